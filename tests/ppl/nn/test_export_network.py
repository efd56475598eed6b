"""Networks as torch modules: against the model's own evaluation, state dicts, files, draws, and what they refuse."""

from __future__ import annotations

import copy
import io
import warnings
from dataclasses import replace

import pytest
import torch

from ppl import (
    Bernoulli,
    Categorical,
    DataError,
    Gamma,
    HalfNormal,
    Markov,
    ModelError,
    Normal,
    UnsupportedError,
    deterministic,
    given,
    infer,
    latent,
    model,
    nn,
    observe,
    plate,
)
from ppl.models.bnn import classifier, regression
from tests.ppl.network_posteriors import network_posterior, normalised


def images(rows=4, size=12, channels=1, classes=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, channels, size, size, generator=generator, dtype=torch.float64)
    return {"x": x, "label": torch.arange(rows) % classes}


@model
def convolved():
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, name="conv", padding=1, stride=2, prior=nn.point()),
        nn.FRN(4, name="frn"),
        nn.MaxPool2d(2),
        nn.Residual(nn.Sequential(nn.Conv2d(4, 4, 1, name="body"), nn.SiLU())),
        nn.GlobalAvgPool2d(),
        nn.Linear(4, 3, name="fc"),
    )
    with plate("image"):
        logits = deterministic("logits", net(given("x")))
        observe("label", Categorical(logits=logits))


@model
def attended():
    inside = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.ReLU())
    net = nn.lift("net", inside, prior=Normal(0.0, 0.5))
    head = nn.Linear(6, 3, name="head")
    with plate("image"):
        logits = deterministic("logits", head(net(torch.flatten(given("x")))))
        observe("label", Categorical(logits=logits))


def logits_of(posterior, arrays):
    """The model's own evaluation, with one value for every unknown."""
    from ppl.simulation import Known, simulate
    from ppl.streams import Streams

    known = {name: Known(value.unsqueeze(0)) for name, value in arrays.items()}
    return simulate(posterior.bound, 1, Streams(0), known=known, sites=["logits"])["logits"][0]


