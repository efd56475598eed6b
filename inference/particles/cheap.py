"""Start values from a cheap pass of another method, looked up by its name: backends do not import each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from ppl.backend import load
from ppl.binding import Bound
from ppl.errors import NumericalError, UnsupportedError
from ppl.inference.particles.problem import Problem
from ppl.inference.particles.spreads import held_latents, marginal_draws
from ppl.posterior import Posterior
from ppl.simulation import simulate

_STEPS = 200
_DRAWS = 2000
_FIRST = 101  # draws of the prior whose median held latents start at


def cheap_draws(problem: Problem) -> dict[str, Tensor]:
    """Joint draws ``[n, *plates, *event]`` of all latents from the posterior of the method ``options.start``.

    Latents in spreads, and those that the method cannot fit, are found apart, see :mod:`ppl.inference.particles.spreads`.

    Raises:
        UnsupportedError: that method cannot fit the model, or its result is not finite; with its reasons.
    """
    name, bound = problem.options.start, problem.bound
    streams = problem.settings.streams.child(name)
    held = held_latents(bound.graph)
    try:
        if held:
            drawn = simulate(bound, _FIRST, streams.child("held"), sites=held)
            first = {n: drawn[n].median(0).values for n in held}
            draws = marginal_draws(bound, first, partial(_fitted, problem), _DRAWS, streams)
        else:
            draws = _fitted(problem, bound, {}).samples(_DRAWS, seed=streams.seed)
    except UnsupportedError:
        raise
    except (NumericalError, ArithmeticError, RuntimeError) as error:
        raise UnsupportedError(
            f"start='{name}': {name} failed on this model: {error} Use start='prior' or 'standard'."
        ) from error
    lost = [n for n, d in draws.items() if not bool(d.isfinite().all())]
    if lost:
        raise UnsupportedError(
            f"start='{name}': {name} gives values of {', '.join(lost)} that are not finite. Use start='prior' or 'standard'."
        )
    return {v.name: draws[v.name] for v in bound.graph.latents}


def _fitted(problem: Problem, bound: Bound, begin: Mapping[str, Tensor]) -> Posterior:
    """The posterior of the cheap method; ``begin`` holds first values of latents."""
    name = problem.options.start
    backend = load(name)
    reasons = backend.supports(bound.graph)
    if reasons:
        listed = "\n".join(f"    {r}" for r in reasons)
        raise UnsupportedError(
            f"start='{name}': {name} cannot fit this model:\n{listed}\n    Use start='prior' or 'standard'."
        )
    settings = replace(
        problem.settings,
        streams=problem.settings.streams.child(name),
        restarts=1,
        minibatch=None,
        max_iters=_STEPS,
    )
    options = backend.Options(start=begin) if begin else backend.Options()
    inner = backend.prepare(bound, options, settings)
    state = backend.init(inner)
    for _ in range(_STEPS):
        state, info = backend.step(inner, state, None)
        if info.done:
            break
    return backend.posterior(inner, state)
