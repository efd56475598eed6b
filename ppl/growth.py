"""More data for a model that was fitted already: new rows behind the old ones, old elements in place.

Nothing is said twice: the new data holds the new rows only. A plate grows where an array that
varies over it, or a column that points into it, has new entries; new elements stand behind the old
ones, so that positions and results of the old ones keep their meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.columns import Column, Columns, read_data
from ppl.continual import with_laws
from ppl.errors import DataError, nearest
from ppl.model import Model


def grown(
    model: Model[Any],
    old: Bound,
    data: Any,
    *,
    labels: Mapping[str, Sequence[Any]] | None = None,
    sizes: Mapping[str, int] | None = None,
    along: str | None = None,
) -> Bound:
    """The model bound to the old data and the new rows.

    Args:
        model: what was fitted.
        old: its data so far.
        data: new rows: a mapping of arrays, a data frame, or a list of these.
        labels: names of new elements, where no column of the new data tells.
        sizes: of plates after they have grown, where neither arrays nor pointers tell.
        along: plate along which arrays of several plates grow, where their shapes do not tell.

    Raises:
        DataError: rows that lack a column, columns that the old data did not have, or a plate
            ``along`` that the model does not have.
    """
    if along is not None and along not in old.graph.plates:
        raise DataError(
            f"extend: along={along!r} is no plate of the model.{nearest(along, old.graph.plates)} Plates: "
            f"{', '.join(old.graph.plates)}."
        )
    columns = appended(old, read_data(data), along)
    names = {p: [*old.labels[p], *new] for p, new in (labels or {}).items() if p in old.labels}
    bound = model.bind(
        columns,
        sizes=sizes,
        labels={**(labels or {}), **names},
        dtype=old.dtype,
        device=old.device,
        before={p: ls for p, ls in old.labels.items() if p not in names and p not in (sizes or {})},
    )
    _check_kept(old, bound)
    return with_laws(bound, old.prior, old.labels) if old.prior else bound


def appended(old: Bound, new: Columns, along: str | None = None) -> Columns:
    """The columns that the model reads, with the new rows behind the old ones.

    >>> import ppl
    >>> @ppl.model
    ... def noise():
    ...     with ppl.plate("row"):
    ...         ppl.observe("y", ppl.Normal(0.0, 1.0))
    >>> bound = noise.bind({"y": [1.0, 2.0]})
    >>> appended(bound, read_data({"y": [3.0]}))["y"].values.tolist()
    [1.0, 2.0, 3.0]
    """
    axes = _axes(old)
    known = [c for name in old.columns for c in old.columns.all(name) if name in axes]
    _check_known(new, known, axes)
    tables = _tables(known, new)
    grown = {c.table for c in known if c.table is not None and _match(c, new, tables) is not None}
    columns = []
    for column in known:
        rows = _match(column, new, tables)
        if rows is not None:
            columns.append(_joined(column, rows, axes[column.name], old, along))
        elif column.table in grown:
            raise DataError(
                f"'{column.name}': the new rows of the data frame lack this column. Add it; use NaN where a value of an "
                "observed site is missing."
            )
        else:
            columns.append(column)
    return Columns(columns)


def _axes(old: Bound) -> dict[str, tuple[str, ...]]:
    """Every name that the model reads in the data, and the plates that the array varies over."""
    graph = old.graph
    axes = {v.name: v.plates for v in graph.role("observed", "given", "latent")}
    for plate in graph.plates.values():
        for name in (plate.name, *plate.columns):
            axes.setdefault(name, (plate.name,))
    return axes


def _check_known(new: Columns, known: Sequence[Column], axes: Mapping[str, Any]) -> None:
    names = {c.name for c in known}
    for name in new:
        if name in axes and name not in names:
            raise DataError(
                f"'{name}' is in the new data, but was not in the earlier data, so that the model is another one. Fit all "
                "data at once, or leave it out."
            )
    if not any(name in names for name in new):
        raise DataError(
            f"extend: the new data has none of the columns of the model ({', '.join(sorted(names))}), got "
            f"{', '.join(new) or 'nothing'}."
        )


def _tables(known: Sequence[Column], new: Columns) -> dict[int, int]:
    """For every old data frame the new one with its columns."""
    found: dict[int, int] = {}
    fresh: dict[int, set[str]] = {}
    for name in new:
        for column in new.all(name):
            if column.table is not None:
                fresh.setdefault(column.table, set()).add(name)
    for table in {c.table for c in known if c.table is not None}:
        names = {c.name for c in known if c.table == table}
        shared = {t: len(names & have) for t, have in fresh.items() if t not in found.values()}
        if shared and max(shared.values()):
            found[table] = max(shared, key=lambda t: shared[t])
    return found


def _match(column: Column, new: Columns, tables: Mapping[int, int]) -> Column | None:
    """The new rows of a column; a mapping of arrays may continue a data frame."""
    rows = new.all(column.name)
    same = [c for c in rows if column.table is not None and c.table == tables.get(column.table)]
    plain = [c for c in rows if c.table is None]
    return next(iter((*same, *plain)), None)


def _joined(
    column: Column, rows: Column, plates: tuple[str, ...], old: Bound, along: str | None
) -> Column:
    """One column after the other."""
    if column.dims is not None or rows.dims is not None:
        raise DataError(
            f"'{column.name}': xarray data cannot be extended. Pass plain arrays, with the plates as leading axes."
        )
    if column.is_text != rows.is_text:
        kinds = ("labels", "numbers") if column.is_text else ("numbers", "labels")
        raise DataError(f"'{column.name}': expected {kinds[0]} as before, got {kinds[1]}.")
    if not plates:
        raise DataError(
            f"'{column.name}' varies over no plate, so it has no new rows. Leave it out of the new data."
        )
    axis = 0 if column.table is not None else _axis(column, rows, plates, old, along)
    before, after = column.values, rows.values
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        joined: Tensor | np.ndarray = torch.cat([before, after.to(before.device)], axis)
    else:
        joined = np.concatenate([before, after], axis)
    return replace(column, values=joined, categories=None)


def _axis(
    column: Column, rows: Column, plates: tuple[str, ...], old: Bound, along: str | None
) -> int:
    """The axis along which an array grows: the one in which old and new may differ."""
    before, after = tuple(column.values.shape), tuple(rows.values.shape)
    fits = [
        i
        for i in range(min(len(plates), len(before)))
        if len(before) == len(after) and before[:i] + before[i + 1 :] == after[:i] + after[i + 1 :]
    ]
    if along in plates:
        fits = [i for i in fits if plates[i] == along]
    if len(fits) > 1:
        fits = [i for i in fits if old.graph.plates[plates[i]].ordered]
    if len(fits) != 1:
        raise DataError(
            f"'{column.name}' has shape {list(before)} over plates {', '.join(plates)}, the new rows {list(after)}: it is not "
            "clear along which plate they stand. Give them all other axes of the array; along='plate' names the plate."
        )
    return fits[0]


def _check_kept(old: Bound, new: Bound) -> None:
    for plate, labels in old.labels.items():
        kept = new.labels[plate][: len(labels)]
        if list(kept) != list(labels):
            raise DataError(
                f"plate '{plate}' had {len(labels)} elements, and they do not come first among the {new.size(plate)} of the "
                "extended data. Old elements keep their places: give the names of new ones in labels=."
            )


__all__ = ["appended", "grown"]
