"""The backend ``amp``: the first state, and one sweep with its exchange with the gates and its M-step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl.backend import Info
from ppl.inference.amp import gamp, vamp
from ppl.inference.amp import structure as gates
from ppl.inference.amp.learning import Ascent, Pseudo, Rules, learned, start_ascent
from ppl.inference.amp.options import AMP
from ppl.inference.amp.problem import Problem, prior_moments
from ppl.inference.amp.rules.record import Rule

_NEW_MODEL = 1e-2  # relative change of a param after which objectives are not comparable
_FEWEST = 5  # sweeps: a mode that starts at zero may stay there for one or two
_SPREAD = 0.5  # of the start of restarts, in prior standard deviations
_FLAT, _CREEPS = 0.1, 20  # nats, and sweeps within them, after which a run has nothing to gain
_METRICS = ("objective", "change", "step_size", "mse", "refused")


class Flat(NamedTuple):
    """Whether the evidence still moves."""

    reference: float  # nats
    since: int  # sweeps that it has been near the reference


class Seen(NamedTuple):
    """What the host reads of a sweep."""

    diverged: bool
    accepted: bool  # by any restart or right-hand side
    largest: float  # change of any of them
    moved: float  # largest relative change of a param
    metrics: dict[str, float]  # of the best restart


class State(NamedTuple):
    """What the next sweep needs."""

    inner: Any  # of gamp or vamp
    params: dict[str, Tensor]  # [R, *plates, *event]
    ascent: dict[str, Ascent]  # memory of params that follow gradients
    cavities: tuple[Tensor, ...]  # log-weights of gates [R, B, n, V], one a gated latent
    objective: Tensor  # [R, B] nats, of the last accepted sweep
    refused: Tensor  # [R, B]
    sweep: int
    flat: Flat
    switched: int  # sweep at which GAMP was given up for VAMP; 0: it was not
    ended: int  # sweep at which nothing finite was left to try; 0: never


def init(problem: Problem) -> State:
    """Messages that know only the prior; further restarts begin at random places around it."""
    structure, params = problem.model.structure, dict(problem.params)
    cavities = gates.start(structure, params) if structure else ()
    mean, variance = prior_moments(problem, params, cavities)
    if problem.restarts > 1:
        generator = problem.settings.streams.of("restarts")
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        noise[0] = 0.0
        mean = mean + _SPREAD * variance.sqrt() * noise
    inner = _start(problem, problem.choice.variant, mean, variance)
    zero = mean.new_zeros(mean.shape[:2])
    ascent = start_ascent(problem.learner, params)
    return State(
        inner, params, ascent, cavities, zero + torch.inf, zero, 0, Flat(math.inf, 0), 0, 0
    )


def step(problem: Problem, state: State, batch: object) -> tuple[State, Info]:
    """One sweep, one exchange with the gates, one M-step."""
    if state.ended:
        return state, Info({}, done=True)
    with torch.no_grad():
        return _step(problem, state)


def _step(problem: Problem, state: State) -> tuple[State, Info]:
    """The sweep, and what would follow if it is accepted; the host reads all it decides on at once."""
    module, inner_problem = algorithm(problem, state)
    rules = problem.rules(state.params, state.cavities)
    prior, channel = _wide(problem, state, rules)
    inner, info = module.step(inner_problem, state.inner, prior, channel)
    objective = torch.where(info.accepted, info.objective, state.objective)
    state = state._replace(
        inner=inner, objective=objective, refused=info.refused, sweep=state.sweep + 1
    )
    at = pseudo(problem, state)
    after, tables = _exchanged(problem, state, at)
    after, moved = _learned(problem, after, at, rules, tables)
    seen = _seen(problem, after, info, moved)
    if seen.diverged:
        return _diverged(problem, state, seen)
    if not seen.accepted:  # nothing new to learn from
        return state, _info(problem, state, seen._replace(moved=math.inf))
    if seen.moved > _NEW_MODEL:
        after = after._replace(inner=module.forget(after.inner))
    after = after._replace(flat=_flattened(state.flat, seen.metrics["objective"]))
    return after, _info(problem, after, seen)


def _flattened(flat: Flat, objective: float) -> Flat:
    if abs(objective - flat.reference) <= _FLAT:
        return flat._replace(since=flat.since + 1)
    return Flat(objective, 0)


def _wide(problem: Problem, state: State, rules: Rules) -> tuple[Rule, Rule]:
    """Rules of the inner problem: with the unknowns of mean removal where there are some."""
    prior, channel = problem.joined(rules)
    if problem.centered is None or is_vamp(problem, state):
        return prior, channel
    mean, variance = prior_moments(problem, state.params, state.cavities)
    wide = problem.centered.prior(prior, mean, variance)
    return wide, problem.centered.channel(channel, variance.mean(-1, keepdim=True))


def _exchanged(problem: Problem, state: State, at: Pseudo) -> tuple[State, Mapping[str, Tensor]]:
    """The gates' answer to what the coefficients say of them."""
    structure = problem.model.structure
    if structure is None:
        return state, {}
    evidence = problem.model.evidence(state.params, at.blocks)
    found = gates.exchange(structure, state.params, evidence, state.sweep)
    share = problem.options.turbo
    mixed = [
        (old + share * (new - old)).log_softmax(-1)
        for old, new in zip(state.cavities, found.cavity, strict=True)
    ]
    module, _ = algorithm(problem, state)
    return state._replace(cavities=tuple(mixed), inner=module.forget(state.inner)), found.tables


