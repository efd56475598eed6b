"""Gaussian sites: closed forms of regressions by groups, unbiased evidence, units, and what cannot have them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from ppl import (
    Bernoulli,
    Gamma,
    ModelError,
    Normal,
    given,
    latent,
    model,
    observe,
    plate,
)
from ppl.backend import Settings
from ppl.inference.particles import Sites, Skewed, picked
from ppl.inference.particles.estep import draw_all, evaluated, weigh
from ppl.inference.particles.problem import describe
from ppl.inference.particles.proposals import Joint, Proposal
from ppl.inference.particles.skewed import _map
from ppl.inference.qem import QEM, init, prepare, step
from ppl.streams import Streams
from tests.quiet import quiet_fit

GROUPS, ROWS, SIZE, NOISE = 4, 2, 3, 0.7
SPREAD = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
_RNG = np.random.default_rng(0)
X, Y = _RNG.normal(size=(GROUPS, ROWS, SIZE)), _RNG.normal(size=(GROUPS, ROWS))
DATA = {"x": X, "y": Y}
HALVES = {"x": X, "y": (Y > 0).astype(float)}


@model
def regressions(unit: float = 1.0):
    """Coefficients of groups around a common vector; ``unit`` is that of the coefficients."""
    mid = latent("mid", Normal(0.0, unit), shape=SIZE)
    with plate("group"):
        weight = latent("weight", Normal(mid, unit * SPREAD))
        with plate("row"):
            observe("y", Normal((weight * given("x")).sum(-1) / unit, NOISE))


@model
def choices(size: int = SIZE):
    """The same with a learned spread, and observations of zero or one."""
    mid = latent("mid", Normal(0.0, 1.0), shape=size)
    spread = latent("spread", Normal(0.0, 0.5), shape=size)
    with plate("group"):
        weight = latent("weight", Normal(mid, spread.exp()))
        with plate("row"):
            observe("y", Bernoulli(logits=(weight * given("x")).sum(-1)))


def covariance() -> np.ndarray:
    """Prior covariance of all coefficients."""
    same = np.kron(np.ones((GROUPS, GROUPS)), np.eye(SIZE))
    return same + np.kron(np.eye(GROUPS), np.diag(SPREAD.numpy() ** 2))


def design() -> np.ndarray:
    """The rows of all groups, over all coefficients."""
    rows = np.zeros((GROUPS * ROWS, GROUPS * SIZE))
    for g in range(GROUPS):
        rows[ROWS * g : ROWS * (g + 1), SIZE * g : SIZE * (g + 1)] = X[g]
    return rows


def exact() -> float:
    """Log evidence of the regressions."""
    a = design()
    law = stats.multivariate_normal(
        np.zeros(len(a)), a @ covariance() @ a.T + NOISE**2 * np.eye(len(a))
    )
    return float(law.logpdf(Y.reshape(-1)))


def at_likelihood(program, data, share=1.0, restarts=0, dtype=torch.float64, **counts):
    """A problem with the prior as the proposal of the common vector, and a share of the likelihood as sites."""
    sizes = {"mid": 2, "weight": 2} | counts
    options = QEM(q={"weight": Sites()}, particles=sizes)
    settings = Settings(Streams(1), restarts=max(restarts, 1))
    problem = prepare(program.bind(data, dtype=dtype), options, settings)
    lead = problem.weighting.lead
    x, y = torch.tensor(X, dtype=dtype), torch.tensor(Y, dtype=dtype)
    curvature = share * torch.einsum("grd,gre->gde", x, x) / NOISE**2
    slope = share * torch.einsum("grd,gr->gd", x, y) / NOISE**2
    site = [t.expand(*lead, *t.shape) for t in (slope, curvature, torch.zeros_like(slope))]
    prior = Joint(
        *(
            t.expand(*lead, *t.shape).clone()
            for t in (torch.zeros(SIZE, dtype=dtype), torch.eye(SIZE, dtype=dtype))
        )
    )
    proposals = {"k:mid": Proposal(prior, {}), "k:weight": Proposal(None, {"weight": tuple(site)})}
    return problem, init(problem).q._replace(proposals=proposals)


def weighed(problem, q, seed=3):
    drawn = draw_all(problem.weighting, q, Streams(seed))
    return drawn, weigh(evaluated(problem, problem.weighting, drawn, q))


@pytest.mark.parametrize(("share", "own"), [(1.0, 2), (0.5, 2), (1.5, 3)])
def test_the_evidence_is_unbiased(share, own):
    """All particles of the parents share an element's noise, in antithetic pairs; an odd one stands alone."""
    problem, q = at_likelihood(regressions, DATA, share, restarts=20_000, weight=own)
    ratio = (weighed(problem, q)[1].log_z - exact()).exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / math.sqrt(len(ratio))


