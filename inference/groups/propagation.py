"""First points for unknowns that no prior places: factors place one after the other, beginning at those that stand.

A pose graph has flat priors, one anchor and relative measurements. From all poses at the identity, least squares ends
in a poor local minimum; from poses placed one after the other along the measurements (odometry, where the graph is a
chain) it does not. With one row for each element that is a triangular system of nonlinear equations. Newton's method
solves it as a whole: what a step gets right at the beginning of a chain stays right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import splu
from torch import Tensor

from ppl.inference.groups.build import subset
from ppl.inference.groups.coordinates import Coordinates
from ppl.inference.groups.linearise import linearise
from ppl.inference.groups.records import FactorGroups, Group
from ppl.inference.groups.spanning import Order, spanning_order

Points = dict[str, Tensor]
Placed = dict[str, Tensor]  # bool [N] by family
_ROUNDS = 8  # searches: after each, rows that turned out to determine nothing are left out
_NEWTON = 60  # steps; measured: 4 for M3500, 15 along 2500 poses in space that turn fifty times
_SETTLED = 1e-6  # whitened residuals below which an element is placed
_MANY = 2000  # rows above which a group of a few of them is made sooner than all are evaluated
_FEW = 0.25  # share of the rows that are a few
_PLAIN = 1e8  # times a robust threshold: no residual reaches it
_RANK = 1e-9  # smallest pivot of a factor that determines an element, relative to the largest


def propagate(groups: FactorGroups, points: Mapping[str, Tensor], placed: Placed) -> Points:
    """Points with every element that factors can place from ``placed`` ones; the others stay where they are.

    Args:
        groups: the model.
        points: by family ``[N, *event]``.
        placed: which elements stand where they should, by family ``[N]``.

    In a part of the graph without placed elements, its first one is taken where it stands.
    """
    found, placed = dict(points), {k: v.cpu().clone() for k, v in placed.items()}
    useless = {g.name: np.zeros(g.rows, dtype=bool) for g in groups.groups}
    for _ in range(_ROUNDS):
        if all(bool(done.all()) for done in placed.values()):
            break
        order, seeds = spanning_order(groups, placed, useless)
        _mark(groups, placed, seeds)
        if not len(order.elements):
            break
        tree = _Tree(groups, order)
        moved, good = _placed_by(tree, found)
        if good.all():
            return moved
        standing = _standing(tree, good)
        _mark(groups, placed, order.elements[standing])
        found = _chosen(tree, found, moved, standing)
        # What hangs on an element that no row determined may yet do, once another row has placed that.
        for link, chosen in zip(tree.links, tree.by_link(~good), strict=True):
            useless[link.group.name][link.rows[chosen]] = True
    return found


def _mark(groups: FactorGroups, placed: Placed, elements: np.ndarray) -> None:
    begins = Coordinates(groups).elements
    for name, done in placed.items():
        own = elements[(elements >= begins[name]) & (elements < begins[name] + len(done))]
        done[torch.from_numpy(own - begins[name])] = True


class Link(NamedTuple):
    """Rows of a group that place the elements of one of its slots."""

    group: Group
    slot: int
    rows: np.ndarray  # of the group
    places: np.ndarray  # of their elements in the order


class _Near(NamedTuple):
    """The rows of a link near some points."""

    step: np.ndarray  # [L, d] of each element, if no other moved
    turns: np.ndarray  # [L, d, D] how that step depends on all that the row touches
    error: np.ndarray  # [L] largest residual
    determined: np.ndarray  # [L]


@dataclass(eq=False)
class _Tree:
    """Elements in order, with the row that places each."""

    groups: FactorGroups
    order: Order

    @cached_property
    def at(self) -> Coordinates:
        return Coordinates(self.groups)

    @cached_property
    def place(self) -> np.ndarray:
        """Where each element stands in the order, -1 elsewhere."""
        place = np.full(len(self.at.dims), -1)
        place[self.order.elements] = np.arange(len(self.order.elements))
        return place

    @cached_property
    def begins(self) -> np.ndarray:
        """First scalar of each element of the order, and their number."""
        return np.concatenate([[0], np.cumsum(self.at.dims[self.order.elements])])

    @cached_property
    def links(self) -> list[Link]:
        links, begin = [], 0
        for group in self.groups.groups:
            mine = np.flatnonzero(
                (self.order.rows >= begin) & (self.order.rows < begin + group.rows)
            )
            rows, wanted = self.order.rows[mine] - begin, self.order.elements[mine]
            begin += group.rows
            for s, slot in enumerate(group.slots):
                if slot.width != 1:
                    continue
                index = slot.index[:, 0].cpu().numpy()[rows] + self.at.elements[slot.family]
                own = index == wanted
                if own.any():
                    links.append(Link(group, s, rows[own], mine[own]))
        return links

    def by_link(self, chosen: np.ndarray) -> list[np.ndarray]:
        """A mask of the order as one of the rows of each link."""
        return [chosen[link.places] for link in self.links]

    @cached_property
    def parts(self) -> list[tuple[Group, Tensor]]:
        """For each link a group to evaluate, and the rows of it that count."""
        return [_evaluated(self.groups, link) for link in self.links]


def _evaluated(groups: FactorGroups, link: Link) -> tuple[Group, Tensor]:
    rows = torch.from_numpy(link.rows).to(groups.like.device)
    if groups.bound is None or link.group.rows < _MANY or len(rows) > _FEW * link.group.rows:
        return link.group, rows
    made = subset(groups, link.group, rows)
    same = len(made.slots) == len(
        link.group.slots
    )  # slots that differ nowhere in these rows are one
    every = torch.arange(len(rows), device=rows.device)
    return (made, every) if same else (link.group, rows)


def _placed_by(tree: _Tree, points: Points) -> tuple[Points, np.ndarray]:
    """Newton's method for all elements of a tree, and which of them are determined ``[N]``."""
    points = _near_their_roots(tree, points)
    good = np.ones(len(tree.order.elements), dtype=bool)
    for _ in range(_NEWTON):
        near = [_near(tree, k, points) for k in range(len(tree.links))]
        for link, each in zip(tree.links, near, strict=True):
            good[link.places] = each.determined
        if all((each.error[each.determined] < _SETTLED).all() for each in near):
            break
        points = _moved(tree, points, near)
    return points, good


