"""Nested particles: some of a block for each particle of its parents.

Of a vector in a plate, particles that were drawn given one value of the latents above it are worthless for another. A nested
block has particles of its own, ``M`` of them, for each of the ``K`` particles of its parents' block, drawn given just that one:
no mixture is needed, and what they sum up to is an unbiased estimate of the evidence of every parent particle by itself.
Summed within the plate first, they cost ``K M`` densities where an ordinary block has as many.

Particles and their weights are kept flat, ``[*restart, *plates, K M, ...]`` with the parents' index first; log-factors see two
axes, that of the parents and that of the block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppl.errors import ModelError

if TYPE_CHECKING:
    from ppl.inference.particles.blocks import Block
    from ppl.inference.particles.weighting import Weighting


def parent_of(blocks: Sequence[Block], block: Block) -> Block | None:
    """The block whose particles a nested block has its own for; None for other blocks."""
    if not block.is_nested:
        return None
    (parent,) = (b for b in blocks if set(b.names) & set(block.reads))
    return parent


def check(block: Block, parents: Sequence[Block], children: Sequence[Block]) -> None:
    """Refuse what cannot be nested.

    Raises:
        ModelError: with the remedy.
    """
    if not block.is_nested:
        return
    names = ", ".join(block.names)
    if len(parents) != 1 or parents[0].enumerated or parents[0].is_nested or parents[0].chain:
        listed = " and ".join("+".join(p.names) for p in parents) or "nothing"
        raise ModelError(
            f"q=...: index='nested': {names} depends on {listed}. Particles nest in one block of sampled latents that is not "
            "nested and no chain: group its parents (groups=[...]), or use index='permutation'."
        )
    if not block.plates or children or any(m.collapsed for m in block.members):
        raise ModelError(
            f"q=...: index='nested': {names} must lie in a plate, element by element, and no other proposal may read it. Use "
            "index='permutation'."
        )


def axes_of(blocks: Sequence[Block], block: Block) -> tuple[str, ...]:
    """Particle axes of a block's log-factors."""
    parent = parent_of(blocks, block)
    return (block.axis,) if parent is None else (parent.axis, block.axis)


def pairs(blocks: Sequence[Block]) -> tuple[tuple[str, str], ...]:
    """Pairs of axes whose joint weights are the weights of nested particles."""
    found = (axes_of(blocks, b) for b in blocks)
    return tuple((a[0], a[1]) for a in found if len(a) == 2)


def count(blocks: Sequence[Block], block: Block, sizes: Mapping[str, int]) -> int:
    """Particles of one element of a block, for all particles of its parents."""
    total = 1
    for axis in axes_of(blocks, block):
        total *= sizes[axis]
    return total


def apart(weighting: Weighting, block: Block, array: Tensor, at: int) -> Tensor:
    """An array with the flat particles of a block in dimension ``at``, as its log-factors see it."""
    axes = axes_of(weighting.blocks, block)
    return array if len(axes) == 1 else array.unflatten(at, [weighting.sizes[a] for a in axes])


def share(weights: Tensor, own: int) -> Tensor:
    """Effective share ``[...]`` of nested particles given those of the parents, from flat weights ``[..., K M]``.

    Given each parent first, and squared then: the squares of small joint weights are zero.

    >>> share(torch.tensor([0.25, 0.25, 0.5, 0.0]), 2)  # both particles of the first parent count, one of the second
    tensor(0.5000)
    """
    joint = weights.unflatten(-1, (-1, own))
    above = joint.sum(-1)
    given = joint / above.clamp(min=torch.finfo(joint.dtype).tiny).unsqueeze(-1)
    ess = 1 / given.square().sum(-1).clamp(min=1 / own)
    return ((above * ess).sum(-1) / above.sum(-1) - 1) / max(own - 1, 1)
