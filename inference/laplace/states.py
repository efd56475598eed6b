"""States: the points of a run, and the normal equations there."""

from __future__ import annotations

import torch
from torch import Tensor

from ppl.inference.groups.records import Linearised
from ppl.inference.laplace.problem import Problem, State
from ppl.inference.laplace.systems import check_touched


def init(problem: Problem) -> State:
    """The first point, and the equations there.

    Raises:
        NumericalError: an element is in no factor.
    """
    check_touched(problem)
    options, like = problem.options, problem.groups.like
    with torch.no_grad():
        points = problem.groups.start(options.start)
        scale = like.new_tensor(problem.graduated)
        damping = torch.inf if options.optimiser == "dogleg" else options.damping or 0.0
        zero = torch.zeros((), dtype=torch.long, device=like.device)
        far = like.new_tensor(torch.inf)
        empty = State(
            points, dict(problem.groups.params), like, like, like, like.new_tensor(damping), scale, zero, zero, far, far, points,
            like.new_zeros(0), like.new_zeros(0, 0), like.new_zeros(0, 0),
        )  # fmt: skip
        return moved(problem, empty, points)


def moved(
    problem: Problem, state: State, points: dict[str, Tensor], scale: Tensor | None = None
) -> State:
    """The state at other points."""
    scale = state.kernel_scale if scale is None else scale
    rows = problem.equations.linearise(
        points, state.params, matching=problem.options.matching, kernel_scale=float(scale)
    )
    is_direct = problem.solver != "cg"
    curvature = problem.equations.curvature(rows) if is_direct else problem.groups.like.new_zeros(0)
    return state._replace(
        points=points,
        energy=_energy(problem, rows),
        gradient=problem.equations.gradient(rows),
        curvature=curvature,
        kernel_scale=scale,
        bad_rows=torch.full_like(state.bad_rows, sum(row.dropped for row in rows)),
    )


def _energy(problem: Problem, rows: list[Linearised]) -> Tensor:
    # Summed in double precision: the decrease of a late step is a small difference of these.
    total = torch.stack([row.energy.sum(dtype=torch.float64) for row in rows]).sum()
    return total.to(problem.groups.like.device)


__all__ = ["init", "moved"]
