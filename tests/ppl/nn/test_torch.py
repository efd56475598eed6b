"""Every layer against the torch module of its kind with the same weights, through the lowered function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from ppl import Categorical, deterministic, given, model, nn, observe, plate
from ppl.lower import Compiler


@model
def applied(net: Callable[[Any], Any]):
    with plate("row"):
        deterministic("out", net(given("x")))


def lowered(
    graph: Any, arrays: Mapping[str, Tensor], sampled: tuple[str, ...] = (), **options: Any
) -> Tensor:
    """The value of ``out``; ``sampled`` are variables with a particle axis ``k`` in front."""
    axes = {
        v.name: (("k",) if v.name in sampled else ()) + v.plates for v in graph.variables.values()
    }
    dtype = next(iter(arrays.values())).dtype
    compiler = Compiler(graph, axes, ["k", *graph.plates], dtype=dtype, **options)
    out = compiler.operand(graph.factors["out"].value)
    want = ("k", "row") if sampled else ("row",)
    assert out.axes == want
    run = compiler.finish([out])
    return run({k: arrays[k] for k in run.inputs})[0]


def weights_of(module: torch.nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Arrays of a torch module under the names of our sites."""
    known = {"running_mean": "mean", "running_var": "variance"}
    found = {}
    for name, value in module.state_dict().items():
        head, _, last = name.rpartition(".")
        full = ".".join(p for p in (prefix, head, known.get(last, last)) if p)
        found[full] = value.detach()
    return found


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """The module in double precision, with statistics and affine parts that are not the neutral ones."""
    module = module.double().eval()
    for name, value in module.state_dict().items():
        if value.is_floating_point() and value.ndim == 1:
            value.copy_(torch.rand_like(value) + 0.5)
        elif value.is_floating_point() and "weight" in name:
            value.copy_(torch.randn_like(value) * value[0].numel() ** -0.5)
    return module


