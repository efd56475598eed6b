"""Lowered expressions of rows, as functions of the values of slots and of params."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ppl.lower import Lowered


@dataclass(frozen=True, eq=False)
class View:
    """How an expression reads the values of a slot."""

    name: str  # input of the lowered function
    slot: int
    sizes: tuple[int, ...]  # of the axes behind the rows


@dataclass(frozen=True, eq=False)
class Read:
    """How an expression reads a param: whole, or at an index over its elements."""

    name: str  # input of the lowered function
    param: str
    index: Tensor | None
    event_ndim: int


@dataclass(frozen=True, eq=False)
class Expression:
    """A function of the values of slots and of params; results are ``[F, *event]`` or ``[1, *event]``."""

    lowered: Lowered
    views: tuple[View, ...]
    reads: tuple[Read, ...]
    rows: int

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the params that it reads."""
        return tuple(dict.fromkeys(r.param for r in self.reads))

    def __call__(self, values: Sequence[Tensor], params: Mapping[str, Tensor]) -> list[Tensor]:
        arrays: dict[str, Tensor] = {}
        for view in self.views:
            value = values[view.slot]
            arrays[view.name] = value.reshape(self.rows, *view.sizes, *value.shape[2:])
        for read in self.reads:
            arrays[read.name] = _read(read, params[read.param])
        return self.lowered(arrays)


def _read(read: Read, value: Tensor) -> Tensor:
    if read.index is None:
        return value
    return value.reshape(-1, *value.shape[value.ndim - read.event_ndim :])[read.index]


__all__ = ["Expression", "Read", "View"]
