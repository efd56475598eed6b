"""Runs from model to posterior: against exact algebra, scikit-learn, enumeration; options, results, broken inputs."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch

import ppl
from ppl import (
    Bernoulli,
    DataError,
    Laplace,
    Normal,
    Poisson,
    SpikeSlab,
    UnsupportedError,
    deterministic,
    dot,
    given,
    infer,
    latent,
    model,
    observe,
    param,
    plate,
)
from ppl.inference.amp import state_evolution


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def sparse(n, share=0.1, seed=0):
    on = torch.rand(n, generator=generator(seed + 1000)) < share
    return normal(n, seed=seed + 2000) * on


def db(estimate, truth):
    return 10 * math.log10(float((estimate - truth).square().sum() / truth.square().sum()))


def regression(law, prior=lambda: SpikeSlab(0.1, Normal(0.0, 1.0)), **starts):
    @model
    def program():
        row, coef = plate("row"), plate("coef")
        learned = {k: param(k, v) for k, v in starts.items()}
        with coef:
            x = latent("x", prior())
        with row:
            with coef:
                a = given("a")
            observe("y", law(dot(a, x, over=coef), **learned))

    return program


@model
def sensing():
    row, coef = plate("row"), plate("coef")
    rho, sd, noise = param("rho", 0.1), param("sd", 1.0), param("noise", 0.1)
    with coef:
        x = latent("x", SpikeSlab(rho, slab=Normal(0.0, sd)))
    with row:
        with coef:
            a = given("a")
        observe("y", Normal(dot(a, x, over=coef), noise))


def sensed(n=400, m=200, noise=0.02, seed=0):
    a, x = normal(m, n, seed=seed) / math.sqrt(m), sparse(n, seed=seed)
    return {"a": a, "y": a @ x + noise * normal(m, seed=seed + 3000)}, x


# ---- exact algebra -----------------------------------------------------------------------------


@model
def gaussian():
    row, coef = plate("row"), plate("coef")
    base = latent("base", Normal(1.0, 5.0))
    with coef:
        x = latent("x", Normal(0.3, 1.2))
    with row:
        with coef:
            a = given("a")
        observe("y", Normal(base + dot(a, x, over=coef) + given("shift"), 0.3))


@pytest.mark.parametrize("variant", ["gamp", "vamp"])
@pytest.mark.parametrize("rows", [20, 60])
def test_gaussian_models_have_the_exact_means(variant, rows):
    a = normal(rows, 40) / math.sqrt(rows)
    data = {"a": a, "shift": normal(rows, seed=2), "y": a @ normal(40, seed=1) + 2.0}
    exact = infer(gaussian, data, method="exact")
    posterior = infer(
        gaussian, data, method="amp", variant=variant, tolerance=1e-12, max_iters=2000
    )
    for name in ("x", "base"):
        torch.testing.assert_close(posterior.mean(name), exact.mean(name), atol=1e-8, rtol=0)
    assert posterior.sd("base") == pytest.approx(float(exact.sd("base")), rel=0.3)
    assert posterior.log_evidence.value == pytest.approx(exact.log_evidence.value, abs=2.5)


def test_evidence_of_a_small_sparse_model_is_near_the_sum_over_supports():
    """n = 10, m = 8, five per cent."""
    data, _ = sensed(n=10, m=8, noise=0.1, seed=4)
    rho, sd, noise = 0.3, 1.0, 0.1
    logs = []
    for bits in itertools.product((0.0, 1.0), repeat=10):
        s = torch.tensor(bits, dtype=torch.float64)
        cov = sd**2 * (data["a"] * s) @ data["a"].T + noise**2 * torch.eye(8)
        law = torch.distributions.MultivariateNormal(torch.zeros(8).double(), cov)
        weight = s.sum() * math.log(rho) + (10 - s.sum()) * math.log(1 - rho)
        logs.append(weight + law.log_prob(data["y"]))
    exact = float(torch.stack(logs).logsumexp(0))
    program = regression(lambda z: Normal(z, noise), lambda: SpikeSlab(rho, Normal(0.0, sd)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = infer(program, data, method="amp", damping=0.3)
    assert posterior.log_evidence.value == pytest.approx(exact, rel=0.05, abs=0.3)


@pytest.mark.parametrize("variant", ["gamp", "vamp"])
def test_the_mode_under_a_laplace_prior_is_the_lasso(variant):
    linear_model = pytest.importorskip("sklearn.linear_model")
    m, noise = 100, 0.5
    a = normal(m, 200) / math.sqrt(m)
    y = a @ sparse(200) + 0.02 * normal(m, seed=5)
    for rate in (0.5, 1.0, 3.0):
        alpha = rate * noise**2 / m
        lasso = linear_model.Lasso(alpha, fit_intercept=False, tol=1e-14, max_iter=200_000)
        expected = torch.as_tensor(lasso.fit(a.numpy(), y.numpy()).coef_)
        prior = Laplace(0.0, 1.0 / rate)
        program = regression(lambda z: Normal(z, noise), lambda prior=prior: prior)
        options = {"variant": variant, "kind": "max", "tolerance": 1e-12, "max_iters": 5000}
        posterior = infer(program, {"a": a, "y": y}, method="amp", **options)
        torch.testing.assert_close(posterior.mean("x"), expected, atol=1e-8, rtol=0)
        assert posterior.log_evidence is None


# ---- sparse models -----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gamp", "vamp"])
def test_nothing_known_is_learned_from_the_data(variant):
    """(rho, sd, noise) within 5 % of the sample's at n = 2000."""
    data, x = sensed(n=2000, m=1000, noise=0.013)
    posterior = infer(sensing, data, method="amp", variant=variant, start="data")
    live = x[x != 0]
    assert float(posterior.params["rho"]) == pytest.approx(len(live) / 2000, rel=0.05)
    assert float(posterior.params["sd"]) == pytest.approx(
        float(live.square().mean().sqrt()), rel=0.05
    )
    assert float(posterior.params["noise"]) == pytest.approx(0.013, rel=0.05)
    assert db(posterior.mean("x"), x) < -34
    ratio = posterior.predicted_mse / posterior.estimated_mse["x"]
    assert abs(10 * math.log10(ratio)) < 0.5
    error = float((posterior.mean("x") - x).square().mean())
    assert abs(10 * math.log10(error / posterior.estimated_mse["x"])) < 0.7


