"""Linear-Gaussian conditionals: ``q(z | u) = N(B u + c, S)`` on the unconstrained scale.

The state is the joint Gaussian of ``(u, z)`` in the plates of ``z``, learned from the joint weights of the blocks; the
regression of ``z`` on ``u`` is read off it, so that ``S`` is positive definite by construction ([Bishop2006] section 2.3.1).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.inference.numerics.linalg import safe_cholesky
from ppl.inference.particles.blocks import Block
from ppl.inference.particles.moments import average, tie, tied_shares
from ppl.inference.particles.parents import (
    Others,
    at_plates,
    free_dims,
    parent_blocks,
    read_members,
)
from ppl.inference.particles.proposals import (
    Joint,
    Particles,
    Proposal,
    draw_noise,
    log_standard,
    to_values,
)
from ppl.inference.particles.weighting import Weighting
from ppl.streams import Streams

_RIDGE = (
    1e-4  # share of the variance of u that is added to it: where u barely varies, B stays near zero
)
_LEAST = 1e-4  # share of the variance of z that S keeps
_CHUNK = 1 << 22  # entries of one array of densities


class Regression(NamedTuple):
    """``z = mean + (u - centre) slope + chol noise``."""

    centre: Tensor  # [*lead, Du]
    slope: Tensor  # [*lead, Du, D]
    mean: Tensor  # [*lead, D]
    chol: Tensor  # [*lead, D, D]


def given_dims(weighting: Weighting, block: Block) -> list[int]:
    """Unconstrained scalars that the block reads of each of its parents."""
    parents = parent_blocks(weighting.blocks, block)
    return [sum(free_dims(m) for m in read_members(block, p)) for p in parents]


def draw(
    others: Others, block: Block, state: Proposal, k: int, streams: Streams, tails: float
) -> Particles:
    """Draw each particle given one particle of every parent; its density is the mean over all of them."""
    assert state.joint is not None
    parents = others.parents(block)
    law = regression(state.joint, sum(given_dims(others.weighting, block)))
    shifts = _shifts(others, block, parents, law)
    index = others.maps(block, parents, k, streams)
    dims = law.mean.shape[-1]
    chosen = shifts.expand(*index.shape[:-1], *shifts.shape[-2:]).gather(
        -2, index.unsqueeze(-1).expand(*index.shape, dims)
    )
    noise = draw_noise(chosen.shape, chosen, streams.of(block.axis), tails)
    apart = chosen + noise @ law.chol.mT
    values, log_jacobian = to_values(block, law.mean.unsqueeze(-2) + apart)
    log_q = _mixture(apart, shifts, law.chol, tails) - log_jacobian
    return Particles(values, log_q, law.mean.unsqueeze(-2) + apart)


def regression(joint: Joint, given: int) -> Regression:
    """The regression of the last coordinates of a Gaussian on the first ``given``.

    >>> joint = Joint(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    >>> regression(joint, 1).slope
    tensor([[0.5000]])
    """
    uu, uz = joint.cov[..., :given, :given], joint.cov[..., :given, given:]
    zz = joint.cov[..., given:, given:]
    spread = uu.diagonal(dim1=-2, dim2=-1)
    chol = safe_cholesky(uu + torch.diag_embed(_RIDGE * spread))
    half = torch.linalg.solve_triangular(chol, uz, upper=False)
    left = zz - half.mT @ half
    least = _LEAST * zz.diagonal(dim1=-2, dim2=-1)
    left = left + torch.diag_embed((least - left.diagonal(dim1=-2, dim2=-1)).clamp(min=0))
    slope = torch.linalg.solve_triangular(chol.mT, half, upper=True)
    return Regression(joint.mean[..., :given], slope, joint.mean[..., given:], safe_cholesky(left))


def _shifts(others: Others, block: Block, parents: list[Block], law: Regression) -> Tensor:
    """What every combination of parent particles adds to the mean: ``[*lead, combinations, D]``."""
    total, start = None, 0
    for parent in parents:
        free = others.free(block, parent)
        part = slice(start, start + free.shape[-1])
        start += free.shape[-1]
        shift = (free - law.centre[..., part].unsqueeze(-2)) @ law.slope[..., part, :]
        if total is None:
            total = shift
        else:
            total = (total.unsqueeze(-2) + shift.unsqueeze(-3)).flatten(-3, -2)
    assert total is not None
    return total


def _mixture(apart: Tensor, shifts: Tensor, chol: Tensor, tails: float) -> Tensor:
    """Log of the mean density over all combinations, ``[*lead, K]``, of particles ``apart`` from the mean."""
    white = torch.linalg.solve_triangular(chol, apart.mT, upper=False).mT
    centres = torch.linalg.solve_triangular(chol, shifts.mT, upper=False).mT
    lead, combinations = math.prod(apart.shape[:-2]), shifts.shape[-2]
    rows = max(1, _CHUNK // max(1, lead * combinations))
    parts = []
    for some in white.split(rows, -2):
        # |a - b|^2 as a matrix product: no array of [K, combinations, D] is made.
        squares = some.square().sum(-1, keepdim=True) + centres.square().sum(-1).unsqueeze(-2)
        squares = (squares - 2 * some @ centres.mT).clamp(min=0)
        parts.append(log_standard(squares, apart.shape[-1], tails).logsumexp(-1))
    log_det = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
    return torch.cat(parts, -1) - log_det - math.log(combinations)


def pairs(blocks: tuple[Block, ...], block: Block) -> list[tuple[str, str]]:
    """Joint weights that the update needs."""
    axes = [*(p.axis for p in parent_blocks(blocks, block)), block.axis]
    return [(a, b) for i, a in enumerate(axes) for b in axes[i + 1 :]]


def update(
    others: Others,
    block: Block,
    state: Proposal,
    marginals: dict[str, Tensor],
    joint: dict[tuple[str, str], Tensor],
    step: float,
) -> Proposal:
    """Average the joint moments of ``(u, z)`` into the state."""
    assert state.joint is not None
    weights = marginals[block.axis]
    new = _pair_moments(others, block, marginals, joint)
    usable = weights.isfinite().all(-1) & new.cov.isfinite().all((-2, -1))
    safe = Joint(new.mean.nan_to_num(), new.cov.nan_to_num())
    dims, shares = tied_shares(block, usable)
    return Proposal(average(state.joint, tie(safe, dims, shares), step, shares > 0), {})


def _pair_moments(
    others: Others,
    block: Block,
    marginals: dict[str, Tensor],
    joint: dict[tuple[str, str], Tensor],
) -> Joint:
    """Mean and covariance of parents and block, put together from the joint weights of all pairs.

    All pairs are margins of one distribution over indices, so the whole is positive semidefinite.
    """
    parents = others.parents(block)
    graph, own = others.weighting.bound.graph, others.drawn[block.axis].free
    assert own is not None
    points = [*(others.free(block, p) for p in parents), own]
    singles = [*(others.at_child(block, p, marginals[p.axis]) for p in parents)]
    singles.append(marginals[block.axis])
    means = [(w.unsqueeze(-1) * x).sum(-2) for w, x in zip(singles, points, strict=True)]
    apart = [x - m.unsqueeze(-2) for x, m in zip(points, means, strict=True)]
    shape = others.weighting.block_shape(block)
    rows: list[list[Tensor]] = [[torch.empty(0)] * len(points) for _ in points]
    members = [*parents, block]
    for i, left in enumerate(members):
        rows[i][i] = (singles[i].unsqueeze(-1) * apart[i]).mT @ apart[i]
        for j in range(i + 1, len(members)):
            right = members[j]
            plates = graph.maximal(frozenset((*left.plates, *right.plates)))
            w = at_plates(others.weighting, joint[left.axis, right.axis], plates, block.plates)
            rows[i][j] = apart[i].mT @ (w @ apart[j])
            rows[j][i] = rows[i][j].mT
    wide = [torch.cat([c.expand(*shape, *c.shape[-2:]) for c in row], -1) for row in rows]
    mean = torch.cat([m.expand(*shape, m.shape[-1]) for m in means], -1)
    return Joint(mean, torch.cat(wide, -2))
