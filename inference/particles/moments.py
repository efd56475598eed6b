"""Moments of weighted particles, and their average into a proposal: the M-step.

Moments are averaged in central form, so a posterior far from zero loses no digits ([Heap2025] averages raw moments).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppl.inference.logspace import sum_of_few
from ppl.inference.numerics.expfam import FAMILIES
from ppl.inference.numerics.linalg import weighted_moments
from ppl.inference.particles.blocks import Block, Member
from ppl.inference.particles.proposals import Joint, Particles, Proposal, fixed_arguments

_NOISE = 2.0  # nats that the noise of an averaged covariance may cost
_PATH_NOISE = 0.15  # the same of each of many paths, whose start is good to that much


def update(
    block: Block,
    state: Proposal,
    particles: Particles,
    weights: Tensor,
    step: float,
    corrected: bool,
    follows: bool = False,
) -> Proposal:
    """Average the moments of the weighted particles into the proposal.

    Elements whose weights are not finite keep what they had; in a tied plate they are left out.

    Args:
        block: whose proposal it is.
        state: before.
        particles: ``K`` draws.
        weights: ``[*restart, *plates, K]``, sums to one over ``K``.
        step: share of the new moments.
        corrected: divide variances by ``1 - sum(w^2)``, the bias of self-normalised weights.
        follows: whether the target still moves, see :func:`followed`.
    """
    dims: tuple[int, ...]
    if not block.tied and math.isfinite(float(weights.sum())):
        dims, shares, good, safe = (), weights, None, weights
    else:
        usable = weights.isfinite().all(-1)
        safe = torch.where(usable.unsqueeze(-1), weights, 1.0 / weights.shape[-1])
        dims, shares = tied_shares(block, usable)
        good = shares > 0
    joint = state.joint
    if joint is not None and particles.free is not None:
        new = joint_moments(joint, particles.free, safe)
        if corrected:
            new = _corrected(new, safe)
        new = tie(new, dims, shares)
        noise = _PATH_NOISE if any(m.path for m in block.members) else _NOISE
        short = _affordable(step, joint, safe, dims, noise)
        if follows and joint.is_full:
            joint = followed(joint, new, step, short, good)
        else:
            joint = average(joint, new, short, good)
    families = {}
    for member in block.members:
        if member.family is not None:
            old, values = state.families[member.name], particles.values[member.name]
            new_mean = tie_family(member, family_moments(member, values, safe), dims, shares)
            families[member.name] = average_family(member, old, new_mean, step, good)
    return Proposal(joint, families, skew=state.skew)


def _affordable(
    step: float, joint: Joint, weights: Tensor, tied: tuple[int, ...], noise: float
) -> float | Tensor:
    """The step, or a part of it where the noise of a covariance would cost more than ``noise`` nats at a step of one.

    That of ``D`` scalars from ``n`` effective particles is a divergence of about ``D (D + 1) / 4 n`` nats, and an average with
    step ``l`` holds ``(2 - l) / l`` times the particles of an iteration.
    """
    dims = joint.mean.shape[-1]
    if not joint.is_full:
        return step
    ess = 1.0 / weights.square().sum(-1)
    ess = ess.sum(tied, keepdim=True) if tied else ess
    ratio = 4 * noise * ess / (dims * (dims + 1))
    return step * (2 * ratio / (1 + ratio)).clamp(max=1.0)


def tied_shares(block: Block, usable: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """Dimensions of ``usable [*restart, *plates]`` that are tied, and each element's share in the average over them.

    Without tied plates the share is one where the element is usable.
    """
    first = usable.ndim - len(block.plates)
    dims = tuple(first + i for i, p in enumerate(block.plates) if p in block.tied)
    shares = usable.double()
    if dims:
        shares = shares / shares.sum(dims, keepdim=True).clamp(min=1.0)
    return dims, shares


def tie(new: Joint, dims: tuple[int, ...], shares: Tensor) -> Joint:
    """Moments of the mixture of all elements of the tied plates, in central form."""
    if not dims:
        return new
    mean = (like(shares, new.mean) * new.mean).sum(dims, keepdim=True)
    apart = new.mean - mean
    outer = apart.unsqueeze(-1) * apart.unsqueeze(-2) if new.is_full else apart.square()
    cov = (like(shares, new.cov) * (new.cov + outer)).sum(dims, keepdim=True)
    return Joint(mean, cov)


def tie_family(
    member: Member, new: tuple[Tensor, ...], dims: tuple[int, ...], shares: Tensor
) -> tuple[Tensor, ...]:
    """Mean parameters of the mixture of all elements of the tied plates."""
    if not dims:
        return new
    first = (like(shares, new[0]) * new[0]).sum(dims, keepdim=True)
    rest = list(new[1:])
    if FAMILIES[member.family or ""].gaussian_coordinate is not None:  # central second moments
        apart = new[0] - first
        wide = rest[0].ndim > apart.ndim
        rest[0] = rest[0] + (apart.unsqueeze(-1) * apart.unsqueeze(-2) if wide else apart.square())
    return first, *((like(shares, m) * m).sum(dims, keepdim=True) for m in rest)


def like(lead: Tensor, target: Tensor) -> Tensor:
    """``lead`` with trailing axes of size one, to multiply ``target``, and in its dtype."""
    wide = lead.reshape((*lead.shape, *(1,) * (target.ndim - lead.ndim)))
    return wide if lead.dtype == torch.bool else wide.to(target.dtype)


def average(old: Joint, new: Joint, step: float | Tensor, usable: Tensor | None) -> Joint:
    """``(1 - step) old + step new`` of raw moments, in central form; elements that are not usable stay.

    Args:
        old: moments before.
        new: moments to average in.
        step: a number, or ``[*restart, *plates, ...]`` like ``usable``.
        usable: ``[*restart, *plates, ...]``; of size one where plates are tied. None for all.
    """
    if usable is None and not isinstance(step, Tensor) and not old.is_full:
        return _averaged_variances(old, new, step)
    share, wide = (like(step, t) if isinstance(step, Tensor) else step for t in old)
    apart = new.mean - old.mean
    outer = apart.unsqueeze(-1) * apart.unsqueeze(-2) if old.is_full else apart.square()
    mean = old.mean + share * apart
    cov = (1 - wide) * old.cov + wide * new.cov + wide * (1 - wide) * outer
    if usable is None:
        return Joint(mean, _floored(cov, old))
    usable = _reduced(usable, old.mean)
    return Joint(
        torch.where(like(usable, mean), mean, old.mean),
        torch.where(like(usable, cov), _floored(cov, old), old.cov),
    )


def followed(
    old: Joint, new: Joint, step: float, short: float | Tensor, usable: Tensor | None
) -> Joint:
    """:func:`average` for a target that moves: the mean by ``step``, the second moments about the old mean by ``short``.

    A mean has less noise than a covariance, and may come near sooner; a spread that keeps the whole of the mean's way does not
    shrink before the target is there.
    """
    apart = new.mean - old.mean
    share = like(short, new.cov) if isinstance(short, Tensor) else short
    wide = new._replace(cov=new.cov + share * apart.unsqueeze(-1) * apart.unsqueeze(-2))
    return Joint(average(old, new, step, usable).mean, average(old, wide, short, usable).cov)


def _averaged_variances(old: Joint, new: Joint, step: float) -> Joint:
    """:func:`average` in the fewest calls, which are what a small block costs."""
    apart = new.mean - old.mean
    cov = torch.lerp(old.cov, new.cov, step).addcmul_(apart, apart, value=step * (1 - step))
    return Joint(torch.add(old.mean, apart, alpha=step), _floored(cov, old))


def average_family(
    member: Member,
    old: tuple[Tensor, ...],
    new: tuple[Tensor, ...],
    step: float | Tensor,
    usable: Tensor | None,
) -> tuple[Tensor, ...]:
    """The same of mean parameters of a family; ``step`` may be a tensor like ``usable``."""
    family = FAMILIES[member.family or ""]
    if isinstance(step, Tensor):
        step = step.reshape(*step.shape, *(1,) * (old[0].ndim - family.stat_dims[0] - step.ndim))
    mixed = family.average(old, new, step)
    if usable is None:
        return tuple(mixed)
    usable = _reduced(usable, old[0])
    return tuple(torch.where(like(usable, m), m, o) for m, o in zip(mixed, old, strict=True))


def any_of(usable: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Whether any element of the tied plates is usable, with these plates of size one."""
    for d in dims:
        usable = usable.any(d, keepdim=True)
    return usable


