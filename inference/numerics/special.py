"""Special functions and their inverses: what the moment equations of exponential families need.

Every inverse works in double precision and returns the dtype of its argument.  The derivations use
``psi`` for digamma and ``L(a) = log a - psi(a)``, which is positive, decreasing, and tends to
``1 / (2 a)``; forming it as a difference would lose all digits for large ``a``.

Sources: [Minka2000] "Estimating a Dirichlet distribution" (fixed points and Newton steps, inverse
digamma in appendix C), [Minka2002] "Estimating a Gamma distribution", [Sra2012] and [Banerjee2005]
(start value and Newton step for the von Mises concentration).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_EULER_GAMMA = 0.5772156649015329
_SERIES_FROM = 40.0  # above, the asymptotic series below are exact to double precision


def log1mexp(x: Tensor) -> Tensor:
    """Evaluate ``log(1 - exp(x))`` for negative ``x`` without losing digits at either end.

    Args:
        x: ``[*batch]``, negative.

    Source: [Maechler2012] "Accurately computing log(1 - exp(-|a|))", equation (7).

    >>> log1mexp(torch.tensor([-1e-20, -50.0], dtype=torch.float64))
    tensor([-4.6052e+01, -1.9287e-22], dtype=torch.float64)
    """
    near_zero = x > -math.log(2.0)
    # The unused branch is fed a harmless value, or its gradient would be nan times zero.
    near = torch.log(-torch.expm1(torch.where(near_zero, x, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x)))
    return torch.where(near_zero, near, far)


def log_minus_digamma(a: Tensor) -> Tensor:
    """Evaluate ``L(a) = log a - digamma(a)`` to full relative precision for every ``a > 0``.

    Source: [DLMF] 5.11.2 for large ``a``.

    >>> log_minus_digamma(torch.tensor([1.0, 1e12], dtype=torch.float64))
    tensor([5.7722e-01, 5.0000e-13], dtype=torch.float64)
    """
    r = 1.0 / a.clamp(min=_SERIES_FROM)
    r2 = r * r
    series = r / 2 + r2 * (1 / 12 - r2 * (1 / 120 - r2 * (1 / 252 - r2 / 240)))
    direct = a.log() - torch.digamma(a)
    return torch.where(a > _SERIES_FROM, series, direct)


def trigamma(a: Tensor) -> Tensor:
    """Derivative of digamma for ``a > 0``.

    >>> trigamma(torch.tensor(1.0, dtype=torch.float64))
    tensor(1.6449, dtype=torch.float64)
    """
    return torch.polygamma(1, a)


def inverse_digamma(y: Tensor) -> Tensor:
    """Solve ``digamma(x) = y`` for ``x > 0``, for any real ``y``.

    Where the solution leaves the range of the dtype, the result is held inside it.

    Args:
        y: ``[*batch]``, float32 or float64.

    Returns:
        ``x`` ``[*batch]``, positive and finite, dtype of ``y``.

    Source: [Minka2000] appendix C.  Differs from it: above ``y = 20`` the start
    ``exp(y) + 1/2`` is already exact to rounding and is kept.

    >>> inverse_digamma(torch.digamma(torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64)))
    tensor([1.0000e-06, 1.0000e+00, 1.0000e+06], dtype=torch.float64)
    """
    limits = torch.finfo(y.dtype)
    exact = y.double().clamp(-(limits.tiny**-0.5), math.log(limits.max) - 1e-3)
    large = exact.exp() + 0.5
    x = torch.where(exact >= -2.22, large, -1.0 / (exact + _EULER_GAMMA))
    x = torch.where(exact > 20.0, 1.0, x)  # not used; keeps the Newton steps finite
    for _ in range(5):
        x = x - (torch.digamma(x) - exact) / trigamma(x)
    return torch.where(exact > 20.0, large, x).to(y.dtype)


def gamma_shape(gap: Tensor) -> Tensor:
    """Shape of the Gamma law with ``gap = log E[z] - E[log z]``.

    Solves ``L(a) = gap`` by Newton's method on ``1 / a``.

    Args:
        gap: ``[*batch]``, positive (Jensen); the caller clips it away from zero.

    Returns:
        ``a`` ``[*batch]``, dtype of ``gap``.

    Source: [Minka2002] equation (10); start value from [Minka2002] via the quadratic
    approximation of ``L``.

    >>> gamma_shape(log_minus_digamma(torch.tensor([1e-3, 2.5, 1e9], dtype=torch.float64)))
    tensor([1.0000e-03, 2.5000e+00, 1.0000e+09], dtype=torch.float64)
    """
    s = gap.double()
    root = torch.sqrt((s - 3.0) ** 2 + 24.0 * s)
    # (3 - s + root) / (12 s), written without its cancellation for large s.
    a = torch.where(s < 3.0, (3.0 - s + root) / (12.0 * s), 2.0 / (root + (s - 3.0).abs()))
    for _ in range(4):
        slope = -_digamma_slope_gap(a)  # 1/a - trigamma(a), negative
        a = 1.0 / (1.0 / a + (log_minus_digamma(a) - s) / (a**2 * slope))
    return a.to(gap.dtype)


def dirichlet_concentration(mean_log: Tensor, eps: float | None = None) -> Tensor:
    """Concentration of the Dirichlet law with ``E[log z_j] = mean_log_j``.

    Newton's method on ``log a``, whose Hessian is diagonal plus rank one.  Writing
    ``q_j = trigamma(a_j)``, ``S = sum a``, the step needs ``1 / trigamma(S) - sum 1 / q_j``,
    which vanishes relative to its terms for large ``a``; `_curvature_gap` has the stable form.

    Args:
        mean_log: ``[*batch, d]``, ``d >= 2``.  Valid values satisfy ``sum exp(mean_log) < 1``
            (Jensen).  Others, as from equal particles, are moved to the border of that region.
        eps: relative rounding of ``mean_log`` where it was computed in a narrower dtype.

    Returns:
        ``a`` ``[*batch, d]``, positive and finite, dtype of ``mean_log``.

    Source: [Minka2000] section 1, Newton step of equations (15)-(18).  Differs from it: in
    ``log a``, step limited to a factor of ``exp(1.5)``, start exact for large ``a``.

    >>> a = torch.tensor([1e-3, 2.0, 1e5], dtype=torch.float64)
    >>> dirichlet_concentration(torch.digamma(a) - torch.digamma(a.sum()))
    tensor([1.0000e-03, 2.0000e+00, 1.0000e+05], dtype=torch.float64)
    """
    target, slack = _inside_simplex(mean_log, eps or torch.finfo(mean_log.dtype).eps)
    d = target.shape[-1]
    total = ((d - 1) / (2.0 * slack)).clamp(1e-3 * d, 1e15)
    a = inverse_digamma(target + torch.digamma(total))
    for _ in range(20):
        total = a.sum(-1, keepdim=True)
        residual = (a / total).log() - log_minus_digamma(a) + log_minus_digamma(total) - target
        q = trigamma(a)
        x = residual / q
        step = x + x.sum(-1, keepdim=True) / (q * _curvature_gap(a, total, q))
        a = a * torch.exp(-(step / a).clamp(-1.5, 1.5))
    return a.to(mean_log.dtype)


def bessel_ratio(kappa: Tensor) -> Tensor:
    """Mean resultant length ``A(kappa) = I1(kappa) / I0(kappa)`` of a von Mises law.

    >>> bessel_ratio(torch.tensor([0.0, 1.0, 1e6], dtype=torch.float64))
    tensor([0.0000, 0.4464, 1.0000], dtype=torch.float64)
    """
    return torch.special.i1e(kappa) / torch.special.i0e(kappa)


def von_mises_concentration(resultant: Tensor, eps: float | None = None) -> Tensor:
    """Solve ``A(kappa) = R`` for the concentration of a von Mises law.

    Args:
        resultant: ``R`` ``[*batch]``; values outside ``[0, 1)`` are moved to its border.
        eps: relative rounding of ``resultant`` where it was computed in a narrower dtype.

    Returns:
        ``kappa`` ``[*batch]``, positive and finite, dtype of ``resultant``.

    Source: start of [Banerjee2005] equation (4.4) for two dimensions; Newton of [Sra2012].

    >>> von_mises_concentration(bessel_ratio(torch.tensor([0.01, 1.0, 500.0]).double()))
    tensor([1.0000e-02, 1.0000e+00, 5.0000e+02], dtype=torch.float64)
    """
    eps = eps or torch.finfo(resultant.dtype).eps
    r = resultant.double().clamp(0.0, 1.0 - 4.0 * eps)
    kappa = (r * (2.0 - r**2) / (1.0 - r**2)).clamp(min=1e-30)
    for _ in range(8):
        ratio = bessel_ratio(kappa)
        # A' = 1 - A^2 - A / kappa cancels for large kappa, where A' = 1 / (2 kappa^2) + ...
        slope = torch.where(
            kappa > 1e3, (1.0 + 0.5 / kappa) / (2.0 * kappa**2), 1.0 - ratio**2 - ratio / kappa
        )
        kappa = (kappa - (ratio - r) / slope).clamp(min=1e-30)
    return kappa.clamp(min=1e-8).to(resultant.dtype)


def _digamma_slope_gap(a: Tensor) -> Tensor:
    """``trigamma(a) - 1 / a`` to full relative precision ([DLMF] 5.15.8 for large ``a``)."""
    r = 1.0 / a.clamp(min=_SERIES_FROM)
    r2 = r * r
    series = r2 / 2 + r2 * r * (1 / 6 - r2 * (1 / 30 - r2 * (1 / 42 - r2 / 30)))
    return torch.where(a > _SERIES_FROM, series, trigamma(a) - 1.0 / a)


def _curvature_gap(a: Tensor, total: Tensor, q: Tensor) -> Tensor:
    """``1 / trigamma(S) - sum_j 1 / trigamma(a_j)`` ``[*batch, 1]``, stable at both ends.

    With ``h(a) = a - 1 / trigamma(a)`` the same quantity is ``sum_j h(a_j) - h(S)``, because
    ``sum a_j = S``; and ``h(a) = a (trigamma(a) - 1/a) / trigamma(a)`` has no cancellation.
    """
    direct = 1.0 / trigamma(total) - (1.0 / q).sum(-1, keepdim=True)
    spread = (a * _digamma_slope_gap(a) / q).sum(-1, keepdim=True)
    spread = spread - total * _digamma_slope_gap(total) / trigamma(total)
    return torch.where(total > 1.0, spread, direct)


def _inside_simplex(mean_log: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Move ``mean_log`` to where a Dirichlet law exists; also ``1 - sum exp(mean_log)``."""
    limits = torch.finfo(mean_log.dtype)
    target = mean_log.double().clamp(min=-1.0 / limits.tiny**0.25)
    slack = 8.0 * eps
    excess = target.logsumexp(-1, keepdim=True) - math.log1p(-slack)
    target = target - excess.clamp(min=0.0)
    return target, -torch.expm1(target.logsumexp(-1, keepdim=True))
