"""Table conditionals: one proposal for each value of a discrete latent.

Each value's mean parameters are averaged with the joint weights of that value and the particles; the state also holds the
posterior share of each value, so that the average is that of joint statistics: a value that is rare learns as slowly as it
should, and none is lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppl import distributions
from ppl.inference.numerics.expfam import FAMILIES
from ppl.inference.numerics.linalg import safe_cholesky
from ppl.inference.particles import moments
from ppl.inference.particles.blocks import Block, Member
from ppl.inference.particles.parents import Others
from ppl.inference.particles.proposals import (
    Joint,
    Particles,
    Proposal,
    draw_noise,
    fixed_arguments,
    log_standard,
    to_values,
)
from ppl.streams import Streams


def draw(
    others: Others, block: Block, state: Proposal, k: int, streams: Streams, tails: float
) -> Particles:
    """Draw each particle given the value of one parent particle; its density is the mean over all of them."""
    (parent,) = others.parents(block)
    assert state.mass is not None
    values_count = state.mass.shape[-1]
    codes = others.codes(block, parent)
    shares = _one_hot(codes, values_count, state.mass).mean(-2)  # of parent particles at each value
    index = others.maps(block, [parent], k, streams)
    chosen = codes.expand(*index.shape[:-1], codes.shape[-1]).gather(-1, index)
    values: dict[str, Tensor] = {}
    log_q: Tensor | float = shares.log().unsqueeze(-2)  # [*lead, K, values]
    free, log_jacobian = None, None
    if state.joint is not None:
        free, density = _draw_joint(state.joint, chosen, streams.of(block.axis), tails)
        values, log_jacobian = to_values(block, free)
        log_q = log_q + density
    for member in block.members:
        if member.family is not None:
            value, density = _draw_family(member, state.families[member.name], chosen, streams)
            values[member.name], log_q = value, log_q + density
    assert isinstance(log_q, Tensor)
    total = log_q.logsumexp(-1)
    return Particles(values, total if log_jacobian is None else total - log_jacobian, free)


def _draw_joint(
    joint: Joint, chosen: Tensor, generator: torch.Generator, tails: float
) -> tuple[Tensor, Tensor]:
    """Particles ``[*lead, K, D]`` and their density at every value ``[*lead, K, values]``."""
    mean, cov = joint
    full = cov if joint.is_full else torch.diag_embed(cov)
    chol = safe_cholesky(full)
    noise = draw_noise((*chosen.shape, mean.shape[-1]), mean, generator, tails)
    free = _taken(mean, chosen) + (_taken(chol, chosen) @ noise.unsqueeze(-1)).squeeze(-1)
    apart = free.unsqueeze(-3) - mean.unsqueeze(-2)  # [*lead, values, K, D]
    white = torch.linalg.solve_triangular(chol, apart.mT, upper=False)
    log_det = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
    density = log_standard(white.square().sum(-2), mean.shape[-1], tails) - log_det
    return free, density.mT


def _draw_family(
    member: Member, mean: tuple[Tensor, ...], chosen: Tensor, streams: Streams
) -> tuple[Tensor, Tensor]:
    family = FAMILIES[member.family or ""]
    fixed = fixed_arguments(member)
    standard = family.standard_from_mean(mean, **fixed)
    held = {n: v for n, v in fixed.items() if n != "categories"}
    law_class = getattr(distributions, family.name)
    law = law_class(**{n: _taken(standard[n], chosen) for n in family.params}, **held)
    inner = mean[0].shape[chosen.ndim : mean[0].ndim - family.stat_dims[0]]
    value = law.sample((*chosen.shape, *inner), generator=streams.of(member.name))
    value = value.to(mean[0].dtype)
    at = chosen.ndim - 1
    every = law_class(**{n: standard[n].unsqueeze(at) for n in family.params}, **held)
    density = every.log_prob(value.unsqueeze(at + 1))
    return value, density.reshape(*density.shape[: at + 2], -1).sum(-1)


def update(
    others: Others,
    block: Block,
    state: Proposal,
    marginals: dict[str, Tensor],
    joint: dict[tuple[str, str], Tensor],
    step: float,
) -> Proposal:
    """Average each value's statistics, weighted by its joint weights, into the state."""
    (parent,) = others.parents(block)
    assert state.mass is not None
    values_count = state.mass.shape[-1]
    pair = joint[parent.axis, block.axis]  # [*lead, parent particles, K]
    codes = others.codes(block, parent)
    table = _one_hot(codes, values_count, pair).mT @ pair  # [*lead, values, K]
    usable = table.isfinite().all((-2, -1))
    table = torch.where(usable[..., None, None], table, 1.0 / table.shape[-2:].numel())
    mass = table.sum(-1)
    weights = table / mass.clamp(min=1e-300).unsqueeze(-1)
    weights = torch.where((mass > 0).unsqueeze(-1), weights, 1.0 / weights.shape[-1])
    dims, shares = moments.tied_shares(block, usable)
    # In a tied plate an element counts for a value as much as it is likely to have it.
    parts = (shares.unsqueeze(-1) * mass).to(mass.dtype)
    new_mass = parts.sum(dims, keepdim=True) if dims else mass
    within = parts / new_mass.clamp(min=1e-300) if dims else parts
    kept = moments.any_of(usable, dims)
    average_mass = torch.where(
        kept.unsqueeze(-1), (1 - step) * state.mass + step * new_mass, state.mass
    )
    share = (step * new_mass / average_mass.clamp(min=1e-300)).clamp(max=1.0)
    alive = kept.unsqueeze(-1) & (new_mass > 0)
    particles = others.drawn[block.axis]
    new_joint = state.joint
    if state.joint is not None and particles.free is not None:
        new = moments.joint_moments(state.joint, particles.free.unsqueeze(-3), weights)
        new_joint = moments.average(state.joint, moments.tie(new, dims, within), share, alive)
    families = {}
    for member in block.members:
        if member.family is not None:
            values = particles.values[member.name].unsqueeze(weights.ndim - 2)
            values = values.expand(*weights.shape, *values.shape[weights.ndim :])
            mean = moments.family_moments(member, values, weights)
            mean = moments.tie_family(member, mean, dims, within)
            families[member.name] = moments.average_family(
                member, state.families[member.name], mean, share, alive
            )
    return Proposal(new_joint, families, average_mass)


def _one_hot(codes: Tensor, values: int, like: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(codes, values).to(like.dtype)


def _taken(table: Tensor, chosen: Tensor) -> Tensor:
    """Rows ``[*lead, K, ...]`` of a table ``[*lead, values, ...]``."""
    extra = table.ndim - chosen.ndim
    wide = chosen.reshape(*chosen.shape, *(1,) * extra)
    wide = wide.expand(*chosen.shape, *table.shape[chosen.ndim :])
    lead = chosen.shape[:-1]
    return table.expand(*lead, *table.shape[chosen.ndim - 1 :]).gather(chosen.ndim - 1, wide)
