"""Nested particles: against enumeration of the same particles, closed forms, and joint draws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

from ppl import Bernoulli, ModelError, Normal, given, infer, latent, model, observe, plate
from ppl.backend import Settings
from ppl.inference.particles import LinearGaussian, Prior, Tilted, nested
from ppl.inference.particles.estep import draw_all, evaluated, weigh
from ppl.inference.particles.problem import describe
from ppl.inference.particles.tempering import effective_shares
from ppl.inference.qem import QEM, init, prepare, step
from ppl.streams import Streams
from tests.inference.particles.ragged_houses import COUNTY, RAGGED, hierarchy

NESTED = Tilted(index="nested")
norm = stats.norm.logpdf


Y = np.array(RAGGED["y"])


@model
def tastes():
    """Vectors of users around a common one."""
    middle = latent("middle", Normal(0.0, 1.0), shape=2)
    spread = latent("spread", Normal(0.0, 0.5), shape=2)
    with plate("user"):
        taste = latent("taste", Normal(middle, spread.exp()))
        with plate("film"):
            observe("seen", Bernoulli(logits=(taste * given("x")).sum(-1)))


def exact() -> float:
    """Log evidence of the hierarchy."""
    same = np.equal.outer(COUNTY, COUNTY)
    cov = 1.0 + 0.49 * same + 1.25 * np.eye(5)
    return float(stats.multivariate_normal(np.zeros(5), cov).logpdf(Y))


def begun(program, data, q, restarts=1, **options):
    settings = Settings(Streams(1), restarts=restarts)
    problem = prepare(program.bind(data), QEM(q=q, **options), settings)
    state = init(problem)
    drawn = draw_all(problem.weighting, state.q, Streams(3))
    return problem, state, drawn, weigh(evaluated(problem, problem.weighting, drawn, state.q))


def test_evidence_and_weights_equal_enumeration():
    """Houses nest in their county's particles; every combination of indices is summed one after the other."""
    counts = {"mean": 2, "level": 2, "effect": 2}
    problem, _, drawn, found = begun(hierarchy, RAGGED, {"effect": NESTED}, particles=counts)
    mean, level = drawn["k:mean"].values["mean"], drawn["k:level"].values["level"]
    effect = drawn["k:effect"].values["effect"]
    assert effect.shape == (5, 4) and drawn["k:effect"].log_q.shape == (5, 4)
    logs, weights = [], np.zeros((5, 4))
    chosen = list(itertools.product(range(2), *[range(2)] * 3, *[range(2)] * 5))
    for i, *rest in chosen:
        at, own = rest[:3], rest[3:]
        flat = [2 * at[c] + j for c, j in zip(COUNTY, own, strict=True)]
        above = np.array([float(level[c, a]) for c, a in enumerate(at)])
        below = np.array([float(effect[h, f]) for h, f in enumerate(flat)])
        log = norm(float(mean[i]), 0, 1) + norm(above, float(mean[i]), 0.7).sum()
        log += norm(below, above[COUNTY], 0.5).sum() + norm(Y, below, 1).sum()
        log -= float(drawn["k:mean"].log_q[i]) + 9 * math.log(2)
        log -= sum(float(drawn["k:level"].log_q[c, a]) for c, a in enumerate(at))
        logs.append(log - sum(float(drawn["k:effect"].log_q[h, f]) for h, f in enumerate(flat)))
    total = logsumexp(logs)
    for (_, *rest), log in zip(chosen, logs, strict=True):
        for h, (c, j) in enumerate(zip(COUNTY, rest[3:], strict=True)):
            weights[h, 2 * rest[c] + j] += math.exp(log - total)
    assert float(found.log_z) == pytest.approx(float(total), abs=1e-9)
    np.testing.assert_allclose(found.marginals["k:effect"].numpy(), weights, atol=1e-9)


