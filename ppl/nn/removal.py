"""Drop the units of a network that nothing depends on, and fold those that are constant into the next layer's biases.

Forwards: a unit without an active weight is a constant, which the layers between carry to the next layer; what that makes
of it is added to its bias. Backwards: a unit that no active weight of the next layer reads is dropped. Both need a layer
that is read by one other, through functions that keep units apart: activations, pools, norms of one channel at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ppl.graph import Graph, Node, Ref, refs
from ppl.lower import Compiler
from ppl.nn.structure import LayerNode
from ppl.operations import POINTWISE, Batched

_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
# By channel, and by place in it: a flattened image is channel by channel.
_BY_CHANNEL = frozenset("max_pool1d max_pool2d avg_pool1d avg_pool2d".split())
_OVER_PLACES = frozenset("mean amax amin sum".split())
_NORMS = frozenset("batch_norm filter_response_norm".split())  # of each channel by itself


@dataclass(eq=False)
class Matrix:
    """A layer while units are dropped; a convolution's array has its kernel behind."""

    layer: LayerNode
    weight: Tensor  # [outputs, inputs, *kernel] means
    active: Tensor  # the same, bool
    bias: Tensor | None  # [outputs]
    outputs: Tensor  # [outputs] bool, which units stay
    inputs: Tensor  # [inputs] bool
    note: str = ""

    def small(self, array: Tensor) -> Tensor:
        """The rows and columns that stay."""
        return array[self.outputs][:, self.inputs]


@dataclass(frozen=True, eq=False)
class Pair:
    """Two layers, the second of which alone reads the first."""

    first: Matrix
    second: Matrix
    graph: Graph
    norms: tuple[Node, ...] = ()  # between them

    @property
    def width(self) -> int:
        """Inputs of the second layer for each unit of the first."""
        return len(self.second.inputs) // len(self.first.outputs)

    def spread(self, units: Tensor) -> Tensor:
        """A mask of units as a mask of the second layer's inputs."""
        return units.repeat_interleave(self.width)


def remove_units(
    graph: Graph,
    arguments: Sequence[Any],
    matrices: Sequence[Matrix],
    arrays: Mapping[str, Tensor],
) -> dict[int, Tensor]:
    """Mark the units that go, in the order of the layers; biases change, and notes say why units stay.

    Args:
        graph: what the law's arguments need.
        arguments: of the observed law; units that they read stay.
        matrices: of all layers, inputs first.
        arrays: values of all variables that norms read.

    Returns:
        For each norm layer between two others, by its node, which channels stay, ``[channels]`` bool.
    """
    pairs = _pairs(graph, arguments, matrices)
    for pair in pairs:
        _fold_constants(pair, arrays)
    for pair in reversed(pairs):
        _drop_unread(pair)
    return {norm.id: pair.first.outputs for pair in pairs for norm in pair.norms}


