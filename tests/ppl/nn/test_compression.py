"""Compressed networks: predictions of the posterior mean, what is dropped and why, bytes, counts, files."""

from __future__ import annotations

import math
import re

import pytest
import torch

from ppl import Categorical, DataError, Normal, given, latent, model, nn, observe, plate
from ppl import marginals as mg
from ppl.models.bnn import classifier
from ppl.nn.sparse_layers import DenseLayer, SparseLinear
from tests.ppl.network_posteriors import network_posterior


def images(rows=5, size=12, channels=1, classes=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, channels, size, size, generator=generator, dtype=torch.float64)
    return {"x": x, "label": torch.arange(rows) % classes}


def off(*rows):
    def change(active):
        active[list(rows)] = False

    return change


def unread(*columns):
    def change(active):
        active[:, list(columns)] = False

    return change


def assert_same_predictions(posterior, compressed, x):
    expected = posterior.to_module()(x)
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(compressed.module(x), expected, rtol=0, atol=1e-5 * scale)
    module = posterior.to_module()
    module.load_state_dict(compressed.arrays())
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-5 * scale)


def by_name(compressed):
    return {layer.weight: layer for layer in compressed.layers}


# ---- predictions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.05, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("net", ["mlp", "lenet"])
def test_predictions_are_those_of_the_mean(net, density):
    posterior = network_posterior(
        classifier(net=net, classes=3, hidden=(40, 20)), images(), density
    )
    compressed = posterior.compress()
    assert_same_predictions(posterior, compressed, images(9)["x"])
    assert compressed.density <= posterior.density
    if density == 1.0:
        assert compressed.density == 1.0
        assert compressed.bytes < 1.1 * compressed.dense_bytes + 5000
        assert compressed.multiplications.active == compressed.multiplications.dense


def test_a_posterior_in_single_precision_is_kept_to_the_bit():
    posterior = network_posterior(
        classifier(classes=3, hidden=(40,)), images(), 0.6, dtype=torch.float32
    )
    for layer in posterior.compress().layers:
        if len(layer.outputs) == layer.shape[0] and len(layer.inputs) == layer.shape[1]:
            assert torch.equal(layer.dense(), posterior.mean(layer.weight))


def test_support_and_density_are_those_of_the_marginals():
    posterior = network_posterior(classifier(classes=3, hidden=(40,)), images(), 0.2)
    support = posterior.support
    assert list(support) == ["fc1.weight", "fc2.weight"]
    for name, index in support.items():
        nonzero = posterior.mean(name).reshape(-1).nonzero().squeeze(-1)
        assert torch.equal(index, nonzero)
    total = 40 * 144 + 3 * 40
    assert posterior.density == sum(map(len, support.values())) / total


def test_a_new_weight_whose_mean_is_zero_is_active():
    posterior = network_posterior(classifier(classes=3, hidden=(40,)), images(), 0.2)
    m = posterior.marginals["fc2.weight"]
    posterior.marginals["fc2.weight"] = m._replace(loc=torch.zeros_like(m.loc))
    assert torch.equal(posterior.support["fc2.weight"], m.index)
    assert by_name(posterior.compress())["fc2.weight"].active == len(m.index)


# ---- units -------------------------------------------------------------------------------------------------------------


def test_dead_and_unread_units_drop_rows_and_columns():
    masks = {"fc1.weight": off(0, 3), "fc2.weight": unread(5)}
    posterior = network_posterior(
        classifier(classes=3, hidden=(8, 6)), images(), 0.9, masks=masks, seed=4
    )
    found = by_name(posterior.compress())
    first, second = found["fc1.weight"], found["fc2.weight"]
    assert first.outputs.tolist() == second.inputs.tolist() == [1, 2, 4, 6, 7]
    assert second.outputs.tolist() == list(range(6))
    assert len(first.mean) == int(
        posterior.mean("fc1.weight")[first.outputs.long()].count_nonzero()
    )
    # The constant of a dead unit has moved: relu of its bias times its outgoing weights.
    constant = posterior.mean("fc1.bias")[[0, 3]].relu() @ posterior.mean("fc2.weight")[:, [0, 3]].T
    moved = second.bias.double() - posterior.mean("fc2.bias")
    torch.testing.assert_close(moved, constant, rtol=0, atol=1e-6)
    assert_same_predictions(posterior, posterior.compress(), images()["x"])


def test_what_becomes_dead_by_that_goes_too():
    def only_the_dead(active):  # unit 2 of the second layer reads unit 0 alone, which is a constant
        active[2] = False
        active[2, 0] = True

    masks = {"fc1.weight": off(0), "fc2.weight": only_the_dead, "fc3.weight": unread(4)}
    posterior = network_posterior(
        classifier(classes=3, hidden=(8, 6)), images(), 0.95, masks=masks, seed=4
    )
    found = by_name(posterior.compress())
    assert found["fc2.weight"].outputs.tolist() == [0, 1, 3, 5]
    assert_same_predictions(posterior, posterior.compress(), images()["x"])


