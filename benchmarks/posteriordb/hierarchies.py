"""Groups within a population: schools, counties, rats, plates of seeds, test items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ppl import (
    Bernoulli,
    Binomial,
    HalfCauchy,
    HalfFlat,
    HalfNormal,
    LogNormal,
    Normal,
    Poisson,
    Uniform,
    deterministic,
    given,
    latent,
    model,
    observe,
    plate,
)

Arrays = dict[str, np.ndarray]


@model
def schools_centered():
    """Eight schools, effects around their mean."""
    mu, tau = latent("mu", Normal(0.0, 5.0)), latent("tau", HalfCauchy(5.0))
    with plate("school"):
        theta = latent("theta", Normal(mu, tau))
        observe("y", Normal(theta, given("sigma")))


@model
def schools_noncentered():
    """Eight schools, effects as multiples of their spread."""
    mu, tau = latent("mu", Normal(0.0, 5.0)), latent("tau", HalfCauchy(5.0))
    with plate("school"):
        theta = deterministic("theta", mu + tau * latent("theta_trans", Normal(0.0, 1.0)))
        observe("y", Normal(theta, given("sigma")))


@model
def radon():
    """Houses in counties: an intercept for each county."""
    county = plate("county")
    house = plate("house", within=county, by="county_idx")

    mu_alpha = latent("mu_alpha", Normal(0.0, 10.0))
    sigma_alpha, sigma_y = (
        latent("sigma_alpha", HalfNormal(1.0)),
        latent("sigma_y", HalfNormal(1.0)),
    )
    beta = latent("beta", Normal(0.0, 10.0), shape=2)
    with county:
        alpha = latent("alpha", Normal(mu_alpha, sigma_alpha))
    with house:
        level = alpha + beta[0] * given("log_uppm") + beta[1] * given("floor_measure")
        observe("log_radon", Normal(level, sigma_y))


@model
def rats():
    """Growth of rats: a line for each."""
    rat = plate("rat")
    weighing = plate("weighing", within=rat, by="rat_idx")

    mu_alpha, mu_beta = (
        latent("mu_alpha", Normal(0.0, 100.0)),
        latent("mu_beta", Normal(0.0, 100.0)),
    )
    sigma_alpha, sigma_beta = latent("sigma_alpha", HalfFlat()), latent("sigma_beta", HalfFlat())
    sigma_y = latent("sigma_y", HalfFlat())
    with rat:
        alpha, beta = (
            latent("alpha", Normal(mu_alpha, sigma_alpha)),
            latent("beta", Normal(mu_beta, sigma_beta)),
        )
    with weighing:
        observe("y", Normal(alpha + beta * given("age"), sigma_y))


@model
def seeds():
    """Germination on plates of seeds: a factorial design with overdispersion."""
    alpha0, alpha1 = latent("alpha0", Normal(0.0, 1.0)), latent("alpha1", Normal(0.0, 1.0))
    alpha2, alpha12 = latent("alpha2", Normal(0.0, 1.0)), latent("alpha12", Normal(0.0, 1.0))
    sigma = latent("sigma", HalfCauchy(1.0))
    with plate("dish"):
        x1, x2 = given("x1"), given("x2")
        b = latent("b", Normal(0.0, sigma))
        logits = alpha0 + alpha1 * x1 + alpha2 * x2 + alpha12 * x1 * x2 + b
        observe("n", Binomial(given("N"), logits=logits))


@model
def poisson_trend():
    """A cubic trend in the log rate of yearly counts, with an effect for each year."""
    alpha = latent("alpha", Uniform(-20.0, 20.0))
    beta1, beta2, beta3 = (latent(f"beta{k}", Uniform(-10.0, 10.0)) for k in (1, 2, 3))
    sigma = latent("sigma", Uniform(0.0, 5.0))
    with plate("year"):
        t, eps = given("t"), latent("eps", Normal(0.0, sigma))
        observe("C", Poisson((alpha + beta1 * t + beta2 * t**2 + beta3 * t**3 + eps).exp()))


@model
def item_response():
    """Two-parameter item response: every person answers every item."""
    person, item = plate("person"), plate("item")

    sigma_theta, sigma_a = (
        latent("sigma_theta", HalfCauchy(2.0)),
        latent("sigma_a", HalfCauchy(2.0)),
    )
    mu_b, sigma_b = latent("mu_b", Normal(0.0, 5.0)), latent("sigma_b", HalfCauchy(2.0))
    with person:
        theta = latent("theta", Normal(0.0, sigma_theta))
    with item:
        a, b = latent("a", LogNormal(0.0, sigma_a)), latent("b", Normal(mu_b, sigma_b))
    with item, person:
        observe("y", Bernoulli(logits=a * (theta - b)))


# ---- data ---------------------------------------------------------------------------------------


def schools_data(d: Mapping[str, Any]) -> Arrays:
    """Estimated effects and their standard errors."""
    return {"y": d["y"], "sigma": d["sigma"]}


def radon_data(d: Mapping[str, Any]) -> Arrays:
    """Houses, with the position of their county."""
    kept = {k: d[k] for k in ("log_radon", "log_uppm", "floor_measure")}
    return kept | {"county_idx": d["county_idx"].astype(int) - 1}


def rats_data(d: Mapping[str, Any]) -> Arrays:
    """Weighings, with centred age and the position of their rat."""
    return {"y": d["y"], "age": d["x"] - d["xbar"], "rat_idx": d["rat"].astype(int) - 1}


def seeds_data(d: Mapping[str, Any]) -> Arrays:
    """Seeds that germinated, seeds, and the two treatments."""
    return {k: d[k] for k in ("n", "N", "x1", "x2")}


def counts_data(d: Mapping[str, Any]) -> Arrays:
    """Counts and years."""
    return {"C": d["C"], "t": d["year"]}


def answers_data(d: Mapping[str, Any]) -> Arrays:
    """Right and wrong answers, items by persons."""
    return {"y": d["y"]}
