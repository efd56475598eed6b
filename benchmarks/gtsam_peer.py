"""Fit a pose graph with GTSAM: the peer of gbp_pose_graphs.py, run by an interpreter that has it.

    python gtsam_peer.py GRAPH.npz --repeats 5 [--custom] [--incremental] [--out POSES.npz]

The archive has i, j, z, info, start, anchor and anchor_precision. Prints a JSON line a way of
fitting. Needs gtsam and numpy, and nothing of ours:

    python3.11 -m venv ~/peers && ~/peers/bin/pip install gtsam numpy
"""

import argparse
import json
import time

import gtsam
import numpy as np

# Ours has translation before rotation in space, GTSAM rotation before translation.
ROTATION_FIRST = np.array([3, 4, 5, 0, 1, 2])


def pose_of(row):
    """Pose2 or Pose3 of a row of numbers."""
    if len(row) == 3:
        return gtsam.Pose2(*row)
    x, y, z, w = row[3:]
    return gtsam.Pose3(gtsam.Rot3.Quaternion(w, x, y, z), gtsam.Point3(*row[:3]))


def row_of(pose):
    """The numbers of a pose."""
    if isinstance(pose, gtsam.Pose2):
        return [pose.x(), pose.y(), pose.theta()]
    w, x, y, z = (getattr(pose.rotation().toQuaternion(), name)() for name in "wxyz")
    return [*pose.translation(), x, y, z, w]


def noises(info):
    """One noise model for each distinct information matrix, and which edge has which."""
    distinct, which = np.unique(info.reshape(len(info), -1), axis=0, return_inverse=True)
    if info.shape[1] == 6:
        info = info[:, ROTATION_FIRST][:, :, ROTATION_FIRST]
    models = [None] * len(distinct)
    for edge, model in enumerate(which.ravel().tolist()):
        if models[model] is None:
            models[model] = gtsam.noiseModel.Gaussian.Information(info[edge])
    return [models[model] for model in which.ravel().tolist()]


def factors(data, custom):
    """A factor an edge, and the anchor's, last."""
    between = gtsam.BetweenFactorPose2 if data["z"].shape[1] == 3 else gtsam.BetweenFactorPose3
    prior = gtsam.PriorFactorPose2 if data["z"].shape[1] == 3 else gtsam.PriorFactorPose3
    rows = zip(data["i"].tolist(), data["j"].tolist(), data["z"], noises(data["info"]), strict=True)
    if custom:
        made = [python_factor(i, j, z, noise) for i, j, z, noise in rows]
    else:
        made = [between(i, j, pose_of(z), noise) for i, j, z, noise in rows]
    tight = gtsam.noiseModel.Isotropic.Precision(data["info"].shape[1], data["anchor_precision"])
    return [*made, prior(0, pose_of(data["anchor"]), tight)]


def python_factor(i, j, z, noise):
    """The edge in the plane as a user writes it: residual and exact Jacobians in NumPy."""
    cz, sz = np.cos(z[2]), np.sin(z[2])
    back = np.array([[cz, sz], [-sz, cz]])

    def error(this, values, jacobians):
        a, b = values.atPose2(this.keys()[0]), values.atPose2(this.keys()[1])
        ca, sa = np.cos(a.theta()), np.sin(a.theta())
        inverse = np.array([[ca, sa], [-sa, ca]])
        away = inverse @ np.array([b.x() - a.x(), b.y() - a.y()])
        turn = b.theta() - a.theta() - z[2]
        if jacobians is not None:
            first, second = -np.eye(3), np.eye(3)
            first[:2, :2] = -back
            first[:2, 2] = back @ np.array([away[1], -away[0]])
            cd, sd = np.cos(b.theta() - a.theta()), np.sin(b.theta() - a.theta())
            second[:2, :2] = back @ np.array([[cd, -sd], [sd, cd]])
            jacobians[0], jacobians[1] = first, second
        shift = back @ (away - z[:2])
        return np.array([*shift, np.arctan2(np.sin(turn), np.cos(turn))])

    return gtsam.CustomFactor(noise, [i, j], error)


def build(data, custom):
    """Graph and start values, from arrays."""
    graph, start = gtsam.NonlinearFactorGraph(), gtsam.Values()
    for factor in factors(data, custom):
        graph.add(factor)
    for k, row in enumerate(data["start"]):
        start.insert(k, pose_of(row))
    return graph, start


