"""Evidence of a message-passing fixed point: the Bethe free energy ``J``, with ``log p(y) ~ -J``.

Every factor contributes the log normaliser of its tilted distribution; what was counted twice, the Gaussian where
two factors meet, is divided out.  At a fixed point ``J`` is stationary in all messages; away from it ``J`` is what
the step control compares.  It is an approximation, not a bound.

Sources: [Krzakala2014] for GAMP's form; for VAMP, expectation propagation with isotropic messages on the chain
prior - ``z = A x`` - channel [Minka2001].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.inference.amp.operators import Operator
from ppl.inference.amp.rules.record import Moments
from ppl.inference.amp.spectrum import Spectrum

_LOG_2PI = math.log(2.0 * math.pi)


class Message(NamedTuple):
    """An isotropic Gaussian ``exp(-precision |x - mean|^2 / 2)``."""

    mean: Tensor  # [*batch, n]
    precision: Tensor  # [*batch, 1]


def gamp_free_energy(
    r: Tensor, vr: Tensor, x: Moments, p: Tensor, vp: Tensor, z: Moments
) -> Tensor:
    """Bethe free energy of a sweep of sum-product GAMP, in nats.

    Args:
        r: pseudo-observation of the coefficients ``[*batch, n]``.
        vr: its variance ``[*batch, n or 1]``.
        x: the prior's moments there.
        p: pseudo-observation of the outputs ``[*batch, m]``.
        vp: its variance ``[*batch, m or 1]``.
        z: the channel's moments there.

    Returns:
        ``J [*batch]``.

    Source: [Krzakala2014] section III.

    >>> one, zero = torch.ones(1), torch.zeros(1)
    >>> standard = Moments(zero, one / 2, torch.full((1,), -0.5 * math.log(4 * math.pi)))  # N(0, 1) at N(0, 1)
    >>> gamp_free_energy(zero, one, standard, zero, one, standard).round(decimals=3)
    tensor(1.3620)
    """
    outputs = torch.addcdiv(z.log_z, (z.mean - p).square(), vp, value=0.5)
    shift = x.mean - r
    spread = torch.addcmul(x.variance, shift, shift)
    inputs = torch.addcdiv(x.log_z + 0.5 * (_LOG_2PI + vr.log()), spread, vr, value=0.5)
    return -outputs.sum(-1) - inputs.sum(-1)


def map_objective(r: Tensor, vr: Tensor, x: Moments, log_likelihood: Tensor) -> Tensor:
    """What max-sum minimises, ``-log p(y | A x) - log p(x)`` ``[*batch]``, at the proximal point ``x``.

    The prior's log-density is read off the value of its maximum, ``log_z = log p(x) + log N(x; r, vr)``.
    """
    gaussian = -0.5 * (_LOG_2PI + vr.log()) - (x.mean - r).square() / (2.0 * vr)
    return -log_likelihood.sum(-1) - (x.log_z - gaussian).sum(-1)


def vamp_free_energy(
    to_prior: Message, from_prior: Message, x: Moments, to_channel: Message, from_channel: Message, z: Moments,
    linear: Tensor,
) -> Tensor:  # fmt: skip
    """Free energy of expectation propagation on prior - linear map - channel, in nats.

    Args:
        to_prior: message into the prior, ``n`` coefficients.
        from_prior: extrinsic message of the prior.
        x: the prior's moments at ``to_prior``.
        to_channel: message into the channel, ``m`` outputs.
        from_channel: extrinsic message of the channel.
        z: the channel's moments at ``to_channel``.
        linear: log normaliser of the linear step, by :func:`linear_log_normaliser` ``[*batch]``.

    Returns:
        ``J [*batch]``; minus the exact log evidence for a Gaussian prior and channel.
    """
    tilted = _unnormalised(x.log_z, to_prior) + _unnormalised(z.log_z, to_channel) + linear
    return _overlap(to_prior, from_prior) + _overlap(to_channel, from_channel) - tilted


def linear_log_normaliser(
    operator: Operator, spectrum: Spectrum, x: Message, z: Message, mean: Tensor, image: Tensor
) -> Tensor:
    """``log of the integral of x(x) z(A x)`` ``[*batch]``, given its maximum.

    Args:
        operator: ``A``.
        spectrum: eigenvalues of its smaller Gram matrix.
        x: message on the coefficients.
        z: message on the outputs.
        mean: the maximum ``[*batch, n]``.
        image: ``A mean [*batch, m]``.
    """
    n = operator.shape[1]
    logs = spectrum.sum(lambda values: (z.precision * values + x.precision).log())
    logs = logs + (n - min(operator.shape)) * x.precision.log()
    misfit = x.precision * (mean - x.mean).square().sum(-1, keepdim=True)
    misfit = misfit + z.precision * (image - z.mean).square().sum(-1, keepdim=True)
    return 0.5 * (n * _LOG_2PI - logs - misfit).squeeze(-1)


def _unnormalised(log_z: Tensor, message: Message) -> Tensor:
    """From ``log of the integral of f N`` to that of ``f exp(-precision |.|^2 / 2)``."""
    return (log_z + 0.5 * (_LOG_2PI - message.precision.log())).sum(-1)


def _overlap(one: Message, other: Message) -> Tensor:
    total = one.precision + other.precision
    misfit = one.precision * other.precision / total * (one.mean - other.mean).square()
    return 0.5 * (_LOG_2PI - total.log() - misfit).sum(-1)
