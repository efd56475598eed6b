"""Going on with more data: old points stay, new elements are placed by their factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ppl.inference.groups.propagation import propagate
from ppl.inference.laplace.problem import Problem, State
from ppl.inference.laplace.states import init, moved
from ppl.inference.laplace.window import closed_window, places


def extend(
    old_problem: Problem,
    old_state: State,
    new_problem: Problem,
    *,
    lag: Mapping[str, int] | None = None,
) -> State:
    """The state from which a run on old and new data goes on.

    Args:
        old_problem: of the data so far.
        old_state: where its run ended.
        new_problem: of the data so far followed by the new rows; old elements keep their positions in their plates.
        lag: number of elements of an ordered plate that stay open, by plate. Older ones keep their last mean and
            covariance, and what their factors say of the open ones is kept as a Gaussian.
    """
    with torch.no_grad():
        points = _grown(old_problem, old_state, new_problem)
        shaped = {n: new_problem.groups.shaped(n, x) for n, x in points.items()}
        options = replace(new_problem.options, start=shaped)
        state = init(replace(new_problem, options=options))._replace(params=dict(old_state.params))
        if lag or old_state.window is not None:
            window = closed_window(old_problem, old_state, new_problem, points, lag or {})
            state = state._replace(window=window)
            return moved(window.problem, state, points)
        return moved(new_problem, state, points) if old_state.params else state


def _grown(old_problem: Problem, old_state: State, new_problem: Problem) -> dict[str, Tensor]:
    """Old points; new ones where their factors place them, else at prior means, zero or the identity."""
    groups = new_problem.groups
    points: dict[str, Tensor] = {}
    placed: dict[str, Tensor] = {}
    for name, family in groups.families.items():
        mean = groups.means.get(name)
        first = None if mean is None else mean(family, points, old_state.params)
        if first is None:
            neutral = family.neutral(groups.like)
            first = neutral.expand(family.count, *neutral.shape)
        at = places(old_problem.groups.families[name].sizes, family.sizes).to(first.device)
        points[name] = first.index_copy(0, at, old_state.points[name])
        placed[name] = torch.zeros(family.count, dtype=torch.bool).index_fill(0, at.cpu(), True)
    return points if new_problem.is_linear else propagate(groups, points, placed)
