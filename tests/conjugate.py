"""Conjugate models, and their posteriors and evidence in closed form, written with NumPy and scipy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from scipy.special import betaln, gammaln

from ppl import (
    Bernoulli,
    Beta,
    Categorical,
    Dirichlet,
    Exponential,
    Gamma,
    MultivariateNormal,
    Normal,
    Poisson,
    given,
    latent,
    model,
    observe,
    plate,
)


class Conjugate(NamedTuple):
    """A model with one latent whose posterior has a name, and some data."""

    program: Any
    data: Mapping[str, Any]
    site: str
    family: Any  # law of the proposal with some start values; None: Normal
    exact: Mapping[str, Any]  # parameters of the posterior
    law: Any  # the posterior, frozen by scipy
    evidence: float  # log p(data)


@model
def normal_mean(loc: float = 1.0, scale: float = 2.0, noise: float = 0.5):
    mean = latent("mean", Normal(loc, scale))
    with plate("row"):
        observe("y", Normal(mean, noise))


def normal(y: Sequence[float], loc=1.0, scale=2.0, noise=0.5) -> Conjugate:
    y = np.asarray(y)
    precision = scale**-2 + len(y) * noise**-2
    mean = loc + (y - loc).sum() * noise**-2 / precision  # a large loc costs no digits
    joint = stats.multivariate_normal(cov=noise**2 * np.eye(len(y)) + scale**2)
    return Conjugate(
        normal_mean(loc=loc, scale=scale, noise=noise),
        {"y": y},
        "mean",
        None,
        {"loc": mean, "scale": precision**-0.5},
        stats.norm(mean, precision**-0.5),
        joint.logpdf(y - loc),
    )


@model
def waits(concentration: float = 3.0, rate: float = 2.0):
    pace = latent("rate", Gamma(concentration, rate))
    with plate("wait"):
        observe("time", Exponential(pace))


def exponential(time: Sequence[float], concentration=3.0, rate=2.0) -> Conjugate:
    time = np.asarray(time)
    return _gamma(
        waits, {"time": time}, concentration, rate, concentration + len(time), rate + time.sum()
    )


@model
def counts(concentration: float = 3.0, rate: float = 2.0):
    pace = latent("rate", Gamma(concentration, rate))
    with plate("day"):
        observe("count", Poisson(pace))


def poisson(count: Sequence[int], concentration=3.0, rate=2.0) -> Conjugate:
    count = np.asarray(count)
    a, b = concentration + count.sum(), rate + len(count)
    case = _gamma(counts, {"count": count}, concentration, rate, a, b)
    return case._replace(evidence=case.evidence - gammaln(count + 1).sum())


def _gamma(program, data, concentration, rate, a, b) -> Conjugate:
    """Prior ``Gamma(concentration, rate)``, posterior ``Gamma(a, b)``, up to the base measure of the data."""
    evidence = concentration * np.log(rate) - gammaln(concentration) + gammaln(a) - a * np.log(b)
    return Conjugate(
        program(concentration=concentration, rate=rate),
        data,
        "rate",
        Gamma(2.0, 2.0),
        {"concentration": a, "rate": b},
        stats.gamma(a, scale=1 / b),
        evidence,
    )


@model
def coin(heads: float = 2.0, tails: float = 3.0):
    bias = latent("bias", Beta(heads, tails))
    with plate("toss"):
        observe("heads", Bernoulli(bias))


def bernoulli(tosses: Sequence[int], heads=2.0, tails=3.0) -> Conjugate:
    a, b = heads + sum(tosses), tails + len(tosses) - sum(tosses)
    return Conjugate(
        coin(heads=heads, tails=tails),
        {"heads": tosses},
        "bias",
        Beta(1.0, 1.0),
        {"concentration1": a, "concentration0": b},
        stats.beta(a, b),
        betaln(a, b) - betaln(heads, tails),
    )


@model
def kinds():
    share = latent("share", Dirichlet(np.array([1.0, 2.0, 3.0])))
    with plate("draw"):
        observe("kind", Categorical(share))


def categorical(times: Sequence[int]) -> Conjugate:
    """``times [3]``: how often each kind was drawn."""
    prior = np.array([1.0, 2.0, 3.0])
    a = prior + times
    evidence = gammaln(a).sum() - gammaln(a.sum()) - gammaln(prior).sum() + gammaln(prior.sum())
    return Conjugate(
        kinds,
        {"kind": np.repeat(np.arange(3), times)},
        "share",
        Dirichlet(np.array([1.0, 1.0, 1.0])),
        {"concentration": a},
        stats.dirichlet(a),
        evidence,
    )


@model
def regression():
    beta = latent("beta", MultivariateNormal(np.zeros(3), np.eye(3)))
    with plate("row"):
        observe("y", Normal((given("x") * beta).sum(-1), 0.4))


def linear() -> Conjugate:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 3))
    x[:, 2] = x[:, 1] + 0.3 * x[:, 2]
    y = x @ np.array([1.0, -2.0, 0.5]) + 0.4 * rng.standard_normal(12)
    cov = np.linalg.inv(np.eye(3) + x.T @ x / 0.16)
    mean = cov @ x.T @ y / 0.16
    return Conjugate(
        regression,
        {"x": x, "y": y},
        "beta",
        None,
        {"loc": mean, "cov": cov},
        stats.multivariate_normal(mean, cov),
        stats.multivariate_normal(np.zeros(12), x @ x.T + 0.16 * np.eye(12)).logpdf(y),
    )


CONJUGATE = {
    "Normal-Normal": normal([0.3, 0.9, 1.4, 0.2]),
    "Gamma-Exponential": exponential([0.2, 1.1, 0.5]),
    "Gamma-Poisson": poisson([0, 2, 1, 3, 1]),
    "Beta-Bernoulli": bernoulli([1] * 7 + [0] * 3),
    "Dirichlet-Categorical": categorical([4, 1, 2]),
    "MvNormal regression": linear(),
}
