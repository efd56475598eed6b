"""Sparse subspace variational inference as a backend: Gaussians on sets of weights, which move while they are fitted.

Source: [Li2024] algorithm 1; steps between updates of the sets are those of :mod:`ppl.inference.networks`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ppl.backend import Info, Reason, Settings
from ppl.batches import Batch, batches_of
from ppl.binding import Bound
from ppl.errors import ModelError, UnsupportedError
from ppl.graph import Graph
from ppl.inference.networks import fit, results, structure
from ppl.inference.networks import records as networks
from ppl.inference.networks.records import Rule, Runs
from ppl.inference.ssvi.beginning import first_sets, init, timings
from ppl.inference.ssvi.explain import lines, notes
from ppl.inference.ssvi.layers import effective_priors, effective_starts, find_layers
from ppl.inference.ssvi.options import SSVI
from ppl.inference.ssvi.records import Layer, Problem, Running, State
from ppl.inference.ssvi.schedule import is_due, is_settled, schedule, stillness
from ppl.inference.ssvi.update import update
from ppl.posterior import Posterior

_WISHES = {"auto": "local", "local": "local", "flipout": "flipout", "sampling": "draw", "natural": "draw"}  # fmt: skip


def supports(graph: Graph) -> list[Reason]:
    """Why the weights of a model cannot be a sparse set."""
    found = [Reason(*reason) for reason in structure.reasons(graph)]
    if found or _has_products(graph):
        return found
    return [
        Reason("", "no layer multiplies by an array of weights that nothing else reads.", "Use method='vi'.")
    ]  # fmt: skip


def _has_products(graph: Graph) -> bool:
    layers = structure.find_layers(graph)
    return any(
        y.kind in structure.PRODUCTS and y.weight is not None and y.weight.role == "latent"
        for y in layers
    )


def describe(bound: Bound, options: SSVI, settings: Settings) -> str:
    """For ``explain``: the size of the set, and what each layer keeps and costs; kernels are timed.

    Raises:
        UnsupportedError: the model does not fit the options.
    """
    problem = prepare(bound, options, settings)
    measured = timings(problem)
    state = fit.first(problem.inner, 0, first_sets(problem, 0))
    return lines(problem, state, measured)


# ---- what is computed once ---------------------------------------------------------------------------------------


def prepare(bound: Bound, options: SSVI, settings: Settings) -> Problem:
    """Budgets, the schedule, and what all methods for networks prepare.

    Raises:
        UnsupportedError: no array of weights can be sparse.
    """
    network = structure.find_network(bound)
    layers = find_layers(network, options)
    sparse = {layer.at for layer in layers}
    running = Running()
    steps = networks.horizon(bound, settings)
    inner = fit.prepare(
        bound,
        settings,
        _rule(options, steps),
        _WISHES[options.estimator],
        method="ssvi",
        is_sparse=[i in sparse for i in range(len(network.arrays))],
        factory=running.factory,
        starts=lambda own, starts: effective_starts(own, layers, options, starts),
    )
    inner = replace(inner, priors=effective_priors(inner, layers, options))
    _check(inner, layers, options)
    plan = schedule(options.rate, options.every, options.until, steps)
    batches = batches_of(bound, settings.minibatch, settings.streams)
    return Problem(inner, options, plan, layers, batches, running)


def _check(inner: networks.Problem, layers: Sequence[Layer], options: SSVI) -> None:
    if options.addition == "t_like" and options.at == "mean" and not inner.settings.minibatch:
        raise ModelError(
            "SSVI(addition='t_like', at='mean') without minibatch=: gradients of all data at the means have no noise to compare "
            "them with. Take at='draw' or addition='gradient'."
        )
    needs_prior = options.density == "auto" or "evidence" in (options.removal, options.addition)
    for layer in layers:
        if needs_prior and inner.priors[layer.at].kind == "joint":
            raise UnsupportedError(
                f"ssvi: the evidence of a weight needs its own prior density, and that of '{layer.name}' is joint. Take "
                "removal='snr', addition='gradient' and a fixed density."
            )


def _rule(options: SSVI, steps: int) -> Rule:
    mean, scale = options.rates
    return Rule(
        natural=options.is_natural,
        optimiser=options.optimiser,
        learning_rate=mean,
        scale_rate=scale,
        point_rate=Rule.point_rate if options.is_natural else mean,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        schedule=options.schedule,
        warmup=networks.warmup_steps(options.warmup, steps),
        tempering=options.tempering,
        draws=options.draws,
        horizon=steps,
        initial_sd=options.initial_sd,
        augment=options.augment,
    )


# ---- steps -------------------------------------------------------------------------------------------------------


def step(problem: Problem, state: State, batch: Batch | None) -> tuple[State, Info]:
    """A gradient step of every run, or an update of its sets, which moves no value.

    Raises:
        NumericalError: the loss, a gradient or a score is not finite, or the loss runs away; the layer is named.
    """
    problem.running.take(problem, state.kernels)
    made = [_step(problem, state, run, batch) for run in range(len(state.inner.runs))]
    best = min(made, key=lambda m: _rank(m[0].loss))
    runs, _, still, new = zip(*made, strict=True)
    return State(Runs(tuple(runs)), state.kernels, still, new), best[1]


def _rank(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


def _step(
    problem: Problem, state: State, run: int, batch: Batch | None
) -> tuple[networks.State, Info, int, float]:
    own, still, new = state.inner.runs[run], state.still[run], state.new[run]
    if problem.layers and not is_settled(still) and is_due(problem.plan, own.step):
        made = update(problem, own, batch)
        # Sets that are free, or see a divergence whose weight still rises, have not found their places.
        moving = problem.options.density == "auto" or own.step < problem.inner.rule.warmup
        still = 0 if moving else stillness(still, made.new)
        info = fit.info(problem.inner, made.state, made.loss)
        return made.state, _with_sets(problem, made.state, info, made.new), still, made.new
    after, info = fit.step(problem.inner, own, batch)
    return after, _with_sets(problem, after, info, new), still, new


def _with_sets(problem: Problem, state: networks.State, info: Info, new: float) -> Info:
    metrics = {**info.metrics, "density": density(problem, state), "new": new}
    return info._replace(metrics=metrics)


def density(problem: Problem, state: networks.State) -> float:
    """Share of all weights of products that is active."""
    inner = problem.inner
    counts = networks.sizes(inner, state)
    weights = inner.network.weights
    return sum(counts[i] for i in weights) / sum(inner.arrays[i].size for i in weights)


# ---- the result --------------------------------------------------------------------------------------------------


def posterior(problem: Problem, state: State) -> Posterior:
    """The posterior of the best restart; of weights outside its sets nothing is stored."""
    problem.running.take(problem, state.kernels)
    found = results.collect(problem.inner, state.inner)
    best, _ = results.best(problem.inner, state.inner)
    extra = notes(problem, best, state, best.run, timings(problem))
    found.diagnostics = replace(found.diagnostics, notes={**found.diagnostics.notes, **extra})
    return found


__all__ = ["density", "describe", "init", "posterior", "prepare", "step", "supports"]
