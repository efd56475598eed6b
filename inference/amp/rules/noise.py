"""Channels in closed form: Gaussian noise, noise of any law, and noise on a function linear on either side of zero.

``z`` is the linear predictor, ``N(z; p, vp)`` what the algorithm believes of it, ``y`` the data.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from ppl.inference.amp.rules.piecewise import Piece, Piecewise, combined, positive
from ppl.inference.amp.rules.record import Moments, Rule, bounded, log_normal


@dataclass(frozen=True)
class GaussianNoise(Rule):
    """Channel ``y = z + N(0, variance)``.

    >>> one = torch.ones(1, dtype=torch.float64)
    >>> GaussianNoise(2 * one, one).moments(0 * one, one).mean
    tensor([1.], dtype=torch.float64)
    """

    y: Tensor
    variance: Tensor  # positive, one or one a row
    learnable: ClassVar[tuple[str, ...]] = ("variance",)

    def moments(self, r: Tensor, vr: Tensor) -> Moments:
        vr = bounded(vr)
        total, gap = self.variance + vr, self.y - r
        mean = r + (vr / total) * gap
        variance = (self.variance * (vr / total)).expand_as(mean)
        return Moments(mean, variance, log_normal(gap, total))

    def mode(self, r: Tensor, vr: Tensor) -> Moments:
        found = self.moments(r, vr)
        value = self.log_prob(found.mean) + log_normal(found.mean - r, bounded(vr))
        return found._replace(log_z=value)

    def log_prob(self, x: Tensor) -> Tensor:
        return log_normal(self.y - x, self.variance)

    def statistics(self, r: Tensor, vr: Tensor) -> dict[str, Tensor]:
        vr = bounded(vr)
        share = self.variance / (self.variance + vr)  # of the gap that stays after the update
        gap = share * (self.y - r)
        return {"square": torch.addcmul(share * vr, gap, gap)}

    def maximised(self, pooled: Mapping[str, Tensor], learn: Collection[str] | None = None) -> Self:
        return self.replaced(learn, variance=positive(pooled["square"]))

    def predict(self, p: Tensor, vp: Tensor) -> Tensor:
        return p


@dataclass(frozen=True)
class AdditiveNoise(Rule):
    """Channel ``y = z + noise`` whose noise follows any prior rule: Laplace, StudentT, mixtures, ...

    The parameters of the noise are learned under their own names.
    """

    y: Tensor
    noise: Rule

    @property
    def learnable(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.noise.learnable

    @property
    def trailing(self) -> int:  # type: ignore[override]
        return self.noise.trailing

    def moments(self, r: Tensor, vr: Tensor) -> Moments:
        found = self.noise.moments(self.y - r, vr)
        return found._replace(mean=self.y - found.mean)

    def mode(self, r: Tensor, vr: Tensor) -> Moments:
        found = self.noise.mode(self.y - r, vr)
        return found._replace(mean=self.y - found.mean)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.noise.log_prob(self.y - x)

    def statistics(self, r: Tensor, vr: Tensor) -> dict[str, Tensor]:
        return self.noise.statistics(self.y - r, vr)

    def maximised(self, pooled: Mapping[str, Tensor], learn: Collection[str] | None = None) -> Self:
        return replace(self, noise=self.noise.maximised(pooled, learn))

    def predict(self, p: Tensor, vp: Tensor) -> Tensor:
        return p + self.noise.prior_moments()[0]


@dataclass(frozen=True)
class _Folded(Piecewise):
    """``y = g(z) + N(0, variance)`` with ``g`` linear on either side of zero."""

    y: Tensor
    variance: Tensor  # not negative; 0 is held at the smallest usable number
    learnable: ClassVar[tuple[str, ...]] = ("variance",)
    slope: ClassVar[float] = 0.0  # of g left of zero

    def pieces(self) -> tuple[Piece, ...]:
        variance = bounded(self.variance)
        constant = -0.5 * (2.0 * math.pi * variance).log()
        right = Piece(constant, 0.0, 1.0 / variance, self.y, low=0.0)
        if self.slope == 0.0:
            return right, Piece(constant - 0.5 * self.y.square() / variance, high=0.0)
        left = Piece(constant, 0.0, 1.0 / variance, self.y / self.slope, high=0.0)
        return right, left

    def statistics(self, r: Tensor, vr: Tensor) -> dict[str, Tensor]:
        parts = self.parts(r, vr)
        weights, slope = combined(parts)[1], self.slope
        right, left = parts
        residual = (self.y - right.mean).square() + right.variance
        other = (self.y - slope * left.mean).square() + slope * slope * left.variance
        return {"square": weights[0] * residual + weights[1] * other}

    def maximised(self, pooled: Mapping[str, Tensor], learn: Collection[str] | None = None) -> Self:
        return self.replaced(learn, variance=positive(pooled["square"]))

    def predict(self, p: Tensor, vp: Tensor) -> Tensor:
        scale = bounded(vp).sqrt()
        t = p / scale
        # E[max(z, 0)], and E[max(-z, 0)] = E[max(z, 0)] - p
        density = torch.exp(-0.5 * t.square()) / math.sqrt(2.0 * math.pi)
        positive_part = p * torch.special.ndtr(t) + scale * density
        return positive_part - self.slope * (positive_part - p)


@dataclass(frozen=True)
class ReLU(_Folded):
    """Channel ``y = max(z, 0) + N(0, variance)``."""

    slope: ClassVar[float] = 0.0


@dataclass(frozen=True)
class Modulus(_Folded):
    """Channel ``y = |z| + N(0, variance)`` for real ``z``: phase retrieval with signs lost."""

    slope: ClassVar[float] = -1.0
