"""Some elements of a plate at a time: an approximation narrowed to them, and particles drawn part by part.

A plate of a million elements times particles times event does not fit into memory at once. Particles of blocks in such a
plate are never stored: they are drawn when a part of the plate is weighed, from a stream that belongs to the part, and
drawn again when their moments are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ppl.batches import check_divisible, rows_within
from ppl.binding import Bound, put, take
from ppl.errors import UnsupportedError
from ppl.inference.particles.approximation import Approximation, Learned
from ppl.inference.particles.blocks import Block
from ppl.inference.particles.proposals import Particles, Proposal
from ppl.inference.particles.weighting import Weighting
from ppl.streams import Streams

Rows = Mapping[str, Tensor]
DrawAll = Callable[[Weighting, Approximation, Streams, float], dict[str, Particles]]


def lies_within(bound: Bound, plates: tuple[str, ...], plate: str) -> bool:
    """Whether something in ``plates`` is repeated over ``plate``."""
    return plate in bound.graph.closure(plates)


def narrowed(weighting: Weighting, q: Approximation, rows: Rows) -> Approximation:
    """The approximation of some elements of a plate; views where they are consecutive."""
    lead = ("",) * len(weighting.lead)
    proposals = {
        b.axis: _over_leaves(
            lambda t, b=b: take(t, _axes(weighting, b, t), rows), q.proposals[b.axis]
        )
        for b in weighting.blocks
        if b.axis in q.proposals
    }
    params = {}
    for name, learned in q.params.items():
        plates = (*lead, *weighting.bound.graph.variables[name].plates)
        params[name] = Learned(*(take(t, plates, rows) for t in learned))
    return Approximation(proposals, params)


def scatter(weighting: Weighting, whole: Proposal, part: Proposal, block: Block, rows: Rows) -> Any:
    """Write the proposals of some elements into those of all, in place; what no plate in ``rows`` indexes is replaced."""

    def write(t: Tensor, new: Tensor) -> Tensor:
        axes = _axes(weighting, block, t)
        if not set(axes) & set(rows):
            return new
        put(t, axes, rows, new)
        return t

    return _over_leaves(write, whole, part)


def joined_over(
    weighting: Weighting,
    proposal: Proposal,
    block: Block,
    plate: str,
    join: Callable[[Tensor, int], Tensor],
) -> Any:
    """A proposal with every tensor that varies over ``plate`` or a plate within it joined along that axis."""
    graph = weighting.bound.graph
    inside = {p for p in graph.plates if plate in graph.closure((p,))}

    def grow(t: Tensor) -> Tensor:
        for dim, axis in enumerate(_axes(weighting, block, t)):
            if axis in inside:
                t = join(t, dim)
        return t

    return _over_leaves(grow, proposal)


def _axes(weighting: Weighting, block: Block, leaf: Tensor) -> tuple[str, ...]:
    """Names of the leading axes of a tensor of a proposal; tied plates have one element, or none."""
    lead = len(weighting.lead)
    sizes = leaf.shape[lead : lead + len(block.plates)]
    names = [
        p if p not in block.tied and n == weighting.bound.size(p) else ""
        for p, n in zip(block.plates, sizes, strict=False)
    ]
    return (*("",) * lead, *names)


def _over_leaves(f: Callable[..., Any], *trees: Any) -> Any:
    return tree_map(lambda *t: f(*t) if isinstance(t[0], Tensor) else t[0], *trees)


def inner_blocks(weighting: Weighting) -> tuple[Block, ...]:
    """The sampled blocks in the plate that the plan splits."""
    plate = weighting.plan.split
    return tuple(
        b
        for b in weighting.blocks
        if plate and not b.enumerated and lies_within(weighting.bound, b.plates, plate)
    )


class PartStreams(Streams):
    """Streams of one part: the same for the blocks outside the plate in every part, own ones for those inside."""

    def __init__(self, outer: Streams, inner: Streams, names: frozenset[str]) -> None:
        super().__init__(outer.seed, outer.device)
        self._outer, self._inner, self._names = outer, inner, names

    def of(self, name: str) -> torch.Generator:
        """The generator of a block or latent."""
        return (self._inner if name in self._names else self._outer).of(name)


class PartDraws(Mapping[str, Particles]):
    """Particles of a weighting whose plate is processed in parts, drawn when they are needed.

    As a mapping it has the blocks outside the plate; ``of_part`` gives all blocks of one part. The same rows always give
    the same particles.

    Args:
        weighting: whose plan is split.
        q: proposals of all elements.
        streams: random streams; every set of draws takes one number from them.
        tails: of the joint proposals.
        draw_all: draws all blocks of a weighting.
        first: number of the first part, where other processes hold the parts before.
    """

    def __init__(
        self,
        weighting: Weighting,
        q: Approximation,
        streams: Streams,
        tails: float,
        draw_all: DrawAll,
        first: int = 0,
    ) -> None:
        assert weighting.plan.split is not None
        self.weighting, self.plate, self.parts = (
            weighting,
            weighting.plan.split,
            weighting.plan.parts,
        )
        self._q, self._tails, self._draw_all, self._first = q, tails, draw_all, first
        generator = streams.of("parts of " + self.plate)
        token = torch.randint(2**31, (), generator=generator, device=generator.device)
        self._streams = streams.child(f"parts {int(token)}")
        self.inner = inner_blocks(weighting)
        self._number = {int(rows[self.plate][0]): i for i, rows in enumerate(self.parts)}
        self._last: tuple[int, dict[str, Particles]] = -1, {}
        inside = {b.axis for b in self.inner}
        self._outer = {
            axis: p for axis, p in self.of_part(self.parts[0]).items() if axis not in inside
        }

    def __getitem__(self, axis: str) -> Particles:
        return self._outer[axis]

    def __iter__(self) -> Any:
        return iter(self._outer)

    def __len__(self) -> int:
        return len(self._outer)

    def of_part(self, rows: Rows) -> dict[str, Particles]:
        """Particles of all blocks at the elements of one part."""
        number = self._number[int(rows[self.plate][0])]
        if self._last[0] != number:
            self._last = -1, {}  # let go of the part before
            names = frozenset(n for b in self.inner for n in (b.axis, *b.names))
            outer = self._streams.child("outside")
            inner = self._streams.child(f"part {self._first + number}")
            drawn = self._draw_all(
                part_of(self.weighting, rows),
                narrowed(self.weighting, self._q, rows),
                PartStreams(outer, inner, names),
                self._tails,
            )
            self._last = number, drawn
        return self._last[1]

    def release(self) -> None:
        """Forget the particles of the last part; they are drawn again when asked for."""
        self._last = -1, {}


def part_of(weighting: Weighting, rows: Rows) -> Weighting:
    """The weighting with the data of one part, for drawing; its plan stays that of the whole."""
    return replace(weighting, bound=weighting.bound.narrowed(rows))


def average_in_parts(
    draws: PartDraws,
    q: Approximation,
    weights: Mapping[str, Tensor],
    update: Callable[[Block, Proposal, Particles, Tensor], Proposal],
) -> dict[str, Proposal]:
    """Average moments into every proposal, one part of the plate after the other.

    Args:
        draws: particles.
        q: before.
        weights: particle axis -> ``[*restart, *plates, K]``.
        update: the average of one block.
    """
    weighting = draws.weighting
    inside = {b.axis for b in draws.inner}
    new: dict[str, Proposal] = {
        b.axis: update(b, q.proposals[b.axis], draws[b.axis], weights[b.axis])
        for b in weighting.blocks
        if b.axis in q.proposals and b.axis not in inside
    }
    sampled = [b for b in draws.inner if b.axis in q.proposals]
    for b in sampled:
        new[b.axis] = _over_leaves(torch.empty_like, q.proposals[b.axis])
    for rows in draws.parts:
        particles, before = draws.of_part(rows), narrowed(weighting, q, rows).proposals
        for b in sampled:
            w = take(weights[b.axis], _weight_axes(weighting, b), rows)
            after = update(b, before[b.axis], particles[b.axis], w)
            new[b.axis] = scatter(weighting, new[b.axis], after, b, rows)
    draws.release()
    return {b.axis: new[b.axis] for b in weighting.blocks if b.axis in new}


def _weight_axes(weighting: Weighting, block: Block) -> tuple[str, ...]:
    """Axes of a block's weights: plates in the order of the graph."""
    own = [p for p in weighting.bound.graph.plates if p in block.plates]
    return (*("",) * len(weighting.lead), *own)


