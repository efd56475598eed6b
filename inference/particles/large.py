"""The last weighting of plates that are too large for their particles to be kept.

A posterior of a million users at 10 particles in 8 replicates would be 80 points for each of their numbers. Above a share
of the budget, of a latent in such a plate this is kept instead: mean and standard deviation by importance weights from all
replicates; where it can take any real value quantiles are those of a Gaussian with these moments, otherwise those of a few
points for each element, resampled from the particles. Latents outside the plate keep all their weighted particles. Joint
draws draw the particles again, part by part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ppl import marginals as mg
from ppl.binding import put, take
from ppl.errors import UnsupportedError
from ppl.inference.particles.blocks import Block, Member
from ppl.inference.particles.memory import point_bytes
from ppl.inference.particles.proposals import Particles
from ppl.inference.particles.shards import PartDraws
from ppl.inference.particles.weighting import Weighting
from ppl.marginals import Marginal

_KEPT = 8  # points of an element that each replicate leaves, of latents that are no real numbers
REPLICATES = 4


class Moments(NamedTuple):
    """What all replicates so far say of a latent."""

    mean: Tensor  # [*plates, *event]
    variance: Tensor  # [*plates, *event]
    points: list[Tensor]  # of each replicate [kept, *plates, *event]; none for real numbers


class Running:
    """Moments of the latents in a large plate, replicate after replicate, without their particles.

    Replicates are weighed by their evidence. Means and variances are merged in central form.
    """

    def __init__(self, weighting: Weighting, blocks: tuple[Block, ...]) -> None:
        self.weighting, self.blocks = weighting, blocks
        self.log_z: list[Tensor] = []
        self.found: dict[str, Moments] = {}
        self.squares: dict[str, Tensor] = {}  # axis -> sum of squared weights [*plates]

    def add(self, draws: PartDraws, log_z: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Take in one replicate.

        Args:
            draws: its particles.
            log_z: its estimate of the evidence.
            weights: particle axis -> ``[*plates, K]``.
        """
        self.log_z.append(log_z)
        share = float(torch.stack(self.log_z).softmax(0)[-1])
        for block in self.blocks:
            axis, squares = block.axis, weights[block.axis].square().sum(-1)
            before = self.squares.get(axis, torch.zeros_like(squares))
            self.squares[axis] = (1 - share) ** 2 * before + share**2 * squares
        for rows in draws.parts:
            drawn = draws.of_part(rows)
            for block in self.blocks:
                w = take(weights[block.axis], _plates(self.weighting, block), rows)
                for member in block.members:
                    self._merge(block, member, drawn[block.axis], w, rows, share)
        draws.release()

    def _merge(
        self,
        block: Block,
        member: Member,
        drawn: Particles,
        weights: Tensor,
        rows: Mapping[str, Tensor],
        share: float,
    ) -> None:
        values = drawn.values[member.name].movedim(len(block.plates), 0)  # [K, *plates, ...]
        order = [_plates(self.weighting, block).index(p) for p in block.plates]
        w = weights.permute(len(order), *order)
        w = w.reshape(*w.shape, *(1,) * (values.ndim - w.ndim))
        mean = (w * values).sum(0)
        variance = (w * (values - mean).square()).sum(0)
        old = self._of(block, member, values)
        before = take(old.mean, block.plates, rows)
        apart = mean - before
        spread = take(old.variance, block.plates, rows)
        put(
            old.variance,
            block.plates,
            rows,
            (1 - share) * spread + share * variance + share * (1 - share) * apart.square(),
        )
        put(old.mean, block.plates, rows, before + share * apart)
        if not _is_real(member):
            self._keep(old, block, values, w, rows)

    def _of(self, block: Block, member: Member, like: Tensor) -> Moments:
        if member.name not in self.found:
            bound, lead = self.weighting.bound, len(block.plates)
            shape = (*(bound.size(p) for p in block.plates), *like.shape[1 + lead :])
            self.found[member.name] = Moments(like.new_zeros(shape), like.new_zeros(shape), [])
        return self.found[member.name]

    def _keep(
        self, old: Moments, block: Block, values: Tensor, w: Tensor, rows: Mapping[str, Tensor]
    ) -> None:
        if len(old.points) < len(self.log_z):
            old.points.append(old.mean.new_zeros((_KEPT, *old.mean.shape)))
        put(old.points[-1], ("", *block.plates), rows, resampled(values, w, _KEPT))

    def marginals(self) -> dict[str, Marginal]:
        """What is kept of every latent in the plate."""
        shares = torch.stack(self.log_z).softmax(0)
        found: dict[str, Marginal] = {}
        for block in self.blocks:
            for member in block.members:
                m, have = self.found[member.name], (*block.plates, *member.collapsed)
                order = [have.index(p) for p in member.variable.plates]
                event = range(len(have), m.mean.ndim)
                if not m.points:
                    mean, variance = (x.permute(*order, *event) for x in m[:2])
                    found[member.name] = mg.Gaussian(mean, variance.sqrt())
                    continue
                points = torch.cat(m.points).permute(0, *(1 + i for i in (*order, *event)))
                w = (shares / _KEPT).repeat_interleave(_KEPT).to(points)
                plates = points.shape[1 : 1 + len(order)]
                w = w.reshape(-1, *(1,) * len(plates)).expand(-1, *plates)
                found[member.name] = mg.Weighted(points, w)
        return found

    def effective(self) -> dict[str, Tensor]:
        """Effective sample size of every latent, element by element."""
        found = {}
        for block in self.blocks:
            order = [_plates(self.weighting, block).index(p) for p in block.plates]
            ess = 1.0 / self.squares[block.axis].permute(order)
            for member in block.members:
                have = (*block.plates, *member.collapsed)
                wide = ess.reshape(*ess.shape, *(1,) * len(member.collapsed))
                wide = wide.expand(*ess.shape, *member.sizes)
                found[member.name] = wide.permute([have.index(p) for p in member.variable.plates])
        return found


