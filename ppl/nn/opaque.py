"""The function of a lifted module as a node: how it acts once its operands have plates and particles.

Axes that only the inputs have are flattened into the module's batch; those of weights go around it by ``vmap``, or in a
loop where the module does not allow that.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ppl.errors import UnsupportedError
from ppl.graph import Node
from ppl.lowered import Operand, joint_edges
from ppl.operations import mapped

if TYPE_CHECKING:
    from ppl.lower import Compiler


class Call(Protocol):
    """A module as a pure function."""

    batched: bool
    names: Sequence[str]  # of its weights

    def leaves(
        self, inputs: Sequence[Tensor], weights: Sequence[Tensor], buffers: Sequence[Tensor]
    ) -> tuple[list[Tensor], Any]: ...


class Opaque:
    """The function of a lifted module, recorded as one node; it brings its own rule for leading axes."""

    is_opaque = True  # methods that look inside functions refuse it, see ppl.backend

    def __init__(self, label: str, call: Call, axes: tuple[int, ...]) -> None:
        self.__name__, self.call, self.axes = label, call, axes

    def __repr__(self) -> str:
        return self.__name__

    def __call__(
        self, inputs: tuple[Any, ...], weights: tuple[Any, ...], buffers: tuple[Tensor, ...]
    ) -> Any:
        """The tensors that the module returns for one element."""
        tensors = (*inputs, *weights)
        if has_torch_function(tensors):
            return handle_torch_function(self, tensors, inputs, weights, buffers)
        if not self.call.batched:
            return _single(self.call.leaves(inputs, weights, buffers)[0])
        leaves, _ = self.call.leaves([x[None] for x in inputs], weights, buffers)
        return _single([x.squeeze(at) for x, at in zip(leaves, self.axes, strict=True)])

    def lower(self, c: Compiler, node: Node, operands: Sequence[Operand]) -> Operand | None:
        """The rule of :mod:`ppl.expressions` for this node; None leaves it to ``vmap``."""
        if not self.call.batched:
            return None
        parts = [[c.operand(a) for a in arg] for arg in node.args]
        inputs, fixed = parts[0], [*parts[1], *parts[2]]
        axes = c.joint_axes(operands, node.plates)
        outer = tuple(a for a in axes if any(a in c.lifted(p, axes).axes for p in fixed))
        batch = tuple(a for a in axes if a not in outer)
        order = (*outer, *batch)
        lifted = [c.lifted(p, order) for p in inputs] + [c.lifted(p, outer) for p in fixed]
        rows = [tuple(a for a in p.axes if a in batch) for p in lifted[: len(inputs)]]
        run = _Batch(self, len(inputs), len(parts[1]), batch, rows)
        has = [[a in p.axes for p in lifted] for a in outer]
        back = [order.index(a) for a in axes]
        whole = _Around(run, has, back, self)
        slot = c.emit(whole, *(p.slot for p in lifted))
        return Operand(slot, axes, len(node.event_shape), joint_edges(operands))


class _Batch:
    """The module over the axes that weights do not have: flattened into its batch, and back."""

    def __init__(
        self,
        own: Opaque,
        inputs: int,
        weights: int,
        batch: tuple[str, ...],
        rows: Sequence[tuple[str, ...]],
    ) -> None:
        self.own, self.inputs, self.weights = own, inputs, weights
        self.batch, self.rows = batch, rows

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, rest = tensors[: self.inputs], tensors[self.inputs :]
        sizes = self._sizes(inputs)
        flat = [self._flat(x, row, sizes) for x, row in zip(inputs, self.rows, strict=True)]
        weights, buffers = rest[: self.weights], rest[self.weights :]
        leaves, _ = self.own.call.leaves(flat, weights, buffers)
        made = [x.movedim(at, 0) for x, at in zip(leaves, self.own.axes, strict=True)]
        return tuple(x.reshape(*sizes, *x.shape[1:]) for x in made)

    def _sizes(self, inputs: Sequence[Tensor]) -> tuple[int, ...]:
        known = {
            a: x.shape[i]
            for x, row in zip(inputs, self.rows, strict=True)
            for i, a in enumerate(row)
        }
        return tuple(known[a] for a in self.batch)

    def _flat(self, x: Tensor, row: tuple[str, ...], sizes: tuple[int, ...]) -> Tensor:
        event = x.shape[len(row) :]
        index = tuple(slice(None) if a in row else None for a in self.batch)
        return x[index].expand(*sizes, *event).reshape(math.prod(sizes), *event)


class _Around:
    """A function of tensors under the axes of weights: by ``vmap`` where the module allows it, else in a loop."""

    def __init__(
        self,
        run: Callable[..., tuple[Tensor, ...]],
        has: Sequence[Sequence[bool]],
        back: Sequence[int],
        own: Opaque,
    ) -> None:
        self.run, self.has, self.back, self.own = run, has, back, own
        self.is_mapped = bool(has)

    def __call__(self, *tensors: Tensor) -> Any:
        found = self._found(tensors)
        order = self.back
        if order != sorted(order):
            found = tuple(x.permute(*order, *range(len(order), x.ndim)) for x in found)
        return _single(list(found))

    def _found(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if self.is_mapped:
            try:
                with warnings.catch_warnings():  # where torch loops by itself, it says so
                    warnings.filterwarnings("ignore", "There is a performance drop")
                    return mapped(self.run, self.has)(*tensors)  # type: ignore[no-any-return]
            except (RuntimeError, ValueError):  # a kernel without a rule for it, state, branches
                self.is_mapped = False
        try:
            return _looped(self.run, self.has)(*tensors)
        except RuntimeError as error:
            raise UnsupportedError(
                f"{self.own.__name__} failed on a batch of elements: {error}"
            ) from None


def _looped(
    run: Callable[..., tuple[Tensor, ...]], has: Sequence[Sequence[bool]]
) -> Callable[..., tuple[Tensor, ...]]:
    """``mapped`` without ``vmap``."""
    for row in reversed(has):
        run = _loop(run, row)
    return run


def _loop(
    run: Callable[..., tuple[Tensor, ...]], has: Sequence[bool]
) -> Callable[..., tuple[Tensor, ...]]:
    def looped(*tensors: Tensor) -> tuple[Tensor, ...]:
        size = next(x.shape[0] for x, h in zip(tensors, has, strict=True) if h)
        found = [
            run(*(x[i] if h else x for x, h in zip(tensors, has, strict=True))) for i in range(size)
        ]
        return tuple(torch.stack(parts) for parts in zip(*found, strict=True))

    return looped


def _single(leaves: list[Tensor]) -> Any:
    return leaves[0] if len(leaves) == 1 else tuple(leaves)


__all__ = ["Call", "Opaque"]
