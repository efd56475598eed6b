"""Prediction: replications, new groups, held-out scores, leave-one-out, forecasts."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from ppl import (
    Bernoulli,
    DataError,
    HalfNormal,
    Markov,
    Normal,
    infer,
    latent,
    model,
    observe,
    plate,
)
from tests.small_programs import line


@model
def grouped():
    spread = latent("spread", HalfNormal(3.0))
    group = plate("group")
    with group:
        level = latent("level", Normal(2.0, spread))
    with plate("row", within=group):
        observe("y", Normal(level, 0.1))


LINE = line(scale=5.0)
X = np.linspace(-1, 1, 12)
Y = 1.0 + 2.0 * X + 0.5 * np.random.default_rng(0).normal(size=12)


@pytest.fixture(scope="module")
def line_fit():
    return infer(LINE, {"x": X, "y": Y}, method="qem", seed=0)


@pytest.fixture(scope="module")
def grouped_fit():
    data = {"y": [5.0, 5.1, -1.0, -1.1, 2.0], "group": ["a", "a", "b", "b", "c"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return infer(grouped, data, method="qem", seed=0)


def closed_form(x):
    design = np.stack([np.ones_like(X), X], 1)
    precision = np.eye(2) / 25 + design.T @ design / 0.25
    covariance = np.linalg.inv(precision)
    mean = covariance @ design.T @ Y / 0.25
    new = np.stack([np.ones_like(x), x], 1)
    return new @ mean, np.sqrt(np.einsum("ij,jk,ik->i", new, covariance, new) + 0.25)


def test_prediction_at_new_covariates_is_the_closed_form(line_fit):
    x = np.array([-3.0, 0.0, 4.0])
    mean, sd = closed_form(x)
    predicted = line_fit.predict({"x": x}, n=20000, seed=1)
    assert np.allclose(predicted.mean("y"), mean, atol=5 * sd.max() / 20000**0.5 + 0.02)
    assert np.allclose(predicted.sd("y"), sd, rtol=0.05)
    low, high = predicted.interval("y", 0.9)
    assert ((low < predicted.mean("y")) & (predicted.mean("y") < high)).all()


def test_prediction_never_returns_the_observed_data(line_fit):
    replicated = line_fit.predict(n=50)
    assert replicated.draws["y"].shape == (50, 12)
    assert not torch.allclose(replicated.draws["y"][0], torch.as_tensor(Y))


def test_known_groups_keep_their_level_and_new_ones_come_from_the_law(grouped_fit):
    predicted = grouped_fit.predict({"group": ["b", "a", "z", "b"]}, n=4000, seed=2)
    assert predicted.bound.labels["group"] == ["a", "b", "z"]
    mean, sd = predicted.mean("y"), predicted.sd("y")
    assert torch.allclose(
        mean[[0, 1, 3]], torch.tensor([-1.05, 5.05, -1.05], dtype=torch.float64), atol=0.1
    )
    assert sd[2] > 10 * sd[0]
    assert abs(float(mean[2]) - 2.0) < 0.4


def test_held_out_log_likelihood_is_the_predictive_density(line_fit):
    x, y = np.array([0.5, 2.0]), np.array([2.0, 4.0])
    mean, sd = closed_form(x)
    terms = line_fit.log_likelihood({"x": x, "y": y}, n=20000, seed=3)["y"]
    assert terms.shape == (20000, 2)
    found = torch.logsumexp(terms, 0) - np.log(20000)
    assert np.allclose(found, stats.norm(mean, sd).logpdf(y), atol=0.03)


def test_leave_one_out_is_close_to_refitting(line_fit):
    exact = 0.0
    for i in range(12):
        keep = np.arange(12) != i
        design = np.stack([np.ones(11), X[keep]], 1)
        covariance = np.linalg.inv(np.eye(2) / 25 + design.T @ design / 0.25)
        mean = covariance @ design.T @ Y[keep] / 0.25
        new = np.array([1.0, X[i]])
        exact += stats.norm(new @ mean, np.sqrt(new @ covariance @ new + 0.25)).logpdf(Y[i])
    result = line_fit.loo(n=8000)
    assert abs(result.elpd - exact) < 0.15
    assert float(result.pareto_k.max()) < 0.7


def test_entries_that_were_missing_are_not_scored():
    y = Y.copy()
    y[3] = np.nan
    posterior = infer(LINE, {"x": X, "y": y}, method="qem", seed=0)
    assert any("1 of 12" in line for line in posterior.bound.report)
    assert posterior.log_likelihood(n=10)["y"][:, 3].eq(0).all()
    assert len(posterior.loo(n=500).pointwise) == 11


def test_reweighting_leaves_a_good_posterior_as_it_is(line_fit):
    again = line_fit.reweight(2000, seed=5)
    assert abs(again.log_evidence.value - line_fit.log_evidence.value) < 0.02
    assert abs(float(again.mean("slope") - line_fit.mean("slope"))) < 0.05 * float(
        line_fit.sd("slope")
    )
    assert "reweighted from qem" in again.why


def test_forecast_of_a_random_walk_spreads():
    @model
    def walk():
        with plate("day", ordered=True):
            level = latent("level", Markov(Normal(0.0, 1.0), lambda before: Normal(before, 0.5)))
            observe("y", Normal(level, 0.2))

    y = np.cumsum(np.random.default_rng(1).normal(size=8) * 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = infer(
            walk, {"y": y}, labels={"day": list(range(2001, 2009))}, method="qem", seed=0
        )
    future = posterior.forecast(day=4, n=4000)
    assert future.draws["y"].shape == (4000, 4)
    assert future.bound.labels["day"] == [2009, 2010, 2011, 2012]
    last_mean, last_sd = float(posterior.mean("level")[-1]), float(posterior.sd("level")[-1])
    wanted = np.sqrt(last_sd**2 + 0.25 * np.arange(1, 5) + 0.04)
    assert np.allclose(future.sd("y"), wanted, rtol=0.1)
    assert np.allclose(future.mean("y"), last_mean, atol=0.15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.mean("slop"), "Did you mean 'slope'"),
        (lambda p: p.mean("y"), "use predict"),
        (lambda p: p.predict({"z": [1.0]}), "given\\('x'\\)"),
        (lambda p: p.predict(sites=["yy"]), "Did you mean 'y'"),
        (lambda p: p.forecast(row=3), "not an ordered plate"),
        (lambda p: p.forecast(), "forecast\\(year=10\\)"),
        (lambda p: p.quantile("slope", 1.5), "between 0 and 1"),
        (lambda p: p.probs("slope"), "continuous"),
        (lambda p: p.samples(0), "at least one"),
    ],
)
def test_mistakes_are_answered_in_words(line_fit, call, message):
    with pytest.raises(DataError, match=message):
        call(line_fit)


def test_discrete_predictions_have_probabilities():
    @model
    def coin():
        bias = latent("bias", Normal(0.0, 1.0))
        with plate("toss"):
            observe("heads", Bernoulli(logits=bias))

    posterior = infer(coin, {"heads": [1, 1, 1, 0]}, method="qem", seed=0)
    probs = posterior.predict(n=2000).probs("heads")
    assert probs.shape == (4, 2) and torch.allclose(
        probs.sum(-1), torch.ones(4, dtype=torch.float64)
    )
    assert (probs[:, 1] > 0.5).all()
