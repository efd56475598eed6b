"""Which variables the edges of a slot touch, and how to read from them and add to them.

Most graphs are regular: row ``f`` touches element ``f``, or ``f + k`` (a grid), or every row the same elements. Those are
slices and sums; only the rest pays for a look-up. Sums over shared elements run in float64.

On CUDA ``index_add_`` adds in no fixed order; under ``torch.use_deterministic_algorithms(True)`` torch sorts first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ppl.inference.groups import Group, Slot

Rows = slice | Tensor  # of a group: contiguous, or any


@dataclass(frozen=True, eq=False)
class Wire:
    """The edges of one slot for some rows of its group."""

    kind: Literal["shift", "shared", "index"]
    family: str
    count: int  # rows F in play
    width: int  # edges of a row, B
    shift: int = 0  # of kind "shift": the first row touches this element, the next one the next
    index: Tensor | None = None  # "shared": [B], "index": [F * B]

    def gather(self, values: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """``[stop - start, B, ...]`` of the elements' values ``[N, ...]``."""
        stop = self.count if stop is None else stop
        if self.kind == "shift":
            return values[self.shift + start : self.shift + stop].unsqueeze(1)
        assert self.index is not None
        if self.kind == "shared":
            shared = values[self.index]
            return shared.expand(stop - start, *shared.shape)
        picked = values.index_select(0, self.index[start * self.width : stop * self.width])
        return picked.reshape(stop - start, self.width, *values.shape[1:])

    def add(self, total: Tensor, edges: Tensor, start: int = 0) -> None:
        """Add ``[n, B, ...]``, the edges of rows ``start`` and on, to the elements' ``[N, ...]`` in place."""
        stop = start + len(edges)
        if self.kind == "shift":
            total[self.shift + start : self.shift + stop] += edges[:, 0]
            return
        assert self.index is not None
        if self.kind == "shared":
            summed = edges.sum(0, dtype=torch.float64).to(total.dtype)
            total.index_add_(0, self.index, summed)
            return
        picked = self.index[start * self.width : stop * self.width]
        total.index_add_(0, picked, edges.flatten(0, 1))


def wire(slot: Slot, rows: Rows, count: int, device: torch.device) -> Wire:
    """The wire of a slot for ``count`` rows."""
    index = slot.index[rows]
    width = index.shape[1]
    if width == 1 and count:
        first = int(index[0, 0])
        steps = torch.arange(first, first + count, device=index.device)
        if bool((index[:, 0] == steps).all()):
            return Wire("shift", slot.family, count, 1, first)
    if count > 1 and bool((index == index[:1]).all()):
        return Wire("shared", slot.family, count, width, index=index[0].to(device))
    return Wire("index", slot.family, count, width, index=index.reshape(-1).contiguous())


def present(group: Group) -> Tensor:
    """Rows ``bool [F]`` with at least one entry that counts."""
    if group.keep is None:
        device = group.slots[0].index.device
        return torch.ones(group.rows, dtype=torch.bool, device=device)
    return (group.keep != 0).reshape(group.rows, -1).any(1)


def regular_rows(group: Group) -> tuple[Rows, tuple[Slot, ...]]:
    """Rows to work on, and slots whose absent rows point where a regular pattern would have them.

    An absent row sends nothing, so its index is free: a grid's last column, which has no neighbour, then continues the
    pattern of the others, and rows that would point beyond the last element are left out.
    """
    here = present(group)
    if bool(here.all()) or not bool(here.any()):
        return slice(0, group.rows), group.slots
    at = here.nonzero().squeeze(-1)
    low, high, slots = 0, group.rows, []
    for slot, family in zip(group.slots, group.families, strict=True):
        offset = slot.index[at, 0] - at
        if slot.width > 1 or not bool((offset == offset[0]).all()):
            return at, group.slots
        k = int(offset[0])
        low, high = max(low, -k), min(high, family.count - k)
        rows = torch.arange(group.rows, device=at.device)
        slots.append(Slot(slot.family, (rows + k).unsqueeze(1)))
    return slice(low, high), tuple(slots)


def count_of(rows: Rows) -> int:
    """Number of rows."""
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def wires(group: Group, slots: Sequence[Slot], rows: Rows) -> tuple[Wire, ...]:
    """A wire for each slot."""
    device = group.slots[0].index.device
    return tuple(wire(slot, rows, count_of(rows), device) for slot in slots)


__all__ = ["Rows", "Wire", "count_of", "present", "regular_rows", "wire", "wires"]
