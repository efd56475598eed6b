"""Log-factors of a model lowered over particle axes, and the plan of their contraction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ppl.binding import Bound, take
from ppl.graph import Factor, Graph
from ppl.inference.contract import (
    Chain,
    Layout,
    LogFactor,
    Plan,
    PlateSpec,
    make_plan,
)
from ppl.inference.particles import nested
from ppl.inference.particles.blocks import RESTART, Block, check_order
from ppl.inference.particles.forms import Sites
from ppl.inference.particles.laws import LoweredLaw, lower_laws
from ppl.inference.particles.memory import (
    default_memory,
    factor_arrays,
    plan_within,
    point_bytes,
)
from ppl.inference.particles.processes import Share
from ppl.inference.particles.statistics import Piece, Setting, pieces
from ppl.lower import Compiler, Lowered, Operand, map_name, variables_of

DEFAULT_MEMORY = 4 * 2**30
_FEW = 5  # particles
_LARGE = 1 << 17  # entries
ChainSums = Literal["auto", "scan", "tree"]


@dataclass(frozen=True, eq=False)
class Term:
    """One log-factor of the contraction: where it comes from and the plates it is repeated over."""

    name: str
    axes: tuple[str, ...]
    plates: tuple[str, ...]
    later: bool = False  # the transition of a chain
    inside: tuple[str, ...] = ()  # axes of a larger array that its evaluation makes


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
    laws: Mapping[str, LoweredLaw]  # of latents that are proposed from their own law
    added: Mapping[str, Tensor]  # inputs made from the data: distinct rows and their numbers
    share: Share | None = (
        None  # the elements that this process holds of a plate spread over several
    )

    @cached_property
    def draw_order(self) -> tuple[Block, ...]:
        """The blocks, each behind those that its proposal reads."""
        return check_order(self.bound.graph, self.blocks)

    @cached_property
    def plate_orders(self) -> dict[str, list[int] | None]:
        """By particle axis: dimensions of a block's ``[*restart, *plates, K]`` in the order of the graph; None where they are."""
        orders: dict[str, list[int] | None] = {}
        for b in self.blocks:
            start = len(self.lead)
            plates = [start + b.plates.index(p) for p in self.bound.graph.plates if p in b.plates]
            order = [*range(start), *plates, start + len(plates)]
            orders[b.axis] = None if order == sorted(order) else order
        return orders

    @cached_property
    def lies_within(self) -> list[bool]:
        """By term: whether it is summed within plates, as what is said of a chain's first state is, too."""
        inner = {b.axis for b in self.blocks if b.plates}
        return [bool(t.plates) or not inner.isdisjoint(t.axes) for t in self.terms]

    @cached_property
    def takes_no_gradients(self) -> bool:
        """Whether drawing, weighing and averaging are plain operations, so that torch need not prepare for derivatives."""
        sampled = [b for b in self.blocks if not b.enumerated]
        plain = all(b.form is None and not any(m.family for m in b.members) for b in sampled)
        return plain and self.plan.has_rules

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
    chains: ChainSums = "auto",
    share: Share | None = None,
    apart: str | None = None,
) -> Weighting:
    """Lower all factors for these particle counts and plan their contraction.

    ``share`` says which elements of a plate the bound holds where other processes hold the rest; nothing is summed over
    the plate ``apart`` beforehand, because the bound has only some of its elements.
    """
    made = lower_bound(bound, blocks, sizes, restarts, share.plate if share else apart)
    if chains == "auto" and bound.device.type == "cuda":
        chains = "tree"
    arrays = factor_arrays(bound, blocks, made.terms, sizes)
    plan = plan_within(
        lambda budget: plan_of(made, budget, itemsize(bound.dtype), chains, share),
        arrays,
        point_bytes(bound, blocks, sizes),
        memory or default_memory(bound.device),
    )
    static = static_arrays(bound) | made.added
    lowered = made.whole.pruned().given({k: v for k, v in static.items() if k in made.whole.inputs})
    laws = lower_laws(bound, blocks, variable_axes(bound.graph, blocks, restarts), sizes, restarts)
    return Weighting(
        bound,
        blocks,
        dict(sizes),
        restarts,
        made.terms,
        lowered,
        made.singles,
        made.inputs,
        plan,
        laws,
        made.added,
        share,
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
                own = nested.axes_of(blocks, block)
                axes[member.name] = (*lead, *block.plates, *own, *member.collapsed)
    return axes


class _Made(NamedTuple):
    """All factors lowered, before they are planned."""

    terms: tuple[Term, ...]
    whole: Lowered
    singles: tuple[Lowered, ...]
    inputs: dict[str, tuple[str, ...]]
    layout: Layout
    added: dict[str, Tensor]  # inputs made from the data


# What is known of the rows of a data set, however often its factors are lowered.
_KNOWN_ROWS: WeakKeyDictionary[Bound, dict[Any, Any]] = WeakKeyDictionary()


def lower_bound(
    bound: Bound,
    blocks: tuple[Block, ...],
    sizes: Mapping[str, int],
    restarts: int,
    apart: str | None = None,
) -> _Made:
    masks = tuple(bound.masks)
    return lower(
        bound.graph,
        blocks,
        sizes,
        restarts,
        real_plates(bound),
        bound.dtype,
        bound.device,
        masks,
        static_arrays(bound),
        _KNOWN_ROWS.setdefault(bound, {}),
        apart,
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
    values: Mapping[str, Tensor] | None = None,
    known: dict[Any, Any] | None = None,
    apart: str | None = None,
) -> _Made:
    """Lower all factors; ``values`` are inputs that never change, ``known`` keeps what was found out about them."""
    lead = (RESTART,) if restarts else ()
    axes = variable_axes(graph, blocks, restarts)
    # Densities of these are relative to their own law, which is no factor then.
    own = {n for b in blocks if isinstance(b.form, Sites) for n in b.names}
    first = not own and _particles_first(graph, axes, sizes, plates)
    order = (*lead, *_order(graph, blocks, first))

    def compiler() -> Compiler:
        made = Compiler(graph, axes, order, dtype=dtype, device=device, masks=masks)
        made.paths = frozenset(m.name for b in blocks for m in b.members if m.path)
        made.is_dense = first
        return made

    owners = {b.axis: b.plates for b in blocks}
    all_sizes = {**sizes, **{n: p.size for n, p in plates.items()}, RESTART: max(restarts, 1)}
    setting = Setting(
        owners, all_sizes, values, {} if known is None else known, apart=apart, coins=bool(own)
    )
    terms, outputs, singles, whole = [], [], [], compiler()
    for factor in (f for f in graph.densities if f.name not in own):
        for later in (False, True) if factor.chain else (False,):
            made = _pieces(graph, whole, factor, later, setting)
            outputs += [p.out for p in made]
            terms += [Term(factor.name, p.out.axes, p.plates, later, p.inside) for p in made]
            for i in range(len(made)):
                alone = compiler()
                piece = _pieces(graph, alone, factor, later, setting)[i]
                singles.append(alone.finish([piece.out]).pruned())
    for b in blocks:
        if not b.enumerated:
            at = tuple(p for p in graph.plates if p in b.plates)
            terms.append(Term(b.axis, (*lead, *at, *nested.axes_of(blocks, b)), b.plates))
    layout = Layout(
        plates=plates,
        sizes={**sizes, **({RESTART: restarts} if restarts else {})},
        owners=owners,
        chains=tuple(Chain(b.chain, b.axis, b.axis + "'") for b in blocks if b.chain),
        batch=lead,
        particles_first=first,
    )
    inputs = dict(axes) | {name + "@mask": axes[name] for name in masks}
    inputs |= {name: at for name, (at, _) in setting.arrays.items()}
    added = {name: array for name, (_, array) in setting.arrays.items()}
    lowered = whole.finish(outputs)
    return _Made(tuple(terms), lowered, tuple(singles), inputs, layout, added)


def _order(graph: Graph, blocks: Sequence[Block], first: bool) -> tuple[str, ...]:
    """Plates and particle axes in the order that they stand in memory, see :func:`_particles_first`.

    Where particles go first, chains have time and states in front of all, as a scan of few states reads them.
    """
    # Nested particles stand behind those of their parents, as they are drawn.
    axes = [b.axis for b in sorted(blocks, key=lambda b: b.is_nested)]
    before = [a + "'" for a in axes]
    if not first:
        return (*graph.plates, *axes, *before)
    along = [p for p in graph.plates if any(b.chain == p for b in blocks)]
    states = [b.axis for b in blocks if b.chain]
    front = [*along, *(a + "'" for a in states), *states]
    return tuple(dict.fromkeys([*front, *axes, *before, *graph.plates]))


def _particles_first(
    graph: Graph,
    axes: Mapping[str, tuple[str, ...]],
    sizes: Mapping[str, int],
    plates: Mapping[str, PlateSpec],
) -> bool:
    """Whether particle axes go in front of plates: arrays whose last axis has two or three entries are slow to work on."""
    for factor in graph.densities:
        joint = {a for n in variables_of(graph, factor) for a in axes.get(n, ())}
        counts = [sizes[a] for a in joint if a in sizes]
        entries = math.prod(counts) * math.prod(plates[a].size for a in joint if a in plates)
        if counts and min(counts) < _FEW and entries > _LARGE:
            return True
    return False


def plan_of(
    made: _Made,
    memory: int | None,
    itemsize: int = 8,
    chains: ChainSums = "auto",
    share: Share | None = None,
) -> Plan:
    scopes, plates = [t.axes for t in made.terms], [t.plates for t in made.terms]
    return make_plan(
        scopes,
        made.layout,
        memory=memory,
        itemsize=itemsize,
        plates_of=plates,
        chain=chains,
        along=share and (share.plate, share.ends),
        reduce=share and share.reduce,
    )


def itemsize(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


def _output(graph: Graph, compiler: Compiler, factor: Factor, later: bool) -> Operand:
    if not later:
        return compiler.density(factor)
    assert factor.chain is not None
    out = compiler.transition(factor)
    # Without particles of its states a chain has nothing to contract along: its transitions add up.
    return compiler.total(out, factor.chain[0]) if _adds_up(graph, compiler, factor) else out


def _adds_up(graph: Graph, compiler: Compiler, factor: Factor) -> bool:
    """Whether a chain is observed, or its particles are whole paths."""
    return graph.variables[factor.name].role == "observed" or factor.name in compiler.paths


def _pieces(
    graph: Graph, compiler: Compiler, factor: Factor, later: bool, setting: Setting
) -> list[Piece]:
    """The factor as it stands, or what statistics make of it."""
    made = pieces(compiler, factor, later, setting)
    if made is not None:
        return made
    plates = factor.plates
    if factor.chain and (not later or _adds_up(graph, compiler, factor)):
        plates = tuple(p for p in plates if p != factor.chain[0])
    return [Piece(_output(graph, compiler, factor, later), plates)]


def evaluate(weighting: Weighting, arrays: Mapping[str, Tensor]) -> list[LogFactor]:
    """All log-densities of the model at these particles; proposals are not among them."""
    values = weighting.lowered({k: arrays[k] for k in weighting.lowered.inputs})
    return [LogFactor(t.axes, v) for t, v in zip(weighting.terms, values, strict=False)]


def evaluate_part(
    weighting: Weighting,
    arrays: Mapping[str, Tensor],
    i: int,
    rows: Mapping[str, Tensor] | None,
    ready: frozenset[str] = frozenset(),
) -> LogFactor:
    """Log-density ``i`` with the plates in ``rows`` narrowed to those elements; no larger array is made on the way.

    The arrays named in ``ready`` are narrow already.
    """
    everything = {**static_arrays(weighting.bound), **weighting.added, **arrays}
    single = weighting.singles[i]
    inputs = {
        name: everything[name]
        if name in ready
        else _narrowed(weighting, name, everything[name], rows or {})
        for name in single.inputs
    }
    return LogFactor(weighting.terms[i].axes, single(inputs)[0])


def _narrowed(weighting: Weighting, name: str, array: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
    if "->" not in name:
        return take(array, weighting.inputs[name], rows)
    child, ancestor = name.split("->")
    array = take(array, (child,), rows)
    if ancestor in rows:
        array = torch.searchsorted(rows[ancestor].to(array.device), array)
    return array
