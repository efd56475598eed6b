"""A bound model as a network: arrays of weights, the products that read them, and all other latents.

A latent is an *array of weights* where nothing reads it but the products of layers, ``linear``, ``conv1d`` and ``conv2d``.
Only there may an estimator work on the outputs of a layer, or a method keep some of the entries only. Every other
latent (weights of lifted modules, families of networks, scales of norms, a prior's own scale) is drawn as a whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.distributions.transforms import Transform

from ppl.binding import Bound
from ppl.errors import UnsupportedError
from ppl.graph import Factor, Graph, Node, Variable, refs
from ppl.inference.particles.blocks import transform_of
from ppl.nn.structure import PRODUCTS, LayerNode, Weights, data_plates, examples, find_layers

Role = Literal["weight", "bias", "other"]


@dataclass(frozen=True, eq=False)
class Array:
    """A latent.

    ``shape`` is that of its array, ``[*plates, *event]``; ``free_shape`` the same on the real line.
    """

    variable: Variable
    role: Role
    shape: tuple[int, ...]
    free_shape: tuple[int, ...]
    transform: Transform | None  # real line -> support; None where it is the identity
    uses: tuple[int, ...]  # positions in ``Network.products`` that read it as weight or bias
    why: str  # it is drawn as a whole: the reason in words; empty for weights and biases
    layer: str  # that reads it; empty for latents of no layer

    @property
    def name(self) -> str:
        """Of the latent."""
        return self.variable.name

    @property
    def size(self) -> int:
        """Numbers in the whole array on the real line."""
        return math.prod(self.free_shape)


@dataclass(frozen=True, eq=False)
class ProductNode:
    """A node that multiplies its input by an array of weights."""

    node: Node
    kind: str  # "linear", "conv1d", "conv2d"
    name: str  # of the layer
    weight: int  # position of the array
    bias: int | None  # position of the array of biases, where that is drawn with the product
    bias_node: int | None  # node of a bias that is anything else
    bias_constant: Tensor | None
    input: int  # node
    shape: tuple[int, ...]  # [outputs, inputs, *kernel]
    rows: int  # axes of one element's input in front of the features: 1 for linear on a matrix
    multiplications: int  # of a dense evaluation for one element
    plates: tuple[str, ...]  # of the result
    meets: bool  # whether what it puts out for different elements goes into one expression

    @property
    def source(self) -> str:
        """Name of the run's input that holds the callable."""
        return f"product:{self.node.id}"

    @property
    def channel(self) -> int:
        """Position of the outputs in an element of the result, from the end."""
        return -1 if self.kind == "linear" else -len(self.node.event_shape)


@dataclass(frozen=True, eq=False)
class Network:
    """What the methods for networks know of a model."""

    graph: Graph
    arrays: tuple[Array, ...]
    products: tuple[ProductNode, ...]
    layers: tuple[LayerNode, ...]
    params: tuple[Variable, ...]
    plates: tuple[str, ...]  # of the data
    examples: int  # N

    @property
    def weights(self) -> tuple[int, ...]:
        """Positions of the arrays of weights."""
        return tuple(i for i, a in enumerate(self.arrays) if a.role == "weight")


def is_network(graph: Graph) -> bool:
    """Whether a layer of the model reads weights that are latents.

    >>> from ppl import model, latent, Normal
    >>> @model
    ... def plain():
    ...     latent("x", Normal(0.0, 1.0))
    >>> is_network(plain.graph())
    False
    """
    return any(w.role == "latent" for layer in find_layers(graph) for w in layer.arrays.values())


def reasons(graph: Graph) -> list[tuple[str, str, str]]:
    """Why a model does not fit: site, problem, remedy; empty where it does.

    >>> from ppl.models.bnn import classifier
    >>> reasons(classifier.graph({"x": torch.zeros(3, 4), "label": [0, 1, 2]}))
    []
    """
    if not is_network(graph):
        names = ", ".join(f"'{v.name}'" for v in graph.latents[:3]) or "none"
        remedy = "Use layers of ppl.nn with priors, or method='vi' or 'qem' for a model without."
        return [("", f"no layer of the model reads weights that are latents (latents: {names}).", remedy)]  # fmt: skip
    data = graph.closure(data_plates(graph))
    found = (_reason(graph, v, data) for v in graph.latents)
    return [r for r in found if r is not None]