@pytest.mark.parametrize(("dim", "left"), [(-1, 3), (0, 5)])
def test_a_mean_over_channels_of_a_square_array_mixes_them(dim, left):
    @model
    def square():
        conv, head = nn.Conv1d(1, 5, 3, padding=1, name="conv"), nn.Linear(5, 2, name="head")
        with plate("row"):
            h = conv(given("x")).relu()  # [5 channels, 5 places]
            observe("label", Categorical(logits=head(h.mean(dim))))

    x = torch.linspace(-1.0, 1.0, 20, dtype=torch.float64).reshape(4, 1, 5)
    masks = {"head.weight": unread(0, 3)}
    posterior = network_posterior(square, {"x": x, "label": [0, 1, 0, 1]}, 0.9, masks=masks)
    compressed = posterior.compress()
    assert len(by_name(compressed)["conv.weight"].outputs) == left
    assert_same_predictions(posterior, compressed, x)


@pytest.mark.parametrize(
    "between",
    [lambda c, h: c * h, lambda c, h: h * c, lambda c, h: torch.where(c > 1.5, h, 0.0)],
    ids=["in front", "behind", "where"],
)
def test_units_that_constants_belong_to_stay(between):
    each = torch.linspace(1.0, 2.0, 6, dtype=torch.float64)

    @model
    def weighted():
        first, second = nn.Linear(3, 6, name="fc1"), nn.Linear(6, 2, name="fc2")
        with plate("row"):
            observe("label", Categorical(logits=second(between(each, first(given("x")).relu()))))

    x = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).reshape(4, 3)
    masks = {"fc2.weight": unread(0, 3)}
    posterior = network_posterior(weighted, {"x": x, "label": [0, 1, 0, 1]}, 0.9, masks=masks)
    compressed = posterior.compress()
    assert len(by_name(compressed)["fc1.weight"].outputs) == 6
    assert "may mix them" in by_name(compressed)["fc2.weight"].note
    assert_same_predictions(posterior, compressed, x)


def test_channels_drop_blocks_behind_a_flattened_image():
    masks = {"conv2.weight": off(1, 7), "conv1.weight": off(2)}
    posterior = network_posterior(
        classifier(net="lenet", classes=3), images(size=28), 0.9, masks=masks
    )
    found = by_name(posterior.compress())
    kept = found["conv2.weight"].outputs.tolist()
    assert 1 not in kept and 7 not in kept and len(kept) == 14
    assert len(found["fc1.weight"].inputs) == 14 * 25
    assert found["conv2.weight"].inputs.tolist() == [0, 1, 3, 4, 5]
    assert_same_predictions(posterior, posterior.compress(), images(size=28)["x"])


@model
def bordered():
    first = nn.Conv2d(1, 4, 3, name="c1", bias=True)
    second = nn.Conv2d(4, 3, 3, name="c2", padding=1)
    with plate("image"):
        h = second(torch.tanh(first(given("x"))))
        observe("label", Categorical(logits=h.mean((-2, -1))))


def test_a_constant_channel_before_padding_stays_and_the_print_says_so():
    posterior = network_posterior(bordered, images(), 0.9, masks={"c1.weight": off(1)})
    compressed = posterior.compress()
    assert len(by_name(compressed)["c1.weight"].outputs) == 4
    assert "zeros around the image" in str(compressed)
    assert_same_predictions(posterior, compressed, images()["x"])
    # Without a bias it is zero everywhere, and goes.
    posterior.marginals["c1.bias"] = mg.Gaussian(*(torch.zeros(4, dtype=torch.float64),) * 2)
    compressed = posterior.compress()
    assert by_name(compressed)["c1.weight"].outputs.tolist() == [0, 2, 3]
    assert_same_predictions(posterior, compressed, images()["x"])


def block(norm):
    """Two convolutions with a norm between them, then two that read the sum of both paths."""

    @model
    def net():
        body = nn.Sequential(
            nn.Conv2d(3, 6, 3, name="c1", padding=1, bias=None),
            norm(6, name="n1"),
            nn.ReLU(),
            nn.Conv2d(6, 3, 3, name="c2", padding=1, bias=None),
            norm(3, name="n2"),
        )
        stem = nn.Conv2d(1, 3, 3, name="stem", bias=None)
        head = nn.Linear(3, 3, name="head")
        with plate("image"):
            h = nn.Residual(body)(stem(given("x"))).relu()
            observe("label", Categorical(logits=head(nn.GlobalAvgPool2d()(h))))

    return net