@pytest.mark.parametrize("form", [NESTED, Prior(index="nested")])
def test_the_evidence_is_unbiased_and_varies_less(form):
    counts = {"mean": 2, "level": 2, "effect": 2}

    def ratios(q):
        *_, found = begun(hierarchy, RAGGED, {"effect": q}, restarts=8000, particles=counts)
        return (found.log_z - exact()).exp()

    own, mixed = ratios(form), ratios(type(form)())
    assert abs(float(own.mean()) - 1) < 4 * float(own.std()) / math.sqrt(len(own))
    # Of the ratios themselves the standard deviation is that of the few largest.
    assert float(own.log().std()) < float(mixed.log().std())  # 3 % less over five sets of draws


def test_with_the_conditional_posterior_every_parent_particle_knows_its_evidence():
    """The tilt of a Gaussian likelihood is exact: what nested particles sum up to has no noise."""
    counts = {"mean": 20, "level": 20, "effect": 3}
    problem, state, *_ = begun(hierarchy, RAGGED, {"effect": NESTED}, particles=counts)
    for _ in range(60):
        state, _ = step(problem, state)
    drawn = draw_all(problem.weighting, state.q, Streams(8))
    found = weigh(evaluated(problem, problem.weighting, drawn, state.q))
    assert float(nested.share(found.marginals["k:effect"], 3).min()) > 0.95
    assert effective_shares(problem.weighting, found)[1] > 0.2


@pytest.mark.parametrize("restarts", [1, 2])
def test_posterior_and_joint_draws_are_right(restarts):
    posterior = infer(
        hierarchy, RAGGED, method="qem", q={"effect": NESTED}, seed=0, restarts=restarts
    )
    assert posterior.log_evidence.value == pytest.approx(exact(), abs=0.02)
    same = np.equal.outer(COUNTY, COUNTY)
    prior = 1.0 + 0.49 * same + 0.25 * np.eye(5)
    gain = prior @ np.linalg.inv(prior + np.eye(5))
    mean, cov = gain @ Y, prior - gain @ prior
    np.testing.assert_allclose(posterior.mean("effect").numpy(), mean, atol=0.03)
    drawn = posterior.samples(4000, seed=1)["effect"].numpy()
    np.testing.assert_allclose(np.cov(drawn.T), cov, atol=0.06)


@pytest.mark.parametrize(("dtype", "least"), [(torch.float64, 1e-170), (torch.float32, 1e-25)])
def test_parents_of_hardly_any_weight_do_not_hide_that_their_particles_are_dead(dtype, least):
    """One particle of three has all the weight: none is effective beside it, whatever another parent's have."""
    weights = torch.tensor([1.0, 0.0, 0.0, least, least, 0.0, 0.0, 0.0, 0.0], dtype=dtype)
    assert float(nested.share(weights, 3)) == pytest.approx(0.0, abs=1e-12)
    even = torch.tensor([0.25, 0.25, 0.5, 0.0], dtype=dtype)
    assert float(nested.share(even, 2)) == pytest.approx(0.5)


def test_explain_counts_all_combinations():
    options = QEM(q={"effect": NESTED}, particles={"mean": 2, "level": 500, "effect": 7})
    text = describe(hierarchy.bind(RAGGED), options, Settings(Streams(0)))
    assert "effect (7)" in text
    assert f"{5 * 500 * 7} entries" in text


@pytest.mark.parametrize(
    ("q", "groups", "message"),
    [
        ({"taste": NESTED}, [("middle",), ("spread",)], "depends on middle and spread"),
        ({"middle": Prior(index="nested")}, "auto", "depends on nothing"),
        ({"taste": LinearGaussian(given="middle", index="nested")}, "auto", "'permutation'"),
    ],
)
def test_what_cannot_nest_is_refused_in_words(q, groups, message):
    data = {"x": np.ones((2, 3, 2)), "seen": np.ones((2, 3))}
    with pytest.raises(ModelError, match=message):
        prepare(tastes.bind(data), QEM(q=q, groups=groups), Settings(Streams(0)))
