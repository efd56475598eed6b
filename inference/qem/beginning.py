"""Where a run begins: at the prior, or where that says next to nothing of the posterior, at a cheap fit."""

from __future__ import annotations

from dataclasses import replace

from ppl.errors import UnsupportedError
from ppl.inference.particles.approximation import Approximation
from ppl.inference.particles.blocks import Block
from ppl.inference.particles.estep import draw_all, draws_in_parts, evaluated, weigh
from ppl.inference.particles.problem import Problem, may_start_cheaply
from ppl.inference.particles.start import first_approximation
from ppl.inference.particles.tempering import effective_share

_LEAST = 1e-3  # exponent of the weights at which the prior's particles must still count
_ENOUGH = 0.2  # effective share of them


def first(problem: Problem) -> Approximation:
    """The first approximation; ``start="auto"`` is the prior's, or that of laplace where the former is hopeless."""
    if problem.options.start != "auto":
        return first_approximation(problem)
    prior = first_approximation(_starting(problem, "prior"))
    if not _may_differ(problem) or not _is_hopeless(problem, prior):
        return prior
    try:
        return first_approximation(_starting(problem, "laplace"))
    except UnsupportedError:
        return prior


def _starting(problem: Problem, start: str) -> Problem:
    return replace(problem, options=replace(problem.options, start=start))


def _may_differ(problem: Problem) -> bool:
    """Whether there is something to gain, and to lose little."""
    if problem.weighting.share is not None or draws_in_parts(problem.weighting):
        return False
    # Elsewhere the bridge comes from the prior by itself; along a chain what a start lacks adds up from step to step.
    states = any(_has_states(b) for b in problem.blocks)
    return states and may_start_cheaply(problem.bound, problem.options, problem.settings)


def _has_states(block: Block) -> bool:
    """Whether a block holds a chain of states, one by one or as a whole path."""
    return bool(block.chain and not block.enumerated) or any(m.path for m in block.members)


def _is_hopeless(problem: Problem, prior: Approximation) -> bool:
    """Whether a thousandth of what the data say leaves few of the prior's particles."""
    if not prior.proposals:
        return False
    if any(m.path for b in problem.blocks for m in b.members):
        return True  # of whole paths it always says too little
    drawn = draw_all(problem.weighting, prior, problem.settings.streams.child("trial"))
    here = evaluated(problem, problem.weighting, drawn, prior)
    weights = weigh(here, _LEAST, last=True)
    return not effective_share(problem.weighting, weights) >= _ENOUGH
