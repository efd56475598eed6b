"""Layers without weights: activations, pools, and changes of shape.

Any function of one element is a layer, ``torch.sin`` too; the classes here are names for the usual ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ppl.errors import ModelError
from ppl.nn.base import check_rank


class Activation:
    """A torch function, entry by entry; a subclass names the function.

    Args:
        **options: passed on to the function, such as ``negative_slope=0.1``.

    >>> class Wave(nn.Activation):
    ...     function = torch.sin
    >>> float(Wave()(torch.zeros(())))
    0.0
    """

    function: ClassVar[Callable[..., Tensor]]

    def __init__(self, **options: Any) -> None:
        self.options = options

    def __call__(self, x: Tensor) -> Tensor:
        """The layer at one element of any shape."""
        return type(self).function(x, **self.options)


class ReLU(Activation):
    """``max(x, 0)``."""

    function = torch.relu


class LeakyReLU(Activation):
    """``x`` where it is positive, else ``negative_slope * x`` (0.01 by default)."""

    function = functional.leaky_relu


class ELU(Activation):
    """``x`` where it is positive, else ``alpha * (exp(x) - 1)``."""

    function = functional.elu


class GELU(Activation):
    """``x`` times the normal distribution function of ``x``."""

    function = functional.gelu


class SiLU(Activation):
    """``x * sigmoid(x)``."""

    function = functional.silu


class Tanh(Activation):
    """``tanh(x)``."""

    function = torch.tanh


class Sigmoid(Activation):
    """``1 / (1 + exp(-x))``."""

    function = torch.sigmoid


class Softplus(Activation):
    """``log(1 + exp(x))``."""

    function = functional.softplus


class Identity:
    """One element as it is."""

    def __call__(self, x: Tensor) -> Tensor:
        """The layer at one element of any shape."""
        return x


class Flatten:
    """All entries of one element in a vector."""

    def __call__(self, x: Tensor) -> Tensor:
        """The layer at one element of any shape."""
        return torch.flatten(x)


class _Pool:
    function: ClassVar[Callable[..., Tensor]]
    dims: ClassVar[int]

    def __init__(self, kernel: int, stride: int | None = None, *, padding: int = 0) -> None:
        self.kernel, self.stride = kernel, kernel if stride is None else stride
        self.padding = padding

    def __call__(self, x: Tensor) -> Tensor:
        """The layer at one element ``[channels, *size]``."""
        label = type(self).__name__
        check_rank(label, x, (self.dims + 1,), f"[channels, *size] with {self.dims} sizes")
        if min(x.shape[1:]) + 2 * self.padding < self.kernel:
            raise ModelError(
                f"{label} has windows of size {self.kernel}, larger than one element of shape {list(x.shape)}. Use a "
                "smaller window, or leave a pool out."
            )
        return type(self).function(x, self.kernel, self.stride, self.padding)


class MaxPool1d(_Pool):
    """The largest entry of each window of ``[channels, length]``; arguments as for :class:`MaxPool2d`."""

    function, dims = functional.max_pool1d, 1


class MaxPool2d(_Pool):
    """The largest entry of each window of an image ``[channels, height, width]``.

    Args:
        kernel: height and width of the window.
        stride: step between windows; the window's size by default.
        padding: rows and columns added on every side, which are never the largest.
    """

    function, dims = functional.max_pool2d, 2


class AvgPool1d(_Pool):
    """The mean of each window of ``[channels, length]``; arguments as for :class:`MaxPool2d`."""

    function, dims = functional.avg_pool1d, 1


class AvgPool2d(_Pool):
    """The mean of each window of an image ``[channels, height, width]``; arguments as for :class:`MaxPool2d`."""

    function, dims = functional.avg_pool2d, 2


class GlobalAvgPool1d:
    """The mean of every channel of ``[channels, length]``: a vector."""

    def __call__(self, x: Tensor) -> Tensor:
        """The layer at one element."""
        check_rank("GlobalAvgPool1d", x, (2,), "[channels, length]")
        return x.mean(-1)


class GlobalAvgPool2d:
    """The mean of every channel of an image ``[channels, height, width]``: a vector."""

    def __call__(self, x: Tensor) -> Tensor:
        """The layer at one element."""
        check_rank("GlobalAvgPool2d", x, (3,), "an image [channels, height, width]")
        return x.mean((-2, -1))


__all__ = [
    "ELU",
    "GELU",
    "Activation",
    "AvgPool1d",
    "AvgPool2d",
    "Flatten",
    "GlobalAvgPool1d",
    "GlobalAvgPool2d",
    "Identity",
    "LeakyReLU",
    "MaxPool1d",
    "MaxPool2d",
    "ReLU",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Tanh",
]
