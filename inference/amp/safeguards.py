"""What keeps message passing honest: the choice of a variant, refused steps, and a loop nothing impossible leaves.

GAMP is exact on large random matrices and may run away on others; VAMP allows any spectrum at the price of a
factorisation.  A probe of the spectrum picks between them and says why.  Inside the loop a step that is not finite
or raises the objective is refused, the last accepted state comes back, and what was refused is counted.

Sources: [Vila2015] for adaptive steps and mean removal, [Rangan2019] for the spectra GAMP cannot take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from ppl.inference.amp.centering import remove_means
from ppl.inference.amp.linear_map import Operator

State = TypeVar("State", bound=tuple)

_SLACK = 1e-3  # share of |J| by which a step may raise the objective
_GAP_SLACK = 1.1  # factor by which a step may widen the gap between the beliefs
_STRUGGLES = 5  # refused steps; on matrices that suit a variant there are none or one
_MEAN_SHARE = (
    20.0  # row and column means count as large above so many times their share under i.i.d. entries
)


class Info(NamedTuple):
    """What one step did; every field ``[*batch]``."""

    change: Tensor  # relative change of the mean over the step size; inf if the step was refused
    objective: Tensor  # J in nats, of the step as tried
    accepted: Tensor  # bool
    step_size: Tensor  # with which it was tried
    refused: Tensor  # messages and steps refused so far, counts
    diverged: Tensor  # bool: the step control is at its end, or nothing finite comes out
    struggling: Tensor  # bool: so many steps refused that another variant is worth a try


class Control(NamedTuple):
    """Memory of the step control; every field ``[*batch, .]``."""

    step_size: Tensor  # [*batch, 1]
    objectives: Tensor  # [*batch, 5]: of the last accepted steps, -inf before the first
    gaps: Tensor  # [*batch, 5]: squared distance of the two beliefs, likewise
    refused: Tensor  # [*batch, 1]: steps refused so far
    in_a_row: Tensor  # [*batch, 1]: of these, since the last accepted one


class Choice(NamedTuple):
    """The variant for an operator, and the sentence that says why."""

    variant: Literal["gamp", "vamp"]
    variances: Literal["scalar", "vector"]  # of GAMP
    solver: Literal["factor", "cg"]  # of VAMP
    remove_means: bool
    why: str


class Outcome(NamedTuple):
    """End of a run."""

    state: Any
    infos: Info  # every field [iterations, *batch]
    converged: Tensor  # bool [*batch]
    diverged: Tensor  # bool [*batch]
    iterations: int


def choose(operator: Operator, *, factor_limit: int = 6000) -> Choice:
    """Pick the variant by a probe of the spectrum.

    ``remove_means`` also stands in a choice of VAMP, which does not need it: it says that GAMP would.

    Args:
        operator: the linear map.
        factor_limit: largest ``min(m, n)`` whose Gram matrix is factorised.

    Source: the edge of the i.i.d. spectrum is ``(1 + sqrt(n / m))^2`` [MarchenkoPastur1967].

    >>> from ppl.inference.amp.operators import dense
    >>> choose(dense(torch.randn(200, 400, generator=torch.Generator().manual_seed(0)))).variant
    'gamp'
    """
    peak, limit = operator.probe.peak, _limit(operator)
    seen, means = f"largest eigenvalue of A'A {peak:.1f} times their mean", _has_means(operator)
    if peak <= limit and not means:
        why = f"{seen}, as an i.i.d. matrix has it (up to {limit:.1f}): GAMP, scalar variances"
        return Choice("gamp", "scalar", "factor", False, why)
    seen += f", where an i.i.d. matrix has at most {limit:.1f}" if peak > limit else ""
    if min(operator.shape) <= factor_limit:
        why = f"{seen}{_because(means)}: VAMP, its Gram matrix factorised once"
        return Choice("vamp", "scalar", "factor", means, why)
    if means and remove_means(operator).operator.probe.peak <= limit:
        why = f"{seen}, all of it in the row and column means: GAMP with these removed"
        return Choice("gamp", "vector", "cg", True, why)
    why = f"{seen}{_because(means)}, too large to factorise: VAMP by conjugate gradients"
    return Choice("vamp", "scalar", "cg", means, why)


def run(
    step: Callable[[State], tuple[State, Info]],
    state: State,
    *,
    tol: float = 1e-6,
    max_iters: int = 200,
) -> Outcome:
    """Iterate ``step`` until every batch element has converged or diverged."""
    infos: list[Info] = []
    converged = diverged = torch.zeros((), dtype=torch.bool)
    for _ in range(max_iters):
        state, info = step(state)
        infos.append(info)
        diverged = info.diverged
        converged = (info.change <= tol) & ~diverged
        if bool((converged | diverged).all()):
            break
    stacked = Info(*(torch.stack(field) for field in zip(*infos, strict=True)))
    return Outcome(state, stacked, converged, diverged, len(infos))


def start_control(like: Tensor, step_size: float, window: int = 5) -> Control:
    """A control that has seen nothing, for the batch axes of ``like [*batch, n]``."""
    column = like.new_zeros(*like.shape[:-1], 1)
    empty = like.new_full((*like.shape[:-1], window), -torch.inf)
    return Control(column + step_size, empty, empty, column, column)


def judge(
    control: Control,
    objective: Tensor | None,
    gap: Tensor,
    finite: Tensor,
    bounds: tuple[float, float],
    rates: tuple[float, float] = (0.5, 1.1),
) -> tuple[Tensor, Control]:
    """Accept or refuse a tried step, and adapt the step size.

    Accepted is what is finite and, by the objective or by the gap, no worse than the worst of the
    last accepted steps.  The gap is the squared distance between what the two sides of the linear map
    believe of the same variables: zero at a fixed point, growing where the iteration runs away.

    Args:
        control: memory before the step.
        objective: of the step ``[*batch, 1]``; None if only the gap counts.
        gap: of the step ``[*batch, 1]``.
        finite: bool ``[*batch, 1]``.
        bounds: smallest and largest step size.
        rates: factors of the step size after a refused and after an accepted step.

    Returns:
        Accepted, bool ``[*batch, 1]``, and the new memory.

    Source: [Vila2015] section III.  Differs from it, which has no gap: before the
    beliefs agree, J can fall below its value at the fixed point, and rise from there on the right way.
    """
    worst = control.gaps.amax(-1, keepdim=True)
    good = (gap <= _GAP_SLACK * worst) | (worst == -torch.inf)
    objectives = control.objectives
    if objective is not None:
        worst = objectives.amax(-1, keepdim=True)
        good |= (objective <= worst + _SLACK * worst.abs()) | (worst == -torch.inf)
        objectives = _moved(objectives, torch.where(objective < torch.inf, objective, -torch.inf))
    accepted = finite & good
    grown = (control.step_size * rates[1]).clamp(max=bounds[1])
    gaps, none = _moved(control.gaps, gap), torch.zeros_like(control.in_a_row)
    on = Control(grown, objectives, gaps, control.refused, none)
    if bool(accepted.all()):
        return accepted, on
    shrunk = (control.step_size * rates[0]).clamp(min=bounds[0])
    back = control._replace(
        step_size=shrunk, refused=control.refused + 1.0, in_a_row=control.in_a_row + 1.0
    )
    return accepted, select(accepted, on, back)


def forget_objectives(control: Control) -> Control:
    """The same control with nothing to compare with: after new parameters objectives cannot be compared."""
    empty = torch.full_like(control.objectives, -torch.inf)
    return control._replace(objectives=empty, gaps=empty)


def is_at_end(control: Control, smallest: float) -> Tensor:
    """Whether a step of the smallest size has been refused as well ``[*batch, 1]``."""
    return (control.in_a_row >= 2.0) & (control.step_size <= smallest)


def is_struggling(control: Control) -> Tensor:
    """Whether the variant and the matrix do not go together ``[*batch, 1]``."""
    return control.refused >= _STRUGGLES


def all_finite(*tensors: Tensor) -> Tensor:
    """Whether every entry along the last axis is finite, of all tensors: bool ``[*batch, 1]``.

    One sum a tensor: what is not finite survives it, and what overflows in it is refused as well.
    """
    total = sum(each.sum(-1, keepdim=True) for each in tensors)
    return total.abs() < torch.inf  # type: ignore[union-attr]


def select(accepted: Tensor, new: State, old: State) -> State:
    """Field by field, ``new`` where accepted ``[*batch, 1]`` and ``old`` elsewhere."""
    if bool(accepted.all()):
        return new
    return type(new)(
        *(
            select(accepted, a, b) if isinstance(a, tuple) else torch.where(accepted, a, b)
            for a, b in zip(new, old, strict=True)
        )
    )


def _moved(window: Tensor, value: Tensor) -> Tensor:
    return torch.cat([window[..., 1:], value], -1)


def _limit(operator: Operator) -> float:
    """Largest eigenvalue over the mean one that passes for i.i.d."""
    m, n = operator.shape
    return 1.5 * (1.0 + (n / m) ** 0.5) ** 2


def _because(means: bool) -> str:
    return " and rows or columns share a mean" if means else ""


def _has_means(operator: Operator) -> bool:
    """Whether row and column means carry much more than chance gives them, (m + n) / (m n) of the squares."""
    m, n = operator.shape
    return operator.probe.mean_share > _MEAN_SHARE * (m + n) / (m * n)