def _learned(
    problem: Problem, state: State, at: Pseudo, rules: Rules, tables: Mapping[str, Tensor]
) -> tuple[State, Tensor | float]:
    """One M-step, and the largest relative change of a param."""
    if not problem.learner.names or state.sweep < problem.options.learn_from:
        return state, math.inf if problem.learner.names else 0.0
    new, ascent, moved = learned(problem.learner, state.params, state.ascent, at, rules, tables)
    return state._replace(params=new, ascent=ascent), moved


def _diverged(problem: Problem, state: State, seen: Seen) -> tuple[State, Info]:
    """Go over to VAMP, or stop at the last accepted sweep."""
    options = problem.options
    if options.variant == "auto" and options.switch and not is_vamp(problem, state):
        mean, variance = prior_moments(problem, problem.params, state.cavities)
        inner = _start(problem, "vamp", mean, variance)
        state = state._replace(inner=inner, params=dict(problem.params), switched=state.sweep)
        return state, _info(problem, state, seen._replace(moved=math.inf))
    state = state._replace(ended=state.sweep)
    return state, _info(problem, state, seen._replace(moved=math.inf))


def _seen(problem: Problem, state: State, info: Any, moved: Tensor | float) -> Seen:
    """Everything that the host wants to know of a sweep, in one read."""
    objective, spread = state.objective, variance(problem, state)
    arrays = [objective, info.change, spread, state.refused]
    names = [n for n in problem.learner.names if math.prod(state.params[n].shape[1:]) == 1]
    arrays += [state.params[n] for n in names]
    if problem.restarts > 1:  # they are alternatives: what is shown is the best of them
        best = objective.sum(1).argmin().unsqueeze(0)
        arrays = [x[best] for x in arrays]
    shown = [arrays[0].sum(), arrays[1].amax(), info.step_size.amin(), arrays[2].mean(),
             arrays[3].amax(), *(x.sum() for x in arrays[4:])]  # fmt: skip
    flags = [info.diverged.any(), info.accepted.any()]
    flags = [*(x.to(objective.dtype) for x in flags), info.change.amax()]
    moving = [moved] if isinstance(moved, Tensor) else []
    numbers = torch.stack([*flags, *shown, *moving]).tolist()
    largest = numbers.pop() if isinstance(moved, Tensor) else moved
    metrics = dict(zip((*_METRICS, *names), numbers[len(flags) :], strict=True))
    return Seen(bool(numbers[0]), bool(numbers[1]), numbers[2], largest, metrics)


def _info(problem: Problem, state: State, seen: Seen) -> Info:
    tolerance = problem.settings.tol or problem.options.tolerance
    settled = state.sweep >= _FEWEST and seen.largest <= tolerance
    ramp = problem.model.structure is None or state.sweep > 12
    still = seen.moved <= max(10 * tolerance, 1e-5)
    done = settled and still and ramp
    return Info(seen.metrics, done=bool(state.ended) or done or is_creeping(problem, state))


def is_creeping(problem: Problem, state: State) -> bool:
    """Whether a run goes on although the evidence says that nothing is to be gained: along the scale that signs leave open.

    Runs with a tolerance of the user's go on until they meet it.
    """
    asked = problem.settings.tol is not None or problem.options.tolerance != AMP.tolerance
    return problem.options.kind == "sum" and not asked and state.flat.since >= _CREEPS


# ---- what the result reads ---------------------------------------------------------------------


def is_vamp(problem: Problem, state: State) -> bool:
    """Whether the run is VAMP's by now."""
    return problem.choice.variant == "vamp" or state.switched > 0


def algorithm(problem: Problem, state: State) -> tuple[Any, Any]:
    """Module and inner problem of the run."""
    return (vamp, problem.vamp) if is_vamp(problem, state) else (gamp, problem.gamp)


def pseudo(problem: Problem, state: State) -> Pseudo:
    """Pseudo-observations, block by block and site by site, without the unknowns of mean removal."""
    module, _ = algorithm(problem, state)
    unknowns, rows = problem.sizes
    r, vr = module.prior_input(state.inner)
    p, vp = module.channel_input(state.inner)
    blocks, sites = _split(r, vr, unknowns), _split(p, vp, rows)
    if len(blocks) > 1:
        units = problem.mixing.columns
        blocks = [(m / u, v / u**2) for (m, v), u in zip(blocks, units, strict=True)]
    if len(sites) > 1:
        units = problem.mixing.rows
        sites = [(m * u, v * u**2) for (m, v), u in zip(sites, units, strict=True)]
    return Pseudo(blocks, sites)


def variance(problem: Problem, state: State) -> Tensor:
    """Posterior variances ``[R, B, n]``."""
    found = state.inner.variance[..., : sum(problem.sizes[0])]
    if len(problem.mixing.columns) == 1:
        return found
    parts = found.split(problem.sizes[0], -1)
    return torch.cat([v / u**2 for v, u in zip(parts, problem.mixing.columns, strict=True)], -1)


def _start(problem: Problem, variant: str, mean: Tensor, spread: Tensor) -> Any:
    if variant == "vamp":
        return vamp.init(problem.vamp, mean, spread)
    if problem.centered is not None:
        mean, spread = problem.centered.start(mean, spread)
    return gamp.init(problem.gamp, mean, spread)


def _split(mean: Tensor, spread: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    parts, start = [], 0
    for size in sizes:
        at = slice(start, start + size)
        own = spread if spread.shape[-1] == 1 else spread[..., at]
        parts.append((mean[..., at], own))
        start += size
    return parts
