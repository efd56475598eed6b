"""Priors of weights: laws from the number of inputs of a unit, structured sparsity, points and fixed arrays.

Every ``prior=`` and ``bias=`` of a layer takes one of these:

- a function from the number of inputs of a unit to the law of one weight: :func:`fan_in` (the default),
  ``isotropic(0.1)``, :func:`laplace`, ``scale_mixture()``, ``spike_slab(0.1)``, or the user's own;
- a distribution, the law of every weight: ``Normal(0.0, 0.1)``;
- ``group_sparse(over="in")`` and ``group_scale(over="in")``, which declare a latent for every unit as well;
- :func:`ppl.nn.point`: the weights are params, learned as single numbers; :func:`ppl.nn.fixed`: given arrays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl.distributions import (
    Distribution,
    Laplace,
    Mixture,
    Normal,
    SpikeSlab,
    as_distribution,
)
from ppl.errors import ModelError
from ppl.plates import PlateHandle, collect
from ppl.sites import latent
from ppl.value import Value

Law = Callable[[int], Distribution]


class Slot(NamedTuple):
    """One array of weights that a layer needs; a prior declares it."""

    name: str  # of the site, scopes left out
    plates: tuple[PlateHandle, ...]  # of the units: (out, in), (out,), or none
    kernel: tuple[int, ...]  # event shape of one weight
    inputs: int  # number of weights that meet in one unit
    centre: float = 0.0  # of laws and start values: 1 for the scale of a norm layer
    initial: Tensor | None = None  # start values known beforehand

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole array."""
        return (*(p.size for p in self.plates), *self.kernel)


class Prior:
    """A prior that is more than a law: it declares the array of a :class:`Slot` itself."""

    def __call__(self, inputs: int) -> Distribution:
        """Law of one weight of a unit with this many inputs."""
        raise NotImplementedError

    def above(self, slot: Slot) -> Value | None:
        """Declare a latent that the law of a weight reads."""
        return None

    def law(self, slot: Slot, above: Value | None) -> Distribution:
        """Law of one weight, given what :meth:`above` returned."""
        return self(slot.inputs)

    def declare(self, slot: Slot) -> Value:
        """Declare the weights; returns the array that the layer reads."""
        above = self.above(slot)
        with opened(slot.plates):
            law = centred(slot, as_distribution(self.law(slot, above)))
            weight = latent(slot.name, law, shape=slot.kernel)
        return collect(weight, over=slot.plates) if slot.plates else weight

    def of_bias(self) -> Prior:
        """The prior of a bias beside weights with this one."""
        return self


@dataclass(frozen=True)
class Plain(Prior):
    function: Law

    def __call__(self, inputs: int) -> Distribution:
        return self.function(inputs)


def as_prior(prior: Any, default: Any, layer: str) -> Prior:
    """What the user wrote, as a :class:`Prior`.

    Raises:
        ModelError: it is none of the forms that a prior has.
    """
    prior = default if prior is None else prior
    if isinstance(prior, Prior):
        return prior
    if isinstance(prior, (Distribution, torch.distributions.Distribution)):
        return Plain(lambda inputs: as_distribution(prior))
    if callable(prior) and not isinstance(prior, type):
        return Plain(prior)
    raise ModelError(
        f"{layer}: a prior is a function of the number of inputs, a distribution, nn.point() or nn.fixed(array), got "
        f"{prior!r}. Write nn.isotropic(0.1), Normal(0.0, 0.1), nn.spike_slab(0.1), ..."
    )


# ---- laws --------------------------------------------------------------------------------------


def fan_in(inputs: int) -> Distribution:
    """A Normal with variance ``1 / inputs``: a unit keeps the scale of its inputs (Neal, 1996, section 2.1).

    Args:
        inputs: number of weights that meet in one unit.

    >>> fan_in(4).scale
    0.5
    """
    return Normal(0.0, inputs**-0.5)


def isotropic(scale: Any) -> Law:
    """A Normal with one scale for all weights, whatever the size of the layer.

    Args:
        scale: standard deviation; a number, or a value declared outside the plates of the data.

    >>> isotropic(0.1)(400).scale
    0.1
    """
    return lambda inputs: Normal(0.0, scale)


