"""Sparse symmetric positive definite systems: factorise, solve, determinant, joint draws, selected inverse.

SciPy's SuperLU does the factorisation, or CHOLMOD where scikit-sparse is installed; both eliminate in the order that
:mod:`ppl.inference.numerics.ordering` found by blocks. Entries of the inverse come from the factor alone, see
:mod:`ppl.inference.numerics.selected`. Source: [Davis2006].
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import splu

from ppl.inference.numerics.ordering import Ordering, order_blocks
from ppl.inference.numerics.selected import Selected, selected_inverse

Solver = Literal["auto", "superlu", "cholmod"]
_RELATIVE_PIVOT = 1e-14  # of the diagonal: a pivot below it is rounding, not information


class NotPositive(np.linalg.LinAlgError):
    """A system is not positive definite; ``columns`` are scalars without information of their own."""

    def __init__(self, columns: np.ndarray) -> None:
        self.columns = columns
        super().__init__(f"the matrix is not positive definite at unknowns {columns[:5].tolist()}")


@dataclass(frozen=True, eq=False)
class Factor:
    """A factorisation ``A = L diag(D) L'`` in the order of elimination; vectors are in the caller's order."""

    ordering: Ordering
    diagonal: np.ndarray  # of A, in the order of elimination [n]
    engine: Any

    def solve(self, right: np.ndarray) -> np.ndarray:
        """Solution of ``A x = right`` for one right-hand side ``[n]`` or several ``[n, k]``."""
        out = np.empty_like(right, dtype=np.float64)
        out[self.ordering.columns] = self.engine.solve(
            np.asarray(right, dtype=np.float64)[self.ordering.columns]
        )
        return out

    @property
    def log_det(self) -> float:
        """Log determinant of A; ``-inf`` when it is not positive definite."""
        return float(np.log(self.pivots).sum()) if self.is_positive else -np.inf

    @cached_property
    def pivots(self) -> np.ndarray:
        """``D``, in the order of elimination ``[n]``."""
        return self.engine.pivots()

    @property
    def is_positive(self) -> bool:
        """Whether all pivots are positive beyond rounding."""
        return not len(self.undetermined)

    @property
    def undetermined(self) -> np.ndarray:
        """Scalars, in the caller's order, whose pivot vanished: what is left free by the others."""
        bad = ~(self.pivots > _RELATIVE_PIVOT * np.abs(self.diagonal))
        return np.sort(self.ordering.columns[bad])

    def draws(self, noise: np.ndarray) -> np.ndarray:
        """Turn standard Normal ``noise`` ``[n, k]`` into draws with covariance ``inv(A)`` ``[n, k]``.

        ``inv(A) L sqrt(D) z`` has covariance ``inv(A) L D L' inv(A) = inv(A)``: no triangular solve is needed.
        """
        # Both engines permute no further, so that L is in the order of elimination.
        coloured = self.engine.lower() @ (np.sqrt(self.pivots)[:, None] * noise)
        out = np.empty_like(coloured)
        out[self.ordering.columns] = self.engine.solve(coloured)
        return out

    @cached_property
    def inverse(self) -> Selected:
        """Entries of the inverse on the pattern of the factor, found on first use."""
        return selected_inverse(self.engine.lower(), self.pivots, self.ordering)


def factorise(
    matrix: sp.spmatrix, ordering: Ordering | None = None, *, solver: Solver = "auto"
) -> Factor:
    """Factorise a symmetric positive definite matrix.

    Args:
        matrix: ``[n, n]``, both triangles.
        ordering: of its blocks; found from the pattern by scalars when left out.
        solver: ``"superlu"``, ``"cholmod"``, or the best that is installed.

    Raises:
        NotPositive: a pivot is exactly zero. Otherwise ask :attr:`Factor.is_positive`.

    >>> matrix = sp.csc_matrix(np.array([[2.0, 1.0], [1.0, 3.0]]))
    >>> factor = factorise(matrix)
    >>> factor.solve(np.array([3.0, 4.0])).round(6).tolist(), round(float(np.exp(factor.log_det)), 6)
    ([1.0, 1.0], 5.0)
    """
    if ordering is None:
        coo = sp.coo_matrix(matrix)
        ordering = order_blocks(coo.row, coo.col, np.ones(matrix.shape[0], dtype=np.int64))
    columns = ordering.columns
    return factorise_ordered(sp.csc_matrix(matrix)[columns][:, columns], ordering, solver=solver)