def test_inclusion_probabilities_find_the_support():
    data, x = sensed()
    posterior = infer(sensing, data, method="amp")
    share = posterior.inclusion("x")
    assert share.shape == x.shape
    large = x.abs() > 0.2
    assert bool((share[large] > 0.99).all())
    assert float(share[x == 0].mean()) < 0.05
    low, high = posterior.interval("x", 0.99)
    assert bool((low[share < 0.001] == 0).all() & (high[share < 0.001] == 0).all())
    with pytest.raises(DataError, match="no site"):
        posterior.inclusion("z")


def test_marginals_and_draws_agree():
    data, _ = sensed()
    posterior = infer(sensing, data, method="amp")
    draws = posterior.samples(4000, seed=1)["x"]
    gap = (draws.mean(0) - posterior.mean("x")).abs()
    assert bool((gap <= 6 * posterior.sd("x") / math.sqrt(4000) + 1e-12).all())
    live = posterior.inclusion("x") > 0.99
    assert torch.allclose(draws.std(0)[live], posterior.sd("x")[live], rtol=0.1)


def test_a_transform_without_a_matrix():
    n, m = 1024, 500
    keep = torch.randperm(n, generator=generator(1))[:m]
    angle = -math.pi * torch.arange(n, dtype=torch.float64) / (2 * n)
    turn = torch.polar(torch.ones(n, dtype=torch.float64), angle) * math.sqrt(2.0 / n)

    def cosine_transform(x):
        return (torch.fft.fft(torch.cat([x[::2], x[1::2].flip(0)])) * turn).real

    @model
    def program():
        rho, sd, noise = param("rho", 0.1), param("sd", 1.0), param("noise", 0.1)
        x = latent("x", SpikeSlab(rho, Normal(0.0, sd)), shape=n)
        observe("y", Normal(cosine_transform(x)[keep], noise))

    x = sparse(n)
    y = cosine_transform(x)[keep] + 0.02 * normal(m, seed=3)
    posterior = infer(program, {"y": y}, method="amp")
    assert db(posterior.mean("x"), x) < -28
    assert posterior.mean("x").shape == (n,)


