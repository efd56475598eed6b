"""Gaussian laws as whitened residuals: what scales them is computed once where nothing learnable is in it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl.distributions import ConcentratedNormal, Distribution, MultivariateNormal, Normal
from ppl.distributions.multivariate import covariance_of, times_matrix, whitening

GAUSSIAN = (Normal, MultivariateNormal, ConcentratedNormal)
_HALF_LOG_2PI = 0.9189385332046727


class Whitener(NamedTuple):
    """``residual = difference * factor`` or ``difference @ factor``, and the log-density at zero residual."""

    factor: Tensor  # [1 | F, *batch, ...]
    is_matrix: bool
    log_norm: Tensor  # [1 | F, *batch]


def difference(family: Distribution, value: Tensor, loc: Tensor) -> Tensor:
    """What the spread scales: ``value - loc``, or the tangent vector from ``loc`` to ``value``."""
    if isinstance(family, ConcentratedNormal):
        return family.manifold.local(loc, value)
    return value - loc


def whitener(family: Distribution, name: str, spread: Tensor, mask: Tensor | None) -> Whitener:
    """The whitener of a Gaussian law.

    Args:
        family: Normal, MultivariateNormal or ConcentratedNormal.
        name: of the parameter that ``spread`` is.
        spread: ``[1 | F, *batch, ...]``.
        mask: of a MultivariateNormal ``[F, *batch, d]`` that is there in part: the others are integrated out.
    """
    if isinstance(family, Normal):
        return Whitener(1 / spread, False, -spread.log() - _HALF_LOG_2PI)
    dims = family.manifold.dims if isinstance(family, ConcentratedNormal) else spread.shape[-1]
    if name == "scale":
        log_scale = spread.log().expand(*spread.shape[:-1], dims).sum(-1)
        return Whitener(1 / spread, False, -log_scale - dims * _HALF_LOG_2PI)
    if mask is not None:
        return _partly(covariance_of(name, spread), mask)
    white, log_det = whitening(name, spread)
    return Whitener(white, True, log_det - dims * _HALF_LOG_2PI)


def whitened(how: Whitener, residual: Tensor) -> Tensor:
    """The residual of unit covariance."""
    return times_matrix(residual, how.factor) if how.is_matrix else residual * how.factor


def _partly(covariance: Tensor, mask: Tensor) -> Whitener:
    """Rows and columns of missing entries are those of the identity; their residuals become zero.

    Source: as :func:`ppl.densities.marginal_log_prob`.
    """
    both = mask.unsqueeze(-1) & mask.unsqueeze(-2)
    eye = torch.eye(mask.shape[-1], dtype=covariance.dtype, device=covariance.device)
    white, log_det = whitening("covariance_matrix", torch.where(both, covariance, eye))
    count = mask.sum(-1, dtype=covariance.dtype)
    there = mask.unsqueeze(-1).to(covariance.dtype)
    return Whitener(white * there, True, log_det - count * _HALF_LOG_2PI)


def is_illegal(name: str, spread: Tensor) -> Tensor:
    """Which spreads have no whitener: bool ``[1 | F, *batch]``, with ``[..., d]`` behind for scales of vectors.

    >>> is_illegal("precision_matrix", torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 2.0], [2.0, 1.0]]]))
    tensor([False,  True])
    """
    if name == "scale":
        return ~(spread > 0)
    if name == "scale_tril":
        return ~(spread.diagonal(dim1=-2, dim2=-1) > 0).all(-1)
    return torch.linalg.cholesky_ex(spread).info != 0


def spread_of(family: Distribution) -> tuple[str, Any]:
    """Name of the parameter that scales a Gaussian law, and its rank."""
    leaf = next(x for x in family.leaves() if x.path != "loc")
    return leaf.path, leaf.event_dim


__all__ = ["GAUSSIAN", "Whitener", "difference", "is_illegal", "spread_of", "whitened", "whitener"]
