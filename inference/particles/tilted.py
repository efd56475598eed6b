"""Proposals from a latent's own law: as it is, or tilted towards the posterior.

``q(z | u)`` proportional to ``p(z | u) exp(delta . T(z))`` has natural parameters ``eta(u) + delta``. ``delta`` moves by the
natural gradient of ``E_post[log q]``, which is ``E_post[T] - E_q[T]`` over the covariance of ``T`` under q and the posterior of
the parents ([Wainwright2008] section 3.4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from ppl import distributions
from ppl.binding import Bound
from ppl.inference.numerics.expfam import FAMILIES, Family
from ppl.inference.particles import moments, proposals
from ppl.inference.particles.blocks import Block
from ppl.inference.particles.forms import SIGNS
from ppl.inference.particles.laws import LoweredLaw
from ppl.inference.particles.parents import Others, at_plates
from ppl.inference.particles.proposals import Particles, Proposal
from ppl.streams import Streams

# A tilt may take a natural parameter this share of its way to the border of the domain.
_INSIDE = 0.05
_LARGEST = 1e4  # natural parameters of a certain event count as this


# ---- the law itself -----------------------------------------------------------------------------------------


def draw_prior(
    others: Others, block: Block, state: Proposal, k: int, streams: Streams, tails: float
) -> Particles:
    """Draw each member from its law at one combination of parent particles; the density is the mean over all."""
    if block.is_nested:
        return _draw_nested(others, block, state, k, streams)
    index = others.maps(block, others.parents(block), k, streams)
    arrays = dict(others.arrays)
    values: dict[str, Tensor] = {}
    free, log_joint = None, index.new_zeros((), dtype=others.weighting.bound.dtype)
    if state.joint is not None:  # of the members that are not proposed by their laws
        free, log_joint = proposals.draw_gaussian(block, state.joint, k, streams, tails)
        values, log_jacobian = proposals.to_values(block, free)
        log_joint = log_joint - log_jacobian
    grid: Tensor | float = 0.0
    for member in (m for m in block.members if m not in block.gaussian):
        law = others.weighting.laws[member.name]
        here = law.at(arrays)
        leaves = [_taken(leaf.value, index) for leaf in here.leaves()]
        event = member.variable.event_shape
        batch = (*index.shape, *event[: len(event) - here.event_dim])
        drawn = here.replace(leaves).sample(batch, generator=streams.of(member.name))
        values[member.name] = drawn.to(others.weighting.bound.dtype).reshape(*index.shape, *event)
        arrays[member.name] = values[member.name]
        grid = grid + law.log_density(arrays, k)
    assert isinstance(grid, Tensor)
    return Particles(values, log_joint + _mean_over(grid), free)


# ---- the tilted law -----------------------------------------------------------------------------------------


def draw(
    others: Others, block: Block, state: Proposal, k: int, streams: Streams, tails: float
) -> Particles:
    """The same from the tilted laws."""
    if block.is_nested:
        return _draw_nested(others, block, state, k, streams)
    index = others.maps(block, others.parents(block), k, streams)
    values: dict[str, Tensor] = {}
    grid: Tensor | float = 0.0
    for member in block.members:
        (tilt,) = state.families[member.name]
        family, natural, fixed = _natural(others.weighting.laws[member.name], others.arrays)
        eta = tilted(family, natural, tilt.unsqueeze(index.ndim - 1))
        standard = family.standard_from_natural(_split(family, eta), **fixed)
        made = getattr(distributions, family.name)
        held = {n: v for n, v in fixed.items() if n != "categories"}
        here = {n: _taken(standard[n], index) for n in family.params}
        there = {n: _taken(v, index) if isinstance(v, Tensor) else v for n, v in held.items()}
        event = member.variable.event_shape
        batch = (*index.shape, *event[: len(event) - family.event_dim])
        drawn = made(**here, **there).sample(batch, generator=streams.of(member.name))
        values[member.name] = value = drawn.to(tilt.dtype)
        at = index.ndim - 1
        every = {n: standard[n].unsqueeze(at) for n in family.params}
        wide = {n: v.unsqueeze(at) if isinstance(v, Tensor) else v for n, v in held.items()}
        log = made(**every, **wide).log_prob(value.unsqueeze(at + 1))
        grid = grid + log.reshape(*log.shape[: at + 2], -1).sum(-1)
    assert isinstance(grid, Tensor)
    return Particles(values, _mean_over(grid), None)


def _draw_nested(
    others: Others, block: Block, state: Proposal, k: int, streams: Streams
) -> Particles:
    """Draw ``k`` particles given each combination of parent particles, each with its density there."""
    at = len(others.weighting.block_shape(block)) + 1
    values: dict[str, Tensor] = {}
    log_q: Tensor | float = 0.0
    for member in block.members:
        law = others.weighting.laws[member.name].at(others.arrays)
        if state.families:
            law = _tilted_law(others, member.name, state.families[member.name][0])
        here = law.replace([leaf.value.unsqueeze(at) for leaf in law.leaves()])
        event = member.variable.event_shape
        shape = list(here.leaves()[0].value.shape[: at - 1])
        combinations = here.leaves()[0].value.shape[at - 1]
        batch = (*shape, combinations, k, *event[: len(event) - here.event_dim])
        value = here.sample(batch, generator=streams.of(member.name))
        log = here.log_prob(value)
        value = value.to(others.weighting.bound.dtype)
        values[member.name] = value.reshape(*batch[: at + 1], *event).flatten(at - 1, at)
        log_q = log_q + log.reshape(*log.shape[: at + 1], -1).sum(-1).flatten(-2)
    assert isinstance(log_q, Tensor)
    return Particles(values, log_q, None)


def _tilted_law(others: Others, name: str, tilt: Tensor) -> distributions.Distribution:
    """The tilted law at every combination of parent particles."""
    family, natural, fixed = _natural(others.weighting.laws[name], others.arrays)
    eta = tilted(family, natural, tilt.unsqueeze(len(others.weighting.laws[name].shape)))
    standard = family.standard_from_natural(_split(family, eta), **fixed)
    held = {n: v for n, v in fixed.items() if n != "categories"}
    return getattr(distributions, family.name)(**{n: standard[n] for n in family.params}, **held)


def start(law: LoweredLaw, bound: Bound) -> tuple[Tensor]:
    """No tilt: ``[*restart, *plates, *event without that of the family, statistics]``."""
    family = FAMILIES[type(law.family).__name__]
    event = tuple(law.variable.event_shape)
    inner, own = event[: len(event) - family.event_dim], event[len(event) - family.event_dim :]
    size = sum(_stat_size(family, d, own, law.variable.cardinality) for d in family.stat_dims)
    return (torch.zeros((*law.shape, *inner, size), dtype=bound.dtype, device=bound.device),)


def tilted(family: Family, natural: Tensor, tilt: Tensor) -> Tensor:
    """Natural parameters ``eta + delta`` ``[..., statistics]``, held inside the domain of the family."""
    eta = natural + tilt
    parts, start = [], 0
    sizes = _sizes(family, eta.shape[-1])
    for sign, size in zip(SIGNS[family.name], sizes, strict=True):
        part, border = eta[..., start : start + size], _INSIDE * natural[..., start : start + size]
        start += size
        if sign > 0:
            part = torch.maximum(part, border)
        elif sign < 0:
            part = torch.minimum(part, border)
        parts.append(part)
    return torch.cat(parts, -1)


def update(
    others: Others,
    block: Block,
    state: Proposal,
    marginals: dict[str, Tensor],
    joint: dict[tuple[str, str], Tensor],
    step: float,
) -> Proposal:
    """Move the tilts so that the statistics' means go ``step`` of the way to those of the posterior."""
    weights = marginals[block.axis]
    usable = weights.isfinite().all(-1)
    weights = torch.where(usable.unsqueeze(-1), weights, 1.0 / weights.shape[-1])
    share = _parent_weights(others, block, marginals, joint)
    usable = usable & share.isfinite().all(-1)
    share = share.nan_to_num()
    tilts: dict[str, tuple[Tensor, ...]] = {}
    for member in block.members:
        family, natural, fixed = _natural(others.weighting.laws[member.name], others.arrays)
        values = others.drawn[block.axis].values[member.name]
        observed = _statistics(family, values, weights, fixed)
        (old,) = state.families[member.name]
        dims, parts = moments.tied_shares(block, usable)
        new = _moved(family, natural, old, observed, share, step, dims, parts, fixed)
        kept = moments.any_of(usable, dims)
        good = moments.like(kept, new) & new.isfinite().all(-1, keepdim=True)
        tilts[member.name] = (torch.where(good, new, old),)
    return Proposal(None, tilts)


