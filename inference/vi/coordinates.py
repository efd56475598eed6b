"""Which coordinates of which Gaussian make up each latent, and the way from coordinates to values.

Plain variational inference has one group of all latents, the massively parallel one a group for each block. The
Gaussian is over whitened coordinates ``v``; ``centre + unit v`` lies on the unconstrained scale, and each latent's
transform takes it from there to its support.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions.transforms import Transform

from ppl.binding import Bound
from ppl.errors import UnsupportedError
from ppl.graph import Variable
from ppl.inference.numerics.flat_gaussian import Piece
from ppl.inference.particles.blocks import Block, is_enumerable, transform_of
from ppl.inference.particles.start import prior_draws, robust_moments
from ppl.inference.vi.options import VI
from ppl.streams import Streams

ALL, LOCAL = "all", "local"  # names of groups: all latents, and those of the elements of a batch


@dataclass(frozen=True, eq=False)
class Part:
    """A latent in a group."""

    variable: Variable
    transform: Transform | None  # unconstrained -> support; None where it is the identity
    inner: tuple[str, ...]  # plates whose elements are coordinates of one Gaussian
    sizes: tuple[int, ...]  # of these
    free_shape: tuple[int, ...]  # event on the unconstrained scale
    start: int  # first coordinate

    @property
    def stop(self) -> int:
        """One past the last coordinate."""
        return self.start + math.prod(self.sizes) * math.prod(self.free_shape)


@dataclass(frozen=True, eq=False)
class Group:
    """Latents that one Gaussian proposes, for every element of ``plates``."""

    piece: Piece
    plates: tuple[str, ...]
    parts: tuple[Part, ...]


class Origin(NamedTuple):
    """Where coordinates of a group are zero, and what one is: ``[*plates, D]`` on the unconstrained scale."""

    centre: Tensor
    unit: Tensor


def joint_groups(bound: Bound, options: VI, plate: str | None = None) -> tuple[Group, ...]:
    """One group of all continuous latents, none where there is none; those within ``plate`` apart, independent.

    Args:
        bound: the graph and its data.
        options: for the family.
        plate: whose elements are worked on in batches.
    """
    latents: tuple[list[Variable], list[Variable]] = ([], [])
    for v in bound.graph.latents:
        if is_enumerable(v, options.enumerate_up_to):
            continue
        if v.is_discrete:
            raise UnsupportedError(
                f"'{v.name}': a discrete latent without a small set of values has no gradient. Use method='qem' or 'rws'."
            )
        latents[plate in bound.graph.closure(v.plates)].append(v)
    groups: list[Group] = []
    for name, members in zip((ALL, LOCAL), latents, strict=True):
        if members:
            offset = sum(g.piece.size for g in groups)
            own = replace(options, family="mean_field") if name == LOCAL else options
            groups.append(_joint(bound, members, own, name, offset))
    return tuple(groups)


def _joint(bound: Bound, members: Sequence[Variable], options: VI, name: str, offset: int) -> Group:
    parts: list[Part] = []
    for v in members:
        transform = transform_of(v)
        sizes = tuple(bound.size(p) for p in v.plates)
        start = parts[-1].stop if parts else 0
        parts.append(Part(v, transform, v.plates, sizes, free_shape(v, transform), start))
    group = _group(name, (), (), parts, options)
    return replace(group, piece=replace(group.piece, offset=offset))


def block_groups(bound: Bound, blocks: Sequence[Block], options: VI) -> tuple[Group, ...]:
    """A group for every block that is not enumerated."""
    groups: list[Group] = []
    for block in blocks:
        if block.enumerated:
            continue
        parts: list[Part] = []
        for m in block.members:
            if m.family is not None:
                raise UnsupportedError(
                    f"'{m.name}': a latent that is sampled from {m.family} has no gradient here. Use method='rws' or 'qem'."
                )
            start = parts[-1].stop if parts else 0
            parts.append(Part(m.variable, m.transform, m.collapsed, m.sizes, m.free_shape, start))
        sizes = tuple(bound.size(p) for p in block.plates)
        group = _group(block.axis, block.plates, sizes, parts, options)
        offset = groups[-1].piece.offset + groups[-1].piece.size if groups else 0
        groups.append(replace(group, piece=replace(group.piece, offset=offset)))
    return tuple(groups)


def _group(
    name: str, plates: tuple[str, ...], sizes: tuple[int, ...], parts: list[Part], options: VI
) -> Group:
    dims = parts[-1].stop
    family = options.family if dims > 1 else "mean_field"
    if family == "low_rank" and options.rank >= dims:
        family = "full_rank"  # the same family, and cheaper
    piece = Piece(name, sizes, dims, family, options.rank, 0)
    return Group(piece, plates, tuple(parts))


def free_shape(v: Variable, transform: Transform | None) -> tuple[int, ...]:
    """Event shape of a latent on the unconstrained scale."""
    shape = torch.Size(v.event_shape)
    return tuple(shape) if transform is None else tuple(transform.inverse_shape(shape))


def to_values(group: Group, u: Tensor) -> tuple[dict[str, Tensor], Tensor | float]:
    """Latents ``[*lead, *inner, *event]`` at ``u [*lead, D]``, and the log-Jacobian ``[*lead]``."""
    values: dict[str, Tensor] = {}
    total: Tensor | float = 0.0
    for part in group.parts:
        free = u[..., part.start : part.stop]
        free = free.reshape(*u.shape[:-1], *part.sizes, *part.free_shape)
        value = free if part.transform is None else part.transform(free)
        values[part.variable.name] = value
        if part.transform is not None:
            log = part.transform.log_abs_det_jacobian(free, value)
            total = total + log.reshape(*u.shape[:-1], -1).sum(-1)
    return values, total


def in_variable_order(group: Group, part: Part, value: Tensor) -> Tensor:
    """``[n, *plates of the latent, *event]`` from ``[*plates of the group, n, *inner, *event]``."""
    lead = len(group.plates)
    have = (*group.plates, *part.inner)
    value = value.movedim(lead, 0)
    order = [1 + have.index(p) for p in part.variable.plates]
    return value.permute(0, *order, *range(1 + len(have), value.ndim))


def origins(
    bound: Bound, groups: Sequence[Group], options: VI, streams: Streams
) -> dict[str, Origin]:
    """Origin and units of every group: medians and spreads of the prior, or zero and one."""
    draws = prior_draws(bound, streams.child("start")) if options.start == "prior" else {}
    return {g.piece.name: _origin(bound, g, draws) for g in groups}


def _origin(bound: Bound, group: Group, draws: Mapping[str, Tensor]) -> Origin:
    shape = (*group.piece.plates, group.piece.dims)
    zero = torch.zeros(shape, dtype=bound.dtype, device=bound.device)
    if not draws:
        return Origin(zero, torch.ones_like(zero))
    laid = []
    for part in group.parts:
        draw = draws[part.variable.name]
        plates = part.variable.plates
        order = [1 + plates.index(p) for p in (*group.plates, *part.inner)]
        draw = draw.permute(0, *order, *range(1 + len(plates), draw.ndim))
        free = draw if part.transform is None else part.transform.inv(draw)
        laid.append(free.reshape(len(free), *group.piece.plates, -1))
    centre, unit = robust_moments(torch.cat(laid, -1))
    return Origin(centre.expand(shape), unit.expand(shape))
