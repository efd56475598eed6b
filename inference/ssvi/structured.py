"""Sets of whole groups of weights: input units, output units, kernels, blocks.

A group is active or not as a whole, so that what is left is a smaller dense product (units, channels) or runs on block formats.
A set is still a list of weights; everything here goes from weights to groups and back. Scores of groups: the sum of the evidence
of their weights, or the root of the sum of squares of any other score; they are added by the norm of their gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ppl.inference.ssvi.growth import Grown, Score, Shift, Uses, blocks, magnitudes
from ppl.inference.ssvi.patterns import Form, Kernel
from ppl.inference.ssvi.sets import Change

Sets = Literal["weight", "neuron", "output", "channel", "kernel", "block"]


class Groups(NamedTuple):
    """How the weights of an array fall into groups: tiles of output units by inputs, with whole kernels.

    An input unit is a tile as high as the array, an output unit one as wide.
    """

    form: Form
    tile: tuple[int, int]  # output units, inputs

    @property
    def inputs(self) -> int:
        """Input units or channels."""
        return self.form.shape[1]

    @property
    def places(self) -> int:
        """Weights of a kernel."""
        return math.prod(self.form.shape[2:])

    @property
    def across(self) -> int:
        """Groups beside each other."""
        return -(-self.inputs // self.tile[1])

    @property
    def number(self) -> int:
        """Groups of the array."""
        return -(-self.form.rows // self.tile[0]) * self.across

    @property
    def size(self) -> int:
        """Weights of a group; those at the border may have fewer."""
        return self.tile[0] * self.tile[1] * self.places

    @property
    def kernel(self) -> Kernel | None:
        """The compact product that sets of such groups have."""
        if self.tile[0] >= self.form.rows:
            return "columns"
        return "rows" if self.tile[1] >= self.inputs else None


def groups_of(sets: Sets, form: Form, block: tuple[int, int] = (16, 16)) -> Groups | None:
    """The groups of an array, or None where its weights stand alone.

    ``"neuron"``: input units of a linear layer, input channels of a convolution; ``"output"``: output units or channels;
    ``"channel"``: input channels of convolutions only; ``"kernel"``: kernels of convolutions only; ``"block"``: tiles of
    linear layers, of channels in convolutions. Weights of a grouped convolution always stand alone.

    >>> groups_of("neuron", Form("linear", (10, 4))).number
    4
    """
    rows, inputs = form.shape[:2]
    is_linear = form.kind == "linear"
    if sets == "weight" or (is_linear and sets in ("channel", "kernel")) or form.groups > 1:
        return None
    tiles = {
        "neuron": (rows, 1),
        "channel": (rows, 1),
        "output": (1, inputs),
        "kernel": (1, 1),
        "block": (min(block[0], rows), min(block[1], inputs)),
    }
    return Groups(form, tiles[sets])


def group_of(groups: Groups, index: Tensor) -> Tensor:
    """The group of each weight, ``[k]`` -> ``[k]``.

    >>> group_of(Groups(Form("linear", (2, 4)), (2, 2)), torch.tensor([1, 2, 5, 7]))
    tensor([0, 1, 0, 1])
    """
    row, rest = index // groups.form.columns, index % groups.form.columns
    tile = rest // groups.places // groups.tile[1]
    return row // groups.tile[0] * groups.across + tile


def members(groups: Groups, chosen: Tensor) -> Tensor:
    """All weights of some groups ``[n]``, ascending.

    >>> members(Groups(Form("linear", (2, 4)), (2, 2)), torch.tensor([1]))
    tensor([2, 3, 6, 7])
    """
    (high, wide), device = groups.tile, chosen.device
    row = (chosen // groups.across * high)[:, None, None, None]
    column = (chosen % groups.across * wide)[:, None, None, None]
    row = row + torch.arange(high, device=device)[:, None, None]
    column = column + torch.arange(wide, device=device)[:, None]
    place = torch.arange(groups.places, device=device)
    index = row * groups.form.columns + column * groups.places + place
    inside = (row < groups.form.rows) & (column < groups.inputs)
    return index[inside.expand_as(index)].sort().values


def group_scores(
    groups: Groups, index: Tensor, scores: Tensor, is_sum: bool
) -> tuple[Tensor, Tensor]:
    """The active groups ``[n]``, ascending, and the score of each ``[n]``.

    Args:
        groups: of the array.
        index: its set, ``[k]``.
        scores: of the weights, ``[k]``.
        is_sum: whether scores add up, as evidence does; else the root of the sum of squares.
    """
    active, place = group_of(groups, index).unique(return_inverse=True)
    totals = scores.new_zeros(len(active)).index_add(
        0, place, scores if is_sum else scores.square()
    )
    return active, totals if is_sum else totals.sqrt()


def top_groups(
    groups: Groups,
    batches: Sequence[Uses],
    keep: Tensor,
    count: int,
    score: Score = magnitudes,
    is_sum: bool = False,
    shift: Shift | None = None,
) -> Grown:
    """The ``count`` groups of highest gradient outside ``keep``, as :func:`ppl.inference.ssvi.growth.top` for weights."""
    totals = batches[0][0].g.new_zeros(groups.number)
    columns = torch.arange(groups.form.columns, device=totals.device)
    for rows, mean, error in blocks(groups.form, batches, shift=shift):
        found = score(mean, error)
        of_rows = torch.arange(rows.start, rows.stop, device=totals.device) * groups.form.columns
        where = group_of(groups, (of_rows[:, None] + columns).reshape(-1))
        totals = totals.index_add(0, where, (found if is_sum else found.square()).reshape(-1))
    totals = totals.index_fill(0, keep, -math.inf)
    values, index = totals.topk(min(count, groups.number - len(keep)))
    return Grown(values, index)


def as_weights(groups: Groups, index: Tensor, change: Change) -> Change:
    """A change of groups as one of weights; ``index`` ``[k]`` is the old set of weights."""
    new = members(groups, change.indices)
    at = torch.searchsorted(index, new).clamp(max=len(index) - 1)
    return Change(new, torch.where(index[at] == new, at, -1))
