"""Every exponential family once more: its law and sampler in scipy, its sufficient statistics in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import stats


class Law(NamedTuple):
    """How a family is checked."""

    kinds: Mapping[str, str]  # learned parameter -> positive, real, odds, simplex, angle
    draw: Callable[..., np.ndarray]  # parameters, n, rng -> [n, *event]
    statistics: Callable[..., tuple[np.ndarray, ...]]  # raw, of the samples
    fixed: Mapping[str, Any] = {}


def _one_hot(z: np.ndarray, k: int) -> np.ndarray:
    return (z[..., None] == np.arange(k)).astype(float)


LAWS: dict[str, Law] = {
    "Normal": Law(
        {"loc": "real", "scale": "positive"},
        lambda p, n, r: stats.norm(p["loc"], p["scale"]).rvs(n, r),
        lambda z: (z, z**2),
    ),
    "MultivariateNormal": Law(
        {"loc": "vector", "scale_tril": "triangle"},
        lambda p, n, r: stats.multivariate_normal.rvs(
            p["loc"], p["scale_tril"] @ p["scale_tril"].T, n, r
        ),
        lambda z: (z, z[..., :, None] * z[..., None, :]),
    ),
    "LogNormal": Law(
        {"loc": "real", "scale": "positive"},
        lambda p, n, r: stats.lognorm(p["scale"], 0, np.exp(p["loc"])).rvs(n, r),
        lambda z: (np.log(z), np.log(z) ** 2),
    ),
    "HalfNormal": Law(
        {"scale": "positive"},
        lambda p, n, r: stats.halfnorm(0, p["scale"]).rvs(n, r),
        lambda z: (z**2,),
    ),
    "Exponential": Law(
        {"rate": "positive"},
        lambda p, n, r: stats.expon(0, 1 / p["rate"]).rvs(n, r),
        lambda z: (z,),
    ),
    "Laplace": Law(
        {"scale": "positive"},
        lambda p, n, r: stats.laplace(0.7, p["scale"]).rvs(n, r),
        lambda z: (np.abs(z - 0.7),),
        {"loc": 0.7},
    ),
    "Weibull": Law(
        {"scale": "positive"},
        lambda p, n, r: stats.weibull_min(1.5, 0, p["scale"]).rvs(n, r),
        lambda z: (z**1.5,),
        {"concentration": 1.5},
    ),
    "Pareto": Law(
        {"alpha": "positive"},
        lambda p, n, r: stats.pareto(p["alpha"], 0, 2.0).rvs(n, r),
        lambda z: (np.log(z / 2.0),),  # of the ratio to the fixed minimum
        {"scale": 2.0},
    ),
    "Gamma": Law(
        {"concentration": "positive", "rate": "positive"},
        lambda p, n, r: stats.gamma(p["concentration"], 0, 1 / p["rate"]).rvs(n, r),
        lambda z: (np.log(z), z),
    ),
    "InverseGamma": Law(
        {"concentration": "positive", "rate": "positive"},
        lambda p, n, r: stats.invgamma(p["concentration"], 0, p["rate"]).rvs(n, r),
        lambda z: (np.log(z), 1 / z),
    ),
    "Chi2": Law(
        {"df": "positive"},
        lambda p, n, r: stats.chi2(p["df"], 0, 1).rvs(n, r),
        lambda z: (np.log(z),),
    ),
    "Beta": Law(
        {"concentration1": "positive", "concentration0": "positive"},
        lambda p, n, r: stats.beta(p["concentration1"], p["concentration0"], 0, 1).rvs(n, r),
        lambda z: (np.log(z), np.log1p(-z)),
    ),
    "Dirichlet": Law(
        {"concentration": "positives"},
        lambda p, n, r: stats.dirichlet.rvs(p["concentration"], n, r),
        lambda z: (np.log(z),),
    ),
    "Bernoulli": Law(
        {"probs": "odds"}, lambda p, n, r: stats.bernoulli(p["probs"], 0).rvs(n, r), lambda z: (z,)
    ),
    "Binomial": Law(
        {"probs": "odds"},
        lambda p, n, r: stats.binom(7, p["probs"], 0).rvs(n, r),
        lambda z: (z,),
        {"total_count": 7},
    ),
    "Poisson": Law(
        {"rate": "positive"}, lambda p, n, r: stats.poisson(p["rate"], 0).rvs(n, r), lambda z: (z,)
    ),
    "Geometric": Law(  # failures before the first success
        {"probs": "odds"}, lambda p, n, r: stats.geom(p["probs"], -1).rvs(n, r), lambda z: (z,)
    ),
    "NegativeBinomial": Law(  # probs is that of what is counted
        {"probs": "odds"},
        lambda p, n, r: stats.nbinom(4, 1 - p["probs"], 0).rvs(n, r),
        lambda z: (z,),
        {"total_count": 4},
    ),
    "Categorical": Law(
        {"probs": "simplex"},
        lambda p, n, r: r.choice(3, n, p=p["probs"]),
        lambda z: (_one_hot(z, 3),),
        {"categories": 3},
    ),
    "OneHotCategorical": Law(
        {"probs": "simplex"},
        lambda p, n, r: stats.multinomial.rvs(1, p["probs"], n, r),
        lambda z: (z,),
    ),
    "Multinomial": Law(
        {"probs": "simplex"},
        lambda p, n, r: stats.multinomial.rvs(6, p["probs"], n, r),
        lambda z: (z,),
        {"total_count": 6},
    ),
    "VonMises": Law(
        {"loc": "angle", "concentration": "positive"},
        lambda p, n, r: stats.vonmises(p["concentration"], p["loc"], 1).rvs(n, r),
        lambda z: (np.cos(z), np.sin(z)),
    ),
}


def parameters(law: Law, size: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Parameters of one member whose positive ones are about ``size``."""
    made = {}
    for name, kind in law.kinds.items():
        jitter = np.exp(0.5 * rng.standard_normal(3))
        sign = rng.choice([-1.0, 1.0])
        made[name] = {
            "positive": lambda j=jitter: size * j[0],
            "positives": lambda j=jitter: size * j,
            "real": lambda j=jitter, s=sign: s * j[0],
            "vector": lambda: size * rng.standard_normal(3),
            "triangle": lambda: (
                size * (np.tril(0.5 * rng.standard_normal((3, 3)), -1) + np.diag(1 + rng.random(3)))
            ),
            "odds": lambda j=jitter: size * j[0] / (1 + size * j[0]),
            "simplex": lambda j=jitter: (
                np.array([size * j[0], j[1], j[2]]) / (size * j[0] + j[1] + j[2])
            ),
            "angle": lambda: rng.uniform(-3, 3),
        }[kind]()
    return {name: np.asarray(value, dtype=float) for name, value in made.items()}
