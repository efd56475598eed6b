"""Every closed channel: the law that a user writes picks it, and it agrees with quadrature over the same law."""

from __future__ import annotations

import pytest
import torch

from ppl import (
    Bernoulli,
    Categorical,
    Censored,
    Delta,
    Laplace,
    Normal,
    Poisson,
    StudentT,
    dot,
    given,
    infer,
    latent,
    model,
    observe,
    plate,
)
from ppl.inference.amp import outcomes

M, N = 40, 10
NDTR = torch.special.ndtr


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A = normal(M, N) / N**0.5
Z = A @ (2.0 * normal(N, seed=1))
SEEN = Z + 0.3 * normal(M, seed=2)


def seen_through(law):
    @model
    def program():
        row, coef = plate("row"), plate("coef")
        with coef:
            x = latent("x", Normal(0.0, 2.0))
        with row, coef:
            a = given("a")
        with row:
            observe("y", law(dot(a, x, over=coef)))

    return program


def ordered(z, cuts, sd, cdf=NDTR):
    """Categories by cut points of a noisy score."""
    below = [cdf((c - z) / sd) for c in cuts]
    inner = [high - low for low, high in zip(below, below[1:], strict=False)]
    return Categorical(torch.stack([below[0], *inner, 1 - below[-1]]))


def steps(z):
    """Categories of a score without noise."""
    low, high = (z < -1.0).double(), (z >= 1.0).double()
    return Categorical(torch.stack([low, 1 - low - high, high]))


def category(score, *cuts):
    return sum((score > c).long() for c in cuts)


# name: law of the predictor, data, closed rule
CHANNELS = {
    "normal": (lambda z: Normal(z, 0.3), SEEN, "GaussianNoise"),
    "probit": (lambda z: Bernoulli(NDTR(z / 0.3)), SEEN > 0, "Probit"),
    "probit of failure": (lambda z: Bernoulli(NDTR(-z / 0.3)), SEEN <= 0, "Probit"),
    "logistic": (lambda z: Bernoulli(logits=z), SEEN > 0, "Logistic"),
    "counts": (lambda z: Poisson(z.exp()), SEEN.exp().round(), "Poisson"),
    "sign": (lambda z: Bernoulli((z > 0).double()), Z > 0, "Probit"),
    "rectified": (lambda z: Normal(z.relu(), 0.3), Z.relu() + SEEN - Z, "ReLU"),
    "modulus": (lambda z: Normal((1.0 + z).abs(), 0.3), (1.0 + Z).abs() + SEEN - Z, "Modulus"),
    "censored": (
        lambda z: Censored(Normal(z, 0.3), low=-1.0, high=1.0),
        SEEN.clamp(-1, 1),
        "Censored",
    ),
    "ordinal": (
        lambda z: ordered(z, (-1.0, 0.5, 2.0), 0.3),
        category(SEEN, -1, 0.5, 2),
        "Interval",
    ),
    "student": (lambda z: StudentT(4.0, z, 0.3), SEEN, "AdditiveNoise"),
    "laplace noise": (lambda z: Laplace(z, 0.3), SEEN, "AdditiveNoise"),
}


