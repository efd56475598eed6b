"""Entries of the inverse of a sparse matrix, from its factor, on the pattern of the factor.

With ``A = L D L'`` and the columns C and rows R of one supernode, the inverse Z obeys ([Takahashi1973], [Erisman1975])

    Y = L_RC inv(L_CC)        Z_RC = -Z_RR Y        Z_CC = inv(L_CC D L_CC') - Y' Z_RC

and Z_RR is part of the block of the parent supernode. So the elimination tree is walked from its roots to its leaves, all
supernodes of one shape and depth at once. Memory is the sum of the squared heights of the supernodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from ppl.inference.numerics.ordering import Ordering

_SMALL = 48  # height up to which supernodes are merged whatever zeros that stores
_ZEROS = 0.25  # largest share of stored zeros in a merged supernode that is taller


@dataclass(frozen=True, eq=False)
class Fronts:
    """Supernodes: adjacent columns with one pattern. All numbers are in the order of elimination.

    Front s has the scalars ``members[start[s]:start[s + 1]]``, ascending, of which the first ``width[s]`` are its columns.
    """

    ordering: Ordering
    owner: np.ndarray  # front of each scalar column [n]
    parent: np.ndarray  # [S], -1 at a root
    width: np.ndarray  # [S]
    height: np.ndarray  # [S], columns and rows
    start: np.ndarray  # [S + 1]
    members: np.ndarray
    level: np.ndarray  # distance from the root [S]

    @cached_property
    def keys(self) -> np.ndarray:
        """Front and scalar of each member as one ascending number."""
        return np.repeat(np.arange(len(self.width)), self.height) * len(self.owner) + self.members

    def find(self, front: np.ndarray, scalar: np.ndarray) -> np.ndarray:
        """Where a scalar stands within a front; both arrays have one shape."""
        wanted = front * len(self.owner) + scalar
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        if not np.array_equal(self.keys[place], wanted):
            raise ValueError(
                "the inverse was asked for at a pair outside the pattern of the factor"
            )
        return place - self.start[front]


@dataclass(frozen=True, eq=False)
class Selected:
    """The inverse on the pattern of the factor."""

    fronts: Fronts
    offset: np.ndarray  # where the block of each front begins [S]
    values: Tensor  # blocks [height, height] of all fronts, flat

    def blocks(self, first: np.ndarray, second: np.ndarray) -> Tensor:
        """Blocks ``inv(A)[first[k], second[k]]`` for pairs of blocks of the matrix: ``[P, d1, d2]``.

        Each of ``first``, and of ``second``, must have blocks of one size; pairs must be coupled in the matrix or equal.

        Raises:
            ValueError: a pair is not in the pattern of the factor.
        """
        return self.entries(self._scalars(first)[:, :, None], self._scalars(second)[:, None, :])

    def entries(self, first: np.ndarray, second: np.ndarray) -> Tensor:
        """Entries at pairs of scalars, in the caller's order; the two arrays are broadcast."""
        ordering, fronts = self.fronts.ordering, self.fronts
        a, b = np.broadcast_arrays(ordering.positions[first], ordering.positions[second])
        front = fronts.owner[np.minimum(a, b)]
        row, col = fronts.find(front, a), fronts.find(front, b)
        return self.values[torch.from_numpy(self.offset[front] + row * fronts.height[front] + col)]

    def diagonal(self) -> Tensor:
        """Diagonal of the inverse ``[n]``, in the caller's order."""
        scalars = np.arange(len(self.fronts.owner))
        return self.entries(scalars, scalars)

    def _scalars(self, blocks: np.ndarray) -> np.ndarray:
        ordering = self.fronts.ordering
        sizes = ordering.dims[blocks]
        size = int(sizes[0]) if len(sizes) else 0
        if not (sizes == size).all():
            raise ValueError("blocks of different sizes were asked for at once")
        return ordering.offsets[blocks][:, None] + np.arange(size)


