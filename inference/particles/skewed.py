"""Joint Gaussians with skewed marginals: the sinh-arcsinh map of every coordinate, matched to three moments.

``x = mean + sd (v - E v) / sd(v)`` with ``v = sinh(asinh(g) + e) = g cosh e + r sinh e`` and ``r = sqrt(1 + g^2)``
([Jones2009] without their tail parameter), where ``g`` is Gaussian with unit variances and the correlations of ``x``. Mean and
variances of ``x`` are those of the state exactly, correlations nearly; ``e`` follows from the third moment. Scales of which the
data say little are skewed, and a symmetric proposal of many of them leaves few effective particles.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.inference.numerics.linalg import safe_cholesky
from ppl.inference.particles import moments
from ppl.inference.particles.blocks import Block
from ppl.inference.particles.parents import Others
from ppl.inference.particles.proposals import (
    Joint,
    Particles,
    Proposal,
    draw_noise,
    log_standard,
    to_values,
)
from ppl.streams import Streams

# Of r = sqrt(1 + g^2) for a standard Gaussian g, by quadrature: E r, E g^2 (r - E r), E (r - E r)^3.
_MEAN, _MIXED, _THIRD = 1.35453080648132, 0.564890847245658, 0.117228454691956
_MOST = 0.9  # largest skewness
_RATE = 0.1  # share of an iteration's third moments in their average
_STEPS = 50  # of bisection


class _Map(NamedTuple):
    """The standardised map of every coordinate."""

    shift: Tensor  # e
    mean: Tensor  # of v
    sd: Tensor


def draw(
    others: Others, block: Block, state: Proposal, k: int, streams: Streams, tails: float
) -> Particles:
    """Draw ``k`` particles for every element."""
    joint, skew = state.joint, state.skew
    assert joint is not None and skew is not None
    sd = joint.sd
    chol = safe_cholesky(joint.cov / (sd.unsqueeze(-1) * sd.unsqueeze(-2)))
    noise = draw_noise((*sd.shape[:-1], k, sd.shape[-1]), sd, streams.of(block.axis), math.inf)
    base = noise @ chol.mT
    at = _Map(*(t.unsqueeze(-2) for t in _map(skew)))
    root = (1 + base.square()).sqrt()
    free = (base * at.shift.cosh() + root * at.shift.sinh() - at.mean) / at.sd
    stretch = (at.shift.cosh() + base / root * at.shift.sinh()) / at.sd * sd.unsqueeze(-2)
    free = joint.mean.unsqueeze(-2) + sd.unsqueeze(-2) * free
    values, log_jacobian = to_values(block, free)
    log_det = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
    log_q = log_standard(noise.square().sum(-1), noise.shape[-1], math.inf) - log_det
    return Particles(values, log_q - stretch.log().sum(-1) - log_jacobian, free)


def update(
    others: Others,
    block: Block,
    state: Proposal,
    marginals: dict[str, Tensor],
    joint: dict[tuple[str, str], Tensor],
    step: float,
) -> Proposal:
    """Average three moments of the weighted particles into the proposal."""
    particles, weights = others.drawn[block.axis], marginals[block.axis]
    old, skew = state.joint, state.skew
    assert old is not None and skew is not None and particles.free is not None
    made = moments.update(block, state, particles, weights, step, False, True)
    usable = weights.isfinite().all(-1)
    safe = torch.where(usable.unsqueeze(-1), weights, 1.0 / weights.shape[-1])
    new = moments.joint_moments(old, particles.free, safe)
    apart = (particles.free - new.mean.unsqueeze(-2)) / new.sd.unsqueeze(-2)
    third = (safe.unsqueeze(-1) * apart**3).sum(-2).clamp(-_MOST, _MOST)
    good = usable & third.isfinite().all(-1)
    moved = torch.lerp(skew, third, min(step, _RATE))
    return made._replace(skew=torch.where(good.unsqueeze(-1), moved, skew))


def start(joint: Joint) -> Proposal:
    """Without skewness."""
    return Proposal(joint, {}, None, torch.zeros_like(joint.mean))


def _map(skew: Tensor) -> _Map:
    """The map whose result has this skewness, by bisection."""
    low, high = torch.full_like(skew, -8.0), torch.full_like(skew, 8.0)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        below = _skewness(middle) < skew
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    shift = torch.where(skew == 0, 0.0, (low + high) / 2)
    return _Map(shift, _MEAN * shift.sinh(), _variance(shift).sqrt())


def _variance(shift: Tensor) -> Tensor:
    return shift.cosh().square() + (2 - _MEAN**2) * shift.sinh().square()


def _skewness(shift: Tensor) -> Tensor:
    """Of ``v``, from ``v - E v = g cosh e + (r - E r) sinh e``."""
    c, s = shift.cosh(), shift.sinh()
    return (3 * _MIXED * c.square() * s + _THIRD * s**3) / _variance(shift) ** 1.5
