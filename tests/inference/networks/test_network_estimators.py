"""Estimators of layers agree in mean, and each single output in variance, whatever the layer."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from ppl import Categorical, Normal, given, infer, latent, model, nn, observe, plate, plates
from ppl.backend import Settings
from ppl.inference.networks import fit
from ppl.inference.networks.estimators import Bias, draw_signs, flipout, local
from ppl.inference.networks.forward import callables, leaves
from ppl.inference.networks.noise import standard_noise
from ppl.inference.networks.products import Dense
from ppl.inference.networks.records import Rule, sds, sizes, slices
from ppl.streams import Streams

DRAWS = 4000


@model
def dense():
    layer = nn.Linear(3, 2, name="fc")
    with plate("row"):
        observe("y", Normal(layer(given("x")).sum(), 1.0))


@model
def images(stride=1):
    layer = nn.Conv2d(2, 3, 3, name="c", padding=1, stride=stride)
    with plate("row"):
        observe("y", Normal(layer(given("x")).sum(), 1.0))


@model
def sequences():
    layer = nn.Conv1d(2, 3, 2, name="c")
    with plate("row"):
        observe("y", Normal(layer(given("x")).sum(), 1.0))


@model
def tied():
    layer = nn.Linear(3, 3, name="fc")
    with plate("row"):
        observe("y", Normal(layer(torch.tanh(layer(given("x")))).sum(), 1.0))


CASES = {
    "linear": (dense, (3,)),
    "conv2d": (images, (2, 4, 4)),
    "strided": (images(stride=2), (2, 4, 4)),
    "conv1d": (sequences, (2, 5)),
    "rows": (dense, (4, 3)),
}


def problem_of(program, x, wish, **rule):
    data = {"x": x, "y": torch.zeros(len(x))}
    return fit.prepare(program.bind(data), Settings(Streams(3)), Rule(**rule), wish)


def outputs(problem, state, x, n):
    """``n`` evaluations ``[n, *batch, ...]`` of the only product."""
    node = problem.network.products[0]
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(n):
        eps = torch.randn(state.raw.numel(), generator=generator, dtype=state.raw.dtype)
        draw = leaves(problem, state, sds(problem, state), list(eps.split(sizes(problem, state))))
        with torch.no_grad():
            found.append(callables(problem, state, draw, generator)[node.source](x))
    return torch.stack(found)


@pytest.mark.parametrize("wish", ["local", "flipout", "draw"])
@pytest.mark.parametrize("case", CASES)
def test_estimators_agree_with_the_moments_of_a_weight_draw(case, wish):
    program, shape = CASES[case]
    x = torch.randn(2, *shape, dtype=torch.float64)
    problem = problem_of(program, x, wish, initial_sd=1.0)
    (state,) = fit.init(problem).runs
    assert problem.estimators[0] == ("flipout" if wish == "local" and case == "rows" else wish)
    found = outputs(problem, state, x, DRAWS)
    node = problem.network.products[0]
    weight, bias = slices(problem, state)
    sd, product = sds(problem, state), Dense(node)
    beside = (..., *(None,) * (-1 - node.channel))
    mean = product(state.mean[weight], x) + state.mean[bias][beside]
    variance = product(sd[weight].square(), x.square()) + sd[bias].square()[beside]
    if case == "rows":  # the entries of each row of an example share the draw
        variance = x.square() @ sd[weight].square().view(node.shape).T + sd[bias].square()
    error = (variance / DRAWS).sqrt()
    assert bool(((found.mean(0) - mean).abs() < 5 * error).all())
    assert torch.allclose(found.var(0), variance, rtol=6 * (2 / DRAWS) ** 0.5)


def test_local_noise_is_independent_over_examples_and_flipout_keeps_a_kernel_together():
    x = torch.ones(3, 1, 2, 2, dtype=torch.float64)
    weight = torch.zeros(1, dtype=torch.float64)
    variance = torch.ones(1, dtype=torch.float64)

    def product(w, z):
        return functional.conv2d(z, w.view(1, 1, 1, 1))

    generator = torch.Generator().manual_seed(0)
    y = torch.stack([local(product, weight, variance, x, generator) for _ in range(3000)])
    assert torch.corrcoef(y.flatten(1).T).triu(1).abs().max() < 0.1
    signs = draw_signs((3,), 1, 1, x, generator)
    z = flipout(product, weight, variance, x, signs, channel=-3)
    assert bool((z == z[:, :, :1, :1]).all())
    assert bool((z.abs() == 1).all())


def test_outputs_without_random_inputs_are_deterministic_and_their_slopes_finite():
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    mean = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64, requires_grad=True)
    variance = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64, requires_grad=True)

    def product(w, z):
        return functional.linear(z, w.view(2, 2))

    bias = Bias(torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    y = local(product, mean, variance, x, torch.Generator().manual_seed(0), bias)
    fixed = y.detach()
    assert fixed[0].tolist() == [1.0, 1.0]
    assert float(fixed[1, 0]) == 6.0
    assert float(fixed[1, 1]) != 12.0
    for slope in torch.autograd.grad(y.sum(), [mean, variance]):
        assert bool(slope.isfinite().all())


@model
def pairs():
    layer = nn.Linear(3, 1, name="fc", bias=False)
    with plate("row"):
        z = layer(given("x"))[0]
    with plate("match"):
        apart = z[given("a", index="row")] - z[given("b", index="row")]
        observe("y", Normal(apart, 0.5))


@model
def bag():
    layer = nn.Linear(3, 1, name="fc", bias=False)
    with plate("row"):
        z = layer(given("x"))[0]
    observe("y", Normal(plates.mean(z, over="row"), 0.5))


@model
def anchored():
    layer = nn.Linear(3, 1, name="fc", bias=False)
    zero = layer(given("anchor"))[0]
    with plate("row"):
        observe("y", Normal(layer(given("x"))[0] - zero, 0.5))


@pytest.mark.parametrize("wish", ["local", "flipout"])
@pytest.mark.parametrize("program", [pairs, bag, anchored], ids=["pairs", "bag", "anchored"])
def test_noise_is_shared_where_results_for_several_elements_meet(program, wish):
    x = 1.0 + 0.1 * torch.randn(5, 3, dtype=torch.float64)
    a, b, anchor = torch.arange(4), torch.arange(1, 5), torch.ones(3, dtype=torch.float64)
    known = {
        pairs: ({"x": x, "a": a, "b": b}, x[a] - x[b]),
        bag: ({"x": x}, x.mean(0, keepdim=True)),
        anchored: ({"x": x, "anchor": anchor}, x - anchor),
    }
    data, rows = known[program]
    y = torch.zeros(len(rows)) if program is not bag else torch.tensor(0.0)
    problem = fit.prepare(program.bind({**data, "y": y}), Settings(Streams(3)), Rule(), wish)
    assert problem.estimators == ("draw",)
    assert "meets in one expression" in problem.why[0]
    (state,) = fit.init(problem).runs
    found = [fit.step(problem, state._replace(run=i))[1].metrics["nll"] for i in range(500)]
    found = torch.tensor(found, dtype=torch.float64)
    squares = (rows @ state.mean).square() + rows.square() @ sds(problem, state).square()
    constant = torch.distributions.Normal(0.0, 0.5).log_prob(torch.tensor(0.0))
    expected = (squares / (2 * 0.25) - constant).sum() / problem.examples
    assert abs(found.mean() - expected) < 4 * found.std() / 500**0.5


def test_one_array_used_twice_has_the_same_signs_in_both_uses():
    x = torch.randn(4, 3, dtype=torch.float64)
    problem = problem_of(tied, x, "local", initial_sd=1.0)
    assert [p.name for p in problem.network.products] == ["fc", "fc"]
    assert problem.estimators == ("flipout", "draw")  # the bias is read by two products
    assert "more than once" in problem.why[0]
    (state,) = fit.init(problem).runs
    generator = torch.Generator().manual_seed(0)
    noise = standard_noise(problem, state, generator, state.raw.numel())
    draw = leaves(problem, state, sds(problem, state), list(noise.split(sizes(problem, state))))
    first, second = callables(problem, state, draw, generator).values()
    bias = draw.arrays[1].mean
    with torch.no_grad():
        assert torch.equal(first(x, bias), second(x, bias))


def test_flipout_and_draws_of_a_tied_network_have_one_mean_likelihood():
    x = torch.randn(4, 3, dtype=torch.float64)
    means = {}
    for wish in ("flipout", "draw"):
        problem = problem_of(tied, x, wish, initial_sd=0.5)
        (state,) = fit.init(problem).runs
        values = []
        for i in range(3000):
            generator = torch.Generator().manual_seed(i)
            eps = torch.randn(state.raw.numel(), generator=generator, dtype=torch.float64)
            noise = list(eps.split(sizes(problem, state)))
            draw = leaves(problem, state, sds(problem, state), noise)
            with torch.no_grad():
                functions = callables(problem, state, draw, generator)
                values.append(problem.program({"fc.bias": draw.arrays[1].mean, **functions}))
        means[wish] = torch.stack(values)
    error = sum(v.var() / len(v) for v in means.values()).sqrt()
    assert abs(means["flipout"].mean() - means["draw"].mean()) < 4 * error


def test_a_product_written_by_hand_is_one_too():
    @model
    def plain():
        w = latent("w", Normal(0.0, 1.0), shape=(3, 2))
        with plate("row"):
            observe("label", Categorical(logits=given("x") @ w.T))

    x = torch.randn(40, 2, dtype=torch.float64)
    data = {"x": x, "label": (x[:, 0] > 0).long()}
    posterior = infer(plain, data, method="vi", estimator="local", seed=0, max_iters=300)
    assert posterior.mean("w").shape == (3, 2)
    assert "local reparameterisation" in posterior.diagnostics.notes["layers"]
