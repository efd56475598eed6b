"""Averages of scalar estimators over the pseudo-observations of a large random problem, on dense grids.

The law of a pseudo-observation needs no sampling: a rule's ``log Z(r, vr)`` is the log-density of ``r = x + noise``
under its prior, and of ``y`` given ``z ~ N(p, vp)`` under its channel.  So every average here is an integral over
``r``, or over ``p`` and ``y``, of moments that the rules give.  The grids are uniform, as fine as the noise: a
Gauss-Hermite rule of 201 points does not see the kink of a spike and is 0.8 dB off where this is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ppl.errors import DataError
from ppl.inference.amp.rules.record import Moments, Rule

_SPAN = 9.0  # half-width of a grid, in standard deviations
_PER_WIDTH = {
    "sum": 8.0,
    "max": 40.0,
}  # points in one standard deviation of the noise; modes have kinks
_MASS = 1e-6  # of the density that a grid may miss


class Estimate(NamedTuple):
    """How an estimator of ``x`` does; scalars."""

    mse: Tensor  # mean of (estimate - x)^2
    variance: Tensor  # mean of the variance that it reports
    power: Tensor  # mean of its square
    deficit: Tensor  # mean of estimate * (x - estimate): zero for the posterior mean


class Scores(NamedTuple):
    """Averages of the output step, with ``score = (E[z | p, y] - p) / vp``; scalars."""

    precision: Tensor  # mean of (1 - Var[z | p, y] / vp) / vp, as assumed
    gain: Tensor  # mean of score * (true score): mean slope of the score in z
    power: Tensor  # mean of score^2


class Outcomes(NamedTuple):
    """Values of ``y`` and the weights that sum or integrate over them."""

    values: Tensor  # [K]
    weights: Tensor  # [K]


def estimate_coefficients(
    prior: Rule,
    noise: Tensor,
    assumed: Rule | None = None,
    *,
    slope: Tensor | None = None,
    variance: Tensor | None = None,
    kind: Literal["sum", "max"] = "sum",
) -> Estimate:
    """Average the estimate of ``x`` from ``r = slope (x + N(0, noise))``.

    Args:
        prior: true law of ``x``; its parameters are scalars or ``[n]`` (averaged over).
        noise: variance ``[]``.
        assumed: the rule that estimates, ``prior`` if None.
        slope: ``[]``, 1 if None.
        variance: of the noise in ``r`` as the estimator believes it ``[]``, ``noise`` if None.
        kind: posterior mean or mode.

    >>> from ppl.inference.amp.rules.priors import Gaussian
    >>> one = torch.ones((), dtype=torch.float64)
    >>> round(float(estimate_coefficients(Gaussian(0 * one, one), one).mse), 6)
    0.5
    """
    estimator = _estimator(assumed or prior, kind)
    believed = noise if variance is None else variance
    factor = torch.ones_like(noise) if slope is None else slope
    width = torch.minimum(noise, believed / factor.square()).sqrt()
    r, weights, truth = _grid(prior, noise, width / _PER_WIDTH[kind])
    answer = (
        truth
        if _same(assumed, prior, kind, slope, variance)
        else estimator(factor * r, believed.reshape(1))
    )

    def mean(values: Tensor) -> Tensor:
        return (weights * values).sum(0).mean()

    gap = truth.mean - answer.mean
    return Estimate(
        mean(gap.square() + truth.variance),
        mean(answer.variance + torch.zeros_like(r)),
        mean(answer.mean.square()),
        mean(answer.mean * gap),
    )


def score_outputs(
    channel: Callable[[Tensor], Rule],
    outcomes: Outcomes,
    p_variance: Tensor,
    believed: Tensor,
    *,
    slope: Tensor,
    true_variance: Tensor,
    assumed: Callable[[Tensor], Rule] | None = None,
) -> Scores:
    """Average the output step where ``p ~ N(0, p_variance)`` and ``z | p ~ N(slope p, true_variance)``.

    Args:
        channel: true ``p(y | z)``, as a rule for given ``y``.
        outcomes: all of ``y``.
        p_variance: ``[]``.
        believed: variance of ``z`` given ``p`` as the algorithm has it ``[]``.
        slope: ``[]``, 1 where the algorithm is matched.
        true_variance: ``[]``.
        assumed: the channel that the algorithm uses, ``channel`` if None.

    Raises:
        DataError: the outcomes carry less than 99.9 % of the probability.
    """
    width = torch.minimum(believed, true_variance).sqrt()
    p, weights = _gaussian_grid(p_variance, width)
    rule = channel(outcomes.values)
    true = rule.moments(slope * p, true_variance.reshape(1))
    joint = weights.unsqueeze(-1) * outcomes.weights * true.log_z.exp()  # [P, K]: law of (p, y)
    total = float(joint.sum())
    if abs(total - 1.0) > 1e-3:
        raise DataError(
            f"state evolution: the outcomes of y carry {total:.4f} of the probability, expected 1. "
            "Give values that reach further or lie closer together, with weights that integrate over them."
        )
    answer = (assumed or channel)(outcomes.values).moments(p, believed.reshape(1))
    score, true_score = (answer.mean - p) / believed, (true.mean - slope * p) / true_variance
    precision = (1.0 - answer.variance / believed) / believed
    return Scores(
        *((joint * each).sum() / total for each in (precision, score * true_score, score.square()))
    )


def _estimator(rule: Rule, kind: str) -> Callable[[Tensor, Tensor], Moments]:
    return rule.mode if kind == "max" else rule.moments


def _same(assumed: Rule | None, prior: Rule, kind: str, *changes: Tensor | None) -> bool:
    return (
        (assumed is None or assumed is prior)
        and kind == "sum"
        and all(each is None for each in changes)
    )


def _grid(prior: Rule, noise: Tensor, spacing: Tensor) -> tuple[Tensor, Tensor, Moments]:
    """Points ``r [points, 1]``, their probabilities ``[points, 1 or n]``, and the true posterior moments there."""
    mean, variance = prior.prior_moments()
    centre, spread = mean.mean(), (variance.max() + mean.var(correction=0) + noise).sqrt()
    span = _SPAN
    while True:
        count = int((2.0 * span * spread / spacing).clamp(4000, 400_000))
        r = (
            torch.linspace(-span, span, count + 1, dtype=noise.dtype, device=noise.device) * spread
            + centre
        )
        truth = prior.moments(r.unsqueeze(-1), noise.reshape(1))
        weights = truth.log_z.exp() * (r[1] - r[0])
        total = weights.sum(0)
        if span >= 16 * _SPAN or bool(((total - 1.0).abs() <= _MASS).all()):
            return r.unsqueeze(-1), weights / total, truth
        span *= 2.0


def _gaussian_grid(variance: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Points ``[P, 1]`` and probabilities ``[P]`` of ``N(0, variance)``."""
    sd = variance.clamp(min=0.0).sqrt()
    if not bool(sd > 1e-6 * width):
        return variance.new_zeros(1, 1), variance.new_ones(1)
    count = int((2.0 * _SPAN * 3.0 * sd / width).clamp(200, 4000))
    u = torch.linspace(-_SPAN, _SPAN, count + 1, dtype=variance.dtype, device=variance.device)
    weights = (-0.5 * u.square()).exp()
    return (u * sd).unsqueeze(-1), weights / weights.sum()
