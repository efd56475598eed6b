"""Log-densities summed over the rows of a plate, from statistics of parts that have few particle axes each.

Shapes: a part is ``[*batch, rows, *own]``, with ones where it is constant; ``own`` are particle axes of its own, and those of
different parts stand one after the other in the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ppl.inference.logspace import wide

_CACHE_ELEMENTS = 1 << 17  # entries of an array that stays in a core's cache
HALF_LOG_2PI = 0.9189385332046727


def total_square(batch: int, weight: Tensor | None, *parts: Tensor) -> Tensor:
    """Sum over rows of ``weight`` times the square of the sum of the parts.

    Each part is centred over its particles first: products of what is left are no larger than the square itself, so
    that a mean far from zero costs no digits. Sums run in double precision.

    Args:
        batch: number of batch axes.
        weight: ``[*batch, rows]``, or None.
        *parts: ``[*batch, rows, *own]``.

    Returns:
        ``[*batch, *own of the first part, *own of the second, ...]``.

    >>> total_square(0, None, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
    tensor([[13.],
            [25.]])
    """
    shapes = [p.shape[: batch + 1] for p in parts] + ([weight.shape] if weight is not None else [])
    lead = _shape(*shapes)
    dtype, owns = parts[0].dtype, [p.shape[batch + 1 :] for p in parts]
    flat = [wide(p.expand(*lead, *p.shape[batch + 1 :]).reshape(*lead, -1)) for p in parts]
    if len(flat) == 1:
        squares = flat[0].square()
        total = squares.sum(-2) if weight is None else (squares * weight.unsqueeze(-1)).sum(-2)
    else:
        total = _total_of_pairs(flat, weight)
    return total.reshape(*lead[:-1], *(n for own in owns for n in own)).to(dtype)


def _shape(*shapes: Sequence[int]) -> tuple[int, ...]:
    """What shapes of the same length, or shorter in front, broadcast to; torch's own takes longer than small sums."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(s)) + tuple(s) for s in shapes]
    return tuple(max(ns) for ns in zip(*padded, strict=True))


def _total_of_pairs(flat: list[Tensor], weight: Tensor | None) -> Tensor:
    flat = centred(flat, (-1,))
    rows = torch.cat(flat, -1)
    weighted = rows if weight is None else rows * weight.unsqueeze(-1)
    products = weighted.mT @ rows  # [*batch, M, M]
    squares, ends, count = products.diagonal(dim1=-2, dim2=-1), [0], len(flat)
    for f in flat:
        ends.append(ends[-1] + f.shape[-1])

    def spread(x: Tensor, *at: int) -> Tensor:
        lead = x.ndim - len(at)
        sizes = dict(zip(at, x.shape[lead:], strict=True))
        return x.reshape(*x.shape[:lead], *(sizes.get(i, 1) for i in range(count)))

    total: Tensor | None = None
    for i in range(count):
        here = slice(ends[i], ends[i + 1])
        term = spread(squares[..., here], i)
        for j in range(i):
            both = products[..., ends[j] : ends[j + 1], here]
            term = torch.add(term, spread(both, j, i), alpha=2)
        total = term if total is None else total + term
    assert total is not None
    return total.clamp(min=0)


def centred(parts: Sequence[Tensor], dims: tuple[int, ...]) -> list[Tensor]:
    """The parts without their means over ``dims``, which go to the first; the sum of all stays."""
    means = [p.mean(dims, keepdim=True) for p in parts]
    first = parts[0] + sum(means[2:], means[1])
    return [first, *(p - m for p, m in zip(parts[1:], means[1:], strict=True))]


def normal_from_square(square: Tensor, scale: Tensor, count: Tensor | int) -> Tensor:
    """Log-density of ``count`` Normal numbers with this sum of squared residuals."""
    return -0.5 * square * scale.pow(-2) - count * (scale.log() + HALF_LOG_2PI)


def linear_part(batch: int, ones: Tensor, part: Tensor) -> Tensor:
    """Sum over rows of ``ones [*batch, rows]`` times a part: ``[*batch, *own]``."""
    own = part.shape[batch + 1 :]
    if part.shape[batch] == 1:
        return _beside(ones.sum(-1), len(own)) * part.squeeze(batch)
    lead = _shape(ones.shape, part.shape[: batch + 1])
    flat = part.expand(*lead, *own).reshape(*lead, -1)
    return (ones.expand(lead).unsqueeze(-2) @ flat).reshape(*lead[:-1], *own)


def _beside(x: Tensor, count: int) -> Tensor:
    """With trailing axes of size one."""
    return x.reshape(*x.shape, *(1,) * count)


def log_partition(batch: int, count: Tensor, left: Tensor, right: Tensor | None) -> Tensor:
    """Sum over rows of ``count log(1 + exp(left + right))``: what the Bernoulli laws of all rows divide by.

    As ``log1p(exp(left) exp(right))`` where that cannot overflow: one transcendental function for each
    combination, none for the exponentials. A few rows at a time, so that everything runs in the cache.

    Args:
        batch: number of batch axes.
        count: ``[*batch, rows]``, copies of each row.
        left: ``[*batch, rows, *own]``.
        right: likewise; None for zero.

    Returns:
        ``[*batch, *own of left, *own of right]``.

    >>> log_partition(0, torch.tensor([2.0]), torch.zeros(1, 1), torch.zeros(1, 3))
    tensor([[1.3863, 1.3863, 1.3863]])
    """
    parts = [left] if right is None else [left, right]
    lead = _shape(count.shape, *(p.shape[: batch + 1] for p in parts))
    owns = [n for p in parts for n in p.shape[batch + 1 :]]
    cells, rows = math.prod(lead[:-1]), lead[-1]
    weights = count.expand(lead).reshape(cells, 1, rows)
    flat = [_flat(p, lead, batch) for p in parts]
    is_safe = right is not None and _is_safe(left, right)
    if is_safe:
        flat = [f.exp() for f in flat]
    sizes = [f.shape[-1] for f in flat]
    size = math.prod(sizes)
    made = []
    step = max(1, _CACHE_ELEMENTS // max(1, rows * size))
    for start in range(0, cells, step):
        here = slice(start, start + step)
        made.append(_part_of_cells(weights[here], [f[here] for f in flat], is_safe, size))
    total = made[0] if len(made) == 1 else torch.cat(made)
    return total.reshape(*lead[:-1], *owns)


def _flat(part: Tensor, lead: tuple[int, ...], batch: int) -> Tensor:
    """``[cells, rows or 1, own]``."""
    rows = part.shape[batch]
    spread = part.expand(*lead[:-1], rows, *part.shape[batch + 1 :])
    return spread.reshape(math.prod(lead[:-1]), rows, -1)


def _is_safe(left: Tensor, right: Tensor) -> bool:
    """Whether ``exp(left)``, ``exp(right)`` and their product are finite and none of them is lost."""
    limit = 0.45 * math.log(torch.finfo(left.dtype).max)
    return bool(torch.stack((left.abs().amax(), right.abs().amax())).amax() < limit)


def _part_of_cells(weights: Tensor, parts: list[Tensor], is_safe: bool, size: int) -> Tensor:
    """``[cells, size]``; the rows in turns where one cell alone is larger than the cache."""
    rows = weights.shape[-1]
    step = max(1, _CACHE_ELEMENTS // size)
    total: Tensor | None = None
    for start in range(0, rows, step):
        here = slice(start, start + step)
        some = [p if p.shape[1] == 1 else p[:, here] for p in parts]
        joint = some[0]
        if len(some) == 2:
            left, right = some[0].unsqueeze(-1), some[1].unsqueeze(-2)
            joint = (left * right if is_safe else left + right).flatten(-2)
        made = joint.log1p() if is_safe else -logsigmoid(-joint)
        if made.shape[1] == 1:
            new = (weights[..., here].sum(-1, keepdim=True) * made).squeeze(1)
        else:
            new = (weights[..., here] @ made).squeeze(1)
        total = new if total is None else total + new
    assert total is not None
    return total


def bernoulli_sum(batch: int, varying: int, ones: Tensor, count: Tensor, *parts: Tensor) -> Tensor:
    """Sum over rows of ``y x - log(1 + exp(x))``, ``x`` the sum of the parts.

    Args:
        batch: number of batch axes.
        varying: number of parts, in front, that stand on one side of :func:`log_partition`.
        ones: ``[*batch, rows]``, the number of ones among the copies of each row.
        count: ``[*batch, rows]``, copies.
        *parts: ``[*batch, rows or 1, *own]``.

    Returns:
        ``[*batch, *own of the first part, ...]``.
    """
    sides = [_outer_sum(batch, parts[:varying]), _outer_sum(batch, parts[varying:])]
    left, right = sides
    assert left is not None
    total = log_partition(batch, count, left, right).neg_()
    done, own = 0, total.ndim - batch
    for part in parts:
        line = linear_part(batch, ones, part)
        width = line.ndim - batch
        line = line.reshape(
            *line.shape[:batch], *(1,) * done, *line.shape[batch:], *(1,) * (own - done - width)
        )
        fits = not line.requires_grad and _shape(total.shape, line.shape) == tuple(total.shape)
        total = total.add_(line) if fits else total + line
        done += width
    return total


def coin(value: Tensor, odds: Tensor) -> Tensor:
    """Log-density of a Bernoulli law with these log-odds; values are zero or one.

    >>> coin(torch.tensor([0.0, 1.0]), torch.tensor(0.0))
    tensor([-0.6931, -0.6931])
    """
    return torch.addcmul(logsigmoid(-odds), value, odds)


def _outer_sum(batch: int, parts: Sequence[Tensor]) -> Tensor | None:
    """All combinations: ``[*batch, rows or 1, *own of the first, *own of the second, ...]``."""
    if not parts:
        return None
    total, lead = parts[0], batch + 1
    for part in parts[1:]:
        width = part.ndim - lead
        total = total.reshape(*total.shape, *(1,) * width)
        part = part.reshape(
            *part.shape[:lead], *(1,) * (total.ndim - lead - width), *part.shape[lead:]
        )
        total = total + part
    return total


def pair(
    with_squares: tuple[bool, bool], constant: bool, left: Tensor, right: Tensor, scale: Tensor
) -> Tensor:
    """The share of two parts in the log-density of a Normal: minus their product over the variance, and their squares."""
    precision = scale.pow(-2)
    # Small arrays take the precision; the large one is written once.
    first, second = (left, right) if left.numel() <= right.numel() else (right, left)
    rest = -scale.log() - HALF_LOG_2PI if constant else scale.new_zeros(())
    terms = [
        x.square() * (-0.5 * precision)
        for x, wanted in zip((left, right), with_squares, strict=True)
        if wanted
    ]
    terms = sorted([*terms, rest], key=lambda x: -x.numel())
    out = torch.addcmul(terms[0], first * precision, second, value=-1)
    for term in terms[1:]:
        out = out + term if out.requires_grad or out.numel() < _CACHE_ELEMENTS else out.add_(term)
    return out


def distinct_rows(cells: int, rows: int, keyed: Sequence[Tensor]) -> tuple[Tensor, Tensor, int]:
    """Which rows of each cell are alike.

    Args:
        cells: number of groups of rows.
        rows: in each.
        keyed: tables ``[cells * rows, columns]``; rows are alike where all of them agree.

    Returns:
        First row of each kind ``[cells, most]`` into the tables (any row where a cell has fewer kinds), the place
        of each row in ``[cells * most]``, and the largest number of kinds in a cell.

    >>> distinct_rows(1, 3, [torch.tensor([[5.0], [7.0], [5.0]])])
    (tensor([[0, 1]]), tensor([0, 1, 0]), 2)
    """
    device = keyed[0].device if keyed else None
    cell = torch.arange(cells, device=device).repeat_interleave(rows)
    kind = cell
    for table in keyed:
        for column in table.unbind(-1):
            kind = _joined(kind, column)
    return _placed(cells, cell, kind)


def _joined(key: Tensor, column: Tensor) -> Tensor:
    """A key that tells apart what either of the two does, in the order of the first."""
    values, inverse = torch.unique(column, return_inverse=True)
    return torch.unique(key * len(values) + inverse, return_inverse=True)[1]


def _placed(cells: int, cell: Tensor, kind: Tensor) -> tuple[Tensor, Tensor, int]:
    row = torch.arange(len(kind), device=kind.device)
    kinds = int(kind.max()) + 1
    first = torch.full_like(row[:kinds], len(kind)).scatter_reduce(0, kind, row, "amin")
    count = torch.bincount(cell[first], minlength=cells)
    start = count.cumsum(0) - count
    most = int(count.max())
    place = row[:kinds] - start[cell[first]]
    table = kind.new_zeros((cells, most))
    table[cell[first], place] = first
    return table, cell * most + place[kind], most


def zero_first(at: int, x: Tensor) -> Tensor:
    """A zero in front along one axis."""
    shape = list(x.shape)
    shape[at] = 1
    return torch.cat([x.new_zeros(shape), x], at)
