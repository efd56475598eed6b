"""Reading data: arrays and frames of every kind become the same columns."""

from __future__ import annotations

import datetime
import re

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
import xarray as xr

from ppl import DataError
from ppl.columns import Column, read_column, read_data

NUMBERS = [
    ("list", [1, 2, 3]),
    ("floats", [1.0, 2.0, 3.0]),
    ("tuple", (1, 2, 3)),
    ("range", range(1, 4)),
    ("list-of-tensors", [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)]),
    ("tensor", torch.tensor([1.0, 2.0, 3.0])),
    ("parameter", torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))),
    ("float64", np.array([1.0, 2.0, 3.0])),
    ("float16", np.array([1, 2, 3], dtype=np.float16)),
    ("uint8", np.array([1, 2, 3], dtype=np.uint8)),
    ("uint16", np.array([1, 2, 3], dtype=np.uint16)),
    ("uint64", np.array([1, 2, 3], dtype=np.uint64)),
    ("big-endian", np.array([1, 2, 3], dtype=">f8")),
    ("reversed", np.array([3.0, 2.0, 1.0])[::-1]),
    ("object", np.array([1, 2.0, True + 2], dtype=object)),
    ("masked", np.ma.array([1.0, 2.0, 3.0])),
    ("pandas", pd.Series([1, 2, 3], index=[5, 6, 7])),
    ("pandas-nullable", pd.Series([1, 2, 3], dtype="Int64")),
    ("polars", pl.Series([1, 2, 3])),
    ("xarray", xr.DataArray([1.0, 2.0, 3.0], dims="row")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), NUMBERS, ids=[n[0] for n in NUMBERS])
def test_numbers_become_a_tensor(name, value):
    column = read_column("x", value)
    assert not column.is_text
    assert column.values.tolist() == [1, 2, 3]
    assert not column.values.requires_grad


ABSENT = [
    ("None", [1.0, None, 3.0]),
    ("nan", [1.0, float("nan"), 3.0]),
    ("masked", np.ma.array([1.0, 2.0, 3.0], mask=[0, 1, 0])),
    ("masked-int", np.ma.array([1, 2, 3], mask=[0, 1, 0])),
    ("pandas", pd.Series([1.0, None, 3.0])),
    ("pandas-nullable", pd.Series([1, None, 3], dtype="Int64")),
    ("pandas-NA", pd.Series([1, pd.NA, 3], dtype=object)),
    ("polars", pl.Series([1, None, 3])),
]


@pytest.mark.parametrize(("name", "value"), ABSENT, ids=[a[0] for a in ABSENT])
def test_missing_numbers_become_nan(name, value):
    values = read_column("x", value).values
    assert values.isnan().tolist() == [False, True, False]
    assert values[[0, 2]].tolist() == [1.0, 3.0]


TEXT = [
    ("list", ["b", "a", "b"]),
    ("numpy", np.array(["b", "a", "b"])),
    ("object", np.array(["b", "a", "b"], dtype=object)),
    ("pandas", pd.Series(["b", "a", "b"])),
    ("pandas-categorical", pd.Series(["b", "a", "b"], dtype="category")),
    ("polars", pl.Series(["b", "a", "b"])),
    ("polars-categorical", pl.Series(["b", "a", "b"], dtype=pl.Categorical)),
    ("xarray", xr.DataArray(["b", "a", "b"], dims="row")),
]


@pytest.mark.parametrize(("name", "value"), TEXT, ids=[t[0] for t in TEXT])
def test_text_becomes_labels(name, value):
    column = read_column("x", value)
    assert column.is_text
    assert column.values.tolist() == ["b", "a", "b"]


@pytest.mark.parametrize("kind", ["bool-list", "bool-numpy", "bool-pandas", "bool-polars"])
def test_booleans_stay_booleans(kind):
    raw = [True, False]
    value = {
        "bool-list": raw,
        "bool-numpy": np.array(raw),
        "bool-pandas": pd.Series(raw),
        "bool-polars": pl.Series(raw),
    }[kind]
    assert read_column("x", value).values.dtype == torch.bool


def test_categories_keep_their_order_and_the_unused_ones():
    kind = pd.CategoricalDtype(["low", "mid", "high"], ordered=True)
    assert read_column("x", pd.Series(["high", "low"], dtype=kind)).categories == (
        "low",
        "mid",
        "high",
    )
    assert read_column("x", pd.Series(["high", "low"])).categories is None
    frame = pd.DataFrame({"x": pd.Series(["high", "low"], dtype=kind)})
    assert read_data(frame)["x"].categories == ("low", "mid", "high")
    enum = pl.Series(["high", "low"], dtype=pl.Enum(["low", "mid", "high"]))
    assert read_column("x", enum).categories == ("low", "mid", "high")


def test_float64_arrays_are_shared_and_never_changed():
    array = np.array([1.0, 2.0])
    column = read_data({"x": array})["x"]
    assert column.values.data_ptr() == array.ctypes.data
    tensor = torch.tensor([1.0, 2.0])
    assert read_data({"x": tensor})["x"].values.data_ptr() == tensor.data_ptr()


def test_a_read_only_array_is_copied():
    array = np.array([1.0, 2.0])
    array.flags.writeable = False
    assert read_column("x", array).values.tolist() == [1.0, 2.0]


