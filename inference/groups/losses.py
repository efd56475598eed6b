"""What the rows of a group pay for their outputs: squares, robust losses, and log-densities in general."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ppl.distributions import robust

Params = Mapping[str, Tensor]
Matching = Literal["gradient", "energy"]


class Terms(NamedTuple):
    """A loss at outputs ``u [F, m]``, as the square ``|root (J delta) + residual|^2 / 2``."""

    energy: Tensor  # [F], [F, e] or [F, m]; absent entries not yet zero
    residual: Tensor  # [F, m]
    root: (
        Tensor | None
    )  # None: one; [F, m] or [F, 1]: diagonal; [F, e, b, b]: of blocks of b outputs
    weight: Tensor | None  # [F] or [F, m] of robust losses


@dataclass(frozen=True, eq=False)
class Loss:
    """Base of the three losses."""

    def energy(self, outputs: Tensor, params: Params, kernel_scale: float = 1.0) -> Tensor:
        """Energy of every output ``[F, m]``, or of every row ``[F]``."""
        raise NotImplementedError

    def terms(
        self, outputs: Tensor, params: Params, matching: Matching, kernel_scale: float
    ) -> Terms:
        """Energy, residual and scaling near the outputs."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Quadratic(Loss):
    """``|u|^2 / 2`` of whitened residuals ``u``."""

    def energy(self, outputs: Tensor, params: Params, kernel_scale: float = 1.0) -> Tensor:
        return 0.5 * outputs.square()

    def terms(
        self, outputs: Tensor, params: Params, matching: Matching, kernel_scale: float
    ) -> Terms:
        return Terms(self.energy(outputs, params), outputs, None, None)


@dataclass(frozen=True, eq=False)
class Robust(Loss):
    """``rho(M)`` of whitened residuals: one ``M`` a row, or one a component.

    ``k`` is a number, a tensor ``[F]`` (``[F, m]`` by component), or a function of the params that returns one. The
    graduated threshold of non-convex kernels is ``kernel_scale * k``.
    """

    kernel: str
    k: Any
    per: Literal["row", "component"] = "row"

    def energy(self, outputs: Tensor, params: Params, kernel_scale: float = 1.0) -> Tensor:
        square, k = self._square(outputs), self._threshold(outputs, params, kernel_scale)
        return robust.robust_energy(self.kernel, square, k)

    def terms(
        self, outputs: Tensor, params: Params, matching: Matching, kernel_scale: float
    ) -> Terms:
        square, k = self._square(outputs), self._threshold(outputs, params, kernel_scale)
        weight = robust.robust_weight(self.kernel, square, k, matching)
        root = (weight if self.per == "component" else weight.unsqueeze(-1)).sqrt()
        energy = robust.robust_energy(self.kernel, square, k)
        return Terms(energy, root * outputs, root, weight)

    def _square(self, outputs: Tensor) -> Tensor:
        square = outputs.square()
        return square if self.per == "component" else square.sum(-1)

    def _threshold(self, like: Tensor, params: Params, kernel_scale: float) -> Tensor:
        k = self.k(params) if callable(self.k) else self.k
        return kernel_scale * torch.as_tensor(k, dtype=like.dtype, device=like.device)


@dataclass(frozen=True, eq=False)
class LogDensity(Loss):
    """``-log p(u)`` of any twice differentiable density, in ``e`` independent blocks of ``b`` outputs.

    ``log_prob(u [F, e, b], params) -> [F, e]``. Near a point it is the square with the same gradient and the negative
    Hessian as curvature (generalised Gauss-Newton), eigenvalues below ``floor`` times the largest raised to that.
    """

    log_prob: Callable[[Tensor, Params], Tensor] = field(repr=False)
    block: int = 1  # b
    floor: float = 1e-10

    def energy(self, outputs: Tensor, params: Params, kernel_scale: float = 1.0) -> Tensor:
        blocks = outputs.reshape(len(outputs), -1, self.block)
        return -self.log_prob(blocks, params)

    def terms(
        self, outputs: Tensor, params: Params, matching: Matching, kernel_scale: float
    ) -> Terms:
        blocks = outputs.detach().reshape(len(outputs), -1, self.block)
        energy, gradient, hessian = derivatives(lambda u: -self.log_prob(u, params), blocks)
        root, residual = self._square(gradient, hessian)
        return Terms(energy, residual.reshape(outputs.shape), root, None)

    def _square(self, gradient: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
        """``S`` with ``S' S`` the raised Hessian, and ``S^-T gradient``."""
        # Where nothing curves, squared gradients have the units of a curvature (Fisher information).
        size = gradient.square().sum(-1)
        if self.block == 1:
            curve = hessian[..., 0, 0]
            low = self.floor * (curve.abs() + size) + torch.finfo(curve.dtype).tiny
            root = torch.maximum(curve, low).sqrt()
            return root, gradient[..., 0] / root
        values, vectors = _eigen(hessian)
        low = self.floor * (values.abs().amax(-1) + size) + torch.finfo(size.dtype).tiny
        root = torch.maximum(values, low.unsqueeze(-1)).sqrt().unsqueeze(-1)
        turned = vectors.mT @ gradient.unsqueeze(-1)
        return root * vectors.mT, (turned / root).squeeze(-1)


def _eigen(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of symmetric matrices ``[..., b, b]``; those of matrices that are not finite are NaN."""
    # Of a density that overflows, one block would fail them all: the solver does not get it to see. Nor does it see sizes.
    size = matrices.abs().amax((-2, -1), keepdim=True)
    scale = torch.where(size > 0, size, 1.0)
    scaled = torch.where(size.isfinite(), matrices / scale, 0.0)
    values, vectors = torch.linalg.eigh(scaled)
    return values * torch.where(size.isfinite(), scale, torch.nan).squeeze(-1), vectors


def derivatives(
    function: Callable[[Tensor], Tensor], points: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Value ``[F, e]``, gradient ``[F, e, b]`` and Hessian ``[F, e, b, b]`` of a function of each block.

    >>> value, slope, curve = derivatives(lambda u: u.pow(3).sum(-1), torch.tensor([[[2.0]]]))
    >>> value.item(), slope.item(), curve.item()
    (8.0, 12.0, 12.0)
    """
    with torch.enable_grad():
        u = points.detach().requires_grad_(True)
        value = function(u)
        if not value.requires_grad:  # it does not depend on u
            zero = torch.zeros_like(points)
            return value, zero, zero.unsqueeze(-1).expand(*zero.shape, zero.shape[-1])
        (gradient,) = torch.autograd.grad(value.sum(), u, create_graph=True)
        rows = []
        for j in range(points.shape[-1]):
            row = None
            if gradient.requires_grad:
                (row,) = torch.autograd.grad(
                    gradient[..., j].sum(), u, retain_graph=True, allow_unused=True
                )
            rows.append(torch.zeros_like(points) if row is None else row)
    return value.detach(), gradient.detach(), torch.stack(rows, -2)


def scaled_jacobian(jacobian: Tensor, root: Tensor | None) -> Tensor:
    """``root @ jacobian`` for ``jacobian [F, m, D]`` and a root of :class:`Terms`."""
    if root is None:
        return jacobian
    if root.ndim == 2:
        return root.unsqueeze(-1) * jacobian
    blocks = jacobian.reshape(*root.shape[:3], jacobian.shape[-1])
    return (root @ blocks).reshape(jacobian.shape)


__all__ = [
    "LogDensity",
    "Loss",
    "Matching",
    "Quadratic",
    "Robust",
    "Terms",
    "derivatives",
    "scaled_jacobian",
]
