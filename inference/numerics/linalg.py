"""Linear algebra on batches of covariance matrices, some of which may be singular."""

from __future__ import annotations

import torch
from torch import Tensor


def symmetrise(matrix: Tensor) -> Tensor:
    """Symmetric part of ``matrix`` ``[*batch, d, d]``.

    >>> symmetrise(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    tensor([[1., 1.],
            [1., 1.]])
    """
    return (matrix + matrix.mT) / 2


def safe_cholesky(matrix: Tensor) -> Tensor:
    """Cholesky factor of a covariance that rounding or few particles may have made singular.

    Elements of the batch that factorise are returned exactly as they are.  On the others the
    diagonal grows by a factor ``1 + jitter``, with ``jitter`` from ``10 eps`` in steps of ten.
    A jitter relative to each diagonal entry commutes with a change of units.

    Args:
        matrix: ``[*batch, d, d]``, symmetric, positive semidefinite up to rounding.

    Returns:
        Lower-triangular factors ``[*batch, d, d]``.

    Raises:
        torch.linalg.LinAlgError: a matrix is not finite or clearly indefinite.

    >>> safe_cholesky(torch.ones(2, 2, dtype=torch.float64)).isfinite().all()
    tensor(True)
    """
    chol, info = torch.linalg.cholesky_ex(matrix)
    limits = torch.finfo(matrix.dtype)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).clamp(min=limits.tiny**0.5)
    jitter = 10.0 * limits.eps
    while bool(info.any()) and jitter < 1.0:
        fixed, again = torch.linalg.cholesky_ex(matrix + torch.diag_embed(jitter * diagonal))
        failed = info > 0
        chol = torch.where(failed[..., None, None], fixed, chol)
        info = torch.where(failed, again, info)
        jitter *= 10.0
    if bool(info.any()) or not bool(chol.isfinite().all()):
        raise torch.linalg.LinAlgError(
            f"safe_cholesky: expected positive semidefinite matrices {tuple(matrix.shape)}, got "
            f"{int((info > 0).sum())} of {info.numel()} that are indefinite"
            f"{'' if bool(matrix.isfinite().all()) else ' and some entries that are not finite'}."
        )
    return chol


def weighted_moments(z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and central covariance of weighted particles.

    The covariance is centred before it is squared, so no digits are lost when the mean is far
    from zero, and it is positive semidefinite by construction.

    Args:
        z: particles ``[*batch, S, d]``.
        weights: ``[*batch, S]``, summing to one over ``S``; batch axes may be of size one.

    Returns:
        mean ``[*batch, d]``, covariance ``[*batch, d, d]``.

    >>> z = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    >>> mean, cov = weighted_moments(z, torch.tensor([0.5, 0.5]))
    >>> mean, cov
    (tensor([1., 2.]), tensor([[1., 2.],
            [2., 4.]]))
    """
    w = weights.unsqueeze(-1)
    mean = (w * z).sum(-2)
    deviation = z - mean.unsqueeze(-2)
    return mean, symmetrise((w * deviation).mT @ deviation)