@pytest.mark.parametrize("name", CHANNELS)
def test_the_closed_rule_is_picked_and_agrees_with_quadrature(name, monkeypatch):
    law, y, rule = CHANNELS[name]
    fit = {"method": "amp", "tol": 1e-7, "variant": "gamp", "damping": 0.4}
    closed = infer(seen_through(law), {"a": A, "y": y.double()}, **fit)
    assert f"y: {rule}" in closed.diagnostics.notes["rules"]
    monkeypatch.setattr(outcomes, "_kind", lambda outcome, params: ("quadrature", None))
    slow = infer(seen_through(law), {"a": A, "y": y.double()}, **fit)
    assert "y: Quadrature" in slow.diagnostics.notes["rules"]
    torch.testing.assert_close(closed.mean("x"), slow.mean("x"), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(closed.sd("x"), slow.sd("x"), rtol=1e-4, atol=1e-4)
    assert closed.log_evidence.value == pytest.approx(slow.log_evidence.value, rel=1e-5)


EXACT = {
    "sign": (lambda z: Bernoulli((z > 0).double()), lambda z: Bernoulli(NDTR(z / 1e-4)), Z > 0),
    "quantised": (steps, lambda z: ordered(z, (-1.0, 1.0), 1e-4), category(Z, -1.0, 1.0)),
    "rectified": (
        lambda z: Delta(z.relu()),
        lambda z: Censored(Normal(z, 1e-4), low=0.0),
        Z.relu(),
    ),
    "modulus": (lambda z: Delta(z.abs()), lambda z: Normal(z.abs(), 1e-4), Z.abs()),
}


@pytest.mark.parametrize("name", EXACT)
def test_outcomes_without_noise_are_the_limit_of_little_noise(name):
    exact, noisy, y = EXACT[name]
    limit = infer(seen_through(exact), {"a": A, "y": y.double()}, method="amp", variant="gamp")
    near = infer(seen_through(noisy), {"a": A, "y": y.double()}, method="amp", variant="gamp")
    torch.testing.assert_close(limit.mean("x"), near.mean("x"), rtol=0, atol=2e-3)
    assert "Quadrature" not in limit.diagnostics.notes["rules"]


def test_the_sign_itself_may_be_the_outcome():
    fits = [
        infer(seen_through(law), {"a": A, "y": y.double()}, method="amp", variant="gamp")
        for law, y in ((lambda z: Delta(z.sign()), Z.sign()), (EXACT["sign"][0], Z > 0))
    ]
    torch.testing.assert_close(fits[0].mean("x"), fits[1].mean("x"))


def test_an_ordinal_law_with_another_link_is_integrated():
    law = lambda z: ordered(z, (-1.0, 1.0), 0.3, torch.sigmoid)  # noqa: E731
    with pytest.warns(UserWarning, match="not converged"):
        found = infer(
            seen_through(law), {"a": A, "y": category(SEEN, -1, 1)}, method="amp", max_iters=2
        )
    assert "y: Quadrature" in found.diagnostics.notes["rules"]


def test_intervals_of_rows_may_differ():
    """Interval-censored rows: below, within or above an interval of one's own."""
    low = normal(M, seed=4) - 1.0
    high = low + 2.0

    @model
    def program():
        row, coef = plate("row"), plate("coef")
        with coef:
            x = latent("x", Normal(0.0, 2.0))
        with row, coef:
            a = given("a")
        with row:
            z = dot(a, x, over=coef)
            observe("y", ordered(z, (given("low"), given("high")), 0.3))

    y = (SEEN > low).long() + (SEEN > high).long()
    data = {"a": A, "y": y, "low": low, "high": high}
    found = infer(program, data, method="amp")
    assert "y: Interval" in found.diagnostics.notes["rules"]
    assert float((A @ found.mean("x") - Z).square().mean() / Z.square().mean()) < 0.2


@pytest.mark.parametrize("name", ["ordinal", "rectified", "counts"])
def test_glm_vamp_is_not_refused_and_gamp_does_not_circle(name):
    """The first sweep's beliefs agree by knowing nothing, which must not be what later sweeps are held to."""
    law, y, _ = CHANNELS[name]
    found = [
        infer(seen_through(law), {"a": A, "y": y.double()}, method="amp", variant=variant)
        for variant in ("vamp", "gamp")
    ]
    for posterior in found:
        assert posterior.diagnostics.converged
        assert float(posterior.trace["change"][-1]) < 1e-4
    gap = (found[0].mean("x") - found[1].mean("x")).abs() / found[1].sd("x")
    assert float(gap.max()) < 0.1  # of two approximations, at 40 rows
