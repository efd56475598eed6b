"""How many particles each block gets, and what the largest array of a weighting then holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from ppl.backend import Settings
from ppl.binding import Bound
from ppl.errors import ModelError
from ppl.inference.particles.blocks import Block
from ppl.inference.particles.forms import Sites
from ppl.inference.particles.options import ParticleOptions
from ppl.inference.particles.weighting import (
    DEFAULT_MEMORY,
    Weighting,
    itemsize,
    lower_bound,
    plan_of,
    values_of,
)

_COMFORTABLE = (
    200_000  # entries of the largest array up to which more particles cost next to nothing
)
_PER_SCALAR = 8  # particles of a joint Gaussian outside plates, where they cost little, for each of its scalars
_PER_PATH = 5  # particles of a block with a whole path, for each of its scalars
_NESTED = 6  # particles for each one of the parents
_NESTED_LAST = 20
_SITES = 4  # the same of sites, which are near the posterior
_SITES_LAST = (56, 28, 14)  # as many as fit
_SHARING = 100  # particles of the parents in one replicate
_TOLERABLE = 20_000_000  # entries of the largest array, about a second an iteration
# Particles in plates, and outside for each scalar, that are tried in turn where that is exceeded.
_SCARCE = ((10, 4), (6, 4), (6, 3), (4, 3))
_AMPLE = 4_000_000  # entries of the largest array of the last weighting
_COUNTS = (
    2000,
    1000,
    700,
    500,
    300,
    200,
    150,
    100,
    70,
    50,
    30,
)  # particles of the last weighting, the most that fit
_POINTS = 4000  # particles of all replicates together, at least


def particle_counts(
    bound: Bound, blocks: Sequence[Block], options: ParticleOptions, settings: Settings
) -> dict[str, int]:
    """Particles of every block: as asked, or as many as cost next to nothing."""
    asked = options.particles
    default = asked if isinstance(asked, int) else None
    named = asked if isinstance(asked, Mapping) else {}
    known = {n for b in blocks for n in b.names}
    for name in named:
        if name not in known:
            raise ModelError(
                f"particles=... names '{name}', which is not a latent. Latents: {', '.join(sorted(known))}."
            )
    for count in (100, 60, 30, 20, 10):
        sizes = {}
        for b in blocks:
            own = [named[n] for n in b.names if n in named]
            joint = not b.plates and b.dims <= options.joint_limit(b.plates)
            usual = max(count, min(_PER_SCALAR * b.dims, 1000)) if joint else count
            if any(m.path for m in b.members):
                usual = max(count, _PER_PATH * b.dims)
            usual = _nested(b, usual)
            sizes[b.axis] = values_of(b) if b.enumerated else own[0] if own else default or usual
        limit = _COMFORTABLE * (1 if count > 30 else 20)
        if settings.memory is not None:
            limit = min(limit, settings.memory // itemsize(bound.dtype))
        if default is not None or largest(bound, blocks, sizes) <= limit:
            return sizes
    return _few(bound, blocks, sizes, named)


def _nested(block: Block, usual: int) -> int:
    """Particles of a block: of a nested one, for each of the parents'."""
    if not block.is_nested:
        return usual
    return _SITES if isinstance(block.form, Sites) else _NESTED


def _few(
    bound: Bound, blocks: Sequence[Block], sizes: Mapping[str, int], named: Mapping[str, int]
) -> dict[str, int]:
    """Counts for factors of many blocks, such as a chain's, where ten of each are many already."""
    for count, each in _SCARCE:
        if largest(bound, blocks, sizes) <= _TOLERABLE:
            break
        sizes = {
            b.axis: sizes[b.axis]
            if b.enumerated or set(b.names) & named.keys()
            else min(sizes[b.axis], count if b.plates else max(count, each * b.dims))
            for b in blocks
        }
    return dict(sizes)


def final_counts(
    weighting: Weighting, options: ParticleOptions, memory: int | None
) -> dict[str, int]:
    """Particles of the last weighting: up to 2000 a block while the largest array stays ample.

    Blocks in plates get more than those outside: their sums are estimates that multiply over the plate, and replicates
    add particles to the others.
    """
    blocks = weighting.blocks
    budget = min(_AMPLE, (memory or DEFAULT_MEMORY) // 64)
    if any(isinstance(b.form, Sites) for b in blocks) and not options.final_particles:
        return _final_with_sites(weighting, budget)
    for count in (options.final_particles,) if options.final_particles else _COUNTS:
        many = max((b.dims for b in blocks if not b.plates), default=0) > options.joint_up_to
        inner = count if options.final_particles or many else min(4 * count, _COUNTS[0])
        sizes = {
            b.axis: values_of(b)
            if b.enumerated
            else (weighting.sizes[b.axis] if options.final_particles else _NESTED_LAST)
            if b.is_nested
            else inner
            if b.plates
            else count
            for b in blocks
        }
        if options.final_particles or largest(weighting.bound, blocks, sizes) <= budget:
            return sizes
    return {b.axis: weighting.sizes[b.axis] for b in blocks}


def _final_with_sites(weighting: Weighting, budget: int) -> dict[str, int]:
    """Particles of the last weighting where some are sites: few, in many replicates, as those of one share their noise."""
    blocks = weighting.blocks
    for count in (c for c in _COUNTS if c <= _SHARING):
        for own in _SITES_LAST:
            sizes = {
                b.axis: values_of(b)
                if b.enumerated
                else (own if isinstance(b.form, Sites) else _NESTED_LAST)
                if b.is_nested
                else count
                for b in blocks
            }
            if largest(weighting.bound, blocks, sizes) <= budget:
                return sizes
    return {b.axis: weighting.sizes[b.axis] for b in blocks}


def replicate_count(options: ParticleOptions, counts: Iterable[int]) -> int:
    """Replicates of the last weighting: at least 8, and up to 40 where each has few particles."""
    if options.replicates is not None:
        return options.replicates
    return min(max(8, math.ceil(_POINTS / min(counts, default=_POINTS))), 40)


def largest(bound: Bound, blocks: Sequence[Block], sizes: Mapping[str, int]) -> int:
    """Entries of the largest array that one evaluation makes."""
    made = lower_bound(bound, tuple(blocks), sizes, 0)
    plan = plan_of(made, None)
    size_of = {**sizes, **{p: bound.size(p) for p in bound.graph.plates}}
    factors = [
        torch.Size(size_of.get(a, size_of.get(a.rstrip("'"), 1)) for a in t.axes).numel()
        for t in made.terms
    ]
    return max([plan.largest[1], *factors, *_mixtures(bound, blocks, sizes)])


def _mixtures(bound: Bound, blocks: Sequence[Block], sizes: Mapping[str, int]) -> list[int]:
    """Densities of the proposals that are mixtures over other blocks' particles: plates, own and parents' particles."""
    found = []
    for block in blocks:
        parents = [b for b in blocks if set(b.names) & set(block.reads)]
        counts = (sizes[b.axis] for b in (block, *parents))
        if parents:
            size = torch.Size((*(bound.size(p) for p in block.plates), *counts)).numel()
            # Nested particles are drawn at every combination.
            events = [torch.Size(m.variable.event_shape).numel() for m in block.members]
            found.append(size * sum(events) if block.is_nested else size)
    return found