def test_many_right_hand_sides_share_params_and_equal_single_runs():
    problems, n, m = 4, 300, 150
    a = normal(m, n) / math.sqrt(m)
    x = torch.stack([sparse(n, seed=10 * k) for k in range(problems)])
    y = x @ a.T + 0.02 * normal(problems, m, seed=9)

    @model
    def together():
        problem, row, coef = plate("problem"), plate("row"), plate("coef")
        with problem, coef:
            v = latent("x", SpikeSlab(0.1, Normal(0.0, 1.0)))
        with row, coef:
            b = given("a")
        with problem, row:
            observe("y", Normal(dot(b, v, over=coef), 0.02))

    options = {"method": "amp", "tolerance": 1e-10}
    posterior = infer(together, {"a": a, "y": y}, **options)
    assert posterior.mean("x").shape == (problems, n)
    alone = regression(lambda z: Normal(z, 0.02))
    evidence = 0.0
    for k in range(problems):
        single = infer(alone, {"a": a, "y": y[k]}, **options)
        torch.testing.assert_close(posterior.mean("x")[k], single.mean("x"), atol=1e-6, rtol=0)
        evidence += single.log_evidence.value
    assert posterior.log_evidence.value == pytest.approx(evidence, abs=1e-3)


def test_an_intercept_and_counts():
    n, m = 300, 900
    a = 2.0 * normal(m, n) / math.sqrt(m)
    x = sparse(n)
    y = torch.poisson(torch.exp(0.5 + a @ x), generator=generator(3))

    @model
    def program():
        row, coef = plate("row"), plate("coef")
        base = latent("base", Normal(0.0, 3.0))
        with coef:
            v = latent("x", SpikeSlab(0.1, Normal(0.0, 1.0)))
        with row:
            with coef:
                b = given("a")
            observe("y", Poisson(torch.exp(base + dot(b, v, over=coef))))

    posterior = infer(program, {"a": a, "y": y}, method="amp")
    assert abs(float(posterior.mean("base")) - 0.5) < 4 * float(posterior.sd("base")) + 0.05
    error = float((posterior.mean("x") - x).square().mean())
    assert abs(10 * math.log10(error / posterior.estimated_mse["x"])) < 1.5
    assert db(posterior.mean("x"), x) < -2.5


@pytest.mark.parametrize("link", ["probit", "logistic", "sign"])
def test_signs_tell_the_direction(link):
    n, m = 300, 600 if link == "sign" else 1500
    x = sparse(n)
    a = normal(m, n) / math.sqrt(n)
    noise = {
        "probit": lambda: normal(m, seed=7),
        "logistic": lambda: torch.logit(torch.rand(m, generator=generator(7), dtype=torch.float64)),
        "sign": lambda: torch.zeros(m, dtype=torch.float64),
    }[link]()
    z = 5.0 * (a @ x)
    law = {
        "probit": lambda z: Bernoulli(torch.special.ndtr(5.0 * z)),
        "logistic": lambda z: Bernoulli(logits=5.0 * z),
        "sign": lambda z: Bernoulli((z > 0).double()),
    }[link]
    # Signs say nothing of the scale, which comes to rest slowly.
    tolerance = 1e-4 if link == "sign" else 1e-6
    data = {"a": a, "y": (z + noise > 0).double()}
    posterior = infer(regression(law), data, method="amp", tolerance=tolerance)
    assert posterior.diagnostics.converged
    estimate = posterior.mean("x")
    scaled = estimate * (estimate @ x) / estimate.square().sum()
    assert db(scaled, x) < {"probit": -10, "logistic": -7, "sign": -10}[link]
    if link != "sign":
        ratio = posterior.predicted_mse / posterior.estimated_mse["x"]
        assert abs(10 * math.log10(ratio)) < 1.0


