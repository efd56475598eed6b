"""The log-likelihood of a batch as a plain function of arrays, with products of layers as callables.

Factors are sorted into those within the divided plate, whose sum over a batch is scaled up, and the others. The laws of
the latents are not here, they have a module of their own, :mod:`ppl.inference.networks.priors`. The graph is lowered once
for every size of the batch, not for every batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl.batches import Batch
from ppl.binding import Bound
from ppl.graph import Factor, Graph
from ppl.inference.networks.structure import Network
from ppl.lower import Compiler, Lowered, Operand, map_name

Augment = Mapping[str, Callable[..., Tensor]]  # covariate -> function of (batch of it, generator)


class Terms(NamedTuple):
    """The factors at one size of the batch."""

    lowered: Lowered
    inside: tuple[bool, ...]  # of every output: whether it lies within the divided plate
    repeats: tuple[int, ...]  # times that it counts: elements of plates that it does not vary over


class Program:
    """Log-densities of everything but the laws of latents.

    Args:
        bound: the graph and its data.
        network: what was found in it.
        plate: that is taken in batches; None: all data in every step.
        replaced: more nodes that are computed by callables, see :class:`ppl.lower.Compiler`.
        training: whether batch norms take the statistics of a batch.
        changed: covariates that functions of ``augment`` change.

    >>> from ppl.models.bnn import classifier
    >>> from ppl.inference.networks.structure import find_network
    >>> bound = classifier(hidden=(2,), classes=3).bind({"x": torch.ones(4, 5), "label": [0, 1, 2, 0]})
    >>> net = find_network(bound)
    >>> program = Program(bound, net)
    >>> zeros = {p.source: lambda x, p=p: x.new_zeros(len(x), p.shape[0]) for p in net.products}
    >>> torch.allclose(program(zeros), -4 * torch.tensor(3.0).double().log())
    True
    """

    def __init__(
        self,
        bound: Bound,
        network: Network,
        plate: str | None = None,
        replaced: Mapping[int, tuple[str, tuple[int, ...]]] | None = None,
        *,
        training: bool = True,
        changed: Collection[str] = (),
    ) -> None:
        self.bound, self.network, self.plate, self.training = bound, network, plate, training
        self.replaced = {p.node.id: (p.source, _operands(p)) for p in network.products}
        self.replaced |= replaced or {}
        graph = bound.graph
        self.inside = frozenset(
            p for p in graph.plates if plate is not None and plate in (p, *graph.ancestors(p))
        )
        arrays = data_arrays(bound)
        self.varying = {
            n: a for n, a in arrays.items() if n in changed or self.inside.intersection(a[1])
        }
        self.fixed = {n: a[0] for n, a in arrays.items() if n not in self.varying}
        self._made: dict[tuple[int, ...], Terms] = {}

    def __call__(
        self,
        values: Mapping[str, Any],
        batch: Batch | None = None,
        augment: Augment | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Log-likelihood of all data, estimated from the batch: an unbiased sum, not a mean.

        Args:
            values: latents that are no weights and params by name, ``[*plates, *event]``; callables by ``source``.
            batch: what is narrowed to; None: everything.
            augment: functions of covariates of the batch.
            generator: for these.
        """
        terms = self.terms(batch)
        arrays = {**values, **self.data(batch, terms.lowered.inputs)}
        for name, change in (augment or {}).items():
            arrays[name] = change(arrays[name], generator)
        outputs = terms.lowered(arrays)
        scale = 1.0 if batch is None else batch.scale
        total: Tensor | None = None
        for out, inside, repeats in zip(outputs, terms.inside, terms.repeats, strict=True):
            share = repeats * (scale if inside else 1.0)
            part = out.sum() if share == 1.0 else out.sum() * share
            total = part if total is None else total + part
        assert total is not None
        return total

    def data(self, batch: Batch | None, names: Mapping[str, Any]) -> dict[str, Tensor]:
        """The arrays of the batch that are called ``names``."""
        if batch is None:
            return {n: a[0] for n, a in self.varying.items() if n in names}
        return {n: self._rows(n, batch) for n in names if n in self.varying}

    def _rows(self, name: str, batch: Batch) -> Tensor:
        array, axes = self.varying[name]
        for dim, axis in enumerate(axes):
            if axis in batch.rows:
                array = array.index_select(dim, batch.rows[axis].to(array.device))
        ancestor = name.rpartition("->")[2]
        if "->" in name and ancestor in batch.rows:  # positions among the elements of the batch
            array = torch.searchsorted(batch.rows[ancestor].to(array.device), array)
        return array

    def terms(self, batch: Batch | None) -> Terms:
        """The lowered factors for batches of this size."""
        rows = {} if batch is None else batch.rows
        sizes = {n: len(r) for n, r in rows.items()}
        key = tuple(sizes.values())
        if key not in self._made:
            self._made[key] = self._lower(sizes)
        return self._made[key]

    def _lower(self, sizes: Mapping[str, int]) -> Terms:
        graph = _resized(self.bound.graph, sizes)
        axes = {v.name: v.plates for v in graph.variables.values()}
        compiler = Compiler(
            graph, axes, tuple(graph.plates), dtype=self.bound.dtype, device=self.bound.device,
            masks=tuple(self.bound.masks), training=self.training, replaced=self.replaced,
        )  # fmt: skip
        outputs, inside, repeats = [], [], []
        for factor in likelihood_factors(graph):
            for out, plates in _densities(compiler, factor):
                outputs.append(out)
                inside.append(bool(self.inside & graph.closure(plates)))
                repeats.append(_repeats(graph, plates, out.axes))
        lowered = compiler.finish(outputs).pruned()
        fixed = {n: t for n, t in self.fixed.items() if n in lowered.inputs}
        return Terms(lowered.given(fixed), tuple(inside), tuple(repeats))


def likelihood_factors(graph: Graph) -> tuple[Factor, ...]:
    """Every factor but the laws of the latents."""
    own = {v.name for v in graph.latents}
    return tuple(f for f in graph.densities if not (f.kind == "conditional" and f.name in own))


def _operands(product: Any) -> tuple[int, ...]:
    return (product.input,) if product.bias_node is None else (product.input, product.bias_node)


def _densities(compiler: Compiler, factor: Factor) -> list[tuple[Operand, tuple[str, ...]]]:
    out = compiler.density(factor)
    if factor.chain is None:
        return [(out, factor.plates)]
    first = tuple(p for p in factor.plates if p != factor.chain[0])
    return [(out, first), (compiler.transition(factor), factor.plates)]


def _repeats(graph: Graph, plates: tuple[str, ...], axes: tuple[str, ...]) -> int:
    covered = graph.closure(axes)
    return math.prod(graph.plates[p].size or 1 for p in graph.maximal(plates) if p not in covered)


def _resized(graph: Graph, sizes: Mapping[str, int]) -> Graph:
    plates = {n: replace(p, size=sizes.get(n, p.size)) for n, p in graph.plates.items()}
    return replace(graph, plates=plates)


def data_arrays(bound: Bound) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    """Covariates, observations, masks and memberships, each with its plates."""
    variables = bound.graph.variables
    found = {n: (a, variables[n].plates) for n, a in bound.dense.items()}
    found |= {n + "@mask": (m, variables[n].plates) for n, m in bound.masks.items()}
    return found | {map_name(*key): (m, (key[0],)) for key, m in bound.maps.items()}


__all__ = ["Augment", "Program", "Terms", "data_arrays", "likelihood_factors"]
