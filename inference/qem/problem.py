"""Everything that QEM computes once: blocks, lowered factors, contraction plan, particle counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.backend import Reason, Settings
from ppl.binding import Bound
from ppl.errors import ModelError, UnsupportedError
from ppl.graph import Factor, Graph
from ppl.inference.contract import (
    Chain,
    Layout,
    LogFactor,
    Plan,
    PlateSpec,
    make_plan,
    suggest_groups,
)
from ppl.inference.qem.blocks import RESTART, Block, make_blocks, merge_blocks
from ppl.inference.qem.options import QEM
from ppl.lower import Compiler, Lowered, Operand, map_name

_COMFORTABLE = (
    200_000  # entries of the largest array up to which more particles cost next to nothing
)
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
DEFAULT_MEMORY = 4 * 2**30


@dataclass(frozen=True, eq=False)
class Term:
    """One log-factor of the contraction: where it comes from and the plates it is repeated over."""

    name: str
    axes: tuple[str, ...]
    plates: tuple[str, ...]
    later: bool = False  # the transition of a chain


@dataclass(frozen=True, eq=False)
class Weighting:
    """Factors and plan for one choice of particle counts; what one E-step needs."""

    bound: Bound
    blocks: tuple[Block, ...]
    sizes: Mapping[str, int]  # particle axis -> particles
    restarts: int  # 0: no restart axis
    terms: tuple[Term, ...]
    lowered: Lowered
    singles: tuple[Lowered, ...]  # the same factors one by one, for plates processed in parts
    inputs: Mapping[str, tuple[str, ...]]  # input name -> its axes, for narrowing
    plan: Plan

    @property
    def lead(self) -> tuple[int, ...]:
        """Shape of the restart axis."""
        return (self.restarts,) if self.restarts else ()

    def block_shape(self, block: Block) -> tuple[int, ...]:
        """Restarts and plates of a block."""
        return (*self.lead, *(self.bound.size(p) for p in block.plates))


@dataclass(frozen=True, eq=False)
class Problem:
    """What ``prepare`` returns."""

    bound: Bound
    options: QEM
    settings: Settings
    weighting: Weighting
    max_iters: int

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks."""
        return self.weighting.blocks


def supports(graph: Graph) -> list[Reason]:
    """Why QEM cannot fit this graph: a latent without a proposal, or latents of crossed plates that meet."""
    if not graph.latents:
        return [
            Reason(
                "",
                "the model has no latent to infer.",
                "Leave a site out of the data, or use method='exact'.",
            )
        ]
    try:
        blocks = make_blocks(graph, QEM())
        sizes = {b.axis: 2 for b in blocks}
        _plan(_lower(graph, blocks, sizes, 0, dummy_plates(graph), torch.float64, "cpu", ()), None)
    except UnsupportedError as error:
        return [Reason("", str(error))]
    return []


def prepare(bound: Bound, options: QEM, settings: Settings) -> Problem:
    """Blocks, particle counts, lowered factors, plan.

    Raises:
        UnsupportedError: the plan does not fit the memory budget, or an option of ``infer`` is not supported.
    """
    if settings.minibatch is not None:
        raise UnsupportedError("qem does not support minibatch= in this version. Leave it out.")
    blocks = make_blocks(bound.graph, options)
    restarts = settings.restarts if settings.restarts > 1 else 0
    sizes = particle_counts(bound, blocks, options, settings)
    try:
        weighting = make_weighting(bound, blocks, sizes, restarts, settings.memory)
    except UnsupportedError:
        if not isinstance(options.groups, str):
            raise
        weighting = _grouped(bound, blocks, sizes, restarts, settings.memory)
    return Problem(bound, options, settings, weighting, settings.max_iters or 500)


def _grouped(
    bound: Bound,
    blocks: tuple[Block, ...],
    sizes: Mapping[str, int],
    restarts: int,
    memory: int | None,
) -> Weighting:
    """The same with blocks merged until the largest array fits the budget; no split of a plate was enough."""
    budget = memory or DEFAULT_MEMORY
    made = _lower_bound(bound, blocks, sizes, restarts)
    groups = suggest_groups(
        [t.axes for t in made.terms],
        made.layout,
        budget,
        itemsize=_itemsize(bound.dtype),
        plates_of=[t.plates for t in made.terms],
        apart=[b.axis for b in blocks if b.enumerated],
    )
    merged = merge_blocks(blocks, groups)
    counts = {b.axis: max(sizes[a.axis] for a in blocks if a.names[0] in b.names) for b in merged}
    return make_weighting(bound, merged, counts, restarts, memory)


def make_weighting(
    bound: Bound,
    blocks: tuple[Block, ...],
    sizes: Mapping[str, int],
    restarts: int,
    memory: int | None,
) -> Weighting:
    """Lower all factors for these particle counts and plan their contraction."""
    made = _lower_bound(bound, blocks, sizes, restarts)
    plan = _plan(made, memory or DEFAULT_MEMORY, _itemsize(bound.dtype))
    static = static_arrays(bound)
    lowered = made.whole.given({k: v for k, v in static.items() if k in made.whole.inputs})
    return Weighting(
        bound, blocks, dict(sizes), restarts, made.terms, lowered, made.singles, made.inputs, plan
    )


