"""Classic tables against sums known from their sources; loaders on made files and on real ones."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ppl import DataError
from ppl.models import datasets, files
from tests.data_files import data_file


def test_eight_schools_are_those_of_the_textbook():
    data = datasets.eight_schools()
    weights = 1 / np.square(data["sigma"])
    # [Gelman2013] section 5.5: the pooled estimate is 7.7 with standard error 4.1.
    assert round(float(np.average(data["y"], weights=weights)), 1) == 7.7
    assert round(float(weights.sum() ** -0.5), 1) == 4.1
    assert data["school"] == list("ABCDEFGH")


def test_rats_agree_with_the_table_of_posteriordb():
    name = "posteriordb/rats_data-rats_model/data.json"
    data_file(name)
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
    monkeypatch.setattr(files, "_CHECKOUT", checkout)
    monkeypatch.setenv("PPL_DATA", str(named))
    assert datasets.find("a.json") == beside / "a.json"
    (named / "a.json").touch()
    assert datasets.find("a.json") == named / "a.json"


def test_an_installed_package_looks_only_where_it_is_told(tmp_path, monkeypatch):
    (tmp_path / "shared" / "data").mkdir(parents=True)
    (tmp_path / "shared" / "data" / "a.json").touch()
    monkeypatch.setattr(files, "_CHECKOUT", tmp_path / "site-packages")
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
    data_file("radon/radon_states.npz")
    for part in datasets.radon_states():
        assert {name: a.shape for name, a in part.items()} == dict.fromkeys(
            ("obs", "basement", "log_uranium"), (4, 150)
        )
        assert set(np.unique(part["basement"])) == {0.0, 1.0}
        assert part["obs"].min() >= np.log(0.1) - 1e-6


def test_real_radon_of_counties():
    data_file("radon/radon_counties.npz")
    train, test = datasets.radon_counties()
    assert train["obs"].shape == test["log_uranium"].shape == (7, 5, 5)


def test_real_radon_of_minnesota():
    data_file("posteriordb/radon_mn-radon_hierarchical_intercept_centered/data.json")
    houses = datasets.radon_minnesota()
    assert {len(column) for column in houses.values()} == {919}
    assert len(set(houses["county"])) == 85
    assert len(set(zip(houses["county"], houses["uranium"], strict=True))) == 85


PLATED = {
    "bus_breakdown": (datasets.bus_breakdown, "bus_breakdown/split_0.npz"),
    "movielens": (datasets.movielens, "movielens/movielens_simulated.npz"),
    "occupancy": (datasets.occupancy, "occupancy/split_0.npz"),
    "covid": (datasets.covid, "covid/covid_daily.npz"),
    "chimpanzees": (datasets.chimpanzees, "chimpanzees.csv"),
}


@pytest.mark.parametrize("name", PLATED)
def test_absent_data_of_plated_models_are_named_with_their_source(name, data_folder):
    load, file = PLATED[name]
    with pytest.raises(DataError) as error:
        load()
    for part in (file, str(data_folder), "https://github.com/", "PPL_DATA"):
        assert part in str(error.value)


@pytest.mark.parametrize("load", [datasets.bus_breakdown, datasets.occupancy])
def test_a_draw_that_is_not_there_is_refused(load):
    with pytest.raises(DataError, match="draw=7: there are [35], 0 to [24]"):
        load(7)


def test_birds_of_the_file_are_turned_outermost(data_folder):
    (data_folder / "occupancy").mkdir()
    obs = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    np.savez(data_folder / "occupancy" / "split_2.npz", obs_train=obs, obs_test=obs[:, :, :1])
    train, test = datasets.occupancy(2)
    assert np.array_equal(train["obs"], obs.swapaxes(0, 1)) and test["obs"].shape == (3, 2, 1)


@pytest.mark.parametrize("weekly", [False, True])
def test_covid_is_cut_in_time(weekly, data_folder):
    (data_folder / "covid").mkdir()
    obs = np.arange(10).reshape(2, 5)
    file = f"covid_{'weekly' if weekly else 'daily'}.npz"
    np.savez(data_folder / "covid" / file, obs=obs, wearing=obs + 0.5, n_train=3)
    train, test = datasets.covid(weekly=weekly)
    assert np.array_equal(train["obs"], obs[:, :3]) and np.array_equal(test["obs"], obs[:, 3:])
    assert test["wearing"].tolist() == [[3.5, 4.5], [8.5, 9.5]] and set(test) == set(train)


def test_chimpanzees_are_read_in_runs_of_twelve_rows(data_folder):
    rows = [f"{i // 72 + 1};NA;0;1;{i};{i % 2};0;{i % 3 // 2}" for i in range(504)]
    names = ("actor", "recipient", "condition", "block", "trial", "prosoc_left", "chose_prosoc")
    header = ";".join(f'"{name}"' for name in (*names, "pulled_left"))
    (data_folder / "chimpanzees.csv").write_text("\n".join([header, *rows]))
    train, test = datasets.chimpanzees()
    whole = np.concatenate([train["obs"], test["obs"]], 2)
    assert train["obs"].shape == (7, 6, 10) and test["condition"].shape == (7, 6, 2)
    assert np.array_equal(whole.ravel(), np.arange(504) % 3 // 2)
    assert np.array_equal(train["prosoc_left"][0, 0], np.arange(10) % 2)


@pytest.mark.parametrize("draw, companies, run_types", [(0, 59, 8), (2, 36, 6)])
def test_real_buses(draw, companies, run_types):
    data_file(f"bus_breakdown/split_{draw}.npz")
    for part in datasets.bus_breakdown(draw):
        assert part["obs"].shape == (2, 3, 150)
        assert part["company"].shape[-1] == companies and (part["company"].sum(-1) == 1).all()
        assert part["run_type"].shape[-1] == run_types and (part["run_type"].sum(-1) == 1).all()


def test_real_ratings():
    data_file("movielens/movielens_simulated.npz")
    data_file("movielens/movielens_as_shipped.npz")
    drawn, shipped = datasets.movielens(), datasets.movielens(simulated=False)
    assert (drawn.train["x"].sum(-1) > 0).all() and 0.3 < drawn.train["obs"].mean() < 0.7
    # The published file has no information: no rating, and rows of flags that are all alike.
    assert not shipped.train["obs"].any() and not shipped.test["obs"].any()
    assert int((shipped.test["x"].sum(-1) == 0).sum()) == 1361


def test_real_birds_are_seen_on_every_visit():
    data_file("occupancy/split_0.npz")
    train, test = datasets.occupancy()
    assert train["obs"].shape == (12, 6, 200, 5) and test["weather"].shape == (12, 6, 100)
    assert (train["obs"].sum(-1) > 0).all() and (test["obs"].sum(-1) > 0).all()


def test_real_covid():
    data_file("covid/covid_daily.npz")
    train, test = datasets.covid()
    assert train["npis"].shape == (92, 109, 9) and test["obs"].shape == (92, 28)


def test_real_chimpanzees():
    data_file("chimpanzees.csv")
    train, test = datasets.chimpanzees()
    # 504 pulls, 292 of them of the left lever; the partner is there in half of them.
    assert train["obs"].sum() + test["obs"].sum() == 292
    assert train["condition"].sum() + test["condition"].sum() == 252
