"""Lifted torch modules: one opaque node, its value against the module's, particles, families, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ppl import (
    ModelError,
    Normal,
    UnsupportedError,
    deterministic,
    explain,
    given,
    infer,
    model,
    nn,
    observe,
    plate,
)
from ppl.lower import Compiler, map_name


class Scaled(torch.nn.Module):
    """A module of a user's own, with a buffer, a batch norm and two parameters of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.register_buffer("shift", torch.tensor([1.0, -1.0, 0.5, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x) + self.shift).relu() @ self.first.weight


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = torch.nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, x, x)[0]


MODULES: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh()), (4,)),
    "a user's own": (lambda: Scaled().eval(), (4,)),
    "lstm": (lambda: torch.nn.LSTM(4, 3, num_layers=2, batch_first=True), (5, 4)),
    "gru": (lambda: torch.nn.GRU(4, 3, batch_first=True, bidirectional=True), (5, 4)),
    "attention": (Attention, (5, 4)),
    "attention in eval mode": (lambda: Attention().eval(), (5, 4)),
    "encoder": (lambda: torch.nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), (5, 4)),
    "convolution": (lambda: torch.nn.Conv2d(2, 3, 3), (2, 5, 5)),
}  # fmt: skip


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


@model
def applied(module: Any = None, prior: Any = None, batched: bool = True):
    net = nn.lift("net", module, prior=prior, batched=batched)
    with plate("row"):
        deterministic("out", first(net(given("x"))))


def lowered(graph: Any, arrays: dict[str, Tensor], sampled: bool, **options: Any) -> Tensor:
    own = {v.name for v in graph.role("latent")} if sampled else set()
    axes = {v.name: (("k",) if v.name in own else ()) + v.plates for v in graph.variables.values()}
    c = Compiler(graph, axes, ["k", *graph.plates], **options)
    out = c.operand(graph.factors["out"].value)
    assert out.axes == (("k", "row") if sampled else ("row",))
    run = c.finish([out])
    return run({k: arrays[k] for k in run.inputs})[0]


def parameters(module: torch.nn.Module) -> dict[str, Tensor]:
    return {f"net.{n}": p.detach() for n, p in module.named_parameters()}


@pytest.mark.parametrize("case", MODULES)
def test_a_lifted_module_is_the_module(case):
    make, shape = MODULES[case]
    module = make().double()
    x = torch.randn(6, *shape, dtype=torch.float64)
    graph = applied(module=module).graph({"x": x})
    assert [n.name for n in graph.nodes if n.op == "call"] == ["nn.lift('net')"]
    assert {v.name: v.event_shape for v in graph.latents} == {
        k: tuple(v.shape) for k, v in parameters(module).items()
    }
    found = lowered(graph, {"x": x, **parameters(module)}, sampled=False)
    torch.testing.assert_close(found, first(module(x)).detach())


@pytest.mark.parametrize("case", MODULES)
def test_a_lifted_module_under_particles_is_that_of_each(case):
    make, shape = MODULES[case]
    modules = [make().double() for _ in range(3)]
    x = torch.randn(4, *shape, dtype=torch.float64)
    graph = applied(module=modules[0]).graph({"x": x})
    stacked = {k: torch.stack([parameters(m)[k] for m in modules]) for k in parameters(modules[0])}
    found = lowered(graph, {"x": x, **stacked}, sampled=True)
    expected = torch.stack([first(m(x)).detach() for m in modules])
    torch.testing.assert_close(found, expected)


def test_gradients_reach_the_weights_of_particles():
    module = torch.nn.GRU(4, 3, batch_first=True).double()
    x = torch.randn(4, 5, 4, dtype=torch.float64)
    graph = applied(module=module).graph({"x": x})
    w = {k: torch.stack([v, 0.5 * v]).requires_grad_() for k, v in parameters(module).items()}
    lowered(graph, {"x": x, **w}, sampled=True).square().sum().backward()
    module(x)[0].square().sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(w[f"net.{name}"].grad[0], p.grad)


