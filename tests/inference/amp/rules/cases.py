"""One row a rule: random parameters, and the same density written down independently of the rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch import distributions as td

from ppl.inference.amp import rules

COUNT = 60  # random cases of each rule


class Case(NamedTuple):
    """A rule and what it claims to be: a density on ``(low, high)`` plus atoms."""

    rule: rules.Rule
    log_density: Callable[[Tensor], Tensor] | None  # [n, G] -> [n, G]; None: atoms only
    atoms: tuple[tuple[Tensor, Tensor], ...] = ()  # place and log weight, [n] each
    low: float | Tensor = -math.inf
    high: float | Tensor = math.inf
    tolerance: float = 1e-5


def uniform(low: float, high: float, n: int = COUNT) -> Tensor:
    return torch.empty(n, dtype=torch.float64).uniform_(low, high)


def column(x: Tensor) -> Tensor:
    return x.unsqueeze(-1)


def _normal(mean: Tensor, variance: Tensor) -> Callable[[Tensor], Tensor]:
    return td.Normal(column(mean), column(variance.sqrt()), validate_args=False).log_prob


def gaussian() -> Case:
    mean, variance = uniform(-2, 2), uniform(0.05, 4)
    return Case(rules.Gaussian(mean, variance), _normal(mean, variance))


def two_point() -> Case:
    logit, low, width = uniform(-3, 3), uniform(-2, 1), uniform(0.2, 3)
    log_low, log_high = (-logit).sigmoid().log(), logit.sigmoid().log()
    rule = rules.TwoPoint(logit, low, low + width)
    return Case(rule, None, ((low, log_low), (low + width, log_high)))


def bernoulli_gaussian() -> Case:
    logit, mean, variance = uniform(-4, 2), uniform(-1, 1), uniform(0.1, 4)
    slab, weight = _normal(mean, variance), column(logit.sigmoid().log())
    rule = rules.BernoulliGaussian(logit, mean, variance)
    atom = (torch.zeros(COUNT).double(), (-logit).sigmoid().log())
    return Case(rule, lambda x: weight + slab(x), (atom,))


def _spiked(slab: rules.Rule, log_density: Callable[[Tensor], Tensor], low: float) -> Case:
    logit = uniform(-3, 2)
    weight = column(logit.sigmoid().log())
    atom = (torch.zeros(COUNT).double(), (-logit).sigmoid().log())
    return Case(
        rules.SpikeSlab(logit, slab),
        lambda x: weight + log_density(x),
        (atom,),
        low,
    )


def spike_and_half_normal() -> Case:
    variance = uniform(0.2, 4)
    law = td.HalfNormal(column(variance.sqrt()), validate_args=False)
    return _spiked(rules.HalfNormal(variance), law.log_prob, 0.0)


def spike_and_exponential() -> Case:
    rate = uniform(0.3, 3)
    law = td.Exponential(column(rate), validate_args=False)
    return _spiked(rules.Exponential(rate), law.log_prob, 0.0)


def spike_and_laplace() -> Case:
    rate = uniform(0.3, 3)
    law = td.Laplace(0.0, column(1 / rate), validate_args=False)
    return _spiked(rules.Laplace(rate), law.log_prob, -math.inf)


def _mixture_of(logits: Tensor, means: Tensor, variances: Tensor) -> Callable[[Tensor], Tensor]:
    logs = logits.log_softmax(-1)

    def log_density(x: Tensor) -> Tensor:
        total = torch.full_like(x, -math.inf)
        for k in range(logits.shape[-1]):
            part = column(logs[:, k]) + _normal(means[:, k], variances[:, k])(x)
            total = torch.logaddexp(total, part)
        return total

    return log_density


def gaussian_mixture() -> Case:
    logits, means, variances = torch.randn(3, COUNT, 3, dtype=torch.float64).unbind(0)
    variances = variances.exp()
    rule = rules.GaussianMixture(logits, 2 * means, variances)
    return Case(rule, _mixture_of(logits, 2 * means, variances))


def spike_and_gaussians() -> Case:
    logits, means, variances = torch.randn(3, COUNT, 2, dtype=torch.float64).unbind(0)
    variances = variances.exp()
    slab = rules.GaussianMixture(logits, means, variances)
    return _spiked(slab, _mixture_of(logits, means, variances), -math.inf)


def discrete() -> Case:
    logits, points = torch.randn(2, COUNT, 4, dtype=torch.float64).unbind(0)
    atoms = zip(points.unbind(-1), logits.log_softmax(-1).unbind(-1), strict=True)
    return Case(rules.Discrete(logits, points), None, tuple(atoms))


def student_t() -> Case:
    df, mean, variance = uniform(1.0, 8), uniform(-1, 1), uniform(0.05, 2)
    law = td.StudentT(column(df), column(mean), column(variance.sqrt()), validate_args=False)
    return Case(rules.StudentT(df, mean, variance), law.log_prob)


def cauchy() -> Case:
    mean, variance = uniform(-1, 1), uniform(0.05, 2)
    law = td.Cauchy(column(mean), column(variance.sqrt()), validate_args=False)
    return Case(rules.StudentT(torch.ones(COUNT).double(), mean, variance), law.log_prob)


def laplace() -> Case:
    rate = uniform(0.2, 4)
    return Case(
        rules.Laplace(rate), td.Laplace(0.0, column(1 / rate), validate_args=False).log_prob
    )


def exponential() -> Case:
    rate = uniform(0.2, 4)
    law = td.Exponential(column(rate), validate_args=False)
    return Case(rules.Exponential(rate), law.log_prob, low=0.0)


def half_normal() -> Case:
    variance = uniform(0.1, 4)
    law = td.HalfNormal(column(variance.sqrt()), validate_args=False)
    return Case(rules.HalfNormal(variance), law.log_prob, low=0.0)


def truncated_gaussian() -> Case:
    mean, variance, low, width = uniform(-2, 2), uniform(0.1, 3), uniform(-2, 1), uniform(0.2, 4)
    law = td.Normal(mean, variance.sqrt())
    log_mass = column((law.cdf(low + width) - law.cdf(low)).log())
    inside = _normal(mean, variance)
    rule = rules.TruncatedGaussian(mean, variance, low, low + width)
    return Case(rule, lambda x: inside(x) - log_mass, (), column(low), column(low + width))


def uniform_prior() -> Case:
    low, width = uniform(-2, 1), uniform(0.2, 4)
    rule = rules.Uniform(low, low + width)
    return Case(rule, lambda x: -column(width.log()) + 0 * x, (), column(low), column(low + width))


def gaussian_noise() -> Case:
    y, variance = uniform(-3, 3), uniform(0.01, 3)
    return Case(rules.GaussianNoise(y, variance), _normal(y, variance))


def laplace_noise() -> Case:
    y, rate = uniform(-3, 3), uniform(0.2, 4)
    law = td.Laplace(column(y), column(1 / rate), validate_args=False)
    return Case(rules.AdditiveNoise(y, rules.Laplace(rate)), law.log_prob)


def student_noise() -> Case:
    y, df, variance = uniform(-3, 3), uniform(1.0, 8), uniform(0.05, 2)
    law = td.StudentT(column(df), column(y), column(variance.sqrt()), validate_args=False)
    zero = torch.zeros(COUNT).double()
    return Case(rules.AdditiveNoise(y, rules.StudentT(df, zero, variance)), law.log_prob)


def _labels() -> Tensor:
    return torch.randint(2, (COUNT,)).double()


def _log_ndtr(x: Tensor) -> Tensor:
    return torch.special.log_ndtr(x)


def probit() -> Case:
    y, variance = _labels(), uniform(0.1, 3)
    gain = column((2 * y - 1) * variance.rsqrt())
    return Case(rules.Probit(y, variance), lambda z: _log_ndtr(gain * z))


def sign() -> Case:
    y = 2 * _labels() - 1
    low, high = (
        torch.where(y > 0, 0.0, -math.inf).double(),
        torch.where(y > 0, math.inf, 0.0).double(),
    )
    rule = rules.Probit(y, torch.zeros(COUNT).double())
    return Case(rule, torch.zeros_like, (), column(low), column(high))


def ordinal() -> Case:
    cuts = torch.tensor([-math.inf, -1.0, 0.2, 1.5, math.inf]).double()
    y = torch.randint(1, 5, (COUNT,))
    low, high = cuts[y - 1], cuts[y]

    def log_density(z: Tensor) -> Tensor:
        below, above = column(low) - z, column(high) - z
        flip = below + above > 0
        below, above = torch.where(flip, -above, below), torch.where(flip, -below, above)
        return _log_ndtr(above) + torch.log(-torch.expm1(_log_ndtr(below) - _log_ndtr(above)))

    return Case(rules.Interval(low, high, torch.ones(COUNT).double()), log_density)


def quantised() -> Case:
    low = uniform(-3, 2).floor()
    rule = rules.Interval(low, low + 1, torch.zeros(COUNT).double())
    return Case(rule, torch.zeros_like, (), column(low), column(low + 1))


def censored() -> Case:
    latent, variance = uniform(-3, 3), uniform(0.1, 2)
    y, scale = latent.clamp(-1, 1.5), variance.sqrt()
    low, high = torch.full_like(y, -1.0), torch.full_like(y, 1.5)
    inside = _normal(y, variance)

    def log_density(z: Tensor) -> Tensor:
        below = _log_ndtr((-1.0 - z) / column(scale))
        above = _log_ndtr((z - 1.5) / column(scale))
        ends = torch.where(column(y) <= -1.0, below, above)
        return torch.where((column(y) > -1.0) & (column(y) < 1.5), inside(z), ends)

    return Case(rules.Censored(y, low, high, variance), log_density)


def relu() -> Case:
    y, variance = uniform(-0.5, 3), uniform(0.02, 1)
    law = _normal(y, variance)
    return Case(rules.ReLU(y, variance), lambda z: law(z.clamp(min=0)))


def modulus() -> Case:
    y, variance = uniform(0, 3), uniform(0.02, 1)
    law = _normal(y, variance)
    return Case(rules.Modulus(y, variance), lambda z: law(z.abs()))


def logistic() -> Case:
    y = _labels()
    law = td.Bernoulli(logits=torch.zeros(()).double(), validate_args=False)

    def log_density(z: Tensor) -> Tensor:
        return type(law)(logits=z, validate_args=False).log_prob(column(y).expand_as(z))

    return Case(rules.Logistic(y), log_density, tolerance=1e-4)


def binomial() -> Case:
    trials = torch.randint(1, 12, (COUNT,)).double()
    y = (uniform(0, 1) * (trials + 1)).floor()

    def log_density(z: Tensor) -> Tensor:
        return td.Binomial(column(trials), logits=z, validate_args=False).log_prob(column(y))

    return Case(rules.Binomial(y, trials), log_density, tolerance=1e-4)


def poisson() -> Case:
    y, exposure = torch.randint(0, 9, (COUNT,)).double(), uniform(0.3, 3)

    def log_density(z: Tensor) -> Tensor:
        rate = column(exposure) * z.clamp(max=30).exp()
        return td.Poisson(rate, validate_args=False).log_prob(column(y))

    return Case(rules.Poisson(y, exposure), log_density, tolerance=1e-4)


def negative_binomial() -> Case:
    y, size = torch.randint(0, 9, (COUNT,)).double(), uniform(0.3, 8)

    def log_density(z: Tensor) -> Tensor:
        logits = z - column(size.log())
        law = td.NegativeBinomial(column(size), logits=logits, validate_args=False)
        return law.log_prob(column(y))

    return Case(rules.NegativeBinomial(y, size), log_density, tolerance=1e-4)


def softplus_poisson() -> Case:
    y = torch.randint(0, 9, (COUNT,)).double()

    def log_density(z: Tensor) -> Tensor:
        rate = torch.nn.functional.softplus(z).clamp(min=1e-300)
        return td.Poisson(rate, validate_args=False).log_prob(column(y))

    return Case(rules.SoftplusPoisson(y), log_density, tolerance=1e-4)


def quadrature_gamma() -> Case:
    shape, rate = uniform(2.2, 5), uniform(0.5, 3)

    def log_prob(x: Tensor) -> Tensor:
        return td.Gamma(shape, rate, validate_args=False).log_prob(x)

    def log_density(x: Tensor) -> Tensor:
        return td.Gamma(column(shape), column(rate), validate_args=False).log_prob(x)

    return Case(rules.Quadrature(log_prob, low=0.0), log_density, low=0.0)


def quadrature_two_peaks() -> Case:
    far = uniform(1, 4)

    def two(x: Tensor, at: Tensor) -> Tensor:
        return torch.logaddexp(-8 * (x - at) ** 2, -3 * (x + at).abs())

    rule = rules.Quadrature(lambda x: two(x, far))
    return Case(rule, lambda x: two(x, column(far)), tolerance=1e-3)  # kinks where none is told


BUILDERS = (
    gaussian,
    two_point,
    bernoulli_gaussian,
    spike_and_half_normal,
    spike_and_exponential,
    spike_and_laplace,
    spike_and_gaussians,
    gaussian_mixture,
    discrete,
    student_t,
    cauchy,
    laplace,
    exponential,
    half_normal,
    truncated_gaussian,
    uniform_prior,
    gaussian_noise,
    laplace_noise,
    student_noise,
    probit,
    sign,
    ordinal,
    quantised,
    censored,
    relu,
    modulus,
    logistic,
    binomial,
    poisson,
    negative_binomial,
    softplus_poisson,
    quadrature_gamma,
    quadrature_two_peaks,
)


_ATOMS_ONLY = (two_point, discrete)
_ATOMS = (
    two_point,
    discrete,
    bernoulli_gaussian,
    spike_and_half_normal,
    spike_and_exponential,
    spike_and_laplace,
    spike_and_gaussians,
)
_BY_NODES = (quadrature_gamma, quadrature_two_peaks)
_PRIORS = BUILDERS[: BUILDERS.index(gaussian_noise)]
_FIXED = (truncated_gaussian, uniform_prior, logistic, binomial, poisson, negative_binomial)
_FIXED += (softplus_poisson, *_BY_NODES)


def _rows(builders: tuple[Callable[[], Case], ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("build", builders, ids=lambda b: b.__name__)


every_rule = _rows(BUILDERS)
every_density = _rows(tuple(b for b in BUILDERS if b not in _ATOMS_ONLY))
every_mode = _rows(tuple(b for b in BUILDERS if b not in _ATOMS))  # no density to maximise
every_closed = _rows(tuple(b for b in BUILDERS if b not in _BY_NODES))
every_learnable = _rows(tuple(b for b in BUILDERS if b not in _FIXED))
every_prior = _rows(tuple(b for b in _PRIORS if b not in (student_t, cauchy)))  # with moments


def observations() -> tuple[Tensor, Tensor]:
    """Random pseudo-observations ``r, vr`` ``[60]``."""
    return 2 * torch.randn(COUNT, dtype=torch.float64), 10 ** uniform(-2, 1)
