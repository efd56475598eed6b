"""Daily counts of covid with the settings of the paper: a chain of 109 days in 92 regions."""

from __future__ import annotations

import math

import pytest

from ppl.backend import Settings
from ppl.inference.qem import QEM, init, prepare, step
from ppl.models import covid, datasets
from ppl.streams import Streams
from tests.data_files import data_file

GLOBALS = (
    *("CM_alpha", "Wearing_alpha", "Mobility_alpha", "RegionR"),
    *("InitialSize_log_mean", "log_infected_noise_mean"),
)
# Log evidence at iterations 0, 10 and 50 of another implementation (three particles, one seed), and by which factor ours
# may differ: over seeds 0 to 2 it is 0.96 to 1.28, 1.07 to 1.54 and 1.02 to 1.05 times as large, or as small.
PATH = {0: (-3.69e6, 1.6), 10: (-1.08e6, 2.0), 50: (-114e3, 1.1)}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_log_evidence_of_daily_covid_follows_the_path_of_the_paper(seed):
    data_file("covid/covid_daily.npz")
    options = QEM(particles=3, step=0.1, bridge=False, joint_up_to=0, start="standard",
                  groups=[GLOBALS, ("InitialSize_log", "log_infected_noise", "psi")])  # fmt: skip
    problem = prepare(covid.bind(datasets.covid().train), options, Settings(Streams(seed)))
    state, found = init(problem), []
    for _ in range(51):
        state, info = step(problem, state)
        found.append(info.metrics["log_evidence"])
    for iteration, (value, factor) in PATH.items():
        assert abs(math.log(found[iteration] / value)) < math.log(factor), (
            iteration,
            found[iteration],
        )