def call_of(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a layer's function behind the bias."""
    return tuple(node.args[3:]), {k: v for k, v in node.kwargs.items() if k not in _ARGUMENTS[:3]}


# ---- who reads whom ----------------------------------------------------------------------------------------------------


def _pairs(graph: Graph, arguments: Sequence[Any], matrices: Sequence[Matrix]) -> list[Pair]:
    readers: dict[int, int] = dict.fromkeys(refs(tuple(arguments)), 1)
    for node in graph.nodes:
        for i in node.operands():
            readers[i] = readers.get(i, 0) + 1
    known = {m.layer.node: m for m in matrices}
    pairs = []
    for m in matrices:
        before, reason, norms = _before(graph, m.layer, known, readers)
        if before is None:
            m.note = reason and f"units that it reads stay: {reason}"
        else:
            pairs.append(Pair(known[before], m, graph, norms))
    return pairs


def _before(
    graph: Graph, layer: LayerNode, known: Mapping[int, Matrix], readers: Mapping[int, int]
) -> tuple[int | None, str, tuple[Node, ...]]:
    """The layer that this one reads, or None and the reason, in words, why units between them stay; norms in between."""
    at, norms = layer.inputs[0], []
    while at not in known:
        node = graph.nodes[at]
        if node.op != "call":
            return None, "", ()  # data
        if readers[at] > 1:
            return None, f"'{node.name}' before it is read {readers[at]} times", ()
        if _is_norm_of_channels(graph, node, readers):
            norms.append(node)
        elif len(node.operands()) != 1:
            return None, f"'{node.name}' before it reads other things, too", ()
        elif not _keeps_units_apart(graph, node):
            return None, f"'{node.name}' before it may mix them", ()
        at = node.operands()[0]
    if readers[at] > 1:
        return None, f"'{known[at].layer.name}' before it is read {readers[at]} times", ()
    for one in (known[at].layer, layer):
        if one.kind == "linear" and len(one.event_shape) != 1:
            return None, f"'{one.name}' is applied to several vectors of one element", ()
        if _groups(graph.nodes[one.node]) != 1:
            return None, f"'{one.name}' has groups of channels", ()
    return at, "", tuple(norms)


def _is_norm_of_channels(graph: Graph, node: Node, readers: Mapping[int, int]) -> bool:
    """Whether a node is a norm of each channel by itself, with arrays ``[channels]`` that nothing else reads."""
    if not isinstance(node.func, Batched) or node.name not in _NORMS:
        return False
    channels = node.event_shape[:1]
    arrays = [graph.nodes[a.id] if isinstance(a, Ref) else None for a in node.args[1:]]
    return all(
        a is not None and a.op == "collect" and a.event_shape == channels and readers[a.id] == 1
        for a in arrays
    )


def _keeps_units_apart(graph: Graph, node: Node) -> bool:
    before = graph.nodes[node.operands()[0]].event_shape
    rest = [*node.args, *node.kwargs.values()]  # a constant may stand in front: c * x
    if any(isinstance(a, torch.Tensor) and a.numel() > 1 for a in rest):
        return False
    if node.name in POINTWISE:
        return node.event_shape == before
    if node.name == "flatten":
        return len(node.event_shape) == 1
    if node.name in _OVER_PLACES:
        return node.event_shape == before[:1] and _dims(node, len(before)) == {
            *range(1, len(before))
        }
    return node.name in _BY_CHANNEL


def _dims(node: Node, rank: int) -> set[int]:
    """The axes that a reduction goes over; of a square array the shape of its result does not tell."""
    named = node.kwargs.get("dim", node.kwargs.get("axis"))
    dim = node.args[1] if len(node.args) > 1 else named
    return {d % rank for d in (dim if isinstance(dim, (tuple, list)) else (dim,)) if d is not None}


def _groups(node: Node) -> int:
    named = dict(zip(_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
    return int(named.get("groups", 1))


# ---- what goes ---------------------------------------------------------------------------------------------------------


def _fold_constants(pair: Pair, arrays: Mapping[str, Tensor]) -> None:
    """Units of the first layer without an active weight become part of the second layer's bias."""
    first, second = pair.first, pair.second
    constant = ~first.active.flatten(1).any(1)
    if not bool(constant.any()):
        return
    carried = _carried(pair, arrays)
    changes = _changes(pair, carried, constant)
    if changes is None or (second.bias is None and bool((changes != 0).any())):
        # Those that are zero all the same go without a bias, and without a border that would show.
        is_zero = (carried.reshape(len(first.outputs), -1) == 0).all(1)
        constant = constant & is_zero
        second.note = "constant units that it reads stay: " + (
            "zeros around the image make a border of them"
            if changes is None
            else "it has no bias to hold them"
        )
    elif second.bias is not None:
        second.bias = second.bias + changes
    second.active[:, pair.spread(constant)] = False
    second.weight[:, pair.spread(constant)] = 0.0


def _carried(pair: Pair, arrays: Mapping[str, Tensor]) -> Tensor:
    """What the second layer reads of an input to which the first adds its bias only."""
    first, node = pair.first, pair.first.layer.node
    bias = first.weight.new_zeros(len(first.weight)) if first.bias is None else first.bias
    shape = first.layer.event_shape
    value = bias.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape)
    compiler = Compiler(
        pair.graph,
        {v.name: v.plates for v in pair.graph.variables.values()},
        tuple(pair.graph.plates),
        dtype=bias.dtype,
        device=bias.device,
        replaced={node: ("constant", ())},
    )
    lowered = compiler.finish([compiler.operand(Ref(pair.second.layer.inputs[0]))])
    given: dict[str, Any] = {**arrays, "constant": lambda: value}
    return lowered({k: given[k] for k in lowered.inputs})[0]


def _changes(pair: Pair, carried: Tensor, constant: Tensor) -> Tensor | None:
    """What constant units add to each output ``[outputs]``; None where it varies over the image."""
    second = pair.second
    mask = pair.spread(constant).reshape(-1, *(1,) * (carried.ndim - 1))
    only = torch.where(mask, carried, 0.0)
    if second.layer.kind == "linear":
        return second.weight @ only
    rest, named = call_of(pair.graph.nodes[second.layer.node])
    run = getattr(functional, second.layer.kind)
    image = run(only.unsqueeze(0), second.weight, None, *rest, **named)[0].flatten(1)
    low, high = image.amin(1), image.amax(1)
    varies = bool((high - low > 1e-6 * image.abs().amax().clamp(min=1e-30)).any())
    return None if varies else image.mean(1)


def _drop_unread(pair: Pair) -> None:
    first, second = pair.first, pair.second
    read = second.active[second.outputs].transpose(0, 1).flatten(1).any(1)
    units = read.reshape(-1, pair.width).any(1)
    if not bool(units.any()):
        units[0] = (
            True  # a layer keeps one unit: functions of no unit at all are not defined everywhere
        )
    first.outputs &= units
    second.inputs &= pair.spread(first.outputs)


__all__ = ["Matrix", "call_of", "remove_units"]
