"""Windows of fixed length: elements that leave are integrated out.

All rows that touch them, linearised where they stand, are replaced by the Gaussian that they leave on the others (a Schur
complement). On linear chains this is the Kalman filter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl.errors import DataError
from ppl.inference.groups.coordinates import Coordinates
from ppl.inference.groups.equations import Equations
from ppl.inference.groups.linearise import linearise
from ppl.inference.groups.records import Family, Group, Slot
from ppl.inference.laplace.problem import Problem, State, Window, choose_solver
from ppl.inference.laplace.spread import spread_of
from ppl.inference.laplace.systems import undetermined

_SUMMARY, _CLOSED = "(summary of what is closed)", "(closed)"


def places(old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Where the elements of plates of sizes ``old`` stand in grown plates.

    >>> places((2, 2), (3, 4))
    tensor([0, 1, 4, 5])
    """
    if len(old) != len(new) or any(a > b for a, b in zip(old, new, strict=True)):
        raise DataError(
            f"extend: plates of sizes {list(old)} cannot have become {list(new)}: plates only grow. Fit the new data by "
            "itself with prior=posterior."
        )
    grid = torch.arange(math.prod(new)).reshape(tuple(new))
    return grid[tuple(slice(0, n) for n in old)].reshape(-1)


@dataclass(frozen=True, eq=False)
class Summary:
    """A Gaussian on some elements: ``|root (x - origin) - shift|^2 / 2``, with ``x - origin`` in the tangent space.

    ``root [D, D]``; elements of one slot after the other.
    """

    families: tuple[Family, ...]
    origins: tuple[Tensor, ...]  # [B, *event]
    root: Tensor
    shift: Tensor

    def __call__(self, values: Any, params: Any) -> Tensor:
        moves = [
            f.local(o, v).reshape(len(v), -1)
            for f, o, v in zip(self.families, self.origins, values, strict=True)
        ]
        return torch.cat(moves, -1) @ self.root.T - self.shift


def closed_window(
    old_problem: Problem,
    old_state: State,
    new_problem: Problem,
    points: dict[str, Tensor],
    lag: Mapping[str, int],
) -> Window:
    """Close what is older than the lag, on top of what was closed before."""
    families = new_problem.groups.families
    before = old_state.window
    shut = {n: torch.zeros(f.count, dtype=torch.bool) for n, f in families.items()}
    extra: list[Group] = []
    if before is not None:
        for name, family in families.items():
            at = places(old_problem.groups.families[name].sizes, family.sizes)
            shut[name] = shut[name].index_copy(0, at, before.closed[name])
        extra = [
            _regrown(g, families, old_problem)
            for g in before.problem.groups.groups
            if g.name == _SUMMARY
        ]
    closing = {n: old & ~shut[n] for n, old in _older(families, lag).items()}
    covariances = _covariances(old_problem, old_state, families, closing)
    groups = [_without(g, _touches(g, shut)) for g in new_problem.groups.groups]
    groups += extra
    if any(bool(c.any()) for c in closing.values()):
        left = _summed_up(new_problem, groups, points, old_state.params, closing)
        groups = [_without(g, _touches(g, closing)) for g in groups if g.name != _SUMMARY] + left
    closed = {n: shut[n] | closing[n] for n in families}
    groups += _pins(new_problem, points, closed)
    lost = _lost(old_problem, new_problem, shut)
    return Window(_problem_of(new_problem, groups), closed, covariances, lost)


def _lost(old: Problem, new: Problem, shut: Mapping[str, Tensor]) -> int:
    """New rows that touch elements closed before: too late for them."""
    before = {g.name: g for g in old.groups.groups}
    count = 0
    for group in new.groups.groups:
        fresh = torch.ones(group.rows, dtype=torch.bool)
        if group.name in before:
            fresh[places(before[group.name].sizes, group.sizes)] = False
        count += int((_touches(group, shut) & fresh).sum())
    return count


def _problem_of(problem: Problem, groups: list[Group]) -> Problem:
    made = replace(problem.groups, groups=tuple(groups))
    equations = Equations(made)
    return replace(
        problem, groups=made, equations=equations, solver=choose_solver(equations, problem.options)
    )