CASES = {
    "convolutions": (convolved, images(channels=2), 1.0),
    "sparse convolutions": (convolved, images(channels=2), 0.3),
    "lifted": (attended, images(size=2), 1.0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("which", ["mean", "sample"])
def test_the_module_makes_the_models_logits(case, which):
    net, data, density = case
    posterior = network_posterior(net, data, density)
    module = posterior.to_module(which, seed=5).eval()
    names = [v.name for v in posterior.graph.role("latent", "param")]
    draws = posterior.samples(1, seed=5)
    arrays = {n: draws[n][0] if which == "sample" else posterior.mean(n) for n in names}
    found = module(data["x"])
    torch.testing.assert_close(found, logits_of(posterior, arrays), rtol=1e-12, atol=1e-12)
    assert module(data["x"][:1]).shape == (1, 3)
    assert module(torch.cat([data["x"]] * 3)).shape == (12, 3)


def test_weights_are_parameters_under_their_names():
    posterior = network_posterior(classifier(hidden=(5,), classes=3), images(), 0.5)
    module = posterior.to_module()
    state = module.state_dict()
    assert list(state) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    torch.testing.assert_close(state["fc1.weight"], posterior.mean("fc1.weight"))
    assert {n for n, _ in module.named_parameters()} == set(state)
    other = posterior.to_module("sample", seed=1)
    assert not torch.equal(other.fc1.weight, module.fc1.weight)
    assert (other.fc1.weight[posterior.mean("fc1.weight") == 0] == 0).all()
    other.load_state_dict(state)
    x = images()["x"]
    torch.testing.assert_close(other(x), module(x))
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_the_posterior_does_not_change_with_the_module():
    posterior = network_posterior(classifier(hidden=(5,), classes=3), images())
    module = posterior.to_module()
    before = posterior.mean("fc1.weight").clone()
    with torch.no_grad():
        module.fc1.weight.zero_()
    assert torch.equal(posterior.mean("fc1.weight"), before)


@pytest.mark.parametrize("net", ["mlp", "lenet"])
def test_a_module_goes_through_files_and_copies(net):
    posterior = network_posterior(classifier(net=net, classes=3, hidden=(6,)), images())
    module, x = posterior.to_module(), images()["x"]
    expected = module(x)  # it has been used before it is saved
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    for other in (again, copy.deepcopy(module)):
        assert torch.equal(other(x), expected)
    assert len(buffer.getvalue()) < 8 * sum(p.numel() for p in module.parameters()) + 60_000


def test_a_module_changes_precision_like_any_other():
    posterior = network_posterior(classifier(hidden=(5,), classes=3), images())
    module, x = posterior.to_module(), images()["x"]
    exact = module(x)
    single = copy.deepcopy(module).float()
    assert single(x).dtype == torch.float32
    torch.testing.assert_close(single(x).double(), exact, rtol=1e-4, atol=1e-4)


def test_a_law_of_two_arguments_is_a_named_tuple():
    x = torch.linspace(-1, 1, 5, dtype=torch.float64).reshape(-1, 1)
    posterior = network_posterior(regression(hidden=(6,), noise=0.7), {"x": x, "y": x[:, 0]})
    module = posterior.to_module()
    found = module(x)
    assert found._fields == ("loc", "scale")
    assert found.loc.shape == (5,)
    assert found.scale.item() == pytest.approx(0.7)
    assert "noise" in module.state_dict()


def test_statistics_of_batches_are_buffers():
    x = torch.randn(5, 4, dtype=torch.float64)
    posterior = network_posterior(normalised, {"x": x, "label": [0, 1, 0, 1, 0]})
    mean = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    posterior.bound = replace(posterior.bound, values={**posterior.bound.values, "bn.mean": mean})
    module = posterior.to_module()
    assert {n for n, _ in module.named_buffers()} == {"bn.mean", "bn.variance"}
    h = (x @ module.fc1.weight.T + module.fc1.bias - mean) / (1 + 1e-5) ** 0.5
    h = h * module.bn.weight + module.bn.bias
    torch.testing.assert_close(module(x), h @ module.fc2.weight.T + module.fc2.bias)
    torch.testing.assert_close(module.train()(x), module.eval()(x))


def test_several_covariates_come_in_order_or_by_name():
    @model
    def two():
        net = nn.Linear(3, 1, name="fc")
        with plate("row"):
            x, shift = given("x"), given("shift")
            observe("y", Normal(net(x)[0] + shift, HalfNormal(1.0).scale))

    data = {"x": torch.randn(4, 3).double(), "shift": torch.arange(4.0), "y": torch.zeros(4)}
    module = network_posterior(two, data).to_module()
    by_place = module(data["x"], data["shift"])
    by_name = module(shift=data["shift"], x=data["x"].tolist())
    torch.testing.assert_close(by_place.loc, by_name.loc)
    torch.testing.assert_close(by_place.loc - module(data["x"], torch.zeros(4)).loc, data["shift"].double())  # fmt: skip
    for wrong in (lambda: module(data["x"]), lambda: module(data["x"], shfit=data["shift"])):
        with pytest.raises(DataError, match="takes x, shift"):
            wrong()
    with pytest.raises(DataError, match=r"'x' is \[row, 3\], got \[3\]"):
        module(data["x"][0], data["shift"])


@model
def two_heads():
    body = nn.Linear(3, 4, name="body")
    left, right = nn.Linear(4, 1, name="left"), nn.Linear(4, 1, name="right")
    rate = latent("rate", Gamma(2.0, 1.0))
    observe("total", Normal(rate, 1.0))
    with plate("row"):
        h = body(given("x")).relu()
        observe("a", Normal(left(h)[0], 1.0))
        observe("b", Bernoulli(logits=right(h)[0]))


def test_a_site_is_chosen_where_there_are_several():
    data = {"x": torch.randn(4, 3).double(), "a": torch.zeros(4), "b": torch.ones(4), "total": 1.0}
    posterior = network_posterior(two_heads, data)
    with pytest.raises(DataError, match="the model observes a, b. Say site="):
        posterior.to_module()
    module = posterior.to_module(site="b")
    assert list(module.state_dict()) == ["body.weight", "body.bias", "right.weight", "right.bias"]
    assert module(data["x"]).shape == (4,)
    with pytest.raises(DataError, match="'c' is not an observed site"):
        posterior.to_module(site="c")
    with pytest.raises(ModelError, match="expected 'mean' or 'sample', got 'median'"):
        posterior.to_module("median")


@model
def local():
    net = nn.Linear(2, 1, name="fc")
    with plate("row"):
        own = latent("own", Normal(0.0, 1.0))
        observe("y", Normal(net(given("x"))[0] + own, 1.0))


@model
def nested():
    net = nn.Linear(2, 1, name="fc")
    user = plate("user")
    with plate("row", within=user):
        observe("y", Normal(net(given("x"))[0], 1.0))


@model
def chained():
    net = nn.Linear(2, 1, name="fc")
    with plate("day", ordered=True):
        observe("y", Markov(Normal(0.0, 1.0), lambda before: Normal(net(given("x"))[0] + before, 1.0)))  # fmt: skip


@pytest.mark.parametrize(
    ("net", "more", "words"),
    [
        (local, {}, "'own' is unknown for each element"),
        (nested, {"user": [0, 0, 1]}, "plate 'row' lies within another"),
        (chained, {}, "'y' is a chain"),
    ],
)
def test_what_is_no_function_of_one_element_is_refused(net, more, words):
    data = {"x": torch.randn(3, 2).double(), "y": torch.zeros(3), **more}
    with pytest.raises(UnsupportedError, match=words):
        network_posterior(net, data).to_module()


def test_a_fit_by_vi_becomes_a_module():
    data = images(6, size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = infer(classifier(hidden=(3,), classes=3), data, method="vi", seed=0, max_iters=20)  # fmt: skip
    module = posterior.to_module()
    h = (data["x"].flatten(1) @ posterior.mean("fc1.weight").T + posterior.mean("fc1.bias")).relu()
    expected = h @ posterior.mean("fc2.weight").T + posterior.mean("fc2.bias")
    torch.testing.assert_close(module(data["x"]), expected)
    assert posterior.density == 1.0
    assert {n: len(i) for n, i in posterior.support.items()} == {"fc1.weight": 12, "fc2.weight": 9}
