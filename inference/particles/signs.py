"""Models that do not know a sign: how QEM proposes their latents by itself.

In a hierarchy whose signs only products tell, every unit finds a sign of its own while weights are tempered, and what the units
have in common is then wrong for all of them. Where data speak of such latents through enumerated labels alone, which say little
of magnitudes, the latents' own laws make good proposals: units follow the sign of what they have in common, for which both
signs are proposed at once (:mod:`ppl.inference.particles.mirrored`).

While a run looks for the other latents, these have a particle index of their own, so that how well they are found does not
limit it; the last weighting brings them together, which costs a product of particles less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ppl.backend import Settings
from ppl.binding import Bound
from ppl.errors import UnsupportedError
from ppl.graph import Graph
from ppl.inference.particles.approximation import Approximation
from ppl.inference.particles.blocks import Block, collapsed_plates, make_blocks, merge_blocks
from ppl.inference.particles.counts import largest
from ppl.inference.particles.forms import Mirrored, Prior
from ppl.inference.particles.options import ParticleOptions
from ppl.inference.particles.problem import Problem
from ppl.inference.particles.sharing import is_enumerable
from ppl.inference.particles.weighting import make_weighting, values_of
from ppl.lower import variables_of
from ppl.reflections import reflections
from ppl.simulation import simulate

_TRIED = 2  # draws of the prior at which densities are compared
_ROOM = 9_000_000  # entries of the largest array
_LAST_ROOM = 26_000_000  # the same of the last weighting: a few replicates of many particles beat many of a few
# Particles of latents outside plates, of units that follow them, of others in plates, and nested ones: the first that fit.
_COUNTS = ((100, 60, 10, 4), (100, 40, 3, 3), (60, 30, 3, 2))
_LAST = (500, 300, 200, 150, 100, 70, 40)  # particles of the last weighting
_REPLICATES = 5
_SHARE = 0.2  # of an iteration in the average that proposals must be near
_NEAR = 0.3  # standard deviations, and of their logs


@dataclass(frozen=True)
class _Levels:
    """Latents that change their signs: outside plates, units that follow them, and what lies within units."""

    roots: tuple[str, ...]
    units: tuple[str, ...]
    inner: tuple[str, ...]


def with_signs(bound: Bound, options: Any, settings: Settings) -> Any:
    """The options with proposals for latents of unknown signs; as they are for other models, or where something is asked for."""
    if not _is_left_open(options, settings) or not _may_apply(bound.graph, options):
        return options
    streams = settings.streams.child("signs")
    names = [v.name for v in bound.graph.latents]
    try:
        drawn = simulate(bound, _TRIED, streams, sites=names)
    except UnsupportedError:  # a law has no sampler
        return options
    points = [{n: d[i] for n, d in drawn.items()} for i in range(_TRIED)]
    for reflection in reflections(bound, points):
        levels = _levels(bound.graph, reflection.sites, options)
        if levels is not None:
            return _with_forms(bound, options, levels)
    return options


def mirrored_names(blocks: Sequence[Block]) -> tuple[str, ...]:
    """Latents that are proposed with both signs, and those whose proposals follow them."""
    flips = [n for b in blocks if isinstance(b.form, Mirrored) for n in b.form.flips]
    reading = [b for b in blocks if isinstance(b.form, Prior)]
    followed = [
        n for b in reading for n in b.names if isinstance(b.form, Prior) and b.form.takes(n)
    ]
    return (*flips, *followed) if flips else ()


def for_last(problem: Problem, q: Approximation) -> tuple[Problem, Approximation]:
    """The same for the last weighting: units and the Gaussian that meets them around a label share one particle index."""
    pair = _meeting(problem) if mirrored_names(problem.blocks) else None
    if pair is None:
        return problem, q
    first, other = pair
    assert isinstance(first.form, Prior)
    form = replace(first.form, of=first.names)
    merged = merge_blocks(problem.blocks, [(first.axis, other.axis)])
    blocks = tuple(replace(b, form=form) if b.form is first.form else b for b in merged)
    (whole,) = (b for b in blocks if b.form is form)
    kept = {a: p for a, p in q.proposals.items() if a not in (first.axis, other.axis)}
    proposals = {**kept, whole.axis: q.proposals[other.axis]}
    weighting, settings, options = problem.weighting, problem.settings, problem.options
    if options.final_particles is None:
        options = replace(
            options, final_particles=_last_count(problem.bound, blocks, weighting.sizes)
        )
    sizes = {**weighting.sizes, whole.axis: weighting.sizes[first.axis]}
    counts = {b.axis: sizes[b.axis] for b in blocks}
    made = make_weighting(
        problem.bound, blocks, counts, weighting.restarts, settings.memory, options.chains
    )
    changed = replace(problem, weighting=made, options=options)
    return changed, q._replace(proposals=proposals)


def settled(problem: Problem, trail: Tensor | None, q: Approximation) -> tuple[Tensor | None, bool]:
    """An average of the last iterations' proposals, and whether the present ones are near it; for dear iterations only."""
    if not is_slow(problem):
        return None, False
    joints = [q.proposals[b.axis].joint for b in problem.blocks if isinstance(b.form, Mirrored)]
    means = torch.cat([j.mean.reshape(-1) for j in joints if j is not None])
    sds = torch.cat([j.sd.reshape(-1) for j in joints if j is not None])
    here = torch.cat((means, sds.log()))
    if trail is None:
        return here, False
    apart = (here - trail).abs() / torch.cat((sds, torch.ones_like(sds)))
    return trail.lerp(here, _SHARE), float(apart.max()) < _NEAR


