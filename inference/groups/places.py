"""Which element of each plate is in play in every row of a group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ppl.binding import Bound


@dataclass(frozen=True, eq=False)
class Place:
    """The element of a plate in play: ``index`` has one dimension for each of ``axes``."""

    index: Tensor  # long
    axes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Context:
    """Elements in play, the latest decision first; a plate is found itself or through one that lies within it."""

    places: tuple[tuple[str, Place], ...]

    def at(self, plate: str, place: Place) -> Context:
        """The context below a node that decides about ``plate``."""
        return Context(((plate, place), *self.places))

    def find(self, plate: str, bound: Bound) -> Place:
        """The element of ``plate`` in play."""
        for name, place in self.places:
            if name == plate:
                return place
            if plate in bound.graph.ancestors(name):
                return Place(bound.maps[name, plate][place.index], place.axes)
        raise AssertionError(f"plate '{plate}' is not open")


def members(parent: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Children of every parent as a table ``[count, L]``, and which of its entries exist.

    >>> table, exists = members(torch.tensor([1, 0, 1]), 2)
    >>> table.tolist(), exists.tolist()
    ([[1, 0], [0, 2]], [[True, False], [True, True]])
    """
    sizes = torch.bincount(parent, minlength=count)
    order = torch.argsort(parent, stable=True)
    first = sizes.cumsum(0) - sizes
    place = torch.arange(len(parent), device=parent.device) - first[parent[order]]
    longest = max(int(sizes.max()), 1) if count else 1
    table = torch.zeros(count, longest, dtype=torch.long, device=parent.device)
    table[parent[order], place] = order
    steps = torch.arange(longest, device=parent.device)
    return table, steps < sizes.unsqueeze(1)


def aligned(place: Place, axes: tuple[str, ...]) -> Tensor:
    """The index with one dimension for each of ``axes``, of size one where it does not vary."""
    order = [place.axes.index(a) for a in axes if a in place.axes]
    index = place.index.permute(order)
    return index[tuple(slice(None) if a in place.axes else None for a in axes)]


def both(left: Place | None, right: Place) -> Place:
    """Elements that exist on both sides."""
    if left is None:
        return right
    axes = left.axes if len(left.axes) >= len(right.axes) else right.axes
    return Place(aligned(left, axes) & aligned(right, axes), axes)


def is_identity(index: Tensor, count: int) -> bool:
    """Whether an index ``[F]`` is all of ``count`` elements in their order."""
    same = torch.arange(count, device=index.device)
    return len(index) == count and bool((index == same).all())


__all__ = ["Context", "Place", "aligned", "both", "is_identity", "members"]
