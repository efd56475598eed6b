"""How a recorded torch call acts once its operands carry extra leading axes (plates, particles).

Three rules, in this order: a pointwise call broadcasts over aligned operands as it is; a table holds the calls
that look at event axes (reductions, ``matmul``, ``stack``, indexing); ``torch.func.vmap`` goes around anything else.
A rule receives operands whose leading ``n`` dimensions are the joint axes and returns a plain function of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

POINTWISE = frozenset(
    """abs absolute neg negative exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square sin cos tan asin acos atan arcsin
    arccos arctan sinh cosh tanh asinh acosh atanh arcsinh arccosh arctanh sigmoid logit expit erf erfc erfinv ndtr ndtri
    log_ndtr lgamma digamma gammaln polygamma i0 i0e i1 i1e relu relu6 elu selu gelu silu softplus logsigmoid leaky_relu
    hardtanh softsign tanhshrink mish hardsigmoid hardswish celu threshold add sub subtract mul multiply div divide
    true_divide floor_divide remainder fmod pow float_power rsub atan2 arctan2 hypot logaddexp logaddexp2 maximum minimum
    fmax fmin where clamp clip clamp_min clamp_max floor ceil round trunc frac sign sgn reciprocal lerp addcmul addcdiv
    xlogy xlog1py gammainc gammaincc sinc heaviside nextafter ldexp nan_to_num isnan isinf isfinite eq ne lt le gt ge
    greater greater_equal less less_equal not_equal logical_and logical_or logical_not logical_xor bitwise_and bitwise_or
    bitwise_not bitwise_xor masked_fill positive deg2rad rad2deg clone contiguous detach to float double long int bool
    type_as identity dropout _identity __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__
    __div__ __rdiv__ __pow__ __rpow__ __mod__ __rmod__ __floordiv__ __rfloordiv__ __neg__ __pos__ __abs__ __and__ __rand__
    __or__ __ror__ __xor__ __rxor__ __invert__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__""".split()
)

# name -> whether a missing dim means "over all event axes" (True) or the call needs one (False)
REDUCTIONS = {
    "sum": True, "mean": True, "prod": True, "amax": True, "amin": True, "logsumexp": False, "softmax": False,
    "log_softmax": False, "cumsum": False, "cumprod": False, "logcumsumexp": False, "std": True, "var": True, "all": True,
    "any": True, "nansum": True, "flip": False, "softmin": False, "argmax": False, "argmin": False, "count_nonzero": True,
}  # fmt: skip


def reduction(
    name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], event_ndim: int
) -> Callable[[Tensor], Tensor] | None:
    """A reduction over event axes with its dims counted from the end; None when vmap has to do it."""
    rest = list(args[1:])
    options = dict(kwargs)
    dim = rest.pop(0) if rest else options.pop("dim", options.pop("axis", None))
    if dim is None:
        if not REDUCTIONS[name]:
            return None
        if event_ndim == 0:
            return (lambda x: x) if name in ("sum", "mean", "prod", "amax", "amin", "nansum") else None
        dim = tuple(range(-event_ndim, 0))
    if event_ndim == 0:
        return None
    dims = tuple(d - event_ndim if d >= 0 else d for d in (dim if isinstance(dim, (tuple, list)) else (dim,)))
    if name in ("prod", "all", "any") and len(dims) > 1:
        return None
    at: Any = dims if isinstance(dim, (tuple, list)) else dims[0]
    return lambda x: func(x, at, *rest, **options)


def index_event(index: Any, n: int) -> Callable[[Tensor], Tensor]:
    """``x[index]`` on the event axes, ``n`` axes standing in front."""
    full = (slice(None),) * n + (index if isinstance(index, tuple) else (index,))
    return lambda x: x[full]


def index_by_value(x: Tensor, index: Tensor, n: int) -> Tensor:
    """``x[index]`` where the index varies: pick along the first event axis.

    Args:
        x: ``[*axes, size, *rest]``, the ``n`` leading axes aligned with those of ``index``.
        index: ``[*axes, *shape]``, whole numbers of any dtype.
    """
    rest, shape = x.ndim - n - 1, index.shape[n:]
    flat = index.long().reshape(*index.shape[:n], -1, *(1,) * rest)
    picked = torch.take_along_dim(x, flat, dim=n)
    return picked.reshape((*picked.shape[:n], *shape, *x.shape[n + 1 :]))


def matmul(a_ndim: int, b_ndim: int) -> Callable[[Tensor, Tensor], Tensor]:
    """``a @ b`` for event ranks ``a_ndim`` and ``b_ndim`` of 1 or 2, any aligned leading axes."""
    if (a_ndim, b_ndim) == (1, 1):
        return lambda a, b: (a.unsqueeze(-2) @ b.unsqueeze(-1))[..., 0, 0]
    if (a_ndim, b_ndim) == (2, 1):
        return lambda a, b: (a @ b.unsqueeze(-1)).squeeze(-1)
    if (a_ndim, b_ndim) == (1, 2):
        return lambda a, b: (a.unsqueeze(-2) @ b).squeeze(-2)
    return torch.matmul


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` where weights may have leading axes; ``x`` has one event axis."""
    out = (weight @ x.unsqueeze(-1)).squeeze(-1)
    return out if bias is None else out + bias


def einsum(equation: str) -> str:
    """The equation with an ellipsis in front of every operand.

    >>> einsum("ij,j->i")
    '...ij,...j->...i'
    """
    left, _, right = equation.replace(" ", "").partition("->")
    if not _:
        counts = {c: left.count(c) for c in sorted(set(left) - {","})}
        right = "".join(c for c, n in counts.items() if n == 1)
    return ",".join("..." + part for part in left.split(",")) + "->..." + right


def mapped(func: Callable[..., Any], in_axes: Sequence[Sequence[bool]]) -> Callable[..., Any]:
    """``vmap`` a function of one element over the leading axes.

    Args:
        func: function of the operands of one element.
        in_axes: for every axis, outermost first, which operands have it (as their first dimension by then).
    """
    for has in reversed(in_axes):
        func = torch.func.vmap(func, in_dims=tuple(0 if h else None for h in has))
    return func