def _reduced(usable: Tensor, state: Tensor) -> Tensor:
    """Tied plates have one element in the state, usable if any element is."""
    return any_of(usable, tuple(d for d in range(usable.ndim) if state.shape[d] == 1))


def joint_moments(joint: Joint, free: Tensor, weights: Tensor) -> Joint:
    """Mean and central covariance of ``free [*lead, K, D]``, in the form of ``joint``."""
    if joint.is_full:
        return Joint(*weighted_moments(free, weights))
    w = weights.unsqueeze(-1)
    mean = sum_of_few(w * free, -2)
    return Joint(mean, sum_of_few((free - mean.unsqueeze(-2)).square_().mul_(w), -2))


def _corrected(new: Joint, weights: Tensor) -> Joint:
    share = (1 - weights.square().sum(-1)).clamp(min=1 / 3)
    return new._replace(cov=new.cov / like(share, new.cov))


def _floored(cov: Tensor, before: Joint) -> Tensor:
    # A variance may shrink by at most a factor of 100 in a step: a single surviving particle must not make it zero.
    if not before.is_full:
        return torch.maximum(cov, 0.01 * before.cov)
    least = 0.01 * before.cov.diagonal(dim1=-2, dim2=-1)
    lack = (least - cov.diagonal(dim1=-2, dim2=-1)).clamp(min=0)
    return cov + torch.diag_embed(lack)


def family_moments(member: Member, values: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """Mean parameters of weighted particles ``[*lead, K, *event]``, ``weights [*lead, K]``."""
    family = FAMILIES[member.family or ""]
    dim = weights.ndim - 1
    spread = weights.reshape(
        *weights.shape, *(1,) * (values.ndim - family.event_dim - weights.ndim)
    )
    spread = spread.expand(values.shape[: values.ndim - family.event_dim])
    return family.weighted_mean(values, spread, dim=dim, **fixed_arguments(member))
