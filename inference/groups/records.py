"""A model as groups of factor rows: the records that Gaussian message passing and least squares share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.inference.groups.losses import Loss, Quadratic

Function = Callable[[Sequence[Tensor], Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True, eq=False)
class Family:
    """A latent as ``N`` elements: its points are ``[N, *event]``, tangent vectors ``[N, d]``.

    ``manifold`` is None for Euclidean latents, else a record of :mod:`ppl.manifolds`.

    >>> pair = Family("x", ("time",), (4,), (2,))
    >>> pair.count, pair.dims
    (4, 2)
    """

    name: str
    plates: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    event_shape: tuple[int, ...] = ()
    manifold: Any = None

    @property
    def count(self) -> int:
        """Number of elements ``N``."""
        return math.prod(self.sizes)

    @property
    def dims(self) -> int:
        """Number of tangent coordinates ``d`` of one element."""
        return math.prod(self.event_shape) if self.manifold is None else self.manifold.dims

    def retract(self, points: Tensor, delta: Tensor) -> Tensor:
        """Move points ``[*lead, *event]`` along tangent vectors ``[*lead, d]``."""
        if self.manifold is None:
            return points + delta.reshape(*delta.shape[:-1], *self.event_shape)
        return self.manifold.retract(points, delta)

    def local(self, origin: Tensor, points: Tensor) -> Tensor:
        """Tangent vectors ``[*lead, d]`` that :meth:`retract` takes from ``origin`` to ``points``."""
        if self.manifold is None:
            difference = points - origin
            return difference.reshape(
                *difference.shape[: difference.ndim - len(self.event_shape)], -1
            )
        return self.manifold.local(origin, points)

    def neutral(self, like: Tensor) -> Tensor:
        """One element ``[*event]``: zero, or the identity of the manifold."""
        if self.manifold is None:
            return like.new_zeros(self.event_shape)
        return self.manifold.identity(like.dtype, like.device)


@dataclass(frozen=True, eq=False)
class Slot:
    """Which elements of a family the rows of a group touch.

    ``index`` is long ``[F, B]``; ``B`` is 1, or the length of a reduced plate.
    """

    family: str
    index: Tensor

    @cached_property
    def is_row(self) -> bool:
        """Whether row ``f`` touches element ``f``, so that nothing has to be looked up."""
        if self.index.shape[1] != 1:
            return False
        rows = torch.arange(len(self.index), device=self.index.device)
        return bool((self.index[:, 0] == rows).all())

    @cached_property
    def is_shared(self) -> bool:
        """Whether every row touches the same elements."""
        return len(self.index) > 0 and bool((self.index == self.index[:1]).all())

    @property
    def width(self) -> int:
        """Number of elements ``B`` that a row touches."""
        return self.index.shape[1]


class Linearised(NamedTuple):
    """Rows near a point: ``energy(point + delta) ~ |J delta + r|^2 / 2`` up to a constant, robust weights included.

    The gradient is ``J' r`` and the curvature ``J' J``.
    """

    jacobian: Tensor | None  # [F, m, D], slots in order, element by element; None if not asked for
    residual: Tensor  # [F, m]
    energy: Tensor  # [F], of the loss itself, without its constant
    weight: Tensor | None = None  # robust weight in [0, 1]: [F] or [F, m]; None for other losses
    dropped: int = 0  # rows that were not finite; they count as absent


@dataclass(frozen=True, eq=False)
class Group:
    """All factors of one site: ``F`` rows with the same function.

    ``function(values, params)`` maps ``values[s] [F, B, *event]``, one tensor a slot, to outputs ``[F, m]``: whitened
    residuals, or for a :class:`~ppl.inference.groups.losses.LogDensity` the arguments of the density. Row ``f`` of
    the result depends on row ``f`` of the values only.

    >>> x = Family("x", ("n",), (3,))
    >>> slots = (Slot("x", torch.tensor([[0], [1]])), Slot("x", torch.tensor([[1], [2]])))
    >>> step = Group("step", slots, (x, x), lambda values, params: (values[1] - values[0]) / 0.1)
    >>> step.rows, step.dims, step.residual_dims
    (2, 2, 1)
    """

    name: str  # of the site; "x (first)" and "x (later)" are the two parts of a Markov chain
    slots: tuple[Slot, ...]  # no two of the same elements; never empty
    families: tuple[Family, ...]  # of each slot
    function: Function = field(repr=False)
    loss: Loss = field(default_factory=Quadratic)
    site: str = ""
    plates: tuple[str, ...] = ()  # of the rows
    sizes: tuple[int, ...] = ()
    is_affine: bool = False  # outputs are affine in all slots: their jacobian is constant
    is_fixed: bool = False  # affine, quadratic and free of params: r = J x - c for good
    keep: Tensor | None = None  # [F] or [F, m]: 0 for missing entries and absent neighbours
    norm: Callable[[Mapping[str, Tensor]], Tensor] | None = field(default=None, repr=False)
    labels: Mapping[str, Sequence[Any]] = field(default_factory=dict, repr=False)
    row_labels: Mapping[str, Sequence[Any]] = field(default_factory=dict, repr=False)
    params: tuple[str, ...] = ()  # names that the outputs, the loss or the constant read
    outputs_width: int | None = None  # m; found by evaluating the function where left out

    @property
    def rows(self) -> int:
        """Number of rows ``F``."""
        return len(self.slots[0].index)

    @property
    def dims(self) -> int:
        """Number of tangent coordinates ``D`` that a row touches."""
        return sum(s.width * f.dims for s, f in zip(self.slots, self.families, strict=True))

    @cached_property
    def residual_dims(self) -> int:
        """Number of outputs ``m`` of a row."""
        if self.outputs_width is not None:
            return self.outputs_width
        values = []
        for slot, family in zip(self.slots, self.families, strict=True):
            like = torch.zeros((), dtype=torch.float64, device=slot.index.device)
            point = family.neutral(like)
            values.append(point.expand(*slot.index.shape, *point.shape))
        return self.outputs(values, {}).shape[1]

    def outputs(self, values: Sequence[Tensor], params: Mapping[str, Tensor]) -> Tensor:
        """Outputs ``[F, m]`` at ``values[s] [F, B, *event]``."""
        return self.function(values, params)

    def log_norm(self, params: Mapping[str, Tensor]) -> Tensor:
        """``[F]``: the log-density of a row is this minus its energy."""
        if self.norm is None:
            return torch.zeros(self.rows, dtype=torch.float64, device=self.slots[0].index.device)
        return self.norm(params)

    def gather(self, points: Mapping[str, Tensor]) -> list[Tensor]:
        """Values of the slots, ``[F, B, *event]`` each."""
        return [gathered(slot, points[slot.family]) for slot in self.slots]

    def label(self, row: int) -> str:
        """A row in the user's words, such as ``edge 17 (pose 3, pose 9)``."""
        labels = self.row_labels or self.labels
        place = _coordinates(row, self.plates, self.sizes, labels) or f"row {row}"
        touched = []
        for slot, family in zip(self.slots, self.families, strict=True):
            first = int(slot.index[row, 0])
            at = _coordinates(first, family.plates, family.sizes, self.labels)
            if slot.width == 1 and at and at != place:
                touched.append(f"{family.name}: {at}")
        return place + (f" ({'; '.join(touched)})" if touched else "")


