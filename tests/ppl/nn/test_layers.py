"""Layers: what they leave in the graph, their density against plain torch, and a small fit."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from ppl import (
    Categorical,
    HalfNormal,
    ModelError,
    Normal,
    given,
    infer,
    latent,
    model,
    nn,
    observe,
    plate,
    scope,
)
from ppl.lower import Compiler
from ppl.passes import Degree, degree


@model
def classifier(inputs: int = 3, width: int = 4, classes: int = 2, bias: bool = True):
    net = nn.Sequential(
        nn.Linear(inputs, width, name="fc1", bias=bias),
        nn.ReLU(),
        nn.Linear(width, classes, name="out", bias=bias),
    )
    with plate("row"):
        observe("label", Categorical(logits=net(given("x"))))


@model
def pictures(classes: int = 3, stride: int = 1):
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, name="c1", padding=1, stride=stride),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3 * (6 // stride // 2) ** 2, classes, name="out"),
    )
    with plate("image"):
        observe("label", Categorical(logits=net(given("x"))))


def rows(n: int = 5) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(n, 3, dtype=torch.float64), "label": torch.arange(n) % 2}


def images(n: int = 4) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(n, 2, 6, 6, dtype=torch.float64), "label": torch.arange(n) % 3}


def draws(graph, particles: int) -> dict[str, torch.Tensor]:
    """Weights ``[particles, *plates, *event]`` for every latent."""
    return {
        v.name: torch.randn(
            particles,
            *(graph.plates[p].size for p in v.plates),
            *v.event_shape,
            dtype=torch.float64,
        )
        for v in graph.latents
    }


def label_density(graph, arrays, particle_axes, rules="all"):
    """The lowered log-density of the labels; particle axes of the latents stand in front of their plates."""
    axes = {v.name: (*particle_axes.get(v.name, ()), *v.plates) for v in graph.variables.values()}
    samples = list(dict.fromkeys(a for names in particle_axes.values() for a in names))
    compiler = Compiler(graph, axes, [*samples, *graph.plates], rules=rules)
    out = compiler.density(graph.factors["label"])
    return out.axes, compiler.finish([out])(arrays)[0]


def test_weights_lie_in_plates_of_their_layer_and_not_in_those_of_the_data():
    graph = classifier.graph(rows())
    plates = {v.name: v.plates for v in graph.latents}
    assert plates == {
        "fc1.weight": ("fc1.out", "fc1.in"),
        "fc1.bias": ("fc1.out",),
        "out.weight": ("out.out", "out.in"),
        "out.bias": ("out.out",),
    }
    sizes = {p.name: p.size for p in graph.plates.values()}
    assert sizes == {"row": 5, "fc1.out": 4, "fc1.in": 3, "out.out": 2, "out.in": 4}


def test_calls_stand_in_the_plate_of_the_data():
    graph = classifier.graph(rows())
    calls = [(n.name, n.plates, n.event_shape) for n in graph.nodes if n.op == "call"]
    assert calls == [
        ("linear", ("row",), (4,)),
        ("relu", ("row",), (4,)),
        ("linear", ("row",), (2,)),
    ]
    collected = [(n.name, n.plates, n.event_shape) for n in graph.nodes if n.op == "collect"]
    assert collected[0] == ("fc1.out,fc1.in", (), (4, 3))
    assert graph.access("label", "fc1.weight") == {"all"}


def test_kernels_are_events():
    graph = pictures.graph(images())
    assert graph.variables["c1.weight"].plates == ("c1.out", "c1.in")
    assert graph.variables["c1.weight"].event_shape == (3, 3)
    calls = {n.name: n.event_shape for n in graph.nodes if n.op == "call"}
    assert calls["conv2d"] == (3, 6, 6)
    assert calls["max_pool2d"] == (3, 3, 3)
    assert calls["flatten"] == (27,)
    assert all(n.plates == ("image",) for n in graph.nodes if n.op == "call")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rules", ["all", "vmap"])
def test_density_of_a_classifier_is_that_of_plain_torch(bias, rules):
    data = rows()
    graph = classifier(bias=bias).graph(data)
    w = draws(graph, particles=3)
    axes, found = label_density(graph, {**data, **w}, {name: ("k",) for name in w}, rules)
    expected = torch.stack(
        [
            -functional.cross_entropy(
                functional.linear(
                    functional.linear(
                        data["x"], w["fc1.weight"][k], w["fc1.bias"][k] if bias else None
                    ).relu(),
                    w["out.weight"][k],
                    w["out.bias"][k] if bias else None,
                ),
                data["label"],
                reduction="none",
            )
            for k in range(3)
        ]
    )
    assert axes == ("k", "row")
    torch.testing.assert_close(found, expected)


def test_layers_with_particles_of_their_own_are_crossed():
    data = rows()
    graph = classifier(bias=False).graph(data)
    w = draws(graph, particles=2)
    axes, found = label_density(graph, {**data, **w}, {"fc1.weight": ("a",), "out.weight": ("b",)})
    hidden = torch.einsum("aoi,ni->ano", w["fc1.weight"], data["x"]).relu()
    logits = torch.einsum("boi,ani->abno", w["out.weight"], hidden)
    expected = logits.log_softmax(-1)[..., torch.arange(5), data["label"]]
    assert axes == ("a", "b", "row")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_density_of_a_convolutional_network_is_that_of_plain_torch(stride):
    data = images()
    graph = pictures(stride=stride).graph(data)
    w = draws(graph, particles=2)
    _, found = label_density(graph, {**data, **w}, {name: ("k",) for name in w})

    def log_prob(k: int) -> torch.Tensor:
        hidden = functional.conv2d(data["x"], w["c1.weight"][k], w["c1.bias"][k], stride, 1).tanh()
        flat = functional.max_pool2d(hidden, 2).flatten(1)
        logits = functional.linear(flat, w["out.weight"][k], w["out.bias"][k])
        return -functional.cross_entropy(logits, data["label"], reduction="none")

    torch.testing.assert_close(found, torch.stack([log_prob(0), log_prob(1)]))


def test_prior_scale_follows_the_number_of_inputs():
    graph = pictures.graph(images())
    scales = {f.name: float(f.law.family.scale) for f in graph.densities if f.name != "label"}
    assert scales["c1.weight"] == pytest.approx((2 * 3 * 3) ** -0.5)
    assert scales["out.weight"] == pytest.approx(27**-0.5)


def test_prior_with_a_scale_that_is_a_latent():
    @model
    def shrunk():
        tau = latent("tau", HalfNormal(1.0))
        layer = nn.Linear(2, 1, name="fc", prior=nn.isotropic(tau))
        with plate("row"):
            observe("y", Normal(layer(given("x"))[0], 1.0))

    graph = shrunk.graph({"x": torch.zeros(3, 2), "y": torch.zeros(3)})
    assert graph.parents("fc.weight") == ("tau",)
    assert graph.parents("fc.bias") == ("tau",)


def test_a_layer_that_is_called_twice_has_one_set_of_weights():
    layer = nn.Linear(2, 2, name="fc")

    @model
    def recurrent():
        with plate("row"):
            observe("y", Normal(layer(torch.tanh(layer(given("x"))))[0], 1.0))

    for _ in range(2):  # and a second trace declares them anew
        graph = recurrent.graph({"x": torch.zeros(3, 2), "y": torch.zeros(3)})
        assert [v.name for v in graph.latents] == ["fc.weight", "fc.bias"]


def test_scopes_keep_layers_of_one_name_apart():
    @model
    def twins():
        for side, width in (("left", 2), ("right", 3)):
            with scope(side):
                layer = nn.Linear(width, 1, name="fc")
                with plate("row"):
                    observe("y", Normal(layer(given("x"))[0], 1.0))

    data = {"left.x": torch.zeros(4, 2), "right.x": torch.zeros(4, 3)}
    graph = twins.graph(data | {"left.y": torch.zeros(4), "right.y": torch.zeros(4)})
    assert graph.plates["left.fc.in"].size == 2
    assert graph.plates["right.fc.in"].size == 3


def test_one_linear_layer_is_affine_in_its_weights():
    @model
    def regression():
        layer = nn.Linear(2, 1, name="fc", prior=nn.isotropic(1.0))
        with plate("row"):
            observe("y", Normal(layer(given("x"))[0], 0.5))

    x = torch.randn(12, 2, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0], dtype=torch.float64) + 0.5
    graph = regression.graph({"x": x, "y": y})
    mean = graph.factors["y"].law.arguments[0]
    assert degree(graph, mean, frozenset({"fc.weight", "fc.bias"})) == Degree.AFFINE
    # the posterior of linear regression in closed form
    design = torch.cat([x, torch.ones(12, 1, dtype=torch.float64)], 1)
    precision = design.T @ design / 0.25 + torch.eye(3, dtype=torch.float64)
    expected = torch.linalg.solve(precision, design.T @ y / 0.25)
    posterior = infer(regression, {"x": x, "y": y}, method="exact")
    torch.testing.assert_close(posterior.mean("fc.weight").reshape(2), expected[:2])
    torch.testing.assert_close(posterior.mean("fc.bias").reshape(1), expected[2:])


def test_a_small_network_fits():
    @model
    def bump():
        net = nn.Sequential(
            nn.Linear(1, 2, name="fc1", prior=nn.isotropic(1.0)),
            nn.Tanh(),
            nn.Linear(2, 1, name="out", prior=nn.isotropic(1.0)),
        )
        with plate("row"):
            observe("y", Normal(net(given("x"))[0], 1.0))

    x = torch.linspace(-2.0, 2.0, 8, dtype=torch.float64)
    data = {"x": x[:, None], "y": torch.tanh(1.5 * x)}
    graph = bump.graph(data)
    posterior = infer(bump, data, method="qem", seed=0, progress=False)
    # importance sampling from the prior, which seven weights and eight rows still allow
    w = draws(graph, particles=200_000)
    hidden = (w["fc1.weight"] @ data["x"].T + w["fc1.bias"][..., None]).tanh()
    mean = (w["out.weight"] @ hidden)[:, 0] + w["out.bias"]
    log_weight = torch.distributions.Normal(mean, 1.0).log_prob(data["y"]).sum(-1)
    log_evidence = log_weight.logsumexp(0) - math.log(len(mean))
    expected = log_weight.softmax(0) @ mean
    assert posterior.log_evidence.value == pytest.approx(float(log_evidence), abs=0.15)
    fitted = posterior.predict(data, n=2000, seed=0).mean("y")
    torch.testing.assert_close(fitted, expected, atol=0.1, rtol=0.0)


def test_a_layer_outside_a_model_names_itself():
    with pytest.raises(ModelError, match=r"nn\.Linear.*inside a function decorated with @model"):
        nn.Linear(2, 1, name="fc")(torch.zeros(2))


def test_two_layers_of_one_name():
    @model
    def wrong():
        net = nn.Sequential(nn.Linear(2, 3, name="fc"), nn.ReLU(), nn.Linear(3, 1, name="fc"))
        with plate("row"):
            observe("y", Normal(net(given("x"))[0], 1.0))

    with pytest.raises(ModelError, match=r"two sites are called 'fc\.weight'.*Rename one") as error:
        wrong.graph({"x": torch.zeros(3, 2), "y": torch.zeros(3)})
    assert error.value.where.file == __file__


def test_an_input_of_the_wrong_length():
    with pytest.raises(
        ModelError, match=r"Linear\('fc1'\) takes vectors of 4 numbers, got .*\[3\]"
    ):
        classifier(inputs=4).graph(rows())


def _images_of(*shape: int):
    return {"x": torch.zeros(2, *shape), "y": torch.zeros(2)}


@model
def picture(layer=None):
    with plate("image"):
        observe("y", Normal(layer(given("x")).sum(), 1.0))


@pytest.mark.parametrize(
    ("layer", "shape", "words"),
    [
        (nn.Conv2d(1, 2, 5, name="c"), (1, 4, 9), "kernel of size .*larger than one element"),
        (nn.Conv2d(1, 2, 3, name="c"), (28, 28), r"add an axis with x\[None\]"),
        (nn.Conv2d(3, 2, 3, name="c"), (28, 28, 3), "has 3 input channels.*permute"),
        (nn.MaxPool2d(4), (1, 3, 3), "windows of size 4, larger than"),
        (nn.GroupNorm(4, groups=2, name="g"), (3, 5, 5), "has 4 channels, got"),
        (nn.LayerNorm(4, name="g"), (3,), "has 4 features, got"),
        (nn.FRN(4, name="g"), (4,), r"takes \[channels, \*size\]"),
        (nn.Residual(nn.Linear(3, 2, name="a")), (3,), "the shortcut .*Give a shortcut"),
    ],
)
def test_an_element_that_does_not_fit(layer, shape, words):
    with pytest.raises(ModelError, match=words) as error:
        picture(layer=layer).graph(_images_of(*shape))
    assert error.value.where.file == __file__


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Conv2d(1, 2, 0, name="c"), "positive whole number of kernel"),
        (lambda: nn.Conv2d(1, 2, (3, 3, 3), name="c"), "kernel has 2 sizes"),
        (lambda: nn.GroupNorm(6, groups=4, name="g"), "do not fall into 4 equal groups"),
        (lambda: nn.Linear(2, 3, name=""), "needs a name"),
        (lambda: nn.Linear(2, 3, name="fc", prior=0.1), "a prior is a function"),
        (lambda: nn.Linear(2, 3, name="fc", plates="user"), r"plates=\(user,\)"),
        (lambda: nn.Sequential([nn.ReLU()]), "Unpack lists"),
        (lambda: nn.MLP(3), "a number of inputs and one of outputs"),
        (lambda: nn.LeNet(size=8), "at least 12"),
        (lambda: nn.group_sparse(over="rows"), "'in' .*or 'out'"),
        (lambda: nn.BatchNorm(3, name="bn", plates=("user",)), r"cannot be a family"),
    ],
)
def test_a_layer_that_cannot_be(make, words):
    with pytest.raises(ModelError, match=words):
        make()


def test_a_layer_without_outputs():
    with pytest.raises(
        ModelError, match=r"Linear\('fc'\) needs a positive whole number of outputs"
    ):
        nn.Linear(2, 0, name="fc")
