"""Products of activations with a sparse array of weights, given as index list and values.

Every product is differentiable in values and activations, and the choice between the kernels changes results by rounding
only:

- ``csr``: a compressed row form of the array and one of its transpose, built from the indices (a new weight is exactly zero, so
  values cannot tell the pattern). Forward ``W x``, ``W^T g`` for the inputs, and for the values ``g x^T`` at the pattern alone
  (``torch.sparse.sampled_addmm``). The same pattern serves means with ``x`` and variances with ``x^2``.
- ``dense``: the values are scattered into a dense array, for layers that are not sparse enough, and for convolutions.
- ``compact``: a set of whole columns (input units or channels) is a smaller dense product; so is one of whole rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ppl.inference.networks.products import Product

Kernel = Literal["csr", "dense", "columns", "rows"]
KERNELS: tuple[Kernel, ...] = ("dense", "csr", "columns", "rows")


class Form(NamedTuple):
    """What a product node does with its array, apart from the bias."""

    kind: str  # "linear", "conv1d" or "conv2d"
    shape: tuple[int, ...]  # of the array, [outputs, inputs, *kernel]
    run: Callable[[Tensor, Tensor], Tensor] = functional.linear  # input, array -> dense product
    groups: int = 1  # of a convolution: inputs are counted within each

    @property
    def rows(self) -> int:
        """Output units."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Weights of an output unit."""
        return math.prod(self.shape[1:])

    @property
    def size(self) -> int:
        """Weights."""
        return math.prod(self.shape)


class Pattern(NamedTuple):
    """Compressed rows of an index list and of its transpose."""

    indices: Tensor  # [k]
    starts: Tensor  # [rows + 1]: where each row begins in `indices`
    columns: Tensor  # [k]: column of each member
    starts_t: Tensor  # [columns + 1]
    columns_t: Tensor  # [k]: row of each member, in the order of the transpose
    order_t: Tensor  # [k]: position in `indices` of each member of the transpose
    size: tuple[int, int]


def pattern_of(index: Tensor, rows: int, columns: int) -> Pattern:
    """The pattern of ascending indices ``[k]`` into a matrix, whatever values will stand there.

    >>> pattern_of(torch.tensor([1, 2, 5]), 2, 3).starts
    tensor([0, 2, 3])
    """
    _quietly_known((rows, columns), index)
    row, column = index // columns, index % columns
    order = (column * rows + row).argsort()
    return Pattern(
        index,
        _starts(row, rows),
        column,
        _starts(column.index_select(0, order), columns),
        row.index_select(0, order),
        order,
        (rows, columns),
    )


def _starts(ascending: Tensor, count: int) -> Tensor:
    return torch.searchsorted(ascending, torch.arange(count + 1, device=ascending.device))


def _quietly_known(size: tuple[int, int], index: Tensor) -> None:
    """Let torch say once, unheard, that its compressed tensors are beta: users cannot act on it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        _csr(torch.zeros(size[0] + 1, dtype=torch.long), index[:0].cpu(), torch.zeros(0), size)


def _csr(starts: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(starts, columns, values, size, check_invariants=False)


class _SparseProduct(torch.autograd.Function):
    """``W x`` of compressed rows: ``values`` ``[k]``, ``x`` ``[columns, B]`` -> ``[rows, B]``."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(values, x)
        ctx.pattern = pattern
        return _csr(pattern.starts, pattern.columns, values, pattern.size) @ x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, x = ctx.saved_tensors
        p, g = ctx.pattern, gradients[0].contiguous()
        by_values = by_x = None
        if ctx.needs_input_grad[1]:
            turned = values.index_select(0, p.order_t)
            by_x = _csr(p.starts_t, p.columns_t, turned, (p.size[1], p.size[0])) @ g
        if ctx.needs_input_grad[0]:
            where = _csr(p.starts, p.columns, torch.zeros_like(values), p.size)
            by_values = torch.sparse.sampled_addmm(where, g, x.mT, beta=0.0).values()
        return by_values, by_x, None


