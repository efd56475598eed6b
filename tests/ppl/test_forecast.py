"""The future of a chain: against the Kalman forecast, by every method, with covariates, in a panel."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from ppl import (
    Bernoulli,
    Categorical,
    DataError,
    Markov,
    Normal,
    given,
    infer,
    latent,
    model,
    observe,
    plate,
    simulation,
)
from tests.small_programs import autoregression
from tests.smoothers import autoregression_smoother

DRAWS = 4000
Y = [0.3, 0.9, math.nan, 1.4, 0.8, 1.9, 2.2, 1.7]


SERIES = {"gain": 0.9, "step": 0.5, "noise": 0.4, "first_sd": 2.0}


def kalman(y, push=None):
    """Filtered mean and variance of the last state."""
    mean, cov = autoregression_smoother(y, **SERIES, push=push).filtered
    return mean[-1, 0], cov[-1, 0, 0]


def ahead(mean, variance, pushes, *, gain=0.9, noise=0.5):
    """Means and variances of the states after it."""
    found = []
    for push in pushes:
        mean, variance = gain * mean + push, gain**2 * variance + noise**2
        found.append((mean, variance))
    return np.array(found).T


def close(future, name, means, variances):
    """Within four standard errors of the draws, and a tenth of an sd for what the fit itself misses."""
    sd = np.sqrt(variances)
    assert np.all(np.abs(future.mean(name).numpy() - means) < (4 / math.sqrt(DRAWS) + 0.1) * sd)
    np.testing.assert_allclose(future.sd(name).numpy(), sd, rtol=0.08)


@pytest.mark.parametrize("method", ["exact", "qem", "laplace", "gbp"])
def test_forecast_is_the_kalman_forecast(method):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = infer(autoregression(**SERIES), {"y": Y}, method=method, seed=0)
    future = posterior.forecast(time=5, n=DRAWS, seed=1)
    means, variances = ahead(*kalman(Y), np.zeros(5))
    close(future, "x", means, variances)
    close(future, "y", means, variances + 0.16)
    draws = future.draws["x"].numpy()  # the future is a path, too
    for t in range(4):
        expected = 0.9 * math.sqrt(variances[t] / variances[t + 1])
        assert np.corrcoef(draws[:, t], draws[:, t + 1])[0, 1] == pytest.approx(expected, abs=0.05)
    low, high = future.interval("x", 0.9)
    np.testing.assert_allclose((high - low).numpy(), 2 * 1.645 * np.sqrt(variances), rtol=0.1)


@model
def pushed():
    with plate("day", ordered=True):
        step = lambda before: Normal(0.9 * before + given("push"), 0.5)  # noqa: E731
        x = latent("x", Markov(Normal(0.0, 2.0), step))
        observe("y", Normal(x, 0.4))


PUSH = np.array([0.0, 1.0, -0.5, 0.3, 0.0, 0.7, 0.1, 0.0])


@pytest.fixture(scope="module")
def pushed_fit():
    return infer(pushed, {"y": Y, "push": PUSH}, method="exact", seed=0)


def test_covariates_of_the_future_come_in_as_data(pushed_fit):
    pushes = np.array([2.0, -1.0, 0.5])
    future = pushed_fit.forecast({"push": pushes}, day=3, n=DRAWS)
    close(future, "x", *ahead(*kalman(Y, PUSH), pushes))


@pytest.mark.parametrize("years", [[2001, 2002, 2003], np.array([2001, 2002, 2003])])
def test_years_go_on_counting(years):
    series = autoregression(**SERIES)
    posterior = infer(series, {"y": Y[:2] + Y[3:4]}, method="exact", seed=0, labels={"time": years})
    assert list(posterior.forecast(time=2, n=5).labels["time"]) == [2004, 2005]


@pytest.mark.parametrize("steps", [0, 2.5, True, "a"])
def test_steps_are_whole_numbers(pushed_fit, steps):
    with pytest.raises(DataError, match="expected a whole number of steps, at least 1"):
        pushed_fit.forecast(day=steps)


def test_labels_of_the_future_may_be_given(pushed_fit):
    future = pushed_fit.forecast({"push": [0.0, 0.0], "day": ["sat", "sun"]}, day=2, n=10)
    assert list(future.labels["day"]) == ["sat", "sun"]
    assert future.draws["x"].shape == (10, 2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, r"reads 'push' along day.*forecast\(\{'push': ...\}, day=2\)"),
        ({"push": [1.0]}, r"'push': expected shape \[2\] for the new elements, got \[1\]"),
        (
            {"push": [1.0, 2.0], "pull": [1.0, 2.0]},
            "'pull' is no covariate along day.*Covariates: push",
        ),
        ({"push": [1.0, 2.0], "day": ["sat"]}, "'day' has 1 labels. Give 2"),
    ],
)
def test_mistakes_about_the_future_are_answered_in_words(pushed_fit, data, message):
    with pytest.raises(DataError, match=message):
        pushed_fit.forecast(data, day=2)


@model
def panel():
    with plate("shop"):
        start = latent("start", Normal(0.0, 2.0))
        with plate("week", ordered=True):
            step = lambda before: Normal(0.9 * before + given("push"), 0.5)  # noqa: E731
            x = latent("x", Markov(Normal(start, 0.01), step))
            observe("y", Normal(x, 0.4))


def test_a_panel_goes_on_shop_by_shop():
    y = np.array([Y, Y[::-1], [v + 1 for v in Y]])
    pushes = np.stack([PUSH, 0 * PUSH, -PUSH])
    posterior = infer(panel, {"y": y, "push": pushes}, method="laplace", seed=0)
    after = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, -2.0]])
    future = posterior.forecast({"push": after}, week=2, n=DRAWS)
    assert future.draws["x"].shape == (DRAWS, 3, 2)
    for shop in range(3):
        means, variances = ahead(*kalman(y[shop], pushes[shop]), after[shop])
        found = future.draws["x"][:, shop]
        sd = np.sqrt(variances)
        assert np.all(np.abs(found.mean(0).numpy() - means) < 0.1 * sd)
        np.testing.assert_allclose(found.std(0).numpy(), sd, rtol=0.06)


def test_a_hidden_markov_model_goes_on_by_its_transitions():
    rows = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)

    @model
    def hmm():
        with plate("t", ordered=True):
            z = latent(
                "z", Markov(Categorical([0.5, 0.5]), lambda before: Categorical(rows[before]))
            )
            observe("y", Normal(3.0 * z, 1.0))

    posterior = infer(hmm, {"y": [0.1, 2.8, 3.3, 2.2]}, method="qem", seed=0)
    future = posterior.forecast(t=3, n=DRAWS)
    belief = posterior.probs("z")[-1].numpy()
    for ahead_of in range(3):
        belief = belief @ rows.numpy()
        np.testing.assert_allclose(future.probs("z")[ahead_of].numpy(), belief, atol=0.03)


def test_a_chain_whose_steps_depend_on_learned_numbers():
    @model
    def sticky():
        stay = latent("stay", Normal(1.5, 0.5))
        with plate("t", ordered=True):
            z = latent(
                "z",
                Markov(Bernoulli(0.5), lambda before: Bernoulli(logits=stay * (2 * before - 1))),
            )
            observe("y", Normal(2.0 * z, 0.5))

    posterior = infer(sticky, {"y": [0.0, 2.1, 1.9, 2.2, 2.0]}, method="qem", seed=0)
    future = posterior.forecast(t=1, n=DRAWS)
    draws = posterior.samples(DRAWS)
    chance = torch.sigmoid(draws["stay"] * (2 * draws["z"][:, -1] - 1)).mean()
    assert float(future.mean("z")[0]) == pytest.approx(float(chance), abs=0.03)


def test_only_the_future_is_simulated(monkeypatch):
    posterior = infer(autoregression(**SERIES), {"y": np.zeros(300)}, method="laplace", seed=0)
    calls = []
    sample = simulation._sample
    monkeypatch.setattr(simulation, "_sample", lambda *a: calls.append(1) or sample(*a))
    posterior.forecast(time=2, n=10)
    assert len(calls) < 10  # not one for each of the 300 known steps
