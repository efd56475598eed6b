"""Normalisation layers that look at one element and have no state: :class:`GroupNorm`, :class:`LayerNorm`, :class:`FRN`.

Scale and shift are points by default: ordinary parameters, one for each channel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ppl.errors import ModelError
from ppl.nn.base import Layer, Plates, check_count, check_rank
from ppl.nn.points import point
from ppl.nn.priors import Prior, Slot, as_prior
from ppl.operations import Batched
from ppl.trace import Trace


class Norm(Layer):
    """A scale and a shift for every channel."""

    def __init__(
        self, channels: int, name: str, affine: bool, prior: Any, plates: Plates, eps: float
    ) -> None:
        super().__init__(name, plates)
        check_count(self.label, "channels", channels)
        self.channels, self.affine, self.eps = channels, affine, eps
        self.prior = as_prior(prior, point(), self.label)

    def slots(self, trace: Trace) -> tuple[tuple[Slot, Prior] | None, ...]:
        if not self.affine:
            return None, None
        channel = self.units(trace, "out", self.channels)
        scale = Slot(f"{self.name}.weight", (channel,), (), 1, centre=1.0)
        shift = Slot(f"{self.name}.bias", (channel,), (), 1)
        return (scale, self.prior), (shift, self.prior.of_bias())

    def record(self, name: str, run: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
        """One node of the graph: ``run(x, *others, scale, shift)``, leading axes of all broadcast."""
        extra = [v for v in (*others, *self.arrays()) if v is not None]
        shapes = (tuple(x.shape), *((self.channels,) for _ in extra))
        return Batched(name, run, shapes, x.ndim)(x, *extra)

    def check(self, x: Any, ranks: tuple[int, ...], expected: str) -> None:
        check_rank(self.label, x, ranks, expected)
        if x.shape[0] != self.channels:
            raise ModelError(
                f"{self.label} has {self.channels} channels, got one element of shape {list(x.shape)}; channels stand first."
            )


class GroupNorm(Norm):
    """Every group of channels of one element with mean zero and variance one, then a scale and a shift.

    Args:
        channels: of the element, ``[channels, *size]``.
        groups: number of groups; divides the channels.
        name: of the layer; its sites are ``name.weight`` (scale) and ``name.bias`` (shift), its plate ``name.out``.
        affine: whether there are a scale and a shift.
        prior: of scale and shift; :func:`point` by default. A law given here is that of the scale minus one.
        plates: as for :class:`Linear`.
        eps: added to the variance.
    """

    def __init__(
        self,
        channels: int,
        *,
        groups: int,
        name: str,
        affine: bool = True,
        prior: Any = None,
        plates: Plates = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(channels, name, affine, prior, plates, eps)
        check_count(self.label, "groups", groups)
        if channels % groups:
            raise ModelError(
                f"{self.label}: {channels} channels do not fall into {groups} equal groups. Choose a divisor of {channels}."
            )
        self.groups = groups

    def __call__(self, x: Tensor) -> Tensor:
        """The layer at one element."""
        self.check(x, (1, 2, 3), "[channels, *size]")
        return self.record("group_norm", partial(_group_norm, x.ndim, self.groups, self.eps), x)


class LayerNorm(Norm):
    """The last axis of one element with mean zero and variance one, then a scale and a shift.

    Args:
        features: length of the last axis.
        name: as for :class:`GroupNorm`.
        affine: as for :class:`GroupNorm`.
        prior: as for :class:`GroupNorm`.
        plates: as for :class:`GroupNorm`.
        eps: as for :class:`GroupNorm`.
    """

    def __init__(
        self,
        features: int,
        *,
        name: str,
        affine: bool = True,
        prior: Any = None,
        plates: Plates = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(features, name, affine, prior, plates, eps)

    def __call__(self, x: Tensor) -> Tensor:
        """The layer at one element ``[..., features]``."""
        check_rank(self.label, x, (1, 2, 3), f"[..., {self.channels}]")
        if x.shape[-1] != self.channels:
            raise ModelError(
                f"{self.label} has {self.channels} features, got one element of shape {list(x.shape)}; features stand last."
            )
        return self.record("layer_norm", partial(_layer_norm, x.ndim, self.eps), x)


class FRN(Norm):
    """Filter response normalisation: every channel divided by its root mean square, and a learned threshold.

    It looks at one element only and has no state, so that a network with it is a factor graph as it stands. Leave the
    activation after it out: the threshold ``name.threshold``, a point, takes its place.

    Args:
        channels: of the element, ``[channels, *size]``; averages are over ``size``.
        name: as for :class:`GroupNorm`.
        prior: as for :class:`GroupNorm`.
        plates: as for :class:`GroupNorm`.
        eps: added to the mean square.

    Source: S. Singh, S. Krishnan. *Filter Response Normalization Layer.* CVPR 2020, eq. (1) to (3).
    """

    def __init__(
        self,
        channels: int,
        *,
        name: str,
        prior: Any = None,
        plates: Plates = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(channels, name, True, prior, plates, eps)

    def slots(self, trace: Trace) -> tuple[tuple[Slot, Prior] | None, ...]:
        channel = self.units(trace, "out", self.channels)
        threshold = Slot(f"{self.name}.threshold", (channel,), (), 1)
        return (*super().slots(trace), (threshold, point()))

    def __call__(self, x: Tensor) -> Tensor:
        """The layer at one element."""
        self.check(x, (2, 3), "[channels, *size] with one size or two")
        return self.record(
            "filter_response_norm", partial(_filter_response_norm, x.ndim, self.eps), x
        )


# ---- functions of tensors with any leading axes ------------------------------------------------


def _affine(rank: int, y: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
    if not rest:
        return y
    scale, shift = (beside(v, rank) for v in rest)
    return y * scale + shift


def beside(v: Tensor, rank: int) -> Tensor:
    """A vector of channels ``[*axes, C]`` against ``[*axes, C, *size]``."""
    return v.reshape(*v.shape, *(1,) * (rank - 1))


def _group_norm(rank: int, groups: int, eps: float, x: Tensor, *rest: Tensor) -> Tensor:
    grouped = x.reshape(*x.shape[: x.ndim - rank], groups, -1)
    variance, mean = torch.var_mean(grouped, -1, correction=0, keepdim=True)
    return _affine(rank, ((grouped - mean) * (variance + eps).rsqrt()).reshape(x.shape), rest)


def _layer_norm(rank: int, eps: float, x: Tensor, *rest: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    y = (x - mean) * (variance + eps).rsqrt()
    if not rest:
        return y
    scale, shift = (v.reshape(*v.shape[:-1], *(1,) * (rank - 1), v.shape[-1]) for v in rest)
    return y * scale + shift


def _filter_response_norm(rank: int, eps: float, x: Tensor, *rest: Tensor) -> Tensor:
    power = x.square().mean(tuple(range(1 - rank, 0)), keepdim=True)
    y = _affine(rank, x * (power + eps).rsqrt(), rest[:2])
    return torch.maximum(y, beside(rest[2], rank))


__all__ = ["FRN", "GroupNorm", "LayerNorm", "Norm", "beside"]
