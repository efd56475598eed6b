"""Truncated Gaussians: mass, mean and variance on a half-line or an interval, exact far into the tails.

Everything is in standard units and relative to the *reference point*, the place of largest density in
the region (the peak if it is inside, else the nearest edge).  There nothing cancels: the mass is a
number between 0 and 1, the shift of the mean a number of the order of the width.

Beyond an edge ``x >= 0`` deviations from the peak the mean excess ``h(-x) - x`` and the variance
``1 - h (h - x)`` behave as ``1 / x`` and ``1 / x^2``; formed as written they lose ``eps x^2`` and ``eps x^4``.
Times ``x + 4`` and its square they are smooth functions of ``y = (x - 4) / (x + 4)`` in ``[-1, 1)``, so two
polynomials in ``y`` give both to 3e-13 and 7e-12 for every ``x``, with no special function to call.

Source: [DLMF] 7.9 (continued fraction, from which the coefficients were computed with 60 digits by
interpolation at Chebyshev points); the map to ``y`` is that of [Shepherd1981] for ``erfcx``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_CENTRE = 4.0  # of the map of x to y
_SHARE = 0.1  # an interval that loses more than this of its half-line is integrated by nodes
_NODES, _WEIGHTS = (tuple(float(v) for v in vs) for vs in np.polynomial.legendre.leggauss(12))


# Coefficients of (x + 4) times the mean excess, highest power of y first; in float32 the first of
# each pair below is enough.
_EXCESS_SHORT = (
    9.918818910717836e-05,
    -0.0010673999381531653,
    0.00010336109515324439,
    0.006449247173352887,
    -0.0047394846038496625,
    -0.019961140680001745,
    0.03172459888786022,
    0.03346902890039276,
    -0.1382326744654269,
    0.06754659740252388,
    0.401956991478697,
    -1.1822055160956118,
    1.8048571559157687,
)
_EXCESS = (
    2.5296383998636818e-06,
    -2.3573069776693475e-06,
    -2.1318580362984868e-05,
    2.5083059617424563e-05,
    9.305241390941753e-05,
    -0.00014848814465554785,
    -0.00028068873127079464,
    0.0006636347446878749,
    0.0005908224568097855,
    -0.002484768245063866,
    -0.00037238547358641377,
    0.007961077037320493,
    -0.004488806480004959,
    -0.020800390520349953,
    0.03165654909936153,
    0.03370366106093808,
    -0.13822449247251026,
    0.06751792823203089,
    0.40195670381973964,
    -1.1822045015235192,
    1.8048571559157687,
)
# Coefficients of (x + 4)^2 times the variance.
_SPREAD_SHORT = (
    -0.0028440142502966673,
    -0.011822674161055017,
    0.024256096414105897,
    0.057981028815129544,
    -0.11234690956815462,
    -0.1168020812142815,
    0.3672420732250506,
    0.008513004088007745,
    -0.8596435124243256,
    0.823426518953843,
    1.0033163874398245,
    -3.168338523873065,
    2.9870616574350484,
)
_SPREAD = (
    4.209652216230923e-05,
    -8.909174298385771e-05,
    -0.0003094311015786544,
    0.0007962581241528221,
    0.0010566132144572472,
    -0.00379091186772734,
    -0.0018775011265946546,
    0.01314447937062044,
    -0.001013857156300813,
    -0.036860647305028714,
    0.023262411714961757,
    0.08331755565484596,
    -0.11205505106182134,
    -0.1304890045162923,
    0.36719937328218194,
    0.012282247220130837,
    -0.8596408186139844,
    0.8229697050114886,
    1.0033163279620383,
    -3.1683224110242305,
    2.9870616574350484,
)


class Truncated(NamedTuple):
    """A standard Gaussian restricted to a region, relative to its reference point."""

    log_mass: Tensor  # [*batch] of exp((u*^2 - u^2) / 2) / sqrt(2 pi) over the region
    shift: Tensor  # [*batch] mean minus the reference point u*
    variance: Tensor  # [*batch]


def hazard(t: Tensor) -> Tensor:
    """Inverse Mills ratio ``h(t) = phi(t) / Phi(t)`` for any ``t``.

    >>> hazard(torch.tensor([-1e6, 0.0, 50.0], dtype=torch.float64))
    tensor([1.0000e+06, 7.9788e-01, 0.0000e+00], dtype=torch.float64)
    """
    return half_line(t).shift - t.clamp(max=0.0)


def half_line(t: Tensor) -> Truncated:
    """Restrict ``N(t, 1)`` to the positive half-line.

    The reference point is ``max(t, 0)``, so ``log Phi(t) = log_mass - min(t, 0)^2 / 2``.

    Args:
        t: ``[*batch]``, any real number.

    >>> half_line(torch.tensor([-1e8, 0.0, 1e8], dtype=torch.float64)).shift
    tensor([1.0000e-08, 7.9788e-01, 0.0000e+00], dtype=torch.float64)
    """
    inside = (t > 0).to(t.dtype)  # lerp by it: torch.where costs ten times as much
    x = t * (2.0 * inside - 1.0)  # |t|, with a slope at zero
    excess, variance = _beyond(x)
    mills = excess + x  # h(-x), the inverse of Phi(-x) / phi(x)
    density = torch.exp(-0.5 * x * x - HALF_LOG_2PI)
    lost = density / mills  # Phi(-x)
    h = density / (1.0 - lost)
    return Truncated(
        torch.lerp(-mills.log() - HALF_LOG_2PI, torch.log1p(-lost), inside),
        torch.lerp(excess, h, inside),
        torch.lerp(variance, 1.0 - h * (h + x), inside),
    )


def _beyond(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean excess and variance of a standard Gaussian beyond ``x >= 0``."""
    short = x.dtype == torch.float32
    inverse = 1.0 / (x + _CENTRE)
    y = (x - _CENTRE) * inverse
    excess = _polynomial(_EXCESS_SHORT if short else _EXCESS, y) * inverse
    return excess, _polynomial(_SPREAD_SHORT if short else _SPREAD, y) * inverse * inverse


