"""A graph over the axis of rows, as it is written down: slots, data, params and the calls between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.errors import Where
from ppl.graph import Graph, Node, Plate, Ref, Variable, refs
from ppl.inference.groups.expressions import Expression, Read, View
from ppl.inference.groups.records import Slot
from ppl.lower import Compiler, Lowered
from ppl.lowered import Operand
from ppl.passes import Degree, degree

ROW = "row"
_NOWHERE = Where("", 0)


class Recorder:
    """Slots, data and nodes of one group; :meth:`compile` makes functions of them.

    Args:
        bound: graph and data.
        site: for errors.
        rows: ``F``.
    """

    def __init__(self, bound: Bound, site: str, rows: int) -> None:
        self.bound, self.graph, self.site, self.rows = bound, bound.graph, site, rows
        self.slots: list[Slot] = []
        self.sizes: dict[str, int] = {ROW: rows}  # of the axes
        self._nodes: list[Node] = []
        self._variables: dict[str, Variable] = {}
        self._axes: dict[str, tuple[str, ...]] = {}
        self._arrays: dict[str, Tensor] = {}
        self._views: dict[str, View] = {}
        self._reads: dict[str, Read] = {}

    def compile(self, items: Sequence[Any], ranks: Sequence[int]) -> Expression:
        """The function that computes rewritten items, each with so many event axes."""
        lowered = self._lowered(items, ranks)
        views = tuple(v for n, v in self._views.items() if n in lowered.inputs)
        reads = tuple(r for n, r in self._reads.items() if n in lowered.inputs)
        return Expression(lowered, views, reads, self.rows)

    def rank(self, item: Any) -> int:
        """Number of event axes of a rewritten item."""
        if isinstance(item, Ref):
            return len(self._nodes[item.id].event_shape)
        return item.ndim if isinstance(item, Tensor) else 0

    def param_of(self, item: Any) -> str:
        """Name of the param that a rewritten item is, whole or at an index; empty for anything else."""
        node = self._nodes[item.id] if isinstance(item, Ref) else None
        if node is None or node.op != "variable" or node.name not in self._reads:
            return ""
        return self._reads[node.name].param

    def event(self, item: Any) -> tuple[int, ...]:
        """Event shape of a rewritten item."""
        if isinstance(item, Ref):
            return tuple(self._nodes[item.id].event_shape)
        return tuple(item.shape) if isinstance(item, Tensor) else ()

    def node(self, item: Ref) -> Node:
        """The node of a rewritten item."""
        return self._nodes[item.id]

    def view_of(self, item: Any) -> View | None:
        """The slot that a rewritten item is; None for anything else."""
        node = self._nodes[item.id] if isinstance(item, Ref) else None
        return self._views.get(node.name) if node is not None and node.op == "variable" else None

    def reads_slots(self, item: Any) -> bool:
        """Whether a rewritten item depends on a latent."""
        queue, seen = list(refs(item)), set()
        while queue:
            node = self._nodes[queue.pop()]
            if self.view_of(Ref(node.id)) is not None:
                return True
            if node.id not in seen:
                seen.add(node.id)
                queue.extend(node.operands())
        return False

    def is_affine(self, *items: Any) -> bool:
        """Whether rewritten items are affine in the latents."""
        graph, names = self._rows_graph(), frozenset(self._views)
        return all(degree(graph, item, names) <= Degree.AFFINE for item in items)

    def _lowered(self, items: Sequence[Any], ranks: Sequence[int]) -> Lowered:
        compiler = self._compiler()
        made = []
        for item, rank in zip(items, ranks, strict=True):
            operand = compiler.operand(item)
            slot = compiler.place(operand, (ROW,), max(rank, operand.event_ndim))
            full = max(rank, operand.event_ndim) + 1
            padded = compiler.emit(lambda t, n=full: t[(None,) * (n - t.ndim)], slot)
            made.append(Operand(padded, (ROW,), full - 1))
        lowered = compiler.finish(made)
        data = {k: v for k, v in self._arrays.items() if k in lowered.inputs}
        return lowered.given(data).pruned()

    def _compiler(self) -> Compiler:
        graph, bound = self._rows_graph(), self.bound
        order = tuple(graph.plates)
        return Compiler(graph, self._axes, order, dtype=bound.dtype, device=bound.device)

    def _rows_graph(self) -> Graph:
        plates = {axis: Plate(axis, size) for axis, size in self.sizes.items()}
        return Graph(self.site, plates, self._variables, {}, tuple(self._nodes))

    def value(self, item: Any) -> tuple[Tensor, tuple[str, ...]]:
        """The tensor of a rewritten item that reads data alone, and its axes."""
        compiler = self._compiler()
        operand = compiler.operand(item)
        operand = operand._replace(slot=compiler.spelled_out(operand, operand.axes))
        lowered = compiler.finish([operand])
        value = lowered.given({k: self._arrays[k] for k in lowered.inputs})({})[0]
        shape = [self.sizes[a] for a in operand.axes] + list(value.shape[len(operand.axes) :])
        return value.expand(shape), operand.axes

    # ---- leaves ------------------------------------------------------------------------------

    def slot(self, variable: Variable, index: Tensor | None, axes: tuple[str, ...]) -> Ref:
        """A latent at an index over its elements: an input of the group."""
        free = tuple(a for a in axes if a != ROW)
        sizes = tuple(self.sizes[a] for a in free)
        if index is None:
            index = torch.zeros((), dtype=torch.long, device=self.bound.device)
        if ROW not in axes:
            index = index.unsqueeze(0)
        flat = index.expand(self.rows, *sizes).reshape(self.rows, math.prod(sizes))
        number = self._numbered(variable.name, flat)
        name = f"slot{number}@{','.join(free)}"
        if name not in self._variables:
            self._views[name] = View(name, number, sizes)
            self._declare(name, (ROW, *free), variable.event_shape)
        return self._variable_node(name)

    def entry(self, number: int, event: tuple[int, ...]) -> Ref:
        """An input that is no latent: entry ``number`` of what the compiled function is called with."""
        name = f"entry{len(self._variables)}"
        self._views[name] = View(name, number, ())
        self._declare(name, (ROW,), event)
        return self._variable_node(name)

    def _numbered(self, family: str, index: Tensor) -> int:
        for number, slot in enumerate(self.slots):
            if slot.family == family and slot.index.shape == index.shape:
                if bool((slot.index == index).all()):
                    return number
        self.slots.append(Slot(family, index))
        return len(self.slots) - 1

    def param(self, variable: Variable, index: Tensor | None, axes: tuple[str, ...]) -> Ref:
        """A param at an index over its elements, or whole."""
        name = f"param{len(self._reads)}"
        self._reads[name] = Read(name, variable.name, index, len(variable.event_shape))
        self._declare(name, axes, variable.event_shape)
        return self._variable_node(name)

    def data(self, value: Tensor, axes: tuple[str, ...], event: tuple[int, ...]) -> Ref:
        """A tensor with these axes in front."""
        name = f"data{len(self._arrays)}"
        self._arrays[name] = value
        self._declare(name, axes, event)
        return self._variable_node(name)

    # ---- nodes -------------------------------------------------------------------------------

    def axis(self, size: int) -> str:
        """A new axis that a reduction removes again."""
        axis = f"axis{len(self.sizes)}"
        self.sizes[axis] = size
        return axis

    def _declare(self, name: str, axes: tuple[str, ...], event: tuple[int, ...]) -> None:
        self._variables[name] = Variable(name, "given", axes, tuple(event))
        self._axes[name] = axes

    def _variable_node(self, name: str) -> Ref:
        event = self._variables[name].event_shape
        node = Node(len(self._nodes), "variable", None, (), {}, (), event, _NOWHERE, name)
        self._nodes.append(node)
        return Ref(node.id)

    def add(self, node: Node, **changes: Any) -> Ref:
        """Append a node like another one."""
        made = replace(node, id=len(self._nodes), plates=(), **changes)
        self._nodes.append(made)
        return Ref(made.id)

    def made(
        self, node: Node, func: Any, name: str, args: tuple[Any, ...], event: tuple[int, ...]
    ) -> Ref:
        """Append a torch call in the place of a node."""
        return self.add(
            node, op="call", func=func, name=name, args=args, kwargs={}, event_shape=event
        )


__all__ = ["ROW", "Recorder"]
