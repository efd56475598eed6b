"""Draw from a model forwards: prior predictive, posterior predictive, new groups, forecasts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.densities import is_foreign
from ppl.distributions import Distribution
from ppl.errors import UnsupportedError
from ppl.graph import Factor, Law, Variable, refs
from ppl.lower import Compiler, Operand, map_name
from ppl.lowered import joint_edges
from ppl.streams import Streams, isolated

DRAW = "draw"
# Told of each observed site its law, with draws in front of the parameters, and the shape of its draws.
Watch = Callable[[Variable, Distribution, tuple[int, ...]], None]


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
    watch: Watch | None = None,
) -> dict[str, Tensor]:
    """Draw every unknown site in the order of the program, ``n`` times at once.

    Args:
        bound: graph with sizes and covariates; observed arrays are not looked at.
        n: number of draws.
        streams: one generator a site.
        known: values to keep, whole or element by element; the rest is drawn given them.
        sites: which sites to return; all by default.
        watch: is told the laws of observed sites that are drawn anew.

    Returns:
        For each latent, observed and deterministic site a tensor ``[n, *plates, *event]``.

    Raises:
        UnsupportedError: a law has no sampler (``Flat``).
    """
    run = _Simulation(bound, n, streams, known or {}, watch)
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
    def __init__(
        self,
        bound: Bound,
        n: int,
        streams: Streams,
        known: Mapping[str, Known],
        watch: Watch | None,
    ) -> None:
        self.watch = watch
        self.bound, self.graph, self.n, self.streams, self.known = (
            bound,
            bound.graph,
            n,
            streams,
            known,
        )
        self.drawn: dict[str, Tensor] = {}
        self.order = (DRAW, *self.graph.plates)
        self.axes: dict[str, tuple[str, ...]] = {}
        self.arrays: dict[str, Tensor] = {map_name(*key): m for key, m in bound.maps.items()}
        for v in self.graph.variables.values():
            fixed = v.role == "given"
            if fixed:
                value = bound.values[v.name]
                dense = value if value.layout == torch.strided else value.to_dense()
                self.axes[v.name], self.arrays[v.name] = v.plates, dense
            elif v.role == "param":
                start = torch.as_tensor(v.initial, dtype=bound.dtype, device=bound.device)
                self.arrays[v.name] = start.expand(bound.shape(v))
                self.axes[v.name] = v.plates
            else:
                self.axes[v.name] = (DRAW, *v.plates)
        for name, entry in known.items():
            if name in self.graph.variables and self.graph.variables[name].role == "param":
                self.arrays[name], self.axes[name] = (
                    entry.values,
                    (DRAW, *self.graph.variables[name].plates),
                )

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
        arguments = compiler.arguments(law)
        leaves = self._evaluate(
            compiler, law, arguments, (DRAW, *variable.plates), variable, self.arrays
        )
        draw = _without_edges(
            _sample(variable, law, leaves, shape, self.streams), variable, arguments
        )
        if self.watch is not None and variable.role == "observed" and entry is None:
            if not is_foreign(law.family) and not joint_edges(arguments):
                ranks = _ranks(variable, law, arguments)
                full = [1 + len(variable.plates) + rank for rank in ranks]
                spelled = [x[(None,) * (n - x.ndim)] for x, n in zip(leaves, full, strict=True)]
                self.watch(variable, law.family.replace(spelled), shape)
        return _mixed(draw, entry, variable)

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
        row_shape = tuple(1 if i == at else s for i, s in enumerate(shape))
        done = _known_rows(entry, at)
        if entry is not None and done:
            path.narrow(at, 0, done).copy_(entry.values.narrow(at, 0, done))
        for t in range(max(done, 1), shape[at]):
            # A step that looks past its neighbour needs every array whole; of its result one row is used.
            whole = {**self.arrays, variable.name: path}
            arrays = whole if looks_far else self._rows(plate, t, whole)
            leaves = self._evaluate(compiler, transition, arguments, axes, variable, arrays)
            if looks_far:
                back = [len(axes) - at + rank for rank in _ranks(variable, transition, arguments)]
                leaves = [_row(leaf, b, t - 1) for leaf, b in zip(leaves, back, strict=True)]
            row = _sample(variable, transition, leaves, row_shape, self.streams).squeeze(at)
            path.select(at, t).copy_(_known_row(row, entry, at, t, variable))
        return path

    def _looks_far(self, law: Law, plate: str) -> bool:
        """Whether a step reads other elements of its plate than its own and the one before."""
        queue, seen = list(refs(law.arguments)), set()
        while queue:
            node = self.graph.nodes[queue.pop()]
            if node.op in (
                "gather",
                "reduce",
                "dot",
                "pick",
                "shift",
                "collect",
            ) and plate in node.name.split(","):
                return True
            seen.add(node.id)
            queue.extend(i for i in node.operands() if i not in seen)
        return False

    def _rows(self, plate: str, t: int, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All arrays with the chain's plate narrowed to elements t-1 and t."""
        arrays = {}
        for key, array in whole.items():
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
        return Compiler(
            self.graph, self.axes, self.order, dtype=self.bound.dtype, device=self.bound.device
        )

    def _evaluate(
        self,
        compiler: Compiler,
        law: Law,
        arguments: Sequence[Operand],
        axes: tuple[str, ...],
        variable: Variable,
        arrays: Mapping[str, Tensor],
    ) -> list[Tensor]:
        ranks = _ranks(variable, law, arguments)
        outputs = [compiler.align(a, axes, rank) for a, rank in zip(arguments, ranks, strict=True)]
        lowered = compiler.finish(outputs)
        leaves = lowered({k: arrays[k] for k in lowered.inputs})
        if not is_foreign(law.family):
            return leaves
        full = [
            len(axes) + rank for rank in ranks
        ]  # every axis in its place: elements are drawn one by one
        return [x[(None,) * (n - x.ndim)] for x, n in zip(leaves, full, strict=True)]


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
    if is_foreign(family):
        own = len(variable.event_shape) - family.event_dim
        draw = _sample_each(family, leaves, batch, len(batch) - own, generator)
    else:
        draw = family.replace(leaves).sample(batch, generator=generator)
    return draw.to(leaves[0].dtype if leaves else torch.float64).reshape(shape)


