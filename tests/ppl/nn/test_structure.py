"""What methods for networks read off a graph: layers, weights, data plate, buffers; and who refuses batch norms."""

from __future__ import annotations

import pytest
import torch

from ppl import (
    Categorical,
    Normal,
    UnsupportedError,
    explain,
    given,
    infer,
    model,
    nn,
    observe,
    plate,
    scope,
)
from ppl.graph import Ref
from ppl.lower import Compiler


@model
def convolutional():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, name="c1", bias=nn.point()),
        nn.BatchNorm(2, name="bn"),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 3, name="fc"),
    )
    with plate("image"):
        observe("label", Categorical(logits=net(given("x"))))


def images() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(5, 1, 6, 6, dtype=torch.float64), "label": torch.arange(5) % 3}


def test_layers_in_the_order_of_evaluation():
    graph = convolutional.graph(images())
    c1, bn, fc = nn.find_layers(graph)
    assert [f.kind for f in (c1, bn, fc)] == ["conv2d", "batch_norm", "linear"]
    assert [f.name for f in (c1, bn, fc)] == ["c1", "bn", "fc"]
    assert (c1.weight.role, c1.weight.units, c1.weight.shape) == ("latent", ("c1.out", "c1.in"), (2, 1, 3, 3))  # fmt: skip
    assert (c1.bias.role, c1.bias.variable) == ("param", "c1.bias")
    assert graph.nodes[c1.weight.node].op == "collect"
    assert {k: (w.role, w.variable) for k, w in bn.arrays.items()} == {
        "mean": ("given", "bn.mean"),
        "variance": ("given", "bn.variance"),
        "weight": ("param", "bn.weight"),
        "bias": ("param", "bn.bias"),
    }
    assert graph.nodes[c1.inputs[0]].name == "x" and bn.inputs == (c1.node,)
    assert c1.multiplications == 2 * 1 * 9 * 16 and fc.multiplications == 96


def test_data_plate_and_its_size():
    graph = convolutional.graph(images())
    assert nn.data_plates(graph) == ("image",)
    assert nn.examples(graph) == 5
    assert nn.buffers(graph) == (("bn.mean", "bn.variance"),)


def test_a_weight_that_is_used_twice_is_found_twice():
    layer = nn.Linear(2, 2, name="fc")

    @model
    def recurrent():
        with plate("row"):
            observe("y", Normal(layer(torch.tanh(layer(given("x")))), 1.0))

    first, second = nn.find_layers(
        recurrent.graph({"x": torch.zeros(3, 2), "y": torch.zeros(3, 2)})
    )
    assert first.weight == second.weight and first.node != second.node


def test_names_carry_scopes():
    @model
    def inner():
        layer = nn.BatchNorm(2, name="bn")
        with scope("left"), plate("row"):
            observe("y", Normal(layer(given("x")).sum(), 1.0))

    graph = inner.graph({"left.x": torch.zeros(3, 2), "left.y": torch.zeros(3)})
    assert nn.buffers(graph) == (("left.bn.mean", "left.bn.variance"),)
    assert nn.find_layers(graph)[0].name == "left.bn"


def test_statistics_of_a_batch_for_a_method_that_keeps_them():
    known = images()
    graph = convolutional.graph(known)
    bn = nn.find_layers(graph)[1]
    c = Compiler(graph, {v.name: v.plates for v in graph.variables.values()}, list(graph.plates), training=True)  # fmt: skip
    x = c.operand(Ref(bn.inputs[0]))
    dims = tuple(i - len(x.axes) - x.event_ndim for i, a in enumerate(x.axes) if a in bn.plates)
    run = c.finish([x])
    w = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    arrays = {"x": known["x"], "c1.weight": w, "c1.bias": torch.zeros(2, dtype=torch.float64)}
    activations = run({k: arrays[k] for k in run.inputs})[0]
    mean, variance = graph.nodes[bn.node].func.statistics(activations, dims)
    torch.testing.assert_close(mean.flatten(), activations.mean((0, 2, 3)))
    torch.testing.assert_close(variance.flatten(), activations.var((0, 2, 3), correction=0))


@model
def normed():
    net = nn.Sequential(nn.Linear(2, 2, name="fc"), nn.BatchNorm(2, name="bn", affine=False))
    with plate("row"):
        observe("y", Normal(net(given("x")).sum(), 0.5))


def test_a_batch_norm_is_refused_by_name():
    data = {"x": torch.randn(6, 2, dtype=torch.float64), "y": torch.zeros(6)}
    with pytest.raises(
        UnsupportedError, match=r"'bn': is a batch norm.*nn\.FRN.*'bn\.mean' and 'bn\.variance'"
    ):
        infer(normed, data, method="qem")
    assert "qem" not in explain(normed, data).usable


def test_a_batch_norm_with_statistics_in_the_data_is_a_layer_like_any_other():
    data = {
        "x": torch.randn(6, 2, dtype=torch.float64),
        "y": torch.zeros(6),
        "bn.mean": torch.tensor([1.0, 2.0]),
        "bn.variance": torch.tensor([4.0, 1.0]),
    }
    assert {"qem", "laplace"} <= set(explain(normed, data).usable)
    graph = normed.graph(data)
    axes = {v.name: v.plates for v in graph.variables.values()}
    c = Compiler(graph, axes, list(graph.plates))
    run = c.finish([c.operand(graph.factors["y"].law.arguments[0])])
    w, b = torch.randn(2, 2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    known = {**{k: v.double() for k, v in data.items()}, "fc.weight": w, "fc.bias": b}
    found = run({k: known[k] for k in run.inputs})[0]
    hidden = data["x"] @ w.T + b
    expected = (hidden[:, 0] - 1.0) / (4.0 + 1e-5) ** 0.5 + (hidden[:, 1] - 2.0) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(found, expected)


def test_a_batch_of_one_has_no_variance():
    graph = normed.graph({"x": torch.zeros(2, 2), "y": torch.zeros(2)})
    func = next(n.func for n in graph.nodes if n.name == "batch_norm")
    with pytest.raises(UnsupportedError, match="has no variance"):
        func.statistics(torch.zeros(1, 2), (-2,))