def _near_their_roots(tree: _Tree, points: Points) -> Points:
    """Every element begins where the element of its family stood from which it is placed, over however many rows."""
    above = np.arange(len(tree.place))
    for link in tree.links:
        own = tree.order.elements[link.places]
        family = link.group.families[link.slot]
        for s, slot in enumerate(link.group.slots):
            if s != link.slot and slot.family == family.name and slot.width == 1:
                index = slot.index[:, 0].cpu().numpy()[link.rows]
                above[own] = index + tree.at.elements[slot.family]
    while not np.array_equal(above, higher := above[above]):
        above = higher
    out = dict(points)
    for name, family in tree.groups.families.items():
        first = tree.at.elements[name]
        index = torch.from_numpy(above[first : first + family.count] - first)
        out[name] = points[name][index.to(points[name].device)]
    return out


def _near(tree: _Tree, k: int, points: Points) -> _Near:
    (group, rows), link = tree.parts[k], tree.links[k]
    # None is robust, because none contradicts another yet.
    made = linearise(group, group.gather(points), tree.groups.params, kernel_scale=_PLAIN)
    assert made.jacobian is not None
    jacobian, residual = made.jacobian[rows], made.residual[rows]
    columns = _columns(link.group, link.slot)
    q, r = torch.linalg.qr(jacobian[..., columns])
    pivots = r.diagonal(dim1=-2, dim2=-1).abs()
    determined = pivots.amin(-1) > _RANK * pivots.amax(-1)
    safe = torch.where(determined[:, None, None], r, torch.eye(r.shape[-1]).to(r))
    right = -(q.mT @ torch.cat([residual.unsqueeze(-1), jacobian], -1))
    solved = torch.linalg.solve_triangular(safe, right, upper=True)
    solved = torch.where(determined[:, None, None], solved, 0.0).nan_to_num(0.0, 0.0, 0.0)
    # Least squares: of a row with more outputs than coordinates some of the residual stays for good.
    error = (q.mT @ residual.unsqueeze(-1)).abs().amax((-2, -1))
    step, turns, error = (
        x.cpu().double().numpy() for x in (solved[..., 0], solved[..., 1:], error)
    )
    return _Near(step, turns, error, determined.cpu().numpy())


