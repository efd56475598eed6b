"""Pose graphs and bundle adjustment: energies of stored optima, files, simulators, broken files."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ppl import DataError, UnsupportedError, infer
from ppl.manifolds import SE3
from ppl.models import bundle_adjustment, datasets, pose_graph_2d, pose_graph_3d
from ppl.models.pose_graphs import (
    full_information,
    odometry,
    read_g2o,
    split_closures,
    write_g2o,
)
from ppl.models.slam import between, edge_residual, project
from ppl.models.worlds import camera_room, manhattan_world, sphere_world
from tests.models.joint_density import joint_density

POSE_GRAPHS = ("manhattan3500", "intel", "synthetic_manhattan3500")


def oracle(name: str) -> dict[str, np.ndarray]:
    path = datasets.find(f"gbp/{name}.npz")
    if path is None:
        pytest.skip(f"the data file 'gbp/{name}.npz' is not on this machine")
    with np.load(path) as archive:
        return {key: archive[key] for key in archive.files}


def log_norm(precisions: np.ndarray) -> float:
    """Sum of the logs of the normalisers of Gaussians with these precision matrices."""
    *batch, d, _ = precisions.shape
    whole = 0.5 * np.linalg.slogdet(precisions)[1].sum()
    return float(whole - 0.5 * d * math.prod(batch) * math.log(2 * math.pi))


@pytest.mark.parametrize("name", POSE_GRAPHS)
def test_the_energy_at_the_stored_optimum_is_the_stored_energy(name):
    stored, graph = oracle(name), datasets.pose_graph(name)
    bound = pose_graph_2d.bind(graph.data)
    anchor = float(stored["anchor_precision"]) * np.eye(3)
    constant = log_norm(graph.data["info"]) + log_norm(anchor)
    energy = constant - joint_density(bound, {"x": stored["opt"]})
    assert energy == pytest.approx(float(stored["opt_energy"]), rel=1e-9)


@pytest.mark.parametrize("name", POSE_GRAPHS)
def test_odometry_is_that_of_the_file(name):
    oracle(name)
    graph = datasets.pose_graph(name)
    start = odometry(graph.data["i"], graph.data["j"], graph.data["z"])
    assert float(between(*map(torch.as_tensor, (graph.start, start))).abs().max()) < 1e-9


def test_bundle_adjustment_costs_what_is_stored():
    stored, data = oracle("ba_fr1desk_vsmall"), datasets.desk()
    constant = log_norm(stored["prior_prec_cam"][:, None, None] * np.eye(6))
    constant += log_norm(stored["prior_prec_lm"][:, None, None] * np.eye(3))
    constant += log_norm(np.broadcast_to(np.eye(2) / stored["sigma_px"] ** 2, (1801, 2, 2)))
    point = {"pose": stored["cams_map"], "point": stored["lms_map"]}
    energy = constant - joint_density(bundle_adjustment.bind(data), point)
    assert energy == pytest.approx(float(stored["cost_map"]), rel=1e-9)


def test_reprojection_error_is_what_is_stored():
    stored = oracle("ba_fr1desk_vsmall")
    ends = (stored["cams_map"][stored["cam_idx"]], stored["lms_map"][stored["lm_idx"]], stored["K"])
    pixels = project(*map(torch.as_tensor, ends)).numpy()
    error = np.linalg.norm(pixels - stored["meas"], axis=1).mean()
    assert error == pytest.approx(float(stored["are_map"]), rel=1e-6)


def test_a_turn_across_pi_is_a_small_one():
    a, b = torch.tensor([0.0, 0.0, 3.1]), torch.tensor([0.0, 0.0, -3.1])
    assert float(between(a, b)[2]) == pytest.approx(2 * math.pi - 6.2, abs=1e-6)
    assert edge_residual(a, b, between(a, b)).abs().max() < 1e-6
    round_again = a + torch.tensor([0.0, 0.0, 4 * math.pi])
    assert torch.allclose(between(round_again, b), between(a, b), atol=1e-5)


def test_standard_deviations_and_information_say_the_same():
    data = manhattan_world(40, seed=1)
    info = data.data["info"]
    sd = {**data.data, "sd": np.diagonal(info, axis1=1, axis2=2) ** -0.5}
    by_info = joint_density(pose_graph_2d.bind(data.data), {"x": data.truth})
    by_sd = joint_density(pose_graph_2d(noise="sd").bind(sd), {"x": data.truth})
    assert by_info == pytest.approx(by_sd, rel=1e-10)


@pytest.mark.parametrize("model, world", [(pose_graph_2d, manhattan_world), (pose_graph_3d, None)])
def test_a_kernel_changes_closures_only(model, world):
    graph = world(60, closures=20) if world else sphere_world(5, 12)
    parts = split_closures(graph.data)
    robust = model(kernel="geman_mcclure", threshold=3.0).bind(parts)
    factors = robust.graph.factors
    assert {"edge", "closure"} <= set(robust.graph.plates)
    assert [n for n in factors if type(factors[n].law.family).__name__ == "Robust"] == [
        "closure" if world else "closure_z"
    ]
    # A closure that is grossly wrong costs no more than the ceiling of its kernel.
    wrong = {**parts, "closure_z": parts["closure_z"].copy()}
    wrong["closure_z"][0, 0] += 1e6
    change = joint_density(robust, {"x": graph.truth}) - joint_density(
        model(kernel="geman_mcclure", threshold=3.0).bind(wrong), {"x": graph.truth}
    )
    assert 0 < change <= 4.5


def test_closures_split_and_unite():
    graph = manhattan_world(50, closures=15)
    parts = split_closures(graph.data)
    assert len(parts["i"]) == 49 and len(parts["closure_i"]) == len(graph.data["i"]) - 49
    assert np.array_equal(np.concatenate([parts["z"], parts["closure_z"]]), graph.data["z"])


@pytest.mark.parametrize("world", [manhattan_world, sphere_world, camera_room])
def test_simulators_repeat_themselves(world):
    sizes = (5, 8) if world is sphere_world else (20,)
    one, two, other = (torch.utils._pytree.tree_leaves(world(*sizes, seed=s)) for s in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_streets_are_a_grid_and_errors_have_their_size():
    world = manhattan_world(2000, noise=(0.05, 0.02), seed=2)
    assert np.abs(world.truth[:, :2] - world.truth[:, :2].round()).max() < 1e-9
    assert np.linalg.norm(np.diff(world.truth[:, :2], axis=0), axis=1) == pytest.approx(1.0)
    ends = (world.truth[world.data["i"]], world.truth[world.data["j"]], world.data["z"])
    errors = edge_residual(*map(torch.as_tensor, ends)).numpy()
    assert errors.std(0) == pytest.approx([0.05, 0.05, 0.02], rel=0.1)
    assert len(errors) == 1999 + 1000
    closures = split_closures(world.data)
    apart = world.truth[closures["closure_i"], :2] - world.truth[closures["closure_j"], :2]
    assert np.abs(apart).max() < 1e-9


def test_outliers_are_as_many_as_asked_for():
    world = manhattan_world(400, closures=100, outliers=0.3, seed=0)
    ends = (world.truth[world.data["i"]], world.truth[world.data["j"]], world.data["z"])
    errors = edge_residual(*map(torch.as_tensor, ends)).abs().amax(1)
    assert int((errors > 0.5).sum()) in (29, 30)


def test_the_sphere_is_closed_and_its_errors_have_their_size():
    world = sphere_world(20, 20, radius=10.0, noise=(0.1, 0.02), seed=0)
    assert np.linalg.norm(world.truth[:, :3], axis=1) == pytest.approx(10.0)
    i, j, z = (torch.as_tensor(world.data[key]) for key in ("i", "j", "z"))
    truth = torch.as_tensor(world.truth)
    errors = SE3.local(SE3.between(truth[i], truth[j]), z).numpy()
    assert errors.std(0) == pytest.approx([0.1] * 3 + [0.02] * 3, rel=0.12)
    assert len(z) == 399 + 380


def test_odometry_in_space_multiplies_motions_in_order():
    world = sphere_world(3, 7, seed=5)
    pose, expected = torch.as_tensor(world.start[0]), [world.start[0]]
    for motion in torch.as_tensor(world.data["z"][:20]):
        pose = SE3.compose(pose, motion)
        expected.append(pose.numpy())
    away = SE3.local(torch.as_tensor(np.stack(expected)), torch.as_tensor(world.start))
    assert float(away.abs().max()) < 1e-10


def test_odometry_asks_for_every_step():
    with pytest.raises(DataError, match="no edge leads from pose 1 to the next"):
        odometry([0, 0, 2], [1, 2, 3], np.zeros((3, 3)))


def test_cameras_see_what_they_should():
    data, truth = camera_room(5, 40, sigma=0.5, seed=0)
    bound = bundle_adjustment.bind(data)
    drawn = bundle_adjustment.do(**truth).sample(50, data, seed=0)["pixel"]
    off = (data["pixel"] - drawn.mean(0).numpy()) / 0.5
    assert off.std() == pytest.approx(1.0, rel=0.1)
    assert joint_density(bound, truth) > joint_density(
        bound, {"pose": data["pose_mean"], "point": data["point_mean"]}
    )
    robust = bundle_adjustment(kernel="huber").bind(data)
    assert type(robust.graph.factors["pixel"].law.family).__name__ == "Robust"


def test_flat_poses_cannot_be_drawn():
    world = manhattan_world(10, seed=0)
    with pytest.raises(UnsupportedError, match="improper and cannot be drawn"):
        pose_graph_2d.sample(1, world.data)


def squared_distance(truth: torch.Tensor, posterior, manifold=None) -> float:
    """Mean over poses of the squared distance of the truth, in standard deviations."""
    mean = posterior.mean("x")
    away = manifold.local(mean, truth) if manifold else truth - mean
    if manifold is None:
        away[:, 2] = torch.atan2(torch.sin(away[:, 2]), torch.cos(away[:, 2]))
    white = torch.linalg.solve(posterior.covariance("x")[1:], away[1:])
    return float((away[1:] * white).sum(-1).mean())


def test_a_fit_is_as_far_from_the_truth_as_it_says():
    flat, space = manhattan_world(300, seed=6), sphere_world(10, 15, noise=(0.1, 0.02), seed=1)
    plane = infer(pose_graph_2d, flat.data, method="laplace", start={"x": flat.start})
    sphere = infer(pose_graph_3d, space.data, method="laplace", start={"x": space.start})
    # Poses err together, so these means of 3 and of 6 scatter much more than independent ones.
    assert 1 < squared_distance(torch.as_tensor(flat.truth), plane) < 8
    assert 2 < squared_distance(torch.as_tensor(space.truth), sphere, SE3) < 14


def test_a_kernel_lets_wrong_closures_go():
    world = manhattan_world(300, closures=100, outliers=0.2, seed=3)
    robust = infer(
        pose_graph_2d(kernel="geman_mcclure"),
        split_closures(world.data),
        method="laplace",
        start={"x": world.start},
    )
    off = np.linalg.norm(robust.mean("x").numpy()[:, :2] - world.truth[:, :2], axis=1)
    drift = np.linalg.norm(world.start[:, :2] - world.truth[:, :2], axis=1)
    assert off.mean() < 0.5 * drift.mean()


def test_messages_by_a_tree_reach_the_optimum_of_laplace():
    world = manhattan_world(60, closures=20, seed=2)
    options = {"start": {"x": world.start}}
    exact = infer(pose_graph_2d, world.data, method="laplace", **options)
    loopy = infer(
        pose_graph_2d, world.data, method="gbp", schedule="tree", max_iters=2000, **options
    )
    assert loopy.diagnostics.converged
    gap = (loopy.mean("x") - exact.mean("x")).abs() / exact.sd("x")
    assert float(gap.max()) < 0.3


def test_bundle_adjustment_finds_cameras_and_landmarks():
    data, truth = camera_room(5, 60, seed=2)
    posterior = infer(bundle_adjustment, data, method="laplace")
    for name in ("pose", "point"):
        score = (posterior.mean(name) - torch.as_tensor(truth[name])) / posterior.sd(name)
        assert 0.5 < float(score.square().mean()) < 2, name


@pytest.mark.parametrize("world", [manhattan_world(30, seed=0), sphere_world(4, 6)])
def test_a_file_is_read_as_it_was_written(world, tmp_path):
    write_g2o(tmp_path / "graph.g2o", world.start, world.data)
    read = read_g2o(tmp_path / "graph.g2o")
    for name in ("i", "j", "z", "info"):
        assert read.data[name] == pytest.approx(world.data[name], rel=1e-15, abs=1e-15), name
    assert read.start == pytest.approx(world.start, rel=1e-15, abs=1e-15)
    program = pose_graph_2d if world.start.shape[1] == 3 else pose_graph_3d
    first = joint_density(program.bind(world.data), {"x": world.start})
    again = joint_density(program.bind(read.data), {"x": read.start})
    assert again == pytest.approx(first, rel=1e-12)


def test_ids_of_a_file_are_labels_in_their_order(tmp_path):
    file = tmp_path / "a.g2o"
    file.write_text(
        "# a comment\nVERTEX_SE2 7 1 0 0\nVERTEX_SE2 3 0 0 0\nFIX 3\n\nEDGE_SE2 3 7 1 0 0 1 0 0 1 0 1\n"
    )
    read = read_g2o(file)
    assert read.start.tolist() == [[0, 0, 0], [1, 0, 0]]
    bound = pose_graph_2d.bind(read.data)
    assert list(bound.labels["pose"]) == [3, 7] and bound.values["j"].tolist() == [1]


def test_without_vertices_odometry_is_the_start(tmp_path):
    world = manhattan_world(12, seed=0)
    write_g2o(tmp_path / "a.g2o", world.start, world.data)
    lines = (tmp_path / "a.g2o").read_text().splitlines()
    (tmp_path / "a.g2o").write_text("\n".join(line for line in lines if "VERTEX" not in line))
    assert np.allclose(read_g2o(tmp_path / "a.g2o").start, world.start)


VERTICES = "VERTEX_SE2 0 0 0 0\nVERTEX_SE2 1 1 0 0\n"
EDGE = "EDGE_SE2 0 1 1 0 0 1 0 0 1 0 1\n"
SPACE = "EDGE_SE3:QUAT 0 1 1 0 0 {} " + " ".join(
    "1" if k in (0, 6, 11, 15, 18, 20) else "0" for k in range(21)
)
BROKEN = {
    "an unknown tag": (VERTICES + "EDGE_SE3 0 1\n", "graph.g2o:3: the tag 'EDGE_SE3' is not known"),
    "a short line": (
        VERTICES + EDGE[:-3],
        "graph.g2o:3: expected 11 numbers after the tag, got 10",
    ),
    "a word": (
        VERTICES.replace("1 1", "1 x") + EDGE,
        "graph.g2o:2: could not convert string .*'x'",
    ),
    "no number": (VERTICES + EDGE.replace("1 1", "1 nan"), "graph.g2o:3: expected whole numbers"),
    "half an id": (
        VERTICES + EDGE.replace("0 1 1", "0 1.5 1"),
        "graph.g2o:3: expected whole numbers",
    ),
    "no such vertex": (VERTICES + EDGE.replace("0 1 1", "0 4 1"), "graph.g2o:3: .* with the id 4"),
    "a lonely vertex": (VERTICES + "VERTEX_SE2 2 0 0 0\n" + EDGE, "no edge touches vertex 2"),
    "a vertex twice": (VERTICES + VERTICES[:19] + EDGE, "graph.g2o:3: vertex 0 is there twice"),
    "a bad matrix": (VERTICES + EDGE[:-2] + "0", "graph.g2o:3: .* not positive definite"),
    "no edges": (VERTICES, "the file has no edges"),
    "two kinds": (VERTICES + EDGE + SPACE.format("0 0 0 1"), "poses in the plane and in space"),
    "no rotation": (SPACE.format("0 0 0 0"), "graph.g2o:1: the quaternion is zero"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_at_its_line(case, tmp_path):
    text, message = BROKEN[case]
    (tmp_path / "graph.g2o").write_text(text)
    with pytest.raises(DataError, match=message):
        read_g2o(tmp_path / "graph.g2o")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="there is no file '.*nowhere.g2o'"):
        read_g2o(tmp_path / "nowhere.g2o")
    with pytest.raises(DataError, match=r"poses must be \[pose, 3\] or \[pose, 7\], got \[2, 4\]"):
        write_g2o(tmp_path / "a.g2o", np.zeros((2, 4)), {})


def test_an_information_matrix_is_symmetric():
    upper = np.random.default_rng(0).random((2, 21))
    info = full_information(upper)
    assert (
        np.array_equal(info, info.transpose(0, 2, 1))
        and info[1, 0].tolist() == upper[1, :6].tolist()
    )
