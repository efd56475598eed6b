"""The models say what their docstrings say: graphs, simulations, posteriors by quadrature."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ppl import infer
from ppl.models import datasets, eight_schools, radon, radon_states, rats

HOUSES = {
    "county": ["b", "a", "b", "b", "a"],
    "floor": [0, 1, 0, 1, 0],
    "uranium": [0.5, -0.5, 0.5, 0.5, -0.5],
}
ZIPS = {"basement": torch.tensor([[1, 0, 1], [0, 1, 1]]), "log_uranium": torch.ones(2, 3)}
TIMES = {"age": [8.0, 22.0, 36.0], "rat": ["x", "y"]}

# model, covariates, shapes of its latents, observed site and its shape
CASES = [
    pytest.param(
        eight_schools,
        {"sigma": [15.0, 10.0, 16.0]},
        {"mu": (), "tau": (), "theta": (3,)},
        ("y", (3,)),
        id="eight_schools",
    ),
    pytest.param(
        rats,
        TIMES,
        {
            **dict.fromkeys(("mu_alpha", "mu_beta", "sigma_alpha", "sigma_beta", "sigma_y"), ()),
            **dict.fromkeys(("alpha", "beta"), (2,)),
        },
        ("weight", (2, 3)),
        id="rats",
    ),
    pytest.param(
        radon,
        HOUSES,
        {**dict.fromkeys(("base", "slope", "spread", "noise", "effect"), ()), "level": (2,)},
        ("log_radon", (5,)),
        id="radon",
    ),
    pytest.param(
        radon_states,
        ZIPS,
        {
            **dict.fromkeys(("global_mean", "global_log_sigma"), ()),
            **dict.fromkeys(("State_mean", "State_log_sigma", "Beta_u", "Beta_basement"), (2,)),
        },
        ("obs", (2, 3)),
        id="radon_states",
    ),
]


@pytest.mark.parametrize("model, covariates, latents, observed", CASES)
def test_simulations_have_the_documented_sites_and_shapes(model, covariates, latents, observed):
    drawn = model.sample(4, covariates, seed=0)
    shapes = {name: tuple(value.shape) for name, value in drawn.items()}
    assert shapes == {name: (4, *shape) for name, shape in (*latents.items(), observed)}
    assert all(value.isfinite().all() for value in drawn.values())


@pytest.mark.parametrize("model, covariates, latents, observed", CASES)
def test_a_simulation_binds_as_data(model, covariates, latents, observed):
    name = observed[0]
    data = {**covariates, name: model.sample(1, covariates, seed=1)[name][0]}
    graph = model.graph(data)
    assert {v.name for v in graph.latents} == set(latents)
    assert [v.name for v in graph.role("observed")] == [name]


def within_errors(draws: torch.Tensor, mean: float, sd: float, errors: float = 4.5) -> None:
    """Mean and sd of independent Normal draws ``[n]`` lie within so many standard errors."""
    n = len(draws)
    assert abs(float(draws.mean()) - mean) < errors * sd / math.sqrt(n)
    assert abs(float(draws.std()) - sd) < errors * sd / math.sqrt(2 * n)


def test_eight_schools_simulates_its_formula():
    drawn = eight_schools.do(tau=3.0).sample(4000, {"sigma": [12.0]}, seed=0)
    within_errors(drawn["y"][:, 0], 0.0, math.sqrt(5**2 + 3**2 + 12**2))


def test_rats_simulates_its_formula():
    fixed = rats.do(mu_alpha=240.0, mu_beta=6.0, sigma_alpha=15.0, sigma_beta=0.5, sigma_y=6.0)
    drawn = fixed.sample(4000, TIMES, seed=0)["weight"][:, 1, 2]
    within_errors(drawn, 240 + 14 * 6, math.sqrt(15**2 + (14 * 0.5) ** 2 + 6**2))


def test_radon_simulates_its_formula():
    fixed = radon.do(base=1.0, slope=0.7, spread=0.3, noise=0.8, effect=-0.6)
    drawn = fixed.sample(4000, HOUSES, seed=0)["log_radon"]
    within_errors(drawn[:, 3], 1.0 + 0.7 * 0.5 - 0.6, math.hypot(0.3, 0.8))  # county b, upstairs
    within_errors(drawn[:, 4], 1.0 - 0.7 * 0.5, math.hypot(0.3, 0.8))  # county a, basement
    shared = np.corrcoef(drawn[:, 0], drawn[:, 2])[0, 1]  # both in county b
    assert shared == pytest.approx(0.3**2 / (0.3**2 + 0.8**2), abs=4.5 / math.sqrt(4000))


def test_radon_without_uranium_has_no_slope():
    assert "slope" not in radon(uranium=False).graph().variables
    assert "uranium" not in radon(uranium=False).graph().variables


def test_radon_states_simulates_its_formula():
    fixed = radon_states.do(global_mean=0.5, global_log_sigma=-1.0).do(
        Beta_u=[0.4, 0.2], Beta_basement=[0.7, 0.1], State_log_sigma=[0.2, -0.3]
    )
    drawn = fixed.sample(4000, ZIPS, seed=0)["obs"]
    within_errors(drawn[:, 0, 0], 0.5 + 0.7 + 0.4, math.hypot(math.exp(-1.0), math.exp(0.2)))
    within_errors(drawn[:, 1, 0], 0.5 + 0.2, math.hypot(math.exp(-1.0), math.exp(-0.3)))


def eight_schools_by_quadrature() -> dict[str, np.ndarray]:
    """Posterior means and log evidence: given tau everything is Gaussian, tau is a fine grid.

    Source: [Gelman2013] section 5.4, with a proper Normal(0, 5) prior of mu.
    """
    data = datasets.eight_schools()
    y, variance = np.array(data["y"]), np.square(data["sigma"])
    u = (np.arange(20_000) + 0.5) / 20_000
    tau = 5 * np.tan(np.pi / 2 * u)  # midpoints of HalfCauchy(5) by its quantiles
    total = variance + tau[:, None] ** 2  # variance of y_j given mu
    precision = 1 / 25 + (1 / total).sum(1)
    mu = (y / total).sum(1) / precision
    log_weight = -0.5 * (np.log(2 * np.pi * total) + y**2 / total).sum(1)
    log_weight += 0.5 * precision * mu**2 - 0.5 * np.log(25 * precision)
    weight = np.exp(log_weight - log_weight.max())
    theta = (tau[:, None] ** 2 * y + variance * mu[:, None]) / total
    share = weight / weight.sum()
    return {
        "mu": share @ mu,
        "tau": share @ tau,
        "theta": share @ theta,
        "log_evidence": np.log(weight.mean()) + log_weight.max(),
    }


def test_qem_fits_eight_schools_as_quadrature_does():
    expected = eight_schools_by_quadrature()
    posterior = infer(eight_schools, datasets.eight_schools(), method="qem", seed=0)
    for name, unit in (("mu", 3.3), ("tau", 3.2), ("theta", 5.0)):  # posterior sd
        error = (posterior.mean(name).numpy() - expected[name]) / unit
        assert np.abs(error).max() < 0.1, name
    assert posterior.log_evidence.value == pytest.approx(expected["log_evidence"], abs=0.1)


@pytest.mark.slow
def test_qem_fits_rats_as_nuts_does():
    # Reference: NUTS on the version of posteriordb, 10 000 draws; mean and sd.
    reference = {
        "mu_alpha": (242.48, 2.73),
        "mu_beta": (6.185, 0.112),
        "sigma_alpha": (14.89, 2.15),
        "sigma_beta": (0.532, 0.095),
        "sigma_y": (6.119, 0.463),
    }
    posterior = infer(rats, datasets.rats(), method="qem", seed=0)
    for name, (mean, sd) in reference.items():
        assert abs(float(posterior.mean(name)) - mean) < 0.2 * sd, name
        assert float(posterior.sd(name)) == pytest.approx(sd, rel=0.2), name


@pytest.mark.slow
def test_qem_fits_radon_states_as_nuts_does():
    file = datasets.find("nuts_reference/radon.npz")
    if file is None or datasets.find("radon/radon_states.npz") is None:
        pytest.skip("the radon data and its reference posterior are not on this machine")
    with np.load(file) as archive:
        reference = {name: archive[name] for name in archive.files}
    posterior = infer(radon_states, datasets.radon_states().train, method="qem", seed=0)
    for name in ("global_mean", "global_log_sigma", "State_mean", "State_log_sigma", "Beta_u"):
        error = posterior.mean(name).numpy() - reference[f"{name}__mean"]
        assert np.abs(error / reference[f"{name}__sd"]).max() < 0.2, name
