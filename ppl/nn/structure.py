"""Find the layers in a graph: what a method for networks stands on.

A graph knows no layers, only nodes. :func:`find_layers` lists those that read weights, in the order in which they are
evaluated: ``linear``, ``conv1d`` and ``conv2d``, norm layers, and lifted modules. A user's own ``x @ w.T`` is one too.
What stands between them (``relu``, ``max_pool2d``, ``add``, ...) has no weights; methods lower it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ppl.graph import Graph, Node, Ref, refs
from ppl.operations import Batched
from ppl.passes import upstream

PRODUCTS = ("linear", "conv1d", "conv2d")
_OWN = ("latent", "param", "constant")  # roles of a layer's own weights
NORMS = ("group_norm", "layer_norm", "filter_response_norm", "batch_norm")


@dataclass(frozen=True)
class Weights:
    """One array that a layer reads.

    The node ``node`` is what stands in the layer's arguments: a ``collect`` of a variable in plates, the variable
    itself where its event is the array, a constant, or (``role="expression"``) anything else.
    """

    node: int  # id, or -1 for a tensor written into the call
    role: Literal["latent", "param", "given", "constant", "expression"]
    variable: str  # name; empty for constants and expressions
    around: tuple[str, ...]  # plates of a family of networks
    units: tuple[str, ...]  # plates that are leading axes of the array: ("fc1.out", "fc1.in")
    shape: tuple[int, ...]  # of the array, [outputs, inputs, *kernel]


@dataclass(frozen=True)
class LayerNode:
    """A node that reads weights.

    ``arrays`` has the keys "weight" and "bias" where the layer has them, "threshold" for FRN, "mean" and "variance" for
    batch norm, and the parameters' own names for a lifted module.
    """

    kind: str  # "linear", "conv2d", ..., "batch_norm", "lift"
    name: str  # of the layer: its weight's name without ".weight"; of the node for an expression
    node: int
    inputs: tuple[int, ...]  # nodes that it reads as input
    plates: tuple[str, ...]  # of the data: those of the node that the weights do not have
    event_shape: tuple[int, ...]  # of its result
    arrays: Mapping[str, Weights]
    multiplications: int  # of a dense evaluation for one element; 0 where they do not count

    @property
    def weight(self) -> Weights | None:
        """The array of weights, where there is one."""
        return self.arrays.get("weight")

    @property
    def bias(self) -> Weights | None:
        """The array of biases, where there is one."""
        return self.arrays.get("bias")


def find_layers(graph: Graph) -> tuple[LayerNode, ...]:
    """Every node that reads weights and that a factor depends on, inputs first.

    >>> @model
    ... def digits():
    ...     net = nn.MLP(64, 32, 10)
    ...     with plate("image"):
    ...         observe("label", Categorical(logits=net(given("x"))))
    >>> graph = digits.graph({"x": torch.zeros(5, 64), "label": [0, 1, 2, 3, 4]})
    >>> [(layer.kind, layer.name, layer.weight.shape) for layer in nn.find_layers(graph)]
    [('linear', 'fc1', (32, 64)), ('linear', 'fc2', (10, 32))]
    """
    return tuple(found for node in _live(graph) if (found := _layer(graph, node)) is not None)


def examples(graph: Graph) -> int:
    """Number of independent data items: the size of the plates that the layers are evaluated in.

    ``N`` of a variational objective. The graph must have sizes, as ``model.graph(data)`` has.

    >>> @model
    ... def line():
    ...     layer = nn.Linear(2, 1, name="fc")
    ...     with plate("row"):
    ...         observe("y", Normal(layer(given("x"))[0], 1.0))
    >>> nn.examples(line.graph({"x": torch.zeros(7, 2), "y": torch.zeros(7)}))
    7
    """
    return math.prod(graph.plates[p].size or 1 for p in data_plates(graph))


def data_plates(graph: Graph) -> tuple[str, ...]:
    """The plates of the data: those that the layers are evaluated in and their weights are not."""
    found = frozenset(p for layer in find_layers(graph) for p in layer.plates)
    return graph.maximal(found)


def buffers(graph: Graph) -> tuple[tuple[str, str], ...]:
    """Names of the mean and variance of every batch norm, in the order of :func:`find_layers`."""
    return tuple(
        (layer.arrays["mean"].variable, layer.arrays["variance"].variable)
        for layer in find_layers(graph)
        if layer.kind == "batch_norm"
    )


def _live(graph: Graph) -> list[Node]:
    roots: list[int] = []
    for f in graph.factors.values():
        laws = [law for law in (f.law, f.chain[1] if f.chain else None) if law]
        roots += refs((f.value, *(law.arguments for law in laws)))
    seen: set[int] = set()
    while roots:
        i = roots.pop()
        if i not in seen:
            seen.add(i)
            roots.extend(graph.nodes[i].operands())
    return [graph.nodes[i] for i in sorted(seen)]


def _layer(graph: Graph, node: Node) -> LayerNode | None:
    if node.op != "call":
        return None
    if node.name in PRODUCTS:
        return _product(graph, node)
    if isinstance(node.func, Batched) and node.name in NORMS:
        return _made(node, node.name, (node.args[0],), _norm_arrays(graph, node))
    if getattr(node.func, "is_opaque", False):
        return _lifted(graph, node)
    return None


def _product(graph: Graph, node: Node) -> LayerNode | None:
    names = ("input", "weight", "bias")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    arrays = {k: _weights(graph, given[k]) for k in names[1:] if given.get(k) is not None}
    if all(w.role in ("given", "expression") for w in arrays.values()):
        return None  # a product of data
    return _made(node, node.name, (given["input"],), arrays)


def _norm_arrays(graph: Graph, node: Node) -> dict[str, Weights]:
    after = {"batch_norm": ("mean", "variance", "weight", "bias")}
    names = after.get(node.name, ("weight", "bias", "threshold"))
    return {k: _weights(graph, a) for k, a in zip(names, node.args[1:], strict=False)}


def _lifted(graph: Graph, node: Node) -> LayerNode:
    inputs, weights, _ = node.args
    names = node.func.call.names  # type: ignore[union-attr]
    arrays = {k: _weights(graph, a) for k, a in zip(names, weights, strict=True)}
    return _made(node, "lift", tuple(inputs), arrays)


def _made(node: Node, kind: str, inputs: tuple[Any, ...], arrays: dict[str, Weights]) -> LayerNode:
    around = {a for w in arrays.values() if w.role in _OWN for a in w.around}
    plates = tuple(p for p in node.plates if p not in around)
    weight = arrays.get("weight")
    count = math.prod(weight.shape) if weight is not None and kind in PRODUCTS else 0
    places = math.prod(node.event_shape) // node.event_shape[_channel(kind)] if count else 0
    ids = tuple(a.id for a in inputs if isinstance(a, Ref))
    return LayerNode(
        kind, _name(node, kind, arrays), node.id, ids, plates, node.event_shape, arrays, count * places
    )  # fmt: skip


def _channel(kind: str) -> int:
    return -1 if kind == "linear" else 0


def _name(node: Node, kind: str, arrays: Mapping[str, Weights]) -> str:
    if kind == "lift":
        return node.name.removeprefix("nn.lift('").removesuffix("')")
    known = [w.variable for w in arrays.values() if w.variable]
    if not known:
        return f"{node.name} ({node.where})"
    head, _, last = known[0].rpartition(".")
    return head if head and last in arrays else known[0]


def _weights(graph: Graph, item: Any) -> Weights:
    if not isinstance(item, Ref):
        shape = tuple(item.shape) if isinstance(item, Tensor) else ()
        return Weights(-1, "constant", "", (), (), shape)
    node = source = graph.nodes[item.id]
    units: tuple[str, ...] = ()
    if node.op == "collect":
        units, source = tuple(node.name.split(",")), graph.nodes[node.args[0].id]
    role: Any = "expression"
    if source.op == "variable":
        role = graph.variables[source.name].role
        role = "given" if role == "observed" else role
    elif not upstream(graph, node.id):
        role = "constant"
    name = source.name if source.op == "variable" else ""
    return Weights(node.id, role, name, tuple(node.plates), units, tuple(node.event_shape))


__all__ = ["LayerNode", "Weights", "buffers", "data_plates", "examples", "find_layers"]
