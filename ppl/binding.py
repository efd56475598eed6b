"""Bind data to a traced model: plate sizes and labels, memberships, arrays, missing entries, support checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

from ppl.arguments import illegal_arguments
from ppl.columns import Column, Columns
from ppl.distributions import MultivariateNormal
from ppl.errors import DataError, ModelError, nearest
from ppl.graph import Graph, Variable

Missing = Literal["marginalise", "error"]


@dataclass(frozen=True, eq=False)
class Bound:
    """A graph with its data.

    ``values`` has axes ``plates`` of the variable, then the event; ``masks`` are True where an observed entry is
    present; ``maps[child, ancestor]`` is the position of each child element's ancestor.
    """

    graph: Graph
    values: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    maps: Mapping[tuple[str, str], Tensor]
    labels: Mapping[str, Sequence[Any]]
    dtype: torch.dtype
    device: torch.device
    report: tuple[str, ...] = ()
    columns: Columns = field(default_factory=lambda: Columns(()), repr=False)
    # Gaussians that stand for the model's own laws of some latents, see ppl.continual.
    prior: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def size(self, plate: str) -> int:
        """Number of elements of a plate."""
        size = self.graph.plates[plate].size
        assert size is not None
        return size

    @property
    def dense(self) -> Mapping[str, Tensor]:
        """``values`` with sparse matrices written out."""
        return {n: v if v.layout == torch.strided else v.to_dense() for n, v in self.values.items()}

    @property
    def sparse(self) -> tuple[str, ...]:
        """Names of the covariates that are sparse matrices."""
        return tuple(n for n, v in self.values.items() if v.layout != torch.strided)

    def shape(self, variable: Variable) -> tuple[int, ...]:
        """Shape of a variable's array: plates, then event."""
        return (*(self.size(p) for p in variable.plates), *variable.event_shape)

    def narrowed(self, rows: Mapping[str, Tensor]) -> Bound:
        """The same with only some elements of some plates, ``rows[plate]`` long and ascending.

        A plate within one of them must be named too, with the elements whose parents are kept. Consecutive elements are
        views of the whole arrays. Elements are numbered anew and have no labels.
        """
        graph, plates = self.graph, dict(self.graph.plates)
        for name, kept in rows.items():
            plates[name] = replace(plates[name], size=len(kept))
        values = {n: take(v, graph.variables[n].plates, rows) for n, v in self.values.items()}
        masks = {n: take(m, graph.variables[n].plates, rows) for n, m in self.masks.items()}
        maps = {}
        for (child, ancestor), member in self.maps.items():
            kept = take(member, (child,), rows)
            if ancestor in rows:
                at = rows[ancestor].to(kept.device)
                kept = torch.searchsorted(at, kept)
            maps[child, ancestor] = kept
        labels = {n: range(len(rows[n])) if n in rows else ls for n, ls in self.labels.items()}
        graph = replace(graph, plates=plates)
        return replace(self, graph=graph, values=values, masks=masks, maps=maps, labels=labels)


