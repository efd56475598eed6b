"""Covariates that are parameters of laws are checked when data is bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ppl import DataError, MultivariateNormal, Normal, factor, given, latent, model, observe, plate


@model
def measured(robust=False):
    mu = latent("mu", Normal(0.0, 5.0))
    with plate("i"):
        law = Normal(mu, given("sd"))
        observe("y", law.robust("huber", 1.0) if robust else law)


@model
def tied():
    with plate("i"):
        x = latent("x", Normal(torch.zeros(2), 10.0))
        factor("tie", MultivariateNormal(x, precision_matrix=given("info")), at=torch.ones(2))


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_must_be_positive(scale, robust):
    """A negative scale had the means of a positive one, and nobody said so."""
    program = measured(robust=robust)
    program.bind({"y": np.arange(3.0), "sd": np.ones(3)})
    with pytest.raises(
        DataError, match=r"'sd' is the .*scale of .* 1 of 3 are not, the first at i 1"
    ):
        program.bind({"y": np.arange(3.0), "sd": np.array([1.0, scale, 1.0])})


@pytest.mark.parametrize("info", [[[1.0, 0.0], [0.0, 0.0]], [[1.0, 2.0], [2.0, 1.0]]])
def test_a_precision_must_be_positive_definite(info):
    with pytest.raises(DataError, match="precision_matrix of MultivariateNormal.*at i 0"):
        tied.bind({"info": np.array([info] * 3)})
