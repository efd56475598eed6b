"""The last weighting where every block but one is nested in it: one nested particle is kept for each of the parents'.

Many nested particles say how much evidence a particle of the parents has; for moments and draws one of them is enough, picked by
its weight. The weights of the parents' particles raised to a power are then those of a tempered weighting, so that an
exponent costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ppl.inference.particles import sites
from ppl.inference.particles.approximation import Approximation
from ppl.inference.particles.blocks import Block
from ppl.inference.particles.forms import Sites
from ppl.inference.particles.proposals import Particles
from ppl.inference.particles.weighting import Weighting
from ppl.streams import Streams

# Variance of the parents' last proposal over that of the fitted one. One that was fitted to tempered weights is too narrow
# ([Minka2005]: the smaller the exponent, the more so), and an importance sampler wants it wider than the posterior.
_WIDER = 1.5
_FLATTER = 0.6  # curvature of sites, to the same end
_EFFECTIVE = 16  # particles for each scalar of the parents that the last weights leave
_STEPS = 60  # of bisection


def parent(weighting: Weighting) -> Block | None:
    """The one block outside all plates where all others are sites nested in it; None elsewhere."""
    outer = [b for b in weighting.blocks if not isinstance(b.form, Sites)]
    if len(outer) != 1 or len(weighting.blocks) < 2 or weighting.plan.split:
        return None
    plain = not outer[0].plates and outer[0].gaussian and not outer[0].enumerated
    order = list(weighting.bound.graph.plates)
    laid = all([p for p in order if p in b.plates] == list(b.plates) for b in weighting.blocks)
    return outer[0] if plain and laid else None


def widened(q: Approximation, block: Block) -> Approximation:
    """The proposals with that of the parents wider, and flatter sites."""
    made = {a: sites.flatter(p, _FLATTER) if a != block.axis else p for a, p in q.proposals.items()}
    joint = made[block.axis].joint
    assert joint is not None
    wide = joint._replace(cov=_WIDER * joint.cov)
    return q._replace(proposals={**made, block.axis: made[block.axis]._replace(joint=wide)})


def kept(
    weighting: Weighting,
    above: Block,
    particles: Mapping[str, Particles],
    marginals: Mapping[str, Tensor],
    streams: Streams,
) -> tuple[dict[str, Particles], dict[str, Tensor]]:
    """Particles and weights with one nested particle for each of the parents', in every element."""
    found, weights = dict(particles), dict(marginals)
    for block in weighting.blocks:
        if block is above:
            continue
        own = marginals[block.axis].unflatten(-1, (-1, weighting.sizes[block.axis]))
        total = own.cumsum(-1)
        level = torch.rand(
            total.shape[:-1],
            generator=streams.of(f"picked {block.axis}"),
            dtype=total.dtype,
            device=total.device,
        )
        wanted = (level * total[..., -1]).unsqueeze(-1)
        index = (total < wanted).sum(-1).clamp(max=own.shape[-1] - 1)
        values = {
            n: _at(v.unflatten(index.ndim - 1, own.shape[-2:]), index)
            for n, v in particles[block.axis].values.items()
        }
        found[block.axis] = Particles(values, index.new_empty(0, dtype=total.dtype), None)
        weights[block.axis] = marginals[above.axis].expand(index.shape)
    return found, weights


def _at(values: Tensor, index: Tensor) -> Tensor:
    """``[*lead, K, *event]`` from ``[*lead, K, M, *event]``."""
    at = index.ndim
    wide = index.reshape(*index.shape, *(1,) * (values.ndim - at))
    return values.gather(at, wide.expand(*index.shape, 1, *values.shape[at + 1 :])).squeeze(at)


def enough(above: Block) -> int:
    """Effective particles that the last weights leave: moments of many scalars need many."""
    return _EFFECTIVE * above.dims


def exponent(log_z: Tensor, weights: Sequence[Tensor], wanted: float) -> float:
    """The largest exponent up to one at which ``wanted`` particles of all replicates together are effective.

    Args:
        log_z: of the replicates.
        weights: of the parents' particles in each of them.
        wanted: at most half of all particles are asked for.
    """
    logs = torch.cat([z + w.log() for z, w in zip(log_z, weights, strict=True)])
    wanted = min(wanted, len(logs) / 2)

    def effective(power: float) -> float:
        return 1 / float((power * logs).softmax(0).square().sum())

    if effective(1.0) >= wanted:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if effective(middle) >= wanted else (low, middle)
    return low


def raised(
    log_z: Tensor, above: Block, marginals: Mapping[str, Tensor], power: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Evidence, up to a constant, and weights of one replicate at an exponent, from those at exponent one."""
    logs = power * (log_z + marginals[above.axis].log())
    total = logs.logsumexp(0)
    new = (logs - total).exp()
    return total, {a: new.expand(w.shape) for a, w in marginals.items()}


def powered(
    weighting: Weighting, above: Block, marginals: Mapping[str, Tensor], power: float
) -> dict[str, Tensor]:
    """Weights of all particles where those of the parents' are raised to a power; given these, the others keep theirs."""
    own = marginals[above.axis]
    new = own**power
    new = new / new.sum(-1, keepdim=True)
    ratio = torch.where(own > 0, new / own.clamp(min=torch.finfo(own.dtype).tiny), 0.0)
    lead, found = len(weighting.lead), {above.axis: new}
    for block in weighting.blocks:
        if block is not above:
            w = marginals[block.axis].unflatten(-1, (own.shape[-1], -1))
            wide = ratio.reshape(*own.shape[:lead], *(1,) * (w.ndim - lead - 2), -1, 1)
            found[block.axis] = (w * wide).flatten(-2)
    return found
