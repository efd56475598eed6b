"""Log-sums over all paths of a Markov chain by a scan, with the backward pass of the forward-backward algorithm.

Messages are ordinary numbers whose largest is one at every time: a step is a product with matrices, without a logarithm.
Chains that lose a number to underflow are summed again by their logarithms, which few of them need.

Shapes are those of :mod:`ppl.inference.chains`. No gradient in the matrices.

Source: forward-backward with scaling factors, [Bishop2006] section 13.2.4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl.inference.chains import filtered, tree, with_leave
from ppl.inference.logscans import Blocks, Collector, LogScan, Product
from ppl.inference.logspace import exp_of_shifted, log_sum
from ppl.shapes import broadcast_shapes

_FEW_STATES = 5
_MOST_LOST = 0.125  # share of chains up to which those that lost a number are summed again alone
_TREE_ENTRIES = 1 << 9  # entries of their transitions up to which that is done in a tree


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
    outer = broadcast_shapes(first.shape[:-1], *(u.shape[:-2] for u in units), step.shape[:-3])
    if leave is not None:
        outer = broadcast_shapes(outer, leave.shape[:-2])
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
    product = Product(len(own), tuple(outer[d] for d in order), front)
    total = _Scan.apply(moves.contiguous() if front else moves, product, leave is not None, *placed)
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


class _Vectors(NamedTuple):
    """Log-factors of the states, ``[T, S, *outer]`` or ``[T, *outer, S]``."""

    first: Tensor
    units: list[Tensor]
    leave: Tensor | None  # one time less

    def of_first(self) -> Tensor:
        """All that is said of the first state."""
        parts = [self.first[0], *(u[0] for u in self.units)]
        parts += [] if self.leave is None or not len(self.leave) else [self.leave[0]]
        return sum(parts[1:], parts[0])

    def of(self, start: int, stop: int, columns: Tensor, into: Tensor) -> Tensor:
        """All that is said of the states after these moves, with the shifts of the moves, in new memory."""
        *parts, last = [columns, *(u[start + 1 : stop + 1] for u in self.units)]
        torch.add(sum(parts[1:], parts[0]), last.expand_as(into), out=into)
        if self.leave is not None:
            leave = self.leave[start + 1 : stop + 1]
            into[: len(leave)].add_(leave)
        return into


class _Block(NamedTuple):
    """Some times of a forward pass, ``[times, *message]``."""

    start: int
    stop: int
    shares: Tensor  # messages; the largest of each is one
    rates: Tensor  # what the products with the matrices were multiplied by to make them


class _Messages(NamedTuple):
    """What the backward pass needs of a forward pass."""

    first: Tensor  # share of the first state
    blocks: list[_Block]


def _forward(
    made: Blocks, product: Product, vectors: _Vectors
) -> tuple[_Messages, Tensor, Tensor | None]:
    """Messages, the log-sum ``[*outer]``, and the chains ``[*outer]`` of which numbers were lost, if any."""
    states = made.moves.shape[1 if product.front else -1]
    dim, info = product.dim, torch.finfo(made.moves.dtype)
    least, behind = states * info.tiny / info.eps, dim + product.front
    held = vectors.of_first().expand(product.shape(states))
    logs = held.amax(dim, keepdim=True).clamp(min=info.min)
    share = first = exp_of_shifted(held - logs)
    blocks, lost = [], None
    for start, stop in made.bounds:
        matrices, columns = made.exponentials(start, stop)
        shape = (stop - start, *product.shape(states))
        shares, totals, rates = (share.new_empty(shape) for _ in range(3))
        vectors.of(start, stop, columns.squeeze(made.before), rates)
        tops = rates.amax(behind, keepdim=True).clamp_(min=info.min)
        exp_of_shifted(rates.sub_(tops))
        peaks = torch.empty_like(tops)
        befores, laters, news = (
            product.lefts(shares),
            product.rights(matrices),
            product.outs(totals),
        )
        before = product.lefts(share.unsqueeze(0))[0]
        rows = (x.unbind() for x in (totals, rates, shares, peaks))
        for i, (total, rate, share, peak) in enumerate(zip(*rows, strict=True)):
            product.forward(before, laters[i], news[i])
            torch.mul(total, rate, out=share)
            torch.amax(share, dim, keepdim=True, out=peak)
            share.div_(peak)
            before = befores[i]
        if not (bool(totals.min() >= least) and bool(peaks.min() > 0)):  # NaN counts as lost
            fine = (totals.amin(behind) >= least) & (peaks.squeeze(behind) > 0)
            new = fine.all(0).logical_not_()
            lost = new if lost is None else lost.logical_or_(new)
        blocks.append(_Block(start, stop, shares, rates.div_(peaks)))
        logs = logs + tops.add_(peaks.log_()).sum(0)
    log = (logs + share.sum(dim, keepdim=True).log_()).squeeze(dim)
    return _Messages(first, blocks), log, lost


class _Again(NamedTuple):
    """Chains summed by their logarithms."""

    at: tuple[Tensor, ...]  # their outer indices
    unary: Tensor  # [n, T, S], what their log-sums are to be differentiated by
    log: Tensor  # [n]


def _again(moves: Tensor, product: Product, vectors: _Vectors, lost: Tensor) -> _Again:
    at = lost.nonzero().unbind(-1)

    def picked(x: Tensor, behind: int) -> Tensor:
        """``[n, times, ...]`` with ``behind`` dimensions of states."""
        sizes = x.shape[1 + behind :] if product.front else x.shape[1 : x.ndim - behind]
        index = [i if n > 1 else torch.zeros_like(i) for i, n in zip(at, sizes, strict=True)]
        every: list[Any] = [slice(None)] * (1 + behind if product.front else 1)
        x = x[(*every, *index)]  # [T, ..., n] or [T, n, ...]
        return x.movedim(-1 if product.front else 1, 0)

    unary = sum(picked(u, 1) for u in vectors.units)
    assert isinstance(unary, Tensor)
    unary[:, 0] += picked(vectors.first, 1)[:, 0]
    if vectors.leave is not None:
        unary[:, :-1] += picked(vectors.leave, 1)
    step = picked(moves, 2)
    with torch.enable_grad():
        unary.requires_grad_()
        zero = unary.new_zeros(())
        if step[:, 0].numel() <= _TREE_ENTRIES:
            return _Again(at, unary, tree(zero, unary, step))
        return _Again(at, unary, log_sum(filtered(zero, unary, step)[-1], (-1,)))


class _Scan(torch.autograd.Function):
    """Log of the sum over all paths ``[*outer]``.

    Shapes: with the states in front, vectors are ``[T, S, *outer]`` and matrices ``[T - 1, S, S, *outer]``; else
    ``[T, *outer, S]`` and ``[T - 1, *outer, S, S]``. Matrices have length 1 in the outer dimensions that share one; with
    the states behind those come last.
    """

    @staticmethod
    def forward(
        ctx: Any, moves: Tensor, product: Product, leaves: bool, *vectors: Tensor
    ) -> Tensor:
        first, *units = vectors
        here = _Vectors(first, units[: len(units) - leaves], units[-1] if leaves else None)
        ctx.shapes, ctx.leaves, ctx.product = [v.shape for v in vectors], leaves, product
        ctx.made = made = Blocks(moves, product)
        run, log, lost = _forward(made, product, here)
        ctx.run = run  # without the result, which would refer to itself
        ctx.again = ctx.logs = None
        if lost is None:
            return log
        if lost.sum() > _MOST_LOST * lost.numel():
            ctx.run, ctx.logs = (
                None,
                _by_logs(moves, product, leaves, vectors, ctx.needs_input_grad[3:]),
            )
            return ctx.logs[1].detach()
        ctx.again = again = _again(moves, product, here, lost)
        run.first[product.index(again.at, run.first)] = 0.0
        for block in run.blocks:  # so that nothing of these chains goes back through them
            where = product.index(again.at, block.shares)
            block.shares[where] = 0.0
            block.rates[where] = 0.0
        return log.index_put(again.at, again.log.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[3:]
        if ctx.logs is not None:
            leaves, out = ctx.logs
            given = iter(torch.autograd.grad(out, [x for x in leaves if x.requires_grad], grad))
            return (None, None, None, *(next(given) if x.requires_grad else None for x in leaves))
        found = [Collector(shape, need) for shape, need in zip(ctx.shapes, needs, strict=True)]
        sent = None
        if ctx.again is not None:
            at, unary, log = ctx.again
            with torch.enable_grad():
                total = (log * grad[at]).sum()
            (sent,) = torch.autograd.grad(total, unary)
        first, *units = found
        leave = units.pop() if ctx.leaves else None
        for start, weights in _weights(ctx.made, ctx.product, ctx.run, grad, ctx.again, sent):
            for unit in units:
                unit.add(weights)
            if leave is not None:
                leave.add(weights[: ctx.shapes[-1][0] - start])
            if start == 0:
                first.add(weights)
        return (None, None, None, *(f.result() for f in found))


def _weights(
    made: Blocks,
    product: Product,
    run: _Messages,
    grad: Tensor,
    again: _Again | None,
    sent: Tensor | None,
) -> Iterator[tuple[int, Tensor]]:
    """The first of some times, and the weights of their states times ``grad``, ``[times, *message]``; later times first.

    ``sent [n, T, S]`` are those of the chains that were summed again.
    """

    def mended(block: Tensor, start: int) -> Tensor:
        if again is not None and sent is not None:
            some = sent[:, start : start + len(block)]
            order = (1, 2, 0) if product.front else (1, 0, 2)
            block[product.index(again.at, block)] = some.permute(order)
        return block

    last = run.blocks[-1].shares[-1]
    slope = grad / last.sum(product.dim).clamp_(min=1.0)
    after = slope.unsqueeze(product.dim).expand(last.shape)
    for start, stop, shares, rates in reversed(run.blocks):
        matrices, _ = made.exponentials(start, stop)
        slopes = torch.empty_like(shares)  # by the messages
        slopes[-1] = after
        after = torch.empty_like(last)
        into = [after, *slopes.unbind()[:-1]]
        rows = zip(slopes.unbind(), rates.unbind(), product.rights(matrices), into, strict=True)
        for slope, rate, matrix, before in reversed(list(rows)):
            product.backward(slope * rate, matrix, before)
        yield start + 1, mended(slopes.mul_(shares), start + 1)
    yield 0, mended((after * run.first).unsqueeze(0), 0)


def _by_logs(
    moves: Tensor, product: Product, leaves: bool, vectors: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[list[Tensor], Tensor]:
    """Leaves of autograd and the sum by logarithms throughout, where most chains lose numbers."""
    copies = [v.detach().requires_grad_(need) for v, need in zip(vectors, needs, strict=True)]
    with torch.enable_grad():
        last = LogScan.apply(moves, product, leaves, *copies)
        return copies, log_sum(last, (product.dim,))
