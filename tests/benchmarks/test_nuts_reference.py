"""The table against NUTS, on a tiny reference: scores, rows, kept peers, what is skipped, the figure."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import types

import numpy as np
import pytest
import torch

from benchmarks import driving, nuts_reference, nuts_table, scoring
from benchmarks.qem_paper import runs
from ppl import infer, models
from ppl.marginals import Gaussian
from ppl.models import files
from ppl.models.datasets import Split
from ppl.models.simulation import simulated
from ppl.posterior import Posterior

RNG = np.random.default_rng(0)
KNOWN = {"basement": RNG.integers(0, 2, (2, 20)), "log_uranium": RNG.normal(size=(2, 20))}
DATA, TRUTH = simulated(models.radon_states, KNOWN, seed=0)
RUN = {"model": "radon", "seed": 0, "mean_err": 0.05, "max_err": 0.2, "mean_lsr": 0.04}
RUN |= {
    "max_lsr": 0.3,
    "worst_mean": "a",
    "worst_sd": "b",
    "cpu_s": 2.0,
    "seconds": 2.0,
    "steps": 50,
}
OURS = {**RUN, "method": "qem", "verdict": "good: nothing."}
PEER = {
    **RUN,
    "method": "numpyro mean-field",
    "mean_lsr": 0.6,
    "cpu_s": 8.0,
    "converged": True,
    "numpyro": "0.22.0",
    "jax": "0.10.2",
}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Radon of two states, with its own posterior in another seed as the reference; no peers."""
    experiment = dataclasses.replace(nuts_reference.MODELS["radon"], load=lambda: Split(DATA, DATA))
    folder = tmp_path / "nuts_reference"
    folder.mkdir()
    found = infer(models.radon_states, DATA, method="qem", seed=1)
    arrays = {}
    for variable in found.graph.latents:
        arrays[f"{variable.name}__mean"] = found.mean(variable.name).numpy()
        arrays[f"{variable.name}__sd"] = found.sd(variable.name).numpy()
    np.savez(folder / "radon.npz", **arrays)
    monkeypatch.setitem(nuts_reference.MODELS, "radon", experiment)
    monkeypatch.setattr(files, "_CHECKOUT", tmp_path / "none")
    monkeypatch.setenv("PPL_DATA", str(tmp_path))
    monkeypatch.delenv("PPL_PEERS", raising=False)
    return tmp_path


def test_a_run_is_scored_against_the_reference(tiny):
    record = nuts_reference.our_run("radon", "qem", 0)
    assert record["parameters"] == 10 and record["method"] == "qem"
    assert record["mean_err"] < 0.1 and record["mean_lsr"] < 0.1
    assert record["cpu_s"] > 0 and json.dumps(record)


def test_a_run_that_fails_is_a_row_in_words(tiny, monkeypatch):
    def fails(*_, **__):
        raise nuts_reference.PPLError("too large")

    monkeypatch.setattr(nuts_reference, "infer", fails)
    record = nuts_reference.our_run("radon", "qem", 0)
    assert "| radon | qem | PPLError: too large |" in nuts_table.table([record])
    assert "1 failed" in nuts_table.table([record, OURS])
    killed = subprocess.CompletedProcess([], -9, "", "out of memory")
    monkeypatch.setattr(nuts_reference.subprocess, "run", lambda *_, **__: killed)
    record = nuts_reference._apart("radon", "qem", 0)
    assert record["error"] == "process ended with -9: out of memory"


def test_rows_are_medians_with_the_name_of_the_worst():
    others = [{**OURS, "seed": 1, "mean_err": 0.03, "max_err": 0.9, "worst_mean": "c"}]
    others += [{**OURS, "seed": 2, "mean_err": 0.15, "verdict": "check: ess."}]
    row = nuts_table.table([OURS, *others]).splitlines()[-1]
    assert (
        "| radon | qem | 0.05 (0.03 to 0.15) | 0.2 (0.2 to 0.9) c |" in row and "| check |" in row
    )
    row = nuts_table.table([PEER, {**PEER, "converged": False}]).splitlines()[-1]
    assert "| not converged |" in row


def test_what_was_to_be_reached_is_judged_against_the_best_form_of_the_peer():
    standardised = {**PEER, "method": "numpyro mean-field, standardised", "cpu_s": 1.0}
    for peers, sooner in (([], ""), ([PEER], "yes"), ([PEER, standardised], "no")):
        row = nuts_table.reached([OURS, *peers]).splitlines()[-1]
        assert row == f"| radon | yes | yes | {sooner} | {'yes' if peers else ''} |"
    wide = nuts_table.reached([{**OURS, "mean_lsr": 0.7}, PEER]).splitlines()[-1]
    assert wide == "| radon | yes | no | yes | no |"


def test_without_peers_the_table_has_kept_ones_and_says_so(tiny, monkeypatch, capsys):
    clocks = {"clocks": [[9.0, 7.0, -9.0], [9.5, 8.0, -8.0]], "errors": [[0.4, 0.7], [0.05, 0.6]]}
    monkeypatch.setattr(nuts_reference, "_apart", lambda *_: OURS)
    arguments = ["--only", "radon", "chimpanzees", "--seeds", "0", "--output", str(tiny)]
    nuts_reference.main(arguments)
    said = capsys.readouterr().out
    assert "skipped: numpyro, because $PPL_PEERS" in said
    assert "skipped: chimpanzees: no reference in" in said
    (tiny / nuts_reference.KEPT).write_text(json.dumps({**PEER, **clocks}) + "\n")
    nuts_reference.main(arguments)
    text = (tiny / "nuts_reference.md").read_text()
    assert "| radon | numpyro mean-field | 0.05 |" in text and "of an earlier run" in text
    assert "| radon | yes | yes | yes | yes |" in text
    (trace,) = nuts_reference.peer_traces("radon", tiny)["numpyro mean-field"]
    assert trace.seconds == [7.0, 8.0] and trace.errors == {1: (0.4, 0.7), 2: (0.05, 0.6)}


