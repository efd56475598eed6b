"""Priors: Gaussian, two-point, and point masses at zero with a slab (spike and slab).

Log-odds are kept, never probabilities: a probability of ``1 - 1e-20`` still moves.

Source: [Vila2013] for the moments of the spike with Gaussians and for their updates.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from ppl.inference.amp.rules.piecewise import positive
from ppl.inference.amp.rules.record import Moments, Rule, bounded, log_normal

_SHARE = 1e-6  # learned probabilities stay this far from 0 and 1


@dataclass(frozen=True)
class Gaussian(Rule):
    """Prior ``N(mean, variance)``.

    >>> one = torch.ones((), dtype=torch.float64)
    >>> Gaussian(0 * one, one).moments(torch.tensor([2.0]).double(), one).mean
    tensor([1.], dtype=torch.float64)
    """

    mean: Tensor
    variance: Tensor  # positive
    learnable: ClassVar[tuple[str, ...]] = ("mean", "variance")

    def moments(self, r: Tensor, vr: Tensor) -> Moments:
        vr = bounded(vr)
        gain, gap = self.variance / (self.variance + vr), r - self.mean
        mean = self.mean + gain * gap
        return Moments(mean, (gain * vr).expand_as(mean), log_normal(gap, self.variance + vr))

    def tilted(self, r: Tensor, vr: Tensor) -> Moments:
        vr = bounded(vr)
        gain = self.variance / (self.variance + vr)
        mean = self.mean + gain * (r - self.mean)
        ratio = gaussian_log_ratio(self.mean, self.variance, r, vr)
        return Moments(mean, (gain * vr).expand_as(mean), ratio)

    def mode(self, r: Tensor, vr: Tensor) -> Moments:
        vr, found = bounded(vr), self.moments(r, vr)
        return found._replace(log_z=self.log_prob(found.mean) + log_normal(found.mean - r, vr))

    def log_prob(self, x: Tensor) -> Tensor:
        return log_normal(x - self.mean, self.variance)

    def statistics(self, r: Tensor, vr: Tensor) -> dict[str, Tensor]:
        found = self.moments(r, vr)
        gap = found.mean - self.mean
        return {"first": gap, "second": gap.square() + found.variance}

    def maximised(self, pooled: Mapping[str, Tensor], learn: Collection[str] | None = None) -> Self:
        mean, variance = pooled_gaussian(self.mean, pooled, None, learn)
        return self.replaced(learn, mean=mean, variance=variance)

    def prior_moments(self) -> tuple[Tensor, Tensor]:
        return self.mean, self.variance


@dataclass(frozen=True)
class TwoPoint(Rule):
    """Prior on two values: ``high`` with log-odds ``logit``, else ``low``; 0 and 1 for a Bernoulli."""

    logit: Tensor
    low: Tensor
    high: Tensor
    learnable: ClassVar[tuple[str, ...]] = ("logit",)

    def _odds(self, r: Tensor, vr: Tensor) -> Tensor:
        width = self.high - self.low
        return self.logit + width * (r - self.low - 0.5 * width) / vr

    def moments(self, r: Tensor, vr: Tensor) -> Moments:
        vr = bounded(vr)
        odds, width = self._odds(r, vr), self.high - self.low
        share = torch.sigmoid(odds)
        log_z = torch.logaddexp(
            logsigmoid(-self.logit) + log_normal(r - self.low, vr),
            logsigmoid(self.logit) + log_normal(r - self.high, vr),
        )
        variance = width.square() * share * torch.sigmoid(-odds)
        return Moments(self.low + width * share, variance, log_z)

    def mode(self, r: Tensor, vr: Tensor) -> Moments:
        vr = bounded(vr)
        place = torch.where(self._odds(r, vr) > 0, self.high, self.low)
        value = self.log_prob(place) + log_normal(place - r, vr)
        return Moments(place, torch.zeros_like(place), value)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability of a value, for a value that is one of the two."""
        return logsigmoid(torch.where(x == self.high, self.logit, -self.logit))

    def statistics(self, r: Tensor, vr: Tensor) -> dict[str, Tensor]:
        return {"share": torch.sigmoid(self._odds(r, bounded(vr)))}

    def maximised(self, pooled: Mapping[str, Tensor], learn: Collection[str] | None = None) -> Self:
        return self.replaced(learn, logit=clamped_logit(pooled["share"]))

    def prior_moments(self) -> tuple[Tensor, Tensor]:
        share, width = torch.sigmoid(self.logit), self.high - self.low
        mean = self.low + width * share
        return mean, width.square() * share * torch.sigmoid(-self.logit)


