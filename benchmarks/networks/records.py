"""Rows of runs: one JSON line each, kept so that an interrupted table goes on where it stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Row = dict[str, Any]


class Records:
    """The rows of a file; :meth:`row` runs only what is not there yet.

    Args:
        file: of JSON lines; made where it is missing.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.rows: list[Row] = [json.loads(line) for line in lines if line.strip()]

    def row(self, key: Mapping[str, Any], run: Callable[[], Mapping[str, Any]]) -> Row:
        """The kept row with this key, or a new one: ``run`` gives its figures."""
        for row in self.rows:
            if all(row.get(k) == v for k, v in key.items()):
                return row
        row = {**key, **run()}
        print(json.dumps(row), flush=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        return row


def mean_se(values: Iterable[float], digits: int) -> str:
    """Mean and standard error; a dash where there is nothing."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return "-"
    if len(known) == 1:
        return f"{known[0]:.{digits}f}"
    return f"{mean(known):.{digits}f} ± {stdev(known) / math.sqrt(len(known)):.{digits}f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
