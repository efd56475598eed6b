"""Draw from a model forwards: prior predictive, posterior predictive, new groups, forecasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.distributions import Distribution
from ppl.errors import UnsupportedError
from ppl.graph import Factor, Law, Variable, refs
from ppl.lower import Compiler, Operand, map_name
from ppl.streams import Streams, isolated

DRAW = "draw"


class Known(NamedTuple):
    """Values that are not drawn anew: ``values[n, *plates, *event]`` where ``mask[*plates]`` is True."""

    values: Tensor
    mask: Tensor | None = None


def simulate(
    bound: Bound,
    n: int,
    streams: Streams,
    *,
    known: Mapping[str, Known] | None = None,
    sites: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Draw every unknown site in the order of the program, ``n`` times at once.

    Args:
        bound: graph with sizes and covariates; observed arrays are not looked at.
        n: number of draws.
        streams: one generator a site.
        known: values to keep, whole or element by element; the rest is drawn given them.
        sites: which sites to return; all by default.

    Returns:
        For each latent, observed and deterministic site a tensor ``[n, *plates, *event]``.

    Raises:
        UnsupportedError: a law has no sampler (``Flat``).
    """
    run = _Simulation(bound, n, streams, known or {})
    needed = None if sites is None else _needed(bound, sites)
    with isolated(streams.seed):
        for factor in bound.graph.factors.values():
            if needed is None or factor.name in needed:
                run.visit(factor)
    names = sites if sites is not None else list(run.drawn)
    return {name: run.drawn[name] for name in names}


def _needed(bound: Bound, sites: Sequence[str]) -> set[str]:
    needed = set(sites)
    for factor in reversed(list(bound.graph.factors.values())):
        if factor.name in needed and factor.kind != "potential":
            needed.update(factor.scope)
    return needed


class _Simulation:
    def __init__(self, bound: Bound, n: int, streams: Streams, known: Mapping[str, Known]) -> None:
        self.bound, self.graph, self.n, self.streams, self.known = bound, bound.graph, n, streams, known
        self.drawn: dict[str, Tensor] = {}
        self.order = (DRAW, *self.graph.plates)
        self.axes: dict[str, tuple[str, ...]] = {}
        self.arrays: dict[str, Tensor] = {map_name(*key): m for key, m in bound.maps.items()}
        for v in self.graph.variables.values():
            fixed = v.role == "given"
            if fixed:
                self.axes[v.name], self.arrays[v.name] = v.plates, bound.values[v.name]
            elif v.role == "param":
                start = torch.as_tensor(v.initial, dtype=bound.dtype, device=bound.device)
                self.arrays[v.name] = start.expand(bound.shape(v))
                self.axes[v.name] = v.plates
            else:
                self.axes[v.name] = (DRAW, *v.plates)
        for name, entry in known.items():
            if name in self.graph.variables and self.graph.variables[name].role == "param":
                self.arrays[name], self.axes[name] = entry.values, (DRAW, *self.graph.variables[name].plates)

    def visit(self, factor: Factor) -> None:
        if factor.kind == "potential":
            return
        if factor.kind == "deterministic":
            self.drawn[factor.name] = self._deterministic(factor)
            return
        variable = self.graph.variables[factor.name]
        entry = self.known.get(variable.name)
        if entry is not None and entry.mask is None:
            draw = entry.values
        elif factor.chain is not None:
            draw = self._chain(factor, variable, entry)
        else:
            assert factor.law is not None
            draw = self._law(variable, factor.law, entry)
        self.drawn[variable.name] = self.arrays[variable.name] = draw

    def _law(self, variable: Variable, law: Law, entry: Known | None) -> Tensor:
        shape = (self.n, *self.bound.shape(variable))
        compiler = self._compiler()
        leaves = self._evaluate(compiler, law, compiler.arguments(law), (DRAW, *variable.plates), variable, self.arrays)
        return _mixed(_sample(variable, law, leaves, shape, self.streams), entry, variable)

    def _chain(self, factor: Factor, variable: Variable, entry: Known | None) -> Tensor:
        assert factor.chain is not None and factor.law is not None
        plate, transition = factor.chain
        axes = (DRAW, *variable.plates)
        at = axes.index(plate)
        shape = (self.n, *self.bound.shape(variable))
        path = torch.zeros(shape, dtype=self.bound.dtype, device=self.bound.device)
        first_axes = tuple(a for a in axes if a != plate)
        first_shape = tuple(s for i, s in enumerate(shape) if i != at)
        compiler = self._compiler()
        leaves = self._evaluate(
            compiler, factor.law, compiler.arguments(factor.law), first_axes, variable, self.arrays
        )
        first = _sample(variable, factor.law, leaves, first_shape, self.streams)
        path.select(at, 0).copy_(_known_row(first, entry, at, 0, variable))
        compiler = self._compiler()
        arguments = compiler.later_arguments(transition, plate)
        looks_far = self._looks_far(transition, plate)
        for t in range(1, shape[at]):
            if looks_far:  # the whole path so far, and of the result the row of this element
                arrays: Mapping[str, Tensor] = {**self.arrays, variable.name: path}
            else:
                arrays = self._rows(plate, t, variable.name, path)
            leaves = self._evaluate(compiler, transition, arguments, axes, variable, arrays)
            if looks_far:
                leaves = [_row_of(leaf, at - len(axes) - leaf_dims, t - 1) for leaf, leaf_dims in zip(leaves, ranks, strict=True)]
            row_shape = tuple(1 if i == at else s for i, s in enumerate(shape))
            row = _sample(variable, transition, leaves, row_shape, self.streams).squeeze(at)
            path.select(at, t).copy_(_known_row(row, entry, at, t, variable))
        return path

    def _looks_far(self, law: Law, plate: str) -> bool:
        """Whether a step reads other elements of its plate than its own and the one before."""
        queue, seen = list(refs(law.arguments)), set()
        while queue:
            node = self.graph.nodes[queue.pop()]
            if node.op in ("gather", "reduce", "dot", "pick", "shift", "collect") and plate in node.name.split(","):
                return True
            seen.add(node.id)
            queue.extend(i for i in node.operands() if i not in seen)
        return False

    def _rows(self, plate: str, t: int, name: str, path: Tensor) -> dict[str, Tensor]:
        """All arrays with the chain's plate narrowed to elements t-1 and t."""
        arrays = {}
        for key, array in (*self.arrays.items(), (name, path)):
            axes = self.axes.get(key, ())
            if plate in axes:
                array = array.narrow(axes.index(plate), t - 1, 2)
            elif key.startswith(plate + "->"):
                array = array[t - 1 : t + 1]
            arrays[key] = array
        return arrays

    def _deterministic(self, factor: Factor) -> Tensor:
        compiler = self._compiler()
        out = compiler.operand(factor.value)
        axes = (DRAW, *factor.plates)
        lowered = compiler.finish([compiler.align(out, axes)])
        value = lowered({k: self.arrays[k] for k in lowered.inputs})[0]
        event = value.shape[value.ndim - out.event_ndim :]
        return value.expand(self.n, *(self.bound.size(p) for p in factor.plates), *event)

    def _compiler(self) -> Compiler:
        return Compiler(self.graph, self.axes, self.order, dtype=self.bound.dtype, device=self.bound.device)

    def _evaluate(
        self,
        compiler: Compiler,
        law: Law,
        arguments: Sequence[Operand],
        axes: tuple[str, ...],
        variable: Variable,
        arrays: Mapping[str, Tensor],
    ) -> list[Tensor]:
        batch = len(variable.event_shape) - law.family.event_dim
        outputs = []
        for leaf, a in zip(law.family.leaves(), arguments, strict=True):
            rank = max(batch + leaf.event_dim, a.event_ndim)
            outputs.append(compiler.align(a, axes, rank))
        lowered = compiler.finish(outputs)
        return lowered({k: arrays[k] for k in lowered.inputs})


