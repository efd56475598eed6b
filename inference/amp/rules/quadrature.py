"""One rule for any univariate log-density: nodes that find where the mass is, by themselves.

The search samples the tilted density on a coarse grid of many scales, closes in on its top, then
moves three times to a new grid whose cells hold equal shares of a blend of the density and of its
sixteenth root (so that narrow peaks and long tails both get cells).  Kinks, several modes, edges of the
support and any ratio of widths need no care from the author of the density.  The last grid carries four
Gauss-Legendre nodes a cell.

The nodes are constants to autograd: ``log_z`` differentiates through the density at the nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ppl.inference.amp.rules.record import Moments, Rule, bounded

LogDensity = Callable[[Tensor], Tensor]  # [K, *batch] -> [K, *batch]
_CELLS = 64
_ROUNDS = 3
_PEAKS = 3  # local maxima that are followed to their tops
_TEMPER = 1 / 16  # exponent of the flat half of the blend: cells out to where nothing is left
_FLOOR = -1e30  # stands for log 0 where a difference is formed
_GAUSS = tuple(zip(*(v.tolist() for v in np.polynomial.legendre.leggauss(4)), strict=True))


@dataclass(frozen=True)
class Quadrature(Rule):
    """A prior or a channel given by a log-density of one unknown, elementwise.

    >>> rule = Quadrature(lambda x: -x.abs() - math.log(2.0))
    >>> rule.moments(torch.tensor([1.0]).double(), torch.tensor(1.0).double()).mean
    tensor([0.5032], dtype=torch.float64)
    """

    density: LogDensity  # must accept a new leading axis: [K, *batch]
    low: float | Tensor = -math.inf  # edges of the support
    high: float | Tensor = math.inf
    centre: float | Tensor = 0.0  # about where the density itself has its mass, and how wide: read
    width: float | Tensor = 1.0  # only where the pseudo-observation is much wider or far away

    def moments(self, r: Tensor, vr: Tensor) -> Moments:
        vr = bounded(vr)
        return integral(self.log_prob, r, vr, self.centre, self.width, self.low, self.high)

    def mode(self, r: Tensor, vr: Tensor) -> Moments:
        vr = bounded(vr)
        return maximum(self.log_prob, r, vr, self.centre, self.width, self.low, self.high)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.density(x)


def integral(
    density: LogDensity,
    r: Tensor,
    vr: Tensor,
    centre: float | Tensor,
    width: float | Tensor,
    low: float | Tensor = -math.inf,
    high: float | Tensor = math.inf,
) -> Moments:
    """Moments of ``density(x) N(x; r, vr)`` ``[*batch]``; see the module."""
    r, vr = torch.broadcast_tensors(r, vr)
    edges = _edges(density, r, vr, centre, width, low, high)
    half = 0.5 * edges.diff(dim=0)
    middle = edges[:-1] + half
    nodes = torch.cat([middle + half * at for at, _ in _GAUSS])
    masses = torch.cat([half * weight for _, weight in _GAUSS])
    logs = _tilted(density, nodes, r, vr) + masses.log()
    top = logs.detach().amax(0)
    shares = torch.exp(logs - top)
    total = shares.sum(0)
    mean = (shares * nodes).sum(0) / total
    variance = (shares * (nodes - mean).square()).sum(0) / total
    log_z = top + total.log() - 0.5 * (2.0 * math.pi * vr).log()
    return Moments(mean, variance, log_z)


def maximum(
    density: LogDensity,
    r: Tensor,
    vr: Tensor,
    centre: float | Tensor,
    width: float | Tensor,
    low: float | Tensor = -math.inf,
    high: float | Tensor = math.inf,
) -> Moments:
    """Place and value of the largest ``density(x) N(x; r, vr)``: grids that close in, then Newton.

    ``variance`` is ``1 / (1 / vr - d^2 density)`` there, which is ``vr`` times the slope of the place.
    """
    r, vr = torch.broadcast_tensors(r, vr)
    edges = _edges(density, r, vr, centre, width, low, high)
    with torch.no_grad():
        left, right = _enclosed(density, edges, r, vr, 12)
        tops = _tilted(density, 0.5 * (left + right), r, vr)
        best = tops.argmax(0, keepdim=True)
        left, right = left.gather(0, best)[0], right.gather(0, best)[0]
    place = _polished(density, 0.5 * (left + right), r, vr).clamp(left, right)
    slope, curvature = _derivatives(density, place)
    value = _tilted(density, place.unsqueeze(0), r, vr)[0] - 0.5 * (2.0 * math.pi * vr).log()
    # At an edge or a kink the two slopes do not cancel, and the place does not move with r.
    held = ((slope - (place - r) / vr) * vr.sqrt()).abs() > 1e-3
    moved = 1.0 / (1.0 - vr * curvature).clamp(min=torch.finfo(r.dtype).eps)
    return Moments(place, torch.where(held, 0.0, vr * moved), value)


def _polished(density: LogDensity, place: Tensor, r: Tensor, vr: Tensor) -> Tensor:
    """Two Newton steps, each kept only where the objective is concave."""
    for _ in range(2):
        slope, curvature = _derivatives(density, place)
        bend = curvature - 1.0 / vr
        step = (slope - (place - r) / vr) / bend
        place = torch.where((bend < 0) & step.isfinite(), place - step, place)
    return place


def _derivatives(density: LogDensity, x: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of an elementwise function."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(density(x).sum(), x, create_graph=True)
        if not slope.requires_grad:  # a linear density
            return slope.detach(), torch.zeros_like(x)
        (curvature,) = torch.autograd.grad(slope.sum(), x, allow_unused=True)
    zero = torch.zeros_like(slope)
    return slope.detach(), zero if curvature is None else curvature


def _tilted(density: LogDensity, x: Tensor, r: Tensor, vr: Tensor) -> Tensor:
    """Log-density plus the exponent of the Gaussian, ``[K, *batch]``; impossible places get a floor."""
    value = density(x)
    value = torch.where(value > _FLOOR, value, _FLOOR)
    return value - 0.5 * (x - r).square() / vr


def _edges(
    density: LogDensity,
    r: Tensor,
    vr: Tensor,
    centre: float | Tensor,
    width: float | Tensor,
    low: float | Tensor,
    high: float | Tensor,
) -> Tensor:
    """Edges ``[69, *batch]`` of cells that follow the tilted density."""
    with torch.no_grad():
        low, high, centre, width = (
            torch.as_tensor(v, dtype=r.dtype, device=r.device) for v in (low, high, centre, width)
        )
        unit = torch.minimum(width, vr.sqrt())
        x = _even(r, vr, 37)
        for anchor in (centre, low, high):
            if bool(anchor.isfinite().all()):
                x = torch.cat([x, _around(anchor, unit, r, -5, 11)])
        x = x.clamp(low, high).sort(dim=0).values
        left, right = _enclosed(density, x, r, vr, 8)
        x = torch.cat([x, *(_around(at, unit, r, -3, 2) for at in 0.5 * (left + right))])
        x = x.clamp(low, high).sort(dim=0).values
        for _ in range(_ROUNDS):
            x = _regridded(x, _lent(_tilted(density, x, r, vr)))
        kinks = torch.cat([centre.expand_as(r).unsqueeze(0), 0.5 * (left + right)])
        return torch.cat([x, kinks.clamp(x[0], x[-1])]).sort(dim=0).values


def _even(r: Tensor, vr: Tensor, count: int) -> Tensor:
    """Even places ``[count, *batch]`` within 9 deviations of ``r``."""
    at = torch.linspace(-9.0, 9.0, count, dtype=r.dtype, device=r.device)
    return r + vr.sqrt() * at.reshape(-1, *(1,) * r.ndim)


def _around(anchor: Tensor, unit: Tensor, r: Tensor, least: int, most: int) -> Tensor:
    """Places at all distances from an anchor, ``unit`` times powers of 8 from least to most."""
    away = 8.0 ** torch.arange(least, most + 1, dtype=r.dtype, device=r.device)
    away = torch.cat([-away.flip(0), away.new_zeros(1), away]).reshape(-1, *(1,) * r.ndim)
    return (anchor + unit * away).expand(-1, *r.shape)


def _enclosed(
    density: LogDensity, x: Tensor, r: Tensor, vr: Tensor, rounds: int
) -> tuple[Tensor, Tensor]:
    """Close in on the three best local maxima seen on sorted places ``x``; both ends, ``[3, *batch]``."""
    value = _tilted(density, x, r, vr)
    edge = torch.full_like(value[:1], 2 * _FLOOR)
    local = (value >= torch.cat([edge, value[:-1]])) & (value >= torch.cat([value[1:], edge]))
    best = torch.where(local, value, 4 * _FLOOR).topk(_PEAKS, dim=0).indices
    left = x.gather(0, (best - 1).clamp(min=0))
    right = x.gather(0, (best + 1).clamp(max=x.shape[0] - 1))
    steps = torch.linspace(0.0, 1.0, 9, dtype=r.dtype, device=r.device)
    steps = steps.reshape(-1, *(1,) * left.ndim)
    for _ in range(rounds):
        places = left + (right - left) * steps  # [9, 3, *batch]
        value = _tilted(density, places.flatten(0, 1), r, vr).reshape(places.shape)
        best = value.argmax(0, keepdim=True)
        left = places.gather(0, (best - 1).clamp(min=0))[0]
        right = places.gather(0, (best + 1).clamp(max=8))[0]
    return left, right


def _lent(value: Tensor) -> Tensor:
    """Give an impossible place, such as an edge with density 0, a value two nats below its better neighbour."""
    low = torch.full_like(value[:1], 2 * _FLOOR)
    near = torch.maximum(torch.cat([low, value[:-1]]), torch.cat([value[1:], low])) - 2.0
    return torch.where(value <= 0.5 * _FLOOR, torch.maximum(value, near), value)


def _regridded(x: Tensor, value: Tensor) -> Tensor:
    """New edges with equal shares of half the density and half its tempered form."""
    x, value = _trimmed(x, value)
    cells, rise = x.diff(dim=0), _TEMPER * value.diff(dim=0)
    share = 0.5 * (_masses(cells, value) + _masses(cells, _TEMPER * value))
    ends = share.cumsum(0)
    starts = ends - share
    level = torch.linspace(0.0, 1.0, _CELLS + 1, dtype=x.dtype, device=x.device)
    level = (level * (1.0 - 1e-6)).expand(*x.shape[1:], -1).contiguous()
    cell = torch.searchsorted(starts.movedim(0, -1).contiguous(), level, right=True) - 1
    cell = cell.clamp(min=0).movedim(-1, 0)
    inside = (level.movedim(-1, 0) - starts.gather(0, cell)) / share.gather(0, cell)
    at = _quantile(inside.clamp(0.0, 1.0), rise.gather(0, cell))
    new = x.gather(0, cell) + cells.gather(0, cell) * at
    new[-1] = x[-1]
    return new


def _trimmed(x: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Move edges outside all that matters (40 nats below the top) to the first such edge."""
    matters = value > value.amax(0) - 40.0
    first = torch.where(matters, x, math.inf).amin(0)
    last = torch.where(matters, x, -math.inf).amax(0)
    left = torch.where(x < first, x, -math.inf).amax(0)
    right = torch.where(x > last, x, math.inf).amin(0)
    left, right = torch.maximum(left, x[0]), torch.minimum(right, x[-1])
    outside = (x < left) | (x > right)
    return x.clamp(left, right), torch.where(outside, value.amax(0) - 40.0, value)


def _masses(cells: Tensor, value: Tensor) -> Tensor:
    """Share of each cell, of ``exp(value)`` interpolated in the logarithm, and smoothed."""
    high = torch.maximum(value[1:], value[:-1])
    drop = value.diff(dim=0).abs().clamp(min=1e-6)
    mass = torch.exp(high - high.amax(0)) * cells * (-torch.expm1(-drop) / drop)
    mass = mass / mass.amax(0)
    near = torch.zeros_like(mass)  # a peak inside a cell shows at its neighbours too
    near[1:] += mass[:-1]
    near[:-1] += mass[1:]
    mass = torch.where(cells > 0, mass + 0.05 * near + 1e-3, 0.0)
    return mass / mass.sum(0)


def _quantile(u: Tensor, rise: Tensor) -> Tensor:
    """Inverse cdf at ``u`` of a density ``exp(rise t)`` on the unit interval."""
    slope = -rise.abs().clamp(min=1e-6)
    mirrored = torch.where(rise > 0, 1.0 - u, u)
    at = torch.log1p(mirrored * torch.expm1(slope)) / slope
    at = at.nan_to_num(posinf=1.0).clamp(0.0, 1.0)
    return torch.where(rise > 0, 1.0 - at, at)
