"""Sums, products and categorical draws of numbers that are kept as their logarithms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_CACHE_ELEMENTS = 1 << 17  # entries of an array that stays in a core's cache
_FEW_TERMS, _MANY_SUMS = 5, 1 << 12  # of a sum; entries of all
_REDO_ELEMENTS = 1 << 22  # entries gathered at a time when underflown products are redone


class _LogSumProduct(torch.autograd.Function):
    """``logsumexp(x + y, dims)`` whose gradient is zero, not NaN, at slices that are all -inf.

    Keeps the shifted exponentials, so that the backward pass takes none: it is a product with them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, dims: tuple[int, ...]) -> Tensor:
        exponentials, total, out = shifted(x, y, dims, False)
        ctx.save_for_backward(exponentials, total)
        ctx.shapes = x.shape, y.shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        exponentials, total = ctx.saved_tensors
        scaled = (grad / total).masked_fill(total == 0, 0.0)
        need_x, need_y, *_ = ctx.needs_input_grad
        return (
            _summed_product(exponentials, scaled, ctx.shapes[0]) if need_x else None,
            _summed_product(exponentials, scaled, ctx.shapes[1]) if need_y else None,
            None,
        )


def shifted(
    x: Tensor, y: Tensor | None, dims: tuple[int, ...], overwrite: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``exp(x + y - top)``, its sum over ``dims``, and ``top + log(sum)``; ``dims`` are kept as ones; ``y`` None for zero.

    With ``overwrite`` the memory of ``x`` may hold the exponentials.
    A large array is made a few rows at a time, so that its five passes run in the cache.
    """
    rows = x.numel() // _CACHE_ELEMENTS
    covers = y is None or _covers(x.shape, y.shape)
    if rows < 2 or 0 in dims or x.shape[0] < 2 or not covers:
        return _shifted_block(x, y, dims, None)
    # New memory of this size costs more than the arithmetic: the system clears its pages first.
    made = x if overwrite and 0 not in x.stride() else torch.empty_like(x)
    shape = x.shape
    size = -(-shape[0] // min(rows, shape[0]))
    varies = y is not None and y.ndim == len(shape)
    if y is not None and varies:
        y = y.expand(shape[0], *y.shape[1:])
    parts = []
    for start in range(0, shape[0], size):
        part = slice(start, start + size)
        other = y[part] if y is not None and varies else y
        parts.append(_shifted_block(x[part], other, dims, made[part])[1:])
    totals, outs = zip(*parts, strict=True)
    return made, torch.cat(totals), torch.cat(outs)


def exp_of_shifted(x: Tensor) -> Tensor:
    """Exponentials, in place, of numbers that are shifted to at most about zero; those below the normal numbers are zero.

    Numbers that small take ten times as long to make as others, and nothing is left of them in a sum with one.

    >>> exp_of_shifted(torch.tensor([0.0, -90.0, -torch.inf]))
    tensor([1., 0., 0.])
    """
    tiny = torch.finfo(x.dtype).tiny
    return torch.threshold_(x.clamp_(min=math.log(tiny) + 1).exp_(), 3 * tiny, 0.0)


def _covers(shape: torch.Size, other: torch.Size) -> bool:
    """Whether ``other`` broadcasts to ``shape`` without enlarging it."""
    tail = shape[len(shape) - len(other) :]
    return len(other) <= len(shape) and all(b in (1, a) for a, b in zip(tail, other, strict=True))


def _shifted_block(
    x: Tensor, y: Tensor | None, dims: tuple[int, ...], into: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    joint = x if y is None else torch.add(x, y, out=into)
    # Where all are -inf the shift is any number that leaves them so.
    top = _over_few(torch.maximum, torch.amax, joint, dims)
    top.clamp_(min=torch.finfo(joint.dtype).min)
    exponentials = exp_of_shifted(torch.sub(joint, top, out=into if y is None else joint))
    total = _over_few(torch.add, torch.sum, exponentials, dims)
    return exponentials, total, top + total.log()


def _summed_product(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """``(a * b).sum_to_size(shape)`` without the product where it is larger than its sum."""
    shape = torch.Size((1,) * (a.ndim - len(shape)) + tuple(shape))
    summed = [d for d in range(a.ndim) if shape[d] == 1 and a.shape[d] > 1]
    if not summed or a.numel() < _CACHE_ELEMENTS:
        return (a * b).sum_to_size(shape)
    letters = [chr(97 + d) for d in range(a.ndim)]
    present = [d for d in range(a.ndim) if b.shape[d] > 1]
    kept = [d for d in range(a.ndim) if d not in summed]
    spell = ["".join(letters[d] for d in dims) for dims in (range(a.ndim), present, kept)]
    small = b.reshape([b.shape[d] for d in present])
    return torch.einsum(f"{spell[0]},{spell[1]}->{spell[2]}", a, small).reshape(shape)


def summed_products(a: Tensor | None, b: Tensor, dims: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Sums of ``a * b`` over each of several sets of dimensions, which are kept as ones; ``a`` None for ones."""
    if a is None or a.numel() < _CACHE_ELEMENTS:
        both = b if a is None else a * b
        return [both.sum(d, keepdim=True) if d else both for d in dims]
    return [
        _summed_product(a, b, torch.Size(1 if i in d else n for i, n in enumerate(a.shape)))
        for d in dims
    ]


def log_sum_product(
    x: Tensor, y: Tensor | None, dims: tuple[int, ...], *, keepdim: bool = False
) -> Tensor:
    """Log of the sum over ``dims`` of ``exp(x + y)``; a slice that is all -inf gives -inf.

    Args:
        x: log-values, broadcast against ``y``.
        y: log-values, or None for zeros.
        dims: dimensions summed over; none for the plain sum ``x + y``.
        keepdim: whether they stay, of size one.

    Returns:
        The broadcast shape without ``dims``, or with ones there.

    >>> log_sum_product(torch.tensor([0.0, -torch.inf]), torch.zeros(2), (0,))
    tensor(0.)
    """
    if not dims:
        return x if y is None else x + y
    if torch.is_grad_enabled() and (x.requires_grad or (y is not None and y.requires_grad)):
        out = _LogSumProduct.apply(x, x.new_zeros(()) if y is None else y, dims)
    else:
        out = shifted(x, y, dims, False)[2]
    return out if keepdim else out.squeeze(dims)


def log_sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Log of the sum of ``exp(x)`` over ``dims``; the gradient of -inf entries is zero.

    >>> log_sum(torch.full((2, 3), -torch.inf), (1,))
    tensor([-inf, -inf])
    """
    return log_sum_product(x, None, dims)


def log_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Log of the matrix product of ``exp(a)`` and ``exp(b)``, without the array of all products.

    Rows of ``a`` and columns of ``b`` are shifted by their maxima.  A shifted result below
    ``S * tiny / eps`` may have lost terms to underflow; those entries are redone by plain
    log-sum-exp.

    Args:
        a: ``[*batch, L, S]``.
        b: ``[*batch, S, R]``; batch dimensions broadcast.

    Returns:
        ``[*batch, L, R]``.

    >>> log_matmul(torch.tensor([[0.0, -200.0]]), torch.tensor([[-200.0], [0.0]]))
    tensor([[-199.3069]])
    """
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _LogMatmul.apply(a, b)
    return shifted_product(a, b).log


class _Lost(NamedTuple):
    """Entries of a product that were summed the plain way, and the weights ``[n, S]`` of their terms."""

    entries: tuple[Tensor, ...]
    weights: Tensor


class Shifted(NamedTuple):
    """The log of a product of exponentials, and what its derivative needs."""

    log: Tensor
    left: Tensor  # shifted exponentials
    right: Tensor
    product: Tensor
    lost: _Lost | None  # to underflow


def shifted_product(a: Tensor, b: Tensor) -> Shifted:
    """:func:`log_matmul` with what its derivative needs."""
    row, column = a.amax(-1, keepdim=True), b.amax(-2, keepdim=True)
    shift_a = row.masked_fill(row.isinf(), 0.0)
    shift_b = column.masked_fill(column.isinf(), 0.0)
    left, right = exp_of_shifted(a - shift_a), exp_of_shifted(b - shift_b)
    product = left @ right
    info = torch.finfo(product.dtype)
    low = a.shape[-1] * info.tiny / info.eps
    log = product.log().add_(shift_a).add_(shift_b)
    if not product.numel() or bool(product.min() >= low):
        return Shifted(log, left, right, product, None)
    where = (product < low) & (row > -torch.inf) & (column > -torch.inf)
    log = log.masked_fill(product < low, -torch.inf)
    entries = where.nonzero()
    if not len(entries):
        return Shifted(log, left, right, product, None)
    exact, weights = _plain(a, b, entries, log.shape[:-2])
    log = log.index_put(entries.unbind(-1), exact)
    return Shifted(log, left, right, product, _Lost(entries.unbind(-1), weights))


def _plain(a: Tensor, b: Tensor, entries: Tensor, batch: torch.Size) -> tuple[Tensor, Tensor]:
    """Plain log-sum-exps of some entries ``[n, batch + 2]`` of a product, and the weights of their terms."""
    rows, columns = a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:]).mT
    exact, weights = [], []
    for part in entries.split(max(1, _REDO_ELEMENTS // a.shape[-1])):
        *front, left, right = part.unbind(-1)
        joint = rows[(*front, left)] + columns[(*front, right)]
        exact.append(torch.logsumexp(joint, -1))
        top = exact[-1].masked_fill(exact[-1] == -torch.inf, 0.0)
        weights.append(joint.sub_(top.unsqueeze(-1)).exp_())
    return torch.cat(exact), torch.cat(weights)


class _LogMatmul(torch.autograd.Function):
    """The same with the shifted exponentials kept, so that the backward pass takes none."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        made = shifted_product(a, b)
        ctx.lost = made.lost
        ctx.save_for_backward(made.left, made.right, made.product)
        return made.log

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right, product = ctx.saved_tensors
        made = Shifted(grad, left, right, product, ctx.lost)
        first, second = matmul_gradients(made, grad, ctx.needs_input_grad)
        return first, second


def matmul_gradients(
    made: Shifted, grad: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of both sides of :func:`log_matmul` from that of its result, where they are wanted."""
    _, left, right, product, lost = made
    share = (grad / product).masked_fill_(product == 0, 0.0)
    if lost is not None:
        share = share.index_put(lost.entries, share.new_zeros(()))
    first = _of_left(left, share @ right.mT, grad, lost, 0) if wanted[0] else None
    second = _of_left(right.mT, share.mT @ left, grad, lost, 1).mT if wanted[1] else None
    return first, second


def _of_left(side: Tensor, product: Tensor, grad: Tensor, lost: _Lost | None, other: int) -> Tensor:
    """Gradient ``[*batch, rows, S]`` of one side, ``other`` telling which, with its states last."""
    made = product.mul_(side)
    if lost is not None:
        *front, left, right = lost.entries
        spread = grad[lost.entries].unsqueeze(-1) * lost.weights
        made.index_put_((*front, (left, right)[other]), spread, accumulate=True)
    return made.sum_to_size(side.shape)


def sum_of_few(x: Tensor, dim: int) -> Tensor:
    """Sum over one dimension, in a tenth of torch's time where it has few entries.

    >>> sum_of_few(torch.ones(4, 3), -1)
    tensor([3., 3., 3., 3.])
    """
    return _over_few(torch.add, torch.sum, x, (dim,), keepdim=False)


def _over_few(
    two: Callable[..., Tensor],
    many: Callable[..., Tensor],
    x: Tensor,
    dims: tuple[int, ...],
    keepdim: bool = True,
) -> Tensor:
    """A reduction; of many short rows entry by entry, because torch takes as long for each row as for ten numbers."""
    dim = dims[-1]
    if len(dims) > 1 or not 1 < x.shape[dim] <= _FEW_TERMS or x.numel() < _MANY_SUMS:
        return many(x, dims, keepdim=keepdim)
    first, second, *rest = x.unbind(dim)
    total = two(first, second)
    for term in rest:
        total = two(total, term)
    return total.unsqueeze(dim) if keepdim else total


def wide(x: Tensor) -> Tensor:
    """The tensor in double precision if it is in a shorter one: long sums need it."""
    return x if x.dtype == torch.float64 else x.to(torch.float64)


def draw_categorical(logits: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Draw indices from unnormalised log-probabilities by inversion.

    Args:
        logits: ``[n, *plates, S]`` for one distribution a draw, ``[1, *plates, S]`` for one shared
            by all.
        n: number of draws.
        generator: source of randomness on the device of ``logits``.

    Returns:
        Long ``[n, *plates]``; an index of probability zero is never drawn.

    >>> draw_categorical(torch.tensor([[-torch.inf, 0.0]]), 3, None)
    tensor([1, 1, 1])
    """
    cumulative = wide(logits).softmax(-1).cumsum(-1)
    total = cumulative[..., -1:]
    uniform = torch.rand(
        (n, *logits.shape[1:-1]), dtype=total.dtype, device=total.device, generator=generator
    )
    shared = len(logits) == 1
    point = uniform.movedim(0, -1).unsqueeze(0) if shared else uniform.unsqueeze(-1)
    below = torch.nextafter(total, torch.zeros_like(total))
    index = torch.searchsorted(
        cumulative, torch.minimum(point * total, below).contiguous(), right=True
    )
    return index.squeeze(0).movedim(-1, 0).contiguous() if shared else index.squeeze(-1)
