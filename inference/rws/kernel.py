"""The iteration: draw particles, weigh them, move the proposals towards the weighted particles by Adam.

With weights and particles held fixed, ``sum_k w_k grad log q(z_k)`` estimates the gradient of ``E_post[log q]``, whose
maximum has the posterior's moments. Source: [Heap2023] section 4, wake phase of q; [Bornschein2015] equation (9).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl.backend import Info, Settings
from ppl.binding import Bound
from ppl.errors import NumericalError, UnsupportedError
from ppl.inference.numerics import ascent
from ppl.inference.numerics.ascent import Ascent, Rule
from ppl.inference.particles import results
from ppl.inference.particles.approximation import Approximation, Learned
from ppl.inference.particles.estep import draw_all, evaluated, weigh
from ppl.inference.particles.params import learn
from ppl.inference.particles.problem import Problem as Particular
from ppl.inference.particles.problem import prepare_particles
from ppl.inference.particles.start import first_approximation
from ppl.inference.rws import raw, shared
from ppl.inference.rws.options import RWS
from ppl.inference.rws.raw import Coordinates
from ppl.inference.rws.shared import SharedIndex, Weighed
from ppl.posterior import Posterior
from ppl.streams import isolated

_ITERATIONS = 2000
_TOO_MANY = 20  # steps in a row without a finite weight


@dataclass(frozen=True, eq=False)
class Problem:
    """What ``prepare`` returns."""

    bound: Bound
    options: RWS
    settings: Settings
    inner: Particular  # blocks and the plan of their weighting
    coordinates: tuple[Coordinates, ...]
    shared: SharedIndex | None  # where all blocks have one index
    rule: Rule
    max_iters: int
    first_theta: Tensor  # [R, P]
    first_params: dict[str, Learned]


class State(NamedTuple):
    """What the next step needs."""

    ascent: Ascent  # theta [R, P]
    params: dict[str, Learned]
    failures: int


def prepare(bound: Bound, options: RWS, settings: Settings) -> Problem:
    """Blocks, particle counts, lowered factors, plan.

    Raises:
        UnsupportedError: the plan does not fit the memory budget, or an option of ``infer`` is not supported.
    """
    if settings.minibatch is not None:
        raise UnsupportedError(
            "rws: minibatch= is not supported in this version. Use method='qem', or leave it out."
        )
    limit = settings.max_iters or _ITERATIONS
    inner = prepare_particles(bound, options, settings, limit)
    tol = 0.3 * (settings.tol or 0.1)  # of the iterates' scatter; their average is finer still
    memory = 0.99 if options.settle else 0.999
    rule = Rule(options.learning_rate, "adam", options.settle, limit, tol, memory)
    with isolated(settings.streams.seed):  # prior draws
        first = first_approximation(inner)
    coordinates, theta = raw.flatten(inner.blocks, first.proposals, inner.weighting.restarts)
    joint = None if options.parallel else shared.prepare(bound, options, settings)
    return Problem(
        bound, options, settings, inner, coordinates, joint, rule, limit, theta, first.params
    )


def init(problem: Problem) -> State:
    """Proposals as QEM starts them."""
    return State(ascent.start(problem.first_theta), problem.first_params, 0)


def step(problem: Problem, state: State, batch: Any = None) -> tuple[State, Info]:
    """One iteration."""
    q = approximation(problem, state.ascent.theta, state.params)
    made = (
        _weighed(problem, q, state)
        if problem.shared is None
        else problem.shared.weighed(problem.coordinates, q)
    )
    failures = 0 if bool(made.log_z.isfinite().all()) else state.failures + 1
    if failures >= _TOO_MANY:
        raise NumericalError(
            f"no particle had a finite weight for {failures} steps. Scale the data to order one, or give vague priors a scale."
        )
    moved = _moved(problem, state, made)
    new = State(moved, made.params, failures)
    return new, _info(problem, new, made)


def posterior(problem: Problem, state: State) -> Posterior:
    """Weigh fresh particles of the average of the last proposals, and collect the results."""
    q = approximation(problem, state.ascent.mean, state.params)
    if problem.shared is not None:
        return problem.shared.posterior(problem.coordinates, q)
    return results.posterior(problem.inner, q, "rws", state.ascent.iteration)


def approximation(problem: Problem, theta: Tensor, params: dict[str, Learned]) -> Approximation:
    """Proposals at a vector ``[R, P]``."""
    theta = theta.detach()
    return Approximation(
        {c.block.axis: raw.proposal(c, theta) for c in problem.coordinates}, params
    )


def _weighed(problem: Problem, q: Approximation, state: State) -> Weighed:
    """All combinations of the particles of all blocks."""
    inner = problem.inner
    weighting = inner.weighting
    with torch.no_grad():
        particles = draw_all(weighting, q, problem.settings.streams)
        here = evaluated(inner, weighting, particles, q)
    weights = weigh(here, last=not q.params)
    params = q.params and learn(inner, q.params, here, state.ascent.iteration + 1)
    marginals = {
        c.block.axis: _in_order(problem, c, weights.marginals) for c in problem.coordinates
    }
    return Weighed(weights.log_z, particles, marginals, params)


def _in_order(problem: Problem, at: Coordinates, marginals: dict[str, Tensor]) -> Tensor:
    """Weights ``[*restart, *plates, K]`` with the plates in the order of the block."""
    lead = len(problem.inner.weighting.lead)
    canonical = [p for p in problem.bound.graph.plates if p in at.block.plates]
    w = marginals[at.block.axis]
    order = [lead + canonical.index(p) for p in at.block.plates]
    return w.permute(*range(lead), *order, w.ndim - 1)


def _moved(problem: Problem, state: State, made: Weighed) -> Ascent:
    """One Adam step along ``sum_k w_k grad log q(z_k)``; elements without finite weights stay."""
    if not problem.coordinates:  # all latents are enumerated
        return state.ascent._replace(iteration=state.ascent.iteration + 1)
    theta = state.ascent.theta.detach().requires_grad_()
    with torch.enable_grad():
        objective = theta.new_zeros(())
        for at in problem.coordinates:
            w = made.weights[at.block.axis].detach()
            usable = w.isfinite().all(-1, keepdim=True)
            log_q = raw.log_density(at, theta, made.particles[at.block.axis])
            objective = objective + (torch.where(usable, w, 0.0) * log_q).sum()
        (gradient,) = torch.autograd.grad(objective, theta)
    return ascent.ascend(
        state.ascent, gradient, problem.rule, lambda t: raw.units(problem.coordinates, t)
    )


def _info(problem: Problem, state: State, made: Weighed) -> Info:
    ess = [1.0 / w.square().sum(-1) for w in made.weights.values()]
    metrics = {
        "log_evidence": float(made.log_z.max()),
        "ess": float(torch.stack([e.median() for e in ess]).min()) if ess else math.inf,
        "rate": ascent.rate(state.ascent, problem.rule),
    }
    if not problem.coordinates and not state.params:
        return Info(metrics, done=True)
    theta = state.ascent.theta
    unit = raw.units(problem.coordinates, theta)
    watch = [theta.flatten(), *(p.free.flatten() for p in state.params.values())]
    units = [unit.flatten(), *(torch.full_like(w, 0.1) for w in watch[1:])]
    ready = state.ascent.is_fine or not problem.coordinates
    return Info(metrics, watch=torch.cat(watch), unit=torch.cat(units), ready=ready)
