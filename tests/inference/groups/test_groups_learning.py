"""Expectation maximisation: closed forms, monotone evidence, thresholds."""

from __future__ import annotations

import math

import pytest
import torch

import ppl
from ppl import (
    Markov,
    MultivariateNormal,
    Normal,
    Poisson,
    given,
    latent,
    model,
    observe,
    param,
    plate,
)
from ppl.errors import NumericalError
from ppl.inference.groups import build, learn, unsupported
from ppl.inference.groups.learning import expectation, sigma_points
from tests.inference.groups.oracle_of_groups import dense_rows, random_points, row_covariances

positive = torch.distributions.constraints.positive


def gauss_newton(groups, points, params, steps=1):
    """Means and the covariance of every row's latents, from dense normal equations."""
    for _ in range(steps):
        jacobian, residual = dense_rows(groups, points, params)
        covariance = torch.linalg.inv(jacobian.mT @ jacobian)
        delta = -(covariance @ (jacobian.mT @ residual))
        parts = delta.split([f.count * f.dims for f in groups.families.values()])
        moves = {
            n: part.reshape(f.count, f.dims)
            for (n, f), part in zip(groups.families.items(), parts, strict=True)
        }
        points = groups.retract(points, moves)
    return points, row_covariances(groups, covariance), jacobian


def evidence(groups, params):
    """Exact log-evidence of a linear Gaussian model."""
    points, _, jacobian = gauss_newton(groups, groups.start(), params, 2)
    count = jacobian.shape[1]
    log_det = torch.linalg.slogdet(jacobian.mT @ jacobian)[1]
    return float(
        groups.log_density(points, params) + 0.5 * count * math.log(2 * math.pi) - 0.5 * log_det
    )


@model
def local_level():
    step, noise = param("step", 1.0, support=positive), param("noise", 2.0, support=positive)
    with plate("time", ordered=True):
        level = latent("level", Markov(Normal(0.0, 10.0), lambda before: Normal(before, step)))
        observe("y", Normal(level, noise))


def series(length=40):
    generator = torch.Generator().manual_seed(0)
    level = 0.3 * torch.randn(length, generator=generator, dtype=torch.float64).cumsum(0)
    y = level + 0.5 * torch.randn(length, generator=generator, dtype=torch.float64)
    y[5] = math.nan
    return {"y": y}


@model
def autoregression():
    share, step = param("share", 0.2), param("step", 1.0, support=positive)
    with plate("time", ordered=True):
        level = latent(
            "level", Markov(Normal(0.0, 1.0), lambda before: Normal(share * before, step))
        )
        observe("y", Normal(level, 0.5))


@model
def vectors():
    size = param("size", torch.tensor([1.0, 2.0]), support=positive)
    with plate("n"):
        x = latent("x", MultivariateNormal(torch.zeros(2), covariance_matrix=torch.diag(size)))
        observe("y", MultivariateNormal(x, covariance_matrix=0.3 * torch.eye(2)))


@model
def grouped():
    group = plate("group", 3)
    with group:
        scale = param("scale", 1.0, support=positive)
        x = latent("x", Normal(0.0, 1.0))
    with plate("n", within=group):
        observe("y", Normal(x, scale))


GROUPED = {
    "group": [0, 1, 0, 2, 1, 0, 2, 2],
    "y": torch.tensor([1.0, 3.0, 0.5, -1.0, 1.0, 2.0, -1.5, 0.0]),
}
LINEAR = {
    "local level": (local_level, series()),
    "autoregression": (autoregression, {k: v.nan_to_num() for k, v in series().items()}),
    "vectors": (vectors, {"y": torch.randn(12, 2, generator=torch.Generator().manual_seed(1))}),
    "scales by group": (grouped, GROUPED),
}


@pytest.mark.parametrize("case", LINEAR)
def test_evidence_never_falls_and_settles(case):
    program, data = LINEAR[case]
    groups = build(program.bind(data))
    params, found = dict(groups.params), [evidence(groups, groups.params)]
    for _ in range(12):
        points, covariances, _ = gauss_newton(groups, groups.start(), params)
        params = learn(groups, points, params, covariances)
        found.append(evidence(groups, params))
    gains = torch.tensor(found).diff()
    assert gains.min() > -1e-9
    assert gains[0] > 1e-3 and gains[-1] < 0.2 * gains[0]