def _older(families: Mapping[str, Family], lag: Mapping[str, int]) -> dict[str, Tensor]:
    """Elements before the last ``lag[plate]`` of a plate."""
    sizes = {p: n for f in families.values() for p, n in zip(f.plates, f.sizes, strict=True)}
    for plate, length in lag.items():
        if plate not in sizes:
            raise DataError(
                f"extend(lag=...): no latent lies in plate '{plate}'. Plates: {', '.join(sizes)}."
            )
        if length < 1:
            raise DataError(
                f"extend(lag=...): expected at least 1 element of '{plate}', got {length}."
            )
    found = {}
    for name, family in families.items():
        old = torch.zeros(family.sizes, dtype=torch.bool)
        for axis, plate in enumerate(family.plates):
            if plate in lag:
                old.narrow(axis, 0, max(sizes[plate] - lag[plate], 0)).fill_(True)
        found[name] = old.reshape(-1)
    return found


def _touches(group: Group, elements: Mapping[str, Tensor]) -> Tensor:
    """Rows that touch one of the elements ``[F]``; an earlier summary always goes into the next one."""
    if group.name == _SUMMARY:
        return torch.ones(1, dtype=torch.bool)
    hit = torch.zeros(group.rows, dtype=torch.bool)
    for slot in group.slots:
        hit |= elements[slot.family][slot.index.to("cpu")].any(-1)
    return hit


def _without(group: Group, rows: Tensor) -> Group:
    """The group with some rows absent; their constants still count, once."""
    if not bool(rows.any()):
        return group
    return _masked(group, ~rows)


def _masked(group: Group, rows: Tensor) -> Group:
    here = group.slots[0].index.device
    kept = rows.to(here, torch.float64 if group.keep is None else group.keep.dtype)
    if group.keep is not None:
        kept = group.keep * kept.reshape(-1, *(1,) * (group.keep.ndim - 1))
    return replace(group, keep=kept)


def _summed_up(
    problem: Problem,
    groups: list[Group],
    points: dict[str, Tensor],
    params: Mapping[str, Tensor],
    closing: Mapping[str, Tensor],
) -> list[Group]:
    """The Gaussian that rows leave on the open elements when the closing ones are integrated out."""
    touched = [_masked(g, _touches(g, closing)) for g in groups]
    equations = Equations(replace(problem.groups, groups=tuple(touched)))
    at = equations.at
    rows = [
        linearise(g, g.gather(points), params, matching=problem.options.matching) for g in touched
    ]
    scalars, gone = _involved(equations, touched, closing)
    lam = equations.matrix(equations.curvature(rows)).tocsr()
    place = equations.ordering.positions[scalars]
    dense = torch.from_numpy(lam[place][:, place].toarray())
    eta = -equations.gradient(rows).to("cpu", torch.float64)[torch.from_numpy(scalars)]
    inside = torch.from_numpy(gone)
    energy = sum(float(r.energy.sum(dtype=torch.float64)) for r in rows)
    try:
        root = torch.linalg.cholesky(dense[inside][:, inside])
    except torch.linalg.LinAlgError:
        raise undetermined(problem, scalars[gone]) from None
    half = torch.linalg.solve_triangular(root, dense[inside][:, ~inside], upper=False)
    known = torch.linalg.solve_triangular(root, eta[inside].unsqueeze(-1), upper=False).squeeze(-1)
    # Integrated out: what is left of the energy at the origin, and half a log determinant.
    constant = 0.5 * float(known @ known) - energy - float(root.diagonal().log().sum())
    constant += 0.5 * int(inside.sum()) * math.log(2 * math.pi)
    constant += sum(float(g.log_norm(params).sum()) for g in touched if g.name == _SUMMARY)
    rest = dense[~inside][:, ~inside] - half.T @ half
    shift = eta[~inside] - half.T @ known
    return _summary(problem, at, points, scalars[~gone], rest, shift, constant)


