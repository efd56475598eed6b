"""What may stand as a parameter of a distribution: conversion of the user's input and checks with a
remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution as TorchDistribution
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from ppl.errors import ModelError, nearest
from ppl.shapes import broadcast_shapes

_PLAIN = (Tensor, torch.nn.Parameter)


class Weights(Constraint):
    """Vectors of non-negative weights that are not all zero; they are normalised where they are
    used.
    """

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return (value >= 0).all(-1) & (value.sum(-1) > 0)


class PositiveProbability(Constraint):
    """Probabilities of more than zero."""

    def check(self, value: Tensor) -> Tensor:
        return (value > 0) & (value <= 1)


class Point(Constraint):
    """The single value ``point``."""

    def __init__(self, point: Any) -> None:
        self.point = point
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return value == self.point


class OrZero(Constraint):
    """The support of a slab, and zero."""

    def __init__(self, slab: Constraint) -> None:
        self.slab = slab
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return self.slab.check(value) | (value == 0)


weights = Weights()
positive_probability = PositiveProbability()
below_one = constraints.half_open_interval(0.0, 1.0)
real_vector = constraints.real_vector
positive_vector = constraints.independent(constraints.positive, 1)
real_matrix = constraints.independent(constraints.real, 2)

# Constraint -> what is expected, and what to do.  Looked up by identity: torch's constraints are
# singletons.
_WORDS: tuple[tuple[Constraint, str, str], ...] = (
    (constraints.real, "a real number", "Look for a NaN in what it is computed from."),
    (real_vector, "a vector of real numbers", "Look for a NaN in what it is computed from."),
    (constraints.positive, "positive", "Pass exp(x) or softplus(x) of a number of any sign."),
    (
        positive_vector,
        "positive in every entry",
        "Pass exp(x) or softplus(x) of numbers of any sign.",
    ),
    (constraints.nonnegative, "at least 0", "Pass exp(x) or softplus(x) of a number of any sign."),
    (constraints.unit_interval, "between 0 and 1", "Pass log-odds as logits=, or sigmoid(x)."),
    (positive_probability, "above 0 and at most 1", "Pass log-odds as logits=, or sigmoid(x)."),
    (below_one, "at least 0 and below 1", "Pass log-odds as logits=, or sigmoid(x)."),
    (
        weights,
        "non-negative with a positive sum",
        "Pass log-weights as logits=, or softmax(x, -1).",
    ),
    (constraints.nonnegative_integer, "an integer of at least 0", "It counts trials; round it."),
    (
        constraints.positive_definite,
        "symmetric positive definite",
        "Add a small multiple of the identity.",
    ),
    (
        constraints.lower_cholesky,
        "lower triangular, with a positive diagonal",
        "Pass a Cholesky factor, torch.linalg.cholesky(x).",
    ),
)


def is_traced(x: object) -> bool:
    """Whether ``x`` is a value of a model under trace; its numbers must not be looked at."""
    return isinstance(x, Tensor) and type(x) not in _PLAIN


def as_argument(family: str, name: str, x: Any) -> Any:
    """A parameter as a Python number or a tensor; lists and arrays become float64 tensors.

    Numbers stay numbers: a constant takes dtype and device of the run that it is lowered for.

    Raises:
        ModelError: ``x`` is no number and no array.
    """
    if isinstance(x, Tensor) or (isinstance(x, (Real, bool)) and not isinstance(x, np.generic)):
        return x
    if isinstance(x, np.generic) and x.dtype.kind in "biuf":
        return x.item()
    if isinstance(x, (list, tuple)) and any(isinstance(entry, Tensor) for entry in x):
        return _stacked(x)
    if not isinstance(x, (str, bytes)) and (
        isinstance(x, (list, tuple)) or hasattr(x, "__array__")
    ):
        try:
            return torch.as_tensor(np.array(x, dtype=np.float64))
        except (TypeError, ValueError):
            pass
    raise ModelError(
        f"{family}: {name} must be a number, a tensor or an array, got {_kind(x)}. {_other(x)}"
    )


def check_argument(family: str, name: str, x: Any, constraint: Constraint) -> None:
    """Raise where a concrete parameter has too few dimensions or lies outside its constraint."""
    ndim = x.ndim if isinstance(x, Tensor) else 0
    if ndim < constraint.event_dim:
        word = "a vector" if constraint.event_dim == 1 else "a matrix"
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)
        raise ModelError(
            f"{family}: {name} must be {word} (at least {constraint.event_dim} dimension"
            f"{'s' * (constraint.event_dim > 1)}), got {got}. Stack the entries of one draw along "
            "the last axis."
        )
    if is_traced(x):
        return
    tensor = torch.as_tensor(x).detach()
    tensor = tensor if tensor.is_floating_point() else tensor.to(torch.float64)
    valid = _check(constraint, tensor)
    if not bool(valid.all()):
        expected, remedy = _words(constraint)
        raise ModelError(
            f"{family}: {name} must be {expected}, got {_offender(x, tensor, valid)}. {remedy}"
        )


def check_exactly_one(family: str, names: Sequence[str], given: Iterable[str]) -> None:
    """Raise unless exactly one of ``names`` was given."""
    found = [name for name in given if name in names]
    if len(found) != 1:
        got = " and ".join(found) or "none"
        raise ModelError(
            f"{family}: give exactly one of {', '.join(names)}; got {got}. Remove or add one of "
            "them."
        )


def check_broadcast(family: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise where the batch shapes of the parameters do not broadcast."""
    try:
        broadcast_shapes(*shapes.values())
    except RuntimeError:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items() if shape)
        raise ModelError(
            f"{family}: the parameters' shapes do not broadcast: {listed}. Inside a plate a "
            "parameter has the shape of "
            "one element; open a plate for each axis that repeats."
        ) from None


