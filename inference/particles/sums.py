"""Log-densities summed over the rows of a plate, from statistics of parts that have few particle axes each.

Shapes: a part is ``[*batch, rows, *own]``, with ones where it is constant; ``own`` are particle axes of its own, and those of
different parts stand one after the other in the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import logsigmoid

from ppl.inference.logspace import sum_of_few, wide

_CACHE_ELEMENTS = 1 << 17  # entries of an array that stays in a core's cache
_FEW_ROWS, _PADDED = (
    8,
    1.25,
)  # rows of a cell, and how many times as many places, from which on pairs pay
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


def mean(dims: tuple[int, ...], x: Tensor) -> Tensor:
    """Mean over some dimensions; over one of few entries in a fraction of the time of torch."""
    return sum_of_few(x, dims[0]) / x.shape[dims[0]] if len(dims) == 1 else x.mean(dims)


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


def log_partition(
    batch: int, count: Tensor, left: Tensor, right: Tensor | None, are_paired: bool = False
) -> Tensor:
    """Sum over rows of ``count log(1 + exp(left + right))``: what the Bernoulli laws of all rows divide by.

    As ``log1p(exp(left) exp(right))`` where that cannot overflow: one transcendental function for each
    combination, none for the exponentials; one for two rows that stand in pairs, from the product of what they are
    taken of. A few rows at a time, so that everything runs in the cache.

    Args:
        batch: number of batch axes.
        count: ``[*batch, rows]``, copies of each row.
        left: ``[*batch, rows, *own]``.
        right: likewise; None for zero.
        are_paired: whether rows stand as :func:`in_pairs` puts them.

    Returns:
        ``[*batch, *own of left, *own of right]``.

    >>> log_partition(0, torch.tensor([2.0]), torch.zeros(1, 1), torch.zeros(1, 3))
    tensor([[1.3863, 1.3863, 1.3863]])
    """
    if right is None and left.shape[batch] == 1:
        return _beside(count.sum(-1), left.ndim - batch - 1) * _log1pexp(left.squeeze(batch))
    parts = [left] if right is None else [left, right]
    lead = _shape(count.shape, *(p.shape[: batch + 1] for p in parts))
    owns = [n for p in parts for n in p.shape[batch + 1 :]]
    cells, rows = math.prod(lead[:-1]), lead[-1]
    weights = count.expand(lead).reshape(cells, 1, rows)
    flat = [_flat(p, lead, batch) for p in parts]
    is_safe = right is not None and _is_safe(left, right, 1 + are_paired)
    if is_safe:
        flat = [f.exp() for f in flat]
    if is_safe and are_paired and left.shape[batch] == rows:
        weights, flat = weights[..., ::2], _halves(flat, weights)
    size = math.prod(f.shape[-1] for f in flat[:2])
    made = []
    step = max(1, _CACHE_ELEMENTS // max(1, rows * size))
    for start in range(0, cells, step):
        here = slice(start, start + step)
        made.append(_part_of_cells(weights[here], [f[here] for f in flat], is_safe))
    total = made[0] if len(made) == 1 else torch.cat(made)
    return total.reshape(*lead[:-1], *owns)


def _flat(part: Tensor, lead: tuple[int, ...], batch: int) -> Tensor:
    """``[cells, rows or 1, own]``."""
    rows = part.shape[batch]
    spread = part.expand(*lead[:-1], rows, *part.shape[batch + 1 :])
    return spread.reshape(math.prod(lead[:-1]), rows, -1)


def _halves(flat: list[Tensor], weights: Tensor) -> list[Tensor]:
    """The sides with the rows of a pair apart: those of the left side, zero where no row is, then the right side twice."""
    left, right = flat
    left = left * (weights > 0).mT
    halves = [right, right] if right.shape[1] == 1 else [right[:, ::2], right[:, 1::2]]
    return [left[:, ::2], halves[0], left[:, 1::2], halves[1]]


def _log1pexp(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``."""
    return -logsigmoid(-x)


def _is_safe(left: Tensor, right: Tensor, factors: int) -> bool:
    """Whether ``exp(left)``, ``exp(right)`` and the product of so many pairs of them are finite and none of them is lost."""
    limit = 0.45 * math.log(torch.finfo(left.dtype).max) / factors
    most = torch.maximum(vector_norm(left, math.inf), vector_norm(right, math.inf))
    return bool(most < limit)


