"""Laws made of one other law: independent repeats, masks, truncation and censoring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch import distributions as td
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from ppl.distributions.arguments import is_traced
from ppl.distributions.base import NESTED, STATIC, Distribution, open_uniform, outside
from ppl.distributions.continuous import check_order
from ppl.errors import ModelError

WITH_CDF = (
    "Normal, HalfNormal, LogNormal, Laplace, Logistic, Cauchy, "
    "HalfCauchy, Exponential, Gamma, Weibull, Uniform"
)


class Independent(Distribution):
    """The last ``reinterpreted_batch_ndims`` batch dimensions of a law as part of one draw."""

    arg_constraints = {"base_distribution": NESTED, "reinterpreted_batch_ndims": STATIC}
    base_distribution: Distribution
    reinterpreted_batch_ndims: int

    def check(self) -> None:
        count, have = self.reinterpreted_batch_ndims, len(self.base_distribution.batch_shape)
        if not isinstance(count, int) or not 0 <= count <= have:
            raise ModelError(
                f"Independent: reinterpreted_batch_ndims must be an integer from 0 to {have}, the "
                "batch dimensions of "
                f"{self.base_distribution!r}, got {count!r}. Give its parameters the shape of one "
                "draw."
            )
        self.event_dim = self.base_distribution.event_dim + count
        self.is_discrete = self.base_distribution.is_discrete

    def extra_dims(self, name: str) -> int:
        return self.reinterpreted_batch_ndims

    def log_prob(self, value: Tensor) -> Tensor:
        dims = tuple(range(-self.reinterpreted_batch_ndims, 0))
        each = self.base_distribution.log_prob(value)
        return each.sum(dims) if dims else each

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        inner = self.event_shape[: self.reinterpreted_batch_ndims]
        return self.base_distribution.sample((*shape, *inner), generator)

    def to_torch(self) -> td.Distribution:
        return td.Independent(
            self.base_distribution.to_torch(), self.reinterpreted_batch_ndims, validate_args=False
        )

    @property
    def event_shape(self) -> torch.Size:
        batch, count = self.base_distribution.batch_shape, self.reinterpreted_batch_ndims
        return batch[len(batch) - count :] + self.base_distribution.event_shape

    @property
    def support(self) -> Constraint:
        return constraints.independent(
            self.base_distribution.support, self.reinterpreted_batch_ndims
        )

    @property
    def mean(self) -> Tensor:
        return self.base_distribution.mean

    @property
    def variance(self) -> Tensor:
        return self.base_distribution.variance


class _Wrapper(Distribution):
    """One law ``dist`` with the same events."""

    dist: Distribution

    def check(self) -> None:
        self.event_dim, self.is_discrete = self.dist.event_dim, self.dist.is_discrete

    @property
    def event_shape(self) -> torch.Size:
        return self.dist.event_shape

    @property
    def support(self) -> Constraint:
        return self.dist.support


class Masked(_Wrapper):
    """``dist`` where ``keep`` is true; elsewhere the factor is 0 in logs. Draws and moments are
    those of ``dist``.
    """

    arg_constraints = {"dist": NESTED, "keep": constraints.real}
    keep: Any

    def log_prob(self, value: Tensor) -> Tensor:
        keep = self.against(value)[1]
        return torch.where(keep != 0, self.dist.log_prob(value), 0.0)

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        return self.dist.sample(shape, generator)

    def enumerate_support(self) -> Tensor | None:
        return self.dist.enumerate_support()

    @property
    def mean(self) -> Tensor:
        return self.full(self.dist.mean)

    @property
    def variance(self) -> Tensor:
        return self.full(self.dist.variance)


class _Limited(_Wrapper):
    """A continuous law with a distribution function, and one or two limits."""

    arg_constraints = {"dist": NESTED, "low": constraints.real, "high": constraints.real}
    defaults = {"low": None, "high": None}
    low: Any
    high: Any

    def check(self) -> None:
        super().check()
        family = type(self).__name__
        if not self.dist.has_cdf:
            raise ModelError(
                f"{family} needs a law whose distribution function is known, got "
                f"{type(self.dist).__name__}. "
                f"Use one of {WITH_CDF}."
            )
        self.low, self.high = _finite(self.low), _finite(self.high)
        if self.low is None and self.high is None:
            raise ModelError(
                f"{family}: give a finite low, a finite high, or both; got none. Or use the law "
                "as it is."
            )
        check_order(family, self.low, self.high)

    def _limits(self, value: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        value, *limits = self.against(value)
        low = limits.pop(0) if self.low is not None else None
        return value, low, limits.pop(0) if limits else None


class Truncated(_Limited):
    """``dist`` given that it lies between ``low`` and ``high``; its density is divided by the mass
    between them.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        value, low, high = self._limits(value)
        log_density = self.dist.log_prob(value) - self._log_mass(low, high)
        if low is not None:
            log_density = outside(value >= low, log_density)
        return log_density if high is None else outside(value <= high, log_density)

    def _log_mass(self, low: Tensor | None, high: Tensor | None) -> Tensor:
        if low is None:
            return self.dist.log_cdf(high)  # type: ignore[arg-type]
        if high is None:
            return self.dist.log_survival(low)
        return log_between(self.dist, low, high)

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        """Invert the distribution function, from the side on which the interval lies."""
        tensors = self.dist.tensors(generator=generator).values()
        uniform = open_uniform(shape, next(iter(tensors)), generator)
        _, low, high = self._limits(uniform)
        zero, one = torch.zeros_like(uniform), torch.ones_like(uniform)
        below_low = zero if low is None else self.dist.log_cdf(low).exp()
        below_high = one if high is None else self.dist.log_cdf(high).exp()
        above_low = one if low is None else self.dist.log_survival(low).exp()
        above_high = zero if high is None else self.dist.log_survival(high).exp()
        lower = self.dist.icdf(below_low + uniform * (below_high - below_low))
        upper = self.dist.isf(above_high + uniform * (above_low - above_high))
        return torch.where(below_low < 0.5, lower, upper).clamp(low, high)

    @property
    def support(self) -> Constraint:
        inner = self.dist.support
        low = getattr(inner, "lower_bound", None) if self.low is None else self.low
        high = getattr(inner, "upper_bound", None) if self.high is None else self.high
        if low is None:
            return constraints.less_than(high)
        return constraints.greater_than_eq(low) if high is None else constraints.interval(low, high)


