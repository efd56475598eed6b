"""Proposals of a block: a joint Gaussian on the unconstrained scale, or exponential families of its members.

Shapes: particles of a block are ``u [*restart, *plates, K, D]``; state is ``mean [*restart, *plates, D]`` with ``cov``
``[..., D, D]`` (full) or ``[..., D]`` (diagonal). Moments are averaged in central form, so a posterior far from zero
loses no digits (section 8 of the specification; [Heap2025] averages raw moments).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ppl import distributions
from ppl.errors import ModelError
from ppl.inference.numerics.expfam import FAMILIES
from ppl.inference.numerics.linalg import safe_cholesky, weighted_moments
from ppl.inference.particles.blocks import Block, Member
from ppl.streams import Streams

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Joint(NamedTuple):
    """A Gaussian over the concatenated unconstrained members of a block."""

    mean: Tensor  # [*restart, *plates, D]
    cov: Tensor  # [*restart, *plates, D, D] or [*restart, *plates, D]

    @property
    def is_full(self) -> bool:
        """Whether correlations are kept."""
        return self.cov.ndim > self.mean.ndim

    @property
    def sd(self) -> Tensor:
        """Marginal standard deviations ``[*restart, *plates, D]``."""
        return (self.cov.diagonal(dim1=-2, dim2=-1) if self.is_full else self.cov).sqrt()


class Proposal(NamedTuple):
    """State of a block: its joint Gaussian, and the mean parameters of members with a family of their own."""

    joint: Joint | None
    families: dict[str, tuple[Tensor, ...]]


class Particles(NamedTuple):
    """One draw of a block."""

    values: dict[str, Tensor]  # member -> [*restart, *plates, K, *collapsed, *event]
    log_q: Tensor  # [*restart, *plates, K], density of the values
    free: Tensor | None  # [*restart, *plates, K, D], the Gaussian members before their transforms


def draw(
    block: Block, state: Proposal, k: int, streams: Streams, tails: float = math.inf
) -> Particles:
    """Draw ``k`` particles for every element of the block.

    Args:
        block: whose particles they are.
        state: of its proposal.
        k: number of particles.
        streams: random streams.
        tails: degrees of freedom of the joint proposal; infinite for the Gaussian itself, finite for a Student-t with
            the same location and scale, which keeps weights bounded where the posterior has heavier tails.
    """
    values: dict[str, Tensor] = {}
    log_q: Tensor | float = 0.0
    free = None
    if state.joint is not None:
        free, log_q = _draw_joint(state.joint, k, streams.of(block.axis), tails)
        values, log_jacobian = to_values(block, free)
        log_q = log_q - log_jacobian
    for member in block.members:
        if member.family is not None:
            values[member.name], density = _draw_family(
                member, state.families[member.name], k, streams
            )
            log_q = log_q + density
    assert isinstance(log_q, Tensor)
    return Particles(values, log_q, free)


def _draw_joint(
    joint: Joint, k: int, generator: torch.Generator, tails: float
) -> tuple[Tensor, Tensor]:
    mean, cov = joint
    noise = _noise((*mean.shape[:-1], k, mean.shape[-1]), mean, generator, tails)
    if joint.is_full:
        chol = safe_cholesky(cov)
        spread = noise @ chol.mT
        log_det = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    else:
        sd = cov.sqrt()
        spread = noise * sd.unsqueeze(-2)
        log_det = sd.log().sum(-1)
    return mean.unsqueeze(-2) + spread, _log_standard(noise, tails) - log_det.unsqueeze(-1)


def _noise(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator, tails: float
) -> Tensor:
    noise = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
    if math.isinf(tails):
        return noise
    half = torch.full((*shape[:-1], 1), tails / 2, dtype=like.dtype, device=like.device)
    return noise * (half / torch._standard_gamma(half, generator=generator)).sqrt()


def _log_standard(noise: Tensor, tails: float) -> Tensor:
    """Log-density of spherical Gaussian or Student-t noise ``[..., D]``."""
    dims, squares = noise.shape[-1], noise.square().sum(-1)
    if math.isinf(tails):
        return -0.5 * squares - dims * _HALF_LOG_2PI
    constant = (
        math.lgamma((tails + dims) / 2)
        - math.lgamma(tails / 2)
        - 0.5 * dims * math.log(tails * math.pi)
    )
    return constant - 0.5 * (tails + dims) * torch.log1p(squares / tails)


def to_values(block: Block, free: Tensor) -> tuple[dict[str, Tensor], Tensor | float]:
    """Members on the user's scale, and the log-Jacobian ``[..., K]`` of the map."""
    values: dict[str, Tensor] = {}
    total: Tensor | float = 0.0
    start = 0
    for member in block.gaussian:
        part = free[..., start : start + member.dims]
        start += member.dims
        part = part.reshape(*free.shape[:-1], *member.sizes, *member.free_shape)
        if member.transform is None:
            values[member.name] = part
            continue
        value = member.transform(part)
        log_jacobian = member.transform.log_abs_det_jacobian(part, value)
        values[member.name] = value
        total = total + log_jacobian.reshape(*free.shape[:-1], -1).sum(-1)
    return values, total


