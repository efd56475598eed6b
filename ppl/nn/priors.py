"""Priors of weights: functions from the number of inputs of a unit to the law of one weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ppl.distributions import Distribution, Normal

Prior = Callable[[int], Distribution]


def fan_in(inputs: int) -> Distribution:
    """A Normal with variance ``1 / inputs``: a unit keeps the scale of its inputs (Neal, 1996, section 2.1).

    Args:
        inputs: number of weights that meet in one unit.

    >>> fan_in(4).scale
    0.5
    """
    return Normal(0.0, inputs**-0.5)


def isotropic(scale: Any) -> Prior:
    """A Normal with one scale for all weights, whatever the size of the layer.

    Args:
        scale: standard deviation; a number, or a value declared outside the plates of the data.

    >>> isotropic(0.1)(400).scale
    0.1
    """
    return lambda inputs: Normal(0.0, scale)