def test_a_number_is_a_scalar_column():
    for value in (1.5, 3, True, np.float64(1.5), torch.tensor(2.0), np.array(2.0)):
        column = read_column("x", value)
        assert column.event_shape(()) == ()
        assert float(column.element((), torch.float64)) == float(value)


BROKEN = [
    ("ragged", {"x": [[1.0], [1.0, 2.0]]}, "'x': the rows have different lengths"),
    ("mixed", {"x": [1.0, "a"]}, "'x'.*(mixture|numbers or labels)"),
    ("mixed-object", {"x": np.array([1.0, "a"], dtype=object)}, r"mixture of \['float', 'str'\]"),
    ("dates", {"x": np.array(["2020-01-01"], dtype="M8[D]")}, "'x' holds dates"),
    ("pandas-dates", pd.DataFrame({"x": pd.to_datetime(["2020-01-01"])}), "'x' holds dates"),
    ("python-dates", {"x": [datetime.date(2020, 1, 1)]}, "'x': expected numbers or labels"),
    ("complex", {"x": np.array([1j])}, "expected numbers or labels, got entries of type complex"),
    ("records", {"x": {"a": 1}}, "'x': expected numbers or labels"),
    ("missing-label", {"x": ["a", None]}, "'x': 1 labels are missing, the first in row 1"),
    ("missing-pandas", pd.DataFrame({"x": ["a", None]}), "'x': 1 labels are missing"),
    ("missing-polars", pl.DataFrame({"x": ["a", None]}), "'x': 1 labels are missing"),
    ("all-missing", {"x": [None, None]}, ""),
    ("key", {3: [1.0]}, "keys are the names of sites, got 3"),
    ("number", 3.0, "got float"),
    ("array", np.zeros(3), "got ndarray"),
    ("string", "file.csv", "got str"),
    ("twice", [{"x": [1.0]}, {"x": [2.0]}], "'x' stands in two of the mappings"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "text"), BROKEN, ids=[b[0] for b in BROKEN])
def test_what_cannot_be_read_is_said(name, data, text):
    if not text:
        assert read_data(data)["x"].values.isnan().all()
        return
    with pytest.raises(DataError) as caught:
        read_data(data)
    assert re.search(text, str(caught.value)), str(caught.value)


FRAMES = [
    ("pandas", pd.DataFrame({"y": [1.0, 2.0], "g": ["a", "b"]})),
    ("polars", pl.DataFrame({"y": [1.0, 2.0], "g": ["a", "b"]})),
    ("mapping", {"y": [1.0, 2.0], "g": ["a", "b"]}),
    ("xarray", xr.Dataset({"y": ("row", [1.0, 2.0]), "g": ("row", ["a", "b"])})),
]


@pytest.mark.parametrize(("name", "data"), FRAMES, ids=[f[0] for f in FRAMES])
def test_every_container_gives_the_same_columns(name, data):
    columns = read_data(data)
    assert list(columns) == ["y", "g"] and len(columns) == 2
    assert columns["y"].values.tolist() == [1.0, 2.0]
    assert columns["g"].values.tolist() == ["a", "b"]
    assert read_data(columns) is columns


def test_a_list_of_frames_knows_which_column_stands_beside_which():
    ratings = pd.DataFrame({"stars": [1.0, 2.0], "film": ["b", "a"]})
    films = pd.DataFrame({"film": ["a", "b"], "year": [1990, 2000]})
    columns = read_data([ratings, films])
    assert [c.table for c in columns.all("film")] == [0, 1]
    assert columns.beside(columns["year"], "film").values.tolist() == ["a", "b"]
    assert columns.beside(columns["stars"], "film").values.tolist() == ["b", "a"]
    assert columns.beside(columns["stars"], "year") is None


def test_copies_replace_extend_and_leave_out():
    columns = read_data({"x": [1.0], "y": [2.0]})
    more = columns.with_arrays({"y": [3.0], "z": [4.0]})
    assert {n: c.values.tolist() for n, c in more.items()} == {"x": [1.0], "y": [3.0], "z": [4.0]}
    assert list(more.without(["x"])) == ["y", "z"]
    assert columns["y"].values.tolist() == [2.0]


def test_xarray_axes_go_by_name():
    array = xr.DataArray(np.arange(6.0).reshape(2, 3), dims=("b", "a"))
    column = read_column("x", array)
    assert tuple(column.arranged(("a", "b")).shape) == (3, 2)
    assert column.event_shape(("a",)) == (2,)
    assert column.element(("a",), torch.float64).tolist() == [0.0, 3.0]
    with pytest.raises(DataError, match="expected a dimension called 'c'"):
        column.arranged(("c",))


def test_too_few_axes_and_no_elements():
    with pytest.raises(DataError, match="expected 2 leading axes"):
        read_column("x", [1.0]).event_shape(("a", "b"))
    with pytest.raises(DataError, match="'x' is empty"):
        read_column("x", []).element(("a",), torch.float64)
    with pytest.raises(DataError, match="'x' holds text"):
        read_column("x", ["a"]).element(("a",), torch.float64)


def test_an_element_has_the_dtype_of_the_run():
    column = read_column("x", np.array([3, 4], dtype=np.uint8))
    assert column.element(("row",), torch.float32).dtype == torch.float32
    assert read_column("x", [True]).element(("row",), torch.float32).dtype == torch.bool
    assert isinstance(column, Column) and read_column("x", column) is column
