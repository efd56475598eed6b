"""Simulated worlds for the models of :mod:`ppl.models.slam`: streets, a sphere, a room with cameras."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from ppl.manifolds import SE3
from ppl.models.pose_graphs import PoseGraph, odometry
from ppl.models.slam import project


def manhattan_world(
    poses: int = 3500,
    *,
    closures: int | None = None,
    noise: tuple[float, float] = (0.05, 0.02),
    outliers: float = 0.0,
    block: int = 4,
    seed: int = 0,
) -> PoseGraph:
    """A robot that drives through streets at right angles, one unit a step.

    It turns left or right, or goes on, at every ``block``-th step, and turns back towards where it
    began when it is far from there. When it comes to a place where it has been, the two poses may
    be tied by a loop closure.

    Args:
        poses: number of poses.
        closures: number of loop closures, as far as places were seen again; half of ``poses`` by
            default.
        noise: standard deviations of measured places (units) and headings (radians).
        outliers: share of the closures whose measured motion has nothing to do with the true one.
        block: length of the sides of a block.
        seed: of the random numbers.

    Returns:
        Data for :func:`ppl.models.pose_graph_2d`, odometry to start from, and the true poses.

    >>> world = manhattan_world(100, seed=0)
    >>> world.start.shape, world.data["info"].shape[1:]
    ((100, 3), (3, 3))
    """
    rng = np.random.default_rng(seed)
    truth = _walk(poses, block, rng)
    closed = _revisits(truth, poses // 2 if closures is None else closures, rng)
    ends = np.concatenate([np.stack([np.arange(poses - 1), np.arange(1, poses)], 1), closed])
    sd = np.array([noise[0], noise[0], noise[1]])
    z = _between_2d(truth[ends[:, 0]], truth[ends[:, 1]]) + sd * rng.standard_normal((len(ends), 3))
    wrong = poses - 1 + rng.permutation(len(closed))[: round(outliers * len(closed))]
    z[wrong] = rng.uniform([-10, -10, -np.pi], [10, 10, np.pi], (len(wrong), 3))
    info = np.broadcast_to(np.diag(sd**-2.0), (len(ends), 3, 3)).copy()
    data = {"i": ends[:, 0], "j": ends[:, 1], "z": z, "info": info, "anchor": truth[0]}
    return PoseGraph(data, odometry(data["i"], data["j"], z), truth)


def sphere_world(
    laps: int = 50,
    per_lap: int = 50,
    *,
    radius: float = 50.0,
    noise: tuple[float, float] = (0.1, 0.02),
    seed: int = 0,
) -> PoseGraph:
    """A robot that winds round a sphere from pole to pole, and sees its place on the lap before.

    Args:
        laps: how often it goes round.
        per_lap: poses on a lap; 50 of 50 make a graph like the benchmark sphere2500.
        radius: of the sphere.
        noise: standard deviations of measured places (units) and rotations (radians).
        seed: of the random numbers.

    Returns:
        Data for :func:`ppl.models.pose_graph_3d`, odometry to start from, and the true poses.
    """
    count = laps * per_lap
    truth = torch.as_tensor(_on_sphere(laps, per_lap, radius))
    step, lap = np.arange(count - 1), np.arange(count - per_lap)
    ends = np.concatenate([np.stack([step, step + 1], 1), np.stack([lap, lap + per_lap], 1)])
    sd = np.array([noise[0]] * 3 + [noise[1]] * 3)
    errors = torch.as_tensor(sd * np.random.default_rng(seed).standard_normal((len(ends), 6)))
    i, j = torch.as_tensor(ends).T
    z = SE3.retract(SE3.between(truth[i], truth[j]), errors).numpy()
    start = SE3.compose(truth[:1], torch.as_tensor(odometry(ends[:, 0], ends[:, 1], z))).numpy()
    info = np.broadcast_to(np.diag(sd**-2.0), (len(ends), 6, 6)).copy()
    data = {"i": ends[:, 0], "j": ends[:, 1], "z": z, "info": info, "anchor": truth[0].numpy()}
    return PoseGraph(data, start, truth.numpy())


def camera_room(
    cameras: int = 8, landmarks: int = 100, *, sigma: float = 1.0, seed: int = 0
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Cameras on an arc that look at a cloud of landmarks, each of which sees four fifths of it.

    Args:
        cameras: how many.
        landmarks: how many.
        sigma: standard deviation of a pixel's coordinates.
        seed: of the random numbers.

    Returns:
        Data for :func:`ppl.models.bundle_adjustment`, with prior means off the truth by their
        standard deviations (0.05 and 0.3; the first two cameras are known to 0.001, which fixes
        place and scale), and the true ``pose`` and ``point``.
    """
    rng = np.random.default_rng(seed)
    bearing = np.linspace(-0.5, 0.5, cameras)
    turn = np.stack([np.zeros(cameras), bearing, np.zeros(cameras)], 1)
    truth = {
        "pose": np.column_stack([0.2 * rng.standard_normal((cameras, 3)) + [0, 0, 8.0], turn]),
        "point": rng.uniform(-2, 2, (landmarks, 3)),
    }
    seen = np.argwhere(rng.random((cameras, landmarks)) < 0.8)
    intrinsics = np.array([[500.0, 0.0, 320.0], [0.0, 500.0, 240.0], [0.0, 0.0, 1.0]])
    ends = (truth["pose"][seen[:, 0]], truth["point"][seen[:, 1]], intrinsics)
    pixel = project(*(torch.as_tensor(end) for end in ends)).numpy()
    pose_sd = np.where(np.arange(cameras) < 2, 0.001, 0.05)
    noise = {name: rng.standard_normal(array.shape) for name, array in truth.items()}
    data = {
        "pixel": pixel + sigma * rng.standard_normal(pixel.shape),
        "seen_by": seen[:, 0],
        "shows": seen[:, 1],
        "intrinsics": intrinsics,
        "sigma": sigma,
        "pose_mean": truth["pose"] + pose_sd[:, None] * noise["pose"],
        "pose_sd": pose_sd,
        "point_mean": truth["point"] + 0.3 * noise["point"],
        "point_sd": np.full(landmarks, 0.3),
    }
    return data, truth