def test_the_site_of_a_gaussian_likelihood_leaves_no_noise():
    """Weights of nested particles are equal, and the evidence given each common vector is exact."""
    problem, q = at_likelihood(regressions, DATA, mid=5, weight=4)
    drawn, found = weighed(problem, q)
    own = found.marginals["k:weight"].unflatten(-1, (5, 4))
    assert torch.allclose(own, own[..., :1].expand_as(own), rtol=1e-9)
    a, middle = design(), drawn["k:mid"].values["mid"].numpy()
    cov = a @ np.kron(np.eye(GROUPS), np.diag(SPREAD.numpy() ** 2)) @ a.T + NOISE**2 * np.eye(
        len(a)
    )
    logs = [
        stats.multivariate_normal(a @ np.tile(m, GROUPS), cov).logpdf(Y.reshape(-1)) for m in middle
    ]
    assert float(found.log_z) == pytest.approx(np.logaddexp.reduce(logs) - math.log(5), abs=1e-9)


def test_the_sites_of_a_gaussian_likelihood_are_learned():
    options = QEM(q={"weight": Sites()}, particles={"mid": 40, "weight": 4})
    problem = prepare(regressions.bind(DATA), options, Settings(Streams(0)))
    state = init(problem)
    for _ in range(40):
        state, _ = step(problem, state)
    slope, curvature, _ = state.q.proposals["k:weight"].families["weight"]
    x, y = torch.tensor(X), torch.tensor(Y)
    assert torch.allclose(
        curvature, torch.einsum("grd,gre->gde", x, x) / NOISE**2, rtol=1e-3, atol=1e-3
    )
    assert torch.allclose(slope, torch.einsum("grd,gr->gd", x, y) / NOISE**2, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("restarts", [1, 2])
def test_posterior_and_joint_draws_are_right(restarts):
    found = quiet_fit(regressions, DATA, q={"weight": Sites()}, restarts=restarts)
    assert found.log_evidence.value == pytest.approx(exact(), abs=0.05)
    a, prior = design(), covariance()
    gain = prior @ a.T @ np.linalg.inv(a @ prior @ a.T + NOISE**2 * np.eye(len(a)))
    mean, cov = (gain @ Y.reshape(-1)).reshape(GROUPS, SIZE), prior - gain @ a @ prior
    sd = np.sqrt(np.diag(cov)).reshape(GROUPS, SIZE)
    np.testing.assert_allclose((found.mean("weight").numpy() - mean) / sd, 0, atol=0.15)
    np.testing.assert_allclose(np.log(found.sd("weight").numpy() / sd), 0, atol=0.15)
    drawn = found.samples(4000, seed=1)["weight"].numpy().reshape(4000, -1)
    assert np.abs(np.corrcoef(drawn.T) - cov / np.outer(sd, sd)).max() < 0.15


def test_units_do_not_matter():
    """Coefficients in thousandths: the same weights and the same sites, rescaled."""
    made = []
    for unit in (1.0, 1000.0):
        options = QEM(q={"weight": Sites()}, particles={"mid": 30, "weight": 4})
        problem = prepare(regressions(unit).bind(DATA), options, Settings(Streams(0)))
        state = init(problem)
        for _ in range(5):
            state, info = step(problem, state)
        made.append((state.q.proposals, info.metrics["ess"], unit))
    (first, ess, _), (second, other, unit) = made
    assert ess == pytest.approx(other, rel=1e-6)
    slope, curvature, centre = first["k:weight"].families["weight"]
    for left, right, power in zip(
        (slope, curvature, centre), second["k:weight"].families["weight"], (1, 2, -1), strict=True
    ):
        assert torch.allclose(left, right * unit**power, rtol=1e-6, atol=1e-9)


def test_the_same_seed_gives_the_same_answer_in_single_precision_too():
    options = QEM(q={"weight": Sites()}, particles={"mid": 30, "weight": 4})
    for dtype in (torch.float64, torch.float32):
        ends = []
        for _ in range(2):
            problem = prepare(choices.bind(HALVES, dtype=dtype), options, Settings(Streams(0)))
            state = init(problem)
            for _ in range(4):
                state, _ = step(problem, state)
            ends.append(state.q.proposals["k:weight"].families["weight"])
        assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(*ends, strict=True))