def test_a_module_of_one_element():
    class Centred(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.w * (x - x.mean())

    x = torch.randn(4, 3, dtype=torch.float64)
    graph = applied(module=Centred(), batched=False).graph({"x": x})
    w = torch.randn(2, 3, dtype=torch.float64)
    found = lowered(graph, {"x": x, "net.w": w}, sampled=True)
    torch.testing.assert_close(found, w[:, None] * (x - x.mean(-1, keepdim=True)))


def test_several_results_and_inputs():
    class Pair(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = torch.nn.Linear(2, 2)

        def forward(self, a: Tensor, b: Tensor, sign: float = 1.0) -> dict[str, Tensor]:
            return {"sum": self.lin(a) + sign * b, "square": b.square()}

    module = Pair().double()

    @model
    def both():
        net = nn.lift("net", module, prior=nn.fixed())
        shift = given("shift")
        with plate("row"):
            out = net(given("x"), shift, sign=-1.0)
            deterministic("out", out["sum"])
            deterministic("square", out["square"])

    x = torch.randn(3, 2, dtype=torch.float64)
    graph = both.graph({"x": x, "shift": torch.tensor([1.0, 2.0])})
    shift = torch.tensor([1.0, 2.0], dtype=torch.float64)
    found = lowered(graph, {"x": x, "shift": shift}, sampled=False)
    torch.testing.assert_close(found, module(x, shift, sign=-1.0)["sum"].detach())


def test_a_family_of_lifted_modules():
    module = torch.nn.Linear(2, 1).double()

    @model
    def family():
        user = plate("user")
        row = plate("row", within=user)
        net = nn.lift("net", module, plates=(user,))
        with row:
            deterministic("out", net(given("x")))

    user = torch.tensor([0, 1, 1])
    x = torch.randn(3, 2, dtype=torch.float64)
    graph = family.graph({"x": x, "user": user})
    assert graph.variables["net.weight"].plates == ("user",)
    c = Compiler(graph, {v.name: v.plates for v in graph.variables.values()}, list(graph.plates))
    run = c.finish([c.operand(graph.factors["out"].value)])
    w, b = torch.randn(2, 1, 2, dtype=torch.float64), torch.randn(2, 1, dtype=torch.float64)
    known = {"x": x, map_name("row", "user"): user, "net.weight": w, "net.bias": b}
    found = run({k: known[k] for k in run.inputs})[0]
    torch.testing.assert_close(found, torch.einsum("roi,ri->ro", w[user], x) + b[user])


def test_scales_of_laws_follow_the_inputs_of_each_matrix():
    module = torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.LayerNorm(9))
    laws = {
        f.name: f.law.family
        for f in applied(module=module).graph({"x": torch.zeros(2, 4)}).densities
    }
    scales = {k: (float(v.loc), float(v.scale)) for k, v in laws.items()}
    assert scales == {
        "net.0.weight": (0.0, 0.5),
        "net.0.bias": (0.0, 0.5),
        "net.1.weight": (1.0, 1.0),
        "net.1.bias": (0.0, 1.0),
    }


def test_priors_by_pattern():
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
    priors = {"1.*": nn.isotropic(0.1), "0.weight": nn.fixed(), "*": nn.point()}
    graph = applied(module=module, prior=priors).graph({"x": torch.zeros(2, 4)})
    roles = {v.name: v.role for v in graph.variables.values() if v.name != "x"}
    assert roles == {"net.0.bias": "param", "net.1.weight": "latent", "net.1.bias": "latent"}
    start = graph.variables["net.0.bias"].initial
    torch.testing.assert_close(start, module[0].bias.detach().double())
    (layer,) = nn.find_layers(graph)
    assert (layer.kind, layer.name, layer.arrays["0.weight"].role) == ("lift", "net", "constant")
    with pytest.raises(ModelError, match=r"no parameter is called 'head\.\*'"):
        applied(module=module, prior={"head.*": nn.point()}).graph({"x": torch.zeros(2, 4)})


@model
def regression():
    net = nn.lift("net", torch.nn.Linear(1, 1), prior=nn.isotropic(1.0))
    with plate("row"):
        observe("y", Normal(net(given("x"))[0], 0.5))


def test_prior_predictive():
    x = torch.ones(2, 1, dtype=torch.float64)
    y = regression.sample(4000, {"x": x}, seed=0)["y"]
    # 1 + 1 + 0.25; the standard error of a variance from 4000 draws is 0.05
    assert float(y[:, 0].var()) == pytest.approx(2.25, abs=0.25)


def test_particles_fit_a_lifted_module():
    x = torch.linspace(-1.0, 1.0, 10, dtype=torch.float64)[:, None]
    y = 1.5 * x[:, 0] - 0.5
    posterior = infer(regression, {"x": x, "y": y}, method="qem", seed=0, progress=False)
    design = torch.cat([x, torch.ones_like(x)], 1)
    precision = design.T @ design / 0.25 + torch.eye(2, dtype=torch.float64)
    expected = torch.linalg.solve(precision, design.T @ y / 0.25)
    found = torch.cat([posterior.mean("net.weight").flatten(), posterior.mean("net.bias")])
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.0)


@pytest.mark.parametrize("method", ["gbp", "laplace", "amp"])
def test_methods_that_look_inside_refuse_it_by_name(method):
    data = {"x": torch.zeros(3, 1), "y": torch.zeros(3)}
    with pytest.raises(UnsupportedError, match=r"nn\.lift\('net'\).*one function.*look into"):
        infer(regression, data, method=method)
    assert method not in explain(regression, data).usable


REFUSED: dict[str, tuple[Callable[[], Any], tuple[int, ...], str]] = {
    "batch norm in training": (lambda: Scaled(), (4,), r"'norm' is a batch norm in training.*module\.eval\(\)"),
    "dropout in training": (lambda: torch.nn.Dropout(0.1), (4,), r"drops out entries.*module\.eval\(\)"),
    "a recurrent module over the wrong axis": (lambda: torch.nn.LSTM(4, 3), (5, 4), "batch_first=True"),
    "attention over the wrong axis": (lambda: torch.nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), (5, 4),
                                      "batch_first=True"),
    "an input of the wrong size": (lambda: torch.nn.Linear(3, 1), (4,), "failed on inputs of shape"),
    "no module": (lambda: torch.sin, (4,), "expected a torch.nn.Module"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_module_that_no_model_can_hold(case):
    make, shape, words = REFUSED[case]
    with pytest.raises(ModelError, match=words) as error:
        applied(module=make()).graph({"x": torch.randn(2, *shape)})
    assert error.value.where.file == __file__
