"""Systems that are too large to factorise: preconditioned conjugate gradients, and variances from random draws.

Everything works on ``k`` right-hand sides at once and touches the matrix only through products, on any device.
Source: [Golub2013] section 11.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


class Solved(NamedTuple):
    """What conjugate gradients found."""

    solution: Tensor  # [n, k]
    iterations: int
    error: Tensor  # [k], norm of the residual relative to that of the right-hand side


def conjugate_gradients(
    product: Product,
    right: Tensor,
    precondition: Product | None = None,
    *,
    tol: float = 1e-10,
    max_iters: int = 1000,
) -> Solved:
    """Solve ``A x = right`` for a symmetric positive definite A.

    Args:
        product: ``A @ x`` for ``x [n, k]``.
        right: ``[n, k]``.
        precondition: an approximate inverse of A, symmetric positive definite, applied to ``[n, k]``.
        tol: of the residual, relative to the right-hand side.
        max_iters: give up after so many products.

    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> conjugate_gradients(lambda x: matrix @ x, torch.tensor([[3.0], [4.0]])).solution.round().flatten()
    tensor([1., 1.])
    """
    precondition = precondition or (lambda x: x)
    x, residual = torch.zeros_like(right), right.clone()
    z = precondition(residual)
    direction, slope = z, (residual * z).sum(0)
    size = right.norm(dim=0).clamp(min=torch.finfo(right.dtype).tiny)
    done = 0
    while done < max_iters and bool((residual.norm(dim=0) > tol * size).any()):
        image = product(direction)
        # A column that has converged has no slope left: its steps are zero, not 0 / 0.
        step = _ratio(slope, (direction * image).sum(0))
        x, residual = x + step * direction, residual - step * image
        z = precondition(residual)
        slope, before = (residual * z).sum(0), slope
        direction = z + _ratio(slope, before) * direction
        done += 1
    return Solved(x, done, residual.norm(dim=0) / size)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)


def covariance_from_draws(draws: Tensor, pulled: Tensor, own: Tensor) -> Tensor:
    """Covariance of small blocks of a Gaussian with precision A, from joint draws.

    Given all others, block i has covariance ``inv(A_ii)`` and mean ``x_i - inv(A_ii) (A x)_i``: the first is known, and
    only the spread of the second is estimated. Source: [Siden2018], its simple Rao-Blackwellised estimator.

    Args:
        draws: of the blocks ``[N, d, k]``, with mean zero.
        pulled: ``A @ draws`` at the blocks ``[N, d, k]``.
        own: ``A_ii`` ``[N, d, d]``.

    Returns:
        ``[N, d, d]``.

    >>> draws = torch.randn(3, 1, 50)
    >>> alone = torch.full((3, 1, 1), 4.0)  # blocks that are coupled with nothing: no draw is needed
    >>> covariance_from_draws(draws, alone @ draws, alone).flatten()
    tensor([0.2500, 0.2500, 0.2500])
    """
    root = torch.linalg.cholesky(own)
    given = torch.cholesky_inverse(root)
    rest = draws - torch.cholesky_solve(pulled, root)
    return given + rest @ rest.mT / draws.shape[-1]


def block_jacobi(blocks: Tensor) -> Product:
    """The inverse of a block diagonal matrix ``[N, d, d]``, applied to ``[N * d, k]``.

    >>> block_jacobi(torch.tensor([[[2.0]], [[4.0]]]))(torch.ones(2, 1)).flatten()
    tensor([0.5000, 0.2500])
    """
    count, d = blocks.shape[:2]
    root = torch.linalg.cholesky(blocks)
    return lambda x: torch.cholesky_solve(x.reshape(count, d, -1), root).reshape(x.shape)
