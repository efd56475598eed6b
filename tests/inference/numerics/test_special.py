"""Inverse special functions against their forward functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special as sp

from ppl.inference.numerics import special

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def grid(low: float, high: float, n: int = 4000) -> torch.Tensor:
    return torch.logspace(low, high, n, dtype=torch.float64)


def dirichlet_mean(a: torch.Tensor) -> torch.Tensor:
    """E[log z] of a Dirichlet law, without cancellation for large ``a``."""
    total = a.sum(-1, keepdim=True)
    gap = special.log_minus_digamma(total) - special.log_minus_digamma(a)
    return torch.log(a / total) + gap


def test_log1mexp_and_its_gradient_at_both_ends():
    x = torch.tensor([-1e-300, -1e-8, -0.69, -0.7, -40.0, -800.0], dtype=torch.float64)
    x.requires_grad_()
    found = special.log1mexp(x)
    near, far = np.split(x.detach().numpy(), [4])
    expected = np.concatenate((np.log(-np.expm1(near)), np.log1p(-np.exp(far))))
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-13)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.isfinite().all()


def test_inverse_digamma_undoes_digamma_over_thirty_decades():
    x = grid(-15, 15)
    torch.testing.assert_close(special.inverse_digamma(torch.digamma(x)), x, rtol=3e-13, atol=0.0)


@DTYPES
def test_inverse_digamma_is_positive_and_finite_for_any_real_number(dtype):
    wide = grid(-30, 37)
    y = torch.cat((-wide, torch.zeros(1), wide)).to(dtype)
    y = torch.cat((y, torch.tensor([-torch.inf, torch.inf], dtype=dtype)))
    x = special.inverse_digamma(y)
    assert x.dtype == dtype and x.isfinite().all() and (x > 0).all()


@DTYPES
def test_inverse_digamma_around_the_switch_of_its_start(dtype):
    y = torch.linspace(-5, 25, 2001, dtype=dtype)
    x = special.inverse_digamma(y).double()
    tolerance = 1e-13 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(torch.digamma(x), y.double(), rtol=tolerance, atol=tolerance)


def test_log_minus_digamma_and_its_slope_do_not_jump_where_the_series_takes_over():
    a = torch.tensor([39.999999, 40.000001], dtype=torch.float64)
    for function in (special.log_minus_digamma, special._digamma_slope_gap):
        below, above = function(a)
        assert below.item() == pytest.approx(above.item(), rel=2e-7)
    a = grid(-6, 1.5)
    expected = np.log(a.numpy()) - sp.digamma(a.numpy())
    np.testing.assert_allclose(special.log_minus_digamma(a), expected, rtol=1e-12)


def test_gamma_shape_over_twenty_decades():
    a = grid(-6, 14)
    found = special.gamma_shape(special.log_minus_digamma(a))
    torch.testing.assert_close(found, a, rtol=1e-11, atol=0.0)


@pytest.mark.parametrize("d", [2, 3, 10, 100])
def test_dirichlet_concentration_over_eleven_decades(d):
    a = 10 ** (-4 + 11 * torch.rand(1000, d, dtype=torch.float64))
    mean_log = dirichlet_mean(a)
    found = special.dirichlet_concentration(mean_log)
    # The mean itself rounds at eps, which for an expectation of 1e-11 is a relative 1e-5.
    error = (found / a - 1).abs()
    assert error.max() < 5e-5 and error.median() < 1e-10
    again = dirichlet_mean(found)
    torch.testing.assert_close(again, mean_log, rtol=1e-11, atol=1e-14)


@DTYPES
@pytest.mark.parametrize("d", [2, 5, 50])
def test_dirichlet_concentration_converges_from_any_valid_mean(d, dtype):
    """Random points of the whole region ``sum exp(G) < 1``, far into its corners."""
    spread = 10 ** (-3 + 6 * torch.rand(2000, 1, dtype=torch.float64))
    slack = 10 ** (-5 + 7 * torch.rand(2000, 1, dtype=torch.float64))
    mean_log = (spread * torch.randn(2000, d, dtype=torch.float64)).log_softmax(-1) - slack
    a = special.dirichlet_concentration(mean_log.to(dtype)).double()
    assert a.isfinite().all() and (a > 0).all()
    found = dirichlet_mean(a)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, mean_log, rtol=tolerance, atol=tolerance)


@DTYPES
def test_dirichlet_concentration_of_equal_particles_is_large_and_keeps_the_mean(dtype):
    p = torch.tensor([0.2, 0.3, 0.5], dtype=dtype)
    a = special.dirichlet_concentration(p.log())
    assert a.sum() > 1e4
    torch.testing.assert_close(a / a.sum(), p, rtol=1e-3, atol=0.0)
    corner = special.dirichlet_concentration(torch.tensor([0.0, -torch.inf], dtype=dtype))
    assert corner.isfinite().all() and (corner > 0).all()


def test_bessel_ratio_is_that_of_scipy():
    kappa = grid(-6, 6)
    expected = sp.i1e(kappa.numpy()) / sp.i0e(kappa.numpy())
    np.testing.assert_allclose(special.bessel_ratio(kappa), expected, rtol=1e-13)


@DTYPES
def test_von_mises_concentration_over_eight_decades(dtype):
    kappa = grid(-4, 4)
    resultant = special.bessel_ratio(kappa).to(dtype)
    found = special.von_mises_concentration(resultant)
    assert found.dtype == dtype
    again = special.bessel_ratio(found.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(again, resultant.double(), rtol=10 * eps, atol=8 * eps)
    if dtype == torch.float64:
        torch.testing.assert_close(found, kappa, rtol=1e-10, atol=0.0)


@DTYPES
def test_von_mises_concentration_at_its_ends_is_positive_and_finite(dtype):
    found = special.von_mises_concentration(torch.tensor([0.0, 1e-12, 1.0, 1.1], dtype=dtype))
    assert found.isfinite().all() and (found > 0).all()
    assert found[2] > 1e5
