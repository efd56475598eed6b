"""Families on the real line or an interval of it, each with its own density of minimal shape.

Densities as in [Johnson1994], with the parameters of ``torch.distributions``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint
from torch.special import log_ndtr, ndtr, ndtri

from ppl.distributions.arguments import is_traced, show
from ppl.distributions.base import Distribution, open_uniform, outside, standard
from ppl.errors import ModelError

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
_LOCATION_SCALE = {"loc": constraints.real, "scale": constraints.positive}


class Normal(Distribution):
    """Gaussian with mean ``loc`` and standard deviation ``scale``.

    >>> Normal(0.0, 1.0).log_prob(torch.tensor(0.0)).exp()
    tensor(0.3989)
    """

    arg_constraints = _LOCATION_SCALE
    has_cdf = True
    loc: Any
    scale: Any

    def log_prob(self, value: Tensor) -> Tensor:
        residual, log_norm = self.whitened(value)
        return log_norm - 0.5 * residual.square()

    def whitened(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Residual of unit variance, and the log-density at zero, entry by entry."""
        value, loc, scale = self.against(value)
        return (value - loc) / scale, -(scale.log() + HALF_LOG_2PI)

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        loc, scale = self.expanded(shape, generator)
        return loc + scale * standard(torch.randn, shape, loc, generator)

    def cdf(self, value: Tensor) -> Tensor:
        value, loc, scale = self.against(value)
        return ndtr((value - loc) / scale)

    def log_cdf(self, value: Tensor) -> Tensor:
        value, loc, scale = self.against(value)
        return log_ndtr((value - loc) / scale)

    def log_survival(self, value: Tensor) -> Tensor:
        value, loc, scale = self.against(value)
        return log_ndtr((loc - value) / scale)

    def icdf(self, p: Tensor) -> Tensor:
        p, loc, scale = self.against(p)
        return loc + scale * ndtri(p)

    def isf(self, q: Tensor) -> Tensor:
        q, loc, scale = self.against(q)
        return loc - scale * ndtri(q)

    @property
    def mean(self) -> Tensor:
        return self.full(self.tensors()["loc"])

    @property
    def variance(self) -> Tensor:
        return self.full(self.tensors()["scale"].square())


class Laplace(Distribution):
    """Two-sided exponential with median ``loc``; its variance is ``2 * scale**2``."""

    arg_constraints = _LOCATION_SCALE
    has_cdf = True

    def log_prob(self, value: Tensor) -> Tensor:
        value, loc, scale = self.against(value)
        return -(value - loc).abs() / scale - (2 * scale).log()

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        loc, _ = self.expanded(shape, generator)
        return self.icdf(open_uniform(shape, loc, generator))

    def cdf(self, value: Tensor) -> Tensor:
        return self.log_cdf(value).exp()

    def log_cdf(self, value: Tensor) -> Tensor:
        value, loc, scale = self.against(value)
        return _laplace_log_cdf((value - loc) / scale)

    def log_survival(self, value: Tensor) -> Tensor:
        value, loc, scale = self.against(value)
        return _laplace_log_cdf((loc - value) / scale)

    def icdf(self, p: Tensor) -> Tensor:
        p, loc, scale = self.against(p)
        return loc + scale * torch.where(p < 0.5, (2 * p).log(), -(2 * (1 - p)).log())

    def isf(self, q: Tensor) -> Tensor:
        q, loc, scale = self.against(q)
        return loc - scale * torch.where(q < 0.5, (2 * q).log(), -(2 * (1 - q)).log())

    @property
    def mean(self) -> Tensor:
        return self.full(self.tensors()["loc"])

    @property
    def variance(self) -> Tensor:
        return self.full(2 * self.tensors()["scale"].square())


class Logistic(Distribution):
    """Density of ``loc + scale * log(u / (1 - u))`` for uniform ``u``."""

    arg_constraints = _LOCATION_SCALE
    has_cdf = True

    def log_prob(self, value: Tensor) -> Tensor:
        value, loc, scale = self.against(value)
        size = ((value - loc) / scale).abs()
        return -size - 2 * torch.log1p(torch.exp(-size)) - scale.log()

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        loc, _ = self.expanded(shape, generator)
        return self.icdf(open_uniform(shape, loc, generator))

    def cdf(self, value: Tensor) -> Tensor:
        value, loc, scale = self.against(value)
        return torch.sigmoid((value - loc) / scale)

    def log_cdf(self, value: Tensor) -> Tensor:
        value, loc, scale = self.against(value)
        return torch.nn.functional.logsigmoid((value - loc) / scale)

    def log_survival(self, value: Tensor) -> Tensor:
        value, loc, scale = self.against(value)
        return torch.nn.functional.logsigmoid((loc - value) / scale)

    def icdf(self, p: Tensor) -> Tensor:
        p, loc, scale = self.against(p)
        return loc + scale * torch.logit(p)

    def isf(self, q: Tensor) -> Tensor:
        q, loc, scale = self.against(q)
        return loc - scale * torch.logit(q)

    @property
    def mean(self) -> Tensor:
        return self.full(self.tensors()["loc"])

    @property
    def variance(self) -> Tensor:
        return self.full(self.tensors()["scale"].square() * (math.pi**2 / 3))


