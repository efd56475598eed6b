"""Linearised rows against finite differences, autograd and direct Hessians."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ppl import (
    SE2,
    SE3,
    SO2,
    SO3,
    Bernoulli,
    Categorical,
    ConcentratedNormal,
    Flat,
    Normal,
    Poisson,
    StudentT,
    given,
    latent,
    model,
    observe,
    plate,
    shift,
)
from ppl.inference.groups import Family, Group, LogDensity, Robust, Slot, build, energies, linearise
from ppl.inference.groups.frames import frame
from ppl.inference.groups.linearise import outputs_and_jacobian
from ppl.inference.groups.motions import inverse_right_jacobian
from tests.inference.groups.oracle_of_groups import dense_rows, numeric_jacobian, random_points
from tests.inference.groups.test_groups_density import CASES

# The package re-exports a function of the module's name.
MODULE = sys.modules["ppl.inference.groups.linearise"]


def bound_groups(case):
    program, data = CASES[case]
    return build(program.bind(data))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["_by_forward", "_by_reverse"])
def test_jacobians_of_outputs(case, mode):
    groups = bound_groups(case)
    points = random_points(groups, 3)
    for group in groups.groups:
        values = group.gather(points)
        outputs, jacobian = getattr(MODULE, mode)(group, values, groups.params)
        assert jacobian.shape == (group.rows, group.residual_dims, group.dims)
        torch.testing.assert_close(outputs, group.outputs(values, groups.params))
        expected = numeric_jacobian(group, values, groups.params)
        torch.testing.assert_close(jacobian, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_that_of_the_log_density(case):
    """``J' r`` of all rows is minus the derivative of the joint by tangent vectors."""
    groups = bound_groups(case)
    points = random_points(groups, 4)
    delta = {
        n: torch.zeros(f.count, f.dims, dtype=torch.float64, requires_grad=True)
        for n, f in groups.families.items()
    }
    density = groups.log_density(groups.retract(points, delta))
    slopes = torch.autograd.grad(density, list(delta.values()))
    expected = -torch.cat([g.flatten() for g in slopes])
    jacobian, residual = dense_rows(groups, points)
    torch.testing.assert_close(jacobian.mT @ residual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", ["line, a missing entry", "chain", "vectors missing in part"])
def test_curvature_of_a_gaussian_model_is_its_precision(case):
    groups = bound_groups(case)
    assert all(g.is_fixed for g in groups.groups)
    points = random_points(groups, 5)
    sizes = [x.numel() for x in points.values()]

    def density(flat):
        parts = zip(points.items(), flat.split(sizes), strict=True)
        return groups.log_density({n: part.reshape(x.shape) for (n, x), part in parts})

    flat = torch.cat([x.flatten() for x in points.values()])
    expected = -torch.autograd.functional.hessian(density, flat)
    jacobian, _ = dense_rows(groups, points)
    torch.testing.assert_close(jacobian.mT @ jacobian, expected, rtol=1e-10, atol=1e-10)


@model
def classes():
    weight = latent("weight", Normal(torch.zeros(3, 4), 2.0))
    with plate("n"):
        scores = given("x") @ weight
        observe("c", Categorical(logits=scores))
        observe("b", Bernoulli(logits=scores))


def test_curvature_of_canonical_likelihoods_is_the_hessian():
    x = torch.randn(9, 3, dtype=torch.float64)
    data = {"x": x, "c": torch.arange(9) % 4, "b": (torch.randn(9, 4) > 0).double()}
    groups = build(classes.bind(data))
    points = random_points(groups)
    hessian = torch.autograd.functional.hessian(
        lambda w: groups.log_density({"weight": w.reshape(1, 3, 4)}), points["weight"].flatten()
    )
    jacobian, _ = dense_rows(groups, points)
    torch.testing.assert_close(jacobian.mT @ jacobian, -hessian, rtol=1e-7, atol=1e-7)


def test_negative_curvature_is_raised_and_keeps_the_gradient():
    @model
    def outlier():
        x = latent("x", Normal(0.0, 1.0))
        observe("y", StudentT(2.0, x, 1.0))

    groups = build(outlier.bind({"y": 50.0}))
    row = linearise(groups.groups[1], [torch.zeros(1, 1, dtype=torch.float64)], {})
    slope = (row.jacobian * row.residual.unsqueeze(-1)).sum()
    expected = -3 * 50.0 / (2 + 2500.0)
    assert float(slope) == pytest.approx(expected, rel=1e-10)
    assert 0 < float(row.jacobian.square().sum()) < 1e-6


def measure(loss, keep=None, rows=3):
    """Residuals ``x_i - y_i`` of pairs of numbers."""
    x = Family("x", ("n",), (rows,), (2,))
    slots = (Slot("x", torch.arange(rows).unsqueeze(1)),)
    return Group("y", slots, (x,), lambda values, params: values[0].flatten(1), loss, keep=keep)


@pytest.mark.parametrize("per", ["row", "component"])
@pytest.mark.parametrize(
    "kernel", ["huber", "tukey", "cauchy", "geman_mcclure", "dcs", "student", "truncated"]
)
def test_robust_rows(kernel, per):
    group = measure(Robust(kernel, 1.5, per), rows=5)
    x = 1.3 * torch.randn(5, 2, dtype=torch.float64)
    row = linearise(group, group.gather({"x": x}), {})
    point = x.clone().requires_grad_(True)
    total = energies(group, group.gather({"x": point}), {}).sum()
    (slope,) = torch.autograd.grad(total, point)
    torch.testing.assert_close(torch.einsum("fmd,fm->fd", row.jacobian, row.residual), slope)
    assert row.weight.shape == ((5, 2) if per == "component" else (5,))
    torch.testing.assert_close(row.energy.sum(), total.detach())


def test_energy_matching_meets_the_energy():
    group = measure(Robust("huber", 0.7))
    x = torch.randn(3, 2, dtype=torch.float64)
    row = linearise(group, group.gather({"x": x}), {}, matching="energy")
    torch.testing.assert_close(0.5 * row.residual.square().sum(-1), row.energy)


def test_a_wide_kernel_is_quadratic():
    group = measure(Robust("tukey", 0.7))
    row = linearise(group, group.gather({"x": torch.ones(3, 2)}), {}, kernel_scale=1e4)
    torch.testing.assert_close(row.energy, torch.ones(3))


def test_rows_that_are_not_finite_are_dropped_and_counted():
    from ppl.inference.groups import Quadratic

    group = measure(Quadratic())
    x = torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [0.0, 1.0]])
    row = linearise(group, group.gather({"x": x}), {})
    assert row.dropped == 1
    assert row.residual.tolist() == [[1.0, 2.0], [0.0, 0.0], [0.0, 1.0]]
    assert row.jacobian[1].abs().sum() == 0
    assert energies(group, group.gather({"x": x}), {})[1] == torch.inf