def laplace(inputs: int) -> Distribution:
    """A Laplace law with variance ``1 / inputs``; ``Laplace(0.0, b)`` as ``prior=`` has a scale of its own.

    Args:
        inputs: number of weights that meet in one unit.

    >>> round(laplace(50).scale, 6)
    0.1
    """
    return Laplace(0.0, (2 * inputs) ** -0.5)


def scale_mixture(wide: Any = 1.0, narrow: Any = 0.1, share: Any = 0.5) -> Law:
    """Two Normals around zero, a wide and a narrow one, their scales in units of :func:`fan_in`.

    Args:
        wide: standard deviation of the first, times ``inputs ** -0.5``.
        narrow: of the second.
        share: probability of the wide one.

    Source: C. Blundell, J. Cornebise, K. Kavukcuoglu, D. Wierstra. *Weight Uncertainty in Neural Networks.* ICML 2015,
    eq. (7). Differs: scales there do not follow the number of inputs.

    >>> law = scale_mixture(wide=1.0, narrow=0.01)(4)
    >>> [part.scale for part in law.components]
    [0.5, 0.005]
    """

    def law(inputs: int) -> Distribution:
        unit = inputs**-0.5
        parts = [Normal(0.0, wide * unit), Normal(0.0, narrow * unit)]
        return Mixture(_shares(share), parts)

    return law


def _shares(share: Any) -> Tensor:
    if isinstance(share, Tensor):
        return torch.stack([share, 1 - share])
    return torch.tensor([share, 1 - share], dtype=torch.float64)


def spike_slab(rate: Any = 0.5, slab: Any = None) -> Prior:
    """Weights that are exactly zero with probability ``1 - rate``.

    Biases beside such weights are never zero: their law is :func:`fan_in`.

    Args:
        rate: probability of not being zero; a number, or a value such as a param.
        slab: law of a weight that is not zero, or a function of the number of inputs. By default a Normal with the
            variance ``1 / (rate * inputs)``: the inputs that are left keep the scale of a unit.

    >>> spike_slab(0.25)(16).slab.scale
    0.5
    """
    return _SpikeSlab(rate, slab)


@dataclass(frozen=True)
class _SpikeSlab(Prior):
    rate: Any
    slab: Any

    def __call__(self, inputs: int) -> Distribution:
        return SpikeSlab(self.rate, slab=slab_of(self.slab, self.rate, inputs))

    def of_bias(self) -> Prior:
        return Plain(fan_in)


def slab_of(slab: Any, rate: Any, inputs: int) -> Distribution:
    if slab is None:
        # A rate that is itself unknown leaves the scale of the dense layer: a law's start must not move with it.
        return Normal(0.0, (inputs * rate) ** -0.5) if isinstance(rate, float) else fan_in(inputs)
    if isinstance(slab, (Distribution, torch.distributions.Distribution)):
        return as_distribution(slab)
    return slab(inputs)


# ---- what they share ---------------------------------------------------------------------------


def opened(plates: tuple[PlateHandle, ...]) -> ExitStack:
    """All of these plates, open."""
    stack = ExitStack()
    for plate in plates:
        stack.enter_context(plate)
    return stack


def centred(slot: Slot, law: Distribution) -> Distribution:
    """The law moved to where the weights of the slot lie without any: around one, for a scale."""
    if not slot.centre:
        return law
    if not hasattr(law, "loc"):
        raise ModelError(
            f"'{slot.name}' lies around {slot.centre:g}, and {type(law).__name__} has no loc to move there. Use a Normal, "
            "Laplace or StudentT law, nn.point(), or nn.fixed(array)."
        )
    moved = copy.copy(law)
    moved.loc = law.loc + slot.centre
    return moved


__all__ = [
    "Plain",
    "Prior",
    "Slot",
    "as_prior",
    "fan_in",
    "isotropic",
    "laplace",
    "opened",
    "scale_mixture",
    "slab_of",
    "spike_slab",
]
