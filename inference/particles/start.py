"""The first approximation of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from ppl.binding import Bound
from ppl.errors import ModelError, UnsupportedError
from ppl.graph import Variable
from ppl.inference.numerics.expfam import FAMILIES
from ppl.inference.numerics.linalg import safe_cholesky
from ppl.inference.particles import mirrored, paths, proposals, sites, skewed, tilted
from ppl.inference.particles.approximation import Approximation, Learned
from ppl.inference.particles.blocks import Block, Member, transform_of
from ppl.inference.particles.cheap import cheap_draws
from ppl.inference.particles.forms import (
    GaussMarkov,
    LinearGaussian,
    Mirrored,
    Prior,
    Sites,
    Skewed,
    Table,
    Tilted,
)
from ppl.inference.particles.memory import default_memory
from ppl.inference.particles.options import CHEAP
from ppl.inference.particles.parents import at_plates, free_dims, parent_blocks, read_members
from ppl.inference.particles.problem import Problem
from ppl.inference.particles.proposals import Joint, Proposal
from ppl.inference.particles.shards import joined, large_plate, stand_in, start_parts
from ppl.inference.particles.weighting import Weighting
from ppl.simulation import Known, simulate
from ppl.streams import Streams

_PRIOR_DRAWS = 500


def first_approximation(problem: Problem) -> Approximation:
    """Proposals from the moments of prior draws, or standard ones; params at their initial values."""
    bound, weighting = problem.bound, problem.weighting
    room = (problem.settings.memory or default_memory(bound.device)) // 8
    plate = large_plate(bound, problem.blocks, _PRIOR_DRAWS, room)
    if problem.options.start in CHEAP:
        return _first(problem)
    if weighting.share is not None:
        # Part by part, so that the start of an element does not depend on who holds which others.
        parts = stand_in(bound, weighting.share.plate) or weighting.plan.parts
    elif plate is not None and not bound.graph.role("param"):  # params would need to be joined, too
        parts = stand_in(bound, plate) or start_parts(bound, plate, room, _PRIOR_DRAWS)
    else:
        return _first(problem)

    def make(part: Weighting) -> Approximation:
        return _first(replace(problem, bound=part.bound, weighting=part))

    return joined(problem.weighting, parts, make)


def _first(problem: Problem) -> Approximation:
    streams = problem.settings.streams
    # A family has no standard member, so its start is the prior's moments unless it was given.
    families = any(m.family and m.start is None for b in problem.blocks for m in b.members)
    wanted = problem.options.start in ("prior", "auto") or families
    if problem.options.start in CHEAP:
        draws = cheap_draws(problem)
    else:
        draws = prior_draws(problem.bound, streams.child("start")) if wanted else {}
    states = {
        b.axis: _first_proposal(problem, b, draws) for b in problem.blocks if not b.enumerated
    }
    params = problem.bound.graph.role("param")
    return Approximation(states, {v.name: _first_param(problem.weighting, v) for v in params})


def prior_draws(bound: Bound, streams: Streams) -> dict[str, Tensor]:
    """Draws of all latents from their prior ``[n, *plates, *event]``; standard ones of latents without a proper prior."""
    known = {}
    for v in bound.graph.latents:
        law = bound.graph.factors[v.name].law
        if law is not None and getattr(law.family, "is_improper", False):
            known[v.name] = Known(_standard_draws(bound, v, streams))
    names = [v.name for v in bound.graph.latents]
    return simulate(bound, _PRIOR_DRAWS, streams, known=known, sites=names)


def _standard_draws(bound: Bound, v: Variable, streams: Streams) -> Tensor:
    """Draws of an improper latent: standard Normal on the unconstrained scale."""
    shape = (_PRIOR_DRAWS, *bound.shape(v))
    free = torch.randn(shape, generator=streams.of(v.name), dtype=bound.dtype, device=bound.device)
    return biject_to(v.support)(free)


def _first_proposal(problem: Problem, block: Block, draws: Mapping[str, Tensor]) -> Proposal:
    shape = problem.weighting.block_shape(block)
    if isinstance(block.form, (Prior, Tilted, Sites)):
        laws = problem.weighting.laws
        families: dict[str, tuple[Tensor, ...]] = {}
        if isinstance(block.form, Tilted):
            families = {n: tilted.start(laws[n], problem.bound) for n in block.names}
        if isinstance(block.form, Sites):
            families = {n: sites.start(laws[n], problem.bound) for n in block.names}
        joint = _first_joint(problem, block, draws, shape) if block.gaussian else None
        state = Proposal(joint, families)
    else:
        families = {
            m.name: _first_family(problem, block, m, draws) for m in block.members if m.family
        }
        joint = _first_joint(problem, block, draws, shape) if block.gaussian else None
        state = Proposal(joint, families)
    if isinstance(block.form, LinearGaussian) and state.joint is not None:
        state = Proposal(_with_given(problem, block, state.joint, draws), {})
    if isinstance(block.form, Skewed) and state.joint is not None:
        state = skewed.start(state.joint)
    if isinstance(block.form, GaussMarkov) and state.joint is not None:
        state = Proposal(_path(problem, block, state.joint, draws), {})
    if isinstance(block.form, Table):
        state = _tabled(problem, block, state)
    return _tied(problem, block, state)


def _with_given(problem: Problem, block: Block, joint: Joint, draws: Mapping[str, Tensor]) -> Joint:
    """The moments of the latents that a block is given in front of its own, without correlation."""
    shape = problem.weighting.block_shape(block)
    means, sds = [], []
    for parent in parent_blocks(problem.blocks, block):
        members = read_members(block, parent)
        mean = joint.mean.new_zeros((*shape, sum(free_dims(m) for m in members)))
        sd = torch.ones_like(mean)
        if problem.options.start != "standard":
            laid = [_laid_free(problem, parent, m, draws[m.name]) for m in members]
            found = robust_moments(torch.cat(laid, -1))
            mean, sd = (
                at_plates(
                    problem.weighting,
                    f[(None,) * len(problem.weighting.lead)],
                    parent.plates,
                    block.plates,
                )
                for f in found
            )
        means.append(mean.expand(*shape, -1))
        sds.append(sd.expand(*shape, -1))
    given = torch.cat(sds, -1).square()
    size = given.shape[-1] + block.dims
    cov = joint.cov.new_zeros((*shape, size, size))
    cov[..., : given.shape[-1], : given.shape[-1]] = torch.diag_embed(given)
    cov[..., given.shape[-1] :, given.shape[-1] :] = joint.cov
    return Joint(torch.cat([*means, joint.mean], -1), cov)


def _path(problem: Problem, block: Block, joint: Joint, draws: Mapping[str, Tensor]) -> Joint:
    """Neighbours as in the prior's paths, if the start is the prior's; else without correlation."""
    lead = len(problem.weighting.lead)
    time = block.plates.index(block.chain or "")
    if problem.options.start != "standard" and all(m.start is None for m in block.gaussian):
        laid = torch.cat([_laid_free(problem, block, m, draws[m.name]) for m in block.gaussian], -1)
        middle, spread = robust_moments(laid)
        found = paths.near_moments(laid, middle, spread, time)
        if found is not None:
            shape = problem.weighting.block_shape(block)
            return Joint(*(t.expand(*shape, *t.shape[len(block.plates) :]).clone() for t in found))
    return paths.independent(joint.mean, joint.cov, lead + time)


def _laid_free(problem: Problem, block: Block, member: Member, draw: Tensor) -> Tensor:
    laid = laid_out(member.variable, block, member, draw)
    transform = transform_of(member.variable)
    free = laid if transform is None else transform.inv(laid)
    return free.reshape(*free.shape[: 1 + len(block.plates)], -1)


def _tabled(problem: Problem, block: Block, state: Proposal) -> Proposal:
    """The same start at every value of the latent that the table is given."""
    shape = problem.weighting.block_shape(block)
    (parent,) = parent_blocks(problem.blocks, block)
    (read,) = read_members(block, parent)
    count = read.variable.cardinality
    assert count is not None

    def repeat(t: Tensor) -> Tensor:
        wide = t.unsqueeze(len(shape))
        return wide.expand(*shape, count, *t.shape[len(shape) :]).clone()

    mass = torch.full(
        (*shape, count), 1 / count, dtype=problem.bound.dtype, device=problem.bound.device
    )
    return proposals.over_tensors(repeat, state)._replace(mass=mass)


def _tied(problem: Problem, block: Block, state: Proposal) -> Proposal:
    """One start for all elements of the tied plates: the average of theirs."""
    lead = len(problem.weighting.lead)
    dims = tuple(lead + i for i, p in enumerate(block.plates) if p in block.tied)
    return proposals.over_tensors(lambda t: t.mean(dims, keepdim=True), state) if dims else state


def fitted(problem: Problem, block: Block, draws: Mapping[str, Tensor]) -> Proposal:
    """The Gaussian with the moments of joint draws ``[n, *plates, *event]`` of the latents."""
    if any(m.family for m in block.members):
        raise UnsupportedError(
            f"reweight: {block.names} have proposals of their own families; fit them with method='qem'."
        )
    laid = {m.name: laid_out(m.variable, block, m, draws[m.name]) for m in block.gaussian}
    free = proposals.to_free(block, laid, 1 + len(block.plates))
    if isinstance(block.form, GaussMarkov):
        return Proposal(paths.sample_moments(free, block.plates.index(block.chain or "")), {})
    mean = free.mean(0)
    apart = free - mean
    if block.dims <= 4 * problem.options.joint_up_to:
        cov = draws_covariance(free)
    else:
        cov = apart.square().mean(0)
    return Proposal(Joint(mean, cov), {})


def _first_joint(
    problem: Problem, block: Block, draws: Mapping[str, Tensor], shape: tuple[int, ...]
) -> Joint:
    bound = problem.bound
    mean = torch.zeros((*shape, block.dims), dtype=bound.dtype, device=bound.device)
    sd = torch.ones_like(mean)
    if problem.options.start != "standard":
        laid = {
            m.name: laid_out(bound.graph.variables[m.name], block, m, draws[m.name])
            for m in block.gaussian
        }
        free = proposals.to_free(block, laid, 1 + len(block.plates))
        mean, sd = (part.expand(*shape, -1).clone() for part in robust_moments(free))
    if isinstance(block.form, Mirrored):
        mean, sd = mirrored.first_half(block, mean, sd)
    mean, sd = _asked_start(block, mean, sd)
    has_path = any(m.path for m in block.members)
    limit = problem.options.joint_limit(block.plates, has_path)
    full = 0 < block.dims <= limit or _asked_joint(problem, block)
    full = full or isinstance(block.form, LinearGaussian)
    cov = torch.diag_embed(sd.square()) if full else sd.square()
    if full and problem.options.start in CHEAP:
        cov = draws_covariance(free).expand(*shape, -1, -1).clone()
    if problem.weighting.restarts:
        # Restarts begin at different places, or they would all tell the same story.
        generator = problem.settings.streams.of("restarts")
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        apart = (safe_cholesky(cov) @ noise.unsqueeze(-1)).squeeze(-1) if full else sd * noise
        mean = mean + apart
    return Joint(mean, cov)


def _asked_joint(problem: Problem, block: Block) -> bool:
    asked = problem.options.q or {}
    return any(isinstance(key, tuple) and set(key) == set(block.names) for key in asked)


def draws_covariance(free: Tensor) -> Tensor:
    """Covariance ``[..., D, D]`` over draws ``[n, ..., D]``."""
    apart = free - free.mean(0)
    cov = torch.einsum("n...i,n...j->...ij", apart, apart) / len(free)
    return cov + 1e-10 * torch.diag_embed(cov.diagonal(dim1=-2, dim2=-1))


def robust_moments(free: Tensor) -> tuple[Tensor, Tensor]:
    """Median and scaled interquartile range over draws: prior draws of scales have heavy tails."""
    free = free.nan_to_num(nan=0.0, posinf=1e6, neginf=-1e6)
    ordered = free.sort(0).values  # torch.quantile refuses large arrays, and is slow
    low, middle, high = (_level(ordered, level) for level in (0.25, 0.5, 0.75))
    return middle, ((high - low) / 1.349).clamp(min=1e-6)


def _level(ordered: Tensor, level: float) -> Tensor:
    place = level * (len(ordered) - 1)
    below = int(place)
    return ordered[below].lerp(ordered[min(below + 1, len(ordered) - 1)], place - below)


def _asked_start(block: Block, mean: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
    at = 0
    for member in block.gaussian:
        if member.start is not None:  # a MultivariateNormal, on the unconstrained scale
            loc = torch.as_tensor(member.start.loc, dtype=mean.dtype, device=mean.device)
            scale = torch.as_tensor(
                member.start.variance, dtype=mean.dtype, device=mean.device
            ).sqrt()
            mean[..., at : at + member.dims] = loc.reshape(-1)
            sd[..., at : at + member.dims] = scale.reshape(-1)
        at += member.dims
    return mean, sd


def laid_out(v: Variable, block: Block, member: Member, draw: Tensor) -> Tensor:
    """``[n, *plates, *event]`` with block plates in front, collapsed ones behind them."""
    order = [1 + v.plates.index(p) for p in (*block.plates, *member.collapsed)]
    return draw.permute(0, *order, *range(1 + len(v.plates), draw.ndim))


def _first_family(
    problem: Problem, block: Block, member: Member, draws: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    family = FAMILIES[member.family or ""]
    shape = problem.weighting.block_shape(block)
    fixed = proposals.fixed_arguments(member)
    if member.start is not None:
        standard = {
            n: _full(member, getattr(member.start, n), shape, problem) for n in family.params
        }
        return family.mean_from_standard({**standard, **fixed})
    laid = laid_out(member.variable, block, member, draws[member.name])
    batch = laid.shape[: laid.ndim - family.event_dim]
    weights = torch.full(batch, 1 / batch[0], dtype=laid.dtype, device=laid.device)
    mean = family.weighted_mean(laid, weights, dim=0, **fixed)
    if problem.weighting.restarts:
        mean = tuple(m.expand(problem.weighting.restarts, *m.shape).clone() for m in mean)
    return mean


def _full(member: Member, value: Any, shape: tuple[int, ...], problem: Problem) -> Tensor:
    """A start value of every scalar: one for all, one for each of an event, or one for each element of the plates too."""
    family = FAMILIES[member.family or ""]
    tensor = torch.as_tensor(value, dtype=problem.bound.dtype, device=problem.bound.device)
    event = tuple(member.variable.event_shape)
    inner = event[: len(event) - family.event_dim]
    own = tensor.shape[tensor.ndim - family.stat_dims[0] :]
    whole = (*shape, *member.sizes, *inner, *own)
    try:
        return tensor.expand(whole).clone()
    except RuntimeError:
        raise ModelError(
            f"q={{'{member.name}': {family.name}(...)}}: expected start values of a shape that broadcasts to "
            f"{list(whole[len(problem.weighting.lead) :])} (plates, then event), got {list(tensor.shape)}."
        ) from None


def _first_param(weighting: Weighting, v: Variable) -> Learned:
    bound = weighting.bound
    start = torch.as_tensor(v.initial, dtype=bound.dtype, device=bound.device)
    start = start.expand((*weighting.lead, *bound.shape(v))).clone()
    free = biject_to(v.support).inv(start)
    return Learned(free, torch.zeros_like(free), torch.zeros_like(free))
