"""Layers with weights: functions of one element that declare their weights when they are first called in a model.

A layer collects its weights into one array and calls the torch function of its kind, so that the graph holds
``linear`` and ``conv2d`` as nodes with their operands by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from ppl.errors import ModelError
from ppl.nn.base import Layer, Plates, check_count, check_rank
from ppl.nn.priors import Prior, Slot, as_prior, fan_in
from ppl.trace import Trace


class _Weighted(Layer):
    """A matrix of weights ``[outputs, inputs, *kernel]`` and a bias ``[outputs]``."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, ...],
        name: str,
        bias: Any,
        prior: Any,
        plates: Plates,
    ) -> None:
        super().__init__(name, plates)
        for what, size in (("inputs", inputs), ("outputs", outputs)):
            check_count(self.label, what, size)
        self.inputs, self.outputs, self.kernel = inputs, outputs, kernel
        self.prior = as_prior(prior, fan_in, self.label)
        self.bias = self._bias_prior(bias)

    def _bias_prior(self, bias: Any) -> Prior | None:
        if bias is False or bias is None:
            return None
        return self.prior.of_bias() if bias is True else as_prior(bias, fan_in, self.label)

    def slots(self, trace: Trace) -> tuple[tuple[Slot, Prior] | None, ...]:
        meet = self.inputs * math.prod(self.kernel)
        rows = self.units(trace, "out", self.outputs)
        columns = self.units(trace, "in", self.inputs)
        weight = Slot(f"{self.name}.weight", (rows, columns), self.kernel, meet)
        bias = Slot(f"{self.name}.bias", (rows,), (), meet)
        return (weight, self.prior), None if self.bias is None else (bias, self.bias)


class Linear(_Weighted):
    """``weight @ x + bias``.

    Args:
        inputs: length of ``x``.
        outputs: length of the result.
        name: of the layer; its latents are ``name.weight`` and ``name.bias``, its plates ``name.out`` and ``name.in``.
        bias: whether there is one, with the prior of the weights; or a prior of its own.
        prior: of the weights, see :mod:`ppl.nn.priors`; :func:`fan_in` by default.
        plates: that the weights lie in; by default those that are open where the layer is built.

    >>> @model
    ... def regression():
    ...     layer = nn.Linear(2, 1, name="fc")
    ...     with plate("row"):
    ...         observe("y", Normal(layer(given("x"))[0], 1.0))
    >>> graph = regression.graph({"x": [[1.0, 2.0]] * 3, "y": [1.0, 2.0, 3.0]})
    >>> graph.variables["fc.weight"].plates, graph.parents("y")
    (('fc.out', 'fc.in'), ('x', 'fc.weight', 'fc.bias'))

    A layer that is built inside a plate has weights for each of its elements:

    >>> @model
    ... def by_user():
    ...     user = plate("user")
    ...     row = plate("row", within=user)
    ...     with user:
    ...         layer = nn.Linear(2, 1, name="fc")
    ...     with row:
    ...         observe("y", Normal(layer(given("x"))[0], 1.0))
    >>> graph = by_user.graph({"x": [[1.0, 2.0]] * 3, "y": [1.0, 2.0, 3.0], "user": [0, 1, 1]})
    >>> graph.variables["fc.weight"].plates
    ('user', 'fc.out', 'fc.in')
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        name: str,
        bias: Any = True,
        prior: Any = None,
        plates: Plates = None,
    ) -> None:
        super().__init__(inputs, outputs, (), name, bias, prior, plates)

    def __call__(self, x: Tensor) -> Tensor:
        """The layer at one element ``x`` of shape ``[..., inputs]``."""
        weight, bias = self.arrays()
        if not isinstance(x, Tensor) or not x.ndim or x.shape[-1] != self.inputs:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ModelError(
                f"{self.label} takes vectors of {self.inputs} numbers, got one element of shape {got}. Make it "
                "nn.Linear(<length of the vector>, ...); an image goes through nn.Flatten() first."
            )
        return functional.linear(x, weight, bias)  # type: ignore[arg-type]


class _Conv(_Weighted):
    """A cross-correlation; the kernel is the event of a weight."""

    dims: ClassVar[int]
    function: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, ...],
        *,
        name: str,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        bias: Any = True,
        prior: Any = None,
        plates: Plates = None,
    ) -> None:
        label = f"{type(self).__name__}('{name}')"
        sizes = self._each(label, "kernel", kernel, least=1)
        super().__init__(inputs, outputs, sizes, name, bias, prior, plates)
        self.stride = self._each(label, "stride", stride, least=1)
        self.padding = self._each(label, "padding", padding, least=0)

    def __call__(self, x: Tensor) -> Tensor:
        """The layer at one element ``[inputs, *size]``."""
        weight, bias = self.arrays()
        self._check(x)
        return type(self).function(x, weight, bias, self.stride, self.padding)

    def _check(self, x: Any) -> None:
        what = "an image [channels, height, width]" if self.dims == 2 else "[channels, length]"
        check_rank(self.label, x, (self.dims + 1,), what)
        if x.shape[0] != self.inputs:
            raise ModelError(
                f"{self.label} has {self.inputs} input channels, got one element of shape {list(x.shape)}. Channels stand "
                "first: turn [height, width, channels] round with x.permute(2, 0, 1)."
            )
        for size, pad, kernel in zip(x.shape[1:], self.padding, self.kernel, strict=True):
            if size + 2 * pad < kernel:
                raise ModelError(
                    f"{self.label} has a kernel of size {list(self.kernel)}, larger than one element of shape {list(x.shape)} "
                    f"with padding {list(self.padding)}. Use a smaller kernel, more padding, or fewer pools before it."
                )

    def _each(self, label: str, what: str, size: Any, least: int) -> tuple[int, ...]:
        sizes = size if isinstance(size, tuple) else (size,) * self.dims
        if len(sizes) != self.dims:
            raise ModelError(
                f"{label}: {what} has {self.dims} sizes, or one for all; got {size!r}."
            )
        for each in sizes:
            check_count(label, what, 1 if each == least == 0 else each)
        return sizes


class Conv1d(_Conv):
    """Cross-correlation of a sequence ``[inputs, length]`` with one kernel for each pair of channels.

    Arguments are those of :class:`Conv2d`.
    """

    dims = 1
    function = functional.conv1d


class Conv2d(_Conv):
    """Cross-correlation of an image ``[inputs, height, width]`` with one kernel for each pair of channels.

    Args:
        inputs: channels of the image.
        outputs: channels of the result.
        kernel: height and width of the kernel, or both in one number.
        name: as for :class:`Linear`.
        stride: step between places of the kernel.
        padding: zeros added on every side.
        bias: as for :class:`Linear`.
        prior: as for :class:`Linear`; the inputs of a unit are the channels times the size of the kernel.
        plates: as for :class:`Linear`.

    >>> @model
    ... def pictures():
    ...     layer = nn.Conv2d(1, 2, 3, name="c1")
    ...     with plate("image"):
    ...         observe("y", Normal(layer(given("x")).mean(), 1.0))
    >>> graph = pictures.graph({"x": torch.zeros(5, 1, 8, 8), "y": torch.zeros(5)})
    >>> graph.variables["c1.weight"].plates, graph.variables["c1.weight"].event_shape
    (('c1.out', 'c1.in'), (3, 3))
    """

    dims = 2
    function = functional.conv2d


__all__ = ["Conv1d", "Conv2d", "Linear"]
