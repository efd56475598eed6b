"""What a rule believes of single elements, as the marginal that a posterior keeps.

The product of a law with its Gaussian pseudo-observation is known in form: a Gaussian cut at the edges of the law,
one for each piece or component, beside the point mass of a spike. Mean and standard deviation are those of the rule;
quantiles are exact for these forms, and never lie outside the support.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppl import marginals as mg
from ppl.inference.amp.draws import slab_of, stretches
from ppl.inference.amp.rules.mixtures import GaussianMixture
from ppl.inference.amp.rules.piecewise import Piecewise
from ppl.inference.amp.rules.priors import Sparse
from ppl.inference.amp.rules.quadrature import Quadrature
from ppl.inference.amp.rules.record import Moments, Rule, bounded
from ppl.marginals import Marginal

_STRETCHES = 32  # for a law that is known by its density alone
_NUMBERS = 10**7  # kept for them at most; above it one Gaussian is cut at the edges of the law
_COMPONENTS = 16  # of a mixture that is kept whole

Shaped = Callable[[Tensor], Tensor]
Fields = dict[str, Tensor]


def described(
    rule: Rule, answer: Moments, r: Tensor, vr: Tensor, shaped: Shaped, *, is_product: bool
) -> Marginal:
    """The marginal of one block of elements.

    Args:
        rule: its prior.
        answer: moments, or the maximum with its curvature.
        r: pseudo-observation ``[1, B, n]``.
        vr: its variance.
        shaped: from ``[1, B, n]`` to ``[*plates, *event]``.
        is_product: whether a gate multiplies the element: then it follows its own prior where the gate is off.
    """
    if is_product and isinstance(rule, Sparse):
        return _factor(rule, r, vr, shaped)
    mean, sd = answer.mean, answer.variance.clamp(min=0.0).sqrt()
    fields = _pieces(slab_of(rule) if isinstance(rule, Sparse) else rule, answer, r, vr)
    if isinstance(rule, Sparse):
        fields["share"] = rule.inclusion(r, vr)
    elif fields.keys() == {"loc", "scale"} and len(fields["loc"]) == 1:
        return mg.Gaussian(shaped(mean), shaped(sd))
    whole = {k: _by_piece(v, r, shaped) for k, v in fields.items() if k != "share"}
    if "share" in fields:
        whole["share"] = shaped(fields["share"])
    return mg.Pieces(shaped(mean), shaped(sd), **whole)


def _by_piece(x: Tensor, r: Tensor, shaped: Shaped) -> Tensor:
    return torch.stack([shaped(part) for part in x.expand(len(x), *r.shape)])


def _pieces(rule: Rule, answer: Moments, r: Tensor, vr: Tensor) -> Fields:
    """Fields of :class:`~ppl.pieces.Pieces` with axes ``[K, 1, B, n]``."""
    if isinstance(rule, Piecewise):
        return _cut(rule, r, bounded(vr))
    if isinstance(rule, GaussianMixture) and rule.components()[1].shape[-1] <= _COMPONENTS:
        each = rule.posterior(r, vr)
        spread = each.variance.clamp(min=0.0).sqrt()
        parts = (each.mean, spread, each.weight)
        shape = (*r.shape, each.weight.shape[-1])
        loc, scale, weights = (x.expand(shape).movedim(-1, 0) for x in parts)
        return {"loc": loc, "scale": scale, "weights": weights}
    if isinstance(rule, Quadrature):
        return _by_density(rule, answer, r, vr)
    found = rule.moments(r, vr)
    return _one(found)


def _one(found: Moments) -> Fields:
    return {"loc": found.mean[None], "scale": found.variance.clamp(min=0.0).sqrt()[None]}


def _cut(rule: Piecewise, r: Tensor, vr: Tensor) -> Fields:
    """Each piece times the pseudo-observation is a Gaussian cut at the edges of the piece."""
    locs, scales, lows, highs = [], [], [], []
    for piece in rule.pieces():
        shrink = 1.0 / (1.0 + piece.curvature * vr)
        locs.append(r + shrink * vr * (piece.slope + piece.curvature * (piece.centre - r)))
        scales.append((vr * shrink).sqrt().expand_as(r))
        lows.append(_edge(piece.low, -torch.inf, r))
        highs.append(_edge(piece.high, torch.inf, r))
    logs = torch.stack([part.log_weight.expand_as(r) for part in rule.parts(r, vr)])
    parts: dict[str, Any] = {"loc": locs, "scale": scales, "low": lows, "high": highs}
    found = {k: torch.stack(v) for k, v in parts.items()}
    return found if len(locs) == 1 else found | {"weights": logs.softmax(0)}


def _edge(edge: Tensor | float | None, infinite: float, like: Tensor) -> Tensor:
    return torch.as_tensor(infinite if edge is None else edge).to(like).expand_as(like)


def _by_density(rule: Quadrature, answer: Moments, r: Tensor, vr: Tensor) -> Fields:
    """Even stretches; of very many elements one Gaussian cut at the edges."""
    if r.numel() * _STRETCHES > _NUMBERS:
        low, high = (_edge(edge, 0.0, r)[None] for edge in (rule.low, rule.high))
        return _one(answer) | {"low": low, "high": high}
    edges, weights = stretches(rule, r, vr, _STRETCHES)
    loc = 0.5 * (edges[1:] + edges[:-1])
    return {
        "loc": loc,
        "scale": torch.full_like(loc, torch.inf),
        "weights": weights.reshape(-1, *(1,) * r.ndim).expand_as(loc),
        "low": edges[:-1],
        "high": edges[1:],
    }


def _factor(rule: Sparse, r: Tensor, vr: Tensor, shaped: Shaped) -> mg.Pieces:
    """A factor that a gate multiplies: what was seen where the gate is on, its prior where it is off."""
    slab, share = slab_of(rule), rule.inclusion(r, vr).expand_as(r)
    on, (mean, variance) = slab.moments(r, vr), slab.prior_moments()
    centre = share * on.mean + (1 - share) * mean
    spread = share * on.variance + (1 - share) * variance
    spread = spread + share * (1 - share) * (on.mean - mean).square()
    loc = torch.stack([on.mean, mean.expand_as(r)])
    scale = torch.stack([on.variance.expand_as(r), variance.expand_as(r)]).sqrt()
    fields = {"loc": loc, "scale": scale, "weights": torch.stack([share, 1 - share])}
    return mg.Pieces(
        shaped(centre),
        shaped(spread.sqrt()),
        **{k: _by_piece(v, r, shaped) for k, v in fields.items()},
    )
