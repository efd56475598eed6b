"""Proposals that are as likely on either side of zero: a Gaussian and its reflection, half each.

Where a model does not know a sign, because changing it in several latents together leaves the density as it is, the posterior
has a copy on either side. One Gaussian covers both at the price of the gap between them, or loses one for good. Of the mixture
``q(x) / 2 + q(F x) / 2``, where ``F`` changes the signs, only ``q`` is learned: every particle counts for it with the share
that ``q`` has in its density, and reflected with the rest, the E-step of a mixture ([Cappe2008], with components tied to each
other). Signs of different blocks need not agree, since all combinations of particles are weighed.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ppl.inference.numerics.linalg import safe_cholesky
from ppl.inference.particles import moments, proposals
from ppl.inference.particles.blocks import Block
from ppl.inference.particles.forms import Mirrored
from ppl.inference.particles.parents import Others
from ppl.inference.particles.proposals import Joint, Particles, Proposal
from ppl.streams import Streams

_HALF_NORMAL = math.sqrt(2 / math.pi)  # mean of the magnitude of a standard Gaussian number


def signs(block: Block, like: Tensor) -> Tensor:
    """``[D]``: -1 for the scalars whose sign the reflection changes, 1 for the others."""
    assert isinstance(block.form, Mirrored)
    parts = [like.new_full((m.dims,), 1 - 2 * (m.name in block.form.flips)) for m in block.gaussian]
    return torch.cat(parts)


def draw(
    others: Others, block: Block, state: Proposal, k: int, streams: Streams, tails: float
) -> Particles:
    """Draw ``k`` particles of every element, every other one reflected, the first or the second at random."""
    assert state.joint is not None
    free, _ = proposals.draw_gaussian(block, state.joint, k, streams, tails)
    first = torch.randint(
        2,
        (*free.shape[:-2], 1),
        generator=streams.of(f"{block.axis} reflected"),
        device=free.device,
    )
    chosen = (torch.arange(k, device=free.device) + first) % 2 == 1
    free = torch.where(chosen.unsqueeze(-1), free * signs(block, free), free)
    values, log_jacobian = proposals.to_values(block, free)
    here, there = _log_densities(block, state.joint, free, proposals.tails_of(block, tails))
    log_q = torch.logaddexp(here, there) - math.log(2)
    return Particles(values, log_q - log_jacobian, free)


def update(
    others: Others,
    block: Block,
    state: Proposal,
    marginals: dict[str, Tensor],
    joint: dict[tuple[str, str], Tensor],
    step: float,
) -> Proposal:
    """Average the moments of particles and reflected particles into the Gaussian."""
    particles, weights = others.drawn[block.axis], marginals[block.axis]
    assert state.joint is not None and particles.free is not None
    free = particles.free
    here, there = _log_densities(block, state.joint, free, math.inf)
    share = (here - there).sigmoid()
    both = torch.cat((free, free * signs(block, free)), -2)
    parts = torch.cat((weights * share, weights * (1 - share)), -1)
    plain = replace(block, form=None)
    return moments.update(plain, state, particles._replace(free=both), parts, step, False)


def first_half(block: Block, mean: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
    """Moments ``[..., D]`` of the half of a start on the upper side of the first scalar that changes its sign.

    A Gaussian and its reflection that are the same would stay so.
    """
    at = int((signs(block, mean) < 0).nonzero()[0])
    mean, sd = mean.clone(), sd.clone()
    mean[..., at] = sd[..., at] * _HALF_NORMAL
    sd[..., at] = sd[..., at] * math.sqrt(1 - _HALF_NORMAL**2)
    return mean, sd


def _log_densities(block: Block, joint: Joint, free: Tensor, tails: float) -> tuple[Tensor, Tensor]:
    """Of particles ``[..., K, D]`` under the Gaussian and under its reflection, ``[..., K]`` each."""
    if joint.is_full:
        chol = safe_cholesky(joint.cov)
        log_det = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    else:
        sd = joint.cov.sqrt()
        log_det = sd.log().sum(-1)

    def log(points: Tensor) -> Tensor:
        apart = points - joint.mean.unsqueeze(-2)
        if joint.is_full:
            noise = torch.linalg.solve_triangular(chol, apart.mT, upper=False).mT
        else:
            noise = apart / sd.unsqueeze(-2)
        squares = noise.square().sum(-1)
        return proposals.log_standard(squares, noise.shape[-1], tails) - log_det.unsqueeze(-1)

    return log(free), log(free * signs(block, free))
