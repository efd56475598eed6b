"""The normal equations ``J'J x = -J'r`` of factor groups: their pattern once, their values at every linearisation.

``J'J`` is kept by blocks, one for each pair of elements that share a factor: rows add small dense blocks to them by
``index_add``, and where all rows touch the same elements a matrix product sums the rows first. Memory is one index a row
and pair of its elements, and one number an entry of ``J'J``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import scipy.sparse as sp
import torch
from torch import Tensor

from ppl.inference.groups.coordinates import Coordinates
from ppl.inference.groups.linearise import linearise, output_jacobian
from ppl.inference.groups.losses import Matching
from ppl.inference.groups.pattern import Pairing, Pairs, Wiring, find_pairs, make_wiring
from ppl.inference.groups.records import FactorGroups, Group, Linearised, Slot
from ppl.inference.numerics.ordering import Ordering, order_blocks
from ppl.inference.numerics.sparse import Factor, Solver, factorise_ordered

Params = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Equations:
    """The normal equations of a model. Their pattern is worked out on first use.

    Flat vectors are ordered as :class:`~ppl.inference.groups.coordinates.Coordinates` says.

    >>> import ppl
    >>> from ppl.inference.groups.build import build
    >>> @ppl.model
    ... def line():
    ...     base = ppl.latent("base", ppl.Normal(0.0, 1.0))
    ...     with ppl.plate("point"):
    ...         ppl.observe("y", ppl.Normal(base, 1.0))
    >>> equations = Equations(build(line.bind({"y": [1.0, 2.0]})))
    >>> rows = equations.linearise(equations.groups.start(), {})
    >>> factor = equations.factorise(equations.curvature(rows))
    >>> factor.solve(-equations.gradient(rows).numpy()).tolist()
    [1.0]
    >>> equations.covariance(factor, "base").squeeze()
    tensor(0.3333, dtype=torch.float64)
    """

    groups: FactorGroups
    jacobians: dict[str, Tensor] = field(
        default_factory=dict, repr=False
    )  # those that never change

    @cached_property
    def at(self) -> Coordinates:
        """Where each family stands in flat vectors."""
        return Coordinates(self.groups)

    # ---- rows ------------------------------------------------------------------------------------

    def linearise(
        self,
        points: Mapping[str, Tensor],
        params: Params,
        *,
        matching: Matching = "gradient",
        kernel_scale: float = 1.0,
    ) -> list[Linearised]:
        """Every group near the points."""
        made = []
        for group in self.groups.groups:
            values = group.gather(points)
            if group.is_affine and not group.params and group.name not in self.jacobians:
                self.jacobians[group.name] = output_jacobian(group, values, params)
            known = self.jacobians.get(group.name, True)
            made.append(
                linearise(
                    group,
                    values,
                    params,
                    jacobian=known,
                    matching=matching,
                    kernel_scale=kernel_scale,
                )
            )
        return made

    def gradient(self, rows: Sequence[Linearised]) -> Tensor:
        """``J'r`` ``[n]``."""
        return self.pullback(rows, [row.residual.unsqueeze(-1) for row in rows]).squeeze(-1)

    def pushforward(self, rows: Sequence[Linearised], vectors: Tensor) -> list[Tensor]:
        """``J @ vectors``: ``[F, m, k]`` by group, for flat vectors ``[n, k]``."""
        parts, out = self.at.split(vectors), []
        for group, row in zip(self.groups.groups, rows, strict=True):
            total = row.residual.new_zeros(*row.residual.shape, vectors.shape[1])
            for slot, part in zip(group.slots, _split(group, row), strict=True):
                total = total + _pushed(slot, part, parts[slot.family])
            out.append(total)
        return out

    def pullback(self, rows: Sequence[Linearised], weights: Sequence[Tensor]) -> Tensor:
        """``J' weights`` ``[n, k]``, for weights ``[F, m, k]`` by group."""
        k = weights[0].shape[2] if weights else 1
        total = {
            f.name: self.groups.like.new_zeros(f.count, f.dims, k)
            for f in self.groups.families.values()
        }
        for group, row, weight in zip(self.groups.groups, rows, weights, strict=True):
            for slot, part in zip(group.slots, _split(group, row), strict=True):
                _add_pulled(total[slot.family], slot, part, weight)
        return self.at.joined(total)

    def diagonal_blocks(self, rows: Sequence[Linearised]) -> dict[str, Tensor]:
        """Blocks of ``J'J`` on its diagonal, by family ``[N, d, d]``, without the matrix."""
        blocks = {
            f.name: self.groups.like.new_zeros(f.count, f.dims, f.dims)
            for f in self.groups.families.values()
        }
        for group, row in zip(self.groups.groups, rows, strict=True):
            for slot, part in zip(group.slots, _split(group, row), strict=True):
                _add_squares(blocks[slot.family], slot, part)
        return blocks

    # ---- the matrix ------------------------------------------------------------------------------

    @cached_property
    def pairs(self) -> Pairs:
        """Pairs of elements that share a factor."""
        return find_pairs(self.at)

    @cached_property
    def ordering(self) -> Ordering:
        """Order of elimination of the elements."""
        return order_blocks(self.pairs.first, self.pairs.second, self.at.dims)

    @cached_property
    def wiring(self) -> Wiring:
        """Compressed columns of the matrix."""
        return make_wiring(self.pairs, self.at.dims, self.ordering)

    def curvature(self, rows: Sequence[Linearised]) -> Tensor:
        """``J'J`` by blocks of pairs of elements, flat."""
        dims = {name: f.dims for name, f in self.groups.families.items()}
        tables = {
            key: self.groups.like.new_zeros(count + 1, dims[key[0]] * dims[key[1]])
            for key, count in self.pairs.counts.items()
        }
        parts = [_split(g, row) for g, row in zip(self.groups.groups, rows, strict=True)]
        for pairing in self.pairs.pairings:
            s, t = pairing.slots
            _add_products(
                tables[pairing.table], pairing, parts[pairing.group][s], parts[pairing.group][t]
            )
        return torch.cat([t[:-1].reshape(-1) for t in tables.values()])

    def matrix(self, curvature: Tensor, lift: Tensor | None = None) -> sp.csc_matrix:
        """``J'J + diag(lift)`` in the order of elimination, for :func:`factorise_ordered`.

        Args:
            curvature: from :meth:`curvature`.
            lift: ``[n]``.
        """
        data = curvature.detach().to("cpu", torch.float64).numpy()[self.wiring.source]
        if lift is not None:
            added = lift.detach().to("cpu", torch.float64).numpy()
            data[self.wiring.diagonal] += added[self.ordering.columns]
        shape = (self.at.size, self.at.size)
        return sp.csc_matrix((data, self.wiring.indices, self.wiring.pointers), shape, copy=False)

    def diagonal(self, curvature: Tensor) -> Tensor:
        """Diagonal of ``J'J`` ``[n]``."""
        return curvature[self._diagonal]

    @cached_property
    def _diagonal(self) -> Tensor:
        places = self.wiring.source[self.wiring.diagonal[self.ordering.positions]]
        return torch.from_numpy(places).to(self.groups.like.device)

    def factorise(
        self, curvature: Tensor, lift: Tensor | None = None, solver: Solver = "auto"
    ) -> Factor:
        """Factorise ``J'J + diag(lift)``.

        Raises:
            NotPositive: an unknown is not determined at all.
        """
        return factorise_ordered(self.matrix(curvature, lift), self.ordering, solver=solver)

    # ---- covariances -----------------------------------------------------------------------------

    def covariance(self, factor: Factor, name: str) -> Tensor:
        """Covariance of every element of a family ``[N, d, d]``, in its tangent coordinates."""
        count = self.groups.families[name].count
        elements = self.at.elements[name] + torch.arange(count).numpy()
        return factor.inverse.blocks(elements, elements).to(self.groups.like)

    def joint_covariance(self, factor: Factor, group: Group) -> Tensor:
        """Covariance of all that each row of a group touches ``[F, D, D]``, in the order of its jacobian."""
        scalars = self.at.touched(group)
        found = factor.inverse.entries(scalars[:, :, None], scalars[:, None, :])
        return found.to(self.groups.like)