def test_missing_rows_say_nothing():
    data, _ = sensed(n=100, m=80)
    program = regression(lambda z: Normal(z, 0.05))
    holes = dict(data)
    holes["y"] = data["y"].clone()
    holes["y"][60:] = torch.nan
    fewer = {"a": data["a"][:60], "y": data["y"][:60]}
    options = {"method": "amp", "variant": "gamp", "variances": "vector", "tolerance": 1e-11}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = infer(program, holes, **options)
        other = infer(program, fewer, **options)
    torch.testing.assert_close(one.mean("x"), other.mean("x"), atol=1e-6, rtol=0)
    assert one.log_evidence.value == pytest.approx(other.log_evidence.value, abs=1e-3)


# ---- matrices that are not i.i.d. --------------------------------------------------------------


def conditioned(n=400, m=200, condition=100.0):
    u, _ = torch.linalg.qr(normal(m, m))
    v, _ = torch.linalg.qr(normal(n, m, seed=1))
    s = torch.logspace(0, -math.log10(condition), m, dtype=torch.float64)
    a = (u * s) @ v.T
    return a * math.sqrt(n / float(a.square().sum()))


def test_an_ill_conditioned_matrix_is_given_to_vamp_by_a_probe_that_says_why():
    a, x = conditioned(), sparse(400)
    y = a @ x + 0.01 * normal(200, seed=8)
    posterior = infer(sensing, {"a": a, "y": y}, method="amp", start="data")
    assert posterior.variant.startswith("vamp")
    assert "eigenvalue" in str(posterior.diagnostics.notes["variant"])
    assert db(posterior.mean("x"), x) < -15


def test_gamp_by_name_on_such_a_matrix_keeps_the_last_accepted_state_or_says_that_it_stopped():
    a, x = conditioned(condition=1e4), sparse(400)
    y = a @ x + 0.01 * normal(200, seed=8)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        posterior = infer(sensing, {"a": a, "y": y}, method="amp", variant="gamp", max_iters=200)
    assert bool(posterior.mean("x").isfinite().all() & posterior.sd("x").isfinite().all())
    if not posterior.diagnostics.converged:
        assert any("amp:" in str(w.message) for w in seen)


def test_a_common_component_of_all_columns_does_no_harm():
    data, x = sensed()
    a = data["a"] + 1.0
    y = a @ x + 0.02 * normal(200, seed=8)
    posterior = infer(sensing, {"a": a, "y": y}, method="amp", start="data")
    assert db(posterior.mean("x"), x) < -25
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        removed = infer(
            sensing, {"a": a, "y": y}, method="amp", variant="gamp", means="remove", start="data"
        )
    assert "means removed" in removed.variant
    assert db(removed.mean("x"), x) < -20


# ---- invariances -------------------------------------------------------------------------------


def test_order_of_rows_and_columns_is_nothing():
    data, _ = sensed()
    rows, columns = (torch.randperm(k, generator=generator(k)) for k in (200, 400))
    moved = {"a": data["a"][rows][:, columns], "y": data["y"][rows]}
    options = {"method": "amp", "tolerance": 1e-10}
    one, other = infer(sensing, data, **options), infer(sensing, moved, **options)
    torch.testing.assert_close(other.mean("x"), one.mean("x")[columns], atol=1e-6, rtol=0)


def test_units_of_the_data_are_nothing():
    data, _ = sensed()
    options = {"method": "amp", "start": "data", "tolerance": 1e-9}
    one = infer(sensing, data, **options)
    other = infer(sensing, {"a": 1000.0 * data["a"], "y": 1000.0 * data["y"]}, **options)
    torch.testing.assert_close(other.mean("x"), one.mean("x"), atol=1e-5, rtol=0)
    assert float(other.params["noise"]) == pytest.approx(
        1000 * float(one.params["noise"]), rel=1e-4
    )


