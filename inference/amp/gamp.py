"""Generalised approximate message passing for ``y ~ p(y | A x)``, ``x ~ p(x)``, both separable.

A sweep alternates two scalar problems: outputs, seen through ``N(z; p, vp)`` by the channel, and coefficients, seen
through ``N(x; r, vr)`` by the prior.  It costs one product with ``A`` and one with its transpose (two more of each with
``A * A`` for a variance per element).  On large random matrices its error is that of state evolution; elsewhere
it may run away, which the step control sees: a step that raises the objective is undone and halved.  So is the size
of a step that takes the last one back, a circle of two sweeps that the objective does not see.

Sources: [Rangan2011] algorithms 1 and 2; damping and control [Vila2015].  ``A`` is not scaled to a common norm:
every limit is relative to the prior's scale instead, which has the same effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ppl.inference.amp.evidence import gamp_free_energy, map_objective
from ppl.inference.amp.operators import Operator
from ppl.inference.amp.rules.record import Moments, Rule
from ppl.inference.amp.safeguards import (
    Control,
    Info,
    all_finite,
    forget_objectives,
    is_at_end,
    is_struggling,
    judge,
    select,
    start_control,
)

_LARGE = 1e11  # limit of a variance, in units of its prior value
_SMALL = 1e-12  # limit of a precision, likewise
_CIRCLES = (
    -0.9
)  # of the last residual stands in this one with the other sign: a circle of two sweeps
_CURB = 0.5  # factor of the step size then


@dataclass(frozen=True)
class Problem:
    """What stays the same during a run."""

    operator: Operator
    kind: Literal["sum", "max"] = "sum"  # posterior means, or the posterior mode
    variances: Literal["scalar", "vector"] = "scalar"  # one for all, or one an element
    max_step: float = 1.0  # in (0, 1]
    min_step: float = 0.01
    control: bool = True  # refuse steps that raise the objective

    def __post_init__(self) -> None:
        if self.variances == "vector" and self.operator.squared_mv is None:
            raise ValueError(
                f"vector variances need the squares of a {self.operator.kind} operator; use variances='scalar'"
            )


class State(NamedTuple):
    """The last accepted sweep.  Variances have a last axis of 1, or of n and m."""

    mean: Tensor  # [*batch, n] of x
    variance: Tensor  # [*batch, n] of x
    image: Tensor  # [*batch, m]: A mean
    smooth: Tensor  # [*batch, n]: damped mean
    score: Tensor  # [*batch, m]: (z - p) / vp
    score_precision: Tensor  # its negative derivative in p
    p: Tensor  # [*batch, m]
    vp: Tensor
    r: Tensor  # [*batch, n]
    vr: Tensor
    scale: Tensor  # [*batch, 1]: prior variance of x, the unit of all limits
    residual: Tensor  # [*batch, m]: by how much score would have moved, undamped
    control: Control


def init(problem: Problem, mean: Tensor, variance: Tensor) -> State:
    """Start from a mean and a variance of the coefficients, usually those of the prior.

    Args:
        problem: what to solve.
        mean: ``[*batch, n]``; its batch axes are those of the run.
        variance: broadcasts with ``mean``.
    """
    variance = variance.expand_as(mean).clone()
    image = problem.operator.mv(mean)
    vp = _spread(problem, variance)
    flat = torch.zeros_like(vp)
    scale = variance.mean(-1, keepdim=True)
    vr = _LARGE * (scale if problem.variances == "scalar" else torch.ones_like(mean) * scale)
    control = start_control(mean, problem.max_step)
    zero = torch.zeros_like(image)
    return State(mean, variance, image, mean, zero, flat, image, vp, mean, vr, scale, zero, control)


def step(problem: Problem, state: State, prior: Rule, channel: Rule) -> tuple[State, Info]:
    """One sweep, kept if it is finite and does not raise the objective.

    Args:
        problem: what to solve.
        state: the last accepted sweep.
        prior: rule of the coefficients; may differ from step to step.
        channel: rule of the outputs, with the data; likewise.

    Source: [Rangan2011] algorithm 1 (sum) and 2 (max).
    """
    tried, objective, gap = _sweep(problem, state, prior, channel)
    finite = all_finite(tried.mean, tried.variance, tried.vr, tried.vp, tried.score)
    finite &= objective == objective  # not NaN
    compared = objective if problem.control else torch.full_like(objective, -torch.inf)
    accepted, control = judge(
        state.control, compared, gap, finite, (problem.min_step, problem.max_step)
    )
    curbed = _curbed(problem, state, tried, control.step_size)
    control = control._replace(step_size=torch.where(accepted, curbed, control.step_size))
    kept = select(accepted, tried, state)._replace(control=control)
    moved = torch.linalg.vector_norm(tried.mean - state.mean, dim=-1, keepdim=True)
    length = torch.linalg.vector_norm(tried.mean, dim=-1, keepdim=True)
    change = moved / (state.control.step_size * length.clamp(min=torch.finfo(length.dtype).tiny))
    change = torch.where(accepted, change, torch.inf)
    before = state.control.step_size
    verdict = is_at_end(control, problem.min_step), is_struggling(control)
    fields = (change, objective, accepted, before, control.refused, *verdict)
    return kept, Info(*(each.squeeze(-1) for each in fields))


def forget(state: State) -> State:
    """Forget the objectives of the past: after new parameters they cannot be compared."""
    return state._replace(control=forget_objectives(state.control))


def prior_input(state: State) -> tuple[Tensor, Tensor]:
    """Pseudo-observation of the coefficients ``(r, vr)``, which does not contain their prior."""
    return state.r, state.vr


def channel_input(state: State) -> tuple[Tensor, Tensor]:
    """Pseudo-observation of the outputs ``(p, vp)``, which does not contain their own data."""
    return state.p, state.vp


def _sweep(
    problem: Problem, state: State, prior: Rule, channel: Rule
) -> tuple[State, Tensor, Tensor]:
    """The candidate state, its objective and the gap between its outputs and the channel's ``[*batch, 1]``."""
    operator, beta = problem.operator, state.control.step_size
    limit = _LARGE * state.scale
    unit = state.scale * (operator.squared_frobenius / operator.shape[0])  # prior variance of z
    vp = torch.lerp(state.vp, _spread(problem, state.variance), beta).clamp(max=_LARGE * unit)
    p = state.image - vp * state.score  # Onsager term
    z = _answer(problem, channel, p, vp)
    vz = z.variance if problem.variances == "vector" else z.variance.mean(-1, keepdim=True)
    residual = (z.mean - p) / vp - state.score
    score = torch.addcmul(state.score, beta, residual)
    precision = torch.lerp(state.score_precision, (1.0 - vz / vp) / vp, beta).clamp(
        min=_SMALL / unit
    )
    vr = _gathered(problem, precision).reciprocal().clamp(max=limit)
    smooth = torch.lerp(state.smooth, state.mean, beta)
    r = smooth + vr * operator.rmv(score)
    x = _answer(problem, prior, r, vr)
    image = operator.mv(x.mean)
    tried = state._replace(
        mean=x.mean, variance=x.variance.expand_as(x.mean), image=image, smooth=smooth, score=score,
        score_precision=precision, p=p, vp=vp, r=r, vr=vr, residual=residual,
    )  # fmt: skip
    # Below rounding one gap is as good as another.
    floor = torch.finfo(image.dtype).eps * image.square().sum(-1, keepdim=True)
    gap = (z.mean - image).square().sum(-1, keepdim=True).maximum(floor)
    if problem.kind == "max":
        return tried, map_objective(r, vr, x, channel.log_prob(image)).unsqueeze(-1), gap
    return tried, gamp_free_energy(r, vr, x, p, vp, z).unsqueeze(-1), gap