def _moved(
    family: Family,
    natural: Tensor,
    tilt: Tensor,
    observed: Tensor,
    share: Tensor,
    step: float,
    dims: tuple[int, ...],
    parts: Tensor,
    fixed: Mapping[str, Any],
) -> Tensor:
    """One natural-gradient step: ``delta + step (E_post[T] - E_q[T]) / Cov[T]``, kept inside the domain."""
    at = share.ndim - 1
    natural = natural.clamp(-_LARGEST, _LARGEST)
    eta = tilted(family, natural, tilt.unsqueeze(at))
    mean, curvature = _derivatives(family, eta, share, fixed)
    apart = step * (observed - mean)
    if dims:
        apart = (moments.like(parts, apart) * apart).sum(dims, keepdim=True)
        curvature = (moments.like(parts, curvature) * curvature).sum(dims, keepdim=True)
    size = curvature.diagonal(dim1=-2, dim2=-1)
    ridge = 1e-10 * size + 1e-8 * size.mean(-1, keepdim=True) * (size == 0) + 1e-12
    move = torch.linalg.solve(curvature + torch.diag_embed(ridge), apart.unsqueeze(-1)).squeeze(-1)
    return tilt + move * _within(family, natural, tilt, move, at)


def _within(family: Family, natural: Tensor, tilt: Tensor, move: Tensor, at: int) -> Tensor:
    """The share of a move, up to one, that keeps the law inside its domain at every combination of parents."""
    eta, change = (
        natural + tilt.unsqueeze(at),
        move.unsqueeze(at).expand_as(natural + tilt.unsqueeze(at)),
    )
    share = torch.ones_like(eta)
    start = 0
    for sign, size in zip(SIGNS[family.name], _sizes(family, eta.shape[-1]), strict=True):
        part = slice(start, start + size)
        start += size
        if sign:
            room = sign * eta[..., part] - _INSIDE * natural[..., part].abs()
            loss = -sign * change[..., part]
            limit = 0.9 * room.clamp(min=0) / loss.clamp(min=1e-300)
            share[..., part] = torch.where(loss > 0, limit.clamp(max=1.0), 1.0)
    return share.amin((at, -1)).unsqueeze(-1)


