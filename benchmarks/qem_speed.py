"""How fast is an iteration of QEM, and how far from what the machine could do?

    python benchmarks/qem_speed.py [--particles 3 10 30 100] [--threads 1] [--repeats 15]

For MovieLens (300 users, blocks {mu_z} {psi_z} {z}: 300 K^3 combinations) and radon (4 states of 150 houses), prints a
JSON line a run and a table: median time of an iteration, peak memory above the start, and the floor, which is the time
that the largest factor needs by itself: its bytes (written once, read by the sum, read by the backward pass) over the
measured bandwidth, its exponentials and its multiplications over the measured rates. The last column is the time that
the authors' public code needed for the same particles on another x86-64 core; see the note below the table.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

import ppl
from ppl.backend import Settings
from ppl.inference import qem
from ppl.models.datasets import find
from ppl.models.hierarchical import radon_states
from ppl.models.ratings import movielens
from ppl.streams import Streams

RESULTS = Path(__file__).parent / "results"
# Milliseconds an iteration of alan 09ae599 on PyTorch 2.3.1, one thread, without prediction; None: not measured.
AUTHORS = {
    ("movielens", 3): 15,
    ("movielens", 10): 118,
    ("movielens", 30): 4906,
    ("radon", 3): 35,
    ("radon", 10): 339,
}
AUTHORS |= {("radon, a block a latent", k): AUTHORS["radon", k] for k in (3, 10)}
APART = [
    ("global_mean", "global_log_sigma"),
    ("State_mean",),
    ("State_log_sigma",),
    ("Beta_u",),
    ("Beta_basement",),
]


def data_of(name: str):
    """Model and data; simulated with the shape of the real data where that is not on the machine."""
    file = find(
        "movielens/movielens_simulated.npz" if name == "movielens" else "radon/radon_states.npz"
    )
    if name == "movielens":
        arrays = np.load(file) if file else None
        generator = torch.Generator().manual_seed(0)
        x = (
            arrays["x_train"]
            if arrays is not None
            else torch.bernoulli(torch.full((300, 5, 18), 0.2), generator=generator)
        )
        obs = (
            arrays["obs_train"]
            if arrays is not None
            else torch.bernoulli(torch.full((300, 5), 0.5), generator=generator)
        )
        return movielens, {"x": x, "obs": obs}
    if file:
        arrays = np.load(file)
        return radon_states, {k: arrays[f"{k}_train"] for k in ("obs", "basement", "log_uranium")}
    generator = torch.Generator().manual_seed(0)
    return radon_states, {
        k: torch.randn(4, 150, generator=generator) for k in ("obs", "basement", "log_uranium")
    }


def rates() -> dict[str, float]:
    """Bytes, multiplications and exponentials a second of one thread, double precision, out of cache."""
    big = torch.randn(1 << 23, dtype=torch.float64)
    other = torch.empty_like(big)
    left, right = (
        torch.randn(4096, 37, dtype=torch.float64),
        torch.randn(37, 900, dtype=torch.float64),
    )
    small = torch.randn(1 << 15, dtype=torch.float64)
    room = torch.empty_like(small)

    def fastest(work, repeats=9):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times)

    return {
        "bytes": 2 * big.numel() * 8 / fastest(lambda: other.copy_(big)),
        "multiplications": left.numel() * 900 / fastest(lambda: left @ right),
        "exponentials": small.numel() / fastest(lambda: torch.exp(small, out=room), 99),
    }


def _factor(name: str, k: int) -> tuple[int, int]:
    """Entries of the largest factor, and multiplications for each."""
    if name == "movielens":
        return 300 * k**3, 37
    return (600 * k**4, 1) if name.endswith("a block a latent") else (600 * k, 1)


def floor_ms(name: str, k: int, rate: dict[str, float]) -> float:
    """Time of the largest factor alone."""
    entries, width = _factor(name, k)
    seconds = (
        3 * 8 * entries / rate["bytes"]
        + entries / rate["exponentials"]
        + width * entries / rate["multiplications"]
    )
    return 1e3 * seconds


def measure(name: str, k: int, repeats: int) -> dict[str, object]:
    """One configuration, in this process."""
    program, data = data_of(name)
    groups = APART if name.endswith("a block a latent") else "auto"
    problem = qem.prepare(
        program.bind(data), qem.QEM(particles=k, bridge=False, groups=groups), Settings(Streams(0))
    )
    state = qem.init(problem)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    warm_up = 2 if problem.weighting.plan.largest[1] > 1_000_000 else 20
    for i in range(repeats + warm_up):
        start = time.perf_counter()
        state, _ = qem.step(problem, state)
        if i >= warm_up:
            times.append(time.perf_counter() - start)
        if sum(times) > 60:
            break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "question": "time of a QEM iteration",
        "model": name,
        "particles": k,
        "ms": 1e3 * median(times),
        "ms_min": 1e3 * min(times),
        "ms_max": 1e3 * max(times),
        "floor_ms": floor_ms(name, k, rates()),
        "peak_mib": peak / 1024,
        "largest_entries": problem.weighting.plan.largest[1],
        "repeats": len(times),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "version": ppl.__version__,
    }


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| model | K | ms an iteration (min - max) | floor, ms | times floor | peak memory, MiB | authors' code, ms | ratio |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        theirs = AUTHORS.get((r["model"], r["particles"]))
        ratio = f"{theirs / r['ms']:.0f}x" if theirs else "-"
        lines.append(
            f"| {r['model']} | {r['particles']} | {r['ms']:.2f} ({r['ms_min']:.2f} - {r['ms_max']:.2f}) | {r['floor_ms']:.2f} | "
            f"{r['ms'] / r['floor_ms']:.1f} | {r['peak_mib']:.0f} | {theirs or '-'} | {ratio} |"
        )
    lines += [
        "",
        "Authors' code: alan 09ae599 on PyTorch 2.3.1, one thread, measured on another machine of the same kind. It has one",
        "block a latent on radon (600 K^4 combinations), as in the last rows; by default the latents of a state share a block",
        "here. An iteration is sampling, log evidence and update in both. Times at small K are Python overhead: the floor says",
        "little there.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--particles", type=int, nargs="+", default=[3, 10, 30, 100])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--one", nargs=2, metavar=("MODEL", "K"), help="measure one configuration in this process"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]), arguments.repeats)))
        return
    rows = []
    for name in ("movielens", "radon", "radon, a block a latent"):
        for k in (
            arguments.particles
            if "block" not in name
            else [k for k in arguments.particles if k <= 10]
        ):
            # A process for each, so that one peak does not hide another.
            command = [
                sys.executable,
                __file__,
                "--one",
                name,
                str(k),
                "--threads",
                str(arguments.threads),
            ]
            command += ["--repeats", str(arguments.repeats)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            print(out.strip(), flush=True)
            rows.append(json.loads(out))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "qem_speed.md").write_text(table(rows) + "\n")
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
