"""Steps without autograd: what they leave is as good as ever, and the same."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import constraints

from ppl import Bernoulli, HalfNormal, Markov, Normal, latent, model, observe, param, plate
from ppl.backend import Settings
from ppl.inference.particles.estep import draw_all, evaluated, weigh
from ppl.inference.qem import QEM, init, kernel, posterior, prepare, step
from ppl.streams import Streams

DATA = {"y": torch.linspace(-1.0, 2.0, 5, dtype=torch.float64)}


@model
def centres() -> None:
    m = latent("m", Normal(0.0, 1.0))
    s = latent("s", HalfNormal(1.0))
    with plate("i"):
        x = latent("x", Normal(m, s))
        observe("y", Normal(x, 0.5))


@model
def walk() -> None:
    with plate("i", ordered=True):
        x = latent("x", Markov(Normal(0.0, 1.0), lambda last: Normal(last, 1.0)))
        observe("y", Normal(x, 0.5))


@model
def scaled() -> None:
    s = param("s", 1.0, support=constraints.positive)
    with plate("i"):
        x = latent("x", Normal(0.0, s))
        observe("y", Normal(x, 0.5))


@model
def coins() -> None:
    with plate("i"):
        z = latent("z", Bernoulli(0.5))
        observe("y", Normal(z, 0.5))


def made(program, **options):
    return prepare(program.bind(DATA), QEM(particles=10, **options), Settings(Streams(0)))


def tensors(state):
    for proposal in state.q.proposals.values():
        yield from proposal.joint or ()
        for family in proposal.families.values():
            yield from family


@pytest.mark.parametrize("program", [centres, walk, coins])
def test_a_step_leaves_tensors_that_autograd_takes(program):
    problem = made(program)
    state = init(problem)
    for _ in range(3):
        state, _ = step(problem, state)
    for t in tensors(state):
        assert not t.is_inference()
        assert t.clone().requires_grad_().square().sum().requires_grad
    assert posterior(problem, state).log_evidence is not None


def test_steps_with_and_without_autograd_are_the_same():
    problems = [made(centres), made(centres)]
    states = [init(p) for p in problems]
    assert problems[0].weighting.takes_no_gradients
    for _ in range(3):
        states[0], _ = step(problems[0], states[0])
        states[1], _ = kernel._step(problems[1], states[1])
    for a, b in zip(*map(tensors, states), strict=True):
        assert torch.equal(a, b)


def test_learned_params_take_gradients():
    problem = made(scaled)
    state = init(problem)
    before = state.q.params["s"].free.clone()
    state, _ = step(problem, state)
    assert not torch.equal(state.q.params["s"].free, before)


@pytest.mark.parametrize("program", [centres, walk])
def test_weights_in_inference_mode_are_the_same(program):
    problem = made(program)
    q = init(problem).q
    here = evaluated(problem, problem.weighting, draw_all(problem.weighting, q, Streams(1)), q)
    plain = weigh(here)
    with torch.inference_mode():
        drawn = draw_all(problem.weighting, q, Streams(1))
        found = weigh(evaluated(problem, problem.weighting, drawn, q))
    assert torch.equal(plain.log_z, found.log_z)
    for axis, w in plain.marginals.items():
        assert torch.allclose(w, found.marginals[axis], rtol=1e-13, atol=0)
