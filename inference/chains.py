"""Log-sums over all paths of a Markov chain of particle indices, and joint draws of paths.

Shapes: ``first [*outer, S]`` is the log-factor of the first state, ``unary [*outer, T, S]`` one of
every state, ``step [*outer, T - 1, S, S]`` of a state given the one before it (previous, current).
Outer dimensions broadcast, so a factor that does not depend on one has length 1 there.

Source: forward filtering and backward sampling, [Bishop2006] section 13.2.2; the product of
transfer matrices in a tree is [Sarkka2021] section III.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl.inference.logspace import draw_categorical, log_matmul, log_sum, log_sum_product

_FEW_STATES = 5
_REDO_ELEMENTS = 1 << 22  # entries gathered at a time when underflown sums are redone
_BLOCK_ELEMENTS = 1 << 16  # entries of the matrices that a scan exponentiates at a time
_KEPT_ELEMENTS = 1 << 20  # entries of matrices that are kept for the backward pass
_SUMMED_LATER = (
    1 << 13
)  # entries of a message up to which gradients of all times are summed at once
_PRODUCT_ELEMENTS = 100_000  # joint entries above which a scan step is a matrix product


def filtered(first: Tensor, unary: Tensor, step: Tensor | None) -> list[Tensor]:
    """Forward messages: log of the sum over earlier states, for each t a tensor ``[*outer, S]``."""
    units = unary.unbind(-2)
    messages = [first + units[0]]
    if step is None:
        return messages
    for move, unit in zip(step.unbind(-3), units[1:], strict=True):
        messages.append(_advance(messages[-1], move) + unit)
    return messages


def _advance(message: Tensor, move: Tensor) -> Tensor:
    states = move.shape[-1]
    shared = move.numel() == states * states  # the same transition for every outer element
    if shared and message.numel() * states > _PRODUCT_ELEMENTS:
        flat = log_matmul(message.reshape(-1, states), move.reshape(states, states))
        return flat.reshape(message.shape)
    return log_sum_product(message.unsqueeze(-1), move, (-2,))


def scan(
    first: Tensor, units: Sequence[Tensor], step: Tensor | None, leave: Tensor | None = None
) -> Tensor:
    """Log of the sum over all paths, ``[*outer]``, by T - 1 vector-matrix products.

    Args:
        first: ``[*outer, S]``.
        units: log-factors of every state, ``[*outer, T, S]`` each; they add up.
        step: ``[*outer, T - 1, S, S]``; outer dimensions of length 1 share one matrix. None for T = 1.
        leave: ``[*outer, T - 1, S]``, log-factors of the state before.

    >>> scan(torch.zeros(2), [torch.zeros(3, 2)], torch.zeros(2, 2, 2)).exp()  # 2 ** 3 paths
    tensor(8.)
    """
    if step is None:
        return log_sum(first + sum(u[..., 0, :] for u in units), (-1,))
    if step.requires_grad:
        return log_sum(
            filtered(first, sum(units[1:], units[0]), with_leave(step, leave))[-1], (-1,)
        )
    outer = torch.broadcast_shapes(
        first.shape[:-1], *(u.shape[:-2] for u in units), step.shape[:-3]
    )
    if leave is not None:
        outer = torch.broadcast_shapes(outer, leave.shape[:-2])
    n, length = len(outer), max(u.shape[-2] for u in units)
    step = step[(None,) * (n + 3 - step.ndim)]
    step = step.expand(*step.shape[:-3], length - 1, *step.shape[-2:])
    shared = [d for d in range(n) if step.shape[d] == 1 and outer[d] > 1]
    own = [d for d in range(n) if d not in shared]
    # Few states stand in front, where sums over them run along contiguous memory; many stand last, for matrix products.
    front = step.shape[-1] <= _FEW_STATES
    # The last dimension is one along which the matrices vary, or one of which all rows meet the same matrix.
    order = [*shared, *own] if front else [*own, *shared]
    units = _few(units, shared, n)
    units = [u.expand(*u.shape[:-2], length, u.shape[-1]) for u in units]
    vectors = [first.unsqueeze(-2), *units, *([] if leave is None else [leave])]
    placed = [
        v[(None,) * (n + 2 - v.ndim)].permute(
            *((n, n + 1, *order) if front else (n, *order, n + 1))
        )
        for v in vectors
    ]
    at = (n, n + 1, n + 2)
    moves = step.permute(*((*at, *order) if front else (n, *order, n + 1, n + 2)))
    if front:  # results of pointwise functions keep the strides of their arguments
        placed, moves = [v.contiguous() for v in placed], moves.contiguous()
    spread = tuple(outer[d] for d in order)
    last = _Scan.apply(moves, len(own), spread, front, leave is not None, *placed)
    total = log_sum(last, (0 if front else n,))
    return total.permute([order.index(d) for d in range(n)])


def _few(units: Sequence[Tensor], shared: Sequence[int], n: int) -> list[Tensor]:
    """Log-factors added up: the small ones, which are constant along the ``shared`` dimensions, and the others."""
    small: list[Tensor] = []
    large: list[Tensor] = []
    for u in units:
        full = u[(None,) * (n + 2 - u.ndim)]
        (small if all(full.shape[d] == 1 for d in shared) else large).append(full)
    groups = [sorted(g, key=torch.Tensor.numel) for g in (small, large) if g]
    return [sum(g[1:], g[0]) for g in groups]


def with_leave(step: Tensor | None, leave: Tensor | None) -> Tensor | None:
    """Transitions with the factors of the state before in them."""
    return step if step is None or leave is None else step + leave.unsqueeze(-1)


class _Scan(torch.autograd.Function):
    """The last forward message, with the backward pass of the forward-backward algorithm.

    Matrices are exponentiated with each column shifted by its maximum, messages by theirs. Entries that may have lost
    terms to underflow are redone by plain log-sum-exp, in both passes. No gradient in the matrices.

    Shapes: with ``front``, vectors are ``[T, S, *outer]`` and matrices ``[T - 1, S, S, *outer]``; without,
    ``[T, *outer, S]`` and ``[T - 1, *outer, S, S]``. Matrices have length 1 in the outer dimensions that share one; without
    ``front`` those from ``own`` on.
    """

    @staticmethod
    def forward(
        ctx: Any,
        moves: Tensor,
        own: int,
        outer: tuple[int, ...],
        front: bool,
        leaves: bool,
        *vectors: Tensor,
    ) -> Tensor:
        first, *units = vectors
        leave = units.pop() if leaves else None
        dim = 0 if front else -1
        ctx.product = product = _Product(own, outer, front)
        message = first[0]
        for u in units:
            message = message + u[0]
        message = message.expand(product.shape(moves.shape[1] if front else moves.shape[-1]))
        info = torch.finfo(moves.dtype)
        least = moves.shape[1 if front else -1] * info.tiny / info.eps
        ctx.blocks = blocks = _Blocks(moves, front, message.numel())
        ctx.kept, ctx.leaves = [], leaves
        for start, stop in blocks.bounds:
            matrices, columns = blocks.exponentials(start, stop)
            added = [u[start + 1 : stop + 1] for u in units]
            unit = sum(added[1:], added[0])
            several = matrices.unbind(), columns.squeeze(1 if front else -2).unbind(), unit.unbind()
            for t, matrix, column, own_unit in zip(range(start, stop), *several, strict=True):
                if leave is not None:
                    message = message + leave[t]
                top = message.amax(dim, keepdim=True).clamp_(min=info.min)
                shares = (message - top).exp_()
                totals = product.forward(shares, matrix)
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
        needs = ctx.needs_input_grad[5:]
        found = [_Collector(shape, need) for shape, need in zip(ctx.shapes, needs, strict=True)]
        units = found[1:-1] if ctx.leaves else found[1:]
        tiny = torch.finfo(grad.dtype).tiny
        for start, stop in reversed(ctx.blocks.bounds):
            matrices, _ = ctx.blocks.exponentials(start, stop)
            for matrix in reversed(matrices.unbind()):
                for unit in units:
                    unit.add(grad)
                shares, totals, redone = ctx.kept.pop()
                ratio = grad / totals.clamp_(min=tiny)  # zero only where nothing can get to
                before = ctx.product.backward(ratio, matrix).mul_(shares)
                if redone is not None:
                    _put_back(ctx.product.by_state(before), redone, grad)
                grad = before
                if ctx.leaves:
                    found[-1].add(grad)
        for unit in units:
            unit.add(grad)
        found[0].add(grad)
        return (None, None, None, None, None, *(f.result() for f in found))


def _put_back(place: Tensor, redone: _Redone, grad: Tensor) -> None:
    """Add what entries summed the plain way send back, to ``place [*outer, S]``."""
    spread = grad[redone.where].unsqueeze(-1) * redone.weights
    if redone.at:
        place.index_put_(redone.at, spread, accumulate=True)
    else:
        place += spread.sum(0)


class _Blocks:
    """Matrices ``[T - 1, ...]`` exponentiated with each column shifted by its maximum, as many at a time as fit in the cache
    (with messages of ``message`` entries).

    Few in all are kept for the backward pass.
    """

    def __init__(self, moves: Tensor, front: bool, message: int) -> None:
        self.moves, self.before = moves, 1 if front else -2
        self.keep = moves.numel() <= _KEPT_ELEMENTS
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
        made = (some - columns).exp_(), columns
        if self.keep:
            self.made[start] = made
        return made


class _Product:
    """Messages times matrices, with the states in front or last."""

    def __init__(self, own: int, outer: tuple[int, ...], front: bool) -> None:
        self.own, self.outer, self.front = own, outer, front
        self.rows = math.prod(outer[own:])

    def shape(self, states: int) -> tuple[int, ...]:
        """Of a message."""
        return (states, *self.outer) if self.front else (*self.outer, states)

    def forward(self, shares: Tensor, matrix: Tensor) -> Tensor:
        """Over the states before."""
        if self.front:
            return (shares.unsqueeze(1) * matrix).sum(0)
        return self._matmul(shares, matrix)

    def backward(self, ratio: Tensor, matrix: Tensor) -> Tensor:
        """Over the present states."""
        if self.front:
            return (ratio.unsqueeze(0) * matrix).sum(1)
        return self._matmul(ratio, matrix.mT)

    def _matmul(self, x: Tensor, matrix: Tensor) -> Tensor:
        batch, states = self.outer[: self.own], x.shape[-1]
        matrix = matrix.reshape(*batch, *matrix.shape[-2:])
        return (x.reshape(*batch, self.rows, states) @ matrix).reshape(x.shape)

    def by_state(self, message: Tensor) -> Tensor:
        """``[*outer, S]``, a view."""
        return message.movedim(0, -1) if self.front else message

    def by_states(self, move: Tensor) -> Tensor:
        """``[*outer, present, before]``, a view."""
        return move.movedim((0, 1), (-1, -2)) if self.front else move.mT


class _Collector:
    """Gradients of one vector ``[T, ...]``, summed over what it was broadcast along, from the last time to the first."""

    def __init__(self, shape: torch.Size, is_needed: bool) -> None:
        self.shape, self.is_needed = shape, is_needed
        self.parts: list[Tensor] = []

    def add(self, grad: Tensor) -> None:
        if self.is_needed:
            self.parts.append(self._summed(grad, 0) if grad.numel() > _SUMMED_LATER else grad)

    def _summed(self, grad: Tensor, lead: int) -> Tensor:
        shape = grad.shape[lead:]
        dims = [d + lead for d, n in enumerate(self.shape[1:]) if n == 1 and shape[d] > 1]
        return grad.sum(dims, keepdim=True) if dims else grad

    def result(self) -> Tensor | None:
        if not self.is_needed:
            return None
        return self._summed(torch.stack(self.parts[::-1]), 1).sum_to_size(self.shape)


class _Redone(NamedTuple):
    """Entries of a message that were summed the plain way."""

    where: tuple[Tensor, ...]  # in the message
    at: tuple[Tensor, ...]  # their outer indices
    log: Tensor
    weights: Tensor  # of the states before, [entries, S]


def _lost(
    totals: Tensor, least: float, message: Tensor, move: Tensor, product: _Product
) -> _Redone:
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


def tree(first: Tensor, unary: Tensor, step: Tensor | None) -> Tensor:
    """Log of the sum over all paths, ``[*outer]``, by matrix products in a tree of depth log2 T.

    >>> tree(torch.zeros(2), torch.zeros(3, 2), torch.zeros(2, 2, 2)).exp()
    tensor(8.)
    """
    start = first + unary[..., 0, :]
    if step is None or not step.shape[-3]:
        return log_sum(start, (-1,))
    moves = step + unary[..., 1:, None, :]
    while (count := moves.shape[-3]) > 1:
        paired = log_matmul(moves[..., 0 : count - 1 : 2, :, :], moves[..., 1:count:2, :, :])
        moves = torch.cat([paired, moves[..., count - 1 :, :, :]], -3) if count % 2 else paired
    return log_sum(log_matmul(start.unsqueeze(-2), moves[..., 0, :, :]).squeeze(-2), (-1,))


def draw_backward(
    messages: list[Tensor],
    into: Callable[[int, Tensor], Tensor],
    n: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Draw whole paths: the last state from its message, then each state given the one after it.

    Args:
        messages: of ``filtered`` with outer axes indexed away, T tensors ``[1 or n, *plates, S]``.
        into: ``into(t, state)`` gives the log-factor ``[n, *plates, S]`` of the state at t - 1
            given the drawn ``state [n, *plates]`` at t.
        n: number of paths.
        generator: source of randomness.

    Returns:
        Long ``[n, *plates, T]``.
    """
    path = [draw_categorical(messages[-1], n, generator)]
    for t in range(len(messages) - 1, 0, -1):
        path.append(draw_categorical(messages[t - 1] + into(t, path[-1]), n, generator))
    return torch.stack(path[::-1], -1)
