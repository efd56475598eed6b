"""Angles, quaternions and rotation vectors as smooth functions, exact at zero rotation.

Functions of a rotation vector ``phi`` depend on its size by way of ``x = |phi|^2`` only, through
series that are even in ``|phi|``. Near zero they are evaluated as power series, elsewhere in closed
form: values and derivatives of any order are right in both, and nothing divides by zero. Formulas
as in [Sola2018].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SMALL = 0.25  # of x: below it the power series is exact to double precision with nine terms
_TERMS = 9
_SMALL_HALF = 0.01  # of the squared vector part of a quaternion

_SINE = [(-1) ** k / math.factorial(2 * k + 1) for k in range(_TERMS)]
_COSINE = [(-1) ** k / math.factorial(2 * k + 2) for k in range(_TERMS)]
_CUBIC = [(-1) ** k / math.factorial(2 * k + 3) for k in range(_TERMS)]
# (1 - (w/2) cot(w/2)) / w^2: the Bernoulli numbers |B_2k| / (2k)! for k = 1, 2, ...
_COTANGENT = [
    1 / 12, 1 / 720, 1 / 30240, 1 / 1209600, 1 / 47900160, 691 / 1307674368000,
    1 / 74724249600, 3617 / 10670622842880000, 43867 / 5109094217170944000,
]  # fmt: skip
_ARCTANGENT = [(-1) ** k / (2 * k + 1) for k in range(_TERMS)]


def wrapped(angle: Tensor) -> Tensor:
    """The same angle between -pi and pi; the derivative is one everywhere.

    >>> wrapped(torch.tensor([0.5, 4.0]))
    tensor([ 0.5000, -2.2832])
    """
    return angle - 2 * math.pi * torch.round(angle / (2 * math.pi))


def sine_ratio(x: Tensor) -> Tensor:
    """``sin(w) / w`` of ``x = w^2``."""
    w = _root(x)
    return torch.where(x < _SMALL, _series(x, _SINE), w.sin() / w)


def cosine_ratio(x: Tensor) -> Tensor:
    """``(1 - cos(w)) / w^2`` of ``x = w^2``."""
    half = _root(x) / 2
    return torch.where(x < _SMALL, _series(x, _COSINE), 0.5 * (half.sin() / half).square())


def cubic_ratio(x: Tensor) -> Tensor:
    """``(w - sin(w)) / w^3`` of ``x = w^2``."""
    w = _root(x)
    return torch.where(x < _SMALL, _series(x, _CUBIC), (w - w.sin()) / w**3)


def cotangent_ratio(x: Tensor) -> Tensor:
    """``(1 - (w/2) cot(w/2)) / w^2`` of ``x = w^2``; finite up to ``w = 2 pi``."""
    w = _root(x)
    cotangent = (w / 2).cos() / (w / 2).sin()
    return torch.where(x < _SMALL, _series(x, _COTANGENT), (1 - w / 2 * cotangent) / (w * w))


def turned(angle: Tensor, point: Tensor) -> Tensor:
    """Points ``[*batch, 2]`` turned by angles ``[*batch]``."""
    cos, sin = angle.cos(), angle.sin()
    x, y = point[..., 0], point[..., 1]
    return torch.stack([cos * x - sin * y, sin * x + cos * y], -1)


# ---- quaternions (x, y, z, w) ----------------------------------------------------------------


def quaternion_exp(phi: Tensor) -> Tensor:
    """The unit quaternion ``[*batch, 4]`` of rotation vectors ``[*batch, 3]``."""
    x = phi.square().sum(-1, keepdim=True) / 4
    return torch.cat([0.5 * sine_ratio(x) * phi, 1 - x * cosine_ratio(x)], -1)


def quaternion_log(q: Tensor) -> Tensor:
    """Rotation vectors ``[*batch, 3]``, of at most pi, of unit quaternions ``[*batch, 4]``.

    ``q`` and ``-q`` are one rotation: the shorter way is taken.
    """
    q = torch.where(q[..., 3:] < 0, -q, q)
    vector, w = q[..., :3], q[..., 3:]
    square = vector.square().sum(-1, keepdim=True)
    small = square < _SMALL_HALF
    near = torch.where(small, w, 1.0)  # w is close to one there
    ratio = torch.where(small, square, 0.0) / near.square()
    size = torch.where(small, 1.0, square).sqrt()
    closed = torch.atan2(size, torch.where(small, 1.0, w)) / size
    return 2 * torch.where(small, _series(ratio, _ARCTANGENT) / near, closed) * vector


def quaternion_product(a: Tensor, b: Tensor) -> Tensor:
    """Hamilton product ``[*batch, 4]``, scaled to unit length so that errors do not add up."""
    av, aw, bv, bw = a[..., :3], a[..., 3:], b[..., :3], b[..., 3:]
    vector = aw * bv + bw * av + cross(av, bv)
    scalar = aw * bw - (av * bv).sum(-1, keepdim=True)
    return normalised(torch.cat([vector, scalar], -1))


def conjugate(q: Tensor) -> Tensor:
    """The inverse of unit quaternions ``[*batch, 4]``."""
    return torch.cat([-q[..., :3], q[..., 3:]], -1)


def normalised(q: Tensor) -> Tensor:
    """Quaternions ``[*batch, 4]`` scaled to unit length."""
    return q / q.square().sum(-1, keepdim=True).sqrt()


def rotated(q: Tensor, point: Tensor) -> Tensor:
    """Points ``[*batch, 3]`` rotated by unit quaternions ``[*batch, 4]``."""
    vector = q[..., :3]
    twice = 2 * cross(vector, point)
    return point + q[..., 3:] * twice + cross(vector, twice)


def rotation_matrix(q: Tensor) -> Tensor:
    """Rotation matrices ``[*batch, 3, 3]`` of unit quaternions."""
    eye = torch.eye(3, dtype=q.dtype, device=q.device)
    return rotated(q.unsqueeze(-2), eye).mT


def cross(a: Tensor, b: Tensor) -> Tensor:
    """Vector product ``[*batch, 3]`` of operands that broadcast."""
    ax, ay, az = a.unbind(-1)
    bx, by, bz = b.unbind(-1)
    return torch.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], -1)


def skew(v: Tensor) -> Tensor:
    """Matrices ``[*batch, 3, 3]`` with ``skew(v) @ u = cross(v, u)``."""
    eye = torch.eye(3, dtype=v.dtype, device=v.device)
    return cross(v.unsqueeze(-2), eye).mT


def _root(x: Tensor) -> Tensor:
    """Square roots; one where the power series stands, whose other branch must stay finite."""
    return torch.where(x < _SMALL, 1.0, x).sqrt()


def _series(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    # Far from zero the terms are not used; clamped, they cannot overflow into a NaN derivative.
    x = x.clamp(max=1.0)
    total = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = total * x + c
    return total
