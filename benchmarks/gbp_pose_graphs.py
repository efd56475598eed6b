"""Pose graphs: how long does laplace need beside GTSAM, and how far do messages come?

    PPL_PEERS=~/peers/bin/python python benchmarks/gbp_pose_graphs.py [--graphs intel sphere] [--repeats 7] [--rounds 1000]

Graphs, where their data is on the machine: M3500, Intel, a synthetic Manhattan world, sphere2500
(which comes with GTSAM) and a simulated sphere of 2500 poses. Ours and GTSAM take turns in one run,
each after a warm-up: time to optimise from odometry, and set-up from arrays (trace, bind, order;
GTSAM: its graph built from Python). The factor of the plane is written in Python in ours; GTSAM is
asked with its built-in one and with one written in Python. Then messages: energy against rounds and
seconds for each schedule. Then one pose at a time: ``posterior.extend`` beside iSAM2.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.driving import Fit, ask_peer, fit, peers, show, write_table  # noqa: E402
from ppl import DataError, Model, infer  # noqa: E402
from ppl.manifolds import SE3  # noqa: E402
from ppl.models import datasets, pose_graph_2d, pose_graph_3d, worlds  # noqa: E402
from ppl.models.pose_graphs import PoseGraph, odometry, read_g2o  # noqa: E402

NAMES = ("manhattan3500", "intel", "synthetic_manhattan3500", "sphere2500", "sphere")
SCHEDULES = ("flood", "tree", "residual", "auto")
EDGE_COLUMNS = ("i", "j", "z", "info")
SHOWN = (1, 10, 30, 100, 300, 1000)


class Task(NamedTuple):
    """A graph with its model, and the lowest energy that anybody has found."""

    name: str
    program: Model[Any]
    graph: PoseGraph
    known_minimum: float | None


def task(name: str) -> Task | None:
    """None, in words, where the data is not on the machine."""
    if name == "sphere":
        return Task(name, pose_graph_3d, worlds.sphere_world(), None)
    if name == "sphere2500":
        return sphere2500()
    if name.endswith(".g2o"):
        graph = read_g2o(name)
        program = pose_graph_2d if graph.start.shape[1] == 3 else pose_graph_3d
        return Task(Path(name).stem, program, from_odometry(graph), None)
    try:
        graph = datasets.pose_graph(name)
    except DataError as error:
        print(f"skipped: {error}")
        return None
    path = datasets.find(f"gbp/{name}.npz")
    with np.load(path) as archive:
        return Task(name, pose_graph_2d, graph, float(archive["opt_energy"]))


def sphere2500() -> Task | None:
    """The benchmark of that name, which comes with GTSAM; both see the same arrays."""
    if not peers():
        print("skipped: sphere2500, which comes with the peer.")
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sphere2500.npz"
        ask_peer("gtsam_peer.py", str(file), "--export", "sphere2500.txt")
        with np.load(file) as archive:
            data = {name: archive[name] for name in archive.files}
    data["anchor"] = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    start = odometry(data["i"], data["j"], data["z"])
    return Task("sphere2500", pose_graph_3d, PoseGraph(data, start), None)


def from_odometry(graph: PoseGraph) -> PoseGraph:
    """The graph with the motions added up as its start, whatever its file proposes."""
    start = odometry(graph.data["i"], graph.data["j"], graph.data["z"])
    if start.shape[1] == 7:
        first = torch.as_tensor(graph.data["anchor"])[None]
        start = SE3.compose(first, torch.as_tensor(start)).numpy()
    return graph._replace(start=start)


def ours(each: Task, repeats: int) -> list[Fit]:
    """Fits by laplace from the start of the graph, after a warm-up."""
    again = lambda: fit(each.program, each.graph.data, "laplace", start={"x": each.graph.start})  # noqa: E731
    again()
    return [again() for _ in range(repeats)]


def rival(each: Task, repeats: int, folder: Path) -> list[dict[str, Any]]:
    """What GTSAM says of the same arrays."""
    file = folder / f"{each.name}.npz"
    if not file.exists():
        arrays = {"anchor_precision": 1e6, **each.graph.data, "start": each.graph.start}
        np.savez(file, **arrays)
    return ask_peer("gtsam_peer.py", str(file), "--repeats", str(repeats))


def batch(each: Task, repeats: int, turns: int, folder: Path) -> dict[str, Any]:
    """Ours and GTSAM by turns: medians, ranges and energies."""
    fits: list[Fit] = []
    theirs: list[dict[str, Any]] = []
    for _ in range(turns):
        if peers():
            theirs += rival(each, repeats, folder)
        fits += ours(each, repeats)
    figures: dict[str, Any] = {
        "graph": each.name,
        "poses": len(each.graph.start),
        "edges": len(each.graph.data["i"]),
        "energy": fits[-1].steps[-1][1]["energy"],
        "iterations": len(fits[-1].steps),
        **spread("fit_ms", [f.fit_s for f in fits]),
        **spread("setup_ms", [f.setup_s for f in fits]),
        "known_minimum": each.known_minimum,
    }
    for way in ("gauss-newton", "levenberg-marquardt"):
        runs = [t for t in theirs if t["way"] == way]
        if runs:
            figures |= {f"gtsam_{way}_energy": runs[-1]["energy"]}
            figures |= spread(f"gtsam_{way}_ms", [s for r in runs for s in r["fit_s"]])
            figures |= spread("gtsam_build_ms", [s for r in runs for s in r["build_s"]])
    return show("time of a pose graph from odometry", **figures)


def spread(name: str, seconds: list[float]) -> dict[str, float]:
    """Median and range, in milliseconds."""
    values = [1e3 * s for s in seconds]
    return {name: median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def custom(each: Task, folder: Path) -> dict[str, Any]:
    """One fit by GTSAM with the edge written in Python, by Gauss-Newton."""
    file = str(folder / f"{each.name}.npz")
    (figures,) = ask_peer("gtsam_peer.py", file, "--repeats", "1", "--custom")
    return show(
        "the same with a factor written in Python",
        graph=each.name,
        gtsam_custom_ms=1e3 * figures["fit_s"][0],
        gtsam_custom_energy=figures["energy"],
    )


def messages(each: Task, schedule: str, rounds: int) -> dict[str, Any]:
    """Energy at the means after some rounds of messages, from odometry."""
    options = {"schedule": schedule, "variance": "gbp", "cure": False}
    start = {"x": each.graph.start}
    run = fit(each.program, each.graph.data, "gbp", max_iters=rounds, start=start, **options)
    at = {n: run.steps[n - 1] for n in SHOWN if n <= len(run.steps)} | {
        len(run.steps): run.steps[-1]
    }
    return show(
        "energy against rounds of messages",
        graph=each.name,
        schedule=schedule,
        setup_s=run.setup_s,
        rounds=list(at),
        seconds=[seconds for seconds, _ in at.values()],
        energy=[metrics["energy"] for _, metrics in at.values()],
        converged=run.is_done,
        known_minimum=each.known_minimum,
    )


def growing(graph: PoseGraph, first: int, steps: int) -> Iterator[dict[str, np.ndarray]]:
    """The first poses with all edges between them, then one pose at a time with the edges that it closes."""
    newest = np.maximum(graph.data["i"], graph.data["j"])
    yield {n: a[newest < first] if n in EDGE_COLUMNS else a for n, a in graph.data.items()}
    for pose in range(first, first + steps):
        yield {name: graph.data[name][newest == pose] for name in EDGE_COLUMNS}


def one_by_one(each: Task, method: str, first: int, steps: int) -> dict[str, Any]:
    """Seconds of ``posterior.extend`` a pose; messages get so many rounds a pose, laplace what it asks for."""
    grown = growing(each.graph, first, steps)
    before, rounds = (200, 10) if method == "gbp" else (None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # messages rarely converge on these graphs, and say so
        start = {"x": each.graph.start[:first]}
        posterior = infer(each.program, next(grown), method=method, start=start, max_iters=before)
        times = []
        for data in grown:
            begun = time.perf_counter()
            posterior = posterior.extend(data, max_iters=rounds)
            times.append(time.perf_counter() - begun)
    return show(
        "one pose at a time",
        graph=each.name,
        method=method if rounds is None else f"{method}, {rounds} rounds a pose",
        first=first,
        steps=steps,
        step_ms=1e3 * float(np.mean(times)),
        step_ms_median=1e3 * median(times),
    )


def isam2(each: Task, folder: Path) -> dict[str, Any]:
    """Mean milliseconds of a step of iSAM2 over the whole graph."""
    (figures,) = ask_peer("gtsam_peer.py", str(folder / f"{each.name}.npz"), "--incremental")
    return show(
        "one pose at a time, iSAM2",
        graph=each.name,
        steps=figures["steps"],
        step_ms=1e3 * figures["step_s"],
        energy=figures["energy"],
    )


def fastest_at_minimum(row: dict[str, Any]) -> str | None:
    """The faster of GTSAM's two ways among those that end within a thousandth of the lowest energy seen."""
    ways = [w for w in ("gauss-newton", "levenberg-marquardt") if f"gtsam_{w}_ms" in row]
    energies = {way: row[f"gtsam_{way}_energy"] for way in ways}
    lowest = min([row["energy"], *energies.values()])
    there = [way for way in ways if energies[way] <= 1.001 * lowest]
    return min(there or ways, key=lambda way: row[f"gtsam_{way}_ms"], default=None)


