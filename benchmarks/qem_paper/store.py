"""Finished runs in a file, so that experiments can be run one by one, and a stopped command goes on where it was."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.qem_paper.experiments import EXPERIMENTS
from benchmarks.qem_paper.runs import OutOfTime, Trace, Units, run


class Key(NamedTuple):
    """What tells two runs apart."""

    model: str
    method: str
    particles: int
    iterations: int
    seed: int = 0
    units: Units = None
    every: int = 0


class Store:
    """Runs by key, a JSON line each; a run is made when it is asked for and there is time left.

    Args:
        path: of the file; None keeps nothing.
        until: reading of ``time.monotonic`` after which no run goes on; None for no limit.
    """

    def __init__(self, path: Path | None, until: float | None = None) -> None:
        self.path, self.until = path, until
        self.runs: dict[Key, Trace] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                self.runs[Key(*record["key"])] = _trace(record["trace"])

    def get(self, key: Key) -> Trace | None:
        """A run, made now if it is not there yet; None where time is up.

        A run is judged where it is scored: ``every`` is not 0.
        """
        if key in self.runs:
            return self.runs[key]
        if self.until is not None and time.monotonic() > self.until:
            return None
        try:
            made = run(
                EXPERIMENTS[key.model],
                key.method,
                key.particles,
                key.iterations,
                key.seed,
                units=key.units,
                every=key.every,
                judge=key.every > 0,
                until=self.until,
            )
        except OutOfTime:
            return None
        self.runs[key] = made
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "trace": _record(made)}) + "\n")
        return made


def _record(trace: Trace) -> dict[str, Any]:
    return {
        "log_evidence": list(trace.log_evidence),
        "seconds": list(trace.seconds),
        "predicted": trace.predicted,
        "errors": trace.errors,
    }


def _trace(record: dict[str, Any]) -> Trace:
    pairs = ({int(i): tuple(x) for i, x in record[k].items()} for k in ("predicted", "errors"))
    return Trace(record["log_evidence"], record["seconds"], *pairs)