def bind(
    graph: Graph,
    columns: Columns,
    *,
    sizes: Mapping[str, int] | None = None,
    labels: Mapping[str, Sequence[Any]] | None = None,
    missing: Missing = "marginalise",
    need_observed: bool = True,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
    before: Mapping[str, Sequence[Any]] | None = None,
) -> Bound:
    """Resolve sizes, labels and memberships, then move every array to the run's dtype and device.

    Args:
        graph: as traced.
        columns: the data.
        sizes: of plates that no array shows.
        labels: of the elements of plates.
        missing: what to do with NaN in observed sites.
        need_observed: whether every observed site must be there.
        dtype: of the run.
        device: of the run; that of the data by default.
        before: labels of an earlier binding that this data extends: its elements keep their
            places, new ones stand behind them.

    Raises:
        DataError: sizes that disagree, unknown labels, a missing site, NaN in a covariate, a value outside a support.
    """
    if missing not in get_args(Missing):
        raise ModelError(f"missing: expected 'marginalise' or 'error', got {missing!r}.")
    plates = _Plates(graph, columns, sizes or {}, labels or {}, before or {})
    graph = replace(
        graph, plates={n: replace(p, size=plates.sizes[n]) for n, p in graph.plates.items()}
    )
    place = device or _device(columns)
    maps = {key: codes.to(place) for key, codes in plates.maps().items()}
    _check_picks(graph)
    values: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    report: list[str] = []
    for variable in graph.role("observed", "given"):
        if variable.name not in columns:
            if variable.role == "observed" and need_observed:
                raise DataError(
                    f"observe('{variable.name}') at {variable.where}: the data has no such name."
                    f"{nearest(variable.name, columns)} The data has: {', '.join(columns) or 'nothing'}."
                )
            if variable.role == "given":
                values[variable.name] = _default(graph, variable, dtype, place)
            continue
        array = plates.array(variable, columns[variable.name])
        tensor = (
            array.to(place)
            if variable.index_of and variable.role == "given"
            else _numeric(array, dtype, place)
        )
        _check_shape(graph, variable, tensor)
        values[variable.name], mask = _check_values(graph, variable, tensor, plates.labels, missing)
        if mask is not None:
            masks[variable.name] = mask
            gone = int((~mask).sum())
            report.append(
                f"{gone} of {mask.numel()} entries of '{variable.name}' are missing and were marginalised"
            )
    _check_arguments(graph, values, plates.labels)
    report += _unused(graph, columns)
    return Bound(graph, values, masks, maps, plates.labels, dtype, place, tuple(report), columns)


def take(array: Tensor, axes: Sequence[str], rows: Mapping[str, Tensor]) -> Tensor:
    """An array with leading ``axes`` narrowed to ``rows``, ascending; a view where they are consecutive.

    >>> take(torch.arange(6).reshape(2, 3), ("a", "b"), {"b": torch.tensor([1, 2])}).tolist()
    [[1, 2], [4, 5]]
    """
    for dim, axis in enumerate(axes):
        if axis not in rows:
            continue
        kept = rows[axis]
        start, count = int(kept[0]) if len(kept) else 0, len(kept)
        if not count or int(kept[-1]) - start == count - 1:
            array = array.narrow(dim, start, count)
        else:
            array = array.index_select(dim, kept.to(array.device))
    return array


def put(whole: Tensor, axes: Sequence[str], rows: Mapping[str, Tensor], part: Tensor) -> None:
    """Write the elements ``rows`` of an array with leading ``axes``: the inverse of :func:`take`.

    >>> x = torch.zeros(3)
    >>> put(x, ("a",), {"a": torch.tensor([0, 2])}, torch.ones(2))
    >>> x
    tensor([1., 0., 1.])
    """
    place = whole
    scattered = []
    for dim, axis in enumerate(axes):
        kept = rows.get(axis)
        if kept is None or not len(kept):
            continue
        start, count = int(kept[0]), len(kept)
        if int(kept[-1]) - start == count - 1:  # consecutive: rows ascend
            place = place.narrow(dim, start, count)
        else:
            scattered.append((dim, kept.to(whole.device)))
    if not scattered:
        place.copy_(part)
    elif len(scattered) == 1:
        place.index_copy_(*scattered[0], part)
    else:
        grid = [torch.arange(n, device=whole.device) for n in place.shape]
        for dim, kept in scattered:
            grid[dim] = kept
        place[torch.meshgrid(*grid, indexing="ij")] = part


def positions_of(old: Sequence[Any], new: Sequence[Any]) -> Tensor:
    """Position in ``old`` of every label of ``new``, -1 for those that are not there.

    >>> positions_of(["a", "b"], ["b", "c"]).tolist()
    [1, -1]
    """
    if isinstance(old, range) and isinstance(new, range):  # both count from zero
        place = torch.arange(len(new))
        return torch.where(place < len(old), place, -1)
    where = {label: i for i, label in enumerate(old)}
    return torch.tensor([where.get(label, -1) for label in new], dtype=torch.long)


