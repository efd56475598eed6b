"""The shape of a factor graph: trees, levels of a spanning tree, positions along an ordered plate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components, dijkstra
from torch import Tensor

from ppl.inference.gbp.wiring import present
from ppl.inference.groups import Family, Group


def edge_count(groups: Sequence[Group]) -> int:
    """Number of (row, variable) pairs of the rows that are there."""
    return sum(int(present(g).sum()) * sum(s.width for s in g.slots) for g in groups)


def is_forest(families: Mapping[str, Family], groups: Sequence[Group]) -> bool:
    """Whether the graph has no cycle: as many edges as nodes less components.

    >>> x = Family("x", ("n",), (3,))
    >>> def link(*pairs):
    ...     slots = tuple(Slot("x", torch.tensor(ends)[:, None]) for ends in zip(*pairs))
    ...     return Group("link", slots, (x, x), lambda values, params: values[1] - values[0])
    >>> from ppl.inference.groups import Slot
    >>> is_forest({"x": x}, [link((0, 1), (1, 2))]), is_forest({"x": x}, [link((0, 1), (1, 2), (2, 0))])
    (True, False)
    """
    variables = sum(f.count for f in families.values())
    rows = sum(int(present(g).sum()) for g in groups)
    edges = edge_count(groups)
    if edges >= variables + rows:
        return edges == 0
    if edges == 0:
        return True
    graph, _ = _bipartite(families, groups)
    if graph.nnz < edges:  # a row that touches an element twice
        return False
    components = connected_components(graph, directed=False, return_labels=False)
    return (
        edges == graph.shape[0] - components
    )  # an absent row is a node and a component of its own


def tree_levels(families: Mapping[str, Family], groups: Sequence[Group]) -> list[Tensor]:
    """Distance of every row from the middle of its component, counted in variables: a level ``[F]`` a group.

    On a tree, updating levels from the highest to 0 and then from 0 to the highest makes every message exact.
    """
    variables = sum(f.count for f in families.values())
    graph, starts = _bipartite(families, groups)
    _, labels = connected_components(graph, directed=False)
    depth = _distance(graph, _middles(graph, labels, variables))
    levels = []
    for group, start in zip(groups, starts, strict=True):
        # A row lies one step beyond the nearest of its variables, at the odd distance 2 t + 1.
        found = np.nan_to_num(depth[start : start + group.rows], posinf=1.0)
        levels.append(torch.as_tensor((found.astype(np.int64) - 1) // 2))
    return levels


def _middles(graph: csr_matrix, labels: np.ndarray, variables: int) -> np.ndarray:
    """A variable in the middle of each component: equally far from both ends of a longest path."""
    first = _pick(labels[:variables], -np.arange(variables, dtype=float))
    one_end = _pick(labels[:variables], _distance(graph, first)[:variables])
    far = _distance(graph, one_end)[:variables]
    other_end = _pick(labels[:variables], far)
    return _pick(labels[:variables], -np.maximum(far, _distance(graph, other_end)[:variables]))


def _pick(labels: np.ndarray, score: np.ndarray) -> np.ndarray:
    """The variable of the highest score in each component."""
    order = np.lexsort((score, labels))
    last = np.flatnonzero(np.diff(np.append(labels[order], -1)))
    return order[last]


def _distance(graph: csr_matrix, sources: np.ndarray) -> np.ndarray:
    return dijkstra(graph, directed=False, indices=sources, unweighted=True, min_only=True)


def _bipartite(
    families: Mapping[str, Family], groups: Sequence[Group]
) -> tuple[csr_matrix, list[int]]:
    """Variables, then rows, as one graph; and the first node of each group's rows."""
    offsets, total = {}, 0
    for name, family in families.items():
        offsets[name], total = total, total + family.count
    heads, tails, starts = [], [], []
    for group in groups:
        starts.append(total)
        rows = present(group).nonzero().squeeze(-1).cpu()
        for slot in group.slots:
            index = slot.index.cpu()[rows]
            heads.append((index + offsets[slot.family]).reshape(-1).numpy())
            tails.append((rows + total).unsqueeze(1).expand_as(index).reshape(-1).numpy())
        total += group.rows
    ends = np.concatenate(heads), np.concatenate(tails)
    # Double precision marks an edge that stands twice by a two, which the caller sees as a missing entry.
    graph = coo_matrix((np.ones(len(ends[0])), ends), shape=(total, total)).tocsr()
    graph.sum_duplicates()
    return graph, starts


def positions(group: Group, plate: str) -> tuple[Tensor, Tensor] | None:
    """First and last position ``[F]`` along a plate of what each row touches; None where it touches nothing there."""
    found: list[Tensor] = []
    for slot, family in zip(group.slots, group.families, strict=True):
        if plate in family.plates:
            axis = family.plates.index(plate)
            inner = int(np.prod(family.sizes[axis + 1 :], dtype=np.int64))
            found.append(slot.index // inner % family.sizes[axis])
    if not found:
        return None
    everything = torch.cat(found, 1)
    return everything.amin(1), everything.amax(1)


__all__ = ["edge_count", "is_forest", "positions", "tree_levels"]
