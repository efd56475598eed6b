"""Proposals with both signs: their density, the evidence that they give, and posteriors with two modes, against a grid."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from ppl import Bernoulli, HalfNormal, ModelError, Normal, infer, latent, model, observe, plate
from ppl.backend import Settings
from ppl.inference.particles import Mirrored, Prior
from ppl.inference.particles.estep import draw_all, evaluated, weigh
from ppl.inference.particles.proposals import Joint, Proposal
from ppl.inference.qem import QEM, init, prepare
from ppl.streams import Streams

BOTH = {("a", "b"): Mirrored(("a", "b"))}
Y = [1.1, 0.8, 1.3]


@model
def product():
    """Two numbers of which only the product is seen."""
    a = latent("a", Normal(0.0, 1.0))
    b = latent("b", Normal(0.0, 1.0))
    with plate("row"):
        observe("y", Normal(a * b, 0.3))


def grid():
    """Evidence, and the mean and the standard deviation of ``|a|``."""
    x = np.linspace(-5, 5, 1001)
    a, b = np.meshgrid(x, x, indexing="ij")
    density = stats.norm.pdf(a) * stats.norm.pdf(b)
    for y in Y:
        density = density * stats.norm.pdf(y, a * b, 0.3)
    total = density.sum() * 1e-4
    mean = (density * np.abs(a)).sum() * 1e-4 / total
    square = (density * a**2).sum() * 1e-4 / total
    return total, mean, math.sqrt(square - mean**2), math.sqrt(square)


def prepared(program, data, q, **options):
    settings = Settings(Streams(1), restarts=options.pop("restarts", 1))
    return prepare(program.bind(data), QEM(q=q, **options), settings)


def test_the_density_is_that_of_the_mixture():
    problem = prepared(product, {"y": Y}, BOTH, particles=7)
    cov = torch.tensor([[0.5, 0.2], [0.2, 0.4]], dtype=torch.float64)
    mean = torch.tensor([0.9, 1.2], dtype=torch.float64)
    q = init(problem).q._replace(proposals={"k:a+b": Proposal(Joint(mean, cov), {})})
    drawn = draw_all(problem.weighting, q, Streams(3))["k:a+b"]
    law = stats.multivariate_normal(mean.numpy(), cov.numpy())
    free = drawn.free.numpy()
    wanted = np.log(0.5 * law.pdf(free) + 0.5 * law.pdf(-free))
    np.testing.assert_allclose(drawn.log_q.numpy(), wanted, rtol=1e-10)
    signs = np.sign(free.sum(-1))
    assert abs(signs.sum()) <= 3  # every other particle is reflected


@pytest.mark.parametrize("particles", [1, 2, 3])
def test_evidence_is_unbiased(particles):
    """Whatever the Gaussian, and also where an odd number of particles cannot be halved."""
    count = 40_000
    problem = prepared(product, {"y": Y}, BOTH, particles=particles, restarts=count)
    cov = torch.tensor([[0.6, 0.0], [0.0, 0.5]], dtype=torch.float64).expand(count, 2, 2)
    mean = torch.tensor([0.9, 0.7], dtype=torch.float64).expand(count, 2)
    q = init(problem).q._replace(proposals={"k:a+b": Proposal(Joint(mean, cov), {})})
    drawn = draw_all(problem.weighting, q, Streams(3))
    z = weigh(evaluated(problem, problem.weighting, drawn, q)).log_z.exp()
    error = (float(z.mean()) - grid()[0]) / (float(z.std()) / math.sqrt(count))
    assert abs(error) < 4


def test_both_modes_are_found():
    """Where one Gaussian keeps one of them, and takes its mean for that of the posterior."""
    found = infer(product, {"y": Y}, q=BOTH, method="qem", seed=0)
    total, magnitude, spread, sd = grid()
    draws = found.samples(20_000, seed=1)
    assert float(found.mean("a")) == pytest.approx(0.0, abs=0.06)
    assert float(found.sd("a")) == pytest.approx(sd, rel=0.03)
    assert float(draws["a"].abs().mean()) == pytest.approx(magnitude, abs=0.05 * spread)
    assert float((draws["a"] > 0).double().mean()) == pytest.approx(0.5, abs=0.04)
    assert bool((draws["a"] * draws["b"] > -0.5).all())  # signs agree
    assert found.log_evidence.value == pytest.approx(math.log(total), abs=0.02)


@model
def units():
    """Units that follow what they have in common, and a number of their own."""
    middle = latent("middle", Normal(0.0, 1.0))
    with plate("unit"):
        effect = latent("effect", Normal(middle, 0.8))
        level = latent("level", Normal(0.0, 0.7))
        observe("y", Normal(effect + level, 0.5))


def test_a_block_of_laws_and_a_gaussian():
    """Evidence of particles that share an index, some of them from their own law; unbiased, and exact in the limit."""
    y, count = [0.5, -0.2], 20_000
    cov = np.ones((2, 2)) + (0.64 + 0.49 + 0.25) * np.eye(2)
    exact = stats.multivariate_normal(np.zeros(2), cov).logpdf(y)
    q = {("effect", "level"): Prior(of="effect")}
    problem = prepared(units, {"y": y}, q, particles=2, restarts=count)
    state = init(problem)
    assert state.q.proposals["k:effect+level"].joint.mean.shape == (count, 2, 1)
    drawn = draw_all(problem.weighting, state.q, Streams(3))
    z = weigh(evaluated(problem, problem.weighting, drawn, state.q)).log_z.exp()
    error = (float(z.mean()) - math.exp(exact)) / (float(z.std()) / math.sqrt(count))
    assert abs(error) < 4
    found = infer(units, {"y": y}, q=q, method="qem", seed=0)
    assert found.log_evidence.value == pytest.approx(exact, abs=0.02)


@model
def scale():
    size = latent("size", HalfNormal(1.0))
    flag = latent("flag", Bernoulli(0.5))
    observe("y", Normal(flag * size, 1.0))


@pytest.mark.parametrize(
    ("program", "q", "message"),
    [
        (product, {("a", "b"): Mirrored(("a", "c"))}, "'c' is not in the block"),
        (product, {("a", "b"): Prior(of="y")}, "'y' is not in the block"),
        (scale, {"size": Mirrored("size")}, "'size' does not take all real values"),
        (product, {"a": Mirrored("a", index="nested")}, "expected 'permutation'"),
    ],
)
def test_what_cannot_be_is_refused(program, q, message):
    data = {"y": Y} if program is product else {"y": 0.5}
    with pytest.raises(ModelError, match=message):
        prepare(program.bind(data), QEM(q=q), Settings(Streams(0)))


def test_nothing_to_flip():
    with pytest.raises(ModelError, match="at least one latent"):
        Mirrored(())
