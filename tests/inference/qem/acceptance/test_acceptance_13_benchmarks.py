"""Benchmarks among the acceptance tests: levels of log Zhat that an independent implementation reaches.

Settings of [Heap2025]: products of N(0, 1) at the start, a constant step, no bridge, the same blocks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest

from ppl.backend import Settings
from ppl.inference.qem import QEM, init, prepare, step
from ppl.models.hierarchical import radon_counties, radon_states
from ppl.models.logistic import bus_breakdown
from ppl.streams import Streams
from tests.data_files import data_file


class Published(NamedTuple):
    """A model, its settings, and the mean and spread over seeds of log Zhat."""

    program: object
    file: str
    arrays: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    particles: int
    step: float
    start: float  # before any update, mean of five seeds
    start_spread: float
    plateau: float  # mean over iterations 201 ... 250
    within: float


COUNTY = ("County_mean", "County_log_sigma", "Beta_u", "Beta_basement")
STATE = ("State_mean", "State_log_sigma", "Beta_u", "Beta_basement")
RADON = ("obs", "basement", "log_uranium")
CASES = {
    "radon counties": Published(
        radon_counties(),
        "radon/radon_counties.npz",
        RADON,
        (("global_mean", "global_log_sigma"), ("State_mean", "State_log_sigma"), COUNTY),
        *(30, 0.03, -287.3, 4.2, -277.8, 0.6),
    ),
    "bus breakdown": Published(
        bus_breakdown(),
        "bus_breakdown/split_0.npz",
        ("obs", "company", "run_type"),
        (("psi", "phi", "sigma_beta", "mu_beta"), ("beta", "sigma_alpha"), ("alpha",)),
        *(10, 0.1, -500.3, 16.3, -412.3, 4.0),
    ),
    "radon states": Published(
        radon_states(),
        "radon/radon_states.npz",
        RADON,
        (("global_mean", "global_log_sigma"), *((n,) for n in STATE)),
        *(10, 0.1, -848.8, 31.7, -828.0, 0.6),
    ),
}


def problem_of(name, seed):
    case = CASES[name]
    with np.load(data_file(case.file)) as archive:
        data = {n: archive[f"{n}_train"] for n in case.arrays}
    options = QEM(particles=case.particles, step=case.step, groups=case.groups,
                  start="standard", joint_up_to=0, bridge=False, stratified=False)  # fmt: skip
    return prepare(case.program.bind(data), options, Settings(Streams(seed)))


@pytest.mark.parametrize("name", CASES)
def test_13_log_evidence_before_any_update(name):
    """The mean of five seeds against the mean of five others; four standard errors, five nats at least."""
    found = []
    for seed in range(5):
        problem = problem_of(name, seed)
        _, info = step(problem, init(problem))
        found.append(info.metrics["log_evidence"])
    case = CASES[name]
    within = max(5.0, 4 * case.start_spread * math.sqrt(2 / 5))
    assert abs(np.mean(found) - case.start) < within, found


@pytest.mark.parametrize(
    "name",
    ["radon counties"]
    + [pytest.param(n, marks=pytest.mark.slow) for n in ("bus breakdown", "radon states")],
)
def test_13_plateau(name):
    case, problem = CASES[name], problem_of(name, 0)
    state, trace = init(problem), []
    for _ in range(250):
        state, info = step(problem, state)
        trace.append(info.metrics["log_evidence"])
    plateau = float(np.mean(trace[200:]))
    assert abs(plateau - case.plateau) < case.within, plateau
