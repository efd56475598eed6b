"""Particles of the blocks that a proposal is given: which of them a child's particle uses, and their values there.

An index map is drawn for every element of the *child's* plates. One map for the whole plate makes the evidence biased where a
block has two parents, or where maps are categorical; [Heap2025] shares them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl.inference.particles import nested
from ppl.inference.particles.blocks import Block, Member, transform_of
from ppl.inference.particles.proposals import Particles
from ppl.inference.particles.weighting import Weighting, values_of
from ppl.streams import Streams


@dataclass(frozen=True, eq=False)
class Others:
    """What has been drawn before a block: particles, values of enumerated latents, params."""

    weighting: Weighting
    drawn: Mapping[str, Particles]  # particle axis -> particles
    arrays: Mapping[str, Tensor]  # inputs of lowered laws

    def parents(self, block: Block) -> list[Block]:
        """The blocks that ``block`` is given, in the order of the model."""
        return parent_blocks(self.weighting.blocks, block)

    def count(self, block: Block) -> int:
        """Particles of a block, or values of an enumerated one."""
        return self.weighting.sizes[block.axis]

    def free(self, child: Block, parent: Block) -> Tensor:
        """The latents of ``parent`` that ``child`` reads, unconstrained: ``[*restart, *plates of the child, K, D]``.

        Plates along which they do not vary have size one.
        """
        parts = [self._free_member(parent, m) for m in read_members(child, parent)]
        return self.at_child(child, parent, torch.cat(parts, -1))

    def codes(self, child: Block, parent: Block) -> Tensor:
        """Values of the one discrete latent of ``parent`` that ``child`` reads: ``[*restart, *plates of the child, K]``."""
        if parent.enumerated:
            values = torch.arange(values_of(parent), device=self.weighting.bound.device)
            return values.reshape((1,) * len(self.weighting.block_shape(child)) + (-1,))
        (member,) = read_members(child, parent)
        return self.at_child(child, parent, self.drawn[parent.axis].values[member.name].long())

    def at_child(self, child: Block, parent: Block, array: Tensor) -> Tensor:
        """An array ``[*restart, *plates of the parent, ...]`` with the plates of the child instead."""
        plates = self.weighting.bound.graph.maximal(frozenset(parent.plates))
        return at_plates(self.weighting, array, plates, child.plates)

    def maps(self, child: Block, parents: Sequence[Block], k: int, streams: Streams) -> Tensor:
        """Which combination of parent particles each particle uses: ``[*restart, *plates, k]``, row-major."""
        shape = self.weighting.block_shape(child)
        chosen = torch.zeros((*shape, k), dtype=torch.long, device=self.weighting.bound.device)
        for parent in parents:
            generator = streams.of(f"{child.axis} given {parent.axis}")
            index = draw_index(shape, k, self.count(parent), child.index, generator)
            chosen = chosen * self.count(parent) + index
        return chosen

    def _free_member(self, parent: Block, member: Member) -> Tensor:
        particles = self.drawn[parent.axis]
        if member in parent.gaussian and particles.free is not None:
            at = sum(m.dims for m in parent.gaussian[: parent.gaussian.index(member)])
            return particles.free[..., at : at + member.dims]
        transform = transform_of(member.variable)
        value = particles.values[member.name]
        free = value if transform is None else transform.inv(value)
        lead = len(self.weighting.block_shape(parent)) + 1
        return free.reshape(*free.shape[:lead], -1)


def parent_blocks(blocks: Sequence[Block], block: Block) -> list[Block]:
    """The blocks whose latents the proposal of ``block`` reads."""
    return [b for b in blocks if set(b.names) & set(block.reads)]


def read_members(child: Block, parent: Block) -> list[Member]:
    """The members of ``parent`` that the proposal of ``child`` reads."""
    return [m for m in parent.members if m.name in child.reads]


def free_dims(member: Member) -> int:
    """Unconstrained scalars of one particle of a latent, also where its proposal is a family of its own."""
    transform = transform_of(member.variable)
    shape = torch.Size(member.variable.event_shape)
    inner = shape if transform is None else transform.inverse_shape(shape)
    return torch.Size((*member.sizes, *inner)).numel()


def at_plates(
    weighting: Weighting, array: Tensor, have: Sequence[str], want: Sequence[str]
) -> Tensor:
    """Bring ``[*restart, *have, ...]`` to ``[*restart, *want, ...]``; a plate without influence gets size one.

    Every plate of ``have`` is one of ``want`` or an ancestor of one.
    """
    if tuple(have) == tuple(want):
        return array
    bound, lead = weighting.bound, len(weighting.lead)
    if not have:
        return array.reshape(*array.shape[:lead], *(1,) * len(want), *array.shape[lead:])
    index: list[Tensor] = []
    for plate in have:
        holder = next(w for w in want if w == plate or plate in bound.graph.ancestors(w))
        rows = (
            torch.arange(bound.size(plate), device=array.device)
            if holder == plate
            else bound.maps[holder, plate]
        )
        at = len(want) - 1 - list(want).index(holder)
        index.append(rows.reshape(-1, *(1,) * at))
    every: list[Any] = [slice(None)] * lead
    picked = array[(*every, *index)]
    missing = len(want) - max(i.ndim for i in index)  # leading plates that nothing varies over
    return picked.reshape(*array.shape[:lead], *(1,) * missing, *picked.shape[lead:])


def flat_index(
    weighting: Weighting, block: Block, indices: Mapping[str, Tensor], own: Tensor
) -> Tensor:
    """Which of a block's particles an index ``own [n, *plates]`` means: of a nested one, with that of its parents in front.

    ``indices`` are those of all blocks, ``[n, *plates in the order of the graph]``.
    """
    parent = nested.parent_of(weighting.blocks, block)
    if parent is None:
        return own
    have = [p for p in weighting.bound.graph.plates if p in parent.plates]
    above = at_plates(weighting, indices[parent.axis].movedim(0, -1), have, block.plates)
    return above.movedim(-1, 0) * weighting.sizes[block.axis] + own


def draw_index(
    shape: tuple[int, ...], k: int, parents: int, kind: str, generator: torch.Generator
) -> Tensor:
    """For ``k`` particles of every element the parent's particle that each uses, ``[*shape, k]``.

    Each index is uniform over the ``parents``; of a permutation no parent is used again before all others have been, as far as
    ``k`` is a multiple of their number.

    >>> draw_index((), 4, 4, "permutation", torch.Generator().manual_seed(0)).sort().values
    tensor([0, 1, 2, 3])
    """
    if kind == "categorical":
        return torch.randint(parents, (*shape, k), generator=generator, device=generator.device)
    copies = -(-k // parents)
    keys = torch.rand((*shape, copies * parents), generator=generator, device=generator.device)
    return keys.argsort(-1)[..., :k] % parents
