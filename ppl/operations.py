"""How a recorded torch call acts once its operands carry extra leading axes (plates, particles).

Three rules, in this order: a pointwise call broadcasts over aligned operands as it is; a table holds the calls
that look at event axes (reductions, ``matmul``, ``stack``, indexing); ``torch.func.vmap`` goes around anything else.
A rule receives operands whose leading ``n`` dimensions are the joint axes and returns a plain function of tensors.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ppl.errors import ModelError

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

_FEW = 4096  # products of two vectors that are added up as they are

# name -> whether a missing dim means "over all event axes" (True) or the call needs one (False)
REDUCTIONS = {
    "sum": True, "mean": True, "prod": True, "amax": True, "amin": True, "logsumexp": False, "softmax": False,
    "log_softmax": False, "cumsum": False, "cumprod": False, "logcumsumexp": False, "std": True, "var": True, "all": True,
    "any": True, "nansum": True, "flip": False, "softmin": False, "argmax": False, "argmin": False, "count_nonzero": True,
}  # fmt: skip


class Batched:
    """A function of tensors with any leading axes, recorded in a model as one node.

    Its leading axes broadcast, so lowering calls it as it is; no ``vmap`` goes around it.

    Args:
        name: of the node.
        run: the function on plain tensors.
        inputs: shape of the trailing axes that each argument has of its own.
        output: number of trailing axes that the result has of its own.

    Attributes:
        train: the function where the elements of a batch are seen at once, ``train(dims, *tensors)`` with their axes
            counted from the end; None where an element does not depend on others.
    """

    train: Callable[..., Tensor] | None = None

    def __init__(
        self,
        name: str,
        run: Callable[..., Tensor],
        inputs: tuple[tuple[int, ...], ...],
        output: int,
    ) -> None:
        self.__name__, self.run, self.inputs, self.output = name, run, inputs, output

    def __call__(self, *args: Any) -> Tensor:
        dtype = next((x.dtype for x in args if isinstance(x, Tensor)), torch.float64)
        tensors = tuple(
            x if isinstance(x, Tensor) else torch.as_tensor(x, dtype=dtype) for x in args
        )
        if has_torch_function(tensors):  # a value of a model under trace records the call
            return handle_torch_function(self, tensors, *tensors)
        for x, shape in zip(tensors, self.inputs, strict=True):
            if shape and tuple(x.shape[-len(shape) :]) != shape:
                raise ModelError(
                    f"{self.__name__}: expected an argument [..., {', '.join(map(str, shape))}], got "
                    f"{list(x.shape)}. The numbers of one element stand last."
                )
        return self.run(*tensors)

    def __repr__(self) -> str:
        return self.__name__


def reduction(
    name: str,
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    event_ndim: int,
) -> Callable[[Tensor], Tensor] | None:
    """A reduction over event axes with its dims counted from the end; None when vmap has to do it."""
    rest = list(args[1:])
    options = dict(kwargs)
    dim = rest.pop(0) if rest else options.pop("dim", options.pop("axis", None))
    if isinstance(dim, bool) or (name == "flip" and rest):  # std(x, False), x.flip(0, 1)
        return None
    if dim is None:
        if not REDUCTIONS[name]:
            return None
        if event_ndim == 0:
            return (
                (lambda x: x) if name in ("sum", "mean", "prod", "amax", "amin", "nansum") else None
            )
        dim = tuple(range(-event_ndim, 0))
    if event_ndim == 0:
        return None
    dims = tuple(
        d - event_ndim if d >= 0 else d for d in (dim if isinstance(dim, (tuple, list)) else (dim,))
    )
    if name in ("prod", "all", "any", "argmax", "argmin"):  # they take one dimension
        if len(dims) != 1:
            return None
        return lambda x: func(x, dims[0], *rest, **options)
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
        n: number of leading axes.
    """
    rest, shape = x.ndim - n - 1, index.shape[n:]
    at = index.long()
    at = torch.where(at < 0, at + x.shape[n], at)
    flat = at.reshape((*index.shape[:n], -1, *(1,) * rest))
    picked = torch.take_along_dim(x, flat, dim=n)
    return picked.reshape((*picked.shape[:n], *shape, *x.shape[n + 1 :]))


def einsum(equation: str, axes: Sequence[Sequence[str]], out: Sequence[str]) -> str:
    """The equation with a letter in front for every leading axis of an operand.

    Args:
        equation: of the events.
        axes: leading axes of each operand.
        out: leading axes of the result; one that is missing is summed over.

    >>> einsum("ij,j->i", [("k",), ("k", "row")], ("k", "row"))
    'aij,abj->abi'
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    if not arrow:
        right = "".join(x for x in sorted(set(left) - {","}) if left.count(x) == 1)
    free = [x for x in string.ascii_letters if x not in equation]
    names = dict.fromkeys(a for part in axes for a in part)
    letter = dict(zip(names, free, strict=False))
    spelled = ["".join(letter[a] for a in part) for part in axes]
    parts = [lead + event for lead, event in zip(spelled, left.split(","), strict=True)]
    return ",".join(parts) + "->" + "".join(letter[a] for a in out) + right


def inner(x: Tensor, y: Tensor) -> Tensor:
    """``(x * y).sum(-1)``, as a matrix product where the array of all products is much larger than its factors.

    >>> inner(torch.ones(2, 1, 3), torch.ones(1, 4, 3)).shape
    torch.Size([2, 4])
    """
    entries = math.prod(map(max, x.shape, y.shape))
    if entries <= max(_FEW, 2 * x.numel(), 2 * y.numel()) or x.dtype != y.dtype:
        return (x * y).sum(-1)
    return torch.einsum("...i,...i->...", x, y)


def mapped(func: Callable[..., Any], in_axes: Sequence[Sequence[bool]]) -> Callable[..., Any]:
    """``vmap`` a function of one element over the leading axes.

    Args:
        func: function of the operands of one element.
        in_axes: for every axis, outermost first, which operands have it (as their first dimension by then).
    """
    for has in reversed(in_axes):
        func = torch.func.vmap(func, in_dims=tuple(0 if h else None for h in has))
    return func
