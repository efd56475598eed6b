"""Latents stated in other units: the same model to a person, another one to a learning rate."""

from __future__ import annotations

from typing import Any

from ppl import Normal, latent


def normal_in_units(name: str, mean: Any, sd: Any, unit: float = 1.0) -> Any:
    """A Normal latent that is kept in units of ``unit`` and handed on in units of one.

    The site ``name`` is Normal(mean / unit, sd / unit); what is returned is ``unit`` times it, and
    so Normal(mean, sd) whatever the unit. A method that does not depend on how latents are stated
    gives the same answer for each unit.

    Args:
        name: of the latent.
        mean: of what is returned.
        sd: of what is returned.
        unit: what one unit of the latent stands for.

    >>> from ppl import model
    >>> @model
    ... def length(unit=1.0):
    ...     normal_in_units("metres", 5.0, 1.0, unit)
    >>> a, b = (length(unit=u).sample(1, seed=0)["metres"] for u in (1.0, 1000.0))
    >>> bool((a - 1000 * b).abs() < 1e-9)
    True
    """
    if unit == 1.0:
        return latent(name, Normal(mean, sd))
    return unit * latent(name, Normal(mean / unit, sd / unit))
