"""Nonlinear factors: Gauss-Newton and Newton by messages, least-squares optima, robust fits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares

from ppl import given, infer, latent, model, observe, plate
from ppl.distributions import Bernoulli, MultivariateNormal, Normal
from ppl.inference.gbp import GBP, init, step
from ppl.inference.gbp.problem import make_problem
from ppl.inference.groups import FactorGroups, Family, Group, Robust, Slot
from ppl.inference.groups.build import build
from tests.data_files import data_file
from tests.inference.gbp import factor_graphs as fg


@pytest.fixture(scope="module")
def oracle() -> dict[str, torch.Tensor]:
    with np.load(data_file("gbp/nonlinear_oracles.npz")) as file:
        return {k: torch.from_numpy(file[k]) for k in file.files}


@model
def decay():
    mean = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    w = latent("w", MultivariateNormal(mean, 100 * torch.eye(3, dtype=torch.float64)))
    with plate("n"):
        observe("y", Normal(w[0] * (-w[1] * given("t")).exp() + w[2], 0.05))


@model
def decay_of_scalars():
    a, b, c = (
        latent("a", Normal(1.0, 10.0)),
        latent("b", Normal(1.0, 10.0)),
        latent("c", Normal(0.0, 10.0)),
    )
    with plate("n"):
        observe("y", Normal(a * (-b * given("t")).exp() + c, 0.05))


def gauss_newton(t: torch.Tensor, y: torch.Tensor, steps: int) -> list[torch.Tensor]:
    start = w = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)

    def residuals(w):
        return torch.cat([(w[0] * (-w[1] * t).exp() + w[2] - y) / 0.05, (w - start) / 10])

    found = []
    for _ in range(steps):
        jacobian = torch.func.jacrev(residuals)(w)
        w = w - torch.linalg.solve(jacobian.mT @ jacobian, jacobian.mT @ residuals(w))
        found.append(w)
    return found


def test_one_vector_is_gauss_newton(oracle):
    """Nonlinear: `decay` joint: iterates = Gauss-Newton 1e-12, MAP 1e-8, covariance 1e-7."""
    data = {"t": oracle["decay_t"], "y": oracle["decay_y"]}
    problem = make_problem(build(decay.bind(data)), GBP(), tol=1e-10)
    state = init(problem)
    for want in gauss_newton(data["t"], data["y"], 8):
        state, _ = step(problem, state)
        got = problem.groups.retract(state.charts.points, state.means)["w"][0]
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    posterior = infer(decay, data, method="gbp", tol=1e-9)
    torch.testing.assert_close(posterior.mean("w"), oracle["decay_map"], rtol=0, atol=1e-8)
    torch.testing.assert_close(
        posterior.covariance("w"), oracle["decay_laplace_cov"], rtol=0, atol=1e-7
    )
    assert posterior.log_evidence.kind == "Laplace"


def test_scalars_that_share_every_row_need_damping(oracle):
    """Nonlinear: scalar variables, damping 0.7: MAP 1e-8."""
    data = {"t": oracle["decay_t"], "y": oracle["decay_y"]}
    posterior = infer(
        decay_of_scalars, data, method="gbp", tol=1e-8, damping=0.7, relinearise=1, max_iters=2000
    )
    got = torch.stack([posterior.mean(n) for n in "abc"])
    torch.testing.assert_close(got, oracle["decay_map"], rtol=0, atol=1e-8)
    assert posterior.diagnostics.converged


@model
def ranging():
    point = plate("point", 6)
    with point:
        x = latent("x", Normal(given("x0"), 10.0))
    with plate("anchor"):
        apart = x[given("i", index=point)] - given("at")
        observe("za", Normal(apart.square().sum().sqrt(), 0.1))
    with plate("pair"):
        apart = x[given("j", index=point)] - x[given("k", index=point)]
        observe("zp", Normal(apart.square().sum().sqrt(), 0.1))


@pytest.mark.parametrize(
    "options", [{"damping": 0.0, "relinearise": 1}, {"damping": 0.4, "relinearise": 1}, {}]
)
def test_ranges_reach_the_optimum(oracle, options):
    """Nonlinear: `range`: MAP 1e-7 with damping 0 and 0.4."""
    rows, pairs = oracle["range_ra"], oracle["range_rp"]
    data = {
        "x0": oracle["range_x0"],
        "i": rows[:, 0],
        "at": oracle["range_anchors"][rows[:, 1]],
        "za": oracle["range_za"],
        "zp": oracle["range_zp"],
        "j": pairs[:, 0],
        "k": pairs[:, 1],
    }
    posterior = infer(ranging, data, method="gbp", tol=1e-7, variance="exact", **options)
    torch.testing.assert_close(posterior.mean("x"), oracle["range_map"], rtol=0, atol=1e-7)
    whole = oracle["range_laplace_cov"].reshape(6, 2, 6, 2)
    exact = torch.stack([whole[i, :, i] for i in range(6)])
    torch.testing.assert_close(posterior.covariance("x"), exact, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 10))]
)
def test_small_problems_reach_a_stationary_point_of_scipy(seed):
    """Nonlinear: random small problems against scipy from the same start: gradient < 1e-6."""
    draws = np.random.default_rng(seed)
    ends = torch.from_numpy(draws.integers(0, 5, (14, 2)))
    ends = ends[ends[:, 0] != ends[:, 1]]
    z = torch.from_numpy(draws.normal(size=len(ends)))
    mean = torch.from_numpy(draws.normal(size=(5, 2)))
    x = Family("x", ("n",), (5,), (2,))

    def link(v, _):
        a, b = v[0][:, 0], v[1][:, 0]
        return ((a * b).sum(-1).sin() + 0.5 * (a - b)[:, 0] - z)[:, None] / 0.5

    slots = tuple(Slot("x", ends[:, s : s + 1]) for s in range(2))
    groups = FactorGroups(
        {"x": x},
        (fg.prior(x, mean, torch.ones(5, dtype=torch.float64)), Group("link", slots, (x, x), link)),
        like=torch.zeros((), dtype=torch.float64),
    )

    def residuals(flat):
        points = {"x": torch.as_tensor(flat).reshape(5, 2)}
        return torch.cat([g.outputs(g.gather(points), {}).reshape(-1) for g in groups.groups])

    _, state = fg.run(groups, 8000, tol=1e-9)
    got = fg.means(groups, state)
    jacobian = torch.func.jacrev(residuals)(got)
    assert float((jacobian.mT @ residuals(got)).norm()) < 1e-6
    # Where several minima lie near, another one may be found; it is then as good a one as that of scipy.
    other = least_squares(lambda f: residuals(f).numpy(), np.zeros(10), xtol=1e-12)
    assert float(residuals(got).square().sum()) / 2 < 1.5 * other.cost + 1e-9


@pytest.mark.parametrize("policy", [1, 3, "jit", "outer"])
def test_policies_do_not_matter_where_all_is_linear(policy):
    """Nonlinear: linear h gives the same answer for every relinearisation policy."""
    mean = torch.randn(5, 1, dtype=torch.float64)
    edges = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4], [4, 0]])
    ones, z = torch.ones(5, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    linear = fg.relative(mean, ones, edges, z, torch.eye(1, dtype=torch.float64))
    link = linear.groups[1]
    curved = Group("link", link.slots, link.families, link.function)  # not known to be affine
    unknown = FactorGroups(linear.families, (linear.groups[0], curved), like=linear.like)
    _, state = fg.run(unknown, relinearise=policy, tol=1e-11)
    want, _ = fg.moments(linear)
    assert state.run.converged
    torch.testing.assert_close(fg.means(unknown, state), want, rtol=0, atol=1e-9)


@model
def logistic():
    w = latent(
        "w",
        MultivariateNormal(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)),
    )
    with plate("n"):
        observe("y", Bernoulli(logits=(w * given("x")).sum()))


def test_logistic_regression_is_newton():
    """Nonlinear: logistic regression with a vector weight: iterates = IRLS, MAP and Laplace covariance."""
    x = torch.randn(60, 3, dtype=torch.float64)
    y = (torch.rand(60) < torch.sigmoid(x @ torch.tensor([1.0, -2.0, 0.5]).double())).double()
    problem = make_problem(build(logistic.bind({"x": x, "y": y})), GBP(), tol=1e-10)
    state, w = init(problem), torch.zeros(3, dtype=torch.float64)
    for _ in range(6):
        p = torch.sigmoid(x @ w)
        hessian = (x * (p * (1 - p))[:, None]).mT @ x + torch.eye(3)
        w = w - torch.linalg.solve(hessian, x.mT @ (p - y) + w)
        state, _ = step(problem, state)
        got = problem.groups.retract(state.charts.points, state.means)["w"][0]
        torch.testing.assert_close(got, w, rtol=1e-10, atol=1e-10)
    posterior = infer(logistic, {"x": x, "y": y}, method="gbp", tol=1e-9)
    p = torch.sigmoid(x @ posterior.mean("w"))
    want = torch.linalg.inv((x * (p * (1 - p))[:, None]).mT @ x + torch.eye(3))
    torch.testing.assert_close(posterior.covariance("w"), want, rtol=1e-8, atol=1e-8)


# ---- robust ----------------------------------------------------------------------------------------------------


def line(y: torch.Tensor, kernel: str, k: float = 1.5) -> FactorGroups:
    """A chain of samples: data factors of sd 0.1, smoothness of sd 0.08, both with a kernel."""
    n = len(y)
    x, rows, loss = Family("x", ("n",), (n,)), torch.arange(n)[:, None], Robust(kernel, k)
    data = Group(
        "data",
        (Slot("x", rows),),
        (x,),
        lambda v, _: (v[0] - y[:, None]) / 0.1,
        loss,
        is_affine=True,
    )
    slots = (Slot("x", rows[:-1]), Slot("x", rows[1:]))
    smooth = Group("smooth", slots, (x, x), lambda v, _: (v[1] - v[0]) / 0.08, loss, is_affine=True)
    return FactorGroups({"x": x}, (data, smooth), like=torch.zeros((), dtype=torch.float64))


def test_huber_line_is_the_reweighted_solution(oracle):
    """Robust: `line_huber_irls`: 1e-8."""
    groups = line(oracle["line_y"], "huber")
    _, state = fg.run(groups, tol=1e-11)
    torch.testing.assert_close(
        fg.means(groups, state), oracle["line_huber_irls_mean"], rtol=0, atol=1e-8
    )
    torch.testing.assert_close(
        state.sds["x"][:, 0].square(), oracle["line_huber_irls_var"], rtol=0, atol=1e-8
    )


def test_energy_matching_has_its_own_fixed_point(oracle):
    groups = line(oracle["line_y"], "huber")
    _, state = fg.run(groups, tol=1e-11, matching="energy")
    torch.testing.assert_close(
        fg.means(groups, state), oracle["line_huber_mean"], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(("start", "low", "high"), [(10.0, 0.0, 0.06), (1.0, 0.5, 1.0)])
def test_graduation_frees_a_truncated_smoother(oracle, start, low, high):
    """Robust: truncated, energy-matched, 10 t to t in 60 steps: RMSE < 0.06 (0.82 without)."""
    groups = line(oracle["line_y"], "truncated")
    _, state = fg.run(
        groups, 400, tol=1e-8, matching="energy", graduated=start, start={"x": oracle["line_y"]}
    )
    error = float((fg.means(groups, state) - oracle["line_true"]).square().mean().sqrt())
    assert low < error < high


def test_one_outlier_among_a_hundred_is_the_m_estimator():
    """Robust: one gross outlier among 100 data: Huber location; the outlier's weight is reported."""

    @model
    def location():
        mu = latent("mu", Normal(0.0, 1e6))
        with plate("n"):
            observe("y", Normal(mu, 1.0).robust("huber", 1.345))

    y = torch.randn(100, dtype=torch.float64)
    y[17] = 500.0
    posterior = infer(location, {"y": y}, method="gbp", tol=1e-10)
    mu = float(posterior.mean("mu"))
    slope = float((y - mu).clamp(-1.345, 1.345).sum())
    assert abs(slope) < 1e-6
    weight = posterior.diagnostics.notes["robust weights"]["y"]
    assert int(weight.argmin()) == 17 and float(weight[17]) < 0.01


