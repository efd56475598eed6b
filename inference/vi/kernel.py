"""Variational inference as a backend: Gaussians on the unconstrained scale, moved up a bound by stochastic gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from ppl.backend import Info, Reason, Settings
from ppl.binding import Bound
from ppl.errors import NumericalError, UnsupportedError
from ppl.graph import Graph
from ppl.inference.networks import fit
from ppl.inference.networks.records import Problem as NetworkProblem
from ppl.inference.networks.records import Runs
from ppl.inference.networks.results import collect
from ppl.inference.numerics import ascent
from ppl.inference.numerics import flat_gaussian as gaussians
from ppl.inference.numerics.ascent import Rule
from ppl.inference.particles.blocks import is_enumerable, transform_of
from ppl.inference.particles.lanes import check_lanes, make_lanes
from ppl.inference.particles.problem import prepare_particles
from ppl.inference.vi import networks, results
from ppl.inference.vi.batches import divide, moved_by_all, step_on_batch
from ppl.inference.vi.bounds import BoundOnEvidence, MassivelyParallel, Plain
from ppl.inference.vi.coordinates import block_groups, joint_groups, origins
from ppl.inference.vi.estimators import ESTIMATORS
from ppl.inference.vi.options import VI
from ppl.inference.vi.problem import Param, Problem, State, units
from ppl.nn.structure import buffers
from ppl.posterior import Posterior

_ITERATIONS = 3000
_TOO_MANY = 20  # steps in a row without a finite bound
_LARGEST = 2**28  # numbers in the Cholesky factor of a full-rank Gaussian
_NARROW = 0.1  # first scale, in prior standard deviations, where one draw must represent q


def supports(graph: Graph) -> list[Reason]:
    """Why there is no gradient, or no sum over the discrete latents."""
    if not graph.latents and not graph.role("param"):
        return [Reason("", "the model has no latent to infer.", "Leave a site out of the data.")]
    reasons = []
    limit = VI().enumerate_up_to
    for v in graph.latents:
        if is_enumerable(v, limit):
            continue
        if v.is_discrete:
            reasons.append(
                Reason(
                    v.name,
                    "a discrete latent without a small set of values has no gradient.",
                    "Use method='qem' or method='rws', which sample it.",
                )
            )
            continue
        try:
            transform_of(v)
        except UnsupportedError as error:
            reasons.append(Reason("", str(error)))
    if not reasons:
        try:
            check_lanes(graph, limit)
        except UnsupportedError as error:
            reasons.append(Reason("", str(error)))
    return reasons


def describe(bound: Bound, options: VI, settings: Settings) -> str:
    """For ``explain``: the family and its size; of a network a line for each layer.

    Raises:
        UnsupportedError: the model does not fit the options or the memory budget.
    """
    problem = prepare(bound, options, settings)
    if isinstance(problem, NetworkProblem):
        return networks.describe(problem)
    scalars = sum(g.piece.cells for g in problem.groups)
    size = sum(g.piece.size for g in problem.groups)
    family = options.family.replace("_", "-")
    noun = "scalar" if scalars == 1 else "scalars"
    return f"a {family} Gaussian of {scalars} {noun}, {size} parameters; {options.draw_count} draws a step"


def prepare(bound: Bound, options: VI, settings: Settings) -> Problem | NetworkProblem:
    """Coordinates, the bound and its plan; or the lowered network.

    Raises:
        UnsupportedError: the model does not fit the options or the memory budget.
    """
    if networks.applies(bound.graph, options, settings):
        return networks.prepare(bound, options, settings)
    _refuse_batch_norms(bound)
    target = (
        _parallel(bound, options, settings)
        if options.parallel
        else _plain(bound, options, settings)
    )
    offset = sum(g.piece.size for g in target.groups)
    params = []
    for v in bound.graph.role("param"):
        start = biject_to(v.support).inv(_initial(bound, v))
        params.append(Param(v, tuple(start.shape), slice(offset, offset + start.numel())))
        offset += start.numel()
    limit = settings.max_iters or _ITERATIONS
    tol = 0.3 * (settings.tol or 0.1)  # of the iterates' scatter; their average is finer still
    # The long memory that is usual for squares would remember the first gradients, far from the posterior, for too long.
    memory = 0.99 if options.settle else 0.999
    rule = Rule(options.rate, options.optimiser, options.settle, limit, tol, memory)
    return Problem(bound, options, settings, target, tuple(params), rule, limit)


def _refuse_batch_norms(bound: Bound) -> None:
    """Batch statistics are known to the code for networks only."""
    unknown = [n for pair in buffers(bound.graph) for n in pair if n and n not in bound.columns]
    if unknown:
        raise UnsupportedError(
            f"vi: the statistics '{unknown[0]}' of a batch norm are estimated where the model is fitted as a network: "
            "family='mean_field', one particle, no discrete latents and none of every element of the data. Or use nn.FRN, "
            "nn.GroupNorm, nn.LayerNorm, or give the statistics as data."
        )


def _plain(bound: Bound, options: VI, settings: Settings) -> BoundOnEvidence:
    plate = next(iter(settings.minibatch), None) if settings.minibatch else None
    groups = joint_groups(bound, options, plate)  # latents within a divided plate apart
    for g in groups:
        numbers = g.piece.dims * g.piece.extra_dims * settings.restarts
        if numbers > _LARGEST:
            raise UnsupportedError(
                f"VI(family='{g.piece.family}') of {g.piece.dims} scalars has {numbers} coefficients. "
                "Use family='low_rank' with a small rank, or 'mean_field'."
            )
    counts = (settings.restarts, options.draw_count, options.particle_count)
    number = math.prod(counts)
    if plate is not None:
        return divide(groups, bound, options, settings, plate)
    return Plain(
        groups, make_lanes(bound, number, options.enumerate_up_to, settings.memory), *counts
    )


def _parallel(bound: Bound, options: VI, settings: Settings) -> BoundOnEvidence:
    lanes = settings.restarts * options.draw_count
    wide = Settings(settings.streams, lanes, settings.memory, settings.max_iters, settings.tol)
    weighting = prepare_particles(bound, options.blocks(), wide, 1).weighting
    groups = block_groups(bound, weighting.blocks, options)
    counts = (settings.restarts, options.draw_count, options.particle_count)
    return MassivelyParallel(groups, bound, weighting, *counts)


def init(problem: Problem | NetworkProblem) -> State | Runs:
    """Gaussians at the prior, one draw of it apart in further restarts; params at their initial values."""
    if isinstance(problem, NetworkProblem):
        return fit.init(problem)
    streams, options, bound = problem.settings.streams, problem.options, problem.bound
    origin = origins(bound, problem.groups, options, streams) if problem.groups else {}
    like = torch.zeros((), dtype=bound.dtype, device=bound.device)
    restarts = problem.target.restarts
    generator = streams.of("first approximation")
    alone = options.particle_count == 1 and options.start == "prior"
    sd = _NARROW if alone else 1.0
    parts = [gaussians.first(g.piece, restarts, sd, like, generator) for g in problem.groups]
    for p in problem.params:
        free = biject_to(p.variable.support).inv(_initial(bound, p.variable))
        parts.append(free.reshape(1, -1).expand(restarts, -1))
    theta = torch.cat([like.expand(restarts, 0), *parts], -1)
    for g in problem.groups:
        # Restarts begin at different places, or they would all tell the same story.
        apart = torch.randn(
            (restarts - 1, g.piece.cells), generator=generator, dtype=like.dtype, device=like.device
        )
        theta[1:, g.piece.locations] += apart
    return State(ascent.start(theta), origin, 0)


def _initial(bound: Bound, v: Any) -> Tensor:
    start = torch.as_tensor(v.initial, dtype=bound.dtype, device=bound.device)
    return start.expand(bound.shape(v)).clone()


def step(
    problem: Problem | NetworkProblem, state: State | Runs, batch: Any = None
) -> tuple[State | Runs, Info]:
    """One step up the bound."""
    if isinstance(problem, NetworkProblem):
        assert isinstance(state, Runs)
        return fit.step_all(problem, state, batch)
    assert isinstance(state, State)
    return _general_step(problem, state, batch)


def _general_step(problem: Problem, state: State, batch: Any) -> tuple[State, Info]:
    options = problem.options
    warmup = options.warmup_steps(problem.max_iters)
    risen = min(1.0, (state.ascent.iteration + 1) / warmup) if warmup else 1.0
    estimator, tempering = ESTIMATORS[options.estimator], options.tempering * risen
    if batch is not None and state.ascent.theta.numel():
        moved, bound = step_on_batch(problem, state, tempering, batch, estimator)
    elif state.ascent.theta.numel():
        moved, bound = estimator(problem, state, tempering)
    else:  # all latents are discrete: the sum over them is exact
        moved, bound = state.ascent, problem.target({}, {}, {})
    failures = 0 if bool(bound.isfinite().all()) else state.failures + 1
    if failures >= _TOO_MANY:
        raise NumericalError(
            f"the bound was not finite for {failures} steps. Scale the data to order one, give vague priors a scale, or "
            "lower learning_rate."
        )
    new = State(moved, state.origin, failures)
    return new, _info(problem, new, bound, risen)


def _info(problem: Problem, state: State, bound: Tensor, risen: float) -> Info:
    metrics = {
        "bound": float(bound.max()),
        "rate": ascent.rate(state.ascent, problem.rule),
    }
    ready = state.ascent.is_fine and risen == 1.0
    theta = state.ascent.theta
    if not theta.numel():
        return Info(metrics, done=True)
    if not ready:
        return Info(metrics, ready=False)
    watch, unit, judged = theta, units(problem, theta), moved_by_all(problem)
    if judged is not None:
        watch, unit = watch[..., judged], unit[..., judged]
    return Info(metrics, watch=watch.flatten(), unit=unit.flatten())


def posterior(problem: Problem | NetworkProblem, state: State | Runs) -> Posterior:
    """Moments and draws of q, its bound, and how well it stands the test of importance weights."""
    if isinstance(problem, NetworkProblem):
        assert isinstance(state, Runs)
        return collect(problem, state)
    assert isinstance(state, State)
    return results.posterior(problem, state)
