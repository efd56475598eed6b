# %% [markdown]
# # A map from a drive: pose graphs
#
# A robot drives through streets. Its wheels tell it how far it went and turned at each step, a
# little wrongly; added up, the errors grow without end. Now and then it recognises a place where
# it has been. Where was it, and how sure can we be?

# %%
import os
import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Ellipse

from ppl import (
    DataError,
    Flat,
    MultivariateNormal,
    Normal,
    NumericalError,
    factor,
    given,
    infer,
    latent,
    model,
    pick,
    plate,
)
from ppl.models import datasets, pose_graph_2d, worlds
from ppl.models.pose_graphs import split_closures

QUICK = os.environ.get("SMOKE_TEST") == "1"
POSES = 150 if QUICK else 600

# %% [markdown]
# ## The model
#
# A pose is a place and a heading. An edge of the graph measures one pose as seen from another. To
# say so takes one function of ordinary torch: the pose b, seen from a. Its derivatives are found
# by themselves. Angles are compared around the circle, so that a turn from 179 to -179 degrees is
# one of 2.
#
# The poses have a flat prior: all that is known comes from the edges, and from the first pose,
# which we put at the origin.


# %%
def between(a, b):
    """Pose b seen from pose a; poses are (x, y, heading)."""
    cos, sin = torch.cos(a[2]), torch.sin(a[2])
    x, y, turn = (b - a).unbind()
    turn = torch.atan2(torch.sin(turn), torch.cos(turn))
    return torch.stack([cos * x + sin * y, cos * y - sin * x, turn])


@model
def pose_graph():
    pose = plate("pose")
    with pose:
        x = latent("x", Flat(3))
    with plate("edge"):
        i, j = given("i", index=pose), given("j", index=pose)
        residual = between(given("z"), between(x[i], x[j]))
        factor("edge", MultivariateNormal(residual, precision_matrix=given("info")), at=0.0)
    factor("first", Normal(pick(x, pose=0), 1e-3), at=0.0)


# %% [markdown]
# ## The data
#
# A simulated drive. Edges from each pose to the next are odometry; the others, between two visits
# to one place, are loop closures. To start from, the steps of the odometry are added up.

