"""Mixtures of Gaussians, of points, and of scales (Student-t, Cauchy, horseshoe).

A scale mixture is a Gaussian whose precision has a law of its own; that law is integrated by the
trapezoid rule in the logarithm of the precision, which converges exponentially because the integrand
is analytic there and decays at both ends.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ppl.inference.amp.rules.piecewise import positive
from ppl.inference.amp.rules.priors import gaussian_log_ratio
from ppl.inference.amp.rules.quadrature import maximum
from ppl.inference.amp.rules.record import Moments, Rule, bounded, log_normal


class Components(NamedTuple):
    """Posterior of each component, the component axis last."""

    weight: Tensor  # [*batch, n, K], sums to 1
    mean: Tensor  # [*batch, n, K]
    variance: Tensor  # [*batch, n, K]


class _Mixture(Rule):
    """Mixtures whose components are Gaussians with log weights, means and variances."""

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised log weights, means and variances, ``[*batch, K]`` each."""
        raise NotImplementedError

    def moments(self, r: Tensor, vr: Tensor) -> Moments:
        vr = bounded(vr)
        logs, means, variances = self.components()
        wide = vr.unsqueeze(-1)
        log_density = log_normal(r.unsqueeze(-1) - means, variances + wide)
        return self._collected(logs + log_density, r, vr)[0]

    def tilted(self, r: Tensor, vr: Tensor) -> Moments:
        vr = bounded(vr)
        return self._collected(self._evidence(r, vr), r, vr)[0]

    def posterior(self, r: Tensor, vr: Tensor) -> Components:
        """Weight, mean and variance of each component given the pseudo-observation."""
        vr = bounded(vr)
        return self._collected(self._evidence(r, vr), r, vr)[1]

    def _evidence(self, r: Tensor, vr: Tensor) -> Tensor:
        logs, means, variances = self.components()
        return logs + gaussian_log_ratio(means, variances, r.unsqueeze(-1), vr.unsqueeze(-1))

    def _collected(self, logs: Tensor, r: Tensor, vr: Tensor) -> tuple[Moments, Components]:
        _, means, variances = self.components()
        gain = variances / (variances + vr.unsqueeze(-1))
        each = means + gain * (r.unsqueeze(-1) - means)
        spread, log_z = gain * vr.unsqueeze(-1), logs.logsumexp(-1)
        weight = torch.exp(logs - log_z.unsqueeze(-1))
        mean = (weight * each).sum(-1)
        variance = (weight * (spread + (each - mean.unsqueeze(-1)).square())).sum(-1)
        return Moments(mean, variance, log_z), Components(weight, each, spread)

    def log_prob(self, x: Tensor) -> Tensor:
        logs, means, variances = self.components()
        return (logs + log_normal(x.unsqueeze(-1) - means, variances)).logsumexp(-1)

    def prior_moments(self) -> tuple[Tensor, Tensor]:
        logs, means, variances = self.components()
        mean = (logs.exp() * means).sum(-1)
        spread = variances + (means - mean.unsqueeze(-1)).square()
        return mean, (logs.exp() * spread).sum(-1)


@dataclass(frozen=True)
class GaussianMixture(_Mixture):
    """Prior ``sum_k w_k N(means_k, variances_k)``; a component of variance 0 is a point mass.

    >>> prior = GaussianMixture(*torch.tensor([[0.0, 0.0], [-1.0, 1.0], [0.0, 0.0]]).double())
    >>> prior.moments(torch.tensor([0.5]).double(), torch.tensor(1.0).double()).mean  # tanh(0.5)
    tensor([0.4621], dtype=torch.float64)
    """

    logits: Tensor  # [*batch, K], log weights up to a constant
    means: Tensor  # [*batch, K]
    variances: Tensor  # [*batch, K], not negative
    learnable: ClassVar[tuple[str, ...]] = ("logits", "means", "variances")
    trailing: ClassVar[int] = 1

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.logits.log_softmax(-1), self.means, self.variances

    def mode(self, r: Tensor, vr: Tensor) -> Moments:
        if bool((self.variances == 0).any()):
            raise self.refusal(
                "mode: a point mass is infinitely denser than a Gaussian",
                "Use kind='sum', or Discrete if every component is a point.",
            )
        lows = (self.means - 9.0 * self.variances.sqrt()).amin(-1)
        highs = (self.means + 9.0 * self.variances.sqrt()).amax(-1)
        return maximum(self.log_prob, r, bounded(vr), 0.5 * (lows + highs), 0.5 * (highs - lows))

    def statistics(self, r: Tensor, vr: Tensor) -> dict[str, Tensor]:
        each = self.posterior(r, vr)
        gap = each.mean - self.means
        return {
            "share": each.weight,
            "first": each.weight * gap,
            "second": each.weight * (gap.square() + each.variance),
        }

    def maximised(self, pooled: Mapping[str, Tensor], learn: Collection[str] | None = None) -> Self:
        share = positive(pooled["share"])
        first, second = pooled["first"] / share, pooled["second"] / share
        moved = learn is None or "means" in learn
        spread = second - first.square() if moved else second
        variances = torch.where(self.variances > 0, positive(spread), 0.0)  # points stay points
        return self.replaced(
            learn, logits=share.log(), means=self.means + first, variances=variances
        )