def test_a_step_leaves_its_state_alone():
    """A run may go on from any state, as one that was saved."""
    options = QEM(q={"weight": Sites()}, particles={"mid": 30, "weight": 4})
    problem = prepare(choices.bind(HALVES), options, Settings(Streams(0)))
    state, _ = step(problem, init(problem))
    before = [t.clone() for t in state.q.proposals["k:weight"].families["weight"]]
    step(problem, state)
    after = state.q.proposals["k:weight"].families["weight"]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def many(groups=30, size=14):
    """Choices of groups with more coefficients than a joint Gaussian takes within plates."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(groups, 6, size)) / 2
    weight = 0.5 + rng.normal(size=(groups, 1, size))
    return {"x": x, "y": (rng.random((groups, 6)) < 1 / (1 + np.exp(-(weight * x).sum(-1)))) * 1.0}


def test_long_vectors_get_sites_by_themselves_and_explain_says_so():
    data = many(groups=5)
    problem = prepare(choices(14).bind(data), QEM(), Settings(Streams(0)))
    forms = {b.names: b.form for b in problem.blocks}
    assert forms == {("mid", "spread"): Skewed(), ("weight",): Sites()}
    assert "weight (4 each, by sites)" in describe(
        choices(14).bind(data), QEM(), Settings(Streams(0))
    )
    assert not problem.weighting.takes_no_gradients


@pytest.mark.parametrize(
    "options",
    [{"joint_up_to": 0}, {"bridge": False}, {"particles": 10}, {"q": {"weight": "Normal"}}],
)
def test_what_is_asked_for_keeps_sites_away(options):
    problem = prepare(choices(14).bind(many(groups=5)), QEM(**options), Settings(Streams(0)))
    assert all(b.form is None for b in problem.blocks)


def test_short_vectors_get_none():
    problem = prepare(choices.bind(HALVES), QEM(), Settings(Streams(0)))
    assert all(b.form is None for b in problem.blocks)


@model
def of_rates():
    rate = latent("mid", Normal(0.0, 1.0), shape=SIZE)
    with plate("group"):
        weight = latent("weight", Gamma(2.0, rate.exp()))
        with plate("row"):
            observe("y", Normal((weight * given("x")).sum(-1), NOISE))


@model
def of_noise():
    mid = latent("mid", Normal(0.0, 1.0), shape=SIZE)
    with plate("group"):
        weight = latent("weight", Normal(mid, 1.0))
        own = latent("own", Gamma(2.0, 2.0))
        with plate("row"):
            observe("y", Normal((weight * given("x")).sum(-1), own))


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        (of_rates, {}, "no Normal law"),
        (of_noise, {}, "'y' is not an observation of 'weight'"),
        (choices, {"groups": [("mid",), ("spread",)]}, "not one block"),
        (regressions, {"q": {"mid": Sites()}}, "not one block"),
        (regressions, {"q": {"weight": Sites(index="permutation")}}, "expected 'nested'"),
    ],
)
def test_what_cannot_have_sites_is_refused_in_words(program, options, message):
    data = HALVES if program is choices else DATA
    with pytest.raises(ModelError, match=message):
        prepare(
            program.bind(data), QEM(**{"q": {"weight": Sites()}, **options}), Settings(Streams(0))
        )


# ---- skewed marginals -------------------------------------------------------------------------------------------


@model
def alone():
    latent("a", Normal(torch.tensor([1.0, -2.0], dtype=torch.float64), 1.0))


def test_a_skewed_proposal_has_its_moments_and_its_density_integrates_to_one():
    problem = prepare(
        alone.bind({}), QEM(q={"a": Skewed()}, particles=400_000), Settings(Streams(0))
    )
    cov = torch.tensor([[4.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    skew = torch.tensor([-0.6, 0.3], dtype=torch.float64)
    state = Proposal(Joint(torch.tensor([3.0, 5.0], dtype=torch.float64), cov), {}, None, skew)
    q = init(problem).q._replace(proposals={"k:a": state})
    drawn = draw_all(problem.weighting, q, Streams(1))["k:a"]
    free = drawn.free
    apart = (free - free.mean(0)) / free.std(0)
    assert torch.allclose(free.mean(0), state.joint.mean, atol=0.02)
    assert torch.allclose(free.std(0), state.joint.sd, rtol=0.01)
    assert torch.allclose((apart**3).mean(0), skew, atol=0.03)
    other = torch.distributions.MultivariateNormal(state.joint.mean, cov / 2)
    assert float((other.log_prob(free) - drawn.log_q).exp().mean()) == pytest.approx(1, abs=0.01)


def test_no_skewness_is_the_gaussian_itself():
    made = _map(torch.zeros(2, dtype=torch.float64))
    assert torch.equal(made.shift, torch.zeros(2, dtype=torch.float64)) and torch.equal(
        made.sd, torch.ones(2, dtype=torch.float64)
    )


# ---- the last weighting ------------------------------------------------------------------------------------------


def test_powers_of_weights_are_those_of_a_tempered_weighting():
    problem, q = at_likelihood(regressions, DATA, 0.5, mid=6, weight=4)
    drawn = draw_all(problem.weighting, q, Streams(3))
    here = evaluated(problem, problem.weighting, drawn, q)
    above = picked.parent(problem.weighting)
    full, half = weigh(here).marginals, weigh(here, 0.5, inner=1.0).marginals
    powers = picked.powered(problem.weighting, above, full, 0.5)
    for axis, weights in half.items():
        assert torch.allclose(powers[axis], weights, rtol=1e-9)


@pytest.mark.slow
def test_choices_of_many_groups_come_near_the_posterior():
    """Against importance sampling from the same program with many more particles."""
    data = many()
    found = quiet_fit(choices(14), data)
    more = {"particles": {"mid": 224, "weight": 20}, "replicates": 40}
    long = quiet_fit(choices(14), data, seed=7, q={"weight": Sites()}, **more)
    for name in ("mid", "spread", "weight"):
        sd = long.sd(name)
        assert float(((found.mean(name) - long.mean(name)) / sd).abs().mean()) < 0.1
        assert float((found.sd(name) / sd).log().abs().mean()) < 0.1
