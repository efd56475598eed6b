"""Sparse problems, their scores and their clock: what the benchmarks of AMP share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from ppl.models.sparse import MatrixKind, sensing_matrix


class Sensed(NamedTuple):
    """A linear problem with its truth."""

    matrix: np.ndarray  # [row, coef]
    x: np.ndarray  # [coef]
    y: np.ndarray  # [row]
    noise: float  # standard deviation

    @property
    def data(self) -> dict[str, np.ndarray]:
        """What a model sees."""
        return {"A": self.matrix, "y": self.y}


def sparse_vector(size: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """Standard normals in exactly ``share * size`` places, zero elsewhere.

    A support of fixed size, since one of random size moves the errors by more than the methods differ.
    """
    x = np.zeros(size)
    places = rng.permutation(size)[: round(share * size)]
    x[places] = rng.standard_normal(len(places))
    return x


def grouped_vector(size: int, members: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """Standard normals in exactly ``share`` of the groups of neighbours, zero elsewhere."""
    groups = size // members
    on = np.isin(np.arange(groups), rng.permutation(groups)[: round(share * groups)])
    return rng.standard_normal(size) * np.repeat(on, members)


def sensed(
    x: np.ndarray, rows: int, kind: MatrixKind = "independent", *, snr_db: float = 30, seed: int = 0
) -> Sensed:
    """Linear measurements of ``x`` with noise ``snr_db`` below them."""
    matrix = sensing_matrix(rows, len(x), kind, seed=seed + 1000)
    z = matrix @ x
    noise = float(np.sqrt(np.mean(z**2) * 10 ** (-snr_db / 10)))
    rng = np.random.default_rng(seed + 2000)
    return Sensed(matrix, x, z + noise * rng.standard_normal(rows), noise)


def oracle(case: Sensed, slab: float = 1.0) -> np.ndarray:
    """The posterior mean of one who knows the support, the slab and the noise: no method can be better."""
    at = np.flatnonzero(case.x)
    a = case.matrix[:, at]
    precision = a.T @ a + np.eye(len(at)) * (case.noise / slab) ** 2
    found = np.zeros_like(case.x)
    found[at] = np.linalg.solve(precision, a.T @ case.y)
    return found


def nmse_db(found: Any, x: np.ndarray) -> float:
    """Squared error relative to the square of ``x``, in dB.

    >>> round(nmse_db([0.9, 0.0], np.array([1.0, 0.0])), 6)
    -20.0
    """
    return float(10 * np.log10(np.square(np.asarray(found) - x).sum() / np.square(x).sum()))


def direction_db(found: Any, x: np.ndarray) -> float:
    """Squared distance of the two directions, in dB: what a channel without a scale can be judged by.

    >>> direction_db([3.0, 4.0], np.array([0.3, 0.4])) < -200
    True
    """
    a, b = (np.asarray(v) / max(np.linalg.norm(v), 1e-300) for v in (found, x))
    return float(10 * np.log10(np.square(a - b).sum() + 1e-30))


def cpu(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of one call, and what it returns; other load on the machine counts less so."""
    begun = time.process_time()
    found = work()
    return time.process_time() - begun, found


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median and range.

    >>> spread([1.0, 3.0, 2.0])
    '2.0 (1.0 .. 3.0)'
    """
    shown = [f"{v:.{digits}f}" for v in (median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} .. {shown[2]})"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
