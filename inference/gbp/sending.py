"""Which of the new messages are sent: all, random rows, those that change most; and dropout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.inference.gbp.layout import Part
from ppl.inference.gbp.problem import Problem
from ppl.inference.numerics.gaussian import Gaussian


class Offer(NamedTuple):
    """New messages of a part beside those that they would replace, a slot each."""

    part: Part
    new: list[Gaussian]  # eta [F, B, d], lam [F, B, d, d]
    old: list[Gaussian]


def accepted(
    problem: Problem, offers: Sequence[Offer], beliefs: Mapping[str, Gaussian], rng: torch.Generator
) -> list[list[Tensor] | None]:
    """Masks ``[F, B]`` a slot of the messages that are sent; None where all are."""
    options, schedule = problem.options, problem.plan.schedule
    masks: list[list[Tensor] | None] = [None] * len(offers)
    if schedule == "random":
        masks = [_rows_drawn(offer, options.active, rng) for offer in offers]
    elif schedule == "residual":
        masks = _most_changed(offers, beliefs, options.active)
    if options.dropout:
        pairs = zip(offers, masks, strict=True)
        masks = [_dropped(offer, mask, options.dropout, rng) for offer, mask in pairs]
    return masks


def _uniform(rng: torch.Generator, like: Tensor, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=rng).to(like.device)


def _rows_drawn(offer: Offer, share: float, rng: torch.Generator) -> list[Tensor]:
    drawn = _uniform(rng, offer.new[0].eta, offer.part.count, 1) < share
    return [drawn.expand(m.eta.shape[:2]) for m in offer.new]


def _dropped(
    offer: Offer, mask: list[Tensor] | None, share: float, rng: torch.Generator
) -> list[Tensor]:
    sent = [_uniform(rng, m.eta, *m.eta.shape[:2]) >= share for m in offer.new]
    return sent if mask is None else [a & b for a, b in zip(sent, mask, strict=True)]


def _most_changed(
    offers: Sequence[Offer], beliefs: Mapping[str, Gaussian], share: float
) -> list[list[Tensor] | None]:
    """The ``share`` of all rows with the largest change, in units of the beliefs."""
    scores = [_change(offer, beliefs) for offer in offers]
    everything = torch.cat(scores)
    if not len(everything):
        return [None] * len(offers)
    least = everything.topk(max(int(share * len(everything)), 1)).values[-1]
    return [
        [(score >= least).unsqueeze(1).expand(m.eta.shape[:2]) for m in offer.new]
        for score, offer in zip(scores, offers, strict=True)
    ]


def _change(offer: Offer, beliefs: Mapping[str, Gaussian]) -> Tensor:
    largest = offer.new[0].eta.new_zeros(offer.part.count)
    for wire, n, o in zip(offer.part.wires, offer.new, offer.old, strict=True):
        belief = wire.gather(beliefs[wire.family].lam.diagonal(dim1=-2, dim2=-1))
        size = torch.maximum(belief, n.lam.diagonal(dim1=-2, dim2=-1))
        size = size.clamp(min=torch.finfo(size.dtype).tiny)
        eta = (n.eta - o.eta).abs() / size.sqrt()
        lam = (n.lam - o.lam).diagonal(dim1=-2, dim2=-1).abs() / size
        largest = torch.maximum(largest, torch.maximum(eta, lam).flatten(1).amax(1))
    return largest


__all__ = ["Offer", "accepted"]
