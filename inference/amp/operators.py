"""Makers of linear maps: dense, sparse (CSR), or a torch function, and maps made of others.

The transpose of a torch function is the pullback of ``torch.func.vjp``, which a linear function has once and for all.
Nothing is taken on trust: superposition and ``z . A x = x . A' z`` are tested on random vectors.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ppl.errors import UnsupportedError
from ppl.inference.amp.linear_map import Map, Operator, measured

__all__ = ["Map", "Operator", "beside", "dense", "matrix_free", "rescaled", "sparse"]


def dense(matrix: Tensor) -> Operator:
    """A matrix ``[m, n]`` in memory.

    >>> dense(torch.tensor([[1.0, 2.0]])).mv(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    tensor([[3.],
            [2.]])
    """
    squares: list[Tensor] = []  # filled on first use: scalar variances never need it

    def square() -> Tensor:
        if not squares:
            squares.append(matrix.square())
        return squares[0]

    return Operator(
        (matrix.shape[0], matrix.shape[1]),
        lambda x: x @ matrix.mT,
        lambda z: z @ matrix,
        "dense",
        float(torch.linalg.vector_norm(matrix).square()),
        matrix.dtype,
        matrix.device,
        lambda x: x @ square().mT,
        lambda z: z @ square(),
        matrix,
    )


def sparse(matrix: Tensor) -> Operator:
    """A sparse matrix ``[m, n]`` in any of torch's layouts; its transpose is kept as well.

    >>> sparse(torch.eye(3).to_sparse()).kind
    'sparse'
    """
    with warnings.catch_warnings():  # torch calls its CSR tensors a beta feature, once a process
        warnings.simplefilter("ignore")
        rows, columns = matrix.to_sparse_csr(), matrix.to_sparse_coo().t().to_sparse_csr()
        rows2, columns2 = _squared_csr(rows), _squared_csr(columns)
    maps = (_csr_map(each) for each in (rows, columns, rows2, columns2))
    mv, rmv, squared_mv, squared_rmv = maps
    return Operator(
        (rows.shape[0], rows.shape[1]),
        mv,
        rmv,
        "sparse",
        float(rows2.values().sum()),
        rows.dtype,
        rows.device,
        squared_mv,
        squared_rmv,
        rows,
    )


def matrix_free(
    function: Map,
    n: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    batched: bool = False,
    transpose: Map | None = None,
    squared: tuple[Map, Map] | None = None,
    squared_frobenius: float | None = None,
) -> Operator:
    """A linear torch function of a vector, for instance a Fourier transform or a blur.

    Args:
        function: ``[n] -> [m]``; with ``batched`` also ``[*batch, n] -> [*batch, m]``.
        n: length of its argument.
        dtype: of its argument.
        device: of its argument.
        batched: whether ``function`` (and ``transpose``) take leading axes; otherwise they are mapped.
        transpose: ``[m] -> [n]``; derived by ``torch.func.vjp`` if None.
        squared: products with the entrywise square and its transpose, for vector variances.
        squared_frobenius: sum of the squared entries; measured if None, with random vectors if
            the matrix has more than a million entries.

    Raises:
        UnsupportedError: the function is not linear, or the transpose is not its transpose.

    >>> blur = matrix_free(lambda x: x + x.roll(1), 4)
    >>> blur.rmv(torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    tensor([1., 0., 0., 1.], dtype=torch.float64)
    """
    zero = torch.zeros(n, dtype=dtype, device=device)
    value, pullback = torch.func.vjp(function, zero)[:2]
    _check_vector(value, zero)
    back = transpose or (lambda z: pullback(z)[0])
    forward = function if batched else _mapped(function)
    if batched and transpose is None:
        back = _batched_pullback(function, back, n)
    elif not batched:
        back = _mapped(back)
    operator = Operator(
        (value.shape[0], n),
        forward,
        back,
        "matrix-free",
        squared_frobenius or 0.0,
        dtype,
        zero.device,
        *(squared or (None, None)),
    )
    _check_linear(operator)
    return operator if squared_frobenius is not None else measured(operator)


def rescaled(
    operator: Operator, rows: Tensor | None = None, columns: Tensor | None = None
) -> Operator:
    """``diag(rows) A diag(columns)``, to whiten unequal noise or to standardise columns.

    >>> op = rescaled(dense(torch.ones(1, 2)), columns=torch.tensor([1.0, 3.0]))
    >>> op.to_dense()
    tensor([[1., 3.]])
    """
    left = torch.ones((), dtype=operator.dtype, device=operator.device) if rows is None else rows
    right = (
        torch.ones((), dtype=operator.dtype, device=operator.device) if columns is None else columns
    )
    if operator.kind == "dense" and operator.matrix is not None:
        return dense(left.unsqueeze(-1) * operator.matrix * right)
    squares = _between(operator.squared_mv, operator.squared_rmv, left.square(), right.square())
    new = Operator(
        operator.shape,
        lambda x: left * operator.mv(right * x),
        lambda z: right * operator.rmv(left * z),
        operator.kind,
        0.0,
        operator.dtype,
        operator.device,
        *squares,
    )
    return measured(new)


def beside(operators: Sequence[Operator]) -> Operator:
    """``[A1 A2 ...]``: one map of several latents, concatenated along the last axis.

    >>> beside([dense(torch.ones(2, 3)), dense(torch.zeros(2, 1))]).shape
    (2, 4)
    """
    if len(operators) == 1:
        return operators[0]
    if all(each.kind == "dense" for each in operators):
        return dense(torch.cat([each.to_dense() for each in operators], -1))
    sizes = [each.shape[1] for each in operators]
    known = all(each.squared_mv is not None for each in operators)
    first = operators[0]
    return Operator(
        (first.shape[0], sum(sizes)),
        _summed([each.mv for each in operators], sizes),
        _stacked([each.rmv for each in operators]),
        " beside ".join(dict.fromkeys(each.kind for each in operators)),
        sum(each.squared_frobenius for each in operators),
        first.dtype,
        first.device,
        _summed([each.squared_mv for each in operators], sizes) if known else None,  # type: ignore[misc]
        _stacked([each.squared_rmv for each in operators]) if known else None,  # type: ignore[misc]
        None,
        max(each.frobenius_probes for each in operators),
    )


def _check_vector(value: Tensor, zero: Tensor) -> None:
    if value.ndim != 1 or value.dtype != zero.dtype:
        raise UnsupportedError(
            f"amp: the linear operator must map a vector of length {len(zero)} to a vector of {zero.dtype}; "
            f"it returned shape {list(value.shape)}, {value.dtype}. Flatten its result."
        )
    if torch.count_nonzero(value):
        raise UnsupportedError(
            "amp: the operator is not linear: it maps zero to something else. "
            "Move the constant out of it, into the output."
        )


def _check_linear(operator: Operator) -> None:
    """Two tests: superposition, and equality of ``z . A x`` and ``x . A' z``."""
    m, n = operator.shape
    generator = torch.Generator().manual_seed(1)
    x, other = torch.randn(2, n, generator=generator, dtype=torch.float64).to(
        operator.device, operator.dtype
    )
    z = torch.randn(m, generator=generator, dtype=torch.float64).to(operator.device, operator.dtype)
    image, second = operator.mv(x), operator.mv(other)
    tolerance = 100 * torch.finfo(operator.dtype).eps ** 0.75
    scale = torch.linalg.vector_norm(image) + torch.linalg.vector_norm(second)
    error = torch.linalg.vector_norm(
        operator.mv(2.0 * x - 3.0 * other) - 2.0 * image + 3.0 * second
    )
    if not error <= tolerance * scale:
        raise UnsupportedError(
            f"amp: the operator is not linear: A(2x - 3y) differs from 2Ax - 3Ay by {float(error / scale):.1e} of "
            "their size. Keep only what is linear in the latent inside it."
        )
    gap = (image @ z - x @ operator.rmv(z)).abs()
    if not gap <= tolerance * scale * torch.linalg.vector_norm(z):
        raise UnsupportedError(
            "amp: the transpose given is not the transpose of the operator: z.Ax and x.A'z differ by "
            f"{float(gap):.1e}. Leave it out, and it is derived."
        )


def _mapped(function: Map) -> Map:
    """A function of one vector, over any number of leading axes."""

    def over_axes(x: Tensor) -> Tensor:
        if x.ndim == 1:
            return function(x)
        flat = torch.func.vmap(function)(x.reshape(-1, x.shape[-1]))
        return flat.reshape(*x.shape[:-1], -1)

    return over_axes


def _batched_pullback(function: Map, single: Map, n: int) -> Map:
    def back(z: Tensor) -> Tensor:
        if z.ndim == 1:
            return single(z)
        return torch.func.vjp(function, z.new_zeros(*z.shape[:-1], n))[1](z)[0]

    return back


def _csr_map(matrix: Tensor) -> Map:
    def product(x: Tensor) -> Tensor:
        columns = x.reshape(-1, x.shape[-1]).mT
        return (matrix @ columns).mT.reshape(*x.shape[:-1], matrix.shape[0])

    return product


def _squared_csr(matrix: Tensor) -> Tensor:
    return torch.sparse_csr_tensor(
        matrix.crow_indices(), matrix.col_indices(), matrix.values().square(), matrix.shape
    )


def _between(
    forward: Map | None, back: Map | None, left: Tensor, right: Tensor
) -> tuple[Map | None, Map | None]:
    if forward is None or back is None:
        return None, None
    return lambda x: left * forward(right * x), lambda z: right * back(left * z)


def _summed(maps: Sequence[Map], sizes: list[int]) -> Map:
    def forward(x: Tensor) -> Tensor:
        parts = x.split(sizes, -1)
        return torch.stack([each(part) for each, part in zip(maps, parts, strict=True)]).sum(0)

    return forward


def _stacked(maps: Sequence[Map]) -> Map:
    return lambda z: torch.cat([each(z) for each in maps], -1)
