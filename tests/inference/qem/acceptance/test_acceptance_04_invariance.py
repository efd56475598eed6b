"""Acceptance test 4: rescaling a latent by 1000 changes nothing but its scale, over whole trajectories."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ppl import HalfNormal, Markov, Normal, latent, model, observe, plate
from ppl.backend import Settings
from ppl.inference.particles.estep import draw_all, evaluated, weigh
from ppl.inference.qem import QEM, init, prepare, step
from ppl.streams import Streams

ITERATIONS = 20
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
GROUPS = (("mean", "spread"), ("level", "slope"))
RESCALED = ("mean", "level", "x")
Y = np.array([[0.3, 1.9, -0.4], [2.2, 0.1, 1.4], [-0.9, 0.8, 3.0]])


def program(c: float):
    """A hierarchy and a series, with a global, a latent in a plate and a chain in units of ``1 / c``."""

    @model
    def scaled():
        mean, spread = latent("mean", Normal(0.0, 3.0 * c)), latent("spread", HalfNormal(2.0))
        with plate("group"):
            level = latent("level", Normal(mean, spread * c))
            slope = latent("slope", Normal(0.0, 1.0))
            with plate("row"):
                observe("y", Normal(level / c + slope, 1.0))
        with plate("time", ordered=True):
            x = latent(
                "x", Markov(Normal(mean, c), lambda before: Normal(0.9 * before, spread * c))
            )
            observe("w", Normal(x / c, 0.5))

    return scaled


def trajectory(c: float, **options):
    """At every iteration the log evidence, all weights, and the moments of every proposal in units of 1."""
    bound = program(c).bind({"y": Y, "w": [0.5, 1.5, -0.2, 0.4]})
    options = {"groups": GROUPS, "particles": 12, "step": 0.2, **options}
    problem = prepare(bound, QEM(**options), Settings(Streams(3)))
    state, rows = init(problem), []
    for _ in range(ITERATIONS):
        drawn = draw_all(problem.weighting, state.q, problem.settings.streams)
        found = weigh(evaluated(problem, problem.weighting, drawn, state.q))
        state, info = step(problem, state)
        rows.append(
            {"log_z": found.log_z, "bridge": torch.tensor(info.metrics["bridge"])}
            | {f"weights of {a}": w for a, w in found.marginals.items()}
            | moments(problem, state.q, c)
        )
    return rows


def moments(problem, q, c: float):
    """Means and covariances of the proposals, those of rescaled latents divided by ``c``."""
    made = {}
    for block in problem.blocks:
        joint = q.proposals[block.axis].joint
        units = [c if m.name in RESCALED else 1.0 for m in block.gaussian for _ in range(m.dims)]
        mean, cov, unit = joint.mean, joint.cov, torch.tensor(units, dtype=torch.float64)
        if block.chain and mean.shape[-1] == 2 * len(unit):  # of a state and the one before
            made[f"first spread of {block.axis}"] = cov[0, 1:, 1:] / c**2
            made[f"first mean of {block.axis}"] = mean[0, 1:] / c
            mean, cov, unit = mean[1:], cov[1:], unit.repeat(2)
        full = cov.ndim > mean.ndim
        made[f"mean of {block.axis}"] = mean / unit
        made[f"spread of {block.axis}"] = cov / (unit.outer(unit) if full else unit.square())
    return made


@pytest.mark.parametrize("bridge", [False, True], ids=["no bridge", "bridge"])
@pytest.mark.parametrize("joint", [0, 6], ids=["product", "joint"])
@pytest.mark.parametrize("c", [1000.0, 0.001], ids=["1000", "1/1000"])
def test_04_rescaling_leaves_evidence_weights_and_iterates(c, joint, bridge):
    plain, scaled = (trajectory(s, joint_up_to=joint, bridge=bridge) for s in (1.0, c))
    if bridge:  # it was down for a while, or nothing is tested
        assert plain[0]["bridge"] < 1
    for before, after in zip(plain, scaled, strict=True):
        assert before.keys() == after.keys()
        for name in before:
            torch.testing.assert_close(
                after[name], before[name], msg=lambda m, n=name: f"{n}: {m}", **TIGHT
            )


def test_04_proposals_that_ignore_the_scale_are_told_apart():
    """The comparison can fail: both runs start from N(0, 1), whatever the unit."""
    plain, scaled = (trajectory(s, start="standard", joint_up_to=0) for s in (1.0, 1000.0))
    assert not torch.allclose(plain[-1]["log_z"], scaled[-1]["log_z"], rtol=1e-3)
