"""Families on the positive half line and the unit interval, each with its own density of minimal
shape.

Densities as in [Johnson1994], with the parameters of ``torch.distributions``.  Outside the support
a harmless value is put in before the formula, so that gradients there are zero and not NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from ppl.distributions.base import Distribution, open_uniform, outside, standard, times
from ppl.distributions.continuous import HALF_LOG_2PI, Cauchy, Normal


class _OnPositive(Distribution):
    """Families on the numbers of at least zero."""

    @property
    def support(self) -> Constraint:
        return constraints.nonnegative


class Exponential(_OnPositive):
    """Waiting time of mean ``1 / rate``."""

    arg_constraints = {"rate": constraints.positive}
    has_cdf = True

    def log_prob(self, value: Tensor) -> Tensor:
        value, rate = self.against(value)
        return outside(value >= 0, rate.log() - rate * value)

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        (rate,) = self.expanded(shape, generator)
        return -open_uniform(shape, rate, generator).log() / rate

    def cdf(self, value: Tensor) -> Tensor:
        value, rate = self.against(value)
        return -torch.expm1(-rate * value.clamp(min=0))

    def log_survival(self, value: Tensor) -> Tensor:
        value, rate = self.against(value)
        return -rate * value.clamp(min=0)

    def icdf(self, p: Tensor) -> Tensor:
        p, rate = self.against(p)
        return -torch.log1p(-p) / rate

    def isf(self, q: Tensor) -> Tensor:
        q, rate = self.against(q)
        return -q.log() / rate

    @property
    def mean(self) -> Tensor:
        return self.full(1 / self.tensors()["rate"])

    @property
    def variance(self) -> Tensor:
        return self.full(self.tensors()["rate"] ** -2)


class Gamma(_OnPositive):
    """Gamma law of mean ``concentration / rate``.

    >>> Gamma(2.0, 4.0).mean
    tensor(0.5000, dtype=torch.float64)
    """

    arg_constraints = {"concentration": constraints.positive, "rate": constraints.positive}
    has_cdf = True

    def log_prob(self, value: Tensor) -> Tensor:
        value, concentration, rate = self.against(value)
        inside = value >= 0
        value = torch.where(inside, value, 1.0)
        constant = concentration * rate.log() - torch.lgamma(concentration)
        return outside(inside, times(concentration - 1, value.log()) - rate * value + constant)

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        concentration, rate = self.expanded(shape, generator)
        draw = torch._standard_gamma(concentration, generator=generator) / rate
        return draw.clamp(min=torch.finfo(draw.dtype).tiny)

    def cdf(self, value: Tensor) -> Tensor:
        value, concentration, rate = self.against(value)
        return torch.special.gammainc(
            *torch.broadcast_tensors(concentration, rate * value.clamp(min=0))
        )

    def log_survival(self, value: Tensor) -> Tensor:
        value, concentration, rate = self.against(value)
        return torch.special.gammaincc(
            *torch.broadcast_tensors(concentration, rate * value.clamp(min=0))
        ).log()

    def icdf(self, p: Tensor) -> Tensor:
        p, concentration, rate = self.against(p)
        log_p = p.log()
        return self._invert(concentration / rate + 0 * p, lambda x: self.log_cdf(x) >= log_p)

    def isf(self, q: Tensor) -> Tensor:
        q, concentration, rate = self.against(q)
        log_q = q.log()
        return self._invert(concentration / rate + 0 * q, lambda x: self.log_survival(x) <= log_q)

    @staticmethod
    def _invert(start, is_above) -> Tensor:  # type: ignore[no-untyped-def]
        # Bisection in log x: 70 halvings of 440 octaves leave a relative error below 1e-15.
        # Quantiles under
        # mean * 2^-400 end there.
        low, high = start.log() - 400 * math.log(2), start.log() + 40 * math.log(2)
        for _ in range(70):
            middle = 0.5 * (low + high)
            above = is_above(middle.exp())
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (0.5 * (low + high)).exp()

    @property
    def mean(self) -> Tensor:
        args = self.tensors()
        return self.full(args["concentration"] / args["rate"])

    @property
    def variance(self) -> Tensor:
        args = self.tensors()
        return self.full(args["concentration"] / args["rate"].square())


class InverseGamma(_OnPositive):
    """Law of ``1 / x`` for ``x`` of ``Gamma(concentration, rate)``."""

    arg_constraints = {"concentration": constraints.positive, "rate": constraints.positive}

    @property
    def support(self) -> Constraint:
        return constraints.positive

    def log_prob(self, value: Tensor) -> Tensor:
        value, concentration, rate = self.against(value)
        inside = value > 0
        value = torch.where(inside, value, 1.0)
        constant = concentration * rate.log() - torch.lgamma(concentration)
        return outside(inside, constant - (concentration + 1) * value.log() - rate / value)

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        concentration, rate = self.expanded(shape, generator)
        draw = torch._standard_gamma(concentration, generator=generator)
        return rate / draw.clamp(min=torch.finfo(draw.dtype).tiny)

    @property
    def mean(self) -> Tensor:
        a, b = self.tensors().values()
        return self.full(torch.where(a > 1, b / (a - 1), torch.inf))

    @property
    def variance(self) -> Tensor:
        a, b = self.tensors().values()
        return self.full(torch.where(a > 2, (b / (a - 1)).square() / (a - 2), torch.inf))


class HalfNormal(_OnPositive):
    """Absolute value of a ``Normal(0, scale)``."""

    arg_constraints = {"scale": constraints.positive}
    has_cdf = True

    def log_prob(self, value: Tensor) -> Tensor:
        value, scale = self.against(value)
        constant = scale.log() + (HALF_LOG_2PI - math.log(2))
        return outside(value >= 0, -0.5 * (value / scale).square() - constant)

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        (scale,) = self.expanded(shape, generator)
        return scale * standard(torch.randn, shape, scale, generator).abs()

    def cdf(self, value: Tensor) -> Tensor:
        value, scale = self.against(value)
        return torch.erf(value.clamp(min=0) / (scale * math.sqrt(2)))

    def log_survival(self, value: Tensor) -> Tensor:
        value, scale = self.against(value)
        return math.log(2) + torch.special.log_ndtr(-value.clamp(min=0) / scale)

    def icdf(self, p: Tensor) -> Tensor:
        p, scale = self.against(p)
        return scale * torch.erfinv(p) * math.sqrt(2)

    def isf(self, q: Tensor) -> Tensor:
        q, scale = self.against(q)
        return -scale * torch.special.ndtri(0.5 * q)

    @property
    def mean(self) -> Tensor:
        return self.full(self.tensors()["scale"] * math.sqrt(2 / math.pi))

    @property
    def variance(self) -> Tensor:
        return self.full(self.tensors()["scale"].square() * (1 - 2 / math.pi))


class HalfCauchy(_OnPositive):
    """Absolute value of a ``Cauchy(0, scale)``."""

    arg_constraints = {"scale": constraints.positive}
    has_cdf = True

    def log_prob(self, value: Tensor) -> Tensor:
        value, scale = self.against(value)
        return outside(
            value >= 0, -torch.log1p((value / scale).square()) - (0.5 * math.pi * scale).log()
        )

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        (scale,) = self.expanded(shape, generator)
        return self.icdf(open_uniform(shape, scale, generator))

    def cdf(self, value: Tensor) -> Tensor:
        value, scale = self.against(value)
        return torch.atan(value.clamp(min=0) / scale) * (2 / math.pi)

    def log_survival(self, value: Tensor) -> Tensor:
        value, scale = self.against(value)
        return (2 * Cauchy(0.0, 1.0).log_survival(value.clamp(min=0) / scale).exp()).log()

    def icdf(self, p: Tensor) -> Tensor:
        p, scale = self.against(p)
        return scale * torch.tan(0.5 * math.pi * p)

    def isf(self, q: Tensor) -> Tensor:
        q, scale = self.against(q)
        return scale / torch.tan(0.5 * math.pi * q)


class LogNormal(_OnPositive):
    """Law of ``exp(x)`` for ``x`` of ``Normal(loc, scale)``."""

    arg_constraints = Normal.arg_constraints
    has_cdf = True

    @property
    def support(self) -> Constraint:
        return constraints.positive

    def log_prob(self, value: Tensor) -> Tensor:
        value, loc, scale = self.against(value)
        inside = value > 0
        log = torch.where(inside, value, 1.0).log()
        return outside(
            inside, -0.5 * ((log - loc) / scale).square() - (scale.log() + HALF_LOG_2PI) - log
        )

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        return self._normal().sample(shape, generator).exp()

    def cdf(self, value: Tensor) -> Tensor:
        return self._normal().cdf(value.clamp(min=0).log())

    def log_cdf(self, value: Tensor) -> Tensor:
        return self._normal().log_cdf(value.clamp(min=0).log())

    def log_survival(self, value: Tensor) -> Tensor:
        return self._normal().log_survival(value.clamp(min=0).log())

    def icdf(self, p: Tensor) -> Tensor:
        return self._normal().icdf(p).exp()

    def isf(self, q: Tensor) -> Tensor:
        return self._normal().isf(q).exp()

    def _normal(self) -> Distribution:
        new = object.__new__(Normal)
        new.__dict__.update(self.__dict__)
        return new

    @property
    def mean(self) -> Tensor:
        loc, scale = self.tensors().values()
        return self.full((loc + 0.5 * scale.square()).exp())

    @property
    def variance(self) -> Tensor:
        loc, scale = self.tensors().values()
        return self.full(torch.expm1(scale.square()) * (2 * loc + scale.square()).exp())


class Weibull(_OnPositive):
    """Waiting time with hazard growing as ``x ** (concentration - 1)``."""

    arg_constraints = {"scale": constraints.positive, "concentration": constraints.positive}
    has_cdf = True

    def log_prob(self, value: Tensor) -> Tensor:
        value, scale, concentration = self.against(value)
        inside = value >= 0
        ratio = torch.where(inside, value, 1.0) / scale
        power = times(concentration - 1, ratio.log())
        return outside(inside, (concentration / scale).log() + power - ratio**concentration)

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        scale, _ = self.expanded(shape, generator)
        return self.isf(open_uniform(shape, scale, generator))

    def cdf(self, value: Tensor) -> Tensor:
        return -torch.expm1(self.log_survival(value))

    def log_survival(self, value: Tensor) -> Tensor:
        value, scale, concentration = self.against(value)
        return -((value.clamp(min=0) / scale) ** concentration)

    def icdf(self, p: Tensor) -> Tensor:
        p, scale, concentration = self.against(p)
        return scale * (-torch.log1p(-p)) ** (1 / concentration)

    def isf(self, q: Tensor) -> Tensor:
        q, scale, concentration = self.against(q)
        return scale * (-q.log()) ** (1 / concentration)

    @property
    def mean(self) -> Tensor:
        scale, concentration = self.tensors().values()
        return self.full(scale * torch.lgamma(1 + 1 / concentration).exp())

    @property
    def variance(self) -> Tensor:
        scale, concentration = self.tensors().values()
        first = torch.lgamma(1 + 1 / concentration).exp()
        return self.full(
            scale.square() * (torch.lgamma(1 + 2 / concentration).exp() - first.square())
        )


class Beta(Distribution):
    """Law on (0, 1) with density proportional to ``x**(concentration1 - 1) * (1 -
    x)**(concentration0 - 1)``.
    """

    arg_constraints = {
        "concentration1": constraints.positive,
        "concentration0": constraints.positive,
    }

    @property
    def support(self) -> Constraint:
        return constraints.unit_interval

    def log_prob(self, value: Tensor) -> Tensor:
        value, a, b = self.against(value)
        inside = (value >= 0) & (value <= 1)
        value = torch.where(inside, value, 0.5)
        constant = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
        return outside(
            inside, times(a - 1, value.log()) + times(b - 1, torch.log1p(-value)) + constant
        )

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        both = torch.stack(self.expanded(shape, generator), -1)
        return torch._sample_dirichlet(both, generator=generator)[..., 0]

    @property
    def mean(self) -> Tensor:
        a, b = self.tensors().values()
        return self.full(a / (a + b))

    @property
    def variance(self) -> Tensor:
        a, b = self.tensors().values()
        return self.full(a * b / ((a + b).square() * (a + b + 1)))
