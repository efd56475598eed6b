"""Gradients through the draws: q's noise is drawn once, and draws move with q's parameters.

Sources: [Kucukelbir2017] section 2 for the total gradient; [Roeder2017] for the gradient without the score of q, whose noise
vanishes as q reaches the posterior; [Tucker2019] equation (7) for several particles. Beyond the last: as a function of one
particle ``z_k`` of one block the massively parallel log Zhat is ``log sum_k exp(a_k(z_k))`` with ``softmax(a)`` the block's
marginal weights, so the same argument holds for every block, and what reaches particle k is multiplied by its weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ppl.inference.numerics import flat_gaussian as gaussians
from ppl.inference.numerics.ascent import Ascent, ascend
from ppl.inference.vi.problem import (
    Problem,
    State,
    draw_noise,
    log_unit,
    param_values,
    units,
    unwhitened,
)


def total(problem: Problem, state: State, tempering: float) -> tuple[Ascent, Tensor]:
    """One step by the gradient through draws and densities."""
    theta = state.ascent.theta.detach().requires_grad_()
    noise = draw_noise(problem, theta)
    with torch.enable_grad():
        made = {
            g.piece.name: gaussians.sample(
                g.piece, gaussians.views(g.piece, theta), noise[g.piece.name]
            )
            for g in problem.groups
        }
        bound = bound_at(problem, state, made, theta, param_values(problem, theta), tempering)
        (gradient,) = torch.autograd.grad(bound.sum(), theta)
    return ascended(problem, state, gradient), bound.detach()


def pathwise(problem: Problem, state: State, tempering: float) -> tuple[Ascent, Tensor]:
    """One step by the gradient through the draws only, doubly reparameterised for several particles."""
    theta = state.ascent.theta.detach().requires_grad_()
    fixed = theta.detach()
    noise = draw_noise(problem, fixed)
    with torch.enable_grad():
        made = {
            g.piece.name: gaussians.sample(
                g.piece, gaussians.views(g.piece, theta), noise[g.piece.name]
            )
            for g in problem.groups
        }
        leaves = {name: v.detach().requires_grad_() for name, v in made.items()}
        sources = _sources(problem, leaves)
        constants = param_values(problem, theta)
        bound = bound_at(problem, state, leaves, fixed, constants, tempering, sources)
        inputs = [*leaves.values(), *sources.values(), *([theta] if constants else [])]
        grads = list(torch.autograd.grad(bound.sum(), inputs))
        gradient = grads.pop() if constants else torch.zeros_like(fixed)
        flows = _weighted(problem, grads[: len(leaves)], grads[len(leaves) :], tempering)
        if made:
            gradient = gradient + torch.autograd.grad(list(made.values()), theta, flows)[0]
    return ascended(problem, state, gradient), bound.detach()


def bound_at(
    problem: Problem,
    state: State,
    draws: Mapping[str, Tensor],
    theta: Tensor,
    constants: Mapping[str, Tensor],
    tempering: float = 1.0,
    sources: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The bound ``[R]`` at draws ``v``, with the densities of q at ``theta``; ``sources`` are zeros added to these."""
    us = {name: unwhitened(state.origin[name], v) for name, v in draws.items()}
    log_qs = {}
    for group in problem.groups:
        name, piece = group.piece.name, group.piece
        log_q = gaussians.log_density(piece, gaussians.views(piece, theta), draws[name])
        log_qs[name] = log_q - log_unit(state.origin[name])
        if sources:
            log_qs[name] = log_qs[name] + sources[name]
    return problem.target(us, log_qs, constants, tempering)


def ascended(problem: Problem, state: State, gradient: Tensor) -> Ascent:
    """The state after a step along a gradient ``[R, P]``."""
    return ascend(state.ascent, gradient, problem.rule, lambda theta: units(problem, theta))


def _sources(problem: Problem, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros whose gradient is minus a particle's weight; one particle alone has weight one."""
    if problem.target.particles == 1:
        return {}
    return {name: torch.zeros_like(v[..., 0]).requires_grad_() for name, v in leaves.items()}


def _weighted(
    problem: Problem, flows: list[Tensor], slopes: list[Tensor], tempering: float
) -> list[Tensor]:
    """What reaches each particle times ``1 - tempering (1 - w)``, which is its weight w where nothing is tempered."""
    if not slopes:
        return flows
    scale = problem.target.draws / tempering
    weights = [(-scale * slope).unsqueeze(-1) for slope in slopes]
    return [f * (1 - tempering * (1 - w)) for f, w in zip(flows, weights, strict=True)]