class _Plates:
    """Sizes, labels and memberships of all plates, from the columns that speak of them."""

    def __init__(
        self,
        graph: Graph,
        columns: Columns,
        sizes: Mapping[str, int],
        labels: Mapping[str, Sequence[Any]],
        before: Mapping[str, Sequence[Any]],
    ) -> None:
        self.graph, self.columns, self.before = graph, columns, before
        for name in (*sizes, *labels):
            if name not in graph.plates:
                raise DataError(
                    f"sizes= and labels= speak of plate '{name}', which the model does not have."
                    f"{nearest(name, graph.plates)} Plates: {', '.join(graph.plates) or 'none'}."
                )
        self.given_labels = labels
        self.claims: dict[str, list[tuple[int, str]]] = {name: [] for name in graph.plates}
        self._claim_declared(sizes)
        self._claim_arrays()
        self.labels: dict[str, Sequence[Any]] = {}
        self.sizes: dict[str, int] = {}
        for name in graph.plates:
            self.labels[name] = self._labels_of(name)
            self.sizes[name] = len(self.labels[name])
        self._lookup = {
            n: {v: i for i, v in enumerate(ls)}
            for n, ls in self.labels.items()
            if not isinstance(ls, range)
        }

    # ---- sizes ----------------------------------------------------------------------------------------------

    def _claim_declared(self, sizes: Mapping[str, int]) -> None:
        for name, plate in self.graph.plates.items():
            if plate.size is not None:
                self.claims[name].append(
                    (plate.size, f"plate('{name}', {plate.size}) at {plate.where}")
                )
            if name in sizes:
                self.claims[name].append((int(sizes[name]), f"sizes={{'{name}': {sizes[name]}}}"))
            if name in self.given_labels:
                self.claims[name].append((len(self.given_labels[name]), f"labels of '{name}'"))
        for variable in self.graph.role(
            "latent", "observed"
        ):  # Categorical(weight, over=plate) fixes the size
            if variable.index_of and variable.cardinality:
                claim = (variable.cardinality, f"the categories of '{variable.name}'")
                self.claims[variable.index_of].append(claim)

    def _claim_arrays(self) -> None:
        for variable in self.graph.role("observed", "given"):
            column = self.columns.get(variable.name)
            if column is None:
                continue
            column.event_shape(variable.plates)
            shape = column.arranged(variable.plates).shape
            for axis, name in enumerate(variable.plates):
                if self._key(column, name, shape[axis]) is None:
                    self.claims[name].append((shape[axis], f"axis {axis} of '{variable.name}'"))
        for plate in self.graph.plates.values():
            for name in plate.columns:
                column = self._membership_column(plate.name, name)
                if self._key(column, plate.name, len(column.values)) is None:
                    self.claims[plate.name].append((len(column.values), f"the rows of '{name}'"))
        for name, claims in self.claims.items():
            for size, source in claims[1:]:
                if size != claims[0][0]:
                    raise DataError(
                        f"plate '{name}' has two sizes: {claims[0][0]} from {claims[0][1]}, {size} from {source}. "
                        "Make the arrays agree, or put one of them in a plate of its own."
                    )

    def _membership_column(self, plate: str, name: str) -> Column:
        column = self.columns.get(name)
        if column is None:
            raise DataError(
                f"plate '{plate}' lies within another by the data column '{name}', which is not in the data."
                f"{nearest(name, self.columns)} Add it, or name another: plate('{plate}', within=..., by='column')."
            )
        return column

    def _key(self, column: Column, plate: str, rows: int) -> Column | None:
        """The column that says which element of ``plate`` each row belongs to, when rows are not elements themselves.

        In a data frame that is the column with the plate's name. In a mapping of arrays it must have as many rows as
        ``column`` and hold labels, or repeat a position: labels have an order of their own, whatever their number.
        """
        for name in self._keys(plate, is_table=column.table is not None):
            key = self.columns.beside(column, name)
            if key is None or key is column or len(key.values) != rows:
                continue
            if column.table is not None or key.is_text or len(_distinct(key)) < rows:
                return key
        return None

    def _pointers(self, plate: str) -> list[str]:
        """Names of the columns whose entries are elements of ``plate``."""
        indices = [v.name for v in self.graph.role("given") if v.index_of == plate]
        return list(dict.fromkeys([*self._members(plate), *indices, plate]))

    def _keys(self, plate: str, *, is_table: bool) -> list[str]:
        # An index (an edge's two poses) is a key only where it is the one way from the rows of a table.
        indices = [v.name for v in self.graph.role("given") if v.index_of == plate]
        return [plate, *self._members(plate), *(indices if is_table and len(indices) == 1 else [])]

    def _members(self, plate: str) -> list[str]:
        """Names of the columns that say which element of ``plate`` something lies within."""
        everything = self.graph.plates.values()
        return [
            c for p in everything for c, q in zip(p.columns, p.parents, strict=True) if q == plate
        ]

    def _labels_of(self, plate: str) -> Sequence[Any]:
        if plate in self.given_labels:
            return _unique(plate, list(self.given_labels[plate]))
        claimed = self.claims[plate][0][0] if self.claims[plate] else None
        for variable in self.graph.role("observed", "given"):
            column = self.columns.get(variable.name)
            if (
                column is not None
                and column.coords
                and plate in column.coords
                and plate in variable.plates
            ):
                return _unique(plate, list(column.coords[plate]))
        found = [c for name in self._pointers(plate) for c in self.columns.all(name)]
        if not found:
            return self._positions(plate, claimed)
        return self._from_pointers(plate, found, claimed)

    def _positions(self, plate: str, claimed: int | None) -> Sequence[Any]:
        known = self.before.get(plate)
        if known is not None and claimed in (None, len(known)):
            return known
        if known is not None and not isinstance(known, range):
            raise DataError(
                f"plate '{plate}' grows from {len(known)} to {claimed} elements ({self.claims[plate][0][1]}). Name the new "
                f"ones: labels={{'{plate}': [...]}}."
            )
        if claimed is None:
            raise DataError(
                f"plate '{plate}' has no size: no data array varies over it. "
                f"Give one: plate('{plate}', 10) in the model, or sizes={{'{plate}': 10}}."
            )
        return range(claimed)

    def _from_pointers(
        self, plate: str, found: Sequence[Column], claimed: int | None
    ) -> Sequence[Any]:
        categories = next((c.categories for c in found if c.categories), None)
        if categories and plate not in self.before:
            return list(categories)
        distinct = sorted(set().union(*(_distinct(c) for c in found)))
        known = self.before.get(plate, range(0))
        named = any(c.is_text for c in found) or not isinstance(known, range)
        if not isinstance(known, range):
            seen = set(known)
            distinct = [*known, *(v for v in distinct if v not in seen)]
        elif known and claimed is None and not named:
            claimed = max(len(known), int(distinct[-1]) + 1 if distinct else 0)
        if named:
            if claimed is not None and claimed != len(distinct):
                raise DataError(
                    f"plate '{plate}' has {claimed} elements by {self.claims[plate][0][1]}, but '{found[0].name}' has "
                    f"{len(distinct)} different labels. Pass labels={{'{plate}': [...]}} in the order of the array."
                )
            return distinct
        if claimed is None:
            return range(len(distinct)) if distinct == list(range(len(distinct))) else distinct
        if distinct and (distinct[0] < 0 or distinct[-1] >= claimed):
            hint = (
                " Positions start at 0: subtract 1."
                if distinct[0] == 1 and distinct[-1] == claimed
                else ""
            )
            raise DataError(
                f"'{found[0].name}' points into plate '{plate}' of {claimed} elements: expected positions 0 to "
                f"{claimed - 1}, got {distinct[0]} to {distinct[-1]}.{hint}"
            )
        return range(claimed)

    # ---- memberships and arrays -----------------------------------------------------------------------------

    def codes(self, column: Column, plate: str) -> Tensor:
        """Positions in ``plate`` of a column's entries."""
        if isinstance(self.labels[plate], range):
            return torch.as_tensor(column.values).long()
        lookup = self._lookup[plate]
        entries = column.values.tolist()
        flat = np.ravel(np.asarray(entries, dtype=object))
        unknown = [v for v in dict.fromkeys(flat) if v not in lookup]
        if unknown:
            raise DataError(
                f"'{column.name}': {len(unknown)} labels are not elements of plate '{plate}', the first is {unknown[0]!r}."
                f"{nearest(str(unknown[0]), map(str, lookup))} Correct them, or extend labels={{'{plate}': [...]}}."
            )
        return torch.tensor([lookup[v] for v in flat]).reshape(np.shape(entries))

    def maps(self) -> dict[tuple[str, str], Tensor]:
        """Positions of every element's parents and further ancestors."""
        maps: dict[tuple[str, str], Tensor] = {}
        for plate in self.graph.plates.values():
            for parent, name in zip(plate.parents, plate.columns, strict=True):
                column = self._membership_column(plate.name, name)
                codes = self.codes(column, parent)
                maps[plate.name, parent] = self._per_element(column, codes, plate.name)
        for child in self.graph.plates:
            for ancestor in self.graph.ancestors(child):
                if (child, ancestor) not in maps:
                    maps[child, ancestor] = self._compose(maps, child, ancestor)
        return maps

    def _compose(self, maps: dict[tuple[str, str], Tensor], plate: str, ancestor: str) -> Tensor:
        ways = [
            p
            for p in self.graph.plates[plate].parents
            if p == ancestor or ancestor in self.graph.ancestors(p)
        ]
        found = []
        for way in ways:
            if (way, ancestor) not in maps:
                maps[way, ancestor] = self._compose(maps, way, ancestor)
            found.append(maps[way, ancestor][maps[plate, way]])
        for way, other in zip(ways[1:], found[1:], strict=True):
            differ = torch.nonzero(found[0] != other)
            if len(differ):
                raise DataError(
                    f"plate '{plate}' lies within '{ancestor}' by way of '{ways[0]}' and of '{way}', which disagree for "
                    f"{plate} {self.labels[plate][int(differ[0, 0])]!r} ({len(differ)} in all). Correct the data, or index "
                    f"one of them: given('i', index={ancestor})."
                )
        return found[0]

    def _per_element(self, column: Column, rows: Tensor, plate: str, axis: int = 0) -> Tensor:
        """One entry an element of ``plate`` from an array with one entry a row; they must agree within an element."""
        key = self._key(column, plate, rows.shape[axis])
        if key is None:
            return rows
        codes = self.codes(key, plate)
        moved = rows.movedim(axis, 0)
        first = torch.full((self.sizes[plate],), -1, dtype=torch.long)
        first[codes.flip(0)] = torch.arange(len(codes)).flip(0)
        if bool((first < 0).any()):
            absent = [self.labels[plate][i] for i in torch.nonzero(first < 0)[:3, 0].tolist()]
            raise DataError(
                f"'{column.name}' has no row for {plate} {absent}. Add rows for them, or drop the labels."
            )
        same = (moved == moved[first[codes]]) | (moved.isnan() & moved[first[codes]].isnan())
        bad = torch.nonzero(~same.reshape(len(codes), -1).all(1))
        if len(bad):
            row = int(bad[0, 0])
            label = self.labels[plate][int(codes[row])]
            raise DataError(
                f"'{column.name}' is read once for each {plate}, but its rows differ within {plate} {label!r} (row {row}). "
                f"Read it in the plate of the rows, or make it constant within {plate}."
            )
        return moved[first].movedim(0, axis)

    def array(self, variable: Variable, column: Column) -> Tensor:
        """The array of a variable, one entry an element of its plates."""
        if variable.index_of is not None and (variable.role == "given" or column.is_text):
            array = self.codes(
                replace(column, values=column.arranged(variable.plates)), variable.index_of
            )
        else:
            arranged = column.arranged(variable.plates)
            if column.is_sparse:
                return self._sparse(variable, column)
            if not isinstance(arranged, Tensor):
                column.element(variable.plates, torch.float64)  # raises: text used as numbers
            array = torch.as_tensor(arranged)
        for axis, plate in enumerate(variable.plates):
            array = self._by_coordinate(column, array, plate, axis)
            array = self._per_element(column, array, plate, axis)
        return array

    def _sparse(self, variable: Variable, column: Column) -> Tensor:
        """A sparse matrix as it is: it can be a covariate whose axes are whole plates, or events."""
        matrix = column.values
        assert isinstance(matrix, Tensor)
        keyed = any(
            self._key(column, p, matrix.shape[i]) for i, p in enumerate(variable.plates[:2])
        )
        if variable.role != "given" or keyed:
            what = "rows are looked up by a key" if keyed else f"it is {variable.role}"
            raise DataError(
                f"'{variable.name}': only a matrix that given() reads whole may be sparse, but {what}. "
                f"Pass a dense array: {variable.name}.to_dense(), or .toarray()."
            )
        return matrix

    def _by_coordinate(self, column: Column, array: Tensor, plate: str, axis: int) -> Tensor:
        # The coordinates of an xarray name its elements; another array may have them in another order.
        names, labels = (column.coords or {}).get(plate), list(self.labels[plate])
        if names is None or list(names) == labels:
            return array
        position = {v: i for i, v in enumerate(names)}
        absent = [v for v in labels if v not in position]
        if absent or len(names) != len(labels):
            raise DataError(
                f"'{column.name}': its coordinate '{plate}' differs from the labels of the plate "
                f"({len(absent)} labels are absent, the first is {absent[:1]}). Align the arrays, or drop the coordinate."
            )
        return array.index_select(
            axis, torch.tensor([position[v] for v in labels], device=array.device)
        )


