"""Networks as models: graphs, sizes from the data, fits of tiny ones; and the data they are compared on."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from ppl import DataError, ModelError, Normal, infer, nn
from ppl.models import classifier, datasets, learning_sets, regression
from tests.data_files import data_file


def images(n: int = 4, *shape: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(n, *shape, dtype=torch.float64), "label": torch.arange(n) % 3}


@pytest.mark.parametrize("shape", [(64,), (1, 8, 8), (8, 8)])
def test_an_mlp_takes_images_of_any_shape(shape):
    graph = classifier(classes=3, hidden=(5, 4)).graph(images(4, *shape))
    found = [(f.name, f.kind, f.weight.shape) for f in nn.find_layers(graph)]
    assert found == [
        ("fc1", "linear", (5, 64)),
        ("fc2", "linear", (4, 5)),
        ("fc3", "linear", (3, 4)),
    ]
    assert nn.data_plates(graph) == ("image",) and nn.examples(graph) == 4
    assert graph.variables["label"].plates == ("image",)


def test_lenet_has_its_weights():
    graph = classifier(net="lenet").graph(images(2, 1, 28, 28))
    count = sum(
        int(np.prod([graph.plates[p].size for p in v.plates])) * v.dims for v in graph.latents
    )
    assert count == 61_706  # LeNet-5 with full connections between maps


def test_resnet_by_name_with_norms_without_state():
    graph = classifier(net="resnet18", norm=nn.FRN, activation=nn.Identity()).graph(images(2, 3, 32, 32))  # fmt: skip
    assert len([f for f in nn.find_layers(graph) if f.kind == "filter_response_norm"]) == 20
    assert nn.buffers(graph) == ()


@pytest.mark.parametrize(
    ("options", "shape", "words"),
    [
        ({"net": "alexnet"}, (1, 28, 28), "expected one of mlp, lenet, resnet18"),
        ({"net": "lenet"}, (28, 28), "Add the channel axis"),
        ({"norm": nn.FRN}, (8,), "norm= is of net='resnet18'"),
    ],
)
def test_a_classifier_that_cannot_be(options, shape, words):
    with pytest.raises(ModelError, match=words):
        classifier(**options).graph(images(2, *shape))


def test_a_prior_predictive_of_the_regression_is_finite():
    y = regression.sample(50, {"x": torch.randn(7, 3)}, seed=0)["y"]
    assert y.shape == (50, 7) and bool(y.isfinite().all())


def test_particles_fit_a_tiny_classifier():
    x = torch.randn(60, 1, dtype=torch.float64)
    data = {"x": x, "label": (x[:, 0].abs() > 0.7).long()}
    tiny = classifier(
        classes=2, hidden=(2,), prior=Normal(0.0, 3.0), bias=Normal(0.0, 2.0), activation=nn.Tanh()
    )
    posterior = infer(
        tiny, data, method="qem", seed=0, particles=100, max_iters=200, progress=False
    )
    chance = posterior.predict(data, n=200, seed=0).mean("label")
    right = ((chance > 0.5).long() == data["label"]).double().mean()
    assert (
        float(right) > 0.9
    )  # the larger class has half of them, a linear classifier three quarters


def test_particles_fit_a_tiny_regression():
    x = torch.linspace(-2.0, 2.0, 30, dtype=torch.float64)[:, None]
    data = {"x": x, "y": torch.tanh(2.0 * x[:, 0]) + 0.3 * torch.randn(30, dtype=torch.float64)}
    tiny = regression(hidden=(1,), activation=nn.Tanh(), prior=nn.isotropic(1.0), noise=0.5)
    posterior = infer(tiny, data, method="qem", seed=0, max_iters=300, progress=False)
    predicted = posterior.predict(data, n=500, seed=0).mean("y")
    assert float((predicted - torch.tanh(2.0 * x[:, 0])).square().mean().sqrt()) < 0.25
    assert 0.2 < float(posterior.mean("noise")) < 0.5


# ---- data --------------------------------------------------------------------------------------


def test_a_made_table_is_standardised_by_the_part_to_fit(data_folder):
    rng = np.random.default_rng(0)
    x = np.stack([rng.normal(3.0, 2.0, 20), np.full(20, 7.0)], 1)
    y = rng.normal(-1.0, 5.0, 20)
    (data_folder / "uci_regression").mkdir()
    train, test = np.arange(15)[None], np.arange(15, 20)[None]
    file = data_folder / "uci_regression" / "yacht.npz"
    np.savez(file, X=x, y=y, train_index=train, test_index=test)
    table = datasets.uci("yacht")
    assert table.train["x"][:, 0].mean() == pytest.approx(0.0, abs=1e-12)
    assert table.train["y"].std() == pytest.approx(1.0)
    assert np.array_equal(table.test["x"][:, 1], np.zeros(5))  # a constant column
    np.testing.assert_allclose(table.test["y"] * table.scale + table.mean, y[15:])
    with pytest.raises(DataError, match="splits 0 to 0, got 1"):
        datasets.uci("yacht", 1)


def test_made_images_are_scaled(data_folder):
    (data_folder / "mnist").mkdir()
    x = np.full((3, 28, 28), 255, np.uint8)
    y = np.array([1, 2, 3], np.uint8)
    np.savez(data_folder / "mnist" / "mnist.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    train, test = datasets.mnist(limit=2)
    assert train["x"].shape == (2, 1, 28, 28) and train["x"].dtype == np.float32
    assert train["label"].tolist() == [1, 2] and len(test["label"]) == 2
    assert float(train["x"][0, 0, 0, 0]) == pytest.approx((1 - 0.1307) / 0.3081, rel=1e-6)


def test_made_photographs_are_decoded(data_folder):
    image = pytest.importorskip("PIL.Image")
    (data_folder / "cifar10").mkdir()
    files_made = []
    for grey in (0, 255, 128):
        out = io.BytesIO()
        image.fromarray(np.full((32, 32, 3), grey, np.uint8)).save(out, "JPEG")
        files_made.append(out.getvalue())
    offset = np.cumsum([0, *map(len, files_made)])
    jpeg = np.frombuffer(b"".join(files_made), np.uint8)
    labels = {"y_train": np.array([3, 4], np.uint8), "y_test": np.array([5], np.uint8)}
    np.savez(data_folder / "cifar10" / "cifar10_jpeg.npz", jpeg=jpeg, offset=offset, **labels)
    train, test = datasets.cifar10()
    assert train["x"].shape == (2, 3, 32, 32) and test["label"].tolist() == [5]
    np.testing.assert_allclose(train["x"][1, 0], (1 - 0.4913) / 0.2452, rtol=1e-5)


@pytest.mark.parametrize(
    "load", [datasets.mnist, datasets.fashion_mnist, datasets.cifar10, lambda: datasets.uci("wine")]
)
def test_an_absent_set_says_where_it_is_from(load, data_folder):
    with pytest.raises(DataError, match=r"not on this machine.*Set PPL_DATA.*https?://"):
        load()


def test_an_unknown_regression_names_the_nearest():
    with pytest.raises(DataError, match="Did you mean 'boston'"):
        datasets.uci("bostn")


def test_a_missing_package_names_the_extra(monkeypatch):
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(learning_sets.importlib, "import_module", absent)
    with pytest.raises(DataError, match=r"scikit-learn.*factorppl\[tutorials\]"):
        datasets.digits()


def test_digits_and_diabetes_are_split_and_scaled():
    pytest.importorskip("sklearn")
    train, test = datasets.digits()
    assert train["x"].mean() == pytest.approx(0.0, abs=1e-5) and set(test["label"]) == set(
        range(10)
    )
    table = datasets.diabetes()
    assert table.train["y"].std() == pytest.approx(1.0) and table.test["x"].shape == (42, 10)


@pytest.mark.parametrize("name", learning_sets.UCI)
def test_real_regressions_have_their_splits(name):
    data_file(f"uci_regression/{name}.npz")
    table = datasets.uci(name, 4)
    total = len(table.train["y"]) + len(table.test["y"])
    assert abs(len(table.test["y"]) - total / 10) <= 1
    assert all(np.isfinite(a).all() for part in (table.train, table.test) for a in part.values())


def test_real_digits_have_their_mean():
    data_file("mnist/mnist.npz")
    train, test = datasets.mnist()
    assert train["x"].shape == (60000, 1, 28, 28) and test["x"].shape == (10000, 1, 28, 28)
    assert abs(float(train["x"].mean())) < 1e-3 and abs(float(train["x"].std()) - 1) < 1e-3


def test_real_photographs_have_their_mean():
    data_file("cifar10/cifar10_jpeg.npz")
    pytest.importorskip("PIL")
    train, _ = datasets.cifar10(limit=500)
    assert np.abs(train["x"].mean((0, 2, 3))).max() < 0.15
