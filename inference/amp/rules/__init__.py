"""Scalar rules of approximate message passing: priors and channels, their moments, modes and updates."""

from ppl.inference.amp.rules.channels import (
    AdditiveNoise,
    Censored,
    GaussianNoise,
    Interval,
    Modulus,
    Probit,
    ReLU,
)
from ppl.inference.amp.rules.mixtures import Discrete, GaussianMixture, Horseshoe, StudentT
from ppl.inference.amp.rules.piecewise import (
    Exponential,
    HalfNormal,
    Laplace,
    TruncatedGaussian,
    Uniform,
)
from ppl.inference.amp.rules.priors import BernoulliGaussian, Gaussian, Sparse, SpikeSlab, TwoPoint
from ppl.inference.amp.rules.quadrature import Quadrature
from ppl.inference.amp.rules.record import Moments, Rule, bounded, log_normal
from ppl.inference.amp.rules.smooth import (
    Binomial,
    LogConcave,
    Logistic,
    NegativeBinomial,
    Poisson,
    SoftplusPoisson,
)

__all__ = [
    "AdditiveNoise",
    "BernoulliGaussian",
    "Binomial",
    "Censored",
    "Discrete",
    "Exponential",
    "Gaussian",
    "GaussianMixture",
    "GaussianNoise",
    "HalfNormal",
    "Horseshoe",
    "Interval",
    "Laplace",
    "LogConcave",
    "Logistic",
    "Modulus",
    "Moments",
    "NegativeBinomial",
    "Poisson",
    "Probit",
    "Quadrature",
    "ReLU",
    "Rule",
    "SoftplusPoisson",
    "Sparse",
    "SpikeSlab",
    "StudentT",
    "TruncatedGaussian",
    "TwoPoint",
    "Uniform",
    "bounded",
    "log_normal",
]
