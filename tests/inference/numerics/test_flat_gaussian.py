"""Gaussian pieces of a flat vector against torch.distributions."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal, Normal

from ppl.inference.numerics import flat_gaussian as fg

PLATES, D, RANK, K = (2,), 3, 2, 4
FAMILIES = ("mean_field", "low_rank", "full_rank")


def made(family):
    piece = fg.Piece("x", PLATES, D, family, RANK, offset=5)
    theta = 0.5 * torch.randn(2, 5 + piece.size, dtype=torch.float64)
    return piece, fg.views(piece, theta), theta


def law(piece, at):
    """The same Gaussian, ``[R, 1, *plates, 1]`` batches."""
    loc = at.loc[:, None, :, None]
    if piece.family == "mean_field":
        return torch.distributions.Independent(Normal(loc, at.raw.exp()[:, None, :, None]), 1)
    if piece.family == "low_rank":
        diagonal = (2 * at.raw).exp()[:, None, :, None]
        return LowRankMultivariateNormal(loc, at.extra[:, None, :, None], diagonal)
    return MultivariateNormal(loc, scale_tril=fg.roots(piece, at)[:, None, :, None])


@pytest.mark.parametrize("family", FAMILIES)
def test_densities_are_those_of_torch(family):
    piece, at, _ = made(family)
    v = torch.randn(2, 3, *PLATES, K, D, dtype=torch.float64)
    assert torch.allclose(fg.log_density(piece, at, v), law(piece, at).log_prob(v))


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_have_the_moments_that_are_reported(family):
    piece, at, theta = made(family)
    n = 40_000
    noise = fg.noise(piece, (2, 2), n, theta, torch.Generator().manual_seed(0))
    v = fg.sample(piece, at, noise)
    assert v.shape == (2, 2, *PLATES, n, D)
    apart = (v.mean((1, 3)) - at.loc) / fg.sds(piece, at)
    assert float(apart.abs().max()) < 1e-10  # opposite pairs
    flat = v.movedim(1, 2).flatten(2, 3)
    assert torch.allclose(flat.std(2), fg.sds(piece, at), rtol=0.02)
    root = fg.roots(piece, at)
    own = torch.diag_embed((2 * at.raw).exp()) if family == "low_rank" else 0.0
    centred = flat - flat.mean(2, keepdim=True)
    found = centred.mT @ centred / flat.shape[2]
    assert torch.allclose(found, root @ root.mT + own, atol=0.05, rtol=0.05)


def test_pieces_share_a_vector_without_overlap():
    piece, _, theta = made("full_rank")
    assert theta.shape[-1] == piece.offset + piece.size
    assert piece.locations.stop == piece.raws.start
    assert fg.unit(piece, theta).shape == (2, piece.size)
