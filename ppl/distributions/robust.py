"""A Normal whose squared residual is replaced by a loss that grows more slowly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from ppl.distributions.base import NESTED, STATIC, Distribution
from ppl.distributions.continuous import HALF_LOG_2PI, Normal
from ppl.errors import ModelError, nearest


class Robust(Distribution):
    """The factor ``-rho(r) - log(scale) - log(2 pi) / 2`` with ``r = (x - loc) / scale``.

    It keeps the normaliser of the Gaussian, so it is *not* a normalised density (huber, cauchy for
    ``k > 1`` and student could be; the others tend to a constant). Draws, mean and variance are
    those of the Normal.

    Kernels, with ``k`` in units of ``scale``:

    | kernel | rho(r) |
    |---|---|
    | huber | ``r^2/2`` for ``|r| <= k``, else ``k |r| - k^2/2`` |
    | tukey | ``k^2/6 (1 - (1 - r^2/k^2)^3)`` for ``|r| <= k``, else ``k^2/6`` |
    | cauchy | ``k^2/2 log(1 + r^2/k^2)`` |
    | geman_mcclure | ``k^2 r^2 / (2 (k^2 + r^2))`` |
    | dcs | ``r^2/2`` for ``|r| <= k``, else ``k^2 (3 r^2 - k^2) / (2 (r^2 + k^2))`` |
    | student | ``(k + 1)/2 log(1 + r^2/k)``: ``k`` counts degrees of freedom |
    | truncated | ``min(r^2, k^2) / 2`` |

    dcs is dynamic covariance scaling [Agarwal2013] with ``Phi = k^2``, as the loss whose slope is
    ``s^2 r`` for ``s = min(1, 2 Phi / (Phi + r^2))``.
    """

    arg_constraints = {"dist": NESTED, "kernel": STATIC, "k": constraints.positive}
    dist: Distribution
    kernel: str
    k: Any

    def check(self) -> None:
        if self.kernel not in KERNELS:
            hint = nearest(str(self.kernel), KERNELS)
            raise ModelError(
                f"robust: no kernel is called {self.kernel!r}.{hint} Known: {', '.join(KERNELS)}."
            )
        if type(self.dist) is not Normal:
            raise ModelError(
                f"robust: only a Normal can be made robust, got {type(self.dist).__name__}. "
                "Use StudentT, or a Mixture with a wide component."
            )

    def log_prob(self, value: Tensor) -> Tensor:
        value, k = self.against(value)
        value, loc, scale = self.dist.against(value)
        return -robust_loss(self.kernel, (value - loc) / scale, k) - (scale.log() + HALF_LOG_2PI)

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        return self.dist.sample(shape, generator)

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
    return KERNELS[kernel](residual.square(), k)


# Each loss as a function of the squared residual.  The square root of huber is taken where it is
# not zero,
# because its gradient there would be infinite times zero.
def _huber(square: Tensor, k: Tensor) -> Tensor:
    size = torch.where(square > k * k, square, k * k).sqrt()
    return torch.where(square <= k * k, 0.5 * square, k * size - 0.5 * k * k)


def _tukey(square: Tensor, k: Tensor) -> Tensor:
    return k * k / 6 * (1 - (1 - square / (k * k)).clamp(min=0) ** 3)


def _cauchy(square: Tensor, k: Tensor) -> Tensor:
    return 0.5 * k * k * torch.log1p(square / (k * k))


def _geman_mcclure(square: Tensor, k: Tensor) -> Tensor:
    return 0.5 * k * k * square / (k * k + square)


def _dcs(square: Tensor, k: Tensor) -> Tensor:
    phi = k * k
    return torch.where(square <= phi, 0.5 * square, phi * (3 * square - phi) / (2 * (square + phi)))


def _student(square: Tensor, k: Tensor) -> Tensor:
    return 0.5 * (k + 1) * torch.log1p(square / k)


def _truncated(square: Tensor, k: Tensor) -> Tensor:
    return 0.5 * torch.minimum(square, k * k)


KERNELS = {
    "huber": _huber,
    "tukey": _tukey,
    "cauchy": _cauchy,
    "geman_mcclure": _geman_mcclure,
    "dcs": _dcs,
    "student": _student,
    "truncated": _truncated,
}