def factorise_ordered(
    matrix: sp.csc_matrix, ordering: Ordering, *, solver: Solver = "auto"
) -> Factor:
    """As :func:`factorise`, for a matrix whose rows and columns already are in the order of elimination."""
    engine = _ENGINES[_chosen(solver)]
    diagonal = matrix.diagonal()
    try:
        return Factor(ordering, diagonal, engine(matrix))
    except _Singular:
        raise NotPositive(_singular(matrix, ordering)) from None


def has_cholmod() -> bool:
    """Whether scikit-sparse is installed."""
    return importlib.util.find_spec("sksparse") is not None


def _chosen(solver: Solver) -> str:
    if solver == "auto":
        return "cholmod" if has_cholmod() else "superlu"
    return solver


def _singular(matrix: sp.csc_matrix, ordering: Ordering) -> np.ndarray:
    """Which scalars lack information: pivots that vanish when the diagonal is lifted by next to nothing."""
    diagonal = np.abs(matrix.diagonal())
    lift = 1e-10 * np.where(diagonal > 0, diagonal, max(float(diagonal.max(initial=0.0)), 1.0))
    engine = _SuperLU((matrix + sp.diags(lift)).tocsc())
    small = ~(engine.pivots() > 100 * lift)
    return np.sort(ordering.columns[small])


class _Singular(Exception):
    pass


class _SuperLU:
    """``A = L U`` with pivots from the diagonal, which for a symmetric matrix is ``L D L'``."""

    def __init__(self, matrix: sp.csc_matrix) -> None:
        options = {"SymmetricMode": True}
        try:
            self.lu = splu(matrix, permc_spec="NATURAL", diag_pivot_thresh=0.0, options=options)
        except RuntimeError as error:  # "Factor is exactly singular"
            raise _Singular from error
        self.solve = self.lu.solve
        self._order = np.argsort(self.lu.perm_c)

    def pivots(self) -> np.ndarray:
        if not np.array_equal(self.lu.perm_r, self.lu.perm_c):  # a zero on the diagonal was avoided
            return np.full(len(self._order), -np.inf)
        out = np.empty(len(self._order))
        out[self._order] = self.lu.U.diagonal()
        return out

    def lower(self) -> sp.csc_matrix:
        """L; SuperLU may exchange columns that do not depend on each other, which is undone here."""
        lower = self.lu.L
        if np.array_equal(self._order, np.arange(len(self._order))):
            return lower
        back = self.lu.perm_c
        return lower[back][:, back].tocsc()


class _Cholmod:
    """CHOLMOD's supernodal Cholesky factor, through scikit-sparse 0.4."""

    def __init__(self, matrix: sp.csc_matrix) -> None:
        cholmod = importlib.import_module("sksparse.cholmod")
        try:
            self.factor = cholmod.cholesky(matrix, ordering_method="natural")
        except cholmod.CholmodNotPositiveDefiniteError as error:
            raise _Singular from error
        self.solve = self.factor.solve_A if hasattr(self.factor, "solve_A") else self.factor

    def pivots(self) -> np.ndarray:
        return np.asarray(self.factor.D())

    def lower(self) -> sp.csc_matrix:
        return sp.csc_matrix(self.factor.L_D()[0])


_ENGINES: dict[str, Any] = {"superlu": _SuperLU, "cholmod": _Cholmod}
