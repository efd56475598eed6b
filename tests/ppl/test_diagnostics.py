"""Pareto k, smoothed weights and leave-one-out against ArviZ; R-hat; the verdict in words."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from ppl.diagnostics import (
    Diagnostics,
    LooResult,
    effective_sample_size,
    loo,
    pareto_k,
    psis,
    r_hat,
)


@pytest.fixture(scope="module")
def az():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arviz = pytest.importorskip("arviz", reason="arviz, the oracle of this test, is absent")
        if not hasattr(arviz, "psislw"):
            pytest.skip("this arviz has no psislw; the test needs the 0.x series")
    return arviz


def student_weights(rows: int, size: int, df: float) -> torch.Tensor:
    """Log-weights of a Student-t target under a Normal proposal: heavier tail, larger k."""
    x = torch.randn(rows, size, dtype=torch.float64)
    target = torch.distributions.StudentT(torch.tensor(df, dtype=torch.float64))
    return target.log_prob(x) + x**2 / 2


@pytest.mark.parametrize("size", [30, 100, 1000, 4000])
@pytest.mark.parametrize("df", [1.0, 3.0, 30.0])
def test_psis_is_that_of_arviz(az, size, df):
    log_weights = student_weights(6, size, df)
    smoothed, k = psis(log_weights)
    expected, expected_k = az.psislw(log_weights.numpy().copy())
    np.testing.assert_allclose(k, expected_k, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(smoothed, expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(smoothed.exp().sum(-1), torch.ones(6, dtype=torch.float64))


def test_psis_is_that_of_arviz_with_ties_and_zero_weights(az):
    log_weights = student_weights(4, 200, 2.0)
    log_weights[0] = log_weights[0].mul(8).round() / 8  # ties at the cutoff shorten the tail
    log_weights[1] *= 300.0  # most weights underflow
    smoothed, k = psis(log_weights)
    expected, expected_k = az.psislw(log_weights.numpy().copy())
    known = np.isfinite(expected_k)
    np.testing.assert_allclose(k[known], expected_k[known], rtol=1e-7)
    assert k[~known].isnan().all()
    # Which of two tied particles gets which quantile is arbitrary.
    np.testing.assert_allclose(smoothed.sort(-1).values, np.sort(expected), rtol=1e-7, atol=1e-8)


def test_many_rows_are_cut_into_chunks_with_the_same_result():
    log_weights = student_weights(900, 500, 3.0)
    together = pareto_k(log_weights.reshape(30, 30, 500))
    torch.testing.assert_close(together[7, 3], pareto_k(log_weights[7 * 30 + 3]))
    assert together.shape == (30, 30)


@pytest.mark.parametrize("shape", [-0.2, 0.3, 0.6, 1.0])
def test_pareto_k_finds_the_shape_of_a_pareto_tail(shape):
    u = torch.rand(20, 20_000, dtype=torch.float64)
    weights = torch.expm1(-shape * torch.log1p(-u)) / shape
    k = pareto_k(weights.log())
    # Posterior variance of k is (1 + k)^2 / tail; the prior pulls to 0.5 as ten points do.
    tail = 3 * math.sqrt(20_000)
    expected = (tail * shape + 5) / (tail + 10)
    error = (1 + shape) / math.sqrt(tail * 20)
    assert abs(k.mean().item() - expected) < 5 * error + 0.02


def test_pareto_k_of_equal_weights_is_zero_and_of_few_particles_unknown():
    assert pareto_k(torch.full((50,), -3.0)) == 0.0
    assert pareto_k(torch.randn(10)).isnan()
    assert pareto_k(torch.zeros(3, 1)).tolist() == [0.0, 0.0, 0.0]
    assert pareto_k(torch.zeros(0, 50)).shape == (0,)
    log_weights, _ = psis(torch.tensor([0.0, -torch.inf, 1.0]))
    torch.testing.assert_close(log_weights.exp().sum(), torch.tensor(1.0))


def test_psis_ignores_a_common_factor_and_keeps_dtype():
    log_weights = student_weights(3, 300, 3.0)
    smoothed, k = psis(log_weights)
    moved, moved_k = psis(log_weights + 64.0)
    torch.testing.assert_close(moved_k, k, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(moved, smoothed, rtol=1e-10, atol=1e-10)
    assert all(part.dtype == torch.float32 for part in psis(log_weights.float()))


def test_effective_sample_size_counts_equal_weights():
    weights = torch.tensor([[0.25] * 4, [1.0, 0.0, 0.0, 0.0]])
    assert effective_sample_size(weights).tolist() == [4.0, 1.0]


def normal_log_likelihood(draws: int = 2000, count: int = 12) -> torch.Tensor:
    y = torch.randn(count, dtype=torch.float64)
    mu = y.mean() + torch.randn(draws, dtype=torch.float64) / math.sqrt(count)
    return -((y - mu[:, None]) ** 2) / 2 - 0.5 * math.log(2 * math.pi)


def test_loo_is_that_of_arviz(az):
    log_lik = normal_log_likelihood()
    found = loo(log_lik)
    data = az.from_dict(
        posterior={"mu": np.zeros((1, log_lik.shape[0]))},
        log_likelihood={"y": log_lik.numpy()[None]},
    )
    expected = az.loo(data, pointwise=True, reff=1.0)
    assert found.elpd == pytest.approx(expected.elpd_loo, rel=1e-8)
    assert found.se == pytest.approx(expected.se, rel=1e-8)
    assert found.p_loo == pytest.approx(expected.p_loo, rel=1e-6)
    np.testing.assert_allclose(found.pointwise, expected.loo_i.values, rtol=1e-8)
    np.testing.assert_allclose(found.pareto_k, expected.pareto_k.values, rtol=1e-8, atol=1e-8)


def test_loo_agrees_with_refitting_a_conjugate_normal():
    # Flat prior: y_i given the others is Normal(mean of the others, 1 + 1 / (n - 1)).
    y = torch.randn(12, dtype=torch.float64)
    mu = y.mean() + torch.randn(20_000, dtype=torch.float64) / math.sqrt(12)
    log_lik = torch.distributions.Normal(mu[:, None], 1.0).log_prob(y)
    others = (y.sum() - y) / 11
    exact = torch.distributions.Normal(others, math.sqrt(1 + 1 / 11)).log_prob(y)
    assert (loo(log_lik).pointwise - exact).abs().max() < 0.02


def test_loo_accepts_several_axes_of_observations():
    log_lik = normal_log_likelihood(500, 12)
    assert loo(log_lik.reshape(500, 3, 4)).elpd == loo(log_lik).elpd


def test_loo_prints_itself():
    result = LooResult(-30.8, 1.4, 1.0, torch.zeros(3), torch.tensor([0.2, 0.9, torch.nan]))
    assert "1 with Pareto k over 0.7" in str(result) and "elpd -30.8" in str(result)


def test_r_hat_is_that_of_arviz(az):
    draws = torch.randn(4, 101, 3, dtype=torch.float64) + torch.arange(4)[:, None, None] * 0.2
    expected = [az.rhat(draws[..., i].numpy(), method="split") for i in range(3)]
    np.testing.assert_allclose(r_hat(draws), expected, rtol=1e-10)


def diagnostics(
    ess: float = 50.0, k: float = 0.1, converged: bool = True, warnings: tuple[str, ...] = ()
) -> Diagnostics:
    return Diagnostics(
        ess={"level": torch.tensor([60.0, ess])},
        pareto_k={"level": torch.tensor([torch.nan, k])},
        converged=converged,
        iterations=40,
        seconds=0.25,
        warnings=warnings,
        notes={"schedule": "power"},
    )


@pytest.mark.parametrize(
    ("case", "word", "reason"),
    [
        ({}, "good", "nothing"),
        ({"k": 0.6}, "check", "Pareto k is 0.60 at 'level'"),
        ({"k": 0.8}, "unreliable", "usable is below 0.7"),
        ({"k": math.inf}, "unreliable", "Pareto k is inf"),
        ({"k": math.nan}, "good", "nothing"),
        ({"ess": 5.0}, "check", "effective sample size is 5.0 at 'level'"),
        ({"ess": 1.2}, "unreliable", "usable is above 3"),
        ({"ess": math.nan}, "unreliable", "nan"),
        ({"converged": False}, "check", "not converged after 40 iterations"),
        ({"converged": False, "k": 0.9}, "unreliable", "not converged"),
        ({"warnings": ("3 rows are left out",)}, "check", "3 rows are left out"),
    ],
    ids=str,
)
def test_verdict(case, word, reason):
    verdict = diagnostics(**case).verdict
    assert verdict.startswith(f"{word}: ") and reason in verdict and verdict.endswith(".")


def test_verdict_of_many_sites_stays_one_readable_sentence():
    many = {f"x{i}": torch.tensor(1.0) for i in range(9)}
    assert Diagnostics(many, {}, True, 1, 0.0).verdict.endswith("; and 6 more.")


def test_a_backend_without_particles_is_judged_by_convergence_alone():
    assert Diagnostics({}, {}, True, 3, 0.1).verdict.startswith("good")
    empty = Diagnostics({"x": torch.zeros(0)}, {"x": torch.zeros(0)}, True, 3, 0.1)
    assert empty.verdict.startswith("good")


def test_diagnostics_print_themselves():
    text = str(diagnostics(k=0.6, warnings=("3 values of 'y' are missing",)))
    for part in (
        "check:",
        "40 iterations in 0.2 s, converged",
        "level: effective sample size at least 50.0, Pareto k at most 0.60",
        "warning: 3 values of 'y' are missing",
        "schedule: power",
    ):
        assert part in text
