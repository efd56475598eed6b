"""Vectors that are drawn jointly: the Normal in its three parametrisations, Laplace, Dirichlet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from ppl.distributions.arguments import positive_vector, real_vector, shape_of
from ppl.distributions.base import Distribution, outside, standard, times
from ppl.distributions.continuous import HALF_LOG_2PI
from ppl.errors import ModelError


class MultivariateNormal(Distribution):
    """Gaussian vector ``[*batch, d]`` with a covariance, a precision or the Cholesky factor of a
    covariance.

    >>> MultivariateNormal([0.0, 0.0], covariance_matrix=torch.eye(2)).event_shape
    torch.Size([2])
    """

    arg_constraints = {
        "loc": real_vector,
        "covariance_matrix": constraints.positive_definite,
        "precision_matrix": constraints.positive_definite,
        "scale_tril": constraints.lower_cholesky,
    }
    defaults = {"covariance_matrix": None, "precision_matrix": None, "scale_tril": None}
    exactly_one = ("covariance_matrix", "precision_matrix", "scale_tril")
    event_dim = 1
    loc: Any

    def check(self) -> None:
        (_, loc), (name, matrix) = self._items()
        rows, columns, d = *shape_of(matrix)[-2:], shape_of(loc)[-1]
        if rows != columns or rows != d:
            raise ModelError(
                f"MultivariateNormal: {name} must be [{d}, {d}] for a loc of {d} entries, got "
                f"[{rows}, {columns}]. "
                "Both describe one draw; open a plate for repeats."
            )

    def log_prob(self, value: Tensor) -> Tensor:
        residual, log_norm = self.whitened(value)
        return log_norm - 0.5 * residual.square().sum(-1)

    def whitened(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Residual ``[*batch, d]`` of unit covariance, and the log-density ``[*batch]`` at zero."""
        value, loc, matrix = self.against(value)
        white, log_det = whitening(self._items()[1][0], matrix)
        return times_matrix(value - loc, white), log_det - loc.shape[-1] * HALF_LOG_2PI

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        loc, matrix = self.tensors(generator=generator).values()
        noise = standard(torch.randn, (*shape, loc.shape[-1]), loc, generator)
        return loc + times_matrix(noise, colouring(self._items()[1][0], matrix))

    @property
    def support(self) -> Constraint:
        return constraints.real_vector

    @property
    def covariance(self) -> Tensor:
        """Covariance ``[*batch, d, d]`` in every parametrisation."""
        matrix = list(self.tensors().values())[1]
        return covariance_of(self._items()[1][0], matrix)

    @property
    def mean(self) -> Tensor:
        return self.full(self.tensors()["loc"])

    @property
    def variance(self) -> Tensor:
        return self.full(self.covariance.diagonal(dim1=-2, dim2=-1))


class MultivariateLaplace(Distribution):
    """Vector ``[*batch, d]`` whose density falls with its length, ``exp(-|x - loc| / scale)``.

    It is the prior of the group Lasso: its mode has whole groups at zero. For ``d = 1`` it is the
    Laplace law; the length is Gamma with shape ``d``, the direction uniform. (Other laws of this
    name, elliptical with Bessel functions, have another density.)

    Source: [Raman2009] section 2; a Gaussian with variance drawn from
    Gamma((d + 1) / 2, 1 / (2 scale^2)).

    >>> law = MultivariateLaplace(torch.zeros(3), 2.0)
    >>> law.variance
    tensor([16., 16., 16.])
    """

    arg_constraints = {"loc": real_vector, "scale": constraints.positive}
    event_dim = 1
    loc: Any
    scale: Any

    def log_prob(self, value: Tensor) -> Tensor:
        value, loc, scale = self.against(value)
        length, d = torch.linalg.vector_norm(value - loc, dim=-1), loc.shape[-1]
        # Surface of the unit sphere times the integral over the length.
        surface = math.log(2.0) + 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d)
        return -length / scale - d * scale.log() - surface - math.lgamma(d)

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        loc, scale = self.tensors(generator=generator).values()
        d = loc.shape[-1]
        noise = standard(torch.randn, (*shape, d), loc, generator)
        half = torch.full(tuple(shape), 0.5 * (d + 1), dtype=loc.dtype, device=loc.device)
        root = torch._standard_gamma(half, generator=generator).mul(2.0).sqrt()
        return loc + (scale * root).unsqueeze(-1) * noise

    @property
    def support(self) -> Constraint:
        return constraints.real_vector

    @property
    def mean(self) -> Tensor:
        return self.full(self.tensors()["loc"])

    @property
    def variance(self) -> Tensor:
        loc, scale = self.tensors().values()
        return self.full(((loc.shape[-1] + 1) * scale.square()).unsqueeze(-1))


