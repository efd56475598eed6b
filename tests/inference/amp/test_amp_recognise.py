"""What the backend finds in a graph, and the words with which it declines."""

from __future__ import annotations

import re

import pytest
import torch

from ppl import (
    Bernoulli,
    Flat,
    Gamma,
    HalfNormal,
    Laplace,
    Markov,
    MultivariateNormal,
    Normal,
    Poisson,
    SpikeSlab,
    UnsupportedError,
    dot,
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
from ppl.inference.amp.mixing import make_operator
from ppl.inference.amp.problem import make_model
from ppl.inference.amp.recognise import recognise, supports

M, N = 5, 8
A = torch.randn(M, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(M, dtype=torch.float64)


def plated(law, prior=lambda: Laplace(0.0, 1.0)):
    """``law`` of the predictor ``dot(a, x)``."""

    @model
    def program():
        row, coef = plate("row"), plate("coef")
        with coef:
            x = latent("x", prior())
        with row:
            with coef:
                a = given("a")
            observe("y", law(dot(a, x, over=coef)))

    return program


def rows_plated():
    @model
    def program():
        x = latent("x", Laplace(0.0, 1.0), shape=N)
        with plate("row"):
            a = given("a")
            observe("y", Normal((a * x).sum(-1), 0.1))

    return program


def vector(product):
    @model
    def program():
        x = latent("x", Laplace(0.0, 1.0), shape=N)
        observe("y", Normal(product(given("a"), x), 0.1))

    return program


FORMS = {
    "dot over a plate": plated(lambda z: Normal(z, 0.1)),
    "sum of a product in each row": rows_plated(),
    "matmul": vector(lambda a, x: a @ x),
    "sum of a product": vector(lambda a, x: (a * x).sum(-1)),
    "einsum": vector(lambda a, x: torch.einsum("ij,j->i", a, x)),
    "vector first": vector(lambda a, x: x @ a.T),
    "minus and minus": vector(lambda a, x: -torch.neg(a @ x)),
    "halves": vector(lambda a, x: 2.0 * (a @ (x / 2.0))),
    "fixed offset": vector(lambda a, x: a @ x + 3.0),
    "two products": vector(lambda a, x: 0.25 * a @ x - (-0.75 * a) @ x),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_map_is_the_matrix(name):
    bound = FORMS[name].bind({"a": A, "y": Y})
    linear = recognise(bound.graph)
    operator, *units = make_operator(bound, linear)
    torch.testing.assert_close(operator.to_dense(), A)
    assert [m.name for m in linear.mixed] == ["x"]
    assert units == [(1.0,), (1.0,)]


def test_a_fourier_transform_is_linear_and_never_written_out():
    n = 3000

    @model
    def program():
        x = latent("x", Laplace(0.0, 1.0), shape=n)
        observe("y", Normal(torch.fft.rfft(x, norm="ortho").real[:700], 0.1))

    bound = program.bind({"y": torch.zeros(700)})
    operator = make_operator(bound, recognise(bound.graph)).operator
    assert operator.kind == "matrix-free"
    x = torch.randn(2, n, dtype=torch.float64)
    torch.testing.assert_close(operator.mv(x), torch.fft.rfft(x, norm="ortho").real[:, :700])
    z = torch.randn(700, dtype=torch.float64)
    torch.testing.assert_close(operator.mv(x[0]) @ z, operator.rmv(z) @ x[0])


def test_a_convolution_is_linear():
    @model
    def program():
        x = latent("x", Laplace(0.0, 1.0), shape=9)
        kernel = given("kernel")
        observe(
            "y", Normal(torch.nn.functional.conv1d(x[None, None], kernel[None, None])[0, 0], 0.1)
        )

    bound = program.bind({"kernel": torch.tensor([1.0, 2.0, -1.0]), "y": torch.zeros(7)})
    operator = make_operator(bound, recognise(bound.graph)).operator
    dense = operator.to_dense()
    assert dense.shape == (7, 9)
    assert dense[2, 1:6].tolist() == [0.0, 1.0, 2.0, -1.0, 0.0]


def test_latents_stand_beside_each_other_and_sites_below():
    @model
    def program():
        group, row, coef = plate("group"), plate("row"), plate("coef")
        base = latent("base", Normal(0.0, 5.0))
        with group:
            level = latent("level", Normal(0.0, 2.0))
        with coef:
            x = latent("x", Laplace(0.0, 1.0))
        with row:
            g = given("g", index=group)
            with coef:
                a = given("a")
            z = base + level[g] + dot(a, x, over=coef)
            observe("y", Normal(z, 0.1))
            observe("n", Poisson(torch.exp(2.0 * z)))

    data = {"a": A, "y": Y, "n": Y, "g": [0, 1, 1, 0, 2]}
    bound = program.bind(data)
    linear = recognise(bound.graph)
    operator, columns, rows = make_operator(bound, linear)
    assert [m.name for m in linear.mixed] == ["base", "level", "x"]
    top = torch.cat([torch.ones(M, 1), torch.eye(3)[[0, 1, 1, 0, 2]], A], 1).double()
    scale = torch.cat([torch.full((k,), u) for k, u in zip((1, 3, N), columns, strict=True)])
    assert rows[1] == pytest.approx(2.0 * rows[0])
    whole = torch.cat([top / rows[0], 2.0 * top / rows[1]])
    torch.testing.assert_close(operator.to_dense() * scale, whole)


def test_right_hand_sides_share_the_map():
    @model
    def program():
        problem, row, coef = plate("problem"), plate("row"), plate("coef")
        with problem, coef:
            x = latent("x", Laplace(0.0, 1.0))
        with row, coef:
            a = given("a")
        with problem, row:
            observe("y", Normal(dot(a, x, over=coef), 0.1))

    bound = program.bind({"a": A, "y": torch.zeros(4, M)})
    linear = recognise(bound.graph)
    assert linear.batch == ("problem",)
    torch.testing.assert_close(make_operator(bound, linear)[0].to_dense(), A)


KINDS = {
    "gaussian": lambda z: Normal(z, 0.3),
    "probit": lambda z: Bernoulli(torch.special.ndtr(z)),
    "logistic": lambda z: Bernoulli(torch.sigmoid(z)),
    "poisson": lambda z: Poisson(torch.exp(z)),
    "modulus": lambda z: Normal(z.abs(), 0.3),
    "rectified": lambda z: Normal(torch.relu(z), 0.3),
    "additive": lambda z: Laplace(z, 0.3),
    "sign": lambda z: Bernoulli((z > 0).double()),
    "quadrature": lambda z: Normal(torch.tanh(3 * z), 0.3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_law_is_known_by_what_it_computes(kind):
    bound = plated(KINDS[kind]).bind({"a": A, "y": torch.ones(M)})
    assert make_model(bound, 1, None).outcomes[0].kind == kind


def test_spellings_of_a_link_are_one():
    for link in (
        lambda z: Bernoulli(logits=z),
        lambda z: Bernoulli(1.0 / (1.0 + torch.exp(-z))),
    ):
        bound = plated(link).bind({"a": A, "y": torch.ones(M)})
        assert make_model(bound, 1, None).outcomes[0].kind.startswith("logistic")
    for link in (
        lambda z: Bernoulli(Normal(0.0, 1.0).cdf(z)),
        lambda z: Bernoulli(0.5 * (1.0 + torch.erf(z / 2**0.5))),
    ):
        bound = plated(link).bind({"a": A, "y": torch.ones(M)})
        assert make_model(bound, 1, None).outcomes[0].kind == "probit"


# ---- what it declines --------------------------------------------------------------------------


@model
def free_factor():
    x = latent("x", Normal(0.0, 1.0))
    factor("tie", Normal(x, 0.1), at=0.0)
    observe("y", Normal(x, 1.0))


@model
def random_walk():
    with plate("t", ordered=True):
        x = latent("x", Markov(init=Normal(0.0, 1.0), step=lambda prev: Normal(prev, 0.1)))
        observe("y", Normal(x, 1.0))


@model
def joint_law():
    x = latent("x", MultivariateNormal(torch.zeros(3), torch.eye(3)))
    observe("y", Normal(x, 1.0))


@model
def latent_scale():
    sd = latent("sd", HalfNormal(1.0))
    x = latent("x", Normal(0.0, 1.0))
    with plate("row"):
        observe("y", Normal(given("a") * x, sd))


@model
def latent_hyper():
    tau = latent("tau", HalfNormal(1.0))
    with plate("coef"):
        x = latent("x", Normal(0.0, tau))
        observe("y", Normal(x, 1.0))


@model
def hierarchy_of_means():
    mu = latent("mu", Normal(0.0, 1.0))
    with plate("coef"):
        x = latent("x", Normal(mu, 1.0))
        observe("y", Normal(x, 1.0))


@model
def bilinear():
    u, v = latent("u", Normal(0.0, 1.0)), latent("v", Normal(0.0, 1.0))
    with plate("row"):
        observe("y", Normal(given("a") * u * v, 1.0))


@model
def mixing_of_something_else():
    row, coef = plate("row"), plate("coef")
    with coef:
        x = latent("x", Normal(0.0, 1.0))
        folded = torch.exp(x)
    with row:
        with coef:
            a = given("a")
        observe("y", Normal(dot(a, folded, over=coef), 1.0))


@model
def counted():
    with plate("coef"):
        x = latent("x", Poisson(2.0))
        observe("y", Normal(x, 1.0))


@model
def improper():
    x = latent("x", Flat())
    with plate("row"):
        observe("y", Normal(given("a") * x, 1.0))


@model
def idle():
    latent("z", Normal(0.0, 1.0))
    x = latent("x", Normal(0.0, 1.0))
    observe("y", Normal(x, 1.0))


@model
def no_latent_in_law():
    x = latent("x", Normal(0.0, 1.0))
    observe("y", Normal(x, 1.0))
    observe("w", Normal(0.0, 1.0))


@model
def product_with_a_spike():
    on = latent("on", Bernoulli(0.5))
    w = latent("w", SpikeSlab(0.5, Normal(0.0, 1.0)))
    observe("y", Normal(on * w, 1.0))


@model
def nothing_observed():
    latent("x", Normal(0.0, 1.0))


REFUSED = {
    "free factor": (free_factor, "'tie'", "observe"),
    "chain of reals": (random_walk, "'x'", "cumsum"),
    "joint law": (joint_law, "'x'", "single elements"),
    "latent noise scale": (latent_scale, "'sd'", r"sd = param\('sd', init\)"),
    "latent prior scale": (latent_hyper, "'tau'", r"tau = param\('tau', init\)"),
    "mean above a mean": (hierarchy_of_means, "'mu'", r"mu \+ x"),
    "product of latents": (
        bilinear,
        "'y'",
        "linear expressions of u and v|different linear expressions",
    ),
    "not affine below the map": (mixing_of_something_else, "'y'", "dot over 'coef'"),
    "count": (counted, "'x'", "Bernoulli or Categorical"),
    "improper prior": (improper, "'x'", "improper"),
    "idle latent": (idle, "'z'", "Leave it out"),
    "law of constants": (no_latent_in_law, "'w'", "given"),
    "gate times a spike": (product_with_a_spike, "'w'", r"SpikeSlab\(on, slab"),
    "nothing observed": (nothing_observed, "no site is observed", ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_site_and_the_remedy(name):
    program, site, remedy = REFUSED[name]
    reasons = supports(program.graph())
    text = "\n".join(map(str, reasons))
    assert site in text
    assert re.search(remedy, text), text


def test_all_reasons_are_in_one_error():
    with pytest.raises(UnsupportedError, match=r"(?s)amp cannot fit this model.*'tau'"):
        infer(latent_hyper, {"y": [1.0, 2.0]}, method="amp")


def test_explain_says_what_it_would_do():
    @model
    def outside():
        noise = param("noise", 0.1)
        row, coef = plate("row"), plate("coef")
        with coef:
            x = latent("x", SpikeSlab(0.1, Normal(0.0, 1.0)))
        with row:
            with coef:
                a = given("a")
            observe("y", Normal(dot(a, x, over=coef), noise))

    rows = {r.method: r for r in explain(outside, {"a": A, "y": Y}).rows}
    assert rows["amp"].usable
    assert "dense map from 8 scalars of x to 5 rows" in rows["amp"].note


@pytest.mark.parametrize("option", ["variant", "kind", "variances", "solver", "means", "start"])
def test_a_wrong_choice_lists_the_right_ones(option):
    from ppl import ModelError
    from ppl.inference.amp import AMP

    with pytest.raises(ModelError, match=rf"AMP\({option}=...\): expected one of"):
        AMP(**{option: "other"})


def test_modes_over_gates_are_declined():
    @model
    def gated():
        with plate("coef"):
            on = latent("on", Bernoulli(0.1))
            x = latent("x", SpikeSlab(on, Normal(0.0, 1.0)))
            observe("y", Normal(x, 1.0))

    with pytest.raises(UnsupportedError, match="kind='max' has no maximum over the gates on"):
        infer(gated, {"y": [1.0, 2.0]}, method="amp", kind="max")


def test_a_spike_has_no_mode():
    with pytest.raises(UnsupportedError, match="Laplace"):
        program = plated(lambda z: Normal(z, 1.0), lambda: SpikeSlab(0.1, Normal(0.0, 1.0)))
        infer(program, {"a": A, "y": Y}, method="amp", kind="max")


def test_a_pole_of_a_density_does_no_harm():
    program = plated(lambda z: Normal(z, 1.0), lambda: Gamma(0.5, 2.0))
    posterior = infer(program, {"a": A, "y": Y}, method="amp", variant="vamp")
    assert bool(posterior.mean("x").isfinite().all())
    assert bool((posterior.mean("x") > 0).all())