LAYERS = {
    "linear": (nn.Linear(4, 3, name="l"), torch.nn.Linear(4, 3), (4,)),
    "linear without bias": (nn.Linear(4, 3, name="l", bias=False), torch.nn.Linear(4, 3, bias=False), (4,)),
    "linear of rows": (nn.Linear(4, 3, name="l"), torch.nn.Linear(4, 3), (5, 4)),
    "conv1d": (nn.Conv1d(2, 3, 3, name="l", stride=2, padding=1), torch.nn.Conv1d(2, 3, 3, 2, 1), (2, 9)),
    "conv2d": (nn.Conv2d(2, 3, (3, 2), name="l", stride=(1, 2), padding=(0, 1)),
               torch.nn.Conv2d(2, 3, (3, 2), (1, 2), (0, 1)), (2, 6, 7)),
    "group norm": (nn.GroupNorm(6, groups=3, name="l"), torch.nn.GroupNorm(3, 6), (6, 4, 5)),
    "layer norm": (nn.LayerNorm(5, name="l"), torch.nn.LayerNorm(5), (5,)),
    "layer norm of rows": (nn.LayerNorm(5, name="l"), torch.nn.LayerNorm(5), (3, 5)),
    "batch norm": (nn.BatchNorm(3, name="l"), torch.nn.BatchNorm1d(3), (3,)),
    "batch norm of images": (nn.BatchNorm(3, name="l"), torch.nn.BatchNorm2d(3), (3, 4, 5)),
    "batch norm alone": (nn.BatchNorm(3, name="l", affine=False), torch.nn.BatchNorm2d(3, affine=False), (3, 4, 5)),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("rules", ["all", "vmap"])
def test_a_layer_is_that_of_torch(case, rules):
    ours, theirs, shape = LAYERS[case]
    theirs = randomised(theirs)
    x = torch.randn(6, *shape, dtype=torch.float64)
    arrays = {"x": x, **weights_of(theirs, "l")}
    found = lowered(applied(ours).graph({"x": x}), arrays, rules=rules)
    torch.testing.assert_close(found, theirs(x).detach())


@pytest.mark.parametrize("case", [k for k in LAYERS if k != "batch norm alone"])
def test_a_layer_under_particles_is_that_of_each(case):
    ours, theirs, shape = LAYERS[case]
    x = torch.randn(6, *shape, dtype=torch.float64)
    graph = applied(ours).graph({"x": x})
    draws = [weights_of(randomised(theirs), "l") for _ in range(3)]
    draws = [{k: v.clone() for k, v in d.items() if k in graph.variables} for d in draws]
    expected = []
    for draw in draws:
        expected.append(lowered(graph, {"x": x, **draw}))
    stacked = {k: torch.stack([d[k] for d in draws]) for k in draws[0]}
    found = lowered(graph, {"x": x, **stacked}, tuple(stacked))
    torch.testing.assert_close(found, torch.stack(expected))


def filter_response(x: Tensor, scale: Tensor, shift: Tensor, threshold: Tensor) -> Tensor:
    power = x.square().mean((-2, -1), keepdim=True)
    wide = [v[:, None, None] for v in (scale, shift, threshold)]
    return torch.maximum(x / (power + 1e-6).sqrt() * wide[0] + wide[1], wide[2])


def test_filter_response_norm_is_its_formula():
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    arrays = {
        f"l.{k}": torch.randn(3, dtype=torch.float64) for k in ("weight", "bias", "threshold")
    }
    found = lowered(applied(nn.FRN(3, name="l")).graph({"x": x}), {"x": x, **arrays})
    torch.testing.assert_close(found, filter_response(x, *arrays.values()))


ACTIVATIONS = {
    "ReLU": (nn.ReLU(), torch.nn.ReLU()),
    "LeakyReLU": (nn.LeakyReLU(negative_slope=0.1), torch.nn.LeakyReLU(0.1)),
    "ELU": (nn.ELU(), torch.nn.ELU()),
    "GELU": (nn.GELU(), torch.nn.GELU()),
    "SiLU": (nn.SiLU(), torch.nn.SiLU()),
    "Tanh": (nn.Tanh(), torch.nn.Tanh()),
    "Sigmoid": (nn.Sigmoid(), torch.nn.Sigmoid()),
    "Softplus": (nn.Softplus(), torch.nn.Softplus()),
    "Identity": (nn.Identity(), torch.nn.Identity()),
    "MaxPool2d": (nn.MaxPool2d(3, 2, padding=1), torch.nn.MaxPool2d(3, 2, 1)),
    "AvgPool2d": (nn.AvgPool2d(2), torch.nn.AvgPool2d(2)),
    "GlobalAvgPool2d": (nn.GlobalAvgPool2d(), lambda x: x.mean((-2, -1))),
    "Flatten": (nn.Flatten(), torch.nn.Flatten()),
}


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_a_layer_without_weights_is_that_of_torch(case):
    ours, theirs = ACTIVATIONS[case]
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(lowered(applied(ours).graph({"x": x}), {"x": x}), theirs(x))


@pytest.mark.parametrize("case", ["MaxPool1d", "AvgPool1d", "GlobalAvgPool1d"])
def test_a_pool_of_sequences_is_that_of_torch(case):
    x = torch.randn(4, 2, 6, dtype=torch.float64)
    if case == "GlobalAvgPool1d":
        ours, theirs = nn.GlobalAvgPool1d(), lambda x: x.mean(-1)
    else:
        ours, theirs = getattr(nn, case)(2), getattr(torch.nn, case)(2)
    torch.testing.assert_close(lowered(applied(ours).graph({"x": x}), {"x": x}), theirs(x))


def test_batch_norm_lowered_for_training_is_that_of_torch_in_training():
    theirs = randomised(torch.nn.BatchNorm2d(3))
    arrays = weights_of(theirs, "l")
    x = torch.randn(6, 3, 4, 5, dtype=torch.float64) * 2.0 + 1.0
    graph = applied(nn.BatchNorm(3, name="l")).graph({"x": x})
    found = lowered(graph, {"x": x, **arrays}, training=True)
    torch.testing.assert_close(found, theirs.train()(x).detach())


def test_batch_norm_in_training_has_statistics_of_its_own_for_each_particle():
    @model
    def two():
        first = nn.Linear(2, 3, name="fc", bias=False)
        norm = nn.BatchNorm(3, name="bn", affine=False)
        with plate("row"):
            deterministic("out", norm(first(given("x"))))

    x = torch.randn(8, 2, dtype=torch.float64)
    w = torch.randn(4, 3, 2, dtype=torch.float64)
    graph = two.graph({"x": x})
    start = {"bn.mean": torch.zeros(3), "bn.variance": torch.ones(3)}
    found = lowered(graph, {"x": x, "fc.weight": w, **start}, ("fc.weight",), training=True)
    hidden = x @ w.mT
    theirs = torch.nn.BatchNorm1d(3, affine=False).double()
    torch.testing.assert_close(found, torch.stack([theirs(h) for h in hidden]))


class _Block(torch.nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(outputs)
        self.conv2 = torch.nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(outputs)
        self.downsample = torch.nn.Identity()
        if stride > 1 or inputs != outputs:
            conv = torch.nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.downsample(x)).relu()


class _ResNet18(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(width)
        before = width
        for stage in range(1, 5):
            after = width * 2 ** (stage - 1)
            blocks = [_Block(before, after, 2 if stage > 1 else 1), _Block(after, after, 1)]
            setattr(self, f"layer{stage}", torch.nn.Sequential(*blocks))
            before = after
        self.fc = torch.nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((-2, -1)))


def test_resnet18_is_that_of_torch_and_has_its_weights():
    theirs = _ResNet18(64)
    for module in theirs.modules():  # statistics as after some training
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    theirs.eval()
    x = torch.randn(2, 3, 32, 32)
    graph = applied(nn.ResNet18()).graph({"x": x})
    arrays = {k: v for k, v in weights_of(theirs).items() if k in graph.variables}
    assert set(arrays) | {"x"} == set(graph.variables)
    with torch.no_grad():
        found, expected = lowered(graph, {"x": x, **arrays}), theirs(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert sum(arrays[v.name].numel() for v in graph.latents) == 11_164_352
    products = [f for f in nn.find_layers(graph) if f.kind in ("linear", "conv2d")]
    assert len(products) == 21
    assert sum(f.multiplications for f in products) == pytest.approx(555.4e6, rel=1e-4)


def test_gradients_of_a_training_step_are_those_of_torch():
    theirs = _ResNet18(2).double().train()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    graph = applied(nn.ResNet18(width=2)).graph({"x": x})
    arrays = {k: v.clone() for k, v in weights_of(theirs).items() if k in graph.variables}
    learned = {n: arrays[n].requires_grad_() for n, _ in theirs.named_parameters()}
    lowered(graph, {"x": x, **arrays}, training=True).square().sum().backward()
    theirs(x).square().sum().backward()
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(learned[name].grad, p.grad)


def test_resnet18_with_filter_response_norm():
    net = nn.ResNet18(width=4, norm=nn.FRN, activation=nn.Identity())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    graph = applied(net).graph({"x": x})
    assert not nn.buffers(graph)
    arrays = {v.name: torch.randn(*(graph.plates[p].size for p in v.plates), *v.event_shape, dtype=torch.float64) * 0.2
              for v in graph.role("latent", "param")}  # fmt: skip
    assert lowered(graph, {"x": x, **arrays}).shape == (2, 10)


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (12, 1)])
def test_lenet_is_that_of_torch(size, channels):
    side = {28: 5, 32: 5, 12: 1}[size]
    pad = 0 if size == 32 else 2
    t = torch.nn
    theirs = t.Sequential()
    for name, part in {
        "conv1": t.Conv2d(channels, 6, 5, padding=pad), "a": t.ReLU(), "p": t.MaxPool2d(2),
        "conv2": t.Conv2d(6, 16, 5), "b": t.ReLU(), "q": t.MaxPool2d(2), "f": t.Flatten(),
        "fc1": t.Linear(16 * side**2, 120), "c": t.ReLU(), "fc2": t.Linear(120, 84), "d": t.ReLU(), "fc3": t.Linear(84, 10),
    }.items():  # fmt: skip
        theirs.add_module(name, part)
    x = torch.randn(3, channels, size, size, dtype=torch.float64)
    graph = applied(nn.LeNet(channels=channels, size=size)).graph({"x": x})
    theirs = theirs.double()
    torch.testing.assert_close(lowered(graph, {"x": x, **weights_of(theirs)}), theirs(x).detach())


def test_a_residual_sum_is_a_node_of_its_own():
    @model
    def block():
        body = nn.Residual(nn.Sequential(nn.Linear(3, 3, name="a"), nn.Tanh()))
        with plate("row"):
            observe("y", Categorical(logits=body(given("x"))))

    graph = block.graph({"x": torch.zeros(2, 3), "y": torch.zeros(2)})
    assert [n.name for n in graph.nodes if n.op == "call"] == ["linear", "tanh", "add"]
