"""Products of activations with an array of weights that is given as its stored values.

A :class:`Product` knows how one array is stored and multiplies by it. :class:`Dense` stores all entries; methods that
keep some entries only bring products of their own. All are linear in the values and differentiable in both arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor
from torch.nn import functional

from ppl.inference.networks.structure import ProductNode

_CONVOLUTIONS: dict[str, Callable[..., Tensor]] = {
    "conv1d": functional.conv1d,
    "conv2d": functional.conv2d,
}


class Product(Protocol):
    """Multiplies activations by an array of weights; no bias."""

    def __call__(self, values: Tensor, x: Tensor) -> Tensor:
        """The product.

        Args:
            values: the stored entries ``[k]``, in ascending order of their place in the array.
            x: ``[*batch, in]``, or ``[*batch, channels, *size]`` of a convolution.

        Returns:
            ``[*batch, out]`` or ``[*batch, channels out, *size out]``.
        """
        ...


class Dense:
    """All entries of an array are stored.

    >>> from ppl.models.bnn import classifier
    >>> from ppl.inference.networks.structure import find_network
    >>> bound = classifier(hidden=(2,)).bind({"x": torch.ones(3, 4), "label": [0, 1, 2]})
    >>> Dense(find_network(bound).products[0])(torch.ones(8), torch.ones(3, 4)).tolist()
    [[4.0, 4.0], [4.0, 4.0], [4.0, 4.0]]
    """

    def __init__(self, product: ProductNode) -> None:
        self.shape = product.shape
        self.run = linear if product.kind == "linear" else convolution(product)

    def __call__(self, values: Tensor, x: Tensor) -> Tensor:
        """The product, see :class:`Product`."""
        return self.run(x, values.view(self.shape))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``[*batch, in]`` times ``[out, in]``."""
    return functional.linear(x, weight)


def convolution(product: ProductNode) -> Callable[[Tensor, Tensor], Tensor]:
    """The convolution of a node, with its strides and paddings: a function of input and kernel ``[out, in, *size]``."""
    func, node = _CONVOLUTIONS[product.kind], product.node
    rest: tuple[Any, ...] = node.args[3:]
    options = {k: v for k, v in node.kwargs.items() if k not in ("input", "weight", "bias")}
    rank = len(product.shape) - 1  # channels and sizes

    def run(x: Tensor, weight: Tensor) -> Tensor:
        lead = x.shape[: x.ndim - rank]
        flat = x if len(lead) == 1 else x.reshape(math.prod(lead), *x.shape[x.ndim - rank :])
        made = func(flat, weight, None, *rest, **options)
        return made if len(lead) == 1 else made.reshape(*lead, *made.shape[1:])

    return run


__all__ = ["Dense", "Product", "convolution", "linear"]