# %%
world = worlds.manhattan_world(POSES, closures=POSES // 4, noise=(0.06, 0.02), seed=4)
edges = {name: world.data[name] for name in ("i", "j", "z", "info")}
print(f"{len(world.start)} poses, {len(edges['i'])} edges")
drift = np.linalg.norm(world.start[:, :2] - world.truth[:, :2], axis=1)
print(f"odometry is off by {drift.mean():.1f} steps on average, {drift.max():.1f} at worst")

# %% [markdown]
# ## The fit
#
# `laplace` finds the most probable poses (Gauss-Newton on a sparse system) and the covariances
# around them, exactly for the linearised graph.

# %%
posterior = infer(pose_graph, edges, method="laplace", start={"x": world.start})
print(posterior.diagnostics.verdict)
found = posterior.mean("x").numpy()
error = np.linalg.norm(found[:, :2] - world.truth[:, :2], axis=1)
print(f"the fit is off by {error.mean():.2f} steps on average, {error.max():.2f} at worst")


# %%
def draw_path(ax, poses, colour, label, closures=None):
    """The path, and thin lines between poses that are tied by a loop closure."""
    if closures is not None:
        ends = np.stack([poses[closures["closure_i"], :2], poses[closures["closure_j"], :2]])
        ax.plot(ends[..., 0], ends[..., 1], color="tab:orange", linewidth=0.6, alpha=0.7)
    ax.plot(poses[:, 0], poses[:, 1], color=colour, linewidth=1, label=label)
    ax.set(aspect="equal", xticks=[], yticks=[])


def draw_ellipses(ax, poses, covariances, every, colour, size=3.0):
    """Ellipses of ``size`` standard deviations of some places."""
    for pose, covariance in zip(poses[::every], covariances[::every], strict=True):
        variances, axes = np.linalg.eigh(covariance[:2, :2])
        angle = np.degrees(np.arctan2(axes[1, 1], axes[0, 1]))
        width, height = 2 * size * np.sqrt(variances[::-1])
        ax.add_patch(Ellipse(pose[:2], width, height, angle=angle, color=colour, alpha=0.25, lw=0))


parts = split_closures(world.data)
figure, (left, right) = plt.subplots(
    1, 2, figsize=(10, 5), sharex=True, sharey=True, layout="constrained"
)
draw_path(left, world.start, "0.4", "odometry", parts)
left.set_title("before: odometry, and what it says of loop closures")
draw_path(right, world.truth, "0.8", "truth")
draw_path(right, found, "tab:blue", "fit")
covariances = posterior.covariance("x").numpy()
draw_ellipses(right, found, covariances, 5, "tab:blue")
right.set_title("after: fit, with ellipses of 3 standard deviations")
right.legend(frameon=False)
figure.savefig("slam_before_after.png", dpi=110)

# %% [markdown]
# ## Are the ellipses right?
#
# If they are, the squared distance of the truth from the fit, measured in standard deviations,
# averages to the number of coordinates: three.

# %%
away = world.truth - found
away[:, 2] = np.arctan2(np.sin(away[:, 2]), np.cos(away[:, 2]))
whole = np.einsum("pi,pij,pj->p", away[1:], np.linalg.inv(covariances[1:]), away[1:])
print(f"mean squared distance {whole.mean():.2f}; 3 is expected, but poses err together")

# %% [markdown]
# ## Wrong loop closures
#
# Streets look alike. Let every fifth loop closure measure a motion that has nothing to do with the
# true one. Least squares believes each of them and bends the whole map. A robust loss says: an edge
# that is off by much more than its error is probably wrong; let it go. The model of
# `ppl.models` is the one above, with a kernel for a second set of edges.

# %%
fooled = worlds.manhattan_world(
    POSES, closures=POSES // 4, noise=(0.06, 0.02), outliers=0.2, seed=4
)
parts = split_closures(fooled.data)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # between contradictions least squares settles slowly
    wrong = {name: fooled.data[name] for name in edges}
    bent = infer(pose_graph, wrong, method="laplace", start={"x": fooled.start}, max_iters=50)
robust = infer(
    pose_graph_2d(kernel="geman_mcclure"), parts, method="laplace", start={"x": fooled.start}
)


def off(fitted):
    """Mean distance of the fit from the truth, in steps."""
    return np.linalg.norm(fitted.mean("x").numpy()[:, :2] - fooled.truth[:, :2], axis=1).mean()


print(f"least squares is off by {off(bent):.2f} steps, the robust fit by {off(robust):.2f}")

figure, axes = plt.subplots(1, 2, figsize=(10, 5), sharex=True, sharey=True, layout="constrained")
for ax, fitted, title in zip(axes, (bent, robust), ("least squares", "robust"), strict=True):
    draw_path(ax, fooled.truth, "0.8", "truth")
    draw_path(ax, fitted.mean("x").numpy(), "tab:blue", "fit", parts)
    ax.set_title(f"a fifth of the loop closures is wrong: {title}")
figure.savefig("slam_robust.png", dpi=110)

# %% [markdown]
# ## Messages instead of one large system
#
# `gbp` lets each pose talk to its neighbours in the graph and nobody solve for all of them at once.
# Its means go to the same optimum, but news travel one edge a round. And where the graph has loops
# messages count some evidence twice: their variances are too small. The report says by how much.

# %%
small = worlds.manhattan_world(100, closures=60, noise=(0.06, 0.02), seed=1)
data = {name: small.data[name] for name in edges}
exact = infer(pose_graph, data, method="laplace", start={"x": small.start})
options = {"start": {"x": small.start}, "schedule": "tree", "max_iters": 60 if QUICK else 200}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the report says it, too
    loopy = infer(pose_graph, data, method="gbp", variance="check", **options)
print(loopy.diagnostics)
gap = (loopy.mean("x") - exact.mean("x")).abs() / exact.sd("x")
print(f"means differ by at most {float(gap.max()):.2f} standard deviations")
ratio = (loopy.sd("x") / exact.sd("x"))[1:, :2]
print(f"standard deviations of places: {float(ratio.median()):.2f} of the exact ones (median)")

# %% [markdown]
# ## What could go wrong
#
# From a bad start, or with wrong edges, the fit can end far from the truth. The energy tells: it is
# half a sum of squares, so it should be about half the number of residuals that are left over when
# the unknowns are paid for.


# %%
def expected_energy(data, poses):
    """Half of residuals minus unknowns."""
    return (3 * len(data["i"]) + 3 - 3 * poses) / 2


for name, fitted, data in (("true edges", posterior, edges), ("some wrong", bent, wrong)):
    energy, half = float(fitted.trace["energy"][-1]), expected_energy(data, POSES)
    print(f"{name}: energy {energy:.0f}, expected about {half:.0f}")

# %% [markdown]
# And a graph whose first pose is not known is known up to a motion of the whole only. Then there is
# no answer, and none is made up:

# %%
try:
    infer(pose_graph_2d(anchored=False), edges, method="laplace", start={"x": world.start})
except NumericalError as refusal:
    print(refusal)

# %% [markdown]
# The same program fits a real building, where its data is on this machine.

# %%
try:
    intel = datasets.pose_graph("intel")
except DataError as missing:
    print(missing)
else:
    real = {name: intel.data[name] for name in edges}
    lab = infer(pose_graph, real, method="laplace", start={"x": intel.start})
    figure, axes = plt.subplots(1, 2, figsize=(10, 5), layout="constrained")
    draw_path(axes[0], intel.start, "0.4", "odometry")
    draw_path(axes[1], lab.mean("x").numpy(), "tab:blue", "fit")
    axes[0].set_title("the Intel laboratory: odometry")
    axes[1].set_title(f"fit of {len(intel.start)} poses")
    figure.savefig("slam_intel.png", dpi=110)

# %% [markdown]
# ## Check

# %%
assert error.mean() < drift.mean() / 4
assert 1 < whole.mean() < 9
assert off(robust) < off(bent) / 3
assert float(ratio.median()) < 1
