"""Binding: sizes, labels, memberships and arrays of a model and its data."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
import xarray as xr

from ppl import (
    Bernoulli,
    Categorical,
    DataError,
    Normal,
    Poisson,
    given,
    latent,
    model,
    observe,
    plate,
)


@model
def radon():
    county = plate("county")
    house = plate("house", within=county)
    with county:
        level = latent("level", Normal(given("uranium"), 1.0))
    with house:
        observe("y", Normal(level, 1.0))


@model
def grouped():
    group = plate("group")
    with group:
        level = latent("level", Normal(0.0, 1.0))
    with plate("row", within=group):
        observe("y", Normal(level, 1.0))


@model
def line():
    with plate("row"):
        observe("y", Normal(given("x", default=0.5), 1.0))


@model
def grid():
    with plate("a"), plate("b"):
        observe("y", Normal(given("x"), 1.0))


@model
def movies():
    user, film = plate("user"), plate("film")
    with user:
        taste = latent("taste", Normal(0.0, 1.0))
    with film:
        quality = latent("quality", Normal(given("year"), 1.0))
    with plate("rating", within=(user, film)):
        observe("stars", Normal(taste + quality, 1.0))


ROWS = {"county": ["b", "a", "b", "c"], "y": [1.0, 2.0, 3.0, 4.0], "uranium": [0.5, 0.1, 0.5, 0.9]}


def as_xarray(rows):
    return xr.Dataset({name: ("house", list(values)) for name, values in rows.items()})


FRAMES = [
    ("mapping", dict),
    ("pandas", pd.DataFrame),
    ("polars", pl.DataFrame),
    ("xarray", as_xarray),
]


@pytest.mark.parametrize(("name", "make"), FRAMES, ids=[f[0] for f in FRAMES])
def test_a_row_table_gives_groups_and_their_covariates(name, make):
    bound = radon.bind(make(ROWS))
    assert list(bound.labels["county"]) == ["a", "b", "c"]
    assert bound.maps["house", "county"].tolist() == [1, 0, 1, 2]
    assert bound.values["uranium"].tolist() == [0.1, 0.5, 0.9]
    assert bound.size("house") == 4
    assert bound.shape(bound.graph.variables["level"]) == (3,)


@pytest.mark.parametrize(("name", "make"), FRAMES, ids=[f[0] for f in FRAMES])
def test_a_covariate_that_differs_within_its_group_is_refused(name, make):
    rows = {**ROWS, "uranium": [0.5, 0.1, 0.4, 0.9]}
    with pytest.raises(
        DataError, match=r"'uranium' is read once for each county.*within county 'b' \(row 2\)"
    ):
        radon.bind(make(rows))


def test_labels_and_not_positions_say_whose_covariate_it_is():
    @model
    def m():
        county = plate("county")
        with county:
            observe("rate", Normal(given("uranium"), 1.0))

    bound = m.bind({"county": ["Z", "A"], "uranium": [5.0, -5.0], "rate": [1.0, 2.0]})
    assert list(bound.labels["county"]) == ["A", "Z"]
    assert bound.values["uranium"].tolist() == [-5.0, 5.0]
    assert bound.values["rate"].tolist() == [2.0, 1.0]


@pytest.mark.parametrize("houses", [2, 3])
def test_one_unsorted_row_a_group_under_a_tree(houses):
    @model
    def m():
        county = plate("county")
        with county:
            level = latent("level", Normal(given("uranium"), 1.0))
        with plate("house", within=county, by="home"):
            observe("y", Normal(level, 1.0))

    data = {"county": ["Z", "A"], "uranium": [5, -5], "home": ["A", "Z", "Z"][:houses]}
    bound = m.bind({**data, "y": [1.0, 2.0, 3.0][:houses]})
    assert list(bound.labels["county"]) == ["A", "Z"]
    assert bound.values["uranium"].tolist() == [-5.0, 5.0]
    assert bound.maps["house", "county"].tolist() == [0, 1, 1][:houses]


def test_a_membership_with_one_unsorted_row_a_group():
    bound = radon.bind({"county": ["Z", "A"], "uranium": [5, -5], "y": [1.0, 2.0]})
    assert list(bound.labels["county"]) == ["A", "Z"]
    assert bound.values["uranium"].tolist() == [-5.0, 5.0]
    assert bound.maps["house", "county"].tolist() == [1, 0]


def test_a_covariate_in_the_order_of_given_labels():
    data = {"county": ["b", "a", "b"], "y": [1.0, 2.0, 3.0], "uranium": [0.5, 0.1]}
    bound = radon.bind(data, labels={"county": ["b", "a"]})
    assert list(bound.labels["county"]) == ["b", "a"]
    assert bound.maps["house", "county"].tolist() == [0, 1, 0]
    assert bound.values["uranium"].tolist() == [0.5, 0.1]


def films_in(order):
    return pd.DataFrame({"film": list(order), "year": [{"a": 1, "b": 2, "c": 3}[f] for f in order]})


@pytest.mark.parametrize("order", ["abc", "cab", "bca"])
def test_a_second_frame_goes_by_its_key(order):
    ratings = pd.DataFrame(
        {"user": [7, 3, 7, 3], "film": ["c", "a", "b", "b"], "stars": [1.0, 2.0, 3.0, 4.0]}
    )
    bound = movies.bind([ratings, films_in(order)])
    assert list(bound.labels["film"]) == ["a", "b", "c"]
    assert list(bound.labels["user"]) == [3, 7]
    assert bound.values["year"].tolist() == [1.0, 2.0, 3.0]
    assert bound.maps["rating", "film"].tolist() == [2, 0, 1, 1]
    assert bound.maps["rating", "user"].tolist() == [1, 0, 1, 0]


def test_a_second_frame_with_integer_keys_that_are_not_in_order():
    ratings = pl.DataFrame({"user": [0, 1], "film": [2, 0], "stars": [1.0, 2.0]})
    films = pl.DataFrame({"film": [2, 0, 1], "year": [20.0, 0.0, 10.0]})
    bound = movies.bind([ratings, films])
    assert bound.values["year"].tolist() == [0.0, 10.0, 20.0]
    assert bound.maps["rating", "film"].tolist() == [2, 0]


def test_a_film_without_ratings_and_a_rating_without_a_film():
    ratings = pd.DataFrame({"user": [0, 0], "film": ["a", "b"], "stars": [1.0, 2.0]})
    assert movies.bind([ratings, films_in("abc")]).size("film") == 3
    with pytest.raises(DataError, match=r"'year' has no row for film \['b'\]"):
        movies.bind([ratings, films_in("ac")])


def test_categoricals_keep_their_order_and_the_unused():
    kind = pd.CategoricalDtype(["low", "mid", "high"])
    frame = pd.DataFrame(
        {"group": pd.Series(["high", "low", "high"], dtype=kind), "y": [1.0, 2.0, 3.0]}
    )
    bound = grouped.bind(frame)
    assert list(bound.labels["group"]) == ["low", "mid", "high"]
    assert bound.maps["row", "group"].tolist() == [2, 0, 2]


CODES = [
    ("dense", [0, 2, 1, 0], range(3), [0, 2, 1, 0]),
    ("gaps", [10, 30, 10, 20], [10, 20, 30], [0, 2, 0, 1]),
    ("from-one", [1, 2, 3, 1], [1, 2, 3], [0, 1, 2, 0]),
    ("negative", [-1, 5, 5, -1], [-1, 5], [0, 1, 1, 0]),
    ("floats", [2.0, 7.0, 2.0, 7.0], [2, 7], [0, 1, 0, 1]),
    ("uint8", np.array([3, 3, 9, 3], dtype=np.uint8), [3, 9], [0, 0, 1, 0]),
    ("booleans", [True, False, True, True], None, [1, 0, 1, 1]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "codes", "labels", "positions"), CODES, ids=[c[0] for c in CODES])
def test_integer_codes(name, codes, labels, positions):
    bound = grouped.bind({"group": codes, "y": [1.0, 2.0, 3.0, 4.0]})
    if labels is not None:
        assert list(bound.labels["group"]) == list(labels)
    assert bound.maps["row", "group"].tolist() == positions


def test_sizes_leave_room_for_groups_without_rows():
    bound = grouped.bind({"group": [0, 2, 0], "y": [1.0, 2.0, 3.0]}, sizes={"group": 5})
    assert bound.size("group") == 5 and bound.maps["row", "group"].tolist() == [0, 2, 0]


def test_fractions_are_no_codes():
    with pytest.raises(DataError, match="'group' names elements of a plate"):
        grouped.bind({"group": [0.5, 1.0], "y": [1.0, 2.0]})
    with pytest.raises(DataError, match="'group' names elements of a plate"):
        grouped.bind({"group": [None, 1.0], "y": [1.0, 2.0]})


@model
def nested():
    county = plate("county")
    zone = plate("zip", within=county)
    with county:
        a = latent("a", Normal(0.0, 1.0))
    with zone:
        b = latent("b", Normal(a, 1.0))
    with plate("house", within=zone):
        observe("y", Normal(a + b, 1.0))


def test_the_groups_of_groups_come_from_the_rows():
    rows = pd.DataFrame(
        {
            "zip": ["z2", "z1", "z3", "z2"],
            "county": ["B", "A", "B", "B"],
            "y": [1.0, 2.0, 3.0, 4.0],
        }
    )
    bound = nested.bind(rows)
    assert bound.maps["zip", "county"].tolist() == [0, 1, 1]
    assert bound.maps["house", "zip"].tolist() == [1, 0, 2, 1]
    assert bound.maps["house", "county"].tolist() == [1, 0, 1, 1]
    rows.loc[3, "county"] = "A"
    with pytest.raises(DataError, match=r"'county' is read once for each zip.*within zip 'z2'"):
        nested.bind(rows)


def test_the_groups_of_groups_from_a_mapping_of_two_lengths():
    data = {"county": ["A", "B", "B"], "zip": [1, 0, 2, 1], "y": [1.0, 2.0, 3.0, 4.0]}
    bound = nested.bind(data)
    assert bound.maps["zip", "county"].tolist() == [0, 1, 1]
    assert bound.maps["house", "county"].tolist() == [1, 0, 1, 1]


# ---- arrays ------------------------------------------------------------------------------------


def test_a_float64_array_is_not_copied():
    y = np.array([1.0, 2.0])
    assert line.bind({"y": y}).values["y"].data_ptr() == y.ctypes.data


def test_arrays_follow_the_dtype_of_the_run():
    bound = line.bind({"y": np.array([1, 2]), "x": [1.0, 2.0]}, dtype=torch.float32)
    assert bound.dtype == torch.float32
    assert {t.dtype for t in bound.values.values()} == {torch.float32}


def test_counts_and_booleans_are_observed():
    @model
    def m():
        with plate("row"):
            observe("count", Poisson(2.0))
            observe("hit", Bernoulli(0.5))
            observe("kind", Categorical(torch.ones(3) / 3))

    data = {"count": np.array([3, 0], dtype=np.uint8), "hit": [True, False], "kind": [2, 0]}
    bound = m.bind(data)
    assert bound.values["count"].tolist() == [3.0, 0.0]
    assert bound.values["hit"].tolist() == [True, False]
    assert bound.values["kind"].tolist() == [2, 0]


def test_a_scalar_is_data_without_plates():
    @model
    def m():
        observe("y", Normal(given("x"), 1.0))

    bound = m.bind({"y": 1.5, "x": np.float64(2.0)})
    assert bound.values["y"].shape == () and float(bound.values["x"]) == 2.0


@pytest.mark.parametrize("dims", [("a", "b"), ("b", "a")])
def test_xarray_goes_by_dimension_names_and_coordinates_are_labels(dims):
    values = xr.DataArray(
        np.arange(6.0).reshape(2, 3), dims=("a", "b"), coords={"b": ["u", "v", "w"]}
    )
    bound = grid.bind(xr.Dataset({"y": values.transpose(*dims), "x": values}))
    assert bound.values["y"].tolist() == values.values.tolist()
    assert list(bound.labels["b"]) == ["u", "v", "w"] and bound.size("a") == 2


def test_xarray_coordinates_in_another_order_are_labels_too():
    y = xr.DataArray([1.0, 2.0], dims="row", coords={"row": ["p", "q"]})
    x = xr.DataArray([20.0, 10.0], dims="row", coords={"row": ["q", "p"]})
    bound = line.bind({"y": y, "x": x})
    labels = list(bound.labels["row"])
    assert sorted(labels) == ["p", "q"]
    assert dict(zip(labels, bound.values["x"].tolist(), strict=True)) == {"p": 10.0, "q": 20.0}
    assert dict(zip(labels, bound.values["y"].tolist(), strict=True)) == {"p": 1.0, "q": 2.0}


def test_defaults_fill_in_for_an_absent_covariate():
    bound = line.bind({"y": [1.0, 2.0]})
    assert bound.values["x"].tolist() == [0.5, 0.5]
    assert line.bind({"y": [1.0, 2.0], "x": [3.0, 4.0]}).values["x"].tolist() == [3.0, 4.0]


INDEXED = [
    ("positions", {"i": [2, 0]}, {}, [2, 0]),
    ("labels", {"i": ["c", "a"]}, {"labels": {"pose": ["a", "b", "c"]}}, [2, 0]),
    ("other-order", {"i": ["c", "a"]}, {"labels": {"pose": ["c", "b", "a"]}}, [0, 2]),
    ("key", {"pose": ["x", "y", "z"], "i": ["z", "x"]}, {}, [2, 0]),
]


@pytest.mark.parametrize(
    ("name", "data", "options", "positions"), INDEXED, ids=[i[0] for i in INDEXED]
)
def test_an_index_points_by_position_or_label(name, data, options, positions):
    @model
    def m():
        pose = plate("pose", 3)
        with pose:
            x = latent("x", Normal(0.0, 1.0))
        with plate("edge"):
            observe("y", Normal(x[given("i", index=pose)], 1.0))

    bound = m.bind({**data, "y": [1.0, 2.0]}, **options)
    assert bound.values["i"].tolist() == positions
    assert bound.values["i"].dtype == torch.long


# ---- missing entries ---------------------------------------------------------------------------

ABSENT = [
    ("nan", [1.0, float("nan"), 3.0]),
    ("None", [1.0, None, 3.0]),
    ("masked", np.ma.array([1.0, 2.0, 3.0], mask=[0, 1, 0])),
    ("polars", pl.Series([1.0, None, 3.0])),
]


@pytest.mark.parametrize(("name", "y"), ABSENT, ids=[a[0] for a in ABSENT])
def test_missing_entries_are_masked_and_counted(name, y):
    bound = line.bind({"y": y})
    assert bound.masks["y"].tolist() == [True, False, True]
    assert not bound.values["y"].isnan().any()
    assert bound.report == ("1 of 3 entries of 'y' are missing and were marginalised",)
    with pytest.raises(
        DataError, match="'y': 1 entries are missing, the first at row 1.*marginalise"
    ):
        line.bind({"y": y}, missing="error")


def test_missing_entries_do_not_change_the_users_array():
    y = np.array([1.0, np.nan])
    line.bind({"y": y})
    assert np.isnan(y[1])


def test_columns_that_the_model_does_not_use_are_reported():
    assert line.bind({"y": [1.0], "weather": [3.0]}).report == ("not used: weather",)
    assert line.bind(pd.DataFrame({"y": [1.0], "weather": [3.0]})).report == ()


BROKEN = [
    ("absent", line, {"x": [1.0]}, {}, r"observe\('y'\).*has no such name"),
    ("all-missing", line, {"y": [None, None]}, {}, "every entry is missing"),
    ("infinite", line, {"y": [1.0], "x": [float("inf")]}, {}, "'x' .*NaN or infinite.*row 0"),
    ("two-sizes", line, {"y": [1.0], "x": [1.0, 2.0]}, {}, "plate 'row' has two sizes: (1.*2|2.*1)"),
    ("size-argument", line, {"y": [1.0]}, {"sizes": {"row": 2}}, "two sizes.*sizes={'row': 2}"),
    ("label-argument", line, {"y": [1.0]}, {"labels": {"row": "ab"}}, "two sizes.*labels of 'row'"),
    ("label-twice", line, {"y": [1.0, 2.0]}, {"labels": {"row": "aa"}}, "'a' stands twice"),
    ("no-plate", line, {"y": [1.0]}, {"sizes": {"rows": 1}}, "'rows'.*Did you mean 'row'"),
    ("transposed", grid, {"y": torch.zeros(2, 3), "x": torch.zeros(3, 2)}, {}, "two sizes"),
    ("misspelt", grouped, {"y": [1.0], "group": [0], "levle": [1.0]}, {}, "Did you mean 'level'"),
    ("labels-count", radon, {"county": ["a", "b"], "y": [1.0, 2.0], "uranium": [1, 2, 3]}, {}, "3"),
    ("too-few-axes", grid, {"y": [1.0], "x": [1.0]}, {}, "expected 2 leading axes"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "program", "data", "options", "text"), BROKEN, ids=[b[0] for b in BROKEN]
)
def test_data_that_does_not_fit_is_said(name, program, data, options, text):
    with pytest.raises(DataError) as caught:
        program.bind(data, **options)
    assert re.search(text, str(caught.value)), str(caught.value)
