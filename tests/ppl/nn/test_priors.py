"""Priors of weights: their densities against formulas, what they declare, points and fixed arrays."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as td

from ppl import (
    HalfNormal,
    ModelError,
    Normal,
    deterministic,
    explain,
    given,
    infer,
    latent,
    model,
    nn,
    observe,
    param,
    plate,
)
from ppl.backend import load
from ppl.lower import Compiler


@model
def net(prior=None, inputs: int = 4, outputs: int = 2, bias=False):
    layer = nn.Linear(inputs, outputs, name="fc", prior=prior, bias=bias)
    noise = param("noise", 1.0)
    with plate("row"):
        observe("y", Normal(layer(given("x"))[0], noise))


def graph_of(prior, inputs: int = 4, bias=False):
    data = {"x": torch.zeros(3, inputs, dtype=torch.float64), "y": torch.zeros(3)}
    return net(prior=prior, inputs=inputs, bias=bias).graph(data)


def density(graph, site: str, arrays):
    """Log-density of a site as a function of ``[*plates]`` arrays."""
    axes = {v.name: v.plates for v in graph.variables.values()}
    c = Compiler(graph, axes, list(graph.plates))
    out = c.density(graph.factors[site])
    run = c.finish([c.align(out, graph.factors[site].plates)])
    return run({k: arrays[k] for k in run.inputs})[0]


def normal(scale: float) -> td.Normal:
    return td.Normal(0.0, torch.tensor(scale, dtype=torch.float64))


def laplace_law(scale: float) -> td.Laplace:
    return td.Laplace(0.0, torch.tensor(scale, dtype=torch.float64))


W = torch.tensor([[0.3, 0.0, -1.2, 2.0], [0.0, 0.5, 0.0, -0.1]], dtype=torch.float64)


def mixture(w: torch.Tensor) -> torch.Tensor:
    parts = [math.log(s) + normal(sd).log_prob(w) for s, sd in ((0.25, 1.0), (0.75, 0.05))]
    return torch.stack(parts).logsumexp(0)


def spiked(w: torch.Tensor) -> torch.Tensor:
    slab = math.log(0.25) + normal(1.0).log_prob(w)  # (0.25 * 4) ** -0.5
    return torch.where(w == 0, math.log(0.75), slab)


LAWS = {
    "fan-in": (None, normal(0.5).log_prob),
    "isotropic": (nn.isotropic(0.1), normal(0.1).log_prob),
    "a distribution": (Normal(0.0, 0.2), normal(0.2).log_prob),
    "torch's distribution": (td.Normal(0.0, 0.2), normal(0.2).log_prob),
    "a function": (lambda n: Normal(0.0, 1.0 / n), normal(0.25).log_prob),
    "Laplace": (nn.laplace, laplace_law(8.0**-0.5).log_prob),
    "scale mixture": (nn.scale_mixture(2.0, 0.1, share=0.25), mixture),
    "spike and slab": (nn.spike_slab(0.25), spiked),
}  # fmt: skip


@pytest.mark.parametrize("case", LAWS)
def test_density_is_the_formula(case):
    prior, expected = LAWS[case]
    graph = graph_of(prior)
    assert graph.variables["fc.weight"].plates == ("fc.out", "fc.in")
    torch.testing.assert_close(
        density(graph, "fc.weight", {"fc.weight": W}).expand(2, 4), expected(W)
    )


def test_laplace_prior_has_the_variance_of_the_normal_one():
    assert float(nn.laplace(7).variance) == pytest.approx(float(nn.fan_in(7).variance))


@pytest.mark.parametrize(("over", "units"), [("in", 4), ("out", 2)])
def test_a_gate_for_every_unit(over, units):
    graph = graph_of(nn.group_sparse(over=over, rate=0.25), bias=True)
    gate = graph.variables["fc.weight.on"]
    assert (gate.plates, gate.is_discrete) == ((f"fc.{over}",), True)
    assert graph.parents("fc.bias") == ()  # a bias is never switched off
    on = torch.ones(units, dtype=torch.float64)
    on[0] = 0.0
    found = density(graph, "fc.weight", {"fc.weight": W, "fc.weight.on": on})
    open_gate = (on[None, :] if over == "in" else on[:, None]).expand(2, 4).bool()
    slab = normal(1.0).log_prob(W)
    expected = torch.where(
        open_gate, torch.where(W == 0, -torch.inf, slab), torch.where(W == 0, 0.0, -torch.inf)
    )
    torch.testing.assert_close(found, expected)


def test_groups_are_a_structure_that_amp_takes():
    @model
    def selection():
        layer = nn.Linear(20, 1, name="fc", prior=nn.group_sparse(over="in", rate=0.2), bias=False)
        with plate("row"):
            observe("y", Normal(layer(given("x"))[0], 0.1))

    x = torch.randn(30, 20, dtype=torch.float64)
    w = torch.zeros(20, dtype=torch.float64)
    w[[2, 7, 11]] = torch.tensor([1.0, -1.5, 0.7], dtype=torch.float64)
    data = {"x": x, "y": x @ w}
    assert load("amp").supports(selection.graph(data)) == []
    posterior = infer(selection, data, method="amp", seed=0)
    torch.testing.assert_close(posterior.mean("fc.weight")[0], w, atol=0.15, rtol=0.0)


def test_a_scale_for_every_unit():
    graph = graph_of(nn.group_scale(over="in", law=HalfNormal(1.0)))
    assert graph.variables["fc.weight.scale"].plates == ("fc.in",)
    scale = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    found = density(graph, "fc.weight", {"fc.weight": W, "fc.weight.scale": scale})
    torch.testing.assert_close(found, td.Normal(0.0, scale / 2).log_prob(W))  # fmt: skip


def test_groups_need_units():
    with pytest.raises(ModelError, match="has no plate of inputs and of outputs"):
        graph_of(None, bias=nn.group_sparse(over="in"))


def test_a_rate_that_is_learned():
    @model
    def learned():
        rate = param("rate", 0.3)
        layer = nn.Linear(4, 1, name="fc", prior=nn.spike_slab(rate), bias=False)
        with plate("row"):
            observe("y", Normal(layer(given("x"))[0], 1.0))

    graph = learned.graph({"x": torch.zeros(3, 4), "y": torch.zeros(3)})
    assert graph.parents("fc.weight") == ("rate",)
    slab = graph.factors["fc.weight"].law.family.slab
    assert float(slab.scale) == 0.5  # that of the dense layer


# ---- points and fixed weights ------------------------------------------------------------------


def test_a_point_starts_with_draws_that_depend_on_its_name_alone():
    before = torch.get_rng_state()
    first, second = (graph_of(nn.point(), 400, bias=True).variables for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    start = first["fc.weight"].initial
    assert (first["fc.weight"].role, tuple(start.shape)) == ("param", (2, 400))
    assert torch.equal(start, second["fc.weight"].initial)
    assert float(start.std()) == pytest.approx((2 / 400) ** 0.5, rel=0.1)
    assert torch.equal(first["fc.bias"].initial, torch.zeros(2, dtype=torch.float64))


def test_a_point_starts_where_it_is_told_to():
    graph = graph_of(nn.point(W, [1.0, 2.0]), bias=True)
    assert torch.equal(graph.variables["fc.weight"].initial, W)
    assert graph.variables["fc.bias"].initial.tolist() == [1.0, 2.0]


def test_points_are_learned():
    @model
    def line(prior=None):
        layer = nn.Linear(2, 1, name="fc", prior=prior, bias=nn.isotropic(1.0))
        with plate("row"):
            observe("y", Normal(layer(given("x"))[0], 0.5))

    x = torch.randn(40, 2, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0], dtype=torch.float64) + 0.5
    posterior = infer(
        line(prior=nn.point()), {"x": x, "y": y}, method="qem", seed=0, progress=False
    )
    expected = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    torch.testing.assert_close(posterior.mean("fc.weight"), expected, atol=0.02, rtol=0.0)


def test_fixed_weights_are_constants():
    graph = graph_of(nn.fixed(W, [1.0, 2.0]), bias=True)
    assert [v.name for v in graph.variables.values()] == ["noise", "x", "y"]
    (layer,) = nn.find_layers(graph)
    assert layer.weight.role == layer.bias.role == "constant"


@pytest.mark.parametrize(
    ("prior", "bias", "words"),
    [
        (nn.fixed(W.T), False, r"has shape \[2, 4\], got an array \[4, 2\].*\[outputs, inputs"),
        (nn.point(W.T), False, r"nn\.point: 'fc\.weight' has shape"),
        (nn.fixed(W), True, "'fc.bias' has no array.*bias=False"),
    ],
)
def test_arrays_that_do_not_fit(prior, bias, words):
    with pytest.raises(ModelError, match=words):
        graph_of(prior, bias=bias)


def test_a_bias_with_a_prior_of_its_own():
    graph = graph_of(nn.isotropic(0.1), bias=nn.point())
    assert graph.variables["fc.bias"].role == "param"
    assert graph.variables["fc.weight"].role == "latent"


def test_a_bayesian_norm_layer_has_a_scale_around_one():
    @model
    def normed(prior=None):
        layer = nn.LayerNorm(3, name="ln", prior=prior)
        with plate("row"):
            observe("y", Normal(layer(given("x")).sum(), 1.0))

    data = {"x": torch.zeros(2, 3), "y": torch.zeros(2)}
    laws = {f.name: f.law.family for f in normed(prior=nn.isotropic(0.1)).graph(data).densities}
    assert (float(laws["ln.weight"].loc), float(laws["ln.bias"].loc)) == (1.0, 0.0)
    with pytest.raises(ModelError, match="lies around 1"):
        normed(prior=HalfNormal(1.0)).graph(data)


# ---- prior predictive --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prior", [None, nn.laplace, nn.spike_slab(0.25), nn.group_sparse("in", 0.25)]
)
def test_prior_predictive_keeps_the_scale_of_its_inputs(prior):
    @model
    def wide():
        layer = nn.Linear(200, 1, name="fc", prior=prior, bias=False)
        with plate("row"):
            deterministic("f", layer(given("x"))[0])

    x = torch.ones(1, 200, dtype=torch.float64)
    f = wide.sample(4000, {"x": x}, seed=0)["f"]
    # standard error of a variance from 4000 draws: 2.2 % for a Normal, a little more for a mixture
    assert float(f.var()) == pytest.approx(1.0, abs=0.12)


def test_explain_names_the_methods_for_a_small_network():
    @model
    def small():
        scale = latent("scale", HalfNormal(1.0))
        layer = nn.Linear(1, 1, name="fc", prior=nn.isotropic(scale))
        with plate("row"):
            observe("y", Normal(layer(given("x"))[0].tanh(), 0.1))

    assert "qem" in explain(small, {"x": torch.zeros(2, 1), "y": torch.zeros(2)}).usable
