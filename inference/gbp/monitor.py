"""Whether messages converge, and what is done when they do not.

Converged: no mean moved by more than ``tol`` standard deviations in a round, the distance still to go, by
the observed rate, is below ten times that, and no row is displaced from where it was linearised. Not converging: the
observed rate stays above one, changes stop shrinking while the energy finds no new minimum, or a number is not finite.
Then cures are tried in turn: more damping, then a proximal factor around the means [Johnson2009].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.errors import NumericalError
from ppl.inference.gbp.cures import is_determined
from ppl.inference.gbp.problem import Problem
from ppl.inference.gbp.relinearise import Charts, displacement
from ppl.inference.gbp.state import WINDOW, Run, State
from ppl.inference.groups import Family
from ppl.inference.numerics.gaussian import Gaussian, inverse, times

_SPAN = 5  # rounds over which the rate is measured
_LONGEST = 0.999  # rate that the distance still to go is computed with, at most
_COARSE = 0.05  # change above which a run has not converged, whatever the rounding
WHISPER = 1e-6  # proximal factor that only keeps variables where they are
_PATIENT = 20  # rounds with a rate above one until the run counts as diverging


class Moments(NamedTuple):
    """Means and standard deviations of beliefs by family, and how many are improper."""

    means: dict[str, Tensor]  # [N, d]
    sds: dict[str, Tensor]  # [N, d]
    improper: int


def moments_of(beliefs: Mapping[str, Gaussian], before: Mapping[str, Tensor]) -> Moments:
    """Moments of beliefs; an improper one keeps the mean ``before`` and has no finite deviation."""
    means, sds, improper = {}, {}, 0
    for name, belief in beliefs.items():
        found = inverse(belief.lam)
        mean = times(found.matrix, belief.eta)
        sd = found.matrix.diagonal(dim1=-2, dim2=-1).sqrt()
        if not bool(found.proper.all()):
            proper = found.proper.unsqueeze(-1)
            improper += int((~found.proper).sum())
            mean, sd = torch.where(proper, mean, before[name]), torch.where(proper, sd, torch.inf)
        means[name], sds[name] = mean, sd
    return Moments(means, sds, improper)


def largest_change(
    means: Mapping[str, Tensor], before: Mapping[str, Tensor], sds: Mapping[str, Tensor]
) -> tuple[float, float]:
    """Largest move of a mean, and what rounding alone may move, in standard deviations."""
    change, noise = 0.0, 0.0
    for name, mean in means.items():
        if mean.numel():
            moved = torch.sub(mean, before[name]).abs_().div_(sds[name])
            change = _worst(change, float(moved.amax()))
    if change > _COARSE:  # rounding does not matter yet
        return change, 0.0
    for name, mean in means.items():
        if mean.numel():
            eps = torch.finfo(mean.dtype).eps
            noise = max(noise, 4 * eps * float((mean / sds[name]).abs_().amax()))
    return change, noise


def _worst(a: float, b: float) -> float:
    """The larger number; a nan is not lost in it."""
    return b if math.isnan(b) or b > a else a


def judged(problem: Problem, state: State, found: Moments, change: float, noise: float) -> State:
    """The state with its run's record brought up to date."""
    run = _recorded(problem, state.run, change, noise)
    run = _ranked(problem, run, state.beliefs, state.charts, found.improper)
    state = state._replace(run=run)
    still = change / (1 - state.run.damping) <= max(problem.tol, noise) and not found.improper
    exact = _is_exact(problem, state, found)
    if not (exact or (still and _near(problem, state, noise))):
        return state._replace(run=state.run._replace(settled=False))
    if not exact and _displaced(problem, state, change):
        return state._replace(run=state.run._replace(settled=True))
    return state._replace(run=state.run._replace(settled=True, converged=True))


def _recorded(problem: Problem, run: Run, change: float, noise: float) -> Run:
    history = torch.cat([run.history[1:], run.history.new_tensor([change])])
    before = float(history[-1 - _SPAN])
    rate = (change / before) ** (1 / _SPAN) if 0 < before < math.inf else math.nan
    grows = rate > 1 and change > 10 * max(problem.tol, noise)
    return run._replace(
        history=history,
        rate=rate,
        rising=run.rising + 1 if grows else 0,
        since=run.since + 1,
        energy_age=run.energy_age + 1,
    )


def _near(problem: Problem, state: State, noise: float) -> bool:
    """Whether the distance still to go is small, over as many rounds as every message needs."""
    run, rounds = state.run, problem.patience
    if graduation(problem, state.round) > 1:
        return False
    recent = float(run.history[-min(rounds, WINDOW) :].max())
    rate = 0.0 if math.isnan(run.rate) else min(run.rate, _LONGEST)
    limit = max(problem.tol, noise)
    to_go = recent * rate / (1 - rate)
    return recent <= limit * (1 if rounds == 1 else 2) and to_go <= 10 * limit


