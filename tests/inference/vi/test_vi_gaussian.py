"""Variational inference where the answer is known in closed form: Gaussian posteriors."""

from __future__ import annotations

import math

import pytest
import torch

from ppl import VI, Normal, infer, latent, model, observe
from tests.conjugate import normal_mean
from tests.small_programs import line, schools

X = torch.tensor([0.5, 1.0, 1.5, 2.5], dtype=torch.float64)
Y = torch.tensor([0.1, 0.9, 1.6, 3.2], dtype=torch.float64)
DESIGN = torch.stack([torch.ones(4, dtype=torch.float64), X], 1)
PRECISION = DESIGN.T @ DESIGN / 0.25 + torch.eye(2) / 9.0
COVARIANCE = torch.linalg.inv(PRECISION)
MEAN = COVARIANCE @ DESIGN.T @ Y / 0.25


def fit(**options):
    return infer(line, {"x": X, "y": Y}, method="vi", seed=0, **options)


def moments(posterior):
    draws = posterior.samples(20_000)
    return torch.stack([draws["base"], draws["slope"]])


@pytest.mark.parametrize("estimator", ["pathwise", "total", "natural"])
def test_mean_field_has_the_scale_of_the_conditional_not_of_the_marginal(estimator):
    posterior = fit(estimator=estimator, tol=0.03)
    want = PRECISION.diagonal().rsqrt()
    for i, site in enumerate(("base", "slope")):
        assert abs(float(posterior.mean(site) - MEAN[i])) < 0.05 * float(want[i])
        assert abs(math.log(float(posterior.sd(site) / want[i]))) < 0.06
    # Twice the loss of the bound is log |cov| - log |diagonal of precision|^-1.
    gap = 0.5 * float(torch.logdet(COVARIANCE) - want.log().sum() * 2)
    exact = infer(line, {"x": X, "y": Y}, method="exact").log_evidence.value
    assert abs(posterior.log_evidence.value - (exact - gap)) < 5 * posterior.log_evidence.se + 0.01
    assert posterior.log_evidence.kind == "bound"


@pytest.mark.parametrize("options", [{"family": "full_rank"}, {"family": "low_rank", "rank": 1}])
def test_correlations_make_the_bound_tight(options):
    posterior = fit(tol=0.03, **options)
    exact = infer(line, {"x": X, "y": Y}, method="exact").log_evidence.value
    assert posterior.log_evidence.value == pytest.approx(exact, abs=2e-3)
    assert torch.allclose(torch.cov(moments(posterior)), COVARIANCE, rtol=0.05, atol=1e-3)
    sds = torch.stack([posterior.sd("base"), posterior.sd("slope")])
    assert torch.allclose(sds, COVARIANCE.diagonal().sqrt(), rtol=0.02)
    assert posterior.diagnostics.verdict.startswith("good")


def test_a_bad_fit_is_flagged_and_weights_mend_it():
    @model
    def ridge():
        a, b = latent("a", Normal(0.0, 1.0)), latent("b", Normal(0.0, 1.0))
        observe("sum", Normal(a + b, 0.03))

    posterior = infer(ridge, {"sum": 1.0}, method="vi", seed=0)
    assert posterior.diagnostics.verdict.startswith("unreliable: Pareto k")
    wide = math.sqrt(0.5)
    assert float(posterior.sd("a")) < 0.1 * wide
    full = infer(ridge, {"sum": 1.0}, method="vi", family="full_rank", tol=0.01, seed=0)
    assert abs(math.log(float(full.sd("a")) / wide)) < 0.05
    weighed = full.reweight(1000)
    exact = infer(ridge, {"sum": 1.0}, method="exact").log_evidence.value
    assert abs(weighed.log_evidence.value - exact) < 5 * weighed.log_evidence.se + 1e-3
    assert weighed.log_evidence.kind == "estimate"


@pytest.mark.parametrize("options", [{}, {"estimator": "natural"}, {"parallel": True, "tol": 0.03}])
def test_tempering_gives_the_cold_posterior(options):
    program = normal_mean(loc=0.0, scale=1.0, noise=1.0)
    y = torch.tensor([1.0, 2.0, 0.6, 1.4], dtype=torch.float64)
    with pytest.warns(UserWarning, match="not a posterior"):
        posterior = infer(program, {"y": y}, method="vi", tempering=0.25, seed=0, **options)
    precision = 1.0 + 4 / 0.25
    assert abs(float(posterior.mean("mean")) - 20.0 / precision) < 0.02
    assert abs(math.log(float(posterior.sd("mean")) * math.sqrt(precision))) < 0.08


@pytest.mark.parametrize("options", [{}, {"estimator": "natural"}, {"parallel": True}])
def test_params_reach_the_maximum_of_the_evidence(options):
    y = torch.tensor([1.0, 2.0, 3.4, 0.2], dtype=torch.float64)
    posterior = infer(schools, {"y": y}, method="vi", seed=0, **options)
    assert abs(float(posterior.params["centre"]) - float(y.mean())) < 0.1
    apart = posterior.mean("effect") - (y + float(posterior.params["centre"])) / 2
    assert float(apart.abs().max()) < 0.1


def test_warm_up_delays_the_end_only():
    early, late = fit(), fit(warmup=400)
    assert late.diagnostics.iterations >= 400 + 39
    assert torch.allclose(early.mean("base"), late.mean("base"), atol=0.02)


def test_restarts_are_independent_and_the_best_is_kept():
    posterior = fit(restarts=3)
    assert posterior.diagnostics.notes["restarts"].startswith("3 of 3 restarts")
    assert torch.allclose(posterior.mean("base"), MEAN[0], atol=0.03)


def test_a_run_that_goes_on_is_the_run_that_never_stopped():
    options = {"settle": False, "tol": 0.0}
    with pytest.warns(UserWarning, match="not converged"):
        whole, part = fit(max_iters=30, **options), fit(max_iters=20, **options)
        more = part.resume(10)
    assert torch.equal(whole.trace["bound"], more.trace["bound"])


def test_sgd_is_there_too():
    posterior = fit(optimiser="sgd", learning_rate=1e-3, family="full_rank")
    assert torch.allclose(posterior.mean("slope"), MEAN[1], atol=0.05)


def test_options_can_stand_in_a_record():
    posterior = infer(line, {"x": X, "y": Y}, method=VI(family="full_rank"), seed=0)
    assert torch.equal(posterior.mean("base"), fit(family="full_rank").mean("base"))
