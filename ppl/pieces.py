"""A marginal in pieces: Gaussians, cut where the law has edges, even stretches, and a point mass at zero.

Mean and standard deviation are kept beside the pieces, so that they are exact where the pieces are approximate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.special import log_ndtr

_WIDE = 40.0  # standard deviations beyond which no quantile is looked for
_STEPS = 80  # halvings


class Pieces(NamedTuple):
    """Exactly zero with probability ``1 - share``, else one of ``K`` pieces.

    A piece is a Gaussian cut at ``low`` and ``high``; one of infinite scale is even between its edges.

    >>> one = torch.ones(1)
    >>> spike = Pieces(0.1 * one, 0.3 * one, one.unsqueeze(0), 0.1 * one.unsqueeze(0), share=0.1 * one)
    >>> quantiles(spike, torch.tensor([0.5, 0.95])).tolist()
    [[0.0], [1.0]]
    """

    centre: Tensor  # [*plates, *event] mean
    spread: Tensor  # [*plates, *event] standard deviation
    loc: Tensor  # [K, *plates, *event]
    scale: Tensor  # [K, *plates, *event]
    share: Tensor | None = None  # [*plates, *event] probability of not being zero; None: one
    weights: Tensor | None = None  # [K, *plates, *event], sum to one; None: there is one piece
    low: Tensor | None = None  # [K | 1, ...], broadcasts; None: no piece has a lower edge
    high: Tensor | None = None


def quantiles(m: Pieces, levels: Tensor) -> Tensor:
    """Quantiles ``[Q, *plates, *event]``."""
    return torch.stack([_quantile(m, level) for level in levels])


def _quantile(m: Pieces, level: Tensor) -> Tensor:
    if m.share is None:
        return _of_pieces(m, level.expand_as(m.centre))
    left = m.share * _below(m, torch.zeros_like(m.centre))
    rest = 1.0 - m.share
    is_zero = (level >= left) & (level <= left + rest) & (rest > 0)
    inner = torch.where(level < left, level, level - rest) / m.share
    return torch.where(is_zero, 0.0, _of_pieces(m, inner.clamp(0.0, 1.0).nan_to_num(0.5)))


def _of_pieces(m: Pieces, level: Tensor) -> Tensor:
    """The quantile of what is not zero; ``level [*plates, *event]``."""
    if len(m.loc) == 1 and m.low is None and m.high is None:
        return m.loc[0] + m.scale[0] * torch.special.ndtri(level)
    edges = _edges(m)
    left, right = (_reach(m, edges, sign) for sign in (-1.0, 1.0))
    low, high = left.amin(0), right.amax(0)
    for _ in range(_STEPS):
        middle = 0.5 * (low + high)
        more = _below(m, middle) < level
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    ends = [e.expand_as(m.loc) for e in edges]
    found = torch.where(level <= 0.0, ends[0].amin(0), 0.5 * (low + high))
    return torch.where(level >= 1.0, ends[1].amax(0), found)


def _edges(m: Pieces) -> tuple[Tensor, Tensor]:
    infinite = torch.full_like(m.loc[:1], torch.inf)
    return -infinite if m.low is None else m.low, infinite if m.high is None else m.high


def _reach(m: Pieces, edges: tuple[Tensor, Tensor], sign: float) -> Tensor:
    """How far a piece extends to one side; one that is cut far out in its tail starts at its edge."""
    near = torch.minimum(torch.maximum(m.loc, edges[0]), edges[1])
    inside = near + sign * _WIDE * m.scale
    return torch.minimum(torch.maximum(inside, edges[0]), edges[1])


def _below(m: Pieces, x: Tensor) -> Tensor:
    """Probability of at most ``x`` among what is not zero ``[*plates, *event]``."""
    low, high = _edges(m)
    x = torch.minimum(torch.maximum(x.expand_as(m.loc), low), high)
    even = m.scale.isinf()
    scale = torch.where(even, 1.0, m.scale).clamp(min=torch.finfo(m.scale.dtype).tiny)
    a, b, z = ((e - m.loc) / scale for e in (low, high, x))
    # Probabilities relative to the larger end, so that nothing is lost far out in a tail.
    up, down = (
        _between(log_ndtr(-a), log_ndtr(-z), log_ndtr(-b)),
        _between(log_ndtr(b), log_ndtr(z), log_ndtr(a)),
    )
    found = torch.where(a > 0, up, 1.0 - down)
    width = (high - low).clamp(min=torch.finfo(m.scale.dtype).tiny)
    found = torch.where(even, (x - low) / width, found).clamp(0.0, 1.0)
    found = torch.where(x >= high, 1.0, found)
    return found[0] if m.weights is None else (m.weights * found).sum(0)


def _between(top: Tensor, at: Tensor, bottom: Tensor) -> Tensor:
    """``(e^top - e^at) / (e^top - e^bottom)``."""
    return torch.expm1(at - top) / torch.expm1(bottom - top)
