"""Every rule against numerical integration, the derivatives of its own log Z, and a numerical maximum."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from ppl.inference.amp.rules import (
    Gaussian,
    HalfNormal,
    Horseshoe,
    Laplace,
    Quadrature,
    log_normal,
)
from tests.inference.amp.rules.cases import (
    COUNT,
    Case,
    column,
    every_density,
    every_mode,
    every_rule,
    observations,
    uniform,
)

_POINTS = 20_001


def grid(case: Case, r: Tensor, vr: Tensor, points: int = _POINTS) -> Tensor:
    """Even points ``[n, points]`` over all that is within 45 nats of the top of the tilted density.

    Cutting to what matters makes 20,001 points finer than 200,001 on plus and minus 16 deviations.
    """
    least, most = torch.as_tensor(case.low), torch.as_tensor(case.high)
    middle, reach = column(r).clamp(least, most), 16 * column(vr.sqrt())
    even = torch.linspace(0, 1, 2001, dtype=torch.float64)
    low, high = (middle - reach).clamp(min=least), (middle + reach).clamp(max=most)
    for _ in range(3):
        x = low + (high - low) * even
        assert case.log_density is not None
        value = case.log_density(x) + log_normal(x - column(r), column(vr))
        kept = value > value.amax(-1, keepdim=True) - 45.0
        step = x[:, 1:2] - x[:, :1]
        left = torch.where(kept, x, math.inf).amin(-1, keepdim=True) - step
        right = torch.where(kept, x, -math.inf).amax(-1, keepdim=True) + step
        low, high = torch.maximum(low, left), torch.minimum(high, right)
    return low + (high - low) * torch.linspace(0, 1, points, dtype=torch.float64)


def integrate(case: Case, r: Tensor, vr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance, log Z ``[n]`` by the trapezoid rule, atoms exactly."""
    logs, means, variances = [], [], []
    if case.log_density is not None:
        x = grid(case, r, vr)
        weight = case.log_density(x) + log_normal(x - column(r), column(vr))
        weight[:, [0, -1]] -= math.log(2.0)
        top = weight.amax(-1, keepdim=True)
        share = (weight - top).exp_()
        total = share.sum(-1)
        mean = torch.linalg.vecdot(share, x) / total
        means.append(mean)
        variances.append(torch.linalg.vecdot(share, (x - column(mean)).square_()) / total)
        logs.append(top[:, 0] + (total * (x[:, 1] - x[:, 0])).log())
    for place, log_weight in case.atoms:
        means.append(place)
        variances.append(torch.zeros_like(place))
        logs.append(log_weight + log_normal(place - r, vr))
    log_z = torch.stack(logs).logsumexp(0)
    share = (torch.stack(logs) - log_z).exp()
    mean = (share * torch.stack(means)).sum(0)
    spread = torch.stack(variances) + (torch.stack(means) - mean).square()
    return mean, (share * spread).sum(0), log_z


@every_rule
def test_moments_equal_numerical_integration(build: Callable[[], Case]) -> None:
    case, (r, vr) = build(), observations()
    found = case.rule.moments(r, vr)
    mean, variance, log_z = integrate(case, r, vr)
    assert ((found.mean - mean).abs() <= case.tolerance * variance.sqrt()).all()
    torch.testing.assert_close(found.variance, variance, rtol=case.tolerance, atol=0)
    torch.testing.assert_close(found.log_z, log_z, rtol=case.tolerance, atol=case.tolerance)


@every_rule
def test_moments_are_derivatives_of_log_z(build: Callable[[], Case]) -> None:
    case, (r, vr) = build(), observations()
    r.requires_grad_()
    found = case.rule.moments(r, vr)
    (slope,) = torch.autograd.grad(found.log_z.sum(), r, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), r)
    loose = 10 * case.tolerance
    torch.testing.assert_close(found.mean, r + vr * slope, rtol=loose, atol=loose)
    torch.testing.assert_close(found.variance, vr + vr**2 * bend, rtol=loose, atol=loose)


