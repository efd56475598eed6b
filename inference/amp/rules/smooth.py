"""Channels with a smooth concave log-likelihood: logistic, binomial, Poisson and relatives.

The tilted density is then concave too.  From its mode, the distance at which it has dropped by one nat is
found on either side; beyond it the drop is at least linear, inside at most one nat.  Gauss-Legendre
panels at fixed multiples of that distance resolve both a Gaussian flank and an exponential cliff.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from ppl.inference.amp.rules.logistic import sigmoid_moments
from ppl.inference.amp.rules.quadrature import maximum
from ppl.inference.amp.rules.record import Moments, Rule, bounded, log_normal

_NEWTON = 12  # at most; it ends where steps no longer matter
_HALVINGS = 8  # of a range of 10 nats or more: the distance to a few per cent
_PANELS = (0.0, 0.8, 1.6, 2.6, 4.0, 7.0, 15.0, 40.0)  # in units of the distance of one nat
_POINTS, _WEIGHTS = (v.tolist() for v in np.polynomial.legendre.leggauss(5))
_NODES = tuple(
    (low + 0.5 * (high - low) * (1.0 + x), 0.5 * (high - low) * w)
    for low, high in zip(_PANELS, _PANELS[1:], strict=False)
    for x, w in zip(_POINTS, _WEIGHTS, strict=True)
)


class LogConcave(Rule):
    """A channel with a concave log-likelihood and its first two derivatives."""

    def log_prob(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def slopes(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivative of :meth:`log_prob`; the second is not positive."""
        raise NotImplementedError

    def rise(self, z: Tensor, step: Tensor) -> Tensor:
        """``log_prob(z + step) - log_prob(z)``, without constants and without losing digits."""
        raise NotImplementedError

    def start(self, r: Tensor, vr: Tensor) -> Tensor:
        """A place near the mode, on the side from which Newton's steps do not overshoot."""
        raise NotImplementedError

    def place(self, r: Tensor, vr: Tensor) -> tuple[Tensor, Tensor]:
        """The mode of the tilted density minus ``r``, and the curvature of the likelihood there."""
        with torch.no_grad():
            far = vr * self.slopes(r)[0]
            low, high = far.clamp(max=0.0), far.clamp(min=0.0)  # the root lies between
            gap = torch.minimum(torch.maximum(self.start(r, vr) - r, low), high)
            for _ in range(_NEWTON):
                slope, bend = self.slopes(r + gap)
                excess = gap - vr * slope
                low, high = torch.where(excess < 0, gap, low), torch.where(excess > 0, gap, high)
                spread = vr / (1.0 - vr * bend)
                new = gap - excess * (spread / vr)
                new = torch.where((new >= low) & (new <= high), new, 0.5 * (low + high))
                settled = bool(((new - gap).square() <= torch.finfo(r.dtype).eps * spread).all())
                gap = new
                if settled:
                    break
            return gap, self.slopes(r + gap)[1]

    def mode(self, r: Tensor, vr: Tensor) -> Moments:
        vr = bounded(vr)
        gap, bend = self.place(r, vr)
        value = self.log_prob(r + gap) + log_normal(gap, vr)
        return Moments(r + gap, vr / (1.0 - vr * bend), value)

    def moments(self, r: Tensor, vr: Tensor) -> Moments:
        r, vr = torch.broadcast_tensors(r, bounded(vr))
        gap, _ = self.place(r, vr)
        z, slope, half = r + gap, gap / vr, 0.5 / vr

        def drop(step: Tensor) -> Tensor:  # of the tilted log-density, in steps from the mode
            # Not positive but for rounding, which in float32 may put the mode a little aside.
            return (self.rise(z, step) - step * (slope + half * step)).clamp(max=30.0)

        s0 = s1 = s2 = torch.zeros_like(z)
        for side in (-1.0, 1.0):
            distance = side * self._reach(drop, side, vr)
            for node, weight in _NODES:
                step = node * distance
                mass = (side * weight) * distance * torch.exp(drop(step))
                s0, s1, s2 = s0 + mass, s1 + mass * step, s2 + mass * step * step
        mean = s1 / s0
        log_z = self.log_prob(z) + log_normal(gap, vr) + s0.log()
        variance = torch.minimum(s2 / s0 - mean.square(), vr)  # a theorem, and rounding
        return Moments(r + (gap + mean), variance, log_z)

    def _reach(self, drop: Callable[[Tensor], Tensor], side: float, vr: Tensor) -> Tensor:
        """Distance to one nat below the mode, by halving its logarithm below the Gaussian bound."""
        with torch.no_grad():
            bound = (2.0 * vr).sqrt()
            high = torch.zeros_like(bound)
            low = high - bound.log().clamp(min=0.0) - 9.0
            for _ in range(_HALVINGS):
                middle = 0.5 * (low + high)
                inside = drop(side * bound * middle.exp()) > -1.0
                low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
            return bound * (0.5 * (low + high)).exp()