def test_fixed_point_is_the_maximum_of_the_evidence():
    groups = build(grouped.bind(GROUPED))
    params = dict(groups.params)
    for _ in range(400):
        points, covariances, _ = gauss_newton(groups, groups.start(), params)
        params = learn(groups, points, params, covariances)
    best = evidence(groups, params)
    for g in range(3):
        for change in (0.98, 1.02):
            scale = params["scale"].clone()
            scale[g] *= change
            assert evidence(groups, {"scale": scale}) < best


def test_closed_form_equals_the_numeric_maximum(monkeypatch):
    groups = build(local_level.bind(series()))
    points, covariances, _ = gauss_newton(groups, groups.start(), groups.params)
    closed = learn(groups, points, groups.params, covariances)
    monkeypatch.setattr("ppl.inference.groups.learning._is_scale", lambda *_: False)
    numeric = learn(groups, points, groups.params, covariances)
    for name in closed:
        torch.testing.assert_close(closed[name], numeric[name], rtol=1e-5, atol=0)


@model
def robust():
    base, k = latent("base", Normal(0.0, 10.0)), param("k", 2.0, support=positive)
    with plate("n"):
        observe("y", Normal(base, 1.0).robust("huber", k))


def test_a_threshold_is_fitted_by_its_normalised_density():
    """With the location known, it is the maximum likelihood of the normalised density."""
    generator = torch.Generator().manual_seed(2)
    y = torch.randn(300, generator=generator, dtype=torch.float64)
    y[::6] *= 8
    groups = build(robust.bind({"y": y}))
    points = {"base": torch.zeros(1, dtype=torch.float64)}
    covariances = {"y": torch.zeros(300, 1, 1, dtype=torch.float64)}
    k = float(learn(groups, points, groups.params, covariances)["k"])

    def likelihood(k):
        k = torch.tensor(k, dtype=torch.float64)
        rho = ppl.distributions.robust_loss("huber", y, k)
        return float(-rho.sum() - 300 * ppl.distributions.robust.robust_log_norm("huber", k))

    assert 0.5 < k < 3.0
    assert likelihood(k) > max(likelihood(0.98 * k), likelihood(1.02 * k))


def test_a_kernel_without_normaliser_cannot_be_learned():
    @model
    def bounded():
        base, scale = latent("base", Normal(0.0, 10.0)), param("scale", 2.0, support=positive)
        with plate("n"):
            observe("y", Normal(base, scale).robust("tukey", 3.0))

    (reason,) = unsupported(bounded.graph({"y": [1.0, 2.0]}))
    assert reason.site == "y" and "'scale'" in reason.problem and "no normaliser" in reason.problem
    assert "huber, cauchy, student" in reason.remedy


@model
def counts():
    base, spread = param("base", 0.0), param("spread", 1.0, support=positive)
    with plate("n"):
        x = latent("x", Normal(0.0, 1.0))
        observe("y", Poisson((base + spread * x).exp()))


def test_params_of_other_laws_follow_the_gradient():
    groups = build(counts.bind({"y": [3.0, 5.0, 2.0, 9.0]}))
    points = random_points(groups)
    covariances = {g.name: torch.full((4, 1, 1), 0.1, dtype=torch.float64) for g in groups.groups}
    new = learn(groups, points, groups.params, covariances)
    group = groups.group("y")
    expected = expectation(group, points, groups.params, covariances["y"])
    assert expected.log_density(new) > expected.log_density(groups.params) + 1.0
    live = {n: v.clone().requires_grad_(True) for n, v in new.items()}
    slopes = torch.autograd.grad(expected.log_density(live), list(live.values()))
    assert max(abs(float(s)) for s in slopes) < 1e-3


def test_an_impossible_start_is_named():
    @model
    def heavy():
        base, k = latent("base", Normal(0.0, 10.0)), param("k", 0.5, support=positive)
        with plate("n"):
            observe("y", Normal(base, given("s")).robust("cauchy", k))

    groups = build(heavy.bind({"y": [1.0, 2.0], "s": [1.0, 1.0]}))
    zero = {"y": torch.zeros(2, 1, 1, dtype=torch.float64)}
    with pytest.raises(NumericalError, match=r"param 'k'.* y is not\s+finite"):
        learn(groups, groups.start(), groups.params, zero)


def test_sigma_points_have_the_moments():
    root = torch.randn(3, 4, 4, dtype=torch.float64)
    mean, covariance = torch.randn(3, 4, dtype=torch.float64), root @ root.mT
    points = torch.stack(sigma_points(mean, covariance, 4))
    torch.testing.assert_close(points.mean(0), mean)
    centred = points - mean
    torch.testing.assert_close(torch.einsum("kfi,kfj->fij", centred, centred) / 8, covariance)