def _curbed(problem: Problem, state: State, tried: State, size: Tensor) -> Tensor:
    """The step size ``[*batch, 1]``, less where two sweeps undo each other and the objective sees nothing of it."""
    along = (tried.residual * state.residual).sum(-1, keepdim=True)
    circles = along < _CIRCLES * state.residual.square().sum(-1, keepdim=True)
    return torch.where(circles, (_CURB * size).clamp(min=problem.min_step), size)


def _answer(problem: Problem, rule: Rule, mean: Tensor, variance: Tensor) -> Moments:
    return rule.mode(mean, variance) if problem.kind == "max" else rule.moments(mean, variance)


def _spread(problem: Problem, variance: Tensor) -> Tensor:
    """Variance of the outputs from that of the coefficients."""
    operator = problem.operator
    if problem.variances == "vector" and operator.squared_mv is not None:
        return operator.squared_mv(variance)
    return variance.mean(-1, keepdim=True) * (operator.squared_frobenius / operator.shape[0])


def _gathered(problem: Problem, precision: Tensor) -> Tensor:
    """Precision of the coefficients from that of the scores."""
    operator = problem.operator
    if problem.variances == "vector" and operator.squared_rmv is not None:
        return operator.squared_rmv(precision)
    return precision.mean(-1, keepdim=True) * (operator.squared_frobenius / operator.shape[1])
