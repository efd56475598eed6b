"""Marginals of single elements: exact moments, quantiles inside the support, files."""

from __future__ import annotations

import pytest
import torch

from ppl import (
    Bernoulli,
    Beta,
    DataError,
    Exponential,
    Gamma,
    HalfNormal,
    Laplace,
    Mixture,
    Normal,
    SpikeSlab,
    Truncated,
    Uniform,
    infer,
    latent,
    load,
    model,
    observe,
    plate,
)
from ppl import marginals as mg

# Elements seen directly, through noise of one: every posterior is known by quadrature.
Y = torch.tensor([-6.0, -1.0, 0.0, 0.3, 1.2, 4.0], dtype=torch.float64)
LEVELS = [0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99]

LAWS = {
    "half normal": (lambda: HalfNormal(1.5), 0.0, None),
    "exponential": (lambda: Exponential(0.7), 0.0, None),
    "uniform": (lambda: Uniform(-1.0, 2.0), -1.0, 2.0),
    "truncated": (lambda: Truncated(Normal(0.5, 1.0), low=-0.5, high=1.0), -0.5, 1.0),
    "beta": (lambda: Beta(2.0, 3.0), 0.0, 1.0),
    "gamma": (lambda: Gamma(2.0, 1.5), 0.0, None),
    "laplace": (lambda: Laplace(0.0, 0.8), None, None),
    "mixture": (lambda: Mixture([0.3, 0.7], Normal([-2.0, 1.0], [0.5, 1.0])), None, None),
}


def direct(law):
    @model
    def program():
        with plate("coef"):
            x = latent("x", law())
            observe("y", Normal(x, 1.0))

    return program


@pytest.mark.parametrize("name", LAWS)
def test_moments_and_quantiles_are_those_of_the_product(name):
    law, low, high = LAWS[name]
    found = infer(direct(law), {"y": Y}, method="amp", variant="vamp", damping=0.0)
    quantiles = found.quantile("x", LEVELS)
    assert low is None or float(quantiles.min()) >= low
    assert high is None or float(quantiles.max()) <= high
    # The map is the identity: what the algorithm tells each prior is the datum itself.
    edges = torch.linspace(-12.0 if low is None else low, 12.0 if high is None else high, 400_001)
    x = (0.5 * (edges[1:] + edges[:-1])).double().unsqueeze(-1)
    logs = law().log_prob(x) - 0.5 * (x - Y).square()
    mass = logs.softmax(0)
    mean = (mass * x).sum(0)
    torch.testing.assert_close(found.mean("x"), mean, atol=2e-4, rtol=0)
    sd = (mass * (x - mean).square()).sum(0).sqrt()
    torch.testing.assert_close(found.sd("x"), sd, atol=2e-4, rtol=0)
    below = mass.cumsum(0)
    at = torch.searchsorted(x.flatten(), quantiles).clamp(max=len(x) - 1)
    reached = below.gather(0, at)
    wanted = torch.tensor(LEVELS, dtype=torch.float64).unsqueeze(-1).expand_as(reached)
    torch.testing.assert_close(reached, wanted, atol=6e-3, rtol=0)


@pytest.mark.parametrize("slab", [lambda: Normal(0.0, 2.0), lambda: HalfNormal(2.0)])
def test_a_spike_and_slab_survives_a_file(slab, tmp_path):
    program = direct(lambda: SpikeSlab(0.3, slab()))
    found = infer(program, {"y": Y}, method="amp", variant="vamp")
    assert isinstance(found.marginal("x"), mg.Pieces)
    found.save(tmp_path / "fit.pt")
    again = load(tmp_path / "fit.pt", program)
    for name in ("mean", "sd", "inclusion"):
        torch.testing.assert_close(getattr(again, name)("x"), getattr(found, name)("x"))
    torch.testing.assert_close(again.quantile("x", LEVELS), found.quantile("x", LEVELS))
    draws = found.samples(20_000, seed=3)["x"]
    torch.testing.assert_close(
        draws.quantile(0.9, dim=0), found.quantile("x", 0.9), atol=0.06, rtol=0
    )
    torch.testing.assert_close(
        (draws != 0).double().mean(0), found.inclusion("x"), atol=0.02, rtol=0
    )


def test_a_site_without_a_spike_says_so():
    found = infer(direct(lambda: Normal(0.0, 1.0)), {"y": Y}, method="amp")
    with pytest.raises(DataError, match="no point mass at zero"):
        found.inclusion("x")


def test_a_gate_and_its_factor():
    @model
    def program():
        with plate("coef"):
            on = latent("on", Bernoulli(0.3))
            w = latent("w", Normal(0.0, 2.0))
            observe("y", Normal(on * w, 1.0))

    found = infer(program, {"y": Y}, method="amp", variant="vamp")
    draws = found.samples(20_000, seed=3)["w"]
    torch.testing.assert_close(draws.mean(0), found.mean("w"), atol=0.06, rtol=0)
    torch.testing.assert_close(
        draws.quantile(0.9, dim=0), found.quantile("w", 0.9), atol=0.1, rtol=0
    )
