"""An update of all sets: budgets of layers that stay, one budget that layers share, or one that the evidence sets.

Source: [Li2024] algorithm 1 (:func:`within_layers`); the other two extend it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.inference.ssvi import growth, sets, structured
from ppl.inference.ssvi.growth import Grown, Score, Shift, Uses
from ppl.inference.ssvi.patterns import Form
from ppl.inference.ssvi.sets import Change
from ppl.inference.ssvi.structured import Groups


class Moving(NamedTuple):
    """A layer whose set an update may change."""

    form: Form
    groups: Groups | None  # None: weights stand alone
    indices: Tensor  # its set, [k], ascending
    scores: Tensor  # removal scores [k]
    seen: Sequence[Uses]  # inputs and gradients at the outputs of its uses, a batch each
    growth: Score  # of gradients
    pull: Tensor | None = None  # [k]: what gradients of members owe to their present values

    def shift(self, gone: Tensor) -> Shift | None:
        """Gradients of members ``[k]`` that go, as they would be at zero."""
        return None if self.pull is None else Shift(self.indices[gone], -self.pull[gone])


def within_layers(layers: Sequence[Moving], share: float, is_sum: bool = False) -> list[Change]:
    """Replace a share of the set of each layer by its weights of highest growth; the sizes stay.

    Args:
        layers: to update.
        share: of each set, in [0, 1].
        is_sum: whether removal scores of weights add up to those of groups.
    """
    return [
        _weights_moved(layer, share)
        if layer.groups is None
        else _groups_moved(layer, share, is_sum)
        for layer in layers
    ]


def _weights_moved(layer: Moving, share: float) -> Change:
    count = math.floor(share * len(layer.indices))
    if count == 0 or len(layer.indices) == layer.form.size:
        return unmoved(layer.indices)
    keep = sets.kept(layer.scores, count)
    grown = _top(layer, keep, count)
    return sets.joined(layer.indices, keep, grown.indices)


def _top(layer: Moving, keep: Tensor, count: int) -> Grown:
    shift = layer.shift(~keep)
    return growth.top(layer.form, layer.seen, layer.indices[keep], count, layer.growth, shift=shift)


def _groups_moved(layer: Moving, share: float, is_sum: bool) -> Change:
    groups = layer.groups
    assert groups is not None
    active, scores = structured.group_scores(groups, layer.indices, layer.scores, is_sum)
    count = math.floor(share * len(active))
    if count == 0 or len(active) == groups.number:
        return unmoved(layer.indices)
    keep = sets.kept(scores, count)
    gone = torch.isin(structured.group_of(groups, layer.indices), active[~keep])
    shift = layer.shift(gone)
    adds_up = growth.adds_up(layer.growth)
    grown = structured.top_groups(
        groups, layer.seen, active[keep], count, layer.growth, adds_up, shift
    )
    return structured.as_weights(groups, layer.indices, sets.joined(active, keep, grown.indices))


def across_layers(layers: Sequence[Moving], share: float) -> list[Change]:
    """Replace a share of all members by one threshold over all layers; their total stays.

    Sizes of gradients are compared in units of their root mean square in each layer; standard errors and evidence have no unit.
    Every output unit keeps its best weight.
    """
    count = math.floor(share * sum(len(m.indices) for m in layers))
    keeps = _kept_of_all(layers, count)
    count = sum(int((~k).sum()) for k in keeps)
    if count == 0:
        return [unmoved(m.indices) for m in layers]
    found = []
    for layer, keep in zip(layers, keeps, strict=True):
        grown = _top(layer, keep, count)
        found.append(grown._replace(score=grown.score / _unit(layer)))
    return _joined_all(layers, keeps, _best_of_all(found, count))


def _unit(layer: Moving) -> float:
    if layer.growth is not growth.magnitudes:
        return 1.0
    return growth.root_mean_square(layer.form, layer.seen) or 1.0


def _kept_of_all(layers: Sequence[Moving], count: int) -> list[Tensor]:
    scores = torch.cat([m.scores for m in layers])
    protected = torch.cat([_protected(m) for m in layers])
    keep = sets.kept(scores, count, protected)
    return list(keep.split([len(m.indices) for m in layers]))


def _protected(layer: Moving) -> Tensor:
    """The best weight of every output unit, so that no unit dies."""
    return sets.best_of_rows(layer.scores, layer.indices // layer.form.columns, layer.form.rows)


def _best_of_all(found: Sequence[Grown], count: int) -> list[Tensor]:
    """The best candidates over all layers, as indices of each."""
    scores = torch.cat([g.score for g in found])
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[scores.topk(min(count, len(scores))).indices] = True
    parts = mask.split([len(g.score) for g in found])
    return [g.indices[part] for g, part in zip(found, parts, strict=True)]


def _joined_all(
    layers: Sequence[Moving], keeps: Sequence[Tensor], grown: Sequence[Tensor]
) -> list[Change]:
    return [sets.joined(m.indices, k, g) for m, k, g in zip(layers, keeps, grown, strict=True)]


def by_evidence(layers: Sequence[Moving], room: int) -> list[Change]:
    """Remove every weight that the evidence does not pay for, add those that promise to; the total is a result.

    Args:
        layers: with evidence as removal score and :func:`ppl.inference.ssvi.growth.gains` as growth, less what a weight costs.
        room: most weights that may be added.
    """
    keeps = [(m.scores >= 0) | _protected(m) for m in layers]
    for layer in layers:
        sets.kept(layer.scores, 0)  # refuses NaN
    if room <= 0:
        return _joined_all(layers, keeps, [m.indices[:0] for m in layers])
    found = []
    for layer, keep in zip(layers, keeps, strict=True):
        grown = _top(layer, keep, room)
        pays = grown.score > 0
        found.append(Grown(grown.score[pays], grown.indices[pays]))
    return _joined_all(layers, keeps, _best_of_all(found, room))


def unmoved(index: Tensor) -> Change:
    """The change that changes nothing.

    >>> unmoved(torch.tensor([2, 5])).source
    tensor([0, 1])
    """
    return Change(index, torch.arange(len(index), device=index.device))
