"""Time series, hidden Markov models, a Gaussian process, a mixture and a differential equation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl import (
    Beta,
    Categorical,
    Dirichlet,
    Exponential,
    Gamma,
    HalfCauchy,
    HalfFlat,
    HalfNormal,
    LogNormal,
    Markov,
    Mixture,
    MultivariateNormal,
    Normal,
    Truncated,
    deterministic,
    factor,
    given,
    latent,
    model,
    observe,
    plate,
)
from ppl.distributions import Distribution

Arrays = dict[str, np.ndarray]

SUBSTEPS = 4  # Runge-Kutta steps between two measurements: within 1e-5 of the solution


@model
def autoregression(order: int):
    """Each value by the ``order`` before it; the first of them are conditioned on."""
    alpha = latent("alpha", Normal(0.0, 10.0))
    beta = latent("beta", Normal(0.0, 10.0), shape=order)
    sigma = latent("sigma", HalfCauchy(2.5))
    with plate("time"):
        observe("y", Normal(alpha + (beta * given("lags")).sum(-1), sigma))


@model
def arma11():
    """ARMA(1, 1): the errors follow a recursion, so the whole series is one event."""
    mu, sigma = latent("mu", Normal(0.0, 10.0)), latent("sigma", HalfCauchy(2.5))
    phi, theta = latent("phi", Normal(0.0, 2.0)), latent("theta", Normal(0.0, 2.0))
    past = given("past")
    nu = [mu + phi * mu]
    for t in range(past.shape[0]):
        nu.append(mu + phi * past[t] + theta * (past[t] - nu[-1]))
    observe("y", Normal(torch.stack(nu), sigma))


@model
def normal_hmm():
    """Two hidden states with Normal emissions of different means."""
    theta1, theta2 = (
        latent("theta1", Dirichlet(torch.ones(2))),
        latent("theta2", Dirichlet(torch.ones(2))),
    )
    mu = _ordered("mu", Truncated(Normal(3.0, 1.0), 0.0, math.inf), Normal(10.0, 1.0))
    rows = torch.stack([theta1, theta2])
    with plate("time", ordered=True):
        z = latent(
            "z", Markov(Categorical([0.5, 0.5]), lambda previous: Categorical(rows[previous]))
        )
        observe("y", Normal(mu[z], 1.0))


@model
def drive_hmm():
    """Two hidden states of a basketball player, each with the rates of two waiting times."""
    alpha = given("alpha")
    theta1, theta2 = latent("theta1", Dirichlet(alpha[0])), latent("theta2", Dirichlet(alpha[1]))
    # HalfNormal(1) is Normal(0, 1) restricted to the positive numbers.
    phi = _ordered("phi", HalfNormal(1.0), Normal(3.0, 1.0))
    rate = _ordered("lambda", HalfNormal(1.0), Normal(3.0, 1.0))
    rows = torch.stack([theta1, theta2])
    with plate("time", ordered=True):
        z = latent(
            "z", Markov(Categorical([0.5, 0.5]), lambda previous: Categorical(rows[previous]))
        )
        observe("u", Exponential(phi[z]))
        observe("v", Exponential(rate[z]))


@model
def normal_mixture():
    """Two Normal components in the order of their means; the component of a point is summed out."""
    theta = latent("theta", Beta(5.0, 5.0))
    mu = _ordered("mu", Normal(0.0, 2.0), Normal(0.0, 2.0))
    sigma = latent("sigma", HalfNormal(2.0), shape=2)
    with plate("point"):
        observe("y", Mixture(torch.stack([theta, 1 - theta]), Normal(mu, sigma)))


@model
def gaussian_process():
    """Values of a smooth function with noise, jointly Gaussian."""
    rho, alpha = latent("rho", Gamma(25.0, 4.0)), latent("alpha", HalfNormal(2.0))
    sigma = latent("sigma", HalfNormal(1.0))
    x = given("x")
    apart = x.unsqueeze(-1) - x
    noise = sigma * torch.eye(x.shape[0])  # sigma is a variance here
    kernel = alpha**2 * torch.exp(-(apart**2) / (2 * rho**2))
    observe("y", MultivariateNormal(torch.zeros(x.shape[0]), kernel + noise))


@model
def one_compartment():
    """Concentration of a drug: first-order absorption, saturating elimination."""
    k_a, K_m = latent("k_a", HalfCauchy(1.0)), latent("K_m", HalfCauchy(1.0))
    V_m, sigma = latent("V_m", HalfCauchy(1.0)), latent("sigma", HalfCauchy(1.0))
    grid, volume = given("grid"), given("volume")
    absorbed = given("dose") * k_a / volume * torch.exp(-k_a * grid)

    def slope(c: Tensor, at: int) -> Tensor:
        c = c.clamp(min=0.0)  # a step too long for the elimination must not make it a source
        return absorbed[at] - V_m / volume * c / (K_m + c)

    c, seen = torch.zeros(()) * k_a, []
    for i in range(0, grid.shape[0] - 1, 2):
        h = grid[i + 2] - grid[i]
        first = slope(c, i)
        second = slope(c + h / 2 * first, i + 1)
        third = slope(c + h / 2 * second, i + 1)
        fourth = slope(c + h * third, i + 2)
        c = c + h / 6 * (first + 2 * second + 2 * third + fourth)
        if (i + 2) % (2 * SUBSTEPS) == 0:
            seen.append(c)
    level = torch.stack(seen).clamp(min=1e-12)
    observe("concentration", LogNormal(level.log(), sigma))


def _ordered(name: str, low: Distribution, high: Distribution) -> Tensor:
    """Two values under the product of two densities, restricted to ascending order."""
    first, gap = latent(f"{name}_1", low), latent(f"{name}_gap", HalfFlat())
    factor(f"{name}_2", high, at=first + gap)
    return deterministic(name, torch.stack([first, first + gap]))


# ---- data ---------------------------------------------------------------------------------------


def autoregression_data(d: Mapping[str, Any]) -> Arrays:
    """Values after the first ``K``, and for each the ``K`` before it, the latest first."""
    y, order = d["y"], int(d["K"])
    lags = np.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], -1)
    return {"y": y[order:], "lags": lags}


def arma_data(d: Mapping[str, Any]) -> Arrays:
    """The series, and all of it but the last value."""
    return {"y": d["y"], "past": d["y"][:-1]}


def series_data(d: Mapping[str, Any]) -> Arrays:
    """The observed series."""
    return {"y": d["y"]}


def drive_data(d: Mapping[str, Any]) -> Arrays:
    """Two series and the prior counts of the transitions."""
    return {k: d[k] for k in ("u", "v", "alpha")}


def process_data(d: Mapping[str, Any]) -> Arrays:
    """Places and values."""
    return {"x": d["x"], "y": d["y"]}


def compartment_data(d: Mapping[str, Any]) -> Arrays:
    """Concentrations, and the times of all half steps between measurements."""
    ends = np.concatenate([[d["t0"]], d["times"]])
    inner = np.arange(2 * SUBSTEPS) / (2 * SUBSTEPS)
    grid = (ends[:-1, None] + np.diff(ends)[:, None] * inner).ravel()
    return {
        "concentration": d["C_hat"],
        "grid": np.append(grid, ends[-1]),
        "dose": np.asarray(d["D"], float),
        "volume": np.asarray(d["V"], float),
    }
