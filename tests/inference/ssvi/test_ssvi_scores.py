"""Removal scores: check values, draws, quadrature, and which of them give the same order."""

from __future__ import annotations

import math

import pytest
import torch

from ppl.inference.ssvi.scores import (
    REMOVAL,
    Members,
    evidence,
    folded_moments,
    log_mean_exp,
    mean_abs,
    snr,
    snr_exp,
)


def members(n, scale=1.0, dtype=torch.float64):
    mean = torch.randn(n, dtype=dtype) * scale
    sd = torch.rand(n, dtype=dtype).add(0.05) * scale
    return Members(mean, sd, torch.zeros(n, dtype=dtype), torch.rand(n, dtype=dtype))


@pytest.mark.parametrize(
    ("r", "expected", "ratio"),
    [(0.0, 0.797885, 1.323608), (1.0, 1.166631, 1.459461), (3.0, 3.000764, 3.007669)],
)
def test_check_values(r, expected, ratio):
    mean, variance = folded_moments(torch.tensor(-r).double(), torch.tensor(1.0).double())
    assert float(mean) == pytest.approx(expected, abs=5e-7)
    assert float(mean / variance.sqrt()) == pytest.approx(ratio, abs=5e-7)


def test_folded_moments_are_those_of_draws():
    for mean, sd in [(0.3, 1.0), (-2.0, 0.7), (0.0, 2.0)]:
        draws = (mean + sd * torch.randn(10**6, dtype=torch.float64)).abs()
        found = folded_moments(torch.tensor(mean).double(), torch.tensor(sd).double())
        assert float(found[0]) == pytest.approx(float(draws.mean()), abs=5e-3 * sd)
        assert float(found[1]) == pytest.approx(float(draws.var()), rel=1e-2)


def test_folded_moments_are_stable_far_out():
    mean, sd = torch.tensor([1e4, 3.0]), torch.tensor([1.0, 1e-8])
    expected, variance = folded_moments(mean, sd)
    torch.testing.assert_close(expected, mean)
    torch.testing.assert_close(variance, sd.square())


@pytest.mark.parametrize("lam", [0.5, 1.0, 3.0])
def test_mean_exp_against_quadrature(lam):
    mean, sd = torch.tensor([-1.2, 0.0, 2.0]).double(), torch.tensor([0.4, 1.0, 0.3]).double()
    z = torch.linspace(-14, 14, 200_001, dtype=torch.float64)
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    values = torch.exp(lam * (mean[:, None] + sd[:, None] * z).abs())
    first, second = (torch.trapezoid(v * density, z) for v in (values, values.square()))
    torch.testing.assert_close(log_mean_exp(mean, sd, lam), first.log())
    torch.testing.assert_close(
        snr_exp(mean, sd, lam), first / (second - first.square()).sqrt(), rtol=1e-7, atol=0
    )


def test_snr_of_the_absolute_value_orders_as_snr():
    m = members(10_000)
    mean, variance = folded_moments(m.mean, m.sd)
    assert torch.equal((mean / variance.sqrt()).argsort(), snr(m.mean, m.sd).argsort())
    assert torch.equal(REMOVAL["snr_abs"](m), REMOVAL["snr"](m))


def _ranks(x):
    return x.argsort().argsort().double()


def _rank_correlation(x, y):
    return float(torch.corrcoef(torch.stack([_ranks(x), _ranks(y)]))[0, 1])


def test_exponential_scores_of_small_weights_order_by_size_and_by_spread():
    m = members(2000, scale=1e-2)
    spread = folded_moments(m.mean, m.sd)[1].sqrt()
    assert _rank_correlation(log_mean_exp(m.mean, m.sd, 1.0), mean_abs(m.mean, m.sd)) > 0.9999
    assert _rank_correlation(snr_exp(m.mean, m.sd, 1.0), -spread) > 0.999


def test_exponential_scores_have_no_scale_by_default():
    m = members(500)
    small = m._replace(mean=1e-3 * m.mean, sd=1e-3 * m.sd)
    for name in ("mean_exp", "snr_exp"):
        torch.testing.assert_close(REMOVAL[name](m), REMOVAL[name](small))


def test_evidence_of_a_normal_prior_is_the_formula():
    m, s = members(50), 0.7
    log_prior = torch.distributions.Normal(0.0, s).log_prob(torch.zeros(50).double())
    expected = snr(m.mean, m.sd).square() - torch.log(s**2 / m.sd.square())
    torch.testing.assert_close(evidence(m.mean, m.sd, log_prior), expected)


def test_evidence_is_what_a_model_without_the_weight_loses():
    # y ~ Normal(theta x, 1), theta ~ Normal(0, s): closed form of log p(y) - log p(y | theta = 0).
    x, y, s = torch.randn(20).double(), torch.randn(20).double(), 1.3
    precision = x.square().sum() + 1 / s**2
    mean, sd = (x @ y) / precision, precision.rsqrt()
    with_weight = torch.distributions.MultivariateNormal(
        torch.zeros(20).double(), torch.eye(20).double() + s**2 * torch.outer(x, x)
    ).log_prob(y)
    without = torch.distributions.Normal(0.0, 1.0).log_prob(y).sum()
    log_prior = torch.distributions.Normal(0.0, s).log_prob(torch.tensor(0.0).double())
    torch.testing.assert_close(evidence(mean, sd, log_prior), 2 * (with_weight - without))


@pytest.mark.parametrize("name", REMOVAL)
def test_every_score_is_finite_at_extremes(name):
    mean = torch.tensor([0.0, 1e-8, 1.0, -50.0])
    sd = torch.tensor([1e-6, 1.0, 1e-6, 1e-3])
    found = REMOVAL[name](Members(mean, sd, torch.zeros(4), torch.rand(4)))
    assert bool(found.isfinite().all())
