"""Mini-batches: a plate dealt into parts once, and the part that each step works on.

The parts are fixed for a run, so that a backend may keep something for each of them; every epoch visits all parts in a
new order. Both follow from the seed and the number of the step alone, so that a run can be continued anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.errors import DataError, ModelError, UnsupportedError, nearest
from ppl.streams import Streams


class Batch(NamedTuple):
    """The elements that one step works on.

    ``scale`` makes a sum over the batch an unbiased estimate of the sum over the plate: the number of parts, since each
    part is as likely as any other, whatever its size.
    """

    plate: str
    rows: Mapping[
        str, Tensor
    ]  # the plate and those within it -> their elements in this part, long, ascending
    scale: float
    part: int  # which one
    parts: int


class Batches:
    """All parts of a plate; ``at(t)`` is the one of step ``t`` = 0, 1, ...

    >>> from ppl import Normal, latent, model, plate
    >>> @model
    ... def groups():
    ...     with plate("group", 5):
    ...         latent("level", Normal(0.0, 1.0))
    >>> batches = Batches(groups.bind({}), "group", 2, Streams(0))
    >>> sorted(len(batches.at(t).rows["group"]) for t in range(batches.parts))
    [1, 2, 2]
    """

    def __init__(self, bound: Bound, plate: str, size: int, streams: Streams) -> None:
        self.plate, self.bound = plate, bound
        self.parts = math.ceil(bound.size(plate) / size)
        self._seed = streams.child(f"minibatch {plate}").seed
        order = self._shuffled(bound.size(plate), "parts")
        # Every parts-th element of the shuffled plate: sizes differ by at most one.
        self._rows = [order[i :: self.parts].sort().values for i in range(self.parts)]
        self._made: dict[int, Batch] = {}

    def part(self, number: int) -> Batch:
        """One of the parts."""
        if number not in self._made:
            if len(self._made) > 4096:
                self._made.clear()
            rows = rows_within(self.bound, self.plate, self._rows[number])
            self._made[number] = Batch(self.plate, rows, float(self.parts), number, self.parts)
        return self._made[number]

    def at(self, step: int) -> Batch:
        """The part of this step."""
        epoch, place = divmod(step, self.parts)
        return self.part(int(self._shuffled(self.parts, f"epoch {epoch}")[place]))

    def _shuffled(self, n: int, name: str) -> Tensor:
        return torch.randperm(n, generator=Streams(self._seed).of(name))


def rows_within(bound: Bound, plate: str, rows: Tensor) -> dict[str, Tensor]:
    """These elements of a plate and, of every plate within it, the elements that lie in them."""
    found = {plate: rows}
    chosen = torch.zeros(bound.size(plate), dtype=torch.bool)
    chosen[rows] = True
    for child in bound.graph.plates:
        if plate in bound.graph.ancestors(child):
            inside = chosen.to(bound.device)[bound.maps[child, plate]]
            found[child] = inside.nonzero().squeeze(-1).cpu()
    return found


def batches_of(
    bound: Bound, minibatch: Mapping[str, int] | None, streams: Streams
) -> Batches | None:
    """The parts that ``infer(..., minibatch=...)`` asks for; None where it asks for none.

    Raises:
        ModelError: not one whole number for one plate.
        DataError: the plate is not there, or smaller than the batch.
        UnsupportedError: the plate cannot be divided.
    """
    if minibatch is None:
        return None
    if not isinstance(minibatch, Mapping) or len(minibatch) != 1:
        raise ModelError(
            f"minibatch: expected one plate and a number, such as {{'user': 1000}}, got {minibatch!r}."
        )
    ((plate, size),) = minibatch.items()
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ModelError(
            f"minibatch={{'{plate}': {size!r}}}: expected a whole number of at least 1."
        )
    check_divisible(bound, plate, "minibatch")
    if size > bound.size(plate):
        raise DataError(
            f"minibatch={{'{plate}': {size}}}: plate '{plate}' has {bound.size(plate)} elements only. "
            "Take fewer, or leave minibatch= out."
        )
    return Batches(bound, plate, size, streams)


def check_divisible(bound: Bound, plate: str, option: str) -> None:
    """Refuse a plate whose elements cannot be worked on part by part.

    Raises:
        DataError: there is no such plate.
        UnsupportedError: it is ordered, lies within another, or something reads across it.
    """
    graph = bound.graph
    if plate not in graph.plates:
        raise DataError(
            f"{option} names plate '{plate}', which the model does not have.{nearest(plate, graph.plates)} "
            f"Plates: {', '.join(graph.plates) or 'none'}."
        )
    within = [p for p in graph.plates if plate == p or plate in graph.ancestors(p)]
    if graph.plates[plate].parents:
        top = ", ".join(p for p in graph.ancestors(plate) if not graph.plates[p].parents)
        raise UnsupportedError(
            f"{option}: plate '{plate}' lies within another. Divide the outer one: '{top}'."
        )
    ordered = [p for p in within if graph.plates[p].ordered]
    if ordered:
        raise UnsupportedError(
            f"{option}: the elements of plate '{ordered[0]}' are ordered, each depends on the one before, so they cannot "
            f"be taken in parts. Divide another plate, or leave {option} out."
        )
    crossing = _crossings(bound, plate, within)
    if crossing:
        raise UnsupportedError(
            f"{option}: {crossing} plate '{plate}', so its elements are not independent given the rest. Put what belongs "
            f"to one element into a plate within it (plate(..., within={plate})), or leave {option} out."
        )


def _crossings(bound: Bound, plate: str, within: list[str]) -> str:
    """What reads across the plate, in words; empty if nothing does."""
    for node in bound.graph.nodes:
        along = node.name.split(",") if node.op == "collect" else [node.name]
        if node.op in ("reduce", "dot", "collect") and plate in along:
            return f"a {node.op} runs over"
        if node.op in ("gather", "pick", "shift") and set(along) & set(within):
            return f"an index picks elements of '{along[0]}' across"
    for variable in bound.graph.variables.values():
        if variable.index_of in within:
            return f"'{variable.name}' points into"
    return ""
