"""Blocks by posterior correlation, particle counts by what blocks add to the noise, start values from another method."""

from __future__ import annotations

from builtins import sum

import numpy as np
import pytest
import torch
from scipy import stats

from ppl import (
    Bernoulli,
    HalfNormal,
    ModelError,
    Normal,
    UnsupportedError,
    given,
    latent,
    model,
    observe,
    plate,
)
from ppl.backend import Settings
from ppl.inference.particles.counts import largest
from ppl.inference.particles.estep import draw_all, evaluated
from ppl.inference.particles.pilot import correlations, wants_pilot
from ppl.inference.particles.problem import prepare_particles
from ppl.inference.qem import QEM, init, prepare, step
from ppl.streams import Streams
from tests.quiet import quiet_fit


@model
def many_slopes(n: int = 16):
    slopes = [latent(f"b{i}", Normal(0.0, 5.0)) for i in range(n)]
    with plate("row"):
        x = given("x")
        observe("y", Normal(sum(x[i] * slopes[i] for i in range(n)), 1.0))


def twins(n=8, rows=60):
    """Columns ``i`` and ``i + n`` are almost the same, so the slopes' posterior is correlated across the order."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, n))
    x = np.concatenate([x, x + 0.1 * rng.normal(size=x.shape)], 1)
    return {"x": x, "y": x @ rng.normal(size=2 * n) + rng.normal(size=rows)}


def slopes_posterior(data):
    x, y = data["x"], data["y"]
    cov = np.linalg.inv(x.T @ x + np.eye(x.shape[1]) / 25)
    law = stats.multivariate_normal(np.zeros(len(y)), np.eye(len(y)) + 25 * x @ x.T)
    return cov @ x.T @ y, np.diag(cov) ** 0.5, law.logpdf(y), cov


def test_correlations_are_those_of_the_posterior():
    data = twins(2, 30)
    bound = many_slopes(n=4).bind(data)
    options = QEM(groups=[("b0", "b1"), ("b2", "b3")], particles=300)
    problem = prepare_particles(bound, options, Settings(Streams(0)), 1)
    state = init(problem)
    for _ in range(80):
        state, _ = step(problem, state)
    drawn = draw_all(problem.weighting, state.q, problem.settings.streams)
    found = correlations(problem, evaluated(problem, problem.weighting, drawn, state.q))
    cov = slopes_posterior(data)[3]
    exact = np.abs(cov / np.sqrt(np.outer(np.diag(cov), np.diag(cov))))
    for i, j in ((0, 2), (1, 3), (0, 1), (0, 3)):
        value = found.get((f"b{i}", f"b{j}"), found.get((f"b{j}", f"b{i}")))
        assert abs(value - exact[i, j]) < 0.2, (i, j)


def test_twins_share_a_block_and_the_answer_is_right():
    data = twins()
    posterior = quiet_fit(many_slopes(n=16), data, seed=0, final_particles=500, replicates=8)
    mean, sd, log_evidence, _ = slopes_posterior(data)
    blocks = posterior.diagnostics.notes["particles"]
    together = sum(
        any({f"b{i}", f"b{i + 8}"} <= set(a[2:].split("+")) for a in blocks) for i in range(8)
    )
    assert together >= 7
    found = np.array([float(posterior.mean(f"b{i}")) for i in range(16)])
    spread = np.array([float(posterior.sd(f"b{i}")) for i in range(16)])
    assert np.abs((found - mean) / sd).mean() < 0.1
    assert np.abs(np.log(spread / sd)).mean() < 0.1
    assert abs(posterior.log_evidence.value - log_evidence) < 0.3


def test_a_pilot_runs_only_where_it_can_change_something():
    def asked(program, data, **options):
        return wants_pilot(
            prepare_particles(program.bind(data), QEM(**options), Settings(Streams(0)), 1)
        )

    assert asked(many_slopes(n=16), twins(), joint_up_to=1)
    assert not asked(many_slopes(n=16), twins())  # outside all plates a block may be larger
    assert not asked(many_slopes(n=4), twins(2, 30))
    assert asked(many_slopes(n=4), twins(2, 30), groups="correlation")
    assert asked(many_slopes(n=4), twins(2, 30), particles="auto")
    assert not asked(many_slopes(n=2), twins(1, 30), joint_up_to=0)
    assert not asked(many_slopes(n=16), twins(), joint_up_to=16)


@model
def groups_of_rows():
    mean, spread = latent("mean", Normal(0.0, 3.0)), latent("spread", HalfNormal(1.0))
    with plate("group"):
        level = latent("level", Normal(mean, spread))
        with plate("row"):
            observe("y", Normal(level, 1.0))


def test_counts_follow_the_demand_at_the_same_size():
    y = {"y": np.random.default_rng(1).normal(size=(30, 4)) + 1.0}
    usual, asked = (
        prepare(groups_of_rows.bind(y), QEM(particles=p), Settings(Streams(0)))
        for p in (None, "auto")
    )
    assert largest(asked.bound, asked.blocks, asked.weighting.sizes) <= largest(
        usual.bound, usual.blocks, usual.weighting.sizes
    )
    # Thirty levels add more to the noise of the evidence than the two globals do.
    counts = asked.weighting.sizes
    assert counts["k:level"] > usual.weighting.sizes["k:level"] > counts["k:mean+spread"]


def test_counts_keep_to_the_memory():
    y = {"y": np.zeros((30, 4))}
    bound = groups_of_rows.bind(y)
    free = prepare_particles(bound, QEM(), Settings(Streams(0)), 1)
    tight = prepare_particles(bound, QEM(), Settings(Streams(0), memory=2**17), 1)
    size = largest(bound, tight.blocks, tight.weighting.sizes)
    assert size * 8 <= 2**17 < 8 * largest(bound, free.blocks, free.weighting.sizes)


# ---- start values -------------------------------------------------------------------------------------------


@model
def collinear():
    first, second = latent("first", Normal(0.0, 1000.0)), latent("second", Normal(0.0, 1000.0))
    log_noise = latent("log_noise", Normal(0.0, 2.0))
    with plate("row"):
        mean = first * given("a") + second * given("b")
        observe("y", Normal(mean, torch.exp(log_noise)))


def collinear_data():
    rng = np.random.default_rng(0)
    a = rng.normal(size=40)
    b = a + 0.01 * rng.normal(size=40)
    return {"a": a, "b": b, "y": a - b + 0.5 * rng.normal(size=40)}


@pytest.mark.parametrize("restarts", [1, 2])
def test_a_start_from_laplace_needs_no_bridge(restarts):
    bridged, means = {}, {}
    for start in ("prior", "laplace"):
        posterior = quiet_fit(collinear, collinear_data(), seed=0, start=start, restarts=restarts)
        bridged[start] = int((posterior.trace["bridge"] < 1).sum())
        means[start] = posterior.mean("first") / posterior.sd("first")
    assert bridged["laplace"] <= 5 < 20 < bridged["prior"]
    assert torch.allclose(means["laplace"], means["prior"], atol=0.15)


@model
def two_levels():
    high, level = latent("high", Bernoulli(0.5)), latent("level", Normal(0.0, 1.0))
    with plate("row"):
        observe("y", Normal(level + high, 1.0))


def test_a_start_that_cannot_be_had_is_refused_with_the_remedy():
    with pytest.raises(UnsupportedError, match="laplace cannot fit this model") as refused:
        quiet_fit(two_levels, {"y": np.zeros(3)}, start="laplace")
    assert "'high'" in str(refused.value) and "start='prior'" in str(refused.value)
    with pytest.raises(ModelError, match="prior, standard, laplace, gbp"):
        QEM(start="newton")
    with pytest.raises(ModelError, match="'auto', 'correlation' or groups"):
        QEM(groups="all")
