"""Moments of ``sigmoid(z) N(z; p, vp)``: two quadratures that cover every variance to about 1e-5.

Narrow beliefs (``vp <= 3``): Gauss-Hermite nodes about the mode of the tilted density.

Wide beliefs: the logistic function is a step plus a remainder that decays as ``exp(-|z|)``,
``sigmoid(z) = 1[z > 0] - sign(z) sigmoid(-|z|)``.  The step is a truncated Gaussian; the remainder meets
a Gaussian that is smooth on its scale, so a Gauss rule for the weight ``sigmoid(-u)`` on ``u > 0`` needs few
nodes.  ``e^z sigmoid(-z) = sigmoid(z)`` moves any ``p < -vp / 2`` to ``-(p + vp)``, so the nodes never
see a steeper tilt than ``e^(u / 2)``.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from ppl.inference.amp.rules.record import Moments
from ppl.inference.amp.rules.truncation import HALF_LOG_2PI, half_line

_WIDE = 3.0  # belief variance from which the second quadrature is the better one
_HERMITE = tuple(
    (math.sqrt(2.0) * float(x), math.log(float(w) / math.sqrt(math.pi)) + float(x) ** 2)
    for x, w in zip(*np.polynomial.hermite.hermgauss(15), strict=True)
)
# Gauss rule of 12 nodes for the weight sigmoid(-u) on u > 0, by the Stieltjes recurrence.
_STEP = (
    (0.1270262753424002, 0.15200002388304407),
    (0.6584865938216722, 0.250181748752624),
    (1.587198672413708, 0.19078296569126843),
    (2.9133113862997, 0.0790617378709971),
    (4.6729785726052295, 0.018441570837096827),
    (6.913204428829728, 0.002481017134374078),
    (9.687349591107623, 0.00019011950172694806),
    (13.07071383562854, 7.839117874309127e-06),
    (17.180694236416084, 1.5650810647620645e-07),
    (22.214383110377106, 1.2599576907916723e-09),
    (28.550866394950603, 2.8748246835962725e-12),
    (37.16171182861082, 7.653508235767678e-16),
)


def sigmoid_moments(p: Tensor, vp: Tensor) -> Moments:
    """Moments of ``sigmoid(z) N(z; p, vp)`` ``[*batch]``.

    >>> p, vp = torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 1e8]).double()
    >>> sigmoid_moments(p, vp).mean
    tensor([4.1324e-01, 7.9788e+03], dtype=torch.float64)
    """
    wide = vp > _WIDE
    # CHOICE: a look at the data, because either form costs more than everything else.
    if not bool(wide.any()):
        return _about_mode(p, vp)
    if bool(wide.all()):
        return _step_and_rest(p, vp)
    narrow = _about_mode(p, torch.where(wide, 1.0, vp))
    broad = _step_and_rest(p, torch.where(wide, vp, _WIDE))
    return Moments(*(torch.where(wide, b, a) for a, b in zip(narrow, broad, strict=True)))


def _about_mode(p: Tensor, vp: Tensor) -> Moments:
    """Gauss-Hermite about the mode for ``sigmoid(z) N(z; p, vp)``."""
    # In terms of gap = z - p, which keeps its digits where p is huge and vp tiny.
    with torch.no_grad():
        gap = vp * torch.sigmoid(-(p + 0.5 * vp))
        for _ in range(3):
            s = torch.sigmoid(-(p + gap))
            gap = gap - (gap - vp * s) / (1.0 + vp * s * (1.0 - s))
        s = torch.sigmoid(-(p + gap))
        scale = torch.sqrt(vp / (1.0 + vp * s * (1.0 - s)))
    z, slope, half = p + gap, gap / vp, 0.5 / vp
    at_mode = softplus(-z)
    s0 = s1 = s2 = torch.zeros_like(z)
    for node, log_weight in _HERMITE:
        step = scale * node
        mass = torch.exp(log_weight + at_mode - softplus(-z - step) - step * (slope + half * step))
        s0, s1, s2 = s0 + mass, s1 + node * mass, s2 + node * node * mass
    mean = s1 / s0
    log_z = s0.log() + (scale * vp.rsqrt()).log() - at_mode - 0.5 * gap * slope
    moved = p + (gap + scale * mean)
    return Moments(moved, scale.square() * (s2 / s0 - mean.square()), log_z)


def _step_and_rest(p: Tensor, vp: Tensor) -> Moments:
    """The same for wide beliefs: half a Gaussian, and nodes of negative weight around zero."""
    mirrored = p < -0.5 * vp
    q, scale = torch.where(mirrored, -(p + vp), p), vp.sqrt()
    t, slope = q / scale, q / vp
    cut = half_line(t)
    # All masses relative to the largest value of the Gaussian on z > 0.
    whole, mean = cut.log_mass.exp(), q.clamp(min=0.0) + scale * cut.shift
    log_height = -HALF_LOG_2PI - scale.log() - 0.5 * t.clamp(min=0.0).square()
    s0, s1 = whole, whole * mean
    s2 = whole * (vp * cut.variance + mean.square())
    for node, weight in _STEP:
        base = log_height - 0.5 * node * node / vp
        right, left = (
            weight * torch.exp(base + slope * node),
            weight * torch.exp(base - slope * node),
        )
        s0, s1 = s0 + (left - right), s1 - node * (left + right)
        s2 = s2 + node * node * (left - right)
    middle = s1 / s0
    variance = s2 / s0 - middle.square()
    # Far inside z > 0 the second moment would cancel, and the remainder has no weight there.
    variance = torch.where(t > 9.0, vp * cut.variance, variance)
    log_z = s0.log() - 0.5 * t.clamp(max=0.0).square()
    shift = torch.where(mirrored, p + 0.5 * vp, 0.0)
    return Moments(torch.where(mirrored, -middle, middle), variance, log_z + shift)
