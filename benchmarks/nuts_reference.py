"""How near does QEM come to NUTS on hierarchical models by default settings, beside NumPyro's variational inference?

    python benchmarks/nuts_reference.py [--only radon ...] [--methods qem ...] [--seeds 0 1 2] [--figure]

Prints a JSON line a run, then a table; that of all models and methods is also left in ``--output``, by default
``benchmarks/results/``. No option is given to ``qem`` and ``vi``. Each run has a process of its own, on one thread: seconds are
those from arrays to the posterior, the first use of everything included, imports not. References are
``nuts_reference/*.npz`` in ``$PPL_DATA`` or ``../shared/data``; of occupancy only what the data identify is scored.

The peers are described in ``nuts_peer.py`` and run where ``$PPL_PEERS`` names an interpreter that has numpyro. Their results
are kept in ``results/nuts_reference_peers.jsonl``, so that without it the table has those of an earlier run, and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import driving, nuts_table, scoring  # noqa: E402
from benchmarks.qem_paper import figures, runs  # noqa: E402
from benchmarks.qem_paper.experiments import EXPERIMENTS  # noqa: E402
from ppl import Posterior, PPLError, backend, infer  # noqa: E402
from ppl.backend import Settings  # noqa: E402
from ppl.models.files import find  # noqa: E402
from ppl.streams import Streams  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
KEPT = "nuts_reference_peers.jsonl"
MODELS = {e.nuts: e for e in EXPERIMENTS.values() if e.nuts}
OURS = ("qem", "vi")
PEERS = ("mean-field", "mean-field, standardised", "full rank")
FULL_RANK_UP_TO = 200  # scalars
OTHERWISE_IDENTIFIED = {"occupancy": ("abs_beta",)}  # latents are named by the experiment


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, score, report."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    if options.one:
        name, method, seed = options.one
        print(json.dumps(our_run(name, method, int(seed))))
        return
    missing = {name: _missing(name) for name in options.only or MODELS}
    skipped = [f"skipped: {name}: {why}" for name, why in missing.items() if why]
    print("".join(f"{line}\n" for line in skipped), end="")
    names = [name for name, why in missing.items() if not why]
    options.output.mkdir(parents=True, exist_ok=True)
    if options.figure:
        draw_figure(names, options)
        return
    records: list[dict[str, Any]] = []
    for name in names:
        for method in (m for m in options.methods if m in OURS):
            records += [_apart(name, method, seed) for seed in options.seeds]
        records += _peers(name, options)
    if records:
        _report(records, skipped, options)


# ---- runs ---------------------------------------------------------------------------------------


def our_run(name: str, method: str, seed: int) -> dict[str, Any]:
    """One fit in this process, as a record of plain numbers; where it fails, the text of the error."""
    experiment = MODELS[name]
    data = experiment.load().train
    record: dict[str, Any] = {"model": name, "method": method, "seed": seed}
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is in the diagnostics
            posterior = infer(experiment.program, data, method=method, seed=seed)
    except PPLError as error:
        return {**record, "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    record |= {"seconds": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    reference = reference_of(name)
    result = scoring.score(scoring.posterior_moments(posterior, reference), reference)
    found = posterior.diagnostics
    record |= {"verdict": found.verdict, "converged": found.converged, "steps": found.iterations}
    record |= {"ess": scoring.smallest(found.ess), "pareto_k": scoring.largest(found.pareto_k)}
    return {**record, **result._asdict()}


def peer_run(name: str, peer: str, seed: int) -> dict[str, Any]:
    """One fit of the peer, scored after every window of its steps."""
    with tempfile.TemporaryDirectory() as folder:
        case, output = Path(folder) / "case.npz", Path(folder) / "moments.npz"
        np.savez(case, **MODELS[name].load().train)
        asked = driving.ask_peer("nuts_peer.py", str(case), name, peer, str(seed), str(output))[-1]
        with np.load(output) as archive:
            arrays = {key: archive[key] for key in archive.files}
    reference = reference_of(name)
    looks = range(len(next(iter(arrays.values()))))
    scores = [
        scoring.score(scoring.named({n: a[i] for n, a in arrays.items()}), reference) for i in looks
    ]
    record = {"model": name, "method": f"numpyro {peer}", "seed": seed, **asked}
    return {
        **record,
        **scores[-1]._asdict(),
        "errors": [[round(s.mean_err, 4), round(s.mean_lsr, 4)] for s in scores],
    }


def reference_of(name: str) -> dict[str, scoring.Moments]:
    """Moments by NUTS of what the data identify."""
    path = find(f"nuts_reference/{name}.npz")
    assert path is not None
    judged = MODELS[name].judged
    return scoring.load_arrays(path, (*judged, *OTHERWISE_IDENTIFIED[name]) if judged else ())


def peer_records(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """What peers found when they were last run."""
    path = folder / KEPT
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _missing(name: str) -> str:
    """Why a model cannot be judged here, in words; empty if it can."""
    if find(f"nuts_reference/{name}.npz") is None:
        return "no reference in $PPL_DATA or ../shared/data"
    try:
        MODELS[name].load()
    except PPLError as error:
        return str(error)
    return ""


def _apart(name: str, method: str, seed: int) -> dict[str, Any]:
    """One fit of ours in a process of its own, so that nothing is warm or cached."""
    command = [sys.executable, __file__, "--one", name, method, str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:  # the other runs are not lost for this one
        why = f"process ended with {run.returncode}: {' '.join(run.stderr.split())[-300:]}"
        failed = {"model": name, "method": method, "seed": seed, "error": why}
        return driving.show("NUTS references", **failed)
    return driving.show("NUTS references", **json.loads(run.stdout.strip().splitlines()[-1]))


def _peers(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Records of the peers: of this run where there is an environment for them, else the kept ones."""
    wanted = [p for p in PEERS if p in options.methods and (p != "full rank" or _is_small(name))]
    methods = [f"numpyro {peer}" for peer in wanted]
    kept = peer_records(options.output)
    if not has_numpyro():
        mine = [r for r in kept if r["model"] == name and r["seed"] in options.seeds]
        return [r for m in methods for r in mine if r["method"] == m]
    found = []
    for peer in wanted:
        for seed in options.seeds:
            found.append(driving.show("NUTS references", **peer_run(name, peer, seed)))
            kept = [r for r in kept if _key(r) != _key(found[-1])] + [found[-1]]
            lines = [json.dumps(r) + "\n" for r in sorted(kept, key=_key)]
            (options.output / KEPT).write_text("".join(lines))
    return found


