"""Bounds and their gradients: tighter with particles, tighter still in parallel, and the same gradient by both estimators."""

from __future__ import annotations

import pytest
import torch

from ppl import VI, HalfNormal, Normal, latent, model, observe, plate
from ppl.backend import Settings
from ppl.inference.vi import kernel, results
from ppl.inference.vi.estimators import ESTIMATORS
from ppl.streams import Streams

DATA = {"y": [1.0, 0.2, -0.5, 2.2, 0.9]}


@model
def schools():
    centre, spread = latent("centre", Normal(0.0, 1.0)), latent("spread", HalfNormal(1.0))
    with plate("school"):
        effect = latent("effect", Normal(centre, spread))
        observe("y", Normal(effect, 0.8))


def made(restarts=1, **options):
    settings = Settings(Streams(0), restarts=restarts, max_iters=100)
    problem = kernel.prepare(schools.bind(DATA), VI(start="standard", **options), settings)
    return problem, kernel.init(problem)


def bounds(repeats=60, **options):
    problem, state = made(draws=50, **options)
    return torch.cat([results._bounds(problem, state) for _ in range(repeats)])


def test_particles_tighten_the_bound_and_parallel_ones_more():
    elbo, plain = bounds(), bounds(particles=5)
    parallel = bounds(particles=5, parallel=True)
    for worse, better in ((elbo, plain), (plain, parallel)):
        error = (worse.var() / len(worse) + better.var() / len(better)).sqrt()
        assert float(better.mean() - worse.mean()) > 4 * float(error)


def test_one_parallel_particle_is_the_plain_elbo():
    one, elbo = bounds(particles=1, parallel=True), bounds()
    error = (one.var() / len(one) + elbo.var() / len(elbo)).sqrt()
    assert abs(float(one.mean() - elbo.mean())) < 4 * float(error)


def gradients(estimator, repeats=60, tempering=1.0, **options):
    """Gradients ``[repeats, P]`` at the first state: what SGD with rate one adds in its first step."""
    problem, state = made(
        draws=100, optimiser="sgd", learning_rate=1.0, settle=False, estimator=estimator, **options
    )
    step = ESTIMATORS[estimator]
    found = [step(problem, state, tempering)[0].theta - state.ascent.theta for _ in range(repeats)]
    return torch.cat(found)


@pytest.mark.parametrize("tempering", [1.0, 0.4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"family": "full_rank"},
        {"family": "low_rank", "rank": 2},
        {"particles": 4},
        {"particles": 4, "parallel": True},
        {"particles": 4, "parallel": True, "family": "full_rank"},
    ],
    ids=str,
)
def test_both_gradients_have_the_same_mean(options, tempering):
    a, b = (gradients(e, tempering=tempering, **options) for e in ("pathwise", "total"))
    error = ((a.var(0) + b.var(0)) / len(a)).sqrt() + 1e-12
    # The largest of some dozens of standardised differences.
    assert float(((a.mean(0) - b.mean(0)) / error).abs().max()) < 4.5


def test_draws_of_restarts_do_not_mix():
    problem, state = made(restarts=3, particles=4, parallel=True, draws=2)
    moved, bound = ESTIMATORS["pathwise"](problem, state, 1.0)
    assert bound.shape == (3,) and moved.theta.shape == state.ascent.theta.shape
    apart = state.ascent.theta.clone()
    apart[0] += 1.0
    problem, _ = made(restarts=3, particles=4, parallel=True, draws=2)
    other = state._replace(ascent=state.ascent._replace(theta=apart))
    again, _ = ESTIMATORS["pathwise"](problem, other, 1.0)
    assert not torch.allclose(again.second[0], moved.second[0])
    assert torch.allclose(again.second[1:], moved.second[1:], rtol=1e-9)
