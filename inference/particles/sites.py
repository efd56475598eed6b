"""Gaussian sites: a Normal vector in a plate, given its parents, times a Gaussian that stands for what the data say of it.

``q(z | u)`` proportional to ``p(z | u) exp(r . z - z' L z / 2)``. Where a vector is long, products of scalars are too narrow and
particles of the law itself have no weight; a site keeps all correlations that the data bring in. ``L`` has the rank of what
is observed of an element, ``L = U' U``, so that nothing larger than ``rank x rank`` is factorised for each particle of the
parents: a draw of the law moves to one of ``q`` by Matheron's rule ([Doucet2010], [Wilson2021]).

The site is near that of Newton's method in expectation, ``L = E_post[-H]`` and ``r = E_post[g] + L E_post[z]`` with gradient
``g`` and Hessian ``H`` of the log-likelihood ([Opper2009], [Khan2017]): the only derivatives that these methods take. ``L`` is
that of the points where the likelihood bends least, as one site serves all particles of the parents.

All particles of the parents share the noise of an element, in antithetic pairs. Their estimates of the evidence then rise and
fall together, and remain unbiased: they are averaged, and elements have noise of their own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.distributions import Normal
from ppl.inference.particles.blocks import Block
from ppl.inference.particles.laws import LoweredLaw
from ppl.inference.particles.moments import like
from ppl.inference.particles.parents import Others, at_plates
from ppl.inference.particles.proposals import Particles, Proposal, standard_normal
from ppl.streams import Streams

_QUARTER = 4
_POINTS = 16  # of an element at which the likelihood is differentiated
_RANK = 1e-10  # share of the largest eigenvalue of an element below which others count as zero


class _Given(NamedTuple):
    """The law ``N(loc, S)`` and the site at every particle of the parents."""

    loc: Tensor  # [*lead or ones, K, D]
    scale: Tensor  # the same
    slope: Tensor  # [*lead, D], r
    root: Tensor  # [*lead, rank, D], U
    seen: Tensor  # [*lead, rank, K], U loc
    gain: Tensor  # [*lead, rank, K], U S (r - L loc)
    reach: Tensor  # [*lead, K], (r - L loc)' S (r - L loc)
    chol: Tensor  # [*lead, rank, rank, K], of I + U S U'


# ---- drawing ----------------------------------------------------------------------------------------------------


def draw(
    others: Others, block: Block, state: Proposal, k: int, streams: Streams, tails: float
) -> Particles:
    """Draw ``k`` particles given each particle of the parents, each with its density there relative to the law's."""
    (name,) = block.names
    here = _given(others, block, state)
    lead, (rank, size) = here.root.shape[:-2], here.root.shape[-2:]
    noise = standard_normal((*lead, -(-k // 2), size + rank), here.root, streams.of(name))
    own, second = noise[..., :size], noise[..., size:].mT.unsqueeze(-2)  # [*lead, rank, 1, half]
    first = here.scale.unsqueeze(-3) @ (here.root.unsqueeze(-2) * own.unsqueeze(-3)).mT
    white = _solved(here.chol, first + second)  # [*lead, rank, K, half]
    moves = _paired(_centre(here).unsqueeze(-1), _solved_back(here.chol, white))
    log_q = _relative(here, moves, own, _paired(0.0, first), _paired(0.0, second), white)
    value = _moved(here, moves, torch.cat((own, -own), -2))
    event = others.weighting.bound.graph.variables[name].event_shape
    kept = value[..., :k, :].reshape(*lead, -1, *event)
    return Particles({name: kept}, log_q[..., :k].flatten(-2), None)


def _paired(middle: Tensor | float, noise: Tensor) -> Tensor:
    """Both signs of the noise, along the last axis."""
    return torch.cat((middle + noise, middle - noise), -1)


def _centre(here: _Given) -> Tensor:
    """``(I + U S U')^-1 U S (r - L loc)``, ``[*lead, rank, K]``."""
    return _solved_back(here.chol, _solved(here.chol, here.gain.unsqueeze(-1))).squeeze(-1)


def _moved(here: _Given, moves: Tensor, noise: Tensor) -> Tensor:
    """``loc + scale noise + S (r - U' (U loc + moves))``, ``[*lead, K, M, D]`` from ``moves [*lead, rank, K, M]``."""
    variance = here.scale.square().unsqueeze(-2)
    base = here.loc.unsqueeze(-2) + variance * here.slope[..., None, None, :]
    pulled = (here.seen.unsqueeze(-1) + moves).flatten(-2).mT @ here.root
    drawn = pulled.unflatten(-2, moves.shape[-2:]).mul_(-variance).add_(base)
    return drawn.addcmul_(here.scale.unsqueeze(-2), noise.unsqueeze(-3))


def _relative(
    here: _Given, moves: Tensor, own: Tensor, first: Tensor, second: Tensor, white: Tensor
) -> Tensor:
    """Log-density of the particles over that of the law, ``[*lead, K, M]``.

    In units of the law ``z = loc + S^1/2 e`` with ``e = g + own - V' c``: ``g`` is the site's slope, ``V = U S^1/2``, ``c`` the
    moves. Products with the long vectors ``e`` are matrix products over all particles of the parents.
    """
    along = here.scale @ (own * here.slope.unsqueeze(-2)).mT  # [*lead, K, half]
    along = _paired(0.0, along) - (here.seen.unsqueeze(-1) * first).sum(-3)
    pull = here.gain.unsqueeze(-1) + first - second + moves
    squares = white.square() - second[..., : white.shape[-1]].square()
    shift = 0.5 * here.reach + here.chol.diagonal(dim1=-3, dim2=-2).log().sum(-1)
    total = shift.unsqueeze(-1) + along - 0.5 * (moves * pull).sum(-3)
    return total.add_(_doubled(0.5 * squares.sum(-3)))


def _doubled(halves: Tensor) -> Tensor:
    return torch.cat((halves, halves), -1)


def _given(others: Others, block: Block, state: Proposal) -> _Given:
    (name,) = block.names
    slope, curvature, _ = state.families[name]
    loc, scale = _law(others.weighting.laws[name], others)
    root = _root(curvature, scale.log().mean(-2).exp().expand(slope.shape))
    variance = scale.square().mT  # [*lead or ones, D, K]
    products = (root.unsqueeze(-2) * root.unsqueeze(-3)).flatten(-3, -2)
    rank = root.shape[-2]
    gram = (products @ variance).unflatten(-2, (rank, rank))  # [*lead, rank, rank, K]
    seen = root @ loc.mT
    seen = seen.expand(*seen.shape[:-1], gram.shape[-1])
    straight = (root * slope.unsqueeze(-2)) @ variance
    back = (gram * seen.unsqueeze(-3)).sum(-2)
    reach = (slope.square().unsqueeze(-2) @ variance).squeeze(-2)
    reach = reach + (seen * (back - 2 * straight)).sum(-2)
    eye = torch.eye(rank, dtype=gram.dtype, device=gram.device).unsqueeze(-1)
    gain = straight - back
    return _Given(loc, scale, slope, root, seen, gain, reach, _cholesky(gram + eye))


def _law(law: LoweredLaw, others: Others) -> tuple[Tensor, Tensor]:
    """Location and scale of the law ``[*lead, K, D]``, with size one where they do not vary over a plate."""
    leaves = law.parameters({k: others.arrays[k] for k in law.parameters.inputs})
    event = tuple(law.variable.event_shape)
    lead = len(law.shape) + len(law.combinations)
    wide = []
    for leaf, rank in zip(leaves, law.ranks, strict=True):
        own = leaf.shape[: leaf.ndim - rank]
        full = leaf.reshape(*(1,) * (lead - len(own)), *leaf.shape)
        shape = (*full.shape[: lead - 1], *law.combinations)
        wide.append(full.expand(*shape, *event).reshape(*shape, -1))
    here = law.family.replace(wide)
    assert isinstance(here, Normal)
    return here.loc, here.scale


def _root(curvature: Tensor, typical: Tensor) -> Tensor:
    """``U [*lead, rank, D]`` with ``U' U`` the curvature; the rank is the largest of any element."""
    scaled = typical.unsqueeze(-1) * curvature * typical.unsqueeze(-2)
    values, vectors = torch.linalg.eigh(scaled)
    large = values > _RANK * values[..., -1:].clamp(min=torch.finfo(values.dtype).tiny)
    first = values.shape[-1] - int(large.sum(-1).max())
    kept = torch.where(large, values, 0.0)[..., first:].sqrt()
    return (vectors[..., first:] * kept.unsqueeze(-2)).mT / typical.unsqueeze(-2)


# ---- factors of small matrices, the batch last -------------------------------------------------------------------


def _cholesky(matrix: Tensor) -> Tensor:
    """Lower factors of ``[..., n, n, K]``, column by column: far faster than LAPACK on many small matrices."""
    left = matrix.clone()
    factor = torch.zeros_like(matrix)
    for j in range(matrix.shape[-2]):
        column = left[..., j:, j, :] / left[..., j : j + 1, j, :].sqrt()
        factor[..., j:, j, :] = column
        below = column[..., 1:, :]
        left[..., j + 1 :, j + 1 :, :] -= below.unsqueeze(-2) * below.unsqueeze(-3)
    return factor


def _solved(chol: Tensor, right: Tensor) -> Tensor:
    """``L^-1 right`` for ``L [..., n, n, K]`` and ``right [..., n, K, m]``."""
    left = right.clone()
    for j in range(chol.shape[-2]):
        left[..., j, :, :] /= chol[..., j, j, :, None]
        left[..., j + 1 :, :, :] -= chol[..., j + 1 :, j, :, None] * left[..., j : j + 1, :, :]
    return left


def _solved_back(chol: Tensor, right: Tensor) -> Tensor:
    """``L'^-1 right``, likewise."""
    left = right.clone()
    for j in reversed(range(chol.shape[-2])):
        left[..., j, :, :] /= chol[..., j, j, :, None]
        left[..., :j, :, :] -= chol[..., j, :j, :, None] * left[..., j : j + 1, :, :]
    return left


# ---- learning ---------------------------------------------------------------------------------------------------


def start(law: LoweredLaw, bound: Bound) -> tuple[Tensor, Tensor, Tensor]:
    """No site: slope ``r [*restart, *plates, D]``, curvature ``L [..., D, D]`` and where it was taken ``[..., D]``, all zero."""
    size = math.prod(law.variable.event_shape)
    slope = torch.zeros((*law.shape, size), dtype=bound.dtype, device=bound.device)
    curvature = torch.zeros((*law.shape, size, size), dtype=bound.dtype, device=bound.device)
    return slope, curvature, torch.zeros_like(slope)


def flatter(state: Proposal, share: float) -> Proposal:
    """The sites with a share of their curvature, and the same slope where they were taken."""
    made: dict[str, tuple[Tensor, ...]] = {}
    for name, (slope, curvature, centre) in state.families.items():
        less = (curvature @ centre.unsqueeze(-1)).squeeze(-1)
        made[name] = (slope - (1 - share) * less, share * curvature, centre)
    return state._replace(families=made)


def update(
    others: Others,
    block: Block,
    state: Proposal,
    marginals: dict[str, Tensor],
    joint: dict[tuple[str, str], Tensor],
    step: float,
) -> Proposal:
    """Move the sites ``step`` of the way to where Newton's method in expectation puts them."""
    (name,) = block.names
    old = state.families[name]
    weights = marginals[block.axis]
    usable = weights.isfinite().all(-1)
    weights = torch.where(usable.unsqueeze(-1), weights, 1.0 / weights.shape[-1])
    arrays = _picked(others, block, weights)
    points = arrays[name].flatten(usable.ndim + 1)
    gradient, hessian = _derivatives(others.weighting.laws[name], arrays, others, name)
    new = _positive(_least(-hessian, points))
    centre = points.mean(-2)
    linear = gradient.mean(-2) + (new @ centre.unsqueeze(-1)).squeeze(-1)
    good = usable & new.isfinite().all(-1).all(-1) & linear.isfinite().all(-1)
    kept = [
        torch.where(like(good, n), torch.lerp(o, n, step), o)
        for n, o in zip((linear, new, centre), old, strict=True)
    ]
    return Proposal(None, {name: tuple(kept)})


def _picked(others: Others, block: Block, weights: Tensor) -> dict[str, Tensor]:
    """Equally weighted points of the posterior of every element, and the parents' values with them: ``[*lead, points, ...]``."""
    (name,) = block.names
    (parent,) = others.parents(block)
    levels = (torch.arange(_POINTS, dtype=weights.dtype, device=weights.device) + 0.5) / _POINTS
    total = weights.cumsum(-1)
    wanted = levels * total[..., -1:]
    index = torch.searchsorted(total, wanted.contiguous()).clamp(max=weights.shape[-1] - 1)
    picked = {name: _taken(others.drawn[block.axis].values[name], index)}
    above = index // others.weighting.sizes[block.axis]
    read = others.weighting.laws[name].likelihood
    for member in parent.members:
        if read is not None and member.name in read.inputs:
            values = others.drawn[parent.axis].values[member.name]
            values = at_plates(
                others.weighting,
                values,
                others.weighting.bound.graph.maximal(frozenset(parent.plates)),
                block.plates,
            )
            values = values.expand(*weights.shape[:-1], *values.shape[weights.ndim - 1 :])
            picked[member.name] = _taken(values, above)
    return picked


def _taken(values: Tensor, index: Tensor) -> Tensor:
    at = index.ndim - 1
    wide = index.reshape(*index.shape, *(1,) * (values.ndim - index.ndim))
    return values.gather(at, wide.expand(*index.shape, *values.shape[index.ndim :]))


def _derivatives(
    law: LoweredLaw, picked: dict[str, Tensor], others: Others, name: str
) -> tuple[Tensor, Tensor]:
    """Gradient ``[*lead, points, D]`` and Hessian ``[..., D, D]`` of the log-likelihood of every element at every point.

    Points do not meet in any factor, so that derivatives of the sum over all of them are those of each one.
    """
    assert law.likelihood is not None
    lowered = law.likelihood
    point = picked[name].detach().requires_grad_()
    arrays = {**others.arrays, **picked, name: point}
    with torch.enable_grad():
        logs = lowered({k: arrays[k] for k in lowered.inputs})
        total = torch.stack([log.sum() for log in logs]).sum()
        (first,) = torch.autograd.grad(total, point, create_graph=True)
        event = len(law.variable.event_shape)
        flat = first.flatten(first.ndim - event)
        if not first.requires_grad:  # linear in the latent
            return flat, flat.new_zeros((*flat.shape, flat.shape[-1]))
        basis = torch.eye(flat.shape[-1], dtype=flat.dtype, device=flat.device)
        ones = basis.reshape(-1, *(1,) * (flat.ndim - 1), flat.shape[-1]).expand(-1, *flat.shape)
        (second,) = torch.autograd.grad(flat, point, ones, is_grads_batched=True)
    return flat.detach(), second.flatten(second.ndim - event).movedim(0, -2).detach()


def _least(curvature: Tensor, points: Tensor) -> Tensor:
    """Mean of the curvatures ``[..., points, D, D]`` over the quarter of the points where the likelihood bends least.

    One site serves all particles of the parents. Those with a wide law see less curvature, and a proposal that is too narrow for
    them would have weights without bound.
    """
    spread = (points - points.mean(-2, keepdim=True)).square().mean(-2, keepdim=True)
    size = (curvature.diagonal(dim1=-2, dim2=-1) * spread).sum(-1)
    index = size.topk(size.shape[-1] // _QUARTER, largest=False).indices[..., None, None]
    return curvature.gather(-3, index.expand(*index.shape[:-2], *curvature.shape[-2:])).mean(-3)


def _positive(matrix: Tensor) -> Tensor:
    """The nearest positive semidefinite matrix: what data say of an element may not take precision away."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return (vectors * values.clamp(min=0).unsqueeze(-2)) @ vectors.mT
