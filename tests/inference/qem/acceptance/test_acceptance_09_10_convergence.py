"""Acceptance tests 9 and 10: the estimate tightens with K, and proposals become the exact posterior."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from ppl import Normal, latent, model, observe
from ppl.backend import Settings
from ppl.inference.numerics.expfam import FAMILIES
from ppl.inference.particles.estep import draw_all, evaluated, weigh
from ppl.inference.qem import QEM, init, prepare, step
from ppl.streams import Streams
from tests.conjugate import CONJUGATE
from tests.inference.qem.nested_normals import Y, nested, nested_evidence
from tests.small_programs import rates


def problem_of(program, data, seed=0, restarts=1, **options):
    return prepare(program.bind(data), QEM(**options), Settings(Streams(seed), restarts=restarts))


def evidence_draws(problem, q, repeats=1):
    """Log Zhat of some E-steps from the same proposals."""
    found = []
    for _ in range(repeats):
        drawn = draw_all(problem.weighting, q, problem.settings.streams)
        found.append(weigh(evaluated(problem, problem.weighting, drawn, q)).log_z.reshape(-1))
    return torch.cat(found).numpy()


def test_09_log_evidence_increases_with_particles_and_approaches_the_truth():
    """200 repeats at each K; every step up is larger than two of its standard errors.

    Particles are drawn one by one: stratified ones are within 0.05 nats from K = 10 on.
    """
    means, errors = [], []
    for particles in (1, 3, 10, 30, 100):
        problem = problem_of(
            nested, {"y": Y}, particles=particles, joint_up_to=0, start="standard",
            groups=[("mean",), ("level",), ("x",)], stratified=False,
        )  # fmt: skip
        log_z = evidence_draws(problem, init(problem).q, 200)
        means.append(log_z.mean())
        errors.append(log_z.std() / math.sqrt(200))
    truth = nested_evidence()
    for i in range(4):
        assert means[i + 1] - means[i] > 2 * math.hypot(errors[i], errors[i + 1]), (means, errors)
    assert all(m < truth + 3 * e for m, e in zip(means, errors, strict=True))
    assert truth - means[-1] < 0.1, (means, truth)
    assert truth - means[0] > 3


@pytest.mark.parametrize("particles", [1, 2, 7, 50])
@pytest.mark.parametrize("name", CONJUGATE)
def test_09_with_the_exact_posterior_every_draw_gives_the_evidence(name, particles):
    case = CONJUGATE[name]
    options = {"q": {case.site: type(case.family)(**exact_law(case))}} if case.family else {}
    problem = problem_of(case.program, case.data, particles=particles, bridge=False, **options)
    q = init(problem).q
    if case.family is None:
        ((axis, proposal),) = q.proposals.items()
        joint = exact_joint(case, proposal.joint)
        q = q._replace(proposals={axis: proposal._replace(joint=joint)})
    found = evidence_draws(problem, q, 10)
    np.testing.assert_allclose(found, case.evidence, rtol=1e-9, atol=1e-9)


def exact_law(case):
    return {k: torch.as_tensor(v, dtype=torch.float64) for k, v in case.exact.items()}


def exact_joint(case, joint):
    """The posterior as the Gaussian proposal of the block."""
    exact = exact_law(case)
    cov = exact.get("cov", exact.get("scale", torch.tensor(0.0)).square())
    shape = joint.cov.shape
    return joint._replace(mean=exact["loc"].reshape(joint.mean.shape), cov=cov.reshape(shape))


@pytest.mark.parametrize("particles", [1, 5])
def test_09_exact_proposals_of_every_plate_element_give_the_evidence_too(particles):
    """Latents of a plate without globals are one-block models each, with proposals of their own."""
    count, pace = np.array([0, 4, 1]), np.array([1.0, 2.0, 0.5])
    problem = problem_of(
        rates,
        {"count": count, "pace": pace},
        particles=particles,
        q={"rate": "Gamma"},
        bridge=False,
    )
    q = init(problem).q
    ((axis, proposal),) = q.proposals.items()
    exact = {"concentration": torch.as_tensor(2.0 + count), "rate": torch.as_tensor(1.0 + pace)}
    families = {"rate": FAMILIES["Gamma"].mean_from_standard(exact)}
    q = q._replace(proposals={axis: proposal._replace(families=families)})
    wanted = sum(stats.nbinom(2, b / (b + 1)).logpmf(k) for b, k in zip(pace, count, strict=True))
    np.testing.assert_allclose(evidence_draws(problem, q, 5), wanted, rtol=1e-9)


# ---- 10 -----------------------------------------------------------------------------------------

PARTICLES, ITERATIONS = 1000, 200
# Noise of the averaged moments in posterior sds: sqrt(lambda / (2 - lambda) / K) with lambda = 204^-0.6, about 0.005.
WITHIN = 0.025


def run(problem, iterations):
    state = init(problem)
    for _ in range(iterations):
        state, _ = step(problem, state)
    return state.q.proposals


@pytest.mark.parametrize("name", CONJUGATE)
def test_10_the_proposal_becomes_the_exact_posterior(name):
    case = CONJUGATE[name]
    options = {"q": {case.site: case.family}} if case.family else {}
    problem = problem_of(case.program, case.data, particles=PARTICLES, **options)
    (proposal,) = run(problem, ITERATIONS).values()
    if case.family is None:
        check_gaussian(proposal.joint, exact_joint(case, proposal.joint))
        return
    family = FAMILIES[type(case.family).__name__]
    found = family.standard_from_mean(proposal.families[case.site])
    want = torch_law(case.family, exact_law(case))
    got = torch_law(case.family, found)
    assert ((got.mean - want.mean).abs() / want.stddev).max() < WITHIN
    assert (got.stddev / want.stddev).log().abs().max() < WITHIN


def torch_law(like, values):
    return getattr(torch.distributions, type(like).__name__)(**values)


def check_gaussian(found, exact):
    full = exact.cov.ndim > exact.mean.ndim
    want, got = (j.cov if full else torch.diag_embed(j.cov) for j in (exact, found))
    sd = want.diagonal().sqrt()
    assert ((found.mean - exact.mean).abs() / sd).max() < WITHIN
    assert ((got - want).abs() / (sd[:, None] * sd)).max() < 2 * WITHIN


@model
def pair():
    a, b = latent("a", Normal(0.0, 1.0)), latent("b", Normal(0.0, 2.0))
    observe("y", Normal(a + b, 0.4))


@pytest.mark.parametrize(
    "groups", [[("a",), ("b",)], [("a", "b")]], ids=["two blocks", "one block"]
)
def test_10_product_proposals_reach_exact_marginals_and_not_the_mean_field_optimum(groups):
    precision = np.diag([1.0, 0.25]) + np.ones((2, 2)) / 0.16
    cov = np.linalg.inv(precision)
    mean = cov @ np.full(2, 1.5 / 0.16)
    exact, mean_field = np.sqrt(np.diag(cov)), 1 / np.sqrt(np.diag(precision))
    assert (exact > 2 * mean_field).all()
    problem = problem_of(pair, {"y": 1.5}, particles=300, groups=groups, joint_up_to=0)
    proposals = run(problem, ITERATIONS)
    found = np.concatenate([p.joint.mean.numpy() for p in proposals.values()])
    spread = np.concatenate([p.joint.cov.numpy() for p in proposals.values()]) ** 0.5
    assert np.abs((found - mean) / exact).max() < 0.05
    assert np.abs(np.log(spread / exact)).max() < 0.05
