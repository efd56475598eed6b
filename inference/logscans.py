"""A scan over a Markov chain by logarithms, and what scans share.

Shapes: with the states in front, vectors are ``[T, S, *outer]`` and matrices ``[T - 1, S, S, *outer]``; without,
``[T, *outer, S]`` and ``[T - 1, *outer, S, S]``. Matrices have length 1 in the outer dimensions that share one; without
states in front those come last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl.inference.logspace import exp_of_shifted, log_sum

_REDO_ELEMENTS = 1 << 22  # entries gathered at a time when underflown sums are redone
_BLOCK_ELEMENTS = 1 << 16  # entries of the matrices that a scan exponentiates at a time
_KEPT_ELEMENTS = (
    1 << 20
)  # entries of matrices that are kept for the backward pass, or as many as messages have
_SUMMED_LATER = (
    1 << 13
)  # entries of a message up to which gradients of all times are summed at once


class LogScan(torch.autograd.Function):
    """The last forward message, with the backward pass of the forward-backward algorithm.

    Matrices are exponentiated with each column shifted by its maximum, messages by theirs. Entries that may have lost
    terms to underflow are redone by plain log-sum-exp, in both passes. No gradient in the matrices.
    """

    @staticmethod
    def forward(
        ctx: Any,
        moves: Tensor,
        product: Product,
        leaves: bool,
        *vectors: Tensor,
    ) -> Tensor:
        first, *units = vectors
        leave = units.pop() if leaves else None
        front, dim = product.front, product.dim
        ctx.product = product
        message = first[0]
        for u in units:
            message = message + u[0]
        message = message.expand(product.shape(moves.shape[1] if front else moves.shape[-1]))
        info = torch.finfo(moves.dtype)
        least = moves.shape[1 if front else -1] * info.tiny / info.eps
        ctx.blocks = blocks = Blocks(moves, product)
        ctx.kept, ctx.leaves = [], leaves
        for start, stop in blocks.bounds:
            matrices, columns = blocks.exponentials(start, stop)
            added = [u[start + 1 : stop + 1] for u in units]
            unit = sum(added[1:], added[0])
            several = (
                product.rights(matrices),
                columns.squeeze(blocks.before).unbind(),
                unit.unbind(),
            )
            for t, matrix, column, own_unit in zip(range(start, stop), *several, strict=True):
                if leave is not None:
                    message = message + leave[t]
                top = message.amax(dim, keepdim=True).clamp_(min=info.min)
                shares = exp_of_shifted(message - top)
                totals = torch.empty_like(shares)
                product.forward(
                    product.lefts(shares.unsqueeze(0))[0],
                    matrix,
                    product.outs(totals.unsqueeze(0))[0],
                )
                new = totals.log().add_(top).add_(column)
                redone = None
                if totals.min() < least:
                    redone = _lost(totals, least, message, moves[t], product)
                    new = new.index_put(redone.where, redone.log)
                    totals = totals.index_put(redone.where, torch.full_like(redone.log, torch.inf))
                ctx.kept.append((shares, totals, redone))
                message = new.add_(own_unit)
        ctx.shapes = [v.shape for v in vectors]
        return message

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[3:]
        found = [Collector(shape, need) for shape, need in zip(ctx.shapes, needs, strict=True)]
        units = found[1:-1] if ctx.leaves else found[1:]
        tiny = torch.finfo(grad.dtype).tiny
        for start, stop in reversed(ctx.blocks.bounds):
            matrices, _ = ctx.blocks.exponentials(start, stop)
            for matrix in reversed(ctx.product.rights(matrices)):
                for unit in units:
                    unit.add(grad)
                shares, totals, redone = ctx.kept.pop()
                ratio = grad / totals.clamp_(min=tiny)  # zero only where nothing can get to
                before = ctx.product.backward(ratio, matrix, torch.empty_like(ratio)).mul_(shares)
                if redone is not None:
                    _put_back(ctx.product.by_state(before), redone, grad)
                grad = before
                if ctx.leaves:
                    found[-1].add(grad)
        for unit in units:
            unit.add(grad)
        found[0].add(grad)
        return (None, None, None, *(f.result() for f in found))


def _put_back(place: Tensor, redone: _Redone, grad: Tensor) -> None:
    """Add what entries summed the plain way send back, to ``place [*outer, S]``."""
    spread = grad[redone.where].unsqueeze(-1) * redone.weights
    if redone.at:
        place.index_put_(redone.at, spread, accumulate=True)
    else:
        place += spread.sum(0)


class Blocks:
    """Matrices ``[T - 1, ...]`` exponentiated with each column shifted by its maximum, as many at a time as fit in the cache.

    Where they are few in all, or no more than the messages, they are kept for the backward pass.
    """

    def __init__(self, moves: Tensor, product: Product) -> None:
        self.moves, self.before = moves, 1 if product.front else -2
        message = math.prod(product.shape(moves.shape[self.before]))
        self.keep = moves.numel() <= max(_KEPT_ELEMENTS, len(moves) * message)
        size = max(1, _BLOCK_ELEMENTS // max(moves[0].numel(), message))
        ends = [*range(0, len(moves), size), len(moves)]
        self.bounds = list(pairwise(ends))
        self.made: dict[int, tuple[Tensor, Tensor]] = {}

    def exponentials(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Those of some times, and the shifts."""
        if start in self.made:
            return self.made[start]
        some = self.moves[start:stop]
        columns = some.amax(self.before, keepdim=True).clamp_(min=torch.finfo(some.dtype).min)
        made = exp_of_shifted(some - columns), columns
        if self.keep:
            self.made[start] = made
        return made


