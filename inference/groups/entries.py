"""Which entries of a factor count: those that are observed, kept by the model's masks, and have their neighbours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.distributions import MultivariateNormal, Normal
from ppl.inference.groups.laws import peel
from ppl.inference.groups.parts import Part
from ppl.inference.groups.rows import Walk


def entries(
    bound: Bound,
    part: Part,
    walk: Walk,
    keeps: Sequence[Any],
    event_dim: int,
    batch: tuple[int, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """Which entries count ``[F, *batch]``, and the mask ``[F, *batch, d]`` of vectors that are there in part."""
    found: list[Tensor] = []
    partly = None
    factor = part.factor
    if factor.kind == "conditional" and factor.name in bound.masks:
        count = math.prod(bound.size(p) for p in factor.plates)
        mask = bound.masks[factor.name].reshape(count, *batch, -1)
        mask = mask if part.chosen is None else mask[part.chosen]
        assert part.law is not None
        inside = mask.any(-1) & ~mask.all(-1)
        if event_dim and isinstance(peel(part.law).family, MultivariateNormal) and inside.any():
            partly, mask = mask, mask.any(-1, keepdim=True)
        found.append(mask.all(-1))
    for item in keeps:
        rewritten = walk.visit(item)
        (value,) = walk.compile([rewritten], [len(batch)])([], {})
        found.append(value != 0)
    if walk.valid is not None:
        found.append(walk.valid.reshape(-1, *(1,) * len(batch)))
    if not found:
        return None, None
    keep = torch.ones(part.rows, *batch, dtype=torch.bool, device=bound.device)
    for each in found:
        keep = keep & each
    return None if bool(keep.all()) and partly is None else keep.to(bound.dtype), partly


def per_residual(keep: Tensor | None, family: Any, event: tuple[int, ...]) -> Tensor | None:
    """One number a residual: ``[F, m]``, or ``[F]`` where a row has one vector."""
    if keep is None or keep.ndim == 1:
        return keep
    return keep.flatten(1).repeat_interleave(draw_dims(family, event), 1)


def draw_dims(family: Any, event: tuple[int, ...]) -> int:
    """Number of residuals of one draw of a Gaussian law."""
    if isinstance(family, Normal):
        return 1
    return event[-1] if isinstance(family, MultivariateNormal) else family.manifold.dims


__all__ = ["draw_dims", "entries", "per_residual"]
