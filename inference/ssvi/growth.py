"""Which weights to add: the largest gradients among all coordinates of a layer, without ever holding them all.

A layer hands in its inputs and the gradients of the loss at its outputs. The dense gradient ``g^T x`` is formed in blocks of
output units; members that are kept are masked by infinity, and the best so far are carried from block to block.

Source: [Li2024] section 3.2, [Evci2020]; the t-like score and the evidence of a new weight are derived in
:mod:`ppl.inference.ssvi.scores`' terms below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.errors import NumericalError
from ppl.inference.ssvi.patterns import Form

_BLOCK = 2**20  # numbers in a block of a dense gradient


class Seen(NamedTuple):
    """What a layer saw in one batch."""

    form: Form
    x: Tensor  # inputs [*batch, inputs] or [*batch, channels, *size]
    g: Tensor  # gradient of the mean loss at the outputs, [*batch, outputs] or [*batch, channels, *size]


class Grown(NamedTuple):
    """Candidates, best first."""

    score: Tensor  # [K]
    indices: Tensor  # [K], long


class Shift(NamedTuple):
    """What is added to the gradients of some coordinates."""

    indices: Tensor  # [r], ascending
    by: Tensor  # [r]


Score = Callable[[Tensor, Tensor], Tensor]  # mean and squared standard error of gradients -> score


def magnitudes(mean: Tensor, error: Tensor) -> Tensor:
    """``|g|`` ``[...]``, the score of [Li2024]."""
    return mean.abs()


def t_like(mean: Tensor, error: Tensor) -> Tensor:
    """``|g|`` in standard errors ``[...]``: with one noisy batch the largest of very many pure-noise gradients wins."""
    return mean.abs() / error.sqrt().clamp(min=torch.finfo(mean.dtype).tiny)


def gains(examples: float, curvature: float, prior_precision: float, price: float = 0.0) -> Score:
    """Twice the log evidence that a new weight would bring, as a function of gradients of the mean loss.

    With curvature ``h`` of the mean loss the best Gaussian has ``sd^2 = 1 / (N h + 1/s^2)`` and ``mean = -N g sd^2``, so the gain
    is ``N^2 g^2 sd^2 - log(s^2 / sd^2)``: the removal score of :func:`ppl.inference.ssvi.scores.evidence` at that optimum. The
    squared gradient is that of all data, so what its estimate owes to noise, its squared standard error, is taken off.

    Args:
        examples: ``N``.
        curvature: ``h``.
        prior_precision: ``1/s^2``.
        price: taken off: twice the log prior odds against a weight.

    >>> score = gains(examples=10, curvature=0.9, prior_precision=1.0)
    >>> score(torch.tensor([0.5]), torch.tensor([0.0]))
    tensor([0.1974])
    """
    precision = examples * curvature + prior_precision
    cost = math.log(precision / prior_precision) + price

    def score(mean: Tensor, error: Tensor) -> Tensor:
        return examples**2 * (mean.square() - error) / precision - cost

    return score


def adds_up(score: Score) -> bool:
    """Whether scores of weights add up to that of a group: evidence does; of the others a group has the norm."""
    return score not in (magnitudes, t_like)


# What all uses of an array saw in one batch: nearly always one.
Uses = Sequence[Seen]


def dense_gradient(uses: Uses, rows: slice) -> Tensor:
    """Gradient of all weights of some output units, ``[r, inputs * kernel]``, over all uses of the array."""
    found = [_of_one(seen, rows) for seen in uses]
    return found[0] if len(found) == 1 else torch.stack(found).sum(0)


def _of_one(seen: Seen, rows: slice) -> Tensor:
    form = seen.form
    if form.kind == "linear":
        g = seen.g.reshape(-1, form.rows)[:, rows]
        return g.mT @ seen.x.reshape(-1, form.columns)
    return _of_convolution(form, seen, rows)


def _of_convolution(form: Form, seen: Seen, rows: slice) -> Tensor:
    """By the backward pass of the convolution at an array of zeros, of some output channels."""
    channel = 1 - len(form.shape)
    g = seen.g.movedim(channel, 0)[rows].movedim(0, channel)
    with torch.enable_grad():
        weight = g.new_zeros(len(range(*rows.indices(form.rows))), *form.shape[1:]).requires_grad_()
        (gradient,) = torch.autograd.grad(form.run(seen.x, weight), weight, g)
    return gradient.reshape(len(gradient), -1)


def blocks(
    form: Form, batches: Sequence[Uses], size: int = _BLOCK, shift: Shift | None = None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Mean gradient over batches, shifted, and its squared standard error, ``[r, columns]``, for blocks of output units.

    From one batch alone the standard error is not known; it is zero.
    """
    # Channels of a grouped convolution do not come apart.
    step = max(1, size // form.columns) if form.groups == 1 else form.rows
    for first in range(0, form.rows, step):
        rows = slice(first, min(first + step, form.rows))
        each = [dense_gradient(uses, rows) for uses in batches]
        mean = each[0] if len(each) == 1 else sum(each[1:], each[0]) / len(each)
        error = _squared_error(each, mean)
        yield rows, mean if shift is None else _shifted(form, mean, rows, shift), error


def _shifted(form: Form, mean: Tensor, rows: slice, shift: Shift) -> Tensor:
    first, last = rows.start * form.columns, rows.stop * form.columns
    inside = (shift.indices >= first) & (shift.indices < last)
    moved = mean.reshape(-1).index_add(0, shift.indices[inside] - first, shift.by[inside])
    return moved.reshape(mean.shape)


def _squared_error(each: Sequence[Tensor], mean: Tensor) -> Tensor:
    n = len(each)
    if n == 1:
        return torch.zeros_like(mean)
    return sum(((e - mean).square() for e in each), torch.zeros_like(mean)) / ((n - 1) * n)


def top(
    form: Form,
    batches: Sequence[Uses],
    keep: Tensor,
    count: int,
    score: Score = magnitudes,
    *,
    shift: Shift | None = None,
    size: int = _BLOCK,
) -> Grown:
    """The ``count`` coordinates of highest score outside ``keep``.

    Args:
        form: of the layer.
        batches: what its uses saw.
        keep: indices that cannot be chosen, ascending, ``[m]``.
        count: how many to choose.
        score: of mean gradients and their squared standard errors.
        shift: of gradients at some coordinates.
        size: numbers in a block; the memory needed beside ``count``.

    Raises:
        NumericalError: a gradient is not finite.

    >>> form = Form("linear", (2, 2))
    >>> seen = Seen(form, torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, -3.0]]))
    >>> top(form, [[seen]], torch.tensor([3]), 2).indices.tolist()
    [2, 1]
    """
    device = keep.device
    best = Grown(batches[0][0].g.new_empty(0), torch.empty(0, dtype=torch.long, device=device))
    for rows, mean, error in blocks(form, batches, size, shift):
        scores = score(mean, error).reshape(-1)
        if not bool(scores.isfinite().all()):
            raise NumericalError("the gradient of a weight is not finite.")
        offset = rows.start * form.columns
        low, high = torch.searchsorted(
            keep, torch.tensor([offset, offset + len(scores)], device=device)
        )
        # Not zero: where all others are zero, or scores are negative, a kept member must still not come out.
        scores = scores.index_fill(0, keep[low:high] - offset, -math.inf)
        best = _merged(best, scores, offset, count)
    found = best.score > -math.inf
    return Grown(best.score[found], best.indices[found])


def _merged(best: Grown, scores: Tensor, offset: int, count: int) -> Grown:
    """The running best together with the best of a block."""
    values, at = scores.topk(min(count, len(scores)))
    score, index = torch.cat([best.score, values]), torch.cat([best.indices, at + offset])
    score, order = score.topk(min(count, len(score)))
    return Grown(score, index[order])


def root_mean_square(form: Form, batches: Sequence[Uses]) -> float:
    """Root mean square of a layer's dense gradient: what gradients of layers are compared by."""
    total = sum(float(mean.square().sum()) for _, mean, _ in blocks(form, batches))
    return math.sqrt(total / form.size)
