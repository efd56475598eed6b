"""Which latents are arrays of weights, why others are not, and the likelihood as a function with callables in it."""

from __future__ import annotations

import pytest
import torch

from ppl import (
    Bernoulli,
    HalfNormal,
    Normal,
    deterministic,
    factor,
    given,
    latent,
    model,
    nn,
    observe,
    plate,
)
from ppl.backend import Settings
from ppl.batches import batches_of
from ppl.graph import Ref
from ppl.inference.networks.products import Dense
from ppl.inference.networks.program import Program
from ppl.inference.networks.structure import find_network, is_network, reasons
from ppl.inference.particles.lanes import make_lanes
from ppl.lower import Compiler
from ppl.models.bnn import classifier, regression
from ppl.streams import Streams

X = torch.randn(5, 3, dtype=torch.float64)
DATA = {"x": X, "y": torch.randn(5, dtype=torch.float64)}


def roles(program, data=DATA, **binding):
    network = find_network(program.bind(data, **binding))
    return {a.name: a.role for a in network.arrays}, {a.name: a.why for a in network.arrays}


def test_a_bias_of_one_product_goes_with_it():
    found, _ = roles(regression(hidden=(4,)))
    assert found == {"fc1.weight": "weight", "fc1.bias": "bias", "fc2.weight": "weight", "fc2.bias": "bias"}  # fmt: skip


def test_weights_that_a_penalty_reads_are_drawn_as_a_whole():
    @model
    def penalised():
        layer = nn.Linear(3, 1, name="fc", bias=False)
        with plate("row"):
            observe("y", Normal(layer(given("x"))[0], 1.0))
        (weight,) = [v for v in layer.arrays() if v is not None]
        factor("small", -weight.square().sum())

    found, why = roles(penalised)
    assert found == {"fc.weight": "other"}
    assert "something else" in why["fc.weight"]


def test_reported_quantities_do_not_count_as_readers():
    @model
    def reported():
        layer = nn.Linear(3, 1, name="fc", bias=False)
        with plate("row"):
            observe("y", Normal(layer(given("x"))[0], 1.0))
        (weight,) = [v for v in layer.arrays() if v is not None]
        deterministic("size", weight.square().sum())

    assert roles(reported)[0] == {"fc.weight": "weight"}


def test_scales_of_priors_lifted_modules_norms_and_families_are_drawn_as_a_whole():
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))

    @model
    def lifted():
        scale = latent("scale", HalfNormal(1.0))
        net = nn.lift("net", module, prior=nn.isotropic(scale))
        with plate("row"):
            observe("y", Normal(net(given("x"))[0], 1.0))

    found, why = roles(lifted)
    assert set(found.values()) == {"other"}
    assert "lifted" in why["net.0.weight"] and "laws" in why["scale"]

    @model
    def family():
        with plate("user") as user:
            layer = nn.Linear(3, 1, name="fc")
        with plate("row", within=user):
            observe("y", Normal(layer(given("x"))[0], 1.0))

    found, why = roles(family, {**DATA, "user": [0, 1, 1, 0, 1]})
    assert set(found.values()) == {"other"} and "family" in why["fc.weight"]
    assert reasons(family.graph({**DATA, "user": [0, 1, 1, 0, 1]})) == []

    @model
    def normed():
        layer, norm = nn.Linear(3, 2, name="fc"), nn.LayerNorm(2, name="ln", prior=Normal(0.0, 0.1))
        with plate("row"):
            observe("y", Normal(norm(layer(given("x"))).sum(), 1.0))

    found, why = roles(normed)
    assert found["ln.weight"] == "other" and "scale or shift" in why["ln.weight"]
    assert found["fc.weight"] == "weight"


def test_reasons_name_what_does_not_fit():
    @model
    def local_noise():
        layer = nn.Linear(3, 1, name="fc")
        with plate("row"):
            shift = latent("shift", Normal(0.0, 1.0))
            observe("y", Normal(layer(given("x"))[0] + shift, 1.0))

    @model
    def gated():
        layer, gate = nn.Linear(3, 1, name="fc"), latent("gate", Bernoulli(0.5))
        with plate("row"):
            observe("y", Normal(gate * layer(given("x"))[0], 1.0))

    @model
    def plain():
        observe("y", Normal(latent("mu", Normal(0.0, 1.0)), 1.0))

    assert [r[0] for r in reasons(local_noise.graph(DATA))] == ["shift"]
    assert [r[0] for r in reasons(gated.graph(DATA))] == ["gate"]
    assert "no layer" in reasons(plain.graph())[0][1] and not is_network(plain.graph())


def dense_callables(network, values):
    """Products at one assignment of all latents."""

    def made(node):
        product, weight = Dense(node), values[network.arrays[node.weight].name].reshape(-1)
        bias = None if node.bias is None else values[network.arrays[node.bias].name]

        def run(x, *more):
            y = product(weight, x)
            for b in (*more, *([] if bias is None else [bias])):
                y = y + b[(..., *(None,) * (-1 - node.channel))]
            return y

        return run

    return {p.source: made(p) for p in network.products}


