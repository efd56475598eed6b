"""Sum over finite discrete latents by the contraction engine: plates, chains and all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.graph import Factor
from ppl.inference.contract import Chain, Layout, LogFactor, PlateSpec, make_plan
from ppl.inference.exact.arrays import CASES, order, particle, static_arrays, variable_axes
from ppl.inference.exact.split import Split
from ppl.lower import Compiler, Lowered, variables_of


@dataclass(frozen=True, eq=False)
class Term:
    """A factor with summed latents: axes of its tensor and the plates it is repeated over."""

    axes: tuple[str, ...]
    plates: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Contraction:
    """All factors with summed latents, lowered, and the plans made so far."""

    parts: Split
    plates: Mapping[str, PlateSpec]
    terms: tuple[Term, ...]
    lowered: Lowered
    memory: int | None
    plans: dict[tuple[int, bool], Any]

    def log_evidence(self, arrays: Mapping[str, Tensor], cases: int) -> Tensor:
        """Log of the sum over all configurations, for every case ``[g]``."""
        return self._plan(cases, True).log_evidence(self._factors(arrays))

    def tables(self, arrays: Mapping[str, Tensor], cases: int) -> dict[str, Tensor]:
        """Probabilities of every value: ``[g, *plates, V]`` by latent."""
        _, marginals = self._plan(cases, True).marginals(self._factors(arrays))
        return {
            v.name: self._ordered(marginals[particle(v.name)], v.plates, 1)
            for v in self.parts.summed
        }

    def draw(
        self, arrays: Mapping[str, Tensor], cases: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """One joint draw in every case: long ``[g, *plates]`` by latent."""
        # Cases become a plate: independent elements, each of which draws its own configuration.
        indices = self._plan(cases, False).draw(self._factors(arrays), 1, generator)
        return {
            v.name: self._ordered(indices[particle(v.name)][0], v.plates, 1)
            for v in self.parts.summed
        }

    @property
    def flops(self) -> float:
        """Work of one case, about."""
        return float(self._plan(1, True).flops)

    @property
    def elements(self) -> int:
        """Entries of the largest array of one case."""
        return int(self._plan(1, True).largest[1])

    def _ordered(self, tensor: Tensor, plates: tuple[str, ...], lead: int) -> Tensor:
        """Engine's order of plates (that of declaration) to the order of the variable."""
        declared = [p for p in self.plates if p in plates]
        order = [lead + declared.index(p) for p in plates]
        rest = range(lead + len(plates), tensor.ndim)
        return tensor.permute(*range(lead), *order, *rest)

    def _factors(self, arrays: Mapping[str, Tensor]) -> list[LogFactor]:
        values = self.lowered(arrays)
        return [
            LogFactor(t.axes, torch.where(x.isnan() | (x == torch.inf), -torch.inf, x))
            for t, x in zip(self.terms, values, strict=True)
        ]

    def _plan(self, cases: int, as_batch: bool) -> Any:
        key = (cases, as_batch)
        if key not in self.plans:
            self.plans[key] = _make_plan(self, cases, as_batch)
        return self.plans[key]


def make_contraction(bound: Bound, parts: Split, memory: int | None) -> Contraction:
    """Lower the factors with summed latents."""
    graph = bound.graph
    plates = {
        p.name: PlateSpec(p.name, bound.size(p.name), {q: bound.maps[p.name, q] for q in p.parents})
        for p in graph.plates.values()
    }
    compiler = Compiler(
        graph,
        variable_axes(graph, parts),
        order(graph, parts),
        dtype=bound.dtype,
        device=bound.device,
        masks=tuple(bound.masks),
    )
    terms, lowered = _lowered(parts, compiler)
    static = dict(static_arrays(bound)) | {
        v.name: torch.arange(v.cardinality or 1, dtype=bound.dtype, device=bound.device)
        for v in parts.summed
    }
    lowered = lowered.given({k: v for k, v in static.items() if k in lowered.inputs})
    return Contraction(parts, plates, terms, lowered, memory, {})


def check_contractible(parts: Split) -> None:
    """Plan the contraction with plates of two elements.

    Raises:
        UnsupportedError: no order of elimination is polynomial.
    """
    graph = parts.graph
    plates = {
        p.name: PlateSpec(p.name, 2, {q: torch.zeros(2, dtype=torch.long) for q in p.parents})
        for p in graph.plates.values()
    }
    terms, lowered = _lowered(
        parts, Compiler(graph, variable_axes(graph, parts), order(graph, parts))
    )
    _make_plan(Contraction(parts, plates, terms, lowered, None, {}), 1, True)


def summed_factors(parts: Split) -> list[Factor]:
    """The factors that touch a summed latent."""
    names = {v.name for v in parts.summed}
    return [f for f in parts.graph.densities if names & variables_of(parts.graph, f)]


def _lowered(parts: Split, compiler: Compiler) -> tuple[tuple[Term, ...], Lowered]:
    terms, outputs = [], []
    for factor in summed_factors(parts):
        for later in (False, True) if factor.chain else (False,):
            out = compiler.transition(factor) if later else compiler.density(factor)
            plates = factor.plates
            if factor.chain and not (later and _is_summed(parts, factor.name)):
                # The first element lies outside the plate; transitions of an observed chain add up.
                out = compiler.total(out, factor.chain[0]) if later else out
                plates = tuple(p for p in plates if p != factor.chain[0])
            outputs.append(out)
            terms.append(Term(out.axes, plates))
    return tuple(terms), compiler.finish(outputs)


def _is_summed(parts: Split, name: str) -> bool:
    return any(v.name == name for v in parts.summed)


def _make_plan(c: Contraction, cases: int, as_batch: bool) -> Any:
    graph = c.parts.graph
    chains = []
    for v in c.parts.summed:
        factor = graph.factors.get(v.name)
        if factor is not None and factor.chain is not None:
            chains.append(Chain(factor.chain[0], particle(v.name), particle(v.name) + "'"))
    around = () if as_batch else (CASES,)
    plates = dict(c.plates) if as_batch else {CASES: PlateSpec(CASES, cases), **c.plates}
    layout = Layout(
        plates=plates,
        sizes={
            **({CASES: cases} if as_batch else {}),
            **{particle(v.name): v.cardinality or 1 for v in c.parts.summed},
        },
        owners={particle(v.name): (*around, *v.plates) for v in c.parts.summed},
        chains=tuple(chains),
        batch=(CASES,) if as_batch else (),
    )
    return make_plan(
        [t.axes for t in c.terms],
        layout,
        memory=c.memory,
        plates_of=[(*around, *t.plates) for t in c.terms],
    )
