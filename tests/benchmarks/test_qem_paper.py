"""The experiments of the paper, tiny: they run, their figures are what they are called, and where ours differ, why."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import types

import numpy as np
import pytest
import torch
from scipy.special import expit, logsumexp
from scipy.stats import bernoulli

from benchmarks.qem_paper import runs, tables
from benchmarks.qem_paper.experiments import EXPERIMENTS
from ppl import infer, models
from ppl.models import files
from ppl.models.datasets import Split
from ppl.models.simulation import simulated

RNG = np.random.default_rng(0)


def small_split() -> Split:
    """Two states of three counties, and other counties to predict."""
    parts = []
    for seed in (0, 1):
        known = {
            "basement": RNG.integers(0, 2, (2, 3, 4)),
            "log_uranium": RNG.normal(size=(2, 3, 4)),
        }
        parts.append(simulated(models.radon_counties, known, seed=seed)[0])
    return Split(*parts)


SPLIT = small_split()
SMALL = dataclasses.replace(EXPERIMENTS["radon_counties"], load=lambda: SPLIT)


def test_a_run_is_the_same_whether_it_is_judged_or_not():
    judged, plain = (runs.run(SMALL, "qem", 4, 6, 0, every=every) for every in (3, 0))
    assert judged.log_evidence == plain.log_evidence
    assert sorted(judged.predicted) == [1, 2, 3, 5, 6] and not plain.predicted
    assert all(math.isfinite(joint) for joint, _ in judged.predicted.values())


def test_the_iterates_of_qem_do_not_depend_on_units():
    pair = [runs.run(SMALL, "qem", 4, 12, 0, units=u, every=0) for u in ("original", "rescaled")]
    assert np.allclose(pair[0].log_evidence, pair[1].log_evidence, rtol=0, atol=1e-9)


def test_scores_are_their_formulas():
    density = torch.as_tensor(RNG.normal(size=(runs.DRAWS, 3, 4)))
    asked = {}

    def log_likelihood(data, **options):
        asked.update(options)
        return {"obs": density}

    posterior = types.SimpleNamespace(log_likelihood=log_likelihood)
    joint, pointwise = runs.predictive(posterior, ({}, {"labels": {"County": ["a"]}}, 1), 7)
    left = density[:, :, 1:].numpy().reshape(runs.DRAWS, -1)
    assert asked == {"n": runs.DRAWS, "seed": 7, "labels": {"County": ["a"]}}
    assert joint == pytest.approx(np.log(np.exp(left.sum(1)).mean()))
    assert pointwise == pytest.approx(np.log(np.exp(left).mean(0)).sum())


def test_counties_to_predict_are_new_ones():
    _, binding, _ = SMALL.held_out()
    assert binding["labels"] == {"County": ["new 0", "new 1", "new 2"]}


def test_levels_and_plateaus_by_hand():
    climbing = tables.Trace([math.nan] * 5 + [-10.0] * 5 + [-2.0] * 40, [], {}, {})
    assert tables.at(climbing, 10) == -10 and tables.at(climbing, "plateau") == -2
    assert tables.reached(climbing, -2.5) == 18  # the mean of 8 has left the last -10 behind
    assert tables.reached(climbing, -1.0) == math.inf
    assert tables.final_level([climbing]) == (-2.0, 0.0)
    assert (
        tables._differences([[1.0, 3.0]] * 5, {1: (0.0, 0.0)})[0] == "+2.0"
    )  # 2 / (sqrt(2) / sqrt(2))


def test_the_command_leaves_tables_and_figures(tmp_path, monkeypatch, capsys):
    main = importlib.import_module("benchmarks.qem_paper.__main__")
    monkeypatch.setitem(EXPERIMENTS, "radon_counties", SMALL)
    main.main(
        ["--only", "radon_counties", "--seeds", "2", "--iterations", "12", "--particles", "3"]
        + [
            "--every",
            "4",
            "--timed",
            "5",
            "--output",
            str(tmp_path),
            "--methods",
            "qem",
            "qem default",
        ]
    )
    text = (tmp_path / "qem_paper.md").read_text()
    for part in (
        "| radon_counties, K=3 | ours |",
        "-371.0 (11.9)",
        "difference / noise",
        "qem default",
    ):
        assert part in text
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {f"qem_paper_{n}.png" for n in ("radon_counties", "times", "rescaled")}
    assert '"question": "qem_paper"' in capsys.readouterr().out


def test_runs_that_are_kept_are_not_made_again(tmp_path, monkeypatch, capsys):
    main = importlib.import_module("benchmarks.qem_paper.__main__")
    monkeypatch.setitem(EXPERIMENTS, "radon_counties", SMALL)
    kept = tmp_path / "runs.jsonl"
    command = ["--only", "radon_counties", "--seeds", "1", "--iterations", "9", "--particles", "3"]
    command += ["--every", "4", "--timed", "5", "--methods", "qem", "--keep", str(kept)]
    main.main([*command, "--output", str(tmp_path / "late"), "--minutes", "1e-9"])
    assert "skipped: radon_counties by qem, seed 0: time is up" in capsys.readouterr().out
    assert not kept.exists() and not list((tmp_path / "late").glob("*.md"))
    main.main([*command, "--output", str(tmp_path / "first")])
    lines = kept.read_text()
    monkeypatch.setattr("benchmarks.qem_paper.store.run", None)
    main.main([*command, "--output", str(tmp_path / "again"), "--minutes", "1e-9"])
    tables = [(tmp_path / place / "qem_paper.md").read_text() for place in ("first", "again")]
    assert tables[0] == tables[1]
    assert kept.read_text() == lines and len(lines.splitlines()) == 4  # run, timing, two versions


def test_a_run_that_was_scored_nowhere_is_drawn(tmp_path):
    figures = importlib.import_module("benchmarks.qem_paper.figures")
    trace = runs.Trace([-9.0, -8.0, -7.5, -7.2], [0.1, 0.2, 0.3, 0.4], {}, {})
    figures.curves("radon_counties", {"qem": [trace]}, 3, tmp_path / "curves.png", None)
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_defaults_are_measured_at_the_particles_of_the_paper():
    """Their own number of particles is another, and their weights are tempered at first."""
    trace = runs.run(SMALL, "qem default", 3, 4, 0, every=0)
    assert np.isfinite(trace.log_evidence).all()
    more = runs.run(SMALL, "qem default", 30, 4, 0, every=0)
    assert np.mean(more.log_evidence) > np.mean(trace.log_evidence)


def test_an_experiment_without_its_data_is_skipped_in_words(tmp_path, monkeypatch, capsys):
    main = importlib.import_module("benchmarks.qem_paper.__main__")
    monkeypatch.setattr(files, "_CHECKOUT", tmp_path / "none")
    monkeypatch.setenv("PPL_DATA", str(tmp_path))
    main.main(["--only", "chimpanzees", "--output", str(tmp_path)])
    assert "skipped: chimpanzees: the data file 'chimpanzees.csv'" in capsys.readouterr().out


# Two birds, a year, three visits of two replicates: presence is known by what else is known.
KNOWN = {"bird_year_mean": [[0.4], [-0.3]], "alpha": [0.2, -0.5], "beta": [1.0, 0.7]}
VISITS = {"weather": RNG.normal(size=(2, 1, 3)), "quality": np.ones((2, 1, 3))}
SEEN = np.array([[[[1, 0], [0, 0], [1, 1]]], [[[0, 0], [0, 1], [0, 0]]]])


def presence_log_joint(z: np.ndarray) -> np.ndarray:
    """Of presences ``[..., bird, year, visit]`` and detections."""
    mean, alpha, beta = (np.array(KNOWN[n]) for n in ("bird_year_mean", "alpha", "beta"))
    there = mean[..., None] * VISITS["weather"] * beta[:, None, None]
    seen = expit(alpha[:, None, None] * VISITS["quality"] * z - 10 * (1 - z))[..., None]
    terms = bernoulli.logpmf(z, expit(there)) + bernoulli.logpmf(SEEN, seen).sum(-1)
    return terms.sum((-1, -2, -3))


def test_presence_is_summed_and_sampling_it_loses():
    """Published occupancy runs draw presences; the enumerated evidence is the sum over all of them."""
    tables_of_z = np.array(list(itertools.product((0, 1), repeat=6))).reshape(-1, 2, 1, 3)
    exact = logsumexp(presence_log_joint(tables_of_z))
    # What is above bird_year_mean, alpha and beta stays unknown, and has nothing to do with presence.
    fixed = models.occupancy.do(**KNOWN)
    posterior = infer(fixed, {**VISITS, "obs": SEEN}, method="qem", particles=3, seed=0)
    assert posterior.log_evidence.value == pytest.approx(exact, abs=0.5)
    # K presences for each visit, drawn from their law, each visit averaged over its own.
    there = expit(np.array(KNOWN["bird_year_mean"])[..., None] * VISITS["weather"])
    there[1] = expit(-0.3 * 0.7 * VISITS["weather"][1])
    drawn = np.random.default_rng(1).random((4000, 3, 2, 1, 3)) < there  # 4000 runs of K = 3
    seen = expit(np.array(KNOWN["alpha"])[:, None, None] * drawn - 10.0 * ~drawn)[..., None]
    density = bernoulli.logpmf(SEEN, seen).sum(-1)
    sampled = (logsumexp(density, axis=1) - math.log(3)).sum((-1, -2, -3))
    assert logsumexp(sampled) - math.log(4000) == pytest.approx(exact, abs=0.1)  # unbiased
    assert sampled.mean() < exact - 1  # its logarithm is not
