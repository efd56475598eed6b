"""The record of a linear map ``z = A x``: products with ``A`` and its transpose, and its spectrum on demand.

Batch axes of the vectors lead and share the matrix, so that a hundred right-hand sides cost one matrix product.
What is expensive is computed on first use and kept on the record: the eigenvectors of the smaller Gram matrix, or a
Lanczos picture of its spectrum where it is too large to form.

The Gram matrix stands in for the thin SVD of [Rangan2019]: every formula of VAMP needs ``A`` only through
``(A A' + c I)^-1`` or ``(A' A + c I)^-1``, and its eigenvectors cost a third of the SVD.  Squaring ``A`` loses
singular values below ``1e-8`` of the largest, which matters only for noise 150 dB below the signal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ppl.inference.amp.spectrum import (
    Gram,
    Probe,
    Spectrum,
    lanczos_spectrum,
    outer_gram,
    random_signs,
)

Map = Callable[[Tensor], Tensor]

_EXACT_ENTRIES = 1_000_000  # a map with at most so many entries is measured exactly


@dataclass(frozen=True, eq=False)
class Operator:
    """A linear map from ``[*batch, n]`` to ``[*batch, m]``."""

    shape: tuple[int, int]  # (m, n)
    mv: Map
    rmv: Map  # the transpose
    kind: str  # dense, sparse, matrix-free, ...: for reports
    squared_frobenius: float  # sum of the squared entries
    dtype: torch.dtype
    device: torch.device
    squared_mv: Map | None = None  # of the entrywise square, None if it is not known
    squared_rmv: Map | None = None
    matrix: Tensor | None = None  # [m, n], if it exists in memory
    frobenius_probes: int = 0  # random vectors behind squared_frobenius; 0: exact

    @property
    def is_wide(self) -> bool:
        """Whether the smaller Gram matrix is that of the rows, m <= n."""
        return self.shape[0] <= self.shape[1]

    def small_gram(self, vector: Tensor) -> Tensor:
        """The smaller Gram matrix times a vector ``[*batch, min(m, n)]``."""
        return self.mv(self.rmv(vector)) if self.is_wide else self.rmv(self.mv(vector))

    def to_dense(self) -> Tensor:
        """The matrix ``[m, n]``, by products with the unit vectors if it does not exist yet."""
        if self.matrix is not None:
            return self.matrix.to_dense() if self.matrix.layout != torch.strided else self.matrix
        m, n = self.shape
        if self.is_wide:
            return self.rmv(torch.eye(m, dtype=self.dtype, device=self.device))
        return self.mv(torch.eye(n, dtype=self.dtype, device=self.device)).mT

    @cached_property
    def gram(self) -> Gram:
        """Eigenvalues and eigenvectors of the smaller Gram matrix, computed once."""
        matrix = self.to_dense()
        return outer_gram(matrix if self.is_wide else matrix.mT)

    @cached_property
    def spectrum(self) -> Spectrum:
        """The spectrum by Lanczos quadrature of random probes; :attr:`gram` has it exactly."""
        size = min(self.shape)
        probes = max(1, 200_000 // size)  # noise of a trace: about (probes * size)^-1/2 = 0.2 %
        return lanczos_spectrum(self.small_gram, self._signs(probes, size), min(size, 30))

    @cached_property
    def probe(self) -> Probe:
        """Largest eigenvalue, a lower bound of the condition, weight of the means."""
        m, n = self.shape
        ritz = lanczos_spectrum(self.small_gram, self._signs(1, min(m, n)), min(m, n, 4))
        found = ritz.values[ritz.weights > 1e-10 * min(m, n)]
        top = float(found.max())
        shared = n * float(self.row_means.square().sum())
        shared += m * float((self.column_means - self.column_means.mean()).square().sum())
        total = max(self.squared_frobenius, torch.finfo(self.dtype).tiny)
        low = max(float(found.min()), top * torch.finfo(self.dtype).eps)
        return Probe(top * n / total, (top / low) ** 0.5 if top > 0 else 1.0, shared / total)

    @cached_property
    def row_means(self) -> Tensor:
        """Mean of each row ``[m]``."""
        return self.mv(self._ones(self.shape[1])) / self.shape[1]

    @cached_property
    def column_means(self) -> Tensor:
        """Mean of each column ``[n]``."""
        return self.rmv(self._ones(self.shape[0])) / self.shape[0]

    def _signs(self, count: int, size: int) -> Tensor:
        return random_signs(count, size, self.dtype, self.device)

    def _ones(self, size: int) -> Tensor:
        return torch.ones(size, dtype=self.dtype, device=self.device)


def measured(operator: Operator) -> Operator:
    """The same operator with its sum of squares: exact if that is cheap, else by ten random vectors."""
    m, n = operator.shape
    fields = {k: v for k, v in operator.__dict__.items() if k in Operator.__dataclass_fields__}
    if operator.squared_mv is not None:
        total, probes = operator.squared_mv(operator._ones(n)).sum(), 0
    elif m * n <= _EXACT_ENTRIES:
        total, probes = operator.to_dense().square().sum(), 0
    else:
        probes = 10
        total = operator.mv(operator._signs(probes, n)).square().sum() / probes
    return Operator(**{**fields, "squared_frobenius": float(total), "frobenius_probes": probes})
