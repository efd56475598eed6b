"""Acceptance test 11: with steps t^-p the error falls like t^(-p/2), with a constant step it levels off."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ppl import Normal, latent, model, observe
from ppl.backend import Settings
from ppl.inference.qem import QEM, init, prepare, step
from ppl.streams import Streams

RUNS, PARTICLES = 2000, 100
EXACT, SPREAD = 0.5, math.sqrt(0.5)  # posterior of the model below


@model
def single():
    mean = latent("mean", Normal(0.0, 1.0))
    observe("y", Normal(mean, 1.0))


def squared_errors(rule, times, runs=RUNS):
    """Mean squared error of the mean of q over independent runs, after each of ``times`` iterations."""
    options = QEM(particles=PARTICLES, step=rule, bridge=False)
    problem = prepare(single.bind({"y": 1.0}), options, Settings(Streams(7), restarts=runs))
    state, found = at_the_posterior(init(problem)), {}
    for t in range(1, max(times) + 1):
        state, _ = step(problem, state)
        if t in times:
            (proposal,) = state.q.proposals.values()
            found[t] = float((proposal.joint.mean[:, 0] - EXACT).square().mean())
    return found


def at_the_posterior(state):
    """Runs that start where they will end, so that every E-step has the noise of a converged one."""
    ((axis, proposal),) = state.q.proposals.items()
    mean, cov = proposal.joint.mean, proposal.joint.cov
    joint = proposal.joint._replace(
        mean=torch.full_like(mean, EXACT), cov=torch.full_like(cov, 0.5)
    )
    return state._replace(q=state.q._replace(proposals={axis: proposal._replace(joint=joint)}))


def predicted(rule, times):
    """``v_t = (1 - l)^2 v_{t-1} + l^2 s^2``: the noise of an E-step from a converged proposal is s^2 = var / K."""
    noise, v, found = SPREAD**2 / PARTICLES, 0.0, {}
    for t in range(1, max(times) + 1):
        share = rule(t - 1) if callable(rule) else rule
        v = (1 - share) ** 2 * v + share**2 * noise
        found[t] = v
    return found


# 2000 runs: the relative standard error of a mean square is sqrt(2 / 2000) = 0.032; four of them, and 0.03 for what
# the weights of a proposal that is itself noisy add (of order 1/K times a few).
TOLERANCE = 4 * math.sqrt(2 / RUNS) + 0.03


@pytest.mark.parametrize("p", [0.4, 0.8])
def test_11_error_falls_like_t_to_the_minus_half_p(p):
    """Fitted slope of log error against log t over t = 10 ... 160, against -p/2 and the predicted variance."""
    times = (10, 20, 40, 80, 160)
    rule = lambda t: (t + 1.0) ** -p  # noqa: E731
    found, wanted = squared_errors(rule, times), predicted(rule, times)
    for t in times:
        assert abs(found[t] / wanted[t] - 1) < TOLERANCE, (t, found[t], wanted[t])
    slope, limit = (
        np.polyfit(np.log(times), 0.5 * np.log([v[t] for t in times]), 1)[0]
        for v in (found, wanted)
    )
    # A log error has a standard error of 0.016: that of a slope through five of them is 0.007.
    assert abs(slope - limit) < 0.04 and abs(slope + p / 2) < 0.07, (slope, limit)


@pytest.mark.parametrize("share", [0.3, 0.1])
def test_11_a_constant_step_levels_off_at_the_predicted_variance(share):
    """At lambda s^2 / (2 - lambda), and stays there."""
    times = (60, 100, 160)
    found = squared_errors(share, times)
    level = share * SPREAD**2 / PARTICLES / (2 - share)
    for t in times:
        assert abs(found[t] / level - 1) < TOLERANCE, (t, found[t], level)


def test_11_the_two_predictions_are_apart():
    falling = predicted(lambda t: (t + 1.0) ** -0.6, (20, 320))
    assert math.sqrt(falling[320] / falling[20]) == pytest.approx(16**-0.3, rel=0.1)
    assert torch.tensor(falling[320]) < 0.5 * predicted(0.1, (320,))[320]
