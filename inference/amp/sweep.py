"""The backend ``amp``: the first state, and one sweep with its exchange with the gates and its M-step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl.backend import Info
from ppl.inference.amp import gamp, vamp
from ppl.inference.amp import structure as gates
from ppl.inference.amp.learning import Ascent, Pseudo, Rules, learned, start_ascent
from ppl.inference.amp.problem import Problem, prior_moments
from ppl.inference.amp.rules.record import Rule

_NEW_MODEL = 1e-2  # relative change of a param after which objectives are not comparable
_PATIENCE, _SMALLEST_CAP = 25, 0.05  # sweeps without progress; smallest cap on the step
_FEWEST = 5  # sweeps: a mode that starts at zero may stay there for one or two
_SPREAD = 0.5  # of the start of restarts, in prior standard deviations


class Stall(NamedTuple):
    """Whether the run still comes closer to its fixed point."""

    cap: float  # largest step from now on, as a share of the largest at the start
    best: float  # smallest change since the cap was set
    since: int  # sweeps since it got smaller


class State(NamedTuple):
    """What the next sweep needs."""

    inner: Any  # of gamp or vamp
    params: dict[str, Tensor]  # [R, *plates, *event]
    ascent: dict[str, Ascent]  # memory of params that follow gradients
    cavities: tuple[Tensor, ...]  # log-weights of gates [R, B, n, V], one a gated latent
    objective: Tensor  # [R, B] nats, of the last accepted sweep
    refused: Tensor  # [R, B]
    sweep: int
    stall: Stall
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
    stall = Stall(1.0, math.inf, 0)
    return State(inner, params, ascent, cavities, zero + torch.inf, zero, 0, stall, 0, 0)


def step(problem: Problem, state: State, batch: object) -> tuple[State, Info]:
    """One sweep, one exchange with the gates, one M-step."""
    if state.ended:
        return state, _info(problem, state, torch.ones_like(state.objective) * torch.inf, 0.0, 0.0)
    with torch.no_grad():
        return _step(problem, state)


def _step(problem: Problem, state: State) -> tuple[State, Info]:
    module, inner_problem = algorithm(problem, state)
    top = max(state.stall.cap * inner_problem.max_step, inner_problem.min_step)
    inner_problem = replace(inner_problem, max_step=top)
    rules = problem.rules(state.params, state.cavities)
    prior, channel = _wide(problem, state, rules)
    inner, info = module.step(inner_problem, state.inner, prior, channel)
    sweep = state.sweep + 1
    objective = torch.where(info.accepted, info.objective, state.objective)
    stall = _stalled(state.stall, float(info.change.max()))
    state = state._replace(
        inner=inner, objective=objective, refused=info.refused, sweep=sweep, stall=stall
    )
    if bool(info.diverged.any()):
        return _diverged(problem, state, info)
    if not bool(info.accepted.any()):  # nothing new to learn from
        return state, _info(problem, state, info.change, torch.inf, info.step_size.min())
    at = pseudo(problem, state)
    state, turned = _exchanged(problem, state, at)
    state, moved = _learned(problem, state, at, rules, turned)
    return state, _info(problem, state, info.change, moved, info.step_size.min())


def _stalled(stall: Stall, change: float) -> Stall:
    """Half the largest step where the change has not got smaller for a while: the run goes in circles.

    The control of the objective does not see a circle whose points are about as good as each other.
    """
    if change < 0.9 * stall.best:
        return Stall(stall.cap, change, 0)
    if stall.since < _PATIENCE:
        return stall._replace(since=stall.since + 1)
    return Stall(max(0.5 * stall.cap, _SMALLEST_CAP), math.inf, 0)


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
        return state, torch.inf if problem.learner.names else 0.0
    new, ascent = learned(problem.learner, state.params, state.ascent, at, rules, tables)
    moved = [
        ((new[n] - state.params[n]).abs() / (state.params[n].abs() + 1e-8)).amax()
        for n in problem.learner.names
    ]
    largest = torch.stack(moved).amax()
    inner = state.inner
    if float(largest) > _NEW_MODEL:
        inner = algorithm(problem, state)[0].forget(inner)
    return state._replace(params=new, ascent=ascent, inner=inner), largest


def _diverged(problem: Problem, state: State, info: Any) -> tuple[State, Info]:
    """Go over to VAMP, or stop at the last accepted sweep."""
    options = problem.options
    if options.variant == "auto" and options.switch and not is_vamp(problem, state):
        mean, variance = prior_moments(problem, problem.params, state.cavities)
        inner = _start(problem, "vamp", mean, variance)
        state = state._replace(inner=inner, params=dict(problem.params), switched=state.sweep)
        state = state._replace(stall=Stall(1.0, math.inf, 0))
        return state, _info(problem, state, info.change, torch.inf, 1.0)
    state = state._replace(ended=state.sweep)
    return state, _info(problem, state, info.change, torch.inf, info.step_size.min())


def _info(
    problem: Problem, state: State, change: Tensor, moved: Tensor | float, step_size: Tensor | float
) -> Info:
    tolerance = problem.settings.tol or problem.options.tolerance
    settled = state.sweep >= _FEWEST and bool((change <= tolerance).all())
    ramp = problem.model.structure is None or state.sweep > 12
    still = float(moved) <= max(10 * tolerance, 1e-5)
    # Restarts are alternatives: what is shown is the best of them.
    best = int(state.objective.sum(1).argmin())
    metrics = {
        "objective": float(state.objective[best].sum()),
        "change": float(change[best].max()),
        "step_size": float(step_size),
        "mse": float(variance(problem, state)[best].mean()),
        "refused": float(state.refused[best].max()),
    }
    for name in problem.learner.names:
        if state.params[name][best].numel() == 1:
            metrics[name] = float(state.params[name][best])
    return Info(metrics, done=bool(state.ended) or (settled and still and ramp))


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