def test_robust_line_with_thirty_percent_outliers():

    @model
    def fit():
        w = latent("w", MultivariateNormal(torch.zeros(2).double(), 100 * torch.eye(2).double()))
        with plate("n"):
            observe("y", Normal(w[0] + w[1] * given("t"), 0.1).robust("tukey", 4.685))

    t = torch.linspace(-1, 1, 100, dtype=torch.float64)
    y = 2 - 3 * t + 0.1 * torch.randn(100, dtype=torch.float64)
    y[::10], y[3::10], y[7::10] = 8.0, -9.0, 5.0
    posterior = infer(fit, {"t": t, "y": y}, method="gbp")
    assert posterior.diagnostics.converged
    assert float((posterior.mean("w") - torch.tensor([2.0, -3.0])).abs().max()) < 0.1


def test_rows_that_are_not_finite_are_dropped_and_counted():
    """Robustness: NaN input row: that factor is dropped and counted."""
    x = Family("x", ("n",), (3,))
    z = torch.tensor([[1.0], [torch.nan], [3.0]], dtype=torch.float64)
    rows = torch.arange(3)[:, None]
    data = Group(
        "y", (Slot("x", rows),), (x,), lambda v, _: v[0] - z, is_affine=True, is_fixed=True
    )
    own = fg.prior(x, torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    groups = FactorGroups({"x": x}, (own, data), like=torch.zeros((), dtype=torch.float64))
    _, state = fg.run(groups, 5)
    assert state.run.dropped == 1
    assert fg.means(groups, state).tolist() == [0.5, 0.0, 1.5]