# ---- one slot ------------------------------------------------------------------------------------


def _split(group: Group, row: Linearised) -> list[Tensor]:
    """The jacobian ``[F, m, D]`` by slots ``[F, m, B, d]``."""
    assert row.jacobian is not None, "the rows were linearised without their jacobian"
    dims = [f.dims for f in group.families]
    sizes = [s.width * d for s, d in zip(group.slots, dims, strict=True)]
    return [
        part.reshape(*part.shape[:2], slot.width, d)
        for part, slot, d in zip(row.jacobian.split(sizes, 2), group.slots, dims, strict=True)
    ]


def _pushed(slot: Slot, part: Tensor, vectors: Tensor) -> Tensor:
    """``J v`` of one slot ``[F, m, k]``: jacobian ``[F, m, B, d]``, vectors ``[N, d, k]``."""
    if slot.is_shared:
        return part.flatten(2) @ vectors[slot.index[0]].flatten(0, 1)
    return part.flatten(2) @ vectors[slot.index].flatten(1, 2)


def _add_pulled(total: Tensor, slot: Slot, part: Tensor, weight: Tensor) -> None:
    """Add ``J' w`` of one slot to its elements ``total [N, d, k]``: weight ``[F, m, k]``."""
    if slot.is_shared:
        pulled, index = part.flatten(0, 1).flatten(1).T @ weight.flatten(0, 1), slot.index[0]
    else:
        pulled, index = part.flatten(2).mT @ weight, slot.index.reshape(-1)
    total.index_add_(0, index, pulled.reshape(len(index), *total.shape[1:]))


def _add_squares(blocks: Tensor, slot: Slot, part: Tensor) -> None:
    """Add ``J'J`` of every element with itself to ``blocks [N, d, d]``."""
    if slot.is_shared:
        blocks.index_add_(0, slot.index[0], torch.einsum("fmbi,fmbj->bij", part, part))
    else:
        own = torch.einsum("fmbi,fmbj->fbij", part, part)
        blocks.index_add_(0, slot.index.reshape(-1), own.flatten(0, 1))


def _add_products(table: Tensor, pairing: Pairing, a: Tensor, b: Tensor) -> None:
    """Add ``J_s' J_t`` of every row to the blocks of its pairs; jacobians are ``[F, m, B, d]``."""
    (rows, m, b1, d1), (b2, d2) = a.shape, b.shape[2:]
    if not rows:
        return
    if len(pairing.pair) == 1:
        product = (a.reshape(rows * m, b1 * d1).T @ b.reshape(rows * m, b2 * d2)).unsqueeze(0)
    else:
        product = a.reshape(rows, m, b1 * d1).mT @ b.reshape(rows, m, b2 * d2)
    blocks = product.reshape(-1, b1, d1, b2, d2).transpose(2, 3)
    if pairing.twice is not None:
        blocks = torch.where(pairing.twice[..., None, None], blocks + blocks.mT, blocks)
    if pairing.flip is not None:
        blocks = torch.where(pairing.flip[..., None, None], blocks.mT, blocks)
    table.index_add_(0, pairing.pair.reshape(-1), blocks.reshape(-1, d1 * d2))
