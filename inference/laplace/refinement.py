"""Digits that a factorisation loses where scales differ much, won back.

``J'J`` squares the ratio of the smallest to the largest standard deviation, so that its factor may have few correct digits
where residuals still have all. Slopes at the solution, from the residuals themselves, show what is missing, and the same
factor solves for it: iterative refinement. Source: [Golub2013] section 3.5.
"""

from __future__ import annotations

from torch import Tensor

from ppl.inference.laplace.problem import Problem, State
from ppl.inference.laplace.proposals import newton
from ppl.inference.laplace.states import moved
from ppl.inference.laplace.systems import make_system

_CLOSE = 1e-6  # posterior standard deviations that are not worth another solve
_MOST = 3  # corrections
INACCURATE = 1e-3  # posterior standard deviations that are worth a warning


def refined(problem: Problem, state: State, new: State) -> tuple[State, Tensor]:
    """The solution of a linear problem, corrected as long as that helps.

    Args:
        problem: linear.
        state: where the step set out.
        new: where it led.

    Returns:
        The corrected state, and the squared length ``[]`` of what is still missing, in posterior standard deviations.
    """
    system = make_system(problem, state)
    left = newton(problem, system, new)
    for _ in range(_MOST):
        if bool(left.decrement <= _CLOSE**2):
            break
        points = problem.groups.retract(new.points, problem.equations.at.split(left.delta))
        tried = moved(problem, new, points)
        after = newton(problem, system, tried)
        if not bool(after.decrement.abs() < left.decrement.abs() / 4):
            break
        new, left = tried, after
    return new, left.decrement.abs()


__all__ = ["INACCURATE", "refined"]
