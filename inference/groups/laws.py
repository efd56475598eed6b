"""Laws as functions of rows: whitened residuals of Gaussians, arguments of any other density."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl import operations
from ppl.densities import is_foreign
from ppl.distributions import ConcentratedNormal, Distribution, Independent, Masked, Robust
from ppl.graph import Law
from ppl.inference.groups.expressions import Expression
from ppl.inference.groups.motions import Motion, differences, slopes
from ppl.inference.groups.whitening import GAUSSIAN, Whitener, difference, whitened, whitener
from ppl.shapes import broadcast_shapes

Params = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Peeled:
    """A law without its wrappers: what is left, its arguments, and what masks of the model keep."""

    family: Distribution
    arguments: tuple[Any, ...]
    keeps: tuple[Any, ...] = ()

    @property
    def gaussian(self) -> Distribution | None:
        """The Gaussian law inside, robust or not; None of other laws."""
        inner = self.family.dist if isinstance(self.family, Robust) else self.family
        return inner if type(inner) in GAUSSIAN else None


def peel(law: Law) -> Peeled:
    """Take ``Independent`` and ``Masked`` off a law: neither changes what one row says.

    >>> from ppl.distributions import Independent, Normal
    >>> import torch
    >>> law = Law(Independent(Normal(torch.zeros(2), 1.0), 1), (torch.zeros(2), 1.0))
    >>> type(peel(law).family).__name__
    'Normal'
    """
    family, arguments = law.family, law.arguments
    keeps: tuple[Any, ...] = ()
    while isinstance(family, (Independent, Masked)):
        if isinstance(family, Masked):
            keeps, arguments = (*keeps, arguments[-1]), arguments[:-1]
            family = family.dist
        else:
            family = family.base_distribution
    return Peeled(family, tuple(arguments), keeps)


@dataclass(frozen=True, eq=False)
class Residual:
    """Whitened residuals ``[F, m]`` of a Gaussian law."""

    family: Distribution
    ends: Expression  # value and loc
    spread: Expression
    name: str  # of the parameter that scales
    mask: Tensor | None  # [F, *batch, d] of a vector that is there in part
    rows: int
    fixed: Whitener | None = None
    block: int = 1  # residuals that are scaled together: the dimension of a vector, 1 of a Normal
    motion: Motion | None = None  # from loc to value, where both are products of group elements
    scale: str = ""  # the param that is itself the scale of a Normal

    def __call__(self, values: Sequence[Tensor], params: Params) -> Tensor:
        return self.outer(self.inner(values, params), params)

    @property
    def inner_params(self) -> tuple[str, ...]:
        """Params that :meth:`inner` reads; all others come in by :meth:`outer`."""
        return self.ends.params

    def inner(self, values: Sequence[Tensor], params: Params) -> Tensor:
        """Residuals before they are scaled ``[F, *batch]``, with ``[..., d]`` behind for vectors."""
        value, loc = self.ends(values, params)
        residual = difference(self.family, value, loc)
        return residual.expand(self.rows, *residual.shape[1:])

    def outer(self, residual: Tensor, params: Params) -> Tensor:
        """Outputs from residuals of :meth:`inner`."""
        return whitened(self.whitener(params), residual).reshape(self.rows, -1)

    def linear(self, values: Sequence[Tensor], params: Params) -> tuple[Tensor, list[Tensor]]:
        """Outputs ``[F, m]`` and their derivatives ``[F, m, d]`` by tangent vectors of each slot, in closed form."""
        assert self.motion is not None and isinstance(self.family, ConcentratedNormal)
        group, how = self.family.manifold, self.whitener(params)
        residual, tape = differences(group, self.motion, values, params)
        left = (
            how.factor.mT
            if how.is_matrix
            else torch.diag_embed(how.factor.expand(*how.factor.shape[:-1], group.dims))
        )
        found = slopes(self.motion, tape, residual, left)
        shape = (self.rows, group.dims, group.dims)
        parts = [
            found[s].expand(shape) if s in found else residual.new_zeros(shape)
            for s in range(len(values))
        ]
        return whitened(how, residual).expand(self.rows, group.dims), parts

    def whitener(self, params: Params) -> Whitener:
        """What scales the residuals; the same for good unless it is learned."""
        if self.fixed is not None:
            return self.fixed
        return whitener(self.family, self.name, self.spread([], params)[0], self.mask)

    def log_norm(self, batch: tuple[int, ...], keep: Tensor | None, params: Params) -> Tensor:
        """Log-density of every row at zero residual ``[F]``; ``keep [F, *batch]`` counts entries."""
        each = self.whitener(params).log_norm.expand(self.rows, *batch)
        if keep is not None:
            each = torch.where(keep != 0, each, 0.0)
        return each.reshape(self.rows, -1).sum(-1)


@dataclass(frozen=True, eq=False)
class Arguments:
    """What a density depends on through latents, ``[F, e * b]``: block by block, its value and parameters."""

    expression: Expression
    batch: tuple[int, ...]
    events: tuple[tuple[int, ...], ...]  # event shape of each part within a block
    rows: int

    @property
    def block(self) -> int:
        """Number of outputs ``b`` of a block."""
        return sum(math.prod(e) for e in self.events)

    def __call__(self, values: Sequence[Tensor], params: Params) -> Tensor:
        parts = [
            x.expand(self.rows, *self.batch, *event).reshape(self.rows, -1, math.prod(event))
            for x, event in zip(self.expression(values, params), self.events, strict=True)
        ]
        return torch.cat(parts, -1).reshape(self.rows, -1)

    @property
    def inner_params(self) -> tuple[str, ...]:
        """Params that the arguments read; all others are in the density."""
        return self.expression.params

    def inner(self, values: Sequence[Tensor], params: Params) -> Tensor:
        """The arguments."""
        return self(values, params)

    def outer(self, outputs: Tensor, params: Params) -> Tensor:
        """The arguments again."""
        return outputs

    def split(self, blocks: Tensor) -> list[Tensor]:
        """``u [F, e, b]`` back as the parts ``[F, *batch, *event]``."""
        sizes = [math.prod(e) for e in self.events]
        return [
            part.reshape(self.rows, *self.batch, *event)
            for part, event in zip(blocks.split(sizes, -1), self.events, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Density:
    """``log p`` of every block ``[F, e]`` as a function of :class:`Arguments`."""

    family: Distribution
    arguments: Arguments
    varying: tuple[int, ...]  # which of (value, *leaves) depend on those arguments
    links: Expression  # how they do
    constants: Expression  # the others, in order

    def __call__(self, blocks: Tensor, params: Params) -> Tensor:
        rows, batch = self.arguments.rows, self.arguments.batch
        parts = [x.unsqueeze(1) for x in self.arguments.split(blocks)]
        found: dict[int, Tensor] = dict(zip(self.varying, self.links(parts, params), strict=True))
        rest = iter(self.constants([], params))
        value, *leaves = [
            found[i] if i in found else next(rest) for i in range(len(self.family.leaves()) + 1)
        ]
        density = _log_prob(self.family, 1 + len(batch), value, leaves)
        return density.expand(rows, *batch).reshape(rows, -1)


@dataclass(frozen=True, eq=False)
class Values:
    """The values of all slots, flattened ``[F, D]``: the arguments of a free log-density."""

    rows: int

    def __call__(self, values: Sequence[Tensor], params: Params) -> Tensor:
        return torch.cat([v.reshape(self.rows, -1) for v in values], -1)


@dataclass(frozen=True, eq=False)
class Free:
    """A log-density without a law ``[F, 1]``, its event summed."""

    expression: Expression
    shapes: tuple[tuple[int, ...], ...]  # of each slot's values, without the rows

    def __call__(self, blocks: Tensor, params: Params) -> Tensor:
        flat = blocks.squeeze(1).split([math.prod(s) for s in self.shapes], -1)
        values = [x.reshape(len(x), *s) for x, s in zip(flat, self.shapes, strict=True)]
        (density,) = self.expression(values, params)
        return (
            density.expand(len(blocks), *density.shape[1:])
            .reshape(len(blocks), -1)
            .sum(-1, keepdim=True)
        )


def _log_prob(family: Distribution, lead: int, value: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    def evaluate(value: Tensor, *leaves: Tensor) -> Tensor:
        return family.replace(leaves).log_prob(value)

    if not is_foreign(family):
        return evaluate(value, *leaves)
    operands = (value, *leaves)  # a law that is right for one element's shapes only
    full = broadcast_shapes(*(x.shape[:lead] for x in operands))
    spread = [x.expand(*full, *x.shape[lead:]) for x in operands]
    has: list[Sequence[bool]] = [[True] * len(operands)] * lead
    run: Callable[..., Tensor] = operations.mapped(evaluate, has)
    return run(*spread)


__all__ = ["Arguments", "Density", "Free", "Peeled", "Residual", "Values", "peel"]
