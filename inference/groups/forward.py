"""Forward-mode derivatives, without the warnings of torch about itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def jvp(
    function: Callable[..., Tensor], points: tuple[Tensor, ...], directions: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """``torch.func.jvp``: the value of a function, and its derivative along a direction.

    Args:
        function: of tensors.
        points: where.
        directions: one tensor a point, of its shape.

    >>> value, slope = jvp(lambda x: x**2, (torch.tensor(3.0),), (torch.tensor(1.0),))
    >>> value.item(), slope.item()
    (9.0, 6.0)
    """
    _load()
    found: Any = torch.func.jvp(function, points, directions)
    return found


@cache
def _load() -> None:
    """The first use of forward mode makes torch compile formulas by its old compiler, which warns that it is old."""
    zero = torch.zeros(())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script.*", DeprecationWarning)
        torch.func.jvp(torch.clone, (zero,), (zero,))


__all__ = ["jvp"]
