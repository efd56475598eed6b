"""Exponents of the weights, outside plates and within them."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch

from ppl import Bernoulli, Categorical, Markov, Normal, given, infer, latent, model, observe, plate
from ppl.backend import Settings
from ppl.inference.contract import Chain, Layout, LogFactor, PlateSpec, make_plan
from ppl.inference.particles.estep import draw_all, evaluated, weigh
from ppl.inference.particles.moments import followed
from ppl.inference.particles.problem import prepare_particles
from ppl.inference.particles.proposals import Joint
from ppl.inference.particles.start import first_approximation
from ppl.inference.particles.tempering import Exponents, largest_exponents, may_differ
from ppl.inference.qem import QEM
from ppl.streams import Streams

POWER = 0.3
STAY = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)


@pytest.fixture
def planned():
    """A factor of a root axis, and one of it and an axis within a plate."""
    generator = torch.Generator().manual_seed(0)
    outer = 2 * torch.randn(4, generator=generator, dtype=torch.float64)
    inner = 2 * torch.randn((3, 4, 5), generator=generator, dtype=torch.float64)
    layout = Layout({"p": PlateSpec("p", 3, {})}, {"a": 4, "b": 5}, {"a": (), "b": ("p",)}, (), ())
    factors = [LogFactor(("a",), outer), LogFactor(("p", "a", "b"), inner)]
    plan = make_plan([f.axes for f in factors], layout)
    root = (outer + POWER * inner.logsumexp(-1).sum(0)).softmax(0)
    within = torch.einsum("a,pab->pb", root, inner.softmax(-1))
    pairs = torch.einsum("a,pab->pab", root, inner.softmax(-1))
    return plan, factors, root, within, pairs


def test_a_power_tempers_what_plates_say_and_not_what_happens_in_them(planned):
    plan, factors, root, within, pairs = planned
    _, found = plan.marginals(factors, [("a", "b")], power=POWER)
    torch.testing.assert_close(found["a"], root, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found["b"], within, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found["a", "b"], pairs, rtol=1e-12, atol=1e-14)


def test_draws_follow_the_tempered_weights(planned):
    plan, factors, root, within, _ = planned
    n = 40_000
    drawn = plan.draw(factors, n, torch.Generator().manual_seed(1), power=POWER)
    shares = torch.bincount(drawn["a"], minlength=4) / n
    assert float((shares - root).abs().max()) < 4 * (0.25 / n) ** 0.5
    for p in range(3):
        shares = torch.bincount(drawn["b"][:, p], minlength=5) / n
        assert float((shares - within[p]).abs().max()) < 4 * (0.25 / n) ** 0.5


@pytest.fixture
def chained():
    """A root axis of four, and a chain of two states over three times that reads it; sums by enumeration."""
    g = torch.Generator().manual_seed(2)
    outer = torch.randn(4, generator=g, dtype=torch.float64)
    first = torch.randn((4, 2), generator=g, dtype=torch.float64)
    seen = 2 * torch.randn((3, 4, 2), generator=g, dtype=torch.float64)
    move = torch.randn((2, 2), generator=g, dtype=torch.float64)
    layout = Layout(
        {"t": PlateSpec("t", 3)},
        {"a": 4, "z": 2},
        {"a": (), "z": ("t",)},
        (Chain("t", "z", "z'"),),
        (),
    )
    factors = [
        LogFactor(("a",), outer),
        LogFactor(("a", "z"), first),
        LogFactor(("t", "a", "z"), seen),
        LogFactor(("z'", "z"), move),
    ]
    scopes, plates = [f.axes for f in factors], [(), (), ("t",), ("t",)]
    paths = {
        z: first[:, z[0]]
        + sum(seen[t, :, z[t]] for t in range(3))
        + move[z[0], z[1]]
        + move[z[1], z[2]]
        for z in itertools.product(range(2), repeat=3)
    }
    total = torch.stack(list(paths.values())).logsumexp(0)
    root = (outer + POWER * total).softmax(0)
    states = torch.zeros((3, 2), dtype=torch.float64)
    for z, log in paths.items():
        for t in range(3):
            states[t, z[t]] += (root * (log - total).exp()).sum()
    return make_plan(scopes, layout, plates_of=plates), factors, root, states


def test_a_power_tempers_the_sum_over_all_paths_of_a_chain(chained):
    plan, factors, root, states = chained
    _, found = plan.marginals(factors, power=POWER)
    torch.testing.assert_close(found["a"], root, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found["z"], states, rtol=1e-12, atol=1e-14)
    n = 40_000
    drawn = plan.draw(factors, n, torch.Generator().manual_seed(1), power=POWER)
    assert float((torch.bincount(drawn["a"], minlength=4) / n - root).abs().max()) < 0.01
    assert float((drawn["z"].double().mean(0) - states[:, 1]).abs().max()) < 0.01


@model
def switching():
    level = latent("level", Normal(0.0, 1.0), shape=2)
    with plate("time", ordered=True):
        z = latent("z", Markov(Categorical([0.5, 0.5]), lambda last: Categorical(STAY[last])))
        observe("y", Normal(level[z], 0.5))


def test_enumerated_states_are_summed_before_they_are_tempered():
    y = torch.tensor([0.4, -0.1, 1.3, 1.0], dtype=torch.float64)
    bound = switching.bind({"y": y}, dtype=torch.float64)
    problem = prepare_particles(bound, QEM(particles=6), Settings(Streams(0)), 1)
    weighting, q = problem.weighting, first_approximation(problem)
    drawn = draw_all(weighting, q, Streams(3))
    assert may_differ(weighting)
    found = weigh(evaluated(problem, weighting, drawn, q), POWER, inner=1.0).marginals
    (block,) = [b for b in problem.blocks if not b.enumerated]
    level, log_q = drawn[block.axis].values["level"], drawn[block.axis].log_q
    message = 0.5 * torch.ones(2, dtype=torch.float64)
    seen = torch.distributions.Normal(level, 0.5).log_prob(y[:, None, None]).exp()  # [t, K, z]
    message = message * seen[0]
    for t in range(1, 4):
        message = (message @ STAY) * seen[t]
    log = torch.distributions.Normal(0.0, 1.0).log_prob(level).sum(-1) + message.sum(-1).log()
    want = (POWER * (log - log_q)).softmax(-1)
    torch.testing.assert_close(found[block.axis], want, rtol=1e-10, atol=1e-12)


def test_exponents_are_powers_of_the_root_of_two_so_that_doubling_leads_to_one():
    y = torch.linspace(-40.0, 60.0, 50, dtype=torch.float64)
    problem = prepare_particles(
        switching.bind({"y": y}, dtype=torch.float64), QEM(particles=30), Settings(Streams(0)), 1
    )
    q = first_approximation(problem)
    here = evaluated(problem, problem.weighting, draw_all(problem.weighting, q, Streams(1)), q)
    found, weights = largest_exponents(here, Exponents(), 0.12, True)
    roots = 2 * math.log2(found.outside)
    assert roots < 0 and abs(roots - round(roots)) < 1e-9 and found.within == 1.0
    if round(roots) % 2 == 0:
        assert found.outside == 2.0 ** round(roots / 2)
    (w,) = (weights.marginals[b.axis] for b in problem.blocks if not b.enumerated)
    assert float((1 / w.square().sum(-1) - 1) / 29) >= 0.12


def test_a_spread_that_follows_keeps_the_way_of_the_mean():
    eye = torch.eye(2, dtype=torch.float64)
    old, new = (
        Joint(torch.zeros(2).double(), eye),
        Joint(torch.tensor([3.0, 0.0]).double(), 0.1 * eye),
    )
    found = followed(old, new, 0.8, 0.4, None)
    apart = torch.tensor([[9.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(found.mean, 0.8 * new.mean)
    torch.testing.assert_close(found.cov, 0.6 * eye + 0.4 * (new.cov + apart))


@model
def many_slopes(n: int = 60):
    slopes = latent("slopes", Normal(0.0, 3.0), shape=n)
    with plate("row"):
        observe("y", Bernoulli(logits=(slopes * given("x")).sum(-1)))


def test_too_few_effective_particles_soften_the_last_weights_and_say_so():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((200, 60), generator=generator, dtype=torch.float64)
    y = (torch.rand(200, generator=generator) < 0.5).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = infer(
            many_slopes, {"x": x, "y": y}, method="qem", seed=0, max_iters=3, final_particles=100
        )
    outside, within = posterior.diagnostics.notes["exponents of the last weights"]
    assert 0 < outside < 1 and within == 1.0  # the only latent lies outside all plates
    assert any("tempered" in w for w in posterior.diagnostics.warnings)
    # The diagnostics are those of the posterior's own weights.
    assert float(posterior.diagnostics.ess["slopes"].min()) < 40
    points = posterior.marginals["slopes"]
    assert float((1 / points.weights.square().sum(0)).min()) > 40
    drawn = posterior.samples(2000, seed=0)["slopes"]
    spread = posterior.sd("slopes")
    assert float(((drawn.mean(0) - posterior.mean("slopes")) / spread).abs().max()) < 0.5
