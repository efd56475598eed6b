"""Mixtures of Gaussians against a direct evaluation."""

from __future__ import annotations

import torch

from ppl import marginals as mg


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
