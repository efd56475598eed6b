"""Does QEM find what the paper found, how fast, and how near to the reference posteriors?

    python benchmarks/qem_paper [--only radon_counties bus] [--seeds 5] [--iterations 250] [--particles 30]

Runs each experiment with the paper's settings (constant step, start at Normal(0, 1), product proposals, the
paper's blocks) and with our defaults, which choose particles by themselves, and the gradient methods where
this version has them. Log evidence is that of the posterior's own weights at the paper's number of particles of every block,
whatever a method takes for itself. Prints a JSON line a run; leaves tables (``qem_paper.md``) and figures
(``qem_paper_*.png``) in ``--output``, by default ``benchmarks/results``.

With ``--keep FILE`` finished runs are kept there and not made again, so that experiments can be run one by one, or for some
``--minutes`` at a time; the tables and figures of a last command with all of them in ``--only`` are then made at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.qem_paper import figures, tables  # noqa: E402
from benchmarks.qem_paper.experiments import EXPERIMENTS, Experiment  # noqa: E402
from benchmarks.qem_paper.runs import METHODS, Trace, is_there  # noqa: E402
from benchmarks.qem_paper.store import Key, Store  # noqa: E402
from ppl import PPLError  # noqa: E402

_TIMED = (3, 10, 30)
_LARGEST = {"covid": 10, "covid_weekly": 10, "radon_states": 10}  # particles, as in the paper
# The paper's block a latent has 600 K^4 combinations, covid's chain 10028 K^4: no more than these are timed.


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, tabulate, draw."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * options.minutes if options.minutes else None
    store = Store(options.keep, until)
    methods = [m for m in options.methods if is_there(m)]
    absent = [m for m in options.methods if m not in methods]
    done = {}
    for name in options.only or EXPERIMENTS:
        try:
            done[name] = _experiment(EXPERIMENTS[name], methods, options, store)
        except PPLError as error:  # no data, or more memory than there is
            print(f"skipped: {name}: {error}")
    done = {name: (k, found) for name, (k, found) in done.items() if found}
    if not done:
        return
    text = _tables(done, options, absent)
    (options.output / f"{options.name}.md").write_text(text + "\n", encoding="utf-8")
    print("\n" + text)
    _figures(done, options, store)


Done = dict[str, tuple[int, dict[str, list[Trace]]]]


def _experiment(
    experiment: Experiment, methods: Sequence[str], options: argparse.Namespace, store: Store
) -> tuple[int, dict[str, list[Trace]]]:
    """Every method with one seed, then with the next, so that a limit of time leaves something of each."""
    particles = min(options.particles, _LARGEST.get(experiment.name, options.particles))
    experiment.load()  # no data, no runs
    found: dict[str, list[Trace]] = {m: [] for m in methods}
    for seed in range(options.seeds):
        for method in list(found):
            key = Key(
                experiment.name, method, particles, options.iterations, seed, every=options.every
            )
            try:
                trace = store.get(key)
            except PPLError as error:
                print(f"skipped: {experiment.name} by {method}: {error}")
                del found[method]
                continue
            if trace is None:
                print(f"skipped: {experiment.name} by {method}, seed {seed}: time is up")
                continue
            found[method].append(trace)
            _tell(key, trace)
    return particles, {m: traces for m, traces in found.items() if traces}


def _tell(key: Key, trace: Trace) -> None:
    record = {"question": "qem_paper", "model": key.model, "method": key.method, "K": key.particles}
    record |= {"seed": key.seed, "plateau": tables.at(trace, "plateau")}
    record |= {"seconds": trace.seconds[-1], "threads": torch.get_num_threads()}
    print(json.dumps(record | {"torch": torch.__version__}), flush=True)


def _tables(done: Done, options: argparse.Namespace, absent: Sequence[str]) -> str:
    levels, speeds, scores, notes = [], [], [], []
    for name, (particles, found) in done.items():
        experiment = EXPERIMENTS[name]
        if "qem" in found:
            levels += tables.level_table(experiment, particles, found["qem"])
        if "qem" in found and "qem default" in found:
            speeds.append(
                tables.speed_row(experiment, particles, found["qem"], found["qem default"])
            )
        for method, traces in found.items():
            scores += tables.score_rows(experiment, particles, method, traces)
        notes.append(f"- {name}: {experiment.note}.")
    lines = [
        f"QEM with the settings of the paper: log evidence by iteration, mean (sd over {options.seeds} seeds). Published",
        "curves are smoothed over 8 iterations, the reference is not; a difference is in standard errors.",
        "",
        *(tables.LEVEL_HEAD + levels),
        "",
        "Iterations (median, range) until the mean of 8 is at the final level of the paper's settings, less the standard",
        "deviation of one iteration there:",
        "",
        *(tables.SPEED_HEAD + speeds),
        "",
        "At the end: scores of 100 joint draws on the test data, mean errors against NUTS, time on "
        f"{options.threads} thread(s):",
        "",
        *(tables.SCORE_HEAD + scores),
        "",
        *notes,
    ]
    if absent:
        lines += ["", f"Not in this version, and left out: {', '.join(absent)}."]
    return "\n".join(lines)


def _figures(done: Done, options: argparse.Namespace, store: Store) -> None:
    place = options.output
    for name, (particles, found) in done.items():
        published = EXPERIMENTS[name].published.get(particles, {}).get("plateau")
        path = place / f"{options.name}_{name}.png"
        figures.curves(name, found, particles, path, published)
    judged = {n: f for n, (_, f) in done.items() if any(t.errors for t in next(iter(f.values())))}
    if judged:
        figures.errors(judged, place / f"{options.name}_errors.png")
    times, pairs = _times(done, options, store), _pairs(done, options, store)
    if times:
        figures.timings(times, place / f"{options.name}_times.png")
    if pairs:
        figures.rescaled(pairs, place / f"{options.name}_rescaled.png")


def _times(
    done: Done, options: argparse.Namespace, store: Store
) -> dict[str, dict[tuple[str, int], float]]:
    """Median milliseconds of an iteration by method and number of particles, after the first fifth.

    Our defaults are left out: while the bridge is down an iteration weighs more than once.
    """
    table: dict[str, dict[tuple[str, int], float]] = {}
    for name, (_, found) in done.items():
        counts = [k for k in _TIMED if k <= min(_LARGEST.get(name, 30), options.particles)]
        table[name] = {}
        for method in (m for m in found if m != "qem default"):
            for k in counts:
                trace = store.get(Key(name, method, k, options.timed))
                if trace is not None:
                    steps = np.diff([0.0, *trace.seconds])[options.timed // 5 :]
                    table[name][method, k] = 1e3 * float(np.median(steps))
    return {name: times for name, times in table.items() if times}


def _pairs(
    done: Done, options: argparse.Namespace, store: Store
) -> dict[str, dict[str, tuple[Trace, Trace]]]:
    """The version in the usual units and the one in others, from the same seed."""
    made: dict[str, dict[str, tuple[Trace, Trace]]] = {}
    for name, (particles, found) in done.items():
        for method in (m for m in found if m != "qem default"):
            keys = [
                Key(name, method, particles, options.iterations, units=u)
                for u in ("original", "rescaled")
            ]
            first, second = (store.get(key) for key in keys)
            if first is not None and second is not None:
                made.setdefault(name, {})[method] = first, second
    return made


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/qem_paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, help="experiments")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=250)
    parser.add_argument("--particles", type=int, default=30, help="at most; covid has 10")
    parser.add_argument("--every", type=int, default=10, help="iterations between two scores")
    parser.add_argument("--timed", type=int, default=25, help="iterations of a timing")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="of finished runs")
    parser.add_argument("--minutes", type=float, help="after which no run goes on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--name", default="qem_paper", help="first part of the names of results")
    return parser


if __name__ == "__main__":
    main()
