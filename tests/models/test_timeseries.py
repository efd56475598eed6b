"""Time series: densities by hand, moments of simulations, lags, a Kalman filter as oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from ppl import infer
from ppl.models import (
    autoregression,
    local_level,
    local_linear_trend,
    stochastic_volatility,
    tracking,
)
from ppl.models.timeseries import lagged, lighthouse, simulated
from tests.models.joint_density import joint_density

SCALES = {"level_sd": 0.5, "slope_sd": 0.1, "noise_sd": 2.0, "start_sd": 3.0}
LEVEL = {name: SCALES[name] for name in ("level_sd", "noise_sd", "start_sd")}
LAGS = lagged(np.random.default_rng(0).standard_normal(9), 2)["lags"]
BOAT = {name: value for name, value in lighthouse(6)[0].items() if name not in ("range", "bearing")}

# model, covariates, latents with their shapes, observed sites with theirs
CASES = [
    pytest.param(local_level, LEVEL, {"level": (6,)}, {"y": (6,)}, id="local_level"),
    pytest.param(local_linear_trend, SCALES, {"state": (6, 2)}, {"y": (6,)}, id="trend"),
    pytest.param(
        autoregression,
        {"lags": LAGS[:6], "noise_sd": 1.0},
        {"intercept": (), "phi": (2,)},
        {"y": (6,)},
        id="autoregression",
    ),
    pytest.param(
        tracking, BOAT, {"state": (6, 4)}, {"range": (6,), "bearing": (6,)}, id="tracking"
    ),
    pytest.param(stochastic_volatility, {}, {"h": (6,)}, {"y": (6,)}, id="volatility"),
]


@pytest.mark.parametrize("program, known, latents, observed", CASES)
def test_a_series_is_drawn_and_fits_its_own_model(program, known, latents, observed):
    drawn = program.sample(7, known, sizes={"time": 6}, seed=0)
    assert {n: tuple(x.shape) for n, x in drawn.items()} == {
        n: (7, *shape) for n, shape in {**latents, **observed}.items()
    }
    data, truth = simulated(program, 6, known, seed=3)
    again, same = simulated(program, 6, known, seed=3)
    assert all(torch.equal(data[n], again[n]) for n in observed)
    assert all(torch.equal(truth[n], same[n]) for n in latents)
    assert math.isfinite(joint_density(program.bind(data), truth))


def test_the_density_of_a_level_is_the_formula():
    data, truth = simulated(local_level, 6, LEVEL, seed=0)
    level, y = truth["level"].numpy(), data["y"].numpy()
    expected = stats.norm(0, 3.0).logpdf(level[0]) + stats.norm(level, 2.0).logpdf(y).sum()
    expected += stats.norm(level[:-1], 0.5).logpdf(level[1:]).sum()
    assert joint_density(local_level.bind(data), truth) == pytest.approx(expected)


def test_the_density_of_a_trend_is_the_formula():
    data, truth = simulated(local_linear_trend, 6, SCALES, seed=0)
    (level, slope), y = truth["state"].numpy().T, data["y"].numpy()
    expected = stats.norm(0, 3.0).logpdf([level[0], slope[0]]).sum()
    expected += stats.norm(level[:-1] + slope[:-1], 0.5).logpdf(level[1:]).sum()
    expected += stats.norm(slope[:-1], 0.1).logpdf(slope[1:]).sum()
    expected += stats.norm(level, 2.0).logpdf(y).sum()
    assert joint_density(local_linear_trend.bind(data), truth) == pytest.approx(expected)


def test_the_density_of_a_track_is_the_formula():
    data, truth = simulated(tracking(step=2.0, acceleration=0.3), 5, boat_of(5), seed=1)
    state = truth["state"].numpy()
    block = 0.09 * np.array([[8 / 3, 2.0], [2.0, 2.0]])
    moved = state[:-1] + 2.0 * np.concatenate([state[:-1, 2:], np.zeros((4, 2))], 1)
    expected = stats.norm(data["start"], data["start_sd"]).logpdf(state[0]).sum()
    for axis in (0, 1):
        law = stats.multivariate_normal([0, 0], block)
        expected += law.logpdf((state[1:] - moved)[:, [axis, axis + 2]]).sum()
    away = np.linalg.norm(state[:, :2], axis=1)
    expected += stats.norm(away, 0.5).logpdf(data["range"]).sum()
    bearing = data["bearing"].numpy() - np.arctan2(state[:, 1], state[:, 0])
    wrapped = (bearing + np.pi) % (2 * np.pi) - np.pi
    expected += stats.norm(0, 0.05).logpdf(wrapped).sum()
    program = tracking(step=2.0, acceleration=0.3)
    assert joint_density(program.bind(data), truth) == pytest.approx(expected)


def boat_of(times: int) -> dict[str, object]:
    return {**BOAT, "sensor": np.zeros((times, 2))}


def test_bearings_may_wrap():
    data, truth = lighthouse(12, seed=0)
    turned = {**data, "bearing": data["bearing"] + 2 * math.pi}
    same = joint_density(tracking.bind(data), truth)
    assert joint_density(tracking.bind(turned), truth) == pytest.approx(same)
    boat, _ = lighthouse(50, seed=0)
    assert boat["bearing"].min() < -2.5 and boat["bearing"].max() > 2.5  # it crosses pi


def test_volatility_is_stationary():
    program = stochastic_volatility(mean=-1.0, persistence=0.9, spread=0.3)
    h = program.sample(4000, sizes={"time": 20}, seed=0)["h"]
    sd = 0.3 / math.sqrt(1 - 0.81)
    for t in (0, 19):
        assert float(h[:, t].mean()) == pytest.approx(-1.0, abs=4.5 * sd / math.sqrt(4000))
        assert float(h[:, t].std()) == pytest.approx(sd, rel=4.5 / math.sqrt(2 * 4000))


def test_lags_are_the_values_before():
    y = np.arange(7.0)
    data = lagged(y, 3)
    assert data["y"].tolist() == [3, 4, 5, 6] and data["lags"][1].tolist() == [3, 2, 1]


def test_a_regression_on_lags_is_exact_least_squares():
    rng = np.random.default_rng(3)
    y = np.zeros(400)
    for t in range(2, 400):
        y[t] = 0.5 + 0.6 * y[t - 1] - 0.3 * y[t - 2] + 0.2 * rng.standard_normal()
    data = {**lagged(y, 2), "noise_sd": 0.2}
    posterior = infer(autoregression, data, method="exact")
    design = np.column_stack([np.ones(len(data["y"])), data["lags"]])
    precision = design.T @ design / 0.04 + np.diag([0.01, 1.0, 1.0])
    expected = np.linalg.solve(precision, design.T @ data["y"] / 0.04)
    assert float(posterior.mean("intercept")) == pytest.approx(expected[0], abs=1e-8)
    assert posterior.mean("phi").numpy() == pytest.approx(expected[1:], abs=1e-8)


@pytest.mark.parametrize("method", ["laplace", "gbp"])
def test_a_track_is_found_across_pi(method):
    data, truth = lighthouse(50, seed=1)
    posterior = infer(tracking, data, method=method)
    score = (posterior.mean("state") - truth["state"]) / posterior.sd("state")
    assert 0.4 < float(score.square().mean()) < 2.2


@pytest.mark.parametrize("method", ["laplace", "gbp"])
def test_volatility_is_found(method):
    data, truth = simulated(stochastic_volatility, 200, seed=1)
    posterior = infer(stochastic_volatility, data, method=method)
    score = (posterior.mean("h") - truth["h"]) / posterior.sd("h")
    assert 0.5 < float(score.square().mean()) < 2


def test_scales_are_data_constants_or_latents():
    data = {"y": [1.0, 2.0, 4.0]}
    for scales, role in (("learned", "param"), ("latent", "latent")):
        graph = local_linear_trend(scales=scales).graph(data)
        assert {graph.variables[n].role for n in ("level_sd", "slope_sd", "noise_sd")} == {role}
    assert local_level.graph({**data, **LEVEL}).variables["level_sd"].role == "given"


def test_the_smoother_of_a_level_is_that_of_kalman():
    data, _ = simulated(local_level, 12, LEVEL, seed=2)
    y = data["y"].numpy().copy()
    y[4] = np.nan
    posterior = infer(local_level, {**data, "y": y}, method="exact")
    mean, variance = kalman_smoother(y, 0.25, 4.0, 9.0)
    assert posterior.mean("level").numpy() == pytest.approx(mean, abs=1e-8)
    assert posterior.sd("level").numpy() ** 2 == pytest.approx(variance, abs=1e-8)


def kalman_smoother(y, drift, noise, first) -> tuple[np.ndarray, np.ndarray]:
    """Means and variances of a local level, forwards and back (Rauch, Tung, Striebel)."""
    means, variances, ahead = [], [], []
    mean, variance = 0.0, first
    for value in y:
        ahead.append((mean, variance))
        if not np.isnan(value):
            gain = variance / (variance + noise)
            mean, variance = mean + gain * (value - mean), (1 - gain) * variance
        means.append(mean)
        variances.append(variance)
        variance += drift
    for t in reversed(range(len(y) - 1)):
        back = variances[t] / ahead[t + 1][1]
        means[t] += back * (means[t + 1] - ahead[t + 1][0])
        variances[t] += back**2 * (variances[t + 1] - ahead[t + 1][1])
    return np.array(means), np.array(variances)
