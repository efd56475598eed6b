"""Discrete latents, crossed plates, constrained and vector latents, units, and refusals of variational inference."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from ppl import (
    Dirichlet,
    Gamma,
    HalfNormal,
    ModelError,
    MultivariateNormal,
    Normal,
    Poisson,
    UnsupportedError,
    explain,
    infer,
    latent,
    model,
    observe,
    plate,
)
from ppl.inference.numerics.ivon import curvature_step, mean_step
from tests.small_programs import clusters, scaled

STEPS = {"settle": False, "tol": 0.0, "max_iters": 40, "start": "standard"}


def test_discrete_latents_are_summed_and_drawn_with_the_others():
    x = torch.tensor([-0.5, 1.4, 3.0, 2.6], dtype=torch.float64)
    posterior = infer(clusters, {"x": x}, method="vi", seed=0, tol=0.03)
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)[:, None, None]
    values, share = torch.tensor([0.0, 3.0]).double(), torch.tensor([0.3, 0.7]).double()
    joint = torch.distributions.Normal(grid + values, 1.0).log_prob(x[:, None]) + share.log()
    log_p = joint.logsumexp(-1).sum(-1) - 0.5 * grid[:, 0, 0].square()
    w = log_p.softmax(0)
    mean = (w * grid[:, 0, 0]).sum()
    sd = (w * (grid[:, 0, 0] - mean).square()).sum().sqrt()
    table = torch.tensordot(w, joint.softmax(-1), 1)
    assert abs(float(posterior.mean("shift") - mean)) < 0.1 * float(sd)
    assert abs(math.log(float(posterior.sd("shift") / sd))) < 0.1
    assert torch.allclose(posterior.probs("z"), table, atol=0.03)
    draws = posterior.samples(4000)
    found = torch.corrcoef(torch.stack([draws["shift"], draws["z"][:, 1]]))[0, 1]
    both = (w[:, None] * joint.softmax(-1)[:, 1]).T @ (grid[:, 0, 0] - mean)
    p = table[1, 1]
    assert abs(float(found) - float(both[1] / (sd * (p * (1 - p)).sqrt()))) < 0.06


def test_latents_of_crossed_plates_are_welcome():
    @model
    def films():
        with plate("user", 8) as user:
            taste = latent("taste", Normal(0.0, 1.0))
        with plate("film", 6) as film:
            quality = latent("quality", Normal(0.0, 1.0))
        with user, film:
            observe("y", Normal(taste + quality, 0.5))

    data = {"y": torch.randn(8, 6, dtype=torch.float64)}
    exact = infer(films, data, method="exact")
    found = infer(films, data, method="vi", family="full_rank", tol=0.03, seed=0)
    for site in ("taste", "quality"):
        assert torch.allclose(found.mean(site), exact.mean(site), atol=0.03)
        assert float((found.sd(site) / exact.sd(site)).log().abs().max()) < 0.1


@pytest.mark.filterwarnings("ignore:vi. not converged")
@pytest.mark.parametrize("family", ["mean_field", "full_rank"])
@pytest.mark.parametrize("parallel", [False, True])
def test_constrained_and_vector_latents_keep_their_supports(family, parallel):
    @model
    def mixed():
        share = latent("share", Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
        with plate("group", 2):
            rate = latent("rate", Gamma(3.0, 2.0))
            pair = latent("pair", MultivariateNormal(torch.zeros(2), torch.eye(2)))
            observe("x", Normal(rate * share[0] + pair[0] + pair[1], 1.0))

    options = {"family": family, "parallel": parallel, "max_iters": 250}
    posterior = infer(mixed, {"x": [1.0, 2.0]}, method="vi", seed=0, **options)
    draws = posterior.samples(50)
    assert draws["share"].shape == (50, 3) and draws["pair"].shape == (50, 2, 2)
    assert torch.allclose(draws["share"].sum(-1), torch.ones(50, dtype=torch.float64))
    assert bool((draws["rate"] > 0).all()) and posterior.sd("rate").shape == (2,)
    assert torch.allclose(posterior.mean("share").sum(), torch.tensor(1.0).double())
    covariance = posterior.covariance("pair") if family == "full_rank" else None
    if covariance is not None:
        assert covariance.shape == (2, 2, 2) and float(covariance[0, 0, 1]) < 0
        many = posterior.samples(8000)["pair"][:, 0]
        assert torch.allclose(torch.cov(many.T), covariance[0], atol=0.05)


@pytest.mark.parametrize("options", [{}, {"parallel": True, "estimator": "total"}])
def test_a_change_of_units_changes_the_run(options):
    """Adam's steps in raw parameters know nothing of units: the trajectories of the same model in other units part."""
    y = {"y": [1.0, 2.0, -0.5]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = (
            infer(scaled(unit), y, method="vi", seed=0, **STEPS, **options)
            for unit in (1.0, 1000.0)
        )
    apart = (a.trace["bound"] - b.trace["bound"]).abs()
    assert float(apart[-10:].min()) > 1.0
    assert float((a.mean("effect") - b.mean("effect") / 1000.0).abs().max()) > 0.1


def test_units_of_the_prior_take_that_back():
    y = {"y": [1.0, 2.0, -0.5]}
    options = {**STEPS, "start": "prior"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = (infer(scaled(u), y, method="vi", seed=0, **options) for u in (1.0, 1000.0))
    assert torch.allclose(a.mean("effect"), b.mean("effect") / 1000.0, rtol=1e-6)


def test_ivon_rests_at_the_penalised_curvature_and_mean():
    """Per example loss h (x - c)^2 / 2: sd^2 = 1 / (lam (h + delta)), mean = h c / (h + delta)."""
    h, c, lam, delta = 2.0, 1.5, 50.0, 0.1
    generator = torch.Generator().manual_seed(0)
    mean, momentum, curvature = (torch.tensor(v).double() for v in (0.0, 0.0, 0.5))
    means, curvatures = [], []
    for t in range(1, 4001):
        sd = (lam * (curvature + delta)).rsqrt()
        eps = torch.randn(8, generator=generator, dtype=torch.float64)
        slope = h * (mean + sd * eps - c)
        estimate = (sd * eps * slope).mean() * lam * (curvature + delta)
        mean, momentum = mean_step(
            mean, momentum, slope.mean(), curvature, t, rate=0.1, decay=delta
        )
        curvature = curvature_step(curvature, estimate, 0.01, decay=delta)
        means.append(mean)
        curvatures.append(curvature)
    assert abs(float(torch.stack(means[1000:]).mean()) - h * c / (h + delta)) < 0.01
    assert abs(float(torch.stack(curvatures[1000:]).mean()) / h - 1) < 0.02


@model
def counts():
    with plate("row"):
        n = latent("n", Poisson(3.0))
        observe("y", Normal(n, 1.0))


@model
def spread():
    scale = latent("scale", HalfNormal(1.0))
    observe("y", Normal(0.0, scale))


def test_a_discrete_latent_without_end_is_refused_by_name():
    with pytest.raises(UnsupportedError, match="'n'.*no gradient.*method='qem' or method='rws'"):
        infer(counts, {"y": [1.0]}, method="vi")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"family": "full"}, "family.*'full_rank'.*got 'full'"),
        ({"estimator": "natural", "family": "low_rank"}, "mean-field.*family"),
        ({"estimator": "natural", "particles": 3}, "particles.*draws="),
        ({"particles": 0}, "at least 1, got 0"),
        ({"learning_rate": -1.0}, "positive"),
        ({"groups": [["scale"]]}, r"VI\(groups=...\) is an option of parallel=True"),
        ({"rank": 3}, "is an option of family='low_rank'"),
        ({"joint_up_to": 3, "parallel": True}, "is an option of parallel=True with family="),
        ({"momentum": 0.5}, "is an option of optimiser='sgd'"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_words(options, text):
    with pytest.raises(ModelError, match=text):
        infer(spread, {"y": 1.0}, method="vi", **options)


def test_too_many_coefficients_are_refused_before_they_are_made():
    @model
    def wide():
        with plate("weight", 40_000):
            latent("w", Normal(0.0, 1.0))

    with pytest.raises(UnsupportedError, match="40000 scalars.*'low_rank'"):
        infer(wide, {}, method="vi", family="full_rank")


def test_explain_says_what_would_be_fitted():
    note = next(r.note for r in explain(clusters, {"x": [0.0, 1.0]}).rows if r.method == "vi")
    assert note == "a mean-field Gaussian of 1 scalar, 2 parameters; 8 draws a step"
