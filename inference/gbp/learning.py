"""Learning of params by expectation maximisation, around the rounds of messages.

Whenever the messages have converged, the beliefs of the factors that read params are the E-step.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ppl.backend import Info
from ppl.inference.gbp import kernel
from ppl.inference.gbp.evidence import joint_covariance
from ppl.inference.gbp.final import Final, finished
from ppl.inference.gbp.models import linear_model
from ppl.inference.gbp.problem import Problem
from ppl.inference.gbp.state import State
from ppl.inference.groups.learning import learn

_STILL = 1e-4  # relative change of the params below which they have settled, at most


def step(problem: Problem, state: State, batch: Any = None) -> tuple[State, Info]:
    """One round of messages; where they have converged, new params, until these have settled too."""
    state, info = kernel.step(problem, state, batch)
    if not state.run.converged or not problem.groups.params:
        return state, info
    with torch.no_grad():
        state = _learned(problem, state)
    return state, kernel.info_of(state)


def _learned(problem: Problem, state: State) -> State:
    final = finished(problem, state)
    covariances = {g.name: _covariance(final, g) for g in problem.groups.groups if g.params}
    new = learn(problem.groups, final.charts.points, state.params, covariances)
    change = max(
        float(((new[n] - old).abs() / old.abs().clamp(min=1e-8)).amax())
        for n, old in state.params.items()
    )
    if change < min(_STILL, problem.tol):
        return state
    models = {
        g.name: linear_model(g, final.charts.points, new).model for g in problem.groups.groups
    }
    fresh = torch.full_like(state.run.history, math.inf)
    fresh[-1] = state.run.history[-1]
    run = state.run._replace(converged=False, settled=False, since=0, rising=0, history=fresh)
    moved = kernel.started(problem, final.charts._replace(models=models), run, new)
    return moved._replace(round=state.round)


def _covariance(final: Final, group: Any) -> torch.Tensor:
    sent = final.charts.messages.get(group.name)
    found = joint_covariance(final.problem, group, final.rows[group.name], sent, final.beliefs)
    return torch.nan_to_num(found)  # absent rows have none, and do not count


__all__ = ["step"]
