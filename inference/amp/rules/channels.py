"""Channels in closed form: here those with a threshold, probit, sign, intervals (quantised, ordinal), censoring.

``z`` is the linear predictor, ``N(z; p, vp)`` what the algorithm believes of it; the data say on which side of an
edge, or between which two, ``z`` plus Gaussian noise lies.  Those with noise alone are in ``noise.py``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from ppl.inference.amp.rules.noise import AdditiveNoise, GaussianNoise, Modulus, ReLU
from ppl.inference.amp.rules.piecewise import Piece, maximised, positive
from ppl.inference.amp.rules.quadrature import maximum
from ppl.inference.amp.rules.record import Moments, Rule, bounded
from ppl.inference.amp.rules.truncation import half_line, interval, standardised

__all__ = ["AdditiveNoise", "Censored", "GaussianNoise", "Interval", "Modulus", "Probit", "ReLU"]


@dataclass(frozen=True)
class Probit(Rule):
    """Channel ``P(y > 0 | z) = Phi(z / sqrt(variance))``; variance 0 is the sign channel.

    The variance is learned from ``E[noise^2 | y]``, the noise being that of ``y = sign(z + noise)``.

    >>> rule = Probit(torch.ones(1).double(), torch.ones(()).double())
    >>> rule.moments(torch.zeros(1).double(), torch.ones(()).double()).mean
    tensor([0.5642], dtype=torch.float64)
    """

    y: Tensor  # success where positive: 0 and 1, or -1 and 1
    variance: Tensor  # not negative, of the latent noise
    learnable: ClassVar[tuple[str, ...]] = ("variance",)

    def _signed(self, r: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        sign = torch.where(self.y > 0, 1.0, -1.0).to(r.dtype)
        return sign, sign * r * total.rsqrt()

    def moments(self, r: Tensor, vr: Tensor) -> Moments:
        vr = bounded(vr)
        total = self.variance + vr
        sign, t = self._signed(r, total)
        cut, kept = half_line(t), self.variance / total
        gain = vr / total
        # The shift of the mean is h = cut.shift - min(t, 0); z follows the latent u by the gain.
        mean = r + sign * (gain * total.sqrt()) * (cut.shift - t.clamp(max=0.0))
        variance = vr * torch.addcmul(kept.expand_as(t), gain.expand_as(t), cut.variance)
        return Moments(mean, variance, cut.log_mass - 0.5 * t.clamp(max=0.0).square())

    def mode(self, r: Tensor, vr: Tensor) -> Moments:
        vr = bounded(vr)
        if bool((self.variance == 0).all()):
            sign = torch.where(self.y > 0, 1.0, -1.0).to(r.dtype)
            part = maximised(Piece(low=0.0), sign * r, vr)
            return Moments(sign * part.mean, part.variance, part.log_weight)
        return maximum(self.log_prob, r, vr, 0.0, self.variance.sqrt())

    def log_prob(self, x: Tensor) -> Tensor:
        signed = torch.where(self.y > 0, x, -x)
        hard = torch.where(signed > 0, 0.0, -math.inf)
        soft = torch.special.log_ndtr(
            signed / torch.where(self.variance > 0, self.variance, 1.0).sqrt()
        )
        return torch.where(self.variance > 0, soft, hard)

    def statistics(self, r: Tensor, vr: Tensor) -> dict[str, Tensor]:
        vr = bounded(vr)
        total = self.variance + vr
        _, t = self._signed(r, total)
        cut = half_line(t)
        shift = cut.shift - t.clamp(max=0.0)
        share = self.variance / total
        spread = cut.variance + shift.square()  # of the latent, in units of total
        return {"square": share * (vr + self.variance * spread)}

    def maximised(self, pooled: Mapping[str, Tensor], learn: Collection[str] | None = None) -> Self:
        return self.replaced(learn, variance=positive(pooled["square"]))

    def predict(self, p: Tensor, vp: Tensor) -> Tensor:
        """Probability of a success."""
        return torch.special.ndtr(p * (self.variance + bounded(vp)).rsqrt())


@dataclass(frozen=True)
class Interval(Rule):
    """Channel "``z + N(0, variance)`` lies in ``(low, high)``": quantised, ordinal or censored data.

    Variance 0 is allowed.  For ordinal data gather the edges from the cut points,
    ``cuts[y - 1], cuts[y]``: ``log_z`` differentiates to them.
    """

    low: Tensor  # may be -inf
    high: Tensor  # may be inf
    variance: Tensor  # not negative
    learnable: ClassVar[tuple[str, ...]] = ("variance",)

    def _latent(self, r: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean minus ``r`` and variance of ``z + noise``, and the log of the mass."""
        scale = total.sqrt()
        low, high, width = standardised(self.low, self.high, r, scale)
        cut = interval(low, high, width)
        edge = torch.where(low > 0, low, torch.where(high < 0, high, 0.0))
        log_z = cut.log_mass - 0.5 * edge.square()
        return scale * (edge + cut.shift), total * cut.variance, log_z

    def moments(self, r: Tensor, vr: Tensor) -> Moments:
        vr = bounded(vr)
        total = self.variance + vr
        gain = vr / total
        shift, spread, log_z = self._latent(r, total)
        return Moments(r + gain * shift, gain * (self.variance + gain * spread), log_z)

    def mode(self, r: Tensor, vr: Tensor) -> Moments:
        vr = bounded(vr)
        if bool((self.variance == 0).all()):
            return Moments(*_reordered(maximised(Piece(low=self.low, high=self.high), r, vr)))
        finite = torch.where(self.low.isfinite(), self.low, self.high)
        return maximum(self.log_prob, r, vr, finite, self.variance.sqrt())

    def log_prob(self, x: Tensor) -> Tensor:
        inside = (x >= self.low) & (x <= self.high)
        some = torch.where(self.variance > 0, self.variance, 1.0)
        soft = self._latent(x, some)[2]
        return torch.where(self.variance > 0, soft, torch.where(inside, 0.0, -math.inf))

    def statistics(self, r: Tensor, vr: Tensor) -> dict[str, Tensor]:
        vr = bounded(vr)
        total = self.variance + vr
        share = self.variance / total
        shift, spread, _ = self._latent(r, total)
        return {"square": share * (vr + share * (spread + shift.square()))}

    def maximised(self, pooled: Mapping[str, Tensor], learn: Collection[str] | None = None) -> Self:
        return self.replaced(learn, variance=positive(pooled["square"]))

    def predict(self, p: Tensor, vp: Tensor) -> Tensor:
        """Probability of the interval."""
        return self._latent(p, self.variance + bounded(vp))[2].exp()


