"""Dense algebra of all latents that are jointly Gaussian given the others.

The joint precision is the sum over factors of ``J' S^-1 J``; the rest is [Bishop2006] section 2.3.
Axes as in :mod:`ppl.inference.exact.linear`, and ``D`` for all coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.inference.exact.linear import (
    HALF_LOG_2PI,
    Gram,
    Places,
    Rows,
    Scaled,
    Term,
    make_terms,
    prepared,
    scaled,
)
from ppl.inference.exact.split import Split

_ACCURATE = 1e-7  # error in nats above which Cholesky gives way to QR


class Quadratic(NamedTuple):
    """``const + eta @ x - x @ lam @ x / 2`` in every case."""

    lam: Tensor  # [g, n, n]
    eta: Tensor  # [g, n]
    const: Tensor  # [g]


class Solution(NamedTuple):
    """The joint Gaussian of every case."""

    log_evidence: Tensor  # [g], -inf where the joint is not proper
    mean: Tensor  # [g, D]
    chol: Tensor  # [g, D, D], of the precision


@dataclass(frozen=True, eq=False)
class GaussianPart:
    """All Gaussian factors and where each latent stands among the ``D`` coordinates."""

    terms: tuple[Term, ...]
    places: Places
    dims: int
    centre: Tensor  # [D]; algebra is done around it, which keeps sums of squares small
    grams: Gram | None = None  # of all fixed terms: [F, D, D], [F, D], [F]

    @property
    def elements(self) -> int:
        """Numbers in the largest array that one case makes besides the precision."""
        sizes = [len(t.columns) * t.entries for t in self.terms if t.gram is None]
        return int(max([1.0, *sizes]))

    @property
    def flops(self) -> float:
        """Work of one case to assemble the precision, about."""
        moving = [t for t in self.terms if t.gram is None]
        return sum(len(t.columns) ** 2 * t.entries for t in moving) + self.dims**2 * len(self.terms)

    def solve(self, arrays: Mapping[str, Tensor], cases: int) -> Solution:
        """Evidence, mean and Cholesky factor of the precision, for every case."""
        parts = [scaled(t, self.centre[t.columns], arrays) for t in self.terms]
        found, error = self._by_precision(parts, cases)
        doubtful = torch.nonzero(error > _ACCURATE).flatten()
        if not len(doubtful):
            return found
        chosen = [_scaled_at(p, doubtful) for p in parts]
        again = _by_roots(self.terms, chosen, self.centre, len(doubtful))
        return Solution(
            *(old.index_copy(0, doubtful, new) for old, new in zip(found, again, strict=True))
        )

    def _by_precision(self, parts: Sequence[Scaled], cases: int) -> tuple[Solution, Tensor]:
        """The joint Gaussian by Cholesky, and a rough error ``[g]`` of its log evidence."""
        lam, eta, const = self._summed(parts, cases)
        chol, info = torch.linalg.cholesky_ex(lam)
        diagonal = chol.diagonal(dim1=-2, dim2=-1)
        good = (info == 0) & (diagonal > 0).all(-1) & diagonal.isfinite().all(-1) & const.isfinite()
        if not bool(good.all()):
            eye = torch.eye(self.dims, dtype=lam.dtype, device=lam.device)
            chol = torch.where(good[:, None, None], chol, eye)
            diagonal = chol.diagonal(dim1=-2, dim2=-1)
        shift = torch.cholesky_solve(eta.unsqueeze(-1), chol).squeeze(-1)
        gain = 0.5 * (eta * shift).sum(-1)
        log = const + gain - diagonal.log().sum(-1) + self.dims * HALF_LOG_2PI
        condition = (diagonal.amax(-1) / diagonal.amin(-1)).square()
        error = (condition + const.abs() + gain.abs()) * torch.finfo(lam.dtype).eps
        error = torch.where(good & error.isfinite(), error, torch.inf)
        return Solution(log, self.centre + shift, chol), error

    def _summed(self, parts: Sequence[Scaled], cases: int) -> Quadratic:
        """The sum of all terms as one quadratic."""
        lam = self.centre.new_zeros(cases, self.dims, self.dims)
        eta, const = self.centre.new_zeros(cases, self.dims), self.centre.new_zeros(cases)
        fixed = [i for i, t in enumerate(self.terms) if t.gram is not None]
        if (
            self.grams is not None and fixed
        ):  # one matrix product for all terms that only their scale changes
            precision = torch.cat([parts[i].precision.expand(cases, 1) for i in fixed], 1)
            lam = (precision @ self.grams.lam.flatten(1)).reshape(cases, self.dims, self.dims)
            eta = -(precision @ self.grams.eta)
            const = sum((parts[i].norm for i in fixed), const) - 0.5 * (
                precision @ self.grams.square
            )
        for term, part in zip(self.terms, parts, strict=True):
            if term.gram is None:
                q = _quadratic(part)
                lam[:, term.columns.unsqueeze(-1), term.columns] += q.lam
                eta[:, term.columns] += q.eta
                const = const + q.const
        return Quadratic(lam, eta, const)

    def centred(self, centre: Tensor) -> GaussianPart:
        """The same part with its algebra done around ``centre [D]``."""
        terms = tuple(prepared(t, centre[t.columns]) for t in self.terms)
        fixed = [t for t in terms if t.gram is not None]
        return replace(
            self, centre=centre, terms=terms, grams=_stacked(fixed, centre) if fixed else None
        )

    def sites(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut ``[*lead, D]`` into one array ``[*lead, *plates, *event]`` for each latent."""
        lead = flat.shape[:-1]
        return {
            name: flat[..., start : start + math.prod(shape)].reshape((*lead, *shape))
            for name, (start, shape) in self.places.items()
        }