def selected_inverse(lower: sp.csc_matrix, pivots: np.ndarray, ordering: Ordering) -> Selected:
    """Compute the inverse on the pattern of the factor.

    Args:
        lower: unit lower triangular factor ``[n, n]``, in the order of elimination.
        pivots: D ``[n]``.
        ordering: the order, with the pattern of the factor by blocks.

    Source: [Takahashi1973]; by supernodes, [Lin2011] section 3.

    >>> from ppl.inference.numerics.ordering import natural_order
    >>> lower = sp.csc_matrix(np.array([[1.0, 0.0], [0.5, 1.0]]))  # of [[2, 1], [1, 3]]
    >>> one = np.ones(2, dtype=int)
    >>> ordering = natural_order(np.array([0]), np.array([1]), one)
    >>> selected_inverse(lower, np.array([2.0, 2.5]), ordering).diagonal()
    tensor([0.6000, 0.4000], dtype=torch.float64)
    """
    fronts = make_fronts(ordering)
    groups = _by_shape(fronts)
    offset = _laid_out(groups, fronts.height**2)
    values = torch.empty(int((fronts.height**2).sum()), dtype=torch.float64)
    panels, panel_offset = _panels(fronts, groups, lower, pivots)
    for group in groups:
        _solve_group(fronts, group, values, offset, panels, panel_offset)
    return Selected(fronts, offset, values)


def _solve_group(
    fronts: Fronts,
    group: np.ndarray,
    values: Tensor,
    offset: np.ndarray,
    panels: Tensor,
    panel_offset: np.ndarray,
) -> None:
    """The recursion for fronts of one shape and level ``group [B]``; writes their blocks."""
    count, m, w = len(group), int(fronts.height[group[0]]), int(fronts.width[group[0]])
    begin = int(panel_offset[group[0]])
    panel = panels[begin : begin + count * m * w].view(count, m, w)
    pivots = panel[:, :w].diagonal(dim1=1, dim2=2)
    eye = torch.eye(w, dtype=panel.dtype).expand(count, w, w)
    root = torch.linalg.solve_triangular(panel[:, :w], eye, upper=False, unitriangular=True)
    begin = int(offset[group[0]])
    block = values[begin : begin + count * m * m].view(count, m, m)
    own = root.mT @ (root / pivots.unsqueeze(-1))
    if m > w:
        outer = values[torch.from_numpy(_parent_places(fronts, group, offset))]  # Z_RR [B, r, r]
        y = panel[:, w:] @ root
        cross = outer @ y
        block[:, w:, w:], block[:, w:, :w], block[:, :w, w:] = outer, -cross, -cross.mT
        own = own + y.mT @ cross
    block[:, :w, :w] = own


