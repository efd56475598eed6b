"""When rows are linearised again, and the move of all charts to the means that goes with it.

Policies: every so many rounds; just in time, each row by itself when its variables have moved; or all rows
when the linear problem has converged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.inference.gbp.models import (
    Model,
    carried,
    carried_model,
    change_of_chart,
    linear_model,
)
from ppl.inference.gbp.problem import Problem
from ppl.inference.groups import Group
from ppl.inference.numerics.gaussian import Gaussian

_EARLY = (3, 8)  # rounds at which every row may move, whatever its age, as in [Ortiz2020]


class Clock(NamedTuple):
    """Of every row: rounds since it was linearised, and how far its charts have moved since."""

    age: Tensor  # [F], whole numbers
    drift: tuple[Tensor, ...]  # [F, B, d] a slot


class Charts(NamedTuple):
    """Everything that is written in coordinates about the variables' points."""

    points: Mapping[str, Tensor]  # family: [N, *event]
    models: Mapping[str, Model]  # group
    messages: Mapping[str, tuple[Gaussian, ...]]  # group with edges -> slot
    clocks: Mapping[str, Clock]  # group that is not affine


class Moved(NamedTuple):
    """Charts after a move, and what was done."""

    charts: Charts
    rows: int  # linearised again
    is_moved: bool


def new_clock(group: Group, like: Tensor) -> Clock:
    """A clock that has just started."""
    age = torch.zeros(group.rows, dtype=torch.long, device=like.device)
    drift = tuple(
        like.new_zeros(*s.index.shape, f.dims)
        for s, f in zip(group.slots, group.families, strict=True)
    )
    return Clock(age, drift)


def displacement(
    group: Group, clock: Clock, means: Mapping[str, Tensor], sds: Mapping[str, Tensor]
) -> Tensor:
    """How far ``[F]`` the means lie from where each row was linearised, in standard deviations of the beliefs."""
    largest = clock.age.new_zeros(group.rows, dtype=means[group.families[0].name].dtype)
    places = zip(group.gather(means), group.gather(sds), clock.drift, strict=True)
    for mean, sd, drift in places:
        moved = ((drift + mean).abs() / sd).flatten(1)
        largest = torch.maximum(largest, moved.amax(1))
    return largest


def due_rows(
    problem: Problem,
    charts: Charts,
    means: Mapping[str, Tensor],
    sds: Mapping[str, Tensor],
    *,
    policy: int | str,
    at: int,
    settled: bool,
) -> dict[str, Tensor]:
    """Masks ``[F]`` of the rows to linearise in round ``at``; groups without any are left out.

    A problem that has settled moves every row that is displaced by more than the tolerance, so that the answer is that
    of the nonlinear problem whatever the threshold.
    """
    found = {}
    for group in problem.moving:
        clock = charts.clocks[group.name]
        if isinstance(policy, int):
            due = torch.full_like(clock.age, at % policy == 0, dtype=torch.bool)
        elif settled:
            due = displacement(group, clock, means, sds) > problem.tol
        elif policy == "outer":
            continue
        else:
            far = displacement(group, clock, means, sds) > problem.options.threshold
            due = far & ((clock.age >= problem.options.min_linear) | (at in _EARLY))
        if bool(due.any()):
            found[group.name] = due
    return found


def moved(
    problem: Problem,
    charts: Charts,
    means: Mapping[str, Tensor],
    due: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
) -> Moved:
    """Move the charts to the means and linearise the rows that are due there."""
    older = {n: Clock(c.age + 1, c.drift) for n, c in charts.clocks.items()}
    if not due:
        return Moved(charts._replace(clocks=older), 0, False)
    carried_over = at_means(problem, charts._replace(clocks=older), means)
    models, clocks, rows = dict(carried_over.models), dict(carried_over.clocks), 0
    for group in problem.moving:
        if group.name in due:
            made = linear_model(group, carried_over.points, params)
            mask = due[group.name]
            models[group.name] = _merged(mask, made.model, models[group.name])
            clocks[group.name] = _restarted(mask, clocks[group.name])
            rows += int(mask.sum())
    return Moved(carried_over._replace(models=models, clocks=clocks), rows, True)


def at_means(problem: Problem, charts: Charts, means: Mapping[str, Tensor]) -> Charts:
    """Re-express points, models, messages and drifts about the means.

    On a manifold precisions are turned by the derivative of the change of charts, not kept.
    """
    groups = problem.groups
    points = groups.retract(charts.points, means)
    turns = {n: change_of_chart(f, charts.points[n], points[n]) for n, f in groups.families.items()}
    models, messages, clocks = {}, {}, {}
    for group in groups.groups:
        delta = group.gather(means)
        turn = _turns(group, turns)
        models[group.name] = carried_model(charts.models[group.name], delta, turn)
        if group.name in charts.messages:
            sent = charts.messages[group.name]
            messages[group.name] = tuple(
                carried(m, x, t) for m, x, t in zip(sent, delta, turn, strict=True)
            )
        if group.name in charts.clocks:
            clock = charts.clocks[group.name]
            drift = tuple(a + b for a, b in zip(clock.drift, delta, strict=True))
            clocks[group.name] = Clock(clock.age, drift)
    return Charts(points, models, messages, clocks)


def _turns(group: Group, turns: Mapping[str, Tensor | None]) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for slot in group.slots:
        turn = turns[slot.family]
        found.append(None if turn is None else turn[slot.index])
    return found


def _merged(mask: Tensor, new: Model, old: Model) -> Model:
    if bool(mask.all()):
        return new
    jacobian = tuple(
        torch.where(mask[:, None, None, None], a, b)
        for a, b in zip(new.jacobian, old.jacobian, strict=True)
    )
    return Model(jacobian, torch.where(mask[:, None], new.outputs, old.outputs))


def _restarted(mask: Tensor, clock: Clock) -> Clock:
    drift = tuple(torch.where(mask[:, None, None], 0.0, x) for x in clock.drift)
    return Clock(torch.where(mask, 0, clock.age), drift)


__all__ = [
    "Charts",
    "Clock",
    "Moved",
    "at_means",
    "displacement",
    "due_rows",
    "moved",
    "new_clock",
]
