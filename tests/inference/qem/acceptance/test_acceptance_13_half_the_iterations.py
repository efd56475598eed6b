"""Default settings reach the final level of the paper's settings in at most half the iterations.

The level is the plateau of log Zhat, less the standard deviation of one iteration there; it is reached by a mean of eight
iterations, of the posterior's own weights at the paper's number of particles, drawn one by one.
"""

from __future__ import annotations

import pytest

from benchmarks.qem_paper.experiments import EXPERIMENTS
from benchmarks.qem_paper.runs import run
from benchmarks.qem_paper.tables import final_level, reached
from tests.data_files import data_file

RADON, BUS = "radon/radon_{}.npz", "bus_breakdown/split_0.npz"


@pytest.mark.parametrize(
    ("name", "file", "particles"),
    [
        ("radon_counties", RADON.format("counties"), 30),
        ("radon_states", RADON.format("states"), 10),
        pytest.param("bus", BUS, 30, marks=pytest.mark.slow),
        pytest.param("bus_delays", BUS, 30, marks=pytest.mark.slow),  # a minute, or two
    ],
)
def test_13_half_the_iterations_are_enough(name, file, particles):
    data_file(file)
    paper = run(EXPERIMENTS[name], "qem", particles, 250, 0, every=0)
    level, noise = final_level([paper])
    half = int(reached(paper, level - noise)) // 2
    assert 8 <= half < 100  # a mean of eight, and the level is reached
    for seed in range(1 if name == "bus_delays" else 3):
        ours = run(EXPERIMENTS[name], "qem default", particles, half, seed, every=0)
        assert reached(ours, level - noise) <= half, (seed, half, ours.log_evidence)
