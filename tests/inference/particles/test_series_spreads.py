"""Spreads found at the mode of their marginal posterior, as a start for hierarchical models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from ppl import (
    HalfNormal,
    Markov,
    NegativeBinomial,
    Normal,
    latent,
    model,
    observe,
    plate,
)
from ppl.backend import Settings
from ppl.inference.particles.cheap import cheap_draws
from ppl.inference.particles.density import joint_density
from ppl.inference.particles.spreads import Held, held_latents, hold, scorer
from ppl.inference.qem import QEM, prepare
from ppl.streams import Streams

EFFECTS = np.array([2.1, -1.4, 0.3, 3.2, -2.7, 1.1, 0.2, -0.9, 1.8, -3.0, 0.6, 2.4])


@model
def schools():
    middle = latent("middle", Normal(0.0, 5.0))
    log_spread = latent("log_spread", Normal(-2.0, 2.0))
    with plate("school"):
        effect = latent("effect", Normal(middle, log_spread.exp()))
        observe("y", Normal(effect, 0.5))


@model
def positive():
    spread = latent("spread", HalfNormal(3.0))
    with plate("school"):
        observe("y", Normal(latent("effect", Normal(0.0, spread)), 0.5))


@model
def counts():
    scale_mean = latent("scale_mean", Normal(-3.0, 0.5))
    with plate("series"):
        first = latent("first", Normal(3.0, 1.0))
        scale = latent("scale", Normal(scale_mean, 0.3))
        size = latent("size", Normal(0.0, 1.0))
        with plate("time", ordered=True):
            path = Markov(Normal(first, scale.exp()), lambda last: Normal(last, scale.exp()))
            x = latent("x", path)
            observe("y", NegativeBinomial(total_count=size.exp(), logits=x - size))


def draws_of(program, data, method="laplace"):
    problem = prepare(program.bind(data), QEM(start=method), Settings(Streams(0)))
    return cheap_draws(problem)


def marginal_of_log_spread():
    """Mean and sd of log_spread, by quadrature: effects and middle are integrated in closed form."""

    def log_density(s):
        cov = 25.0 * np.ones((12, 12)) + (math.exp(2 * s) + 0.25) * np.eye(12)
        return stats.multivariate_normal(np.zeros(12), cov).logpdf(EFFECTS) + stats.norm(
            -2, 2
        ).logpdf(s)

    top = log_density(0.7)
    moments = [
        integrate.quad(lambda s, k=k: s**k * math.exp(log_density(s) - top), -6, 5, limit=200)[0]
        for k in range(3)
    ]
    mean = moments[1] / moments[0]
    return mean, math.sqrt(moments[2] / moments[0] - mean**2)


def test_which_latents_are_held():
    assert held_latents(schools.graph({"y": EFFECTS})) == ("log_spread",)
    assert held_latents(positive.graph({"y": EFFECTS})) == ("spread",)
    # What stands in the laws of spreads alone goes with them; first states and chains do not.
    assert held_latents(counts.graph({"y": [[1.0]]})) == ("scale_mean", "scale", "size")


@pytest.mark.parametrize("method", ["laplace", "gbp"])
def test_the_mode_is_that_of_the_marginal_posterior(method):
    """The joint mode has no spread at all: its density grows without bound there, up to the prior's fall."""
    mean, sd = marginal_of_log_spread()
    draws = draws_of(schools, {"y": EFFECTS}, method)
    assert abs(float(draws["log_spread"].mean()) - mean) < 0.25 * sd
    assert abs(math.log(float(draws["log_spread"].std()) / sd)) < 0.2
    shrunk = np.exp(2 * mean) / (np.exp(2 * mean) + 0.25)
    middle = float(draws["middle"].mean())
    assert np.allclose(draws["effect"].mean(0), middle + shrunk * (EFFECTS - middle), atol=0.1)


def test_a_positive_spread_is_found_on_its_own_scale():
    spread = draws_of(positive, {"y": EFFECTS})["spread"]
    assert bool((spread > 0).all()) and 1.3 < float(spread.median()) < 2.5  # root mean square: 1.94


def test_a_prior_that_is_far_off_is_left():
    """Of two modes, noise of the chain or width of the counts, the higher one is taken."""
    generator = np.random.default_rng(0)
    x = 4.0 + np.cumsum(0.5 * generator.normal(size=(20, 15)), 1)
    draws = draws_of(counts, {"y": generator.poisson(np.exp(x)).astype(float)})
    # The prior says -3 +- 0.5, the paths log 0.5; in between because part of them may be noise of the counts.
    assert -1.4 < float(draws["scale_mean"].mean()) < -0.5
    assert np.corrcoef(draws["x"].mean(0).ravel(), x.ravel())[0, 1] > 0.96


def test_scores_are_derivatives_of_the_log_density():
    bound = schools.bind({"y": EFFECTS})
    held = Held(bound, {"log_spread": torch.tensor(0.3, dtype=torch.float64)})
    others = {
        "middle": torch.tensor([0.1, -0.2], dtype=torch.float64),
        "effect": torch.tensor(EFFECTS, dtype=torch.float64) + torch.tensor([[0.2], [-0.3]]),
    }
    free = torch.tensor([0.3], dtype=torch.float64)
    found = scorer(bound, held)(free, others)
    apart = others["effect"] - others["middle"][:, None]
    squares = apart.square().sum(-1) * math.exp(-0.6)
    assert torch.allclose(found.slope[:, 0], squares - 12 - (0.3 + 2.0) / 4)
    assert torch.allclose(found.complete, 2 * squares.mean() + 0.25)
    value = joint_density(bound, ("log_spread",))({**others, "log_spread": free.expand(2)})
    law = stats.norm(others["middle"][:, None], math.exp(0.3))
    expected = law.logpdf(others["effect"]).sum(-1) + stats.norm(-2, 2).logpdf(0.3)
    assert np.allclose(value, expected)


def test_a_held_latent_is_data():
    bound = schools.bind({"y": EFFECTS})
    fixed = hold(bound, {"log_spread": torch.tensor(0.3, dtype=torch.float64)})
    assert [v.name for v in fixed.graph.latents] == ["middle", "effect"]
    assert [v.name for v in bound.graph.latents] == ["middle", "log_spread", "effect"]
