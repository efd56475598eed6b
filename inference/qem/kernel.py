"""QEM's iteration: draw particles, weigh all combinations of them, average moments into the proposals.

Source: [Heap2025], Algorithm 1; contraction and marginals as gradients after [Bowyer2023]. Differs from the paper:
a joint Gaussian for each block on the unconstrained scale, a bridge from proposal to posterior while the effective
sample size is low, and moments averaged in central form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl.backend import Info, Settings
from ppl.binding import Bound
from ppl.inference.particles import moments, results, signs
from ppl.inference.particles import problem as particle_problem
from ppl.inference.particles.approximation import Approximation, ordinary
from ppl.inference.particles.blocks import Block, make_blocks
from ppl.inference.particles.conditional import update_all
from ppl.inference.particles.estep import Evaluated, Weights, draw_in_parts, evaluated, weigh
from ppl.inference.particles.forms import Sites
from ppl.inference.particles.params import learn
from ppl.inference.particles.pilot import refined, wants_pilot
from ppl.inference.particles.problem import Problem, prepare_particles
from ppl.inference.particles.proposals import Particles, Proposal
from ppl.inference.particles.shards import PartDraws, average_in_parts, inner_blocks
from ppl.inference.particles.tempering import (
    Exponents,
    effective_shares,
    largest_exponents,
    may_differ,
)
from ppl.inference.qem import beginning
from ppl.inference.qem.options import QEM
from ppl.posterior import Posterior

_ITERATIONS = 500
_ENOUGH = 0.12  # share of the particles that the effective sample size must reach while the bridge is down
_MANY = 1_000  # elements of a plate above which the bridge starts below 1
_WATCHED = 100_000  # entries of a tensor that the stop rule looks at
_STRIDE = 0.8  # step while the bridge is down
_FIRM = 0.25  # share from which an iteration on the posterior itself counts
_CALM = 0.4  # effective share within plates from which the step there falls
_FOLLOWING = 0.1  # least step within plates while it is
_SMOOTH = 0.1  # share of an iteration's exponent in their average
_RISE = 1.5  # factor by which the average must grow to count as a rise
_SETTLED = 14  # iterations without a rise at which a run with sites ends
_HASTE = 4  # the same after which the step has halved, of runs with sites
_PATIENCE = 12  # iterations without a rise after which the exponent counts as settled
COLLAPSED = 0.02  # share below which the bridge comes down again
# Where iterations are dear, and the last weighting is the cheaper way to what they would still gain.
_SUFFICES = 4  # iterations on the posterior itself that are enough
_AFAR = 1 / 32  # where the search for the bridge begins
_BRISK = 0.4  # step on the posterior itself
_SAGGING = 0.08  # share below which the next iteration is tempered again


class State(NamedTuple):
    """What the next step needs."""

    q: Approximation
    bridge: float  # exponent of the weights, 1 once the posterior itself is the target
    crossed: int  # iterations on the posterior itself since the weights last collapsed
    iteration: int
    inner: float = 1.0  # exponent of the weights within plates
    level: float = 0.0  # average exponent of the last iterations
    peak: float = 0.0  # the same when it rose last
    risen: int = 0  # iteration of that
    calm: int = 0  # iterations whose weights within plates were the posterior's own, and many of them effective
    trail: Tensor | None = None  # average of the last iterations' proposals, where they are dear


def prepare(bound: Bound, options: QEM, settings: Settings) -> Problem:
    """Blocks, particle counts, lowered factors, plan.

    Raises:
        UnsupportedError: the plan does not fit the memory budget, or an option of ``infer`` is not supported.
    """
    options = signs.with_signs(bound, options, settings)
    problem = prepare_particles(bound, options, settings, settings.max_iters or _ITERATIONS)
    if options.final_particles is not None:
        results.check_last(problem)
    return refined(problem, init, step) if wants_pilot(problem) else problem


def describe(bound: Bound, options: QEM, settings: Settings) -> str:
    """One line for ``explain``, see :func:`ppl.inference.particles.problem.describe`, with what is chosen for unknown signs."""
    chosen = signs.with_signs(bound, options, settings)
    text = particle_problem.describe(bound, chosen, settings)
    names = signs.mirrored_names(make_blocks(bound.graph, chosen)) if chosen is not options else ()
    return f"{text}; signs of {', '.join(names)} are not known" if names else text


def init(problem: Problem) -> State:
    """The first approximation, not tempered."""
    return State(beginning.first(problem), _first_bridge(problem), 0, 0)


def _first_bridge(problem: Problem) -> float:
    """Where the search for the bridge begins: a weighting of a large plate is dear, and far from 1 it will be."""
    sizes = [problem.bound.size(p) for p in problem.bound.graph.plates]
    if signs.is_slow(problem):
        return _AFAR
    return min(1.0, _MANY / max(sizes, default=1))


def step(problem: Problem, state: State, batch: Any = None) -> tuple[State, Info]:
    """One iteration."""
    if state.q.params or not problem.weighting.takes_no_gradients:
        return _step(problem, state)
    with torch.inference_mode():  # a sixth of the time of a small operation
        new, shown = _step(problem, state)
    trail = None if new.trail is None else new.trail.clone()
    return new._replace(q=ordinary(new.q), trail=trail), shown


def _step(problem: Problem, state: State) -> tuple[State, Info]:
    weighting = problem.weighting
    particles = draw_in_parts(weighting, state.q, problem.settings.streams)
    here = evaluated(problem, weighting, particles, state.q)
    bridge, inner, weights = cross(problem, state, here, may_differ(weighting))
    shares = effective_shares(weighting, weights)
    firm = state.crossed > 0 or min(shares) >= _FIRM
    stays = bridge == 1.0 and (firm or not problem.options.bridge)
    calm = inner == 1.0 and shares[1] >= _CALM
    steps = _steps(problem, state, stays, calm)
    follows = not (stays or state.crossed)
    averaged = _averaged(problem, state, particles, here.arrays, weights, steps, follows)
    params = state.q.params
    if params:
        params = learn(problem, params, here, state.iteration + 1)
    crossed = state.crossed + stays
    if crossed > 1 and bridge == 1.0 and problem.options.bridge and averaged:
        bridge, crossed = _kept(min(shares), crossed)
    q = Approximation(averaged, params)
    level = state.level + _SMOOTH * (bridge - state.level)
    rises = level > _RISE * state.peak
    peak, risen = (level, state.iteration) if rises else (state.peak, state.risen)
    count = state.calm + calm
    trail, settled = signs.settled(problem, state.trail, q)
    new = State(q, bridge, crossed, state.iteration + 1, inner, level, peak, risen, count, trail)
    found = info(_common(problem, new), weights)
    enough = stays and bridge == 1.0 and crossed >= _SUFFICES and settled
    if _has_sites(problem):
        enough = new.crossed > 10 or new.iteration - new.risen >= _SETTLED
    return new, found._replace(done=found.done or enough)


def _kept(share: float, crossed: int) -> tuple[float, int]:
    """Exponent and count of crossed iterations after one on the posterior itself that left this effective share."""
    if share < COLLAPSED:
        return 0.25, 0
    return (0.5 if share < _SAGGING else 1.0), crossed


def posterior(problem: Problem, state: State) -> Posterior:
    """Weigh fresh particles and collect the results."""
    warnings = []
    if state.bridge < 1:
        warnings.append(f"the weights are still tempered (exponent {state.bridge:.2g} of 1)")
    last, q = signs.for_last(problem, state.q)
    found = results.posterior(last, q, "qem", state.iteration, tuple(warnings))
    names = signs.mirrored_names(problem.blocks)
    if names:
        notes = {**found.diagnostics.notes, "signs not known": names}
        found.diagnostics = replace(found.diagnostics, notes=notes)
    return found


def _averaged(
    problem: Problem,
    state: State,
    particles: Mapping[str, Particles],
    arrays: Mapping[str, Tensor],
    weights: Weights,
    steps: tuple[float, float],
    follows: bool,
) -> dict[str, Proposal]:
    """The M-step: new moments averaged into every proposal, with these steps outside and within plates."""
    weighting, corrected = problem.weighting, problem.options.variance_correction

    def update(block: Block, before: Proposal, drawn: Particles, w: Tensor) -> Proposal:
        return moments.update(
            block, before, drawn, w, steps[bool(block.plates)], corrected, follows
        )

    if isinstance(particles, PartDraws):
        return average_in_parts(particles, state.q, weights.marginals, update)
    found: dict[str, Proposal] = {}
    for within, step in enumerate(steps):
        blocks = [b for b in weighting.blocks if bool(b.plates) == within]
        found |= update_all(
            weighting,
            state.q.proposals,
            particles,
            arrays,
            weights,
            step,
            corrected,
            blocks,
            follows,
        )
    return {axis: found[axis] for axis in state.q.proposals}  # a checkpoint keeps the order


def _steps(problem: Problem, state: State, stays: bool, calm: bool) -> tuple[float, float]:
    """Shares of the new moments outside and within plates.

    Where the weights within plates are the posterior's own already, noise of their many proposals adds up in what they say of the
    rest, so their averages begin to settle; they still follow the rest.
    """
    options, share = problem.options, _stride(state, _has_sites(problem))
    if stays or state.crossed:  # one lucky crossing does not undo what has been averaged
        asked = options.step_at(state.crossed)
        if options.step == "schedule" and signs.is_slow(problem):
            return _BRISK, _BRISK
        share = min(asked, share) if options.step == "schedule" else asked
        return share, share
    if not calm:
        return share, share
    return share, min(share, max(options.step_at(state.calm), _FOLLOWING))


def _has_sites(problem: Problem) -> bool:
    """Whether long vectors have sites, so that a run ends on tempered weights and had better settle there soon."""
    return any(isinstance(b.form, Sites) for b in problem.blocks)


def _stride(state: State, ends_soon: bool) -> float:
    """Step while the weights are tempered; once their exponent no longer rises it falls, so that averages settle."""
    if ends_soon:
        return _STRIDE / (1 + (state.iteration - state.risen) / _HASTE)
    return _STRIDE * (1 + (state.iteration - state.risen) / _PATIENCE) ** -0.6


def cross(
    problem: Problem, state: State, here: Evaluated, apart: bool = False
) -> tuple[float, float, Weights]:
    """The largest exponents that leave enough effective particles, outside and within plates, and the weights there.

    ``apart=False`` keeps both exponents equal.
    """
    passed = state.crossed > 0 and state.bridge == 1.0
    if not problem.options.bridge or not here.particles or passed:
        return 1.0, 1.0, weigh(here, last=True, enumerated=False)
    within = min(1.0, state.inner * 2) if apart else 1.0
    first = Exponents(min(within, state.bridge * 2), within)
    exponents, weights = largest_exponents(here, first, _ENOUGH, apart)
    return exponents.outside, exponents.within, weights


def _common(problem: Problem, state: State) -> State:
    """The state without what is not watched: sites, which follow their parents, and what only this process holds.

    All processes must decide alike when to stop.
    """
    own = {b.axis for b in problem.blocks if isinstance(b.form, Sites)}
    if problem.weighting.share is not None:
        own |= {b.axis for b in inner_blocks(problem.weighting)}
    if not own:
        return state
    proposals = {a: p for a, p in state.q.proposals.items() if a not in own}
    return state._replace(q=Approximation(proposals, state.q.params))


# ---- what a person sees -----------------------------------------------------------------------------------------


def info(state: State, weights: Weights) -> Info:
    ess = [weights.effective(a) for a in weights.marginals if a in state.q.proposals]
    metrics = {
        "log_evidence": float(weights.log_z.max()) if state.bridge == 1.0 else math.nan,
        "ess": math.nan if any(map(math.isnan, ess)) else min(ess, default=math.inf),
        "bridge": state.bridge,
    }
    watch, unit = _watch(state)
    done = not state.q.proposals and not state.q.params
    return Info(
        metrics,
        done=done,
        watch=watch,
        unit=unit,
        ready=state.crossed > 10 or state.iteration - state.risen > 2 * _PATIENCE,
    )


def _watch(state: State) -> tuple[Tensor | None, Tensor | None]:
    """Locations and log spreads of everything that is learned, and the spread to measure their change by."""
    means, variances, parts, units = [], [], [], []
    for proposal in state.q.proposals.values():
        if proposal.joint is not None:
            means.append(_some(proposal.joint.mean))
            variances.append(_some(proposal.joint.variance))
        for family in proposal.families.values():
            parts += [_some(m) for m in family]
            units += [_some(m).abs().clamp(min=1e-12) for m in family]
    for learned in state.q.params.values():
        parts.append(learned.free.reshape(-1))
        units.append(torch.full_like(parts[-1], 0.1))
    if means:
        sd = torch.cat(variances).sqrt_()
        parts += [torch.cat(means), sd.log()]
        units += [sd, torch.ones_like(sd)]
    return (torch.cat(parts), torch.cat(units)) if parts else (None, None)


def _some(t: Tensor) -> Tensor:
    """All entries of a small tensor; of a large one evenly spaced ones, since the last 40 steps are kept."""
    flat = t.reshape(-1)
    return flat[:: max(1, flat.numel() // _WATCHED)]