@pytest.mark.parametrize("norm", [nn.BatchNorm, nn.FRN], ids=["batch", "filter response"])
def test_channels_inside_a_residual_block_go_with_their_norms(norm):
    masks = {"c1.weight": off(0), "c2.weight": unread(2, 4)}
    posterior = network_posterior(block(norm), images(), 0.9, masks=masks)
    generator = torch.Generator().manual_seed(1)
    for name in ("n1.weight", "n1.bias"):
        posterior.params[name] = torch.rand(6, generator=generator, dtype=torch.float64) - 0.9
    # A channel that is zero before the norm is its shift behind it: of channel 0 the rectifier makes zero.
    posterior.params["n1.bias"][0] = -1.0
    if norm is nn.FRN:
        posterior.params["n1.threshold"] = torch.full((6,), -2.0, dtype=torch.float64)
    compressed = posterior.compress()
    found = by_name(compressed)
    assert found["c1.weight"].outputs.tolist() == [1, 3, 5]
    assert found["c2.weight"].inputs.tolist() == [1, 3, 5]
    assert len(found["stem.weight"].outputs) == 3
    assert compressed.module.n1.weight.shape == (3,)
    assert compressed.others["n1.weight"].shape == (6,)
    assert_same_predictions(posterior, compressed, images()["x"])
    # Its shift is positive: a constant that the padding would show.
    posterior.params["n1.bias"][0] = 1.0
    assert found["c1.weight"].outputs.tolist() == [1, 3, 5]
    compressed = posterior.compress()
    assert by_name(compressed)["c1.weight"].outputs.tolist() == [0, 1, 3, 5]
    assert "zeros around the image" in str(compressed)
    assert_same_predictions(posterior, compressed, images()["x"])


def make(*layers):
    @model
    def net():
        with plate("image"):
            x = torch.flatten(given("x"))
            observe("label", Categorical(logits=nn.Sequential(*layers)(x)))

    return net


STAYS = {
    "a sum": (
        lambda: make(
            nn.Linear(4, 5, name="a", plates=()),
            nn.Residual(nn.Linear(5, 5, name="b", plates=())),
            nn.Linear(5, 3, name="c", plates=()),
        ),
        "reads other things",
    ),
    "a norm": (
        lambda: make(
            nn.Linear(4, 5, name="a", plates=()),
            nn.LayerNorm(5, name="n", plates=()),
            nn.Linear(5, 3, name="c", plates=()),
        ),
        "reads other things|may mix",
    ),
    "a softmax": (
        lambda: make(
            nn.Linear(4, 5, name="a", plates=()),
            lambda x: x.softmax(-1),
            nn.Linear(5, 3, name="c", plates=()),
        ),
        "'softmax' before it may mix",
    ),
    "no bias to hold a constant": (
        lambda: make(
            nn.Linear(4, 5, name="a", plates=()),
            nn.Tanh(),
            nn.Linear(5, 3, name="c", plates=(), bias=False),
        ),
        "no bias to hold",
    ),
}


@pytest.mark.parametrize("case", STAYS.values(), ids=list(STAYS))
def test_units_stay_where_something_else_needs_them(case):
    net, words = case
    data = images(size=2)
    posterior = network_posterior(net(), data, 0.95, masks={"a.weight": off(1)})
    compressed = posterior.compress()
    assert len(by_name(compressed)["a.weight"].outputs) == 5
    assert re.search(words, str(compressed))
    assert_same_predictions(posterior, compressed, data["x"])


def test_a_net_that_depends_on_nothing_still_predicts():
    def none(active):
        active[:] = False

    masks = {"fc1.weight": none, "fc2.weight": none}
    posterior = network_posterior(classifier(classes=3, hidden=(8,)), images(), 0.5, masks=masks)
    compressed = posterior.compress()
    assert_same_predictions(posterior, compressed, images()["x"])
    assert compressed.multiplications.active == 0
    assert [len(layer.outputs) for layer in compressed.layers] == [1, 3]


# ---- layers that are not compressed ------------------------------------------------------------------------------------


@model
def mixed():
    lifted = nn.lift("inside", torch.nn.Linear(4, 5), prior=Normal(0.0, 1.0))
    shared = nn.Linear(5, 5, name="shared")
    head = nn.Linear(5, 3, name="head", prior=nn.point())
    with plate("image"):
        h = lifted(torch.flatten(given("x"))).relu()
        observe("label", Categorical(logits=head(shared(shared(h).relu()).relu())))