def _walk(poses: int, block: int, rng: np.random.Generator) -> np.ndarray:
    """True poses: headings are right angles, each step is as long as the side of a square."""
    legs = -(-poses // block)
    choices = rng.integers(-1, 2, legs)
    ahead = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])
    limit, place, heading = int(np.sqrt(poses) / 2) + block, np.zeros(2, dtype=int), 0
    headings = np.empty(legs, dtype=int)
    choices[0] = 0  # the first pose is the origin of the map
    for leg in range(legs):  # where to turn depends on where the leg before has led
        options = (heading + choices[leg] + np.array([0, 1, -1, 2])) % 4
        inside = np.abs(place + block * ahead[options]).max(1) <= limit
        heading = int(options[np.argmax(inside)])
        headings[leg], place = heading, place + block * ahead[heading]
    turned = np.repeat(headings, block)[:poses]
    steps = np.concatenate([np.zeros((1, 2)), ahead[turned[:-1]]])
    angle = (turned * np.pi / 2 + np.pi) % (2 * np.pi) - np.pi
    return np.column_stack([np.cumsum(steps, 0), angle])


def _revisits(truth: np.ndarray, closures: int, rng: np.random.Generator) -> np.ndarray:
    """Pairs ``[closure, 2]`` of successive visits to one place, at random."""
    _, place = np.unique(truth[:, :2].round().astype(int), axis=0, return_inverse=True)
    order = np.argsort(place.ravel(), kind="stable")
    same = place.ravel()[order[1:]] == place.ravel()[order[:-1]]
    pairs = np.stack([order[:-1], order[1:]], 1)[same]
    pairs = pairs[pairs[:, 1] > pairs[:, 0] + 1]
    return pairs[np.sort(rng.permutation(len(pairs))[:closures])]


def _between_2d(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    cos, sin = np.cos(a[:, 2]), np.sin(a[:, 2])
    x, y, turn = (b - a).T
    turn = (turn + np.pi) % (2 * np.pi) - np.pi
    return np.stack([cos * x + sin * y, cos * y - sin * x, turn], 1)


def _on_sphere(laps: int, per_lap: int, radius: float) -> np.ndarray:
    """Poses ``[laps * per_lap, 7]``: x along the lap, z away from the centre."""
    count = laps * per_lap
    along = 2 * np.pi * np.arange(count) / per_lap
    height = np.pi * (np.arange(count) + 0.5) / count - np.pi / 2
    out = np.stack(
        [np.cos(height) * np.cos(along), np.cos(height) * np.sin(along), np.sin(height)], 1
    )
    ahead = np.stack([-np.sin(along), np.cos(along), np.zeros(count)], 1)
    axes = np.stack([ahead, np.cross(out, ahead), out], 2)
    return np.concatenate([radius * out, _quaternion(axes)], 1)


def _quaternion(rotation: np.ndarray) -> np.ndarray:
    """Unit quaternions (x, y, z, w) of rotation matrices ``[n, 3, 3]``."""
    return Rotation.from_matrix(rotation).as_quat()
