"""Noise on groups, and robust laws of whole vectors."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, stats

import ppl
from ppl.distributions import (
    ConcentratedNormal,
    Flat,
    Markov,
    MultivariateNormal,
    Normal,
    Robust,
    StudentT,
    robust_log_norm,
    robust_loss,
    robust_weight,
)
from ppl.distributions.robust import KERNELS
from ppl.errors import ModelError, UnsupportedError
from ppl.lower import Compiler
from ppl.manifolds import MANIFOLDS, SE2, SE3, SO2, SO3

ALL = list(MANIFOLDS.values())
F64 = torch.float64


def spd(d):
    root = torch.randn(d, d, dtype=F64)
    return root @ root.T / d + 0.2 * torch.eye(d, dtype=F64)


def spreads(manifold):
    covariance = 0.04 * spd(manifold.dims)
    return [
        {"covariance_matrix": covariance},
        {"precision_matrix": torch.linalg.inv(covariance)},
        {"scale_tril": torch.linalg.cholesky(covariance)},
        {"scale": 0.1 + 0.1 * torch.rand(manifold.dims, dtype=F64)},
        {"scale": 0.2},
    ]


def element(manifold, *shape):
    return manifold.exp(0.8 * torch.randn(*shape, manifold.dims, dtype=F64))


@pytest.mark.parametrize("manifold", ALL)
def test_density_is_gaussian_in_tangent_coordinates(manifold):
    loc, value = element(manifold, 5), element(manifold, 5)
    for spread in spreads(manifold):
        law = ConcentratedNormal(manifold, loc, **spread)
        covariance = law.covariance.expand(5, manifold.dims, manifold.dims)
        off = manifold.local(loc, value)
        expected = [
            stats.multivariate_normal(cov=c.numpy()).logpdf(x.numpy())
            for c, x in zip(covariance, off, strict=True)
        ]
        torch.testing.assert_close(law.log_prob(value), torch.tensor(expected, dtype=F64))
        residual, log_norm = law.whitened(value)
        again = log_norm - 0.5 * residual.square().sum(-1)
        torch.testing.assert_close(law.log_prob(value), again)


@pytest.mark.parametrize("manifold", ALL)
def test_draws_have_the_covariance_of_the_noise(manifold):
    loc = element(manifold)
    for spread in spreads(manifold):
        law = ConcentratedNormal(manifold, loc, **spread)
        draws = law.sample((20000,), torch.Generator().manual_seed(1))
        assert bool(manifold.support.check(draws).all())
        off = manifold.local(law.mean, draws)
        found, expected = off.T @ off / len(off), law.covariance
        scale = expected.diagonal().sqrt()
        error = (found - expected).abs() / (scale.unsqueeze(-1) * scale)
        assert float(error.max()) < 5 * math.sqrt(2 / 20000)


def test_arguments_are_checked():
    with pytest.raises(ModelError, match="manifold must be one of SO2, SE2"):
        ConcentratedNormal("SE2", [0.0, 0.0, 0.0], 1.0)
    with pytest.raises(ModelError, match="exactly one of scale"):
        ConcentratedNormal(SE2, [0.0, 0.0, 0.0])
    with pytest.raises(ModelError, match="the elements of SO3"):
        ConcentratedNormal(SO3, [1.0, 1.0, 0.0, 0.0], 1.0)
    with pytest.raises(ModelError, match=r"\[3\] for the 3 tangent coordinates"):
        ConcentratedNormal(SE2, [0.0, 0.0, 0.0], [1.0, 1.0])
    with pytest.raises(ModelError, match=r"\[6, 6\] for the 6 tangent"):
        ConcentratedNormal(SE3, SE3.identity(), covariance_matrix=torch.eye(3))
    with pytest.raises(ModelError, match="positive"):
        ConcentratedNormal(SO2, 0.0, -1.0)
    with pytest.raises(ModelError, match="size must be a shape"):
        ppl.HalfFlat(SE2)


@ppl.model
def drift(manifold=SE2, robust=False):
    noise = ppl.latent("noise", ppl.HalfNormal(0.1))
    time = ppl.plate("time", ordered=True)
    with time:
        x = ppl.latent(
            "x",
            Markov(
                ConcentratedNormal(manifold, manifold.identity(), 0.5),
                lambda before: ConcentratedNormal(manifold, before, noise),
            ),
        )
        law = ConcentratedNormal(manifold, x, covariance_matrix=0.01 * torch.eye(manifold.dims))
        ppl.observe("z", law.robust("huber", 1.5) if robust else law)


@pytest.mark.parametrize("manifold", ALL)
def test_models_are_drawn_from_and_lowered(manifold):
    draws = drift(manifold=manifold).sample(2, sizes={"time": 4}, seed=0)
    assert draws["x"].shape == (2, 4, *manifold.event_shape)
    bound = drift(manifold=manifold, robust=True).bind({"z": draws["z"][0]})
    values = {**bound.values, "x": draws["x"][0], "noise": draws["noise"][0]}
    axes = {v.name: v.plates for v in bound.graph.variables.values()}
    results = []
    for rules in ("all", "vmap"):
        compiler = Compiler(bound.graph, axes, ("time",), rules=rules)
        chain, z = bound.graph.factors["x"], bound.graph.factors["z"]
        outputs = [compiler.density(chain), compiler.transition(chain), compiler.density(z)]
        lowered = compiler.finish(outputs)
        results.append(lowered({k: values[k] for k in lowered.inputs}))
    x, noise = values["x"], values["noise"]
    start = ConcentratedNormal(manifold, manifold.identity(), 0.5).log_prob(x[0])
    steps = ConcentratedNormal(manifold, x[:-1], noise).log_prob(x[1:])
    base = ConcentratedNormal(manifold, x, 0.1)
    seen = base.robust("huber", 1.5).log_prob(values["z"])
    for found in results:
        for value, expected in zip(found, (start, steps, seen), strict=True):
            torch.testing.assert_close(value, expected)


def test_a_flat_latent_on_a_group_starts_at_the_identity_and_is_not_drawn():
    @ppl.model
    def free():
        ppl.latent("x", Flat(SE3))
        ppl.latent("a", Flat(SO2))

    graph = free.graph()
    assert graph.variables["x"].event_shape == (7,)
    torch.testing.assert_close(Flat(SE3).sample(()), SE3.identity())
    assert Flat(SE3).log_prob(SE3.identity().expand(4, 7)).shape == (4,)
    with pytest.raises(UnsupportedError, match="improper"):
        free.sample()


def test_several_elements_in_one_event_have_their_own_axes():
    @ppl.model
    def several():
        x = ppl.latent("x", ConcentratedNormal(SE2, SE2.identity(), 0.1), shape=5)
        ppl.deterministic("first", SE2.between(x[0], x))

    draws = several.sample(3, seed=0)
    assert draws["x"].shape == draws["first"].shape == (3, 5, 3)
    torch.testing.assert_close(draws["first"], SE2.between(draws["x"][:, :1], draws["x"]))


# ---- robust laws ------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_a_vector_has_one_kernel(kernel):
    covariance, value = spd(3), 3 * torch.randn(50, 3, dtype=F64)
    law = MultivariateNormal(torch.zeros(3, dtype=F64), covariance_matrix=covariance)
    distance = (value @ torch.linalg.inv(covariance) * value).sum(-1).sqrt()
    k = torch.tensor(1.7, dtype=F64)
    expected = law.log_prob(torch.zeros(3, dtype=F64)) - robust_loss(kernel, distance, k)
    torch.testing.assert_close(law.robust(kernel, 1.7).log_prob(value), expected)


def test_a_normal_stays_elementwise():
    value = torch.tensor([0.5, 10.0], dtype=F64)
    law = Normal(torch.zeros(2, dtype=F64), 1.0).robust("huber", 1.0)
    assert law.is_elementwise and law.log_prob(value).shape == (2,)
    assert (
        not MultivariateNormal([0.0, 0.0], scale_tril=torch.eye(2))
        .robust("huber", 1.0)
        .is_elementwise
    )


@pytest.mark.parametrize("manifold", ALL)
def test_on_a_group_one_kernel_sees_the_whole_residual(manifold):
    loc, value = element(manifold, 6), element(manifold, 6)
    law = ConcentratedNormal(manifold, loc, 0.3)
    distance = manifold.local(loc, value).norm(dim=-1) / 0.3
    k = torch.tensor(2.0, dtype=F64)
    expected = law.log_prob(loc) - robust_loss("cauchy", distance, k)
    torch.testing.assert_close(law.robust("cauchy", 2.0).log_prob(value), expected)
    assert law.robust("cauchy", 2.0).support is manifold.support


def test_other_laws_cannot_be_made_robust():
    with pytest.raises(ModelError, match="got StudentT"):
        StudentT(3.0, 0.0, 1.0).robust("huber", 1.0)
    with pytest.raises(ModelError, match="no kernel is called 'hubr'"):
        Robust(Normal(0.0, 1.0), "hubr", 1.0)


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_gradient_weight_is_the_slope_over_the_residual(kernel):
    size = torch.tensor([0.0, 1e-8, 0.3, 0.9, 1.29, 1.31, 2.0, 5.0, 40.0], dtype=F64)
    k, step = torch.tensor(1.3, dtype=F64), 1e-6
    slope = robust_loss(kernel, size + step, k) - robust_loss(kernel, size - step, k)
    found = robust_weight(kernel, size.square(), k)
    torch.testing.assert_close(found * size, slope / (2 * step), atol=1e-8, rtol=1e-6)
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("kernel", sorted(set(KERNELS) - {"dcs"}))
def test_energy_weight_has_the_height_of_the_loss(kernel):
    size = torch.tensor([0.0, 1e-6, 0.3, 1.29, 1.31, 5.0, 40.0], dtype=F64)
    k = torch.tensor(1.3, dtype=F64)
    found = robust_weight(kernel, size.square(), k, "energy")
    torch.testing.assert_close(0.5 * found * size.square(), robust_loss(kernel, size, k))
    # at zero both weights agree
    torch.testing.assert_close(found[0], robust_weight(kernel, size[0], k))


def test_weights_of_the_specification():
    square, k = torch.tensor([0.25, 9.0], dtype=F64), torch.tensor(1.0, dtype=F64)
    table = {
        ("huber", "energy"): [1.0, 2 / 3 - 1 / 9],
        ("truncated", "gradient"): [1.0, 0.0],
        ("truncated", "energy"): [1.0, 1 / 9],
        ("tukey", "gradient"): [0.75**2, 0.0],
        ("cauchy", "energy"): [4 * math.log(1.25), math.log(10) / 9],
        ("geman_mcclure", "energy"): [1 / 1.25, 0.1],
        ("dcs", "gradient"): [1.0, 0.04],
        ("dcs", "energy"): [1.0, 0.04],
    }
    for (kernel, matching), expected in table.items():
        found = robust_weight(kernel, square, k, matching)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=F64))
    with pytest.raises(ModelError, match="expected 'gradient' or 'energy'"):
        robust_weight("huber", square, k, "both")


@pytest.mark.parametrize("dims", [1, 2, 3, 6])
@pytest.mark.parametrize(
    ("kernel", "k"), [("huber", 0.7), ("huber", 2.5), ("cauchy", 4.0), ("student", 9.0)]
)
def test_normaliser_is_the_integral(kernel, k, dims):
    threshold = torch.tensor(k, dtype=F64)
    surface = 2 * math.pi ** (dims / 2) / math.gamma(dims / 2)

    def density(r):
        loss = robust_loss(kernel, torch.tensor(r, dtype=F64), threshold)
        return float((-loss).exp()) * r ** (dims - 1)

    inside, _ = integrate.quad(density, 0, k, epsabs=1e-12)
    outside, _ = integrate.quad(density, k, math.inf, epsabs=1e-12, limit=200)
    total = math.log(surface * (inside + outside))
    assert float(robust_log_norm(kernel, threshold, dims)) == pytest.approx(total, abs=1e-7)


def test_normalisers_have_derivatives_and_limits():
    k = torch.tensor([0.5, 1.5, 4.0], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: robust_log_norm("huber", x, 2), k)
    assert torch.autograd.gradcheck(lambda x: robust_log_norm("student", x + 3, 2), k)
    assert float(robust_log_norm("cauchy", torch.tensor(0.9))) == math.inf
    with pytest.raises(ModelError, match="tends to a constant"):
        robust_log_norm("tukey", torch.tensor(1.0))
