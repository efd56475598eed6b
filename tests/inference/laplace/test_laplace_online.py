"""Going on with more data, and windows of fixed length, against a Kalman filter and fits from scratch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ppl import infer
from ppl.errors import DataError
from ppl.models import slam
from tests.small_programs import autoregression
from tests.smoothers import autoregression_smoother

LEVEL = {"gain": 1.0, "step": 0.5, "noise": 1.0, "first_mean": 1.0, "first_sd": 3.0}
local_level = autoregression(**LEVEL)


@pytest.mark.parametrize("lag", [1, 2, 7])
@pytest.mark.parametrize("batch", [1, 3])
def test_fixed_lag_is_the_kalman_filter(lag, batch):
    y = np.random.default_rng(0).normal(size=16).cumsum()
    exact = autoregression_smoother(y, **LEVEL)
    means, covariances = exact.filtered
    posterior = infer(local_level, {"y": y[:4]}, method="laplace")
    for end in range(4 + batch, 17, batch):
        posterior = posterior.extend({"y": y[end - batch : end]}, lag={"time": lag})
        assert float(posterior.mean("x")[-1]) == pytest.approx(means[end - 1, 0], abs=1e-9)
        assert float(posterior.sd("x")[-1]) ** 2 == pytest.approx(
            covariances[end - 1, 0, 0], abs=1e-9
        )
    if batch == 1:
        assert posterior.log_evidence.value == pytest.approx(exact.log_evidence, abs=1e-9)
        # What left the window was smoothed with the data that the window had seen by then.
        seen = infer(local_level, {"y": y[: lag + 4]}, method="laplace")
        assert float(posterior.mean("x")[4]) == pytest.approx(float(seen.mean("x")[4]), abs=1e-9)
        assert float(posterior.sd("x")[4]) == pytest.approx(float(seen.sd("x")[4]), abs=1e-9)


def test_without_a_lag_it_is_the_smoother():
    y = np.random.default_rng(1).normal(size=20).cumsum()
    posterior = infer(local_level, {"y": y[:5]}, method="laplace")
    for end in (6, 12, 20):
        posterior = posterior.extend({"y": y[len(posterior.mean("x")) : end]})
    whole = infer(local_level, {"y": y}, method="laplace")
    torch.testing.assert_close(posterior.mean("x"), whole.mean("x"), atol=1e-9, rtol=0.0)
    torch.testing.assert_close(posterior.sd("x"), whole.sd("x"), atol=1e-9, rtol=0.0)
    assert posterior.log_evidence.value == pytest.approx(whole.log_evidence.value, abs=1e-9)


def loop(n=24, seed=0):
    rng = np.random.default_rng(seed)
    i, j = np.r_[np.arange(n - 1), 0], np.r_[np.arange(1, n), n - 1]
    step = np.array([1.0, 0.0, 2 * np.pi / n])
    z = step + rng.normal(size=(n, 3)) * [0.05, 0.05, 0.02]
    z[-1] = [0.0, 0.0, 0.0]
    z[-1] = relative(n, step)
    return {"i": i, "j": j, "z": z, "sd": np.tile([0.05, 0.05, 0.02], (n, 1))}


def relative(n, step):
    """The last pose of the loop, seen from the first."""
    pose = np.zeros(3)
    for _ in range(n - 1):
        c, s = np.cos(pose[2]), np.sin(pose[2])
        pose = pose + [c * step[0] - s * step[1], s * step[0] + c * step[1], step[2]]
    return pose


def test_new_poses_are_placed_by_their_edges():
    data = loop()
    rows = lambda a, b: {k: v[a:b] for k, v in data.items()}  # noqa: E731
    program = slam.pose_graph_2d(noise="sd")
    posterior = infer(program, rows(0, 5), method="laplace", start={"x": np.zeros((6, 3))})
    for k in range(5, 24):
        posterior = posterior.extend(rows(k, k + 1))
        assert posterior.diagnostics.converged
        assert posterior.diagnostics.iterations <= 8
    whole = infer(program, data, method="laplace", start={"x": posterior.mean("x")})
    torch.testing.assert_close(posterior.mean("x"), whole.mean("x"), atol=1e-6, rtol=0.0)
    torch.testing.assert_close(posterior.sd("x"), whole.sd("x"), atol=1e-6, rtol=1e-4)


def test_window_of_poses_follows_the_odometry():
    data = loop()
    rows = lambda a, b: {k: v[a:b] for k, v in data.items()}  # noqa: E731
    program = slam.pose_graph_2d(noise="sd")
    whole = infer(program, rows(0, 20), method="laplace", start={"x": np.zeros((21, 3))})
    posterior = infer(program, rows(0, 5), method="laplace", start={"x": np.zeros((6, 3))})
    for k in range(5, 20):
        posterior = posterior.extend(rows(k, k + 1), lag={"pose": 3})
    torch.testing.assert_close(posterior.mean("x"), whole.mean("x"), atol=1e-6, rtol=0.0)
    torch.testing.assert_close(posterior.sd("x")[-1], whole.sd("x")[-1], atol=1e-6, rtol=1e-6)
    draws = posterior.samples(4000)["x"]
    torch.testing.assert_close(draws.std(0), posterior.sd("x"), rtol=0.1, atol=1e-4)
    with pytest.warns(UserWarning, match="1 new rows touch closed elements"):
        posterior.extend(
            {"i": [0], "j": [20], "z": [[0.0, 0.0, 0.0]], "sd": [[1.0, 1.0, 1.0]]}, lag={"pose": 3}
        )


def test_bad_lags_are_refused():
    posterior = infer(local_level, {"y": np.zeros(4)}, method="laplace")
    with pytest.raises(DataError, match="no latent lies in plate 'day'"):
        posterior.extend({"y": [0.0]}, lag={"day": 3})
    with pytest.raises(DataError, match="at least 1"):
        posterior.extend({"y": [0.0]}, lag={"time": 0})
