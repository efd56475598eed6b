"""Sums, products and categorical draws of numbers that are kept as their logarithms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CACHE_ELEMENTS = 1 << 17  # entries of an array that stays in a core's cache
_REDO_ELEMENTS = 1 << 22  # entries gathered at a time when underflown products are redone


class _LogSumProduct(torch.autograd.Function):
    """``logsumexp(x + y, dims)`` whose gradient is zero, not NaN, at slices that are all -inf.

    Keeps the shifted exponentials, so that the backward pass takes none: it is a product with them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, dims: tuple[int, ...], overwrite: bool) -> Tensor:
        exponentials, total, out = _shifted(x, y, dims, overwrite and not x.requires_grad)
        ctx.save_for_backward(exponentials, total)
        ctx.shapes = x.shape, y.shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        exponentials, total = ctx.saved_tensors
        scaled = (grad / total).masked_fill(total == 0, 0.0)
        need_x, need_y, *_ = ctx.needs_input_grad
        return (
            _summed_product(exponentials, scaled, ctx.shapes[0]) if need_x else None,
            _summed_product(exponentials, scaled, ctx.shapes[1]) if need_y else None,
            None,
            None,
        )


def _shifted(
    x: Tensor, y: Tensor, dims: tuple[int, ...], overwrite: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``exp(x + y - top)``, its sum over ``dims``, and ``top + log(sum)``; ``dims`` are kept as ones.

    A large array is made a few rows at a time, so that its five passes run in the cache.
    """
    rows = x.numel() // _CACHE_ELEMENTS
    if rows < 2 or 0 in dims or x.shape[0] < 2 or not _covers(x.shape, y.shape):
        return _shifted_block(x, y, dims, None)
    # New memory of this size costs more than the arithmetic: the system clears its pages first.
    made = x if overwrite and 0 not in x.stride() else torch.empty_like(x)
    shape = x.shape
    size = -(-shape[0] // min(rows, shape[0]))
    y = y.expand(shape[0], *y.shape[1:]) if y.ndim == len(shape) else y
    parts = []
    for start in range(0, shape[0], size):
        part = slice(start, start + size)
        other = y[part] if y.ndim == len(shape) else y
        parts.append(_shifted_block(x[part], other, dims, made[part])[1:])
    totals, outs = zip(*parts, strict=True)
    return made, torch.cat(totals), torch.cat(outs)


def _covers(shape: torch.Size, other: torch.Size) -> bool:
    """Whether ``other`` broadcasts to ``shape`` without enlarging it."""
    tail = shape[len(shape) - len(other) :]
    return len(other) <= len(shape) and all(b in (1, a) for a, b in zip(tail, other, strict=True))


def _shifted_block(
    x: Tensor, y: Tensor, dims: tuple[int, ...], into: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    joint = torch.add(x, y) if into is None else torch.add(x, y, out=into)
    top = joint.amax(dims, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    exponentials = joint.sub_(top).exp_()
    total = exponentials.sum(dims, keepdim=True)
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


def log_sum_product(
    x: Tensor, y: Tensor, dims: tuple[int, ...], *, overwrite: bool = False
) -> Tensor:
    """Log of the sum over ``dims`` of ``exp(x + y)``; a slice that is all -inf gives -inf.

    Args:
        x: log-values, broadcast against ``y``.
        y: log-values.
        dims: dimensions summed over; none for the plain sum ``x + y``.
        overwrite: whether the memory of ``x`` may hold the exponentials.

    Returns:
        The broadcast shape without ``dims``.

    >>> log_sum_product(torch.tensor([0.0, -torch.inf]), torch.zeros(2), (0,))
    tensor(0.)
    """
    if not dims:
        return x + y
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        return _LogSumProduct.apply(x, y, dims, overwrite).squeeze(dims)
    return torch.logsumexp(x + y, dims)


def log_sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Log of the sum of ``exp(x)`` over ``dims``; the gradient of -inf entries is zero.

    >>> log_sum(torch.full((2, 3), -torch.inf), (1,))
    tensor([-inf, -inf])
    """
    return log_sum_product(x, x.new_zeros(()), dims)


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
    row, column = a.detach().amax(-1, keepdim=True), b.detach().amax(-2, keepdim=True)
    shift_a = row.masked_fill(row.isinf(), 0.0)
    shift_b = column.masked_fill(column.isinf(), 0.0)
    product = (a - shift_a).exp() @ (b - shift_b).exp()
    info = torch.finfo(product.dtype)
    low = product.detach() < a.shape[-1] * info.tiny / info.eps
    if not low.any():
        return product.log() + shift_a + shift_b
    log = product.masked_fill(low, 1.0).log() + shift_a + shift_b
    return _redo(
        log.masked_fill(low, -torch.inf), a, b, low & (row > -torch.inf) & (column > -torch.inf)
    )


def _redo(log: Tensor, a: Tensor, b: Tensor, where: Tensor) -> Tensor:
    """Replace the entries of ``log`` marked in ``where`` by plain log-sum-exps."""
    entries = where.nonzero()
    if not len(entries):
        return log
    batch = log.shape[:-2]
    rows, columns = a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:]).mT
    exact = []
    for part in entries.split(max(1, _REDO_ELEMENTS // a.shape[-1])):
        *front, left, right = part.unbind(-1)
        exact.append(log_sum_product(rows[(*front, left)], columns[(*front, right)], (-1,)))
    return log.index_put(entries.unbind(-1), torch.cat(exact))


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
