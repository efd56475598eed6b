"""Weights of robust rows, which print as a summary."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ppl.inference.groups.records import Group

_OUTLIER = 0.1  # weight below which a row counts as one


class RobustWeights(dict[str, Tensor]):
    """Weights ``[*plates]`` in [0, 1] by name of a group; ``[*plates, m]`` where each entry of a row has its own.

    >>> import ppl
    >>> @ppl.model
    ... def location():
    ...     centre = ppl.latent("centre", ppl.Normal(0.0, 1.0))
    ...     with ppl.plate("row"):
    ...         ppl.observe("y", ppl.Normal(centre, 1.0).robust("huber", 1.5))
    >>> from ppl.inference.groups import build
    >>> group = build(location.bind({"y": [0.0, 99.0]})).groups[-1]
    >>> weights = RobustWeights({group: torch.tensor([1.0, 0.015])})
    >>> print(weights)
    y: 1 of 2 below 0.1, the least 0.015 at row 1
    >>> weights["y"]
    tensor([1.0000, 0.0150])
    """

    def __init__(self, weights: Mapping[Group, Tensor]) -> None:
        super().__init__({g.name: w.reshape(*g.sizes, *w.shape[1:]) for g, w in weights.items()})
        self._lines = [_summary(g, w) for g, w in weights.items()]

    def __str__(self) -> str:
        return "; ".join(self._lines)


def _summary(group: Group, weights: Tensor) -> str:
    """How many rows hardly count, and which one counts least."""
    if not weights.numel():
        return f"{group.name}: no rows"
    rows = weights.detach().reshape(group.rows, -1).amin(1)
    least = int(torch.argmin(rows))
    return (
        f"{group.name}: {int((rows < _OUTLIER).sum())} of {group.rows} below {_OUTLIER}, the least {float(rows[least]):.2g} at "
        f"{group.label(least)}"
    )


__all__ = ["RobustWeights"]