def large_plate(bound: Bound, blocks: tuple[Block, ...], draws: int, room: int) -> str | None:
    """The plate to draw from the prior in parts, where ``draws`` of all latents take more than ``room`` bytes."""
    graph, best = bound.graph, ("", 0)
    for plate in graph.plates:
        inside = [b for b in blocks if lies_within(bound, b.plates, plate)]
        size = sum(m.dims * _elements(bound, b) for b in inside for m in b.members)
        if size > best[1] and not any(m.start is not None for b in inside for m in b.members):
            try:
                check_divisible(bound, plate, "start")
            except UnsupportedError:
                continue
            best = plate, size
    itemsize = torch.empty((), dtype=bound.dtype).element_size()
    return best[0] if best[1] * draws * itemsize > room else None


def _elements(bound: Bound, block: Block) -> int:
    return torch.Size(bound.size(p) for p in block.plates).numel()


def stand_in(bound: Bound, plate: str) -> list[Rows]:
    """One element of a plate that tells the start of all, where no law in the plate reads a covariate; else nothing."""
    graph = bound.graph
    latents = [v for v in graph.latents if lies_within(bound, v.plates, plate)]
    read = {graph.variables[n] for v in latents for n in graph.factors[v.name].scope}
    if any(v.role != "latent" and lies_within(bound, v.plates, plate) for v in read):
        return []
    for first in range(min(bound.size(plate), 100)):
        rows = rows_within(bound, plate, torch.tensor([first]))
        if all(len(r) for r in rows.values()):
            return [rows]
    return []


