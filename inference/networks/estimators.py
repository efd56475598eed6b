"""How a layer with Gaussian weights is evaluated: a draw of its outputs, of signs for every example, or of its weights.

All work on the stored values of an array, dense or not: means and variances are vectors ``[k]``, and a
:class:`Product` multiplies by them. Every estimator has the mean and, of each single output, the variance of a weight
draw; they differ in how the outputs of different examples, units and places go together.

Sources: local reparameterisation, [Kingma2015a]; Flipout, [Wen2018].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ppl.inference.networks.products import Product

_LEAST = 1e-10  # variance of an output below which the slope of the square root is cut


class Bias(NamedTuple):
    """Of a layer, drawn with its product: shape ``[out, 1, ...]``, to be added to the result."""

    mean: Tensor
    spread: Tensor  # variance, for ``local``; noise, for ``flipout``


class Signs(NamedTuple):
    """Random signs of one array for every example; the same for all of its uses in a step."""

    out: Tensor  # [*batch, out]
    into: Tensor  # [*batch, in]


def local(
    product: Product,
    mean: Tensor,
    variance: Tensor,
    x: Tensor,
    generator: Generator,
    bias: Bias | None = None,
) -> Tensor:
    """A draw of the outputs: ``m + sqrt(v) eps`` with ``m`` and ``v`` of every output by itself.

    Outputs that no random weight reaches have ``v = 0`` and are exactly deterministic. In a convolution the noise is drawn
    for every place by itself, which leaves out how a shared kernel ties places together.

    Args:
        product: by the array.
        mean: of the weights ``[k]``.
        variance: of the weights ``[k]``.
        x: activations.
        generator: of the noise.
        bias: with variances as ``spread``.

    >>> from torch.nn.functional import linear
    >>> both = lambda w, x: linear(x, w.view(1, 2))
    >>> local(both, torch.tensor([1.0, 2.0]), torch.zeros(2), torch.ones(3, 2), Generator()).tolist()
    [[3.0], [3.0], [3.0]]
    """
    m, v = product(mean, x), product(variance, x.square())
    if bias is not None:
        m, v = m + bias.mean, v + bias.spread
    noise = torch.randn(v.shape, generator=generator, dtype=v.dtype, device=v.device)
    noise = noise.mul_(v.detach() > 0)
    return torch.addcmul(m, v.clamp(min=_LEAST).sqrt(), noise)


def flipout(
    product: Product,
    mean: Tensor,
    noise: Tensor,
    x: Tensor,
    signs: Signs,
    channel: int = -1,
    bias: Bias | None = None,
) -> Tensor:
    """One weight draw for the batch, with signs of its own for every example.

    Args:
        product: by the array.
        mean: of the weights ``[k]``.
        noise: the draw minus the mean ``[k]``.
        x: activations.
        signs: of the array's outputs and inputs.
        channel: place of inputs and outputs in an element, from the end.
        bias: with noise as ``spread``.
    """
    into = beside(signs.into, x.ndim - signs.into.ndim, channel)
    m, d = product(mean, x), product(noise, into * x)
    if bias is not None:
        m, d = m + bias.mean, d + bias.spread
    return torch.addcmul(m, beside(signs.out, m.ndim - signs.out.ndim, channel), d)


def draw_signs(
    lead: tuple[int, ...], out: int, into: int, like: Tensor, generator: Generator
) -> Signs:
    """Signs ``[*lead, out]`` and ``[*lead, into]`` in the dtype of ``like``."""
    return Signs(_signs((*lead, out), like, generator), _signs((*lead, into), like, generator))


def beside(units: Tensor, axes: int, channel: int) -> Tensor:
    """``[..., units]`` with ``axes`` more axes of size one, so that the units stand at ``channel`` from the end.

    >>> beside(torch.ones(5, 3), 2, -3).shape
    torch.Size([5, 3, 1, 1])
    """
    after = -1 - channel
    shape = (*units.shape[:-1], *(1,) * (axes - after), units.shape[-1], *(1,) * after)
    return units.reshape(shape)


def _signs(shape: tuple[int, ...], like: Tensor, generator: Generator) -> Tensor:
    bits = torch.randint(0, 2, shape, generator=generator, device=like.device, dtype=torch.int8)
    return bits.to(like.dtype).mul_(2.0).sub_(1.0)


__all__ = ["Bias", "Signs", "beside", "draw_signs", "flipout", "local"]
