"""Linear and logistic regressions, and the design matrices that posteriordb asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ppl import (
    Bernoulli,
    Binomial,
    Flat,
    HalfCauchy,
    HalfFlat,
    HalfNormal,
    Normal,
    given,
    latent,
    model,
    observe,
    plate,
)

Arrays = dict[str, np.ndarray]


@model
def flat_regression(columns: int):
    """Linear regression under flat priors."""
    beta, sigma = latent("beta", Flat(columns)), latent("sigma", HalfFlat())
    with plate("row"):
        observe("y", Normal((given("x") * beta).sum(-1), sigma))


@model
def half_cauchy_regression(columns: int):
    """Linear regression, flat coefficients, a half-Cauchy noise scale."""
    beta, sigma = latent("beta", Flat(columns)), latent("sigma", HalfCauchy(2.5))
    with plate("row"):
        observe("y", Normal((given("x") * beta).sum(-1), sigma))


@model
def normal_regression(columns: int):
    """Linear regression under proper priors."""
    beta, sigma = (
        latent("beta", Normal(0.0, 10.0), shape=columns),
        latent("sigma", HalfNormal(10.0)),
    )
    with plate("row"):
        observe("y", Normal((given("x") * beta).sum(-1), sigma))


@model
def logistic_regression(columns: int):
    """Logistic regression with an intercept, flat priors."""
    alpha, beta = latent("alpha", Flat()), latent("beta", Flat(columns))
    with plate("row"):
        observe("y", Bernoulli(logits=alpha + (given("x") * beta).sum(-1)))


@model
def dogs():
    """Learning to avoid a shock: the log-odds move with the trials avoided and the shocks taken."""
    beta = latent("beta", Normal(0.0, 100.0), shape=3)
    with plate("dog"), plate("trial"):
        logits = beta[0] + beta[1] * given("avoided") + beta[2] * given("shocked")
        observe("y", Bernoulli(logits=logits))


@model
def binomial_trend():
    """A quadratic trend in the log-odds of yearly counts."""
    alpha = latent("alpha", Normal(0.0, 100.0))
    beta1, beta2 = latent("beta1", Normal(0.0, 100.0)), latent("beta2", Normal(0.0, 100.0))
    with plate("year"):
        t = given("t")
        observe("C", Binomial(given("N"), logits=alpha + beta1 * t + beta2 * t**2))


# ---- data ---------------------------------------------------------------------------------------


def earn_height(d: Mapping[str, Any]) -> Arrays:
    """Earnings by height."""
    return _design(d["earn"], d["height"])


def logearn_height(d: Mapping[str, Any]) -> Arrays:
    """Log earnings by height."""
    return _design(np.log(d["earn"]), d["height"])


def logearn_interaction(d: Mapping[str, Any]) -> Arrays:
    """Log earnings by height and sex."""
    return _interacting(np.log(d["earn"]), d["height"], d["male"])


def logearn_interaction_z(d: Mapping[str, Any]) -> Arrays:
    """The same with standardised height."""
    return _interacting(np.log(d["earn"]), _standard(d["height"]), d["male"])


def kidscore_momhs(d: Mapping[str, Any]) -> Arrays:
    """Test scores by the mother's school."""
    return _design(d["kid_score"], d["mom_hs"])


def kidscore_momiq(d: Mapping[str, Any]) -> Arrays:
    """Test scores by the mother's IQ."""
    return _design(d["kid_score"], d["mom_iq"])


def kidscore_momhsiq(d: Mapping[str, Any]) -> Arrays:
    """Test scores by both."""
    return _design(d["kid_score"], d["mom_hs"], d["mom_iq"])


def kidscore_interaction_c(d: Mapping[str, Any]) -> Arrays:
    """Both, centred, and their product."""
    hs, iq = (d[k] - d[k].mean() for k in ("mom_hs", "mom_iq"))
    return _interacting(d["kid_score"], hs, iq)


def kidscore_interaction_z(d: Mapping[str, Any]) -> Arrays:
    """Both, in units of two standard deviations, and their product."""
    return _interacting(d["kid_score"], _standard(d["mom_hs"]) / 2, _standard(d["mom_iq"]) / 2)


def mesquite(d: Mapping[str, Any]) -> Arrays:
    """Weight of mesquite bushes by their measures."""
    sizes = [d[k] for k in ("diam1", "diam2", "canopy_height", "total_height", "density")]
    return _design(d["weight"], *sizes, d["group"])


def logmesquite(d: Mapping[str, Any]) -> Arrays:
    """The same on log scales."""
    sizes = [d[k] for k in ("diam1", "diam2", "canopy_height", "total_height", "density")]
    return _design(np.log(d["weight"]), *map(np.log, sizes), d["group"])


def logmesquite_logvash(d: Mapping[str, Any]) -> Arrays:
    """Log weight by volume, area, shape and height."""
    area, shape = d["diam1"] * d["diam2"], d["diam1"] / d["diam2"]
    sizes = (area * d["canopy_height"], area, shape, d["total_height"])
    return _design(np.log(d["weight"]), *map(np.log, sizes), d["group"])


def logmesquite_logvolume(d: Mapping[str, Any]) -> Arrays:
    """Log weight by log volume."""
    return _design(np.log(d["weight"]), np.log(d["diam1"] * d["diam2"] * d["canopy_height"]))


def nes(d: Mapping[str, Any]) -> Arrays:
    """Party identification by opinion and background."""
    ages = [(d["age_discrete"] == k).astype(float) for k in (2, 3, 4)]
    rest = [d[k] for k in ("educ1", "gender", "income")]
    return _design(d["partyid7"], d["real_ideo"], d["race_adj"], *ages, *rest)


def blr(d: Mapping[str, Any]) -> Arrays:
    """A simulated design, as it is."""
    return {"y": d["y"], "x": d["X"]}


def wells(d: Mapping[str, Any]) -> Arrays:
    """Who switched to a safer well, with all two-way interactions."""
    distance = (d["dist"] - d["dist"].mean()) / 100
    arsenic = d["arsenic"] - d["arsenic"].mean()
    education = (d["educ"] - d["educ"].mean()) / 4
    products = (distance * arsenic, distance * education, arsenic * education)
    x = np.stack([distance, arsenic, education, *products], -1)
    return {"y": d["switched"], "x": x}


def nes_logit(d: Mapping[str, Any]) -> Arrays:
    """Vote by income."""
    return {"y": d["vote"], "x": d["income"][:, None]}


def dog_trials(d: Mapping[str, Any]) -> Arrays:
    """How often each dog had avoided the shock before a trial, and how often not."""
    shocks = d["y"]
    before = np.cumsum(shocks, 1) - shocks
    return {"y": shocks, "shocked": before, "avoided": np.arange(shocks.shape[1]) - before}


def yearly_counts(d: Mapping[str, Any]) -> Arrays:
    """Counts, trials and years of the binomial trend."""
    return {"C": d["C"], "N": d["N"], "t": d["year"]}


def _design(y: np.ndarray, *columns: np.ndarray) -> Arrays:
    return {"y": y, "x": np.stack([np.ones_like(y), *columns], -1)}


def _interacting(y: np.ndarray, a: np.ndarray, b: np.ndarray) -> Arrays:
    return _design(y, a, b, a * b)


def _standard(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / x.std(ddof=1)
