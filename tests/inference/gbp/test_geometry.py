"""Pose graphs, bundle adjustment and images with real data; skipped in words where it is not on the machine."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ppl import given, infer, latent, model, observe, plate
from ppl.distributions import ConcentratedNormal
from ppl.inference.gbp import GBP, init, step
from ppl.inference.gbp.problem import make_problem
from ppl.inference.groups.build import build
from ppl.manifolds import SE2
from ppl.models import bundle_adjustment, datasets, denoise, pose_graph_2d
from tests.data_files import data_file


def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(data_file(f"gbp/{name}.npz")) as file:
        return {k: file[k] for k in file.files}


def iterate(groups, rounds: int, *, tol: float = 1e-6, **options):
    problem = make_problem(groups, GBP(**options), tol=tol)
    state = init(problem)
    for _ in range(rounds):
        state, info = step(problem, state)
        if info.done:
            break
    return state


def manhattan(start: torch.Tensor, rounds: int, **options):
    graph = datasets.pose_graph("manhattan3500")
    groups = build(pose_graph_2d.bind(graph.data))
    return groups, iterate(groups, rounds, start={"x": start}, **options)


def test_energy_of_a_pose_graph_follows_the_convention():
    """Pose graphs: energy at `opt` equals `opt_energy` 1e-9."""
    data = arrays("manhattan3500")
    groups, state = manhattan(torch.from_numpy(data["opt"]), 0)
    assert state.run.energy == pytest.approx(float(data["opt_energy"]), rel=1e-9)


@pytest.mark.slow
def test_messages_settle_a_perturbed_pose_graph():
    """Pose graphs: from `opt` plus 0.1 noise within 0.1 % of `opt_energy` in 600 rounds (M3500)."""
    data = arrays("manhattan3500")
    start = torch.from_numpy(data["opt"])
    _, state = manhattan(start + 0.1 * torch.randn(start.shape, dtype=torch.float64), 600)
    assert state.best.energy < 1.001 * float(data["opt_energy"])


@pytest.mark.slow
def test_messages_from_odometry_are_not_called_converged():
    """Pose graphs: from `init` energy below 5000 in 1000 rounds; `converged` must be False."""
    data = arrays("manhattan3500")
    _, state = manhattan(torch.from_numpy(data["init"]), 1000)
    assert state.best.energy < 5000
    assert not state.run.converged


@model
def circle(n: int = 8):
    pose = plate("pose", n)
    with pose:
        x = latent("x", ConcentratedNormal(SE2, given("guess"), 0.5))
    with plate("edge"):
        i, j = given("i", index=pose), given("j", index=pose)
        observe("z", ConcentratedNormal(SE2, SE2.between(x[i], x[j]), 0.1))


def test_angles_never_wrap_wrongly():
    """Pose graphs: wrap-around: edges across ±π. A loop of eight quarter-right turns closes."""
    n = 8
    heading = torch.arange(n, dtype=torch.float64) * 2 * math.pi / n
    heading = torch.remainder(heading + math.pi, 2 * math.pi) - math.pi
    truth = torch.stack([heading.cos(), heading.sin(), heading], 1)
    i = torch.arange(n)
    j = (i + 1) % n
    z = SE2.between(truth[i], truth[j])
    guess = truth + 0.2 * torch.randn(n, 3, dtype=torch.float64)
    posterior = infer(
        circle, {"guess": guess, "i": i, "j": j, "z": z}, method="gbp", tol=1e-6, variance="gbp"
    )
    laplace = infer(circle, {"guess": guess, "i": i, "j": j, "z": z}, method="laplace")
    assert posterior.diagnostics.converged
    apart = SE2.local(laplace.mean("x"), posterior.mean("x"))
    assert float(apart.abs().max()) < 1e-4


# ---- bundle adjustment -----------------------------------------------------------------------------------------


def reprojection(**options) -> tuple[dict[int, float], bool]:
    """Mean reprojection error in pixels after 100 and 400 rounds, and whether the run calls itself converged."""
    a = {k: torch.from_numpy(v) for k, v in arrays("ba_fr1desk_vsmall").items()}
    data = {
        "pose_mean": a["cams0"],
        "pose_sd": a["prior_prec_cam"].rsqrt()[:, None].expand(-1, 6),
        "point_mean": a["lms0"],
        "point_sd": a["prior_prec_lm"].rsqrt()[:, None].expand(-1, 3),
        "intrinsics": a["K"],
        "sigma": float(a["sigma_px"]),
        "seen_by": a["cam_idx"],
        "shows": a["lm_idx"],
        "pixel": a["meas"],
    }
    groups = build(bundle_adjustment.bind(data))
    pixel, found = groups.group("pixel"), {}
    problem = make_problem(groups, GBP(**options), tol=1e-3)
    state = init(problem)
    for at in range(1, 401):
        state, _ = step(problem, state)
        if at in (100, 400):
            points = groups.retract(state.charts.points, state.means)
            outputs = pixel.outputs(pixel.gather(points), {})
            found[at] = float(a["sigma_px"] * outputs.norm(dim=-1).mean())
    return found, state.run.converged


@pytest.mark.slow
def test_bundle_adjustment_just_in_time():
    """Bundle adjustment: error < 1.5 px within 100 rounds, < 1.2 px within 400 (start 198.9)."""
    found, _ = reprojection()
    assert found[100] < 1.5 and found[400] < 1.2


@pytest.mark.slow
def test_relinearising_every_round_is_not_called_converged():
    """Bundle adjustment: relinearising every round must be flagged as not converging."""
    found, converged = reprojection(relinearise=1, cure=False)
    assert found[400] > 2 and not converged


# ---- images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tol", "error"), [(torch.float64, 1e-9, 1e-6), (torch.float32, 1e-6, 1e-4)]
)
def test_huber_image_is_the_map(dtype, tol, error):
    """Images: image64 Huber MAP 1e-6 (float32 1e-4)."""
    a = arrays("image64_oracle")
    program = denoise(noise_kernel=("huber", float(a["t_obs"])))
    bound = program.bind({"pixel": a["noisy"]}, dtype=dtype)
    groups = build(bound)
    state = iterate(groups, 600, tol=tol, start={"x": a["noisy"]})
    got = groups.retract(state.charts.points, state.means)["x"].reshape(64, 64).double()
    torch.testing.assert_close(got, torch.from_numpy(a["huber_map"]), rtol=0, atol=error)


def test_quadratic_image_and_its_variances():
    """Images: quadratic MAP 1e-10; variance ratio in [0.83, 0.93]."""
    a = arrays("image64_oracle")
    program = denoise(smooth_kernel=None)
    posterior = infer(program, {"pixel": a["noisy"]}, method="gbp", tol=1e-11, variance="gbp")
    torch.testing.assert_close(
        posterior.mean("x"), torch.from_numpy(a["quad_map"]), rtol=0, atol=1e-10
    )
    ratio = posterior.sd("x").square() / torch.from_numpy(a["quad_var"])
    assert 0.83 <= float(ratio.min()) and float(ratio.max()) <= 0.93
    torch.testing.assert_close(
        posterior.sd("x").square(), torch.from_numpy(a["quad_bp_var"]), rtol=0, atol=1e-9
    )


@pytest.mark.slow
def test_bear_is_denoised():
    """Images: bear frame 0, pairwise, every pair twice: PSNR >= 30.5 dB from 18.7, 200 rounds."""
    arrays("bear_video")
    clean, noisy = datasets.bear()
    settings = {
        "noise": 0.2,
        "noise_kernel": ("truncated", 0.14),
        "smooth": 1.3,
        "smooth_kernel": ("truncated", 0.35),
    }
    bound = denoise(**settings, colours=True, copies=2).bind({"pixel": noisy}, dtype=torch.float32)
    state = iterate(
        build(bound), 200, matching="energy", damping=0.7, cure=False, start={"x": noisy}
    )
    found = (state.charts.points["x"].reshape(-1) + state.means["x"][:, 0]).clamp(0, 1).double()
    error = (found.reshape(clean.shape) - torch.from_numpy(clean)).square().mean()
    assert float(-10 * error.log10()) >= 30.5