def _parent_places(fronts: Fronts, group: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Where the entries Z_RR of each front stand among the values: ``[B, r, r]``."""
    w, m = int(fronts.width[group[0]]), int(fronts.height[group[0]])
    rows = fronts.members[fronts.start[group][:, None] + np.arange(w, m)]
    parent = fronts.parent[group]
    place = fronts.find(np.broadcast_to(parent[:, None], rows.shape), rows)
    first = offset[parent][:, None] + place * fronts.height[parent][:, None]
    return first[:, :, None] + place[:, None, :]


def _panels(
    fronts: Fronts, groups: list[np.ndarray], lower: sp.csc_matrix, pivots: np.ndarray
) -> tuple[Tensor, np.ndarray]:
    """Columns of the factor as dense panels ``[height, width]`` of each front, the pivots on their diagonal."""
    offset = _laid_out(groups, fronts.height * fronts.width)
    panels = np.zeros(int((fronts.height * fronts.width).sum()))
    n = len(pivots)
    cols = np.repeat(np.arange(n), np.diff(lower.indptr))
    rows = lower.indices.astype(np.int64)
    front = fronts.owner[cols]
    within = np.arange(n) - fronts.members[fronts.start[:-1]][fronts.owner]  # column in its front
    place = offset[front] + fronts.find(front, rows) * fronts.width[front] + within[cols]
    panels[place] = lower.data
    own = fronts.owner
    panels[offset[own] + within * (fronts.width[own] + 1)] = pivots
    return torch.from_numpy(panels), offset


def _by_shape(fronts: Fronts) -> list[np.ndarray]:
    """Fronts of equal level, height and width together, roots first."""
    if not len(fronts.width):
        return []
    order = np.lexsort((fronts.width, fronts.height, fronts.level))
    shape = np.stack([fronts.level, fronts.height, fronts.width], 1)[order]
    return np.split(order, np.flatnonzero((shape[1:] != shape[:-1]).any(1)) + 1)


def _laid_out(groups: list[np.ndarray], sizes: np.ndarray) -> np.ndarray:
    """Offsets of arrays that are stored in the order of the groups."""
    order = np.concatenate(groups) if groups else np.zeros(0, dtype=np.int64)
    offset = np.empty(len(sizes), dtype=np.int64)
    offset[order] = np.cumsum(sizes[order]) - sizes[order]
    return offset


# ---- the supernodes --------------------------------------------------------------------------------------------


def make_fronts(ordering: Ordering) -> Fronts:
    """Supernodes of the factor, small ones merged with the only child before them. Source: [Davis2006] section 4.11."""
    first, last = _merged(ordering)
    pointers, rows = ordering.lower
    sizes = ordering.dims[ordering.order]
    begins = np.concatenate([[0], np.cumsum(sizes)])  # first scalar of each block
    number = np.repeat(np.arange(len(first)), last - first + 1)  # front of each block
    # Rows of a merged front are those of its last column.
    counts = pointers[last + 1] - pointers[last]
    tails = rows[_ranges(pointers[last], counts)]
    blocks = np.concatenate([np.arange(len(sizes)), tails])
    owners = np.concatenate([number, np.repeat(np.arange(len(first)), counts)])
    order = np.lexsort((blocks, owners))
    blocks, owners = blocks[order], owners[order]
    members = _ranges(begins[blocks], sizes[blocks])
    height = np.bincount(owners, sizes[blocks], len(first)).astype(np.int64)
    parent = np.full(len(first), -1)
    inner = counts > 0
    parent[inner] = number[rows[pointers[last[inner]]]]
    start = np.concatenate([[0], np.cumsum(height)])
    width = begins[last + 1] - begins[first]
    owner = np.repeat(np.arange(len(first)), width)
    return Fronts(ordering, owner, parent, width, height, start, members, _levels(parent))


def _merged(ordering: Ordering) -> tuple[np.ndarray, np.ndarray]:
    """First and last block of every front."""
    pointers, rows = ordering.lower
    count = ordering.count
    sizes = ordering.dims[ordering.order]
    has_rows = np.diff(pointers) > 0
    parent = np.full(count, -1)
    parent[has_rows] = rows[pointers[:-1][has_rows]]
    totals = np.concatenate([[0], np.cumsum(sizes[rows])])
    below = totals[pointers[1:]] - totals[pointers[:-1]]  # scalars under each block column
    first: list[int] = []
    last: list[int] = []
    width = zeros = 0
    for k, (size, rest, up) in enumerate(
        zip(sizes.tolist(), below.tolist(), [-1, *parent[:-1].tolist()], strict=True)
    ):
        # Joining the front that ends at k - 1, whose parent is k: its columns get the rows of k.
        more = zeros + width * (size + rest - below[k - 1]) if k else 0
        height = width + size + rest
        joined = up == k and (height <= _SMALL or more <= _ZEROS * height * (width + size))
        if joined:
            last[-1], width, zeros = k, width + size, int(more)
        else:
            first.append(k)
            last.append(k)
            width, zeros = size, 0
    return np.array(first, dtype=np.int64), np.array(last, dtype=np.int64)


def _levels(parent: np.ndarray) -> np.ndarray:
    """Distance from the root; a parent has a higher number than its children."""
    level = [0] * len(parent)
    up = parent.tolist()
    for s in range(len(up) - 1, -1, -1):
        if up[s] >= 0:
            level[s] = level[up[s]] + 1
    return np.array(level, dtype=np.int64)


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``start, start + 1, ...`` for each start, one after the other."""
    shift = np.repeat(starts - (np.cumsum(counts) - counts), counts)
    return shift + np.arange(len(shift))
