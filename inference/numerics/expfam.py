"""The exponential families by name: ``FAMILIES["Gamma"]`` and the others.

A `Family` (in `family.py`) has the operations; its formulas are in `formulas.py` and `counts.py`.
Names of families and of standard parameters are those of ``torch.distributions``, so that
``Gamma(**FAMILIES["Gamma"].standard_from_mean(mean))`` works.  One exception: ``categories``, the
fixed parameter of Categorical, is the number of categories, needed to turn integers into
indicators; leave it out where a ``torch.distributions.Categorical`` is built.
"""

from __future__ import annotations

from torch import Tensor

from ppl.inference.numerics import counts, formulas
from ppl.inference.numerics.family import Family, Mean, Natural

__all__ = ["FAMILIES", "Family", "Mean", "Natural"]


def _identity(z: Tensor) -> Tensor:
    return z


_ALL = (
    Family(
        "Normal",
        ("loc", "scale"),
        formulas.NORMAL,
        stat_dims=(0, 0),
        gaussian_coordinate=_identity,
    ),
    Family(
        "MultivariateNormal",
        ("loc", "scale_tril"),
        formulas.MVN,
        event_dim=1,
        stat_dims=(1, 2),
        gaussian_coordinate=_identity,
    ),
    Family(
        "LogNormal",
        ("loc", "scale"),
        formulas.LOG_NORMAL,
        stat_dims=(0, 0),
        gaussian_coordinate=formulas.log_inside,
    ),
    Family("HalfNormal", ("scale",), formulas.HALF_NORMAL),
    Family("Exponential", ("rate",), formulas.EXPONENTIAL),
    Family("Laplace", ("scale",), formulas.LAPLACE, fixed=("loc",)),
    Family("Weibull", ("scale",), formulas.WEIBULL, fixed=("concentration",)),
    Family("Pareto", ("alpha",), formulas.PARETO, fixed=("scale",)),
    Family("Gamma", ("concentration", "rate"), formulas.GAMMA, stat_dims=(0, 0)),
    Family("InverseGamma", ("concentration", "rate"), formulas.INVERSE_GAMMA, stat_dims=(0, 0)),
    Family("Chi2", ("df",), formulas.CHI2),
    Family("Beta", ("concentration1", "concentration0"), formulas.BETA, stat_dims=(0, 0)),
    Family("Dirichlet", ("concentration",), formulas.DIRICHLET, event_dim=1, stat_dims=(1,)),
    Family("Bernoulli", ("probs",), counts.BERNOULLI),
    Family("Binomial", ("probs",), counts.BINOMIAL, fixed=("total_count",)),
    Family("Poisson", ("rate",), counts.POISSON),
    Family("Geometric", ("probs",), counts.GEOMETRIC),
    Family("NegativeBinomial", ("probs",), counts.NEGATIVE_BINOMIAL, fixed=("total_count",)),
    Family("Categorical", ("probs",), counts.CATEGORICAL, fixed=("categories",), stat_dims=(1,)),
    Family("OneHotCategorical", ("probs",), counts.ONE_HOT, event_dim=1, stat_dims=(1,)),
    Family(
        "Multinomial",
        ("probs",),
        counts.MULTINOMIAL,
        fixed=("total_count",),
        event_dim=1,
        stat_dims=(1,),
    ),
    Family("VonMises", ("loc", "concentration"), formulas.VON_MISES, stat_dims=(0, 0)),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
