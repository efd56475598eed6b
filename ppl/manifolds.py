"""Groups of rotations and rigid motions whose elements a latent may be: SO2, SE2, SO3, SE3.

| | element | tangent vector | acts on |
|---|---|---|---|
| SO2 | an angle (radians): ``[]`` | ``[1]``: angle | points of the plane |
| SE2 | ``[x, y, heading]`` | ``[3]``: translation, then angle | points of the plane |
| SO3 | a unit quaternion ``[x, y, z, w]``, the order of g2o files | ``[3]``: rotation vector | points of space |
| SE3 | ``[x, y, z, qx, qy, qz, qw]`` | ``[6]``: translation, then rotation vector | points of space |

Every operation is plain torch on elements with any leading axes, which broadcast; the event stands
last. Derivatives are exact, also at zero rotation. Inside a model an operation is one node of the
graph. ``retract`` and ``local`` perturb on the right, in the coordinates of the element itself:
``retract(a, d) = a o exp(d)`` with the full exponential of the group. Source: [Sola2018].

>>> start, goal = torch.tensor([1.0, 0.0, 1.5708]), torch.tensor([0.0, 2.0, 2.0708])
>>> SE2.between(start, goal).round(decimals=3)
tensor([2.0000, 1.0000, 0.5000])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from ppl.errors import ModelError, nearest
from ppl.operations import Batched
from ppl.rotations import (
    conjugate,
    cosine_ratio,
    cotangent_ratio,
    cross,
    cubic_ratio,
    normalised,
    quaternion_exp,
    quaternion_log,
    quaternion_product,
    rotated,
    rotation_matrix,
    sine_ratio,
    skew,
    turned,
    wrapped,
)
from ppl.shapes import broadcast_shapes

_UNIT = 1e-4  # how far from unit length the squared length of a quaternion in the data may be


class Manifold:
    """A group whose elements are stored with ``event_shape`` and perturbed by ``dims`` numbers.

    Attributes:
        name: ``"SE2"``; :func:`by_name` finds the group again.
        dims: number of tangent coordinates.
        event_shape: of one element.
        support: the constraint that elements obey; it carries the group as ``manifold``.
    """

    name: str
    dims: int
    event_shape: tuple[int, ...]
    space: int  # dimension of the points that elements act on

    def __init__(self) -> None:
        self.support = Elements(self)
        e, v, n = self.event_shape, (self.dims,), len(self.event_shape)
        self._recorded = {
            kind: Batched(f"{self.name}.{kind}", run, inputs, output)
            for kind, run, inputs, output in (
                ("compose", self._compose, (e, e), n),
                ("inverse", self._inverse, (e,), n),
                ("between", self._between, (e, e), n),
                ("exp", self._exp, (v,), n),
                ("log", self._log, (e,), 1),
                ("retract", self._retract, (e, v), n),
                ("local", self._local, (e, e), 1),
                ("act", self._act, (e, (self.space,)), 1),
                ("matrix", self._matrix, (e,), 2),
                ("adjoint", self._adjoint, (e,), 2),
                ("project", self._project, (e,), n),
            )
        }

    # ---- operations --------------------------------------------------------------------------

    def identity(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> Tensor:
        """The element that changes nothing ``[*event]``."""
        raise NotImplementedError

    def compose(self, a: Any, b: Any) -> Tensor:
        """``a o b``: first ``b``, then ``a`` ``[*batch, *event]``."""
        return self._recorded["compose"](a, b)

    def inverse(self, a: Any) -> Tensor:
        """The element that undoes ``a``."""
        return self._recorded["inverse"](a)

    def between(self, a: Any, b: Any) -> Tensor:
        """``b`` as seen from ``a``: ``inverse(a) o b``."""
        return self._recorded["between"](a, b)

    def exp(self, tangent: Any) -> Tensor:
        """The element reached from the identity by ``tangent [*batch, dims]``."""
        return self._recorded["exp"](tangent)

    def log(self, a: Any) -> Tensor:
        """Tangent ``[*batch, dims]`` with ``exp(log(a)) = a``; rotations of at most pi."""
        return self._recorded["log"](a)

    def retract(self, a: Any, tangent: Any) -> Tensor:
        """``a o exp(tangent)``: a step in the coordinates of ``a`` (right perturbation)."""
        return self._recorded["retract"](a, tangent)

    def local(self, a: Any, b: Any) -> Tensor:
        """The tangent ``[*batch, dims]`` at ``a`` that leads to ``b``: ``log(inverse(a) o b)``."""
        return self._recorded["local"](a, b)

    def act(self, a: Any, point: Any) -> Tensor:
        """Points ``[*batch, 2 or 3]`` from the coordinates of ``a`` to those of the world."""
        return self._recorded["act"](a, point)

    def matrix(self, a: Any) -> Tensor:
        """Rotation matrix (SO) or homogeneous matrix (SE) of an element."""
        return self._recorded["matrix"](a)

    def adjoint(self, a: Any) -> Tensor:
        """``Ad [*batch, dims, dims]`` with ``a o exp(v) = exp(Ad v) o a``."""
        return self._recorded["adjoint"](a)

    def project(self, a: Any) -> Tensor:
        """The same element written properly: angles within pi, quaternions of unit length."""
        return self._recorded["project"](a)

    def __repr__(self) -> str:
        return self.name

    # ---- what each group defines; plain tensors ----------------------------------------------

    def _compose(self, a: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError

    def _inverse(self, a: Tensor) -> Tensor:
        raise NotImplementedError

    def _exp(self, v: Tensor) -> Tensor:
        raise NotImplementedError

    def _log(self, a: Tensor) -> Tensor:
        raise NotImplementedError

    def _act(self, a: Tensor, point: Tensor) -> Tensor:
        raise NotImplementedError

    def _matrix(self, a: Tensor) -> Tensor:
        raise NotImplementedError

    def _adjoint(self, a: Tensor) -> Tensor:
        raise NotImplementedError

    def _project(self, a: Tensor) -> Tensor:
        raise NotImplementedError

    def _is_element(self, value: Tensor) -> Tensor:
        raise NotImplementedError

    def _between(self, a: Tensor, b: Tensor) -> Tensor:
        return self._compose(self._inverse(a), b)

    def _retract(self, a: Tensor, v: Tensor) -> Tensor:
        return self._compose(a, self._exp(v))

    def _local(self, a: Tensor, b: Tensor) -> Tensor:
        return self._log(self._between(a, b))


class Elements(Constraint):
    """The elements of a group; ``manifold`` is the group."""

    def __init__(self, manifold: Manifold) -> None:
        self.manifold = manifold
        super().__init__()

    @property
    def event_dim(self) -> int:  # type: ignore[override]
        return len(self.manifold.event_shape)

    def check(self, value: Tensor) -> Tensor:
        """Whether each ``[*batch, *event]`` is an element ``[*batch]``."""
        if self.event_dim and (not value.ndim or value.shape[-1:] != self.manifold.event_shape):
            return torch.zeros(value.shape[:-1], dtype=torch.bool, device=value.device)
        return self.manifold._is_element(value)

    def __repr__(self) -> str:
        return f"the elements of {self.manifold.name}"


class _SO2(Manifold):
    name, dims, event_shape, space = "SO2", 1, (), 2

    def identity(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> Tensor:
        return torch.zeros((), dtype=dtype, device=device)

    def _compose(self, a: Tensor, b: Tensor) -> Tensor:
        return wrapped(a + b)

    def _inverse(self, a: Tensor) -> Tensor:
        return -a

    def _exp(self, v: Tensor) -> Tensor:
        return wrapped(v[..., 0])

    def _log(self, a: Tensor) -> Tensor:
        return wrapped(a).unsqueeze(-1)

    def _act(self, a: Tensor, point: Tensor) -> Tensor:
        return turned(a, point)

    def _matrix(self, a: Tensor) -> Tensor:
        cos, sin = a.cos(), a.sin()
        return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)

    def _adjoint(self, a: Tensor) -> Tensor:
        return torch.ones_like(a)[..., None, None]

    def _project(self, a: Tensor) -> Tensor:
        return wrapped(a)

    def _is_element(self, value: Tensor) -> Tensor:
        return value.isfinite()


class _SE2(Manifold):
    name, dims, event_shape, space = "SE2", 3, (3,), 2

    def identity(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> Tensor:
        return torch.zeros(3, dtype=dtype, device=device)

    def _compose(self, a: Tensor, b: Tensor) -> Tensor:
        place = a[..., :2] + turned(a[..., 2], b[..., :2])
        return torch.cat([place, wrapped(a[..., 2:] + b[..., 2:])], -1)

    def _inverse(self, a: Tensor) -> Tensor:
        return torch.cat([-turned(-a[..., 2], a[..., :2]), -a[..., 2:]], -1)

    def _between(self, a: Tensor, b: Tensor) -> Tensor:
        place = turned(-a[..., 2], b[..., :2] - a[..., :2])
        return torch.cat([place, wrapped(b[..., 2:] - a[..., 2:])], -1)

    def _exp(self, v: Tensor) -> Tensor:
        angle = v[..., 2:]
        along, across = sine_ratio(angle.square()), angle * cosine_ratio(angle.square())
        x, y = v[..., :1], v[..., 1:2]
        return torch.cat([along * x - across * y, across * x + along * y, wrapped(angle)], -1)

    def _log(self, a: Tensor) -> Tensor:
        angle = wrapped(a[..., 2:])
        along, across = 1 - angle.square() * cotangent_ratio(angle.square()), angle / 2
        x, y = a[..., :1], a[..., 1:2]
        return torch.cat([along * x + across * y, along * y - across * x, angle], -1)

    def _act(self, a: Tensor, point: Tensor) -> Tensor:
        return a[..., :2] + turned(a[..., 2], point)

    def _matrix(self, a: Tensor) -> Tensor:
        return _homogeneous(SO2._matrix(a[..., 2]), a[..., :2])

    def _adjoint(self, a: Tensor) -> Tensor:
        return _homogeneous(SO2._matrix(a[..., 2]), torch.stack([a[..., 1], -a[..., 0]], -1))

    def _project(self, a: Tensor) -> Tensor:
        return torch.cat([a[..., :2], wrapped(a[..., 2:])], -1)

    def _is_element(self, value: Tensor) -> Tensor:
        return value.isfinite().all(-1)


class _SO3(Manifold):
    name, dims, event_shape, space = "SO3", 3, (4,), 3

    def identity(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> Tensor:
        return torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=dtype, device=device)

    def _compose(self, a: Tensor, b: Tensor) -> Tensor:
        return quaternion_product(a, b)

    def _inverse(self, a: Tensor) -> Tensor:
        return conjugate(a)

    def _exp(self, v: Tensor) -> Tensor:
        return quaternion_exp(v)

    def _log(self, a: Tensor) -> Tensor:
        return quaternion_log(a)

    def _act(self, a: Tensor, point: Tensor) -> Tensor:
        return rotated(a, point)

    def _matrix(self, a: Tensor) -> Tensor:
        return rotation_matrix(a)

    def _adjoint(self, a: Tensor) -> Tensor:
        return rotation_matrix(a)

    def _project(self, a: Tensor) -> Tensor:
        return normalised(a)

    def _is_element(self, value: Tensor) -> Tensor:
        return (value.square().sum(-1) - 1).abs() < _UNIT


class _SE3(Manifold):
    name, dims, event_shape, space = "SE3", 6, (7,), 3

    def identity(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> Tensor:
        return torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0], dtype=dtype, device=device)

    def _compose(self, a: Tensor, b: Tensor) -> Tensor:
        place = a[..., :3] + rotated(a[..., 3:], b[..., :3])
        return _pose(place, quaternion_product(a[..., 3:], b[..., 3:]))

    def _inverse(self, a: Tensor) -> Tensor:
        back = conjugate(a[..., 3:])
        return torch.cat([-rotated(back, a[..., :3]), back], -1)

    def _between(self, a: Tensor, b: Tensor) -> Tensor:
        back = conjugate(a[..., 3:])
        place = rotated(back, b[..., :3] - a[..., :3])
        return _pose(place, quaternion_product(back, b[..., 3:]))

    def _exp(self, v: Tensor) -> Tensor:
        move, phi = v[..., :3], v[..., 3:]
        x, once = phi.square().sum(-1, keepdim=True), cross(phi, move)
        place = move + cosine_ratio(x) * once + cubic_ratio(x) * cross(phi, once)
        return torch.cat([place, quaternion_exp(phi)], -1)

    def _log(self, a: Tensor) -> Tensor:
        place, phi = a[..., :3], quaternion_log(a[..., 3:])
        x, once = phi.square().sum(-1, keepdim=True), cross(phi, place)
        return torch.cat([place - 0.5 * once + cotangent_ratio(x) * cross(phi, once), phi], -1)

    def _act(self, a: Tensor, point: Tensor) -> Tensor:
        return a[..., :3] + rotated(a[..., 3:], point)

    def _matrix(self, a: Tensor) -> Tensor:
        return _homogeneous(rotation_matrix(a[..., 3:]), a[..., :3])

    def _adjoint(self, a: Tensor) -> Tensor:
        turn = rotation_matrix(a[..., 3:])
        upper = torch.cat([turn, skew(a[..., :3]) @ turn], -1)
        return torch.cat([upper, torch.cat([torch.zeros_like(turn), turn], -1)], -2)

    def _project(self, a: Tensor) -> Tensor:
        return torch.cat([a[..., :3], normalised(a[..., 3:])], -1)

    def _is_element(self, value: Tensor) -> Tensor:
        return value.isfinite().all(-1) & SO3._is_element(value[..., 3:])


def manifold_of(variable: Any) -> Manifold | None:
    """The group that a variable of the graph lives on; None on ordinary numbers."""
    return getattr(variable.support, "manifold", None)


def by_name(name: str) -> Manifold:
    """The group of this name.

    >>> by_name("SE2").dims
    3
    """
    if name not in MANIFOLDS:
        raise ModelError(
            f"there is no manifold {name!r}.{nearest(str(name), MANIFOLDS)} Known: {', '.join(MANIFOLDS)}."
        )
    return MANIFOLDS[name]


def _pose(place: Tensor, turn: Tensor) -> Tensor:
    """Both parts side by side; leading axes broadcast."""
    lead = broadcast_shapes(place.shape[:-1], turn.shape[:-1])
    return torch.cat([place.expand(*lead, 3), turn.expand(*lead, 4)], -1)


def _homogeneous(turn: Tensor, place: Tensor) -> Tensor:
    """``[[turn, place], [0, 1]]``."""
    upper = torch.cat([turn, place.unsqueeze(-1)], -1)
    last = torch.zeros_like(upper[..., :1, :])
    return torch.cat([upper, torch.cat([last[..., :-1], torch.ones_like(last[..., -1:])], -1)], -2)


SO2, SE2, SO3, SE3 = _SO2(), _SE2(), _SO3(), _SE3()
MANIFOLDS: Mapping[str, Manifold] = {m.name: m for m in (SO2, SE2, SO3, SE3)}

__all__ = ["MANIFOLDS", "SE2", "SE3", "SO2", "SO3", "Manifold", "by_name", "manifold_of"]
