"""A short run that looks at the posterior before the real one: which latents are correlated, which blocks lack particles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ppl.inference.particles.blocks import Block
from ppl.inference.particles.counts import largest
from ppl.inference.particles.estep import Evaluated, draw_all, evaluated, weigh
from ppl.inference.particles.problem import Problem, prepare_particles

_ITERATIONS = 100
_CROSSED = 15  # iterations on the posterior itself that are enough
_STRONG = 0.3  # correlation from which on latents are brought together first
# CHOICE: counts follow the root of the demand, which keeps globals from starving while plates get more.
_POWER = 0.5
_RANGE = (30, 500)  # particles of a block


def wants_pilot(problem: Problem) -> bool:
    """Whether blocks or counts depend on what only the posterior can tell.

    With ``groups="auto"`` that is where latents of one context are too many for one joint Gaussian, so that the order of the
    program has decided which of them share a block.
    """
    options = problem.options
    if options.groups == "correlation" or options.particles == "auto":
        return True
    if options.groups != "auto" or problem.settings.minibatch or problem.weighting.plan.split:
        return False
    return any(
        a.plates == b.plates
        and min(m.dims for m in a.members) + min(m.dims for m in b.members)
        <= options.joint_limit(a.plates)
        and min(len(a.members), len(b.members)) > 1
        for a, b in combinations(_open_blocks(problem), 2)
    )


def refined(problem: Problem, init: Callable[..., Any], step: Callable[..., Any]) -> Problem:
    """The problem with blocks and particle counts chosen after a pilot run of the method itself.

    Args:
        problem: prepared with structural blocks and counts.
        init: of the method.
        step: of the method.
    """
    settings = replace(
        problem.settings,
        streams=problem.settings.streams.child("pilot"),
        restarts=1,
        minibatch=None,
    )
    options = problem.options
    plain = replace(options, groups="auto" if isinstance(options.groups, str) else options.groups)
    trial = prepare_particles(problem.bound, plain, settings, _ITERATIONS)
    state = init(trial)
    for _ in range(_ITERATIONS):
        state, _ = step(trial, state)
        if state.crossed >= _CROSSED:
            break
    drawn = draw_all(trial.weighting, state.q, settings.streams)
    here = evaluated(trial, trial.weighting, drawn, state.q)
    changes: dict[str, Any] = {}
    if isinstance(options.groups, str):
        changes["groups"] = correlated_groups(trial, here)
    if options.particles == "auto":
        changes["particles"] = balanced_counts(trial, here)
    chosen = replace(options, **changes)
    made = prepare_particles(problem.bound, chosen, problem.settings, problem.max_iters)
    return replace(made, options=chosen)


def correlated_groups(problem: Problem, here: Evaluated) -> list[list[str]]:
    """Groups of latents: the strongest correlations first, then those that share a block already."""
    found = correlations(problem, here)
    strong = sorted((p for p in found if found[p] >= _STRONG), key=lambda p: -found[p])
    together = [p for b in _open_blocks(problem) for p in combinations(b.names, 2)]
    dims = {m.name: m.dims for b in problem.blocks for m in b.members}
    groups = [[n] for b in _open_blocks(problem) for n in b.names]
    plates = {n: b.plates for b in problem.blocks for n in b.names}
    for a, b in [*strong, *together]:
        left = next(g for g in groups if a in g)
        right = next(g for g in groups if b in g)
        limit = problem.options.joint_limit(plates[a])
        if left is not right and sum(dims[n] for n in left + right) <= limit:
            left.extend(right)
            groups.remove(right)
    return groups


def correlations(problem: Problem, here: Evaluated) -> dict[tuple[str, str], float]:
    """Posterior correlation of every two latents of one plate context, on the unconstrained scale.

    Of vectors the largest of all pairs of entries; over the elements of a plate the median.
    """
    blocks = _open_blocks(problem)
    pairs = [(a, b) for a, b in combinations(blocks, 2) if a.plates == b.plates]
    weights = weigh(here, pairs=[(a.axis, b.axis) for a, b in pairs])
    points = {}
    for block in blocks:
        w, free = weights.marginals[block.axis], here.particles[block.axis].free
        assert free is not None
        apart = free - (w.unsqueeze(-1) * free).sum(-2, keepdim=True)
        points[block.axis] = apart / (w.unsqueeze(-1) * apart.square()).sum(-2, keepdim=True).sqrt()
    found: dict[tuple[str, str], float] = {}
    for block in blocks:
        x, w = points[block.axis], weights.marginals[block.axis]
        matrix = (w.unsqueeze(-1) * x).mT @ x
        found |= _by_member(matrix, block, block)
    for a, b in pairs:
        joint = weights.joint[a.axis, b.axis]
        found |= _by_member(points[a.axis].mT @ (joint @ points[b.axis]), a, b)
    return found


def balanced_counts(problem: Problem, here: Evaluated) -> dict[str, int]:
    """Particles of every sampled block, by what it adds to the variance of the log evidence, at the same largest array.

    A block with effective share ``s`` of ``K`` particles in ``N`` plate elements adds about ``N (1 / s - 1) / K``.
    """
    weighting = problem.weighting
    weights = weigh(here, pairs=()).marginals
    sampled = [b for b in problem.blocks if not b.enumerated]
    demand = {}
    for b in sampled:
        w = weights[b.axis]
        lost = w.shape[-1] * w.square().sum(-1) - 1  # 1 / s - 1
        demand[b.axis] = max(float(lost.nan_to_num(1e3).sum()), 0.05)
    budget = largest(problem.bound, problem.blocks, weighting.sizes)
    low, high = 1e-3, 1e3
    for _ in range(20):
        middle = (low * high) ** 0.5
        sizes = _counts(problem, demand, middle)
        fits = largest(problem.bound, problem.blocks, sizes) <= budget
        low, high = (middle, high) if fits else (low, middle)
    sizes = _counts(problem, demand, low)
    return {n: sizes[b.axis] for b in sampled for n in b.names}


def _counts(problem: Problem, demand: Mapping[str, float], scale: float) -> dict[str, int]:
    sizes = dict(problem.weighting.sizes)
    for axis, amount in demand.items():
        sizes[axis] = min(max(round(scale * sizes[axis] * amount**_POWER), _RANGE[0]), _RANGE[1])
    return sizes


def _open_blocks(problem: Problem) -> list[Block]:
    """Blocks that may be regrouped: a joint Gaussian without a form, nothing asked of them."""
    asked = {
        n for key in problem.options.q or {} for n in (key if isinstance(key, tuple) else (key,))
    }
    return [
        b
        for b in problem.blocks
        if b.gaussian == b.members
        and b.form is None
        and b.chain is None
        and not asked & set(b.names)
    ]


def _by_member(matrix: Tensor, left: Block, right: Block) -> dict[tuple[str, str], float]:
    """Largest entries of a matrix of correlations ``[*restart, *plates, D, D']`` for every pair of members."""
    found = {}
    for m, rows in _slices(left):
        for n, columns in _slices(right):
            if m != n:
                part = matrix[..., rows, columns].abs().amax((-2, -1))
                found[m, n] = float(torch.nan_to_num(part).median())
    return found


def _slices(block: Block) -> Sequence[tuple[str, slice]]:
    start, made = 0, []
    for m in block.members:
        made.append((m.name, slice(start, start + m.dims)))
        start += m.dims
    return made
