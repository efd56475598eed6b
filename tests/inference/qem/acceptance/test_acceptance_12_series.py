"""Acceptance test 12: the Kalman smoother at large K, and hidden Markov models exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ppl import Categorical, Markov, Normal, given, latent, model, observe, plate
from ppl.backend import Settings
from ppl.inference.particles.estep import evaluated, weigh
from ppl.inference.qem import QEM, init, prepare
from ppl.streams import Streams
from tests.quiet import quiet_fit
from tests.small_programs import autoregression
from tests.smoothers import autoregression_smoother, forward_backward, normal_log_likelihood

Y = np.array([0.4, 1.3, 0.2, -0.5, -1.6, -0.9, -2.2, -1.1])


SERIES = {"gain": 0.8, "step": 0.7, "noise": 0.6, "first_mean": 0.5, "first_sd": 1.5}


@model
def autoregressive_after_a_latent():
    """The same series with its first state written as a latent above the plate."""
    first = latent("first", Normal(0.5, 1.5))
    with plate("time", ordered=True):
        step = lambda before: Normal(0.8 * before, 0.7)  # noqa: E731
        x = latent("x", Markov(Normal(0.8 * first, 0.7), step))
        observe("y", Normal(x, 0.6))


def check_moments(posterior, exact):
    """Within 0.06 posterior sds: of order sqrt(1 / smallest ESS), with a few replicates of 400 particles a step."""
    sd = np.sqrt(exact.cov[:, 0, 0])
    error = (posterior.mean("x").numpy() - exact.mean[:, 0]) / sd
    assert np.abs(error).max() < 0.06, error
    assert np.abs(np.log(posterior.sd("x").numpy() / sd)).max() < 0.06
    found = posterior.log_evidence
    assert abs(found.value - exact.log_evidence) < 0.05, (found, exact.log_evidence)


@pytest.mark.parametrize("seed", [0, 1])
def test_12_kalman_smoother_at_large_k(seed):
    exact = autoregression_smoother(Y, **SERIES)
    posterior = quiet_fit(
        autoregression(**SERIES),
        {"y": Y},
        seed=seed,
        particles=100,
        final_particles=400,
        max_iters=100,
    )
    check_moments(posterior, exact)


@pytest.mark.parametrize("seed", [0, 1])
def test_12_kalman_smoother_with_a_first_state_above_the_series(seed):
    above = {"first_mean": 0.4, "first_sd": np.sqrt(0.64 * 2.25 + 0.49)}
    exact = autoregression_smoother(Y, **{**SERIES, **above})
    posterior = quiet_fit(
        autoregressive_after_a_latent, {"y": Y}, seed=seed, particles=100, final_particles=400,
        max_iters=100,
    )  # fmt: skip
    check_moments(posterior, exact)


def test_12_paths_have_the_lagged_covariance_of_the_smoother():
    """Joint draws of neighbours; draws of each step on its own would have none."""
    exact = autoregression_smoother(Y, **SERIES)
    posterior = quiet_fit(
        autoregression(**SERIES),
        {"y": Y},
        seed=0,
        particles=100,
        final_particles=400,
        max_iters=100,
    )
    paths = posterior.samples(8000)["x"].numpy()
    sd = np.sqrt(exact.cov[:, 0, 0])
    found = np.cov(paths.T)[np.arange(1, 8), np.arange(7)] / (sd[1:] * sd[:-1])
    wanted = exact.lag[:, 0, 0] / (sd[1:] * sd[:-1])
    assert (wanted > 0.2).all()
    assert np.abs(found - wanted).max() < 0.06, (found, wanted)


# ---- enumerated states ----------------------------------------------------------------------

START = np.array([0.5, 0.3, 0.2])
MOVE = np.array([[0.8, 0.15, 0.05], [0.2, 0.7, 0.1], [0.1, 0.3, 0.6]])
CENTRES = np.array([-1.0, 0.5, 2.0])


@model
def hidden_markov():
    move, centres = torch.as_tensor(MOVE), torch.as_tensor(CENTRES)
    with plate("time", ordered=True):
        step = lambda before: Categorical(move[before])  # noqa: E731
        z = latent("z", Markov(Categorical(torch.as_tensor(START)), step))
        observe("y", Normal(centres[z], 0.9))


@model
def several_chains():
    move, centres = torch.as_tensor(MOVE), torch.as_tensor(CENTRES)
    with plate("series"):
        with plate("time", ordered=True):
            step = lambda before: Categorical(move[before])  # noqa: E731
            z = latent("z", Markov(Categorical(torch.as_tensor(START)), step))
            observe("y", Normal(centres[z] + given("shift"), 0.9))


def log_likelihood(y, shift=0.0):
    return normal_log_likelihood(y, CENTRES + shift, 0.9)


def series_of(length):
    rng = np.random.default_rng(length)
    return rng.choice(CENTRES, length) + 0.9 * rng.standard_normal(length)


@pytest.mark.parametrize("length", [1, 2, 9, 200])
def test_12_hidden_markov_model_equals_forward_backward(length):
    y = series_of(length)
    log_evidence, single, _ = forward_backward(START, MOVE, log_likelihood(y))
    posterior = quiet_fit(hidden_markov, {"y": y}, seed=0, max_iters=2)
    assert posterior.log_evidence.value == pytest.approx(log_evidence, rel=1e-10)
    np.testing.assert_allclose(posterior.probs("z").numpy(), single, rtol=1e-9, atol=1e-12)


def test_12_pairs_of_neighbouring_states_equal_forward_backward():
    y = series_of(30)
    _, _, pairs = forward_backward(START, MOVE, log_likelihood(y))
    problem = prepare(hidden_markov.bind({"y": y}), QEM(), Settings(Streams(0)))
    here = evaluated(problem, problem.weighting, {}, init(problem).q)
    (axis,) = weigh(here).marginals
    _, found = problem.weighting.plan.marginals(here.factors(), joint=[(axis + "'", axis)])
    np.testing.assert_allclose(found[axis + "'", axis].numpy(), pairs, rtol=1e-9, atol=1e-12)


def test_12_hidden_markov_chains_in_a_plate_equal_forward_backward():
    y, shift = np.stack([series_of(6) + k for k in range(3)]), np.arange(3.0)
    exact = [
        forward_backward(START, MOVE, log_likelihood(row, s))
        for row, s in zip(y, shift, strict=True)
    ]
    posterior = quiet_fit(
        several_chains, {"y": y, "shift": shift[:, None].repeat(6, 1)}, seed=0, max_iters=2
    )
    assert posterior.log_evidence.value == pytest.approx(sum(e[0] for e in exact), rel=1e-10)
    found = posterior.probs("z").numpy()
    np.testing.assert_allclose(found, np.stack([e[1] for e in exact]), rtol=1e-9, atol=1e-12)


def test_12_paths_of_states_have_the_frequencies_of_forward_backward():
    y = series_of(5)
    _, _, pairs = forward_backward(START, MOVE, log_likelihood(y))
    paths = (
        quiet_fit(hidden_markov, {"y": y}, seed=0, max_iters=2).samples(20_000)["z"].long().numpy()
    )
    for t in range(4):
        counts = np.zeros((3, 3))
        np.add.at(counts, (paths[:, t], paths[:, t + 1]), 1)
        error = np.sqrt(pairs[t] * (1 - pairs[t]) / 20_000)
        assert (np.abs(counts / 20_000 - pairs[t]) < 5 * error + 1e-4).all()
