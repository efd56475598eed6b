"""EM: closed updates pooled over what shares a param, and gradients for any other use."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import constraints

from ppl import (
    Bernoulli,
    Categorical,
    HalfNormal,
    Laplace,
    Mixture,
    Normal,
    Poisson,
    SpikeSlab,
    StudentT,
    dot,
    given,
    infer,
    latent,
    model,
    observe,
    param,
    plate,
)
from ppl.backend import Settings
from ppl.inference.amp.learning import Pseudo, make_learner, objective
from ppl.inference.amp.options import AMP
from ppl.inference.amp.problem import make_model, prepare
from ppl.streams import Streams


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def learner_of(program, data, **options):
    bound = program.bind(data)
    return make_learner(make_model(bound, 1, None), AMP(**options))


@model
def direct():
    group = plate("group")
    coef = plate("coef", within=group)
    with group:
        sd = param("sd", 1.0)
    rho, noise = param("rho", 0.5), param("noise", 0.3)
    with coef:
        x = latent("x", SpikeSlab(rho, Normal(0.0, sd)))
        observe("y", Normal(x, noise))


def test_which_params_have_closed_updates():
    data = {"y": torch.zeros(6), "group": [0, 0, 0, 1, 1, 1]}
    found = learner_of(direct, data)
    assert set(found.closed) == {"sd", "rho", "noise"}
    assert found.closed["sd"].entry.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.closed["rho"].entry is None
    assert learner_of(direct, data, learn=False).names == ()
    assert learner_of(direct, data, learn=["rho"]).names == ("rho",)


@model
def indirect():
    row, coef = plate("row"), plate("coef")
    base, sd, cut = param("base", 0.0), param("sd", 1.0), param("cut", 2.0)
    with coef:
        x = latent("x", Laplace(0.0, 2.0 * sd))
    with row:
        with coef:
            a = given("a")
        observe("y", Normal(base + dot(a, x, over=coef), sd * torch.exp(cut)))


def test_any_other_use_follows_the_gradient():
    found = learner_of(indirect, {"a": torch.ones(3, 2), "y": torch.zeros(3)})
    assert found.closed == {}
    assert set(found.ascending) == {"base", "sd", "cut"}


def test_the_gradient_is_that_of_the_log_normalisers():
    """Fisher's identity against finite differences, for params of prior, channel and offset together."""
    a, y = normal(5, 4), normal(5, seed=1)
    learner = learner_of(indirect, {"a": a, "y": y})
    one = (normal(1, 1, 4, seed=2), torch.full((1, 1, 1), 0.3).double())
    two = (normal(1, 1, 5, seed=3), torch.full((1, 1, 1), 0.4).double())
    at = Pseudo([one], [two])
    start = {k: v.clone().requires_grad_() for k, v in learner.model.start.items()}
    grads = torch.autograd.grad(objective(learner, start, at).sum(), list(start.values()))
    for (name, value), grad in zip(start.items(), grads, strict=True):
        ends = [objective(learner, {**start, name: value.detach() + h}, at) for h in (1e-5, -1e-5)]
        assert float(grad) == pytest.approx(float((ends[0] - ends[1]).detach()) / 2e-5, rel=1e-5), (
            name
        )


