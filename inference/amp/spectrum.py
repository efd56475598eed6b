"""Eigenvalues of a Gram matrix: exact, or as the quadrature rule that Lanczos builds from random vectors.

Message passing needs the spectrum of ``A A'`` only in sums of a function over it: traces of an inverse, a log
determinant.  A quadrature rule found once gives them all, for every precision of every later step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Spectrum(NamedTuple):
    """Eigenvalues of the smaller Gram matrix, each standing for ``weights`` of its ``min(m, n)``."""

    values: Tensor  # [k]
    weights: Tensor  # [k]; sum min(m, n)

    def sum(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Sum of ``function(eigenvalue)`` over all of them: ``[*batch, k] -> [*batch, 1]``."""
        return (function(self.values) * self.weights).sum(-1, keepdim=True)


class Gram(NamedTuple):
    """``A A'`` (if m <= n) or ``A' A``, as ``vectors @ diag(values) @ vectors.mT``."""

    values: Tensor  # [k], ascending, not negative
    vectors: Tensor  # [k, k]

    @property
    def spectrum(self) -> Spectrum:
        """The eigenvalues, each once."""
        return Spectrum(self.values, torch.ones_like(self.values))


def outer_gram(matrix: Tensor) -> Gram:
    """Eigenvalues and eigenvectors of ``matrix @ matrix.mT``.

    In main memory by numpy: it forms one triangle only of a product with its own transpose, and the eigenvectors
    of its LAPACK come a fifth sooner than those of torch's.

    >>> outer_gram(torch.tensor([[3.0, 0.0], [0.0, 2.0]])).values
    tensor([4., 9.])
    """
    if matrix.device.type == "cpu":
        side = matrix.detach().numpy()
        values, vectors = (torch.from_numpy(x) for x in np.linalg.eigh(side @ side.T))
    else:
        values, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    return Gram(values.clamp(min=0.0), vectors)


class Probe(NamedTuple):
    """A cheap look at the spectrum: four products each with ``A`` and its transpose, and two for the means."""

    peak: float  # largest eigenvalue of A'A over their mean; (1 + sqrt(n/m))^2 if i.i.d.
    condition: float  # of A, at least this
    mean_share: float  # share of the sum of squares that row and column means carry


def lanczos_spectrum(gram: Callable[[Tensor], Tensor], signs: Tensor, steps: int) -> Spectrum:
    """Gauss quadrature of the spectrum of a positive semidefinite matrix, by Lanczos from random signs.

    The nodes of each probe integrate polynomials of degree ``2 steps - 1`` exactly; their average over probes
    estimates traces with a relative error of about ``(probes k)^-1/2``.  Vectors are not
    orthogonalised again: copies of an eigenvalue that appear so share its weight.

    Args:
        gram: product with the matrix, ``[probes, k] -> [probes, k]``.
        signs: one row a probe ``[probes, k]``.
        steps: of Lanczos.

    Source: [Ubaru2017] algorithm 1.

    >>> found = lanczos_spectrum(lambda x: 3.0 * x, random_signs(1, 4), 2)
    >>> round(float(found.sum(lambda values: 1.0 / values)), 6)  # trace of the inverse of 3 I
    1.333333
    """
    size = signs.shape[-1]
    vector = signs / size**0.5
    tiny = torch.finfo(vector.dtype).tiny
    before, off = torch.zeros_like(vector), torch.zeros_like(vector[:, :1])
    diagonals, offs = [], []
    for _ in range(steps):
        image = gram(vector) - off * before
        diagonal = (image * vector).sum(-1, keepdim=True)
        image = image - diagonal * vector
        norm = torch.linalg.vector_norm(image, dim=-1, keepdim=True)
        # An invariant subspace is exhausted: what follows is decoupled and has no weight.
        alive = norm > 1e3 * torch.finfo(vector.dtype).eps * diagonal.abs()
        off = torch.where(alive, norm, 0.0)
        before, vector = vector, torch.where(alive, image / norm.clamp(min=tiny), 0.0)
        diagonals.append(diagonal)
        offs.append(off)
    return _gauss_nodes(torch.cat(diagonals, -1), torch.cat(offs, -1)[:, :-1], size)


def random_signs(
    count: int,
    size: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Rademacher vectors ``[count, size]``, always the same ones: a measurement of ``A`` is not a draw."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, (count, size), generator=generator)
    return (2 * bits - 1).to(device, dtype)


def _gauss_nodes(diagonals: Tensor, offs: Tensor, size: int) -> Spectrum:
    tridiagonal = torch.diag_embed(diagonals)
    tridiagonal += torch.diag_embed(offs, 1) + torch.diag_embed(offs, -1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    weights = vectors[:, 0].square() * (size / len(diagonals))
    found = weights > 0.0  # not those behind an exhausted subspace
    return Spectrum(values[found].clamp(min=0.0), weights[found])
