"""Proposals as one flat vector of unconstrained numbers, and their log-densities as functions of it.

Locations stand as they are, scales as logs, parameters of other families through torch's map to their support.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import biject_to

from ppl import distributions
from ppl.errors import UnsupportedError
from ppl.inference.numerics import flat_gaussian as gaussians
from ppl.inference.numerics.expfam import FAMILIES
from ppl.inference.numerics.flat_gaussian import Piece
from ppl.inference.numerics.linalg import safe_cholesky
from ppl.inference.particles.blocks import Block, Member
from ppl.inference.particles.proposals import (
    Joint,
    Particles,
    Proposal,
    fixed_arguments,
    to_values,
)


@dataclass(frozen=True, eq=False)
class Argument:
    """One parameter of a member's family: its place in the vector, and its shape on the unconstrained scale."""

    name: str
    where: slice
    shape: tuple[int, ...]  # [*plates, *collapsed, *parameter]


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Where the parameters of one block lie."""

    block: Block
    piece: Piece | None  # of its joint Gaussian
    arguments: Mapping[str, tuple[Argument, ...]]  # member -> parameters of its family
    lead: tuple[int, ...]  # restarts, or nothing


def flatten(
    blocks: Sequence[Block], proposals: Mapping[str, Proposal], restarts: int
) -> tuple[tuple[Coordinates, ...], Tensor]:
    """Coordinates of all blocks, and the vector ``[R, P]`` of the proposals given.

    Raises:
        UnsupportedError: a block has a proposal that reads others, is tied, or is a table.
    """
    lead = (restarts,) if restarts else ()
    found: list[Coordinates] = []
    parts: list[Tensor] = []
    offset = 0
    for block in blocks:
        if block.enumerated:
            continue
        _check(block)
        state = proposals[block.axis]
        piece = None
        if state.joint is not None:
            piece, numbers = _flat_joint(block, state.joint, len(lead), offset)
            parts.append(numbers.reshape(max(restarts, 1), -1))
            offset += piece.size
        arguments: dict[str, tuple[Argument, ...]] = {}
        for member in block.members:
            if member.family is None:
                continue
            own: list[Argument] = []
            for name, raw in _raw_arguments(member, state.families[member.name]).items():
                shape = tuple(raw.shape[len(lead) :])
                own.append(Argument(name, slice(offset, offset + math.prod(shape)), shape))
                parts.append(raw.reshape(max(restarts, 1), -1))
                offset += math.prod(shape)
            arguments[member.name] = tuple(own)
        found.append(Coordinates(block, piece, arguments, lead))
    # Where all latents are enumerated there is nothing to move.
    empty = parts[0][:, :0] if parts else torch.zeros(max(restarts, 1), 0)
    return tuple(found), torch.cat([empty, *parts], -1)


def _check(block: Block) -> None:
    if block.form is not None or block.tied:
        raise UnsupportedError(
            f"{', '.join(block.names)}: rws moves Gaussians and families without parents; proposals that read other latents, are "
            "tied or are tables need method='qem'."
        )


def _flat_joint(block: Block, joint: Joint, lead: int, offset: int) -> tuple[Piece, Tensor]:
    plates = tuple(joint.mean.shape[lead:-1])
    family: Literal["full_rank", "mean_field"] = "full_rank" if joint.is_full else "mean_field"
    piece = Piece(block.axis, plates, block.dims, family, 0, offset)
    front = joint.mean.shape[:lead]
    if not joint.is_full:
        raws = [joint.mean, 0.5 * joint.cov.log()]
    else:
        factor = safe_cholesky(joint.cov)
        raws = [joint.mean, factor.diagonal(dim1=-2, dim2=-1).log(), factor.tril(-1)]
    return piece, torch.cat([r.reshape((*front, -1)) for r in raws], -1)


def _raw_arguments(member: Member, mean: tuple[Tensor, ...]) -> dict[str, Tensor]:
    family = FAMILIES[member.family or ""]
    standard = family.standard_from_mean(mean, **fixed_arguments(member))
    return {n: _support(family.name, n).inv(standard[n]) for n in family.params}


def _support(family: str, argument: str) -> Any:
    return biject_to(getattr(torch.distributions, family).arg_constraints[argument])


def proposal(at: Coordinates, theta: Tensor) -> Proposal:
    """The block's proposal at a vector ``[R, P]``."""
    joint = None
    if at.piece is not None:
        shape = (*at.lead, *at.piece.plates, at.piece.dims)
        views = gaussians.views(at.piece, theta)
        root = gaussians.roots(at.piece, views)
        if at.piece.family == "full_rank":
            cov = (root @ root.mT).reshape((*shape, at.piece.dims))
        else:
            cov = (2 * views.raw).exp().reshape(shape)
        joint = Joint(views.loc.reshape(shape), cov)
    families = {}
    for member in at.block.members:
        if member.family is not None:
            family = FAMILIES[member.family]
            standard = _standard(at, member, theta)
            families[member.name] = family.mean_from_standard(
                {**standard, **fixed_arguments(member)}
            )
    return Proposal(joint, families)


def _standard(at: Coordinates, member: Member, theta: Tensor) -> dict[str, Tensor]:
    """Parameters of a member's family, ``[*lead, *plates, *collapsed, *parameter]``."""
    return {
        a.name: _support(member.family or "", a.name)(
            theta[..., a.where].reshape((*at.lead, *a.shape))
        )
        for a in at.arguments[member.name]
    }


def log_density(at: Coordinates, theta: Tensor, particles: Particles) -> Tensor:
    """Log-density of fixed particles ``[*lead, *plates, K]``, differentiable in ``theta [R, P]``."""
    total: Tensor | float = 0.0
    if at.piece is not None and particles.free is not None:
        free = particles.free.detach()
        draws = free.reshape(theta.shape[0], 1, *free.shape[len(at.lead) :])
        density = gaussians.log_density(at.piece, gaussians.views(at.piece, theta), draws)
        total = density.reshape(free.shape[:-1]) - to_values(at.block, free)[1]
    for member in at.block.members:
        if member.family is not None:
            total = total + _family_density(at, member, theta, particles.values[member.name])
    assert isinstance(total, Tensor)
    return total


def _family_density(at: Coordinates, member: Member, theta: Tensor, value: Tensor) -> Tensor:
    family = FAMILIES[member.family or ""]
    front = len(at.lead) + len(at.block.plates)
    # The particle axis stands behind the plates, in front of collapsed plates and parameter.
    arguments = {n: t.unsqueeze(front) for n, t in _standard(at, member, theta).items()}
    fixed = {n: v for n, v in fixed_arguments(member).items() if n != "categories"}
    law = getattr(distributions, family.name)(**arguments, **fixed)
    density = law.log_prob(value.detach())
    return density.reshape((*density.shape[: front + 1], -1)).sum(-1)


def units(coordinates: Sequence[Coordinates], theta: Tensor) -> Tensor:
    """The change of each coordinate ``[R, P]`` that counts as one: a posterior sd, or one in logs."""
    out = torch.ones_like(theta)
    for at in coordinates:
        if at.piece is not None:
            where = slice(at.piece.offset, at.piece.offset + at.piece.size)
            out[..., where] = gaussians.unit(at.piece, theta)
    return out