def test_single_precision_is_close():
    data, _ = sensed()
    program = regression(lambda z: Normal(z, 0.02))
    one = infer(program, data, method="amp", tolerance=1e-4)
    single = {k: v.float() for k, v in data.items()}
    other = infer(program, single, method="amp", dtype=torch.float32, tolerance=1e-4)
    assert other.mean("x").dtype == torch.float32
    torch.testing.assert_close(other.mean("x").double(), one.mean("x"), atol=5e-3, rtol=0)


# ---- the result --------------------------------------------------------------------------------


def test_restarts_keep_the_best_and_say_how_many_agree():
    data, x = sensed()
    posterior = infer(sensing, data, method="amp", restarts=3, seed=2)
    assert posterior.mean("x").shape == x.shape
    assert "3 of 3 restarts" in str(posterior.diagnostics.notes["restarts"])
    assert db(posterior.mean("x"), x) < -25


def test_a_result_is_saved_predicted_from_resumed_and_repeated(tmp_path):
    @model
    def program():
        row, coef = plate("row"), plate("coef")
        noise = param("noise", 0.1)
        with coef:
            x = latent("x", SpikeSlab(0.1, slab=Normal(0.0, 1.0)))
        with row:
            with coef:
                a = given("a")
            z = deterministic("z", dot(a, x, over=coef))
            observe("y", Normal(z, noise))

    data, x = sensed(n=100, m=60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        early = infer(program, data, method="amp", max_iters=6, seed=1)
    posterior = early.resume(300)
    assert posterior.diagnostics.converged
    assert not early.diagnostics.converged
    again = infer(program, data, method="amp", seed=1)
    torch.testing.assert_close(again.mean("x"), posterior.mean("x"), atol=1e-5, rtol=0)
    assert posterior.trace["objective"].shape == (posterior.diagnostics.iterations,)
    torch.testing.assert_close(posterior.mean("z"), data["a"] @ x, atol=0.2, rtol=0)
    posterior.save(tmp_path / "fit.pt")
    loaded = ppl.load(tmp_path / "fit.pt", program)
    torch.testing.assert_close(loaded.mean("x"), posterior.mean("x"))
    new = normal(7, 100, seed=5) / math.sqrt(60)
    found = posterior.predict({"a": new}, n=400, seed=0)
    assert float((found.mean("y") - new @ x).abs().max()) < 0.2
    assert "amp on" in str(posterior)


def test_prediction_before_any_data_knows_that_rows_help():
    """``state_evolution`` of the model is what a run of that size then achieves."""
    program = regression(lambda z: Normal(z, 0.02))
    few, more = (state_evolution(program, {"row": m, "coef": 2000}) for m in (700, 840))
    assert few.converged
    assert more.mse < few.mse
    data, x = sensed(n=2000, m=700, noise=0.02, seed=3)
    scaled = {"a": data["a"], "y": data["y"]}
    posterior = infer(program, scaled, method="amp")
    error = float((posterior.mean("x") - x).square().mean())
    assert abs(10 * math.log10(error / few.mse)) < 1.5
    assert "dB" in str(few)


def test_prediction_declines_what_it_cannot_do():
    @model
    def two():
        a, b = latent("a", Normal(0.0, 1.0)), latent("b", Normal(0.0, 1.0))
        with plate("row"):
            observe("y", Normal(a + b * given("t"), 1.0))

    with pytest.raises(UnsupportedError, match="one latent without gates"):
        state_evolution(two, {"row": 10})
    with pytest.raises(DataError, match="no size for plate 'row'"):
        state_evolution(two, {})


# ---- broken inputs -----------------------------------------------------------------------------


def finite_or_words(program, data, **options):
    """A finite posterior, or one of the project's errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            posterior = infer(program, data, method="amp", max_iters=100, **options)
        except (ppl.DataError, ppl.NumericalError, ppl.UnsupportedError) as error:
            assert str(error)
            return None
    for name in posterior.marginals:
        assert bool(posterior.mean(name).isfinite().all())
        assert bool(posterior.sd(name).isfinite().all())
    return posterior


@pytest.mark.parametrize("variant", ["gamp", "vamp", "auto"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda a, y: (torch.zeros_like(a), y),
        lambda a, y: (a, torch.zeros_like(y)),
        lambda a, y: (1e200 * a, y),
        lambda a, y: (1e-200 * a, y),
        lambda a, y: (a, 1e150 * y),
        lambda a, y: (a[:, :1].expand_as(a), y),
        lambda a, y: (a[:1].expand_as(a), y),
        lambda a, y: (a[:1], y[:1]),
        lambda a, y: (torch.full_like(a, torch.inf), y),
    ],
    ids="zero-map zero-data huge-map tiny-map huge-data equal-columns equal-rows one-row inf".split(),
)
def test_nothing_impossible_leaves_the_loop(variant, spoil):
    data, _ = sensed(n=40, m=30)
    a, y = spoil(data["a"], data["y"])
    finite_or_words(sensing, {"a": a.clone(), "y": y}, variant=variant)


def test_equal_columns_share_the_coefficient():
    a = normal(40, 20) / math.sqrt(40)
    twice = torch.cat([a, a[:, :1]], 1)
    program = regression(lambda z: Normal(z, 0.1), lambda: Normal(0.0, 1.0))
    posterior = infer(
        program,
        {"a": twice, "y": twice[:, 0] + 0.1 * normal(40, seed=3)},
        method="amp",
        variant="vamp",
    )
    mean = posterior.mean("x")
    assert float(mean[0]) == pytest.approx(float(mean[-1]), abs=1e-6)


def test_minibatches_are_declined():
    data, _ = sensed(n=40, m=30)
    with pytest.raises(UnsupportedError, match="minibatch"):
        infer(sensing, data, method="amp", minibatch={"row": 10})


def test_sites_of_different_laws_and_norms_inform_one_latent():
    n, m = 200, 100
    x = sparse(n)
    a, c = (normal(m, n, seed=s) / math.sqrt(m) for s in (1, 2))
    uniform = torch.rand(m, generator=generator(3), dtype=torch.float64)
    signs = (uniform < torch.sigmoid(5.0 * (c @ x))).double()

    @model
    def program():
        coef, row, other = plate("coef"), plate("row"), plate("other")
        noise = param("noise", 0.3)
        with coef:
            v = latent("x", SpikeSlab(0.1, Normal(0.0, 1.0)))
        with row:
            with coef:
                b = given("a")
            observe("y", Normal(dot(b, v, over=coef), noise))
        with other:
            with coef:
                d = given("c")
            observe("sign", Bernoulli(logits=5.0 * dot(d, v, over=coef)))

    y = a @ x + 0.05 * normal(m, seed=4)
    posterior = infer(program, {"a": a, "c": c, "y": y, "sign": signs}, method="amp")
    assert float(posterior.params["noise"]) == pytest.approx(0.05, rel=0.5)
    assert db(posterior.mean("x"), x) < -15


def test_right_hand_sides_may_share_their_support():
    """Row sparsity (MMV): one gate a coefficient, a value of its own in each problem."""
    problems, n, m = 5, 200, 60
    on = (torch.rand(n, generator=generator(5)) < 0.1).double()
    x = normal(problems, n) * on
    a = normal(m, n, seed=1) / math.sqrt(m)

    @model
    def program():
        problem, row, coef = plate("problem"), plate("row"), plate("coef")
        rho = param("rho", 0.3)
        with coef:
            gate = latent("on", Bernoulli(rho))
        with problem, coef:
            v = latent("x", SpikeSlab(gate, Normal(0.0, 1.0)))
        with row, coef:
            b = given("a")
        with problem, row:
            observe("y", Normal(dot(b, v, over=coef), 0.05))

    y = x @ a.T + 0.05 * normal(problems, m, seed=2)
    posterior = infer(program, {"a": a, "y": y}, method="amp")
    assert posterior.probs("on").shape == (n, 2)
    assert db(posterior.mean("x"), x) < -20
    draws = posterior.samples(3)["x"]
    assert bool(((draws != 0).sum(1) % problems == 0).all())