def test_plate_level_params_are_learned_apart():
    """One slab width a group; rho and noise are tied."""
    n, m = 2000, 1500
    member = torch.arange(n) % 2
    live = uniform(n) < 0.3
    x = normal(n, seed=1) * torch.tensor([1.0, 4.0]).double()[member] * live
    a = normal(m, n, seed=7) / math.sqrt(m)

    @model
    def program():
        group, row = plate("group"), plate("row")
        coef = plate("coef", within=group)
        with group:
            sd = param("sd", 2.0)
        rho, noise = param("rho", 0.5), param("noise", 0.5)
        with coef:
            v = latent("x", SpikeSlab(rho, Normal(0.0, sd)))
        with row:
            with coef:
                b = given("a")
            observe("y", Normal(dot(b, v, over=coef), noise))

    y = a @ x + 0.2 * normal(m, seed=2)
    posterior = infer(program, {"a": a, "y": y, "group": member}, method="amp")
    wanted = torch.tensor([1.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(posterior.params["sd"], wanted, rtol=0.12, atol=0)
    assert float(posterior.params["rho"]) == pytest.approx(0.3, abs=0.03)
    assert float(posterior.params["noise"]) == pytest.approx(0.2, rel=0.1)


def regression(law, prior, **starts):
    @model
    def program():
        row, coef = plate("row"), plate("coef")
        learned = {
            k: param(k, *v[:1], **({"support": v[1]} if len(v) > 1 else {}))
            for k, v in starts.items()
        }
        with coef:
            x = latent("x", prior(**{k: learned[k] for k in learned if k.startswith("p_")}))
        with row:
            with coef:
                a = given("a")
            z = dot(a, x, over=coef)
            observe("y", law(z, **{k: learned[k] for k in learned if k.startswith("c_")}))

    return program


N, M = 1000, 800
A = normal(M, N, seed=5) / math.sqrt(M)

PRIORS = {
    "laplace": (
        lambda p_scale: Laplace(0.0, p_scale),
        {"p_scale": (1.0,)},
        lambda: 0.7 * (-(uniform(N).log()) * torch.sign(normal(N, seed=9))),
        {"p_scale": 0.7},
    ),
    "normal": (
        lambda p_loc, p_scale: Normal(p_loc, p_scale),
        {"p_loc": (0.0,), "p_scale": (1.0,)},
        lambda: 0.5 + 2.0 * normal(N, seed=9),
        {"p_loc": 0.5, "p_scale": 2.0},
    ),
    "half-normal": (
        lambda p_scale: HalfNormal(p_scale),
        {"p_scale": (1.0,)},
        lambda: 2.0 * normal(N, seed=9).abs(),
        {"p_scale": 2.0},
    ),
    "spike with a Laplace slab": (
        lambda p_share, p_scale: SpikeSlab(p_share, Laplace(0.0, p_scale)),
        {"p_share": (0.3,), "p_scale": (1.0,)},
        lambda: (uniform(N, seed=8) < 0.15) * 2.0 * (-(uniform(N).log())) * torch.sign(normal(N)),
        {"p_share": 0.15, "p_scale": 2.0},
    ),
    "binary": (
        lambda p_share: Bernoulli(p_share),
        {"p_share": (0.5,)},
        lambda: (uniform(N) < 0.2).double(),
        {"p_share": 0.2},
    ),
}


@pytest.mark.parametrize("name", PRIORS)
def test_params_of_priors_are_recovered(name):
    prior, starts, draw, truth = PRIORS[name]
    x = draw()
    y = A @ x + 0.1 * normal(M, seed=6)
    program = regression(lambda z: Normal(z, 0.1), prior, **starts)
    posterior = infer(program, {"a": A, "y": y}, method="amp", max_iters=2000)
    for param_name, value in truth.items():
        assert float(posterior.params[param_name]) == pytest.approx(
            value, rel=0.12, abs=0.15 if name == "normal" else 0.05
        )


def test_weights_of_a_mixture_are_learned_as_a_vector():
    which = (uniform(N) < 0.8).double()
    x = which * 0.05 * normal(N, seed=1) + (1 - which) * (2.0 + 0.3 * normal(N, seed=2))
    y = A @ x + 0.05 * normal(M, seed=6)

    @model
    def program():
        row, coef = plate("row"), plate("coef")
        weights = param("weights", torch.tensor([0.5, 0.5]), support=constraints.simplex)
        means = param("means", torch.tensor([0.0, 1.0]))
        with coef:
            v = latent("x", Mixture(weights, Normal(means, torch.tensor([0.05, 0.3]))))
        with row:
            with coef:
                a = given("a")
            observe("y", Normal(dot(a, v, over=coef), 0.05))

    posterior = infer(program, {"a": A, "y": y}, method="amp", max_iters=2000)
    wanted = torch.tensor([0.8, 0.2], dtype=torch.float64)
    torch.testing.assert_close(posterior.params["weights"], wanted, atol=0.05, rtol=0)
    assert float(posterior.params["means"][1]) == pytest.approx(2.0, abs=0.1)


def test_heavy_tailed_noise_is_learned():
    x = normal(N, seed=1) * (uniform(N) < 0.1)
    tails = normal(M, seed=3) / (normal(3, M, seed=4).square().mean(0)).sqrt()
    program = regression(
        lambda z, c_scale: StudentT(3.0, z, c_scale),
        lambda: SpikeSlab(0.1, Normal(0.0, 1.0)),
        c_scale=(1.0,),
    )
    posterior = infer(program, {"a": A, "y": A @ x + 0.1 * tails}, method="amp")
    assert float(posterior.params["c_scale"]) == pytest.approx(0.1, rel=0.15)


def test_an_intercept_may_be_a_param():
    x = normal(N, seed=1) * (uniform(N) < 0.1)

    @model
    def program():
        row, coef = plate("row"), plate("coef")
        base = param("base", 0.0)
        with coef:
            v = latent("x", SpikeSlab(0.1, Normal(0.0, 1.0)))
        with row:
            with coef:
                a = given("a")
            observe("y", Normal(base + dot(a, v, over=coef), 0.1))

    y = 3.0 + A @ x + 0.1 * normal(M, seed=6)
    posterior = infer(program, {"a": A, "y": y}, method="amp")
    assert float(posterior.params["base"]) == pytest.approx(3.0, abs=0.02)


def test_noise_of_every_right_hand_side_is_its_own():
    sds = torch.tensor([0.05, 0.2], dtype=torch.float64)
    x = normal(2, N, seed=1) * (uniform(2, N) < 0.1)
    y = x @ A.T + sds[:, None] * normal(2, M, seed=6)

    @model
    def program():
        problem, row, coef = plate("problem"), plate("row"), plate("coef")
        with problem:
            noise = param("noise", 0.5)
            with coef:
                v = latent("x", SpikeSlab(0.1, Normal(0.0, 1.0)))
        with row, coef:
            a = given("a")
        with problem, row:
            observe("y", Normal(dot(a, v, over=coef), noise))

    posterior = infer(program, {"a": A, "y": y}, method="amp")
    torch.testing.assert_close(posterior.params["noise"], sds, rtol=0.12, atol=0)


def test_cut_points_of_ordered_categories_are_learned():
    n, m = 100, 600
    a = normal(m, n) / math.sqrt(n)
    z = a @ (3.0 * normal(n, seed=1)) + normal(m, seed=2)
    y = (z > -1.0).long() + (z > 1.5).long()

    def law(z, c_low, c_high):
        below, above = (torch.special.ndtr(c - z) for c in (c_low, c_high))
        return Categorical(torch.stack([below, above - below, 1 - above]))

    program = regression(law, lambda: Normal(0.0, 3.0), c_low=(-0.5,), c_high=(0.5,))
    posterior = infer(program, {"a": a, "y": y}, method="amp", tolerance=1e-4)
    assert "y: Interval" in posterior.diagnostics.notes["rules"]
    assert float(posterior.params["c_low"]) == pytest.approx(-1.0, abs=0.25)
    assert float(posterior.params["c_high"]) == pytest.approx(1.5, abs=0.3)


def test_params_that_are_not_learned_stay():
    x = normal(N, seed=1) * (uniform(N) < 0.1)
    program = regression(
        lambda z, c_sd: Normal(z, c_sd),
        lambda p_rho: SpikeSlab(p_rho, Normal(0.0, 1.0)),
        c_sd=(0.2,),
        p_rho=(0.2,),
    )
    data = {"a": A, "y": A @ x + 0.1 * normal(M, seed=6)}
    posterior = infer(program, data, method="amp", learn=["c_sd"])
    assert float(posterior.params["p_rho"]) == 0.2
    assert float(posterior.params["c_sd"]) == pytest.approx(0.1, rel=0.2)
    fixed = infer(program, data, method="amp", learn=False)
    assert float(fixed.params["c_sd"]) == 0.2


@pytest.mark.parametrize("link", ["probit", "logistic", "poisson"])
def test_a_start_from_the_data_has_the_scale_of_the_link(link):
    """Wherever the model starts, the slab starts where the predictor is of the order of what the link can tell."""
    m, n = 300, 400
    a = normal(m, n) / math.sqrt(m)
    x = 3.0 * normal(n, seed=1) * (uniform(n, seed=2) < 0.1)
    z = a @ x
    laws = {
        "probit": (lambda z: Bernoulli(torch.special.ndtr(z)), z + normal(m, seed=3) > 0),
        "logistic": (lambda z: Bernoulli(logits=z), torch.sigmoid(z) > uniform(m, seed=3)),
        "poisson": (
            lambda z: Poisson(torch.exp(z)),
            torch.poisson(z.exp(), torch.Generator().manual_seed(0)),
        ),
    }
    law, y = laws[link]
    program = regression(
        law,
        lambda p_rho, p_sd: SpikeSlab(p_rho, Normal(0.0, p_sd)),
        p_rho=(0.9, constraints.unit_interval),
        p_sd=(1e-3, constraints.positive),
    )
    bound = program.bind({"a": a, "y": y.double()})
    problem = prepare(bound, AMP(start="data"), Settings(Streams(0)))
    spread = problem.params["p_rho"] * problem.params["p_sd"].square()
    predicted = float(spread * a.square().sum() / m)
    assert 0.3 < predicted < 12.0
    assert 0.001 < float(problem.params["p_rho"]) < 0.5
