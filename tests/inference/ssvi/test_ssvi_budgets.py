"""Budgets and the schedule: published counts, totals, and which steps move the sets."""

from __future__ import annotations

import math

import pytest

from ppl.inference.ssvi import budgets, schedule

_STAGES = [(64, 64, 1), (128, 64, 2), (256, 128, 2), (512, 256, 2)]


def resnet18():
    """Arrays of weights of the ResNet-18 for 32 x 32 images."""
    shapes = [(64, 3, 3, 3)]
    for width, before, stride in _STAGES:
        shapes += [(width, before, 3, 3), *[(width, width, 3, 3)] * 3]
        shapes += [(width, before, 1, 1)] if stride == 2 else []
    return [*shapes, (10, 512)]


@pytest.mark.parametrize(
    ("density", "active"),
    [
        (1.0, 11_164_352),
        (0.5, 5_583_040),
        (0.2, 2_234_253),
        (0.1, 1_117_990),
        (0.05, 559_859),
        (0.02, 224_977),
        (0.01, 113_356),
    ],
)
def test_uniform_budgets_of_the_resnet_are_those_of_the_public_code(density, active):
    found = budgets.uniform(resnet18(), density, output=1.0)
    assert sum(found) == pytest.approx(active, abs=len(found))  # rounding of each layer


@pytest.mark.parametrize("density", [0.01, 0.05, 0.3, 0.9, 1.0])
def test_erk_has_the_total_that_was_asked_for(density):
    for shapes in ([(256, 784), (256, 256), (10, 256)], resnet18()):
        found, sizes = budgets.erk(shapes, density), [math.prod(s) for s in shapes]
        assert all(1 <= k <= n for k, n in zip(found, sizes, strict=True))
        assert sum(found) == pytest.approx(density * sum(sizes), abs=len(shapes))


def test_erk_is_in_proportion_to_the_sum_of_sizes_where_it_is_not_capped():
    found = budgets.erk([(100, 300), (100, 100)], 0.1)
    assert found[0] / found[1] == pytest.approx(400 / 200, rel=1e-2)


def test_small_output_layers_are_denser_and_large_first_layers_are_not_dense():
    found = budgets.uniform([(1024, 784), (1024, 1024), (10, 1024)], 0.05)
    assert found == [round(0.05 * 1024 * 784), round(0.05 * 1024**2), round(0.2 * 10240)]


def test_the_schedule_falls_as_a_cosine_and_ends():
    plan = schedule.schedule(0.3, 100, 0.75, 4000)
    due = [t for t in range(4000) if schedule.is_due(plan, t)]
    assert due[0] == 100 and due[-1] == 2900 and schedule.is_last(plan, 2900)
    assert [t for t in due if schedule.is_last(plan, t)] == [2900]
    assert schedule.share(plan, 0) == 0.3
    assert schedule.share(plan, 1500) == pytest.approx(0.15)
    assert schedule.share(plan, 3000) == 0.0


def test_short_runs_get_some_thirty_updates():
    plan = schedule.schedule(0.5, None, 0.75, 1880)
    assert plan.every == 47
    assert len([t for t in range(1880) if schedule.is_due(plan, t)]) == 29


def test_rate_zero_never_moves():
    plan = schedule.schedule(0.0, 10, 0.75, 1000)
    assert not any(schedule.is_due(plan, t) for t in range(1000))
