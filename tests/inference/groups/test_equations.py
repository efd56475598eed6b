"""Normal equations against dense jacobians."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ppl.inference.groups import FactorGroups, Family, Group, Slot
from ppl.inference.groups.equations import Equations
from ppl.inference.numerics.ordering import order_blocks

X, W = Family("x", ("n",), (7,), (2,)), Family("w", ("k",), (3,), (3,))


def linear(name, slots, families, m, seed):
    """A group whose outputs are a random linear function of its slots, minus one."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(slots[0].index)
    matrices = [
        torch.randn(rows, m, s.width, f.dims, generator=generator, dtype=torch.float64)
        for s, f in zip(slots, families, strict=True)
    ]

    def outputs(values, params):
        parts = [torch.einsum("fmbd,fbd->fm", a, v) for a, v in zip(matrices, values, strict=True)]
        return sum(parts) - 1.0

    return Group(name, tuple(slots), tuple(families), outputs)


def index(*rows):
    return torch.tensor(rows)


def column(*elements):
    return torch.tensor(elements).unsqueeze(-1)


EVERY = torch.arange(7).unsqueeze(-1)
GROUPS = {
    "unary": lambda: [linear("a", [Slot("x", EVERY)], [X], 2, 0)],
    "pairs": lambda: [
        linear("a", [Slot("x", column(0, 1, 5, 6)), Slot("x", column(1, 2, 3, 0))], [X, X], 3, 1)
    ],
    "with itself": lambda: [
        linear("a", [Slot("x", column(0, 4, 2)), Slot("x", column(0, 1, 2))], [X, X], 2, 2)
    ],
    "families backwards": lambda: [
        linear("a", [Slot("w", column(0, 2)), Slot("x", column(3, 3))], [W, X], 2, 3)
    ],
    "shared": lambda: [
        linear("a", [Slot("w", column(1).expand(7, 1)), Slot("x", EVERY)], [W, X], 2, 4)
    ],
    "all shared": lambda: [
        linear(
            "a",
            [Slot("w", index((0, 2)).expand(9, 2)), Slot("x", column(4).expand(9, 1))],
            [W, X],
            1,
            5,
        )
    ],
    "wide": lambda: [linear("a", [Slot("x", index((0, 1, 2), (6, 3, 1)))], [X], 2, 6)],
    "wide, twice the same": lambda: [
        linear("a", [Slot("x", index((0, 1, 0), (6, 6, 6)))], [X], 4, 7)
    ],
    "wide meets wide": lambda: [
        linear(
            "a", [Slot("x", index((0, 1), (5, 3))), Slot("x", index((1, 2), (2, 5)))], [X, X], 4, 8
        )
    ],
    "no rows": lambda: [linear("a", [Slot("x", torch.zeros(0, 1, dtype=torch.long))], [X], 2, 9)],
}


def dense(groups, equations, rows):
    """The jacobian of all rows ``[R, n]`` and their residuals."""
    jacobians, residuals = [], []
    for group, row in zip(groups, rows, strict=True):
        at = equations.at.touched(group)
        whole = torch.zeros(*row.residual.shape, equations.at.size, dtype=torch.float64)
        for k in range(at.shape[1]):  # an element may be touched twice: columns add up
            whole[torch.arange(len(at)), :, at[:, k]] += row.jacobian[:, :, k]
        jacobians.append(whole.flatten(0, 1))
        residuals.append(row.residual.flatten())
    return torch.cat(jacobians), torch.cat(residuals)


@pytest.fixture(params=[*GROUPS, "everything"])
def case(request):
    makers = GROUPS.values() if request.param == "everything" else [GROUPS[request.param]]
    groups = [g for make in makers for g in make()]
    # Names are those of the jacobians that are kept.
    from dataclasses import replace

    groups = [replace(g, name=f"{g.name}{i}") for i, g in enumerate(groups)]
    made = FactorGroups({"x": X, "w": W}, tuple(groups))
    equations = Equations(made)
    points = {
        "x": torch.randn(7, 2, dtype=torch.float64),
        "w": torch.randn(3, 3, dtype=torch.float64),
    }
    rows = equations.linearise(points, {})
    return equations, rows, *dense(groups, equations, rows)


def in_order(matrix, ordering):
    return matrix.toarray()[ordering.positions][:, ordering.positions]


