"""Lower factors and expressions to plain functions of tensors with named leading axes.

A factor is written for one plate element. Here it is put under plates, particles and restarts:
every variable comes as a tensor whose leading dimensions are the axes that the caller names,
followed by its event. Operands are aligned to *minimal* shapes (size one where an axis is absent).
:mod:`ppl.expressions` compiles the recorded calls, :mod:`ppl.densities` the laws. The result is a
list of steps; nothing of the graph is left at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from ppl.densities import law_density, without_edges
from ppl.errors import UnsupportedError
from ppl.expressions import compile_node
from ppl.graph import Factor, Graph, Law, Node, Ref, refs
from ppl.lowered import Lowered, Operand, Step, map_name
from ppl.passes import upstream

Rules = Literal["all", "vmap"]


class Compiler:
    """Turns nodes, laws and factors of a graph into steps; :meth:`finish` returns the function.

    Args:
        graph: the traced model.
        axes: leading axes of each variable's array, such as ``("k.level", "county")``.
        order: all axes, in the order that results have them (sample axes, then plates).
        dtype: of the run; constants follow it.
        device: of the run.
        masks: names of observed variables with missing entries; the mask is the input
            ``name@mask``.
        rules: ``"vmap"`` uses the fallback everywhere (a test compares the two).
        training: whether batch norms take the statistics of the elements at hand, over the axes
            of their plates, instead of those they are given.
        replaced: nodes that are computed by a function given at run time: id -> (name of the input
            that holds the function, ids of the nodes it is called with). The operands have the
            joint axes in front, size one where absent.
    """

    def __init__(
        self,
        graph: Graph,
        axes: Mapping[str, tuple[str, ...]],
        order: Sequence[str],
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        masks: Sequence[str] = (),
        rules: Rules = "all",
        training: bool = False,
        replaced: Mapping[int, tuple[str, tuple[int, ...]]] | None = None,
    ) -> None:
        self.graph, self.axes, self.rules, self.masks = graph, axes, rules, frozenset(masks)
        self.training, self.replaced = training, replaced or {}
        self.rank = {axis: i for i, axis in enumerate(order)}
        self.dtype, self.device = dtype, torch.device(device)
        self.inputs: dict[str, int] = {}
        self.steps: list[Step] = []
        self.base: list[Any] = []
        self.aligned: dict[Any, int] = {}
        # Chains of which one sample is a whole path, so that a state and the one before have the same axes.
        self.paths: frozenset[str] = frozenset()
        # Whether arrays with axes in another order are copied, so that what is made of them stands in memory in order.
        self.is_dense = False
        # The ordered plate whose first element is left out, while a transition is compiled.
        self.along: str | None = None
        # Inputs that stand in for variables while one factor is compiled, and the name of that factor.
        self.instead: Mapping[str, str] = {}
        self._within: str | None = None
        self._memo: dict[tuple[str | None, str | None, int], Operand] = {}

    # ---- factors -----------------------------------------------------------------------------

    def density(self, factor: Factor) -> Operand:
        """Log-density of a factor, event axes summed. Of a chain: that of its first element."""
        if factor.law is None:
            return self._in_plates(self._sum_event(self.operand(factor.value)), factor.plates)
        if factor.chain is not None:
            along = factor.chain[0]
            value = self.variable(factor.name, "first", along)
            plates = tuple(p for p in factor.plates if p != along)
            return law_density(self, factor.law, value, self._mask(factor), plates)
        mask = self._mask(factor) if factor.kind == "conditional" else None
        density = law_density(self, factor.law, self.operand(factor.value), mask, factor.plates)
        return self._in_plates(density, factor.plates)

    def transition(self, factor: Factor) -> Operand:
        """Log-density of every later element of a chain given the one before.

        Its particle axis for the previous element is the latent's axis with a prime; its chain
        plate is one shorter.
        """
        assert factor.chain is not None
        plate, law = factor.chain
        with self._later(plate):
            value = self.variable(factor.name, "next", plate)
            return law_density(self, law, value, self._mask(factor), factor.plates)

    def arguments(self, law: Law) -> list[Operand]:
        """The parameters of a law."""
        return [self.operand(a) for a in law.arguments]

    def later_arguments(self, law: Law, plate: str) -> list[Operand]:
        """The parameters of a transition law for every element of the plate but the first."""
        with self._later(plate):
            return self.arguments(law)

    def align(
        self, operand: Operand, axes: tuple[str, ...], event_ndim: int | None = None
    ) -> Operand:
        """The operand with exactly ``axes`` in front (size one where absent) and ``event_ndim``
        event axes; leading ones may be left to broadcasting.
        """
        event = operand.event_ndim if event_ndim is None else event_ndim
        return Operand(self.place(operand, axes, event), axes, event)

    def total(self, operand: Operand, axis: str) -> Operand:
        """The operand summed over an axis, when it has it."""
        if axis not in operand.axes:
            return operand
        at = operand.axes.index(axis)
        rest = tuple(a for a in operand.axes if a != axis)
        slot = self.emit(lambda t: t.sum(at), operand.slot)
        return operand._replace(slot=slot, axes=rest)

    def finish(self, outputs: Sequence[Operand]) -> Lowered:
        """The function that computes ``outputs``."""
        return Lowered(
            tuple(o.axes for o in outputs),
            tuple(o.slot for o in outputs),
            dict(self.inputs),
            tuple(self.steps),
            list(self.base),
        )

    def _in_plates(self, density: Operand, plates: tuple[str, ...]) -> Operand:
        # A free factor may vary by an ancestor of its plate only: it stands there once for every
        # element all the same.
        coarse = {a for p in plates for a in self.ancestors(p)} & set(density.axes)
        if not coarse:
            return density
        finer = {p for p in plates if coarse.intersection(self.ancestors(p))}
        axes = self.sorted_axes((set(density.axes) - coarse) | finer)
        return Operand(self.place(density, axes), axes, 0)

    def _sum_event(self, x: Operand) -> Operand:
        if x.event_ndim:
            dims = tuple(range(-x.event_ndim, 0))
            x = x._replace(slot=self.emit(lambda t: t.sum(dims), x.slot), event_ndim=0)
        return without_edges(self, x)

    def _mask(self, factor: Factor) -> Operand | None:
        if factor.name not in self.masks:
            return None
        if factor.chain is not None:
            raise UnsupportedError(
                f"'{factor.name}': missing entries in an observed Markov chain are not supported. "
                "Make the chain a latent and observe it through a law of its own."
            )
        event = len(self.graph.variables[factor.name].event_shape)
        return self._in_order(self.input(factor.name + "@mask"), self.axes[factor.name], event)

    # ---- operands ----------------------------------------------------------------------------

    def operand(self, item: Any) -> Operand:
        """Compile a reference, or place a constant."""
        if isinstance(item, Ref):
            key = (self.along, self._within, item.id)
            if key not in self._memo:
                self._memo[key] = self._node(self.graph.nodes[item.id])
            return self._memo[key]
        # Python numbers go to the run's dtype at once: by way of the default dtype they would lose digits.
        tensor = item if isinstance(item, Tensor) else torch.as_tensor(item, dtype=self.dtype)
        tensor = tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)
        return Operand(self.slot(tensor), (), tensor.ndim)

    def whole(self, item: Any, plate: str) -> Operand:
        """Compile with every element of ``plate``, also where a transition leaves one out."""
        if self.along != plate:
            return self.operand(item)
        with self._later(None):
            return self.operand(item)

    @contextmanager
    def renamed(
        self, factor: str, names: Mapping[str, str], axes: Mapping[str, tuple[str, ...]]
    ) -> Iterator[None]:
        """Compile a factor with other inputs in the place of some variables.

        Args:
            factor: its name; nothing is shared with other factors.
            names: variable -> input.
            axes: of the inputs.
        """
        self.axes = {**self.axes, **axes}
        before, self.instead, self._within = (self.instead, self._within), names, factor
        try:
            yield
        finally:
            self.instead, self._within = before

    @contextmanager
    def _later(self, plate: str | None) -> Iterator[None]:
        before, self.along = self.along, plate
        try:
            yield
        finally:
            self.along = before

    def slot(self, value: Any = None) -> int:
        """A new place, for a constant or a result."""
        self.base.append(value)
        return len(self.base) - 1

    def emit(self, run: Callable[..., Any], *inputs: int) -> int:
        """Append a step; returns the slot of its result."""
        out = self.slot()
        self.steps.append(Step(run, inputs, out))
        return out

    def input(self, name: str) -> int:
        """The slot of a named input."""
        if name not in self.inputs:
            self.inputs[name] = self.slot()
        return self.inputs[name]

    def _node(self, node: Node) -> Operand:
        if node.op == "variable":
            narrowed = self.along is not None and self.along in self.axes[node.name]
            return self.variable(node.name, "next" if narrowed else "", self.along or "")
        if node.op == "previous":
            if self.along is None:
                raise UnsupportedError(
                    f"{node.where}: a step of the chain '{node.name}' reduces, shifts or indexes "
                    "the element before along time. A step sees one element before; use it as is."
                )
            return self.variable(node.name, "previous", self.along)
        return compile_node(self, node)

    def variable(self, name: str, part: str, plate: str) -> Operand:
        """A variable's array, whole or the ``first``, ``next``, ``previous`` part along a plate."""
        array = self.instead.get(name, name)
        axes, slot = self.axes[array], self.input(array)
        event = len(self.graph.variables[name].event_shape)
        primed = part == "previous" and name not in self.paths
        if not part or plate not in axes:  # an enumerated chain has the same values everywhere
            axes = self._primed(axes) if primed else axes
            return self._in_order(slot, axes, event)
        if self.is_dense:  # parts of one copy
            _, axes, *_ = whole = self._in_order(slot, axes, event)
            slot = whole.slot
        at = axes.index(plate)
        if part == "first":
            slot = self.emit(lambda t: t.select(at, 0), slot)
            axes = tuple(a for a in axes if a != plate)
        else:
            start = 1 if part == "next" else 0
            slot = self.emit(lambda t: t.narrow(at, start, t.shape[at] - 1), slot)
        return self._in_order(slot, self._primed(axes) if primed else axes, event)

    def _primed(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        shared = {*self.graph.plates, "restart", "draw"}
        return tuple(a if a in shared else a + "'" for a in axes)

    def _in_order(self, slot: int, axes: tuple[str, ...], event: int) -> Operand:
        return self.ordered(Operand(slot, axes, event))

    def ordered(self, operand: Operand) -> Operand:
        """The operand with its axes in the order of results."""
        axes, wanted = operand.axes, self.sorted_axes(operand.axes)
        if wanted == axes:
            return operand
        order = [axes.index(a) for a in wanted]
        order += [len(axes) + i for i in range(operand.event_ndim)]
        key = ("ordered", operand)
        if key not in self.aligned:
            run = (
                (lambda t: t.permute(order).contiguous())
                if self.is_dense
                else (lambda t: t.permute(order))
            )
            self.aligned[key] = self.emit(run, operand.slot)
        return operand._replace(slot=self.aligned[key], axes=wanted)

    # ---- alignment ---------------------------------------------------------------------------

    def sorted_axes(self, axes: Sequence[str] | set[str]) -> tuple[str, ...]:
        """Axes in the order of results."""
        return tuple(sorted(axes, key=self.rank.__getitem__))

    def ancestors(self, axis: str) -> tuple[str, ...]:
        """Plates that a plate lies within; nothing for other axes."""
        return self.graph.ancestors(axis) if axis in self.graph.plates else ()

    def related(self, left: Sequence[str], right: Sequence[str]) -> bool:
        """Whether a plate on one side lies within one on the other."""
        return any(b in self.ancestors(a) or a in self.ancestors(b) for a in left for b in right)

    def joint_axes(
        self, operands: Sequence[Operand], plates: Sequence[str] = ()
    ) -> tuple[str, ...]:
        """Axes of a result: sample axes of all operands, and the finest plates they need.

        Args:
            operands: what is combined.
            plates: of the result; several ancestors of one of them meet in it, never in their grid.
        """
        union = {a for o in operands for a in o.axes}
        samples = {a for a in union if a not in self.graph.plates}
        finest = set(self.graph.maximal(frozenset(union - samples)))
        for plate in plates:
            covered = finest.intersection(self.graph.ancestors(plate))
            if plate not in finest and len(covered) > 1:
                finest = (finest - covered) | {plate}
        return self.sorted_axes(samples | finest)

    def place(self, operand: Operand, axes: tuple[str, ...], event_ndim: int | None = None) -> int:
        """Slot of the operand with exactly ``axes`` in front and padded event axes."""
        event = operand.event_ndim if event_ndim is None else event_ndim
        key = (operand.slot, operand.axes, axes, event)
        if key not in self.aligned:
            self.aligned[key] = self._place(operand, axes, event)
        return self.aligned[key]

    def _place(self, operand: Operand, axes: tuple[str, ...], event: int) -> int:
        slot, have = operand.slot, operand.axes
        for plate in axes:
            lost = [a for a in have if a not in axes and a in self.ancestors(plate)]
            if lost:
                slot, have = self._lift(slot, have, lost, plate)
        stray = [a for a in have if a not in axes]
        assert not stray, f"axes {stray} of {have} do not fit {axes}"
        order = [have.index(a) for a in axes if a in have]
        if order != sorted(order):
            full = order + [len(have) + i for i in range(operand.event_ndim)]
            slot = self.emit(lambda t: t.permute(full), slot)
        present = [slice(None) if a in have else None for a in axes]
        index = (*present, *(None,) * (event - operand.event_ndim))
        first = next((i for i, part in enumerate(index) if part is not None), len(index))
        index = index[first:]  # leading ones come from broadcasting
        return slot if None not in index else self.emit(lambda t: t[index], slot)

    def _lift(
        self, slot: int, have: tuple[str, ...], lost: list[str], plate: str
    ) -> tuple[int, tuple[str, ...]]:
        """Replace ancestor axes by the axis of ``plate``, through its membership."""
        maps = [self.membership(plate, a) for a in lost]
        gone = lost
        if plate in have:  # it varies over both: its own elements pick themselves
            gone = [*lost, plate]
            maps.append(self.emit(lambda m: torch.arange(len(m), device=m.device), maps[0]))
        dims = [have.index(a) for a in gone]
        rest = tuple(a for a in have if a not in gone)
        if len(gone) == 1:
            dim = dims[0]
            slot = self.emit(lambda t, m: t.index_select(dim, m), slot, *maps)
            return slot, tuple(plate if a == gone[0] else a for a in have)
        others = [i for i in range(len(have)) if i not in dims]

        def pick(t: Tensor, *members: Tensor) -> Tensor:
            tail = range(len(have), t.ndim)
            return t.permute(*dims, *others, *tail)[members]

        return self.emit(pick, slot, *maps), (plate, *rest)

    def membership(self, child: str, ancestor: str) -> int:
        """Slot of the position of each child element's ancestor."""
        slot = self.input(map_name(child, ancestor))
        return self.emit(lambda m: m[1:], slot) if child == self.along else slot

    def lifted(self, operand: Operand, axes: tuple[str, ...]) -> Operand:
        """Lifted and permuted to the order of ``axes``, absent axes left out."""
        have = tuple(
            a
            for a in axes
            if a in operand.axes
            or any(h in self.ancestors(a) and h not in axes for h in operand.axes)
        )
        return operand._replace(slot=self.place(operand, have), axes=have)

    def spelled_out(self, operand: Operand, axes: tuple[str, ...]) -> int:
        """Slot with every leading one in place, for calls that count dimensions from the front."""
        rank = len(axes) + operand.event_ndim
        return self.emit(
            lambda t: t[(None,) * (rank - t.ndim)] if t.ndim < rank else t,
            self.place(operand, axes),
        )


def variables_of(graph: Graph, factor: Factor) -> frozenset[str]:
    """Every variable that the density of a factor reads, covariates included."""
    laws = [law for law in (factor.law, factor.chain[1] if factor.chain else None) if law]
    roots = refs((factor.value, *(law.arguments for law in laws)))
    return frozenset().union(*(upstream(graph, i) for i in roots))


__all__ = ["Compiler", "Lowered", "Operand", "map_name", "variables_of"]