def test_lifted_modules_and_shared_weights_stay_dense_and_points_are_kept():
    posterior = network_posterior(mixed, images(size=2), 0.5)
    compressed = posterior.compress()
    assert [layer.weight for layer in compressed.layers] == ["head.weight"]
    assert compressed.layers[0].log_sd is None
    assert "inside is kept dense: the inside of a lifted module" in str(compressed)
    assert "shared is kept dense: its weights are used more than once" in str(compressed)
    assert_same_predictions(posterior, compressed, images(size=2)["x"])
    assert set(posterior.support) == {
        "inside.weight",
        "inside.bias",
        "shared.weight",
        "head.weight",
    }


def test_a_model_without_layers_has_nothing_to_compress():
    @model
    def line():
        slope = latent("slope", Normal(0.0, 1.0))
        with plate("row"):
            observe("y", Normal(slope * given("x"), 1.0))

    posterior = network_posterior(line, {"x": torch.ones(3), "y": torch.ones(3)})
    with pytest.raises(DataError, match="no linear layer or convolution"):
        posterior.compress()
    assert posterior.density == 1.0 and posterior.support == {}


# ---- counts, bytes, files ----------------------------------------------------------------------------------------------


def test_multiplications_are_counted_by_hand():
    posterior = network_posterior(classifier(net="lenet", classes=3), images(size=28), 0.5)
    compressed = posterior.compress()
    places = {"conv1.weight": 28 * 28, "conv2.weight": 10 * 10}
    dense = active = 0
    for layer in compressed.layers:
        assert layer.places == places.get(layer.weight, 1)
        dense += math.prod(layer.shape) * layer.places
        active += layer.active * layer.places
    assert compressed.multiplications[:2] == (dense, active)
    assert dense == 6 * 25 * 784 + 16 * 6 * 25 * 100 + 120 * 400 + 84 * 120 + 3 * 84
    assert active <= compressed.multiplications.executed <= dense


def test_the_file_has_the_bytes_that_are_said_and_reads_back(tmp_path):
    posterior = network_posterior(classifier(classes=3, hidden=(300, 100)), images(size=16), 0.05)
    compressed = posterior.compress()
    file = tmp_path / "net.pt"
    compressed.save(file)
    assert file.stat().st_size == compressed.bytes
    # Mean 4 bytes, log sd 2, column 2; rows, biases, and the archive's own.
    active = sum(layer.active for layer in compressed.layers)
    assert compressed.bytes < 8 * active + 12 * 403 + 10_000
    assert compressed.dense_bytes > 6 * (256 * 300 + 300 * 100)
    assert posterior.compress(sd=False).bytes < compressed.bytes - active
    again = nn.load_compressed(file)
    assert str(again) == str(compressed)
    for name, array in compressed.arrays().items():
        assert torch.equal(again.arrays()[name], array)
    module = posterior.to_module()
    module.load_state_dict(again.arrays())
    x = images(size=16)["x"]
    torch.testing.assert_close(module(x), compressed.module(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(DataError, match="not a compressed network"):
        nn.load_compressed(tmp_path / "nothing.pt")
    torch.save({"format": "other"}, file)
    with pytest.raises(DataError, match="not a compressed network"):
        nn.load_compressed(file)


def test_standard_deviations_in_the_file_are_within_a_percent():
    posterior = network_posterior(classifier(classes=3, hidden=(40,)), images(), 0.9)
    for layer in posterior.compress().layers:
        m = posterior.marginals[layer.weight]
        if layer.active == len(m.index):
            torch.testing.assert_close(layer.log_sd.double().exp(), m.scale, rtol=0.01, atol=0)


def test_the_print_tells_layers_bytes_and_multiplications():
    posterior = network_posterior(classifier(classes=3, hidden=(40,)), images(), 0.1)
    text = str(posterior.compress())
    assert "fc1.weight  40 x 144" in text
    assert "bytes on disk" in text and "times fewer" in text


# ---- modules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(7,), (2, 3), ()])
def test_sparse_and_dense_products_agree(lead):
    weight = torch.randn(6, 9, dtype=torch.float64)
    active = torch.rand(6, 9) < 0.3
    weight = torch.where(active, weight, 0.0)
    bias, x = torch.randn(6, dtype=torch.float64), torch.randn(*lead, 9, dtype=torch.float64)
    for b in (bias, None):
        sparse, dense = SparseLinear(weight, active, b), DenseLayer("linear", weight, b)
        torch.testing.assert_close(sparse(x), dense(x))
    assert sparse.multiplications == int(active.sum())


def test_a_convolution_takes_any_axes_in_front():
    weight = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    layer = DenseLayer("conv2d", weight, None, (2, 1))
    x = torch.randn(3, 5, 2, 8, 8, dtype=torch.float64)
    found = layer(x)
    assert found.shape == (3, 5, 4, 4, 4)
    torch.testing.assert_close(
        found[1], torch.nn.functional.conv2d(x[1], weight, None, stride=2, padding=1)
    )
