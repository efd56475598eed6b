"""Cholesky factors of singular covariances, and weighted moments against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ppl.inference.numerics.linalg import safe_cholesky, symmetrise, weighted_moments


def test_safe_cholesky_changes_only_the_elements_that_fail():
    good = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    singular = torch.ones(2, 2, dtype=torch.float64)
    chol = safe_cholesky(torch.stack((good, singular, torch.zeros_like(good))))
    assert torch.equal(chol[0], torch.linalg.cholesky(good))
    torch.testing.assert_close(chol[1] @ chol[1].mT, singular, rtol=1e-12, atol=0.0)
    assert (chol[2].diagonal() > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_safe_cholesky_of_fewer_particles_than_dimensions(dtype):
    z = torch.randn(20, 3, 8, dtype=dtype)
    _, cov = weighted_moments(z, torch.full((20, 3), 1 / 3, dtype=dtype))
    chol = safe_cholesky(cov)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(chol @ chol.mT, cov, rtol=tolerance, atol=tolerance)


def test_safe_cholesky_commutes_with_a_change_of_units():
    singular = torch.ones(2, 2, dtype=torch.float64)
    units = torch.tensor([1.0, 1024.0], dtype=torch.float64)
    scaled = safe_cholesky(units[:, None] * singular * units)
    torch.testing.assert_close(scaled, units[:, None] * safe_cholesky(singular))


@pytest.mark.parametrize("bad", [-1.0, float("nan")], ids=["indefinite", "nan"])
def test_safe_cholesky_refuses_what_is_not_a_covariance(bad):
    matrix = torch.eye(2, dtype=torch.float64).repeat(3, 1, 1)
    matrix[1, 0, 0] = bad
    with pytest.raises(torch.linalg.LinAlgError, match="1 of 3"):
        safe_cholesky(matrix)


def test_weighted_moments_are_those_of_numpy():
    z, w = torch.randn(4, 30, 3, dtype=torch.float64), torch.randn(4, 30).double().softmax(-1)
    mean, cov = weighted_moments(z, w)
    for i in range(4):
        np.testing.assert_allclose(mean[i], np.average(z[i], axis=0, weights=w[i]))
        expected = np.cov(z[i].numpy().T, aweights=w[i].numpy(), ddof=0)
        np.testing.assert_allclose(cov[i], expected, atol=1e-14)


def test_weighted_moments_far_from_zero_keep_their_digits():
    z, w = torch.randn(50, 2, dtype=torch.float64), torch.full((50,), 0.02, dtype=torch.float64)
    _, near = weighted_moments(z, w)
    _, far = weighted_moments(z + 1e6, w)
    torch.testing.assert_close(far, near, rtol=1e-8, atol=1e-9)


def test_symmetrise():
    matrix = torch.randn(3, 4, 4, dtype=torch.float64)
    assert torch.equal(symmetrise(matrix), symmetrise(matrix).mT)