def is_slow(problem: Problem) -> bool:
    """Whether iterations are so dear that the last weighting is the cheaper way to what they would still gain."""
    return bool(mirrored_names(problem.blocks)) and any(b.is_nested for b in problem.blocks)


# ---- the choice ---------------------------------------------------------------------------------------------------


def _is_left_open(options: Any, settings: Settings) -> bool:
    asked = (options.q, options.particles, options.final_particles, options.replicates)
    plain = options.groups == "auto" and options.start in ("auto", "prior") and options.bridge
    whole = settings.minibatch is None and options.distribute is None and settings.memory is None
    return all(a is None for a in asked) and plain and whole and options.joint_up_to > 0


def _may_apply(graph: Graph, options: ParticleOptions) -> bool:
    """Whether an enumerated latent reads two others, and there is nothing that the choice is not made for."""
    latents = {v.name for v in graph.latents}
    if graph.role("param") or any(f.chain for f in graph.densities):
        return False
    return any(
        is_enumerable(v, options.enumerate_up_to) and len(set(graph.parents(v.name)) & latents) > 1
        for v in graph.latents
    )


def _levels(graph: Graph, sites: Sequence[str], options: ParticleOptions) -> _Levels | None:
    """The latents of a reflection by their place in the hierarchy; None where it is of another kind."""
    labels = {v.name for v in graph.latents if is_enumerable(v, options.enumerate_up_to)}
    readers = {f.name for f in graph.densities if variables_of(graph, f) & set(sites)}
    if not readers <= labels | set(sites) or set(sites) & collapsed_plates(graph).keys():
        return None
    above = {n: [p for p in graph.parents(n) if graph.variables[p].role == "latent"] for n in sites}
    roots = tuple(n for n in sites if not set(above[n]) & set(sites))
    contexts = {n: graph.closure(graph.variables[n].plates) for n in sites}
    rest = [n for n in sites if n not in roots]
    places = sorted({contexts[n] for n in rest}, key=len)
    if any(contexts[n] for n in roots) or not 1 <= len(places) <= 2 or not places[0]:
        return None
    units = tuple(n for n in rest if contexts[n] == places[0])
    inner = tuple(n for n in rest if contexts[n] == places[-1]) if len(places) == 2 else ()
    follow = not any(set(above[n]) & set(rest) for n in units)
    nest = places[0] <= places[-1] and all(above[n] and set(above[n]) <= set(units) for n in inner)
    return _Levels(roots, units, inner) if follow and nest else None


def _with_forms(bound: Bound, options: Any, levels: _Levels) -> Any:
    q: dict[Any, Any] = {_key(levels.units): Prior()}
    if levels.inner:
        q[_key(levels.inner)] = Prior(index="nested")
    for block in make_blocks(bound.graph, replace(options, q=q)):
        flips = tuple(n for n in block.names if n in levels.roots)
        if flips:
            q[_key(block.names)] = Mirrored(flips)
    chosen = replace(options, q=q)
    blocks = make_blocks(bound.graph, chosen)
    for counts in _COUNTS:
        sizes = {b.axis: values_of(b) if b.enumerated else _usual(b, counts) for b in blocks}
        if largest(bound, blocks, sizes) <= _ROOM:
            particles = {b.names[0]: sizes[b.axis] for b in blocks if not b.enumerated}
            return replace(chosen, particles=particles, replicates=_REPLICATES)
    return options


def _usual(block: Block, counts: tuple[int, int, int, int]) -> int:
    outer, units, others, own = counts
    if block.is_nested:
        return own
    return outer if not block.plates else units if isinstance(block.form, Prior) else others


def _key(names: tuple[str, ...]) -> Any:
    return names if len(names) > 1 else names[0]


# ---- the last weighting -------------------------------------------------------------------------------------------


def _last_count(bound: Bound, blocks: Sequence[Block], sizes: Mapping[str, int]) -> int:
    """Particles of every block that is not nested: as many as there is room for.

    One that follows particles of another by its own law needs as many as that has.
    """
    for count in _LAST:
        found = {
            b.axis: values_of(b) if b.enumerated else sizes[b.axis] if b.is_nested else count
            for b in blocks
        }
        if largest(bound, blocks, found) <= _LAST_ROOM:
            break
    return count


def _meeting(problem: Problem) -> tuple[Block, Block] | None:
    """A block proposed by its own law, and a Gaussian one in the same plates that it meets around an enumerated latent."""
    graph = problem.bound.graph
    labels = {n for b in problem.blocks if b.enumerated for n in b.names}
    around = {n for f in graph.densities if labels & set(f.scope) for n in f.scope}
    for first in problem.blocks:
        if isinstance(first.form, Prior) and not first.is_nested and not first.gaussian:
            for other in problem.blocks:
                if _is_plain(other) and other.plates == first.plates and around & set(other.names):
                    return first, other
    return None


def _is_plain(block: Block) -> bool:
    free = not (block.form or block.tied or block.chain or block.enumerated)
    return free and block.gaussian == block.members and not any(m.collapsed for m in block.members)
