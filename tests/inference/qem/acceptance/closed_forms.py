"""Conjugate models and their posteriors in closed form; smoothers of chains; written with NumPy and scipy only."""

from __future__ import annotations

from collections.abc import Mapping
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
    """A model with one latent whose posterior has a name."""

    program: Any
    data: Mapping[str, Any]
    site: str
    family: Any  # law of the proposal with some start values; None: Normal
    exact: Mapping[str, Any]  # parameters of the posterior
    evidence: float


@model
def normal_normal():
    mean = latent("mean", Normal(1.0, 2.0))
    with plate("row"):
        observe("y", Normal(mean, 0.5))


@model
def gamma_exponential():
    rate = latent("rate", Gamma(3.0, 2.0))
    with plate("wait"):
        observe("time", Exponential(rate))


@model
def gamma_poisson():
    rate = latent("rate", Gamma(3.0, 2.0))
    with plate("day"):
        observe("count", Poisson(rate))


@model
def beta_bernoulli():
    bias = latent("bias", Beta(2.0, 3.0))
    with plate("toss"):
        observe("heads", Bernoulli(bias))


@model
def dirichlet_categorical():
    share = latent("share", Dirichlet(np.array([1.0, 2.0, 3.0])))
    with plate("draw"):
        observe("kind", Categorical(share))


@model
def regression():
    beta = latent("beta", MultivariateNormal(np.zeros(3), np.eye(3)))
    with plate("row"):
        observe("y", Normal((given("x") * beta).sum(-1), 0.4))


def _normal():
    y = np.array([0.3, 0.9, 1.4, 0.2])
    precision = 1 / 4 + len(y) / 0.25
    mean = (1 / 4 + y.sum() / 0.25) / precision
    evidence = stats.multivariate_normal(np.ones(4), 0.25 * np.eye(4) + 4.0).logpdf(y)
    exact = {"loc": mean, "scale": precision**-0.5}
    return Conjugate(normal_normal, {"y": y}, "mean", None, exact, evidence)


def _exponential():
    y = np.array([0.2, 1.1, 0.5])
    a, b = 3 + len(y), 2 + y.sum()
    evidence = 3 * np.log(2) - gammaln(3) + gammaln(a) - a * np.log(b)
    exact = {"concentration": a, "rate": b}
    return Conjugate(gamma_exponential, {"time": y}, "rate", Gamma(2.0, 2.0), exact, evidence)


def _poisson():
    y = np.array([0, 2, 1, 3, 1])
    a, b = 3 + y.sum(), 2 + len(y)
    evidence = 3 * np.log(2) - gammaln(3) + gammaln(a) - a * np.log(b) - gammaln(y + 1).sum()
    exact = {"concentration": a, "rate": b}
    return Conjugate(gamma_poisson, {"count": y}, "rate", Gamma(2.0, 2.0), exact, evidence)


def _beta():
    exact = {"concentration1": 9.0, "concentration0": 6.0}
    data = {"heads": [1] * 7 + [0] * 3}
    return Conjugate(
        beta_bernoulli, data, "bias", Beta(1.0, 1.0), exact, betaln(9, 6) - betaln(2, 3)
    )


def _dirichlet():
    counts, prior = np.array([4, 1, 2]), np.array([1.0, 2.0, 3.0])
    a = prior + counts
    evidence = gammaln(a).sum() - gammaln(a.sum()) - gammaln(prior).sum() + gammaln(prior.sum())
    data = {"kind": np.repeat(np.arange(3), counts)}
    start = Dirichlet(np.array([1.0, 1.0, 1.0]))
    exact = {"concentration": a}
    return Conjugate(dirichlet_categorical, data, "share", start, exact, evidence)


def _regression():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 3))
    x[:, 2] = x[:, 1] + 0.3 * x[:, 2]
    y = x @ np.array([1.0, -2.0, 0.5]) + 0.4 * rng.standard_normal(12)
    cov = np.linalg.inv(np.eye(3) + x.T @ x / 0.16)
    mean = cov @ x.T @ y / 0.16
    evidence = stats.multivariate_normal(np.zeros(12), x @ x.T + 0.16 * np.eye(12)).logpdf(y)
    exact = {"loc": mean, "cov": cov}
    return Conjugate(regression, {"x": x, "y": y}, "beta", None, exact, evidence)


CONJUGATE = {
    "Normal-Normal": _normal(),
    "Gamma-Exponential": _exponential(),
    "Gamma-Poisson": _poisson(),
    "Beta-Bernoulli": _beta(),
    "Dirichlet-Categorical": _dirichlet(),
    "MvNormal regression": _regression(),
}


class Smoothed(NamedTuple):
    """Posterior of a linear-Gaussian chain."""

    mean: np.ndarray  # [T, d]
    cov: np.ndarray  # [T, d, d]
    lag: np.ndarray  # [T-1, d, d], covariance of x_t+1 and x_t
    log_evidence: float


def kalman_smoother(y, start, start_cov, move, move_cov, read, noise_cov) -> Smoothed:
    """Filter forwards, Rauch-Tung-Striebel backwards."""
    mean, cov, log = np.asarray(start, float), np.asarray(start_cov, float), 0.0
    filtered, predicted = [], []
    for t, value in enumerate(y):
        if t:
            mean, cov = move @ mean, move @ cov @ move.T + move_cov
        predicted.append((mean, cov))
        spread = read @ cov @ read.T + noise_cov
        log += stats.multivariate_normal(read @ mean, spread).logpdf(value)
        gain = cov @ read.T @ np.linalg.inv(spread)
        mean, cov = mean + gain @ (np.atleast_1d(value) - read @ mean), cov - gain @ read @ cov
        filtered.append((mean, cov))
    means, covs, lags = [filtered[-1][0]], [filtered[-1][1]], []
    for (m, c), (pm, pc) in zip(filtered[-2::-1], predicted[:0:-1], strict=True):
        back = c @ move.T @ np.linalg.inv(pc)
        lags.append(covs[-1] @ back.T)
        means.append(m + back @ (means[-1] - pm))
        covs.append(c + back @ (covs[-1] - pc) @ back.T)
    return Smoothed(np.array(means[::-1]), np.array(covs[::-1]), np.array(lags[::-1]), float(log))


def forward_backward(start, move, likelihood):
    """Log evidence, ``p(z_t | y)`` ``[T, S]`` and ``p(z_t, z_t+1 | y)`` ``[T-1, S, S]`` of a hidden Markov chain."""
    steps, states = likelihood.shape
    forward, backward, scale = np.empty((steps, states)), np.ones((steps, states)), np.empty(steps)
    for t in range(steps):
        ahead = (start if t == 0 else forward[t - 1] @ move) * likelihood[t]
        scale[t] = ahead.sum()
        forward[t] = ahead / scale[t]
    for t in range(steps - 2, -1, -1):
        backward[t] = move @ (likelihood[t + 1] * backward[t + 1]) / scale[t + 1]
    pairs = np.stack(
        [
            forward[t][:, None] * move * (likelihood[t + 1] * backward[t + 1]) / scale[t + 1]
            for t in range(steps - 1)
        ]
    )
    return np.log(scale).sum(), forward * backward, pairs
