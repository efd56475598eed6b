"""What does an iteration of QEM cost as a plate grows, and how much memory does a run take?

    python benchmarks/qem_scale.py [--users 1000 10000 100000 1000000] [--memory 2GiB] [--iterations 3]

MovieLens, simulated: users with 18 tastes and 5 films each, blocks {mu_z, psi_z} and {z}, 10 particles, single precision.
A run a size in a process of its own, without the bridge, so that every iteration is one weighting. Prints and writes a
table of processor time an iteration, time a user, and peak memory of the process, and a plot. Results of a plate of this
size keep moments of each user, not particles; the last weighting is part of the run and of its peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def measure(users: int, memory: str, iterations: int) -> dict[str, float]:
    """One run in this process."""
    import resource
    import warnings

    import torch

    from ppl import infer
    from ppl.models.ratings import movielens

    warnings.simplefilter("ignore")
    g = torch.Generator().manual_seed(0)
    data = {
        "x": (torch.rand((users, 5, 18), generator=g) < 0.2).float(),
        "obs": (torch.rand((users, 5), generator=g) < 0.5).float(),
    }

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    before, start, marks = peak(), time.process_time(), []
    posterior = infer(
        movielens,
        data,
        method="qem",
        seed=0,
        dtype=torch.float32,
        memory=memory,
        particles=10,
        groups=[("mu_z", "psi_z")],
        bridge=False,
        replicates=2,
        max_iters=iterations,
        tol=0,
        progress=False,
        callbacks=[lambda _: marks.append(time.process_time())],
    )
    steps = [b - a for a, b in zip(marks, marks[1:], strict=False)] or [marks[0] - start]
    return {
        "users": users,
        "ms": 1e3 * min(steps),
        "start_s": marks[0] - start,
        "last_s": time.process_time() - marks[-1],
        "data_gib": before,
        "peak_gib": peak(),
        "kept": type(posterior.marginals["z"]).__name__,
    }


def main() -> None:
    """Run all sizes; write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.users[0], args.memory, args.iterations)))
        return
    rows = [run(n, args.memory, args.iterations) for n in args.users]
    lines = table(rows, args.memory)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "qem_scale.md").write_text("\n".join(lines) + "\n")
    plot(rows, RESULTS / "qem_scale.png")


def run(users: int, memory: str, iterations: int) -> dict[str, float]:
    """One size in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--one", "--users", str(users), "--memory", memory]
    command += ["--iterations", str(iterations)]
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(done.stderr)
    row = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(row), flush=True)
    return row


def table(rows: list[dict[str, float]], memory: str) -> list[str]:
    """The measured rows as markdown."""
    lines = [
        f"Budget {memory}, one thread, processor time.",
        "",
        "| users | ms an iteration | microseconds a user | last weighting, s | data, GiB | peak, GiB | kept of z |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['users']} | {r['ms']:.0f} | {1e3 * r['ms'] / r['users']:.1f} | {r['last_s']:.1f} | "
            f"{r['data_gib']:.2f} | {r['peak_gib']:.2f} | {r['kept']} |"
        )
    print("\n".join(lines))
    return lines


def plot(rows: list[dict[str, float]], file: Path) -> None:
    """Time an iteration and peak memory against the number of users, on logarithmic scales."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    users = [r["users"] for r in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    left.loglog(users, [r["ms"] for r in rows], "o-", label="measured")
    last = rows[-1]
    left.loglog(users, [last["ms"] * n / last["users"] for n in users], ":", label="linear")
    left.set(xlabel="users", ylabel="ms an iteration")
    left.legend()
    right.loglog(users, [r["peak_gib"] for r in rows], "o-", label="peak")
    right.loglog(users, [r["data_gib"] for r in rows], ":", label="data and libraries")
    right.set(xlabel="users", ylabel="GiB")
    right.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