def optimiser(name, graph, start):
    """Gauss-Newton or Levenberg-Marquardt with GTSAM's own settings."""
    if name == "gauss-newton":
        return gtsam.GaussNewtonOptimizer(graph, start, gtsam.GaussNewtonParams())
    return gtsam.LevenbergMarquardtOptimizer(graph, start, gtsam.LevenbergMarquardtParams())


def batch(data, name, repeats, custom):
    """Times and energy of repeated fits."""
    builds, fits = [], []
    for _ in range(repeats):
        begun = time.perf_counter()
        graph, start = build(data, custom)
        built = time.perf_counter()
        run = optimiser(name, graph, start)
        result = run.optimize()
        fits.append(time.perf_counter() - built)
        builds.append(built - begun)
    get = result.atPose2 if data["z"].shape[1] == 3 else result.atPose3
    poses = np.array([row_of(get(k)) for k in range(len(data["start"]))])
    figures = {"build_s": builds, "fit_s": fits, "energy": graph.error(result)}
    return {**figures, "iterations": run.iterations()}, poses


def incremental(data):
    """Seconds of each step of iSAM2: a pose with its edges, and the new estimate."""
    made = factors(data, False)
    newest = np.maximum(data["i"], data["j"])
    arrival = [[] for _ in data["start"]]
    for edge, pose in enumerate(newest.tolist()):
        arrival[pose].append(edge)
    first = data["z"].shape[1] == 3
    parameters = gtsam.ISAM2Params()
    parameters.setRelinearizeThreshold(0.1)
    parameters.relinearizeSkip = 10
    parameters.setFactorization("QR")  # Cholesky gives up on M3500 as indeterminate
    solver, estimate, times = gtsam.ISAM2(parameters), None, []
    for k, edges in enumerate(arrival):
        graph, values = gtsam.NonlinearFactorGraph(), gtsam.Values()
        for edge in edges:
            graph.add(made[edge])
        if k == 0:
            graph.add(made[-1])
            values.insert(0, pose_of(data["anchor"]))
        else:
            step = next(e for e in edges if data["i"][e] == k - 1)
            get = estimate.atPose2 if first else estimate.atPose3
            values.insert(k, get(k - 1).compose(pose_of(data["z"][step])))
        begun = time.perf_counter()
        solver.update(graph, values)
        estimate = solver.calculateEstimate()
        times.append(time.perf_counter() - begun)
    whole, _ = build(data, False)
    return {"step_s": float(np.mean(times)), "energy": whole.error(estimate), "steps": len(times)}


def export(name, file):
    """Write a graph in space that comes with GTSAM as arrays."""
    graph, _ = gtsam.load3D(gtsam.findExampleDataFile(name))
    edges = [graph.at(k) for k in range(graph.size())]
    info = np.array([edge.noiseModel().information() for edge in edges])
    back = np.argsort(ROTATION_FIRST)
    np.savez(
        file,
        i=np.array([edge.keys()[0] for edge in edges]),
        j=np.array([edge.keys()[1] for edge in edges]),
        z=np.array([row_of(edge.measured()) for edge in edges]),
        info=info[:, back][:, :, back],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("graph")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--custom", action="store_true")
    parser.add_argument("--incremental", action="store_true")
    parser.add_argument("--out")
    parser.add_argument("--export", metavar="NAME", help="write this graph of GTSAM's to GRAPH.npz")
    arguments = parser.parse_args()
    if arguments.export:
        export(arguments.export, arguments.graph)
        return
    with np.load(arguments.graph) as archive:
        data = {name: archive[name] for name in archive.files}
    data["anchor_precision"] = float(data["anchor_precision"])
    version = {"peer": "gtsam", "version": getattr(gtsam, "__version__", "unknown")}
    if arguments.incremental:
        print(json.dumps({**version, "way": "isam2", **incremental(data)}))
        return
    for name in ("gauss-newton", "levenberg-marquardt"):
        if not arguments.custom:
            batch(data, name, 1, False)  # warm-up
        figures, poses = batch(data, name, arguments.repeats, arguments.custom)
        print(
            json.dumps({**version, "way": name, "custom": arguments.custom, **figures}), flush=True
        )
        if arguments.out and name == "levenberg-marquardt":
            np.savez(arguments.out, poses=poses)
        if arguments.custom:
            return


if __name__ == "__main__":
    main()