def _sample_each(
    family: Distribution,
    leaves: Sequence[Tensor],
    batch: tuple[int, ...],
    n: int,
    generator: torch.Generator,
) -> Tensor:
    # A foreign distribution knows only the shape of one element; it is drawn from element by element.
    lead, own = batch[:n], batch[n:]
    rows = [x.expand((*lead, *x.shape[n:])).reshape((-1, *x.shape[n:])) for x in leaves]
    draws = []
    for i in range(torch.Size(lead).numel()):
        draws.append(family.replace([r[i] for r in rows]).sample(own, generator=generator))
    return torch.stack(draws)


def _ranks(variable: Variable, law: Law, arguments: Sequence[Operand]) -> list[int]:
    """Number of event axes that each parameter is padded to."""
    if is_foreign(law.family):
        return [a.event_ndim for a in arguments]
    batch = len(variable.event_shape) - law.family.event_dim
    leaves = law.family.leaves()
    return [max(batch + x.event_dim, a.event_ndim) for x, a in zip(leaves, arguments, strict=True)]


def _row(leaf: Tensor, back: int, t: int) -> Tensor:
    """Row ``t`` of the axis that is ``back`` from the end, when the leaf has it."""
    if leaf.ndim < back or leaf.shape[-back] == 1:
        return leaf
    return leaf.narrow(-back, t, 1)


def _without_edges(draw: Tensor, variable: Variable, arguments: Sequence[Operand]) -> Tensor:
    """NaN where a neighbour is missing: the model says nothing of those elements."""
    for plate, start, end in joint_edges(arguments):
        if variable.role == "latent" or plate not in variable.plates:
            raise UnsupportedError(
                f"'{variable.name}' has no law where its neighbour along plate '{plate}' is missing, so it cannot be drawn. "
                f"Use Markov for a chain, or state the law of the edge."
            )
        at = 1 + variable.plates.index(plate)
        place = torch.arange(draw.shape[at], device=draw.device)
        inside = (place >= start) & (place < draw.shape[at] - end)
        draw = torch.where(inside.reshape(-1, *(1,) * (draw.ndim - at - 1)), draw, torch.nan)
    return draw


def _mixed(draw: Tensor, entry: Known | None, variable: Variable) -> Tensor:
    if entry is None or entry.mask is None:
        return draw
    mask = entry.mask.reshape((*entry.mask.shape, *(1,) * len(variable.event_shape)))
    return torch.where(mask, entry.values, draw)


def _known_rows(entry: Known | None, at: int) -> int:
    """How many leading elements along an axis of the values are known in every other element."""
    if entry is None or entry.mask is None:
        return 0
    rows = entry.mask.movedim(at - 1, 0)
    whole = rows.reshape(len(rows), -1).all(1)
    return int(whole.long().cumprod(0).sum())


def _known_row(row: Tensor, entry: Known | None, at: int, t: int, variable: Variable) -> Tensor:
    if entry is None or entry.mask is None:
        return row
    part = Known(entry.values.select(at, t), entry.mask.select(at - 1, t))
    return _mixed(row, part, variable)