def make_part(bound: Bound, parts: Split) -> GaussianPart:
    """Lower every factor that touches a Gaussian latent."""
    places: dict[str, tuple[int, tuple[int, ...]]] = {}
    start = 0
    for v in parts.gaussian:
        places[v.name] = (start, bound.shape(v))
        start += math.prod(bound.shape(v))
    centre = torch.zeros(start, dtype=bound.dtype, device=bound.device)
    return GaussianPart(make_terms(bound, parts, places), places, start, centre).centred(centre)


def variances(solution: Solution) -> Tensor:
    """Marginal variances ``[g, D]``."""
    eye = torch.eye(solution.chol.shape[-1], dtype=solution.chol.dtype, device=solution.chol.device)
    inverse = torch.linalg.solve_triangular(solution.chol, eye, upper=False)
    return inverse.square().sum(-2)


def covariances(solution: Solution, start: int, elements: int, entries: int) -> Tensor:
    """Covariances ``[g, elements, entries, entries]`` within the events of one latent.

    Args:
        solution: of every case.
        start: first coordinate of the latent.
        elements: of its plates together.
        entries: of one event.
    """
    eye = torch.eye(solution.chol.shape[-1], dtype=solution.chol.dtype, device=solution.chol.device)
    columns = eye[:, start : start + elements * entries]
    inverse = torch.linalg.solve_triangular(solution.chol, columns, upper=False)
    rows = inverse.unflatten(-1, (elements, entries)).movedim(-2, 1)  # [g, elements, D, entries]
    return rows.mT @ rows


def draw(solution: Solution, noise: Tensor) -> Tensor:
    """Joint draws ``[g, m, D]`` of each case from standard normal ``noise [g, m, D]``."""
    step = torch.linalg.solve_triangular(solution.chol.mT, noise.mT, upper=True).mT
    return solution.mean.unsqueeze(1) + step


def _scaled_at(part: Scaled, rows: Tensor) -> Scaled:
    """The term in some of the cases."""

    def some(x: Tensor) -> Tensor:
        return x[rows] if len(x) > 1 else x

    return Scaled(Rows(*map(some, part.rows)), some(part.precision), some(part.norm))


def _stacked(terms: Sequence[Term], centre: Tensor) -> Gram:
    """Grams of fixed terms side by side, over all coordinates."""
    dims = len(centre)
    lam = centre.new_zeros(len(terms), dims, dims)
    eta = centre.new_zeros(len(terms), dims)
    for i, term in enumerate(terms):
        assert term.gram is not None
        lam[i][term.columns.unsqueeze(-1), term.columns] = term.gram.lam
        eta[i, term.columns] = term.gram.eta
    return Gram(lam, eta, torch.stack([t.gram.square for t in terms if t.gram is not None]))


def _quadratic(part: Scaled) -> Quadratic:
    """A term as a function of the distance from the centre."""
    jac, residual, precision = part.rows.jacobian, part.rows.residual, part.precision
    weighted = jac * precision.unsqueeze(1)  # [g, n, R]
    eta = -(weighted @ residual.unsqueeze(-1)).squeeze(-1)
    const = part.norm - 0.5 * (precision * residual.square()).sum(-1)
    return Quadratic(weighted @ jac.mT, eta, const)


def _by_roots(
    terms: Sequence[Term], parts: Sequence[Scaled], centre: Tensor, cases: int
) -> Solution:
    """The joint Gaussian by QR of all residuals: slower, but it squares no condition number.

    Rows are sorted by size, which keeps the small ones accurate beside the large ones, Higham
    (2002) section 19.4.
    """
    dims, blocks = len(centre), []
    norm = centre.new_zeros(cases)
    for term, part in zip(terms, parts, strict=True):
        root = part.precision.sqrt()
        count = part.rows.residual.shape[-1]
        block = centre.new_zeros(cases, count, dims + 1)
        block[:, :, term.columns] = (part.rows.jacobian * root.unsqueeze(1)).mT.expand(
            cases, -1, -1
        )
        block[:, :, -1] = part.rows.residual * root
        blocks.append(block)
        norm = norm + part.norm
    rows = torch.cat([*blocks, centre.new_zeros(cases, dims + 1, dims + 1)], 1)
    good = rows.isfinite().all(-1).all(-1) & norm.isfinite()
    rows = torch.where(good[:, None, None], rows, 0.0)
    largest = rows.abs().amax(-1).argsort(1, descending=True)
    rows = rows.gather(1, largest.unsqueeze(-1).expand_as(rows))
    upper = torch.linalg.qr(rows, mode="r")[1]
    square, right, left_over = upper[:, :-1, :-1], upper[:, :-1, -1:], upper[:, -1, -1]
    diagonal = square.diagonal(dim1=-2, dim2=-1)
    size = diagonal.abs()
    eps = torch.finfo(size.dtype).eps
    good = good & (size.amin(-1) > 1e4 * eps * size.amax(-1))
    eye = torch.eye(dims, dtype=size.dtype, device=size.device)
    square = torch.where(good[:, None, None], square * diagonal.sign().unsqueeze(-1), eye)
    shift = -torch.linalg.solve_triangular(
        square, right * diagonal.sign().unsqueeze(-1), upper=True
    )
    log = norm - 0.5 * left_over.square() - size.log().sum(-1) + dims * HALF_LOG_2PI
    log = torch.where(good & log.isfinite(), log, -torch.inf)
    return Solution(log, centre + shift.squeeze(-1), square.mT)
