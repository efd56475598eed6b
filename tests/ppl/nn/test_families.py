"""Where weights lie: one network for all elements, or a family with one for each element of a plate."""

from __future__ import annotations

import pytest
import torch

from ppl import ModelError, Normal, deterministic, given, infer, latent, model, nn, observe, plate
from ppl.lower import Compiler, map_name


def data(rows: int = 5) -> dict[str, torch.Tensor]:
    return {
        "x": torch.randn(rows, 2, dtype=torch.float64),
        "y": torch.randn(rows, dtype=torch.float64),
        "user": torch.tensor([0, 1, 2, 1, 0]),
    }


@model
def family(explicit: bool = False):
    user = plate("user")
    row = plate("row", within=user)
    if explicit:
        net = nn.MLP(2, 3, 1, activation=nn.Tanh(), plates=(user,))
    else:
        with user:
            net = nn.MLP(2, 3, 1, activation=nn.Tanh())
    with row:
        deterministic("mean", net(given("x"))[0])


@pytest.mark.parametrize("explicit", [False, True])
def test_a_network_that_is_built_in_a_plate_is_one_for_each_element(explicit):
    known = data()
    graph = family(explicit=explicit).graph(known)
    assert graph.variables["fc1.weight"].plates == ("user", "fc1.out", "fc1.in")
    assert graph.variables["fc1.bias"].plates == ("user", "fc1.out")
    layer = nn.find_layers(graph)[0]
    assert (layer.plates, layer.weight.around, layer.weight.shape) == (("row",), ("user",), (3, 2))
    w = {
        v.name: torch.randn(4, *(graph.plates[p].size for p in v.plates), dtype=torch.float64)
        for v in graph.latents
    }
    axes = {v.name: v.plates if v.role == "given" else ("k", *v.plates) for v in graph.variables.values()}  # fmt: skip
    c = Compiler(graph, axes, ["k", *graph.plates])
    out = c.operand(graph.factors["mean"].value)
    found = c.finish([out])({"x": known["x"], map_name("row", "user"): known["user"], **w})[0]
    u = known["user"]
    hidden = torch.einsum("kroi,ri->kro", w["fc1.weight"][:, u], known["x"]) + w["fc1.bias"][:, u]
    expected = (w["fc2.weight"][:, u, 0] * hidden.tanh()).sum(-1) + w["fc2.bias"][:, u, 0]
    assert out.axes == ("k", "row")
    torch.testing.assert_close(found, expected)


def test_a_network_that_is_built_outside_is_one_for_all():
    @model
    def shared():
        user = plate("user")
        row = plate("row", within=user)
        net = nn.Linear(2, 1, name="fc")
        with user, row:
            observe("y", Normal(net(given("x"))[0], 1.0))

    assert shared.graph(data()).variables["fc.weight"].plates == ("fc.out", "fc.in")


def test_a_scale_of_the_users_own_above_the_weights_of_each():
    @model
    def hierarchical():
        user = plate("user")
        row = plate("row", within=user)
        with user:
            spread = latent("spread", Normal(0.0, 1.0)).exp()
            net = nn.Linear(2, 1, name="fc", prior=nn.isotropic(spread))
        with row:
            observe("y", Normal(net(given("x"))[0], 1.0))

    graph = hierarchical.graph(data())
    assert graph.parents("fc.weight") == ("spread",)
    assert graph.variables["fc.weight"].plates == ("user", "fc.out", "fc.in")


def test_points_and_fixed_weights_of_a_family():
    @model
    def mixed():
        user = plate("user")
        row = plate("row", within=user)
        with user:
            first = nn.Linear(2, 2, name="a", prior=nn.point())
            second = nn.Linear(2, 1, name="b", prior=nn.fixed([[1.0, 2.0]]), bias=False)
        with row:
            observe("y", Normal(second(first(given("x")))[0], 1.0))

    known = data()
    graph = mixed.graph(known)
    assert graph.variables["a.weight"].plates == ("user", "a.out", "a.in")
    a, b = nn.find_layers(graph)
    assert (a.weight.role, b.weight.role, b.weight.around) == ("param", "constant", ())
    assert mixed.sample(3, known, seed=0)["y"].shape == (3, 5)


def test_regressions_of_a_family_are_those_of_each_user():
    @model
    def lines():
        user = plate("user")
        row = plate("row", within=user)
        with user:
            net = nn.Linear(2, 1, name="fc", prior=nn.isotropic(1.0), bias=False)
        with row:
            observe("y", Normal(net(given("x"))[0], 0.5))

    known = data()
    posterior = infer(lines, known, method="laplace")
    for u in range(3):
        x, y = (known[k][known["user"] == u] for k in ("x", "y"))
        precision = x.T @ x / 0.25 + torch.eye(2, dtype=torch.float64)
        expected = torch.linalg.solve(precision, x.T @ y / 0.25)
        torch.testing.assert_close(posterior.mean("fc.weight")[u, 0], expected)


def test_a_network_that_is_built_and_called_in_one_plate_is_asked_about():
    @model
    def unclear():
        with plate("row"):
            observe("y", Normal(nn.Linear(2, 1, name="fc")(given("x"))[0], 1.0))

    known = {k: v for k, v in data().items() if k != "user"}
    with pytest.raises(
        ModelError, match=r"one network for every element of it, or one for all\?"
    ) as e:
        unclear.graph(known)
    assert e.value.where.file == __file__


@pytest.mark.parametrize("each", [False, True])
def test_a_network_that_is_built_and_called_in_one_plate_says_which(each):
    @model
    def clear():
        row = plate("row")
        with row:
            layer = nn.Linear(2, 1, name="fc", plates=(row,) if each else ())
            observe("y", Normal(layer(given("x"))[0], 1.0))

    known = {k: v for k, v in data().items() if k != "user"}
    expected = ("row", "fc.out", "fc.in") if each else ("fc.out", "fc.in")
    assert clear.graph(known).variables["fc.weight"].plates == expected


def test_a_plate_that_the_model_lacks():
    layer = nn.Linear(2, 1, name="fc", plates=("user",))

    @model
    def lacking():
        with plate("row"):
            observe("y", Normal(layer(given("x"))[0], 1.0))

    with pytest.raises(ModelError, match="there is no plate 'user'"):
        lacking.graph({"x": torch.zeros(3, 2), "y": torch.zeros(3)})


def test_a_batch_norm_that_is_built_in_a_plate():
    @model
    def wrong():
        with plate("row"):
            observe("y", Normal(nn.BatchNorm(2, name="bn")(given("x")).sum(), 1.0))

    with pytest.raises(ModelError, match=r"cannot be a family.*plates=\(\)"):
        wrong.graph({"x": torch.zeros(3, 2), "y": torch.zeros(3)})
