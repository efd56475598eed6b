"""Cut a prediction by a network into portions of draws and of data that fit into memory.

Never are all weights of all draws, or all hidden units of all data, in memory at once. A network with many weights is
predicted with as few as 30 draws. Models without layers are evaluated in one piece.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from ppl.batches import check_divisible, rows_within
from ppl.binding import Bound
from ppl.errors import DataError, UnsupportedError
from ppl.graph import Graph
from ppl.nn.structure import data_plates, find_layers

_NUMBERS = 2**24  # in the weights of one portion of draws, and in its largest hidden layer
_MANY = 10_000  # weights of a large network
_ROWS = 64  # of data that a portion should have at least: fewer make the steps short and many
_DRAWS = 1000
_DRAWS_OF_NETWORKS = 30


@dataclass(frozen=True, eq=False)
class Portions:
    """``draws``: how many at a time; ``plate`` is cut into ``rows``, which are None where all data are taken at once."""

    draws: tuple[int, ...]
    plate: str | None = None
    rows: tuple[Mapping[str, Tensor] | None, ...] = (None,)

    def bounds(self, bound: Bound) -> list[Bound]:
        """The data in parts."""
        return [bound if rows is None else bound.narrowed(rows) for rows in self.rows]

    def along(self, plates: Sequence[str]) -> int | None:
        """Which axis of ``[*plates]`` the parts of the data have to be joined along; None where they are not cut."""
        if self.plate is None or len(self.rows) == 1:
            return None
        kept = self.rows[0]
        assert kept is not None
        return next((i for i, p in enumerate(plates) if p in kept), None)


def layer_arrays(graph: Graph) -> tuple[str, ...]:
    """Names of the latent arrays that layers read, in the order of the layers.

    >>> @model
    ... def digits():
    ...     net = nn.MLP(64, 32, 10)
    ...     with plate("image"):
    ...         observe("label", Categorical(logits=net(given("x"))))
    >>> layer_arrays(digits.graph({"x": torch.zeros(5, 64), "label": [0, 1, 2, 3, 4]}))
    ('fc1.weight', 'fc1.bias', 'fc2.weight', 'fc2.bias')
    """
    names = (
        w.variable
        for layer in find_layers(graph)
        for w in layer.arrays.values()
        if w.role == "latent"
    )
    return tuple(dict.fromkeys(names))


def is_large(bound: Bound) -> bool:
    """Whether the model is a network of more than 10 000 latent weights."""
    return _weights(bound) > _MANY


def draws_of(bound: Bound, n: int | None) -> int:
    """Number of draws: 1000 unless said, 30 of a large network."""
    if n is not None and (isinstance(n, bool) or not isinstance(n, Integral) or n < 1):
        raise DataError(f"n={n!r}: expected a whole number of draws, at least 1.")
    if n is not None:
        return n
    return _DRAWS_OF_NETWORKS if is_large(bound) else _DRAWS


def portions(bound: Bound, n: int) -> Portions:
    """How to take ``n`` draws of a model on its data."""
    weights, plate = _weights(bound), _plate(bound)
    if not weights or (plate is None and not is_large(bound)):
        return Portions((n,))
    count = 1 if plate is None else bound.size(plate)
    each = 1 if plate is None else _per_element(bound, plate)
    size = max(1, min(n, _NUMBERS // weights, _NUMBERS // (each * min(count, _ROWS))))
    draws = tuple(min(size, n - start) for start in range(0, n, size))
    rows = max(1, _NUMBERS // (size * each))
    if plate is None or rows >= count:
        return Portions(draws)
    parts = torch.arange(count).split(rows)
    return Portions(draws, plate, tuple(rows_within(bound, plate, part) for part in parts))


def _weights(bound: Bound) -> int:
    graph = bound.graph
    return sum(math.prod(bound.shape(graph.variables[n])) for n in layer_arrays(graph))


def _plate(bound: Bound) -> str | None:
    """The plate of the data, where its elements have nothing to do with each other and nothing unknown of their own."""
    graph = bound.graph
    found = data_plates(graph)
    if not found:
        return None
    plate = found[0]
    try:
        check_divisible(bound, plate, "predict")
    except UnsupportedError:
        return None
    own = [v for v in graph.role("latent", "param") if plate in graph.closure(v.plates)]
    return None if own else plate


def _per_element(bound: Bound, plate: str) -> int:
    """Numbers of one element in the largest array of one draw."""
    graph, size = bound.graph, bound.size(plate)
    largest = 1
    for node in graph.nodes:
        if plate in graph.closure(node.plates):
            elements = math.prod(bound.size(p) for p in node.plates)
            largest = max(largest, math.prod(node.event_shape) * elements // max(size, 1))
    return largest


__all__ = ["Portions", "draws_of", "is_large", "layer_arrays", "portions"]