def _part_of_cells(weights: Tensor, parts: list[Tensor], is_safe: bool) -> Tensor:
    """``[cells, size]``; the rows in turns where one cell alone is larger than the cache."""
    rows, size = weights.shape[-1], math.prod(p.shape[-1] for p in parts[:2])
    step = max(1, _CACHE_ELEMENTS // size)
    total: Tensor | None = None
    for start in range(0, rows, step):
        here = slice(start, start + step)
        some = [p if p.shape[1] == 1 else p[:, here] for p in parts]
        made = _log_terms(some, is_safe)
        if made.shape[1] == 1:
            new = (weights[..., here].sum(-1, keepdim=True) * made).squeeze(1)
        else:
            new = (weights[..., here] @ made).squeeze(1)
        total = new if total is None else total + new
    assert total is not None
    return total


def _log_terms(parts: list[Tensor], is_safe: bool) -> Tensor:
    """``log(1 + exp(left + right))`` of all combinations ``[cells, rows, size]``, added up for the two rows of a pair."""
    if len(parts) == 1:
        return _log1pexp(parts[0])
    sides = list(zip(parts[::2], parts[1::2], strict=True))
    if not is_safe:
        ((left, right),) = sides
        return _log1pexp((left.unsqueeze(-1) + right.unsqueeze(-2)).flatten(-2))
    joint = [(a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2) for a, b in sides]
    if joint[0].requires_grad:
        total = joint[0] if len(joint) == 1 else torch.addcmul(joint[0] + joint[1], *joint)
        return total.log1p()
    if len(joint) == 1:
        return joint[0].log1p_()
    both = joint[0] * joint[1]
    return both.add_(joint[0]).add_(joint[1]).log1p_()


def in_pairs(count: Tensor) -> Tensor | None:
    """An order of the rows of each cell in which those with equal numbers stand two and two.

    Args:
        count: ``[cells, rows]``, the number of copies of each row; zero for none.

    Returns:
        ``[cells, places]`` rows, -1 for no row: at an odd place one with the number of the row before it, or none.
        None where few rows are alike.

    >>> in_pairs(torch.tensor([[2.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]]))
    tensor([[0, 2, 1, 3, 4, 5, 6, 7]])
    """
    cells, rows = count.shape
    number, row = count.sort(dim=-1, descending=True, stable=True)
    is_new = torch.ones_like(number, dtype=torch.bool)
    is_new[:, 1:] = number[:, 1:] != number[:, :-1]
    at = torch.arange(rows, device=count.device).expand(cells, rows)
    begin = torch.where(is_new, at, 0).cummax(-1).values
    is_odd = is_new.roll(-1, -1) & ((at - begin) % 2 == 0)  # the last of an odd number of rows
    is_odd[:, -1] = False
    place = at + is_odd.cumsum(-1) - is_odd.long()
    places = int(place[number > 0].max()) + 1 if bool((number > 0).any()) else 0
    places += places % 2
    if rows < _FEW_ROWS or places > _PADDED * rows:
        return None
    order = torch.full((cells, places + 1), -1, device=count.device)
    return order.scatter_(1, place.clamp(max=places), row)[:, :places]


def bernoulli_sum(
    batch: int, varying: int, are_paired: bool, ones: Tensor, count: Tensor, *parts: Tensor
) -> Tensor:
    """Sum over rows of ``y x - log(1 + exp(x))``, ``x`` the sum of the parts.

    Args:
        batch: number of batch axes.
        varying: number of parts, in front, that stand on one side of :func:`log_partition`.
        are_paired: whether rows stand as :func:`in_pairs` puts them.
        ones: ``[*batch, rows]``, the number of ones among the copies of each row.
        count: ``[*batch, rows]``, copies.
        *parts: ``[*batch, rows or 1, *own]``.

    Returns:
        ``[*batch, *own of the first part, ...]``.
    """
    sides = [_outer_sum(batch, parts[:varying]), _outer_sum(batch, parts[varying:])]
    left, right = sides
    assert left is not None
    total = log_partition(batch, count, left, right, are_paired).neg_()
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
    return products([(first * -precision, second)], [*terms, rest])


def products(factors: Sequence[tuple[Tensor, Tensor]], terms: Sequence[Tensor]) -> Tensor:
    """The sum of some products and terms; a large one is made a few rows at a time, so that all passes run in the cache.

    Args:
        factors: pairs of tensors of as many dimensions.
        terms: tensors, likewise, or of fewer dimensions.

    >>> products([(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]))], [torch.tensor(1.0)])
    tensor([[4., 5.],
            [7., 9.]])
    """
    given = [*(x for pair in factors for x in pair), *terms]
    shape = _shape(*(x.shape for x in given))
    if math.prod(shape) < _CACHE_ELEMENTS or any(x.requires_grad for x in given):
        by_size = sorted(terms, key=torch.Tensor.numel)
        total = sum(by_size[1:], by_size[0]) if terms else given[0].new_zeros(())
        for a, b in factors:
            total = torch.addcmul(total, a, b)
        return total
    out = given[0].new_empty(shape)
    size = max(1, _CACHE_ELEMENTS * shape[0] // (4 * math.prod(shape)))
    for start in range(0, shape[0], size):
        rows = out[start : start + size]

        def part(x: Tensor, start: int = start) -> Tensor:
            whole = x.ndim == len(shape) and x.shape[0] > 1
            return x[start : start + size] if whole else x

        (first, second), *rest = factors
        torch.mul(part(first), part(second).expand_as(rows), out=rows)
        for a, b in rest:
            rows.add_(part(a) * part(b))
        for term in terms:
            rows.add_(part(term))
    return out


def moves_beside(
    at: int, square: bool, value: Tensor, before: Tensor, part: Tensor, scale: Tensor
) -> Tensor:
    """What the products of a part of a chain's steps with the states before and after them say of each state.

    The state at time t meets the part of the step to it, and that of the step from it.

    Args:
        at: the dimension of time, from the end; of size ``T - 1`` in all but ``scale``.
        square: whether the square of the part is said, too.
        value: the part that reads the state after a step.
        before: the part that reads the state before it.
        part: another one.
        scale: of the steps.

    Returns:
        ``T`` times: the share in the log-densities of the Normal steps.
    """
    precision = scale.pow(-2)
    minus = part * -precision
    terms = [zero_first(at, 0.5 * (minus * part))] if square else []
    to, off = (zero_first(at, x) for x in (value, minus))
    return products([(to, off), (zero_last(at, before), zero_last(at, minus))], terms)


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
    return torch.cat([_zero(at, x), x], at)


def zero_last(at: int, x: Tensor) -> Tensor:
    """A zero at the end of one axis."""
    return torch.cat([x, _zero(at, x)], at)


def _zero(at: int, x: Tensor) -> Tensor:
    shape = list(x.shape)
    shape[at] = 1
    return x.new_zeros(shape)