def _polynomial(coefficients: tuple[float, ...], y: Tensor) -> Tensor:
    """Horner's rule, one pass over memory a term."""
    first, *rest = y.new_tensor(coefficients).unbind()
    value = first.expand_as(y)
    for c in rest:
        value = torch.addcmul(c, value, y)
    return value


def interval(low: Tensor, high: Tensor, width: Tensor) -> Truncated:
    """Restrict ``N(0, 1)`` to ``(low, high)``, either of which may be infinite.

    Args:
        low: ``[*batch]``.
        high: ``[*batch]``, above ``low``.
        width: ``[*batch]``, ``high - low`` as exactly as the caller knows it.

    The reference point is 0 clamped to the interval.

    >>> far = torch.tensor([1e6], dtype=torch.float64)
    >>> interval(far, far + 1, torch.ones_like(far)).shift
    tensor([1.0000e-06], dtype=torch.float64)
    """
    flip = low + high < 0
    reach = 13.0 if low.dtype == torch.float32 else 38.0  # no mass of this dtype beyond
    a = torch.where(flip, -high, low).clamp(min=-reach)
    found = _from_near_edge(a, width.clamp(max=100.0))
    return found._replace(shift=torch.where(flip, -found.shift, found.shift))


def standardised(
    low: Tensor, high: Tensor, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Edges and width in units of ``N(mean, scale^2)``; an infinite edge passes no gradient on."""
    at_low, at_high = low.isfinite(), high.isfinite()
    near, far = torch.where(at_low, low, 0.0), torch.where(at_high, high, 0.0)
    return (
        torch.where(at_low, (near - mean) / scale, -math.inf),
        torch.where(at_high, (far - mean) / scale, math.inf),
        torch.where(at_low & at_high, (far - near) / scale, math.inf),
    )


def _from_near_edge(a: Tensor, width: Tensor) -> Truncated:
    """The same on ``(a, a + width)``, whose middle is not negative."""
    b = a + width
    outer, whole = half_line(-b), half_line(-a)
    lost = torch.where(a > 0, width * (a + 0.5 * width), 0.5 * b * b)
    log_share = outer.log_mass - whole.log_mass - lost  # log Phi(-b) / Phi(-a)
    narrow = log_share > math.log(_SHARE)
    wide = _without(whole, outer, a, width, log_share.masked_fill(narrow, -math.inf))
    by_nodes = _by_nodes(torch.where(narrow, a, 0.0), torch.where(narrow, width, 1.0))
    return Truncated(*(torch.where(narrow, n, w) for n, w in zip(by_nodes, wide, strict=True)))


def _without(
    whole: Truncated, outer: Truncated, a: Tensor, width: Tensor, log_share: Tensor
) -> Truncated:
    """Take the half-line beyond the far edge, a small share, out of the half-line."""
    share = log_share.exp()
    gap = outer.shift - whole.shift + torch.where(a > 0, width, a + width)  # of the two means
    moved = share / (1.0 - share) * gap
    variance = (whole.variance - share * outer.variance) / (1.0 - share)
    return Truncated(
        whole.log_mass + torch.log1p(-share),
        whole.shift - moved,
        variance - share * (gap + moved).square(),
    )


def _by_nodes(a: Tensor, width: Tensor) -> Truncated:
    """Gauss-Legendre on an interval over which the density varies little: no cancellation at all."""
    half = 0.5 * width
    base = 0.5 * a.clamp(max=0.0).square()  # the exponent at the reference point
    s0 = s1 = s2 = torch.zeros_like(a)
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        e = half * (1.0 + node)
        mass = weight * torch.exp(-e * (a + 0.5 * e) - base)
        s0, s1, s2 = s0 + mass, s1 + node * mass, s2 + node * node * mass
    mean = s1 / s0
    return Truncated(
        torch.log(half * s0) - HALF_LOG_2PI,
        half * (1.0 + mean) + a.clamp(max=0.0),
        half.square() * (s2 / s0 - mean.square()),
    )
