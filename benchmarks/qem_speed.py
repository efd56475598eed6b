"""Time and memory of an iteration of QEM on the models of its paper, beside the authors' own code.

    python benchmarks/qem_speed.py [--models bus_breakdown radon ...] [--particles 3 10 30] [--repeats 40]

Blocks, step and start are the paper's. An iteration is sampling, log evidence and update, in both codes; ours in double
precision, theirs in single. Each configuration runs in a process of its own, one thread, and is timed by the CPU time of that
process (median over iterations, the first left out), so that a busy machine changes ratios little. Memory is what the
process's peak grows by from the prepared problem on.

Where ``$PPL_PEERS`` names an interpreter that runs the authors' code and ``$PPL_ALAN`` a clone of it (see
``qem_peer.py``), their configuration runs right after ours, and the ratio is of this run. Otherwise it is to the table below,
measured on another x86-64 machine, and marked so.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ppl  # noqa: E402
from benchmarks.qem_paper.experiments import EXPERIMENTS  # noqa: E402
from ppl.backend import Settings  # noqa: E402
from ppl.inference import qem  # noqa: E402
from ppl.streams import Streams  # noqa: E402

RESULTS = Path(__file__).parent / "results"
# Name here and at the peer -> name of the experiment.
MODELS = {
    "bus_breakdown": "bus",
    "bus_logdelay": "bus_delays",
    "movielens": "movielens_as_shipped",
    "occupancy": "occupancy",
    "radon": "radon_states",
    "radon_counties": "radon_counties",
    "covid": "covid",
    "chimpanzees": "chimpanzees",
}
# CPU ms an iteration and MB above start of alan 09ae599 on PyTorch 2.3.1, one thread of a loaded two-core x86-64 machine.
AUTHORS = {
    ("bus_breakdown", 3): (24, 71),
    ("bus_breakdown", 10): (21, 72),
    ("bus_breakdown", 30): (30, 88),
    ("bus_logdelay", 30): (1945, 538),
    ("covid", 3): (70, 35),
    ("covid", 10): (1873, 525),
    ("movielens", 3): (15, 104),
    ("movielens", 10): (118, 127),
    ("movielens", 30): (4906, 1286),
    ("occupancy", 3): (71, 3531),
    ("occupancy", 10): (2072, 418),
    ("radon", 3): (35, 34),
    ("radon", 10): (339, 523),
    ("radon_counties", 3): (41, 29),
    ("radon_counties", 10): (40, 31),
    ("radon_counties", 30): (39, 34),
}
# Too large for the authors' code on 24 GB, or hours of it.
BEYOND = {("radon", 30), ("occupancy", 30), ("covid", 30)}
WANTED = {3: 10, 10: 10, 30: 20}


def data_of(name: str) -> dict[str, Any]:
    """The data of an experiment; of chimpanzees random ones of the same shape, here as at the peer."""
    if name != "chimpanzees":
        return EXPERIMENTS[MODELS[name]].load().train
    generator = torch.Generator().manual_seed(0)
    names = ("condition", "prosoc_left", "obs")
    return {n: torch.bernoulli(torch.full((7, 6, 10), 0.5), generator=generator) for n in names}


def measure(name: str, k: int, repeats: int, seconds: float) -> dict[str, Any]:
    """One configuration of ours, in this process."""
    experiment = EXPERIMENTS[MODELS[name]]
    options = qem.QEM(
        particles=k,
        groups=[list(g) for g in experiment.groups],
        step=experiment.step,
        joint_up_to=0,
        start="standard",
        bridge=False,
    )
    bound = experiment.program.bind(data_of(name))
    problem = qem.prepare(bound, options, Settings(Streams(0)))
    state = qem.init(problem)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times, log_z, begin = [], [], time.process_time()
    for i in range(repeats + 3):
        start = time.process_time()
        state, info = qem.step(problem, state)
        taken = time.process_time() - start
        log_z.append(info.metrics["log_evidence"])
        if i >= 3 or taken > 1:  # the first ones of a quick model warm up
            times.append(taken)
        if times and time.process_time() - begin > seconds:
            break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "ms": 1e3 * median(times),
        "ms_min": 1e3 * min(times),
        "peak_mib": peak / 1024,
        "largest_entries": problem.weighting.plan.largest[1],
        "repeats": len(times),
        "log_z": log_z[:2],
        "torch": torch.__version__,
        "version": ppl.__version__,
    }


def ours(name: str, k: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same in a process of its own, so that one peak does not hide another."""
    command = [sys.executable, __file__, "--one", name, str(k)]
    command += ["--repeats", str(arguments.repeats), "--seconds", str(arguments.seconds)]
    return _answer(command)


def theirs(name: str, k: int, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The authors' code beside it; None where it is not to be had."""
    interpreter = os.environ.get("PPL_PEERS")
    if not interpreter or "PPL_ALAN" not in os.environ or (name, k) in BEYOND:
        return None
    script = str(Path(__file__).with_name("qem_peer.py"))
    command = [interpreter, script, name, str(k)]
    command += ["--repeats", str(arguments.repeats), "--seconds", str(arguments.seconds)]
    return _answer(command)


def _answer(command: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    out = subprocess.run(command, capture_output=True, text=True, env=environment)
    if out.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{out.stderr[-2000:]}")
    return json.loads(out.stdout.strip().splitlines()[-1])


def row(name: str, k: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    mine, peer = ours(name, k, arguments), theirs(name, k, arguments)
    known = AUTHORS.get((name, k))
    base = peer["ms"] if peer else known[0] if known else None
    return {
        "question": "CPU time of a QEM iteration",
        "model": name,
        "particles": k,
        **mine,
        "authors_ms": peer["ms"] if peer else None,
        "authors_peak_mib": peer["peak_mib"] if peer else None,
        "authors_table_ms": known[0] if known else None,
        "authors_table_peak_mb": known[1] if known else None,
        "ratio": base / mine["ms"] if base else None,
        "ratio_of": "this run" if peer else "the table" if known else "",
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model | K | ms | peak, MiB | authors' code here: ms | peak, MiB | their table: ms | ratio | wanted |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]

    def shown(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    for r in rows:
        ratio = "-" if r["ratio"] is None else f"{r['ratio']:.1f}x"
        ratio += " (table)" if r["ratio_of"] == "the table" else ""
        lines.append(
            f"| {r['model']} | {r['particles']} | {r['ms']:.2f} | {r['peak_mib']:.0f} | {shown(r['authors_ms'])} | "
            f"{shown(r['authors_peak_mib'], 0)} | {shown(r['authors_table_ms'], 0)} | {ratio} | "
            f"{WANTED.get(r['particles'], 10)}x |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--particles", type=int, nargs="+", default=[3, 10, 30])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="stop a configuration after this"
    )
    parser.add_argument(
        "--one", nargs=2, metavar=("MODEL", "K"), help="ours alone, in this process"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        name, k = arguments.one[0], int(arguments.one[1])
        print(json.dumps(measure(name, k, arguments.repeats, arguments.seconds)))
        return
    if "PPL_PEERS" not in os.environ or "PPL_ALAN" not in os.environ:
        print(
            "skipped: the authors' code, because $PPL_PEERS and $PPL_ALAN do not name it; ratios are to their table"
        )
    rows = []
    for name in arguments.models:
        for k in arguments.particles:
            if (name, k) == ("covid", 30):  # nothing to compare with, and minutes an iteration
                continue
            rows.append(row(name, k, arguments))
            print(json.dumps(rows[-1]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    if set(arguments.models) == set(MODELS):
        (RESULTS / "qem_speed.md").write_text(table(rows) + "\n")
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
