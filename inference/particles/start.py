"""The first approximation of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from ppl.graph import Variable
from ppl.inference.numerics.expfam import FAMILIES
from ppl.inference.particles import proposals
from ppl.inference.particles.approximation import Approximation, Learned
from ppl.inference.particles.blocks import Block, Member
from ppl.inference.particles.problem import Problem
from ppl.inference.particles.proposals import Joint, Proposal
from ppl.inference.particles.weighting import Weighting
from ppl.simulation import Known, simulate
from ppl.streams import Streams

_PRIOR_DRAWS = 500


def first_approximation(problem: Problem) -> Approximation:
    """Proposals from the moments of prior draws, or standard ones; params at their initial values."""
    streams = problem.settings.streams
    # A family has no standard member, so its start is the prior's moments unless it was given.
    families = any(m.family and m.start is None for b in problem.blocks for m in b.members)
    wanted = problem.options.start == "prior" or families
    draws = _prior_draws(problem, streams.child("start")) if wanted else {}
    states = {
        b.axis: _first_proposal(problem, b, draws) for b in problem.blocks if not b.enumerated
    }
    params = problem.bound.graph.role("param")
    return Approximation(states, {v.name: _first_param(problem.weighting, v) for v in params})


def _prior_draws(problem: Problem, streams: Streams) -> dict[str, Tensor]:
    bound = problem.bound
    known = {}
    for v in bound.graph.latents:
        law = bound.graph.factors[v.name].law
        if law is not None and getattr(law.family, "is_improper", False):
            known[v.name] = Known(_standard_draws(problem, v, streams))
    names = [v.name for v in bound.graph.latents]
    return simulate(bound, _PRIOR_DRAWS, streams, known=known, sites=names)


def _standard_draws(problem: Problem, v: Variable, streams: Streams) -> Tensor:
    """Draws of an improper latent: standard Normal on the unconstrained scale."""
    shape = (_PRIOR_DRAWS, *problem.bound.shape(v))
    free = torch.randn(
        shape, generator=streams.of(v.name), dtype=problem.bound.dtype, device=problem.bound.device
    )
    return biject_to(v.support)(free)


def _first_proposal(problem: Problem, block: Block, draws: Mapping[str, Tensor]) -> Proposal:
    shape = problem.weighting.block_shape(block)
    families = {m.name: _first_family(problem, block, m, draws) for m in block.members if m.family}
    joint = _first_joint(problem, block, draws, shape) if block.gaussian else None
    return Proposal(joint, families)


def _first_joint(
    problem: Problem, block: Block, draws: Mapping[str, Tensor], shape: tuple[int, ...]
) -> Joint:
    bound = problem.bound
    mean = torch.zeros((*shape, block.dims), dtype=bound.dtype, device=bound.device)
    sd = torch.ones_like(mean)
    if problem.options.start == "prior":
        laid = {
            m.name: laid_out(bound.graph.variables[m.name], block, m, draws[m.name])
            for m in block.gaussian
        }
        free = proposals.to_free(block, laid, 1 + len(block.plates))
        mean, sd = (part.expand(*shape, -1).clone() for part in _robust_moments(free))
    mean, sd = _asked_start(block, mean, sd)
    if problem.weighting.restarts:
        # Restarts begin at different places, or they would all tell the same story.
        generator = problem.settings.streams.of("restarts")
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        mean = mean + sd * noise
    full = 0 < block.dims <= max(problem.options.joint_up_to, 0) or _asked_joint(problem, block)
    return Joint(mean, torch.diag_embed(sd.square()) if full else sd.square())


def _asked_joint(problem: Problem, block: Block) -> bool:
    asked = problem.options.q or {}
    return any(isinstance(key, tuple) and set(key) == set(block.names) for key in asked)


def _robust_moments(free: Tensor) -> tuple[Tensor, Tensor]:
    """Median and scaled interquartile range over draws: prior draws of scales have heavy tails."""
    free = free.nan_to_num(nan=0.0, posinf=1e6, neginf=-1e6)
    low, middle, high = torch.quantile(
        free, torch.tensor([0.25, 0.5, 0.75], dtype=free.dtype, device=free.device), dim=0
    )
    return middle, ((high - low) / 1.349).clamp(min=1e-6)


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
            n: _full(getattr(member.start, n), (*shape, *member.sizes), problem)
            for n in family.params
        }
        return family.mean_from_standard({**standard, **fixed})
    laid = laid_out(member.variable, block, member, draws[member.name])
    batch = laid.shape[: laid.ndim - family.event_dim]
    weights = torch.full(batch, 1 / batch[0], dtype=laid.dtype, device=laid.device)
    mean = family.weighted_mean(laid, weights, dim=0, **fixed)
    if problem.weighting.restarts:
        mean = tuple(m.expand(problem.weighting.restarts, *m.shape).clone() for m in mean)
    return mean


def _full(value: Any, shape: tuple[int, ...], problem: Problem) -> Tensor:
    tensor = torch.as_tensor(value, dtype=problem.bound.dtype, device=problem.bound.device)
    return tensor.expand((*shape, *tensor.shape)).clone()


def _first_param(weighting: Weighting, v: Variable) -> Learned:
    bound = weighting.bound
    start = torch.as_tensor(v.initial, dtype=bound.dtype, device=bound.device)
    start = start.expand((*weighting.lead, *bound.shape(v))).clone()
    free = biject_to(v.support).inv(start)
    return Learned(free, torch.zeros_like(free), torch.zeros_like(free))
