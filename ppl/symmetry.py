"""Exchangeable components: which elements of a plate, or of an event axis, a model with its data cannot tell apart.

Where they can be renumbered at will, the posterior has one copy for each numbering ("label switching"). Candidates come
from the graph: what is read by a discrete latent, summed over, or mixed. Each is then tried: the log-density of every
factor has to stay the same, to rounding, when the components of all its latents are renumbered together. Two
renumberings, the swap of the first two and the shift by one, generate all others.

Source: [Stephens2000] for the problem; the test of the density itself is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor
from torch.distributions import constraints

from ppl.binding import Bound
from ppl.distributions import Distribution, Mixture, MixtureSameFamily
from ppl.distributions.arguments import shape_of
from ppl.graph import Factor, Graph, Node, Ref, Variable
from ppl.lower import Compiler
from ppl.lowered import Lowered, map_name
from ppl.passes import upstream

_ACROSS = ("gather", "reduce", "dot", "collect", "pick", "shift")  # nodes that read across a plate
_MOST = 64  # components: more are elements of a population
_AXES = 6  # event axes of one length that are tried in all combinations


@dataclass(frozen=True)
class Exchange:
    """Components whose numbers carry no meaning, and where they stand in the latents.

    >>> print(Exchange("component", 3, {"centre": (0,)}, ("z",)))
    plate 'component' (3 elements): centre, z
    """

    plate: str | None  # None where the components are event axes only
    size: int
    axes: Mapping[str, tuple[int, ...]]  # latent -> axes of [*plates, *event] that count components
    labels: tuple[str, ...]  # discrete latents whose values are components

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of all latents that are renumbered."""
        return (*self.axes, *self.labels)

    @property
    def mixes(self) -> bool:
        """Whether these are components of a mixture, so that the copies lie apart."""
        return bool(self.labels) or self.plate is None

    @property
    def copies(self) -> int:
        """Number of equal copies of the posterior."""
        return math.factorial(self.size)

    def renumbered(self, draws: Mapping[str, Tensor], order: Tensor) -> dict[str, Tensor]:
        """Draws whose component ``j`` is what was component ``order[j]``.

        Args:
            draws: ``[n, *plates, *event]`` of each site; others pass as they are.
            order: ``[n, size]``, a permutation a draw.
        """
        out = dict(draws)
        for name, axes in self.axes.items():
            for axis in axes:
                out[name] = _along(out[name], order, axis)
        back = order.argsort(-1)
        for name in self.labels:
            value = draws[name]
            flat = value.reshape(len(value), -1).long()
            out[name] = back.gather(1, flat).reshape(value.shape).to(value.dtype)
        return out

    def __str__(self) -> str:
        where = "event axis" if self.plate is None else f"plate '{self.plate}'"
        return f"{where} ({self.size} elements): {', '.join(self.sites)}"


def may_exchange(bound: Bound) -> bool:
    """Whether there is anything to try: by the graph alone, without a density."""
    return any(tries for tries in _candidates(bound))


def exchanges(bound: Bound, point: Mapping[str, Tensor]) -> tuple[Exchange, ...]:
    """The exchangeable components of a model with its data.

    Args:
        bound: the graph and its data.
        point: of every latent and param a value ``[*plates, *event]`` at which the density is finite.
    """
    candidates = [tries for tries in _candidates(bound) if tries]
    if not candidates:
        return ()
    density = Densities(bound, point)
    found: list[Exchange] = []
    for tries in candidates:
        taken = {(n, a) for e in found for n, axes in e.axes.items() for a in axes}
        fresh = [t for t in tries if not taken & {(n, a) for n, x in t.axes.items() for a in x}]
        found += [t for t in fresh if density.is_unmoved(t)][:1]
    return tuple(found)


# ---- candidates -------------------------------------------------------------------------------------------------


def _candidates(bound: Bound) -> Iterator[list[Exchange]]:
    """Of each plate, label or mixture what might be renumbered with it, the most first."""
    graph = bound.graph
    for plate in graph.plates:
        if _is_free(graph, plate):
            yield _with_plate(graph, plate, bound.size(plate))
    for factor in graph.densities:
        for size, around in _mixed(graph, factor):
            axes = _event_axes(graph, around, size)
            labels = tuple(n for n in around if _is_label(graph.variables[n], None, size))
            yield [Exchange(None, size, a, labels) for a in _choices(axes) if a]


def _is_free(graph: Graph, plate: str) -> bool:
    """Whether nothing known hangs on the elements of a plate, and something is read across them."""
    own = graph.plates[plate]
    inner = any(plate in graph.ancestors(p) for p in graph.plates)
    if own.ordered or own.parents or inner or not 1 < (own.size or 0) <= _MOST:
        return False
    inside = [v for v in graph.variables.values() if plate in v.plates]
    reads = [n for n in graph.nodes if n.op in _ACROSS and plate in n.name.split(",")]
    alike = bool(reads) and not any(n.op in ("pick", "shift") for n in reads)
    return alike and all(v.role == "latent" for v in inside + _pointers(graph, reads))


def _pointers(graph: Graph, reads: Sequence[Node]) -> list[Variable]:
    """The variables that say which element is read."""
    nodes = [n.args[1].id for n in reads if n.op == "gather" and isinstance(n.args[1], Ref)]
    return [graph.variables[name] for i in nodes for name in upstream(graph, i)]


