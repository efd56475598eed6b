"""The prior of the group Lasso as a rule: vectors whose density falls with their length.

Not elementwise, but in the shape that elementwise rules have: the ``d`` entries of a vector stand behind each other
on the last axis, and share the log normaliser of their vector in equal parts.

Sum-product: the law is a Gaussian whose variance ``t`` is drawn from Gamma((d + 1) / 2, 1 / (2 scale^2)), so all
moments are integrals over ``log t``. Max-sum: the block soft threshold, also where the entries of a vector have
pseudo-observations of unequal variance.

Sources: [Raman2009] for the scale mixture, [Yuan2006] for the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ppl.inference.amp.rules.record import Moments, Rule, bounded, log_normal

LogWeight = Callable[[Tensor], Tensor]  # of log t ``[K, *batch, groups]``

_COARSE, _FINE = 65, 129  # places of log t: to find the mass, and of the trapezoid rule over it
_FAR, _ABOVE = 40.0, 8.0  # nats below the largest weight that still matter; log t searched above
_STEPS = (
    40  # of Newton's method for the length of the maximum; exact at the first for equal variances
)


class Spread(NamedTuple):
    """Places of the variance ``t`` for every vector ``[K, *batch, groups]`` and their weights, which sum to one."""

    variance: Tensor
    weight: Tensor
    log_z: Tensor  # [*batch, groups] nats, of the whole vector


@dataclass(frozen=True)
class MultivariateLaplace(Rule):
    """Prior with density proportional to ``exp(-|x - mean| / scale)`` for vectors of ``d`` entries.

    ``mean`` and ``scale`` broadcast with ``r [*batch, groups * d]``; the scale is one for the entries of a vector.

    >>> rule = MultivariateLaplace(torch.zeros(1), torch.ones(1), 2)
    >>> rule.mode(torch.tensor([3.0, 4.0, 0.1, 0.1]), torch.ones(1)).mean
    tensor([2.4000, 3.2000, 0.0000, 0.0000])
    """

    mean: Tensor
    scale: Tensor
    d: int
    learnable: ClassVar[tuple[str, ...]] = ("scale",)

    def moments(self, r: Tensor, vr: Tensor) -> Moments:
        gap, vr = self._vectors(r, vr)
        spread = self._spread(gap, vr)
        t = spread.variance.unsqueeze(-1)  # [K, *batch, groups, 1]
        weight, gain = spread.weight.unsqueeze(-1), t / (t + vr)
        mean = (weight * gain).sum(0) * gap
        within = (weight * (gain * vr + (gain * gap - mean).square())).sum(0)
        log_z = (spread.log_z / self.d).unsqueeze(-1).expand_as(gap)
        return Moments(self.mean + mean.flatten(-2), within.flatten(-2), log_z.flatten(-2))

    def mode(self, r: Tensor, vr: Tensor) -> Moments:
        """The block soft threshold, ``x = r / (1 + vr / (scale |x|))`` or zero."""
        gap, vr = self._vectors(r, vr)
        scale = self._scales(gap)
        length = _length(gap, vr, scale.unsqueeze(-1))  # [*batch, groups, 1]
        pull = scale.unsqueeze(-1) * length
        x = torch.where(length > 0, gap / (1.0 + vr / pull), 0.0)
        unit, inverse = x / length, 1.0 / (1.0 / pull + 1.0 / vr)
        rest = pull - (unit.square() * inverse).sum(-1, keepdim=True)
        variance = torch.where(length > 0, inverse + (unit * inverse).square() / rest, 0.0)
        prior = (self._log_prob(x) / self.d).unsqueeze(-1).expand_as(gap)
        value = prior + log_normal(x - gap, vr)
        return Moments(self.mean + x.flatten(-2), variance.flatten(-2), value.flatten(-2))

    def log_prob(self, x: Tensor) -> Tensor:
        """Shares of the entries in the log-density of their vector."""
        gap, _ = self._vectors(x, torch.ones_like(x[..., :1]))
        return (self._log_prob(gap) / self.d).unsqueeze(-1).expand_as(gap).flatten(-2)

    def statistics(self, r: Tensor, vr: Tensor) -> dict[str, Tensor]:
        spread = self._spread(*self._vectors(r, vr))
        square = (spread.weight * spread.variance).sum(0) / (self.d + 1)
        return {"square": square.unsqueeze(-1).expand(*square.shape, self.d).flatten(-2)}

    def maximised(self, pooled: Mapping[str, Tensor], learn: Collection[str] | None = None) -> Self:
        return self.replaced(learn, scale=pooled["square"].sqrt())

    def prior_moments(self) -> tuple[Tensor, Tensor]:
        return self.mean, (self.d + 1) * self.scale.square()

    def drawn(self, r: Tensor, vr: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Draws ``[n, *batch, groups * d]``: a variance for each vector, then its entries."""
        gap, vr = self._vectors(r, vr)
        spread = self._spread(gap, vr)
        level = spread.weight.cumsum(0).movedim(0, -1).contiguous()
        u = torch.rand((*level.shape[:-1], n), generator=generator, dtype=r.dtype).to(r.device)
        at = torch.searchsorted(level, u * level[..., -1:]).clamp(max=level.shape[-1] - 1)
        t = spread.variance.movedim(0, -1).gather(-1, at).movedim(-1, 0).unsqueeze(-1)
        gain = t / (t + vr)
        noise = torch.randn((n, *gap.shape), generator=generator, dtype=r.dtype).to(r.device)
        return self.mean + (gain * gap + (gain * vr).sqrt() * noise).flatten(-2)

    def _vectors(self, r: Tensor, vr: Tensor) -> tuple[Tensor, Tensor]:
        """``r - mean`` as ``[*batch, groups, d]`` and its variance."""
        gap = (r - self.mean).unflatten(-1, (-1, self.d))
        vr = bounded(vr)
        wide = vr.unsqueeze(-1) if vr.shape[-1] == 1 else vr.unflatten(-1, (-1, self.d))
        return gap, wide.expand_as(gap)

    def _scales(self, gap: Tensor) -> Tensor:
        """One scale a vector ``[*batch, groups]``."""
        scale = self.scale
        scale = scale if scale.shape[-1] == 1 else scale[..., :: self.d]
        return scale.expand(gap.shape[:-1])

    def _log_prob(self, gap: Tensor) -> Tensor:
        scale = self._scales(gap)
        length = torch.linalg.vector_norm(gap, dim=-1)
        return -length / scale - self.d * scale.log() - _log_volume(self.d)

    def _spread(self, gap: Tensor, vr: Tensor) -> Spread:
        """Places and weights of the variance given a pseudo-observation."""
        scale = self._scales(gap)
        shape, rate = 0.5 * (self.d + 1), 0.5 / scale.square()
        constant = shape * rate.log() - math.lgamma(shape)

        def log_weight(u: Tensor) -> Tensor:  # [K, *batch, groups]
            t = u.exp()
            fit = log_normal(gap, t.unsqueeze(-1) + vr).sum(-1)
            return constant + shape * u - rate * t + fit

        with torch.no_grad():
            low, high = _ends(log_weight, gap, vr, scale)
        u = low + (high - low) * _even(_FINE, low)
        logs = log_weight(u) + ((high - low) / (_FINE - 1)).log()
        return Spread(u.exp(), logs.softmax(0), logs.logsumexp(0))