class Cauchy(Distribution):
    """Heavy-tailed law without a mean; half of its mass lies within ``scale`` of ``loc``."""

    arg_constraints = _LOCATION_SCALE
    has_cdf = True

    def log_prob(self, value: Tensor) -> Tensor:
        value, loc, scale = self.against(value)
        return -torch.log1p(((value - loc) / scale).square()) - (math.pi * scale).log()

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        loc, _ = self.expanded(shape, generator)
        return self.icdf(open_uniform(shape, loc, generator))

    def cdf(self, value: Tensor) -> Tensor:
        value, loc, scale = self.against(value)
        return (
            torch.atan2(torch.ones_like(value), (loc - value) / scale) / math.pi
        )  # no cancellation below

    def log_survival(self, value: Tensor) -> Tensor:
        value, loc, scale = self.against(value)
        return (torch.atan2(torch.ones_like(value), (value - loc) / scale) / math.pi).log()

    def icdf(self, p: Tensor) -> Tensor:
        p, loc, scale = self.against(p)
        return loc - scale / torch.tan(math.pi * p)

    def isf(self, q: Tensor) -> Tensor:
        q, loc, scale = self.against(q)
        return loc + scale / torch.tan(math.pi * q)


class StudentT(Distribution):
    """Student's t with ``df`` degrees of freedom; the mean needs ``df > 1``, the variance ``df >
    2``.
    """

    arg_constraints = {"df": constraints.positive, **_LOCATION_SCALE}
    defaults = {"loc": 0.0, "scale": 1.0}

    def log_prob(self, value: Tensor) -> Tensor:
        value, df, loc, scale = self.against(value)
        constant = (
            torch.lgamma(0.5 * df) - torch.lgamma(0.5 * (df + 1)) + 0.5 * (math.pi * df).log()
        )
        kernel = torch.log1p(((value - loc) / scale).square() / df)
        return -0.5 * (df + 1) * kernel - scale.log() - constant

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        df, loc, scale = self.expanded(shape, generator)
        chi2 = 2 * torch._standard_gamma(0.5 * df, generator=generator)
        return loc + scale * standard(torch.randn, shape, loc, generator) * (df / chi2).sqrt()

    @property
    def mean(self) -> Tensor:
        args = self.tensors()
        return self.full(torch.where(args["df"] > 1, args["loc"], torch.nan))

    @property
    def variance(self) -> Tensor:
        args = self.tensors()
        df = args["df"]
        finite = torch.where(df > 2, df / (df - 2), torch.inf)
        return self.full(torch.where(df > 1, args["scale"].square() * finite, torch.nan))


class Uniform(Distribution):
    """Constant density on the closed interval from ``low`` to ``high``."""

    arg_constraints = {"low": constraints.real, "high": constraints.real}
    has_cdf = True
    low: Any
    high: Any

    def check(self) -> None:
        check_order(type(self).__name__, self.low, self.high)

    def log_prob(self, value: Tensor) -> Tensor:
        value, low, high = self.against(value)
        return outside((value >= low) & (value <= high), -(high - low).log())

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        low, high = self.expanded(shape, generator)
        return low + (high - low) * standard(torch.rand, shape, low, generator)

    def cdf(self, value: Tensor) -> Tensor:
        value, low, high = self.against(value)
        return ((value - low) / (high - low)).clamp(0, 1)

    def icdf(self, p: Tensor) -> Tensor:
        p, low, high = self.against(p)
        return low + (high - low) * p

    @property
    def support(self) -> Constraint:
        return constraints.interval(self.low, self.high)

    @property
    def mean(self) -> Tensor:
        args = self.tensors()
        return self.full(0.5 * (args["low"] + args["high"]))

    @property
    def variance(self) -> Tensor:
        args = self.tensors()
        return self.full((args["high"] - args["low"]).square() / 12)


def check_order(family: str, low: Any, high: Any) -> None:
    """Raise where two concrete bounds are in the wrong order."""
    if low is None or high is None or is_traced(low) or is_traced(high):
        return
    if not bool(torch.all(torch.as_tensor(low) < torch.as_tensor(high))):
        raise ModelError(
            f"{family}: low must be less than high, got low={show(low)}, high={show(high)}. Swap "
            "or move the bounds."
        )


def _laplace_log_cdf(z: Tensor) -> Tensor:
    return torch.where(z < 0, z - math.log(2), torch.log1p(-0.5 * torch.exp(-z.abs())))
