"""The log joint of every posteriordb model, written with SciPy from the model's text.

A formula takes the raw data and the parameters, and returns the log joint up to a constant; hidden
states are parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import stats

Arrays = Mapping[str, np.ndarray]
norm, binom = stats.norm.logpdf, stats.binom.logpmf


def regression(x: np.ndarray, y: np.ndarray, p: Arrays, prior: float = 0.0) -> float:
    return norm(y, x @ p["beta"], p["sigma"]).sum() + prior


def flat(response: str, *columns: Any, log: bool = False) -> Callable[[Arrays, Arrays], float]:
    def formula(d: Arrays, p: Arrays) -> float:
        parts = [c(d) if callable(c) else d[c] for c in columns]
        y = np.log(d[response]) if log else d[response]
        return regression(np.column_stack([np.ones(len(y)), *parts]), y, p)

    return formula


def half_cauchy(*columns: str) -> Callable[[Arrays, Arrays], float]:
    def formula(d: Arrays, p: Arrays) -> float:
        return flat("kid_score", *columns)(d, p) + stats.halfcauchy.logpdf(p["sigma"], scale=2.5)

    return formula


def z_height(d: Arrays) -> np.ndarray:
    return (d["height"] - np.mean(d["height"])) / np.std(d["height"], ddof=1)


def centred(name: str) -> Callable[[Arrays], np.ndarray]:
    return lambda d: d[name] - np.mean(d[name])


def scaled(name: str) -> Callable[[Arrays], np.ndarray]:
    return lambda d: (d[name] - np.mean(d[name])) / (2 * np.std(d[name], ddof=1))


def times(a: Any, b: Any) -> Callable[[Arrays], np.ndarray]:
    return lambda d: (a(d) if callable(a) else d[a]) * (b(d) if callable(b) else d[b])


def log_of(name: str) -> Callable[[Arrays], np.ndarray]:
    return lambda d: np.log(d[name])


def age(k: int) -> Callable[[Arrays], np.ndarray]:
    return lambda d: (d["age_discrete"] == k) * 1.0


def log_volume(d: Arrays) -> np.ndarray:
    return np.log(d["diam1"]) + np.log(d["diam2"]) + np.log(d["canopy_height"])


def log_area(d: Arrays) -> np.ndarray:
    return np.log(d["diam1"]) + np.log(d["diam2"])


def log_shape(d: Arrays) -> np.ndarray:
    return np.log(d["diam1"]) - np.log(d["diam2"])


nes = flat("partyid7", "real_ideo", "race_adj", age(2), age(3), age(4), "educ1", "gender", "income")


def blr(d: Arrays, p: Arrays) -> float:
    return regression(
        d["X"],
        d["y"],
        p,
        norm(p["beta"], 0, 10).sum() + stats.halfnorm.logpdf(p["sigma"], scale=10),
    )


def ar(d: Arrays, p: Arrays) -> float:
    y, total = d["y"], norm(p["alpha"], 0, 10) + norm(p["beta"], 0, 10).sum()
    total += stats.halfcauchy.logpdf(p["sigma"], scale=2.5)
    for t in range(5, len(y)):
        mean = p["alpha"] + sum(p["beta"][k - 1] * y[t - k] for k in range(1, 6))
        total += norm(y[t], mean, p["sigma"])
    return total


def arma(d: Arrays, p: Arrays) -> float:
    y, mu, phi, theta = d["y"], p["mu"], p["phi"], p["theta"]
    errors = [y[0] - (mu + phi * mu)]
    for t in range(1, len(y)):
        errors.append(y[t] - (mu + phi * y[t - 1] + theta * errors[-1]))
    prior = norm(mu, 0, 10) + norm(phi, 0, 2) + norm(theta, 0, 2)
    return (
        prior + stats.halfcauchy.logpdf(p["sigma"], scale=2.5) + norm(errors, 0, p["sigma"]).sum()
    )


def transitions(p: Arrays) -> float:
    z, rows = p["z"].astype(int), (p["theta1"], p["theta2"])
    return sum(np.log(rows[a][b]) for a, b in zip(z[:-1], z[1:], strict=True))


def hmm(d: Arrays, p: Arrays) -> float:
    mu = np.array([p["mu_1"], p["mu_1"] + p["mu_gap"]])
    prior = norm(mu[0], 3, 1) + norm(mu[1], 10, 1)
    return prior + transitions(p) + norm(d["y"], mu[p["z"].astype(int)], 1).sum()


def drive(d: Arrays, p: Arrays) -> float:
    total, z = transitions(p), p["z"].astype(int)
    for row, theta in zip(d["alpha"], (p["theta1"], p["theta2"]), strict=True):
        total += stats.dirichlet.logpdf(theta, row)
    for name, data in (("phi", d["u"]), ("lambda", d["v"])):
        rate = np.array([p[f"{name}_1"], p[f"{name}_1"] + p[f"{name}_gap"]])
        total += norm(rate[0], 0, 1) + norm(rate[1], 3, 1)
        total += stats.expon.logpdf(data, scale=1 / rate[z]).sum()
    return total


def schools(d: Arrays, p: Arrays) -> float:
    if "theta_trans" in p:
        theta, prior = p["mu"] + p["tau"] * p["theta_trans"], norm(p["theta_trans"]).sum()
    else:
        theta, prior = p["theta"], norm(p["theta"], p["mu"], p["tau"]).sum()
    top = norm(p["mu"], 0, 5) + stats.halfcauchy.logpdf(p["tau"], scale=5)
    return top + prior + norm(d["y"], theta, d["sigma"]).sum()


def process(d: Arrays, p: Arrays) -> float:
    x = d["x"]
    cov = p["alpha"] ** 2 * np.exp(-((x[:, None] - x) ** 2) / (2 * p["rho"] ** 2)) + p[
        "sigma"
    ] * np.eye(11)
    prior = stats.gamma.logpdf(p["rho"], 25, scale=1 / 4) + stats.halfnorm.logpdf(
        p["alpha"], scale=2
    )
    likelihood = stats.multivariate_normal.logpdf(d["y"], np.zeros(11), cov)
    return prior + stats.halfnorm.logpdf(p["sigma"]) + likelihood


def mixture(d: Arrays, p: Arrays) -> float:
    low, high = p["mu_1"], p["mu_1"] + p["mu_gap"]
    prior = stats.beta.logpdf(p["theta"], 5, 5) + norm(low, 0, 2) + norm(high, 0, 2)
    prior += stats.halfnorm.logpdf(p["sigma"], scale=2).sum()
    each = p["theta"] * np.exp(norm(d["y"], low, p["sigma"][0]))
    each = each + (1 - p["theta"]) * np.exp(norm(d["y"], high, p["sigma"][1]))
    return prior + np.log(each).sum()


def concentrations(d: Arrays, p: Arrays, substeps: int) -> np.ndarray:
    """Runge-Kutta of fourth order with ``substeps`` steps between two measurements."""
    dose, volume = d["D"], d["V"]

    def slope(t: float, c: float) -> float:
        absorbed = dose * p["k_a"] / volume * np.exp(-p["k_a"] * t)
        return absorbed - p["V_m"] / volume * c / (p["K_m"] + c)

    t, c, out = float(d["t0"]), 0.0, []
    for end in d["times"]:
        h = (end - t) / substeps
        for i in range(substeps):
            s = t + i * h
            k1 = slope(s, c)
            k2 = slope(s + h / 2, c + h / 2 * k1)
            k3 = slope(s + h / 2, c + h / 2 * k2)
            c += h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(s + h, c + h * k3))
        t = end
        out.append(c)
    return np.array(out)


def compartment(d: Arrays, p: Arrays) -> float:
    prior = sum(stats.halfcauchy.logpdf(p[k]) for k in ("k_a", "K_m", "V_m", "sigma"))
    level = concentrations(d, p, 4)
    return prior + stats.lognorm.logpdf(d["C_hat"], p["sigma"], scale=level).sum()


def radon(d: Arrays, p: Arrays) -> float:
    county = d["county_idx"].astype(int) - 1
    mean = p["alpha"][county] + p["beta"][0] * d["log_uppm"] + p["beta"][1] * d["floor_measure"]
    prior = norm(p["mu_alpha"], 0, 10) + norm(p["beta"], 0, 10).sum()
    prior += stats.halfnorm.logpdf([p["sigma_alpha"], p["sigma_y"]]).sum()
    prior += norm(p["alpha"], p["mu_alpha"], p["sigma_alpha"]).sum()
    return prior + norm(d["log_radon"], mean, p["sigma_y"]).sum()


def rats(d: Arrays, p: Arrays) -> float:
    rat = d["rat"].astype(int) - 1
    prior = norm(p["mu_alpha"], 0, 100) + norm(p["mu_beta"], 0, 100)
    prior += norm(p["alpha"], p["mu_alpha"], p["sigma_alpha"]).sum()
    prior += norm(p["beta"], p["mu_beta"], p["sigma_beta"]).sum()
    mean = p["alpha"][rat] + p["beta"][rat] * (d["x"] - d["xbar"])
    return prior + norm(d["y"], mean, p["sigma_y"]).sum()


def expit(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def seeds(d: Arrays, p: Arrays) -> float:
    prior = sum(norm(p[k]) for k in ("alpha0", "alpha1", "alpha2", "alpha12"))
    prior += stats.halfcauchy.logpdf(p["sigma"]) + norm(p["b"], 0, p["sigma"]).sum()
    x1, x2 = d["x1"], d["x2"]
    eta = p["alpha0"] + p["alpha1"] * x1 + p["alpha2"] * x2 + p["alpha12"] * x1 * x2 + p["b"]
    return prior + binom(d["n"], d["N"], expit(eta)).sum()


def dogs(d: Arrays, p: Arrays) -> float:
    total = norm(p["beta"], 0, 100).sum()
    for trials in d["y"]:
        avoided = shocked = 0
        for y in trials:
            chance = expit(p["beta"][0] + p["beta"][1] * avoided + p["beta"][2] * shocked)
            total += np.log(chance if y else 1 - chance)
            avoided, shocked = avoided + (y == 0), shocked + (y == 1)
    return total


def glmm(d: Arrays, p: Arrays) -> float:
    t = d["year"]
    eta = p["alpha"] + p["beta1"] * t + p["beta2"] * t**2 + p["beta3"] * t**3 + p["eps"]
    return norm(p["eps"], 0, p["sigma"]).sum() + stats.poisson.logpmf(d["C"], np.exp(eta)).sum()


def glm(d: Arrays, p: Arrays) -> float:
    eta = p["alpha"] + p["beta1"] * d["year"] + p["beta2"] * d["year"] ** 2
    prior = norm([p["alpha"], p["beta1"], p["beta2"]], 0, 100).sum()
    return prior + binom(d["C"], d["N"], expit(eta)).sum()


def wells(d: Arrays, p: Arrays) -> float:
    dist, arsenic, educ = (d[k] - d[k].mean() for k in ("dist", "arsenic", "educ"))
    dist, educ = dist / 100, educ / 4
    x = np.column_stack([dist, arsenic, educ, dist * arsenic, dist * educ, arsenic * educ])
    return stats.bernoulli.logpmf(d["switched"], expit(p["alpha"] + x @ p["beta"])).sum()


def vote(d: Arrays, p: Arrays) -> float:
    return stats.bernoulli.logpmf(d["vote"], expit(p["alpha"] + p["beta"][0] * d["income"])).sum()


def irt(d: Arrays, p: Arrays) -> float:
    scales = [p["sigma_theta"], p["sigma_a"], p["sigma_b"]]
    prior = stats.halfcauchy.logpdf(scales, scale=2).sum() + norm(p["mu_b"], 0, 5)
    prior += (
        norm(p["theta"], 0, p["sigma_theta"]).sum() + norm(p["b"], p["mu_b"], p["sigma_b"]).sum()
    )
    prior += stats.lognorm.logpdf(p["a"], p["sigma_a"]).sum()
    chance = expit(p["a"][:, None] * (p["theta"] - p["b"][:, None]))
    return prior + stats.bernoulli.logpmf(d["y"], chance).sum()


_BUSH = ("diam1", "diam2", "canopy_height", "total_height", "density")
_HS, _IQ = "mom_hs", "mom_iq"
FORMULAS: dict[str, Callable[[Arrays, Arrays], float]] = {
    "earnings-earn_height": flat("earn", "height"),
    "earnings-logearn_height": flat("earn", "height", log=True),
    "earnings-logearn_interaction": flat(
        "earn", "height", "male", times("height", "male"), log=True
    ),
    "earnings-logearn_interaction_z": flat(
        "earn", z_height, "male", times(z_height, "male"), log=True
    ),
    "kidiq-kidscore_momhs": half_cauchy(_HS),
    "kidiq-kidscore_momhsiq": half_cauchy(_HS, _IQ),
    "kidiq-kidscore_momiq": half_cauchy(_IQ),
    "kidiq_with_mom_work-kidscore_interaction_c": flat(
        "kid_score", centred(_HS), centred(_IQ), times(centred(_HS), centred(_IQ))
    ),
    "kidiq_with_mom_work-kidscore_interaction_z": flat(
        "kid_score", scaled(_HS), scaled(_IQ), times(scaled(_HS), scaled(_IQ))
    ),
    "mesquite-mesquite": flat("weight", *_BUSH, "group"),
    "mesquite-logmesquite": flat("weight", *map(log_of, _BUSH), "group", log=True),
    "mesquite-logmesquite_logvash": flat(
        "weight", log_volume, log_area, log_shape, log_of("total_height"), "group", log=True
    ),
    "mesquite-logmesquite_logvolume": flat("weight", log_volume, log=True),
    **{f"nes{year}-nes": nes for year in (1972, 1980, 1984, 1992, 2000)},
    "sblrc-blr": blr,
    "arK-arK": ar,
    "arma-arma11": arma,
    "hmm_example-hmm_example": hmm,
    "bball_drive_event_0-hmm_drive_0": drive,
    "eight_schools-eight_schools_noncentered": schools,
    "eight_schools-eight_schools_centered": schools,
    "gp_pois_regr-gp_regr": process,
    "low_dim_gauss_mix-low_dim_gauss_mix": mixture,
    "one_comp_mm_elim_abs-one_comp_mm_elim_abs": compartment,
    "radon_mn-radon_hierarchical_intercept_centered": radon,
    "seeds_data-seeds_stanified_model": seeds,
    "rats_data-rats_model": rats,
    "dogs-dogs": dogs,
    "GLMM_Poisson_data-GLMM_Poisson_model": glmm,
    "GLM_Binomial_data-GLM_Binomial_model": glm,
    "wells_data-wells_dae_inter_model": wells,
    "nes_logit_data-nes_logit_model": vote,
    "irt_2pl-irt_2pl": irt,
}
