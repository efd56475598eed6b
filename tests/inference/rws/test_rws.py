"""Reweighted wake-sleep: conjugate posteriors, its gradient in closed form, shared particles, units, refusals."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from ppl import (
    RWS,
    ModelError,
    UnsupportedError,
    infer,
)
from ppl.backend import Settings
from ppl.inference.particles import LinearGaussian
from ppl.inference.rws import kernel, raw
from ppl.streams import Streams
from tests import conjugate
from tests.small_programs import clusters, scaled, schools


def made(program, data, restarts=1, **options):
    settings = Settings(Streams(0), restarts=restarts, max_iters=100)
    problem = kernel.prepare(program.bind(data), RWS(**options), settings)
    return problem, kernel.init(problem)


@pytest.mark.parametrize(
    ("case", "family"),
    [
        (conjugate.bernoulli([1, 0, 1, 1, 1], 2.0, 2.0), "Beta"),
        (conjugate.poisson([3, 1, 4], 2.0, 1.0), "Gamma"),
    ],
    ids=["beta", "gamma"],
)
def test_the_family_of_the_posterior_is_reached(case, family):
    options = {"q": {case.site: family}, "particles": 100}
    posterior = infer(case.program, case.data, method="rws", seed=0, **options)
    assert abs(float(posterior.mean(case.site)) - case.law.mean()) < 0.05 * case.law.std()
    assert abs(math.log(float(posterior.sd(case.site)) / case.law.std())) < 0.05
    found = posterior.log_evidence
    assert abs(found.value - case.evidence) < 5 * found.se + 1e-3


@pytest.mark.parametrize("joint_up_to", [0, 12])
def test_the_step_follows_the_gradient_of_the_weighted_log_density(joint_up_to):
    """For a Gaussian: sum w (z - m) / s^2 by its mean, and sum w ((z - m)^2 / s^2 - 1) by the log of its scale."""
    problem, state = made(scaled, {"y": [1.0, 2.0]}, particles=7, joint_up_to=joint_up_to)
    q = kernel.approximation(problem, state.ascent.theta, {})
    weighed = kernel._weighed(problem, q, state)
    found = kernel._moved(problem, state, weighed).first / 0.1  # Adam's running mean after a step
    at = next(c for c in problem.coordinates if c.block.names == ("effect",))
    free, w = weighed.particles[at.block.axis].free, weighed.weights[at.block.axis]
    joint = q.proposals[at.block.axis].joint
    z = (free - joint.mean.unsqueeze(-2)) / joint.sd.unsqueeze(-2)
    want = (w.unsqueeze(-1) * z).sum(-2) / joint.sd
    assert torch.allclose(found[0, at.piece.locations], want.flatten())
    want = (w.unsqueeze(-1) * (z.square() - 1)).sum(-2)
    assert torch.allclose(found[0, at.piece.raws], want.flatten())


@pytest.mark.parametrize("family", [None, "Gamma"])
def test_coordinates_give_back_the_proposal_that_they_came_from(family):
    options = {"q": {"rate": family}} if family else {}
    problem, state = made(conjugate.counts, {"count": [3]}, restarts=2, particles=5, **options)
    q = kernel.approximation(problem, state.ascent.theta, {})
    again, theta = raw.flatten(problem.inner.blocks, q.proposals, 2)
    assert torch.allclose(theta, state.ascent.theta)
    q2 = kernel.approximation(problem, theta, {})
    weighed = kernel._weighed(problem, q2, state)
    (at,) = again
    particles = weighed.particles[at.block.axis]
    assert torch.allclose(raw.log_density(at, theta, particles), particles.log_q)


def test_one_index_for_all_blocks_gives_plain_importance_weights():
    problem, state = made(scaled, {"y": [1.0, 2.0]}, particles=50, parallel=False, restarts=2)
    q = kernel.approximation(problem, state.ascent.theta, {})
    weighed = problem.shared.weighed(problem.coordinates, q)
    value = {n: v for p in weighed.particles.values() for n, v in p.values.items()}
    level, effect = value["level"], value["effect"]  # [2, 50], [2, row, 50]
    normal = torch.distributions.Normal
    y = torch.tensor([1.0, 2.0]).double()[:, None]
    log_p = normal(0.0, 1.0).log_prob(level) + normal(level[:, None], 1.0).log_prob(effect).sum(1)
    log_p = log_p + normal(effect, 0.5).log_prob(y).sum(1)
    log_q = {p.log_q.ndim: p.log_q for p in weighed.particles.values()}
    log_w = log_p - log_q[2] - log_q[3].sum(1)
    assert torch.allclose(weighed.log_z, log_w.logsumexp(-1) - math.log(50))
    for w in weighed.weights.values():
        shared = w if w.ndim == 2 else w[:, 0]
        assert torch.allclose(shared, log_w.softmax(-1))


@pytest.mark.parametrize("options", [{}, {"parallel": False, "particles": 200}])
def test_discrete_latents_are_summed_and_drawn(options):
    x = {"x": [-0.5, 1.4, 3.0, 2.6]}
    found = infer(clusters, x, method="rws", seed=0, **options)
    want = infer(clusters, x, method="qem", seed=1)
    assert torch.allclose(found.probs("z"), want.probs("z"), atol=0.03)
    assert abs(float(found.mean("shift") - want.mean("shift"))) < 0.05
    draws = found.samples(2000)
    assert torch.allclose(draws["z"].mean(0), found.probs("z")[:, 1], atol=0.06)
    assert abs(float(draws["shift"].mean() - found.mean("shift"))) < 0.1


@pytest.mark.parametrize("parallel", [True, False])
def test_a_change_of_units_changes_the_run(parallel):
    y = {"y": [1.0, 2.0, -0.5]}
    options = {"settle": False, "tol": 0.0, "max_iters": 40, "parallel": parallel}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = (
            infer(scaled(u), y, method="rws", particles=10, seed=0, start="standard", **options)
            for u in (1.0, 1000.0)
        )
    assert float((a.trace["log_evidence"] - b.trace["log_evidence"])[-10:].min()) > 1.0


def test_params_reach_the_maximum_of_the_evidence():
    y = torch.tensor([1.0, 2.0, 3.4, 0.2], dtype=torch.float64)
    posterior = infer(schools, {"y": y}, method="rws", particles=30, seed=0)
    assert abs(float(posterior.params["centre"]) - float(y.mean())) < 0.15


def test_restarts_keep_the_best_and_reweighting_agrees():
    data = {"y": [1.0, 2.0, -0.5]}
    exact = infer(scaled, data, method="exact")
    for options in ({}, {"parallel": False}):
        posterior = infer(scaled, data, method="rws", restarts=2, seed=0, **options)
        assert torch.allclose(posterior.mean("effect"), exact.mean("effect"), atol=0.1)
        again = posterior.reweight(300)
        assert abs(again.log_evidence.value - exact.log_evidence.value) < (
            5 * again.log_evidence.se + 0.02
        )


def test_what_cannot_be_moved_is_refused_in_words():
    data = {"y": [1.0, 2.0]}
    with pytest.raises(UnsupportedError, match="effect: rws moves .*method='qem'"):
        infer(scaled, data, method="rws", q={"effect": LinearGaussian(given="level")})
    with pytest.raises(UnsupportedError, match="does not learn params.*centre.*parallel=True"):
        infer(schools, data, method="rws", parallel=False)
    with pytest.raises(ModelError, match="one particle index.*one number"):
        infer(scaled, data, method="rws", parallel=False, particles={"level": 3})
    with pytest.raises(UnsupportedError, match="rws: minibatch=.*method='qem'"):
        infer(scaled, data, method="rws", minibatch={"row": 1})
    with pytest.raises(ModelError, match="learning_rate.*positive"):
        infer(scaled, data, method="rws", learning_rate=0.0)