class Dirichlet(Distribution):
    """Probability vectors ``[*batch, d]``, as if ``concentration`` of each category had been
    counted.
    """

    arg_constraints = {"concentration": positive_vector}
    event_dim = 1
    concentration: Any

    def log_prob(self, value: Tensor) -> Tensor:
        value, concentration = self.against(value)
        inside = on_simplex(value)
        value = torch.where(value >= 0, value, 1.0)
        constant = torch.lgamma(concentration.sum(-1)) - torch.lgamma(concentration).sum(-1)
        return outside(inside, times(concentration - 1, value.log()).sum(-1) + constant)

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        (concentration,) = self.expanded(shape, generator)
        return torch._sample_dirichlet(concentration, generator=generator)

    @property
    def support(self) -> Constraint:
        return constraints.simplex

    @property
    def mean(self) -> Tensor:
        concentration = self.tensors()["concentration"]
        return self.full(concentration / concentration.sum(-1, keepdim=True))

    @property
    def variance(self) -> Tensor:
        total = self.tensors()["concentration"].sum(-1, keepdim=True)
        return self.full(self.mean * (1 - self.mean) / (total + 1))


def whitening(name: str, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``W`` with ``W @ W.mT`` the precision, and its log-determinant; of the shape of the matrix.

    Args:
        name: what the matrix is: ``covariance_matrix``, ``precision_matrix`` or ``scale_tril``.
        matrix: ``[*batch, d, d]``.
    """
    if name == "precision_matrix":
        white = torch.linalg.cholesky(matrix)
        return white, _log_diagonal(white)
    chol = matrix if name == "scale_tril" else torch.linalg.cholesky(matrix)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(chol, eye, upper=False).mT, -_log_diagonal(chol)


def colouring(name: str, matrix: Tensor) -> Tensor:
    """``C`` with ``C.mT @ C`` the covariance: rows of unit noise times ``C`` have that covariance."""
    if name == "precision_matrix":
        return torch.linalg.inv(torch.linalg.cholesky(matrix))
    return (matrix if name == "scale_tril" else torch.linalg.cholesky(matrix)).mT


def covariance_of(name: str, matrix: Tensor) -> Tensor:
    """The covariance that a matrix of this name describes."""
    if name == "precision_matrix":
        return torch.linalg.inv(matrix)
    return matrix @ matrix.mT if name == "scale_tril" else matrix


def on_simplex(value: Tensor) -> Tensor:
    """Where rows are non-negative and sum to one, as far as their dtype can tell."""
    slack = 1e-6 if value.dtype == torch.float64 else 1e-4
    return (value >= 0).all(-1) & ((value.sum(-1) - 1).abs() < slack)


def times_matrix(rows: Tensor, matrix: Tensor) -> Tensor:
    """``rows @ matrix`` for ``[*batch, d]`` and ``[*batch, d, e]`` that broadcast, without
    repeating a matrix.

    Batch axes over which the matrix does not vary become rows of one product: ``torch.matmul``
    would copy the matrix for each of their elements.
    """
    count = max(rows.ndim - 1, matrix.ndim - 2)
    rows = rows.reshape((1,) * (count + 1 - rows.ndim) + rows.shape)
    matrix = matrix.reshape((1,) * (count + 2 - matrix.ndim) + matrix.shape)
    own = [i for i in range(count) if matrix.shape[i] != 1]
    free = [i for i in range(count) if matrix.shape[i] == 1]
    rows = rows.expand(
        *(matrix.shape[i] if i in own else rows.shape[i] for i in range(count)), rows.shape[-1]
    )
    kept, repeats = [rows.shape[i] for i in own], [rows.shape[i] for i in free]
    left = rows.permute(*own, *free, count).reshape(*kept, -1, rows.shape[-1])
    right = matrix.permute(*own, *free, count, count + 1).reshape(*kept, *matrix.shape[-2:])
    product = (left @ right).reshape(*kept, *repeats, matrix.shape[-1])
    back = sorted(range(count), key=[*own, *free].__getitem__)
    return product.permute(*back, count)


def _log_diagonal(triangle: Tensor) -> Tensor:
    return triangle.diagonal(dim1=-2, dim2=-1).log().sum(-1)
