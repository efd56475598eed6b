"""Oracle of lowering: a graph's expressions evaluated for one element at a time, with plain loops."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ppl.graph import Factor, Graph, Law, Node, Ref, substitute

Point = Mapping[str, int]  # axis -> position


class Beyond(Exception):
    """A shifted neighbour does not exist."""


@dataclass
class Loop:
    """Evaluates nodes and densities of ``graph`` at one point of the axes.

    Args:
        graph: a graph with sizes.
        arrays: arrays of the variables, ``[*axes, *event]``; memberships under ``child->ancestor``.
        axes: leading axes of each variable's array.
        sizes: of every axis.
    """

    graph: Graph
    arrays: Mapping[str, Tensor]
    axes: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, int]
    before: dict[str, int] = field(default_factory=dict)  # position of primed axes

    def table(self, item: Any, axes: tuple[str, ...]) -> Tensor:
        """The expression at every point of ``axes``; NaN where a neighbour is missing."""
        rows: list[Tensor | None] = []
        for point in self.points(axes):
            try:
                rows.append(self.value(item, self.located(point)))
            except Beyond:
                rows.append(None)
        shape = next(r.shape for r in rows if r is not None)
        filled = [torch.full(shape, torch.nan) if r is None else r.double() for r in rows]
        return torch.stack(filled).reshape((*(self.sizes[a] for a in axes), *shape))

    def density(
        self, law: Law, value: Any, axes: tuple[str, ...], keep: Tensor | None = None
    ) -> Tensor:
        """Log-density at every point of ``axes``, events summed, zero where a neighbour is missing."""
        out = torch.zeros([self.sizes[a] for a in axes], dtype=torch.float64)
        for point in self.points(axes):
            try:
                out[tuple(point.values())] = self._density(law, value, self.located(point), keep)
            except Beyond:
                pass
        return out

    def _density(self, law: Law, value: Any, point: Point, keep: Tensor | None) -> Tensor:
        leaves = [self.constant(self.value(a, point)) for a in law.arguments]
        terms = law.family.replace(leaves).log_prob(self.value(value, point))
        if keep is not None:
            terms = (
                terms
                * keep[
                    tuple(
                        point[a]
                        for a in self.graph.variables[self.graph.nodes[value.id].name].plates
                    )
                ]
            )
        return terms.sum()

    def points(self, axes: tuple[str, ...]) -> list[dict[str, int]]:
        ranges = [range(self.sizes[a]) for a in axes]
        return [dict(zip(axes, p, strict=True)) for p in itertools.product(*ranges)]

    def located(self, point: Point) -> dict[str, int]:
        """The point with the positions of every ancestor plate."""
        found = dict(point)
        for axis, position in point.items():
            for ancestor in self.graph.ancestors(axis) if axis in self.graph.plates else ():
                found[ancestor] = int(self.arrays[f"{axis}->{ancestor}"][position])
        return found

    def moved(self, point: Point, plate: str, position: int) -> dict[str, int]:
        return {**point, **self.located({plate: position})}

    def constant(self, leaf: Any) -> Tensor:
        tensor = leaf if isinstance(leaf, Tensor) else torch.tensor(leaf, dtype=torch.float64)
        return tensor.double() if tensor.is_floating_point() else tensor

    def value(self, item: Any, point: Point) -> Any:
        """An operand at one point; constants as they are."""
        if not isinstance(item, Ref):
            return self.constant(item)
        node = self.graph.nodes[item.id]
        return getattr(self, f"_{node.op}")(node, point)

    def _variable(self, node: Node, point: Point) -> Tensor:
        return self.arrays[node.name][tuple(point[a] for a in self.axes[node.name])]

    def _previous(self, node: Node, point: Point) -> Tensor:
        assert self.before, "only inside a transition"
        position = {
            **point,
            **{a: point.get(a + "'", point.get(a, 0)) for a in self.axes[node.name]},
            **self.before,
        }
        for axis, at in self.before.items():
            position[axis] = point[axis] - 1 if at == -1 else at
        return self._variable(node, position)

    def _call(self, node: Node, point: Point) -> Any:
        def fill(leaf: Any) -> Any:
            return self.value(leaf, point) if isinstance(leaf, Ref) else leaf

        args, kwargs = substitute(node.args, fill), substitute(node.kwargs, fill)
        if node.name == "getitem" and isinstance(node.args[1], Ref):
            args = (args[0], args[1].long())
        assert node.func is not None
        return node.func(*args, **kwargs)

    def _item(self, node: Node, point: Point) -> Tensor:
        return self.value(node.args[0], point)[node.args[1]]

    def _gather(self, node: Node, point: Point) -> Tensor:
        index = self.value(node.args[1], point).long()
        x = [
            self.value(node.args[0], self.moved(point, node.name, int(i))) for i in index.flatten()
        ]
        return torch.stack(x).reshape((*index.shape, *x[0].shape))

    def _members(self, node: Node, point: Point) -> list[dict[str, int]]:
        closure = self.graph.closure(node.plates)
        groups = [p for p in self.graph.ancestors(node.name) if p in closure]
        found = []
        for i in range(self.sizes[node.name]):
            there = self.moved(point, node.name, i)
            if all(there[g] == point[g] for g in groups):
                found.append(there)
        return found

    def _reduce(self, node: Node, point: Point) -> Tensor:
        parts = [self.value(node.args[0], there) for there in self._members(node, point)]
        return getattr(torch.stack(parts), node.args[1])(0)

    def _dot(self, node: Node, point: Point) -> Tensor:
        parts = [
            self.value(node.args[0], p) * self.value(node.args[1], p)
            for p in self._members(node, point)
        ]
        return torch.stack(parts).sum(0)

    def _pick(self, node: Node, point: Point) -> Tensor:
        return self.value(node.args[0], self.moved(point, node.name, node.args[1]))

    def _shift(self, node: Node, point: Point) -> Tensor:
        there = point[node.name] + node.args[1]
        if not 0 <= there < self.sizes[node.name]:
            raise Beyond
        return self.value(node.args[0], self.moved(point, node.name, there))

    def transition(self, factor: Factor, axes: tuple[str, ...], own: str | None = None) -> Tensor:
        """Log-densities of a chain's later elements; ``own`` is the chain's sample axis, which has a primed partner."""
        assert factor.chain is not None and factor.law is not None
        plate, law = factor.chain
        self.before = {plate: -1}
        sizes = [self.sizes[a.removesuffix("'")] - (a == plate) for a in axes]
        out = torch.zeros(sizes, dtype=torch.float64)
        for index in itertools.product(*map(range, sizes)):
            point = {a: i + (a == plate) for a, i in zip(axes, index, strict=True)}
            out[index] = self._density(law, factor.value, self.located(point), None)
        self.before = {}
        return out


__all__ = ["Beyond", "Loop", "Point"]
