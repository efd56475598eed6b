"""Means and variances of batch norms, estimated anew under draws of the weights.

While a network is fitted every batch is normalised by its own statistics. Predictions need fixed ones: the averages over
batches and weight draws, each taken where it stands in the network with all norms before it as in training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppl.batches import batches_of
from ppl.graph import Node, Ref, refs
from ppl.inference.networks.fit import evaluate
from ppl.inference.networks.program import Program
from ppl.inference.networks.records import Problem, State
from ppl.nn.structure import LayerNode

_EVALUATIONS = 32  # batches, or draws where there are no batches


def estimated_statistics(problem: Problem, state: State) -> dict[str, Tensor]:
    """Arrays for the covariates ``name.mean`` and ``name.variance`` of every batch norm; empty where none is to do."""
    norms = [y for y in problem.network.layers if y.kind == "batch_norm"]
    if not norms or not problem.program.training:
        return {}
    seen = {y.node: _Recorded(problem.network.graph.nodes[y.node]) for y in norms}
    replaced = {i: (r.source, r.operands) for i, r in seen.items()}
    program = Program(problem.bound, problem.network, problem.program.plate, replaced)
    given = {r.source: r for r in seen.values()}
    batches = batches_of(
        problem.bound, problem.settings.minibatch, problem.settings.streams.child("statistics")
    )
    for i in range(_EVALUATIONS):
        batch = None if batches is None else batches.part(i % batches.parts)
        evaluate(problem, state, batch, number=3000 + i, program=program, also=given)
    found: dict[str, Tensor] = {}
    for y in norms:
        found |= _named(y, seen[y.node])
    return found


def _named(layer: LayerNode, seen: _Recorded) -> dict[str, Tensor]:
    names = (layer.arrays["mean"].variable, layer.arrays["variance"].variable)
    return {n: t for n, t in zip(names, seen.averages(), strict=True) if n}


class _Recorded:
    """A batch norm in training that keeps the statistics it sees."""

    def __init__(self, node: Node) -> None:
        self.node, self.func = node, node.func
        self.source = f"norm:{node.id}"
        self.operands = tuple(refs(node.args))
        self.sums: tuple[Tensor, Tensor] | None = None
        self.count = 0

    def __call__(self, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        x, *rest = (next(given) if isinstance(a, Ref) else a for a in self.node.args)
        func: Any = self.func
        dims = tuple(range(-x.ndim, -len(self.node.event_shape)))
        mean, variance = (t.reshape(-1) for t in func.statistics(x, dims))
        if self.sums is None:
            self.sums = torch.zeros_like(mean), torch.zeros_like(variance)
        self.sums = self.sums[0] + mean, self.sums[1] + variance
        self.count += 1
        # Scale and shift come with the axes of the batch in front, each of size one.
        return func.train(dims, x, *(t.reshape(-1) for t in rest))  # type: ignore[no-any-return]

    def averages(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of every channel."""
        assert self.sums is not None
        return self.sums[0] / self.count, self.sums[1] / self.count


__all__ = ["estimated_statistics"]
