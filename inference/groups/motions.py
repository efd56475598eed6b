"""Products of group elements and their derivatives in closed form: what an edge of a pose graph predicts.

An expression of ``compose``, ``inverse`` and ``between`` has the derivatives of its tangent vectors in the adjoints of
its parts, and a logarithm in the inverse right Jacobian. For one edge of a graph in space that is four small matrix
products, in the place of six passes through series and quaternions. Adjoints and Jacobians as in [Sola2018];
the polynomial of :func:`inverse_right_jacobian` is derived where it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl.inference.groups.expressions import Expression
from ppl.inference.groups.recorder import Recorder
from ppl.manifolds import SE2, SE3, SO2, SO3, Manifold
from ppl.operations import Batched
from ppl.rotations import cotangent_ratio, skew

_KINDS = ("compose", "inverse", "between")


@dataclass(frozen=True, eq=False)
class Motion:
    """A group element: that of a slot, a known one, or made of others by ``kind``."""

    kind: str  # "slot", "known" or a name of _KINDS
    parts: tuple[Motion, ...] = ()
    slot: int = -1
    known: Expression | None = None


def motion_of(recorder: Recorder, item: Any, manifold: Manifold) -> Motion | None:
    """How a rewritten item is made of group elements; None where it is made in any other way."""
    view = recorder.view_of(item)
    if view is not None:
        return None if view.sizes else Motion("slot", slot=view.slot)
    if not recorder.reads_slots(item):
        known = recorder.compile([item], [len(manifold.event_shape)])
        return Motion("known", known=known)
    node = recorder.node(item)
    for kind in _KINDS:
        if isinstance(node.func, Batched) and node.func.__name__ == f"{manifold.name}.{kind}":
            parts = [motion_of(recorder, a, manifold) for a in node.args]
            return None if None in parts else Motion(kind, tuple(parts))  # type: ignore[arg-type]
    return None


def differences(
    manifold: Manifold,
    motion: Motion,
    values: Sequence[Tensor],
    params: Mapping[str, Tensor],
) -> tuple[Tensor, _Tape]:
    """Logarithm ``[F | 1, d]`` of a motion, and what :func:`slopes` needs of its parts."""
    tape = _Tape(manifold, {})
    element = _element(tape, motion, values, params)
    return manifold.log(element), tape


def slopes(motion: Motion, tape: _Tape, logarithm: Tensor, left: Tensor) -> dict[int, Tensor]:
    """``left @ d logarithm / d tangent`` by slot, each ``[F, m, d]``.

    Args:
        motion: of :func:`differences`.
        tape: from there.
        logarithm: from there.
        left: ``[F | 1, m, d]``.
    """
    into: dict[int, Tensor] = {}
    _push(tape, motion, left @ inverse_right_jacobian(tape.manifold, logarithm), into)
    return into


@dataclass(frozen=True, eq=False)
class _Tape:
    manifold: Manifold
    elements: dict[int, Tensor]  # by id of the motion


def _element(
    tape: _Tape, motion: Motion, values: Sequence[Tensor], params: Mapping[str, Tensor]
) -> Tensor:
    if motion.kind == "slot":
        made = values[motion.slot][:, 0]
    elif motion.known is not None:
        (made,) = motion.known(values, params)
    else:
        parts = [_element(tape, p, values, params) for p in motion.parts]
        made = getattr(tape.manifold, motion.kind)(*parts)
    tape.elements[id(motion)] = made
    return made


def _push(tape: _Tape, motion: Motion, left: Tensor, into: dict[int, Tensor]) -> None:
    """Hand a derivative on to the parts of a motion.

    For tangent vectors u, v of a and b, to first order: ``(a exp u)(b exp v) = a b exp(Ad(b^-1) u + v)``,
    ``(a exp u)^-1 = a^-1 exp(-Ad(a) u)``, and ``(a exp u)^-1 (b exp v) = e exp(v - Ad(e^-1) u)`` with ``e = a^-1 b``.
    """
    if motion.kind == "slot":
        into[motion.slot] = into[motion.slot] + left if motion.slot in into else left
        return
    if motion.kind == "known":
        return
    group, a, b = tape.manifold, motion.parts[0], motion.parts[-1]
    if motion.kind != "inverse":
        _push(tape, b, left, into)
    if a.kind == "known":
        return
    if motion.kind == "inverse":
        turn = -group.adjoint(tape.elements[id(a)])
    elif motion.kind == "compose":
        turn = group.adjoint(group.inverse(tape.elements[id(b)]))
    else:
        turn = -group.adjoint(group.inverse(tape.elements[id(motion)]))
    _push(tape, a, left @ turn, into)


def inverse_right_jacobian(manifold: Manifold, xi: Tensor) -> Tensor:
    """Derivative ``[*batch, d, d]`` of ``log(exp(xi) exp(delta))`` by ``delta`` at zero.

    The series ``sum B_n ad^n / n!`` is ``1 + ad/2 + (g - x g') ad^2 - g' ad^4`` with ``g`` the
    :func:`~ppl.rotations.cotangent_ratio` of ``x``, the squared angle: ad has the eigenvalues 0 and twice ``+-i``
    times the angle, where that polynomial has the value and the slope of the series.
    """
    eye = torch.eye(manifold.dims, dtype=xi.dtype, device=xi.device)
    if manifold is SO2:
        return eye.expand(*xi.shape[:-1], 1, 1)
    ad = _ad(manifold, xi)
    angle = xi if manifold is SO3 else xi[..., 2:] if manifold is SE2 else xi[..., 3:]
    x = angle.square().sum(-1)[..., None, None]
    square = ad @ ad
    if manifold is not SE3:  # ad^4 = -x ad^2
        return eye + 0.5 * ad + cotangent_ratio(x) * square
    ratio, slope = _with_slope(x)
    return eye + 0.5 * ad + (ratio - x * slope) * square - slope * (square @ square)


def _with_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        ratio = cotangent_ratio(x)
        (slope,) = torch.autograd.grad(ratio.sum(), x)
    return ratio.detach(), slope


def _ad(manifold: Manifold, xi: Tensor) -> Tensor:
    """The matrix of the Lie bracket with ``xi``; translation before rotation."""
    if manifold is SO3:
        return skew(xi)
    ad = xi.new_zeros(*xi.shape, xi.shape[-1])
    if manifold is SE2:
        x, y, turn = xi.unbind(-1)
        ad[..., 0, 1], ad[..., 1, 0] = -turn, turn
        ad[..., 0, 2], ad[..., 1, 2] = y, -x
        return ad
    turn = skew(xi[..., 3:])
    ad[..., :3, :3] = ad[..., 3:, 3:] = turn
    ad[..., :3, 3:] = skew(xi[..., :3])
    return ad


__all__ = ["Motion", "differences", "inverse_right_jacobian", "motion_of", "slopes"]