@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_absent_entries_are_zero(shape):
    from ppl.inference.groups import Quadratic

    keep = torch.ones(shape)
    keep[1] = 0.0
    row = linearise(group := measure(Quadratic(), keep), group.gather({"x": torch.ones(3, 2)}), {})
    assert row.energy.tolist() == [1.0, 0.0, 1.0]
    assert row.jacobian[1].abs().sum() == 0 and row.dropped == 0


def test_a_given_jacobian_is_not_computed_again():
    calls = []

    def function(values, params):
        calls.append(1)
        return values[0].flatten(1) * torch.tensor([2.0, 3.0])

    x = Family("x", ("n",), (4,), (2,))
    group = Group("y", (Slot("x", torch.arange(4).unsqueeze(1)),), (x,), function, is_affine=True)
    values = group.gather({"x": torch.randn(4, 2)})
    jacobian = outputs_and_jacobian(group, values, {})[1]
    before = len(calls)
    row = linearise(group, values, {}, jacobian=jacobian)
    assert len(calls) == before + 1
    torch.testing.assert_close(row.jacobian, torch.diag(torch.tensor([2.0, 3.0])).expand(4, 2, 2))
    assert linearise(group, values, {}, jacobian=False).jacobian is None


def test_a_singular_branch_falls_back_to_forward_mode():
    x = Family("x", ("n",), (2,))

    def function(values, params):
        size = values[0].abs()
        return torch.where(size > 0, size.sqrt(), values[0])

    group = Group("y", (Slot("x", torch.tensor([[0], [1]])),), (x,), function)
    row = linearise(group, group.gather({"x": torch.tensor([0.0, 4.0])}), {})
    assert row.jacobian.flatten().tolist() == [1.0, 0.25] and row.dropped == 0


def test_groups_of_no_rows():
    x = Family("x", ("n",), (4,))
    index = torch.zeros(0, 1, dtype=torch.long)
    group = Group("y", (Slot("x", index),), (x,), lambda values, params: values[0])
    row = linearise(group, group.gather({"x": torch.zeros(4)}), {})
    assert row.jacobian.shape == (0, 1, 1) and row.energy.shape == (0,)


@pytest.mark.parametrize("manifold", [SO2, SE2, SO3, SE3], ids=str)
def test_frames_are_derivatives_of_the_retraction(manifold):
    family = Family("x", ("n",), (6,), manifold.event_shape, manifold)
    points = manifold.project(torch.randn(6, *manifold.event_shape, dtype=torch.float64))
    zero = torch.zeros(6, manifold.dims, dtype=torch.float64)
    full = torch.autograd.functional.jacobian(lambda d: family.retract(points, d), zero)
    each = torch.stack([full[i, ..., i, :] for i in range(6)])
    made = frame(family, points)
    made = torch.ones(6, 1) if made is None else made
    torch.testing.assert_close(made.reshape(each.shape).to(each), each)


def test_blocks_are_independent():
    loss = LogDensity(lambda u, params: -(u.square().sum(-1) + u[..., 0] * u[..., 1]), block=2)
    terms = loss.terms(torch.randn(5, 4, dtype=torch.float64), {}, "gradient", 1.0)
    curve = terms.root.mT @ terms.root
    expected = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(curve, expected.expand(5, 2, 2, 2))


