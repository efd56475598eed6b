"""Rules whose log-density is quadratic on each of a few intervals: exact moments and exact maxima.

A piece times the Gaussian ``N(x; r, vr)`` is a truncated Gaussian, so a rule is the list of its pieces.
Each integral is formed relative to the largest value of the integrand on the piece, where
nothing cancels however sharp or flat either factor is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ppl.inference.amp.rules.record import Moments, Rule, bounded
from ppl.inference.amp.rules.truncation import (
    HALF_LOG_2PI,
    Truncated,
    half_line,
    interval,
    standardised,
)
from ppl.shapes import broadcast_shapes


class Piece(NamedTuple):
    """Log-density ``constant + slope x - curvature (x - centre)^2 / 2`` on ``(low, high)``."""

    constant: Tensor | float = 0.0
    slope: Tensor | float = 0.0
    curvature: Tensor | float = 0.0  # not negative
    centre: Tensor | float = 0.0
    low: Tensor | float | None = None  # None: no edge on this side
    high: Tensor | float | None = None

    def at(self, x: Tensor) -> Tensor:
        """The log-density without regard to the edges."""
        value = self.constant + self.slope * x
        if isinstance(self.curvature, float) and self.curvature == 0.0:
            return value
        return value - 0.5 * self.curvature * (x - self.centre) ** 2

    def covers(self, x: Tensor) -> Tensor:
        """Whether ``x`` lies between the edges."""
        above = torch.ones_like(x, dtype=torch.bool) if self.low is None else x >= self.low
        return above if self.high is None else above & (x <= self.high)


class Part(NamedTuple):
    """What one piece contributes: a log weight with the moments, or the maximum, of its own."""

    log_weight: Tensor  # [*batch]
    mean: Tensor  # [*batch]
    variance: Tensor  # [*batch]


def integrated(piece: Piece, r: Tensor, vr: Tensor, against_zero: bool = False) -> Part:
    """Integrate a piece against ``N(x; r, vr)``, or against ``N(x; r, vr) / N(0; r, vr)``."""
    shrink = 1.0 / (1.0 + piece.curvature * vr)
    scale, gap = torch.sqrt(vr * shrink), _gap(piece, r, vr, shrink)
    edge, found = _standardised(piece, r, gap, scale)
    x = edge + scale * found.shift
    if against_zero:
        log_weight = edge * (r - 0.5 * edge) / vr + scale.log() + HALF_LOG_2PI
    else:
        log_weight = -0.5 * (edge - r).square() / vr + 0.5 * torch.as_tensor(shrink).log()
    return Part(log_weight + piece.at(edge) + found.log_mass, x, vr * shrink * found.variance)


def maximised(piece: Piece, r: Tensor, vr: Tensor) -> Part:
    """Largest value of the piece times ``N(x; r, vr)``, its place, and ``vr`` times its slope."""
    shrink = 1.0 / (1.0 + piece.curvature * vr)
    free = r + _gap(piece, r, vr, shrink)
    held = free if piece.low is None else torch.maximum(free, torch.as_tensor(piece.low).to(free))
    if piece.high is not None:
        held = torch.minimum(held, torch.as_tensor(piece.high).to(free))
    value = piece.at(held) - 0.5 * ((held - r).square() / vr + (2.0 * math.pi * vr).log())
    return Part(value, held, torch.where(held == free, vr * shrink, 0.0))


def combined(parts: Sequence[Part]) -> tuple[Moments, list[Tensor]]:
    """Moments of the mixture of the parts, and the weight of each.

    The variance is a sum of squares about the common mean, so it never comes out negative.
    """
    if len(parts) == 1:
        only = parts[0]
        return Moments(only.mean, only.variance, only.log_weight), [torch.ones_like(only.mean)]
    if len(parts) == 2:
        return _of_two(*parts)
    shape = broadcast_shapes(*(q.log_weight.shape for q in parts))
    logs = torch.stack([q.log_weight.expand(shape) for q in parts])
    log_z = logs.logsumexp(0)
    weights = list(torch.exp(logs - log_z))
    mean = sum(w * q.mean for w, q in zip(weights, parts, strict=True))
    variance = sum(
        w * (q.variance + (q.mean - mean).square()) for w, q in zip(weights, parts, strict=True)
    )
    return Moments(mean, variance, log_z), weights  # type: ignore[arg-type]


def _of_two(one: Part, other: Part) -> tuple[Moments, list[Tensor]]:
    """The same for two parts, in fewer passes."""
    odds = one.log_weight - other.log_weight
    share, rest = torch.sigmoid(odds), torch.sigmoid(-odds)
    apart = one.mean - other.mean
    variance = share * one.variance + rest * (other.variance + share * apart.square())
    log_z = other.log_weight + softplus(odds)
    return Moments(other.mean + share * apart, variance, log_z), [share, rest]


def _gap(piece: Piece, r: Tensor, vr: Tensor, shrink: Tensor | float) -> Tensor:
    """Peak of the untruncated product minus ``r``."""
    return shrink * vr * (piece.slope + piece.curvature * (piece.centre - r))


def _standardised(piece: Piece, r: Tensor, gap: Tensor, scale: Tensor) -> tuple[Tensor, Truncated]:
    """The reference point in units of ``x``, and the truncated Gaussian about it."""
    free, low, high = r + gap, piece.low, piece.high
    if low is None and high is None:
        zero = torch.zeros_like(free)
        return free, Truncated(zero, zero, torch.ones_like(free))
    if low is None:
        assert high is not None
        found = half_line(((high - r) - gap) / scale)
        return free.clamp(max=high), found._replace(shift=-found.shift)
    if high is None:
        return free.clamp(min=low), half_line(((r - low) + gap) / scale)
    low, high = torch.as_tensor(low).to(free), torch.as_tensor(high).to(free)
    below, above, width = standardised(low - r, high - r, gap, scale)
    return free.clamp(low, high), interval(below, above, width)


class Piecewise(Rule):
    """A rule made of pieces."""

    def pieces(self) -> tuple[Piece, ...]:
        """The pieces, which together cover the support."""
        raise NotImplementedError

    def moments(self, r: Tensor, vr: Tensor) -> Moments:
        return combined(self.parts(r, vr))[0]

    def tilted(self, r: Tensor, vr: Tensor) -> Moments:
        vr = bounded(vr)
        return combined([integrated(piece, r, vr, True) for piece in self.pieces()])[0]

    def mode(self, r: Tensor, vr: Tensor) -> Moments:
        vr = bounded(vr)
        parts = [maximised(piece, r, vr) for piece in self.pieces()]
        best = parts[0]
        for part in parts[1:]:
            better = part.log_weight > best.log_weight
            best = Part(*(torch.where(better, a, b) for a, b in zip(part, best, strict=True)))
        return Moments(best.mean, best.variance, best.log_weight)

    def log_prob(self, x: Tensor) -> Tensor:
        values = [torch.where(piece.covers(x), piece.at(x), -math.inf) for piece in self.pieces()]
        return torch.stack(torch.broadcast_tensors(*values)).amax(0)

    def parts(self, r: Tensor, vr: Tensor) -> list[Part]:
        """What each piece contributes."""
        vr = bounded(vr)
        return [integrated(piece, r, vr) for piece in self.pieces()]


@dataclass(frozen=True)
class Laplace(Piecewise):
    """Prior ``rate / 2 exp(-rate |x|)``.

    The posterior mean is the closed form of the Bayesian Lasso; the maximum is the soft threshold at
    ``rate vr``, whose fixed point is the Lasso.

    >>> one = torch.ones((), dtype=torch.float64)
    >>> Laplace(one).mode(torch.tensor([-3.0, 0.5]).double(), one).mean
    tensor([-2.,  0.], dtype=torch.float64)
    """

    rate: Tensor  # positive, 1 / the unit of x
    learnable: ClassVar[tuple[str, ...]] = ("rate",)

    def pieces(self) -> tuple[Piece, ...]:
        constant = (0.5 * self.rate).log()
        return (
            Piece(constant, -self.rate, low=0.0),
            Piece(constant, self.rate, high=0.0),
        )

    def statistics(self, r: Tensor, vr: Tensor) -> dict[str, Tensor]:
        parts = self.parts(r, vr)
        weights = combined(parts)[1]
        return {"size": weights[0] * parts[0].mean - weights[1] * parts[1].mean}

    def maximised(self, pooled: Mapping[str, Tensor], learn: Collection[str] | None = None) -> Self:
        return self.replaced(learn, rate=1.0 / positive(pooled["size"]))

    def prior_moments(self) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(self.rate), 2.0 / self.rate.square()


@dataclass(frozen=True)
class Exponential(Piecewise):
    """Prior ``rate exp(-rate x)`` on ``x > 0``."""

    rate: Tensor  # positive
    learnable: ClassVar[tuple[str, ...]] = ("rate",)

    def pieces(self) -> tuple[Piece, ...]:
        return (Piece(self.rate.log(), -self.rate, low=0.0),)

    def statistics(self, r: Tensor, vr: Tensor) -> dict[str, Tensor]:
        return {"size": self.moments(r, vr).mean}

    def maximised(self, pooled: Mapping[str, Tensor], learn: Collection[str] | None = None) -> Self:
        return self.replaced(learn, rate=1.0 / positive(pooled["size"]))

    def prior_moments(self) -> tuple[Tensor, Tensor]:
        return 1.0 / self.rate, 1.0 / self.rate.square()


@dataclass(frozen=True)
class HalfNormal(Piecewise):
    """Prior ``2 N(x; 0, variance)`` on ``x > 0``."""

    variance: Tensor  # positive; of the Gaussian that was halved
    learnable: ClassVar[tuple[str, ...]] = ("variance",)

    def pieces(self) -> tuple[Piece, ...]:
        constant = 0.5 * (2.0 / (math.pi * self.variance)).log()
        return (Piece(constant, curvature=1.0 / self.variance, low=0.0),)

    def statistics(self, r: Tensor, vr: Tensor) -> dict[str, Tensor]:
        found = self.moments(r, vr)
        return {"square": found.mean.square() + found.variance}

    def maximised(self, pooled: Mapping[str, Tensor], learn: Collection[str] | None = None) -> Self:
        return self.replaced(learn, variance=positive(pooled["square"]))

    def prior_moments(self) -> tuple[Tensor, Tensor]:
        share = 2.0 / math.pi
        return (share * self.variance).sqrt(), (1.0 - share) * self.variance


@dataclass(frozen=True)
class TruncatedGaussian(Piecewise):
    """Prior ``N(x; mean, variance)`` restricted to ``(low, high)`` and normalised."""

    mean: Tensor
    variance: Tensor  # positive; of the Gaussian before it is cut
    low: Tensor  # may be -inf
    high: Tensor  # may be inf

    def pieces(self) -> tuple[Piece, ...]:
        peak = torch.minimum(torch.maximum(self.mean, self.low), self.high)
        height = 0.5 * (peak - self.mean).square() / self.variance
        constant = height - self._shape().log_mass - 0.5 * (2.0 * math.pi * self.variance).log()
        return (Piece(constant, 0.0, 1.0 / self.variance, self.mean, self.low, self.high),)

    def _shape(self) -> Truncated:
        scale = self.variance.sqrt()
        return interval(*standardised(self.low, self.high, self.mean, scale))

    def prior_moments(self) -> tuple[Tensor, Tensor]:
        peak, shape = torch.minimum(torch.maximum(self.mean, self.low), self.high), self._shape()
        return peak + self.variance.sqrt() * shape.shift, self.variance * shape.variance


@dataclass(frozen=True)
class Uniform(Piecewise):
    """Prior of density ``1 / (high - low)`` between two finite edges."""

    low: Tensor
    high: Tensor

    def pieces(self) -> tuple[Piece, ...]:
        return (Piece(-(self.high - self.low).log(), low=self.low, high=self.high),)

    def prior_moments(self) -> tuple[Tensor, Tensor]:
        return 0.5 * (self.low + self.high), (self.high - self.low).square() / 12.0


def positive(x: Tensor) -> Tensor:
    """Hold a scale or a count away from zero by the square root of the smallest number."""
    return x.clamp(min=torch.finfo(x.dtype).tiny ** 0.5)