@every_mode
def test_mode_equals_scipy(build: Callable[[], Case]) -> None:
    case, (r, vr) = build(), observations()
    assert case.log_density is not None
    found = case.rule.mode(r, vr)
    x = grid(case, r, vr, 2001)
    value = case.log_density(x) + log_normal(x - column(r), column(vr))
    best, at = value.max(-1)
    for i in range(0, COUNT, 12):

        def objective(z: float, i: int = i) -> float:
            point = torch.full((COUNT, 1), z, dtype=torch.float64)
            assert case.log_density is not None
            tilted = case.log_density(point) + log_normal(point - column(r), column(vr))
            return -float(tilted[i, 0])

        bracket = float(x[i, max(int(at[i]) - 1, 0)]), float(x[i, min(int(at[i]) + 1, 2000)])
        exact = minimize_scalar(
            objective, bounds=bracket, method="bounded", options={"xatol": 1e-10}
        )
        scale = float(vr[i].sqrt())
        assert abs(float(found.mean[i]) - exact.x) < 2e-6 * (1 + scale)
        assert float(found.log_z[i]) >= -exact.fun - 1e-8
    assert (found.log_z >= best - 1e-9).all()


@every_mode
def test_variance_of_the_mode_is_its_slope(build: Callable[[], Case]) -> None:
    case, (r, vr) = build(), observations()
    step = 1e-4 * vr.sqrt()
    above, below = case.rule.mode(r + step, vr).mean, case.rule.mode(r - step, vr).mean
    slope = vr * (above - below) / (2 * step)
    off = (case.rule.mode(r, vr).variance - slope).abs() > 1e-3 * vr
    assert off.sum() <= 2, "only where the maximum jumps or starts to move may the slope differ"


@every_density
def test_log_prob_is_the_density(build: Callable[[], Case]) -> None:
    case = build()
    assert case.log_density is not None
    low = torch.as_tensor(case.low).clamp(min=-3.0)
    high = torch.as_tensor(case.high).clamp(max=3.0)
    x = low + (high - low) * torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    x = x.expand(COUNT, 50)
    found = torch.stack([case.rule.log_prob(x[:, k]) for k in range(50)], -1)
    torch.testing.assert_close(found, case.log_density(x), rtol=1e-7, atol=1e-7)


def test_horseshoe_against_integration_over_its_scale() -> None:
    mean, variance = uniform(-1, 1), uniform(0.05, 2)
    r, vr = observations()
    u = torch.linspace(-40, 40, 20_001, dtype=torch.float64)
    weight = u.exp() * (2 / math.pi) / (1 + (2 * u).exp()) * (u[1] - u[0])
    spread = column(variance) * (2 * u).exp()
    evidence = weight * log_normal(column(r - mean), spread + column(vr)).exp()
    each = spread / (spread + column(vr)) * column(r - mean)
    share = evidence / evidence.sum(-1, keepdim=True)
    expected = mean + (share * each).sum(-1)
    found = Horseshoe(mean, variance).moments(r, vr)
    torch.testing.assert_close(found.mean, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.log_z, evidence.sum(-1).log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vr", [1e-10, 1e-4, 1.0, 1e4, 1e9])
def test_quadrature_finds_the_mass_at_any_scale(vr: float) -> None:
    r = torch.tensor([-30.0, -1.0, 0.0, 0.7, 50.0]).double()
    one = torch.tensor(0.7).double()
    for rule in (Laplace(one), HalfNormal(one), Gaussian(one, one)):
        by_nodes = Quadrature(rule.log_prob, low=0.0 if type(rule) is HalfNormal else -math.inf)
        expected, found = rule.moments(r, torch.tensor(vr)), by_nodes.moments(r, torch.tensor(vr))
        off = (found.mean - expected.mean).abs() / expected.variance.sqrt()
        assert off.max() < 1e-4
        torch.testing.assert_close(found.variance, expected.variance, rtol=1e-4, atol=0)
