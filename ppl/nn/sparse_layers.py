"""Modules that multiply by what is left of a layer's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ppl.columns import quiet

# Density below which compressed rows take less time than a dense product: measured on one CPU core for matrices 256 and
# 1024 wide and batches of 100 and 1000, where both take as long at 0.2.
_SPARSE = 0.2


class SparseLinear(torch.nn.Module):
    """``x [..., inputs]`` times a matrix of compressed sparse rows, plus a bias.

    >>> weight = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    >>> SparseLinear(weight, weight != 0, torch.ones(2))(torch.ones(5, 3))[0]
    tensor([3., 1.])
    """

    starts: Tensor
    columns: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, active: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        starts, columns = rows_of(active)
        self.register_buffer("starts", starts)
        self.register_buffer("columns", columns)
        self.register_buffer("values", weight[active])
        self.register_buffer("bias", bias)

    @property
    def multiplications(self) -> int:
        """For one vector."""
        return len(self.values)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., outputs]``."""
        with quiet():
            matrix = torch.sparse_csr_tensor(
                self.starts, self.columns, self.values, self.shape, check_invariants=False
            )
        product = (matrix @ x.reshape(-1, x.shape[-1]).mT).mT
        product = product.reshape(*x.shape[:-1], self.shape[0])
        return product if self.bias is None else product + self.bias


class DenseLayer(torch.nn.Module):
    """A linear layer or a convolution on elements with any axes in front.

    Args:
        kind: name of the function in ``torch.nn.functional``.
        weight: ``[outputs, inputs, *kernel]``.
        bias: ``[outputs]``.
        rest: arguments of the function behind the bias.
        named: the same by name.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        kind: str,
        weight: Tensor,
        bias: Tensor | None,
        rest: tuple[Any, ...] = (),
        named: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.rest, self.named = kind, rest, dict(named or {})
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    @property
    def multiplications(self) -> int:
        """For one vector, or at one place of the kernel."""
        return self.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., outputs]``, or ``[..., channels, *size]``."""
        run = getattr(functional, self.kind)
        if self.kind == "linear":
            return run(x, self.weight, self.bias)
        event = self.weight.ndim - 1
        lead = x.shape[: x.ndim - event]
        flat = x.reshape(-1, *x.shape[len(lead) :])
        out = run(flat, self.weight, self.bias, *self.rest, **self.named)
        return out.reshape(*lead, *out.shape[1:])


class Unchecked(torch.nn.Module):
    """A norm of fewer channels than it was recorded with.

    Args:
        run: its function of tensors with any axes in front.
    """

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *tensors: Tensor) -> Tensor:
        """Like the norm itself."""
        return self.run(*tensors)


def rows_of(active: Tensor) -> tuple[Tensor, Tensor]:
    """Starts of rows ``[rows + 1]`` and columns ``[k]`` of the entries of a matrix that are True."""
    counts = active.sum(1)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return starts, active.nonzero()[:, 1]


def is_sparse(active: Tensor) -> bool:
    """Whether a product by compressed rows is expected to be faster than a dense one."""
    has_kernels = active.device.type != "cpu" or torch.backends.mkl.is_available()
    return has_kernels and active.ndim == 2 and float(active.sum()) < _SPARSE * active.numel()


__all__ = ["DenseLayer", "SparseLinear", "Unchecked", "is_sparse", "rows_of"]
