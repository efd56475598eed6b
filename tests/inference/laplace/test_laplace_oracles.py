"""Modes and covariances that were computed by other means, from the files of `data/gbp` and by SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares

from ppl import Bernoulli, Normal, Poisson, given, infer, latent, model, observe, plate
from ppl.inference.groups import build
from ppl.models import datasets, slam


def arrays(name):
    path = datasets.find(f"gbp/{name}.npz")
    if path is None:
        pytest.skip(f"the data file 'gbp/{name}.npz' is not on this machine")
    with np.load(path) as file:
        return {key: file[key] for key in file}


OPTIMISERS = ("lm", "gauss_newton", "dogleg")


@model
def decay():
    mean = given("mean")
    a = latent("a", Normal(mean, 10.0))
    with plate("sample"):
        observe("y", Normal(a[0] * (-a[1] * given("t")).exp() + a[2], 0.05))


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_decay(optimiser):
    o = arrays("nonlinear_oracles")
    data = {"mean": [1.0, 1.0, 0.0], "t": o["decay_t"], "y": o["decay_y"]}
    found = infer(decay, data, method="laplace", optimiser=optimiser)
    np.testing.assert_allclose(found.mean("a"), o["decay_map"], atol=1e-8)
    np.testing.assert_allclose(found.covariance("a"), o["decay_laplace_cov"], atol=1e-7)
    assert found.diagnostics.converged


@model
def ranges():
    point, anchor = plate("point"), plate("anchor")
    with point:
        x = latent("x", Normal(given("x0"), 10.0))
    with anchor:
        where = given("anchors")
    with plate("reading"):
        off = x[given("ra_point", index=point)] - where[given("ra_anchor", index=anchor)]
        observe("za", Normal(off.square().sum(-1).sqrt(), 0.1))
    with plate("pair"):
        off = x[given("rp_first", index=point)] - x[given("rp_second", index=point)]
        observe("zp", Normal(off.square().sum(-1).sqrt(), 0.1))


def test_ranges():
    o = arrays("nonlinear_oracles")
    data = {
        "x0": o["range_x0"], "anchors": o["range_anchors"],
        "ra_point": o["range_ra"][:, 0], "ra_anchor": o["range_ra"][:, 1], "za": o["range_za"],
        "rp_first": o["range_rp"][:, 0], "rp_second": o["range_rp"][:, 1], "zp": o["range_zp"],
    }  # fmt: skip
    found = infer(ranges, data, method="laplace")
    np.testing.assert_allclose(found.mean("x"), o["range_map"], atol=1e-7)
    blocks = o["range_laplace_cov"].reshape(6, 2, 6, 2)
    expected = np.stack([blocks[k, :, k] for k in range(6)])
    np.testing.assert_allclose(found.covariance("x"), expected, atol=1e-7)
    joint = found.joint("zp").covariance[2]
    i, j = o["range_rp"][2]
    np.testing.assert_allclose(joint[:2, 2:], blocks[i, :, j], atol=1e-7)


@pytest.mark.parametrize("name", ["manhattan3500", "intel", "synthetic_manhattan3500"])
def test_pose_graphs(name):
    o = arrays(name)
    graph = datasets.pose_graph(name)
    found = infer(
        slam.pose_graph_2d, graph.data, method="laplace", start={"x": graph.start}, max_iters=10
    )
    assert found.diagnostics.converged
    assert found.diagnostics.notes["energy"] == pytest.approx(float(o["opt_energy"]), rel=1e-9)
    covariance = found.covariance("x").numpy()[o["marg_idx"]]
    scale = np.abs(o["marg_cov"]).max((1, 2), keepdims=True)
    assert (np.abs(covariance - o["marg_cov"]) / scale).max() < 1e-4


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_pose_graph_by_every_optimiser(optimiser):
    o = arrays("intel")
    graph = datasets.pose_graph("intel")
    options = {"start": {"x": graph.start}, "optimiser": optimiser}
    found = infer(slam.pose_graph_2d, graph.data, method="laplace", **options)
    assert found.diagnostics.notes["energy"] == pytest.approx(float(o["opt_energy"]), rel=1e-9)


def test_energy_of_a_pose_graph_at_the_minimum():
    o = arrays("intel")
    groups = build(slam.pose_graph_2d.bind(datasets.pose_graph("intel").data))
    energy = float(groups.energy({"x": torch.from_numpy(o["opt"])}))
    assert energy == pytest.approx(float(o["opt_energy"]), rel=1e-9)


def test_bundle_adjustment():
    o = arrays("ba_fr1desk_vsmall")
    found = infer(slam.bundle_adjustment, datasets.desk(), method="laplace")
    assert found.diagnostics.notes["energy"] == pytest.approx(float(o["cost_map"]), rel=1e-6)
    pose, point = (found.mean(n) for n in ("pose", "point"))
    seen = slam.project(pose[o["cam_idx"]], point[o["lm_idx"]], torch.from_numpy(o["K"]))
    error = (seen - torch.from_numpy(o["meas"])).norm(dim=-1).mean()
    assert float(error) == pytest.approx(float(o["are_map"]), abs=2e-3)


@model
def smooth_line(kernel=None):
    site = plate("site", ordered=True)
    with site:
        x = latent("x", Normal(0.0, 1e6))
        law = Normal(x, 0.1)
        observe("y", law if kernel is None else law.robust(kernel, 1.5))
    with plate("step"):
        first, second = given("first", index=site), given("second", index=site)
        move = Normal(x[second] - x[first], 0.08)
        observe("zero", move if kernel is None else move.robust(kernel, 1.5))


def line_data(o):
    n = len(o["line_y"])
    return {
        "y": o["line_y"],
        "first": np.arange(n - 1),
        "second": np.arange(1, n),
        "zero": np.zeros(n - 1),
    }


def test_quadratic_line():
    o = arrays("nonlinear_oracles")
    found = infer(smooth_line, line_data(o), method="laplace")
    np.testing.assert_allclose(found.mean("x"), o["line_quad_mean"], atol=1e-8)
    np.testing.assert_allclose(found.sd("x") ** 2, o["line_quad_var"], rtol=1e-8)
    assert found.diagnostics.iterations == 1


def test_huber_line():
    o = arrays("nonlinear_oracles")
    found = infer(smooth_line(kernel="huber"), line_data(o), method="laplace")
    np.testing.assert_allclose(found.mean("x"), o["line_huber_irls_mean"], atol=1e-7)
    np.testing.assert_allclose(found.sd("x") ** 2, o["line_huber_irls_var"], rtol=1e-6)


def test_huber_line_with_weights_by_height():
    o = arrays("nonlinear_oracles")
    found = infer(smooth_line(kernel="huber"), line_data(o), method="laplace", matching="energy")
    np.testing.assert_allclose(found.mean("x"), o["line_huber_mean"], atol=1e-6)


def test_graduated_non_convexity():
    o = arrays("nonlinear_oracles")
    options = {"method": "laplace", "matching": "energy", "start": {"x": o["line_y"]}}
    rmse = lambda p: float((p.mean("x") - torch.from_numpy(o["line_true"])).square().mean().sqrt())  # noqa: E731
    stuck = infer(smooth_line(kernel="truncated"), line_data(o), graduated=1.0, **options)
    freed = infer(smooth_line(kernel="truncated"), line_data(o), **options)
    assert rmse(stuck) > 0.5
    assert rmse(freed) < 0.06


# ---- SciPy ---------------------------------------------------------------------------------------


@model
def curve():
    w = latent("w", Normal(given("mean"), 3.0))
    with plate("sample"):
        t = given("t")
        mean = w[0] * (w[1] * t).tanh() + w[2] * (w[3] * t).sin()
        observe("y", Normal(mean, 0.1))


@pytest.mark.parametrize("seed", range(10))
def test_random_least_squares_problems(seed):
    rng = np.random.default_rng(seed)
    truth, mean, t = rng.normal(size=4) * 1.5, rng.normal(size=4), np.linspace(-2, 2, 30)
    y = (
        truth[0] * np.tanh(truth[1] * t)
        + truth[2] * np.sin(truth[3] * t)
        + 0.1 * rng.normal(size=30)
    )

    def residual(w):
        return np.r_[(y - w[0] * np.tanh(w[1] * t) - w[2] * np.sin(w[3] * t)) / 0.1, (w - mean) / 3]

    found = infer(curve, {"mean": mean, "t": t, "y": y}, method="laplace")
    at = found.mean("w").numpy()
    slope = least_squares(residual, at, max_nfev=1).grad
    assert np.abs(slope).max() < 1e-4 * max(1.0, residual(at) @ residual(at))
    # Local minima may differ; where SciPy starts at our answer, it stays there.
    again = least_squares(residual, at, xtol=1e-14, ftol=1e-14, gtol=1e-14)
    np.testing.assert_allclose(again.x, at, atol=1e-6)
    assert found.diagnostics.converged


# ---- other likelihoods ---------------------------------------------------------------------------


@model
def logistic():
    w = latent("w", Normal(given("mean"), 2.0))
    with plate("case"):
        observe("hit", Bernoulli(logits=(w * given("x")).sum(-1)))


@model
def counts():
    w = latent("w", Normal(given("mean"), 2.0))
    with plate("case"):
        observe("number", Poisson((w * given("x")).sum(-1).exp()))


def regression(kind):
    """Fit, mode and Hessian by Newton's method."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(200, 3))
    eta = x @ np.array([0.5, -1.0, 0.3])
    y = rng.binomial(1, 1 / (1 + np.exp(-eta))) if kind == "logistic" else rng.poisson(np.exp(eta))
    program, name = (logistic, "hit") if kind == "logistic" else (counts, "number")
    found = infer(program, {"mean": np.zeros(3), "x": x, name: y.astype(float)}, method="laplace")
    w, hessian = np.zeros(3), np.eye(3)
    for _ in range(30):
        mean = 1 / (1 + np.exp(-x @ w)) if kind == "logistic" else np.exp(x @ w)
        weight = mean * (1 - mean) if kind == "logistic" else mean
        hessian = x.T @ (weight[:, None] * x) + np.eye(3) / 4
        w = w + np.linalg.solve(hessian, x.T @ (y - mean) - w / 4)
    return found, w, hessian


@pytest.mark.parametrize("kind", ["logistic", "poisson"])
def test_mode_of_a_regression_equals_newton(kind):
    found, w, _ = regression(kind)
    np.testing.assert_allclose(found.mean("w"), w, atol=1e-8)


@pytest.mark.parametrize("kind", ["logistic", "poisson"])
def test_covariance_of_a_regression(kind):
    found, _, hessian = regression(kind)
    np.testing.assert_allclose(found.covariance("w"), np.linalg.inv(hessian), atol=1e-8)
