"""Pose graphs as arrays: read and written in the g2o format, with odometry to start from.

A line of a g2o file is a tag and numbers. Read are the tags below; lines that start with # and FIX
lines are passed over, because the models of :mod:`ppl.models.slam` hold the first pose.

| tag | numbers |
|---|---|
| VERTEX_SE2 | id, x, y, heading |
| EDGE_SE2 | ids of the two ends, x, y, heading of the second seen from the first, 6 of the information matrix |
| VERTEX_SE3:QUAT | id, x, y, z, qx, qy, qz, qw |
| EDGE_SE3:QUAT | ids, x, y, z, qx, qy, qz, qw, 21 of the information matrix |

An information matrix is given by its upper triangle, row by row, translation before rotation. That
of a rotation is taken to be in radians, as GTSAM does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ppl.errors import DataError, nearest
from ppl.manifolds import SE3


class PoseGraph(NamedTuple):
    """A pose graph: what the model fits, where to start, and the truth where it is known.

    Poses are (x, y, heading), or (x, y, z, qx, qy, qz, qw) with a unit quaternion.
    """

    data: dict[str, np.ndarray]  # i, j [edge], z [edge, p], info [edge, d, d], anchor [p]
    start: np.ndarray  # [pose, p]
    truth: np.ndarray | None = None  # [pose, p]


class _Kind(NamedTuple):
    vertex: str
    edge: str
    entries: int  # of a pose
    dims: int  # of its tangent space


_KINDS = (_Kind("VERTEX_SE2", "EDGE_SE2", 3, 3), _Kind("VERTEX_SE3:QUAT", "EDGE_SE3:QUAT", 7, 6))
_SKIPPED = ("FIX",)


class _Line(NamedTuple):
    where: str  # file:line
    fields: list[str]


def read_g2o(path: str | Path) -> PoseGraph:
    """Read a pose graph, in the plane or in space.

    Returns:
        Data for :func:`ppl.models.pose_graph_2d` or :func:`~ppl.models.pose_graph_3d`; ``i`` and
        ``j`` are the ids of the file. ``start`` is ordered by id: the vertices of the file, or
        odometry where it has none.

    Raises:
        DataError: an unknown tag, a line of the wrong length, a number that cannot be read, an edge
            to a vertex that is not there, an information matrix that is not positive definite.
    """
    path = Path(path)
    lines = _lines(path)
    kind = _kind(path, lines)
    ends, z, info = _edges(kind, lines[kind.edge])
    ids, start = _vertices(kind, lines.get(kind.vertex, []))
    used = np.unique(ends)
    if not len(ids):
        i, j = np.searchsorted(used, ends).T
        start = odometry(i, j, z)
    elif not np.array_equal(ids, used):
        raise _unmatched(path, kind, lines[kind.edge], ends, ids, used)
    data = {"i": ends[:, 0], "j": ends[:, 1], "z": z, "info": info, "anchor": start[0]}
    return PoseGraph(data, start)


def write_g2o(path: str | Path, poses: Any, data: Mapping[str, Any]) -> None:
    """Write poses ``[pose, p]`` and the edges of ``data``; ids are positions.

    Numbers are written so that reading them back gives the same float64.

    Raises:
        DataError: poses of neither form.
    """
    poses = np.asarray(poses, dtype=float)
    kind = next((k for k in _KINDS if poses.ndim == 2 and poses.shape[1] == k.entries), None)
    if kind is None:
        raise DataError(
            f"write_g2o: poses must be [pose, 3] or [pose, 7], got {list(poses.shape)}."
        )
    upper = np.asarray(data["info"])[(slice(None), *np.triu_indices(kind.dims))]
    numbers = np.column_stack([data["z"], upper]).tolist()
    ends = np.column_stack([data["i"], data["j"]]).tolist()
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(_text(kind.vertex, [k], pose) for k, pose in enumerate(poses.tolist()))
        file.writelines(_text(kind.edge, e, n) for e, n in zip(ends, numbers, strict=True))


def odometry(i: Any, j: Any, z: Any) -> np.ndarray:
    """Poses by adding up the motions from each pose to the next, from the origin: ``[pose, p]``.

    Args:
        i: position of the first pose of each edge.
        j: of the second; edges with ``j = i + 1`` are odometry.
        z: measured motions ``[edge, p]``.

    Raises:
        DataError: a pose has no edge from the one before.

    >>> odometry([0, 1], [1, 2], [[1.0, 0.0, np.pi / 2], [1.0, 0.0, 0.0]]).round(6).tolist()
    [[0.0, 0.0, 0.0], [1.0, 0.0, 1.570796], [1.0, 1.0, 1.570796]]
    """
    i, j, z = np.asarray(i), np.asarray(j), np.asarray(z, dtype=float)
    count = int(max(i.max(), j.max())) + 1
    edge = np.full(count, -1)
    steps = np.flatnonzero(j == i + 1)
    edge[j[steps[::-1]]] = steps[::-1]  # of several measurements of one motion, the first
    if (edge[1:] < 0).any():
        raise DataError(
            f"odometry: no edge leads from pose {int(np.argmax(edge[1:] < 0))} to the next. Start from other poses."
        )
    motions = z[edge[1:]]
    return _chain_2d(motions) if z.shape[1] == 3 else _chain_3d(motions)


def split_closures(data: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Take the edges that are not from a pose to the next as loop closures, for ``kernel=``.

    Returns:
        The data with ``closure_i``, ``closure_j``, ``closure_z`` and ``closure_info`` (or
        ``closure_sd``) beside what is left of ``i``, ``j`` and so on.
    """
    step = np.asarray(data["j"]) == np.asarray(data["i"]) + 1
    parts = {name: np.asarray(data[name]) for name in ("i", "j", "z", "info", "sd") if name in data}
    closures = {f"closure_{name}": array[~step] for name, array in parts.items()}
    return {**data, **{name: array[step] for name, array in parts.items()}, **closures}


