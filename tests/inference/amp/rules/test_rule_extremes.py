"""Tails, float32, variances from 1e-12 to infinity, batches, and truncated Gaussians to many digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace

import mpmath
import pytest
import torch
from torch import Tensor

from ppl.inference.amp import rules
from ppl.inference.amp.rules.truncation import half_line, hazard, interval
from tests.inference.amp.rules.cases import (
    COUNT,
    Case,
    every_closed,
    every_rule,
    observations,
    uniform,
)

CONCAVE = (  # the variance of a log-concave tilted density is below vr
    rules.Gaussian,
    rules.Laplace,
    rules.Exponential,
    rules.HalfNormal,
    rules.TruncatedGaussian,
    rules.Uniform,
    rules.GaussianNoise,
    rules.Probit,
    rules.Logistic,
    rules.Interval,
    rules.Censored,
    rules.LogConcave,
)


def of_dtype(rule: rules.Rule, dtype: torch.dtype) -> rules.Rule:
    """The same rule with its tensors, also those of a nested rule, in another dtype."""
    own = {f.name: getattr(rule, f.name) for f in fields(rule)}  # type: ignore[arg-type]
    moved = {k: v.to(dtype) for k, v in own.items() if isinstance(v, Tensor)}
    moved |= {k: of_dtype(v, dtype) for k, v in own.items() if isinstance(v, rules.Rule)}
    return replace(rule, **moved)  # type: ignore[type-var]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every_closed
def test_extremes_give_finite_answers(build: Callable[[], Case], dtype: torch.dtype) -> None:
    rule = of_dtype(build().rule, dtype)
    for vr in (1e-12, 1e-6, 1e-2, 1.0, 1e2, 1e6, 1e11, math.inf):
        for size in (0.0, 1.0, 30.0, 1e3):
            r, v = size * uniform(-1, 1).to(dtype), torch.tensor(vr, dtype=dtype)
            found = rule.moments(r, v)
            assert all(part.isfinite().all() for part in found), (vr, size)
            assert (found.variance >= 0).all(), (vr, size)
            assert found.mean.dtype == found.log_z.dtype == found.variance.dtype == dtype
            if isinstance(rule, CONCAVE) and math.isfinite(vr):
                slack = 1e-4 if dtype == torch.float32 else 1e-6
                assert (found.variance <= v * (1 + slack)).all(), (vr, size)


@every_closed
def test_float32_agrees_with_float64(build: Callable[[], Case]) -> None:
    rule, (r, vr) = build().rule, observations()
    narrow = of_dtype(rule, torch.float32)
    exact = of_dtype(narrow, torch.float64).moments(r.float().double(), vr.float().double())
    found = narrow.moments(r.float(), vr.float())
    off = (found.mean.double() - exact.mean).abs() / exact.variance.sqrt().clamp(min=1e-4)
    assert off.max() < 2e-3
    torch.testing.assert_close(found.variance.double(), exact.variance, rtol=5e-3, atol=1e-6)
    torch.testing.assert_close(found.log_z.double(), exact.log_z, rtol=1e-4, atol=1e-3)


@every_rule
def test_leading_axes_are_many_problems_at_once(build: Callable[[], Case]) -> None:
    rule = build().rule
    r, vr = torch.randn(3, 2, COUNT).double(), torch.tensor([0.1, 2.0]).double().reshape(2, 1)
    found = rule.moments(r, vr)
    for i in range(3):
        for j in range(2):
            one = rule.moments(r[i, j], vr[j])
            for a, b in zip(found, one, strict=True):
                assert a.shape == r.shape
                torch.testing.assert_close(a[i, j], b, rtol=1e-10, atol=1e-12)


@every_rule
def test_one_scalar_variance_equals_one_each(build: Callable[[], Case]) -> None:
    rule, r, vr = build().rule, torch.randn(COUNT).double(), torch.tensor(0.7).double()
    one, many = rule.moments(r, vr), rule.moments(r, vr.expand(COUNT).clone())
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def exact_truncation(low: float, high: float) -> tuple[float, float, float]:
    """Log mass relative to the reference point, shift, variance of ``N(0, 1)`` on an interval."""
    with mpmath.workdps(60):
        a, b = mpmath.mpf(low), mpmath.mpf(high)
        reference = min(max(mpmath.mpf(0), a), b)
        mass = mpmath.ncdf(-a) - mpmath.ncdf(-b) if a > 0 else mpmath.ncdf(b) - mpmath.ncdf(a)
        mean = (mpmath.npdf(a) - mpmath.npdf(b)) / mass
        variance = 1 + (a * mpmath.npdf(a) - b * mpmath.npdf(b)) / mass - mean**2
        log_mass = mpmath.log(mass) + reference**2 / 2
        return float(log_mass), float(mean - reference), float(variance)


@pytest.mark.parametrize("t", [-1e4, -40, -5.01, -4.99, -4.01, -3.99, -1, 0, 0.5, 3, 8])
def test_half_line_to_many_digits(t: float) -> None:
    expected = torch.tensor(exact_truncation(-t, 1e6), dtype=torch.float64)
    for dtype, digits in ((torch.float64, 2e-8), (torch.float32, 5e-5)):
        found = torch.stack(half_line(torch.tensor(t, dtype=dtype))).double()
        torch.testing.assert_close(found, expected, rtol=digits, atol=1e-6 if digits > 1e-6 else 0)


@pytest.mark.parametrize(
    ("low", "high"),
    [(-1, 1), (0, 1), (-0.1, 3), (2, 2.5), (2, 6), (5, 5.001), (100, 105), (-3, 8), (-8, -7)]
    + [(-50, -3), (-2, 1.3), (-1.4, 1.5), (0.1, 1.5), (0.2, 1.8), (-1e-9, 1e-9), (30, 30.001)],
)
def test_interval_to_many_digits(low: float, high: float) -> None:
    expected = torch.tensor(exact_truncation(low, high), dtype=torch.float64)
    ends = torch.tensor((low, high), dtype=torch.float64)
    found = torch.stack(interval(*ends, ends[1] - ends[0]))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-24)


def test_infinite_intervals_and_hazards() -> None:
    low = torch.tensor([-math.inf, -math.inf, 0.0, 1e8]).double()
    high = torch.tensor([math.inf, 0.0, math.inf, math.inf]).double()
    found = interval(low, high, high - low)
    h = math.sqrt(2 / math.pi)
    torch.testing.assert_close(found.shift, torch.tensor([0, -h, h, 1e-8]).double())
    torch.testing.assert_close(found.variance[:3], torch.tensor([1, 1 - h * h, 1 - h * h]).double())
    t = torch.tensor([-1e6, -3.0, 40.0]).double()
    torch.testing.assert_close(hazard(t)[:2], torch.tensor([1e6, 3.28309865493044]).double())
    assert hazard(t)[2] < 1e-300


def test_soft_threshold_is_the_mode_of_laplace() -> None:
    r, vr, rate = 3 * torch.randn(100).double(), uniform(0.1, 3, 100), torch.tensor(0.8).double()
    found = rules.Laplace(rate).mode(r, vr)
    expected = r.sign() * (r.abs() - rate * vr).clamp(min=0)
    torch.testing.assert_close(found.mean, expected, rtol=1e-12, atol=1e-15)
    assert torch.equal(found.variance, torch.where(r.abs() > rate * vr, vr, 0.0))


@pytest.mark.parametrize("vp", [1e-3, 0.5, 2.9, 3.1, 10.0, 1e3, 1e7])
def test_logistic_at_every_width_of_the_belief(vp: float) -> None:
    tilt = torch.tensor([-3.0, -1.0, -0.6, -0.4, 0.0, 0.5, 2.0]).double()
    p = torch.cat([tilt * math.sqrt(vp), tilt * min(vp, 1e3)])
    found = rules.Logistic(torch.ones_like(p)).moments(p, torch.tensor(vp).double())
    # The trapezoid rule is exact to rounding for steps below the width of the logistic function.
    reach = 14 * found.variance.sqrt().unsqueeze(-1) + min(vp, 40.0)
    z = found.mean.unsqueeze(-1) + reach * torch.linspace(-1, 1, 400_001, dtype=torch.float64)
    logs = torch.nn.functional.logsigmoid(z) - (z - p.unsqueeze(-1)) ** 2 / (2 * vp)
    share = logs.softmax(-1)
    mean = (share * z).sum(-1)
    variance = (share * (z - mean.unsqueeze(-1)) ** 2).sum(-1)
    log_z = logs.logsumexp(-1) + ((z[:, 1] - z[:, 0]) / math.sqrt(2 * math.pi * vp)).log()
    assert ((found.mean - mean).abs() < 2e-5 * variance.sqrt()).all()
    torch.testing.assert_close(found.variance, variance, rtol=4e-5, atol=0)
    torch.testing.assert_close(found.log_z, log_z, rtol=1e-5, atol=1e-5)
