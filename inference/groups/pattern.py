"""Which pairs of elements share a factor, and where each of their blocks stands in a sparse matrix.

Worked out once for a model; :mod:`ppl.inference.groups.equations` fills in the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from ppl.errors import UnsupportedError
from ppl.inference.groups.coordinates import Coordinates
from ppl.inference.groups.records import Group
from ppl.inference.numerics.ordering import Ordering

_MOST = 2**26  # pairs of one site: 512 MiB of their numbers
Key = tuple[str, str]  # two families, the earlier one first


class Pairing(NamedTuple):
    """Where the products of two slots of a group go. ``F`` is 1 where both slots are shared by all rows."""

    group: int
    slots: tuple[int, int]  # the first belongs to the earlier family
    table: Key
    pair: Tensor  # number of the block [F, B1, B2]; one past the last for products that are not wanted
    flip: Tensor | None  # blocks to be transposed [F, B1, B2]
    twice: Tensor | None  # blocks of an element with itself, through two slots [F, B1, B2]


class Pairs(NamedTuple):
    """Pairs of elements that share a factor; every element is paired with itself."""

    pairings: tuple[Pairing, ...]
    counts: dict[Key, int]  # number of pairs of two families
    first: np.ndarray  # of every pair, counted over all families [P]
    second: np.ndarray


class Wiring(NamedTuple):
    """The compressed columns of ``J'J`` in the order of elimination."""

    source: np.ndarray  # where each entry stands among the blocks
    indices: np.ndarray
    pointers: np.ndarray
    diagonal: np.ndarray  # entries on the diagonal, in the order of elimination


class _Wanted(NamedTuple):
    """Elements that the rows of a group pair through two slots: ``[F, B1, B2]`` each."""

    group: int
    slots: tuple[int, int]
    first: np.ndarray
    second: np.ndarray


def find_pairs(at: Coordinates) -> Pairs:
    """Number all pairs of elements that share a factor, by pair of families.

    Raises:
        UnsupportedError: a site touches so many elements at once that the pairs do not fit into memory.
    """
    _check_number(at)
    rank = {name: i for i, name in enumerate(at.families)}
    wanted: dict[Key, list[_Wanted]] = {(name, name): [] for name in at.families}
    for number, group in enumerate(at.groups.groups):
        for s, t in combinations_with_replacement(range(len(group.slots)), 2):
            if rank[group.slots[s].family] > rank[group.slots[t].family]:
                s, t = t, s
            key = (group.slots[s].family, group.slots[t].family)
            wanted.setdefault(key, []).append(_wanted(number, group, s, t))
    pairings: list[Pairing] = []
    counts, first, second = {}, [], []
    for key in sorted(wanted, key=lambda k: (rank[k[0]], rank[k[1]])):
        made, left, right = _numbered(at, key, wanted[key])
        pairings += made
        counts[key] = len(left)
        first.append(at.elements[key[0]] + left)
        second.append(at.elements[key[1]] + right)
    return Pairs(tuple(pairings), counts, np.concatenate(first), np.concatenate(second))


def _check_number(at: Coordinates) -> None:
    for group in at.groups.groups:
        rows = 1 if all(s.is_shared for s in group.slots) else group.rows
        number = rows * sum(s.width for s in group.slots) ** 2 // 2
        if number > _MOST:
            names = ", ".join(dict.fromkeys(f"'{s.family}'" for s in group.slots))
            raise UnsupportedError(
                f"'{group.site or group.name}' couples all elements of {names} with each other: {number:.2g} pairs, more than "
                f"{_MOST:.2g}. For the weights of a network use method='ssvi' or 'vi'; for a regression with this many "
                "coefficients 'amp'."
            )


def _wanted(number: int, group: Group, s: int, t: int) -> _Wanted:
    a, b = (group.slots[k].index.cpu().numpy() for k in (s, t))
    if group.slots[s].is_shared and group.slots[t].is_shared:
        a, b = a[:1], b[:1]
    return _Wanted(number, (s, t), *np.broadcast_arrays(a[:, :, None], b[:, None, :]))


def _numbered(
    at: Coordinates, key: Key, wanted: Sequence[_Wanted]
) -> tuple[list[Pairing], np.ndarray, np.ndarray]:
    """Pairings of two families, and the two ends of their distinct pairs."""
    same, width = key[0] == key[1], max(at.families[key[1]].count, 1)
    own = at.families[key[0]].count if same else 0
    keys = [np.arange(own) * (width + 1)]  # every element with itself
    for w in wanted:
        low, high = (
            (np.minimum(w.first, w.second), np.maximum(w.first, w.second)) if same else w[2:]
        )
        keys.append((low * width + high).ravel())
    pairs, number = np.unique(np.concatenate(keys), return_inverse=True)
    made, begin = [], own
    for w in wanted:
        pair = number[begin : begin + w.first.size].reshape(w.first.shape)
        begin += w.first.size
        made.append(_pairing(at, key, w, pair, len(pairs)))
    return made, *np.divmod(pairs, width)


def _pairing(at: Coordinates, key: Key, w: _Wanted, pair: np.ndarray, count: int) -> Pairing:
    """What to do with the products so that every block of ``J'J`` is complete, and counted once."""
    flip = twice = None
    if key[0] == key[1]:
        above, equal = w.first > w.second, w.first == w.second
        if w.slots[0] == w.slots[1]:
            # A slot meets itself in both orders: one of them is enough, and an element met twice needs both.
            pair = np.where(above, count, pair)
        else:
            flip, twice = (x if x.any() else None for x in (above, equal))
    device = at.groups.like.device
    tensors = (
        None if x is None else torch.from_numpy(np.ascontiguousarray(x)).to(device)
        for x in (pair, flip, twice)
    )
    return Pairing(w.group, w.slots, key, *tensors)  # type: ignore[arg-type]


def make_wiring(pairs: Pairs, dims: np.ndarray, ordering: Ordering) -> Wiring:
    """Where the entries of the sparse matrix stand among the blocks of the pairs."""
    sizes = dims[pairs.first] * dims[pairs.second]
    source = np.arange(sizes.sum())
    pair = np.repeat(np.arange(len(sizes)), sizes)
    row, col = np.divmod(
        source - np.repeat(np.cumsum(sizes) - sizes, sizes), dims[pairs.second][pair]
    )
    row = ordering.positions[ordering.offsets[pairs.first[pair]] + row]
    col = ordering.positions[ordering.offsets[pairs.second[pair]] + col]
    apart = (pairs.first != pairs.second)[pair]
    rows, cols = np.concatenate([row, col[apart]]), np.concatenate([col, row[apart]])
    # Where an entry is read from travels as its value, plus one so that none is zero.
    values = np.concatenate([source, source[apart]]) + 1
    size = len(ordering.columns)
    matrix = sp.csc_matrix((values, (rows, cols)), (size, size))
    matrix.sort_indices()
    column = np.repeat(np.arange(size), np.diff(matrix.indptr))
    diagonal = np.flatnonzero(matrix.indices == column)
    return Wiring(matrix.data - 1, matrix.indices, matrix.indptr, diagonal)
