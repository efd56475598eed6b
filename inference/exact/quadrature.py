"""Deterministic integration over one to three real numbers.

The trapezoidal rule on a whole line converges geometrically for smooth integrands that fade at
both ends (Trefethen and Weideman, SIAM Review 56, 2014). The grid stands along the principal axes
of the integrand, at ``centre + factor @ sinh(t)`` with ``t`` equally spaced: dense in the middle,
wide in the tails, so that the exponential tails of a scale on its log axis cost few nodes. The
range of ``t`` grows until the integrand is negligible on every face. Every second node makes a
rule of half the resolution, every fourth one of a quarter: their differences tell the error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.errors import NumericalError

LogDensity = Callable[[Tensor], Tensor]  # [n, d] -> [n], nats

# By number of axes: nodes an axis of the first grid, of the final one, and the depth at which it
# ends (nats).
_COARSE = (0, 61, 21, 13)
_FINE = (0, 801, 81, 37)
_DEPTH = (0.0, 42.0, 34.0, 28.0)
_MOST_NODES = 300_000
_WIDEST = 30.0  # of t; sinh(30) is 5e12 standard deviations
_GRANULE = 0.75


class Frame(NamedTuple):
    """A grid: ``u = centre + factor @ sinh(t)`` for ``t`` between ``low`` and ``high``."""

    centre: Tensor  # [d]
    factor: Tensor  # [d, d]
    low: Tensor  # [d]
    high: Tensor  # [d]


class Moments(NamedTuple):
    """Of weighted nodes."""

    log_total: Tensor  # []
    mean: Tensor  # [d]
    covariance: Tensor  # [d, d]


class Grid(NamedTuple):
    """Nodes with the logarithms of weight and of density, and an estimate of the error."""

    point: Tensor  # [n, d]
    log_weight: Tensor  # [n], nats; of the rule alone
    log_density: Tensor  # [n], nats
    error: float  # of log evidence (nats), means and spreads (in standard deviations), the largest


def integrate(log_density: LogDensity, start: Tensor, tol: float) -> Grid:
    """Place a grid over a density on ``R^d`` and refine it until its error is small.

    Args:
        log_density: of a batch of points; -inf is allowed.
        start: ``[d]``, tells dtype and device; the search begins around it.
        tol: error of log evidence (nats) and moments (standard deviations) at which refinement
            stops.

    Raises:
        NumericalError: the density has no finite top, or does not fade.

    >>> origin = torch.zeros(2, dtype=torch.float64)
    >>> grid = integrate(lambda u: -0.5 * u.square().sum(-1), origin, 1e-6)
    >>> total = (grid.log_weight + grid.log_density).logsumexp(0)
    >>> round(float(total), 6), round(math.log(2 * math.pi), 6)
    (1.837877, 1.837877)
    """
    d = len(start)
    top, best = _find_top(log_density, start)
    frame = _first_frame(log_density, top, best)
    for _ in range(2):
        frame = _bounded(log_density, frame, best, _COARSE[d])
        nodes, rule = _nodes(frame, _COARSE[d])
        density = log_density(nodes)
        best = max(best, float(density.max()))
        frame = _turned(frame, nodes, rule + density)
    frame = _bounded(log_density, frame, best, _COARSE[d])
    count = _FINE[d]
    while True:
        nodes, rule = _nodes(frame, count)
        density = log_density(nodes)
        error = _error(nodes, rule + density, count, d)
        if error <= tol or (2 * count - 1) ** d > _MOST_NODES:
            return Grid(nodes, rule, density, error)
        count = 2 * count - 1


def _error(nodes: Tensor, log: Tensor, count: int, d: int) -> float:
    """Error of the rule from those of every second and every fourth node.

    Of a geometric rate the next difference is at most ``fine * fine / coarse``; of an algebraic
    one it is just that.
    """
    index = torch.arange(count**d, device=nodes.device).reshape((count,) * d)
    rules = [
        _moments(nodes[i], log[i] + k * d * math.log(2))
        for k in range(3)
        for i in [index[(slice(None, None, 2**k),) * d].flatten()]
    ]
    fine, coarse = _difference(rules[0], rules[1]), _difference(rules[1], rules[2])
    return fine * min(1.0, fine / coarse) if coarse > 0 else fine


def _difference(a: Moments, b: Moments) -> float:
    """The largest of the changes of log total (nats), means (sd) and spreads (share)."""
    sd = a.covariance.diagonal().sqrt()
    parts = (
        (a.log_total - b.log_total).abs(),
        ((a.mean - b.mean) / sd).abs().max(),
        (b.covariance.diagonal().sqrt() / sd - 1).abs().max(),
    )
    return max(float(p) for p in parts)


def _moments(nodes: Tensor, log: Tensor) -> Moments:
    """Log total, mean ``[d]`` and covariance ``[d, d]`` of weighted nodes."""
    weight = log.softmax(0)
    mean = weight @ nodes
    away = nodes - mean
    return Moments(log.logsumexp(0), mean, away.mT @ (weight.unsqueeze(-1) * away))


def _nodes(frame: Frame, count: int) -> tuple[Tensor, Tensor]:
    """Nodes ``[count^d, d]`` and log-weights of the trapezoidal rule in ``t``."""
    share = torch.linspace(0, 1, count, dtype=frame.low.dtype, device=frame.low.device)
    axes = [low + share * (high - low) for low, high in zip(frame.low, frame.high, strict=True)]
    t = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    widths = ((frame.high - frame.low) / (count - 1)).log().sum() + torch.linalg.slogdet(
        frame.factor
    )[1]
    log_cosh = t.abs() + torch.log1p((-2 * t.abs()).exp()) - math.log(2)
    return frame.centre + t.sinh() @ frame.factor.mT, widths + log_cosh.sum(-1)


def nodes_of(origin: Tensor, count: int) -> Tensor:
    """A first look around the origin: ``count`` points an axis, ``[count^d, d]``."""
    unit = torch.eye(len(origin), dtype=origin.dtype, device=origin.device)
    reach = origin.new_full((len(origin),), 2.1)
    return _nodes(Frame(origin, unit, -reach, reach), count)[0]


def expected_nodes(dims: int) -> int:
    """Evaluations of the density that an integral over so many numbers takes, about."""
    return _FINE[dims] ** dims + 12 * _COARSE[dims] ** dims if dims else 1


def _find_top(log_density: LogDensity, start: Tensor) -> tuple[Tensor, float]:
    """A local maximum: the best point of a wide grid, then steps that halve when none leads up."""
    d = len(start)
    reach, count = (math.asinh(1e6), 241) if d == 1 else (math.asinh(1e3), {2: 33, 3: 15}[d])
    unit = torch.eye(d, dtype=start.dtype, device=start.device)
    wide = Frame(start, unit, start.new_full((d,), -reach), start.new_full((d,), reach))
    candidates = _nodes(wide, count)[0]
    values = log_density(candidates)
    if not bool((values > -torch.inf).any()):
        raise NumericalError(
            "the density is zero or undefined wherever it was looked at. Check the data against "
            "the supports of the laws, "
            "and that flat priors leave a proper posterior."
        )
    here, best = candidates[values.argmax()], float(values.max())
    stencil = start.new_tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=d)))
    step = 0.2 * (1 + here.abs())
    for _ in range(400):
        points = here + step * stencil
        values = log_density(points)
        found = float(values.max())
        if found > best:
            here, best = points[values.argmax()], found
            step = step * 1.3
        else:
            step = step / 2
        if bool((step < 1e-5 * (1e-3 + here.abs().clamp(max=1.0))).all()):
            break
    return here, best


def _first_frame(log_density: LogDensity, top: Tensor, best: float) -> Frame:
    """Axis by axis, how far the density takes to fall by half a nat: one sigma of a Gaussian."""
    d = len(top)
    distances = torch.logspace(-7, 6, 131, dtype=top.dtype, device=top.device)
    widths = []
    for axis in range(d):
        both = []
        for sign in (-1.0, 1.0):
            points = top.repeat(len(distances), 1)
            points[:, axis] += sign * distances
            fallen = log_density(points) < best - 0.5
            both.append(
                float(distances[int(fallen.to(torch.int8).argmax())])
                if bool(fallen.any())
                else math.inf
            )
        width = min(both)
        if not math.isfinite(width):
            raise NumericalError(
                "the posterior does not fade in either direction of a latent: it is improper. "
                "Give the latent a proper prior."
            )
        widths.append(width)
    return Frame(
        top, torch.diag(top.new_tensor(widths)), top.new_full((d,), -2.5), top.new_full((d,), 2.5)
    )


def _turned(frame: Frame, nodes: Tensor, log: Tensor) -> Frame:
    """The frame along the principal axes of what the grid has found."""
    _, mean, covariance = _moments(nodes, log)
    values, vectors = torch.linalg.eigh(covariance)
    floor = values.max() * 1e-12
    if not bool(values.isfinite().all()) or not bool(values.max() > 0):
        return frame
    factor = vectors * values.clamp(min=float(floor)).sqrt()
    d = len(mean)
    return Frame(mean, factor, mean.new_full((d,), -2.5), mean.new_full((d,), 2.5))


def _bounded(log_density: LogDensity, frame: Frame, best: float, count: int) -> Frame:
    """Move each face out until the density on it is negligible, and in while a whole margin is."""
    d = len(frame.centre)
    low, high = frame.low.clone(), frame.high.clone()
    for _ in range(80):
        nodes, rule = _nodes(frame._replace(low=low, high=high), count)
        # The rule's weight counts: a slowly falling tail under a widening grid has mass.
        spacing = ((high - low) / (count - 1)).log().sum() + torch.linalg.slogdet(frame.factor)[1]
        grid = (log_density(nodes) + (rule - spacing)).reshape((count,) * d)
        least = max(best, float(grid.max())) - _DEPTH[d]
        moved = False
        for axis in range(d):
            profile = grid.movedim(axis, 0).reshape(count, -1).amax(1)
            for side, edge in ((-1, low), (1, high)):
                face = profile[0 if side < 0 else -1]
                if face > least:
                    edge[axis] += side * _GRANULE
                    moved = True
        if bool((torch.maximum(-low, high) > _WIDEST).any()):
            raise NumericalError(
                "the posterior does not fade far out: it is improper, or its tails are too heavy "
                "to integrate. "
                "Give the latents proper priors."
            )
        if not moved:
            return _trimmed(frame._replace(low=low, high=high), grid, least)
    return frame._replace(low=low, high=high)


def _trimmed(frame: Frame, grid: Tensor, least: float) -> Frame:
    """Cut margins in which nothing counts, one node left over on each side."""
    count, d = grid.shape[0], grid.ndim
    low, high = frame.low.clone(), frame.high.clone()
    for axis in range(d):
        inside = torch.nonzero(grid.movedim(axis, 0).reshape(count, -1).amax(1) > least).flatten()
        if len(inside):
            step = (frame.high[axis] - frame.low[axis]) / (count - 1)
            first, last = max(int(inside[0]) - 1, 0), min(int(inside[-1]) + 1, count - 1)
            low[axis], high[axis] = frame.low[axis] + first * step, frame.low[axis] + last * step
    return frame._replace(low=low, high=high)
