"""Gauss-Markov proposals of chains: each state is proposed given the one before it.

Particles of a smooth chain that are drawn independently over time lie too far apart for its narrow transitions: few pairs
of neighbours count. Here a state is ``u_t = m_t + B_t (u_{t-1} - m'_t) + L_t noise``, and the density of a particle is the
mixture over all particles of the state before. Whole paths are drawn; which particle of t descends from which one of t - 1
needs no random map, because the sum over all combinations stays the same when the particles of one time are renamed.

With the exact conditionals of a linear-Gaussian model every weighting gives its evidence without error: by induction, the
forward message at t is proportional to one over the likelihood of the future.

The state of a proposal is the joint Gaussian of ``(u_{t-1}, u_t)`` for every t, ``mean [*lead, 2 D]`` and ``cov [*lead, 2 D,
2 D]``, learned from joint weights of neighbours; at the first element the former is a standard Gaussian that nothing
depends on. ``time`` is the dimension of the ordered plate in ``lead``.

Source: mixture densities over parents, section 3.2 of [Heap2025], there for proposals that are not learned.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.inference.numerics.linalg import safe_cholesky
from ppl.inference.particles.blocks import Block
from ppl.inference.particles.moments import average
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

_MIXED = 1 << 22  # entries of the array of all pairs of particles that is made at a time
_FAR = 8.0  # spreads from the middle beyond which a path of the prior is left out
_INSIDE = 1 - 1e-12  # of a correlation: rounding must not make a variance negative


class Transition(NamedTuple):
    """``u_t = mean + gain (u_{t-1} - before) + chol noise``; the gain is zero at the first element."""

    before: Tensor  # [*lead, D]
    mean: Tensor  # [*lead, D]
    gain: Tensor  # [*lead, D, D]
    chol: Tensor  # [*lead, D, D], lower triangular


def draw(
    others: Others, block: Block, state: Proposal, k: int, streams: Streams, tails: float
) -> Particles:
    """Draw ``k`` paths; the density of each state is the mean over all states before it."""
    assert state.joint is not None
    time = time_of(others, block)
    law = transition(state.joint, time)
    shape = (*law.mean.shape[:-1], k, law.mean.shape[-1])
    noise = draw_noise(shape, law.mean, streams.of(block.axis), tails, block.stratified)
    free = draw_paths(law, noise, time)
    values, log_jacobian = to_values(block, free)
    return Particles(values, log_density(law, free, time, tails) - log_jacobian, free)


def time_of(others: Others, block: Block) -> int:
    """Dimension of the chain's plate in the arrays of its block."""
    assert block.chain is not None
    return len(others.weighting.lead) + block.plates.index(block.chain)


def transition(joint: Joint, time: int) -> Transition:
    """Each state given the one before it; the first has none.

    >>> cov = torch.tensor([[1.0, 0.6], [0.6, 1.0]]).expand(3, 2, 2)
    >>> law = transition(Joint(torch.zeros(3, 2), cov), 0)
    >>> law.gain.flatten(), law.chol.flatten()
    (tensor([0.0000, 0.6000, 0.6000]), tensor([1.0000, 0.8000, 0.8000]))
    """
    d = joint.mean.shape[-1] // 2
    before, own = (safe_cholesky(joint.cov[..., s, s]) for s in (slice(d), slice(d, 2 * d)))
    # In units of both spreads: correlations R, so that the conditional covariance is L (I - R R') L'.
    half = torch.linalg.solve_triangular(own, joint.cov[..., d:, :d], upper=False)
    correlation = _INSIDE * torch.linalg.solve_triangular(before, half.mT, upper=False).mT
    correlation.select(time, 0).zero_()
    eye = torch.eye(d, dtype=own.dtype, device=own.device)
    chol = own @ safe_cholesky(eye - correlation @ correlation.mT)
    gain = torch.linalg.solve_triangular(before, own @ correlation, upper=False, left=False)
    return Transition(joint.mean[..., :d], joint.mean[..., d:], gain, chol)


def draw_paths(law: Transition, noise: Tensor, time: int) -> Tensor:
    """Paths ``[*lead, K, D]`` made of noise of that shape, in log2 T rounds of doubling."""
    means = law.mean.movedim(time, 0)
    moved = torch.cat([torch.zeros_like(means[:1]), means[:-1]]) - law.before.movedim(time, 0)
    gain = law.gain.movedim(time, 0)
    shock = (noise @ law.chol.mT).movedim(time, 0)
    shock = shock + (gain @ moved.unsqueeze(-1)).mT
    reach = 1
    while reach < len(shock):  # shock[t] holds what the last ``reach`` shocks up to t add up to
        rest = shock[reach:] + shock[:-reach] @ gain[reach:].mT
        shock = torch.cat([shock[:reach], rest])
        gain = torch.cat([gain[:reach], gain[reach:] @ gain[:-reach]])
        reach *= 2
    return shock.movedim(0, time) + law.mean.unsqueeze(-2)