class Sparse(Rule):
    """A point mass at zero with log-odds ``-logit`` against a slab; the base of both forms of it."""

    logit: Tensor

    def log_odds(self, r: Tensor, vr: Tensor) -> Tensor:
        """Extrinsic evidence of the slab against the spike, ``log N``-ratio without ``logit``."""
        raise NotImplementedError

    def inclusion(self, r: Tensor, vr: Tensor) -> Tensor:
        """Posterior probability that an element is not zero."""
        return torch.sigmoid(self.logit + self.log_odds(r, vr))

    def with_activity(self, logit: Tensor) -> Self:
        """The same slab with another log-odds of activity for each element."""
        return replace(self, logit=logit)  # type: ignore[type-var]

    def group_log_odds(self, r: Tensor, vr: Tensor) -> Tensor:
        """Evidence for a group bit above this element's own bit: ``log(1 - lambda + lambda e^l)``.

        With the group off the element is zero; with it on the element follows this rule.
        """
        return softplus(self.logit + self.log_odds(r, vr)) - softplus(self.logit)

    def mode(self, r: Tensor, vr: Tensor) -> Moments:
        raise self.refusal(
            "mode: a point mass is infinitely denser than its slab",
            "Use kind='sum', or a Laplace prior for a sparse maximum.",
        )

    def _mixed(self, slab: Moments, odds: Tensor, r: Tensor, vr: Tensor) -> Moments:
        """Moments from those of the slab and the posterior log-odds of activity."""
        share, square = torch.sigmoid(odds), slab.mean.square()
        log_z = log_normal(r, vr) + (softplus(odds) - softplus(self.logit))
        # pi v + pi (1 - pi) m^2: no difference of squares.
        variance = share * torch.addcmul(slab.variance, square, torch.sigmoid(-odds))
        return Moments(share * slab.mean, variance, log_z)


@dataclass(frozen=True)
class BernoulliGaussian(Sparse):
    """Prior ``(1 - lambda) delta_0 + lambda N(mean, variance)`` with ``logit = log lambda/(1-lambda)``.

    >>> rule = BernoulliGaussian(*torch.tensor([-2.0, 0.0, 1.0]).double())
    >>> rule.inclusion(torch.tensor([0.0, 2.0]).double(), torch.tensor(0.01).double())
    tensor([0.0133, 1.0000], dtype=torch.float64)
    """

    logit: Tensor
    mean: Tensor
    variance: Tensor  # positive, of the slab
    learnable: ClassVar[tuple[str, ...]] = ("logit", "mean", "variance")

    def log_odds(self, r: Tensor, vr: Tensor) -> Tensor:
        return gaussian_log_ratio(self.mean, self.variance, r, bounded(vr))

    def moments(self, r: Tensor, vr: Tensor) -> Moments:
        vr = bounded(vr)
        slab = self._slab(r, vr)
        return self._mixed(slab, self.logit + slab.log_z, r, vr)

    def _slab(self, r: Tensor, vr: Tensor) -> Moments:
        gain = self.variance / (self.variance + vr)
        ratio = gaussian_log_ratio(self.mean, self.variance, r, vr)
        return Moments(self.mean * (1.0 - gain) + gain * r, gain * vr, ratio)

    def log_prob(self, x: Tensor) -> Tensor:
        return logsigmoid(self.logit) + log_normal(x - self.mean, self.variance)

    def statistics(self, r: Tensor, vr: Tensor) -> dict[str, Tensor]:
        slab = self._slab(r, bounded(vr))
        share, gap = torch.sigmoid(self.logit + slab.log_z), slab.mean - self.mean
        return {
            "active": share,
            "first": share * gap,
            "second": share * (gap.square() + slab.variance),
        }

    def maximised(self, pooled: Mapping[str, Tensor], learn: Collection[str] | None = None) -> Self:
        mean, variance = pooled_gaussian(self.mean, pooled, pooled["active"], learn)
        logit = clamped_logit(pooled["active"])
        return self.replaced(learn, logit=logit, mean=mean, variance=variance)

    def prior_moments(self) -> tuple[Tensor, Tensor]:
        share = torch.sigmoid(self.logit)
        spread = self.variance + torch.sigmoid(-self.logit) * self.mean.square()
        return share * self.mean, share * spread