def full_information(upper: Any) -> np.ndarray:
    """Symmetric matrices ``[edge, d, d]`` from their upper triangles ``[edge, d (d + 1) / 2]``.

    >>> full_information([[1.0, 2.0, 3.0]]).tolist()
    [[[1.0, 2.0], [2.0, 3.0]]]
    """
    upper = np.asarray(upper, dtype=float)
    dims = int((np.sqrt(8 * upper.shape[1] + 1) - 1) / 2)
    rows, columns = np.triu_indices(dims)
    info = np.empty((len(upper), dims, dims))
    info[:, rows, columns] = info[:, columns, rows] = upper
    return info


def _chain_2d(motions: np.ndarray) -> np.ndarray:
    heading = np.concatenate([[0.0], np.cumsum(motions[:, 2])])
    cos, sin = np.cos(heading[:-1]), np.sin(heading[:-1])
    x, y = motions[:, 0], motions[:, 1]
    steps = np.stack([cos * x - sin * y, sin * x + cos * y], 1)
    place = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, 0)])
    return np.column_stack([place, (heading + np.pi) % (2 * np.pi) - np.pi])


def _chain_3d(motions: np.ndarray) -> np.ndarray:
    # Products of 1, 2, 4, ... neighbours: a logarithm of the number of batched products.
    poses = torch.as_tensor(np.concatenate([[[0.0] * 6 + [1.0]], motions]))
    reach = 1
    while reach < len(poses):
        poses = torch.cat([poses[:reach], SE3.compose(poses[:-reach], poses[reach:])])
        reach *= 2
    return SE3.project(poses).numpy()


def _lines(path: Path) -> dict[str, list[_Line]]:
    known = [tag for kind in _KINDS for tag in (kind.vertex, kind.edge)]
    lines: dict[str, list[_Line]] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"read_g2o: there is no file '{path}'.") from None
    for number, line in enumerate(text.splitlines(), 1):
        tag, *fields = line.split() or ["#"]
        if tag.startswith("#") or tag in _SKIPPED:
            continue
        if tag not in known:
            raise DataError(
                f"{path}:{number}: the tag '{tag}' is not known.{nearest(tag, known)} Known: {', '.join(known)}."
            )
        lines.setdefault(tag, []).append(_Line(f"{path}:{number}", fields))
    return lines


