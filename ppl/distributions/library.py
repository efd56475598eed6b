"""The rarer families, through ``torch.distributions``: built without validation each time they are
evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Generator, Tensor
from torch import distributions as td
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from ppl.distributions.arguments import (
    is_traced,
    positive_vector,
    real_matrix,
    real_vector,
    shape_of,
    show,
    weights,
)
from ppl.distributions.base import STATIC, Distribution, open_uniform, outside, standard
from ppl.distributions.discrete import log_weights
from ppl.distributions.multivariate import on_simplex
from ppl.errors import ModelError

_LOCATION_SCALE = {"loc": constraints.real, "scale": constraints.positive}
_TRIAL = {"probs": constraints.unit_interval, "logits": constraints.real}
_CATEGORY = {"probs": weights, "logits": real_vector}
_NEITHER = {"probs": None, "logits": None}


class Library(Distribution):
    """A family whose density, moments and draws are those of the ``torch.distributions`` class of
    the same name.

    That class repeats its parameters over the full batch before it computes; prefer a family with
    its own density where speed over many particles matters.
    """

    values: ClassVar[Constraint] = constraints.real  # the support, where no parameter moves it

    def log_prob(self, value: Tensor) -> Tensor:
        value = self.against(value)[0]
        law = self._law(value)
        support = self._support(law)
        inside = support.check(value)
        return outside(inside, law.log_prob(value))

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        law = self._law(generator=generator).expand(torch.Size(shape))
        with seeded(generator):
            return law.sample()

    def to_torch(self) -> td.Distribution:
        return self._law()

    def _law(
        self, like: Tensor | None = None, generator: Generator | None = None
    ) -> td.Distribution:
        return getattr(td, type(self).__name__)(
            **self.tensors(like, generator), validate_args=False
        )

    def _support(self, law: td.Distribution) -> Constraint:
        return self.values

    @property
    def support(self) -> Constraint:
        return self.values

    @property
    def mean(self) -> Tensor:
        return self.full(self._law().mean)

    @property
    def variance(self) -> Tensor:
        return self.full(self._law().variance)


class _Moving(Library):
    """Families whose support depends on their parameters."""

    def _support(self, law: td.Distribution) -> Constraint:
        return law.support  # type: ignore[return-value]

    @property
    def support(self) -> Constraint:
        return self._law().support  # type: ignore[return-value]


class Chi2(Library):
    """Chi-squared with ``df`` degrees of freedom."""

    arg_constraints = {"df": constraints.positive}
    values = constraints.nonnegative


class ContinuousBernoulli(Library):
    """Density on [0, 1] proportional to ``probs**x * (1 - probs)**(1 - x)``."""

    arg_constraints = {**_TRIAL, "lims": STATIC}
    defaults = {**_NEITHER, "lims": (0.499, 0.501)}
    exactly_one = ("probs", "logits")
    values = constraints.unit_interval


class FisherSnedecor(Library):
    """Ratio of two chi-squared laws over their degrees of freedom."""

    arg_constraints = {"df1": constraints.positive, "df2": constraints.positive}
    values = constraints.positive


class GeneralizedPareto(_Moving):
    """Excesses over a threshold ``loc``; ``concentration`` is the weight of the tail."""

    arg_constraints = {**_LOCATION_SCALE, "concentration": constraints.real}

    # torch 2.13's density and draws fail for float64 parameters.
    def log_prob(self, value: Tensor) -> Tensor:
        value, loc, scale, tail = self.against(value)
        z = (value - loc) / scale
        exponential = tail.abs() < 1e-12
        shape = torch.where(exponential, 1.0, tail)
        growth = 1 + shape * z
        inside = (z >= 0) & (exponential | (growth > 0))
        power = (1 / shape + 1) * torch.where(growth > 0, growth, 1.0).log()
        return outside(inside, -torch.where(exponential, z, power) - scale.log())

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        loc, scale, tail = self.expanded(shape, generator)
        wait = -open_uniform(shape, loc, generator).log()
        exponential = tail.abs() < 1e-12
        shape_ = torch.where(exponential, 1.0, tail)
        return loc + scale * torch.where(exponential, wait, torch.expm1(shape_ * wait) / shape_)


class Gumbel(Library):
    """Largest of many exponential-tailed draws."""

    arg_constraints = _LOCATION_SCALE


class Kumaraswamy(Library):
    """A relative of the Beta with a closed-form distribution function."""

    arg_constraints = {
        "concentration1": constraints.positive,
        "concentration0": constraints.positive,
    }
    values = constraints.unit_interval


class LKJCholesky(Library):
    """Cholesky factors of correlations ``[*batch, dim, dim]``; 1 is uniform over matrices."""

    arg_constraints = {"dim": STATIC, "concentration": constraints.positive}
    defaults = {"concentration": 1.0}
    values = constraints.corr_cholesky
    event_dim = 2
    dim: int

    def check(self) -> None:
        if not isinstance(self.dim, int) or self.dim < 2:
            raise ModelError(
                f"LKJCholesky: dim must be an integer of at least 2, got {self.dim!r}. It is a "
                "size."
            )

    @property
    def event_shape(self) -> torch.Size:
        return torch.Size((self.dim, self.dim))


class LogisticNormal(Library):
    """Probability vectors of ``d + 1`` entries: a Normal vector of ``d`` entries broken off a
    stick.
    """

    arg_constraints = {"loc": real_vector, "scale": positive_vector}
    values = constraints.simplex
    event_dim = 1

    @property
    def event_shape(self) -> torch.Size:
        return torch.Size((max(shape_of(v)[-1] for _, v in self._items()) + 1,))


class LowRankMultivariateNormal(Library):
    """Gaussian vector with covariance ``cov_factor @ cov_factor.mT + diag(cov_diag)``."""

    arg_constraints = {"loc": real_vector, "cov_factor": real_matrix, "cov_diag": positive_vector}
    values = constraints.real_vector
    event_dim = 1


class OneHotCategorical(Library):
    """A category as a vector with a single 1."""

    arg_constraints = _CATEGORY
    defaults = _NEITHER
    exactly_one = ("probs", "logits")
    values = constraints.one_hot
    event_dim = 1
    is_discrete = True


class OneHotCategoricalStraightThrough(OneHotCategorical):
    """A :class:`OneHotCategorical` under the name that torch gives its reparametrised draws."""


class Pareto(_Moving):
    """Power law above ``scale``."""

    arg_constraints = {"scale": constraints.positive, "alpha": constraints.positive}


class RelaxedBernoulli(Library):
    """A Bernoulli smoothed to (0, 1) by ``temperature`` [Maddison2017]."""

    arg_constraints = {"temperature": constraints.positive, **_TRIAL}
    defaults = _NEITHER
    exactly_one = ("probs", "logits")
    values = constraints.unit_interval


class RelaxedOneHotCategorical(Library):
    """A one-hot category smoothed into the simplex by ``temperature`` [Maddison2017]."""

    arg_constraints = {"temperature": constraints.positive, **_CATEGORY}
    defaults = _NEITHER
    exactly_one = ("probs", "logits")
    values = constraints.simplex
    event_dim = 1

    # torch's class aligns a batch of temperatures with the categories; here each row has its own.
    def log_prob(self, value: Tensor) -> Tensor:
        value, temperature, last = self.against(value)
        inside = on_simplex(value)
        log, t = torch.where(value > 0, value, 1.0).log(), temperature[..., None]
        score = log_weights(self, last) - t * log
        constant = math.lgamma(last.shape[-1]) + (last.shape[-1] - 1) * temperature.log()
        density = (score - log).sum(-1) - last.shape[-1] * score.logsumexp(-1) + constant
        return outside(inside & (value > 0).all(-1), density)

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        temperature, last = self.expanded(shape, generator)
        gumbel = -(-open_uniform(last.shape, last, generator).log()).log()
        return torch.softmax((log_weights(self, last) + gumbel) / temperature[..., None], -1)


class VonMises(Library):
    """The Gaussian of angles, in radians around ``loc``; its moments are circular."""

    arg_constraints = {"loc": constraints.real, "concentration": constraints.positive}

    # torch's polynomial for the Bessel function has seven digits; the scaled function has all of
    # them.
    def log_prob(self, value: Tensor) -> Tensor:
        value, loc, concentration = self.against(value)
        constant = math.log(2 * math.pi) + torch.special.i0e(concentration).log()
        return concentration * (torch.cos(value - loc) - 1) - constant

    @property
    def variance(self) -> Tensor:
        concentration = self.tensors()["concentration"]
        return self.full(1 - torch.special.i1e(concentration) / torch.special.i0e(concentration))


class Wishart(Library):
    """Positive definite matrices ``[*batch, p, p]`` of mean ``df`` times the covariance matrix."""

    arg_constraints = {
        "df": constraints.positive,
        "covariance_matrix": constraints.positive_definite,
        "precision_matrix": constraints.positive_definite,
        "scale_tril": constraints.lower_cholesky,
    }
    defaults = {"covariance_matrix": None, "precision_matrix": None, "scale_tril": None}
    exactly_one = ("covariance_matrix", "precision_matrix", "scale_tril")
    values = constraints.positive_definite
    event_dim = 2

    # torch's constructor looks at the numbers of df, which vmap forbids.
    def log_prob(self, value: Tensor) -> Tensor:
        value, df, matrix = self.against(value)
        p, chol = value.shape[-1], self._cholesky(matrix)
        near = (value - value.mT).abs() <= 1e-6 + 1e-5 * value.abs()
        eye = torch.eye(p, dtype=value.dtype, device=value.device)
        root, failed = torch.linalg.cholesky_ex(value)
        inside = near.all(-1).all(-1) & (failed == 0)
        root = torch.where(inside[..., None, None], root, eye)
        trace = torch.linalg.solve_triangular(chol, root, upper=False).square().sum((-2, -1))
        constant = (
            0.5 * df * p * math.log(2)
            + torch.special.multigammaln(0.5 * df, p)
            + df * _log_det(chol)
        )
        return outside(inside, (df - p - 1) * _log_det(root) - 0.5 * trace - constant)

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        """Bartlett's decomposition: ``L A A.mT L.mT`` with normals below and chi variables on the
        diagonal of A.
        """
        df, matrix = self.expanded(shape, generator)
        chol, p = self._cholesky(matrix), matrix.shape[-1]
        freedom = df[..., None] - torch.arange(p, dtype=df.dtype, device=df.device)
        diagonal = (2 * torch._standard_gamma(0.5 * freedom, generator=generator)).sqrt()
        below = standard(torch.randn, matrix.shape, matrix, generator).tril(-1)
        root = chol @ (below + torch.diag_embed(diagonal))
        return root @ root.mT

    def check(self) -> None:
        df, size = self.__dict__["df"], self.event_shape[-1]
        if not is_traced(df) and not bool(torch.all(torch.as_tensor(df) > size - 1)):
            raise ModelError(
                f"Wishart: df must be more than {size - 1} for {size} x {size} matrices, got "
                f"{show(df)}. Raise df."
            )

    def _cholesky(self, matrix: Tensor) -> Tensor:
        name = self._items()[1][0]
        if name == "precision_matrix":
            return torch.linalg.cholesky(torch.linalg.inv(matrix))
        return matrix if name == "scale_tril" else torch.linalg.cholesky(matrix)


@contextmanager
def seeded(generator: Generator | None) -> Iterator[None]:
    """Let torch's own samplers draw from a stream that ``generator`` starts; the global state is
    put back.
    """
    if generator is None:
        yield
        return
    device = generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=device))
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _log_det(triangle: Tensor) -> Tensor:
    return triangle.diagonal(dim1=-2, dim2=-1).log().sum(-1)
