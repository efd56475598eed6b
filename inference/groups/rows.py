"""Expressions of a factor with its plates flattened to one axis of rows.

Every factor element is a row. Walking an expression from its root, a context says for each plate which element is in
play in each row: its own at the root, ``i`` below ``x[i]``, its parent through ``within=``, its neighbour below a
shift, all of them below a reduction. At a leaf the context is an index array: data are picked there and then, once,
and a latent becomes a *slot*, an input ``[F, B, *event]``. What remains is a graph of the same torch calls over the
axis ``row`` and the axes that reductions remove, which :mod:`ppl.lower` compiles as it does any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.errors import UnsupportedError
from ppl.graph import Node, Ref, substitute
from ppl.inference.groups.places import Context, Place, aligned, both, is_identity, members
from ppl.inference.groups.recorder import ROW, Recorder
from ppl.passes import upstream


class Walk(Recorder):
    """Rewrites the expressions of one group.

    Args:
        bound: graph and data.
        site: for errors.
        places: the root context; every index ``[F]`` over the axis ``row``.
        rows: ``F``.
    """

    def __init__(self, bound: Bound, site: str, places: Mapping[str, Place], rows: int) -> None:
        super().__init__(bound, site, rows)
        self.root = Context(tuple(places.items()))
        self.valid: Tensor | None = None  # [F], False where a neighbour does not exist
        self._masks: dict[
            str, Place
        ] = {}  # axis -> which of its elements exist, as an index of 0/1
        self._memo: dict[tuple[int, int], Any] = {}
        self._contexts: list[Context] = []  # keeps them alive, so that their ids stay theirs
        self._latents = {v.name for v in self.graph.latents}

    def visit(self, item: Any, context: Context | None = None) -> Any:
        """The item, rewritten for rows."""
        context = self.root if context is None else context
        if not isinstance(item, Ref):
            return item
        key = (id(context), item.id)
        if key not in self._memo:
            self._contexts.append(context)
            self._memo[key] = self._node(self.graph.nodes[item.id], context)
        return self._memo[key]

    def _node(self, node: Node, context: Context) -> Ref:
        if node.op == "variable":
            return self._leaf(node.name, context)
        rule = getattr(self, f"_{node.op}", self._call)
        return rule(node, context)

    def _call(self, node: Node, context: Context) -> Ref:
        def visit(leaf: Any) -> Any:
            return self.visit(leaf, context)

        return self.add(
            node, args=substitute(node.args, visit), kwargs=substitute(node.kwargs, visit)
        )

    def _previous(self, node: Node, context: Context) -> Ref:
        chain = self.graph.factors[node.name].chain
        assert chain is not None
        here = context.find(chain[0], self.bound)
        if here is not self.root.find(chain[0], self.bound):
            raise UnsupportedError(
                f"{node.where}: a step of the chain '{node.name}' reduces, shifts or indexes the element before along "
                "time. A step sees one element before; use it as is."
            )
        return self._leaf(node.name, context.at(chain[0], Place(here.index - 1, here.axes)))

    def _pick(self, node: Node, context: Context) -> Ref:
        size, position = self.bound.size(node.name), node.args[1]
        index = torch.tensor(position % size, device=self.bound.device)
        return self.visit(node.args[0], context.at(node.name, Place(index, ())))

    def _shift(self, node: Node, context: Context) -> Ref:
        here, size = context.find(node.name, self.bound), self.bound.size(node.name)
        index = here.index + node.args[1]
        exists = (index >= 0) & (index < size)
        self._mask(exists, here.axes, node)
        place = Place(index.clamp(0, size - 1), here.axes)
        return self.visit(node.args[0], context.at(node.name, place))

    def _mask(self, exists: Tensor, axes: tuple[str, ...], node: Node) -> None:
        """Note which rows, or elements of the innermost free axis, are there."""
        free = [a for a in axes if a != ROW]
        if not free:
            exists = exists.expand(self.rows)
            self.valid = exists if self.valid is None else self.valid & exists
        elif len(free) == 1:
            self._masks[free[0]] = both(self._masks.get(free[0]), Place(exists, axes))
        else:
            raise UnsupportedError(
                f"'{self.site}': neighbours along plate '{node.name}' ({node.where}) are looked up inside two "
                "reductions at once. Shift outside of one of them."
            )

    def _gather(self, node: Node, context: Context) -> Ref:
        index = self._index(node, context)
        rank = len(self.graph.nodes[node.args[1].id].event_shape)
        axes = index.axes[len(index.axes) - rank :] if rank else ()
        inner = self.visit(node.args[0], context.at(node.name, index))
        return self._collected(node, inner, axes) if rank else inner

    def _index(self, node: Node, context: Context) -> Place:
        """The values of an index; entries of an index that is a vector become axes of their own."""
        item = node.args[1]
        unknown = [
            v
            for v in sorted(upstream(self.graph, item.id))
            if self.graph.variables[v].role in ("latent", "param")
        ]
        if unknown:
            raise UnsupportedError(
                f"'{self.site}': the index into plate '{node.name}' ({node.where}) depends on '{unknown[0]}', which is "
                'not known. Gaussian methods need known indices: use method="qem" or method="exact".'
            )
        value, axes = self.value(self.visit(item, context))
        own = [self.axis(size) for size in value.shape[len(axes) :]]
        return Place(value.long(), (*axes, *own))

    # ---- along plates ------------------------------------------------------------------------

    def _reduce(self, node: Node, context: Context) -> Ref:
        axis, inner = self._free(node, context)
        return self._reduced(node, self.visit(node.args[0], inner), axis, node.args[1])

    def _dot(self, node: Node, context: Context) -> Ref:
        axis, inner = self._free(node, context)
        parts = tuple(self.visit(a, inner) for a in node.args)
        if axis not in self._masks and all(self.rank(p) == 0 for p in parts):
            return self.add(node, args=parts, name=axis)
        product = replace(node, op="call", func=torch.mul, name="mul")
        return self._reduced(node, self.add(product, args=parts), axis, "sum")

    def _reduced(self, node: Node, x: Ref, axis: str, kind: str) -> Ref:
        """Reduce over an axis, elements that do not exist left out."""
        mask = self._masks.get(axis)
        if mask is None:
            return self.add(node, op="reduce", args=(x, kind), name=axis)
        there = self.data(mask.index, mask.axes, ())
        filler = torch.finfo(self.bound.dtype).min / 4 if kind == "logsumexp" else 0.0
        chosen = self.made(node, torch.where, "where", (there, x, filler), self.event(x))
        if kind != "mean":
            return self.add(node, op="reduce", args=(chosen, kind), name=axis)
        total = self.add(node, op="reduce", args=(chosen, "sum"), name=axis)
        count = mask.index.sum(mask.axes.index(axis)).clamp(min=1).to(self.bound.dtype)
        known = self.data(count, tuple(a for a in mask.axes if a != axis), ())
        return self.made(node, torch.div, "div", (total, known), self.event(total))

    def _collect(self, node: Node, context: Context) -> Ref:
        axes = []
        for plate in node.name.split(","):
            axes.append(self.axis(self.bound.size(plate)))
            index = torch.arange(self.bound.size(plate), device=self.bound.device)
            context = context.at(plate, Place(index, (axes[-1],)))
        return self._collected(node, self.visit(node.args[0], context), tuple(axes))

    def _collected(self, node: Node, x: Ref, axes: tuple[str, ...]) -> Ref:
        if any(a in self._masks for a in axes):
            raise UnsupportedError(
                f"{node.where}: an element of a value shifted along plate '{node.name}' is looked up, and elements at "
                "the edge have none. Look up first, or shift the index."
            )
        return self.add(node, op="collect", args=(x,), name=",".join(axes))

    def _free(self, node: Node, context: Context) -> tuple[str, Context]:
        """A new axis for the plate that a node reduces: all its elements, or the members of the row's group."""
        plate, device = node.name, self.bound.device
        groups = [p for p in self.graph.ancestors(plate) if p in node.plates]
        if not groups:
            axis = self.axis(self.bound.size(plate))
            index = torch.arange(self.bound.size(plate), device=device)
            return axis, context.at(plate, Place(index, (axis,)))
        if len(groups) > 1:
            raise UnsupportedError(
                f"'{self.site}': a reduction over plate '{plate}' ({node.where}) inside {' and '.join(groups)} is not "
                "supported. Open one plate, and reduce one after the other."
            )
        table, exists = members(self.bound.maps[plate, groups[0]], self.bound.size(groups[0]))
        group = context.find(groups[0], self.bound)
        axis = self.axis(table.shape[1])
        axes = (*group.axes, axis)
        if not bool(exists.all()):
            self._masks[axis] = Place(exists[group.index], axes)
        return axis, context.at(plate, Place(table[group.index], axes))

    # ---- leaves ------------------------------------------------------------------------------

    def _leaf(self, name: str, context: Context) -> Ref:
        variable = self.graph.variables[name]
        index, axes = self._position(variable.plates, context)
        if name in self._latents:
            return self.slot(variable, index, axes)
        if variable.role == "param":
            return self.param(variable, index, axes)
        value = self.bound.values[name]
        if index is None:
            return self.data(value, (), variable.event_shape)
        flat = value.reshape(-1, *variable.event_shape)
        if axes == (ROW,) and is_identity(index, len(flat)):
            return self.data(flat, axes, variable.event_shape)
        return self.data(flat[index], axes, variable.event_shape)

    def _position(
        self, plates: Sequence[str], context: Context
    ) -> tuple[Tensor | None, tuple[str, ...]]:
        """Index of an element over several plates, and the axes along which it varies."""
        if not plates:
            return None, ()
        places = [context.find(p, self.bound) for p in plates]
        axes = tuple(a for a in self.sizes if any(a in p.axes for p in places))
        index = torch.zeros((), dtype=torch.long, device=self.bound.device)
        for plate, place in zip(plates, places, strict=True):
            index = index * self.bound.size(plate) + aligned(place, axes)
        return index, axes


__all__ = ["ROW", "Walk"]
