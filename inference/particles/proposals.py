"""Proposals of a block: a joint Gaussian on the unconstrained scale, or exponential families of its members.

Shapes: particles of a block are ``u [*restart, *plates, K, D]``; state is ``mean [*restart, *plates, D]`` with ``cov``
``[..., D, D]`` (full) or ``[..., D]`` (diagonal). Moments are averaged in central form, so a posterior far from zero
loses no digits ([Heap2025] averages raw moments).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ppl import distributions
from ppl.errors import ModelError
from ppl.inference.numerics.expfam import FAMILIES
from ppl.inference.numerics.linalg import safe_cholesky
from ppl.inference.particles.blocks import Block, Member
from ppl.streams import Streams

# Scalars up to which a common Student-t tail loses little. Of many paths some have heavy tails, and one suffices to
# spoil a weighting.
_HEAVY = 12
_MANY = 1 << 13  # numbers
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
    def variance(self) -> Tensor:
        """Marginal variances ``[*restart, *plates, D]``."""
        return self.cov.diagonal(dim1=-2, dim2=-1) if self.is_full else self.cov

    @property
    def sd(self) -> Tensor:
        """Marginal standard deviations ``[*restart, *plates, D]``."""
        return self.variance.sqrt()


class Proposal(NamedTuple):
    """State of a block: its joint Gaussian, and the mean parameters of members with a family of their own."""

    joint: Joint | None
    families: dict[str, tuple[Tensor, ...]]  # of a tilted law: the tilt of its natural parameters
    mass: Tensor | None = (
        None  # of a table, [*restart, *plates, values]: posterior share of each value
    )
    skew: Tensor | None = None  # of skewed marginals, [*restart, *plates, D]


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
        free, log_q = draw_gaussian(block, state.joint, k, streams, tails)
        values, log_jacobian = to_values(block, free)
        if isinstance(log_jacobian, Tensor):
            log_q = log_q - log_jacobian
    for member in block.members:
        if member.family is not None:
            values[member.name], density = _draw_family(
                member, state.families[member.name], k, streams
            )
            log_q = log_q + density
    assert isinstance(log_q, Tensor)
    return Particles(values, log_q, free)


def tails_of(block: Block, tails: float) -> float:
    """Degrees of freedom of a block's Student-t proposal; infinite where one tail for all its scalars would lose much."""
    heavy = block.dims <= _HEAVY or any(m.path for m in block.members)
    return tails if heavy else math.inf


def draw_gaussian(
    block: Block, joint: Joint, k: int, streams: Streams, tails: float
) -> tuple[Tensor, Tensor]:
    """Particles ``[*restart, *plates, K, D]`` of a block's joint proposal, before their transforms, and their log-density."""
    generator = streams.of(block.axis)
    return _draw_joint(joint, k, generator, tails_of(block, tails), block.stratified)


def _draw_joint(
    joint: Joint, k: int, generator: torch.Generator, tails: float, stratified: bool
) -> tuple[Tensor, Tensor]:
    mean, cov = joint
    shape = (*mean.shape[:-1], k, mean.shape[-1])
    noise = draw_noise(shape, mean, generator, tails, stratified)
    if joint.is_full:
        chol = safe_cholesky(cov)
        free = mean.unsqueeze(-2) + noise @ chol.mT
        log_det = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    else:
        sd = cov.sqrt()
        free = torch.addcmul(mean.unsqueeze(-2), noise, sd.unsqueeze(-2))
        log_det = sd.log().sum(-1)
    density = log_standard(noise.square().sum(-1), noise.shape[-1], tails)
    return free, density - log_det.unsqueeze(-1)


def draw_noise(
    shape: tuple[int, ...],
    like: Tensor,
    generator: torch.Generator,
    tails: float,
    stratified: bool = False,
) -> Tensor:
    """Spherical Gaussian or Student-t noise ``[..., K, D]``, with one of each coordinate in each of ``K`` shares if so asked."""
    make = stratified_normal if stratified else standard_normal
    noise = make(shape, like, generator)
    if math.isinf(tails):
        return noise
    half = torch.full((*shape[:-1], 1), tails / 2, dtype=like.dtype, device=like.device)
    return noise * (half / torch._standard_gamma(half, generator=generator)).sqrt()


def stratified_normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise ``[..., K, D]`` whose ``K`` values of a coordinate lie one in each of ``K`` intervals of equal probability.

    They stand in random order: each particle by itself has the same law as ever, and elements are independent, so a sum over
    combinations of one particle a block keeps its expectation. What a single coordinate adds to its variance falls like
    ``K^-3``. Source: [McKay1979], Latin hypercube samples.

    >>> noise = stratified_normal((2, 4, 1), torch.zeros(()), torch.Generator().manual_seed(0))
    >>> (torch.special.ndtr(noise).squeeze(-1) * 4).long().sort().values.tolist()
    [[0, 1, 2, 3], [0, 1, 2, 3]]
    """
    keys, share = torch.rand((2, *shape), generator=generator, dtype=like.dtype, device=like.device)
    share = (share + keys.argsort(-2)) / shape[-2]
    least = torch.finfo(like.dtype).eps
    return torch.special.ndtri(share.clamp_(least, 1 - least))


def standard_normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent standard Gaussian numbers; many of them from single precision, in a fifth of the time.

    Their density is taken where they are, so what is rounded is a grid of a relative 1e-7 that particles lie on. The largest
    number there can be is 5.8, which one in 1e8 exceeds.
    """
    many = math.prod(shape) >= _MANY and like.device.type == "cpu"
    dtype = torch.float32 if many and like.dtype == torch.float64 else like.dtype
    noise = torch.randn(shape, generator=generator, dtype=dtype, device=like.device)
    return noise.to(like.dtype)


def log_standard(squares: Tensor, dims: int, tails: float) -> Tensor:
    """Log-density of spherical Gaussian or Student-t noise with ``dims`` entries, from the sum of its squares ``[...]``."""
    if math.isinf(tails):
        return torch.rsub(squares, -dims * _HALF_LOG_2PI, alpha=0.5)
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
        shape = (*free.shape[:-1], *member.sizes, *member.free_shape)
        part = part if part.shape == shape else part.reshape(shape)
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


def expanded(state: Proposal, shape: tuple[int, ...]) -> Proposal:
    """The proposal with tied plates written out: every tensor ``[*shape, ...]``."""
    return over_tensors(lambda t: t.expand(*shape, *t.shape[len(shape) :]), state)


def over_tensors(change: Callable[[Tensor], Tensor], state: Proposal) -> Proposal:
    """The proposal with every tensor changed."""
    return tree_map(lambda t: change(t) if isinstance(t, Tensor) else t, state)


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
