"""IVON: formulas of a natural-gradient step of a mean-field Gaussian that costs one gradient.

Precisions are averages of ``noise * gradient / sd``, an unbiased estimate of the expected curvature (Price's theorem), so
no second derivative is taken. ``h`` is the average curvature of a loss, ``delta`` the precision of a Gaussian prior
that the loss leaves out, ``lam`` the number of losses: the Gaussian has variance ``1 / (lam (h + delta))``.

Source: [Shen2024] algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOMENTUM = 0.9


def mean_step(
    location: Tensor,
    momentum: Tensor,
    slope: Tensor,
    curvature: Tensor,
    t: int,
    *,
    rate: float,
    decay: float = 0.0,
    longest: float = float("inf"),
) -> tuple[Tensor, Tensor]:
    """New location and momentum of a minimisation, all ``[*shape]``.

    Args:
        location: before.
        momentum: running mean of slopes, before.
        slope: of the loss at a draw.
        curvature: its average ``h``.
        t: number of this step, from 1.
        rate: share of a Newton step.
        decay: weight decay ``delta``, the precision of a Gaussian prior that the loss leaves out.
        longest: of a step.

    >>> x, zero = torch.tensor(3.0), torch.tensor(0.0)
    >>> mean_step(x, zero, x - 1.0, torch.tensor(1.0), 1, rate=1.0)[0]
    tensor(1.)
    """
    momentum = MOMENTUM * momentum + (1 - MOMENTUM) * slope
    newton = (momentum / (1 - MOMENTUM**t) + decay * location) / (curvature + decay)
    return location - rate * newton.clamp(-longest, longest), momentum


def curvature_step(curvature: Tensor, estimate: Tensor, share: float, decay: float = 0.0) -> Tensor:
    """The average curvature with a new estimate in it; the last term keeps ``h + delta`` positive.

    >>> float(curvature_step(torch.tensor(1.0), torch.tensor(-50.0), 0.1)) > 0
    True
    """
    apart = curvature - estimate
    return curvature - share * apart + 0.5 * share**2 * apart.square() / (curvature + decay)


def total_curvature_step(
    total: Tensor,
    noise_slope: Tensor,
    sd: Tensor,
    share: float,
    decay: float | Tensor,
    lam: float,
    out: Tensor | None = None,
) -> Tensor:
    """``h + delta`` after a step, in few passes: :func:`curvature_step` in terms of what a step has at hand.

    With ``c = h + delta`` and the estimate ``e / sd``, the new value is ``c (1 + z^2) / 2`` for
    ``z = 1 - share (1 - lam sd (e + delta sd))``: completing the square of the source's update. Differs: ``z`` is kept between
    -1 and 2, so that one estimate makes the curvature at most 2.5 times as large.

    Args:
        total: ``c`` before.
        noise_slope: ``e``, standard noise times slope, of which anything that does not know the noise may be taken away; is
            written to.
        sd: ``1 / sqrt(lam c)``.
        share: of the new estimate.
        decay: ``delta``.
        lam: number of losses.
        out: where the result is written; may be ``sd``.

    >>> c, e = torch.tensor([2.0]), torch.tensor([0.3])
    >>> sd = (4.0 * c).rsqrt()
    >>> new = curvature_step(c - 0.5, e / sd, 0.1, 0.5) + 0.5
    >>> torch.allclose(total_curvature_step(c, e, sd, 0.1, 0.5, 4.0), new)
    True
    """
    if isinstance(decay, float):
        z = noise_slope.add_(sd, alpha=decay)
    else:
        z = noise_slope.addcmul_(sd, decay)
    rest = torch.full((), 1.0 - share, dtype=total.dtype, device=total.device)
    z = torch.addcmul(rest, z, sd, value=share * lam).clamp_(-1.0, 2.0).square_()
    return torch.addcmul(total, total, z, out=out).mul_(0.5)


__all__ = ["MOMENTUM", "curvature_step", "mean_step", "total_curvature_step"]
