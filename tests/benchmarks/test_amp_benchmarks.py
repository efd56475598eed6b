"""The benchmarks of AMP, tiny: every method runs, and the scores are those of their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.amp_glm import SETTINGS as CHANNELS
from benchmarks.amp_glm import measure as measure_channel
from benchmarks.amp_glm import table as channel_table
from benchmarks.amp_phase import cell, half_way, l1_curve
from benchmarks.amp_scale import sides, spectrum
from benchmarks.amp_scale import table as scale_table
from benchmarks.amp_sparse import SETTINGS, case_of, measure, methods, table
from benchmarks.sensing import nmse_db, oracle, sparse_vector
from ppl import infer
from ppl.models import sparse_linear

pytestmark = pytest.mark.filterwarnings("ignore:amp")  # small problems need not settle


def test_the_oracle_is_better_than_those_who_do_not_know_the_support():
    case = case_of(SETTINGS["iid1000"], 200, 0)
    best = nmse_db(oracle(case), case.x)
    found = {
        name: nmse_db(work(case), case.x) for name, work in methods(SETTINGS["iid1000"]).items()
    }
    assert all(best - 1 < score < 0 for score in found.values())
    assert found["amp"] < found["Lasso path, best by truth"]


def test_the_vectors_have_the_sparsity_they_say():
    assert np.count_nonzero(sparse_vector(500, 0.1, np.random.default_rng(0))) == 50
    case = case_of(SETTINGS["group10"], 400, 0)
    assert (np.count_nonzero(case.x.reshape(-1, 10), axis=1) > 0).sum() == 4


def test_groups_and_their_table(capsys):
    rows = measure("group10", 400, 1)
    assert [r["method"] for r in rows] == list(methods(SETTINGS["group10"]))
    assert "groups of 10" in table(rows, 400)


@pytest.mark.parametrize("name", CHANNELS)
def test_channels_and_their_table(name, capsys):
    rows = measure_channel(name, 30, 1, with_rivals=True)
    assert len(rows) == 3 and all(np.isfinite(r["db"]) for r in rows)
    assert name in channel_table(rows, 30)


def test_large_problems_and_their_table(capsys):
    rows = [spectrum(1 << 10, "float64"), sides(3, sweeps=5)]
    assert rows[0]["nmse_db"] < -20
    assert "1024" in scale_table(rows)


def test_right_hand_sides_together_are_those_apart():
    from benchmarks.amp_scale import many_sides

    case = case_of(SETTINGS["iid1000"], 200, 0)
    options = {"method": "amp", "seed": 0, "tol": 0.0, "max_iters": 8, "learn": False}
    alone = infer(sparse_linear, case.data, **options).mean("x")
    data = {"A": case.matrix, "y": np.stack([case.y, case.y], 1)}
    both = infer(many_sides, data, **options).mean("x")
    assert both.numpy() == pytest.approx(np.stack([alone, alone]), abs=1e-10)


def test_the_phase_transition_lies_above_the_l1_curve(capsys):
    delta = 0.5
    curve = l1_curve(np.array([delta]))[0]
    assert curve == pytest.approx(0.386, abs=2e-3)  # Donoho and Tanner's table
    assert cell(200, delta, 0.8 * curve, 2, 0)["success"] == 1
    assert cell(200, delta, 0.95, 2, 0)["success"] == 0
    assert half_way(np.array([0.2, 0.4, 0.6]), np.array([1.0, 0.75, 0.25])) == pytest.approx(0.5)