@model
def moving():
    with plate("n", 5, ordered=True) as n:
        x, y = latent("x", Flat(SE3)), latent("y", Flat(SE2))
        turn, heading = latent("turn", Flat(SO3)), latent("heading", Flat(SO2))
        path = SE3.compose(SE3.inverse(x), SE3.compose(given("offset"), shift(x, n)))
        observe("z", ConcentratedNormal(SE3, path, precision_matrix=given("info")))
        observe("w", ConcentratedNormal(SE2, SE2.between(y, SE2.compose(y, given("step"))), 0.1))
        observe(
            "t",
            ConcentratedNormal(SO3, SO3.compose(turn, SO3.inverse(given("start"))), torch.ones(3)),
        )
        observe("h", ConcentratedNormal(SO2, SO2.inverse(heading), 0.3).robust("huber", 1.0))
        chain = SE2.between(shift(y, n), y)
        observe("v", ConcentratedNormal(SE2, chain, covariance_matrix=torch.eye(3) + 0.5))


def moving_groups():
    root = torch.randn(5, 6, 6, dtype=torch.float64)

    def element(group):
        return group.project(torch.randn(5, *group.event_shape, dtype=torch.float64))

    names = {
        "z": SE3,
        "offset": SE3,
        "w": SE2,
        "t": SO3,
        "h": SO2,
        "v": SE2,
        "step": SE2,
        "start": SO3,
    }
    data = {n: element(g) for n, g in names.items()} | {"info": root @ root.mT + torch.eye(6)}
    return build(moving.bind(data))


def test_motions_in_closed_form():
    groups = moving_groups()
    points = random_points(groups)
    for group in groups.groups:
        assert group.function.motion is not None
        values = group.gather(points)
        outputs, jacobian = outputs_and_jacobian(group, values, {})
        torch.testing.assert_close(outputs, group.outputs(values, {}))
        expected = MODULE._by_reverse(group, values, {})[1]
        torch.testing.assert_close(jacobian, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1e-9, 1e-3, 0.5, 3.0])
@pytest.mark.parametrize("manifold", [SO2, SE2, SO3, SE3], ids=str)
def test_inverse_right_jacobian(manifold, size):
    xi = torch.randn(4, manifold.dims, dtype=torch.float64)
    xi = size * xi / xi.norm(dim=-1, keepdim=True)

    def moved(delta):
        return manifold.log(manifold.compose(manifold.exp(xi), manifold.exp(delta)))

    full = torch.autograd.functional.jacobian(moved, torch.zeros_like(xi))
    each = torch.stack([full[i, :, i] for i in range(4)])
    torch.testing.assert_close(inverse_right_jacobian(manifold, xi), each, rtol=1e-10, atol=1e-10)


@model
def linked():
    w, spread = latent("w", Normal(torch.zeros(3), 1.0)), latent("spread", Normal(0.0, 1.0))
    with plate("n"):
        score = (given("x") * w).sum(-1)
        observe("k", Poisson(given("exposure") * (score + 0.1).exp()))
        observe("b", Bernoulli(torch.sigmoid(torch.stack([score, 2 * score]))))
        observe("y", Normal(score, 0.1 + (0.3 * spread).exp()))
        observe("v", Normal(torch.stack([score, score]), spread.exp()))
        observe(
            "c", Categorical(probs=torch.softmax(torch.stack([score, 1 - score, score * 0]), -1))
        )


def test_links_belong_to_the_density():
    """Below its link an affine argument has the curvature of the model, not of its rate."""
    data = {"x": torch.randn(9, 3), "exposure": torch.rand(9) + 0.5, "k": torch.arange(9) % 3, "y": torch.randn(9),
            "b": (torch.randn(9, 2) > 0).double(), "v": 3 * torch.randn(9, 2), "c": torch.arange(9) % 3}  # fmt: skip
    groups = build(linked.bind(data))
    assert all(g.is_affine for g in groups.groups)
    points = {n: 0.3 * x for n, x in random_points(groups).items()}
    for name in ("k", "b", "c"):
        group = groups.group(name)
        values = group.gather(points)

        def energy(w, group=group):
            return energies(group, [w.expand(9, 1, 3)], {}).sum()

        hessian = torch.autograd.functional.hessian(energy, values[0][:1, 0])[0, :, 0]
        jacobian = linearise(group, values, {}).jacobian.flatten(0, 1)
        torch.testing.assert_close(jacobian.mT @ jacobian, hessian, rtol=1e-8, atol=1e-8)


def test_forward_mode_is_silent_in_a_plain_script():
    """In another process: torch warns once, and the tests may have used forward mode already."""
    script = (
        "import warnings; import torch; import ppl\n"
        "from ppl.inference.groups.forward import jvp\n"
        "warnings.simplefilter('error')\n"
        "one = torch.ones(2)\n"
        "slope = torch.func.vmap(lambda d: jvp(torch.sin, (0 * one,), (d,))[1])(torch.eye(2))\n"
        "assert torch.equal(slope, torch.eye(2))"
    )
    folder = Path(__file__).parents[3]
    made = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
