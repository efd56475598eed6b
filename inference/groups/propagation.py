"""First points for unknowns that no prior places: each is solved for from one that is placed already.

A pose graph has flat priors, one anchor and relative measurements. From all poses at the identity, least squares ends
in a poor local minimum; from poses placed one after the other along the measurements (odometry, where the graph is a
chain) it does not. All elements at the same distance from the placed ones are solved for together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.inference.groups.build import subset
from ppl.inference.groups.linearise import linearise
from ppl.inference.groups.losses import LogDensity
from ppl.inference.groups.records import FactorGroups, Group

Points = dict[str, Tensor]
Placed = dict[str, Tensor]  # bool [N] by family
_NEWTON = 8  # steps for one element from one factor; a relative pose takes two
_SETTLED = 1e-6  # whitened residuals below which an element is placed
_LEVELS = 2000  # distance from the placed elements beyond which a start is no longer worth its time
_MANY = 30_000  # rows above which a group of a few of them is made sooner than all are evaluated
_PLAIN = 1e8  # times a robust threshold: no residual reaches it
_RANK = 1e-9  # smallest pivot of a factor that determines an element, relative to the largest


class Link(NamedTuple):
    """Rows of a group that have one unknown each, all in the same slot, and no two the same."""

    group: Group
    slot: int
    rows: Tensor  # long
    elements: Tensor  # long, of the slot's family


@dataclass(eq=False)
class _Search:
    """Points and what is placed so far; rows that turned out to determine nothing are left out."""

    groups: FactorGroups
    points: Points
    placed: Placed
    useless: dict[str, Tensor]  # bool [F] by group


def propagate(groups: FactorGroups, points: Mapping[str, Tensor], placed: Placed) -> Points:
    """Points with every element that factors can place from ``placed`` ones; the others stay where they are.

    Args:
        groups: the model.
        points: by family ``[N, *event]``.
        placed: which elements stand where they should, by family ``[N]``.

    In a part of the graph without placed elements, its first one is taken where it stands.
    """
    if all(bool(done.all()) for done in placed.values()):
        return dict(points)
    useless = {g.name: torch.zeros(g.rows, dtype=torch.bool) for g in groups.groups}
    search = _Search(groups, dict(points), {k: v.clone() for k, v in placed.items()}, useless)
    for _ in range(_LEVELS):
        links = _links(search)
        if links:
            for link in links:
                _place(search, link)
        elif not _seed(search):
            break
    return search.points


def _links(search: _Search) -> list[Link]:
    """One row for every element that is next to placed ones."""
    links: list[Link] = []
    taken = {name: done.clone() for name, done in search.placed.items()}
    for group in search.groups.groups:
        if isinstance(group.loss, LogDensity):
            continue
        open_ = _open(search, group)
        count = open_.sum(-1)
        usable = (count == 1) & ~search.useless[group.name]
        if group.keep is not None:
            usable &= group.keep.reshape(group.rows, -1).amax(-1).to("cpu") != 0
        for s, slot in enumerate(group.slots):
            if slot.width != 1 or group.families[s].dims > group.residual_dims:
                continue
            rows = torch.nonzero(usable & open_[:, s]).flatten()
            elements = slot.index[:, 0].to("cpu")[rows]
            rows = rows[~taken[slot.family][elements]]
            rows, elements = _first_rows(rows, slot.index[:, 0].to("cpu")[rows])
            if len(rows):
                taken[slot.family][elements] = True
                links.append(Link(group, s, rows, elements))
    return links


def _open(search: _Search, group: Group) -> Tensor:
    """Number of elements that are not placed, by row and slot ``[F, S]``."""
    return torch.stack(
        [(~search.placed[s.family])[s.index.to("cpu")].sum(-1) for s in group.slots], -1
    )


def _first_rows(rows: Tensor, elements: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the rows of each element."""
    if not len(rows):
        return rows, elements
    distinct, inverse = elements.unique(return_inverse=True)
    first = torch.full((len(distinct),), len(rows), dtype=torch.long)
    first = first.scatter_reduce(0, inverse, torch.arange(len(rows)), "amin")
    return rows[first], distinct


