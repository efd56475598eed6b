"""Log-factors of a model lowered over particle axes, and the plan of their contraction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.graph import Factor, Graph
from ppl.inference.contract import (
    Chain,
    Layout,
    LogFactor,
    Plan,
    PlateSpec,
    make_plan,
)
from ppl.inference.particles.blocks import RESTART, Block
from ppl.lower import Compiler, Lowered, Operand, map_name

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


def make_weighting(
    bound: Bound,
    blocks: tuple[Block, ...],
    sizes: Mapping[str, int],
    restarts: int,
    memory: int | None,
) -> Weighting:
    """Lower all factors for these particle counts and plan their contraction."""
    made = lower_bound(bound, blocks, sizes, restarts)
    plan = plan_of(made, memory or DEFAULT_MEMORY, itemsize(bound.dtype))
    static = static_arrays(bound)
    lowered = made.whole.given({k: v for k, v in static.items() if k in made.whole.inputs})
    return Weighting(
        bound, blocks, dict(sizes), restarts, made.terms, lowered, made.singles, made.inputs, plan
    )


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


def values_of(block: Block) -> int:
    """Number of values of an enumerated block."""
    count = block.members[0].variable.cardinality
    assert count is not None
    return count


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


def lower_bound(
    bound: Bound, blocks: tuple[Block, ...], sizes: Mapping[str, int], restarts: int
) -> _Made:
    masks = tuple(bound.masks)
    return lower(
        bound.graph, blocks, sizes, restarts, real_plates(bound), bound.dtype, bound.device, masks
    )


def lower(
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


def plan_of(made: _Made, memory: int | None, itemsize: int = 8) -> Plan:
    scopes, plates = [t.axes for t in made.terms], [t.plates for t in made.terms]
    return make_plan(scopes, made.layout, memory=memory, itemsize=itemsize, plates_of=plates)


def itemsize(dtype: torch.dtype) -> int:
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
