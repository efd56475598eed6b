"""Gaussians in information form: the algebra that messages, cavities and beliefs share.

A pair ``(eta, lam)`` stands for ``exp(eta'x - x' lam x / 2)``, normalised or not. Products add, quotients subtract, and
``(0, 0)`` says nothing. Source: [Bishop2006] section 2.3.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


class Gaussian(NamedTuple):
    """Unnormalised log-densities ``eta'x - x' lam x / 2``; ``belief - message`` is the cavity.

    >>> half = Gaussian(torch.tensor([1.0]), torch.tensor([[2.0]]))
    >>> half + half
    Gaussian(eta=tensor([2.]), lam=tensor([[4.]]))
    """

    eta: Tensor  # [*batch, d]
    lam: Tensor  # [*batch, d, d], symmetric, may be singular

    def __add__(self, other: Gaussian) -> Gaussian:  # type: ignore[override]
        return Gaussian(self.eta + other.eta, self.lam + other.lam)

    def __sub__(self, other: Gaussian) -> Gaussian:
        return Gaussian(self.eta - other.eta, self.lam - other.lam)

    def moved(self, delta: Tensor) -> Gaussian:
        """The same density in coordinates ``x - delta``, with ``delta [*batch, d]``."""
        return Gaussian(self.eta - times(self.lam, delta), self.lam)


class Diagonal(NamedTuple):
    """Independent scalars: as :class:`Gaussian`, with the diagonal of ``lam`` only.

    >>> Diagonal(torch.tensor([1.0]), torch.tensor([2.0])) - Diagonal(torch.tensor([1.0]), torch.tensor([1.0]))
    Diagonal(eta=tensor([0.]), lam=tensor([1.]))
    """

    eta: Tensor  # [*batch, d]
    lam: Tensor  # [*batch, d]

    def __add__(self, other: Diagonal) -> Diagonal:  # type: ignore[override]
        return Diagonal(self.eta + other.eta, self.lam + other.lam)

    def __sub__(self, other: Diagonal) -> Diagonal:
        return Diagonal(self.eta - other.eta, self.lam - other.lam)

    def moved(self, delta: Tensor) -> Diagonal:
        """The same density in coordinates ``x - delta``, with ``delta [*batch, d]``."""
        return Diagonal(self.eta - self.lam * delta, self.lam)

    def full(self) -> Gaussian:
        """With its precision as a matrix."""
        return Gaussian(self.eta, torch.diag_embed(self.lam))


class Inverse(NamedTuple):
    """Inverses of precisions, and which of them there are."""

    matrix: Tensor  # [*batch, d, d]; the identity where a precision is singular
    proper: Tensor  # bool [*batch]


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """``matrix @ vector`` for ``[*batch, n, d]`` and ``[*batch, d]``."""
    if matrix.shape[-2:] == (1, 1):
        return matrix[..., 0] * vector
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def from_moments(mean: Tensor, covariance: Tensor) -> Gaussian:
    """Information form of mean ``[*batch, d]`` and covariance ``[*batch, d, d]``.

    >>> from_moments(torch.tensor([3.0]), torch.tensor([[0.25]]))
    Gaussian(eta=tensor([12.]), lam=tensor([[4.]]))
    """
    lam = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    return Gaussian(times(lam, mean), lam)


def moments(belief: Gaussian) -> tuple[Tensor, Tensor]:
    """Mean ``[*batch, d]`` and covariance ``[*batch, d, d]`` of proper Gaussians.

    >>> moments(Gaussian(torch.tensor([6.0]), torch.tensor([[4.0]])))
    (tensor([1.5000]), tensor([[0.2500]]))
    """
    covariance = torch.cholesky_inverse(torch.linalg.cholesky(belief.lam))
    return times(covariance, belief.eta), covariance


def marginal(joint: Gaussian, keep: slice) -> Gaussian:
    """Integrate a joint Gaussian over every coordinate outside ``keep``.

    Args:
        joint: eta ``[*batch, d]``, lam ``[*batch, d, d]``; may be improper in ``keep``.
        keep: the ``m`` coordinates that stay.

    Returns:
        eta ``[*batch, m]``, lam ``[*batch, m, m]``.

    Raises:
        torch.linalg.LinAlgError: the block integrated over is not positive definite.

    Source: Schur complement, [Bishop2006] section 2.3.2.

    >>> chain = Gaussian(torch.tensor([1.0, 0.0]), torch.tensor([[2.0, -1.0], [-1.0, 2.0]]))
    >>> marginal(chain, slice(0, 1))
    Gaussian(eta=tensor([1.]), lam=tensor([[1.5000]]))
    """
    stay, drop = _split(joint, keep)
    cross = joint.lam[..., stay, :][..., drop]
    return eliminated(
        Gaussian(joint.eta[..., stay], joint.lam[..., stay, :][..., stay]),
        cross,
        Gaussian(joint.eta[..., drop], joint.lam[..., drop, :][..., drop]),
    )


def eliminated(kept: Gaussian, cross: Tensor, dropped: Gaussian) -> Gaussian:
    """What remains for ``kept [*batch, m]`` when ``dropped [*batch, n]`` is integrated out; ``cross [*batch, m, n]``."""
    chol = torch.linalg.cholesky(dropped.lam)
    right = torch.cat([cross.mT, dropped.eta.unsqueeze(-1)], -1)
    half = torch.linalg.solve_triangular(chol, right, upper=False)
    gain, rest = half[..., :-1], half[..., -1]
    return Gaussian(kept.eta - times(gain.mT, rest), kept.lam - gain.mT @ gain)


def conditional(joint: Gaussian, keep: slice, value: Tensor) -> Gaussian:
    """The coordinates in ``keep`` given that the others are ``value [*batch, d - m]``.

    >>> chain = Gaussian(torch.tensor([1.0, 0.0]), torch.tensor([[2.0, -1.0], [-1.0, 2.0]]))
    >>> conditional(chain, slice(0, 1), torch.tensor([3.0]))
    Gaussian(eta=tensor([4.]), lam=tensor([[2.]]))
    """
    stay, drop = _split(joint, keep)
    rows = joint.lam[..., stay, :]
    return Gaussian(joint.eta[..., stay] - times(rows[..., drop], value), rows[..., stay])


def log_integral(belief: Gaussian) -> Tensor:
    """Log of the integral ``[*batch]``: ``eta' lam^-1 eta / 2 - log det lam / 2 + d log(2 pi) / 2``.

    >>> log_integral(Gaussian(torch.zeros(1), torch.full((1, 1), 2 * math.pi)))
    tensor(0.)
    """
    chol = torch.linalg.cholesky(belief.lam)
    half = torch.linalg.solve_triangular(chol, belief.eta.unsqueeze(-1), upper=False)
    log_det = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return 0.5 * half.square().sum((-2, -1)) - log_det + 0.5 * belief.eta.shape[-1] * LOG_2PI


def inverse(lam: Tensor) -> Inverse:
    """Inverse of symmetric positive semidefinite matrices ``[*batch, d, d]``, and which are proper.

    Closed forms up to three dimensions, Cholesky factors above. A matrix counts as singular when a pivot is below
    ``1e3 d`` units of rounding of its diagonal entry, which no change of the coordinates' units alters.

    >>> inverse(torch.tensor([[[2.0]], [[0.0]]])).proper
    tensor([ True, False])
    """
    d = lam.shape[-1]
    if d <= 3:
        return (_inverse1, _inverse2, _inverse3)[d - 1](lam)
    chol, info = torch.linalg.cholesky_ex(lam)
    pivots = chol.diagonal(dim1=-2, dim2=-1).square()
    sizes = lam.diagonal(dim1=-2, dim2=-1)
    proper = (info == 0) & (pivots > _singular(lam) * sizes).all(-1)
    if not bool(proper.all()):
        unit = torch.eye(d, dtype=lam.dtype, device=lam.device)
        chol = torch.where(proper[..., None, None], chol, unit)
    return Inverse(torch.cholesky_inverse(chol), proper)


def _split(joint: Gaussian, keep: slice) -> tuple[Tensor, Tensor]:
    d = joint.eta.shape[-1]
    drop = torch.ones(d, dtype=torch.bool, device=joint.eta.device)
    drop[keep] = False
    return (~drop).nonzero().squeeze(-1), drop.nonzero().squeeze(-1)


def _singular(lam: Tensor) -> float:
    return 1e3 * lam.shape[-1] * torch.finfo(lam.dtype).eps


def _inverse1(lam: Tensor) -> Inverse:
    proper = lam > torch.finfo(lam.dtype).tiny
    if bool(proper.all()):
        return Inverse(lam.reciprocal(), proper[..., 0, 0])
    return Inverse(torch.where(proper, lam, 1.0).reciprocal(), proper[..., 0, 0])


def _inverse2(lam: Tensor) -> Inverse:
    a, b, c = lam[..., 0, 0], lam[..., 0, 1], lam[..., 1, 1]
    det = a * c - b * b
    proper = (a > 0) & (c > 0) & (det > _singular(lam) * a * c)
    det = torch.where(proper, det, 1.0)
    off = -b / det
    rows = torch.stack([c / det, off, off, a / det], -1).reshape(lam.shape)
    return _or_unit(rows, proper)


def _inverse3(lam: Tensor) -> Inverse:
    a, b, c = lam[..., 0, 0], lam[..., 0, 1], lam[..., 0, 2]
    e, f, i = lam[..., 1, 1], lam[..., 1, 2], lam[..., 2, 2]
    # Cofactors; the last pivots of the three orders of elimination are det / minor.
    ei, cf, ae = e * i - f * f, c * f - b * i, a * e - b * b
    bf, ai, bc = b * f - c * e, a * i - c * c, b * c - a * f
    det = a * ei + b * cf + c * bf
    tiny = _singular(lam)
    proper = (a > 0) & (i > 0) & (ae > tiny * a * e) & (ei > tiny * e * i) & (det > tiny * i * ae)
    det = torch.where(proper, det, 1.0)
    rows = torch.stack([ei, cf, bf, cf, ai, bc, bf, bc, ae], -1) / det.unsqueeze(-1)
    return _or_unit(rows.reshape(lam.shape), proper)


def _or_unit(matrix: Tensor, proper: Tensor) -> Inverse:
    if bool(proper.all()):
        return Inverse(matrix, proper)
    unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return Inverse(torch.where(proper[..., None, None], matrix, unit), proper)


__all__ = [
    "Diagonal",
    "Gaussian",
    "Inverse",
    "LOG_2PI",
    "conditional",
    "eliminated",
    "from_moments",
    "inverse",
    "log_integral",
    "marginal",
    "moments",
    "times",
]