def resampled(values: Tensor, weights: Tensor, n: int) -> Tensor:
    """``n`` of the points of every element at evenly spaced levels of their weight: ``[n, ...]``.

    Args:
        values: ``[K, *plates, *event]``.
        weights: ``[K, *plates, 1, ...]``, sums to one over ``K``.
        n: how many.

    >>> points = torch.tensor([1.0, 2.0, 3.0])
    >>> resampled(points, torch.tensor([0.5, 0.25, 0.25]), 4)
    tensor([1., 1., 2., 3.])
    """
    levels = weights.cumsum(0).movedim(0, -1).contiguous()
    wanted = (torch.arange(n, dtype=levels.dtype, device=levels.device) + 0.5) / n
    wanted = wanted.expand(*levels.shape[:-1], n).contiguous()
    index = torch.searchsorted(levels, wanted).clamp(max=len(values) - 1).movedim(-1, 0)
    return values.gather(0, index.expand(n, *values.shape[1:]))


def _is_real(member: Member) -> bool:
    return member.transform is None and member.family is None


def _plates(weighting: Weighting, block: Block) -> tuple[str, ...]:
    """Plates of a block's weights, in the order of the graph."""
    return tuple(p for p in weighting.bound.graph.plates if p in block.plates)


def picked_in_parts(
    draws: PartDraws, indices: Mapping[str, Tensor], budget: int
) -> dict[str, Tensor]:
    """Values of the latents in the plate at joint draws of particle indices: ``[n, *plates, *event]``.

    Raises:
        UnsupportedError: they take more than the budget.
    """
    weighting, n = draws.weighting, len(next(iter(indices.values())))
    size = (
        n
        * point_bytes(weighting.bound, weighting.blocks, weighting.sizes)
        // max(min(weighting.sizes.values()), 1)
    )
    if size > budget:
        raise UnsupportedError(
            f"{n} joint draws of all latents take about {size / 2**30:.2g} GiB; the budget is {budget / 2**30:.2g} GiB. "
            f"Draw at most {max(1, n * budget // size)} at a time, or allow more memory (memory=...)."
        )
    found: dict[str, Tensor] = {}
    for rows in draws.parts:
        drawn = draws.of_part(rows)
        for block in draws.inner:
            if not block.enumerated:
                _pick(found, weighting, block, drawn[block.axis], indices[block.axis], rows)
    draws.release()
    return found


def _pick(
    found: dict[str, Tensor],
    weighting: Weighting,
    block: Block,
    drawn: Particles,
    index: Tensor,
    rows: Mapping[str, Tensor],
) -> None:
    canonical, n = _plates(weighting, block), len(index)
    part = take(index, ("", *canonical), rows)
    part = part.permute(0, *(1 + canonical.index(p) for p in block.plates))
    for member in block.members:
        values = drawn.values[member.name].movedim(len(block.plates), 0)
        wide = part.reshape(*part.shape, *(1,) * (values.ndim - part.ndim))
        taken = values.gather(0, wide.expand(*part.shape, *values.shape[part.ndim :]))
        have = (*block.plates, *member.collapsed)
        if member.name not in found:
            shape = (*(weighting.bound.size(p) for p in block.plates), *values.shape[part.ndim :])
            found[member.name] = values.new_empty((n, *shape))
        put(found[member.name], ("", *have), rows, taken)


def in_variable_order(found: Mapping[str, Tensor], blocks: tuple[Block, ...]) -> dict[str, Tensor]:
    """Draws with the plates of every latent in the order of its declaration."""
    ordered = {}
    for block in blocks:
        for member in block.members:
            if member.name in found:
                x, have = found[member.name], (*block.plates, *member.collapsed)
                plates = [1 + have.index(p) for p in member.variable.plates]
                ordered[member.name] = x.permute(0, *plates, *range(1 + len(have), x.ndim))
    return ordered
