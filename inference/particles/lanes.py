"""Joint draws, each in a lane of its own: the log-density of a model at whole assignments of its continuous latents.

What methods without massively parallel weights need: one axis ``draw`` for all latents, inside plates too. Discrete
latents with finitely many values are summed exactly in every lane, by the contraction engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.errors import UnsupportedError
from ppl.graph import Factor, Graph, Variable
from ppl.inference.contract import Chain, Layout, LogFactor, Plan, PlateSpec, make_plan
from ppl.inference.particles.blocks import is_enumerable
from ppl.inference.particles.weighting import (
    DEFAULT_MEMORY,
    dummy_plates,
    itemsize,
    real_plates,
    static_arrays,
)
from ppl.lower import Compiler, Lowered, Operand

LANE = "draw"


class Summed(NamedTuple):
    """A finite discrete latent that is summed over all its values."""

    variable: Variable
    axis: str
    values: int
    chain: str | None  # its ordered plate, when it is a Markov chain


@dataclass(frozen=True, eq=False)
class Lanes:
    """Log-factors of a model over a lane axis, and the plan that sums its discrete latents."""

    bound: Bound
    summed: tuple[Summed, ...]
    count: int
    terms: tuple[tuple[str, tuple[str, ...]], ...]  # name of the factor and its axes
    lowered: Lowered
    plan: Plan

    def factors(
        self,
        values: Mapping[str, Tensor],
        tempering: float = 1.0,
        tempered: frozenset[str] = frozenset(),
    ) -> list[LogFactor]:
        """Log-factors at an assignment; those of the latents ``tempered`` are scaled by ``tempering``.

        Args:
            values: continuous latents and params, ``[lanes, *plates, *event]`` each.
            tempering: of prior factors.
            tempered: names of the factors that it scales.
        """
        arrays = {**values, **self._tables()}
        outputs = self.lowered({name: arrays[name] for name in self.lowered.inputs})
        return [
            LogFactor(axes, tempering * out if name in tempered else out)
            for (name, axes), out in zip(self.terms, outputs, strict=True)
        ]

    def log_joint(
        self,
        values: Mapping[str, Tensor],
        tempering: float = 1.0,
        tempered: frozenset[str] = frozenset(),
    ) -> Tensor:
        """``log p(data, latents)`` of every lane ``[lanes]``, discrete latents summed out."""
        return self.plan.log_evidence(self.factors(values, tempering, tempered))

    def in_order(self, s: Summed, found: Tensor) -> Tensor:
        """``[lanes, *plates of the latent, ...]`` from an array of the plan, whose plates are in the order of the graph."""
        plates = [p for p in self.bound.graph.plates if p in s.variable.plates]
        order = [1 + plates.index(p) for p in s.variable.plates]
        return found.permute(0, *order, *range(1 + len(order), found.ndim))

    def _tables(self) -> dict[str, Tensor]:
        bound = self.bound
        return {
            s.variable.name: torch.arange(s.values, dtype=bound.dtype, device=bound.device)
            for s in self.summed
        }


def make_lanes(
    bound: Bound,
    count: int,
    enumerate_up_to: int,
    memory: int | None = None,
    *,
    to_draw: bool = False,
    only: frozenset[str] | None = None,
) -> Lanes:
    """Lower all factors over ``count`` lanes and plan the sum over discrete latents.

    Args:
        bound: the graph and its data.
        count: of lanes.
        enumerate_up_to: largest number of values of a latent that is summed.
        memory: budget in bytes.
        to_draw: lanes are a plate, so that ``plan.draw`` draws the discrete latents of each lane.
        only: names of the factors that count; None: all.

    Raises:
        UnsupportedError: the discrete latents cannot be summed within the memory budget.
    """
    summed = summed_latents(bound.graph, enumerate_up_to)
    if only is not None:
        summed = tuple(s for s in summed if s.variable.name in only)
    terms, plates, lowered = _lower(bound, summed, only)
    layout = _layout(summed, count, real_plates(bound), to_draw)
    plates = [(LANE, *over) for over in plates] if to_draw else plates
    plan = make_plan(
        [axes for _, axes in terms],
        layout,
        memory=memory or DEFAULT_MEMORY,
        itemsize=itemsize(bound.dtype),
        plates_of=plates,
    )
    if plan.split:
        raise UnsupportedError(
            f"{count} joint draws of plate '{plan.split}' do not fit into the memory budget. Take fewer draws or particles, "
            "or raise memory=."
        )
    static = static_arrays(bound)
    given = lowered.given({k: v for k, v in static.items() if k in lowered.inputs})
    return Lanes(bound, summed, count, tuple(terms), given, plan)


def check_lanes(graph: Graph, enumerate_up_to: int) -> None:
    """Whether the discrete latents of a graph can be summed at all.

    Raises:
        UnsupportedError: they cannot; the message says why.
    """
    summed = summed_latents(graph, enumerate_up_to)
    compiler = _compiler(graph, summed, torch.float64, "cpu", ())
    terms, plates = _outputs(graph, compiler, summed)[:2]
    layout = _layout(summed, 2, dummy_plates(graph))
    make_plan([axes for _, axes in terms], layout, plates_of=plates)


def summed_latents(graph: Graph, enumerate_up_to: int) -> tuple[Summed, ...]:
    """Discrete latents with at most ``enumerate_up_to`` values."""
    found = []
    for v in graph.latents:
        if is_enumerable(v, enumerate_up_to):
            chain = graph.factors[v.name].chain if v.name in graph.factors else None
            found.append(Summed(v, "k:" + v.name, v.cardinality or 0, chain[0] if chain else None))
    return tuple(found)


def _compiler(
    graph: Graph,
    summed: Sequence[Summed],
    dtype: torch.dtype,
    device: torch.device | str,
    masks: tuple[str, ...],
) -> Compiler:
    tables = [s.axis for s in summed]
    order = (LANE, *graph.plates, *tables, *(a + "'" for a in tables))
    axes = {v.name: v.plates for v in graph.role("given", "observed")}
    axes |= {v.name: (LANE, *v.plates) for v in (*graph.role("param"), *graph.latents)}
    axes |= {s.variable.name: (s.axis,) for s in summed}
    return Compiler(graph, axes, order, dtype=dtype, device=device, masks=masks)


def _lower(
    bound: Bound, summed: Sequence[Summed], only: frozenset[str] | None
) -> tuple[list[tuple[str, tuple[str, ...]]], list[tuple[str, ...]], Lowered]:
    compiler = _compiler(bound.graph, summed, bound.dtype, bound.device, tuple(bound.masks))
    terms, plates, outputs = _outputs(bound.graph, compiler, summed, only)
    return terms, plates, compiler.finish(outputs)


def _outputs(
    graph: Graph,
    compiler: Compiler,
    summed: Sequence[Summed],
    only: frozenset[str] | None = None,
) -> tuple[list[tuple[str, tuple[str, ...]]], list[tuple[str, ...]], list[Operand]]:
    """Name and axes of every factor, the plates it is repeated over, and its operand."""
    chains = {s.variable.name for s in summed if s.chain}
    terms, plates, outputs = [], [], []
    for factor in graph.densities:
        if only is not None and factor.name not in only:
            continue
        for later in (False, True) if factor.chain else (False,):
            out = compiler.transition(factor) if later else compiler.density(factor)
            over = factor.plates
            if factor.chain and not (later and factor.name in chains):
                along = factor.chain[0]
                over = tuple(p for p in over if p != along)
                out = _along(graph, compiler, factor, out, summed)
            terms.append((factor.name, out.axes))
            plates.append(over)
            outputs.append(out)
    return terms, plates, outputs


def _along(
    graph: Graph, compiler: Compiler, factor: Factor, out: Operand, summed: Sequence[Summed]
) -> Operand:
    """Transitions of a chain with known values, added up along it."""
    assert factor.chain is not None
    plate = factor.chain[0]
    for s in summed:
        inside = plate in s.variable.plates or any(
            plate in graph.ancestors(p) for p in s.variable.plates
        )
        if inside and s.axis in out.axes and plate in out.axes:
            raise UnsupportedError(
                f"'{factor.name}': its steps depend on the discrete latent '{s.variable.name}' of the same ordered plate. "
                "Use method='qem', which has particles for the chain."
            )
    return compiler.total(out, plate)


def _layout(
    summed: Sequence[Summed], count: int, plates: Mapping[str, PlateSpec], to_draw: bool = False
) -> Layout:
    lane = {LANE: PlateSpec(LANE, count)} if to_draw else {}
    sizes = {s.axis: s.values for s in summed}
    return Layout(
        plates={**lane, **plates},
        sizes=sizes if to_draw else {**sizes, LANE: count},
        owners={s.axis: (*lane, *s.variable.plates) for s in summed},
        chains=tuple(Chain(s.chain, s.axis, s.axis + "'") for s in summed if s.chain),
        batch=() if to_draw else (LANE,),
    )