def _reason(graph: Graph, v: Variable, data: frozenset[str]) -> tuple[str, str, str] | None:
    remedy = "Use method='vi' without estimator=."
    if v.is_discrete:
        return v.name, "is a discrete latent beside a network.", remedy
    inside = [p for p in v.plates if p in data and not _is_around(graph, p)]
    if inside:
        where = f"is a latent of every element of plate '{inside[0]}', which is that of the data."
        return v.name, where, remedy
    try:
        transform_of(v)
    except UnsupportedError as error:
        return "", str(error), ""
    return None


def _is_around(graph: Graph, plate: str) -> bool:
    """Whether weights of a layer lie in a plate: it counts networks, not data."""
    layers = find_layers(graph)
    return any(plate in w.around for a in layers for w in a.arrays.values() if w.role == "latent")


def find_network(bound: Bound) -> Network:
    """Sort the latents of a bound model.

    >>> from ppl.models.bnn import classifier
    >>> bound = classifier(hidden=(8,)).bind({"x": torch.zeros(3, 4), "label": [0, 1, 2]})
    >>> net = find_network(bound)
    >>> [(a.name, a.role, a.size) for a in net.arrays][:2], net.examples
    ([('fc1.weight', 'weight', 32), ('fc1.bias', 'bias', 8)], 3)
    """
    graph = bound.graph
    layers, readers = find_layers(graph), _Readers(graph)
    found = {ly.node: w for ly in layers if (w := _weight_array(graph, ly, readers)) is not None}
    position = {v.name: i for i, v in enumerate(graph.latents)}
    products = tuple(
        _product(graph, ly, position, readers) for ly in layers if ly.node in found
    )  # fmt: skip
    arrays = tuple(_array(bound, v, i, layers, products) for i, v in enumerate(graph.latents))
    data = data_plates(graph)
    return Network(graph, arrays, products, layers, graph.role("param"), data, examples(graph))


def _array(
    bound: Bound,
    v: Variable,
    at: int,
    layers: tuple[LayerNode, ...],
    products: tuple[ProductNode, ...],
) -> Array:
    uses = tuple(i for i, p in enumerate(products) if p.weight == at)
    as_bias = tuple(i for i, p in enumerate(products) if p.bias == at)
    shape, transform = bound.shape(v), transform_of(v)
    free = shape if transform is None else tuple(transform.inverse_shape(shape))
    layer = next((y for y in layers for w in y.arrays.values() if w.variable == v.name), None)
    name = "" if layer is None else layer.name
    if uses or as_bias:
        return Array(
            v, "weight" if uses else "bias", shape, free, transform, uses or as_bias, "", name
        )
    return Array(v, "other", shape, free, transform, (), _why(v, layer), name)


def _why(v: Variable, layer: LayerNode | None) -> str:
    if layer is None:
        return "it is read by laws or expressions, not by a layer"
    if layer.kind == "lift":
        return f"'{layer.name}' is a lifted module, one function that nothing looks into"
    if layer.kind not in PRODUCTS:
        return f"it is a scale or shift of '{layer.name}', not a product"
    if any(w.around for w in layer.arrays.values() if w.variable == v.name):
        return "it is one of a family of networks, an array for each of them"
    return f"something else than the product of '{layer.name}' reads it too"


# Operations whose result for an element depends on other elements of a plate.
_ACROSS = frozenset(("gather", "pick", "shift", "reduce", "dot", "collect", "previous"))


