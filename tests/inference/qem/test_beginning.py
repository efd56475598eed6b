"""A run begins at the prior, or at a cheap fit where the prior is hopeless."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ppl import Markov, Normal, Poisson, latent, model, observe, plate
from ppl.backend import Settings
from ppl.inference.particles.start import first_approximation
from ppl.inference.qem import QEM, init, prepare
from ppl.streams import Streams


@model
def growing():
    """Counts whose prior grows by a factor of a thousand a step: no path of it comes near the data."""
    rate = latent("rate", Normal(7.0, 1.0))
    noise = latent("noise", Normal(-1.0, 0.5))
    with plate("series"):
        size = latent("size", Normal(4.0, 1.0))
        with plate("time", ordered=True):
            law = Normal(size + rate, noise.exp())
            path = Markov(law, lambda last: Normal(last + rate, noise.exp()))
            observe("y", Poisson(latent("x", path).exp()))


@model
def groups():
    level, spread = latent("level", Normal(0.0, 1.0)), latent("spread", Normal(0.0, 1.0))
    with plate("group"):
        mean = latent("mean", Normal(level, spread.exp()))
        with plate("row"):
            observe("y", Normal(mean, 1.0))


def begun(program, data, **options):
    problem = prepare(program.bind(data), QEM(**options), Settings(Streams(0)))
    return problem, init(problem).q


def test_a_good_prior_is_where_it_begins():
    data = {"y": np.random.default_rng(0).normal(size=(4, 5))}
    (problem, found), (_, prior) = begun(groups, data), begun(groups, data, start="prior")
    for axis, proposal in prior.proposals.items():
        assert torch.equal(found.proposals[axis].joint.mean, proposal.joint.mean)
    assert problem.options.start == "auto"


@pytest.mark.parametrize("bridge", [True, False])
def test_a_hopeless_prior_is_left_for_laplace(bridge):
    rng = np.random.default_rng(0)
    x = 5.0 + np.cumsum(0.1 + 0.3 * rng.normal(size=(6, 10)), 1)
    data = {"y": rng.poisson(np.exp(x)).astype(float)}
    problem, found = begun(growing, data, bridge=bridge, paths_up_to=0)
    (chain,) = (b for b in problem.blocks if b.chain)
    mean = found.proposals[chain.axis].joint.mean[..., 1]
    if bridge:
        assert float((mean - torch.as_tensor(x)).abs().max()) < 0.5
    else:  # what the paper does is left as it is
        assert float(mean[:, -1].min()) > 50
        prior = first_approximation(problem).proposals[chain.axis].joint
        assert torch.equal(found.proposals[chain.axis].joint.mean, prior.mean)