@dataclass(frozen=True)
class Censored(Rule):
    """Channel ``y = clamp(z + N(0, variance), low, high)``: exact inside, a bound at either edge.

    ``low = 0`` is a ReLU behind the noise; with variance 0 it is the ReLU without noise.
    """

    y: Tensor
    low: Tensor  # may be -inf
    high: Tensor  # may be inf
    variance: Tensor  # not negative
    learnable: ClassVar[tuple[str, ...]] = ("variance",)

    def _parts(self, r: Tensor) -> tuple[Tensor, GaussianNoise, Interval]:
        below, above = self.y <= self.low, self.y >= self.high
        some = torch.zeros_like(r)
        beyond = Interval(
            torch.where(above, self.high, -math.inf) + some,
            torch.where(below, self.low, math.inf) + some,
            self.variance,
        )
        return below | above, GaussianNoise(self.y, self.variance), beyond

    def moments(self, r: Tensor, vr: Tensor) -> Moments:
        cut, exact, beyond = self._parts(r)
        return _chosen(cut, beyond.moments(r, vr), exact.moments(r, vr))

    def mode(self, r: Tensor, vr: Tensor) -> Moments:
        cut, exact, beyond = self._parts(r)
        return _chosen(cut, beyond.mode(r, vr), exact.mode(r, vr))

    def log_prob(self, x: Tensor) -> Tensor:
        cut, exact, beyond = self._parts(x)
        return torch.where(cut, beyond.log_prob(x), exact.log_prob(x))

    def statistics(self, r: Tensor, vr: Tensor) -> dict[str, Tensor]:
        cut, exact, beyond = self._parts(r)
        inner, outer = exact.statistics(r, vr), beyond.statistics(r, vr)
        return {"square": torch.where(cut, outer["square"], inner["square"])}

    def maximised(self, pooled: Mapping[str, Tensor], learn: Collection[str] | None = None) -> Self:
        return self.replaced(learn, variance=positive(pooled["square"]))

    def predict(self, p: Tensor, vp: Tensor) -> Tensor:
        total = self.variance + bounded(vp)
        scale = total.sqrt()
        low, high, width = standardised(self.low, self.high, p, scale)
        cut = interval(low, high, width)
        edge = torch.where(low > 0, low, torch.where(high < 0, high, 0.0))
        mass = torch.exp(cut.log_mass - 0.5 * edge.square())
        ends = _weighed(torch.special.ndtr(low), self.low)
        ends = ends + _weighed(torch.special.ndtr(-high), self.high)
        return mass * (p + scale * (edge + cut.shift)) + ends


def _chosen(where: Tensor, one: Moments, other: Moments) -> Moments:
    return Moments(*(torch.where(where, a, b) for a, b in zip(one, other, strict=True)))


def _reordered(part: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    value, place, variance = part
    return place, variance, value


def _weighed(share: Tensor, edge: Tensor) -> Tensor:
    """``share * edge`` with no share of an edge at infinity."""
    return share * torch.where(edge.isfinite(), edge, 0.0)
