"""Batch normalisation, and how a graph whose factors see one element holds it.

In the graph it stands as a function of one element that is given the mean and variance of each channel: the covariates
``name.mean`` and ``name.variance``, with defaults 0 and 1. A method that trains on minibatches compiles it with the
statistics of the batch instead (``Compiler(..., training=True)``), estimates the two covariates under draws of the
weights, and passes them as data to predict. Other methods take it when the data holds the two, and refuse it by name
otherwise.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ppl.errors import ModelError, UnsupportedError, user_line
from ppl.graph import Variable
from ppl.nn.base import Plates
from ppl.nn.norms import Norm, beside
from ppl.nn.priors import Prior, Slot
from ppl.operations import Batched
from ppl.plates import collect
from ppl.trace import Trace, active
from ppl.value import Value


class BatchNorm(Norm):
    """Every channel with the mean and variance given for it, then a scale and a shift; see the module's page.

    Args:
        channels: of the element, ``[channels, *size]``.
        name: of the layer; its sites are ``name.weight`` (scale) and ``name.bias`` (shift), its covariates ``name.mean``
            and ``name.variance``, its plate ``name.out``.
        affine: as for :class:`GroupNorm`.
        prior: as for :class:`GroupNorm`.
        plates: ``()`` where the layer is built inside a plate: the statistics of a batch are those of one network.
        eps: added to the variance.
        mean: start of ``name.mean``: a number, or an array ``[channels]``.
        variance: start of ``name.variance``.

    >>> @model
    ... def normalised():
    ...     layer = nn.BatchNorm(2, name="bn")
    ...     with plate("row"):
    ...         observe("y", Normal(layer(given("x")).sum(), 1.0))
    >>> graph = normalised.graph({"x": torch.ones(3, 2), "y": torch.zeros(3)})
    >>> [(v.name, v.role) for v in graph.variables.values()]  # doctest: +NORMALIZE_WHITESPACE
    [('x', 'given'), ('bn.weight', 'param'), ('bn.bias', 'param'), ('bn.mean', 'given'),
     ('bn.variance', 'given'), ('y', 'observed')]
    """

    def __init__(
        self,
        channels: int,
        *,
        name: str,
        affine: bool = True,
        prior: Any = None,
        plates: Plates = None,
        eps: float = 1e-5,
        mean: Any = 0.0,
        variance: Any = 1.0,
    ) -> None:
        super().__init__(channels, name, affine, prior, plates, eps)
        if self._around:
            raise ModelError(
                f"{self.label} is built inside plates and cannot be a family: the statistics of a batch are those of one "
                "network. Build it outside, say plates=(), or use nn.FRN, nn.GroupNorm or nn.LayerNorm."
            )
        self.start = {"mean": mean, "variance": variance}

    def slots(self, trace: Trace) -> tuple[tuple[Slot, Prior] | None, ...]:
        channel = self.units(trace, "out", self.channels)
        mean, variance = (_Buffer(self.start[what]) for what in ("mean", "variance"))
        return (
            *super().slots(trace),
            (Slot(f"{self.name}.mean", (channel,), (), 1), mean),
            (Slot(f"{self.name}.variance", (channel,), (), 1), variance),
        )

    def __call__(self, x: Tensor) -> Tensor:
        """The layer at one element."""
        self.check(x, (1, 2, 3), "[channels, *size]")
        scale, shift, mean, variance = self.arrays()
        extra = [v for v in (mean, variance, scale, shift) if v is not None]
        shapes = (tuple(x.shape), *((self.channels,) for _ in extra))
        full = active("nn.BatchNorm").full_name(self.name)
        return BatchStatistics(full, x.ndim, self.eps, shapes)(x, *extra)


class BatchStatistics(Batched):
    """The function of a :class:`BatchNorm`: ``(x, mean, variance)``, and maybe scale and shift.

    Lowered for training it leaves ``mean`` and ``variance`` aside and takes those of the elements at hand.
    """

    needs_batch = True  # methods that know no batch refuse it, see ppl.backend

    def __init__(
        self, layer: str, rank: int, eps: float, shapes: tuple[tuple[int, ...], ...]
    ) -> None:
        super().__init__("batch_norm", partial(_batch_norm, rank, eps), shapes, rank)
        self.layer, self.rank, self.eps = layer, rank, eps

    def statistics(self, x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Mean and variance of every channel, axes of size one kept.

        Args:
            x: ``[*axes, channels, *size]``.
            dims: axes of the elements of a batch, counted from the end.

        Returns:
            Both ``[*axes, channels, *size]`` with ones at ``dims`` and for ``size``; the variance has no correction for
            the number of elements. Running estimates are means of these over batches.
        """
        variance, mean = torch.var_mean(x, self._over(x, dims), correction=0, keepdim=True)
        return mean, variance

    def train(self, dims: tuple[int, ...], x: Tensor, *rest: Tensor) -> Tensor:
        """The layer with the statistics of the batch; arguments as for :meth:`statistics`."""
        over = self._over(x, dims)
        if len(over) == x.ndim - 1 and all(
            v.ndim == 1 for v in rest[2:]
        ):  # torch's own, in one pass
            flat = x.reshape(-1, *x.shape[x.ndim - self.rank :])
            scale, shift = rest[2:] or (None, None)
            made = functional.batch_norm(flat, None, None, scale, shift, True, 0.0, self.eps)
            return made.reshape(x.shape)
        mean, variance = self.statistics(x, dims)
        return _scaled(self.rank, self.eps, x, mean, variance, rest[2:])

    def _over(self, x: Tensor, dims: tuple[int, ...]) -> tuple[int, ...]:
        over = (*dims, *range(1 - self.rank, 0))
        if math.prod(x.shape[d] for d in over) < 2:
            raise UnsupportedError(
                f"BatchNorm('{self.layer}') saw one number a channel in a batch, which has no variance. Use larger batches."
            )
        return over


class _Buffer(Prior):
    """A covariate with a default: known to the model, kept up to date by a method that trains."""

    def __init__(self, start: Any) -> None:
        self.start = start

    def declare(self, slot: Slot) -> Value:
        trace = active("nn.BatchNorm")
        start = torch.as_tensor(self.start, dtype=trace.dtype).detach().expand(slot.shape).clone()
        full = trace.full_name(slot.name)
        with slot.plates[0]:
            variable = Variable(
                full, "given", trace.open_plates(), (), initial=start, where=user_line()
            )
            value = trace.add_variable(variable, start[0])
        return collect(value, over=slot.plates)


def _batch_norm(rank: int, eps: float, x: Tensor, *rest: Tensor) -> Tensor:
    mean, variance = (beside(v, rank) for v in rest[:2])
    return _scaled(rank, eps, x, mean, variance, rest[2:])


def _scaled(
    rank: int, eps: float, x: Tensor, mean: Tensor, variance: Tensor, rest: tuple[Tensor, ...]
) -> Tensor:
    # One number a channel to multiply by and one to add: the images themselves are read once.
    scale = (variance + eps).rsqrt()
    if not rest:
        return torch.addcmul(-mean * scale, x, scale)
    weight, bias = (beside(v, rank) for v in rest)
    return torch.addcmul(bias - mean * scale * weight, x, scale * weight)


__all__ = ["BatchNorm", "BatchStatistics"]
