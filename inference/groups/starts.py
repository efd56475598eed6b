"""Where the unknowns start: at the user's values, at prior means, where factors place them, at zero or the identity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppl.errors import DataError, nearest
from ppl.inference.groups.propagation import propagate
from ppl.inference.groups.records import Family

if TYPE_CHECKING:
    from ppl.inference.groups.records import FactorGroups


def start(groups: FactorGroups, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """First points of all families ``[N, *event]``."""
    for name in given:
        if name not in groups.families:
            raise DataError(
                f"start: '{name}' is no latent of the model.{nearest(name, groups.families)} Latents: "
                f"{', '.join(groups.families)}."
            )
    points: dict[str, Tensor] = {}
    for name, family in groups.families.items():
        if name in given:
            points[name] = _given(family, given[name], groups.like)
    placed = set(points)
    for name, family in groups.families.items():
        if name in points:
            continue
        mean = groups.means[name](family, points, groups.params) if name in groups.means else None
        if mean is not None:
            points[name] = mean.clone()
            placed.add(name)
        else:
            neutral = family.neutral(groups.like)
            points[name] = neutral.expand(family.count, *neutral.shape).clone()
    points = {name: points[name] for name in groups.families}
    if all(g.is_affine for g in groups.groups if {f.name for f in g.families} - placed):
        return points  # one step of least squares finds those without a mean from anywhere
    done = {n: torch.full((f.count,), n in placed) for n, f in groups.families.items()}
    return propagate(groups, points, done)


def _given(family: Family, value: Any, like: Tensor) -> Tensor:
    value = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    value = value.detach().to(like)
    expected = (*family.sizes, *family.event_shape)
    if tuple(value.shape) != expected:
        raise DataError(
            f"start: '{family.name}' (plates {', '.join(family.plates) or 'none'}): expected shape {list(expected)}, got "
            f"{list(value.shape)}. Give one element for every element of its plates."
        )
    if not bool(value.isfinite().all()):
        raise DataError(
            f"start: '{family.name}' has entries that are NaN or infinite. Leave the name out to start at the prior mean."
        )
    flat = value.reshape(family.count, *family.event_shape)
    return flat.clone() if family.manifold is None else family.manifold.project(flat)


__all__ = ["start"]
