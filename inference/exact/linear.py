"""Gaussian factors as linear functions of their latents.

Every factor is ``log N(r(x); 0, S)`` with ``r`` affine: ``r(x) = r(0) + J x``. ``r(0)`` and the
columns of ``J`` come from evaluating the lowered factor at zero and at the unit vectors, so that
any structure (chains, ragged plates, gathers, dot products) is the same to what follows.

Axes: ``g`` cases (quadrature nodes and discrete configurations), ``n`` coordinates that a factor
touches, ``R`` its scalar residuals. A leading 1 stands for "the same in all cases".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.distributions import MultivariateNormal
from ppl.distributions.multivariate import covariance_of
from ppl.errors import UnsupportedError
from ppl.graph import Factor, Law
from ppl.inference.exact.arrays import (
    BASIS,
    CASES,
    order,
    padded,
    static_arrays,
    variable_axes,
)
from ppl.inference.exact.split import Split, is_flat
from ppl.lower import Compiler, Lowered, Operand, variables_of

Places = Mapping[str, tuple[int, tuple[int, ...]]]  # name -> first coordinate, shape
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Rows(NamedTuple):
    """Residuals of a factor in every case; absent entries are zero in all three."""

    jacobian: Tensor  # [1 | g, n, R]
    residual: Tensor  # [1 | g, R], at the centre


class Scaled(NamedTuple):
    """A term in every case: ``norm - sum(precision * (residual + x @ jacobian)^2) / 2``."""

    rows: Rows
    precision: Tensor  # [1 | g, 1 | R]
    norm: Tensor  # [1 | g]


class Gram(NamedTuple):
    """Products of rows that do not vary over cases and share one scale."""

    lam: Tensor  # [n, n]
    eta: Tensor  # [n]
    square: Tensor  # []


class Part(NamedTuple):
    """The law, plates and values of a factor, or of the first or later elements of a chain."""

    law: Law
    plates: tuple[str, ...]
    along: str
    cut: Callable[[Tensor], Tensor] | None


@dataclass(frozen=True, eq=False)
class Term:
    """One Gaussian factor, ready to be evaluated in many cases."""

    ends: Lowered  # value and loc
    spread: Lowered  # scale or matrix parameter
    law: Law
    columns: Tensor  # [n], long
    cut: Callable[[Tensor], Tensor] | None  # the part of the value that the law speaks of
    keep: Tensor | None  # [*plates, *event] or [*plates] of the factor, 1 where an entry counts
    sizes: tuple[int, ...]  # of the plates
    event_ndim: int  # of the value
    lost: int  # plates of the factor that the cut removes
    is_fixed: bool  # value and loc are the same in all cases
    rows: Rows | None = (
        None  # of a fixed term with a scalar law; a QR factor where that says as much
    )
    gram: Gram | None = None
    entries: float = 0.0  # number of residuals that count
    has_many_scales: bool = False  # the scale differs between the elements of one case

    @property
    def is_joint(self) -> bool:
        """Whether the law is a MultivariateNormal."""
        return type(self.law.family) is MultivariateNormal


# ---- building ------------------------------------------------------------------------------------


def make_terms(bound: Bound, parts: Split, places: Places) -> tuple[Term, ...]:
    """Lower every factor that touches a Gaussian latent; flat ones say nothing."""
    terms: list[Term] = []
    for factor in gaussian_factors(parts):
        assert factor.law is not None
        if not is_flat(factor.law):
            terms.append(_term(bound, parts, factor, False, places))
        if factor.chain is not None and not is_flat(factor.chain[1]):
            terms.append(_term(bound, parts, factor, True, places))
    return tuple(terms)


def gaussian_factors(parts: Split) -> list[Factor]:
    """The factors that touch a Gaussian latent."""
    names = {v.name for v in parts.gaussian}
    return [f for f in parts.graph.densities if names & variables_of(parts.graph, f)]


def _term(bound: Bound, parts: Split, factor: Factor, later: bool, places: Places) -> Term:
    graph = bound.graph
    axes = variable_axes(graph, parts)
    compiler = Compiler(graph, axes, order(graph, parts), dtype=bound.dtype, device=bound.device)
    value = compiler.operand(factor.value)
    part = _part(factor, later)
    law, plates = part.law, part.plates
    arguments = compiler.later_arguments(law, part.along) if later else compiler.arguments(law)
    leaves = law.family.leaves()
    loc_at = next(i for i, leaf in enumerate(leaves) if leaf.path == "loc")
    batch = value.event_ndim - law.family.event_dim
    lead = (CASES, BASIS, *plates)

    def placed(i: int) -> Operand:
        rank = max(batch + leaves[i].event_dim, arguments[i].event_ndim)
        return compiler.align(arguments[i], lead, rank)

    whole = compiler.align(value, (CASES, BASIS, *factor.plates))
    ends = compiler.finish([whole, placed(loc_at)]).pruned()
    spread = compiler.finish([placed(1 - loc_at)]).pruned()
    touched = [n for n in places if n in ends.inputs]
    columns, basis = _basis(touched, places, bound)
    static = {**static_arrays(bound), **basis}
    sizes = tuple(bound.size(p) - (later and p == part.along) for p in plates)
    return Term(
        has_many_scales=bool({*arguments[1 - loc_at].axes} - {CASES})
        or arguments[1 - loc_at].event_ndim > 0,
        ends=ends.given({k: v for k, v in static.items() if k in ends.inputs}),
        spread=spread.given({k: v for k, v in static.items() if k in spread.inputs}),
        law=law,
        cut=part.cut,
        columns=columns,
        keep=_keep(bound, factor, [value, *arguments], plates, sizes),
        sizes=sizes,
        event_ndim=value.event_ndim,
        lost=len(factor.plates) - len(plates),
        is_fixed=all(CASES not in o.axes for o in (value, arguments[loc_at])),
    )


def _part(factor: Factor, later: bool) -> Part:
    """A whole factor, or of a chain its first element or all later ones."""
    assert factor.law is not None
    if factor.chain is None:
        return Part(factor.law, factor.plates, "", None)
    along, transition = factor.chain
    at = 2 + factor.plates.index(along)
    if later:
        return Part(transition, factor.plates, along, lambda x: x.narrow(at, 1, x.shape[at] - 1))
    plates = tuple(p for p in factor.plates if p != along)
    return Part(factor.law, plates, along, lambda x: x.select(at, 0))


def _basis(names: Sequence[str], places: Places, bound: Bound) -> tuple[Tensor, dict[str, Tensor]]:
    """Coordinates of these latents, and their arrays at zero and at every unit vector: ``[n + 1,
    *shape]``.
    """
    sizes = [math.prod(places[n][1]) for n in names]
    total = sum(sizes)
    unit = torch.eye(total, dtype=bound.dtype, device=bound.device)
    points = torch.cat([unit.new_zeros(1, total), unit])
    arrays, columns = {}, []
    for name, part in zip(names, points.split(sizes, -1), strict=True):
        start, shape = places[name]
        arrays[name] = part.reshape(total + 1, *shape)
        columns.append(torch.arange(start, start + part.shape[-1], device=bound.device))
    return torch.cat(columns), arrays


def _keep(
    bound: Bound,
    factor: Factor,
    operands: Sequence[Operand],
    plates: tuple[str, ...],
    sizes: tuple[int, ...],
) -> Tensor | None:
    """1 where an entry counts: it is present, and its neighbours in an ordered plate exist.
    ``[*plates, *event]``, or ``[*plates]`` where no entry is missing.
    """
    keep = None
    if factor.kind == "conditional" and factor.name in bound.masks:
        if factor.chain is not None:
            raise UnsupportedError(
                f"'{factor.name}': missing entries in an observed Markov chain are not "
                "supported. Make the chain a "
                "latent and observe it through a law of its own."
            )
        keep = bound.masks[factor.name].to(bound.dtype)
    for plate, start, end in {e for o in operands for e in o.edges}:
        at = plates.index(plate)
        place = torch.arange(sizes[at], device=bound.device)
        inside = ((place >= start) & (place < sizes[at] - end)).to(bound.dtype)
        batch = 0 if keep is None else keep.ndim - len(plates)
        inside = inside.reshape(*(-1 if i == at else 1 for i in range(len(plates))), *(1,) * batch)
        keep = inside if keep is None else keep * inside
    return keep


# ---- evaluation ----------------------------------------------------------------------------------


def prepared(term: Term, centre: Tensor) -> Term:
    """Compute now what is the same in all cases."""
    if not term.is_fixed or term.is_joint:
        return term
    residual, entries = _residual(term, {})
    rows = _centred(_rows(residual, term), centre)
    if term.has_many_scales:
        return replace(term, rows=rows, entries=entries)
    # With one scale for all of them, R residuals say no more than the n + 1 rows of their QR
    # factor.
    both = torch.cat([rows.jacobian[0], rows.residual]).mT
    root = torch.linalg.qr(both, mode="r")[1] if len(both) > both.shape[1] else both
    jac, res = root[:, :-1].mT, root[:, -1]
    gram = Gram(jac @ jac.mT, jac @ res, res @ res)
    return replace(term, rows=Rows(jac.unsqueeze(0), res.unsqueeze(0)), gram=gram, entries=entries)


def scaled(term: Term, centre: Tensor, arrays: Mapping[str, Tensor]) -> Scaled:
    """A term at these cases, ``centre [n]``."""
    (spread,) = term.spread(arrays)
    spread = padded(spread, 2 + len(term.sizes) + term.event_ndim + term.is_joint)
    if term.is_joint:
        return _joint_scaled(term, centre, spread, arrays)
    if term.gram is not None and term.rows is not None:
        precision = spread.reshape(-1, 1).pow(-2)
        norm = term.entries * (0.5 * precision.log() - HALF_LOG_2PI)
        return Scaled(term.rows, precision, norm.squeeze(-1))
    residual, _ = _residual(term, arrays)
    rows = term.rows or _centred(_rows(residual, term), centre)
    shape = (*term.sizes, *residual.shape[2 + len(term.sizes) :])
    precision = spread.squeeze(1).expand(-1, *shape).reshape(len(spread), -1).pow(-2)
    keep = _spread_keep(term, residual[0, 0]).flatten()
    norm = (keep * (0.5 * precision.log() - HALF_LOG_2PI)).sum(-1)
    return Scaled(rows, precision, norm)


def _joint_scaled(
    term: Term, centre: Tensor, matrix: Tensor, arrays: Mapping[str, Tensor]
) -> Scaled:
    residual, _ = _residual(term, arrays)
    there = _spread_keep(term, residual[0, 0])  # [*plates, *batch, d]
    chol = _cholesky(term, matrix.squeeze(1), there)  # [1 | g, *plates, *batch, d, d]
    ahead = (residual * there).movedim(1, -1)  # [1 | g, *plates, *batch, d, n + 1]
    white = torch.linalg.solve_triangular(chol, ahead, upper=False).movedim(-1, 1)
    log_det = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    each = -log_det - there.sum(-1) * HALF_LOG_2PI
    norm = each.reshape(len(each), -1).sum(-1)
    return Scaled(_centred(_rows(white, term), centre), norm.new_ones(1, 1), norm)


def _cholesky(term: Term, matrix: Tensor, there: Tensor) -> Tensor:
    """Lower Cholesky factor of the covariance, that of the identity where entries are missing.

    As in :func:`ppl.densities.marginal_log_prob`: with residuals of zero the missing entries add
    nothing, and the others have their marginal law.
    """
    name = next(leaf.path for leaf in term.law.family.leaves() if leaf.path != "loc")
    if name == "scale_tril" and term.keep is None:
        return matrix
    covariance = covariance_of(name, matrix)
    if term.keep is not None:
        both = (there.unsqueeze(-1) * there.unsqueeze(-2)) > 0
        eye = torch.eye(there.shape[-1], dtype=matrix.dtype, device=matrix.device)
        covariance = torch.where(both, covariance, eye)
    return torch.linalg.cholesky_ex(covariance)[0]


def _residual(term: Term, arrays: Mapping[str, Tensor]) -> tuple[Tensor, float]:
    """Value minus location ``[1 | g, n + 1, *plates, *event]``, and how many scalars count."""
    value, loc = term.ends(arrays)
    rank = 2 + len(term.sizes) + term.event_ndim
    value = padded(value, rank + term.lost)
    difference = padded((term.cut(value) if term.cut else value) - loc, rank)
    event = difference.shape[2 + len(term.sizes) :]
    shape = (difference.shape[0], len(term.columns) + 1, *term.sizes, *event)
    full = difference.expand(shape)
    return full, float(_spread_keep(term, full[0, 0]).sum())


def _spread_keep(term: Term, like: Tensor) -> Tensor:
    if term.keep is None:
        return torch.ones_like(like)
    return term.keep[(...,) + (None,) * (like.ndim - term.keep.ndim)].expand_as(like)


def _rows(residual: Tensor, term: Term) -> Rows:
    """Residual and Jacobian from evaluations at zero and at the unit vectors."""
    keep = _spread_keep(term, residual[0, 0])
    flat = (residual * keep).reshape(*residual.shape[:2], -1)
    return Rows(flat[:, 1:] - flat[:, :1], flat[:, 0])


def _centred(rows: Rows, centre: Tensor) -> Rows:
    return rows._replace(residual=rows.residual + (centre @ rows.jacobian))