@dataclass(frozen=True)
class Discrete(_Mixture):
    """Prior on finitely many values ``points`` with log weights ``logits``."""

    logits: Tensor  # [*batch, K], up to a constant
    points: Tensor  # [*batch, K]
    learnable: ClassVar[tuple[str, ...]] = ("logits",)
    trailing: ClassVar[int] = 1

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.logits.log_softmax(-1), self.points, torch.zeros_like(self.points)

    def mode(self, r: Tensor, vr: Tensor) -> Moments:
        vr = bounded(vr)
        gap = r.unsqueeze(-1) - self.points
        value, best = (self.logits.log_softmax(-1) + log_normal(gap, vr.unsqueeze(-1))).max(-1)
        place = r - gap.gather(-1, best.unsqueeze(-1)).squeeze(-1)
        return Moments(place, torch.zeros_like(place), value)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability of a value that is one of the points, else ``-inf``."""
        here = x.unsqueeze(-1) == self.points
        return torch.where(here, self.logits.log_softmax(-1), -math.inf).logsumexp(-1)

    def statistics(self, r: Tensor, vr: Tensor) -> dict[str, Tensor]:
        return {"share": self.posterior(r, vr).weight}

    def maximised(self, pooled: Mapping[str, Tensor], learn: Collection[str] | None = None) -> Self:
        return self.replaced(learn, logits=positive(pooled["share"]).log())


class _ScaleMixture(_Mixture):
    """``x | precision ~ N(mean, variance / precision)`` with a law for the precision."""

    mean: Tensor
    variance: Tensor

    def precisions(self) -> tuple[Tensor, Tensor]:
        """Log weights and precisions of the trapezoid rule, ``[*batch, K]`` each."""
        raise NotImplementedError

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        logs, precision = self.precisions()
        return logs, self.mean.unsqueeze(-1), self.variance.unsqueeze(-1) / precision

    def mode(self, r: Tensor, vr: Tensor) -> Moments:
        return maximum(self.log_prob, r, bounded(vr), self.mean, self.variance.sqrt())

    def statistics(self, r: Tensor, vr: Tensor) -> dict[str, Tensor]:
        each, precision = self.posterior(r, vr), self.precisions()[1]
        gap, weight = each.mean - self.mean.unsqueeze(-1), each.weight * precision
        return {
            "weight": weight.sum(-1),
            "first": (weight * gap).sum(-1),
            "second": (weight * (gap.square() + each.variance)).sum(-1),
        }

    def maximised(self, pooled: Mapping[str, Tensor], learn: Collection[str] | None = None) -> Self:
        step = pooled["first"] / positive(pooled["weight"])
        moved = learn is None or "mean" in learn
        spread = pooled["second"] - step * pooled["first"] if moved else pooled["second"]
        return self.replaced(learn, mean=self.mean + step, variance=positive(spread))


@dataclass(frozen=True)
class StudentT(_ScaleMixture):
    """Prior of Student with ``df`` degrees of freedom; ``df = 1`` is Cauchy.

    Its variance is infinite for ``df <= 2``; ``prior_moments`` then answers that of a Gaussian with the
    same quartiles, as a start.
    """

    df: Tensor  # positive; below 0.2 the nodes no longer reach far enough
    mean: Tensor
    variance: Tensor  # square of the scale
    learnable: ClassVar[tuple[str, ...]] = ("mean", "variance")

    def precisions(self) -> tuple[Tensor, Tensor]:
        shape = 0.5 * self.df.unsqueeze(-1)
        return gamma_nodes(shape, shape)

    def log_prob(self, x: Tensor) -> Tensor:
        half = 0.5 * self.df
        constant = torch.lgamma(half + 0.5) - torch.lgamma(half)
        constant = constant - 0.5 * (math.pi * self.df * self.variance).log()
        ratio = (x - self.mean).square() / (self.df * self.variance)
        return constant - (half + 0.5) * torch.log1p(ratio)

    def prior_moments(self) -> tuple[Tensor, Tensor]:
        finite = self.df > 2.0
        factor = torch.where(finite, self.df / torch.where(finite, self.df - 2.0, 1.0), 2.2)
        return self.mean.expand_as(factor * self.variance), factor * self.variance


@dataclass(frozen=True)
class Horseshoe(_ScaleMixture):
    """Prior ``N(mean, variance * s^2)`` with ``s`` half-Cauchy: a pole at the mean, heavy tails."""

    mean: Tensor
    variance: Tensor  # square of the global scale
    learnable: ClassVar[tuple[str, ...]] = ("mean", "variance")

    def precisions(self) -> tuple[Tensor, Tensor]:
        like = self.variance
        u = torch.linspace(-16.0, 16.0, 81, dtype=like.dtype, device=like.device)
        logs = -torch.logaddexp(u, -u)  # half-Cauchy in log s, up to a constant
        return logs - logs.logsumexp(-1), torch.exp(-2.0 * u)

    def mode(self, r: Tensor, vr: Tensor) -> Moments:
        raise self.refusal(
            "mode: its density is infinite at the mean", "Use kind='sum', or a Laplace prior."
        )

    def prior_moments(self) -> tuple[Tensor, Tensor]:
        """Mean, and the variance at the median of ``s``: the true one is infinite."""
        return self.mean.expand_as(self.variance), self.variance


def gamma_nodes(shape: Tensor, rate: Tensor, count: int = 56) -> tuple[Tensor, Tensor]:
    """Trapezoid nodes of a Gamma law in the logarithm: log weights, and places."""
    # In u = log(x rate / shape) the law is exp(shape (u - e^u)): a peak of width shape^-1/2 at 0 and
    # a doubly exponential right flank.  An observation e^(-u / 2) deviations out looks at u, so the
    # left flank is followed as far as the nodes last: 100 deviations and more for every shape.
    right = torch.log1p(30.0 / shape + 6.5 * shape.rsqrt())
    step = shape.rsqrt().clamp(max=0.45)
    u = right - step * torch.arange(count - 1, -1, -1, dtype=shape.dtype, device=shape.device)
    logs = shape * (shape.log() + u - u.exp()) - torch.lgamma(shape) + step.log()
    return logs, torch.exp(u) * (shape / rate)
