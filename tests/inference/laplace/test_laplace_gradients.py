"""Gradients through the mode against finite differences and closed forms."""

from __future__ import annotations

import pytest
import torch

from ppl import Bernoulli, Normal, given, infer, latent, model, observe, param, plate
from ppl.errors import DataError
from ppl.inference.laplace import solution

positive = torch.distributions.constraints.positive


@model
def curve():
    w = latent("w", Normal(given("mean"), 1.0))
    sd = param("sd", 0.3, support=positive)
    with plate("sample"):
        observe("y", Normal(w[0] * (w[1] * given("t")).sin(), sd))


@model
def chain():
    node = plate("node", ordered=True)
    with node:
        x = latent("x", Normal(0.0, 2.0))
        observe("y", Normal(x, given("noise")))
    with plate("edge"):
        i, j = given("i", index=node), given("j", index=node)
        observe("z", Normal((x[j] - x[i]).tanh(), 0.5))


@model
def logistic():
    w = latent("w", Normal(given("mean"), 1.0))
    with plate("case"):
        observe("hit", Bernoulli(logits=(w * given("x")).sum(-1)))


def test_gradcheck_by_data_and_params():
    t = torch.linspace(-1, 2, 8, dtype=torch.float64)
    y = (1.3 * (0.8 * t).sin() + 0.2 * torch.randn(8, dtype=torch.float64)).requires_grad_()
    sd = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    mean = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)

    def mode(y, mean, sd):
        return solution(curve, {"t": t, "y": y, "mean": mean}, params={"sd": sd}, tol=1e-10)["w"]

    assert torch.autograd.gradcheck(mode, (y, mean, sd), eps=1e-5, atol=1e-5)


def test_gradcheck_on_a_graph():
    noise = torch.tensor([0.5, 0.4, 0.7, 0.6], dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, dtype=torch.float64, requires_grad=True)
    z = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64, requires_grad=True)

    def mode(noise, y, z):
        data = {"y": y, "noise": noise, "i": [0, 1, 2], "j": [1, 2, 3], "z": z}
        return solution(chain, data, tol=1e-10)["x"]

    assert torch.autograd.gradcheck(mode, (noise, y, z), eps=1e-5, atol=1e-5)


def test_gradcheck_of_a_logistic_regression():
    x = torch.randn(12, 2, dtype=torch.float64, requires_grad=True)
    hit = (torch.rand(12, dtype=torch.float64) < 0.5).double()
    mean = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    mode = lambda x, mean: solution(logistic, {"x": x, "hit": hit, "mean": mean}, tol=1e-10)["w"]  # noqa: E731
    assert torch.autograd.gradcheck(mode, (x, mean), eps=1e-5, atol=1e-5)


def test_data_without_gradients():
    data = {"x": [[1.0, 0.5]], "hit": [1.0], "mean": [0.0, 0.0]}
    found = solution(logistic, data)["w"]
    torch.testing.assert_close(found.detach(), infer(logistic, data, method="laplace").mean("w"))


def test_bad_params_are_refused():
    data = {"t": [0.0, 1.0], "y": [0.0, 1.0], "mean": [1.0, 1.0]}
    with pytest.raises(DataError, match="no param 'scale'"):
        solution(curve, data, params={"scale": torch.tensor(1.0)})
    with pytest.raises(DataError, match="expected shape"):
        solution(curve, data, params={"sd": torch.ones(2)})