@dataclass(frozen=True)
class SpikeSlab(Sparse):
    """Prior ``(1 - lambda) delta_0 + lambda slab`` for any continuous rule as slab.

    With ``HalfNormal`` or ``Exponential`` it is the non-negative sparse prior, with
    ``GaussianMixture`` the spike with several Gaussians.  The parameters of the slab are learned under
    their own names.
    """

    logit: Tensor
    slab: Rule

    @property
    def learnable(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("logit", *self.slab.learnable)

    @property
    def trailing(self) -> int:  # type: ignore[override]
        return self.slab.trailing

    def log_odds(self, r: Tensor, vr: Tensor) -> Tensor:
        return self.slab.tilted(r, vr).log_z

    def moments(self, r: Tensor, vr: Tensor) -> Moments:
        slab, vr = self.slab.tilted(r, vr), bounded(vr)
        return self._mixed(slab, self.logit + slab.log_z, r, vr)

    def log_prob(self, x: Tensor) -> Tensor:
        return logsigmoid(self.logit) + self.slab.log_prob(x)

    def statistics(self, r: Tensor, vr: Tensor) -> dict[str, Tensor]:
        share = self.inclusion(r, vr)
        wide = share.reshape(*share.shape, *(1,) * self.trailing)
        inner = self.slab.statistics(r, vr)
        return {"active": wide} | {f"slab_{k}": wide * v for k, v in inner.items()}

    def maximised(self, pooled: Mapping[str, Tensor], learn: Collection[str] | None = None) -> Self:
        share = pooled["active"]
        inner = {k[5:]: v / positive(share) for k, v in pooled.items() if k.startswith("slab_")}
        slab = self.slab.maximised(inner, learn) if inner else self.slab
        logit = share.reshape(share.shape[: share.ndim - self.trailing])
        if learn is None or "logit" in learn:
            return replace(self, logit=clamped_logit(logit), slab=slab)
        return replace(self, slab=slab)

    def prior_moments(self) -> tuple[Tensor, Tensor]:
        share, (mean, variance) = torch.sigmoid(self.logit), self.slab.prior_moments()
        return share * mean, share * (variance + torch.sigmoid(-self.logit) * mean.square())


def gaussian_log_ratio(mean: Tensor, variance: Tensor, r: Tensor, vr: Tensor) -> Tensor:
    """``log N(r; mean, variance + vr) - log N(r; 0, vr)`` without a difference of large numbers.

    The two exponents are put over one denominator.
    """
    total = variance + vr
    half = 0.5 / total
    slope = half * (variance / vr)
    offset = -half * mean.square() - 0.5 * torch.log1p(variance / vr)
    return torch.addcmul(offset, r, torch.addcmul(2.0 * half * mean, slope, r))


def pooled_gaussian(
    mean: Tensor,
    pooled: Mapping[str, Tensor],
    count: Tensor | None,
    learn: Collection[str] | None,
) -> tuple[Tensor, Tensor]:
    """Mean and variance that maximise the expected log-density of a Gaussian.

    ``first`` and ``second`` are averages of ``x - mean`` and its square, weighted by ``count``.
    """
    first, second = pooled["first"], pooled["second"]
    if count is not None:
        first, second = first / positive(count), second / positive(count)
    if learn is None or "mean" in learn:
        return mean + first, positive(second - first.square())
    return mean, positive(second)


def clamped_logit(share: Tensor) -> Tensor:
    """Log-odds of a learned probability, held inside ``[1e-6, 1 - 1e-6]``."""
    return torch.logit(share, eps=_SHARE)
