"""Factors as rows: which plates they have, and the elements that each row is about."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.graph import Factor, Law
from ppl.inference.groups.places import Place
from ppl.inference.groups.recorder import ROW


@dataclass(frozen=True, eq=False)
class Part:
    """A factor, or the first or the later elements of a chain, as rows."""

    name: str
    factor: Factor
    law: Law | None
    plates: tuple[str, ...]
    sizes: tuple[int, ...]
    places: Mapping[str, Place]
    row_labels: Mapping[str, Sequence[Any]]
    chosen: Tensor | None = None  # long: which elements of the factor the rows are; all of them

    @property
    def rows(self) -> int:
        """Number of rows."""
        return math.prod(self.sizes)


def parts(bound: Bound, factor: Factor) -> Iterator[Part]:
    """The factor as rows; a chain is two parts, its first elements and all later ones."""
    if factor.chain is None:
        yield _part(bound, factor, factor.name, factor.law, factor.plates, "")
        return
    along, transition = factor.chain
    rest = tuple(p for p in factor.plates if p != along)
    first = _part(bound, factor, f"{factor.name} (first)", factor.law, rest, "")
    start = Place(torch.zeros((), dtype=torch.long, device=bound.device), ())
    yield replace(first, places={along: start, **first.places})
    yield _part(bound, factor, f"{factor.name} (later)", transition, factor.plates, along)


def _part(
    bound: Bound, factor: Factor, name: str, law: Law | None, plates: tuple[str, ...], along: str
) -> Part:
    sizes = tuple(bound.size(p) - (p == along) for p in plates)
    rows = torch.arange(math.prod(sizes), device=bound.device)
    places, stride = {}, math.prod(sizes)
    for plate, size in zip(plates, sizes, strict=True):
        stride = stride // max(size, 1)
        index = (rows // max(stride, 1)) % max(size, 1)
        places[plate] = Place(index + 1 if plate == along else index, (ROW,))
    labels = {p: bound.labels[p][1:] if p == along else bound.labels[p] for p in plates}
    return Part(name, factor, law, plates, sizes, places, labels)


def chosen_rows(part: Part, rows: Tensor) -> Part:
    """The part with some of its rows only, as rows without a plate."""
    places = {
        name: Place(p.index[rows], p.axes) if p.axes == (ROW,) else p
        for name, p in part.places.items()
    }
    return replace(part, plates=(ROW,), sizes=(len(rows),), places=places, chosen=rows)


__all__ = ["Part", "chosen_rows", "parts"]