@pytest.mark.parametrize("net", ["mlp", "lenet"])
def test_the_program_is_the_log_likelihood_of_the_model(net):
    x = torch.randn(6, 1, 12, 12, dtype=torch.float64)
    data = {"x": x, "label": torch.arange(6) % 3}
    bound = classifier(net=net, hidden=(4,), classes=3).bind(data)
    network = find_network(bound)
    generator = torch.Generator().manual_seed(0)
    values = {
        a.name: 0.1 * torch.randn(a.shape, generator=generator, dtype=torch.float64)
        for a in network.arrays
    }
    lanes = make_lanes(bound, 1, 4)
    joint = lanes.log_joint({n: v[None] for n, v in values.items()})
    laws = sum(bound.graph.factors[n].law.family.log_prob(v).sum() for n, v in values.items())
    functions = dense_callables(network, values)
    assert torch.allclose(Program(bound, network)(functions), joint[0] - laws)
    batches = batches_of(bound, {"image": 4}, Streams(0))
    program = Program(bound, network, "image")
    parts = [program(functions, batches.part(i)) for i in range(batches.parts)]
    assert torch.allclose(torch.stack(parts).mean(), joint[0] - laws)


def test_a_plate_within_the_divided_one_comes_along():
    @model
    def nested():
        layer = nn.Linear(3, 1, name="fc", bias=False)
        offset = latent("offset", Normal(0.0, 1.0))
        with plate("user") as user:
            base = given("base")
        with plate("row", within=user):
            observe("y", Normal(layer(given("x"))[0] + base + offset, 1.0))

    data = {**DATA, "user": [0, 1, 1, 0, 2], "base": [0.5, -1.0, 2.0]}
    bound = nested.bind(data)
    network = find_network(bound)
    assert {a.name: a.role for a in network.arrays} == {"fc.weight": "weight", "offset": "other"}
    values = {"fc.weight": torch.ones(1, 3).double(), "offset": torch.tensor(0.3).double()}
    functions = {**dense_callables(network, values), "offset": values["offset"]}
    base = torch.tensor([0.5, -1.0, -1.0, 0.5, 2.0]).double()
    law = torch.distributions.Normal(X.sum(1) + base + 0.3, 1.0)
    whole = law.log_prob(DATA["y"]).sum()
    assert torch.allclose(Program(bound, network)(functions), whole)
    batches = batches_of(bound, {"user": 2}, Streams(0))
    program = Program(bound, network, "user")
    parts = [program(functions, batches.part(i)) for i in range(batches.parts)]
    assert torch.allclose(torch.stack(parts).mean(), whole)


def test_missing_entries_and_factors_outside_the_data_count_once():
    @model
    def partial():
        layer = nn.Linear(3, 1, name="fc", bias=False)
        offset = latent("offset", Normal(0.0, 1.0))
        observe("total", Normal(offset, 0.1))
        with plate("row"):
            observe("y", Normal(layer(given("x"))[0] + offset, 1.0))

    y = DATA["y"].clone()
    y[1] = torch.nan
    bound = partial.bind({"x": X, "y": y, "total": 0.2})
    network = find_network(bound)
    values = {"fc.weight": torch.ones(1, 3).double(), "offset": torch.tensor(0.3).double()}
    functions = {**dense_callables(network, values), "offset": values["offset"]}
    rows = torch.distributions.Normal(X.sum(1) + 0.3, 1.0).log_prob(DATA["y"])
    whole = rows[torch.tensor([0, 2, 3, 4])].sum()
    whole = whole + torch.distributions.Normal(0.3, 0.1).log_prob(torch.tensor(0.2).double())
    assert torch.allclose(Program(bound, network)(functions), whole)
    batches = batches_of(bound, {"row": 2}, Streams(0))
    program = Program(bound, network, "row")
    parts = [program(functions, batches.part(i)) for i in range(batches.parts)]
    assert torch.allclose(torch.stack(parts).mean(), whole)


def test_a_node_can_be_computed_by_a_function_given_at_run_time():
    graph = classifier(hidden=(4,)).graph({"x": X, "label": [0, 1, 2, 3, 4]})
    node = next(n for n in graph.nodes if n.name == "linear")
    (source,) = [i for i in node.operands() if graph.nodes[i].plates]
    axes = {v.name: v.plates for v in graph.variables.values()}
    compiler = Compiler(graph, axes, tuple(graph.plates), replaced={node.id: ("f", (source,))})
    lowered = compiler.finish([compiler.operand(Ref(node.id))])
    seen = []

    def function(x):
        seen.append(x.shape)
        return x.new_ones(5, 4)

    (found,) = lowered({"x": X, "f": function})
    assert lowered.axes == (("image",),) and found.shape == (5, 4) and seen == [(5, 3)]


def test_the_rows_of_a_batch_are_read_and_nothing_else(monkeypatch):
    bound = regression(hidden=(4,)).bind(DATA)
    network = find_network(bound)
    program = Program(bound, network, "row")
    batches = batches_of(bound, {"row": 2}, Streams(0))
    calls = []
    original = Program._lower
    monkeypatch.setattr(Program, "_lower", lambda self, s: calls.append(s) or original(self, s))
    for i in range(6):
        program.terms(batches.at(i))
    assert len(calls) == 2  # parts of 1 and of 2 rows
    assert Settings(Streams(0)).minibatch is None