class Censored(_Limited):
    """``dist`` read off an instrument that stops at ``low`` and ``high``.

    A value at or beyond a limit has the whole mass of the tail, any other the density of ``dist``.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        value, low, high = self._limits(value)
        log_density = self.dist.log_prob(value)
        if low is not None:
            log_density = torch.where(value <= low, self.dist.log_cdf(low), log_density)
        if high is not None:
            log_density = torch.where(value >= high, self.dist.log_survival(high), log_density)
        return log_density

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        draw = self.dist.sample(shape, generator)
        _, low, high = self._limits(draw)
        return draw.clamp(low, high)


def log_between(dist: Distribution, low: Tensor, high: Tensor) -> Tensor:
    """Log-mass of ``dist`` from ``low`` to ``high``, by differences in the tail that the interval
    lies in.
    """
    below = dist.log_cdf(low), dist.log_cdf(high)
    above = dist.log_survival(high), dist.log_survival(low)
    in_lower = below[0] < math.log(0.5)
    small = torch.where(in_lower, below[0], above[0])
    large = torch.where(in_lower, below[1], above[1])
    return large + _log1mexp((large - small).clamp(min=torch.finfo(large.dtype).tiny))


def _log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(-x))`` for positive ``x``."""
    return torch.where(x < math.log(2), torch.log(-torch.expm1(-x)), torch.log1p(-torch.exp(-x)))


def _finite(limit: Any) -> Any:
    if limit is None or is_traced(limit) or isinstance(limit, Tensor):
        return limit
    return limit if math.isfinite(limit) else None
