"""Steps that the quadratic model proposes, and how much they are damped. Source: [Madsen2004]."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.inference.laplace.problem import Problem, State
from ppl.inference.laplace.systems import System

FIRST_DAMPING = 1e-5  # of Levenberg-Marquardt, once an undamped step has failed
_LEAST_DAMPING = 1e-9  # below it steps are undamped again
_MOST_DAMPING = 1e16
_NOTHING = 1e-13  # nats
ENOUGH = 1e-3  # share of the predicted decrease that a step must bring
_GOOD = 0.75  # share from which on the model is trusted further


class Proposal(NamedTuple):
    """A step, and what the quadratic model expects of it."""

    delta: Tensor  # [n]
    predicted: Tensor  # [], decrease of the energy
    decrement: (
        Tensor  # [], squared length of the undamped step in posterior standard deviations, about
    )
    is_full: bool  # an undamped step
    length: Tensor | None = None  # [], in units of the diagonal; of a trust region


def noise(state: State) -> Tensor:
    """Decrease of the energy, in nats, that rounding hides or that means nothing."""
    return (64 * torch.finfo(state.gradient.dtype).eps * state.energy.abs()).clamp(min=_NOTHING)


def is_noise(state: State, proposal: Proposal) -> bool:
    return bool(proposal.predicted <= noise(state))


def newton(problem: Problem, system: System, state: State) -> Proposal:
    """The full step to the minimum of the quadratic model."""
    delta = system.solve(-state.gradient)
    fall = -(state.gradient * delta).sum()
    return Proposal(delta, fall / 2, fall, True)


def damped(problem: Problem, system: System, state: State) -> Proposal:
    """Levenberg-Marquardt, scaled by the diagonal."""
    if not float(state.damping) > 0:
        return newton(problem, system, state)
    lift = lift_of(system.diagonal(), state.damping)
    delta = system.solve(-state.gradient, lift)
    fall = -(state.gradient * delta).sum()
    return Proposal(delta, (fall + (lift * delta.square()).sum()) / 2, fall, False)


def lift_of(diagonal: Tensor, damping: Tensor) -> Tensor:
    """What a damped step adds to the diagonal ``[n]`` of ``J'J``."""
    return damping * diagonal.clamp(min=1e-9 * float(diagonal.max()) + 1e-30)


def dogleg(problem: Problem, system: System, state: State) -> Proposal:
    """Powell's dogleg in a trust region scaled by the diagonal; the radius is kept as ``damping``."""
    full = newton(problem, system, state)
    root = system.diagonal().clamp(min=1e-30).sqrt()
    radius, length = state.damping, (root * full.delta).norm()
    if bool(length <= radius):
        return full._replace(length=length)
    down = -state.gradient / root.square()
    curve = (down * system.product(down)).sum()
    cauchy = down * (-(state.gradient * down).sum() / curve)
    short, long = (root * cauchy).norm(), root * (full.delta - cauchy)
    if bool(short >= radius):
        delta = cauchy * (radius / short)
    else:  # where the line from the Cauchy point to the full step leaves the region
        a, b, c = (
            long.square().sum(),
            (root * cauchy * long).sum(),
            short.square() - radius.square(),
        )
        delta = cauchy + (full.delta - cauchy) * ((b.square() - a * c).sqrt() - b) / a
    predicted = -(state.gradient * delta).sum() - (delta * system.product(delta)).sum() / 2
    return Proposal(delta, predicted, full.decrement, False, radius)


def as_before(state: State, proposal: Proposal, ratio: float) -> Tensor:
    return state.damping


def _new_damping(state: State, proposal: Proposal, ratio: float) -> Tensor:
    """Ten times more after a step that failed, ten times less after a good one."""
    if ratio > _GOOD:
        less = state.damping / 10
        return torch.where(less < _LEAST_DAMPING, torch.zeros_like(less), less)
    if ratio > ENOUGH or is_noise(state, proposal):  # what rounding hides says nothing
        return state.damping
    return (10 * state.damping).clamp(min=FIRST_DAMPING, max=_MOST_DAMPING)


def _new_radius(state: State, proposal: Proposal, ratio: float) -> Tensor:
    """A quarter of the step after one that failed, and wider again after good ones."""
    assert proposal.length is not None, "a dogleg knows its length"
    if ratio < 0.25 and not is_noise(state, proposal):
        return proposal.length / 4
    return state.damping * 3 if ratio > _GOOD and not proposal.is_full else state.damping


Propose = Callable[[Problem, System, State], Proposal]
Rule = Callable[[State, Proposal, float], Tensor]
PROPOSALS: dict[str, Propose] = {"gauss_newton": newton, "lm": damped, "dogleg": dogleg}
RULES: dict[str, Rule] = {"gauss_newton": as_before, "lm": _new_damping, "dogleg": _new_radius}