def _key(record: dict[str, Any]) -> tuple[int, str, int]:
    return list(MODELS).index(record["model"]), record["method"], record["seed"]


def _is_small(name: str) -> bool:
    """Counted without what is summed out, and without what references have besides latents."""
    experiment = MODELS[name]
    latents = [v.name for v in experiment.program.graph(experiment.load().train).latents]
    path = find(f"nuts_reference/{name}.npz")
    return path is not None and len(scoring.load_arrays(path, latents)) < FULL_RANK_UP_TO


def has_numpyro() -> bool:
    """Whether the interpreter of the peers has it."""
    interpreter = driving.peers()
    command = [interpreter, "-c", "import numpyro"]
    return bool(interpreter) and not subprocess.run(command, capture_output=True).returncode


def _report(records: list[dict[str, Any]], skipped: list[str], options: argparse.Namespace) -> None:
    peers = [r for r in records if "numpyro" in r]
    notes = [f"One thread, torch {torch.__version__}, seeds {', '.join(map(str, options.seeds))}."]
    if not peers:
        notes.append("skipped: numpyro, because $PPL_PEERS names no interpreter that has it.")
    else:
        notes.append("numpyro {numpyro}, jax {jax}.".format(**peers[0]))
    if peers and not has_numpyro():
        notes.append("Their rows are of an earlier run, kept in nuts_reference_peers.jsonl.")
    parts = [nuts_table.table(records), nuts_table.reached(records), " ".join(notes), *skipped]
    text = "\n\n".join(parts)
    is_whole = not options.only and set(options.methods) == {*OURS, *PEERS}
    if is_whole or options.output != RESULTS:
        content = f"{nuts_table.HEAD}\n\n{text}\n"
        (options.output / "nuts_reference.md").write_text(content, encoding="utf-8")
    print("\n" + text)