def _involved(
    equations: Equations, touched: list[Group], closing: Mapping[str, Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """Scalars of all elements that rows touch, in order, and which of them close."""
    families = equations.groups.families
    seen = {n: torch.zeros(f.count, dtype=torch.bool) for n, f in families.items()}
    for group in touched:
        rows = torch.nonzero(_touches(group, closing)).flatten()
        for slot in group.slots:
            seen[slot.family][slot.index.to("cpu")[rows].reshape(-1)] = True
    wide = {n: x.repeat_interleave(families[n].dims) for n, x in seen.items()}
    shut = {n: x.repeat_interleave(families[n].dims) for n, x in closing.items()}
    flat = torch.cat([wide[n] for n in families]).numpy()
    scalars = np.flatnonzero(flat)
    return scalars, torch.cat([shut[n] for n in families]).numpy()[scalars]


def _summary(
    problem: Problem,
    at: Coordinates,
    points: dict[str, Tensor],
    scalars: np.ndarray,
    lam: Tensor,
    eta: Tensor,
    constant: float,
) -> list[Group]:
    """A group of one row for the Gaussian ``(eta, lam)`` around the points of some scalars."""
    if not len(scalars):
        return [_constant(problem, constant)] if problem.groups.families else []
    like = problem.groups.like
    # A root by eigenvectors: the Gaussian may be improper, where nothing is known of a direction.
    values, vectors = torch.linalg.eigh(lam)
    top = values.clamp(min=1e-14 * float(values[-1]) + 1e-300).sqrt()
    root, shift = top.unsqueeze(-1) * vectors.T, (vectors.T @ eta) / top
    slots, families, origins = [], [], []
    for name, family in at.families.items():
        begin = at.offsets[name]
        own = scalars[(scalars >= begin) & (scalars < begin + family.count * family.dims)]
        if len(own):
            index = torch.from_numpy((own[:: family.dims] - begin) // family.dims).to(like.device)
            slots.append(Slot(name, index.unsqueeze(0)))
            families.append(family)
            origins.append(points[name][index])
    law = Summary(tuple(families), tuple(origins), root.to(like), shift.to(like))
    # |root d - shift|^2 / 2 has the constant |shift|^2 / 2 that the energy at the origin does not have.
    total = like.new_tensor([constant + 0.5 * float(shift @ shift)])
    return [_one_row(tuple(slots), tuple(families), law, total)]


def _one_row(slots: Any, families: Any, law: Any, constant: Tensor) -> Group:
    affine = all(f.manifold is None for f in families)
    return Group(
        _SUMMARY,
        slots,
        families,
        law,
        site=_SUMMARY,
        is_affine=affine,
        is_fixed=affine,
        norm=partial(_same, constant),
    )


def _constant(problem: Problem, constant: float) -> Group:
    """Nothing is left open: only the evidence of what was closed stays."""
    name, family = next(iter(problem.groups.families.items()))
    like = problem.groups.like
    slot = Slot(name, torch.zeros(1, 1, dtype=torch.long, device=like.device))
    width = family.dims
    law = Summary(
        (family,), (family.neutral(like).unsqueeze(0),), like.new_zeros(1, width), like.new_zeros(1)
    )
    return _one_row((slot,), (family,), law, like.new_tensor([constant]))


def _same(value: Tensor, params: Any) -> Tensor:
    """A constant that reads no params."""
    return value


def _pins(
    problem: Problem, points: Mapping[str, Tensor], closed: Mapping[str, Tensor]
) -> list[Group]:
    """Closed elements stay where they are: a unit Gaussian each, whose integral is one."""
    pins = []
    for name, family in problem.groups.families.items():
        index = torch.nonzero(closed[name]).to(problem.groups.like.device)
        if not len(index):
            continue
        origin = points[name][index[:, 0]]
        norm = origin.new_full((len(index),), -0.5 * family.dims * math.log(2 * math.pi))

        def residual(
            values: Any, params: Any, family: Family = family, origin: Tensor = origin
        ) -> Tensor:
            return family.local(origin, values[0][:, 0])

        pins.append(
            Group(
                f"{name} {_CLOSED}",
                (Slot(name, index),),
                (family,),
                residual,
                site=f"{name} {_CLOSED}",
                is_affine=family.manifold is None,
                is_fixed=family.manifold is None,
                norm=partial(_same, norm),
            )
        )
    return pins


def _regrown(summary: Group, families: Mapping[str, Family], old: Problem) -> Group:
    """The summary of a smaller problem, in the positions of the grown one."""
    slots = []
    for slot in summary.slots:
        at = places(old.groups.families[slot.family].sizes, families[slot.family].sizes)
        slots.append(Slot(slot.family, at.to(slot.index.device)[slot.index]))
    return replace(summary, slots=tuple(slots), families=tuple(families[s.family] for s in slots))


def _covariances(
    problem: Problem, state: State, families: Mapping[str, Family], closing: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Covariances of all elements before the new data; the closed ones keep theirs."""
    found = {}
    spread = spread_of(problem, state)[0] if any(bool(c.any()) for c in closing.values()) else None
    for name, family in families.items():
        like = problem.groups.like
        whole = like.new_zeros(family.count, family.dims, family.dims)
        at = places(problem.groups.families[name].sizes, family.sizes).to(like.device)
        if spread is not None:
            whole = whole.index_copy(0, at, spread.covariance(name))
        elif state.window is not None:
            whole = whole.index_copy(0, at, state.window.covariances[name])
        found[name] = whole
    return found