def test_peers_are_run_where_they_are_and_kept_by_run(tiny, monkeypatch):
    reference = nuts_reference.reference_of("radon")

    def ask(script, case, name, peer, seed, output):
        """Moments after two windows: one standard deviation off, then right."""
        with np.load(tiny / "nuts_reference" / "radon.npz") as right:
            arrays = dict(right)
        off = {
            n: x + arrays[n.replace("__mean", "__sd")] * n.endswith("__mean")
            for n, x in arrays.items()
        }
        np.savez(output, **{n: np.stack([off[n], arrays[n]]) for n in arrays})
        assert (script, name, np.load(case)["obs"].shape) == ("nuts_peer.py", "radon", (2, 20))
        return [{"cpu_s": 8.0, "seconds": 8.0, "steps": 2000, "converged": True, "clocks": []}]

    monkeypatch.setattr(driving, "ask_peer", ask)
    monkeypatch.setattr(nuts_reference, "has_numpyro", lambda: True)
    arguments = ["--only", "radon", "--methods", "mean-field", "full rank", "--output", str(tiny)]
    for _ in range(2):  # the second time in the place of the first
        nuts_reference.main([*arguments, "--seeds", "0"])
    kept = nuts_reference.peer_records(tiny)
    assert [r["method"] for r in kept] == ["numpyro full rank", "numpyro mean-field"]
    assert kept[0]["errors"] == [[1.0, 0.0], [0.0, 0.0]] and kept[0]["mean_err"] == 0
    assert kept[0]["parameters"] == len(reference)


def test_full_rank_is_asked_of_small_models(tiny, monkeypatch):
    assert nuts_reference._is_small("radon")
    monkeypatch.setattr(nuts_reference, "FULL_RANK_UP_TO", 10)
    assert not nuts_reference._is_small("radon")


def test_the_figure_has_ours_and_the_kept_peers(tiny, monkeypatch):
    clocks = {"clocks": [[9.0, 7.0, -9.0], [9.5, 8.0, -8.0]], "errors": [[0.4, 0.7], [0.05, 0.6]]}
    (tiny / nuts_reference.KEPT).write_text(json.dumps({**PEER, **clocks}) + "\n")
    ours = runs.Trace([-9.0, -8.0], [0.1, 0.2], {}, {1: (0.9, 0.9), 2: (0.1, 0.1)})
    monkeypatch.setattr(nuts_reference, "our_path", lambda *_: ours)
    drawn = {}
    monkeypatch.setattr(
        nuts_reference.figures, "_save", lambda figure, path: drawn.update({path.name: figure})
    )
    nuts_reference.main(["--only", "radon", "--seeds", "0", "--figure", "--output", str(tiny)])
    labels = {line.get_label() for line in drawn["nuts_reference.png"].axes[0].get_lines()}
    assert {"QEM, our defaults", "NumPyro, mean-field"} <= labels


def test_a_path_counts_the_start_and_the_last_weighting(tiny, monkeypatch):
    monkeypatch.setattr(nuts_reference, "_LOOKS", (1, 60))
    ticks = itertools.count()
    monkeypatch.setattr(nuts_reference.time, "process_time", lambda: next(ticks))
    path = nuts_reference.our_path("radon", "qem default", 0)
    assert path.seconds == [4, 63]  # prepared, started, 1 or 60 steps, weighed
    assert path.errors[2][0] < min(0.1, path.errors[1][0])


def test_magnitudes_come_from_quantiles():
    marginals = {
        "x": Gaussian(
            torch.zeros(3, dtype=torch.float64), torch.full((3,), 2.0, dtype=torch.float64)
        )
    }
    graph = types.SimpleNamespace(latents=[types.SimpleNamespace(name="x")], deterministics=())
    posterior = types.SimpleNamespace(
        bound=types.SimpleNamespace(graph=graph),
        quantile=lambda name, q: Posterior.quantile(posterior, name, q),
        mean=lambda name: marginals[name].loc,
        marginal=lambda name: marginals[name],
    )
    found = scoring.posterior_moments(posterior, {"abs_x[1]": scoring.Moments(0.0, 1.0)})
    mean, sd = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(1 - 2 / math.pi)  # a folded Normal
    assert found["abs_x[3]"] == pytest.approx((mean, sd), rel=2e-3)


def test_only_what_the_data_identify_is_asked_of_occupancy(tmp_path, monkeypatch):
    sites = ("alpha", "abs_beta", "beta", "bird_mean_mean")
    arrays = {f"{s}__{part}": np.ones(2) for s in sites for part in ("mean", "sd")}
    (tmp_path / "nuts_reference").mkdir()
    np.savez(tmp_path / "nuts_reference" / "occupancy.npz", **arrays)
    monkeypatch.setenv("PPL_DATA", str(tmp_path))
    asked = nuts_reference.reference_of("occupancy")
    assert set(asked) == {"alpha[1]", "alpha[2]", "abs_beta[1]", "abs_beta[2]"}


def test_every_model_has_a_law_at_the_peer():
    text = (nuts_reference.ROOT / "benchmarks" / "nuts_peer.py").read_text()
    for name in nuts_reference.MODELS:
        assert f'"{name}": ' in text
    for peer in nuts_reference.PEERS:
        assert f'"{peer}": (' in text
    assert runs.METHODS[1] == "qem default"
