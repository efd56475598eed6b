"""Steps to the mode: Gauss-Newton, Levenberg-Marquardt, dogleg. Source: [Madsen2004]."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ppl.backend import Info
from ppl.errors import NumericalError
from ppl.inference.groups.learning import learn
from ppl.inference.laplace.holding import begun, held, is_holding, is_worth, let_go, remembered
from ppl.inference.laplace.problem import Problem, State
from ppl.inference.laplace.proposals import (
    ENOUGH,
    FIRST_DAMPING,
    PROPOSALS,
    RULES,
    Proposal,
    as_before,
    is_noise,
    newton,
)
from ppl.inference.laplace.refinement import refined
from ppl.inference.laplace.spread import spread_of
from ppl.inference.laplace.states import moved
from ppl.inference.laplace.systems import make_system, undetermined
from ppl.inference.numerics.sparse import NotPositive

_TRIED_DAMPING = 1e-3  # of a second attempt, after a full first step into the wrong valley
_SETTLED = 1e-5  # relative error of params at which learning ends


def step(problem: Problem, state: State, batch: object) -> tuple[State, Info]:
    """Propose a step, and take it if the energy falls.

    Raises:
        NumericalError: the energy is not finite, or an unknown is not determined.
    """
    with torch.no_grad():
        return _step(problem, state)


def _step(problem: Problem, state: State) -> tuple[State, Info]:
    problem = state.window.problem if state.window is not None else problem
    _check_finite(state)
    new, info = _tried(problem, state)
    if int(state.iteration) == 1 and info.metrics["step"] == 0 and _is_undecided(problem, state):
        return _restarted(problem, new), info
    return new, info


def _is_undecided(problem: Problem, state: State) -> bool:
    """Whether a full first step could have been the wrong one."""
    options = problem.options
    undamped = options.damping is None and float(state.damping) == 0
    return (
        options.optimiser == "lm"
        and undamped
        and not _always(problem)
        and not problem.graduated > 1
    )


def _restarted(problem: Problem, state: State) -> State:
    """Back to the start, to set out with damped steps.

    Far from the mode full steps find the valley of a pose graph, and jump out of that of bundle adjustment into another
    one; the second step shows which it was, because from there no full step leads down.
    """
    state = state._replace(damping=torch.full_like(state.damping, _TRIED_DAMPING))
    return moved(problem, state, state.origin)


def _tried(problem: Problem, state: State) -> tuple[State, Info]:
    """One proposal, taken or not."""
    if is_holding(state):
        return _held(problem, state)
    try:
        proposal = PROPOSALS[problem.options.optimiser](problem, make_system(problem, state), state)
    except NotPositive as error:
        return _refused(problem, state, error)
    if not bool(proposal.delta.isfinite().all()):
        return _refused(problem, state, NotPositive(_free(proposal)))
    new = _after(problem, state, proposal)
    left = None
    if problem.is_linear and problem.solver != "cg":
        new, left = refined(problem, state, new)
    if _always(problem) and int(new.bad_rows) > int(state.bad_rows):
        raise _diverged()
    ratio = _ratio(state, new, proposal)
    taken = _always(problem) or ratio > ENOUGH or is_noise(state, proposal)
    if not taken and proposal.is_full and problem.options.optimiser == "lm":
        beyond = _two_steps(problem, state, new)
        new, taken, ratio = (new, False, ratio) if beyond is None else (beyond, True, 1.0)
    rule = as_before if _always(problem) else RULES[problem.options.optimiser]
    damping = rule(state, proposal, ratio)
    is_last = taken and _has_converged(problem, state, new, proposal)
    new = begun(problem, state, new, proposal) if taken else state
    new = new._replace(
        damping=damping, iteration=state.iteration + 1, length=_length(state, proposal, taken)
    )
    if left is not None:
        new = new._replace(length=left.sqrt())
    new, info = _ended(problem, new, proposal, taken, is_last)
    if taken and float(new.kernel_scale) > 1:
        new = moved(problem, new, new.points, _narrower(problem, new.kernel_scale))
    return new, info


def _held(problem: Problem, state: State) -> tuple[State, Info]:
    """One proposal with a kept factorisation."""
    try:
        proposal = held(problem, state)
    except NotPositive:
        return _tried(problem, let_go(state))
    new = _after(problem, state, proposal)
    taken = is_worth(state, proposal, _ratio(state, new, proposal))
    # Such steps shrink by fits and starts: how much the last one did says nothing of the rest.
    # Where rounding hides the decrease of the energy, steps that no longer shrink are the end as well.
    is_short = bool(proposal.decrement <= problem.tol**2)
    is_short = is_short or (is_noise(state, proposal) and not _shrinks(state, proposal))
    moves, turns = remembered(state, new, proposal)
    if taken:
        new = new._replace(length=_length(state, proposal, taken), moves=moves, turns=turns)
    elif moves is not state.moves and (state.length.isfinite() or not len(state.moves)):
        # A second trial knows what the first has found.
        new = state._replace(
            length=torch.full_like(state.length, torch.inf), moves=moves, turns=turns
        )
    else:
        new = let_go(state)
    new = new._replace(iteration=state.iteration + 1)
    return _ended(problem, new, proposal, taken, taken and is_short)


def _ended(
    problem: Problem, state: State, proposal: Proposal, taken: bool, is_last: bool
) -> tuple[State, Info]:
    """What a step reports; at a mode params may have to be learned first."""
    if is_last and problem.learns:
        state, is_last = _learned(problem, state)
    return state, Info(_metrics(problem, state, proposal, taken), done=is_last)


def _learned(problem: Problem, state: State) -> tuple[State, bool]:
    """An M-step at the mode, and whether the params have settled."""
    spread, _ = spread_of(problem, state)
    readers = [g for g in problem.groups.groups if g.params]
    covariances = {g.name: spread.joint(g) for g in readers}
    params = learn(problem.groups, state.points, state.params, covariances)
    change = max(float(_apart(params[n], state.params[n])) for n in params)
    # EM converges linearly: with the rate of the last two steps, the rest is a geometric series.
    last = float(state.change)
    rate = change / last if 0 < last < torch.inf else 0.99
    has_settled = change * max(rate, 0.1) <= _SETTLED * max(1 - rate, 1e-3)
    state = let_go(state)._replace(params=params, change=torch.full_like(state.change, change))
    return moved(problem, state, state.points), has_settled


def _apart(new: Tensor, old: Tensor) -> Tensor:
    """Largest change relative to the size of a param."""
    if not new.numel():
        return new.new_zeros(())
    return (new - old).abs().amax() / old.abs().amax().clamp(min=1e-8)


def _check_finite(state: State) -> None:
    if not bool(state.energy.isfinite()) or not bool(state.gradient.isfinite().all()):
        raise _diverged()


def _diverged() -> NumericalError:
    return NumericalError(
        "the energy is not finite: the optimiser has diverged, or starts where the model is not defined. "
        "Use optimiser='lm', or start={...} nearer to the answer."
    )


def _refused(problem: Problem, state: State, error: NotPositive) -> tuple[State, Info]:
    """What to do where the system is singular: damp, or give up."""
    if problem.options.optimiser != "lm" or problem.is_linear or float(state.damping) > 1:
        raise undetermined(problem, error.columns) from error
    damping = (10 * state.damping).clamp(min=FIRST_DAMPING)
    new = state._replace(damping=damping, iteration=state.iteration + 1)
    return new, Info({"energy": float(state.energy), "step": 0.0, "damping": float(damping)})


def _free(proposal: Proposal) -> np.ndarray:
    return torch.nonzero(~proposal.delta.isfinite()).flatten().cpu().numpy()


def _ratio(state: State, new: State, proposal: Proposal) -> float:
    """Decrease of the energy over what was predicted."""
    if int(new.bad_rows) > int(state.bad_rows) or not bool(new.energy.isfinite()):
        return -torch.inf
    return float((state.energy - new.energy) / proposal.predicted.clamp(min=1e-300))


def _after(problem: Problem, state: State, proposal: Proposal) -> State:
    points = problem.groups.retract(state.points, problem.equations.at.split(proposal.delta))
    return moved(problem, state, points)


def _two_steps(problem: Problem, state: State, new: State) -> State | None:
    """Where the next full step leads to, if that is lower than the point before both.

    A full step along a curved valley raises the energy, and the next one brings it down to the floor again; insisting on
    a decrease would creep along the floor. Source: watchdog technique, [Nocedal2006] section 15.6.
    """
    if not bool(new.energy.isfinite()) or not bool(new.gradient.isfinite().all()):
        return None
    try:
        proposal = newton(problem, make_system(problem, new), new)
    except NotPositive:
        return None
    second = _after(problem, new, proposal)
    is_lower = int(second.bad_rows) <= int(state.bad_rows) and bool(
        second.energy < 0.5 * state.energy
    )
    return second if is_lower else None


def _always(problem: Problem) -> bool:
    """Whether steps are taken unseen: with weights matched by height no energy falls."""
    options = problem.options
    return options.optimiser == "gauss_newton" or options.matching == "energy" or problem.is_linear


def _has_converged(problem: Problem, state: State, new: State, proposal: Proposal) -> bool:
    if float(state.kernel_scale) > 1:
        return False
    if problem.is_linear:
        return True
    return _is_near(problem, state, new, proposal)


def _is_near(problem: Problem, state: State, new: State, proposal: Proposal) -> bool:
    """Whether what is left after a full step is shorter than the tolerance.

    Gauss-Newton converges at least linearly: with the rate of the last two steps, the rest is a geometric series. Where
    rounding hides the decrease of the energy, steps that no longer shrink are the end as well.
    """
    length, last = float(proposal.decrement.clamp(min=0).sqrt()), float(state.length)
    if not proposal.is_full:  # a damped step is short far from the mode, too: the full one must be
        if length > problem.tol:
            return False
        try:
            full = newton(problem, make_system(problem, new), new)
        except NotPositive as error:  # damping hid it until here
            raise undetermined(problem, error.columns) from error
        return bool(full.decrement <= problem.tol**2) or is_noise(new, full)
    rate = length / last if 0 < last < torch.inf else 1.0
    if rate < 0.99:
        return length * rate / (1 - rate) <= problem.tol
    return length <= problem.tol or (last < torch.inf and is_noise(state, proposal))


def _shrinks(state: State, proposal: Proposal) -> bool:
    """Whether a step is shorter than the one before it."""
    return bool(proposal.decrement < state.length.square())


def _length(state: State, proposal: Proposal, taken: bool) -> Tensor:
    if not taken or not proposal.is_full:
        return torch.full_like(state.length, torch.inf)
    return proposal.decrement.clamp(min=1e-300).sqrt()


def _narrower(problem: Problem, scale: Tensor) -> Tensor:
    return (scale * problem.graduated ** (-1.0 / problem.options.graduated_steps)).clamp(min=1.0)


def _metrics(problem: Problem, state: State, proposal: Proposal, taken: bool) -> dict[str, float]:
    """What the progress line and the trace show."""
    length = float(proposal.decrement.clamp(min=0).sqrt()) if taken else 0.0
    found = {"energy": float(state.energy), "step": length}
    if problem.options.optimiser != "gauss_newton":
        found["damping"] = float(state.damping)
    if problem.learns:
        found |= {n: float(p) for n, p in state.params.items() if p.numel() == 1}
    if problem.graduated > 1:
        found["kernel_scale"] = float(state.kernel_scale)
    return found
