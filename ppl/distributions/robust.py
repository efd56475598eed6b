"""A Gaussian whose squared residual is replaced by a loss that grows more slowly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from ppl.distributions.base import NESTED, STATIC, Distribution
from ppl.distributions.concentrated import ConcentratedNormal
from ppl.distributions.continuous import Normal
from ppl.distributions.multivariate import MultivariateNormal
from ppl.errors import ModelError, nearest

Matching = Literal["gradient", "energy"]


class Robust(Distribution):
    """The factor ``-rho(M) + log_norm``: a Gaussian's, with ``rho`` in the place of ``M^2 / 2``.

    ``M`` is the residual in standard deviations. Of a Normal every entry has its own,
    ``|x - loc| / scale``; a MultivariateNormal and a ConcentratedNormal have one for the whole
    vector, the Mahalanobis distance, so that an outlier is discounted as a whole.

    It keeps the normaliser of the Gaussian, so it is *not* a normalised density;
    :func:`robust_log_norm` is the correction for those kernels that can be normalised. Draws, mean
    and variance are those of the Gaussian.

    Kernels, with ``k`` in standard deviations:

    | kernel | rho(M) |
    |---|---|
    | huber | ``M^2/2`` for ``M <= k``, else ``k M - k^2/2`` |
    | tukey | ``k^2/6 (1 - (1 - M^2/k^2)^3)`` for ``M <= k``, else ``k^2/6`` |
    | cauchy | ``k^2/2 log(1 + M^2/k^2)`` |
    | geman_mcclure | ``k^2 M^2 / (2 (k^2 + M^2))`` |
    | dcs | ``M^2/2`` for ``M <= k``, else ``k^2 (3 M^2 - k^2) / (2 (M^2 + k^2))`` |
    | student | ``(k + 1)/2 log(1 + M^2/k)``: ``k`` counts degrees of freedom |
    | truncated | ``min(M^2, k^2) / 2`` |

    dcs is dynamic covariance scaling [Agarwal2013] with ``Phi = k^2``, as the loss whose slope is
    ``s^2 M`` for ``s = min(1, 2 Phi / (Phi + M^2))``.
    """

    arg_constraints = {"dist": NESTED, "kernel": STATIC, "k": constraints.positive}
    dist: Normal | MultivariateNormal | ConcentratedNormal
    kernel: str
    k: Any

    def check(self) -> None:
        _known(self.kernel)
        if type(self.dist) not in (Normal, MultivariateNormal, ConcentratedNormal):
            raise ModelError(
                "robust: only a Normal, a MultivariateNormal or a ConcentratedNormal can be made robust, got "
                f"{type(self.dist).__name__}. Use StudentT, or a Mixture with a wide component."
            )
        self.event_dim = self.dist.event_dim

    def log_prob(self, value: Tensor) -> Tensor:
        value, k = self.against(value)
        residual, log_norm = self.dist.whitened(value)
        square = residual.square() if self.is_elementwise else residual.square().sum(-1)
        return log_norm - robust_energy(self.kernel, square, k)

    @property
    def is_elementwise(self) -> bool:
        """Whether every entry has a kernel of its own, and not the vector as a whole."""
        return isinstance(self.dist, Normal)

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        return self.dist.sample(shape, generator)

    @property
    def event_shape(self) -> torch.Size:
        return self.dist.event_shape

    @property
    def support(self) -> Constraint:
        return self.dist.support

    @property
    def mean(self) -> Tensor:
        return self.full(self.dist.mean)

    @property
    def variance(self) -> Tensor:
        return self.full(self.dist.variance)


def robust_loss(kernel: str, residual: Tensor, k: Tensor) -> Tensor:
    """``rho(residual)`` of a kernel of :class:`Robust`; broadcasts.

    >>> robust_loss("huber", torch.tensor([0.5, 4.0]), torch.tensor(1.0))
    tensor([0.1250, 3.5000])
    """
    return robust_energy(kernel, residual.square(), k)


def robust_energy(kernel: str, square: Tensor, k: Tensor) -> Tensor:
    """``rho`` as a function of the squared residual ``M^2``; broadcasts, differentiable at zero."""
    return KERNELS[_known(kernel)](square, k)


def robust_weight(
    kernel: str, square: Tensor, k: Tensor, matching: Matching = "gradient"
) -> Tensor:
    """Factor on the precision that makes a Gaussian of a robust factor, near one residual.

    Args:
        kernel: of :class:`Robust`.
        square: squared residuals ``M^2``.
        k: threshold; broadcasts.
        matching: ``"gradient"`` gives ``rho'(M) / M``, whose fixed points minimise the robust energy
            (iteratively reweighted least squares); ``"energy"`` gives ``2 rho(M) / M^2``, a
            quadratic of the right height with other fixed points, as in [Ortiz2021].

    Returns:
        Weights in [0, 1] (student: up to ``(k + 1) / k``), broadcast. dcs is defined by its weight,
        which is the same in both.

    >>> robust_weight("huber", torch.tensor([0.25, 16.0]), torch.tensor(1.0))
    tensor([1.0000, 0.2500])
    """
    slope = _WEIGHTS[_known(kernel)](square, k)
    if matching == "gradient" or kernel == "dcs":
        return slope
    if matching != "energy":
        raise ModelError(f"matching: expected 'gradient' or 'energy', got {matching!r}.")
    safe = torch.where(square > 0, square, 1.0)
    return torch.where(square > 0, 2 * robust_energy(kernel, safe, k) / safe, slope)


def robust_log_norm(kernel: str, k: Tensor, dims: int = 1) -> Tensor:
    """Log of the integral of ``exp(-rho(|r|))`` over all residuals ``r`` of ``dims`` entries.

    With it a threshold can be learned: ``-rho(M) - log_norm - log|scale|`` is a log-density.

    Args:
        kernel: huber, cauchy or student; the others tend to a constant.
        k: threshold, any shape.
        dims: entries of the residual.

    Returns:
        Of the shape of ``k``; infinite where the tail is too heavy (cauchy: ``k^2 <= dims``,
        student: ``k + 1 <= dims``).

    >>> two_sides = robust_log_norm("huber", torch.tensor(1e3, dtype=torch.float64))
    >>> round(float(two_sides.exp() ** 2 / math.pi), 6)  # nearly a Gaussian: 2 pi / pi
    2.0
    """
    if _known(kernel) not in _LOG_NORMS:
        raise ModelError(
            f"robust: the kernel {kernel!r} tends to a constant and has no normaliser. Use one of "
            f"{', '.join(_LOG_NORMS)}."
        )
    return _LOG_NORMS[kernel](k, dims)


def _known(kernel: str) -> str:
    if kernel not in KERNELS:
        hint = nearest(str(kernel), KERNELS)
        raise ModelError(
            f"robust: no kernel is called {kernel!r}.{hint} Known: {', '.join(KERNELS)}."
        )
    return kernel


# ---- losses and weights, as functions of the squared residual ----------------------------------
# The square root of huber is taken where it is not zero, because its gradient there would be
# infinite times zero.


def _huber(square: Tensor, k: Tensor) -> Tensor:
    size = torch.where(square > k * k, square, k * k).sqrt()
    return torch.where(square <= k * k, 0.5 * square, k * size - 0.5 * k * k)


def _huber_weight(square: Tensor, k: Tensor) -> Tensor:
    return k / torch.where(square > k * k, square, k * k).sqrt()


def _tukey(square: Tensor, k: Tensor) -> Tensor:
    share = (square / (k * k)).clamp(max=1)  # 1 - (1 - s)^3 loses digits for small s
    return k * k / 6 * share * (3 - 3 * share + share * share)


def _tukey_weight(square: Tensor, k: Tensor) -> Tensor:
    return (1 - square / (k * k)).clamp(min=0).square()


def _cauchy(square: Tensor, k: Tensor) -> Tensor:
    return 0.5 * k * k * torch.log1p(square / (k * k))


def _cauchy_weight(square: Tensor, k: Tensor) -> Tensor:
    return 1 / (1 + square / (k * k))


def _geman_mcclure(square: Tensor, k: Tensor) -> Tensor:
    return 0.5 * k * k * square / (k * k + square)


def _geman_mcclure_weight(square: Tensor, k: Tensor) -> Tensor:
    return (k * k / (k * k + square)).square()


def _dcs(square: Tensor, k: Tensor) -> Tensor:
    phi = k * k
    return torch.where(square <= phi, 0.5 * square, phi * (3 * square - phi) / (2 * (square + phi)))


def _dcs_weight(square: Tensor, k: Tensor) -> Tensor:
    return (2 * k * k / (k * k + square)).clamp(max=1).square()


def _student(square: Tensor, k: Tensor) -> Tensor:
    return 0.5 * (k + 1) * torch.log1p(square / k)


def _student_weight(square: Tensor, k: Tensor) -> Tensor:
    return (k + 1) / (k + square)


def _truncated(square: Tensor, k: Tensor) -> Tensor:
    return 0.5 * torch.minimum(square, k * k)


def _truncated_weight(square: Tensor, k: Tensor) -> Tensor:
    return (square <= k * k).to(square.dtype)


KERNELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "huber": _huber,
    "tukey": _tukey,
    "cauchy": _cauchy,
    "geman_mcclure": _geman_mcclure,
    "dcs": _dcs,
    "student": _student,
    "truncated": _truncated,
}
_WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "huber": _huber_weight,
    "tukey": _tukey_weight,
    "cauchy": _cauchy_weight,
    "geman_mcclure": _geman_mcclure_weight,
    "dcs": _dcs_weight,
    "student": _student_weight,
    "truncated": _truncated_weight,
}


# ---- normalisers: the surface of the sphere times an integral over the radius ------------------


def _log_surface(dims: int) -> float:
    """Log of the surface of the unit sphere in ``dims`` dimensions (2 in one dimension)."""
    return math.log(2) + dims / 2 * math.log(math.pi) - math.lgamma(dims / 2)


def _huber_log_norm(k: Tensor, dims: int) -> Tensor:
    # Inside k an incomplete gamma function of M^2/2; outside, int_k^inf M^(d-1) exp(k^2/2 - k M) dM
    # = exp(-k^2/2) (d-1)! sum_j k^(2j) / j! / k^d, with j from 0 to d-1.
    shape = torch.full_like(k, dims / 2)
    log_inside = (dims / 2 - 1) * math.log(2) + math.lgamma(dims / 2)
    inside = torch.special.gammainc(shape, 0.5 * k * k) * math.exp(log_inside)
    powers = [(k * k) ** j / math.factorial(j) for j in range(dims)]
    tail = torch.exp(-0.5 * k * k) * math.factorial(dims - 1) * torch.stack(powers).sum(0)
    return (inside + tail / k**dims).log() + _log_surface(dims)


def _power_log_norm(exponent: Tensor, unit: Tensor, dims: int) -> Tensor:
    """Log-integral of ``(1 + |r|^2 / unit)^-exponent``."""
    proper = exponent > dims / 2
    safe = torch.where(proper, exponent, dims / 2 + 1.0)
    log = dims / 2 * (unit.log() + math.log(math.pi))
    log = log + torch.lgamma(safe - dims / 2) - torch.lgamma(safe)
    return torch.where(proper, log, torch.inf)


_LOG_NORMS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "huber": _huber_log_norm,
    "cauchy": lambda k, dims: _power_log_norm(0.5 * k * k, k * k, dims),
    "student": lambda k, dims: _power_log_norm(0.5 * (k + 1), k, dims),
}