def _check_picks(graph: Graph) -> None:
    for node in graph.nodes:
        size = graph.plates[node.name].size if node.op == "pick" else None
        if size is not None and not -size <= node.args[1] < size:
            raise DataError(
                f"pick(..., {node.name}={node.args[1]}) at {node.where}: plate '{node.name}' has {size} elements, positions 0 "
                f"to {size - 1}. Pick one of them."
            )


def _device(columns: Columns) -> torch.device:
    devices = {
        c.values.device for n in columns for c in columns.all(n) if isinstance(c.values, Tensor)
    }
    accelerators = [d for d in devices if d.type != "cpu"]
    return accelerators[0] if accelerators else torch.device("cpu")


def _numeric(array: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return array.to(device) if array.dtype == torch.bool else array.to(device=device, dtype=dtype)


def _default(graph: Graph, variable: Variable, dtype: torch.dtype, device: torch.device) -> Tensor:
    start = 1.0 if variable.initial is None else variable.initial
    sizes = [graph.plates[p].size for p in variable.plates]
    element = torch.as_tensor(start, dtype=dtype, device=device)
    return element.expand((*sizes, *variable.event_shape))  # type: ignore[arg-type]


def _distinct(column: Column) -> set[Any]:
    if isinstance(column.values, Tensor):
        values = column.values
        if values.is_floating_point():
            if not bool((values == values.round()).all()):
                raise DataError(
                    f"'{column.name}' names elements of a plate: expected whole numbers or labels, got fractions or NaN. "
                    "Convert the column, or name another with by=."
                )
            values = values.long()
        return set(torch.unique(values).tolist())
    return set(np.unique(column.values).tolist())


def _unique(plate: str, labels: list[Any]) -> list[Any]:
    if len(set(labels)) != len(labels):
        twice = next(v for i, v in enumerate(labels) if v in labels[:i])
        raise DataError(
            f"labels of plate '{plate}': {twice!r} stands twice. Labels name elements, so each must be unique."
        )
    return labels


def _check_shape(graph: Graph, variable: Variable, tensor: Tensor) -> None:
    sizes = [graph.plates[p].size for p in variable.plates]
    expected = [*sizes, *variable.event_shape]
    if list(tensor.shape) == expected:
        return
    turned = sorted(map(str, tensor.shape)) == sorted(map(str, expected))
    remedy = (
        "Transpose the tensor, or swap the plates in the model."
        if turned
        else "Open the plates that the array varies over; give a vector-valued law parameters of the event's shape."
    )
    where = ", ".join((variable.role, *(f"plate {p}" for p in variable.plates)))
    raise DataError(
        f"'{variable.name}' ({where}): expected shape {expected}, got {list(tensor.shape)}. {remedy}"
    )


def _check_values(
    graph: Graph,
    variable: Variable,
    tensor: Tensor,
    labels: Mapping[str, Sequence[Any]],
    missing: Missing,
) -> tuple[Tensor, Tensor | None]:
    """The array with missing entries filled by a legal value, and the mask of present entries."""
    if variable.role == "given":
        _check_covariate(variable, tensor, labels)
        return tensor, None
    absent = (
        tensor.isnan() if tensor.is_floating_point() else torch.zeros_like(tensor, dtype=torch.bool)
    )
    if bool(absent.any()):
        if missing == "error":
            raise DataError(
                f"'{variable.name}': {int(absent.sum())} entries are missing, the first at "
                f"{_place(variable, absent, labels)}. Drop them, or pass missing='marginalise'."
            )
        if bool(absent.all()):
            raise DataError(
                f"'{variable.name}': every entry is missing. Leave the name out of the data to infer it."
            )
        if graph.children(variable.name):
            raise DataError(
                f"'{variable.name}': {int(absent.sum())} entries are missing, and {graph.children(variable.name)[0]!r} depends "
                "on them, so they cannot simply drop out. Drop those rows, or fill them in."
            )
    _check_finite(variable, tensor, labels)
    _check_support(variable, tensor, absent, labels)
    if not bool(absent.any()):
        return tensor, None
    if variable.role == "observed":
        _check_parts(graph, variable, absent, labels)
    return _filled(graph, variable, tensor, absent), ~absent


def _check_finite(variable: Variable, tensor: Tensor, labels: Mapping[str, Sequence[Any]]) -> None:
    """An infinite observation has no density under any law."""
    infinite = tensor.isinf()
    if bool(infinite.any()):
        raise DataError(
            f"'{variable.name}' ({variable.role}): {int(infinite.sum())} entries are infinite, the first at "
            f"{_place(variable, infinite, labels)}. Drop those rows, or set the entries to NaN, which sums them out."
        )


def _check_covariate(
    variable: Variable, tensor: Tensor, labels: Mapping[str, Sequence[Any]]
) -> None:
    # A sum is finite where every entry is: one pass over a large matrix instead of three.
    entries = tensor if tensor.layout == torch.strided else tensor.values()
    if not tensor.is_floating_point() or bool(entries.sum().isfinite()):
        return
    bad = ~tensor.to_dense().isfinite()
    if bool(bad.any()):
        raise DataError(
            f"'{variable.name}' (given): {int(bad.sum())} entries are NaN or infinite, the first at "
            f"{_place(variable, bad, labels)}. Drop those rows, fill them in, or give the column a law: "
            f"latent('{variable.name}', ...)."
        )


def _check_arguments(
    graph: Graph, values: Mapping[str, Tensor], labels: Mapping[str, Sequence[Any]]
) -> None:
    for variable, use, rule, bad in illegal_arguments(graph, values):
        raise DataError(
            f"'{variable.name}' is {use}: expected {rule}, and {int(bad.sum())} of {bad.numel()} are not, the first at "
            f"{_place(variable, bad, labels)}: {values[variable.name][tuple(torch.nonzero(bad)[0])].tolist()}. "
            "Correct it, or drop those rows."
        )


def _check_parts(
    graph: Graph, variable: Variable, absent: Tensor, labels: Mapping[str, Sequence[Any]]
) -> None:
    """An event that is drawn as a whole is there as a whole, unless its marginals are known."""
    factor = graph.factors[variable.name]
    assert factor.law is not None
    if factor.chain is not None:
        raise DataError(
            f"'{variable.name}': {int(absent.sum())} entries are missing, and in an observed Markov chain the next element "
            "depends on them. Make the chain a latent and observe it through a law of its own."
        )
    family = factor.law.family
    if not family.event_dim or isinstance(family, MultivariateNormal):
        return
    gone = absent.flatten(absent.ndim - family.event_dim)
    partly = gone.any(-1) & ~gone.all(-1)
    if bool(partly.any()):
        raise DataError(
            f"'{variable.name}': {int(partly.sum())} events are missing in part, the first at "
            f"{_place(variable, partly, labels)}; of the law {type(family).__name__} only whole events can be left out. "
            "Drop those rows, set all of their entries to NaN, or use a law of independent entries."
        )


def _check_support(
    variable: Variable, tensor: Tensor, absent: Tensor, labels: Mapping[str, Sequence[Any]]
) -> None:
    support = variable.support
    if (
        support is None
        or support is constraints.dependent
        or getattr(support, "is_discrete", False) is None
    ):
        return
    valid = support.check(tensor if tensor.dtype != torch.bool else tensor.float())
    event = tensor.ndim - valid.ndim
    gone = absent.reshape(*valid.shape, -1).any(-1) if event else absent
    bad = ~(valid | gone)
    if bool(bad.any()):
        first = tensor[tuple(torch.nonzero(bad)[0])] if bad.ndim else tensor
        raise DataError(
            f"'{variable.name}': {int(bad.sum())} of {bad.numel()} values lie outside the support {support} of its law, "
            f"the first at {_place(variable, bad, labels)}: {first.tolist()}. Correct the data, or choose another law."
        )


def _is_joint(graph: Graph, variable: Variable) -> bool:
    law = graph.factors[variable.name].law if variable.name in graph.factors else None
    return law is None or law.family.event_dim > 0


def _filled(graph: Graph, variable: Variable, tensor: Tensor, absent: Tensor) -> Tensor:
    # The filler never reaches a result: its log-density is masked.  It must only be legal, so a present value is used.
    event = len(variable.event_shape)
    if event == 0 or not _is_joint(graph, variable):
        return torch.where(absent, tensor[~absent][0], tensor)
    flat, gone = (
        tensor.reshape(-1, *variable.event_shape),
        absent.reshape(-1, *variable.event_shape),
    )
    whole = torch.nonzero(~gone.reshape(len(flat), -1).any(1))
    row = flat[int(whole[0, 0])] if len(whole) else torch.nan_to_num(flat).amax(0)
    return torch.where(gone, row, flat).reshape(tensor.shape)


def _place(variable: Variable, bad: Tensor, labels: Mapping[str, Sequence[Any]]) -> str:
    if bad.ndim == 0:
        return "its only entry"
    position = torch.nonzero(bad)[0].tolist()
    named = [f"{p} {labels[p][i]!r}" for p, i in zip(variable.plates, position, strict=False)]
    rest = position[len(variable.plates) :]
    return ", ".join(named + ([f"position {rest}"] if rest else []))


def _unused(graph: Graph, columns: Columns) -> list[str]:
    used = {v.name for v in graph.variables.values()} | {
        c for p in graph.plates.values() for c in p.columns
    }
    used |= set(graph.plates)
    unused = [n for n in columns if n not in used and columns[n].table is None]
    for name in unused:
        close = nearest(name, [v.name for v in graph.latents])
        if close:
            raise DataError(
                f"the data has '{name}', which the model does not know.{close} Rename it, or leave it out."
            )
    return [f"not used: {', '.join(unused)}"] if unused else []


__all__ = ["Bound", "Missing", "bind", "positions_of"]
