"""Mixtures of Gaussians against a direct evaluation."""

from __future__ import annotations

import pytest
import torch

from ppl import marginals as mg
from ppl.manifolds import MANIFOLDS


def test_mixture_of_gaussians_has_moments_and_quantiles():
    loc = torch.tensor([[0.0, 1.0], [4.0, -1.0], [40.0, 0.0]], dtype=torch.float64)
    scale = torch.tensor([[1.0, 0.1], [0.5, 2.0], [0.01, 1.0]], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    mixture = mg.GaussianMixture(loc, scale, weights)
    mean = weights @ loc
    torch.testing.assert_close(mg.mean(mixture), mean)
    torch.testing.assert_close(mg.sd(mixture), (weights @ (scale**2 + (loc - mean) ** 2)).sqrt())
    levels = torch.tensor([0.01, 0.5, 0.79, 0.81, 0.99], dtype=torch.float64)
    found = mg.quantile(mixture, levels)
    below = torch.special.ndtr((found.unsqueeze(1) - loc) / scale)
    reached = torch.einsum("s,qse->qe", weights, below)
    torch.testing.assert_close(reached, levels.unsqueeze(-1).expand(5, 2), atol=1e-9, rtol=0)


def test_the_ends_of_a_mixture_are_infinite():
    one = torch.ones(2, dtype=torch.float64)
    ends = mg.quantile(mg.GaussianMixture(one, one, one / 2), torch.tensor([0.0, 1.0]))
    assert ends.tolist() == [-torch.inf, torch.inf]


# ---- Gaussian vectors, also on groups -----------------------------------------------------------


def spd(*shape):
    root = torch.randn(*shape, shape[-1], dtype=torch.float64)
    return root @ root.mT + 0.1 * torch.eye(shape[-1], dtype=torch.float64)


def test_a_joint_gaussian_keeps_the_covariance_of_an_event():
    m = mg.JointGaussian(torch.randn(5, 2, 3, dtype=torch.float64), spd(5, 6))
    variance = m.covariance.diagonal(dim1=-2, dim2=-1).reshape(5, 2, 3)
    torch.testing.assert_close(mg.mean(m), m.loc)
    torch.testing.assert_close(mg.sd(m), variance.sqrt())
    torch.testing.assert_close(mg.entry_sd(m), variance.sqrt())
    found = mg.quantile(m, torch.tensor([0.5, 0.975], dtype=torch.float64))
    torch.testing.assert_close(found[0], m.loc)
    torch.testing.assert_close(found[1], m.loc + 1.959963984540054 * variance.sqrt())
    torch.testing.assert_close(mg.covariance(m, 2), m.covariance)
    draws = mg.draw(m, 20000, torch.Generator().manual_seed(0)).reshape(20000, 5, 6)
    off = draws - m.loc.reshape(5, 6)
    empirical = torch.einsum("sei,sej->eij", off, off) / len(off)
    size = m.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    error = (empirical - m.covariance).abs() / (size.unsqueeze(-1) * size.unsqueeze(-2))
    assert float(error.max()) < 0.05


@pytest.mark.parametrize("manifold", list(MANIFOLDS.values()))
def test_on_a_group_spread_is_in_tangent_and_quantiles_in_stored_numbers(manifold):
    loc = manifold.exp(torch.randn(4, manifold.dims, dtype=torch.float64))
    m = mg.JointGaussian(loc, 1e-8 * spd(4, manifold.dims), manifold.name)
    assert mg.sd(m).shape == (4, manifold.dims)
    draws = mg.draw(m, 20000, torch.Generator().manual_seed(0))
    assert bool(manifold.support.check(draws).all())
    torch.testing.assert_close(mg.entry_sd(m), draws.std(0), rtol=0.03, atol=1e-9)
    low, high = mg.quantile(m, torch.tensor([0.1, 0.9], dtype=torch.float64))
    share = ((draws > low) & (draws < high)).double().mean(0)
    # a quaternion's entry may not move at all at first order
    moving = mg.entry_sd(m) > 1e-2 * mg.sd(m).amax()
    assert float((share[moving] - 0.8).abs().max()) < 0.02


def test_covariances_of_points_and_of_single_numbers():
    points = torch.randn(100, 3, 2, dtype=torch.float64)
    weights = torch.rand(100, 3, dtype=torch.float64)
    weights = weights / weights.sum(0)
    found = mg.covariance(mg.Weighted(points, weights), 1)
    expected = torch.stack(
        [torch.cov(points[:, i].T, aweights=weights[:, i], correction=0) for i in range(3)]
    )
    torch.testing.assert_close(found, expected)
    one = mg.covariance(mg.Gaussian(torch.zeros(3), torch.full((3,), 2.0)), 0)
    assert one.tolist() == [[[4.0]]] * 3
    with pytest.raises(ValueError, match="only the variances"):
        mg.covariance(mg.Gaussian(torch.zeros(3), torch.ones(3)), 1)
