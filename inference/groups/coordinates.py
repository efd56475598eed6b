"""All unknowns as one flat vector: families in program order, element by element, tangent coordinates innermost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ppl.inference.groups.records import FactorGroups, Family, Group, _coordinates


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Where each family stands in the flat vector, by scalars and by elements.

    >>> pair = FactorGroups({"x": Family("x", ("n",), (3,)), "w": Family("w", (), (), (2,))}, ())
    >>> at = Coordinates(pair)
    >>> at.size, at.offsets, at.label(4)
    (5, {'x': 0, 'w': 3}, "'w'")
    """

    groups: FactorGroups

    @property
    def families(self) -> Mapping[str, Family]:
        """The families, in order."""
        return self.groups.families

    @cached_property
    def offsets(self) -> dict[str, int]:
        """First scalar of each family."""
        sizes = [f.count * f.dims for f in self.families.values()]
        return dict(zip(self.families, _begins(sizes), strict=False))

    @cached_property
    def elements(self) -> dict[str, int]:
        """Number of each family's first element, counted over all families."""
        return dict(
            zip(self.families, _begins([f.count for f in self.families.values()]), strict=False)
        )

    @property
    def size(self) -> int:
        """Number of scalars ``n``."""
        return sum(f.count * f.dims for f in self.families.values())

    @cached_property
    def dims(self) -> np.ndarray:
        """Scalars of every element ``[N]``."""
        families = self.families.values()
        return np.concatenate([np.full(f.count, f.dims, dtype=np.int64) for f in families])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Flat vectors ``[n, *k]`` as tangent vectors by family ``[N, d, *k]``."""
        out = {}
        for name, f in self.families.items():
            begin = self.offsets[name]
            part = vector[begin : begin + f.count * f.dims]
            out[name] = part.reshape(f.count, f.dims, *vector.shape[1:])
        return out

    def joined(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Flat vectors ``[n, *k]`` of tangent vectors by family ``[N, d, *k]``."""
        return torch.cat([parts[name].flatten(0, 1) for name in self.families])

    def touched(self, group: Group) -> np.ndarray:
        """Scalars that each row of a group touches, in the order of its jacobian: ``[F, D]``."""
        parts = []
        for slot, family in zip(group.slots, group.families, strict=True):
            d, index = family.dims, slot.index.cpu().numpy()
            scalars = self.offsets[slot.family] + index[:, :, None] * d + np.arange(d)
            parts.append(scalars.reshape(len(index), slot.width * d))
        return np.concatenate(parts, 1)

    def locate(self, scalar: int) -> tuple[str, int, int]:
        """Family, element and coordinate of a scalar."""
        name = next(n for n in reversed(self.offsets) if self.offsets[n] <= scalar)
        return name, *divmod(scalar - self.offsets[name], self.families[name].dims)

    def label(self, scalar: int) -> str:
        """The element that a scalar belongs to, in the user's words: ``'pose' (node 17)``."""
        name, element, _ = self.locate(scalar)
        place = self.place(name, element)
        return f"'{name}'" + (f" ({place})" if place else "")

    def place(self, name: str, element: int) -> str:
        """Where an element of a family stands: ``node 17``, and nothing outside plates."""
        family, bound = self.families[name], self.groups.bound
        labels = bound.labels if bound is not None else {}
        return _coordinates(element, family.plates, family.sizes, labels)


def _begins(sizes: list[int]) -> list[int]:
    return [0, *np.cumsum(sizes).tolist()]
