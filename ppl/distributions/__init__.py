"""Probability laws under the names and arguments of ``torch.distributions``, and some that it
lacks.
"""

from ppl.distributions.base import Distribution, Leaf
from ppl.distributions.concentrated import ConcentratedNormal
from ppl.distributions.continuous import Cauchy, Laplace, Logistic, Normal, StudentT, Uniform
from ppl.distributions.discrete import (
    Bernoulli,
    Binomial,
    Categorical,
    Geometric,
    Multinomial,
    NegativeBinomial,
    Poisson,
)
from ppl.distributions.foreign import Foreign, TransformedDistribution, as_distribution
from ppl.distributions.library import (
    Chi2,
    ContinuousBernoulli,
    FisherSnedecor,
    GeneralizedPareto,
    Gumbel,
    Kumaraswamy,
    Library,
    LKJCholesky,
    LogisticNormal,
    LowRankMultivariateNormal,
    OneHotCategorical,
    OneHotCategoricalStraightThrough,
    Pareto,
    RelaxedBernoulli,
    RelaxedOneHotCategorical,
    VonMises,
    Wishart,
)
from ppl.distributions.mixtures import (
    Hurdle,
    Mixture,
    MixtureSameFamily,
    SpikeSlab,
    ZeroInflated,
)
from ppl.distributions.multivariate import Dirichlet, MultivariateLaplace, MultivariateNormal
from ppl.distributions.positive import (
    Beta,
    Exponential,
    Gamma,
    HalfCauchy,
    HalfNormal,
    InverseGamma,
    LogNormal,
    Weibull,
)
from ppl.distributions.robust import Robust, robust_log_norm, robust_loss, robust_weight
from ppl.distributions.special import Delta, Flat, HalfFlat, Markov
from ppl.distributions.wrappers import Censored, Independent, Masked, Truncated

_FAMILIES: tuple[type[Distribution], ...] = (
    Bernoulli, Beta, Binomial, Categorical, Cauchy, Censored, Chi2, ConcentratedNormal,
    ContinuousBernoulli, Delta, Dirichlet, Exponential, FisherSnedecor, Flat, Gamma, GeneralizedPareto, Geometric, Gumbel,
    HalfCauchy, HalfFlat, HalfNormal, Hurdle, Independent, InverseGamma, Kumaraswamy, LKJCholesky,
    Laplace, LogNormal, Logistic, LogisticNormal, LowRankMultivariateNormal, Markov, Mixture,
    MixtureSameFamily, Multinomial, MultivariateLaplace, MultivariateNormal, NegativeBinomial, Normal,
    OneHotCategorical, OneHotCategoricalStraightThrough, Pareto, Poisson, RelaxedBernoulli,
    RelaxedOneHotCategorical, SpikeSlab, StudentT, TransformedDistribution, Truncated, Uniform,
    VonMises, Weibull, Wishart, ZeroInflated,
)  # fmt: skip

# Every family by its name: what a user may write in a model.
KNOWN: dict[str, type[Distribution]] = {family.__name__: family for family in _FAMILIES}

__all__ = [
    "KNOWN", "Bernoulli", "Beta", "Binomial", "Categorical", "Cauchy", "Censored", "Chi2",
    "ConcentratedNormal", "ContinuousBernoulli", "Delta", "Dirichlet", "Distribution", "Exponential", "FisherSnedecor",
    "Flat", "Foreign", "Gamma", "GeneralizedPareto", "Geometric", "Gumbel", "HalfCauchy",
    "HalfFlat", "HalfNormal", "Hurdle", "Independent", "InverseGamma", "Kumaraswamy", "LKJCholesky",
    "Laplace", "Leaf", "Library", "LogNormal", "Logistic", "LogisticNormal",
    "LowRankMultivariateNormal", "Markov", "Masked", "Mixture", "MixtureSameFamily",
    "Multinomial", "MultivariateLaplace", "MultivariateNormal", "NegativeBinomial", "Normal", "OneHotCategorical",
    "OneHotCategoricalStraightThrough", "Pareto", "Poisson", "RelaxedBernoulli",
    "RelaxedOneHotCategorical", "Robust", "SpikeSlab", "StudentT", "TransformedDistribution",
    "Truncated", "Uniform", "VonMises", "Weibull", "Wishart", "ZeroInflated", "as_distribution",
    "robust_log_norm", "robust_loss", "robust_weight",
]  # fmt: skip