def to_free(block: Block, values: Mapping[str, Tensor], lead: int) -> Tensor:
    """The inverse of :func:`to_values`: ``[*lead, D]`` from members ``[*lead, *collapsed, *event]``."""
    parts = []
    for member in block.gaussian:
        value = values[member.name]
        free = value if member.transform is None else member.transform.inv(value)
        parts.append(free.reshape(*free.shape[:lead], -1))
    return torch.cat(parts, -1)


def update(
    block: Block,
    state: Proposal,
    particles: Particles,
    weights: Tensor,
    step: float,
    corrected: bool,
) -> Proposal:
    """Average the moments of the weighted particles into the proposal.

    Elements whose weights are not finite keep what they had.

    Args:
        block: whose proposal it is.
        state: before.
        particles: ``K`` draws.
        weights: ``[*restart, *plates, K]``, sums to one over ``K``.
        step: share of the new moments.
        corrected: divide variances by ``1 - sum(w^2)``, the bias of self-normalised weights.
    """
    usable = weights.isfinite().all(-1)
    safe = torch.where(usable.unsqueeze(-1), weights, 1.0 / weights.shape[-1])
    joint = state.joint
    if joint is not None and particles.free is not None:
        joint = _update_joint(joint, particles.free, safe, step, corrected, usable)
    families = {}
    for member in block.members:
        if member.family is not None:
            old = state.families[member.name]
            families[member.name] = _update_family(
                member, old, particles.values[member.name], safe, step
            )
    return Proposal(joint, families)


def _update_joint(
    joint: Joint, free: Tensor, weights: Tensor, step: float, corrected: bool, usable: Tensor
) -> Joint:
    if joint.is_full:
        mean, cov = weighted_moments(free, weights)
    else:
        w = weights.unsqueeze(-1)
        mean = (w * free).sum(-2)
        cov = (w * (free - mean.unsqueeze(-2)).square()).sum(-2)
    if corrected:
        share = (1 - weights.square().sum(-1)).clamp(min=1 / 3)
        cov = cov / share.reshape(*share.shape, *(1,) * (cov.ndim - share.ndim))
    apart = mean - joint.mean
    outer = apart.unsqueeze(-1) * apart.unsqueeze(-2) if joint.is_full else apart.square()
    new_mean = joint.mean + step * apart
    new_cov = (1 - step) * joint.cov + step * cov + step * (1 - step) * outer
    new_cov = _floored(new_cov, joint)
    keep = usable.reshape(*usable.shape, *(1,) * (joint.mean.ndim - usable.ndim))
    new_mean = torch.where(keep, new_mean, joint.mean)
    keep = usable.reshape(*usable.shape, *(1,) * (joint.cov.ndim - usable.ndim))
    return Joint(new_mean, torch.where(keep, new_cov, joint.cov))


def _floored(cov: Tensor, before: Joint) -> Tensor:
    # A variance may shrink by at most a factor of 100 in a step: a single surviving particle must not make it zero.
    if not before.is_full:
        return torch.maximum(cov, 0.01 * before.cov)
    least = 0.01 * before.cov.diagonal(dim1=-2, dim2=-1)
    lack = (least - cov.diagonal(dim1=-2, dim2=-1)).clamp(min=0)
    return cov + torch.diag_embed(lack)


def fixed_arguments(member: Member) -> dict[str, Tensor | int]:
    """Arguments of a member's family that are not learned."""
    family = FAMILIES[member.family or ""]
    if not family.fixed:
        return {}
    if family.fixed == ("categories",) and member.variable.cardinality:
        return {"categories": member.variable.cardinality}
    if member.start is None:
        raise ModelError(
            f"q={{'{member.name}': '{family.name}'}}: {family.name} needs its fixed {', '.join(family.fixed)}. "
            f"Give a law with start values, such as {family.name}(...)."
        )
    return {name: torch.as_tensor(getattr(member.start, name)) for name in family.fixed}


def _draw_family(
    member: Member, mean: tuple[Tensor, ...], k: int, streams: Streams
) -> tuple[Tensor, Tensor]:
    family = FAMILIES[member.family or ""]
    fixed = fixed_arguments(member)
    standard = family.standard_from_mean(mean, **fixed)
    law_class = getattr(distributions, family.name)
    stat_dims = family.stat_dims[0]
    lead = (
        mean[0].ndim - len(member.sizes) - stat_dims - (len(member.free_shape) - family.event_dim)
    )
    # The particle axis stands behind the plates, in front of collapsed plates and event.
    arguments = {name: standard[name].unsqueeze(lead) for name in family.params}
    law = law_class(**arguments, **{n: v for n, v in fixed.items() if n != "categories"})
    batch = list(mean[0].shape[: mean[0].ndim - stat_dims])
    batch.insert(lead, k)
    value = law.sample(batch, generator=streams.of(member.name)).to(mean[0].dtype)
    density = law.log_prob(value)
    return value, density.reshape(*density.shape[: lead + 1], -1).sum(-1)


def _update_family(
    member: Member, old: tuple[Tensor, ...], values: Tensor, weights: Tensor, step: float
) -> tuple[Tensor, ...]:
    family = FAMILIES[member.family or ""]
    dim = weights.ndim - 1
    spread = weights.reshape(
        *weights.shape, *(1,) * (values.ndim - family.event_dim - weights.ndim)
    )
    spread = spread.expand(values.shape[: values.ndim - family.event_dim])
    return family.average(
        old, family.weighted_mean(values, spread, dim=dim, **fixed_arguments(member)), step
    )