class _Readers:
    """Which nodes, in which argument, and which factors read each node that a density depends on."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.of: dict[int, list[tuple[int, str]]] = {}
        self.by_factor: dict[int, list[Factor]] = {}
        queue: list[int] = []
        for f in graph.densities:
            laws = [law for law in (f.law, f.chain[1] if f.chain else None) if law]
            for i in refs((f.value, *(law.arguments for law in laws))):
                self.by_factor.setdefault(i, []).append(f)
                queue.append(i)
        self.live: set[int] = set()
        while queue:
            i = queue.pop()
            if i in self.live:
                continue
            self.live.add(i)
            node = graph.nodes[i]
            for place, argument in _arguments(node):
                for j in refs(argument):
                    self.of.setdefault(j, []).append((i, place))
                    queue.append(j)

    def only(self, name: str, node: int, place: str) -> set[int] | None:
        """The nodes that read latent ``name`` as ``place`` by way of ``node``; None if anything else reads it."""
        sources = [
            n.id
            for n in self.graph.nodes
            if n.id in self.live and n.op == "variable" and n.name == name
        ]
        uses: set[int] = set()
        for source in sources:
            factors = [f.name for f in self.by_factor.get(source, []) if f.name != name]
            if factors:
                return None
            for reader, where in self.of.get(source, []):
                if self.graph.nodes[reader].op == "collect" and reader != source:
                    if self.by_factor.get(reader) or not self._same(reader, node):
                        return None
                    entries = self.of.get(reader, [])
                else:
                    entries = [(reader, where)]
                if any(w != place for _, w in entries):
                    return None
                uses |= {i for i, _ in entries}
        return uses

    def meets(self, node: int) -> bool:
        """Whether an expression reads results of ``node`` for several elements."""
        queue, seen = [node], {node}
        while queue:
            for reader, _ in self.of.get(queue.pop(), []):
                if self.graph.nodes[reader].op in _ACROSS:
                    return True
                if reader not in seen:
                    seen.add(reader)
                    queue.append(reader)
        return False

    def _same(self, one: int, other: int) -> bool:
        return self.graph.nodes[one].name == self.graph.nodes[other].name


def _arguments(node: Node) -> list[tuple[str, object]]:
    names = ("input", "weight", "bias") if node.name in PRODUCTS and node.op == "call" else ()
    found = [(names[i] if i < len(names) else "", a) for i, a in enumerate(node.args)]
    return [*found, *((k if k in names else "", a) for k, a in node.kwargs.items())]


def _weight_array(graph: Graph, layer: LayerNode, readers: _Readers) -> Weights | None:
    """The weights of a layer where only products read them, as they stand."""
    w = layer.weight
    if layer.kind not in PRODUCTS or w is None or not _plain(graph, w) or not layer.inputs:
        return None
    uses = readers.only(w.variable, w.node, "weight")
    if uses is None or any(not list(refs(_input(graph.nodes[i]))) for i in uses):
        return None  # a product of a constant needs the array as a whole
    return w


def _input(node: Node) -> object:
    return next(a for place, a in _arguments(node) if place == "input")


def _plain(graph: Graph, w: Weights) -> bool:
    """Whether the layer's array is a latent's array as it stands, on the whole line."""
    if w.role != "latent" or w.around:
        return False
    v = graph.variables[w.variable]
    return w.units == v.plates and not v.is_discrete and transform_of(v) is None


def _product(
    graph: Graph,
    layer: LayerNode,
    position: dict[str, int],
    readers: _Readers,
) -> ProductNode:
    node, weight, bias = graph.nodes[layer.node], layer.weight, layer.bias
    assert weight is not None
    own: int | None = None
    other: int | None = None
    constant: Tensor | None = None
    if bias is not None and bias.node < 0:
        found = node.kwargs.get("bias", node.args[2] if len(node.args) > 2 else None)
        constant = found if isinstance(found, Tensor) else None
    elif bias is not None:
        uses = readers.only(bias.variable, bias.node, "bias") if _plain(graph, bias) else None
        if uses == {layer.node}:
            own = position[bias.variable]
        else:
            other = bias.node
    rows = len(graph.nodes[layer.inputs[0]].event_shape) - 1 if layer.kind == "linear" else 0
    return ProductNode(
        node, layer.kind, layer.name, position[weight.variable], own, other, constant,
        layer.inputs[0], weight.shape, rows, layer.multiplications, node.plates,
        readers.meets(layer.node),
    )  # fmt: skip


__all__ = [
    "Array",
    "Network",
    "ProductNode",
    "find_network",
    "is_network",
    "reasons",
]
