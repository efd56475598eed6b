"""Drive a backend step by step, with a clock: what the benchmarks of message passing share."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

import ppl
from ppl import Model, Posterior, backend
from ppl.backend import Settings
from ppl.streams import Streams

RESULTS = Path(__file__).parent / "results"


class Fit(NamedTuple):
    """One timed fit."""

    setup_s: float  # from arrays: trace, bind, prepare
    fit_s: float  # first state and all steps
    steps: list[tuple[float, Mapping[str, float]]]  # seconds since the first state; metrics
    posterior: Posterior | None
    is_done: bool


def fit(
    program: Model[Any],
    data: Mapping[str, Any],
    method: str,
    *,
    max_iters: int | None = None,
    with_posterior: bool = False,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Fit:
    """Fit as ``infer`` does, and time its parts; the posterior is made after the clock has stopped."""
    begun = time.perf_counter()
    bound = program.bind(data, dtype=dtype)
    _, module, record = backend.resolve(method, options)
    problem = module.prepare(bound, record, Settings(Streams(0), max_iters=max_iters))
    built = time.perf_counter()
    state, steps, done = module.init(problem), [], False
    limit = max_iters or int(getattr(problem, "max_iters", 1))
    while not done and len(steps) < limit:
        state, info = module.step(problem, state, None)
        done = info.done
        steps.append((time.perf_counter() - built, dict(info.metrics)))
    ended = time.perf_counter()
    posterior = module.posterior(problem, state) if with_posterior else None
    return Fit(built - begun, ended - built, steps, posterior, done)


def peers() -> str | None:
    """The interpreter of a scratch environment that has the peers, named by ``$PPL_PEERS``."""
    return os.environ.get("PPL_PEERS")


def ask_peer(script: str, *arguments: str) -> list[dict[str, Any]]:
    """JSON lines of a script run by :func:`peers`, on one thread."""
    command = [str(peers()), str(Path(__file__).parent / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr[-2000:]}")
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def show(question: str, **figures: Any) -> dict[str, Any]:
    """Print a JSON line and return its record."""
    record = {"question": question, **figures}
    record |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    record |= {"version": ppl.__version__, "machine": platform.machine()}
    print(json.dumps(record), flush=True)
    return record


def write_table(name: str, text: str, *, keep: bool = True) -> None:
    """Print a table; leave it in the results if it is whole."""
    if keep:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    print("\n" + text)
