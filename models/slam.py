"""Where a robot was, and what it saw: pose graphs in the plane and in space, and bundle adjustment.

Poses are unknown, edges measure one pose from another. Graphs to fit come from files
(:func:`ppl.models.pose_graphs.read_g2o`), from :mod:`ppl.models.datasets`, or from the simulators of
:mod:`ppl.models.worlds`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppl import (
    ConcentratedNormal,
    Flat,
    MultivariateNormal,
    Normal,
    factor,
    given,
    latent,
    model,
    observe,
    pick,
    plate,
)
from ppl.distributions import Distribution
from ppl.manifolds import SE3, SO3
from ppl.models.choices import check_choice
from ppl.plates import PlateHandle
from ppl.value import Value


def between(a: Tensor, b: Tensor) -> Tensor:
    """Pose b seen from pose a; poses are ``[..., 3]``: x, y, heading.

    The heading of the result lies in [-pi, pi].

    >>> between(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1.5, 2.0, 0.25]))
    tensor([0.5000, 0.0000, 0.2500])
    """
    return _wrapped(_seen(a, b))


def edge_residual(a: Tensor, b: Tensor, measured: Tensor) -> Tensor:
    """What is left of the motion from a to b when the measured motion is taken back, ``[..., 3]``.

    Zero where ``between(a, b)`` is what was measured; the turn is wrapped once, at the end.
    """
    return _wrapped(_seen(measured, _seen(a, b)))


@model
def pose_graph_2d(
    noise: str = "info", kernel: str | None = None, threshold: float = 3.0, anchored: bool = True
) -> None:
    """Poses in the plane, tied by measured motions. Units: those of the map, and radians.

    Each edge e from pose i to pose j measured the motion z_e. Its residual is the pose j, seen
    from where i and z_e say that it is: r = between(z_e, between(x_i, x_j)); r ~ Normal(0, 1/info)
    or Normal(0, sd). The first pose is known: x_0 ~ Normal(anchor, 1/sqrt(anchor_precision)).

    Latents: ``x`` ``[pose, 3]`` (x, y, heading). Data: ``i``, ``j`` ``[edge]`` positions of poses,
    ``z`` ``[edge, 3]``, ``info`` ``[edge, 3, 3]`` or ``sd`` ``[edge, 3]``; ``anchor`` ``[3]`` and
    ``anchor_precision`` may be left out (0 and 1e6). With a kernel also ``closure_i`` and so on.

    Args:
        noise: "info" (precision matrices) or "sd" (standard deviations).
        kernel: of the loop closures, such as "huber" or "dcs"; they are then a plate of their own,
            ``closure``, see :func:`ppl.models.pose_graphs.split_closures`. None: all edges are alike, and none is robust.
        threshold: of the kernel, in standard deviations of the whole residual.
        anchored: whether the first pose is known; without it only relative poses are determined.

    >>> data = {"i": [0, 1], "j": [1, 2], "z": [[1.0, 0.0, 0.1]] * 2, "sd": [[0.1, 0.1, 0.05]] * 2}
    >>> pose_graph_2d(noise="sd").graph(data).plates["pose"].size
    3
    """
    check_choice("pose_graph_2d: noise", noise, ("info", "sd"))
    pose = plate("pose")
    with pose:
        x = latent("x", Flat(3))
    for name in _edge_plates(kernel):
        with plate(name):
            a, b = _ends(x, pose, name)
            residual = edge_residual(a, b, given(_column(name, "z")))
            law = _residual_law(residual, name, noise)
            factor(name, _robust(law, name, kernel, threshold), at=0.0)
    if anchored:
        sd = given("anchor_precision", default=1e6) ** -0.5
        factor("first", Normal(pick(x, pose=0), sd), at=given("anchor", default=0.0))


@model
def pose_graph_3d(kernel: str | None = None, threshold: float = 4.0, anchored: bool = True) -> None:
    """Poses in space, tied by measured motions. Units: those of the map, and radians.

    Each edge e from pose i to pose j measured z_e ~ ConcentratedNormal(SE3, between(x_i, x_j),
    1/info): the tangent vector from the motion to its measurement is normal. The first pose is
    known: x_0 ~ ConcentratedNormal(SE3, anchor, 1/sqrt(anchor_precision)).

    Latents: ``x`` ``[pose, 7]`` (x, y, z, qx, qy, qz, qw). Data: ``i``, ``j`` ``[edge]`` positions
    of poses, ``z`` ``[edge, 7]``, ``info`` ``[edge, 6, 6]`` (translation before rotation),
    ``anchor`` ``[7]``; ``anchor_precision`` may be left out (1e6). With a kernel also
    ``closure_i`` and so on.

    Args:
        kernel: of the loop closures, which are then a plate of their own, ``closure``, see
            :func:`ppl.models.pose_graphs.split_closures`; None: no edge is robust.
        threshold: of the kernel, in standard deviations of the whole residual.
        anchored: whether the first pose is known.
    """
    pose = plate("pose")
    with pose:
        x = latent("x", Flat(SE3))
    for name in _edge_plates(kernel):
        with plate(name):
            a, b = _ends(x, pose, name)
            info = given(_column(name, "info"))
            law = ConcentratedNormal(SE3, SE3.between(a, b), precision_matrix=info)
            observe(_column(name, "z"), _robust(law, name, kernel, threshold))
    if anchored:
        sd = given("anchor_precision", default=1e6) ** -0.5
        factor("first", ConcentratedNormal(SE3, given("anchor"), sd), at=pick(x, pose=0))


@model
def bundle_adjustment(kernel: str | None = None, threshold: float = 1.345) -> None:
    """Cameras and landmarks from the pixels at which the landmarks were seen. Units: pixels, metres.

    pose_c ~ Normal(pose_mean_c, pose_sd_c) is where camera c stands (translation, axis-angle; world
    to camera), point_l ~ Normal(point_mean_l, point_sd_l) a landmark; each pixel p ~
    Normal(project(pose_c(p), point_l(p)), sigma).

    Latents: ``pose`` ``[camera, 6]``, ``point`` ``[landmark, 3]``. Data: ``pixel`` ``[sight, 2]``,
    ``seen_by`` and ``shows`` ``[sight]`` (positions of cameras and landmarks), ``intrinsics``
    ``[3, 3]``, ``sigma`` (pixels), ``pose_mean``, ``point_mean`` and ``pose_sd`` ``[camera]``,
    ``point_sd`` ``[landmark]``.

    Args:
        kernel: of the pixels, such as "huber"; None: none.
        threshold: of the kernel, in standard deviations.

    Source: [Ortiz2020].
    """
    camera, landmark = plate("camera"), plate("landmark")
    intrinsics, sigma = given("intrinsics"), given("sigma")
    with camera:
        pose = latent("pose", Normal(given("pose_mean"), given("pose_sd")))
    with landmark:
        point = latent("point", Normal(given("point_mean"), given("point_sd")))
    with plate("sight"):
        seen_by, shows = given("seen_by", index=camera), given("shows", index=landmark)
        law = Normal(project(pose[seen_by], point[shows], intrinsics), sigma)
        observe("pixel", law if kernel is None else law.robust(kernel, threshold))


def project(pose: Tensor, point: Tensor, intrinsics: Tensor) -> Tensor:
    """Pixel ``[..., 2]`` of a point ``[..., 3]`` in the camera at ``pose`` ``[..., 6]``.

    Args:
        pose: translation and axis-angle, world to camera.
        point: in the world.
        intrinsics: camera matrix ``[3, 3]``.
    """
    here = (
        intrinsics * (SO3.act(SO3.exp(pose[..., 3:]), point) + pose[..., :3])[..., None, :]
    ).sum(-1)
    return here[..., :2] / here[..., 2:]


def _edge_plates(kernel: str | None) -> tuple[str, ...]:
    return ("edge",) if kernel is None else ("edge", "closure")


def _column(plate_name: str, name: str) -> str:
    return name if plate_name == "edge" else f"{plate_name}_{name}"


def _ends(x: Value, pose: PlateHandle, name: str) -> tuple[Tensor, Tensor]:
    return x[given(_column(name, "i"), index=pose)], x[given(_column(name, "j"), index=pose)]


def _residual_law(residual: Tensor, name: str, noise: str) -> Normal | MultivariateNormal:
    if noise == "sd":
        return Normal(residual, given(_column(name, "sd")))
    return MultivariateNormal(residual, precision_matrix=given(_column(name, "info")))


def _robust(law: Distribution, name: str, kernel: str | None, threshold: float) -> Distribution:
    return law.robust(kernel, threshold) if kernel and name == "closure" else law


def _seen(a: Tensor, b: Tensor) -> Tensor:
    """b in the frame of a, headings subtracted as they are."""
    cos, sin = torch.cos(a[..., 2]), torch.sin(a[..., 2])
    d = b - a
    ahead, aside = cos * d[..., 0] + sin * d[..., 1], cos * d[..., 1] - sin * d[..., 0]
    return torch.stack([ahead, aside, d[..., 2]], -1)


def _wrapped(pose: Tensor) -> Tensor:
    turn = pose[..., 2]
    turn = torch.atan2(torch.sin(turn), torch.cos(turn))
    return torch.stack([pose[..., 0], pose[..., 1], turn], -1)
