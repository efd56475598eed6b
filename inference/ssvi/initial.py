"""Where means and scales of active weights start: by the number of inputs that a unit really has, with little noise.

A unit of a layer at density 0.05 has a twentieth of its inputs, so the usual rule for dense layers would start it 4.5 times too
small. And a net whose units start drowned in the noise of their weights does not begin to learn: scales are shrunk, layer
by layer, until noise is at most 5 % of the variance of its outputs.

Source: [He2015] equation 10 with the effective number of inputs.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ppl.inference.networks.priors import Prior
from ppl.inference.ssvi.patterns import Form

_LEAST = 1e-3  # factor on scales
NOISE = 0.05  # largest share of noise in the variance of a layer's outputs at the start


def effective_inputs(form: Form, count: int) -> float:
    """Active weights that meet in an output unit, on average; at least 1.

    >>> effective_inputs(Form("linear", (10, 100)), 50)
    5.0
    """
    return max(1.0, count / form.rows)


def first_scale(form: Form, count: int) -> float:
    """Standard deviation of the first means, ``sqrt(2 / effective inputs)``.

    >>> first_scale(Form("linear", (10, 100)), 80)
    0.5
    """
    return math.sqrt(2.0 / effective_inputs(form, count))


def widened(prior: Prior, form: Form, count: int) -> Prior:
    """A law of variance ``1 / inputs``, with the inputs that a unit really has; any other law as it is."""
    if prior.leaves is None or prior.kind not in ("normal", "laplace"):
        return prior
    loc, scale = prior.leaves
    variances = {"normal": 1.0, "laplace": 2.0}[prior.kind] * scale.square()
    if not torch.allclose(variances * form.columns, torch.ones_like(variances), rtol=1e-4):
        return prior
    factor = math.sqrt(form.columns / effective_inputs(form, count))
    return replace(prior, leaves=(loc, factor * scale))


def noise_share(mean: Tensor, variance: Tensor) -> Tensor:
    """Share of the noise of weights in the variance of a layer's outputs, from both for a batch ``[*batch, outputs]``.

    >>> noise_share(torch.tensor([-1.0, 1.0]), torch.tensor([2.0, 2.0]))
    tensor(0.5000)
    """
    noise = variance.mean()
    return noise / (noise + mean.var()).clamp(min=torch.finfo(noise.dtype).tiny)


def shrinkage(share: Tensor, limit: float = NOISE) -> Tensor:
    """Factor on all standard deviations of a layer that brings its share of noise down to the limit; 1 below it.

    >>> shrinkage(torch.tensor(0.5))
    tensor(0.2294)
    """
    # Where outputs are the same for all data there is nothing to drown: scales stay positive.
    factor = (limit * (1 - share) / (share * (1 - limit))).sqrt().clamp(min=_LEAST)
    return torch.where(share > limit, factor, torch.ones_like(share))
