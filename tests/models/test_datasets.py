"""Classic tables against sums known from their sources; loaders on made files and on real ones."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ppl import DataError
from ppl.models import datasets


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """An empty data folder that hides any other."""
    monkeypatch.setenv("PPL_DATA", str(tmp_path))
    monkeypatch.setattr(datasets, "_CHECKOUT", tmp_path / "no checkout")
    return tmp_path


def needs(name: str) -> None:
    if datasets.find(name) is None:
        pytest.skip(f"the data file '{name}' is not on this machine; see ppl.models.datasets")


def test_eight_schools_are_those_of_the_textbook():
    data = datasets.eight_schools()
    weights = 1 / np.square(data["sigma"])
    # [Gelman2013] section 5.5: the pooled estimate is 7.7 with standard error 4.1.
    assert round(float(np.average(data["y"], weights=weights)), 1) == 7.7
    assert round(float(weights.sum() ** -0.5), 1) == 4.1
    assert data["school"] == list("ABCDEFGH")


def test_rats_agree_with_the_table_of_posteriordb():
    name = "posteriordb/rats_data-rats_model/data.json"
    needs(name)
    table = json.loads(datasets.find(name).read_text())
    data = datasets.rats()
    assert np.array_equal(data["weight"].T.ravel(), table["y"])
    assert np.array_equal(np.repeat(data["age"], 30), table["x"])


def test_rats_grow():
    data = datasets.rats()
    assert data["weight"].shape == (30, 5) and data["age"].shape == (5,)
    assert (np.diff(data["weight"], axis=1) > 0).all()
    # Least squares through the average rat.
    growth, centre = np.polyfit(data["age"] - 22, data["weight"].mean(0), 1)
    assert growth == pytest.approx(6.186, abs=1e-3) and centre == pytest.approx(242.653, abs=1e-3)


@pytest.mark.parametrize(
    "load, name",
    [
        (datasets.radon_states, "radon/radon_states.npz"),
        (datasets.radon_counties, "radon/radon_counties.npz"),
        (datasets.radon_minnesota, "radon_mn.json"),
    ],
)
def test_an_absent_file_is_named_with_its_source(load, name, data_folder):
    with pytest.raises(DataError) as error:
        load()
    for part in (name, str(data_folder), "https://github.com/", "PPL_DATA"):
        assert part in str(error.value)


def test_without_a_data_folder_the_error_asks_for_one(data_folder, monkeypatch):
    monkeypatch.delenv("PPL_DATA")
    with pytest.raises(DataError, match=r"\$PPL_DATA \(not set\).*Set PPL_DATA to a folder"):
        datasets.radon_states()


def test_the_named_folder_goes_before_the_one_beside_the_checkout(tmp_path, monkeypatch):
    checkout, named = tmp_path / "checkout", tmp_path / "named"
    beside = tmp_path / "shared" / "data"
    for folder in (checkout, named, beside):
        folder.mkdir(parents=True)
    (checkout / "pyproject.toml").touch()
    (beside / "a.json").touch()
    monkeypatch.setattr(datasets, "_CHECKOUT", checkout)
    monkeypatch.setenv("PPL_DATA", str(named))
    assert datasets.find("a.json") == beside / "a.json"
    (named / "a.json").touch()
    assert datasets.find("a.json") == named / "a.json"


def test_an_installed_package_looks_only_where_it_is_told(tmp_path, monkeypatch):
    (tmp_path / "shared" / "data").mkdir(parents=True)
    (tmp_path / "shared" / "data" / "a.json").touch()
    monkeypatch.setattr(datasets, "_CHECKOUT", tmp_path / "site-packages")
    monkeypatch.delenv("PPL_DATA", raising=False)
    assert datasets.find("a.json") is None


def test_splits_are_read_as_two_mappings(data_folder):
    obs = np.arange(6, dtype=np.float32).reshape(2, 3)
    (data_folder / "radon").mkdir()
    np.savez(data_folder / "radon" / "radon_states.npz", obs_train=obs, obs_test=obs + 1)
    train, test = datasets.radon_states()
    assert np.array_equal(train["obs"], obs) and np.array_equal(test["obs"], obs + 1)
    assert train["obs"].dtype == np.float64


def test_minnesota_is_read_as_rows_of_houses(data_folder):
    table = {"log_radon": [0.1], "floor_measure": [1], "county_idx": [7], "log_uppm": [-0.5]}
    (data_folder / "radon_mn.json").write_text(json.dumps(table))
    houses = {name: column.tolist() for name, column in datasets.radon_minnesota().items()}
    assert houses == {"log_radon": [0.1], "floor": [1], "county": ["county 07"], "uranium": [-0.5]}


def test_real_radon_of_states():
    needs("radon/radon_states.npz")
    for part in datasets.radon_states():
        assert {name: a.shape for name, a in part.items()} == dict.fromkeys(
            ("obs", "basement", "log_uranium"), (4, 150)
        )
        assert set(np.unique(part["basement"])) == {0.0, 1.0}
        assert part["obs"].min() >= np.log(0.1) - 1e-6


def test_real_radon_of_counties():
    needs("radon/radon_counties.npz")
    train, test = datasets.radon_counties()
    assert train["obs"].shape == test["log_uranium"].shape == (7, 5, 5)


def test_real_radon_of_minnesota():
    needs("posteriordb/radon_mn-radon_hierarchical_intercept_centered/data.json")
    houses = datasets.radon_minnesota()
    assert {len(column) for column in houses.values()} == {919}
    assert len(set(houses["county"])) == 85
    assert len(set(zip(houses["county"], houses["uranium"], strict=True))) == 85