class Product:
    """Messages times matrices.

    Args:
        own: outer dimensions in front along which matrices vary, where states are last.
        outer: sizes.
        front: whether states are in front.
    """

    def __init__(self, own: int, outer: tuple[int, ...], front: bool) -> None:
        self.own, self.outer, self.front = own, outer, front
        self.cells, self.rows = math.prod(outer[:own]), math.prod(outer[own:])
        self.dim = 0 if front else -1  # of the states of a message

    def shape(self, states: int) -> tuple[int, ...]:
        """Of a message."""
        return (states, *self.outer) if self.front else (*self.outer, states)

    def lefts(self, shares: Tensor) -> Sequence[Tensor]:
        """Views of messages ``[times, *message]``, time by time, for :meth:`forward`."""
        return (shares.unsqueeze(2) if self.front else self._flat(shares)).unbind()

    def rights(self, matrices: Tensor) -> Sequence[Tensor]:
        """The same of matrices."""
        if self.front:
            return matrices.unbind()
        return matrices.reshape(-1, self.cells, *matrices.shape[-2:]).unbind()

    def outs(self, totals: Tensor) -> Sequence[Tensor]:
        """The same of memory for results."""
        return (totals if self.front else self._flat(totals)).unbind()

    def forward(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Over the states before."""
        if self.front:
            torch.sum(left * right, 0, out=out)
        else:
            torch.bmm(left, right, out=out)

    def backward(self, ratio: Tensor, right: Tensor, out: Tensor) -> Tensor:
        """Over the present states."""
        if self.front:
            return torch.sum(ratio * right, 1, out=out)
        shape = self.cells, self.rows, ratio.shape[-1]
        torch.bmm(ratio.reshape(shape), right.mT, out=out.view(shape))
        return out

    def _flat(self, messages: Tensor) -> Tensor:
        return messages.reshape(-1, self.cells, self.rows, messages.shape[-1])

    def index(self, at: tuple[Tensor, ...], x: Tensor) -> tuple[Any, ...]:
        """Where some outer elements stand in a message, or in messages with other dimensions before them."""
        lead = x.ndim - len(self.outer) - (not self.front)
        return (*(slice(None),) * lead, *at)

    def by_state(self, message: Tensor) -> Tensor:
        """``[*outer, S]``, a view."""
        return message.movedim(0, -1) if self.front else message

    def by_states(self, move: Tensor) -> Tensor:
        """``[*outer, present, before]``, a view."""
        return move.movedim((0, 1), (-1, -2)) if self.front else move.mT


class Collector:
    """Gradients of one vector ``[T, ...]``, summed over what it was broadcast along, from the last times to the first."""

    def __init__(self, shape: torch.Size, is_needed: bool) -> None:
        self.shape, self.is_needed = shape, is_needed
        self.parts: list[Tensor] = []

    def add(self, grad: Tensor) -> None:
        """The gradient at one time, or at several ``[times, ...]`` in their order."""
        if self.is_needed:
            grad = grad.unsqueeze(0) if grad.ndim < len(self.shape) else grad
            later = len(grad) == 1 and grad.numel() <= _SUMMED_LATER
            self.parts.append(grad if later else self._summed(grad))

    def _summed(self, grad: Tensor) -> Tensor:
        sizes = zip(self.shape[1:], grad.shape[1:], strict=True)
        dims = [d + 1 for d, (n, m) in enumerate(sizes) if n == 1 and m > 1]
        return grad.sum(dims, keepdim=True) if dims else grad

    def result(self) -> Tensor | None:
        if not self.is_needed:
            return None
        parts = self.parts[::-1]
        if (
            len({p.shape[1:] for p in parts}) > 1
        ):  # of some times, or of one, which waits to be summed
            parts = [self._summed(p) for p in parts]
        return self._summed(torch.cat(parts)).sum_to_size(self.shape)


class _Redone(NamedTuple):
    """Entries of a message that were summed the plain way."""

    where: tuple[Tensor, ...]  # in the message
    at: tuple[Tensor, ...]  # their outer indices
    log: Tensor
    weights: Tensor  # of the states before, [entries, S]


def _lost(totals: Tensor, least: float, message: Tensor, move: Tensor, product: Product) -> _Redone:
    """Redo the entries below ``least``."""
    by_state, matrices = product.by_state(message), product.by_states(move)
    entries = product.by_state(totals < least).nonzero()
    logs, weights = [], []
    for part in entries.split(max(1, _REDO_ELEMENTS // by_state.shape[-1])):
        *index, state = part.unbind(-1)
        own = [
            i if n > 1 else torch.zeros_like(i) for i, n in zip(index, matrices.shape, strict=False)
        ]
        joint = by_state[tuple(index)] + matrices[(*own, state)]
        logs.append(log_sum(joint, (-1,)))
        safe = logs[-1].masked_fill(logs[-1] == -torch.inf, 0.0)
        weights.append((joint - safe.unsqueeze(-1)).exp_())
    *index, state = entries.unbind(-1)
    where = (state, *index) if product.front else (*index, state)
    return _Redone(where, tuple(index), torch.cat(logs), torch.cat(weights))
