"""Gauss-Markov proposals of chains: density, drawing, learning, and what they reach on linear-Gaussian series."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from ppl import Markov, MultivariateNormal, Normal, given, infer, latent, model, observe, plate
from ppl.backend import Settings
from ppl.inference.numerics.linalg import weighted_moments
from ppl.inference.particles import paths
from ppl.inference.particles.approximation import Approximation
from ppl.inference.particles.estep import draw_all, evaluated, weigh
from ppl.inference.particles.proposals import Joint, Proposal
from ppl.inference.qem import QEM, init, prepare
from ppl.models.timeseries import local_level, local_linear_trend, simulated
from ppl.streams import Streams
from tests.small_programs import autoregression
from tests.smoothers import Smoothed, autoregression_smoother, kalman_smoother


def random_joint(*lead: int, d: int = 2) -> Joint:
    root = torch.randn(*lead, 2 * d, 2 * d, dtype=torch.float64)
    cov = root @ root.mT + 0.1 * torch.eye(2 * d, dtype=torch.float64)
    return Joint(torch.randn(*lead, 2 * d, dtype=torch.float64), cov)


def regression(joint: Joint, place: tuple[int, ...]):
    """Gain and covariance of the last coordinates given the first, by the textbook formula."""
    mean, cov = joint.mean[place].numpy(), joint.cov[place].numpy()
    d = len(mean) // 2
    gain = cov[d:, :d] @ np.linalg.inv(cov[:d, :d])
    return mean[:d], mean[d:], gain, cov[d:, d:] - gain @ cov[:d, d:]


@pytest.mark.parametrize("time", [0, 1])
def test_density_is_the_mixture_over_the_particles_before(time):
    joint = random_joint(3, 4)
    free = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    log = paths.log_density(paths.transition(joint, time), free, time)
    for place in np.ndindex(3, 4):
        before, own, gain, cov = regression(joint, place)
        x = free[place].numpy()
        if place[time] == 0:
            expected = stats.multivariate_normal(own, joint.cov[place][2:, 2:].numpy()).logpdf(x)
        else:
            earlier = free[tuple(p - (i == time) for i, p in enumerate(place))].numpy()
            each = [
                stats.multivariate_normal(own + gain @ (e - before), cov).pdf(x) for e in earlier
            ]
            expected = np.log(np.mean(each, 0))
        np.testing.assert_allclose(log[place].numpy(), expected, atol=1e-8)


@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_paths_follow_the_recursion(length):
    joint, noise = random_joint(length), torch.randn(length, 3, 2, dtype=torch.float64)
    law = paths.transition(joint, 0)
    found = paths.draw_paths(law, noise, 0)
    state = law.mean[0] + noise[0] @ law.chol[0].mT
    torch.testing.assert_close(found[0], state)
    for t in range(1, length):
        state = law.mean[t] + (state - law.before[t]) @ law.gain[t].mT + noise[t] @ law.chol[t].mT
        torch.testing.assert_close(found[t], state)


def test_conditional_covariance_keeps_its_digits():
    """A walk from a vague start: neighbours correlate to eight nines."""
    sd, step = 1000.0, 0.1
    cov = torch.tensor([[sd**2, sd**2], [sd**2, sd**2 + step**2]], dtype=torch.float64)
    law = paths.transition(Joint(torch.zeros(2, 2, dtype=torch.float64), cov.expand(2, 2, 2)), 0)
    assert float(law.chol[1]) == pytest.approx(step, rel=1e-3)


def test_moments_of_pairs_and_of_draws_agree():
    draws = torch.randn(3, 50, 2, dtype=torch.float64).cumsum(0)  # [T, K, D]
    weights = torch.full((3, 50), 1 / 50, dtype=torch.float64)
    pairs = torch.diag_embed(weights[1:])  # particle k of t goes with particle k of t - 1
    found = paths.pair_moments(draws, weights, pairs, 0)
    sample = paths.sample_moments(draws.movedim(1, 0), 0)
    torch.testing.assert_close(found.mean, sample.mean)
    torch.testing.assert_close(found.cov, sample.cov, rtol=1e-8, atol=1e-8)
    _, cov = weighted_moments(torch.cat([draws[0], draws[1]], -1), weights[0])
    torch.testing.assert_close(found.cov[1], cov)


@model
def walk():
    sd = given("sd", default=0.5)
    with plate("day", ordered=True):
        x = latent("x", Markov(Normal(0.0, 1.0), lambda before: Normal(0.9 * before, 0.3)))
        observe("y", Normal(x, sd))


WALK = {"gain": 0.9, "step": 0.3, "noise": 0.5}


def exact_joint(exact: Smoothed) -> Joint:
    """State of the proposal that is the posterior."""
    mean, cov, lag = (torch.tensor(x) for x in (exact.mean, exact.cov, exact.lag))
    return paths._neighbours(mean, cov, lag.mT, 0)


@pytest.mark.parametrize("particles", [1, 2, 7])
def test_exact_conditionals_give_the_evidence_without_error(particles):
    y = [0.4, -0.2, 0.9, math.nan, 1.5, 1.1]
    exact = autoregression_smoother(y, **WALK)
    problem = prepare(walk.bind({"y": y}), QEM(particles=particles), Settings(Streams(1)))
    q = Approximation({"k:x": Proposal(exact_joint(exact), {})}, {})
    drawn = draw_all(problem.weighting, q, Streams(1))
    found = weigh(evaluated(problem, problem.weighting, drawn, q))
    assert float(found.log_z) == pytest.approx(exact.log_evidence, abs=1e-7)
    last = found.marginals["k:x"][-1]
    torch.testing.assert_close(last, torch.full_like(last, 1 / particles), rtol=0, atol=1e-7)


def test_the_evidence_is_unbiased():
    y = [0.4, -0.2, 0.9, 1.5]
    log = autoregression_smoother(y, **WALK).log_evidence
    problem = prepare(walk.bind({"y": y}), QEM(particles=2), Settings(Streams(5), restarts=4000))
    start = init(problem).q
    prior = start.proposals["k:x"].joint
    same = Joint(prior.mean[:1].expand_as(prior.mean), prior.cov[:1].expand_as(prior.cov))
    q = start._replace(proposals={"k:x": Proposal(same, {})})
    drawn = draw_all(problem.weighting, q, Streams(6))
    ratio = (weigh(evaluated(problem, problem.weighting, drawn, q)).log_z - log).exp()
    error = float(ratio.std() / math.sqrt(len(ratio)))
    assert abs(float(ratio.mean()) - 1) < 4 * error
    assert error < 0.05


def agreement(posterior, name, exact):
    """Largest error of means in posterior sds, and of log sds."""
    sd = np.sqrt(np.diagonal(exact.cov, axis1=1, axis2=2)).reshape(posterior.mean(name).shape)
    apart = np.abs(posterior.mean(name).numpy() - exact.mean.reshape(sd.shape)) / sd
    return float(apart.max()), float(np.abs(np.log(posterior.sd(name).numpy() / sd)).max())


def moving_smoother(y, shake):
    """Of a place that moves by its speed, both shaken, from scales of 5; the place is read with noise of scale 1."""
    move, read = np.array([[1.0, 1.0], [0.0, 1.0]]), np.array([[1.0, 0.0]])
    return kalman_smoother(y, np.zeros(2), 25 * np.eye(2), move, shake, read, np.eye(1))


def test_local_level_agrees_with_the_smoother():
    data, _ = simulated(
        local_level, 40, {"level_sd": 0.1, "noise_sd": 1.0, "start_sd": 10.0}, seed=1
    )
    data["y"][5:9] = math.nan
    exact = autoregression_smoother(data["y"], 1.0, 0.1, 1.0, first_sd=10.0)
    posterior = infer(local_level, data, method="qem", particles=100, seed=0)
    far, spread = agreement(posterior, "level", exact)
    assert far < 0.06 and spread < 0.05
    assert posterior.log_evidence.value == pytest.approx(exact.log_evidence, abs=0.1)
    assert float(posterior.diagnostics.ess["level"].min()) > 2000


@pytest.mark.slow
def test_local_linear_trend_agrees_with_the_smoother():
    known = {"level_sd": 0.1, "slope_sd": 0.02, "noise_sd": 1.0, "start_sd": 5.0}
    data, _ = simulated(local_linear_trend, 50, known, seed=1)
    exact = moving_smoother(data["y"], np.diag([0.01, 0.0004]))
    posterior = infer(local_linear_trend, data, method="qem", particles=100, seed=0)
    far, spread = agreement(posterior, "state", exact)
    assert far < 0.1 and spread < 0.05
    assert posterior.log_evidence.value == pytest.approx(exact.log_evidence, abs=0.15)


@model
def tracked():
    """Constant velocity: a transition whose covariance is nearly singular."""
    move = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    shake = 0.01 * torch.tensor([[1 / 3, 1 / 2], [1 / 2, 1.0]], dtype=torch.float64)
    with plate("time", ordered=True):
        s = latent(
            "s",
            Markov(
                Normal(torch.zeros(2), 5.0),
                lambda before: MultivariateNormal(move @ before, covariance_matrix=shake),
            ),
        )
        observe("y", Normal(s[0], 1.0))


@pytest.mark.slow
def test_tracking_agrees_with_the_smoother():
    y = tracked.sample(1, sizes={"time": 50}, seed=3)["y"][0]
    exact = moving_smoother(y, 0.01 * np.array([[1 / 3, 1 / 2], [1 / 2, 1.0]]))
    posterior = infer(tracked, {"y": y}, method="qem", particles=100, seed=0)
    far, spread = agreement(posterior, "s", exact)
    assert far < 0.1 and spread < 0.06
    assert posterior.log_evidence.value == pytest.approx(exact.log_evidence, abs=0.15)


def test_drawn_paths_have_the_lag_one_correlation_of_the_posterior():
    """Draws from the marginals of each time would have none."""
    series = {"gain": 0.99, "step": 0.1, "noise": 3.0}
    slow = autoregression(**series)
    y = slow.sample(1, sizes={"time": 40}, seed=2)["y"][0]
    exact = autoregression_smoother(y, **series)
    sd = np.sqrt(exact.cov[:, 0, 0])
    draws = infer(slow, {"y": y}, method="qem", particles=50, seed=0).samples(4000)["x"]
    for t in (5, 20, 38):
        found = np.corrcoef(draws[:, t].numpy(), draws[:, t + 1].numpy())[0, 1]
        expected = exact.lag[t, 0, 0] / (sd[t] * sd[t + 1])
        assert expected > 0.97
        assert found == pytest.approx(expected, abs=0.01)


@model
def panel():
    drift = latent("drift", Normal(0.0, 1.0))
    with plate("series"):
        with plate("time", ordered=True):
            x = latent("x", Markov(Normal(drift, 1.0), lambda b: Normal(b + drift, 0.5)))
            observe("y", Normal(x, 0.7))


def test_whole_paths_of_many_short_chains_have_the_posterior_of_the_joint_gaussian():
    count, steps = 6, 5
    y = np.cumsum(np.random.default_rng(2).normal(0.4, 0.6, (count, steps)), 1)
    paths = np.tril(np.ones((steps, steps))) * np.r_[1.0, np.full(steps - 1, 0.5)]
    own = np.kron(np.eye(count), paths @ paths.T)
    load = np.tile(np.arange(1.0, steps + 1), count)  # every state adds the drift once more
    prior = own + np.outer(load, load)
    gain = prior @ np.linalg.inv(prior + 0.49 * np.eye(len(load)))
    mean, sd = gain @ y.ravel(), np.sqrt(np.diag(prior - gain @ prior))
    log_z = stats.multivariate_normal(np.zeros(len(load)), prior + 0.49 * np.eye(len(load)))
    posterior = infer(panel, {"y": y}, method="qem", seed=0)
    assert posterior.diagnostics.notes["particles"].keys() == {"k:drift", "k:x"}
    assert posterior.log_evidence.value == pytest.approx(log_z.logpdf(y.ravel()), abs=0.1)
    found = posterior.mean("x").numpy().ravel()
    np.testing.assert_allclose((found - mean) / sd, 0.0, atol=0.15)
    np.testing.assert_allclose(posterior.sd("x").numpy().ravel() / sd, 1.0, atol=0.15)
