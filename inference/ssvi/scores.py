"""Which active weights to give up: scores of Gaussian weights, the lowest of which are removed.

Every score is a function of ``mean`` and ``sd`` ``[k]`` of the active weights, of one layer or of all. With ``r = |mean| / sd``,
``phi`` and ``Q`` the density and upper tail of a standard Normal, the folded Normal ``|theta|`` has

    E|theta|   = sd (r + delta),    Var|theta| = sd^2 (1 - delta (2 r + delta)),    delta = 2 (phi(r) - r Q(r)) >= 0

without cancellation at large ``r``.

Source: [Li2024] section 3.3; the stable forms, and which scores give the same order, are derived here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)


class Members(NamedTuple):
    """What a score may look at, each ``[k]``."""

    mean: Tensor
    sd: Tensor
    log_prior: Tensor  # log-density of the prior at zero
    noise: Tensor  # uniform on [0, 1)


def folded_moments(mean: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``|theta|``, ``theta ~ Normal(mean, sd)``, each ``[k]``.

    >>> mean, variance = folded_moments(torch.tensor(0.0), torch.tensor(1.0))
    >>> round(float(mean), 6), round(float(variance), 6)
    (0.797885, 0.36338)
    """
    r = mean.abs() / sd
    delta = _excess(r)
    return sd * (r + delta), sd.square() * (1 - delta * (2 * r + delta))


def _excess(r: Tensor) -> Tensor:
    """``2 (phi(r) - r Q(r))``; rounding must not make it negative."""
    density = torch.exp(-0.5 * r.square() - LOG_ROOT_2PI)
    return (2 * (density - r * torch.special.ndtr(-r))).clamp(min=0)


def magnitude(mean: Tensor) -> Tensor:
    """``|mean|`` ``[k]``, blind to uncertainty."""
    return mean.abs()


def snr(mean: Tensor, sd: Tensor) -> Tensor:
    """``|mean| / sd`` ``[k]``.

    Also the order of ``E|theta| / sd|theta|``, an increasing function of it; that form has ties in single precision, where it
    moves by 3e-5 between 0 and 0.1.

    >>> snr(torch.tensor([-2.0]), torch.tensor([0.5]))
    tensor([4.])
    """
    return mean.abs() / sd


def mean_abs(mean: Tensor, sd: Tensor) -> Tensor:
    """``E|theta|`` ``[k]``."""
    return folded_moments(mean, sd)[0]


def second_moment(mean: Tensor, sd: Tensor) -> Tensor:
    """``E theta^2`` ``[k]``, a cheap stand-in for ``E|theta|``."""
    return mean.square() + sd.square()


def log_mean_exp(mean: Tensor, sd: Tensor, lam: Tensor | float) -> Tensor:
    """``log E exp(lam |theta|)`` ``[k]``.

    >>> round(float(log_mean_exp(torch.tensor(0.0), torch.tensor(1.0), 1.0)), 4)
    1.0204
    """
    r, spread = mean.abs() / sd, lam * sd
    right = spread * r + torch.special.log_ndtr(r + spread)
    left = -spread * r + torch.special.log_ndtr(spread - r)
    return 0.5 * spread.square() + torch.logaddexp(right, left)


def snr_exp(mean: Tensor, sd: Tensor, lam: Tensor | float) -> Tensor:
    """``E Y / sd Y`` ``[k]`` of ``Y = exp(lam |theta|)``.

    For weights far below ``1 / lam`` it orders by small spread, whatever the mean.
    """
    ratio = log_mean_exp(mean, sd, 2 * lam) - 2 * log_mean_exp(
        mean, sd, lam
    )  # log(E Y^2 / (E Y)^2)
    return torch.expm1(ratio).clamp(min=torch.finfo(mean.dtype).tiny).rsqrt()


def evidence(mean: Tensor, sd: Tensor, log_prior: Tensor) -> Tensor:
    """Twice the log evidence that a weight brings ``[k]``: what setting it to zero would lose.

    The Savage-Dickey ratio ``log(p(0) / q(0))``; for a Normal prior of scale ``s`` this is ``r^2 - log(s^2 / sd^2)``. Below zero
    the data argue for removal.

    Args:
        mean: of the posterior, ``[k]``.
        sd: of the posterior, ``[k]``.
        log_prior: log-density of the prior at zero, ``[k]``.

    >>> prior = torch.distributions.Normal(0.0, 1.0).log_prob(torch.tensor([0.0]))
    >>> evidence(torch.tensor([0.0]), torch.tensor([1.0]), prior)
    tensor([0.])
    """
    log_posterior = -0.5 * (mean / sd).square() - sd.log() - LOG_ROOT_2PI
    return 2 * (log_prior - log_posterior)


def _unit(members: Members, lam: float) -> Tensor:
    """``lam`` in units of one over the typical ``|theta|``, so that it has no scale."""
    return lam / mean_abs(members.mean, members.sd).mean()


# The names of the exponential scores stand for lam = 1 in units of 1 / mean |theta|.
REMOVAL: dict[str, Callable[[Members], Tensor]] = {
    "snr": lambda m: snr(m.mean, m.sd),
    "snr_abs": lambda m: snr(m.mean, m.sd),
    "magnitude": lambda m: magnitude(m.mean),
    "mean_abs": lambda m: mean_abs(m.mean, m.sd),
    "second_moment": lambda m: second_moment(m.mean, m.sd),
    "mean_exp": lambda m: log_mean_exp(m.mean, m.sd, _unit(m, 1.0)),
    "snr_exp": lambda m: snr_exp(m.mean, m.sd, _unit(m, 1.0)),
    "evidence": lambda m: evidence(m.mean, m.sd, m.log_prior),
    "random": lambda m: m.noise,
}
