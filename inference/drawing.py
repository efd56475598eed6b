"""Look up factors at particles that are already drawn, and file new draws under their axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ppl.inference.layout import Context, Layout

Chosen = dict[str, Tensor]  # particle axis -> long [n, *innermost plates of its context]


def unravel(flat: Tensor, axes: Sequence[str], sizes: Sequence[int], chosen: Chosen) -> None:
    """Split row-major indices over several axes and put them into ``chosen``."""
    rest = flat
    for axis, size in zip(reversed(axes), reversed(sizes), strict=True):
        chosen[axis] = rest % size
        rest = rest // size


def selected(
    log: Tensor,
    axes: tuple[str, ...],
    layout: Layout,
    context: Context,
    keep: tuple[str, ...],
    chosen: Chosen,
) -> Tensor:
    """Index a factor at the chosen particles, for every draw and every plate element of a context.

    Dimensions of length 1 stand for a factor that is constant along the axis.

    Returns:
        ``[n or 1, *plates or 1, *keep]``, plates being the innermost ones of ``context``.
    """
    front = [a for a in axes if a not in keep]
    kept = [a for a in keep if a in axes]
    moved = log.permute([axes.index(a) for a in (*front, *kept)])
    where = [_coordinate(a, layout, context, chosen).to(log.device) for a in front]
    index = tuple(w if moved.shape[i] > 1 else torch.zeros_like(w) for i, w in enumerate(where))
    plates = (1,) * (1 + len(layout.innermost(context)))
    out = moved[index] if index else moved.reshape(plates + moved.shape)
    ends = [log.shape[axes.index(a)] if a in axes else 1 for a in keep]
    return out.reshape(*out.shape[: out.ndim - len(kept)], *ends)


def _coordinate(axis: str, layout: Layout, context: Context, chosen: Chosen) -> Tensor:
    """Element or particle of ``axis`` at every ``[draw, *plates]`` of the context."""
    plates = layout.innermost(context)
    if axis in layout.plates:
        return _along(layout, context, axis).unsqueeze(0)
    index = chosen[axis]
    if axis not in layout.context_of:  # a flattened state, already on the plates of the context
        return index
    owners = layout.innermost(layout.context_of[axis])
    if owners == plates:
        return index
    draws = torch.arange(len(index)).reshape(-1, *[1] * len(plates))
    return index[
        (draws.to(index.device), *[_along(layout, context, p).to(index.device) for p in owners])
    ]


def _along(layout: Layout, context: Context, plate: str) -> Tensor:
    plates = layout.innermost(context)
    carrier = layout.carrier(context, plate)
    return layout.member(carrier, plate).reshape([-1 if p == carrier else 1 for p in plates])
