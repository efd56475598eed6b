"""Steps near the mode, with a factorisation that is kept.

Near the mode the curvature hardly changes, and factorising it again is most of the work of a step. What its inverse
misses is learned from how the gradient turns from step to step: curvature of the residuals, which Gauss-Newton leaves
out, and weights of robust rows. Alone, it makes full steps converge slowly, or overshoot where it is large.
Source: quasi-Newton with limited memory, [Nocedal2006] section 7.2, whose first matrix here is the kept one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppl.inference.laplace.problem import Problem, State
from ppl.inference.laplace.proposals import ENOUGH, Proposal, is_noise
from ppl.inference.laplace.systems import Direct

_SHORT = 0.5  # posterior standard deviations: a full step after which the curvature hardly changes
_DAMPED = 0.1  # the same of a damped step, which is shorter than the way that is left
_LEAST = 1e-3  # curvature along a step, relative to the kept one, below which it is not remembered
_MEMORY = 10  # steps that are remembered


def may_hold(problem: Problem) -> bool:
    """Whether there is a factor to keep, and a gradient that is that of the energy."""
    options = problem.options
    lowers = options.optimiser != "gauss_newton" and options.matching == "gradient"
    return lowers and problem.solver != "cg" and not problem.is_linear


def is_holding(state: State) -> bool:
    """Whether the next step uses the factorisation of an earlier one."""
    return state.held.numel() > 0


def held(problem: Problem, state: State) -> Proposal:
    """The quasi-Newton step.

    Raises:
        NotPositive: steps were damped until now, and an undamped one is not determined.
    """
    system = Direct(problem, state.held, is_checked=len(state.moves) > 0)
    direction, shares = -state.gradient, []
    for move, turn in zip(reversed(state.moves), reversed(state.turns), strict=True):
        shares.append((move @ direction) / (move @ turn))
        direction = direction - shares[-1] * turn
    delta = system.solve(direction)
    for move, turn in zip(state.moves, state.turns, strict=True):
        delta = delta + (shares.pop() - (turn @ delta) / (move @ turn)) * move
    fall = -(state.gradient * delta).sum()
    return Proposal(delta, fall / 2, fall, True)


def begun(problem: Problem, old: State, new: State, proposal: Proposal) -> State:
    """The state after an ordinary step; it keeps the factorisation of that step where the mode is near."""
    most = _SHORT if proposal.is_full else _DAMPED
    is_near = bool(proposal.decrement < most**2) and float(old.kernel_scale) == 1
    if not is_near or not may_hold(problem):
        return new
    none = new.gradient.new_zeros(0, len(new.gradient))
    return new._replace(held=old.curvature, moves=none, turns=none)


def remembered(state: State, tried: State, proposal: Proposal) -> tuple[Tensor, Tensor]:
    """Moves and turns after a trial: how the gradient turned from its one end to the other is added."""
    turn = tried.gradient - state.gradient
    if not float(proposal.delta @ turn) > _LEAST * float(proposal.decrement):
        return state.moves, state.turns
    return (
        torch.cat([state.moves[1 - _MEMORY :], proposal.delta.unsqueeze(0)]),
        torch.cat([state.turns[1 - _MEMORY :], turn.unsqueeze(0)]),
    )


def let_go(state: State) -> State:
    """The state without a kept factorisation: the next step makes its own."""
    none = state.gradient.new_zeros(0)
    empty = none.reshape(0, 0)
    far = torch.full_like(state.length, torch.inf)
    return state._replace(held=none, moves=empty, turns=empty, length=far)


def is_worth(state: State, proposal: Proposal, ratio: float) -> bool:
    """Whether to take a step, by the share of its predicted decrease that it has brought."""
    return ratio > ENOUGH or is_noise(state, proposal)


__all__ = ["begun", "held", "is_holding", "is_worth", "let_go", "may_hold", "remembered"]
