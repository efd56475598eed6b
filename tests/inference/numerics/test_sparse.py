"""Sparse systems against dense algebra."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from ppl.inference.numerics.ordering import natural_order, order_blocks
from ppl.inference.numerics.pcg import block_jacobi, conjugate_gradients, covariance_from_draws
from ppl.inference.numerics.sparse import NotPositive, factorise, has_cholmod

ENGINES = [
    "superlu",
    pytest.param("cholmod", marks=pytest.mark.skipif(not has_cholmod(), reason="no scikit-sparse")),
]


def blocks_of(pairs, dims, rng):
    """A random positive definite matrix whose blocks couple as the pairs say."""
    offsets = np.concatenate([[0], np.cumsum(dims)])
    dense = np.zeros((offsets[-1], offsets[-1]))
    for a, b in pairs:
        columns = np.r_[offsets[a] : offsets[a + 1], offsets[b] : offsets[b + 1]]
        rows = rng.standard_normal((3, len(columns)))
        dense[np.ix_(columns, columns)] += rows.T @ rows
    return dense + 0.1 * np.eye(offsets[-1])


def grid(n):
    index = np.arange(n * n).reshape(n, n)
    return np.concatenate(
        [
            np.stack([index[:-1].ravel(), index[1:].ravel()], 1),
            np.stack([index[:, :-1].ravel(), index[:, 1:].ravel()], 1),
        ]
    )


GRAPHS = {
    "chain": (np.stack([np.arange(39), np.arange(1, 40)], 1), np.full(40, 2)),
    "star": (np.stack([np.zeros(30, int), np.arange(1, 31)], 1), np.array([5] + [1] * 30)),
    "grid": (grid(9), np.full(81, 1)),
    "poses": (np.random.default_rng(0).integers(0, 60, (150, 2)), np.full(60, 3)),
    "mixed": (
        np.random.default_rng(1).integers(0, 40, (70, 2)),
        np.random.default_rng(2).integers(1, 5, 40),
    ),
    "apart": (np.zeros((0, 2), int), np.array([1, 3, 2])),
    "one": (np.zeros((0, 2), int), np.array([4])),
}


@pytest.fixture(params=GRAPHS)
def system(request):
    pairs, dims = GRAPHS[request.param]
    dense = blocks_of(pairs, dims, np.random.default_rng(7))
    return dense, order_blocks(pairs[:, 0], pairs[:, 1], dims), pairs


@pytest.mark.parametrize("solver", ENGINES)
def test_solve_and_determinant(system, solver):
    dense, ordering, _ = system
    factor = factorise(sp.csc_matrix(dense), ordering, solver=solver)
    right = np.random.default_rng(3).standard_normal((len(dense), 4))
    np.testing.assert_allclose(
        factor.solve(right), np.linalg.solve(dense, right), rtol=1e-9, atol=1e-9
    )
    np.testing.assert_allclose(
        factor.solve(right[:, 0]), np.linalg.solve(dense, right[:, 0]), rtol=1e-9, atol=1e-9
    )
    assert factor.log_det == pytest.approx(np.linalg.slogdet(dense)[1], abs=1e-9)
    assert factor.is_positive


@pytest.mark.parametrize("solver", ENGINES)
def test_selected_inverse(system, solver):
    dense, ordering, pairs = system
    factor = factorise(sp.csc_matrix(dense), ordering, solver=solver)
    inverse = np.linalg.inv(dense)
    scale = np.abs(inverse).max()
    np.testing.assert_allclose(
        factor.inverse.diagonal().numpy(), np.diag(inverse), atol=1e-10 * scale
    )
    dims, offsets = ordering.dims, ordering.offsets
    for a, b in [*pairs, *((k, k) for k in range(len(dims)))]:
        found = factor.inverse.blocks(np.array([a]), np.array([b]))[0].numpy()
        expected = inverse[offsets[a] : offsets[a] + dims[a], offsets[b] : offsets[b] + dims[b]]
        np.testing.assert_allclose(found, expected, atol=1e-10 * scale)


def test_inverse_outside_the_pattern_is_refused():
    pairs, dims = GRAPHS["apart"]
    factor = factorise(sp.identity(6, format="csc"), order_blocks(pairs[:, 0], pairs[:, 1], dims))
    with pytest.raises(ValueError, match="outside the pattern"):
        factor.inverse.entries(np.array([0]), np.array([1]))
    with pytest.raises(ValueError, match="different sizes"):
        factor.inverse.blocks(np.array([0, 1]), np.array([0, 1]))


@pytest.mark.parametrize("solver", ENGINES)
def test_draws_have_the_covariance(system, solver):
    dense, ordering, _ = system
    factor = factorise(sp.csc_matrix(dense), ordering, solver=solver)
    root = factor.draws(np.eye(len(dense)))
    np.testing.assert_allclose(
        root @ root.T, np.linalg.inv(dense), atol=1e-9 * np.abs(np.linalg.inv(dense)).max()
    )


def test_order_of_scalars_when_none_is_given():
    dense = blocks_of(grid(6), np.ones(36, int), np.random.default_rng(5))
    factor = factorise(sp.csc_matrix(dense))
    np.testing.assert_allclose(
        factor.inverse.diagonal().numpy(), np.diag(np.linalg.inv(dense)), rtol=1e-9
    )


def test_natural_order_keeps_the_last_last():
    pairs = grid(6)
    ordering = natural_order(pairs[:, 0], pairs[:, 1], np.ones(36, int))
    assert ordering.order[-1] == 35
    dense = blocks_of(pairs, np.ones(36, int), np.random.default_rng(5))
    factor = factorise(sp.csc_matrix(dense), ordering)
    np.testing.assert_allclose(
        factor.inverse.diagonal().numpy(), np.diag(np.linalg.inv(dense)), rtol=1e-9
    )


def test_long_chain_has_few_fronts_and_is_exact():
    n = 3000
    matrix = sp.diags([np.full(n, 2.001), np.full(n - 1, -1.0), np.full(n - 1, -1.0)], [0, -1, 1])
    factor = factorise(matrix.tocsc())
    assert len(factor.inverse.fronts.width) < n / 10
    np.testing.assert_allclose(
        factor.inverse.diagonal().numpy(), np.diag(np.linalg.inv(matrix.toarray())), rtol=1e-8
    )


def test_ring_fills_its_pattern_without_underflow():
    n = 20_000
    ordering = natural_order(np.arange(n), np.roll(np.arange(n), 1), np.ones(n, int))
    assert len(ordering.lower[1]) == 2 * n - 3


def test_hub_comes_last():
    n = 400
    first, second = np.zeros(n, int), np.arange(1, n + 1)
    assert order_blocks(first, second, np.ones(n + 1, int)).order[-1] == 0


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_not_positive_is_found_and_named(value):
    matrix = sp.csc_matrix(np.diag([1.0, value, 2.0]))
    try:
        found = factorise(matrix).undetermined
    except NotPositive as error:
        found = error.columns
    assert found.tolist() == [1]


def test_direction_without_information_is_found():
    pairs, n = grid(6), 36
    laplacian = np.zeros((n, n))
    for a, b in pairs:
        laplacian[np.ix_([a, b], [a, b])] += 3.7 * np.array([[1, -1], [-1, 1]])
    try:
        assert not factorise(sp.csc_matrix(laplacian)).is_positive
    except NotPositive as error:
        assert len(error.columns) == 1


def test_conjugate_gradients_solve_several_at_once():
    pairs, dims = GRAPHS["poses"]
    dense = torch.from_numpy(blocks_of(pairs, dims, np.random.default_rng(7)))
    own = torch.stack([dense[3 * k : 3 * k + 3, 3 * k : 3 * k + 3] for k in range(60)])
    right = torch.randn(180, 3, dtype=torch.float64)
    right[:, 1] = 0  # converged from the start
    found = conjugate_gradients(lambda x: dense @ x, right, block_jacobi(own), tol=1e-12)
    torch.testing.assert_close(
        found.solution, torch.linalg.solve(dense, right), rtol=1e-7, atol=1e-8
    )
    plain = conjugate_gradients(lambda x: dense @ x, right, tol=1e-12)
    assert found.iterations < plain.iterations


def test_covariance_from_draws_is_unbiased_and_sharper_than_their_spread():
    pairs, dims = GRAPHS["poses"]
    dense = torch.from_numpy(blocks_of(pairs, dims, np.random.default_rng(7)) + 5 * np.eye(180))
    exact = torch.linalg.inv(dense)
    blocks = lambda m: torch.stack([m[3 * k : 3 * k + 3, 3 * k : 3 * k + 3] for k in range(60)])  # noqa: E731
    draws = torch.linalg.cholesky(exact) @ torch.randn(180, 2000, dtype=torch.float64)
    found = covariance_from_draws(
        draws.view(60, 3, -1), (dense @ draws).view(60, 3, -1), blocks(dense)
    )
    plain = draws.view(60, 3, -1) @ draws.view(60, 3, -1).mT / 2000
    error, rough = ((x - blocks(exact)).norm() / blocks(exact).norm() for x in (found, plain))
    assert error < 0.7 * rough
    assert error < 0.05