@dataclass(frozen=True, eq=False)
class FactorGroups:
    """A model with its data as families of unknowns and groups of factor rows."""

    families: Mapping[str, Family]  # in program order
    groups: tuple[Group, ...]
    params: Mapping[str, Tensor] = field(default_factory=dict)  # start values, [*plates, *event]
    constant: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    bound: Bound | None = None
    # Means of the laws of latents, given the points of other families; of those that have one.
    means: Mapping[str, Callable[..., Tensor | None]] = field(default_factory=dict, repr=False)
    like: Tensor = field(
        default_factory=lambda: torch.zeros((), dtype=torch.float64), repr=False
    )  # an empty tensor of the run's dtype and device

    def start(self, given: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """First points ``[N, *event]``: the user's ``[*plates, *event]``, else prior means, else zero or the identity."""
        from ppl.inference.groups.starts import start  # it reads these records

        return start(self, given or {})

    def retract(
        self, points: Mapping[str, Tensor], delta: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Move the points of every family that has tangent vectors ``delta[name] [N, d]``."""
        return {
            name: self.families[name].retract(x, delta[name]) if name in delta else x
            for name, x in points.items()
        }

    def energy(
        self, points: Mapping[str, Tensor], params: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Sum of the energies of all rows, a scalar."""
        from ppl.inference.groups.linearise import energies

        params = self.params if params is None else params
        total = self.like.new_zeros(())
        for group in self.groups:
            total = total + energies(group, group.gather(points), params).sum()
        return total

    def log_density(
        self, points: Mapping[str, Tensor], params: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The joint log-density of points and data, a scalar."""
        params = self.params if params is None else params
        norms = [group.log_norm(params).sum() for group in self.groups]
        return sum(norms, self.constant) - self.energy(points, params)

    def shaped(self, name: str, flat: Tensor) -> Tensor:
        """``[N, *rest]`` of a family as ``[*plates, *rest]``."""
        return flat.reshape((*self.families[name].sizes, *flat.shape[1:]))

    def group(self, name: str) -> Group:
        """The group of this name."""
        return next(g for g in self.groups if g.name == name)


def gathered(slot: Slot, points: Tensor) -> Tensor:
    """Values ``[F, B, *event]`` of a slot from points ``[N, *event]``."""
    if slot.is_row and len(points) == len(slot.index):
        return points.unsqueeze(1)
    if slot.is_shared:
        shared = points[slot.index[0]]
        return shared.expand(len(slot.index), *shared.shape)
    picked = points.index_select(0, slot.index.reshape(-1))
    return picked.reshape(*slot.index.shape, *points.shape[1:])


def _coordinates(
    at: int, plates: Sequence[str], sizes: Sequence[int], labels: Mapping[str, Sequence[Any]]
) -> str:
    parts = []
    for plate, size in zip(reversed(plates), reversed(sizes), strict=True):
        at, position = divmod(at, size)
        parts.append(f"{plate} {labels[plate][position] if plate in labels else position}")
    return ", ".join(reversed(parts))


__all__ = ["FactorGroups", "Family", "Function", "Group", "Linearised", "Slot", "gathered"]