def _kind(path: Path, lines: Mapping[str, list[_Line]]) -> _Kind:
    found = [kind for kind in _KINDS if kind.vertex in lines or kind.edge in lines]
    if len(found) != 1 or found[0].edge not in lines:
        wrong = "poses in the plane and in space" if len(found) > 1 else "no edges"
        raise DataError(
            f"{path}: the file has {wrong}. It must have edges of one kind: "
            f"{' or '.join(kind.edge for kind in _KINDS)}."
        )
    return found[0]


def _table(lines: Sequence[_Line], width: int, integers: int) -> np.ndarray:
    """Numbers ``[line, width]``, the first of them whole."""
    for line in lines:
        if len(line.fields) != width:
            raise DataError(
                f"{line.where}: expected {width} numbers after the tag, got {len(line.fields)}. Complete the line."
            )
    try:
        table = np.array([line.fields for line in lines], dtype=float).reshape(-1, width)
    except ValueError:
        table = np.array([_numbers(line) for line in lines])
    bad = ~np.isfinite(table).all(1) | (table[:, :integers] % 1 != 0).any(1)
    if bad.any():
        line = lines[int(np.argmax(bad))]
        raise DataError(
            f"{line.where}: expected whole numbers as ids and finite ones after them, got {' '.join(line.fields)!r}."
        )
    return table


def _numbers(line: _Line) -> list[float]:
    try:
        return [float(field) for field in line.fields]
    except ValueError as error:
        raise DataError(f"{line.where}: {error}. Write a number.") from None


def _vertices(kind: _Kind, lines: Sequence[_Line]) -> tuple[np.ndarray, np.ndarray]:
    table = _table(lines, 1 + kind.entries, 1)
    ids, first, counts = np.unique(table[:, 0].astype(int), return_index=True, return_counts=True)
    if (counts > 1).any():
        twice = int(ids[np.argmax(counts > 1)])
        last = next(n for n in reversed(range(len(table))) if table[n, 0] == twice)
        raise DataError(f"{lines[last].where}: vertex {twice} is there twice. Keep one of them.")
    return ids, _unit(kind, table[:, 1:], lines)[first]


def _edges(kind: _Kind, lines: Sequence[_Line]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    table = _table(lines, 2 + kind.entries + kind.dims * (kind.dims + 1) // 2, 2)
    z = _unit(kind, table[:, 2 : 2 + kind.entries], lines)
    info = full_information(table[:, 2 + kind.entries :])
    bad = np.linalg.eigvalsh(info)[:, 0] <= 0
    if bad.any():
        raise DataError(
            f"{lines[int(np.argmax(bad))].where}: the information matrix is not positive definite "
            f"({int(bad.sum())} such edges). It is the inverse of a covariance."
        )
    return table[:, :2].astype(int), z, info


def _unit(kind: _Kind, poses: np.ndarray, lines: Sequence[_Line]) -> np.ndarray:
    if kind.entries == 3:
        return poses
    size = np.linalg.norm(poses[:, 3:], axis=1, keepdims=True)
    if (size < 1e-6).any():
        line = lines[int(np.argmax(size[:, 0] < 1e-6))]
        raise DataError(f"{line.where}: the quaternion is zero. A rotation has a unit quaternion.")
    return np.concatenate([poses[:, :3], poses[:, 3:] / size], 1)


def _unmatched(
    path: Path,
    kind: _Kind,
    lines: Sequence[_Line],
    ends: np.ndarray,
    ids: np.ndarray,
    used: np.ndarray,
) -> DataError:
    unknown = ~np.isin(ends, ids)
    if unknown.any():
        row = int(np.argmax(unknown.any(1)))
        absent = int(ends[row][unknown[row]][0])
        return DataError(f"{lines[row].where}: there is no {kind.vertex} with the id {absent}.")
    alone = int(np.setdiff1d(ids, used)[0])
    return DataError(f"{path}: no edge touches vertex {alone}, so nothing is known of it. Drop it.")


def _text(tag: str, ids: Sequence[int], numbers: Sequence[float]) -> str:
    return f"{tag} {' '.join(map(str, ids))} {' '.join(map(repr, numbers))}\n"
