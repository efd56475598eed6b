"""The six plated models: log joints by SciPy, other units, simulations, one line to fit each."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import bernoulli, nbinom, norm

from ppl import infer, models
from ppl.models.simulation import genre_flags, one_hot, simulated
from tests.models.joint_density import joint_density

RNG = np.random.default_rng(7)


def log_normal(x, mean=0.0, sd=1.0) -> float:
    return norm.logpdf(x, mean, sd).sum()


def log_bernoulli(y, logits) -> float:
    return bernoulli.logpmf(np.asarray(y).astype(int), expit(logits)).sum()


def bus_log_joint(d, x, y) -> float:
    total = sum(log_normal(x[n]) for n in ("psi", "phi", "sigma_beta", "mu_beta", "sigma_alpha"))
    total += log_normal(x["beta"], x["mu_beta"], np.exp(x["sigma_beta"]))
    total += log_normal(x["alpha"], x["beta"][:, None], np.exp(x["sigma_alpha"])[:, None])
    late = x["alpha"][..., None] + d["company"] @ x["phi"] + d["run_type"] @ x["psi"]
    if "delay" not in x:
        return total + log_bernoulli(y, late)
    return total + log_normal(x["delay"], late) + log_bernoulli(y, x["delay"])


def chimpanzees_log_joint(d, x, y) -> float:
    total = log_normal(x["sigma_block"]) + log_normal(x["sigma_actor"])
    total += sum(log_normal(x[n], 0.0, 10.0) for n in ("beta_PC", "beta_P", "alpha"))
    total += log_normal(x["alpha_actor"], 0.0, np.exp(x["sigma_actor"]))
    total += log_normal(x["alpha_block"], 0.0, np.exp(x["sigma_block"]))
    intercept = x["alpha"] + x["alpha_actor"][:, None] + x["alpha_block"]
    effect = (x["beta_P"] + x["beta_PC"] * d["condition"]) * d["prosoc_left"]
    return total + log_bernoulli(y, intercept[..., None] + effect)


def movielens_log_joint(d, x, y) -> float:
    total = log_normal(x["mu_z"]) + log_normal(x["psi_z"])
    total += log_normal(x["z"], x["mu_z"], np.exp(x["psi_z"]))
    return total + log_bernoulli(y, np.einsum("uk,ufk->uf", x["z"], d["x"]))


def occupancy_log_joint(d, x, y) -> float:
    total = 0.0
    for name in ("bird_mean", "alpha", "beta"):
        mean, log_sd = x[f"{name}_mean"], x[f"{name}_log_var"]
        total += log_normal(mean) + log_normal(log_sd) + log_normal(x[name], mean, np.exp(log_sd))
    total += log_normal(x["bird_year_mean"], x["bird_mean"][:, None])
    there = x["bird_year_mean"][..., None] * d["weather"] * x["beta"][:, None, None]
    seen = x["alpha"][:, None, None] * d["quality"] * x["z"] - 10 * (1 - x["z"])
    return total + log_bernoulli(x["z"], there) + log_bernoulli(y, seen[..., None])


def covid_log_joint(d, x, y) -> float:
    total = log_normal(x["CM_alpha"]) + log_normal(x["Wearing_alpha"], 0.0, 0.4)
    total += log_normal(x["Mobility_alpha"], 1.704, 0.44) + log_normal(x["RegionR"], 1.07, 0.6)
    total += log_normal(x["InitialSize_log_mean"], math.log(1000), 0.5)
    total += log_normal(x["log_infected_noise_mean"], math.log(0.01), 0.25)
    total += log_normal(x["InitialSize_log"], x["InitialSize_log_mean"], 0.5)
    total += log_normal(x["log_infected_noise"], x["log_infected_noise_mean"], 0.25)
    total += log_normal(x["psi"])
    growth = x["RegionR"] + d["npis"] @ x["CM_alpha"]
    growth = growth + x["Wearing_alpha"] * d["wearing"] + x["Mobility_alpha"] * d["mobility"]
    before = np.concatenate([x["InitialSize_log"][:, None], x["log_infected"][:, :-1]], 1)
    noise = np.exp(x["log_infected_noise"])[:, None]
    total += log_normal(x["log_infected"], before + growth, noise)
    mean, size = np.exp(x["log_infected"]), np.exp(x["psi"])[:, None]
    return total + nbinom.logpmf(y, size, size / (size + mean)).sum()


def states_log_joint(d, x, y) -> float:
    total = sum(log_normal(x[n]) for n in ("global_mean", "global_log_sigma", "Beta_u"))
    total += log_normal(x["State_log_sigma"]) + log_normal(x["Beta_basement"])
    total += log_normal(x["State_mean"], x["global_mean"], np.exp(x["global_log_sigma"]))
    mean, u, b, log_sigma = (
        x[n][..., None] for n in ("State_mean", "Beta_u", "Beta_basement", "State_log_sigma")
    )
    return total + log_normal(y, mean + b * d["basement"] + u * d["log_uranium"], np.exp(log_sigma))


def counties_log_joint(d, x, y) -> float:
    names = ("global_mean", "global_log_sigma", "State_log_sigma", "County_log_sigma")
    total = sum(log_normal(x[n]) for n in (*names, "Beta_u", "Beta_basement"))
    total += log_normal(x["State_mean"], x["global_mean"], np.exp(x["global_log_sigma"]))
    within = np.exp(x["State_log_sigma"])[:, None]
    total += log_normal(x["County_mean"], x["State_mean"][:, None], within)
    mean, u, b, log_sigma = (
        x[n][..., None] for n in ("County_mean", "Beta_u", "Beta_basement", "County_log_sigma")
    )
    return total + log_normal(y, mean + b * d["basement"] + u * d["log_uranium"], np.exp(log_sigma))


HOUSES = {"basement": RNG.integers(0, 2, (2, 3, 4)), "log_uranium": RNG.normal(size=(2, 3, 4))}
ZIPS = {name: array[0] for name, array in HOUSES.items()}
REPORTS = {"company": one_hot((2, 3, 5), 4), "run_type": one_hot((2, 3, 5), 3, seed=1)}
PULLS = {n: RNG.integers(0, 2, (3, 2, 4)) for n in ("condition", "prosoc_left")}
VISITS = {"weather": RNG.normal(size=(3, 2, 6)), "quality": RNG.integers(0, 2, (3, 2, 6))}
REGIONS = {
    "npis": RNG.integers(0, 2, (2, 4, 3)),
    "wearing": RNG.random((2, 4)),
    "mobility": -RNG.random((2, 4)),
}

# model with arguments, covariates, sizes of other plates, log joint, units of rescaled latents
CASES = {
    "bus_breakdown": (
        models.bus_breakdown(companies=4, run_types=3),
        REPORTS,
        {},
        bus_log_joint,
        {"alpha": 1000},
    ),
    "bus_breakdown with delays": (
        models.bus_breakdown(companies=4, run_types=3, delays=True),
        REPORTS,
        {},
        bus_log_joint,
        {"alpha": 1000},
    ),
    "chimpanzees": (models.chimpanzees, PULLS, {}, chimpanzees_log_joint, {"alpha_block": 1000}),
    "movielens": (
        models.movielens(features=6),
        {"x": genre_flags(4, 5, 6)},
        {},
        movielens_log_joint,
        {"z": 100},
    ),
    "occupancy": (
        models.occupancy,
        VISITS,
        {"replicate": 3},
        occupancy_log_joint,
        {"bird_year_mean": 1000},
    ),
    "covid": (
        models.covid(interventions=3),
        REGIONS,
        {},
        covid_log_joint,
        {"Wearing_alpha": 10_000},
    ),
    "radon_states": (models.radon_states, ZIPS, {}, states_log_joint, {"State_mean": 1000}),
    "radon_counties": (
        models.radon_counties,
        HOUSES,
        {},
        counties_log_joint,
        {"County_mean": 100, "Beta_u": 10, "Beta_basement": 1000},
    ),
}
EACH = pytest.mark.parametrize("name", CASES)


@EACH
def test_the_log_joint_is_the_formula(name):
    program, covariates, sizes, log_joint, _ = CASES[name]
    data, truth = simulated(program, covariates, sizes=sizes, seed=3)
    point = {n: x.numpy() for n, x in truth.items()}
    expected = log_joint(covariates, point, data["obs"].numpy())
    assert np.isfinite(expected)
    assert joint_density(program.bind(data), point) == pytest.approx(expected, rel=1e-10)


@EACH
def test_other_units_are_the_same_model(name):
    program, covariates, sizes, _, units = CASES[name]
    data, truth = simulated(program, covariates, sizes=sizes, seed=3)
    point = {n: x.numpy() for n, x in truth.items()}
    there = {n: x / units.get(n, 1) for n, x in point.items()}
    # The density of z / unit is unit times that of z, for each scalar.
    expected = joint_density(program.bind(data), point)
    expected += sum(point[n].size * math.log(unit) for n, unit in units.items())
    rescaled = program(rescaled=True).bind(data)
    assert joint_density(rescaled, there) == pytest.approx(expected, rel=1e-10)


@EACH
def test_simulations_are_finite_and_bind_as_data(name):
    program, covariates, sizes, _, _ = CASES[name]
    drawn = program.sample(6, covariates, sizes=sizes, seed=0)
    assert all(x.shape[0] == 6 and x.isfinite().all() for x in drawn.values())
    graph = program.graph({**covariates, "obs": drawn["obs"][0]})
    assert [v.name for v in graph.role("observed")] == ["obs"]
    assert {v.name for v in graph.latents} == set(drawn) - {"obs"}


@EACH
def test_one_line_fits_it(name):
    program, covariates, sizes, _, _ = CASES[name]
    data, truth = simulated(program, covariates, sizes=sizes, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # five iterations do not converge
        posterior = infer(
            program, data, method="qem", max_iters=5, particles=8, final_particles=8, seed=0
        )
    for latent, value in truth.items():
        assert posterior.mean(latent).shape == value.shape
        assert posterior.mean(latent).isfinite().all()


def test_a_bird_that_was_seen_is_there_and_one_that_was_not_may_be():
    visits = {"weather": np.full((1, 1, 2), 2.0), "quality": np.ones((1, 1, 2))}
    obs = np.array([[[[1, 0, 0], [0, 0, 0]]]])
    known = {"bird_year_mean": [[0.5]], "alpha": [-1.0], "beta": [1.0]}
    posterior = infer(models.occupancy.do(**known), {**visits, "obs": obs}, method="exact")
    there, seen = expit(0.5 * 2.0), expit(-1.0)
    missed = there * (1 - seen) ** 3
    silent = missed / (missed + (1 - there) * (1 - expit(-10.0)) ** 3)
    first = there * seen * (1 - seen) ** 2
    first /= first + (1 - there) * expit(-10.0) * (1 - expit(-10.0)) ** 2
    assert np.allclose(posterior.mean("z").numpy().ravel(), [first, silent], atol=1e-9)
