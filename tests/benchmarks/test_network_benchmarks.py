"""The benchmarks of networks, tiny: every method runs, scores are those of their definitions, kept runs are not made again."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks.networks import cifar, images, step_time, uci
from benchmarks.networks.records import Records, markdown, mean_se
from ppl.models.files import Split
from ppl.models.learning_sets import diabetes, digits

pytest.importorskip("sklearn")


def test_a_kept_run_is_not_made_again(tmp_path):
    file = tmp_path / "rows.jsonl"
    first = Records(file).row({"seed": 0}, lambda: {"score": 1.5})
    again = Records(file).row({"seed": 0}, lambda: pytest.fail("the run is kept"))
    assert first == again == {"seed": 0, "score": 1.5}
    assert [json.loads(line) for line in file.read_text().splitlines()] == [first]


def test_cells_have_a_mean_and_its_standard_error():
    assert mean_se([1.0, 3.0], 2) == "2.00 ± 1.00"
    assert mean_se([2.0, math.nan], 1) == "2.0" and mean_se([], 1) == "-"
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"


def test_regressions_are_scored_in_the_unit_of_the_target(monkeypatch, tmp_path):
    monkeypatch.setattr(uci, "effort", lambda rows: uci.Effort(50, 15))
    monkeypatch.setattr(uci, "uci", lambda name, split: diabetes())
    chosen = [uci.PLAIN, "vi", "ssvi 0.1"]
    text = uci.run(["boston"], chosen, 1, tmp_path / "rows.jsonl")
    rows = Records(tmp_path / "rows.jsonl").rows
    assert [r["method"] for r in rows] == chosen
    spread = diabetes().scale
    for row in rows:
        assert 0.5 * spread < row["rmse"] < 1.1 * spread  # 77 units; the mean alone has 1.0
        gaussian = -math.log(row["rmse"]) - 0.5 * math.log(2 * math.pi) - 0.5
        assert (
            abs(row["log_likelihood"] - gaussian) < 0.3
        )  # no Gaussian with that error scores better on average
    assert "| boston (1) |" in text and "best mean-field known" in text


@pytest.fixture
def tiny(monkeypatch):
    train, test = digits()
    small = Split({k: v[:600] for k, v in train.items()}, {k: v[:200] for k, v in test.items()})
    strange = Split(small.train, {**small.test, "x": -small.test["x"]})
    sets = {"mnist": lambda: small, "fashion_mnist": lambda: strange}
    monkeypatch.setattr(images, "SETS", sets)
    monkeypatch.setattr(images, "HIDDEN", (32,))
    monkeypatch.setitem(images.SIZES, "ci", images.Size(600, 200, 12, 60, 1))


def test_images_are_classified_by_every_method(tiny, tmp_path):
    file = tmp_path / "rows.jsonl"
    text = images.run(["mnist"], ["mlp"], None, "ci", file)
    rows = {r["method"]: r for r in Records(file).rows}
    assert list(rows) == [images.PLAIN, *images.methods()]
    assert rows["vi"]["accuracy"] > 0.8 and rows[images.PLAIN]["accuracy"] > 0.7
    for row in rows.values():
        assert 0 <= row["ece"] <= 1 and 0 <= row["auroc"] <= 1 and row["nll"] > 0
    assert rows["ssvi 0.1"]["density"] == pytest.approx(0.1, abs=0.01)
    assert images.run(["mnist"], ["mlp"], None, "ci", file) == text  # nothing is fitted again


def test_crops_and_flips_are_those_of_the_padded_image():
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    made = cifar.augmented(x, torch.Generator().manual_seed(1))
    assert made.shape == x.shape and not torch.equal(made, x)
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    for image, whole in zip(made, padded, strict=True):
        windows = [whole[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        assert any(torch.equal(image, w) or torch.equal(image, w.flip(-1)) for w in windows)


def test_a_reduced_net_is_fitted_with_the_published_settings():
    g = torch.Generator().manual_seed(0)
    data = {"x": torch.randn(256, 3, 32, 32, generator=g), "label": torch.arange(256) % 10}
    effort = cifar.Size({"net": "lenet"}, None, None, 2)
    row = cifar.fit(data, data, cifar.methods()["ssvi 0.1, as published"], effort, None)
    assert 0.1 < row["density"] < 0.2  # the first and the last layer keep more
    assert math.isfinite(row["nll"]) and row["accuracy"] <= 1
    assert "ssvi 0.1" in cifar.table([{"method": "ssvi 0.1", **row}])


def test_every_method_of_the_step_times_takes_steps(monkeypatch, tmp_path):
    monkeypatch.setattr(step_time, "WIDTHS", (20, 16, 16, 3))
    monkeypatch.setattr(step_time, "EXAMPLES", 256)
    monkeypatch.setattr(step_time, "ROUNDS", 2)
    monkeypatch.setattr(step_time, "WARM", 1)
    text = step_time.run(tmp_path / "rows.jsonl")
    assert all(name in text for name in step_time.METHODS)
