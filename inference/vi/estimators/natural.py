"""IVON: a natural-gradient step for mean-field Gaussians that costs one gradient.

Precisions are averages of ``noise * gradient / sd``, an unbiased estimate of the expected curvature (Price's theorem),
so no second derivative is taken and a scale needs no learning rate of its own.

Source: [Shen2024] algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppl.inference.numerics import flat_gaussian as gaussians
from ppl.inference.numerics.ascent import Ascent, advance, ascend, rate
from ppl.inference.numerics.flat_gaussian import Noise, Piece
from ppl.inference.numerics.ivon import curvature_step, mean_step
from ppl.inference.vi.coordinates import LOCAL
from ppl.inference.vi.problem import Problem, State, draw_noise, param_values, units, unwhitened

_FORGET = 0.05  # share of a new curvature in the average at the first rate
_LONGEST = 1.0  # move of a location in a step, in units of the origin


def step(problem: Problem, state: State, tempering: float) -> tuple[Ascent, Tensor]:
    """One IVON step of all locations and scales, with prior and likelihood in one gradient; params go by Adam."""
    theta = state.ascent.theta.detach().requires_grad_()
    noise = draw_noise(problem, theta)
    with torch.enable_grad():
        draws, log_qs = _draws(problem, theta.detach(), noise)
        us = {name: unwhitened(state.origin[name], v) for name, v in draws.items()}
        constants = param_values(problem, theta)
        bound = problem.target(us, log_qs, constants, tempering)
        inputs = [*draws.values(), *([theta] if constants else [])]
        slopes = list(torch.autograd.grad(bound.sum(), inputs))
    direct = slopes.pop() if constants else None
    ascent = state.ascent
    for g, slope in zip(problem.groups, slopes, strict=True):
        # Curvatures are those of one term of the bound, not of its multiple.
        multiple = tempering * (problem.target.scale if g.piece.name == LOCAL else 1.0)
        ascent = _moved(g.piece, ascent, slope / multiple, noise[g.piece.name].eps, problem)
    return _with_params(problem, ascent, direct), bound.detach()


def _draws(
    problem: Problem, theta: Tensor, noise: dict[str, Noise]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draws to differentiate by, and their log-densities, which the step must not see."""
    draws, log_qs = {}, {}
    for g in problem.groups:
        name, at = g.piece.name, gaussians.views(g.piece, theta)
        v = gaussians.sample(g.piece, at, noise[name])
        log_qs[name] = gaussians.log_density(g.piece, at, v)
        draws[name] = v.detach().requires_grad_()
    return draws, log_qs


def _moved(piece: Piece, ascent: Ascent, slope: Tensor, eps: Tensor, problem: Problem) -> Ascent:
    """The state with new location, log scale and momentum of a piece; ``slope`` ``[R, 1 or G, *plates, 1, D]``."""
    at = gaussians.views(piece, ascent.theta)
    curvature = (-2 * at.raw).exp()
    # The bound averages over draws, so sums over them are means of what each draw says.
    estimate = -(slope * eps).sum((1, -2)) * curvature.sqrt()
    present = rate(ascent, problem.rule)
    share = _FORGET * present / problem.rule.learning_rate
    momentum = ascent.first[..., piece.locations].reshape(at.loc.shape)
    location, momentum = mean_step(
        at.loc,
        momentum,
        -slope.sum((1, -2)),
        curvature,
        ascent.iteration + 1,
        rate=present,
        longest=_LONGEST / present,
    )
    curvature = curvature_step(curvature, estimate, share)
    theta, first = ascent.theta.clone(), ascent.first.clone()
    theta[..., piece.locations] = location.flatten(1)
    theta[..., piece.raws] = -0.5 * curvature.log().flatten(1)
    first[..., piece.locations] = momentum.flatten(1)
    usable = theta.isfinite() & first.isfinite()
    return ascent._replace(
        theta=torch.where(usable, theta, ascent.theta),
        first=torch.where(usable, first, ascent.first),
    )


def _with_params(problem: Problem, ascent: Ascent, direct: Tensor | None) -> Ascent:
    if direct is None:
        return advance(ascent, problem.rule, lambda theta: units(problem, theta))
    rows = torch.cat(
        [torch.arange(p.where.start, p.where.stop, device=direct.device) for p in problem.params]
    )
    return ascend(
        ascent, direct[..., rows], problem.rule, lambda theta: units(problem, theta), rows
    )