def _is_exact(problem: Problem, state: State, found: Moments) -> bool:
    """Linear trees are done after one round of the tree schedule."""
    plan, run = problem.plan, state.run
    plain = run.damping == run.proximal == problem.options.dropout == 0
    scheduled = plan.schedule == "tree" or not problem.edges
    return plan.is_tree and plan.is_linear and scheduled and plain and not found.improper


def _displaced(problem: Problem, state: State, change: float) -> bool:
    if not problem.moving or state.run.policy == 1:
        return False
    limit = max(problem.tol, 2 * change)
    return any(
        bool((displacement(g, state.charts.clocks[g.name], state.means, state.sds) > limit).any())
        for g in problem.moving
        if g.rows
    )


def graduation(problem: Problem, at: int) -> float:
    """Multiple of robust thresholds in round ``at``: shrinks geometrically to one [Yang2020]."""
    start, rounds = problem.plan.graduated, problem.options.graduated_steps
    return 1.0 if at >= rounds else start ** (1 - at / rounds)


# ---- variables that nothing informs ----------------------------------------------------------------------------


def _ranked(
    problem: Problem, run: Run, beliefs: Mapping[str, Gaussian], charts: Charts, improper: int
) -> Run:
    """Count known directions of improper beliefs; when no round adds one, none ever will."""
    if not improper:
        return run._replace(ranks=(-1, 0))
    rank = sum(_rank(b) for b in beliefs.values())
    rounds = run.ranks[1] + 1 if rank == run.ranks[0] else 0
    if rounds <= problem.patience + 1:
        return run._replace(ranks=(rank, rounds))
    if run.proximal or not is_determined(problem, charts.points):
        raise NumericalError(uninformed(problem, beliefs))
    # Every row waits for news of all its variables but one; a whisper from each of them breaks the circle.
    return run._replace(proximal=WHISPER, ranks=(-1, 0), since=0)


def _rank(belief: Gaussian) -> int:
    """Number of directions that improper beliefs know of, and of all that proper ones do."""
    proper = inverse(belief.lam).proper
    lam = belief.lam[~proper]
    size = lam.diagonal(dim1=-2, dim2=-1)
    known = size > torch.finfo(size.dtype).tiny ** 0.5
    scale = torch.where(known, size, 1.0).rsqrt() * known
    unit = torch.nan_to_num(lam * scale.unsqueeze(-1) * scale.unsqueeze(-2)).clamp(-1, 1)
    tiny = 1e3 * torch.finfo(unit.dtype).eps
    rank = int((torch.linalg.eigvalsh(unit) > tiny).sum()) if len(lam) else 0
    return rank + int(proper.sum()) * belief.lam.shape[-1]


def uninformed(problem: Problem, beliefs: Mapping[str, Gaussian]) -> str:
    """What to say of variables without absolute information."""
    for name, belief in beliefs.items():
        proper = inverse(belief.lam).proper
        if not bool(proper.all()):
            first = int((~proper).nonzero()[0])
            place = element(problem.groups.families[name], first, _labels(problem))
            return (
                f"{int((~proper).sum())} of {len(proper)} elements of '{name}' have no absolute information, the first at "
                f"{place}: the factors leave a direction free on which its law is flat, or their derivative at the start is "
                "zero. Give it a proper law, observe one element (an anchor), or pass start=."
            )
    return "every belief is proper"


def _labels(problem: Problem) -> Mapping[str, object]:
    return {} if problem.groups.bound is None else problem.groups.bound.labels


def element(family: Family, at: int, labels: Mapping[str, object]) -> str:
    """An element in the user's words: ``pose 3``."""
    parts = []
    for plate, size in zip(reversed(family.plates), reversed(family.sizes), strict=True):
        at, position = divmod(at, size)
        parts.append(f"{plate} {labels[plate][position] if plate in labels else position}")  # type: ignore[index]
    return ", ".join(reversed(parts)) or "its only element"


# ---- divergence ------------------------------------------------------------------------------------------------


def trouble(problem: Problem, state: State, change: float) -> str:
    """Why the run does not converge, or nothing."""
    run = state.run
    if not math.isfinite(change) or math.isnan(run.energy):
        return "a mean is not finite"
    if graduation(problem, state.round) > 1 or run.since < 2 * _PATIENT or problem.patience > 1:
        return ""
    if run.rising >= _PATIENT and run.energy_age >= _PATIENT:
        return f"changes grow by a factor {run.rate:.3g} a round"
    if run.since > WINDOW and run.energy_age > WINDOW and change > 10 * problem.tol:
        old, new = run.history[:_PATIENT], run.history[-_PATIENT:]
        if float(new.log().mean()) >= float(old.log().mean()) + math.log(0.9):
            return "changes do not shrink, and the energy has found no new minimum"
    return ""


__all__ = [
    "WHISPER",
    "Moments",
    "element",
    "graduation",
    "judged",
    "largest_change",
    "moments_of",
    "trouble",
    "uninformed",
]