def _columns(group: Group, slot: int) -> slice:
    sizes = [s.width * f.dims for s, f in zip(group.slots, group.families, strict=True)]
    return slice(sum(sizes[:slot]), sum(sizes[: slot + 1]))


def _moved(tree: _Tree, points: Points, near: Sequence[_Near]) -> Points:
    """All elements moved so that, to first order, every row is met."""
    size = int(tree.begins[-1])
    right = np.zeros(size)
    rows, cols, data = [np.arange(size)], [np.arange(size)], [np.ones(size)]
    for link, each in zip(tree.links, near, strict=True):
        own = tree.begins[link.places][:, None] + np.arange(each.step.shape[1])
        right[own] = each.step
        places, inner = _others(tree, link)
        row, col = np.broadcast_arrays(own[:, :, None], (tree.begins[places] + inner)[:, None, :])
        counts = np.broadcast_to((places >= 0)[:, None, :], row.shape)
        rows.append(row[counts])
        cols.append(col[counts])
        data.append(-each.turns[counts])
    matrix = sp.csc_matrix(
        (np.concatenate(data), (np.concatenate(rows), np.concatenate(cols))), (size, size)
    )
    step = _solved(matrix, right)
    return _retracted(tree, points, np.nan_to_num(step, posinf=0.0, neginf=0.0))


def _others(tree: _Tree, link: Link) -> tuple[np.ndarray, np.ndarray]:
    """Place and coordinate of every column of a link's rows ``[L, D]``; -1 where the step itself or nothing stands."""
    places, inner = [], []
    for s, (slot, family) in enumerate(zip(link.group.slots, link.group.families, strict=True)):
        index = slot.index.cpu().numpy()[link.rows] + tree.at.elements[slot.family]
        place = np.full(index.shape, -1) if s == link.slot else tree.place[index]
        places.append(np.repeat(place, family.dims, 1))
        inner.append(np.broadcast_to(np.tile(np.arange(family.dims), slot.width), places[-1].shape))
    return np.concatenate(places, 1), np.concatenate(inner, 1)


def _retracted(tree: _Tree, points: Points, step: np.ndarray) -> Points:
    out = dict(points)
    for name, family in tree.groups.families.items():
        first = tree.at.elements[name]
        places = np.flatnonzero(
            (tree.order.elements >= first) & (tree.order.elements < first + family.count)
        )
        if len(places):
            delta = step[tree.begins[places][:, None] + np.arange(family.dims)]
            index = torch.from_numpy(tree.order.elements[places] - first).to(points[name].device)
            moved = family.retract(points[name][index], torch.from_numpy(delta).to(points[name]))
            out[name] = points[name].index_copy(0, index, moved)
    return out


def _chosen(tree: _Tree, before: Points, after: Points, chosen: np.ndarray) -> Points:
    """The points after a round of some elements, and those before it of all others."""
    wanted = np.zeros(len(tree.place), dtype=bool)
    wanted[tree.order.elements[chosen]] = True
    out = dict(before)
    for name, family in tree.groups.families.items():
        first = tree.at.elements[name]
        index = torch.from_numpy(np.flatnonzero(wanted[first : first + family.count]))
        index = index.to(before[name].device)
        out[name] = before[name].index_copy(0, index, after[name][index])
    return out


def _standing(tree: _Tree, good: np.ndarray) -> np.ndarray:
    """Elements that are determined, and all on the way to them."""
    size = len(good)
    rows, cols = [np.arange(size)], [np.arange(size)]
    for link in tree.links:
        places = _others(tree, link)[0]
        row, col = np.broadcast_arrays(link.places[:, None], places)
        rows.append(row[places >= 0])
        cols.append(col[places >= 0])
    row, col = np.concatenate(rows), np.concatenate(cols)
    matrix = sp.csc_matrix((np.where(row == col, 1.0, -1e-3), (row, col)), (size, size))
    # Each adds a share of what is wrong before it: what is wrong nowhere is exactly zero.
    return ~(_solved(matrix, (~good).astype(float)) > 0)


def _solved(lower: sp.csc_matrix, right: np.ndarray) -> np.ndarray:
    """Solve a triangular system, every row behind those that it needs: nothing fills in."""
    return splu(lower, permc_spec="NATURAL", diag_pivot_thresh=0.0).solve(right)


__all__ = ["propagate"]
