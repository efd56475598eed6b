"""Which kernel a layer runs on: the one that a timing at the start finds faster."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ppl.inference.ssvi.patterns import Form, Kernel, product

_REPEATS = 4
_DENSEST = 0.3  # above, no sparse kernel has ever been faster
_LARGEST = (
    2**24
)  # dense arrays above this many numbers are not built to be timed; the sparse one runs


class Timing(NamedTuple):
    """The kernel of a layer and what it was chosen by."""

    kernel: Kernel
    seconds: float  # forward and backward of one product by this kernel; nan: not measured
    dense: float  # the same with all weights; nan: not measured

    @property
    def speed(self) -> float:
        """How many times faster than the dense layer."""
        return self.dense / self.seconds


UNTIMED = Timing("dense", math.nan, math.nan)


def choose(form: Form, count: int, batch: int, dtype: torch.dtype, device: torch.device) -> Timing:
    """Time a layer's product with ``count`` random weights, forward and backward, by the kernels that can do it.

    Args:
        form: of the layer.
        count: active weights.
        batch: examples in a step.
        dtype: of the run.
        device: of the run.

    >>> choose(Form("linear", (8, 8)), 64, 4, torch.float32, torch.device("cpu")).kernel
    'dense'
    """
    if form.kind != "linear" or count > _DENSEST * form.size:
        return UNTIMED
    if form.size > _LARGEST:
        return UNTIMED._replace(kernel="csr")
    # Rounded so that layers that differ by a few weights share one measurement, and so one choice.
    count = max(1, round(count, -max(len(str(count)) - 2, 0)))
    return _measured(form.shape, count, batch, dtype, str(device), torch.get_num_threads())


@lru_cache(maxsize=256)
def _measured(
    shape: tuple[int, ...], count: int, batch: int, dtype: torch.dtype, device: str, threads: int
) -> Timing:
    """Cached: within one process a layer always gets the same kernel (``threads`` is part of the key)."""
    form, generator = Form("linear", shape), torch.Generator(device).manual_seed(0)
    count = min(count, form.size)
    index = torch.randperm(form.size, generator=generator, device=device)[:count].sort().values
    x = torch.randn(batch, form.columns, generator=generator, dtype=dtype, device=device)
    every = torch.arange(form.size, device=device)
    csr = _seconds(product("csr", form, index), index, x)
    masked = _seconds(product("dense", form, index), index, x)
    dense = _seconds(lambda v, x: functional.linear(x, v.reshape(shape)), every, x)
    return Timing("csr", csr, dense) if csr < masked else Timing("dense", masked, dense)


def _seconds(run: Callable[[Tensor, Tensor], Tensor], index: Tensor, x: Tensor) -> float:
    """The fastest of a few runs, forward and backward."""
    values = torch.full_like(index, 0.1, dtype=x.dtype).requires_grad_()
    inputs = x.clone().requires_grad_()
    best = math.inf
    with torch.enable_grad():
        for _ in range(_REPEATS):
            begin = time.perf_counter()
            y = run(values, inputs)
            torch.autograd.grad(y.sum(), (values, inputs))
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            best = min(best, time.perf_counter() - begin)
    return best
