"""A matrix of weights times a vector is one kind of node, however it is written."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from ppl import Normal, given, infer, latent, model, nn, observe, param, plate
from ppl.lower import Compiler
from ppl.plates import collect

WAYS = {
    "x @ w.T": lambda x, w: x @ w.T,
    "x @ w.mT": lambda x, w: x @ w.mT,
    "x @ w.t()": lambda x, w: x @ w.t(),
    "x @ w.transpose(0, 1)": lambda x, w: x @ w.transpose(0, 1),
    "x @ w.transpose(-2, -1)": lambda x, w: x @ w.transpose(-2, -1),
    "torch.matmul(x, w.T)": lambda x, w: torch.matmul(x, w.T),
    "w @ x": lambda x, w: w @ x,
    "torch.mv(w, x)": lambda x, w: torch.mv(w, x),
    "linear(x, w)": functional.linear,
}


@model
def line(way: str = "x @ w.T", learned: bool = False):
    w = param("w", torch.ones(3, 2)) if learned else latent("w", Normal(0.0, 1.0), shape=(3, 2))
    with plate("row"):
        observe("y", Normal(WAYS[way](given("x"), w), 1.0))


def data(rows: int = 4) -> dict[str, torch.Tensor]:
    return {
        "x": torch.randn(rows, 2, dtype=torch.float64),
        "y": torch.randn(rows, 3, dtype=torch.float64),
    }


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_the_node_of_a_layer(way, learned):
    graph = line(way=way, learned=learned).graph(data())
    (layer,) = nn.find_layers(graph)
    assert (layer.kind, layer.name, layer.plates) == ("linear", "w", ("row",))
    assert (layer.weight.variable, layer.weight.units, layer.weight.shape) == ("w", (), (3, 2))
    node = graph.nodes[layer.node]
    assert [graph.nodes[i].name for i in node.operands()] == ["x", "w"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rules", ["all", "vmap"])
def test_every_way_has_the_value_of_the_product(way, rules):
    known = data()
    graph = line(way=way).graph(known)
    axes = {
        v.name: ("k", *v.plates) if v.name == "w" else v.plates for v in graph.variables.values()
    }
    c = Compiler(graph, axes, ["k", "row"], rules=rules)
    run = c.finish([c.operand(graph.factors["y"].law.arguments[0])])
    w = torch.randn(5, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(run({"x": known["x"], "w": w})[0], known["x"] @ w.mT)


def test_weights_in_plates_count_too():
    @model
    def collected():
        rows, columns = plate("out", 3), plate("in", 2)
        with rows, columns:
            w = latent("w", Normal(0.0, 1.0))
        with plate("row"):
            observe("y", Normal(given("x") @ collect(w, over=(rows, columns)).T, 1.0))

    (layer,) = nn.find_layers(collected.graph(data()))
    assert layer.weight.units == ("out", "in")


def test_products_of_data_stay_as_they_are():
    @model
    def sensing():
        x = latent("x", Normal(0.0, 1.0), shape=2)
        observe("y", Normal(given("A") @ x, 0.1))

    graph = sensing.graph({"A": torch.randn(4, 2), "y": torch.zeros(4)})
    assert "linear" not in [n.name for n in graph.nodes]
    assert nn.find_layers(graph) == ()


def test_a_products_posterior_is_that_of_the_layer():
    @model
    def layered():
        layer = nn.Linear(2, 3, name="fc", bias=False, prior=nn.isotropic(1.0))
        with plate("row"):
            observe("y", Normal(layer(given("x")), 1.0))

    known = data()
    ours = infer(layered, known, method="laplace").mean("fc.weight")
    torch.testing.assert_close(infer(line, known, method="laplace").mean("w"), ours)
