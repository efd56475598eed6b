"""What is tried when messages do not converge: more damping, then a proximal factor around the means [Johnson2009]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ppl.inference.gbp.problem import Problem
from ppl.inference.groups.equations import Equations
from ppl.inference.numerics.sparse import NotPositive

_LARGE = 20_000_000  # pairs beyond which no matrix is made
_POWERS = 60  # of the power method


class Cure(NamedTuple):
    """Settings to go on with."""

    damping: float
    proximal: float
    policy: int | str


def cures(problem: Problem) -> list[Cure]:
    """What to try, in order."""
    plan, options = problem.plan, problem.options
    if not options.cure:
        return []
    if plan.is_linear:
        half, summable = max(plan.damping, 0.5), max(_spread(problem) - 1, 0.05)
        return [Cure(half, g * summable, plan.relinearise) for g in (0.0, 1.0, 3.0, 10.0)]
    held = options.proximal or 0.0
    # With a strong enough proximal factor every round is a damped Gauss-Newton step of its own.
    ladder = [Cure(0.0, max(held, g), 1) for g in (0.5, 2.0, 10.0)]
    patient = Cure(max(plan.damping, 0.4), held, "jit" if problem.moving else plan.relinearise)
    is_new = (patient.damping, patient.policy) != (plan.damping, plan.relinearise)
    return [patient, *ladder] if is_new and problem.edges else ladder


def _pair_count(problem: Problem) -> int:
    return sum(g.rows * sum(s.width for s in g.slots) ** 2 for g in problem.groups.groups)


def _spread(problem: Problem) -> float:
    """Spectral radius of |R| for the precision ``I - R`` scaled to unit diagonal.

    Below one the graph is walk-summable. A proximal factor of this radius less one makes it so
    [Malioutov2006], [Johnson2009].
    """
    equations = Equations(problem.groups)
    if _pair_count(problem) > _LARGE:
        return 2.0
    rows = equations.linearise(problem.groups.start({}), problem.groups.params)
    matrix = abs(equations.matrix(equations.curvature(rows)))
    root = np.sqrt(matrix.diagonal())
    vector, radius = np.ones(len(root)), 1.0
    for _ in range(_POWERS):
        image = matrix @ (vector / root) / root  # |I| + |R| on the scaled vector
        radius = float(np.linalg.norm(image) / np.linalg.norm(vector)) - 1
        vector = image / np.linalg.norm(image)
    return 1.05 * radius


def is_determined(problem: Problem, points: Mapping[str, Tensor]) -> bool:
    """Whether all rows together place every variable, even if no message does; taken for granted of large graphs."""
    if _pair_count(problem) > _LARGE:
        return True
    equations = Equations(problem.groups)
    rows = equations.linearise(points, problem.groups.params)
    try:
        return equations.factorise(equations.curvature(rows)).is_positive
    except NotPositive:
        return False


__all__ = ["Cure", "cures", "is_determined"]
