"""The oracle against closed forms, scipy and published references."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import ppl
from ppl import (
    SO2,
    Categorical,
    ConcentratedNormal,
    Flat,
    Gamma,
    HalfCauchy,
    HalfFlat,
    HalfNormal,
    Markov,
    MultivariateNormal,
    Normal,
    Poisson,
    UnsupportedError,
    explain,
    factor,
    given,
    infer,
    latent,
    model,
    observe,
    param,
    plate,
)
from ppl.errors import NumericalError
from ppl.inference.auto import choose
from tests import conjugate
from tests.data_files import data_file
from tests.small_programs import autoregression
from tests.smoothers import autoregression_smoother, forward_backward, normal_log_likelihood

ROOT = Path(__file__).resolve().parents[2]


def exact(program, data=None, **options):
    return infer(program, data, method="exact", seed=0, **options)


def close(got, expected, tol=1e-6):
    got = torch.as_tensor(got, dtype=torch.float64)
    expected = torch.as_tensor(np.asarray(expected), dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=tol, atol=tol)


# ---- one conjugate number ------------------------------------------------------------------------


def test_normal_mean_is_in_closed_form():
    case = conjugate.normal([0.3, 1.2, -0.4])
    posterior = exact(case.program, case.data)
    close(posterior.log_evidence.value, case.evidence, 1e-12)
    close(posterior.mean("mean"), case.law.mean(), 1e-12)
    close(posterior.sd("mean"), case.law.std(), 1e-12)
    assert posterior.log_evidence.kind == "exact" and posterior.log_evidence.se == 0


def test_missing_entries_drop_out():
    full = exact(conjugate.normal_mean, {"y": [0.3, -0.4]})
    holes = exact(conjugate.normal_mean, {"y": [0.3, math.nan, -0.4]})
    close(holes.log_evidence.value, full.log_evidence.value, 1e-12)
    close(holes.mean("mean"), full.mean("mean"), 1e-12)


@pytest.mark.parametrize("form", ["covariance_matrix", "precision_matrix", "scale_tril"])
def test_vectors_that_are_there_in_part_have_their_marginal_law(form):
    cov = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    forms = {
        "covariance_matrix": cov,
        "precision_matrix": torch.linalg.inv(cov),
        "scale_tril": torch.linalg.cholesky(cov),
    }

    @model
    def pairs():
        mu = latent("mu", Normal(0.0, 2.0))
        with plate("item"):
            observe("y", MultivariateNormal(mu * torch.ones(2), **{form: forms[form]}))

    posterior = exact(pairs, {"y": [[0.3, math.nan], [1.0, -0.5], [math.nan, math.nan]]})
    noise = np.zeros((3, 3))
    noise[0, 0], noise[1:, 1:] = 2.0, cov.numpy()
    y = np.array([0.3, 1.0, -0.5])
    joint = stats.multivariate_normal(np.zeros(3), noise + 4.0)
    gain = 4.0 * np.ones(3) @ np.linalg.inv(noise + 4.0)
    close(posterior.log_evidence.value, joint.logpdf(y), 1e-12)
    close(posterior.mean("mu"), gain @ y, 1e-12)
    close(posterior.sd("mu"), (4.0 - 4.0 * gain.sum()) ** 0.5, 1e-12)


CONJUGATE = {
    "beta-bernoulli": conjugate.bernoulli([1, 1, 0, 1]),
    "gamma-poisson": conjugate.poisson([3, 0, 7], concentration=2.0, rate=0.5),
    "gamma-exponential": conjugate.exponential([0.2, 1.5, 3.1]),
}


@pytest.mark.parametrize("case", CONJUGATE.values(), ids=CONJUGATE)
def test_conjugate_numbers_by_quadrature(case):
    posterior = exact(case.program, case.data)
    close(posterior.log_evidence.value, case.evidence, 1e-10)
    close(posterior.mean(case.site), case.law.mean(), 1e-10)
    close(posterior.sd(case.site), case.law.std(), 1e-10)
    levels = [0.05, 0.5, 0.95]
    close(posterior.quantile(case.site, levels), case.law.ppf(levels), 1e-4)


@pytest.mark.parametrize(("place", "size"), [(1000.0, 0.01), (-3e4, 50.0), (0.0, 1e-5)])
def test_a_narrow_peak_far_from_the_origin_is_found(place, size):
    @model
    def far():
        x = latent("x", ppl.StudentT(30.0, place, size))
        latent("y", Normal(torch.exp(0 * x), 1.0))

    posterior = exact(far)
    close((posterior.mean("x") - place) / size, 0.0, 1e-6)
    close(posterior.sd("x") / size, math.sqrt(30 / 28), 1e-6)


def test_two_outer_numbers_that_lie_on_a_ridge():
    @model
    def ridge():
        x, y = latent("x", Normal(0.0, 1.0)), latent("y", Normal(0.0, 1.0))
        factor("tie", Normal(x - y, 0.02), at=0.0)
        factor("outer", -0.0 * (x * y) ** 2)  # makes both numbers non-Gaussian by structure

    posterior = exact(ridge)
    cov = np.linalg.inv(np.eye(2) + np.array([[1, -1], [-1, 1]]) / 0.02**2)
    close(posterior.sd("x"), cov[0, 0] ** 0.5)
    close(posterior.log_evidence.value, stats.norm(0, math.sqrt(2 + 0.02**2)).logpdf(0))


# ---- jointly Gaussian ----------------------------------------------------------------------------


@model
def regression():
    weights = latent("weights", Normal(0.0, 2.0), shape=3)
    with plate("row"):
        observe("y", Normal(given("x") @ weights, 0.7))


def test_bayesian_linear_regression(rng_untouched):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 3))
    y = x @ [1.0, -2.0, 0.5] + 0.7 * rng.normal(size=20)
    posterior = exact(regression, {"x": x, "y": y})
    precision = np.eye(3) / 4 + x.T @ x / 0.49
    joint = stats.multivariate_normal(np.zeros(20), 0.49 * np.eye(20) + 4 * x @ x.T)
    close(posterior.log_evidence.value, joint.logpdf(y), 1e-10)
    close(posterior.mean("weights"), np.linalg.solve(precision, x.T @ y / 0.49), 1e-10)
    close(posterior.sd("weights"), np.linalg.inv(precision).diagonal() ** 0.5, 1e-10)
    draws = posterior.samples(20_000)["weights"]
    spread = np.cov(draws.numpy().T) - np.linalg.inv(precision)
    assert np.abs(spread).max() < 5 * np.linalg.inv(precision).max() * math.sqrt(2 / 20_000)


def test_large_numbers_keep_their_digits():
    case = conjugate.normal(1e6 + np.array([0.1, -0.2, 0.3]), loc=1e6, scale=10.0)
    close(exact(case.program, case.data).log_evidence.value, case.evidence, 1e-8)


def test_vectors_with_covariances_and_free_factors():
    cov = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)

    @model
    def vectors():
        x = latent("x", MultivariateNormal(torch.zeros(2), covariance_matrix=cov))
        factor("tie", Normal(x[0] - x[1], 0.3), at=0.2)
        with plate("item"):
            observe("y", MultivariateNormal(x, covariance_matrix=0.5 * cov))

    y = np.array([[0.5, 1.0], [-0.3, 0.2]])
    posterior = exact(vectors, {"y": y})
    c, d = cov.numpy(), np.array([1.0, -1.0])
    prec = np.linalg.inv(c) * (1 + 2 * 2) + np.outer(d, d) / 0.09
    eta = 2 * np.linalg.solve(c, y.sum(0)) + 0.2 * d / 0.09
    close(posterior.mean("x"), np.linalg.solve(prec, eta), 1e-10)
    close(posterior.sd("x"), np.linalg.inv(prec).diagonal() ** 0.5, 1e-10)
    a = np.vstack([np.eye(2), np.eye(2), d])
    noise = np.zeros((5, 5))
    noise[:2, :2] = noise[2:4, 2:4] = 0.5 * c
    noise[4, 4] = 0.09
    seen = np.concatenate([y.ravel(), [0.2]])
    joint = stats.multivariate_normal(np.zeros(5), a @ c @ a.T + noise)
    close(posterior.log_evidence.value, joint.logpdf(seen), 1e-10)


def test_an_autoregression_is_a_kalman_smoother():
    series = {"gain": 0.9, "step": 0.5, "noise": 0.8, "first_mean": 1.0, "first_sd": 2.0}
    y = [0.3, 1.1, math.nan, 2.0, 1.4, 0.2]
    posterior = exact(autoregression(**series), {"y": y})
    smoothed = autoregression_smoother(y, **series)
    close(posterior.log_evidence.value, smoothed.log_evidence, 1e-10)
    close(posterior.mean("x"), smoothed.mean[:, 0], 1e-10)
    close(posterior.sd("x"), smoothed.cov[:, 0, 0] ** 0.5, 1e-10)


def test_ragged_plates_gathers_and_crossed_effects():
    @model
    def ragged():
        school = plate("school")
        pupil = plate("pupil", within=school)
        with plate("item"):
            hard = latent("hard", Normal(0.0, 0.5))
        with school:
            level = latent("level", Normal(0.0, 1.0))
        with pupil:
            own = latent("own", Normal(level, 0.4))
            i = given("which", index="item")
            observe("y", Normal(own - hard[i], 0.3))

    school, which = np.array([0, 0, 1, 2, 2]), np.array([0, 1, 1, 0, 1])
    y = np.array([0.2, -0.4, 1.0, 0.3, 0.9])
    posterior = exact(ragged, {"school": school, "which": which, "y": y}, sizes={"item": 2})
    s, h = np.eye(3)[school], np.eye(2)[which]
    cov = s @ s.T + 0.16 * np.eye(5) + 0.25 * h @ h.T + 0.09 * np.eye(5)
    close(
        posterior.log_evidence.value, stats.multivariate_normal(np.zeros(5), cov).logpdf(y), 1e-10
    )
    close(posterior.mean("level"), s.T @ np.linalg.solve(cov, y), 1e-10)
    close(posterior.mean("hard"), -0.25 * h.T @ np.linalg.solve(cov, y), 1e-10)
    close(posterior.sd("level"), np.diag(np.eye(3) - s.T @ np.linalg.solve(cov, s)) ** 0.5, 1e-10)


# ---- discrete ------------------------------------------------------------------------------------

START = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
MOVE = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.1, 0.3, 0.6]], dtype=torch.float64)
PLACES = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)


def _states(y, scale):
    see = normal_log_likelihood(y, PLACES.numpy(), scale)
    return forward_backward(START.numpy(), MOVE.numpy(), see)


def test_hidden_markov_model():
    @model
    def hmm():
        with plate("time", ordered=True):
            z = latent(
                "z", Markov(Categorical(START), lambda previous: Categorical(MOVE[previous]))
            )
            observe("y", Normal(PLACES[z], 0.7))

    y = [-0.8, 0.1, 1.9, 2.2, 0.4]
    posterior = exact(hmm, {"y": y})
    log, table, _ = _states(y, 0.7)
    close(posterior.log_evidence.value, log, 1e-10)
    close(posterior.probs("z"), table, 1e-10)
    draws = posterior.samples(4000)["z"]
    assert draws.shape == (4000, 5)
    seen = (draws.unsqueeze(-1) == torch.arange(3)).double().mean(0)
    assert float((seen - posterior.probs("z")).abs().max()) < 5 * 0.5 / math.sqrt(4000)


def test_hidden_markov_model_with_an_unknown_scale():
    @model
    def hmm():
        scale = latent("scale", Gamma(2.0, 2.0))
        with plate("time", ordered=True):
            z = latent(
                "z", Markov(Categorical(START), lambda previous: Categorical(MOVE[previous]))
            )
            observe("y", Normal(PLACES[z], scale))

    y = [-0.8, 0.1, 1.9, 2.2, 0.4]
    posterior = exact(hmm, {"y": y})
    grid = np.linspace(0.04, 14, 2001)
    logs = [(_states(y, s), stats.gamma(2, scale=0.5).logpdf(s)) for s in grid]
    log = np.array([a[0] + b for a, b in logs])
    weight = np.exp(log - log.max())
    close(posterior.log_evidence.value, log.max() + math.log(weight.sum() * (grid[1] - grid[0])))
    weight /= weight.sum()
    close(posterior.mean("scale"), weight @ grid)
    close(posterior.probs("z"), np.tensordot(weight, np.array([a[1] for a, _ in logs]), 1))
    assert posterior.samples(10)["z"].shape == (10, 5)


def test_mixture_with_known_components_and_missing_entries():
    @model
    def mixture():
        with plate("item"):
            z = latent("z", Categorical(START))
            observe("y", Normal(PLACES[z], 0.7))

    y = np.array([-0.8, 0.1, 1.9, math.nan])
    posterior = exact(mixture, {"y": y})
    like = stats.norm(PLACES.numpy(), 0.7).pdf(y[:, None])
    like[3] = 1.0
    joint = START.numpy() * like
    close(posterior.log_evidence.value, np.log(joint.sum(1)).sum(), 1e-10)
    close(posterior.probs("z"), joint / joint.sum(1, keepdims=True), 1e-10)


@model
def unknown_components(k: int = 2):
    with plate("part", k):
        place = latent("place", Normal(0.0, 3.0))
    with plate("item"):
        z = latent("z", Categorical(torch.ones(k) / k, over="part"))
        observe("y", Normal(place[z], 0.5))


def test_listed_configurations_around_a_gaussian():
    y = np.array([-1.0, 1.2, 0.8])
    posterior = exact(unknown_components(), {"y": y})
    logs, means, shares = [], [], []
    for number in range(8):
        z = np.array([(number >> i) & 1 for i in range(3)])
        h = np.eye(2)[z]
        cov = 9 * h @ h.T + 0.25 * np.eye(3)
        logs.append(stats.multivariate_normal(np.zeros(3), cov).logpdf(y) - 3 * math.log(2))
        means.append(9 * h.T @ np.linalg.solve(cov, y))
        shares.append(z)
    weight = np.exp(logs)
    close(posterior.log_evidence.value, math.log(weight.sum()), 1e-10)
    weight /= weight.sum()
    close(posterior.mean("place"), weight @ np.array(means), 1e-10)
    close(posterior.mean("z"), weight @ np.array(shares), 1e-10)


def test_many_discrete_latents_turn_few_gaussians_into_a_quadrature():
    y = np.concatenate([np.full(8, -1.0), np.full(8, 1.5)])
    one = exact(unknown_components(), {"y": y[[0, 1, 8, 9]]})  # 16 configurations around a Gaussian
    many = exact(unknown_components(), {"y": y})
    assert one.diagnostics.notes["nodes"] == 1 and many.diagnostics.notes["nodes"] > 1000
    close(many.mean("place"), many.mean("place").flip(0))  # labels are exchangeable
    close(many.probs("z")[:, 0], [0.5] * 16)


# ---- outer scales over Gaussians -----------------------------------------------------------------


@model
def eight_schools():
    mu, tau = latent("mu", Normal(0.0, 5.0)), latent("tau", HalfCauchy(5.0))
    with plate("school"):
        theta = latent("theta", Normal(mu, tau))
        observe("y", Normal(theta, given("sigma")))


@model
def kidscore():
    base, slope = latent("base", Flat()), latent("slope", Flat())
    noise = latent("noise", HalfCauchy(2.5))
    with plate("child"):
        observe("kid_score", Normal(base + slope * given("mom_hs"), noise))


@model
def radon():
    mean = latent("mean", Normal(0.0, 10.0))
    spread, noise = latent("spread", HalfNormal(1.0)), latent("noise", HalfNormal(1.0))
    uranium, floor = latent("uranium", Normal(0.0, 10.0)), latent("floor", Normal(0.0, 10.0))
    county = plate("county")
    with county:
        level = latent("level", Normal(mean, spread))
    with plate("house", within=county):
        slope = uranium * given("log_uppm") + floor * given("floor_measure")
        observe("log_radon", Normal(level + slope, noise))


@model
def rats():
    mean_a, mean_b = latent("mean_a", Normal(0.0, 100.0)), latent("mean_b", Normal(0.0, 100.0))
    noise = latent("noise", HalfFlat())
    sd_a, sd_b = latent("sd_a", HalfFlat()), latent("sd_b", HalfFlat())
    rat = plate("rat")
    with rat:
        a, b = latent("a", Normal(mean_a, sd_a)), latent("b", Normal(mean_b, sd_b))
    with plate("weighing", within=rat):
        observe("y", Normal(a + b * given("age"), noise))


def reference(name):
    """Data and reference of posteriordb, where the optional data folder is found."""
    files = (data_file(f"posteriordb/{name}/{part}.json") for part in ("data", "reference"))
    data, ref = (json.loads(file.read_text()) for file in files)
    return data, ref


def assert_near(posterior, name, refs, tol):
    """Mean and sd within ``tol`` posterior standard deviations, or five Monte Carlo errors."""
    mean, sd = posterior.mean(name).flatten(), posterior.sd(name).flatten()
    for i, ref in enumerate(refs):
        slack = {k: max(tol * ref["sd"], 5 * ref.get(f"mcse_{k}", 0.0)) for k in ("mean", "sd")}
        assert abs(float(mean[i]) - ref["mean"]) < slack["mean"], (name, i)
        assert abs(float(sd[i]) - ref["sd"]) < slack["sd"], (name, i)


def test_eight_schools():
    data, ref = reference("eight_schools-eight_schools_centered")
    posterior = exact(eight_schools, {"y": data["y"], "sigma": data["sigma"]})
    refs = ref["exact"]
    assert_near(posterior, "mu", [refs["mu"]], 1e-4)
    assert_near(posterior, "tau", [refs["tau"]], 1e-4)
    assert_near(posterior, "theta", [refs[f"theta[{i}]"] for i in range(1, 9)], 1e-4)
    close(posterior.quantile("theta", 0.95)[0], refs["theta[1]"]["q95"], 1e-4)
    draws = posterior.samples(4000)
    gap = draws["theta"].mean(0) - posterior.mean("theta")
    assert float((gap / posterior.sd("theta")).abs().max()) < 5 / math.sqrt(4000)


def test_eight_schools_is_the_same_without_centring():
    @model
    def not_centred():
        mu, tau = latent("mu", Normal(0.0, 5.0)), latent("tau", HalfCauchy(5.0))
        with plate("school"):
            z = latent("z", Normal(0.0, 1.0))
            observe("y", Normal(mu + tau * z, given("sigma")))

    data = {"y": [28, 8, -3, 7, -1, 1, 18, 12], "sigma": [15, 10, 16, 11, 9, 11, 10, 18]}
    one, other = exact(eight_schools, data), exact(not_centred, data)
    close(one.log_evidence.value, other.log_evidence.value, 1e-7)
    close(one.mean("tau"), other.mean("tau"))
    close(one.sd("mu"), other.sd("mu"))


def test_kidscore_with_flat_priors():
    data, ref = reference("kidiq-kidscore_momhs")
    posterior = exact(kidscore, {"kid_score": data["kid_score"], "mom_hs": data["mom_hs"]})
    for name, key in (("base", "beta[1]"), ("slope", "beta[2]"), ("noise", "sigma")):
        assert_near(posterior, name, [ref["exact"][key]], 1e-4)
    assert posterior.log_evidence.kind == "exact, improper prior"


@pytest.mark.slow
def test_radon_in_two_outer_dimensions():
    data, ref = reference("radon_mn-radon_hierarchical_intercept_centered")
    columns = {k: data[k] for k in ("log_radon", "log_uppm", "floor_measure")}
    columns["county"] = np.array(data["county_idx"]) - 1
    posterior = exact(radon, columns)
    keys = {"mean": "mu_alpha", "spread": "sigma_alpha", "noise": "sigma_y"}
    keys |= {"uranium": "beta[1]", "floor": "beta[2]"}
    for name, key in keys.items():
        assert_near(posterior, name, [ref["params"][key]], 0.02)
    levels = [ref["params"][f"alpha[{i}]"] for i in range(1, 86)]
    assert_near(posterior, "level", levels, 0.05)
    assert not posterior.diagnostics.warnings


@pytest.mark.slow
def test_rats_in_three_outer_dimensions():
    data, ref = reference("rats_data-rats_model")
    columns = {"y": data["y"], "age": np.array(data["x"]) - data["xbar"]}
    columns["rat"] = np.array(data["rat"]) - 1
    posterior = exact(rats, columns)
    keys = {"mean_a": "mu_alpha", "mean_b": "mu_beta", "noise": "sigma_y"}
    keys |= {"sd_a": "sigma_alpha", "sd_b": "sigma_beta"}
    for name, key in keys.items():
        assert_near(posterior, name, [ref["params"][key]], 0.02)
    assert_near(posterior, "a", [ref["params"][f"alpha[{i}]"] for i in range(1, 31)], 0.05)


# ---- refusals and the choice of a method ---------------------------------------------------------


def test_params_are_refused_with_a_remedy():
    @model
    def learned():
        latent("x", Normal(param("shift", 0.0), 1.0))

    with pytest.raises(UnsupportedError, match="'shift': is a param.*qem"):
        exact(learned)


def test_infinitely_many_values_are_refused():
    @model
    def counted():
        latent("n", Poisson(3.0))

    with pytest.raises(UnsupportedError, match="'n': has no fixed finite number of values"):
        exact(counted)


def test_many_non_gaussian_scalars_are_refused():
    @model
    def rates():
        with plate("item", 10):
            latent("rate", Gamma(2.0, 1.0))

    with pytest.raises(
        UnsupportedError, match="'rate': 10 scalars are neither discrete nor Gaussian"
    ):
        exact(rates)


def test_many_configurations_are_refused():
    data = {"y": np.linspace(-1, 1, 30)}
    with pytest.raises(UnsupportedError, match="joint configurations|neither discrete"):
        exact(unknown_components(k=5), data)


def test_an_improper_posterior_is_an_error():
    @model
    def free():
        a, b = latent("a", Flat()), latent("b", Flat())
        with plate("item"):
            observe("y", Normal(a + b, 1.0))

    with pytest.raises(NumericalError, match="not proper"):
        exact(free, {"y": [1.0, 2.0]})


def test_auto_takes_exact_where_it_is_cheap():
    name, why = choose(conjugate.coin.bind({"heads": [1, 0]}))
    assert name == "exact" and "exactly" in why


def test_explain_says_how_each_latent_is_integrated():
    data = {"y": [28.0, 8.0], "sigma": [15.0, 10.0]}
    row = next(r for r in explain(eight_schools, data).rows if r.method == "exact")
    assert row.usable and "joint Gaussian of 3 scalars over mu, theta" in row.note
    assert "quadrature in 1 dimensions over tau" in row.note


@pytest.mark.parametrize("method", ["exact", "qem"])
def test_a_latent_on_a_manifold_is_sent_to_the_methods_that_take_it(method):
    @model
    def heading():
        latent("x", ConcentratedNormal(SO2, 0.0, 1.0))

    with pytest.raises(UnsupportedError, match="elements of SO2.*method='laplace' or 'gbp'"):
        infer(heading, method=method, seed=0)
