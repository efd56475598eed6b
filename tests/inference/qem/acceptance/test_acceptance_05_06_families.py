"""Acceptance tests 5 and 6: conversions of every exponential family, and averages in central form."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from ppl.inference.numerics.expfam import FAMILIES
from ppl.inference.particles.moments import average, joint_moments
from ppl.inference.particles.proposals import Joint
from tests.inference.qem.acceptance.family_laws import LAWS, parameters

every_family = pytest.mark.parametrize("name", FAMILIES)
DECADES = np.logspace(-4, 4, 33)


def tensors(values):
    return {k: torch.as_tensor(v, dtype=torch.float64) for k, v in values.items()}


def raw_means(name, mean):
    """Expectations of the raw statistics: families in central form hold a covariance in second place."""
    mean = tuple(m.numpy() for m in mean)
    if name in ("Normal", "LogNormal"):
        return mean[0], mean[1] + mean[0] ** 2
    if name == "MultivariateNormal":
        return mean[0], mean[1] + mean[0][..., :, None] * mean[0][..., None, :]
    return mean


def test_05_every_family_has_a_law_to_be_checked_against():
    assert set(FAMILIES) == set(LAWS)


@every_family
def test_05_parameters_to_mean_parameters_and_back_over_eight_decades(name):
    law, family, rng = LAWS[name], FAMILIES[name], np.random.default_rng(0)
    for size in DECADES:
        given = tensors(parameters(law, size, rng))
        mean = family.mean_from_standard({**given, **tensors(law.fixed)})
        found = family.standard_from_mean(mean, **law.fixed)
        for key, value in given.items():
            torch.testing.assert_close(
                found[key],
                value,
                rtol=1e-6,
                atol=0,
                msg=lambda m, k=key, s=size: f"{k} at {s}: {m}",
            )


@every_family
def test_05_mean_parameters_agree_with_monte_carlo(name):
    """100000 draws of scipy at three sizes; within five standard errors."""
    law, family, rng, n = LAWS[name], FAMILIES[name], np.random.default_rng(1), 100_000
    for size in (0.3, 1.0, 5.0):
        given = parameters(law, size, rng)
        mean = raw_means(name, family.mean_from_standard(tensors({**given, **law.fixed})))
        z = law.draw(given, n, rng)
        for sample, expected in zip(law.statistics(z), mean, strict=True):
            error = sample.std(0) / np.sqrt(n) + 1e-12
            assert (np.abs(sample.mean(0) - expected) < 5 * error).all(), (size, name)


# ---- 6: averages ------------------------------------------------------------------------------


def exact(array) -> np.ndarray:
    """The same numbers as fractions, without rounding from here on."""
    return np.vectorize(Fraction, otypes=[object])(np.asarray(array, dtype=float))


def rational_average(law, batches, weights, steps):
    """The raw moments of weighted particles averaged in rational arithmetic."""
    total = None
    for z, w, lam in zip(batches, weights, steps, strict=True):
        w = exact(w)
        statistics = z if isinstance(z, tuple) else law.statistics(z)
        means = [np.tensordot(w, s if s.dtype == object else exact(s), 1) for s in statistics]
        lam = Fraction(lam)
        total = means if total is None else [(1 - lam) * a + lam * b for a, b in zip(total, means)]  # noqa: B905
    return total


def batches_of(name, rng, count=6, particles=8):
    """Particles of some iterations, and weights whose floating-point sum is one exactly."""
    law = LAWS[name]
    given = parameters(law, 1.3, rng)
    batches = [law.draw(given, particles, rng) for _ in range(count)]
    whole = [rng.multinomial(1 << 20, rng.dirichlet(np.ones(particles))) for _ in range(count)]
    return batches, [w / (1 << 20) for w in whole]


def code_average(name, batches, weights, steps):
    law, family, state = LAWS[name], FAMILIES[name], None
    for z, w, lam in zip(batches, weights, steps, strict=True):
        z = torch.as_tensor(z) if name == "Categorical" else torch.as_tensor(z, dtype=torch.float64)
        new = family.weighted_mean(z, torch.as_tensor(w), dim=0, **law.fixed)
        state = new if state is None else family.average(state, new, lam)
    return state


@every_family
def test_06_average_equals_the_raw_form_in_exact_arithmetic(name):
    rng = np.random.default_rng(2)
    batches, weights = batches_of(name, rng)
    steps = [1.0, 0.5, 0.25, 0.3, 0.1, 0.7]
    found = code_average(name, batches, weights, steps)
    wanted = rational_average(LAWS[name], batches, weights, steps)
    for value, expected in zip(raw_means(name, found), wanted, strict=True):
        np.testing.assert_allclose(value, np.asarray(expected, dtype=float), rtol=1e-12, atol=1e-13)


def central(wanted, vector: bool) -> np.ndarray:
    """Second central moment from raw moments, subtracted before any rounding."""
    first, second = wanted
    square = first[..., :, None] * first[..., None, :] if vector else first**2
    return np.asarray(second - square, dtype=float)


@pytest.mark.parametrize(
    "name, offset",
    [("Normal", 0.0), ("Normal", 1e3), ("Normal", 1e6), ("LogNormal", 0.0), ("LogNormal", 600.0)]
    + [("MultivariateNormal", o) for o in (0.0, 1e3, 1e6)],
)
def test_06_central_form_keeps_its_digits_far_from_zero(name, offset):
    """A posterior of spread 1 at ``offset``: rounded raw moments would lose ``offset^2`` ulps."""
    rng = np.random.default_rng(3)
    shape = (8, 3) if name == "MultivariateNormal" else (8,)
    u = [offset + rng.standard_normal(shape) for _ in range(6)]
    _, weights = batches_of(name, rng)
    steps = [1.0, 0.5, 0.25, 0.3, 0.1, 0.7]
    z = [np.exp(v) for v in u] if name == "LogNormal" else u
    coordinates = [np.log(v) for v in z] if name == "LogNormal" else z
    vector = name == "MultivariateNormal"
    statistics = []
    for v in map(exact, coordinates):
        statistics.append((v, v[..., :, None] * v[..., None, :] if vector else v * v))
    found = code_average(name, z, weights, steps)
    wanted = central(rational_average(None, statistics, weights, steps), vector)
    np.testing.assert_allclose(found[1].numpy(), wanted, rtol=1e-9, atol=1e-9)
    if offset == 1e6:  # what is avoided: the raw form in doubles
        raw = [(1.0 * w) @ (v.reshape(8, -1)[:, 0] ** 2) for w, v in zip(weights, u, strict=True)]
        first = [w @ v.reshape(8, -1)[:, 0] for w, v in zip(weights, u, strict=True)]
        a, b = raw[0], first[0]
        for r, f, lam in zip(raw[1:], first[1:], steps[1:], strict=True):
            a, b = (1 - lam) * a + lam * r, (1 - lam) * b + lam * f
        assert abs((a - b * b) / wanted.reshape(-1)[0] - 1) > 1e-6


@pytest.mark.parametrize("full", [False, True], ids=["product", "joint"])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6], ids=["at 0", "at 1e3", "at 1e6"])
def test_06_gaussian_blocks_average_in_central_form_too(offset, full):
    """The M-step of a block's Gaussian over six iterations, against raw moments in rational arithmetic."""
    rng = np.random.default_rng(4)
    free = [
        offset + rng.standard_normal((8, 2)) @ np.array([[1.0, 0.5], [0.0, 0.7]]) for _ in range(6)
    ]
    _, weights = batches_of("Normal", rng)
    steps, state = [1.0, 0.5, 0.25, 0.3, 0.1, 0.7], None
    start = Joint(
        torch.zeros(2).double(), torch.eye(2).double() if full else torch.ones(2).double()
    )
    for u, w, lam in zip(free, weights, steps, strict=True):
        new = joint_moments(start, torch.as_tensor(u), torch.as_tensor(w))
        state = new if state is None else average(state, new, lam, torch.tensor(True))
    raw = [(v, v[:, :, None] * v[:, None, :]) for v in map(exact, free)]
    first, second = rational_average(None, raw, weights, steps)
    cov = np.asarray(second - first[:, None] * first[None, :], dtype=float)
    np.testing.assert_allclose(state.mean.numpy(), np.asarray(first, dtype=float), rtol=1e-14)
    np.testing.assert_allclose(
        state.cov.numpy(), cov if full else np.diag(cov), rtol=1e-9, atol=1e-9
    )
