"""Weights without a law: learned as single numbers, or given as arrays."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from ppl.errors import ModelError, user_line
from ppl.graph import Variable
from ppl.nn.priors import Prior, Slot, opened
from ppl.plates import collect
from ppl.trace import Trace, active
from ppl.value import Value


def point(weight: Any = None, bias: Any = None) -> Prior:
    """Weights that are learned as single numbers: params, in the same plates as latents would be.

    Args:
        weight: start values, an array of the layer's shape. By default Normal draws of variance ``2 / inputs``, from
            a seed that is made of the site's name; the scale of a norm layer starts at 1. In :func:`ppl.nn.lift` the
            start is what the module holds.
        bias: start values of the bias; zero by default.

    Source: of the variance, K. He, X. Zhang, S. Ren, J. Sun. *Delving Deep into Rectifiers.* ICCV 2015, eq. (10).

    >>> @model
    ... def line():
    ...     layer = nn.Linear(2, 1, name="fc", prior=nn.point())
    ...     with plate("row"):
    ...         observe("y", Normal(layer(given("x"))[0], 1.0))
    >>> v = line.graph({"x": [[1.0, 2.0]], "y": [1.0]}).variables["fc.weight"]
    >>> v.role, v.plates, tuple(v.initial.shape)
    ('param', ('fc.out', 'fc.in'), (1, 2))
    """
    return _Point(weight, bias)


def fixed(weight: Any = None, bias: Any = None) -> Prior:
    """Weights that are known: constants of the model.

    Args:
        weight: array of the layer's shape; in :func:`ppl.nn.lift` what the module holds, by default.
        bias: array of the bias; needed unless the layer has ``bias=False`` or a prior of its own there.
    """
    return _Fixed(weight, bias)


@dataclass(frozen=True, eq=False)
class _Point(Prior):
    weight: Any
    bias: Any

    def declare(self, slot: Slot) -> Value:
        trace = active("nn.point")
        full = trace.full_name(slot.name)
        start = _array(self.weight, slot, trace, "nn.point")
        if start is None:
            start = _start(slot, full, trace)
        with opened(slot.plates):
            variable = Variable(
                full,
                "param",
                trace.open_plates(),
                slot.kernel,
                support=constraints.real,
                initial=start,
                where=user_line(),
            )
            value = trace.add_variable(variable, start[(0,) * len(slot.plates)])
        return collect(value, over=slot.plates) if slot.plates else value

    def of_bias(self) -> Prior:
        return _Point(self.bias, None)


@dataclass(frozen=True, eq=False)
class _Fixed(Prior):
    weight: Any
    bias: Any

    def declare(self, slot: Slot) -> Value:
        trace = active("nn.fixed")
        array = _array(self.weight, slot, trace, "nn.fixed")
        if array is None:
            array = slot.initial
        if array is None:
            raise ModelError(
                f"nn.fixed: '{slot.name}' has no array. Give one of shape {list(slot.shape)}: nn.fixed(weight, bias); a layer "
                "without a bias says bias=False."
            )
        return trace.constant(array)

    def of_bias(self) -> Prior:
        return _Fixed(self.bias, None)


def _array(given: Any, slot: Slot, trace: Trace, word: str) -> Tensor | None:
    if given is None:
        return None
    array = torch.as_tensor(given, dtype=trace.dtype).detach().clone()
    if tuple(array.shape) != slot.shape:
        raise ModelError(
            f"{word}: '{slot.name}' has shape {list(slot.shape)}, got an array {list(array.shape)}. The order of axes is "
            "[outputs, inputs, *kernel], as in torch."
        )
    return array


def _start(slot: Slot, full: str, trace: Trace) -> Tensor:
    if slot.initial is not None:
        return slot.initial.to("cpu", trace.dtype)
    if len(slot.plates) < 2 and slot.plates:  # a bias, or scale and shift of a norm layer
        return torch.full(slot.shape, slot.centre, dtype=trace.dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(full.encode()))
    draw = torch.randn(slot.shape, generator=generator, dtype=trace.dtype)
    return draw * (2.0 / slot.inputs) ** 0.5


__all__ = ["fixed", "point"]