def batch_table(rows: list[dict[str, Any]], customs: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown of :func:`batch`."""
    lines = [
        "## From odometry to the optimum",
        "",
        "| graph | energy (minimum known) | laplace, ms (range) | set-up from arrays, ms | GTSAM: energy | GTSAM, ms (range) "
        "| graph built from Python, ms | times GTSAM | GTSAM, factor in Python, ms | that / ours |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        best = fastest_at_minimum(r)
        theirs = ["-"] * 4
        if best:
            ms, low, high = (r[f"gtsam_{best}_ms{end}"] for end in ("", "_min", "_max"))
            theirs = [
                f"{r[f'gtsam_{best}_energy']:.3f}",
                f"{ms:.0f} ({low:.0f} - {high:.0f}) {best}",
                f"{r['gtsam_build_ms']:.0f}",
                f"{r['fit_ms'] / ms:.2f}",
            ]
        slow = customs.get(r["graph"], {}).get("gtsam_custom_ms")
        known = f" ({r['known_minimum']:.3f})" if r["known_minimum"] else ""
        cells = [
            f"{r['graph']}, {r['poses']} poses, {r['edges']} edges",
            f"{r['energy']:.3f}{known}",
            f"{r['fit_ms']:.0f} ({r['fit_ms_min']:.0f} - {r['fit_ms_max']:.0f})",
            f"{r['setup_ms']:.0f}",
            *theirs,
            f"{slow:.0f}" if slow else "-",
            f"{slow / r['fit_ms']:.0f}" if slow else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "GTSAM is the faster of its Gauss-Newton and Levenberg-Marquardt among those that end at the minimum (Gauss-Newton",
        "stops elsewhere on sphere2500); its energies are those it reports. The factor in Python is a `CustomFactor` with",
        "exact Jacobians in NumPy. Ours is written in Python in every row.",
    ]
    return lines


def message_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown of :func:`messages`."""
    lines = [
        "",
        "## Messages from odometry: energy after some rounds (seconds)",
        "",
        "| graph | schedule | " + " | ".join(map(str, SHOWN)) + " | minimum | converged |",
        "|---|---|" + "--:|" * (len(SHOWN) + 2),
    ]
    for r in rows:
        at = dict(zip(r["rounds"], zip(r["energy"], r["seconds"], strict=True), strict=True))
        last = max(at)
        cells = [
            f"{at[n][0]:.5g} ({at[n][1]:.1f})" if n in at else f"[{last}: {at[last][0]:.5g}]"
            for n in SHOWN
        ]
        known = f"{r['known_minimum']:.1f}" if r["known_minimum"] else "-"
        row = [r["graph"], r["schedule"], *cells, known, "yes" if r["converged"] else "no"]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def step_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown of :func:`one_by_one` and :func:`isam2`."""
    lines = ["", "## One pose at a time", "", "| graph | method | steps | mean ms a step |"]
    lines += ["|---|---|--:|--:|"]
    for r in rows:
        steps = (
            f"{r['first']} to {r['first'] + r['steps']}" if "first" in r else f"0 to {r['steps']}"
        )
        lines.append(
            f"| {r['graph']} | {r.get('method', 'iSAM2')} | {steps} | {r['step_ms']:.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--graphs", nargs="+", default=list(NAMES), help="names, or g2o files")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", choices=["batch", "messages", "steps"], help="printed, not kept")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tasks = [t for t in map(task, arguments.graphs) if t is not None]
    if not peers():
        print("skipped: the peers. Set PPL_PEERS to a Python that has gtsam; see gtsam_peer.py.")
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.only in (None, "batch"):
            rows = [batch(t, arguments.repeats, arguments.turns, folder) for t in tasks]
            flat = [t for t in tasks if peers() and t.program is pose_graph_2d]
            lines += batch_table(rows, {t.name: custom(t, folder) for t in flat})
        if arguments.only in (None, "messages"):
            runs = [messages(t, s, arguments.rounds) for t in tasks for s in SCHEDULES]
            lines += message_table(runs)
        if arguments.only in (None, "steps") and tasks:
            first = len(tasks[0].graph.start) - arguments.steps - 1
            steps = [one_by_one(tasks[0], m, first, arguments.steps) for m in ("laplace", "gbp")]
            if peers():
                rival(tasks[0], 1, folder)
                steps.append(isam2(tasks[0], folder))
            lines += step_table(steps)
    write_table("gbp_pose_graphs", "\n".join(lines), keep=not arguments.only)


if __name__ == "__main__":
    main()
