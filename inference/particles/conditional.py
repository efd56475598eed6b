"""Draw and update any block's proposal, whatever its form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ppl.inference.particles import (
    linear,
    mirrored,
    moments,
    paths,
    proposals,
    sites,
    skewed,
    tables,
    tilted,
)
from ppl.inference.particles.blocks import Block
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
from ppl.inference.particles.parents import Others, parent_blocks
from ppl.inference.particles.proposals import Particles, Proposal
from ppl.inference.particles.weighting import Weighting
from ppl.streams import Streams

_DRAW: dict[type, Callable[..., Particles]] = {
    LinearGaussian: linear.draw,
    Table: tables.draw,
    Tilted: tilted.draw,
    GaussMarkov: paths.draw,
    Prior: tilted.draw_prior,
    Mirrored: mirrored.draw,
    Sites: sites.draw,
    Skewed: skewed.draw,
}
_UPDATE: dict[type, Callable[..., Proposal]] = {
    LinearGaussian: linear.update,
    Table: tables.update,
    Tilted: tilted.update,
    Sites: sites.update,
    Skewed: skewed.update,
    GaussMarkov: paths.update,
    Mirrored: mirrored.update,
}


def draw(
    others: Others, block: Block, state: Proposal, k: int, streams: Streams, tails: float
) -> Particles:
    """Draw ``k`` particles for every element of the block.

    The density of a particle is the mean over all combinations of the parents' particles, members summed first, whichever
    combination it was drawn from (section 3.2 of [Heap2025]); index maps are drawn for every element of the block's plates.
    """
    if block.tied:
        state = proposals.expanded(state, others.weighting.block_shape(block))
    if block.form is None:
        return proposals.draw(block, state, k, streams, tails)
    return _DRAW[type(block.form)](others, block, state, k, streams, tails)


def update_all(
    weighting: Weighting,
    states: Mapping[str, Proposal],
    drawn: Mapping[str, Particles],
    arrays: Mapping[str, Tensor],
    weights: Any,
    step: float,
    corrected: bool,
    blocks: Sequence[Block] | None = None,
    follows: bool = False,
) -> dict[str, Proposal]:
    """Average the moments of the weighted particles into every proposal.

    Args:
        weighting: blocks and sizes.
        states: of the proposals before.
        drawn: their particles.
        arrays: inputs of the log-densities at these particles.
        weights: ``marginals`` of all axes and ``joint`` ones of :func:`needed_pairs`.
        step: share of the new moments.
        corrected: divide variances of blocks without a form by ``1 - sum(w^2)``.
        blocks: those to update; all by default.
        follows: whether the target still moves; of blocks without a form.
    """
    others = Others(weighting, drawn, arrays)
    new = {}
    for b in weighting.blocks if blocks is None else blocks:
        if b.enumerated:
            continue
        old = states[b.axis]
        if b.form is None or (isinstance(b.form, Prior) and old.joint is not None):
            new[b.axis] = moments.update(
                b, old, drawn[b.axis], weights.marginals[b.axis], step, corrected, follows
            )
        elif type(b.form) in _UPDATE:
            learn = _UPDATE[type(b.form)]
            new[b.axis] = learn(others, b, old, weights.marginals, weights.joint, step)
        else:
            new[b.axis] = old
    return new


def needed_pairs(blocks: tuple[Block, ...]) -> tuple[tuple[str, str], ...]:
    """Pairs of blocks whose joint weights the updates need."""
    found: list[tuple[str, str]] = []
    for block in blocks:
        if isinstance(block.form, LinearGaussian):
            found += linear.pairs(blocks, block)
        elif isinstance(block.form, Table):
            found += [(p.axis, block.axis) for p in parent_blocks(blocks, block)]
        elif isinstance(block.form, Tilted):
            found += tilted.pairs(blocks, block)
        elif isinstance(block.form, GaussMarkov):
            found.append(paths.pair(block))
    return tuple(dict.fromkeys(found))
