"""QEM with the elements of one plate spread over processes, see :mod:`ppl.inference.particles.processes`.

One all-reduce a weighting, of the messages to the blocks outside the plate; a step past the bridge is one weighting.
Decisions that all processes must take alike (the bridge, when to stop) look at the blocks outside the plate alone. The
posterior is gathered: every process ends with all of it, from a last weighting of its own.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ppl.backend import Settings
from ppl.binding import Bound
from ppl.errors import UnsupportedError
from ppl.inference.particles.approximation import Approximation
from ppl.inference.particles.estep import draws_in_parts
from ppl.inference.particles.problem import Problem
from ppl.inference.particles.processes import gathered, join, same_streams, share_of
from ppl.inference.particles.shards import joined_over
from ppl.inference.particles.weighting import make_weighting
from ppl.inference.qem import kernel
from ppl.inference.qem.options import QEM
from ppl.posterior import Posterior


def prepare(bound: Bound, options: QEM, settings: Settings) -> Problem:
    """The problem of this process: all blocks outside the plate, and its own elements.

    Raises:
        UnsupportedError: there is one process only, or an option that needs all elements at once.
        DataError: the plate is not there or too small.
    """
    assert options.distribute is not None
    join(torch.device(bound.device))
    _check(bound, settings)
    settings = replace(settings, streams=same_streams(settings.streams))
    whole = kernel.prepare(bound, replace(options, distribute=None), settings)
    share = share_of(bound, options.distribute, len(whole.weighting.plan.parts))
    own = bound.narrowed(share.rows(bound))
    old = whole.weighting
    weighting = make_weighting(
        own, old.blocks, old.sizes, old.restarts, settings.memory, options.chains, share
    )
    if not draws_in_parts(weighting):
        raise UnsupportedError(
            f"distribute='{options.distribute}': proposals that read other latents or are tied learn from all elements at "
            "once. Leave them out of q=, or leave distribute= out."
        )
    return replace(whole, bound=own, options=options, weighting=weighting, whole=whole)


def posterior(problem: Problem, state: kernel.State) -> Posterior:
    """Gather the proposals of all processes, weigh fresh particles and collect the results."""
    share, whole = problem.weighting.share, problem.whole
    assert share is not None and whole is not None
    proposals = {
        b.axis: joined_over(problem.weighting, state.q.proposals[b.axis], b, share.plate, gathered)
        for b in problem.blocks
        if b.axis in state.q.proposals
    }
    full = state._replace(q=Approximation(proposals, state.q.params))
    return kernel.posterior(whole, full)


def _check(bound: Bound, settings: Settings) -> None:
    if settings.minibatch is not None:
        raise UnsupportedError(
            "distribute= and minibatch= exclude each other. Leave one of them out."
        )
    if settings.restarts > 1:
        raise UnsupportedError(
            "distribute= and restarts= exclude each other. Run once for each seed."
        )
    if bound.graph.role("param"):
        names = ", ".join(v.name for v in bound.graph.role("param"))
        raise UnsupportedError(
            f"distribute: the params {names} are learned from all elements at once. Make them latents, or leave distribute= out."
        )
