"""Graphs that grow: old elements keep their positions in their plates, new ones stand behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ppl.errors import DataError
from ppl.inference.groups.losses import Quadratic
from ppl.inference.groups.propagation import propagate
from ppl.inference.groups.records import FactorGroups, Family


def places(old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Where the elements of plates of sizes ``old`` stand in grown plates.

    Raises:
        DataError: a plate has shrunk, or there are more or fewer plates.

    >>> places((2, 2), (3, 4))
    tensor([0, 1, 4, 5])
    """
    if len(old) != len(new) or any(a > b for a, b in zip(old, new, strict=True)):
        raise DataError(
            f"extend: plates of sizes {list(old)} cannot have become {list(new)}: plates only grow. Fit the new data by "
            "itself with prior=posterior."
        )
    grid = torch.arange(math.prod(new)).reshape(tuple(new))
    return grid[tuple(slice(0, n) for n in old)].reshape(-1)


def newcomers(old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Which elements ``bool [N]`` of grown plates were not there before.

    >>> newcomers((2,), (3,))
    tensor([False, False,  True])
    """
    return torch.ones(math.prod(new), dtype=torch.bool).index_fill(0, places(old, new), False)


def grown_points(
    old_groups: FactorGroups,
    old_points: Mapping[str, Tensor],
    new_groups: FactorGroups,
    params: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Old elements where they are; new ones where factors place them from these, else at prior means.

    Args:
        old_groups: the model on the data so far.
        old_points: by family ``[N, *event]``.
        new_groups: the model on the data so far followed by the new rows.
        params: of the prior means.

    Returns:
        Points by family of ``new_groups``. Where there is neither a mean nor a factor: zero or the identity.
    """
    points: dict[str, Tensor] = {}
    placed: dict[str, Tensor] = {}
    for name, family in new_groups.families.items():
        mean = new_groups.means.get(name)
        first = None if mean is None else mean(family, points, params)
        if first is None:
            neutral = family.neutral(new_groups.like)
            first = neutral.expand(family.count, *neutral.shape)
        sizes = old_groups.families[name].sizes
        at = places(sizes, family.sizes).to(first.device)
        points[name] = first.index_copy(0, at, old_points[name])
        placed[name] = ~newcomers(sizes, family.sizes)
    if all(g.is_affine and isinstance(g.loss, Quadratic) for g in new_groups.groups):
        return points  # one step of least squares finds them from anywhere
    return propagate(new_groups, points, placed)


def lagging(families: Mapping[str, Family], lag: Mapping[str, int]) -> dict[str, int]:
    """The first open position along each plate of ``lag``.

    Raises:
        DataError: a plate without latents, or no open element.

    >>> lagging({"x": Family("x", ("time",), (9,))}, {"time": 2})
    {'time': 7}
    """
    sizes = {p: n for f in families.values() for p, n in zip(f.plates, f.sizes, strict=True)}
    for plate, length in lag.items():
        if plate not in sizes:
            raise DataError(
                f"extend(lag=...): no latent lies in plate '{plate}'. Plates: {', '.join(sizes)}."
            )
        if length < 1:
            raise DataError(
                f"extend(lag=...): expected at least 1 element of '{plate}', got {length}."
            )
    return {plate: max(sizes[plate] - length, 0) for plate, length in lag.items()}


__all__ = ["grown_points", "lagging", "newcomers", "places"]
