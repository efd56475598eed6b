"""Layers: functions of one element that declare their weights when they are first called inside a model.

Weights lie in plates of the layer (``fc1.out`` and ``fc1.in``), never in the plates that are open around the
call. A layer collects them into one array and calls the torch function of its kind, so that the graph holds
``linear``, ``conv2d`` and ``relu`` as nodes with their operands by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from ppl.errors import ModelError
from ppl.nn.priors import Prior, fan_in
from ppl.plates import PlateHandle, collect, plate
from ppl.sites import latent
from ppl.trace import Trace, active
from ppl.value import Value


class _Weighted:
    """What layers with weights share: sizes, a name, and one set of weights for each model."""

    def __init__(
        self, inputs: int, outputs: int, name: str, bias: bool, prior: Prior | None
    ) -> None:
        kind = type(self).__name__
        for what, size in (("inputs", inputs), ("outputs", outputs)):
            _check_count(f"{kind}('{name}')", what, size)
        self.inputs, self.outputs, self.name, self.bias = inputs, outputs, name, bias
        self.prior = fan_in if prior is None else prior
        self._weights: WeakKeyDictionary[Trace, tuple[Value, Value | None]] = WeakKeyDictionary()

    def weights(self, kernel: tuple[int, ...] = ()) -> tuple[Value, Value | None]:
        """Weight ``[outputs, inputs, *kernel]`` and bias ``[outputs]`` in the model that is being traced."""
        trace = active(f"nn.{type(self).__name__}")
        if trace not in self._weights:
            with _no_plate_open(trace):
                self._weights[trace] = self._declare(trace, kernel)
        return self._weights[trace]

    def _declare(self, trace: Trace, kernel: tuple[int, ...]) -> tuple[Value, Value | None]:
        trace.claim(trace.full_name(f"{self.name}.weight"))  # before its plates are
        law = self.prior(self.inputs * torch.Size(kernel).numel())
        full = trace.full_name(self.name)  # layers of two scopes have plates of their own
        rows, columns = plate(f"{full}.out", self.outputs), plate(f"{full}.in", self.inputs)
        with rows, columns:
            weight = latent(f"{self.name}.weight", law, shape=kernel)
        return collect(weight, over=(rows, columns)), self._declare_bias(law, rows)

    def _declare_bias(self, law: Any, rows: PlateHandle) -> Value | None:
        if not self.bias:
            return None
        with rows:
            bias = latent(f"{self.name}.bias", law)
        return collect(bias, over=(rows,))


class Linear(_Weighted):
    """``weight @ x + bias``.

    Args:
        inputs: length of ``x``.
        outputs: length of the result.
        name: of the layer; its latents are ``name.weight`` and ``name.bias``, its plates ``name.out`` and ``name.in``.
        bias: whether there is one.
        prior: law of one weight given the number of inputs; :func:`fan_in` by default.

    >>> @model
    ... def regression():
    ...     layer = nn.Linear(2, 1, name="fc")
    ...     with plate("row"):
    ...         observe("y", Normal(layer(given("x"))[0], 1.0))
    >>> graph = regression.graph({"x": [[1.0, 2.0]] * 3, "y": [1.0, 2.0, 3.0]})
    >>> graph.variables["fc.weight"].plates, graph.parents("y")
    (('fc.out', 'fc.in'), ('x', 'fc.weight', 'fc.bias'))
    """

    def __init__(
        self, inputs: int, outputs: int, *, name: str, bias: bool = True, prior: Prior | None = None
    ) -> None:
        super().__init__(inputs, outputs, name, bias, prior)

    def __call__(self, x: Tensor) -> Tensor:
        """The layer at one element ``x`` of shape ``[..., inputs]``."""
        weight, bias = self.weights()
        return functional.linear(x, weight, bias)


class Conv2d(_Weighted):
    """Cross-correlation of an image ``[inputs, height, width]`` with one kernel for each pair of channels.

    Args:
        inputs: channels of the image.
        outputs: channels of the result.
        kernel: height and width of the kernel, or both in one number.
        name: as for :class:`Linear`.
        stride: step between places of the kernel.
        padding: zeros added on every side.
        bias: whether there is one.
        prior: law of one weight given the number of weights that meet in one unit.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        *,
        name: str,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        prior: Prior | None = None,
    ) -> None:
        super().__init__(inputs, outputs, name, bias, prior)
        self.kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        for size in self.kernel:
            _check_count(f"Conv2d('{name}')", "kernel", size)
        self.stride, self.padding = stride, padding

    def __call__(self, x: Tensor) -> Tensor:
        """The layer at one image."""
        weight, bias = self.weights(self.kernel)
        return functional.conv2d(x, weight, bias, self.stride, self.padding)


class ReLU:
    """``max(x, 0)``, entry by entry."""

    def __call__(self, x: Tensor) -> Tensor:
        """The layer at one element of any shape."""
        return torch.relu(x)


class Tanh:
    """``tanh(x)``, entry by entry."""

    def __call__(self, x: Tensor) -> Tensor:
        """The layer at one element of any shape."""
        return torch.tanh(x)


class MaxPool2d:
    """The largest entry of each window of an image ``[channels, height, width]``.

    Args:
        kernel: height and width of the window.
        stride: step between windows; the window's size by default.
    """

    def __init__(self, kernel: int, stride: int | None = None) -> None:
        self.kernel, self.stride = kernel, kernel if stride is None else stride

    def __call__(self, x: Tensor) -> Tensor:
        """The layer at one image."""
        return functional.max_pool2d(x, self.kernel, self.stride)


class Flatten:
    """All entries of one element in a vector."""

    def __call__(self, x: Tensor) -> Tensor:
        """The layer at one element of any shape."""
        return torch.flatten(x)


class Sequential:
    """Layers one after the other; any function of one element is a layer."""

    def __init__(self, *layers: Callable[[Any], Any]) -> None:
        self.layers = layers

    def __call__(self, x: Tensor) -> Tensor:
        """The last layer's result."""
        for layer in self.layers:
            x = layer(x)
        return x


@contextmanager
def _no_plate_open(trace: Trace) -> Iterator[None]:
    around, trace.open = trace.open, []
    try:
        yield
    finally:
        trace.open = around


def _check_count(layer: str, what: str, size: Any) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ModelError(f"{layer} needs a positive whole number of {what}, got {size!r}.")
