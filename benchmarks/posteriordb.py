"""How near does a method come to the reference posteriors of posteriordb by default settings?

Run ``python benchmarks/posteriordb.py``: one JSON line a run, then a table. A run of all models
is also written to ``benchmarks/results/``. Data and references are read from ``$PPL_DATA`` or
``../shared/data``; they are made from posteriordb, https://github.com/stan-dev/posteriordb.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import scoring  # noqa: E402
from benchmarks.posteriordb.models import MODELS, data_folder, load  # noqa: E402
from ppl import PPLError, infer  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = {
    "parameters": "parameters",
    "max_err": "max abs err",
    "mean_err": "mean abs err",
    "max_lsr": "max abs lsr",
    "mean_lsr": "mean abs lsr",
    "ess": "least ESS",
    "pareto_k": "Pareto k",
    "verdict": "verdict",
    "steps": "iterations",
    "seconds": "seconds",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, score and report."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    folder = data_folder()
    if folder is None:
        print("skipped: no folder posteriordb with references in $PPL_DATA or ../shared/data")
        return
    names = [n for n in MODELS if not options.only or any(part in n for part in options.only)]
    runs: list[dict[str, Any]] = []
    for name in names:
        for seed in options.seeds:
            runs.append(run(folder, name, options.method, seed))
            print(json.dumps(runs[-1]), flush=True)
    text = table(runs)
    print(f"\n{text}")
    output = options.output or (None if options.only else RESULTS)
    if output is not None:
        _write(output, runs, text)


def run(folder: Path, name: str, method: str, seed: int) -> dict[str, Any]:
    """One fit as a record of plain numbers; where it fails, the text under the error's name."""
    record: dict[str, Any] = {
        "question": "posteriordb",
        "model": name,
        "backend": method,
        "options": {},
        "seed": seed,
    }
    record |= {"dtype": "float64", "device": "cpu", "threads": torch.get_num_threads()}
    record |= {"torch": torch.__version__, "commit": _commit()}
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is in the diagnostics
            posterior = infer(MODELS[name].model, load(folder, name), method=method, seed=seed)
    except PPLError as error:
        return record | {type(error).__name__: " ".join(str(error).split())}
    seconds = time.perf_counter() - start
    reference = scoring.load_reference(folder / name)
    result = scoring.score(scoring.posterior_moments(posterior, reference), reference)
    found = posterior.diagnostics
    return record | {
        **result._asdict(),
        "ess": scoring.smallest(found.ess),
        "pareto_k": scoring.largest(found.pareto_k),
        "verdict": found.verdict,
        "converged": found.converged,
        "steps": found.iterations,
        "seconds": round(seconds, 2),
        "log_evidence": None if posterior.log_evidence is None else posterior.log_evidence.value,
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each model, the median over seeds and their range."""
    lines = ["| model | " + " | ".join(COLUMNS.values()) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name in dict.fromkeys(r["model"] for r in runs):
        mine = [r for r in runs if r["model"] == name]
        done = [r for r in mine if "max_err" in r]
        if done:
            cells = [scoring.cell([r[key] for r in done]) for key in COLUMNS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        for r in mine if not done else []:
            kind = next(k for k in r if k.endswith("Error"))
            lines.append(f"| {name} | {kind}: {r[kind]} |" + " |" * (len(COLUMNS) - 1))
            break
    return "\n".join(lines) + "\n" + _summary(runs)


def _summary(runs: Sequence[dict[str, Any]]) -> str:
    done = [r for r in runs if "max_err" in r]
    if not done:
        return "\nNo run came to an end."
    close = sum(r["max_err"] < 0.1 for r in done), sum(r["max_err"] < 0.3 for r in done)
    spread = sum(r["mean_lsr"] < 0.1 for r in done)
    return (
        f"\n{len(done)} of {len(runs)} runs came to an end: median of mean abs err "
        f"{median(r['mean_err'] for r in done):.3f}, of mean abs lsr "
        f"{median(r['mean_lsr'] for r in done):.3f}; largest error below 0.1 in {close[0]}, "
        f"below 0.3 in {close[1]}; mean abs lsr below 0.1 in {spread}; "
        f"{sum(r['seconds'] for r in done):.0f} s in all, threads: {done[0]['threads']}, "
        f"torch {done[0]['torch']}."
    )


def _write(folder: Path, runs: Sequence[dict[str, Any]], text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "posteriordb.jsonl").write_text("".join(json.dumps(r) + "\n" for r in runs))
    (folder / "posteriordb.md").write_text(
        "# posteriordb, default settings\n\n"
        "`err`: difference of means in reference standard deviations; "
        "`lsr`: log ratio of standard deviations.\n"
        f"Remake with `python benchmarks/posteriordb.py`.\n\n{text}\n"
    )


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="models whose name contains one of these"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one run for each")
    parser.add_argument("--method", default="qem", help="name of a backend")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--output", type=Path, help="folder of the two result files")
    return parser


if __name__ == "__main__":
    main()