def _place(search: _Search, link: Link) -> None:
    """Newton's method for every element of a link, all others held fixed."""
    family = link.group.families[link.slot]
    before = points = search.points[family.name]
    elements = link.elements.to(points.device)
    points = points.index_copy(0, elements, _guess(search, link))
    rows, columns = _chosen(search, link)
    for _ in range(_NEWTON):
        jacobian, residual = _near(search, rows, family.name, points, jacobian=True)
        assert jacobian is not None
        step, determined = _solved(jacobian[..., columns], residual)
        points = points.index_copy(0, elements, family.retract(points[elements], step))
        # As many residuals as coordinates: they vanish where the element is placed.
        if bool(_near(search, rows, family.name, points)[1].abs().amax() < _SETTLED):
            break
    _accept(search, link, before, points, determined.to("cpu"))


class _Rows(NamedTuple):
    """Some rows of a group: a group of its own, or those rows of the whole one."""

    group: Group
    at: Tensor | None  # long


def _chosen(search: _Search, link: Link) -> tuple[_Rows, slice]:
    """The rows of a link, and the columns of their Jacobian that belong to its unknowns."""
    family, group, at = link.group.families[link.slot], link.group, None
    rows = link.rows.to(link.group.slots[0].index.device)
    if search.groups.bound is None or link.group.rows < _MANY:
        at = rows
    else:
        group = subset(search.groups, link.group, rows)
    wanted = link.elements.to(rows.device)
    start = 0
    for slot, each in zip(group.slots, group.families, strict=True):
        index = slot.index if at is None else slot.index[at]
        if each.name == family.name and slot.width == 1 and torch.equal(index[:, 0], wanted):
            break
        start += each.dims * slot.width
    return _Rows(group, at), slice(start, start + family.dims)


def _near(
    search: _Search, rows: _Rows, name: str, points: Tensor, jacobian: bool = False
) -> tuple[Tensor | None, Tensor]:
    """Jacobian and residual of rows; none is robust, because none contradicts another yet."""
    values = rows.group.gather({**search.points, name: points})
    params = search.groups.params
    made = linearise(rows.group, values, params, jacobian=jacobian, kernel_scale=_PLAIN)
    if rows.at is None:
        return made.jacobian, made.residual
    return None if made.jacobian is None else made.jacobian[rows.at], made.residual[rows.at]


def _solved(jacobian: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares step ``[L, d]`` of each row, and whether the row determines it ``[L]``."""
    q, r = torch.linalg.qr(jacobian)
    pivots = r.diagonal(dim1=-2, dim2=-1).abs()
    determined = pivots.amin(-1) > _RANK * pivots.amax(-1)
    safe = torch.where(determined[:, None, None], r, torch.eye(r.shape[-1]).to(r))
    rhs = -(q.mT @ residual.unsqueeze(-1))
    step = torch.linalg.solve_triangular(safe, rhs, upper=True).squeeze(-1)
    step = torch.where(determined.unsqueeze(-1), step, 0.0)
    return torch.nan_to_num(step, 0.0, 0.0, 0.0), determined & step.isfinite().all(-1)


def _guess(search: _Search, link: Link) -> Tensor:
    """A placed element of the same family in the same row, else where the element stands."""
    family = link.group.families[link.slot]
    points = search.points[family.name]
    for s, slot in enumerate(link.group.slots):
        if s != link.slot and slot.family == family.name and slot.width == 1:
            return points[slot.index[link.rows.to(slot.index.device), 0]]
    return points[link.elements.to(points.device)]


def _accept(search: _Search, link: Link, before: Tensor, points: Tensor, good: Tensor) -> None:
    """Keep the elements whose rows determine them; their other rows may yet place the rest."""
    name = link.group.families[link.slot].name
    finite = points[link.elements.to(points.device)].reshape(len(good), -1).isfinite().all(-1)
    good = good & finite.to("cpu")
    bad = link.elements[~good].to(points.device)
    search.points[name] = points.index_copy(0, bad, before[bad])
    search.placed[name][link.elements[good]] = True
    search.useless[link.group.name][link.rows[~good]] = True


def _seed(search: _Search) -> bool:
    """Take the first element that is not placed as placed, where a factor of several slots touches it."""
    for group in search.groups.groups:
        open_ = _open(search, group)
        rows = torch.nonzero((open_ > 0).all(-1) & (open_.sum(-1) > 1)).flatten()
        for row in rows[:1].tolist():
            slot = group.slots[0]
            search.placed[slot.family][slot.index[row, 0].item()] = True
            return True
    return False


__all__ = ["propagate"]
