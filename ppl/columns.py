"""Read the user's data: mappings of arrays, data frames, xarray, or lists of these, as named columns."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl.errors import DataError


@dataclass(frozen=True, eq=False)
class Column:
    """One named array. Numbers are a tensor (shared with the user's array), text is a NumPy array.

    ``table`` numbers the data frame that it is a column of, None for arrays of a mapping; ``dims`` are xarray's.
    """

    name: str
    values: Tensor | np.ndarray
    table: int | None = None
    dims: tuple[str, ...] | None = None
    coords: Mapping[str, Sequence[Any]] | None = None
    categories: tuple[Any, ...] | None = None

    @property
    def is_text(self) -> bool:
        """Whether the entries are labels and not numbers."""
        return not isinstance(self.values, Tensor)

    @property
    def is_sparse(self) -> bool:
        """Whether the array is a sparse matrix, which is kept as rows of non-zero entries (CSR)."""
        return isinstance(self.values, Tensor) and self.values.layout != torch.strided

    def arranged(self, plates: tuple[str, ...]) -> Tensor | np.ndarray:
        """The array with the axes of ``plates`` in front; xarray goes by dimension name."""
        if self.dims is None:
            return self.values
        absent = [p for p in plates if p not in self.dims]
        if absent and len(self.dims) == len(plates):  # other names for the same axes: by position
            return self.values
        if absent:
            raise DataError(
                f"'{self.name}': expected a dimension called '{absent[0]}', got dimensions {self.dims}. "
                "Rename the dimension, or pass the plain array with the plates as its leading axes."
            )
        order = [self.dims.index(p) for p in plates]
        order += [i for i in range(len(self.dims)) if i not in order]
        return (
            self.values.permute(order)
            if isinstance(self.values, Tensor)
            else self.values.transpose(order)
        )

    def event_shape(self, plates: tuple[str, ...]) -> tuple[int, ...]:
        """Shape of one element when ``plates`` are the leading axes."""
        shape = tuple(self.arranged(plates).shape)
        if len(shape) < len(plates):
            raise DataError(
                f"'{self.name}': expected {len(plates)} leading axes for the plates {plates}, got shape {list(shape)}. "
                "Open only the plates that the array varies over, or add the missing axis."
            )
        return shape[len(plates) :]

    def element(self, plates: tuple[str, ...], dtype: torch.dtype) -> Tensor:
        """The first element, as a floating-point tensor of shape ``event_shape``."""
        shape = self.event_shape(plates)
        if self.is_text:
            raise DataError(
                f"'{self.name}' holds text ({self.values.ravel()[:1].tolist()}), but the model uses it as numbers. "
                f"Use it as labels: plate(..., by='{self.name}') or given('{self.name}', index=plate)."
            )
        values = self.arranged(plates)
        if values.numel() == 0:  # type: ignore[union-attr]
            raise DataError(
                f"'{self.name}' is empty: got shape {list(values.shape)}. Pass at least one element."
            )
        if self.is_sparse:  # never written out; a zero is as good an element as any
            return torch.zeros((), dtype=dtype).expand(shape)
        first = values[(0,) * len(plates)].reshape(shape)  # type: ignore[union-attr]
        return first.to(device="cpu", dtype=torch.bool if first.dtype == torch.bool else dtype)


class Columns(Mapping[str, Column]):
    """All columns of the data, by name; a name may stand in several tables (a key)."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._all = list(columns)
        self._first: dict[str, Column] = {}
        for column in columns:
            self._first.setdefault(column.name, column)

    def __getitem__(self, name: str) -> Column:
        return self._first[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._first)

    def __len__(self) -> int:
        return len(self._first)

    def all(self, name: str) -> list[Column]:
        """Every column of this name, one a table."""
        return [c for c in self._all if c.name == name]

    def beside(self, column: Column, name: str) -> Column | None:
        """The column ``name`` of the same table (or mapping) as ``column``."""
        return next((c for c in self._all if c.name == name and c.table == column.table), None)

    def with_arrays(self, arrays: Mapping[str, Any]) -> Columns:
        """A copy in which ``arrays`` replace or extend the columns."""
        added = [read_column(name, value) for name, value in arrays.items()]
        return Columns([c for c in self._all if c.name not in arrays] + added)

    def without(self, names: Sequence[str]) -> Columns:
        """A copy that lacks ``names``."""
        return Columns([c for c in self._all if c.name not in names])


def read_data(data: Any) -> Columns:
    """Turn what the user passed into columns.

    Args:
        data: None, a mapping of arrays, a data frame (pandas, polars, arrow), an xarray Dataset, or a list of these.

    Raises:
        DataError: another type, or one name in two mappings.

    >>> sorted(read_data({"y": [1.0, 2.0], "x": [0, 1]}))
    ['x', 'y']
    """
    if isinstance(data, Columns):
        return data
    parts = list(data) if isinstance(data, (list, tuple)) else [] if data is None else [data]
    columns: list[Column] = []
    for number, part in enumerate(parts):
        columns.extend(_read_part(part, number))
    _check_duplicates(columns)
    return Columns(columns)


def _read_part(part: Any, number: int) -> list[Column]:
    if hasattr(part, "data_vars"):  # xarray.Dataset
        return [_from_xarray(str(name), part[name]) for name in part.data_vars]
    if isinstance(part, Mapping):
        return [read_column(name, value) for name, value in part.items()]
    names = getattr(part, "column_names", None) or getattr(part, "columns", None)
    if names is not None and hasattr(part, "__getitem__"):
        return [_from_frame(str(name), part[name], number) for name in names]
    raise DataError(
        f"data: expected a mapping of arrays, a data frame, an xarray Dataset or a list of these, got "
        f"{type(part).__name__}. Wrap arrays in a dictionary: {{'y': array}}."
    )


def read_column(name: str, value: Any) -> Column:
    """One entry of a mapping as a column."""
    if not isinstance(name, str):
        raise DataError(f"data: keys are the names of sites, got {name!r}. Use strings.")
    if isinstance(value, Column):
        return value
    if hasattr(value, "dims") and hasattr(value, "coords") and hasattr(value, "values"):
        return _from_xarray(name, value)
    if isinstance(value, Tensor):
        dense = value.layout == torch.strided
        return Column(name, value.detach() if dense else _csr(name, value.detach()))
    if hasattr(value, "tocsr"):  # scipy's sparse matrices and arrays
        return Column(name, _from_scipy(name, value))
    if hasattr(value, "to_numpy"):  # a pandas or polars series
        return Column(name, _as_array(name, value.to_numpy()), categories=_categories(value))
    return Column(name, _as_array(name, value))


def _from_scipy(name: str, matrix: Any) -> Tensor:
    if getattr(matrix, "ndim", 2) != 2 or matrix.dtype.kind not in "biuf":
        raise DataError(
            f"'{name}': expected a sparse matrix of numbers with two axes, got {matrix.ndim} axes of {matrix.dtype}. "
            "Pass a dense array."
        )
    rows = matrix.tocsr()
    rows.sum_duplicates()
    starts, places = (torch.from_numpy(x.astype(np.int64)) for x in (rows.indptr, rows.indices))
    with quiet():
        return torch.sparse_csr_tensor(starts, places, torch.from_numpy(rows.data), rows.shape)


def _csr(name: str, matrix: Tensor) -> Tensor:
    if matrix.ndim != 2:
        raise DataError(
            f"'{name}': expected a sparse matrix of two axes, got shape {list(matrix.shape)}. "
            f"Pass {name}.to_dense()."
        )
    with quiet():
        return matrix.to_sparse_csr()


def quiet() -> warnings.catch_warnings:
    """Torch calls its CSR tensors a beta feature, once a process; not inside this context."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def _from_frame(name: str, series: Any, table: int) -> Column:
    return Column(
        name, _as_array(name, series.to_numpy()), table=table, categories=_categories(series)
    )


def _from_xarray(name: str, array: Any) -> Column:
    dims = tuple(str(d) for d in array.dims)
    coords = {d: array.coords[d].values.tolist() for d in dims if d in array.coords}
    return Column(name, _as_array(name, array.values), dims=dims, coords=coords)


def _categories(series: Any) -> tuple[Any, ...] | None:
    # pandas keeps the order of categories; polars' `cat` namespace has get_categories, in order of appearance.
    dtype = getattr(series, "dtype", None)
    if str(dtype).startswith("Enum"):  # polars' categories with an order
        return tuple(dtype.categories)  # type: ignore[union-attr]
    if "categor" not in str(dtype).lower():
        return None
    categories = getattr(getattr(series, "cat", None), "categories", None)
    return None if categories is None else tuple(categories.tolist())


def _as_array(name: str, value: Any) -> Tensor | np.ndarray:
    try:
        array = value if isinstance(value, np.ndarray) else np.asarray(_plain(value))
    except ValueError as error:
        raise DataError(
            f"'{name}': the rows have different lengths ({error}). Use a flat array and plate(..., within=parent)."
        ) from None
    if isinstance(value, np.ma.MaskedArray):
        array = np.ma.filled(value.astype(float), np.nan)
    if array.dtype == object:
        array = _from_objects(name, array)
    if array.dtype.kind in "US":
        return array.astype(str)
    if array.dtype.kind in "mM":
        raise DataError(f"'{name}' holds dates. Pass labels={{plate: dates}}, or numbers of days.")
    if array.dtype.kind not in "biuf":
        raise DataError(
            f"'{name}': expected numbers or labels, got entries of type {array.dtype}. Convert the column."
        )
    if not array.flags.writeable or any(s < 0 for s in array.strides) or not array.dtype.isnative:
        array = np.array(array, dtype=array.dtype.newbyteorder("="))
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    return torch.from_numpy(array)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        return np.stack([v.detach().cpu().numpy() for v in value])
    if isinstance(value, range):
        return list(value)
    if isinstance(value, (list, tuple)) and any(isinstance(v, str) for v in value):
        return np.array(
            value, dtype=object
        )  # NumPy would write numbers and None among text as text
    return value


def _from_objects(name: str, array: np.ndarray) -> np.ndarray:
    flat = array.ravel()
    empty = np.array([_is_missing(v) for v in flat], dtype=bool)
    if all(isinstance(v, str) for v in flat[~empty]) and (~empty).any():
        if empty.any():
            raise DataError(
                f"'{name}': {int(empty.sum())} labels are missing, the first in row {int(np.argmax(empty))}. "
                "Drop those rows, or give them a label of their own."
            )
        return array.astype(str)
    try:
        return np.array(
            [np.nan if e else float(v) for v, e in zip(flat, empty, strict=True)]
        ).reshape(array.shape)
    except (TypeError, ValueError):
        kinds = sorted({type(v).__name__ for v in flat})
        raise DataError(
            f"'{name}': expected numbers or labels, got a mixture of {kinds}. Convert the column."
        ) from None


def _is_missing(value: Any) -> bool:
    # pandas.NA compares to pandas.NA, not to a truth value.
    return value is None or type(value).__name__ in ("NAType", "NaTType") or bool(value != value)


def _check_duplicates(columns: Sequence[Column]) -> None:
    seen: dict[str, Column] = {}
    for column in columns:
        first = seen.setdefault(column.name, column)
        if first is not column and column.table is None and first.table is None:
            raise DataError(
                f"'{column.name}' stands in two of the mappings. Keep one, or rename it."
            )