def _sample(
    variable: Variable, law: Law, leaves: Sequence[Tensor], shape: tuple[int, ...], streams: Streams
) -> Tensor:
    family: Distribution = law.family
    if getattr(family, "is_improper", False):
        raise UnsupportedError(
            f"'{variable.name}' has the law {type(family).__name__}, which is improper and cannot be drawn from. "
            "Give it a proper prior to simulate from the model."
        )
    batch = shape[: len(shape) - family.event_dim]
    generator = streams.of(variable.name)
    if getattr(family, "needs_vmap", False):
        return _sample_each(family, leaves, batch, shape, len(variable.event_shape) - family.event_dim)
    return family.replace(leaves).sample(batch, generator=generator).to(leaves[0].dtype if leaves else None).reshape(shape)


def _sample_each(
    family: Any, leaves: Sequence[Tensor], batch: tuple[int, ...], shape: tuple[int, ...], own: int
) -> Tensor:
    # A foreign distribution knows only the shape of one element; it is drawn from element by element.
    lead = batch[: len(batch) - own]
    flat = [leaf.expand((*lead, *leaf.shape[len(lead) :])) if leaf.ndim >= len(lead) else leaf for leaf in leaves]
    rows = [f.reshape(-1, *f.shape[len(lead) :]) for f in flat]
    number = rows[0].shape[0] if rows else int(torch.Size(lead).numel())
    draws = [family.replace([r[i] for r in rows]).sample() for i in range(number)]
    return torch.stack(draws).reshape(shape)


def _mixed(draw: Tensor, entry: Known | None, variable: Variable) -> Tensor:
    if entry is None or entry.mask is None:
        return draw
    mask = entry.mask.reshape((*entry.mask.shape, *(1,) * len(variable.event_shape)))
    return torch.where(mask, entry.values, draw)


def _known_row(row: Tensor, entry: Known | None, at: int, t: int, variable: Variable) -> Tensor:
    if entry is None or entry.mask is None:
        return row
    part = Known(entry.values.select(at, t), entry.mask.select(at - 1, t))
    return _mixed(row, part, variable)
