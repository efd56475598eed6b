"""In which order factors can place elements one after the other, by a search in breadth.

An element can be placed by a row of which all other elements stand. Every level of the search touches only the rows of
the elements that were placed last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ppl.inference.groups.coordinates import Coordinates
from ppl.inference.groups.losses import LogDensity
from ppl.inference.groups.records import FactorGroups, Group


class Order(NamedTuple):
    """Elements in the order in which they are placed, numbered over all families, and the row that places each."""

    elements: np.ndarray
    rows: np.ndarray  # numbered over all groups


@dataclass(eq=False)
class _Rows:
    """What rows touch: one entry for each of their elements."""

    row: np.ndarray  # of each entry
    element: np.ndarray
    is_bad: (
        np.ndarray
    )  # the element is one of several of its slot, or has more coordinates than the row has outputs
    begins: np.ndarray = field(init=False)  # first entry of each element, in `order`
    order: np.ndarray = field(init=False)  # entries by element

    def __post_init__(self) -> None:
        self.order = np.argsort(self.element, kind="stable")
        last = int(self.element.max(initial=-1))
        counts = np.bincount(self.element, minlength=last + 1)
        self.begins = np.concatenate([[0], np.cumsum(counts)])

    def touching(self, elements: np.ndarray) -> np.ndarray:
        """Entries of some elements."""
        elements = elements[elements < len(self.begins) - 1]
        first, counts = self.begins[elements], self.begins[elements + 1] - self.begins[elements]
        ends = np.cumsum(counts)
        return self.order[np.repeat(first - ends + counts, counts) + np.arange(counts.sum())]


def spanning_order(
    groups: FactorGroups, placed: Mapping[str, Tensor], useless: Mapping[str, np.ndarray]
) -> tuple[Order, np.ndarray]:
    """The order, and the first elements of parts of the graph in which none stands.

    Args:
        groups: the model.
        placed: by family ``[N]``, bool.
        useless: rows that place nothing, by group ``[F]``, bool.
    """
    at = Coordinates(groups)
    entries = _entries(at)
    stands = np.concatenate([placed[n].cpu().numpy() for n in groups.families])
    usable = np.concatenate([_usable(g) & ~useless[g.name] for g in groups.groups])
    count = len(usable)
    is_open = ~stands[entries.element]
    # Of the open entries of each row: how many, how many of them bad, and the sum of their elements.
    number = np.bincount(entries.row, is_open, count).astype(np.int64)
    touched = np.bincount(entries.row, minlength=count)
    bad = np.bincount(entries.row, is_open & entries.is_bad, count).astype(np.int64)
    total = np.bincount(entries.row, np.where(is_open, entries.element, 0), count).astype(np.int64)
    elements, rows, seeds = [], [], []
    near = np.flatnonzero(number == 1)
    while True:
        near = near[usable[near] & (number[near] == 1) & (bad[near] == 0)]
        fresh, which = np.unique(total[near], return_index=True)
        if len(fresh):
            elements.append(fresh)
            rows.append(near[which])
        else:
            whole = np.flatnonzero((number > 1) & (number == touched) & usable)
            if not len(whole):
                break
            fresh = entries.element[np.searchsorted(entries.row, whole[:1])]
            seeds.append(fresh)
        stands[fresh] = True
        passed = entries.touching(fresh)
        near = entries.row[passed]
        np.subtract.at(number, near, 1)
        np.subtract.at(total, near, entries.element[passed])
        np.subtract.at(bad, near, entries.is_bad[passed])
        near = np.unique(near)
    none = [np.zeros(0, dtype=np.int64)]
    order = Order(np.concatenate(none + elements), np.concatenate(none + rows))
    return order, np.concatenate(none + seeds)


def _entries(at: Coordinates) -> _Rows:
    """All entries, row by row."""
    rows, elements, bads = [], [], []
    begin = 0
    for group in at.groups.groups:
        wide = []
        for slot, family in zip(group.slots, group.families, strict=True):
            index = at.elements[slot.family] + slot.index.cpu().numpy()
            is_bad = slot.width != 1 or family.dims > group.residual_dims
            wide.append((index, np.full(index.shape, is_bad)))
        touched = np.concatenate([w[0] for w in wide], 1)
        rows.append(np.repeat(begin + np.arange(group.rows), touched.shape[1]))
        elements.append(touched.ravel())
        bads.append(np.concatenate([w[1] for w in wide], 1).ravel())
        begin += group.rows
    none = np.zeros(0, dtype=np.int64)
    return _Rows(
        np.concatenate([none, *rows]),
        np.concatenate([none, *elements]),
        np.concatenate([none > 0, *bads]),
    )


def _usable(group: Group) -> np.ndarray:
    """Rows that are there and say where something is ``[F]``."""
    if isinstance(group.loss, LogDensity):
        return np.zeros(group.rows, dtype=bool)
    if group.keep is None:
        return np.ones(group.rows, dtype=bool)
    return (group.keep.reshape(group.rows, -1).amax(-1) != 0).cpu().numpy()


__all__ = ["Order", "spanning_order"]
