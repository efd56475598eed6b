"""Identities that hold for every exponential family, and the borders of their parameters."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from ppl.inference.numerics.expfam import FAMILIES

# The learned parameters of a family over eight decades; (low, high) exponents of ten.
WIDE = (-4.0, 4.0)
FIXED = {
    "Laplace": {"loc": 0.7},
    "Weibull": {"concentration": 1.5},
    "Pareto": {"scale": 2.0},
    "Binomial": {"total_count": 7},
    "NegativeBinomial": {"total_count": 4},
    "Multinomial": {"total_count": 6},
    "Categorical": {"categories": 3},
}
POSITIVE = {
    "HalfNormal": ["scale"],
    "Exponential": ["rate"],
    "Laplace": ["scale"],
    "Weibull": ["scale"],
    "Pareto": ["alpha"],
    "Gamma": ["concentration", "rate"],
    "InverseGamma": ["concentration", "rate"],
    "Chi2": ["df"],
    "Beta": ["concentration1", "concentration0"],
    "Poisson": ["rate"],
}


def standard(name: str, n: int, decades: tuple[float, float] = WIDE) -> dict:
    """``n`` random laws of a family, float64, log-uniform over ``decades``."""
    low, high = decades

    def positive(*shape: int) -> torch.Tensor:
        return 10 ** (low + (high - low) * torch.rand(n, *shape, dtype=torch.float64))

    def signed(*shape: int) -> torch.Tensor:
        return positive(*shape) * torch.randn(n, *shape, dtype=torch.float64).sign()

    if name in POSITIVE:
        law = {key: positive() for key in POSITIVE[name]}
    elif name in ("Normal", "LogNormal"):
        law = {"loc": signed(), "scale": positive()}
    elif name == "MultivariateNormal":
        lower = torch.randn(n, 3, 3, dtype=torch.float64).tril(-1) + 2 * torch.eye(3)
        law = {"loc": signed(3), "scale_tril": positive(1, 1) * lower}
    elif name == "Dirichlet":
        law = {"concentration": positive(4)}
    elif name == "VonMises":
        angle = (2 * torch.rand(n, dtype=torch.float64) - 1) * 3.1
        law = {"loc": angle, "concentration": positive()}
    elif name in ("Categorical", "OneHotCategorical", "Multinomial"):
        p = positive(3)
        law = {"probs": p / p.sum(-1, keepdim=True)}
    else:  # Bernoulli, Binomial, Geometric, NegativeBinomial: eight decades of the odds
        odds = positive()
        law = {"probs": odds / (1 + odds)}
    return law | FIXED.get(name, {})


def build(name: str, law: dict) -> torch.distributions.Distribution:
    law = {key: value for key, value in law.items() if key != "categories"}
    return getattr(torch.distributions, name)(**law)


def fixed_of(name: str) -> dict:
    return FIXED.get(name, {})


def raw(name: str, mean: tuple) -> tuple:
    """Expectations of the statistics: undo the central form of the Gaussian families."""
    family = FAMILIES[name]
    if family.gaussian_coordinate is None:
        return mean
    loc, central = mean
    square = loc.unsqueeze(-1) * loc.unsqueeze(-2) if family.event_dim else loc**2
    return loc, central + square


def same_law(name: str, found: dict, law: dict, rtol: float) -> None:
    for key in FAMILIES[name].params:
        torch.testing.assert_close(found[key], law[key], rtol=rtol, atol=0.0, msg=_worst(key))


def _worst(key: str):
    return lambda text: f"{key}: {text}"


every_family = pytest.mark.parametrize("name", FAMILIES)
# The moments below round to eps; these inversions amplify that, by about the stated condition.
LOOSE = {"Gamma": 1e-7, "InverseGamma": 1e-7, "Beta": 1e-6, "Dirichlet": 1e-6, "VonMises": 1e-6}


@every_family
def test_standard_to_mean_and_back_over_eight_decades(name):
    family, law = FAMILIES[name], standard(name, 2000)
    if name == "MultivariateNormal":
        law["loc"] = law["loc"] * 1e-3  # a scale below eps * loc is floored, as intended
    mean = family.mean_from_standard(law)
    found = family.standard_from_mean(mean, **fixed_of(name))
    same_law(name, found, law, LOOSE.get(name, 1e-10))


@every_family
def test_standard_to_natural_and_back_over_eight_decades(name):
    family, law = FAMILIES[name], standard(name, 500)
    natural = family.natural_from_standard(law)
    assert len(natural) == len(family.stat_dims)
    rtol = 1e-6 if name == "MultivariateNormal" else 1e-9  # entries of loc mix through lam
    same_law(name, family.standard_from_natural(natural, **fixed_of(name)), law, rtol)


@every_family
def test_gradient_of_log_partition_is_the_mean_parameters(name):
    family, law = FAMILIES[name], standard(name, 50, (-1.5, 1.5))
    natural = tuple(eta.requires_grad_() for eta in family.natural_from_standard(law))
    total = family.log_partition(natural, **fixed_of(name)).sum()
    gradient = torch.autograd.grad(total, natural)
    expected = raw(name, family.mean_from_standard(law))
    for found, want in zip(gradient, expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


@every_family
def test_log_prob_is_that_of_torch(name):
    family, law = FAMILIES[name], standard(name, 200, (-1.0, 1.0))
    if name == "VonMises":
        # torch's own normaliser has seven digits only.
        z = (2 * torch.rand(200, dtype=torch.float64) - 1) * math.pi
        expected = stats.vonmises.logpdf(z, law["concentration"], law["loc"])
        expected = torch.as_tensor(expected)
    else:
        dist = build(name, law)
        z = dist.sample((5,))
        if name == "Beta":
            z = z.clamp(1e-6, 1 - 1e-6)
        if name == "Dirichlet":
            z = (z + 1e-6) / (z + 1e-6).sum(-1, keepdim=True)
        expected = dist.log_prob(z)
    found = family.log_prob(z, family.natural_from_standard(law), **fixed_of(name))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@every_family
def test_mean_parameters_agree_with_monte_carlo_within_5_standard_errors(name):
    n, family, law = 20_000, FAMILIES[name], standard(name, 4, (-0.3, 0.7))
    statistics = family.statistics(build(name, law).sample((n,)), **fixed_of(name))
    for sample, want in zip(statistics, raw(name, family.mean_from_standard(law)), strict=True):
        error = sample.std(0) / math.sqrt(n)
        assert ((sample.mean(0) - want).abs() <= 5 * error + 1e-12).all()


@every_family
def test_uniform_weights_give_plain_averages_along_any_axis(name):
    family, law = FAMILIES[name], standard(name, 3, (-0.3, 0.7))
    z = build(name, law).sample((40,)).transpose(0, 1)  # [3, 40, *event]
    weights = torch.full((3, 40), 1 / 40, dtype=torch.float64)
    mean = family.weighted_mean(z, weights, dim=-1, **fixed_of(name))
    statistics = family.statistics(z, **fixed_of(name))
    for found, sample in zip(raw(name, mean), statistics, strict=True):
        torch.testing.assert_close(found, sample.mean(1), rtol=1e-10, atol=1e-12)
    first = family.weighted_mean(z.transpose(0, 1), weights.mT[:, :1], dim=0, **fixed_of(name))
    for found, want in zip(first, mean, strict=True):  # weights broadcast over the batch
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-14)


@every_family
def test_average_is_the_mean_parameters_of_the_mixture(name):
    family = FAMILIES[name]
    old, new = (family.mean_from_standard(standard(name, 5, (-1.0, 1.0))) for _ in range(2))
    step = torch.rand(5, dtype=torch.float64)
    found = raw(name, family.average(old, new, step))
    for value, a, b in zip(found, raw(name, old), raw(name, new), strict=True):
        s = step.reshape(5, *(1,) * (a.dim() - 1))
        torch.testing.assert_close(value, (1 - s) * a + s * b, rtol=1e-12, atol=1e-12)


def test_central_average_equals_raw_average_in_exact_arithmetic():
    old, new, step = (100.0, 1e-4), (100.003, 4e-4), 0.125
    mean = FAMILIES["Normal"].average(
        tuple(torch.tensor(v, dtype=torch.float64) for v in old),
        tuple(torch.tensor(v, dtype=torch.float64) for v in new),
        step,
    )
    (m, c), (m2, c2), lam = map(Fraction, old), map(Fraction, new), Fraction(step)
    loc = (1 - lam) * m + lam * m2
    variance = (1 - lam) * (c + m**2) + lam * (c2 + m2**2) - loc**2
    assert mean[0].item() == pytest.approx(float(loc), rel=1e-15)
    assert mean[1].item() == pytest.approx(float(variance), rel=1e-10)


def test_central_form_keeps_a_small_scale_far_from_zero_in_single_precision():
    normal = FAMILIES["Normal"]
    z = 100 + 0.01 * torch.randn(1000)
    mean = normal.weighted_mean(z, torch.full((1000,), 1e-3), dim=0)
    for _ in range(20):
        mean = normal.average(mean, mean, 0.3)
    assert normal.standard_from_mean(mean)["scale"].item() == pytest.approx(0.01, rel=0.1)


def test_normal_families_are_equivariant_when_the_latent_is_scaled_by_1000():
    normal, z = FAMILIES["Normal"], torch.randn(50, dtype=torch.float64) + 3
    w = torch.rand(50, dtype=torch.float64).softmax(0)
    small = normal.standard_from_mean(normal.weighted_mean(z, w, dim=0))
    large = normal.standard_from_mean(normal.weighted_mean(1000 * z, w, dim=0))
    for key in small:
        torch.testing.assert_close(large[key], 1000 * small[key], rtol=1e-12, atol=0.0)


# --- borders ----------------------------------------------------------------------------------

EQUAL = {
    "Bernoulli": [0.0, 1.0],
    "Binomial": [0.0, 7.0],
    "Poisson": [0.0, 3.0],
    "Geometric": [0.0, 3.0],
    "NegativeBinomial": [0.0, 3.0],
    "Beta": [0.0, 0.3, 1.0],
    "Dirichlet": [[0.0, 1.0, 0.0], [0.2, 0.3, 0.5]],
    "Categorical": [0, 2],
    "OneHotCategorical": [[0.0, 1.0, 0.0]],
    "Multinomial": [[6.0, 0.0, 0.0], [1.0, 2.0, 3.0]],
    "MultivariateNormal": [[0.0, 0.0], [1e3, -1.0]],
    "Normal": [0.0, 1e3],
    "Laplace": [0.7, 5.0],
    "Pareto": [2.0, 3.0],
    "VonMises": [0.0, 2.0, -3.0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_family
def test_equal_particles_and_particles_at_the_border_give_a_proper_law(name, dtype):
    family = FAMILIES[name]
    values = torch.tensor(EQUAL.get(name, [0.0, 1e-3, 5.0]))
    z = values.unsqueeze(1).expand(values.shape[0], 6, *values.shape[1:])
    z = z if name == "Categorical" else z.to(dtype)
    weights = torch.full((1, 6), 1 / 6, dtype=dtype)
    mean = family.weighted_mean(z, weights, dim=1, **fixed_of(name))
    law = family.standard_from_mean(mean, **fixed_of(name))
    for key in family.params:
        assert law[key].dtype == dtype and law[key].isfinite().all(), key
    build(name, law)  # torch's own validation of every parameter
    natural = family.natural_from_standard(law)
    assert all(eta.isfinite().all() for eta in natural)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_family
def test_inversion_converges_from_the_moments_of_any_few_particles(name, dtype):
    """The law that is found has the moments that were asked for."""
    family = FAMILIES[name]
    law = {
        key: value.to(dtype) if isinstance(value, torch.Tensor) else value
        for key, value in standard(name, 300, (-2.0, 3.0)).items()
    }
    z = build(name, law).sample((8,))
    weights = torch.randn(8, 300, dtype=dtype).softmax(0)
    mean = family.weighted_mean(z, weights, dim=0, **fixed_of(name))
    found = family.standard_from_mean(mean, **fixed_of(name))
    again = family.mean_from_standard(found)
    assert all(found[key].isfinite().all() for key in family.params)
    tolerance = 2e-3 if dtype == torch.float32 else 1e-6
    for value, want in zip(again, mean, strict=True):
        torch.testing.assert_close(value, want, rtol=tolerance, atol=tolerance)


def test_particles_of_integers_and_booleans_are_accepted():
    weights = torch.full((4,), 0.25)
    bools = torch.tensor([True, False, True, True])
    (mean,) = FAMILIES["Bernoulli"].weighted_mean(bools, weights, dim=0)
    assert mean == torch.tensor(0.75) and mean.dtype == torch.float32
    counts = torch.tensor([1, 2, 3, 4])
    log_prob = FAMILIES["Poisson"].log_prob(counts, (torch.tensor(0.3),))
    assert log_prob.dtype == torch.float32
    np.testing.assert_allclose(log_prob, stats.poisson.logpmf(counts, math.exp(0.3)), rtol=1e-5)
