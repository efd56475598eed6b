"""Orthonormal transforms, written in torch so that they may stand inside a model: cosines, wavelets.

They act on the last axes and are linear; what leads is carried along.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Daubechies' wavelets with two vanishing moments: taps of the low pass; the high pass is its mirror.
_ROOT = math.sqrt(3.0)
_LOW = [(c / (4 * math.sqrt(2.0))) for c in (1 + _ROOT, 3 + _ROOT, 3 - _ROOT, 1 - _ROOT)]
_HIGH = [_LOW[3], -_LOW[2], _LOW[1], -_LOW[0]]


def dct(x: Tensor) -> Tensor:
    """Cosine transform (of type II, orthonormal) along the last axis, by one fast Fourier transform.

    >>> dct(torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64)).round(decimals=12).tolist()
    [2.0, 0.0, 0.0, 0.0]
    """
    n = x.shape[-1]
    order = torch.cat([torch.arange(0, n, 2), torch.arange(1, n, 2).flip(0)])
    return (torch.fft.fft(x[..., order]) * _turns(n, x)).real


def inverse_dct(x: Tensor) -> Tensor:
    """What :func:`dct` undoes.

    >>> y = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    >>> torch.allclose(inverse_dct(dct(y)), y)
    True
    """
    n = x.shape[-1]
    # The transform is Re(D F P), P a permutation: its inverse is its transpose, P' Re(F D).
    place = torch.arange(n)
    back = torch.where(place % 2 == 0, place // 2, n - 1 - place // 2)
    return torch.fft.fft(x * _turns(n, x)).real[..., back]


def wavelets_of_image(image: Tensor, levels: int) -> list[Tensor]:
    """Daubechies' wavelet coefficients of an image whose edges are joined.

    Args:
        image: ``[..., rows, columns]``, both multiples of ``2^levels``.
        levels: number of scales.

    Returns:
        The coarse image, then the details from coarse to fine, ``[..., 3, rows / 2^k, columns / 2^k]``.
    """
    details = []
    for _ in range(levels):
        low, high = _split(image, -1)
        (image, down), (across, both) = _split(low, -2), _split(high, -2)
        details.append(torch.stack([across, down, both], -3))
    return [image, *reversed(details)]


def image_of_wavelets(parts: Sequence[Any]) -> Tensor:
    """What :func:`wavelets_of_image` undoes.

    >>> image = torch.arange(64, dtype=torch.float64).reshape(8, 8)
    >>> torch.allclose(image_of_wavelets(wavelets_of_image(image, levels=2)), image)
    True
    """
    image = parts[0]
    for detail in parts[1:]:
        across, down, both = (detail[..., k, :, :] for k in range(3))
        image = _joined(_joined(image, down, -2), _joined(across, both, -2), -1)
    return image


def _turns(n: int, like: Tensor) -> Tensor:
    """``e^{-i pi k / 2n}`` with the scale that makes the transform orthonormal ``[n]``."""
    angle = -math.pi * torch.arange(n, dtype=like.dtype, device=like.device) / (2 * n)
    size = torch.full_like(angle, math.sqrt(2.0 / n))
    size[0] = math.sqrt(1.0 / n)
    return torch.polar(size, angle)


def _split(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Low and high pass along an axis, every second place."""
    shifted = torch.stack([torch.roll(x, -k, axis) for k in range(4)])
    even = torch.arange(0, x.shape[axis], 2, device=x.device)
    taps = torch.tensor([_LOW, _HIGH], dtype=x.dtype, device=x.device)
    low, high = torch.tensordot(taps, shifted.index_select(axis, even), 1)
    return low, high


def _joined(low: Tensor, high: Tensor, axis: int) -> Tensor:
    """The transpose of :func:`_split`."""
    before, above = torch.roll(low, 1, axis), torch.roll(high, 1, axis)
    pairs = [
        _LOW[k] * low + _LOW[k + 2] * before + _HIGH[k] * high + _HIGH[k + 2] * above
        for k in (0, 1)
    ]
    stacked = torch.stack(pairs, -1)
    if axis == -1:
        return stacked.reshape(*low.shape[:-1], 2 * low.shape[-1])
    turned = stacked.movedim(-1, -2)  # [..., rows, 2, columns]
    return turned.reshape(*low.shape[:-2], 2 * low.shape[-2], low.shape[-1])
