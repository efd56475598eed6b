"""Windows of fixed length: elements that leave are integrated out.

All rows that touch them, linearised where they stand, are replaced by the Gaussian that they leave on the others (a Schur
complement). On linear chains this is the Kalman filter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ppl.inference.groups.equations import Equations
from ppl.inference.groups.growth import lagging, newcomers, places
from ppl.inference.groups.records import Family, Group, Slot
from ppl.inference.laplace.problem import Problem, State, Window, choose_solver
from ppl.inference.laplace.spread import spread_of
from ppl.inference.laplace.summaries import SUMMARY, masked, same, summed_up, touches

_CLOSED = "(closed)"


def closed_window(
    old_problem: Problem,
    old_state: State,
    new_problem: Problem,
    points: dict[str, Tensor],
    lag: Mapping[str, int],
) -> Window:
    """Close what is older than the lag, on top of what was closed before.

    >>> import ppl
    >>> @ppl.model
    ... def walk():
    ...     with ppl.plate("time", ordered=True):
    ...         first, later = ppl.Normal(0.0, 1.0), lambda x: ppl.Normal(x, 1.0)
    ...         level = ppl.latent("level", ppl.Markov(first, later))
    ...         ppl.observe("y", ppl.Normal(level, 1.0))
    >>> posterior = ppl.infer(walk, {"y": [1.0, 2.0]}, method="laplace")
    >>> posterior.extend({"y": [3.0]}, lag={"time": 1}).mean("level")[-1]  # as of a Kalman filter
    tensor(2.3846, dtype=torch.float64)
    """
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
            if g.name == SUMMARY
        ]
    older = _older(old_problem.groups.families, families, lag)
    closing = {n: old & ~shut[n] for n, old in older.items()}
    covariances = _covariances(old_problem, old_state, families, closing)
    groups = [_without(g, touches(g, shut)) for g in new_problem.groups.groups]
    groups += extra
    if any(bool(c.any()) for c in closing.values()):
        left = summed_up(new_problem, groups, points, old_state.params, closing)
        groups = [_without(g, touches(g, closing)) for g in groups if g.name != SUMMARY] + left
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
            fresh = newcomers(before[group.name].sizes, group.sizes)
        count += int((touches(group, shut) & fresh).sum())
    return count


def _problem_of(problem: Problem, groups: list[Group]) -> Problem:
    made = replace(problem.groups, groups=tuple(groups))
    equations = Equations(made)
    return replace(
        problem, groups=made, equations=equations, solver=choose_solver(equations, problem.options)
    )


def _older(
    old: Mapping[str, Family], families: Mapping[str, Family], lag: Mapping[str, int]
) -> dict[str, Tensor]:
    """Elements before the last ``lag[plate]`` of a plate; new ones stay open, whose covariances nobody knows yet."""
    first = lagging(families, lag)
    found = {}
    for name, family in families.items():
        shut = torch.zeros(family.sizes, dtype=torch.bool)
        for axis, plate in enumerate(family.plates):
            if plate in first:
                shut.narrow(axis, 0, first[plate]).fill_(True)
        found[name] = shut.reshape(-1) & ~newcomers(old[name].sizes, family.sizes)
    return found


def _without(group: Group, rows: Tensor) -> Group:
    """The group with some rows absent; their constants still count, once."""
    if not bool(rows.any()):
        return group
    return masked(group, ~rows)


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
                norm=partial(same, norm),
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