def particle_counts(
    bound: Bound, blocks: Sequence[Block], options: QEM, settings: Settings
) -> dict[str, int]:
    """Particles of every block: as asked, or as many as cost next to nothing."""
    asked = options.particles
    default = asked if isinstance(asked, int) else None
    named = asked if isinstance(asked, Mapping) else {}
    known = {n for b in blocks for n in b.names}
    for name in named:
        if name not in known:
            raise ModelError(
                f"QEM(particles=...) names '{name}', which is not a latent. Latents: {', '.join(sorted(known))}."
            )
    for count in (100, 60, 30, 20, 10):
        sizes = {}
        for b in blocks:
            own = [named[n] for n in b.names if n in named]
            sizes[b.axis] = values_of(b) if b.enumerated else own[0] if own else default or count
        if default is not None or largest(bound, blocks, sizes) <= _COMFORTABLE * (
            1 if count > 30 else 20
        ):
            return sizes
    return sizes


def final_counts(weighting: Weighting, options: QEM, memory: int | None) -> dict[str, int]:
    """Particles of the last weighting: up to 2000 a block while the largest array stays ample.

    Blocks in plates get more than those outside: their sums are estimates that multiply over the plate, and replicates
    add particles to the others.
    """
    blocks = weighting.blocks
    budget = min(_AMPLE, (memory or DEFAULT_MEMORY) // 64)
    for count in (options.final_particles,) if options.final_particles else _COUNTS:
        inner = count if options.final_particles else min(4 * count, _COUNTS[0])
        sizes = {
            b.axis: values_of(b) if b.enumerated else inner if b.plates else count for b in blocks
        }
        if options.final_particles or largest(weighting.bound, blocks, sizes) <= budget:
            return sizes
    return {b.axis: weighting.sizes[b.axis] for b in blocks}


def replicate_count(options: QEM, counts: Iterable[int]) -> int:
    """Replicates of the last weighting: at least 8, and up to 40 where each has few particles."""
    if options.replicates is not None:
        return options.replicates
    return min(max(8, math.ceil(_POINTS / min(counts, default=_POINTS))), 40)


def largest(bound: Bound, blocks: Sequence[Block], sizes: Mapping[str, int]) -> int:
    """Entries of the largest array that one evaluation makes."""
    made = _lower_bound(bound, tuple(blocks), sizes, 0)
    plan = _plan(made, None)
    size_of = {**sizes, **{p: bound.size(p) for p in bound.graph.plates}}
    factors = [
        torch.Size(size_of.get(a, size_of.get(a.rstrip("'"), 1)) for a in t.axes).numel()
        for t in made.terms
    ]
    return max([plan.largest[1], *factors])


def values_of(block: Block) -> int:
    """Number of values of an enumerated block."""
    count = block.members[0].variable.cardinality
    assert count is not None
    return count


def real_plates(bound: Bound) -> dict[str, PlateSpec]:
    """Plates of the data for the contraction engine."""
    graph = bound.graph
    return {
        p.name: PlateSpec(p.name, bound.size(p.name), {q: bound.maps[p.name, q] for q in p.parents})
        for p in graph.plates.values()
    }


def dummy_plates(graph: Graph) -> dict[str, PlateSpec]:
    """Plates of two elements, to ask whether a structure can be contracted at all."""
    return {
        p.name: PlateSpec(
            p.name, p.size or 2, {q: torch.zeros(p.size or 2, dtype=torch.long) for q in p.parents}
        )
        for p in graph.plates.values()
    }


def static_arrays(bound: Bound) -> dict[str, Tensor]:
    """Inputs that do not change from step to step: data, masks, memberships."""
    arrays = dict(bound.values)
    arrays |= {map_name(*key): m for key, m in bound.maps.items()}
    return arrays | {name + "@mask": mask for name, mask in bound.masks.items()}


def variable_axes(
    graph: Graph, blocks: Sequence[Block], restarts: int
) -> dict[str, tuple[str, ...]]:
    """Leading axes of every variable's array."""
    lead = (RESTART,) if restarts else ()
    axes = {v.name: v.plates for v in graph.role("given", "observed")}
    axes |= {v.name: (*lead, *v.plates) for v in graph.role("param")}
    for block in blocks:
        for member in block.members:
            if block.enumerated:
                axes[member.name] = (block.axis,)
            else:
                axes[member.name] = (*lead, *block.plates, block.axis, *member.collapsed)
    return axes


class _Made(NamedTuple):
    """All factors lowered, before they are planned."""

    terms: tuple[Term, ...]
    whole: Lowered
    singles: tuple[Lowered, ...]
    inputs: dict[str, tuple[str, ...]]
    layout: Layout


def _lower_bound(
    bound: Bound, blocks: tuple[Block, ...], sizes: Mapping[str, int], restarts: int
) -> _Made:
    masks = tuple(bound.masks)
    return _lower(
        bound.graph, blocks, sizes, restarts, real_plates(bound), bound.dtype, bound.device, masks
    )


def _lower(
    graph: Graph,
    blocks: tuple[Block, ...],
    sizes: Mapping[str, int],
    restarts: int,
    plates: Mapping[str, PlateSpec],
    dtype: torch.dtype,
    device: torch.device | str,
    masks: tuple[str, ...],
) -> _Made:
    lead = (RESTART,) if restarts else ()
    particle_axes = [b.axis for b in blocks]
    order = (*lead, *graph.plates, *particle_axes, *(a + "'" for a in particle_axes))
    axes = variable_axes(graph, blocks, restarts)

    def compiler() -> Compiler:
        return Compiler(graph, axes, order, dtype=dtype, device=device, masks=masks)

    terms, outputs, singles, whole = [], [], [], compiler()
    for factor in graph.densities:
        for later in (False, True) if factor.chain else (False,):
            outputs.append(_output(graph, whole, factor, later))
            terms.append(_term(graph, factor, outputs[-1], later))
            alone = compiler()
            singles.append(alone.finish([_output(graph, alone, factor, later)]))
    for b in blocks:
        if not b.enumerated:
            own = tuple(p for p in graph.plates if p in b.plates)
            terms.append(Term(b.axis, (*lead, *own, b.axis), b.plates))
    layout = Layout(
        plates=plates,
        sizes={**sizes, **({RESTART: restarts} if restarts else {})},
        owners={b.axis: b.plates for b in blocks},
        chains=tuple(Chain(b.chain, b.axis, b.axis + "'") for b in blocks if b.chain),
        batch=lead,
    )
    inputs = dict(axes) | {name + "@mask": axes[name] for name in masks}
    return _Made(tuple(terms), whole.finish(outputs), tuple(singles), inputs, layout)


def _plan(made: _Made, memory: int | None, itemsize: int = 8) -> Plan:
    scopes, plates = [t.axes for t in made.terms], [t.plates for t in made.terms]
    return make_plan(scopes, made.layout, memory=memory, itemsize=itemsize, plates_of=plates)


def _itemsize(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


def _output(graph: Graph, compiler: Compiler, factor: Factor, later: bool) -> Operand:
    if not later:
        return compiler.density(factor)
    assert factor.chain is not None
    out = compiler.transition(factor)
    # An observed chain has no particles to contract along: its transitions add up.
    return compiler.total(out, factor.chain[0]) if _is_observed(graph, factor) else out


def _is_observed(graph: Graph, factor: Factor) -> bool:
    return graph.variables[factor.name].role == "observed"


def _term(graph: Graph, factor: Factor, out: Operand, later: bool) -> Term:
    plates = factor.plates
    if factor.chain and (not later or _is_observed(graph, factor)):
        plates = tuple(p for p in plates if p != factor.chain[0])
    return Term(factor.name, out.axes, plates, later)


def evaluate(weighting: Weighting, arrays: Mapping[str, Tensor]) -> list[LogFactor]:
    """All log-densities of the model at these particles; proposals are not among them."""
    values = weighting.lowered({k: arrays[k] for k in weighting.lowered.inputs})
    return [LogFactor(t.axes, v) for t, v in zip(weighting.terms, values, strict=False)]


def evaluate_part(
    weighting: Weighting, arrays: Mapping[str, Tensor], i: int, rows: Mapping[str, Tensor] | None
) -> LogFactor:
    """Log-density ``i`` with the plates in ``rows`` narrowed to those elements; no larger array is made on the way."""
    everything = {**static_arrays(weighting.bound), **arrays}
    single = weighting.singles[i]
    inputs = {
        name: _narrowed(weighting, name, everything[name], rows or {}) for name in single.inputs
    }
    return LogFactor(weighting.terms[i].axes, single(inputs)[0])


def _narrowed(weighting: Weighting, name: str, array: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
    if "->" in name:
        child, ancestor = name.split("->")
        array = array.index_select(0, rows[child]) if child in rows else array
        if ancestor in rows:
            place = torch.full(
                (weighting.bound.size(ancestor),), -1, dtype=torch.long, device=array.device
            )
            place[rows[ancestor]] = torch.arange(len(rows[ancestor]), device=array.device)
            array = place[array]
        return array
    for at, axis in enumerate(weighting.inputs[name]):
        if axis in rows:
            array = array.index_select(at, rows[axis].to(array.device))
    return array


def describe(bound: Bound, options: QEM, settings: Settings) -> str:
    """One line for ``explain``: blocks, particles and the largest array of an iteration.

    Raises:
        UnsupportedError: the plan does not fit the memory budget.
    """
    weighting = prepare(bound, options, settings).weighting
    blocks, sizes, plan = weighting.blocks, weighting.sizes, weighting.plan
    text = ", ".join(
        f"{'+'.join(b.names)} ({'all' if b.enumerated else sizes[b.axis]})" for b in blocks
    )
    _, elements, size = plan.largest
    return f"particles of {text}; largest array {elements} entries, {size / 2**20:.1f} MiB"