class CSRProduct:
    """A linear layer on compressed rows.

    Activations come and go as ``[*batch, features]``, but results lie in memory features first, and the next layer takes that
    form without a copy.

    >>> form = Form("linear", (2, 3))
    >>> layer = CSRProduct(form, torch.tensor([0, 5]))
    >>> layer(torch.tensor([1.0, 10.0]), torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[ 1., 30.]])
    """

    def __init__(self, form: Form, index: Tensor) -> None:
        self.pattern = pattern_of(index, form.rows, form.columns)

    def __call__(self, values: Tensor, x: Tensor) -> Tensor:
        """``values`` ``[k]``, ``x`` ``[*batch, inputs]``."""
        rows, columns = self.pattern.size
        flat = x.reshape(-1, columns).mT
        return _SparseProduct.apply(values, flat, self.pattern).mT.reshape(*x.shape[:-1], rows)


class MaskedProduct:
    """Any product, by a dense array that is zero outside the set.

    >>> layer = MaskedProduct(Form("linear", (2, 3)), torch.tensor([0, 5]))
    >>> layer(torch.tensor([1.0, 10.0]), torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[ 1., 30.]])
    """

    def __init__(self, form: Form, index: Tensor) -> None:
        self.form, self.index = form, index

    def __call__(self, values: Tensor, x: Tensor) -> Tensor:
        """``values`` ``[k]``, ``x`` ``[*batch, inputs]`` or ``[*batch, channels, *size]``."""
        weight = dense(values, self.index, self.form.shape)
        return self.form.run(x, weight)


class ColumnsProduct:
    """A set of whole input units or channels: a dense product over those that are kept.

    >>> layer = ColumnsProduct(Form("linear", (2, 3)), torch.tensor([1, 4]))
    >>> layer(torch.tensor([1.0, 10.0]), torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[ 2., 20.]])
    """

    def __init__(self, form: Form, index: Tensor) -> None:
        places = math.prod(form.shape[2:])
        first = index[
            index < form.columns
        ]  # those of the first output unit; all units have the same
        self.kept = first[::places] // places
        self.shape = (form.rows, len(self.kept), *form.shape[2:])
        self.form = form
        self.axis = -len(form.shape) + 1

    def __call__(self, values: Tensor, x: Tensor) -> Tensor:
        """``values`` ``[k]``, ``x`` ``[*batch, inputs]`` or ``[*batch, channels, *size]``."""
        return self.form.run(x.index_select(self.axis, self.kept), values.reshape(self.shape))


class RowsProduct:
    """A set of whole output units or channels: a dense product for those; the others are zero.

    >>> layer = RowsProduct(Form("linear", (2, 2)), torch.tensor([2, 3]))
    >>> layer(torch.tensor([1.0, 10.0]), torch.tensor([[1.0, 2.0]]))
    tensor([[ 0., 21.]])
    """

    def __init__(self, form: Form, index: Tensor) -> None:
        self.kept = index[:: form.columns] // form.columns
        self.rows, self.shape = form.rows, (len(self.kept), *form.shape[1:])
        self.form = form
        self.axis = -len(form.shape) + 1

    def __call__(self, values: Tensor, x: Tensor) -> Tensor:
        """``values`` ``[k]``, ``x`` ``[*batch, inputs]`` or ``[*batch, channels, *size]``."""
        y = self.form.run(x, values.reshape(self.shape))
        size = list(y.shape)
        size[self.axis] = self.rows
        return y.new_zeros(size).index_copy(y.ndim + self.axis, self.kept, y)


_PRODUCTS: dict[Kernel, type] = {
    "csr": CSRProduct,
    "dense": MaskedProduct,
    "columns": ColumnsProduct,
    "rows": RowsProduct,
}


def product(kernel: Kernel, form: Form, index: Tensor) -> Product:
    """The product of a layer by one of the kernels."""
    made: Product = _PRODUCTS[kernel](form, index)
    return made


def dense(values: Tensor, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The array of a set, zero elsewhere.

    >>> dense(torch.tensor([1.0]), torch.tensor([2]), (2, 2))
    tensor([[0., 0.],
            [1., 0.]])
    """
    flat = values.new_zeros(math.prod(shape)).index_copy(0, index, values)
    return flat.reshape(shape)
