"""What every scalar rule of approximate message passing answers: one record and one base class.

A rule is a prior ``p(x)`` or a channel ``p(y | z)``, the same thing to the algorithms: a function of one
unknown that is multiplied by a Gaussian pseudo-observation ``N(x; r, vr)`` and integrated or maximised.
Rules are frozen dataclasses of tensors that broadcast with ``r``; all they do is elementwise.

Sources: [Rangan2011] "Generalized approximate message passing", [Vila2013] for the updates of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ppl.errors import UnsupportedError


class Moments(NamedTuple):
    """First two moments of ``p(x) N(x; r, vr) / Z``, and ``log Z``; or the maximum in their place."""

    mean: Tensor  # [*batch, n]; of the maximum: its place
    variance: Tensor  # [*batch, n]; of the maximum: vr times the slope of its place in r
    log_z: Tensor  # [*batch, n] nats; of the maximum: log p(x) + log N(x; r, vr) there


class Rule:
    """Base of the rules; what a rule does not have, it refuses in words.

    ``r`` ``[*batch, n]`` and ``vr`` (broadcasts with it, positive, ``inf`` allowed) are the mean and
    the variance of the pseudo-observation; for a channel they are called ``p`` and ``vp``.  A channel
    holds its data ``y`` ``[*batch, m]`` as a field.
    """

    learnable: ClassVar[tuple[str, ...]] = ()  # parameters with a closed update
    trailing: ClassVar[int] = 0  # axes of parameters and statistics after those of r, 1 if mixture

    def moments(self, r: Tensor, vr: Tensor) -> Moments:
        """Sum-product: mean, variance and ``log Z``; the last is differentiable in every parameter."""
        raise NotImplementedError

    def mode(self, r: Tensor, vr: Tensor) -> Moments:
        """Max-sum: the proximal point, ``vr`` times its slope, and the value of the maximum."""
        raise self.refusal("proximal point in closed form", "Use the sum-product form, kind='sum'.")

    def tilted(self, r: Tensor, vr: Tensor) -> Moments:
        """The moments with ``log_z - log N(r; 0, vr)`` in place of ``log_z``: evidence against zero.

        A rule overrides it where the difference can be formed without cancellation.
        """
        found = self.moments(r, vr)
        return found._replace(log_z=found.log_z - log_normal(r, bounded(vr)))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of the continuous part; of a channel ``log p(y | z)`` as a function of ``z``."""
        raise NotImplementedError

    def statistics(self, r: Tensor, vr: Tensor) -> dict[str, Tensor]:
        """Expected sufficient statistics of each element, to be averaged over what shares a parameter.

        Statistics of a location are centred on the current value, so that averages stay right where
        the location itself is not shared.
        """
        raise self.refusal("closed update of parameters", "Follow the gradient of log_z instead.")

    def maximised(self, pooled: Mapping[str, Tensor], learn: Collection[str] | None = None) -> Self:
        """The rule whose parameters maximise the expected log-density.

        Args:
            pooled: averages of :meth:`statistics`, in a shape that broadcasts with the parameters.
            learn: names out of :attr:`learnable` to replace, all of them if None; the others are
                held at their values.
        """
        raise self.refusal("closed update of parameters", "Follow the gradient of log_z instead.")

    def prior_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of ``x`` under a prior, with no observation."""
        raise self.refusal("moments of its own", "It is a channel: use predict(p, vp).")

    def predict(self, p: Tensor, vp: Tensor) -> Tensor:
        """Mean of ``y`` under a channel when ``z ~ N(p, vp)``."""
        raise self.refusal("prediction", "It is a prior: use prior_moments().")

    def refusal(self, what: str, remedy: str) -> UnsupportedError:
        """The error that says what this rule lacks."""
        return UnsupportedError(f"amp: the rule {type(self).__name__} has no {what}. {remedy}")

    def replaced(self, learn: Collection[str] | None, **values: Tensor) -> Self:
        """A copy with those of ``values`` that are named by ``learn`` (all if None)."""
        kept = {k: v for k, v in values.items() if learn is None or k in learn}
        return replace(self, **kept)  # type: ignore[type-var]


def log_normal(residual: Tensor, variance: Tensor) -> Tensor:
    """Log-density of ``N(0, variance)`` at ``residual``.

    >>> log_normal(torch.tensor(0.0), torch.tensor(1.0))
    tensor(-0.9189)
    """
    return -0.5 * (residual * (residual / variance) + (2.0 * math.pi * variance).log())


def bounded(variance: Tensor) -> Tensor:
    """Hold a variance where neither it nor its inverse can overflow in a product, also if infinite.

    >>> bounded(torch.tensor(float("inf"), dtype=torch.float64))
    tensor(1.0000e+40, dtype=torch.float64)
    """
    limit = 1e15 if variance.dtype == torch.float32 else 1e40
    return variance.clamp(1.0 / limit, limit)
