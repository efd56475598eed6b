"""A traced value: a tensor that shows one plate element and records what torch does to it.

A model function runs once. Every latent, observation and covariate in it is a :class:`Value`, a subclass of
``torch.Tensor`` that holds a *prototype* (the numbers of one element, so that shapes and dtypes are real) and
a reference to a node of the graph under construction. Each torch call on values goes through
``__torch_function__``, which runs the call on the prototypes and records a node.
"""

from __future__ import annotations

import opcode
import operator
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NoReturn, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from ppl.errors import ModelError, user_frame


class Recorder(Protocol):
    """What a value needs of the trace it belongs to."""

    def call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any: ...


RECORDER: ContextVar[Recorder | None] = ContextVar("recorder", default=None)

# Reading these changes nothing and tells only about one element: no node is recorded.
_METADATA = {
    "shape", "ndim", "dtype", "device", "layout", "size", "dim", "numel", "nelement", "ndimension", "stride", "is_sparse",
    "is_floating_point", "is_complex", "is_signed", "is_contiguous", "requires_grad", "is_leaf", "is_cuda", "names", "is_nested",
    "element_size", "itemsize", "__hash__", "__len__", "is_quantized", "is_meta", "type", "is_cpu", "is_tensor",
    "broadcast_shapes", "result_type", "is_same_size",
}  # fmt: skip
_TO_NUMBER = {
    "item", "tolist", "numpy", "__array__", "__float__", "__int__", "__index__", "__complex__", "__contains__", "cpu_numpy",
    "__array_wrap__", "__array_priority__", "__dlpack__",
}  # fmt: skip
_RANDOM = {
    "rand_like", "randn_like", "randint_like", "bernoulli", "multinomial", "poisson", "normal", "dropout", "dropout1d",
    "dropout2d", "binomial", "rrelu", "alpha_dropout", "feature_dropout", "gumbel_softmax",
}  # fmt: skip
# ``x += y`` rebinds a Python name, as it does for numbers; it is recorded as ``x + y``.
_AUGMENTED = {
    "add_": torch.add, "sub_": torch.sub, "mul_": torch.mul, "div_": torch.div, "pow_": torch.pow,
    "floor_divide_": torch.floor_divide, "remainder_": torch.remainder,
}  # fmt: skip
# A NumPy number on the left, np.sqrt(2.0) * x, is a number like any other.
_NUMPY = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "divide": operator.truediv,
    "true_divide": operator.truediv, "power": operator.pow, "greater": operator.gt, "less": operator.lt,
    "greater_equal": operator.ge, "less_equal": operator.le,
}  # fmt: skip


class Value(Tensor):
    """One element of a traced quantity; behaves as a tensor of that element's shape."""

    node: Any  # the graph.Node that made it
    index_of: str | None  # the plate that this value indexes, for ``x[i]``

    @staticmethod
    def make(prototype: Tensor, node: Any, index_of: str | None = None) -> Value:
        """Wrap a prototype; the storage is shared, never copied."""
        value = torch.Tensor._make_subclass(Value, prototype.detach())
        value.node, value.index_of = node, index_of
        return value

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = function_name(func)
        if name in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if name == "__repr__" or name == "__format__" or name == "__str__":
            return describe(args[0])
        if name == "__bool__":
            return _truth(args[0])
        if name in _AUGMENTED and _is_augmented_assignment():
            func = cast(Callable[..., Any], _AUGMENTED[name])
        else:
            _refuse(name, args)
        if kwargs and kwargs.get("inplace"):
            raise ModelError(f"'{name}' with inplace=True assigns into a value. Leave inplace out.")
        recorder = RECORDER.get()
        if recorder is None:
            raise ModelError(
                "this value belongs to a model that has finished tracing. "
                "Return nothing from a model; read results from the posterior."
            )
        return recorder.call(func, args, kwargs or {})

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        known = _NUMPY.get(ufunc.__name__)
        numbers = [x.item() if isinstance(x, np.generic) else x for x in inputs]
        if known is None or any(isinstance(x, np.ndarray) for x in numbers):
            _refuse("numpy", inputs)
        return known(*numbers)  # type: ignore[misc]

    def __delitem__(self, index: Any) -> None:
        _refuse_assignment()

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.ndim == 0:
            raise ModelError(
                "a value with one number cannot be iterated over. Loop over a plate by opening it."
            )
        return iter([self[i] for i in range(self.shape[0])])


def is_traced(x: object) -> bool:
    """Whether ``x`` is a value of a model that is being traced."""
    return isinstance(x, Value)


def prototype(x: Any) -> Any:
    """The plain tensor behind a value; anything else unchanged."""
    if not isinstance(x, Value):
        return x
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)


def function_name(func: Callable[..., Any]) -> str:
    """The public name of a torch function, property getters included.

    >>> function_name(torch.Tensor.shape.__get__), function_name(torch.exp)
    ('shape', 'exp')
    """
    name = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        return getattr(func.__self__, "__name__", name)  # type: ignore[attr-defined]
    return name


def describe(value: Value) -> str:
    """What ``print(value)`` shows inside a model: plates and the shape of one element."""
    plates = ", ".join(value.node.plates) or "no plate"
    return f"<value of {plates}; one element {list(value.shape)}, {str(value.dtype).removeprefix('torch.')}>"


def _truth(value: Value) -> bool:
    # torch.distributions checks its arguments with `if not valid.all()`; that check is about the numbers of the
    # prototype and decides nothing in the model, so it is let through.  Any other branch is the user's.
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back  # type: ignore[assignment]
    if frame is not None and "/torch/distributions/" in frame.f_code.co_filename:
        return bool(prototype(value))
    raise ModelError(
        f"a model may not branch on the value {describe(value)}: it stands for every element and particle at once. "
        "Use torch.where(condition, a, b), a Mixture, or a structural parameter of the model."
    )


def _is_augmented_assignment() -> bool:
    """Whether the user's line says ``x += y`` and not ``x.add_(y)``: torch gives both the same name."""
    frame = user_frame()
    if frame is None:
        return False
    return opcode.opname[frame.f_code.co_code[frame.f_lasti]].startswith(("BINARY_OP", "INPLACE_"))


def _refuse(name: str, args: tuple[Any, ...]) -> None:
    if name in _TO_NUMBER:
        raise ModelError(
            "a model may not turn a value into a number or a NumPy array. "
            "Use the torch function of the same name, torch.exp(x) for np.exp(x); make an array a tensor, torch.as_tensor(array)."
        )
    if name in _RANDOM:
        raise ModelError(
            f"'{name}' draws random numbers inside a model. Declare the draw: latent(name, distribution)."
        )
    if name == "__setitem__" or name in (
        "__delitem__",
        "backward",
        "requires_grad_",
        "set_",
        "out",
    ):
        _refuse_assignment()
    if name.endswith("_") and not name.endswith("__"):
        _refuse_assignment()


def _refuse_assignment() -> NoReturn:
    raise ModelError(
        "a model may not assign into a value. Build a new one: torch.where(mask, a, b), torch.cat or torch.stack."
    )