def check_keywords(
    family: str, names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]
) -> None:
    """Raise for an unknown keyword, one given twice, or too many positional arguments."""
    for word in kwargs:
        if word not in names:
            hint = nearest(word, names)
            raise ModelError(
                f"{family} has no parameter {word!r}.{hint} It takes {', '.join(names) or 'none'}."
            )
        if word in names[: len(args)]:
            raise ModelError(
                f"{family}: {word} was given twice, by position and by name. Remove one of them."
            )
    if len(args) > len(names):
        raise ModelError(
            f"{family} takes {len(names)} parameters ({', '.join(names)}), got {len(args)}. "
            "Remove the rest."
        )


def shape_of(x: Any) -> tuple[int, ...]:
    """Shape of a tensor; ``()`` for a number."""
    return tuple(x.shape) if isinstance(x, Tensor) else ()


def show(x: Any) -> str:
    """How a parameter prints: its number when it is a single known one, its shape otherwise."""
    if not isinstance(x, Tensor):
        return repr(x)
    if is_traced(x):
        return f"<value {list(x.shape)}>"
    return str(x.item()) if x.ndim == 0 and x.device.type != "meta" else f"tensor{list(x.shape)}"


def _stacked(entries: Sequence[Any]) -> Tensor:
    known = next(entry for entry in entries if isinstance(entry, Tensor))
    return torch.stack(
        [e if isinstance(e, Tensor) else torch.tensor(e, dtype=known.dtype) for e in entries]
    )


def _check(constraint: Constraint, tensor: Tensor) -> Tensor:
    return (
        constraint.check(tensor) & ~tensor.isnan().any()
        if constraint.event_dim
        else constraint.check(tensor)
    )


def _words(constraint: Constraint) -> tuple[str, str]:
    for known, expected, remedy in _WORDS:
        if known is constraint:
            return expected, remedy
    return f"within {constraint}", "Change the argument."


def _offender(x: Any, tensor: Tensor, valid: Tensor) -> str:
    if not isinstance(x, Tensor) or x.ndim == 0:
        return str(x.item() if isinstance(x, Tensor) else x)
    if valid.shape != tensor.shape:
        return (
            f"{tensor.tolist()}"
            if tensor.numel() <= 16
            else f"a tensor of shape {tuple(tensor.shape)}"
        )
    bad = (~valid).nonzero()
    where = tuple(bad[0].tolist())
    share = f"{len(bad)} of {tensor.numel()} entries are outside"
    return f"{tensor[where].item()} at index {where} ({share})"


def _kind(x: Any) -> str:
    return f"the class {x.__name__}" if isinstance(x, type) else f"{type(x).__name__} {x!r}"


def _other(x: Any) -> str:
    if isinstance(x, TorchDistribution) or hasattr(x, "log_prob"):
        return "Declare the draw first, x = latent('x', dist), and pass x."
    return "Pass a number, a tensor or the value of a latent."