# ---- figure -------------------------------------------------------------------------------------


def peer_traces(name: str, folder: Path = RESULTS) -> dict[str, list[runs.Trace]]:
    """Errors against time of the peers that were kept, as traces for :func:`figures.errors`."""
    found: dict[str, list[runs.Trace]] = {}
    for r in peer_records(folder):
        if r["model"] == name:
            seconds = [cpu for _, cpu, _ in r["clocks"]]
            errors = {i: tuple(e) for i, e in enumerate(r["errors"], 1)}
            found.setdefault(r["method"], []).append(runs.Trace([], seconds, {}, errors))
    return found


def draw_figure(names: Sequence[str], options: argparse.Namespace) -> None:
    """Mean errors against time: our defaults, the paper's gradient methods, and the kept peers."""
    lines: dict[str, dict[str, list[runs.Trace]]] = {}
    for name in names:
        methods = [m for m in ("qem default", "vi", "rws") if runs.is_there(m)]
        ours = {m: _paths(name, m, options.seeds) for m in methods}
        lines[name] = {m: t for m, t in ours.items() if t} | peer_traces(name, options.output)
    clock = "CPU seconds from arrays to posterior"
    figures.errors(lines, options.output / "nuts_reference.png", clock)


def our_path(name: str, method: str, seed: int) -> runs.Trace:
    """Errors, and CPU seconds from arrays to the posterior, of a run if it ended at each look."""
    experiment, (backend_name, *_) = MODELS[name], method.split()
    options = runs.options_of(method, experiment, _PARTICLES)
    data, reference = experiment.load().train, reference_of(name)
    _, module, record = backend.resolve(backend_name, options)
    program, path = experiment.program, runs.Trace([], [], {}, {})

    def prepared(stream: int) -> Any:
        bound = program.bind(data, dtype=torch.float64)
        return module.prepare(bound, record, Settings(Streams(stream), max_iters=max(_LOOKS)))

    def weighed(state: Any) -> tuple[Posterior, float]:
        """By a problem with streams of its own, so that the run goes on as if nobody had looked."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a run that is not over has not converged
            return _timed(lambda: module.posterior(judged, state))

    problem, spent = _timed(lambda: prepared(seed))
    judged = prepared(seed + 1000)
    state, taken = _timed(lambda: module.init(problem))
    # Each look is to pay for the first use of the weighting, which happens once.
    spent += taken + weighed(state)[1] - weighed(state)[1]
    for i in range(1, max(_LOOKS) + 1):
        (state, _), taken = _timed(lambda: module.step(problem, state, None))  # noqa: B023
        spent += taken
        if i in _LOOKS:
            posterior, taken = weighed(state)
            found = scoring.score(scoring.posterior_moments(posterior, reference), reference)
            path.seconds.append(spent + taken)
            path.errors[len(path.seconds)] = (found.mean_err, found.mean_lsr)
    return path


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its CPU seconds."""
    begun = time.process_time()
    return call(), time.process_time() - begun


def _paths(name: str, method: str, seeds: Sequence[int]) -> list[runs.Trace]:
    try:
        return [our_path(name, method, seed) for seed in seeds]
    except PPLError as error:
        print(f"skipped: {name} by {method}: {error}")
        return []


_PARTICLES = 10  # of the gradient methods
_LOOKS = (1, 5, 15, 40, 100, 250)  # iterations


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=MODELS, help="models")
    parser.add_argument("--methods", nargs="+", choices=OURS + PEERS, default=OURS + PEERS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run for each")
    parser.add_argument("--figure", action="store_true", help="errors against time, nothing else")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument(
        "--one", nargs=3, metavar=("MODEL", "METHOD", "SEED"), help="in this process"
    )
    return parser


if __name__ == "__main__":
    main()