def start_parts(bound: Bound, plate: str, room: int, draws: int) -> list[Rows]:
    """All elements in parts, small enough for their prior draws to take less than ``room`` bytes."""
    latents = [v for v in bound.graph.latents if lies_within(bound, v.plates, plate)]
    size, itemsize = bound.size(plate), torch.empty((), dtype=bound.dtype).element_size()
    total = sum(torch.Size(bound.shape(v)).numel() for v in latents) * itemsize * draws
    count = min(size, -(-total // room))
    ends = [i * size // count for i in range(count + 1)]
    return [
        rows_within(bound, plate, torch.arange(a, b)) for a, b in zip(ends, ends[1:], strict=False)
    ]


def joined(
    weighting: Weighting, parts: Sequence[Rows], make: Callable[[Weighting], Approximation]
) -> Approximation:
    """An approximation made part by part; one part alone stands for all elements."""
    whole: Approximation | None = None
    for rows in parts:
        made = make(part_of(weighting, rows))
        if whole is None:
            whole = _enlarged(weighting, made, rows, repeat=len(parts) == 1)
        else:
            for b in weighting.blocks:
                if b.axis in made.proposals and set(rows) & weighting.bound.graph.closure(b.plates):
                    scatter(weighting, whole.proposals[b.axis], made.proposals[b.axis], b, rows)
    assert whole is not None
    return whole


def _enlarged(
    weighting: Weighting, made: Approximation, rows: Rows, *, repeat: bool
) -> Approximation:
    """The approximation of all elements with those of one part filled in, or repeated."""
    lead = len(weighting.lead)
    proposals = {}
    for b in weighting.blocks:
        if b.axis not in made.proposals:
            continue
        plates = {lead + i: p for i, p in enumerate(b.plates) if p in rows and p not in b.tied}

        def grow(t: Tensor, plates: dict[int, str] = plates) -> Tensor:
            shape, first = list(t.shape), t
            for dim, p in plates.items():
                if shape[dim] == len(rows[p]):
                    shape[dim], first = weighting.bound.size(p), first.narrow(dim, 0, 1)
            new = t.new_empty(shape) if not repeat else first.expand(shape).clone()
            if not repeat:
                axes = [plates.get(d, "") for d in range(t.ndim)]
                put(new, axes, rows, t)
            return new

        proposals[b.axis] = (
            _over_leaves(grow, made.proposals[b.axis]) if plates else made.proposals[b.axis]
        )
    return Approximation(proposals, made.params)
