"""The group Lasso: vectors whose density falls with their length, as rule and from the graph."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ppl import (
    MultivariateLaplace,
    Normal,
    UnsupportedError,
    dot,
    given,
    infer,
    latent,
    model,
    observe,
    param,
    plate,
)
from ppl.inference.amp import vectors

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def rule(scale=0.7, d=2, mean=0.0):
    return vectors.MultivariateLaplace(*torch.tensor([[mean], [scale]], dtype=F64), d)


@pytest.mark.parametrize(
    ("r", "vr"),
    [([0.3, 0.5], [0.2, 0.2]), ([0.3, -2.0], [0.05, 0.4]), ([3.0, 1.0], [2.0, 2.0])],
)
def test_moments_equal_an_integral_over_the_plane(r, vr):
    r, vr = torch.tensor(r, dtype=F64), torch.tensor(vr, dtype=F64)
    nodes, weights = (torch.as_tensor(v) for v in np.polynomial.legendre.leggauss(12))
    # Gauss nodes on each side of the cusp at zero in both directions, in cells of half a unit.
    edges = torch.arange(-12.0, 12.5, 0.5, dtype=F64)
    x = (edges[:-1, None] + 0.25 + 0.25 * nodes).flatten()
    w = (0.25 * weights).repeat(len(edges) - 1)
    at = torch.stack(torch.meshgrid(x, x, indexing="ij"), -1)
    logs = MultivariateLaplace(torch.zeros(2, dtype=F64), 0.7).log_prob(at)
    logs = logs + torch.distributions.Normal(r, vr.sqrt()).log_prob(at).sum(-1)
    mass = logs.exp() * w[:, None] * w
    total = mass.sum()
    mean = (mass[..., None] * at).sum((0, 1)) / total
    variance = (mass[..., None] * (at - mean).square()).sum((0, 1)) / total
    found = rule().moments(r, vr)
    torch.testing.assert_close(found.mean, mean, atol=1e-7, rtol=0)
    torch.testing.assert_close(found.variance, variance, atol=1e-7, rtol=0)
    assert float(found.log_z.sum()) == pytest.approx(float(total.log()), abs=1e-6)


def test_one_entry_is_the_scalar_rule():
    from ppl.inference.amp.rules import Laplace

    r, vr = torch.linspace(-3, 3, 13, dtype=F64), torch.tensor([0.4], dtype=F64)
    scalar = Laplace(torch.tensor([1 / 0.7], dtype=F64))
    for name in ("moments", "mode"):
        for a, b in zip(getattr(rule(d=1), name)(r, vr), getattr(scalar, name)(r, vr), strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("vr", [[0.3, 0.3, 0.3], [0.1, 0.5, 1.0]])
def test_the_mode_is_the_proximal_point_and_its_variance_the_slope(vr):
    r, vr, law = (
        torch.tensor([1.0, -0.5, 0.3], dtype=F64),
        torch.tensor(vr, dtype=F64),
        rule(2.0, 3),
    )
    found = law.mode(r, vr)
    gradient = found.mean / (2.0 * found.mean.norm()) + (found.mean - r) / vr
    assert float(gradient.abs().max()) < 1e-12
    step = 1e-6 * torch.eye(3, dtype=F64)
    slope = (law.mode(r + step, vr).mean - law.mode(r - step, vr).mean).diagonal() / 2e-6
    torch.testing.assert_close(found.variance, slope * vr, rtol=1e-7, atol=0)
    small = law.mode(0.03 * r, vr)
    assert small.mean.tolist() == small.variance.tolist() == [0.0, 0.0, 0.0]


def test_pseudo_observations_of_other_groups_do_not_matter():
    r, vr = normal(4, 12, seed=1), torch.rand(4, 12, dtype=F64, generator=torch.Generator())
    whole = rule(0.7, 3, 0.2).moments(r, vr + 0.1)
    part = rule(0.7, 3, 0.2).moments(r[:, 3:6], vr[:, 3:6] + 0.1)
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a[:, 3:6], b)


# ---- from the graph ----------------------------------------------------------------------------


def tasks(count, scale, noise):
    @model
    def program():
        row, coef = plate("row"), plate("coef")
        with coef:
            x = latent("x", MultivariateLaplace(torch.zeros(count), scale))
        with row, coef:
            a = given("a")
        with row:
            observe("y", Normal(dot(a, x, over=coef), noise))

    return program


def grouped(d, scale, noise):
    @model
    def program():
        row, group = plate("row"), plate("group")
        with group:
            x = latent("x", MultivariateLaplace(torch.zeros(d), scale))
        with row, group:
            a = given("a")  # [row, group, d]
        with row:
            observe("y", Normal(dot(a, x, over=group).sum(-1), noise))

    return program


@pytest.mark.parametrize("variant", ["gamp", "vamp"])
def test_the_mode_of_many_tasks_is_the_multi_task_lasso(variant):
    linear_model = pytest.importorskip("sklearn.linear_model")
    m, n, count, noise = 40, 60, 3, 0.5
    a = normal(m, n) / math.sqrt(m)
    truth = normal(n, count, seed=1) * (torch.arange(n) % 10 == 0)[:, None]
    y = a @ truth + 0.05 * normal(m, count, seed=2)
    for scale in (0.3, 1.0):
        alpha = noise**2 / (m * scale)
        lasso = linear_model.MultiTaskLasso(alpha, fit_intercept=False, tol=1e-14, max_iter=100_000)
        expected = torch.as_tensor(lasso.fit(a.numpy(), y.numpy()).coef_).T
        options = {"variant": variant, "kind": "max", "tolerance": 1e-12, "max_iters": 5000}
        found = infer(tasks(count, scale, noise), {"a": a, "y": y}, method="amp", **options)
        torch.testing.assert_close(found.mean("x"), expected, atol=1e-8, rtol=0)
        assert 0 < int((found.mean("x")[:, 0] != 0).sum()) < n


def test_the_mode_of_plain_groups_fulfils_the_optimality_conditions():
    m, groups, d, noise, scale = 60, 25, 4, 0.5, 0.8
    a = normal(m, groups, d) / math.sqrt(m)
    truth = normal(groups, d, seed=1) * (torch.arange(groups) % 5 == 0)[:, None]
    y = torch.einsum("igd,gd->i", a, truth) + 0.05 * normal(m, seed=2)

    found = infer(
        grouped(d, scale, noise), {"a": a, "y": y}, method="amp",
        kind="max", tolerance=1e-12, max_iters=5000,
    )  # fmt: skip
    x = found.mean("x")
    pull = torch.einsum("igd,i->gd", a, y - torch.einsum("igd,gd->i", a, x)) / noise**2
    length = x.norm(dim=-1)
    on = length > 0
    assert 0 < int(on.sum()) < groups
    unit = x[on] / length[on, None] / scale
    torch.testing.assert_close(pull[on], unit, atol=1e-7, rtol=0)
    assert float(pull[~on].norm(dim=-1).max()) <= 1 / scale + 1e-9


def test_means_scale_and_draws_of_plain_groups():
    m, groups, d, noise = 80, 40, 3, 0.1
    a = normal(m, groups, d) / math.sqrt(m)
    law = MultivariateLaplace(torch.zeros(d, dtype=F64), 0.5)
    truth = law.sample((groups,), torch.Generator().manual_seed(3))
    y = torch.einsum("igd,gd->i", a, truth) + noise * normal(m, seed=2)

    @model
    def program():
        row, group = plate("row"), plate("group")
        scale = param("scale", 1.0)
        with group:
            x = latent("x", MultivariateLaplace(torch.zeros(d), scale))
        with row, group:
            matrix = given("a")
        with row:
            observe("y", Normal(dot(matrix, x, over=group).sum(-1), noise))

    found = infer(program, {"a": a, "y": y}, method="amp", seed=0)
    assert "x: MultivariateLaplace" in found.diagnostics.notes["rules"]
    assert found.mean("x").shape == (groups, d)
    assert float((found.mean("x") - truth).square().mean() / truth.square().mean()) < 0.5
    assert float(found.params["scale"]) == pytest.approx(0.5, rel=0.25)
    draws = found.samples(4000, seed=1)["x"]
    off = (draws.mean(0) - found.mean("x")).abs() / found.sd("x")
    assert float(off.max()) < 0.08
    torch.testing.assert_close(draws.std(0), found.sd("x"), rtol=0.08, atol=0)


def test_other_joint_laws_are_declined():
    from ppl import MultivariateNormal

    @model
    def program():
        x = latent("x", MultivariateNormal(torch.zeros(3), torch.eye(3)))
        observe("y", Normal(x, 1.0))

    with pytest.raises(UnsupportedError, match="joint law of several numbers"):
        infer(program, {"y": torch.zeros(3)}, method="amp")
