"""Exponents of the weights, outside plates and within them."""

from __future__ import annotations

import warnings

import pytest
import torch

from ppl import Bernoulli, Normal, given, infer, latent, model, observe, plate
from ppl.inference.contract import Layout, LogFactor, PlateSpec, make_plan

POWER = 0.3


@pytest.fixture
def planned():
    """A factor of a root axis, and one of it and an axis within a plate."""
    generator = torch.Generator().manual_seed(0)
    outer = 2 * torch.randn(4, generator=generator, dtype=torch.float64)
    inner = 2 * torch.randn((3, 4, 5), generator=generator, dtype=torch.float64)
    layout = Layout({"p": PlateSpec("p", 3, {})}, {"a": 4, "b": 5}, {"a": (), "b": ("p",)}, (), ())
    factors = [LogFactor(("a",), outer), LogFactor(("p", "a", "b"), inner)]
    plan = make_plan([f.axes for f in factors], layout)
    root = (outer + POWER * inner.logsumexp(-1).sum(0)).softmax(0)
    within = torch.einsum("a,pab->pb", root, inner.softmax(-1))
    pairs = torch.einsum("a,pab->pab", root, inner.softmax(-1))
    return plan, factors, root, within, pairs


def test_a_power_tempers_what_plates_say_and_not_what_happens_in_them(planned):
    plan, factors, root, within, pairs = planned
    _, found = plan.marginals(factors, [("a", "b")], power=POWER)
    torch.testing.assert_close(found["a"], root, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found["b"], within, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found["a", "b"], pairs, rtol=1e-12, atol=1e-14)


def test_draws_follow_the_tempered_weights(planned):
    plan, factors, root, within, _ = planned
    n = 40_000
    drawn = plan.draw(factors, n, torch.Generator().manual_seed(1), power=POWER)
    shares = torch.bincount(drawn["a"], minlength=4) / n
    assert float((shares - root).abs().max()) < 4 * (0.25 / n) ** 0.5
    for p in range(3):
        shares = torch.bincount(drawn["b"][:, p], minlength=5) / n
        assert float((shares - within[p]).abs().max()) < 4 * (0.25 / n) ** 0.5


@model
def many_slopes(n: int = 60):
    slopes = latent("slopes", Normal(0.0, 3.0), shape=n)
    with plate("row"):
        observe("y", Bernoulli(logits=(slopes * given("x")).sum(-1)))


def test_too_few_effective_particles_soften_the_last_weights_and_say_so():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((200, 60), generator=generator, dtype=torch.float64)
    y = (torch.rand(200, generator=generator) < 0.5).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = infer(
            many_slopes, {"x": x, "y": y}, method="qem", seed=0, max_iters=3, final_particles=100
        )
    outside, within = posterior.diagnostics.notes["exponents of the last weights"]
    assert 0 < outside < 1 and within == 1.0  # the only latent lies outside all plates
    assert any("tempered" in w for w in posterior.diagnostics.warnings)
    # The diagnostics are those of the posterior's own weights.
    assert float(posterior.diagnostics.ess["slopes"].min()) < 40
    points = posterior.marginals["slopes"]
    assert float((1 / points.weights.square().sum(0)).min()) > 40
    drawn = posterior.samples(2000, seed=0)["slopes"]
    spread = posterior.sd("slopes")
    assert float(((drawn.mean(0) - posterior.mean("slopes")) / spread).abs().max()) < 0.5
