"""Gaussians in information form against dense algebra."""

from __future__ import annotations

import math

import pytest
import torch

from ppl.inference.numerics.gaussian import (
    Diagonal,
    Gaussian,
    conditional,
    from_moments,
    inverse,
    log_integral,
    marginal,
    moments,
    times,
)

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def positive(*shape: int) -> torch.Tensor:
    root = torch.randn(*shape, shape[-1], dtype=torch.float64)
    return root @ root.mT + torch.eye(shape[-1], dtype=torch.float64)


def gaussian(d: int, *batch: int) -> Gaussian:
    return Gaussian(torch.randn(*batch, d, dtype=torch.float64), positive(*batch, d))


@pytest.mark.parametrize("d", range(2, 13))
def test_marginal_is_the_block_of_the_covariance(d):
    """Algebra: marginal (2) against dense inverse, 2 to 12 dims."""
    joint, keep = gaussian(d, 3), slice(1, 1 + d // 2)
    mean, cov = moments(joint)
    got_mean, got_cov = moments(marginal(joint, keep))
    torch.testing.assert_close(got_mean, mean[..., keep], **TIGHT)
    torch.testing.assert_close(got_cov, cov[..., keep, keep], **TIGHT)


@pytest.mark.parametrize("d", range(2, 13))
def test_conditional_is_the_dense_formula(d):
    """Algebra: conditional against dense inverse."""
    joint, keep = gaussian(d), slice(0, d // 2)
    value = torch.randn(d - d // 2, dtype=torch.float64)
    mean, cov = moments(joint)
    a, b = slice(0, d // 2), slice(d // 2, d)
    gain = cov[a, b] @ torch.linalg.inv(cov[b, b])
    got_mean, got_cov = moments(conditional(joint, keep, value))
    torch.testing.assert_close(got_mean, mean[a] + gain @ (value - mean[b]), **TIGHT)
    torch.testing.assert_close(got_cov, cov[a, a] - gain @ cov[b, a], **TIGHT)


def test_product_then_quotient_changes_nothing():
    """Algebra: product/quotient round trip."""
    first, second = gaussian(4, 5), gaussian(4, 5)
    for got, want in zip((first + second) - second, first, strict=True):
        torch.testing.assert_close(got, want, **TIGHT)
    one, two = (Diagonal(g.eta, g.lam.diagonal(dim1=-2, dim2=-1)) for g in (first, second))
    for got, want in zip((one + two) - two, one, strict=True):
        torch.testing.assert_close(got, want, **TIGHT)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_moving_the_origin_keeps_the_density(kind):
    here, delta = gaussian(3, 2), torch.randn(2, 3, dtype=torch.float64)
    if kind == "diagonal":
        narrow = Diagonal(here.eta, here.lam.diagonal(dim1=-2, dim2=-1))
        here, moved = narrow.full(), narrow.moved(delta).full()
    else:
        moved = here.moved(delta)
    torch.testing.assert_close(moments(moved)[0] + delta, moments(here)[0], **TIGHT)


def test_from_moments_inverts_moments():
    here = gaussian(4, 2)
    for got, want in zip(from_moments(*moments(here)), here, strict=True):
        torch.testing.assert_close(got, want, **TIGHT)


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_log_integral_is_that_of_the_normal(d):
    mean, cov = torch.randn(d, dtype=torch.float64), positive(d)
    law = torch.distributions.MultivariateNormal(mean, cov)
    # The canonical form leaves out the value at the origin.
    want = -law.log_prob(torch.zeros(d, dtype=torch.float64))
    torch.testing.assert_close(log_integral(from_moments(mean, cov)), want, **TIGHT)


@pytest.mark.parametrize("d", [1, 2, 3, 4, 6])
def test_inverse_is_the_dense_one(d):
    lam = positive(50, d)
    found = inverse(lam)
    assert bool(found.proper.all())
    torch.testing.assert_close(found.matrix, torch.linalg.inv(lam), **TIGHT)


@pytest.mark.parametrize("d", [1, 2, 3, 4])
@pytest.mark.parametrize("units", [1.0, 1e-4, 1e5])
def test_inverse_knows_singular_matrices_in_any_units(d, units):
    direction = torch.randn(d, 1, dtype=torch.float64)
    scale = torch.diag(torch.logspace(0, math.log10(units), d, dtype=torch.float64))
    nothing = torch.zeros(d, d, dtype=torch.float64)
    singular = direction @ direction.T if d > 1 else nothing
    lam = torch.stack([scale @ m @ scale for m in (positive(d), singular, nothing)])
    found = inverse(lam)
    assert found.proper.tolist() == [True, False, False]
    torch.testing.assert_close(found.matrix[1], torch.eye(d, dtype=torch.float64))


def test_times_of_scalars_is_that_of_matrices():
    matrix, vector = torch.randn(4, 1, 1), torch.randn(4, 1)
    torch.testing.assert_close(times(matrix, vector), (matrix @ vector[..., None])[..., 0])