def _ends(log_weight: LogWeight, gap: Tensor, vr: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """First and last ``log t`` that matters ``[*batch, groups]``: its weight is within e^40 of the largest."""
    prior, seen = 2.0 * scale.log(), gap.square().sum(-1).clamp(min=1e-300).log()
    low = torch.minimum(prior, vr.amin(-1).log()) - _FAR
    high = torch.maximum(prior, seen) + _ABOVE
    for _ in range(2):
        u = low + (high - low) * _even(_COARSE, low)
        step = (high - low) / (_COARSE - 1)
        top = u.gather(0, log_weight(u).argmax(0, keepdim=True))[0]
        low, high = top - step, top + step
    away = _FAR * torch.logspace(-5, 0.5, _COARSE, dtype=low.dtype, device=low.device)
    away = away.reshape(-1, *(1,) * low.ndim)
    height = log_weight(top.unsqueeze(0)) - _FAR
    reach = [
        torch.where(log_weight(top + sign * away) < height, away, away[-1]).amin(0)
        for sign in (-1, 1)
    ]
    return top - reach[0], top + reach[1]


def _even(count: int, like: Tensor) -> Tensor:
    """Even places ``[count, 1, ...]`` from 0 to 1."""
    steps = torch.linspace(0.0, 1.0, count, dtype=like.dtype, device=like.device)
    return steps.reshape(-1, *(1,) * like.ndim)


def _length(gap: Tensor, vr: Tensor, scale: Tensor) -> Tensor:
    """``|x|`` at the maximum ``[*batch, groups, 1]``: the root of ``sum_j (gap_j / (l + vr_j / scale))^2 = 1``, or zero.

    Newton's method on the inverse root of the sum, which is nearly a straight line, from below.
    """
    edge = vr / scale
    whole = torch.linalg.vector_norm(gap, dim=-1, keepdim=True)
    length = (whole - edge.amax(-1, keepdim=True)).clamp(min=0.0)
    for _ in range(_STEPS):
        parts = gap / (length + edge)
        size = torch.linalg.vector_norm(parts, dim=-1, keepdim=True)
        slope = (parts.square() / (length + edge)).sum(-1, keepdim=True)
        step = (size - 1.0) * size.square() / slope
        new = (length + step).clamp(min=0.0)
        if bool(((new - length).abs() <= 1e-15 * whole).all()):
            break
        length = torch.where(step.isfinite(), new, length)
    return torch.where(
        torch.linalg.vector_norm(gap / edge, dim=-1, keepdim=True) > 1.0, length, 0.0
    )


def _log_volume(d: int) -> float:
    """Log of the integral of ``exp(-|x|)`` over ``d`` dimensions."""
    surface = math.log(2.0) + 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d)
    return surface + math.lgamma(d)