def _derivatives(
    family: Family, eta: Tensor, share: Tensor, fixed: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the statistics under q and the posterior of the parents."""
    at = share.ndim - 1
    first, second = _cumulants(family, eta, fixed)
    mean = (moments.like(share, first) * first).sum(at)
    apart = first - mean.unsqueeze(at)
    # The law of total covariance: where z follows its parents closely, E_post[T] is as uncertain as they are, and the
    # covariance given them alone would turn that into steps of any length.
    spread = second + apart.unsqueeze(-1) * apart.unsqueeze(-2)
    return mean, (moments.like(share, spread) * spread).sum(at)


def _cumulants(family: Family, eta: Tensor, fixed: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the statistics: derivatives of the log-partition."""
    if family.name in ("Normal", "LogNormal"):  # in closed form, as there may be millions
        v = -0.5 / eta[..., 1]
        m = eta[..., 0] * v
        cross = 2 * m * v
        second = torch.stack((v, cross, cross, 2 * v * v + 2 * m * cross), -1)
        return torch.stack((m, m * m + v), -1), second.reshape(*eta.shape, 2)
    held = {n: v for n, v in fixed.items() if not isinstance(v, Tensor)}
    rows = eta.reshape(-1, eta.shape[-1])

    def log_partition(row: Tensor) -> Tensor:
        return family.log_partition(_split(family, row), **held)

    first = vmap(grad(log_partition))(rows).reshape(eta.shape)
    second = vmap(jacrev(grad(log_partition)))(rows).reshape(*eta.shape, eta.shape[-1])
    return first, second


def _statistics(
    family: Family, values: Tensor, weights: Tensor, fixed: Mapping[str, Any]
) -> Tensor:
    """Weighted means of all statistics, ``[*lead, *event, statistics]``."""
    held = {n: v for n, v in fixed.items() if not isinstance(v, Tensor)}
    parts = [
        t if d else t.unsqueeze(-1)
        for t, d in zip(family.statistics(values, **held), family.stat_dims, strict=True)
    ]
    every = torch.cat(parts, -1)
    return (moments.like(weights, every) * every).sum(weights.ndim - 1)


def _parent_weights(
    others: Others,
    block: Block,
    marginals: dict[str, Tensor],
    joint: dict[tuple[str, str], Tensor],
) -> Tensor:
    """Posterior weights of the combinations of parent particles, ``[*restart, *plates, combinations]``."""
    parents = others.parents(block)
    shape = others.weighting.block_shape(block)
    if not parents:
        return torch.ones((*shape, 1), dtype=marginals[block.axis].dtype)
    if len(parents) == 1:
        (parent,) = parents
        weights = others.at_child(block, parent, marginals[parent.axis])
    else:
        left, right = parents
        plates = others.weighting.bound.graph.maximal(frozenset((*left.plates, *right.plates)))
        pair = joint[left.axis, right.axis]
        weights = at_plates(others.weighting, pair, plates, block.plates).flatten(-2)
    return weights.expand(*shape, weights.shape[-1])


def pairs(blocks: tuple[Block, ...], block: Block) -> list[tuple[str, str]]:
    """Joint weights that the update needs: those of two parents."""
    parents = [b.axis for b in blocks if set(b.names) & set(block.reads)]
    return [(parents[0], parents[1])] if len(parents) == 2 else []


def _natural(
    law: LoweredLaw, arrays: Mapping[str, Tensor]
) -> tuple[Family, Tensor, dict[str, Any]]:
    """Family, natural parameters ``[*lead, combinations, *event, statistics]``, and parameters that are fixed."""
    here = law.at(arrays)
    family = FAMILIES[type(law.family).__name__]
    standard = {n: torch.as_tensor(getattr(here, n)) for n in family.params}
    fixed: dict[str, Any] = {n: getattr(here, n) for n in family.fixed if n != "categories"}
    if "categories" in family.fixed:
        fixed["categories"] = standard["probs"].shape[-1]
    parts = family.natural_from_standard({**standard, **fixed})
    event = tuple(law.variable.event_shape)
    batch = len(law.shape) + 1
    inner = event[: len(event) - family.event_dim]
    wide = []
    for eta, dims in zip(parts, family.stat_dims, strict=True):
        full = eta if dims else eta.unsqueeze(-1)
        wide.append(full.expand(*full.shape[:batch], *inner, full.shape[-1]))
    return family, torch.cat(wide, -1), fixed


def _split(family: Family, eta: Tensor) -> tuple[Tensor, ...]:
    parts = eta.split(_sizes(family, eta.shape[-1]), -1)
    return tuple(p if d else p.squeeze(-1) for p, d in zip(parts, family.stat_dims, strict=True))


def _sizes(family: Family, total: int) -> list[int]:
    return [1] * len(family.stat_dims) if not any(family.stat_dims) else [total]


def _stat_size(family: Family, dims: int, own: tuple[int, ...], categories: int | None) -> int:
    if not dims:
        return 1
    if own:
        return own[0]
    assert categories is not None
    return categories


def _mean_over(grid: Tensor) -> Tensor:
    return grid.logsumexp(-1) - math.log(grid.shape[-1])


def _taken(leaf: Tensor, index: Tensor) -> Tensor:
    """``[*lead, K, ...]`` from ``[*lead, combinations, ...]``."""
    at = index.ndim - 1
    wide = index.reshape(*index.shape, *(1,) * (leaf.ndim - index.ndim))
    return leaf.gather(at, wide.expand(*index.shape, *leaf.shape[index.ndim :]))
