"""In which order the unknowns of a sparse system are eliminated, and which entries fill in.

Unknowns come in blocks (a pose is three scalars) that share their pattern, so the order is found on the graph of blocks,
which is smaller and orders better than scalars do. Source: [Davis2006] chapters 4 and 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import depth_first_order
from scipy.sparse.linalg import SuperLU, splu

_SPARE = 1e-6  # added to a Laplacian's diagonal, so that it is positive definite and its fill never underflows


@dataclass(frozen=True, eq=False)
class Ordering:
    """An order of elimination of ``N`` blocks with ``n`` scalars in all.

    Attributes:
        dims: scalars of each block ``[N]``.
        order: the block that is eliminated k-th ``[N]``.
        lower: pattern of the factor by blocks, strictly below the diagonal: row pointers and rows of each column.
    """

    dims: np.ndarray
    order: np.ndarray
    lower: tuple[np.ndarray, np.ndarray]

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self.dims)

    @cached_property
    def offsets(self) -> np.ndarray:
        """First scalar of each block, and the number of scalars: ``[N + 1]``."""
        return np.concatenate([[0], np.cumsum(self.dims)])

    @cached_property
    def place(self) -> np.ndarray:
        """When each block is eliminated ``[N]``."""
        place = np.empty_like(self.order)
        place[self.order] = np.arange(self.count)
        return place

    @cached_property
    def columns(self) -> np.ndarray:
        """The scalar that is eliminated k-th ``[n]``."""
        sizes = self.dims[self.order]
        starts = np.repeat(self.offsets[self.order] - _starts(sizes), sizes)
        return starts + np.arange(len(starts))

    @cached_property
    def positions(self) -> np.ndarray:
        """When each scalar is eliminated ``[n]``."""
        place = np.empty_like(self.columns)
        place[self.columns] = np.arange(len(place))
        return place

    @property
    def fill(self) -> int:
        """Scalar entries of the factor, about."""
        sizes = self.dims[self.order]
        pointers, rows = self.lower
        heights = np.repeat(sizes, np.diff(pointers)) * sizes[rows]
        return int(heights.sum() + (sizes * (sizes + 1) // 2).sum())


def order_blocks(first: np.ndarray, second: np.ndarray, dims: np.ndarray) -> Ordering:
    """Find an order of elimination with little fill.

    Args:
        first: one end of every pair of blocks that are coupled ``[P]``; pairs may repeat, in any direction.
        second: the other end ``[P]``.
        dims: scalars of each block ``[N]``.

    Returns:
        Minimum degree order of the blocks; blocks coupled with very many others come last.

    Source: multiple minimum degree, [Liu1985], as SuperLU has it.

    >>> chain = order_blocks(np.arange(4), np.arange(1, 5), np.full(5, 2))
    >>> chain.count, chain.fill
    (5, 31)
    """
    count = len(dims)
    graph = _laplacian(first, second, count)
    degree = np.diff(graph.indptr) - 1
    # A block that everything touches hides the structure of the rest, and is last in any good order.
    heavy = degree > max(16.0, 10.0 * np.sqrt(count))
    if not heavy.any():
        order, lower = _filled(_splu(graph, "MMD_AT_PLUS_A"), np.arange(count))
    else:
        kept = np.flatnonzero(~heavy)
        light = _splu(graph[kept][:, kept], "MMD_AT_PLUS_A") if len(kept) else None
        inner = kept[np.argsort(light.perm_c)] if light is not None else kept
        order = np.concatenate([inner, np.flatnonzero(heavy)])
        order, lower = _filled(_splu(graph[order][:, order], "NATURAL"), order)
    return Ordering(np.asarray(dims, dtype=np.int64), order, lower)


def natural_order(first: np.ndarray, second: np.ndarray, dims: np.ndarray) -> Ordering:
    """Eliminate the blocks in the order in which they come, apart from harmless exchanges.

    Needed where some blocks must be last, as in marginalising the others.

    >>> star = natural_order(np.zeros(3, dtype=int), np.arange(1, 4), np.ones(4, dtype=int))
    >>> star.order.tolist(), star.fill  # the centre first: all others are coupled
    ([0, 1, 2, 3], 10)
    """
    graph = _laplacian(first, second, len(dims))
    order, lower = _filled(_splu(graph, "NATURAL"), np.arange(len(dims)))
    return Ordering(np.asarray(dims, dtype=np.int64), order, lower)


def _laplacian(first: np.ndarray, second: np.ndarray, count: int) -> sp.csc_matrix:
    """A positive definite matrix with the pattern of the graph.

    All its off-diagonal entries are negative, and stay so in elimination: no entry of the factor cancels to zero, and
    the factor shows the whole pattern.
    """
    apart = first != second
    rows, cols = (
        np.concatenate([first[apart], second[apart]]),
        np.concatenate([second[apart], first[apart]]),
    )
    edges = sp.csc_matrix((np.ones(len(rows)), (rows, cols)), (count, count))
    edges.data[:] = 1.0
    degree = np.asarray(edges.sum(0)).ravel()
    return (sp.diags(np.maximum(degree, 1.0) * (1 + _SPARE)) - edges).tocsc()


def _filled(factor: SuperLU, order: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The order of a factorisation with every subtree in one piece, and the pattern of its factor.

    ``order`` is that of the matrix that was factorised.
    """
    lower = sp.tril(factor.L, -1).tocsc()
    lower.sort_indices()
    post = _postorder(lower)
    lower = lower[post][:, post].tocsc()
    lower.sort_indices()
    order = order[np.argsort(factor.perm_c)[post]].astype(np.int64)
    return order, (lower.indptr.astype(np.int64), lower.indices.astype(np.int64))


def _postorder(lower: sp.csc_matrix) -> np.ndarray:
    """Children before parents, subtree by subtree, which changes nothing but the places of the columns."""
    count = lower.shape[0]
    has_parent = np.diff(lower.indptr) > 0
    parent = np.full(count, count)  # a root above all roots
    parent[has_parent] = lower.indices[lower.indptr[:-1][has_parent]]
    tree = sp.csr_matrix((np.ones(count), (parent, np.arange(count))), (count + 1, count + 1))
    # Backwards, parents before children and subtrees in one piece is a postorder.
    down = depth_first_order(tree, count, return_predecessors=False)
    return down[:0:-1]


def _splu(graph: sp.csc_matrix, order: str) -> SuperLU:
    options = {"SymmetricMode": True}
    return splu(graph, permc_spec=order, diag_pivot_thresh=0.0, options=options)


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.cumsum(sizes) - sizes