def _with_plate(graph: Graph, plate: str, size: int) -> list[Exchange]:
    inside = {v.name: (v.plates.index(plate),) for v in graph.latents if plate in v.plates}
    labels = tuple(v.name for v in graph.latents if _is_label(v, plate, size))
    around = {n for f in graph.densities if set(f.scope) & {*inside, *labels} for n in f.scope}
    found = []
    for chosen in _choices(_event_axes(graph, around, size)):
        names = dict.fromkeys((*inside, *chosen))
        axes = {n: (*inside.get(n, ()), *chosen.get(n, ())) for n in names}
        found.append(Exchange(plate, size, axes, labels))
    return [e for e in found if e.axes]


def _is_label(v: Variable, plate: str | None, size: int) -> bool:
    is_number = v.is_discrete and not v.event_shape and v.cardinality == size
    return v.role == "latent" and is_number and v.index_of == plate


def _mixed(graph: Graph, factor: Factor) -> Iterator[tuple[int, set[str]]]:
    """Number of components and the latents around, where a factor mixes along an event axis."""
    laws = [] if factor.law is None else [factor.law.family]
    laws += [x for law in laws for x in vars(law).values() if isinstance(x, Distribution)]
    given = {n for n in factor.scope if n != factor.name}
    for law in laws:
        if isinstance(law, Mixture) and isinstance(law.components, Distribution):
            yield shape_of(law.weights)[-1], given
        elif isinstance(law, MixtureSameFamily):
            yield len(law.mixture_distribution.enumerate_support()), given
    for name in factor.scope:
        v = graph.variables[name]
        if factor.name == name and v.cardinality and _is_label(v, None, v.cardinality):
            around = {n for f in graph.densities if name in f.scope for n in f.scope}
            yield v.cardinality, around


def _event_axes(graph: Graph, around: set[str], size: int) -> list[tuple[str, int]]:
    """Event axes of this length of the continuous latents around, and of those that their laws read."""
    names = set(around)
    while True:
        above = {p for n in names if n in graph.factors for p in graph.parents(n)}
        if above <= names:
            break
        names |= above
    latents = [v for v in graph.latents if v.name in names and not v.is_discrete]
    found = []
    for v in latents:
        found += [(v.name, len(v.plates) + i) for i, n in enumerate(v.event_shape) if n == size]
    return found[:_AXES]


def _choices(axes: Sequence[tuple[str, int]]) -> Iterator[dict[str, tuple[int, ...]]]:
    """All subsets, the largest first."""
    for count in range(len(axes), -1, -1):
        for chosen in combinations(axes, count):
            names = dict.fromkeys(n for n, _ in chosen)
            yield {n: tuple(a for m, a in chosen if m == n) for n in names}


# ---- the test ---------------------------------------------------------------------------------------------------


class Densities:
    """The log-density of each factor at a point, and whether a renumbering leaves all of them as they are.

    In the order of ``graph.densities``, with those of transitions behind them.
    """

    def __init__(self, bound: Bound, point: Mapping[str, Tensor]) -> None:
        self.bound = bound
        self.point = {v.name: point[v.name] for v in bound.graph.role("latent", "param")}
        self.lowered = _lowered(bound)
        self.here = self._values(self.point)

    def is_unmoved(self, exchange: Exchange) -> bool:
        """Whether a renumbering changes nothing."""
        return all(self._holds(exchange, order) for order in _generators(exchange.size))

    def _holds(self, exchange: Exchange, order: Tensor) -> bool:
        moved = {n: self.point[n].unsqueeze(0) for n in exchange.sites}
        moved = exchange.renumbered(moved, order.unsqueeze(0).to(self.bound.device))
        there = {n: t.squeeze(0) for n, t in moved.items()}
        if not all(_is_inside(self.bound.graph.variables[n], t) for n, t in there.items()):
            return False
        return bool(self.unmoved(there).all())

    def unmoved(self, there: Mapping[str, Tensor]) -> Tensor:
        """Which factors stay as they are, to rounding, where some variables have other values."""
        values = self._values({**self.point, **there})
        slack = 1e3 * torch.finfo(self.bound.dtype).eps
        near = (values - self.here).abs() <= slack * (1 + self.here.abs())
        return near & values.isfinite()

    def _values(self, point: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            outputs = self.lowered({n: point[n] for n in self.lowered.inputs})
        return torch.stack([o.sum() for o in outputs])


def _lowered(bound: Bound) -> Lowered:
    graph = bound.graph
    axes = {v.name: v.plates for v in graph.variables.values()}
    compiler = Compiler(
        graph,
        axes,
        (*graph.plates,),
        dtype=bound.dtype,
        device=bound.device,
        masks=tuple(bound.masks),
    )
    outputs = [compiler.density(f) for f in graph.densities]
    outputs += [compiler.transition(f) for f in graph.densities if f.chain]
    known = dict(bound.values) | {map_name(*key): m for key, m in bound.maps.items()}
    known |= {name + "@mask": mask for name, mask in bound.masks.items()}
    return compiler.finish(outputs).given(known)


def _generators(size: int) -> list[Tensor]:
    order = torch.arange(size)
    swap = order.clone()
    swap[:2] = order[:2].flip(0)
    return [swap, order.roll(1)] if size > 2 else [swap]


def _is_inside(v: Variable, value: Tensor) -> bool:
    if v.is_discrete or v.support is None or v.support is constraints.dependent:
        return True
    return bool(v.support.check(value).all())


def _along(value: Tensor, order: Tensor, axis: int) -> Tensor:
    """``[n, ...]`` with axis ``1 + axis`` in another order for each draw."""
    shape = [1] * value.ndim
    shape[0], shape[1 + axis] = order.shape
    return torch.take_along_dim(value, order.reshape(shape).to(value.device), 1 + axis)