@dataclass(frozen=True)
class Logistic(Rule):
    """Channel ``P(y > 0 | z) = sigmoid(z)``.

    Beliefs wider than 3 take the step-and-remainder form, where Gauss-Hermite nodes about the mode
    lose all accuracy.

    >>> rule = Logistic(torch.ones(1).double())
    >>> rule.moments(torch.zeros(1).double(), torch.ones(()).double()).mean
    tensor([0.4132], dtype=torch.float64)
    """

    y: Tensor  # success where positive: 0 and 1, or -1 and 1

    def moments(self, r: Tensor, vr: Tensor) -> Moments:
        sign = torch.where(self.y > 0, 1.0, -1.0).to(r.dtype)
        found = sigmoid_moments(sign * r, bounded(vr))
        return found._replace(mean=sign * found.mean)

    def mode(self, r: Tensor, vr: Tensor) -> Moments:
        return maximum(self.log_prob, r, bounded(vr), 0.0, 1.0)

    def log_prob(self, x: Tensor) -> Tensor:
        return logsigmoid(torch.where(self.y > 0, x, -x))

    def predict(self, p: Tensor, vp: Tensor) -> Tensor:
        """Probability of a success."""
        return sigmoid_moments(p, bounded(vp)).log_z.exp()


@dataclass(frozen=True)
class Binomial(LogConcave):
    """Channel ``y`` successes of ``trials``, each with probability ``sigmoid(z)``."""

    y: Tensor
    trials: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        n, y = self.trials, self.y
        ways = torch.lgamma(n + 1.0) - torch.lgamma(y + 1.0) - torch.lgamma(n - y + 1.0)
        return ways + y * x - n * softplus(x)

    def rise(self, z: Tensor, step: Tensor) -> Tensor:
        return self.y * step - self.trials * (softplus(z + step) - softplus(z))

    def slopes(self, z: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.sigmoid(z)
        return self.y - self.trials * s, -self.trials * s * torch.sigmoid(-z)

    def start(self, r: Tensor, vr: Tensor) -> Tensor:
        # The logit of the data, pulled towards r by the weights of the two; none at all: a cliff.
        none, full = self.y <= 0, self.y >= self.trials
        cliff = exponential_start(torch.where(full, -r, r), vr, torch.zeros_like(r), self.trials)
        guess = torch.logit((self.y + 0.5) / (self.trials + 1.0))
        precision = (self.y + 0.5) * (self.trials - self.y + 0.5) / (self.trials + 1.0)
        inner = (r / vr + guess * precision) / (1.0 / vr + precision)
        return torch.where(none | full, torch.where(full, -cliff, cliff), inner)

    def predict(self, p: Tensor, vp: Tensor) -> Tensor:
        """Mean count, with the probit in place of the logistic (error below 0.02 a trial)."""
        return self.trials * torch.special.ndtr(p * (1.702**2 + bounded(vp)).rsqrt())


@dataclass(frozen=True)
class Poisson(LogConcave):
    """Channel ``y ~ Poisson(exposure exp(z))``."""

    y: Tensor
    exposure: Tensor | float = 1.0  # positive, one or one a row

    def log_prob(self, x: Tensor) -> Tensor:
        z = x + torch.as_tensor(self.exposure).to(x).log()
        return self.y * z - torch.exp(z.clamp(max=80.0)) - torch.lgamma(self.y + 1.0)

    def rise(self, z: Tensor, step: Tensor) -> Tensor:
        rate = self.exposure * z.clamp(max=80.0).exp()
        return self.y * step - rate * torch.expm1(step.clamp(max=80.0))

    def slopes(self, z: Tensor) -> tuple[Tensor, Tensor]:
        rate = self.exposure * z.clamp(max=80.0).exp()
        return self.y - rate, -rate

    def start(self, r: Tensor, vr: Tensor) -> Tensor:
        return exponential_start(r, vr, self.y, torch.as_tensor(self.exposure).to(r))

    def predict(self, p: Tensor, vp: Tensor) -> Tensor:
        return self.exposure * torch.exp(p + 0.5 * vp)


@dataclass(frozen=True)
class NegativeBinomial(LogConcave):
    """Channel of counts with mean ``exp(z)`` and variance ``mean + mean^2 / size``."""

    y: Tensor
    size: Tensor  # positive; infinity would be Poisson

    def log_prob(self, x: Tensor) -> Tensor:
        y, size = self.y, self.size
        ways = torch.lgamma(y + size) - torch.lgamma(size) - torch.lgamma(y + 1.0)
        u = x - size.log()
        return ways + y * u - (y + size) * softplus(u)

    def rise(self, z: Tensor, step: Tensor) -> Tensor:
        u = z - self.size.log()
        return self.y * step - (self.y + self.size) * (softplus(u + step) - softplus(u))

    def slopes(self, z: Tensor) -> tuple[Tensor, Tensor]:
        u, total = z - self.size.log(), self.y + self.size
        share = torch.sigmoid(u)
        return self.y - total * share, -total * share * torch.sigmoid(-u)

    def start(self, r: Tensor, vr: Tensor) -> Tensor:
        guess = torch.log(self.y + 0.5)
        precision = (self.y + 0.5) * self.size / (self.y + 0.5 + self.size)
        return (r / vr + guess * precision) / (1.0 / vr + precision)

    def predict(self, p: Tensor, vp: Tensor) -> Tensor:
        return torch.exp(p + 0.5 * vp)


@dataclass(frozen=True)
class SoftplusPoisson(LogConcave):
    """Channel ``y ~ Poisson(softplus(z))``: rates that grow linearly."""

    y: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        rate = softplus(x)
        return self.y * _log_softplus(x, rate) - rate - torch.lgamma(self.y + 1.0)

    def rise(self, z: Tensor, step: Tensor) -> Tensor:
        here, there = softplus(z), softplus(z + step)
        logs = _log_softplus(z + step, there) - _log_softplus(z, here)
        return self.y * logs - (there - here)

    def slopes(self, z: Tensor) -> tuple[Tensor, Tensor]:
        s, rate = torch.sigmoid(z), softplus(z).clamp(min=torch.finfo(z.dtype).tiny)
        ratio = torch.where(z < -15.0, 1.0, s / rate)  # the slope of log softplus
        bend = torch.where(z < -15.0, 0.0, ratio * (torch.sigmoid(-z) - ratio))
        return self.y * ratio - s, self.y * bend - s * torch.sigmoid(-z)

    def start(self, r: Tensor, vr: Tensor) -> Tensor:
        weight = 1.0 / (1.0 + self.y)
        return (r / vr + self.y * weight) / (1.0 / vr + weight)


def exponential_start(r: Tensor, vr: Tensor, y: Tensor, exposure: Tensor) -> Tensor:
    """A place at or right of the root of ``y - exposure e^z = (z - r) / vr``, and near it.

    Right of the root Newton's steps descend without overshooting, a nat each at worst.  There
    ``exposure e^z = y + (r - z) / vr``, and any lower bound of ``z`` put on the right gives an upper one.
    """
    floor = torch.where(y > 0, y.clamp(min=0.5).log(), -5.0) - exposure.log()
    upper = torch.log((y + (r - floor).clamp(min=0.0) / vr) / exposure)
    data = torch.where(y > 0, floor, r)
    from_above = torch.minimum(r, torch.maximum(upper, floor))
    return torch.where(r < data, data, from_above)


def _log_softplus(x: Tensor, rate: Tensor) -> Tensor:
    """``log softplus(x)``, which is ``x`` far to the left."""
    left = x < -15.0
    return torch.where(
        left, x - 0.5 * torch.exp(x.clamp(max=0.0)), torch.where(left, 1.0, rate).log()
    )
