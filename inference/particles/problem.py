"""What a method on particles computes once: blocks, particle counts, and the plan of their weighting."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ppl.backend import Reason, Settings
from ppl.batches import batches_of
from ppl.binding import Bound
from ppl.errors import UnsupportedError
from ppl.graph import Graph
from ppl.inference.contract import suggest_groups
from ppl.inference.particles.blocks import Block, make_blocks, merge_blocks
from ppl.inference.particles.counts import largest, particle_counts
from ppl.inference.particles.forms import Sites
from ppl.inference.particles.memory import (
    Largest,
    default_memory,
    factor_arrays,
    keep_freed_memory,
)
from ppl.inference.particles.options import CHEAP, ParticleOptions
from ppl.inference.particles.weighting import (
    ChainSums,
    Weighting,
    dummy_plates,
    itemsize,
    lower,
    lower_bound,
    make_weighting,
    plan_of,
)

_LARGE = 20_000_000  # entries of the largest array up to which sites come by themselves
_MOST = 100_000  # unknown scalars up to which another method is a cheap start
_ROWS = 20_000  # observed numbers up to which it is


@dataclass(frozen=True, eq=False)
class Problem:
    """What ``prepare`` returns."""

    bound: Bound
    options: Any
    settings: Settings
    weighting: Weighting
    max_iters: int
    whole: Problem | None = None  # that of all elements, where this process holds some of them

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks."""
        return self.weighting.blocks


def supports(graph: Graph) -> list[Reason]:
    """Why particles cannot fit this graph: a latent without a proposal, or latents of crossed plates that meet."""
    if not graph.latents:
        return [
            Reason(
                "",
                "the model has no latent to infer.",
                "Leave a site out of the data, or use method='exact'.",
            )
        ]
    try:
        # A count without a bound needs a proposal by name, which a graph does not show: preparing the fit asks for it.
        counts = [v.name for v in graph.latents if v.is_discrete and v.cardinality is None]
        blocks = make_blocks(graph, ParticleOptions(q=dict.fromkeys(counts, "Poisson")))
        sizes = {b.axis: 2 for b in blocks}
        plan_of(lower(graph, blocks, sizes, 0, dummy_plates(graph), torch.float64, "cpu", ()), None)
    except UnsupportedError as error:
        return [Reason("", str(error))]
    return []


def prepare_particles(
    bound: Bound, options: ParticleOptions, settings: Settings, max_iters: int
) -> Problem:
    """Blocks, particle counts, lowered factors, plan.

    Raises:
        UnsupportedError: the plan does not fit the memory budget, or an option of ``infer`` is not supported.
    """
    keep_freed_memory()
    batches = batches_of(bound, settings.minibatch, settings.streams)
    if not may_start_cheaply(bound, options, settings):  # the prior says too little of whole paths
        options = replace(options, paths_up_to=0)
    restarts = settings.restarts if settings.restarts > 1 else 0
    seen = bound if batches is None else bound.narrowed(batches.part(0).rows)
    blocks, sizes = _blocks(seen, options, settings)
    try:
        weighting = make_weighting(bound, blocks, sizes, restarts, settings.memory, options.chains)
    except UnsupportedError as error:
        if not isinstance(options.groups, str):
            raise
        try:
            weighting = _grouped(bound, blocks, sizes, restarts, settings.memory, options.chains)
        except UnsupportedError:
            raise UnsupportedError(f"{error} Sharing of indices was tried.") from None
    return Problem(bound, options, settings, weighting, max_iters)


def _blocks(
    bound: Bound, options: ParticleOptions, settings: Settings
) -> tuple[tuple[Block, ...], dict[str, int]]:
    """Blocks and particle counts, with sites where they are wanted and what they make stays small."""
    if options.wants_sites and settings.minibatch is None:
        blocks = make_blocks(bound.graph, options, sites=True)
        if any(isinstance(b.form, Sites) for b in blocks):
            sizes = particle_counts(bound, blocks, options, settings)
            budget = min(_LARGE, (settings.memory or default_memory(bound.device)) // 64)
            if largest(bound, blocks, sizes) * max(settings.restarts, 1) <= budget:
                return blocks, sizes
    blocks = make_blocks(bound.graph, options)
    return blocks, particle_counts(bound, blocks, options, settings)


def may_start_cheaply(bound: Bound, options: ParticleOptions, settings: Settings) -> bool:
    """Whether a run may begin at the result of another method: where it is told to, or where little is lost by trying."""
    if options.start != "auto":
        return options.start in CHEAP
    plain = settings.minibatch is None and not options.q and getattr(options, "bridge", True)
    if not plain or getattr(options, "distribute", None):
        return False
    scalars = sum(math.prod(bound.shape(v)) for v in bound.graph.latents)
    rows = sum(math.prod(bound.shape(v)) for v in bound.graph.role("observed"))
    return scalars <= _MOST and rows <= _ROWS


def _grouped(
    bound: Bound,
    blocks: tuple[Block, ...],
    sizes: Mapping[str, int],
    restarts: int,
    memory: int | None,
    chains: ChainSums,
) -> Weighting:
    """The same with blocks merged until the largest array fits the budget; no split of a plate was enough."""
    budget = memory or default_memory(bound.device)
    made = lower_bound(bound, blocks, sizes, restarts)
    groups = suggest_groups(
        [t.axes for t in made.terms],
        made.layout,
        budget,
        itemsize=itemsize(bound.dtype),
        plates_of=[t.plates for t in made.terms],
        apart=[b.axis for b in blocks if b.enumerated],
    )
    merged = merge_blocks(blocks, groups)
    counts = {b.axis: max(sizes[a.axis] for a in blocks if a.names[0] in b.names) for b in merged}
    return make_weighting(bound, merged, counts, restarts, memory, chains)


def describe(bound: Bound, options: ParticleOptions, settings: Settings) -> str:
    """One line for ``explain``: blocks, particles, the largest array and the operations of an iteration.

    Raises:
        UnsupportedError: the plan does not fit the memory budget.
    """
    weighting = prepare_particles(bound, options, settings, 1).weighting
    blocks, sizes, plan = weighting.blocks, weighting.sizes, weighting.plan
    text = ", ".join(f"{'+'.join(b.names)} ({_told(b, sizes[b.axis])})" for b in blocks)
    arrays = factor_arrays(bound, blocks, weighting.terms, sizes)
    axes, elements, size = plan.largest
    most = max([*arrays, Largest("a sum of factors", axes, elements, size)], key=lambda a: a.bytes)
    parts = f", plate {plan.split} in {len(plan.parts)} parts" if plan.split else ""
    work = f"about {plan.flops:.1g} operations an iteration"
    return f"particles of {text}; largest array: {most}{parts}; {work}"


def _told(block: Block, count: int) -> str:
    """Particles of a block, in words."""
    return (
        "all"
        if block.enumerated
        else f"{count}{' each, by sites' if isinstance(block.form, Sites) else ''}"
    )
