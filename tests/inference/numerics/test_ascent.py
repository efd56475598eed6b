"""Ascent that settles: the optimum of quadratics, rows, steps that shrink under noise, gradients that are not finite."""

from __future__ import annotations

import pytest
import torch

from ppl.inference.numerics.ascent import Rule, ascend, rate, start

TARGET = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)


def climb(rule, steps, noise=0.0, rows=None):
    state = start(torch.zeros_like(TARGET))
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        pushed = noise * torch.randn(TARGET.shape, generator=generator, dtype=torch.float64)
        gradient = TARGET - state.theta + pushed
        gradient = gradient if rows is None else gradient[..., rows]
        state = ascend(state, gradient, rule, torch.ones_like, rows)
    return state


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_it_finds_the_top_of_a_quadratic(optimiser):
    state = climb(Rule(0.05, optimiser, horizon=2000), 2000)
    assert torch.allclose(state.mean, TARGET, atol=1e-3)
    assert state.is_fine


def test_the_first_step_of_sgd_is_the_gradient_times_the_rate():
    state = climb(Rule(0.1, "sgd"), 1)
    assert torch.allclose(state.theta, 0.1 * TARGET)


def test_noise_shrinks_the_step_and_the_average_is_closer_than_the_iterates():
    rule = Rule(0.1, "adam", horizon=100_000)
    state = climb(rule, 3000, noise=3.0)
    assert state.stage > 0 and rate(state, rule) < 0.1
    assert (
        float((state.mean - TARGET).abs().max()) < 0.25
    )  # 3 over the root of some 500 steps, twice
    unsettled = climb(Rule(0.1, "adam", settles=False), 3000, noise=3.0)
    assert unsettled.stage == 0 and torch.equal(unsettled.mean, unsettled.theta)


def test_the_step_falls_towards_the_end_of_the_horizon_in_any_case():
    rule = Rule(1e-6, "adam", horizon=40)  # far too small to arrive
    assert climb(rule, 40).stage == 3


def test_rows_that_are_not_named_keep_value_and_memory():
    rows = torch.tensor([2, 0])
    state = climb(Rule(0.05), 7, rows=rows)
    assert float(state.theta[0, 1]) == 0 and state.counts.tolist() == [7, 0, 7]
    alone = climb(Rule(0.05), 7)
    assert torch.equal(state.theta[:, rows], alone.theta[:, rows])


def test_a_coordinate_without_a_finite_gradient_stays():
    state = start(torch.zeros_like(TARGET))
    gradient = torch.tensor([[1.0, torch.nan, torch.inf]], dtype=torch.float64)
    state = ascend(state, gradient, Rule(0.1), torch.ones_like)
    assert torch.allclose(state.theta, torch.tensor([[0.1, 0.0, 0.0]], dtype=torch.float64))
    assert bool(state.second.isfinite().all())
