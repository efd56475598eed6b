"""The benchmarks of message passing, tiny: they run, and their figures are what they are called."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from benchmarks import gbp_bundle, gbp_grids, gbp_pose_graphs
from benchmarks.driving import ask_peer, fit
from ppl import infer
from ppl.models import pose_graph_2d, worlds
from ppl.models.grids import peak_signal_to_noise

WORLD = worlds.manhattan_world(60, closures=20, seed=0)
TASK = gbp_pose_graphs.Task("small", pose_graph_2d, WORLD, None)


def test_a_timed_fit_is_that_of_infer():
    timed = fit(pose_graph_2d, WORLD.data, "laplace", with_posterior=True, start={"x": WORLD.start})
    posterior = infer(pose_graph_2d, WORLD.data, method="laplace", start={"x": WORLD.start})
    assert timed.is_done and timed.steps[-1][0] <= timed.fit_s
    assert np.allclose(timed.posterior.mean("x"), posterior.mean("x"), atol=1e-8)


def test_a_growing_graph_ends_as_the_whole():
    parts = list(gbp_pose_graphs.growing(WORLD, 50, 10))
    assert len(parts) == 11 and sum(len(part["i"]) for part in parts) == len(WORLD.data["i"])
    assert all(
        (np.maximum(part["i"], part["j"]) == 49 + k).all() for k, part in enumerate(parts) if k
    )


def test_the_tables_of_pose_graphs_have_every_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("PPL_PEERS", raising=False)
    row = gbp_pose_graphs.batch(TASK, 1, 1, tmp_path)
    rival = {f"gtsam_gauss-newton_ms{end}": 2 * row["fit_ms"] for end in ("", "_min", "_max")}
    rival |= {"gtsam_gauss-newton_energy": 7.0, "gtsam_build_ms": 1.0}
    custom = {"small": {"gtsam_custom_ms": 100 * row["fit_ms"]}}
    lines = gbp_pose_graphs.batch_table([row, {**row, **rival}], custom)
    without, beside = lines[4], lines[5]
    assert "| - | - | - | - |" in without and without.endswith("| 100 |")
    assert "| 0.50 |" in beside and "gauss-newton" in beside
    step = gbp_pose_graphs.one_by_one(TASK, "laplace", 55, 3)
    assert step["steps"] == 3 and step["step_ms"] > 0
    assert "| small | laplace | 55 to 58 |" in gbp_pose_graphs.step_table([step])[-1]
    assert '"question": "one pose at a time"' in capsys.readouterr().out


def test_messages_are_measured_at_the_rounds_shown():
    row = gbp_pose_graphs.messages(TASK, "tree", 12)
    assert row["rounds"] == [1, 10, 12] and row["energy"][-1] < row["energy"][0]
    assert "| small | tree |" in gbp_pose_graphs.message_table([row])[-1]


def test_a_megapixel_grid_made_small():
    row = gbp_grids.huge(24, 3)
    assert row["edges"] == 2 * 2 * 24 * 23 and row["messages_per_second"] > 0
    assert "| 24 x 24 |" in gbp_grids.table([row])


def test_the_bear_is_given_to_three_models(monkeypatch):
    rng = np.random.default_rng(0)
    clean = np.linspace(0, 1, 12 * 14 * 3).reshape(12, 14, 3)
    noisy = np.where(rng.random((12, 14, 1)) < 0.1, rng.random(clean.shape), clean)
    monkeypatch.setattr(gbp_grids.datasets, "bear", lambda: (clean, noisy))
    rows = [gbp_grids.bear(case, 30) for case in gbp_grids.bear_cases(noisy)]
    assert len(rows) == 3 and "| doubled pairs | 30 |" in gbp_grids.table(rows)
    assert all(row["psnr_noisy"] == peak_signal_to_noise(noisy, clean) for row in rows)


def test_bundle_adjustment_reports_pixels():
    data, truth = worlds.camera_room(4, 20, seed=0)
    row = gbp_bundle.run("laplace", 0, "room", data)
    assert 0.5 < row["error_px"] < 2 and row["converged"]
    assert "| room | laplace |" in gbp_bundle.table([row])


def test_a_peer_that_fails_says_why(monkeypatch):
    monkeypatch.setenv("PPL_PEERS", sys.executable)
    with pytest.raises(RuntimeError, match="nothing_here.py failed"):
        ask_peer("nothing_here.py")