def test_matrix_gradient_and_diagonal(case):
    equations, rows, jacobian, residual = case
    torch.testing.assert_close(equations.gradient(rows), jacobian.T @ residual)
    curvature = equations.curvature(rows)
    expected = jacobian.T @ jacobian
    lift = torch.rand(equations.at.size, dtype=torch.float64)
    found = in_order(equations.matrix(curvature, lift), equations.ordering)
    np.testing.assert_allclose(found, (expected + torch.diag(lift)).numpy(), atol=1e-12)
    torch.testing.assert_close(equations.diagonal(curvature), expected.diagonal())


def test_products_without_the_matrix(case):
    equations, rows, jacobian, _ = case
    vectors = torch.randn(equations.at.size, 3, dtype=torch.float64)
    pushed = equations.pushforward(rows, vectors)
    torch.testing.assert_close(torch.cat([p.flatten(0, 1) for p in pushed]), jacobian @ vectors)
    torch.testing.assert_close(equations.pullback(rows, pushed), jacobian.T @ jacobian @ vectors)


def test_covariances_of_elements_and_rows(case):
    equations, rows, jacobian, _ = case
    lift = torch.ones(equations.at.size, dtype=torch.float64)
    factor = equations.factorise(equations.curvature(rows), lift)
    inverse = torch.linalg.inv(jacobian.T @ jacobian + torch.eye(len(lift), dtype=torch.float64))
    for name in ("x", "w"):
        begin, family = equations.at.offsets[name], equations.groups.families[name]
        own = inverse[
            begin : begin + family.count * family.dims, begin : begin + family.count * family.dims
        ]
        own = (
            own.view(family.count, family.dims, family.count, family.dims)
            .diagonal(dim1=0, dim2=2)
            .permute(2, 0, 1)
        )
        torch.testing.assert_close(equations.covariance(factor, name), own, rtol=1e-9, atol=1e-12)
    for group in equations.groups.groups:
        at = equations.at.touched(group)
        found = equations.joint_covariance(factor, group)
        expected = inverse[at[:, :, None], at[:, None, :]]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_diagonal_blocks_ignore_only_products_of_two_slots():
    groups = FactorGroups({"x": X, "w": W}, tuple(GROUPS["shared"]()))
    equations = Equations(groups)
    points = {
        "x": torch.zeros(7, 2, dtype=torch.float64),
        "w": torch.zeros(3, 3, dtype=torch.float64),
    }
    rows = equations.linearise(points, {})
    jacobian, _ = dense(groups.groups, equations, rows)
    whole = jacobian.T @ jacobian
    blocks = equations.diagonal_blocks(rows)
    torch.testing.assert_close(blocks["x"][3], whole[6:8, 6:8])
    torch.testing.assert_close(blocks["w"][1], whole[17:20, 17:20])


def test_jacobian_of_affine_groups_is_computed_once():
    calls = []

    def outputs(values, params):
        calls.append(1)
        return values[0][:, 0] - 1.0

    group = Group("a", (Slot("x", EVERY),), (X,), outputs, is_affine=True, is_fixed=True)
    equations = Equations(FactorGroups({"x": X}, (group,)))
    for _ in range(3):
        equations.linearise({"x": torch.zeros(7, 2, dtype=torch.float64)}, {})
    first = len(calls)
    equations.linearise({"x": torch.zeros(7, 2, dtype=torch.float64)}, {})
    assert len(calls) == first + 1  # the residual only


def test_labels_name_the_element():
    equations = Equations(FactorGroups({"x": X, "w": W}, ()))
    assert equations.at.label(3) == "'x' (n 1)"
    assert equations.at.label(14) == "'w' (k 0)"
    assert equations.at.locate(16) == ("w", 0, 2)


def test_elements_that_nothing_touches_have_a_place():
    equations = Equations(FactorGroups({"x": X, "w": W}, tuple(GROUPS["pairs"]())))
    assert equations.ordering.count == 10
    assert len(equations.pairs.first) == 10 + 4


def test_ordering_of_a_pose_graph_has_less_fill_than_the_natural_one():
    from ppl.inference.numerics.ordering import natural_order

    rng = np.random.default_rng(0)
    i, j = (
        np.r_[np.arange(199), rng.integers(0, 200, 60)],
        np.r_[np.arange(1, 200), rng.integers(0, 200, 60)],
    )
    dims = np.full(200, 3)
    assert order_blocks(i, j, dims).fill < 0.5 * natural_order(i, j, dims).fill
