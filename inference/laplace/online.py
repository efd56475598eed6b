"""Going on with more data: old points stay, new elements are placed by their factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ppl.inference.groups.growth import grown_points
from ppl.inference.laplace.problem import Problem, State
from ppl.inference.laplace.states import init, moved
from ppl.inference.laplace.window import closed_window


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
            covariance, and what their factors say of the open ones is kept as a Gaussian. New ones are always open.
    """
    with torch.no_grad():
        points = grown_points(
            old_problem.groups, old_state.points, new_problem.groups, old_state.params
        )
        shaped = {n: new_problem.groups.shaped(n, x) for n, x in points.items()}
        options = replace(new_problem.options, start=shaped)
        state = init(replace(new_problem, options=options))._replace(params=dict(old_state.params))
        if lag or old_state.window is not None:
            window = closed_window(old_problem, old_state, new_problem, points, lag or {})
            state = state._replace(window=window)
            return moved(window.problem, state, points)
        return moved(new_problem, state, points) if old_state.params else state


__all__ = ["extend"]
