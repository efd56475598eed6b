"""Tangent frames: the derivative of a retraction at zero, in closed form.

Derivatives of a residual by the numbers that store an element are one pass of automatic differentiation; multiplied by
the frame they are those by tangent vectors. Differentiating through the retraction itself costs several times as much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppl.inference.groups.forward import jvp
from ppl.inference.groups.records import Family
from ppl.manifolds import SE2, SE3, SO2, SO3
from ppl.rotations import rotation_matrix


def frame(family: Family, points: Tensor) -> Tensor | None:
    """Derivative of ``retract(points, delta)`` by ``delta`` at zero.

    Args:
        family: Euclidean or on a manifold.
        points: ``[*lead, *event]``.

    Returns:
        ``[*lead, event entries, d]``; None where it is the identity.
    """
    manifold = family.manifold
    if manifold is None or manifold is SO2:
        return None
    if manifold is SE2:
        return _planar(points)
    if manifold is SO3:
        return _quaternion(points)
    if manifold is SE3:
        return _spatial(points)
    return _by_derivative(family, points)


def _planar(points: Tensor) -> Tensor:
    """``[[R, 0], [0, 1]]``."""
    cos, sin = points[..., 2].cos(), points[..., 2].sin()
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    rows = (cos, -sin, zero, sin, cos, zero, zero, zero, one)
    return torch.stack(rows, -1).reshape(*cos.shape, 3, 3)


def _quaternion(q: Tensor) -> Tensor:
    """``q o (v / 2, 1)`` to first order in ``v``; order x, y, z, w."""
    x, y, z, w = (0.5 * q).unbind(-1)
    rows = (w, -z, y, z, w, -x, -y, x, w, -x, -y, -z)
    return torch.stack(rows, -1).reshape(*x.shape, 4, 3)


def _spatial(points: Tensor) -> Tensor:
    made = points.new_zeros(*points.shape[:-1], 7, 6)
    made[..., :3, :3] = rotation_matrix(points[..., 3:])
    made[..., 3:, 3:] = _quaternion(points[..., 3:])
    return made


def _by_derivative(family: Family, points: Tensor) -> Tensor:
    """For a manifold of the user's own."""
    lead = points.shape[: points.ndim - len(family.event_shape)]
    zero = points.new_zeros(*lead, family.dims)
    unit = torch.eye(family.dims, dtype=points.dtype, device=points.device)

    def column(direction: Tensor) -> Tensor:
        moved = jvp(lambda d: family.retract(points, d), (zero,), (direction.expand_as(zero),))
        return moved[1].reshape(*lead, -1)

    return torch.func.vmap(column, out_dims=-1)(unit)


__all__ = ["frame"]