def log_density(law: Transition, free: Tensor, time: int, tails: float = math.inf) -> Tensor:
    """Log-density ``[*lead, K]`` of each state, mixed over all particles of the one before it."""
    own = free - law.mean.unsqueeze(-2)
    earlier = torch.cat([free.narrow(time, 0, 1), free.narrow(time, 0, free.shape[time] - 1)], time)
    expected = (earlier - law.before.unsqueeze(-2)) @ law.gain.mT
    whitened = [
        torch.linalg.solve_triangular(law.chol, x.mT, upper=False).mT for x in (own, expected)
    ]
    k, dims = own.shape[-2:]
    parts = (x.reshape(-1, k, dims).split(max(1, _MIXED // k**2)) for x in whitened)
    mixed = torch.cat([_mixture(a, b, tails) for a, b in zip(*parts, strict=True)])
    log_det = law.chol.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
    return mixed.reshape(own.shape[:-1]) - log_det


def _mixture(own: Tensor, expected: Tensor, tails: float) -> Tensor:
    # Differences before squares: where the chain is smooth both are large, and close to one another.
    distance = torch.cdist(own, expected, compute_mode="donot_use_mm_for_euclid_dist")
    logs = log_standard(distance.square_(), own.shape[-1], tails)
    return logs.logsumexp(-1) - math.log(own.shape[-2])


def pair(block: Block) -> tuple[str, str]:
    """Axes of the joint weights that the update needs."""
    return block.axis + "'", block.axis


def update(
    others: Others,
    block: Block,
    state: Proposal,
    marginals: dict[str, Tensor],
    joint: dict[tuple[str, str], Tensor],
    step: float,
) -> Proposal:
    """Average the joint moments of neighbours into the state."""
    free = others.drawn[block.axis].free
    assert state.joint is not None and free is not None
    time = time_of(others, block)
    new = pair_moments(free, marginals[block.axis], joint[pair(block)], time)
    usable = new.mean.isfinite().all(-1) & new.cov.isfinite().all((-2, -1))
    safe = Joint(new.mean.nan_to_num(), new.cov.nan_to_num())
    return Proposal(average(state.joint, safe, step, usable), {})


def pair_moments(free: Tensor, weights: Tensor, pairs: Tensor, time: int) -> Joint:
    """Moments of neighbours.

    Args:
        free: particles ``[*lead, K, D]``.
        weights: of each state ``[*lead, K]``.
        pairs: joint weights ``[*lead, K, K]`` of (state before, state), T - 1 elements along time.
        time: dimension of time in ``lead``.

    Returns:
        Mean ``[*lead, 2 D]`` and central covariance ``[*lead, 2 D, 2 D]``.
    """
    free, weights, pairs = (x.movedim(time, 0) for x in (free, weights, pairs))
    mean = (weights.unsqueeze(-1) * free).sum(-2)
    apart = free - mean.unsqueeze(-2)
    cov = (weights.unsqueeze(-1) * apart).mT @ apart
    cross = apart[:-1].mT @ (pairs @ apart[1:])
    return _neighbours(mean, cov, cross, time)


def sample_moments(free: Tensor, time: int, weights: Tensor | None = None) -> Joint:
    """The same of draws of whole paths ``[n, *lead, D]`` with ``weights [n, *lead]`` that are equal along time."""
    w = torch.full_like(free[..., 0], 1 / len(free)) if weights is None else weights
    free, w = free.movedim(1 + time, 1), w.movedim(1 + time, 1)
    mean = (w.unsqueeze(-1) * free).sum(0)
    apart = free - mean
    cov = torch.einsum("n...,n...i,n...j->...ij", w, apart, apart)
    # Draws that are all alike leave no spread.
    tiny = torch.finfo(cov.dtype).tiny ** 0.5
    cov = cov + torch.diag_embed(1e-10 * cov.diagonal(dim1=-2, dim2=-1) + tiny)
    cross = torch.einsum("n...,n...i,n...j->...ij", w[:, 1:], apart[:, :-1], apart[:, 1:])
    return _neighbours(mean, cov, cross, time)


def near_moments(free: Tensor, middle: Tensor, spread: Tensor, time: int) -> Joint | None:
    """:func:`sample_moments` of the paths that stay near the middle; None where most of them stray.

    Args:
        free: draws of paths ``[n, *lead, D]``.
        middle: ``[*lead, D]``.
        spread: robust standard deviation ``[*lead, D]``.
        time: dimension of time in ``lead``.
    """
    near = ((free - middle).abs() <= _FAR * spread).all(-1).all(1 + time, keepdim=True)
    share = near.to(free.dtype).mean(0)
    if not bool((share >= 0.5).all()):
        return None
    weights = (near / (share * len(free))).to(free.dtype)
    return sample_moments(free, time, weights.expand(free.shape[:-1]))


def independent(mean: Tensor, cov: Tensor, time: int) -> Joint:
    """Neighbours that know nothing of one another: ``mean [*lead, D]``, ``cov [*lead, D, D]``."""
    mean, cov = mean.movedim(time, 0), cov.movedim(time, 0)
    return _neighbours(mean, cov, torch.zeros_like(cov[1:]), time)


def _neighbours(mean: Tensor, cov: Tensor, cross: Tensor, time: int) -> Joint:
    """From moments with time in front, and ``cross [T - 1, ..., D, D]`` of (before, own)."""
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device).expand_as(cov[:1])
    before = torch.cat([eye, cov[:-1]])
    cross = torch.cat([torch.zeros_like(cov[:1]), cross])
    top, bottom = torch.cat([before, cross], -1), torch.cat([cross.mT, cov], -1)
    means = torch.cat([torch.cat([torch.zeros_like(mean[:1]), mean[:-1]]), mean], -1)
    return Joint(means.movedim(0, time), torch.cat([top, bottom], -2).movedim(0, time))
