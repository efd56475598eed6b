"""What a newcomer gets without an option: schedules, exact spreads, anchors that are far away, warnings that mean something."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from ppl import (
    Flat,
    ModelError,
    Normal,
    dot,
    explain,
    factor,
    given,
    infer,
    latent,
    model,
    observe,
    pick,
    plate,
    shift,
)
from ppl.errors import NumericalError
from ppl.inference.gbp.models import change_of_chart
from ppl.inference.groups import Family
from ppl.manifolds import SE2, SE3, SO2, SO3


def between(a, b):
    cos, sin = torch.cos(a[2]), torch.sin(a[2])
    x, y, turn = (b - a).unbind()
    turn = torch.atan2(torch.sin(turn), torch.cos(turn))
    return torch.stack([cos * x + sin * y, cos * y - sin * x, turn])


@model
def drive(anchored=True):
    with plate("pose"):
        x = latent("x", Flat(3))
    with plate("edge"):
        i, j = given("i", index="pose"), given("j", index="pose")
        residual = between(x[i], x[j]) - given("measured")
        factor("edge", Normal(residual, given("sd")).robust("huber", 1.345), at=0.0)
    if anchored:
        factor("anchor", Normal(pick(x, pose=0), 1e-3), at=0.0)


def square(poses: int = 18, seed: int = 0) -> dict[str, np.ndarray]:
    """Twice around a square, every pose of the second lap seen from that of the first; two wrong edges."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((poses, 3))
    for k in range(1, poses):
        x, y, turn = truth[k - 1]
        truth[k] = x + np.cos(turn), y + np.sin(turn), turn + (np.pi / 2 if k % 3 == 0 else 0)
    i = np.r_[np.arange(poses - 1), np.arange(poses - 12)]
    j = np.r_[np.arange(1, poses), np.arange(12, poses)]
    ends = torch.from_numpy(truth[i]), torch.from_numpy(truth[j])
    z = torch.stack([between(a, b) for a, b in zip(*ends, strict=True)]).numpy()
    z = z + 0.03 * rng.standard_normal(z.shape)
    z[-2:, :2] += 3.0
    return {"i": i, "j": j, "measured": z, "sd": np.full(z.shape, 0.03)}


def test_a_pose_graph_needs_neither_start_nor_options():
    data = square()
    found = infer(drive, data, method="gbp")
    want = infer(drive, data, method="laplace")
    assert found.diagnostics.converged and found.diagnostics.verdict.startswith("good")
    assert "schedule tree" in str(found.diagnostics.notes["graph"])
    gap = (found.mean("x") - want.mean("x")).abs() / want.sd("x")
    assert float(gap.max()) < 0.02
    torch.testing.assert_close(found.sd("x"), want.sd("x"), rtol=1e-2, atol=0)


def test_a_pose_graph_without_anchor_is_refused():
    with pytest.raises(NumericalError, match=r"pose \d+.* no absolute information"):
        infer(drive(anchored=False), square(18), method="gbp")


@model
def smoother():
    with plate("knot", ordered=True):
        c = latent("c", Flat())
        factor("bend", Normal(shift(c, "knot", 1) - 2 * c + shift(c, "knot", -1), 0.5), at=0.0)
    with plate("obs"):
        with plate("knot"):
            b = given("b")
        observe("y", Normal(dot(b, c, over="knot"), 0.2))


def test_rows_that_place_their_variables_only_together():
    """No row says anything of one variable while it knows nothing of the others; all of them together do."""
    rng = np.random.default_rng(0)
    data = {"b": rng.random((20, 6)), "y": rng.standard_normal(20)}
    found = infer(smoother, data, method="gbp", tol=1e-5, max_iters=5000)
    want = infer(smoother, data, method="exact")
    gap = (found.mean("c") - want.mean("c")).abs() / want.sd("c")
    assert float(gap.max()) < 0.1 or not found.diagnostics.verdict.startswith("good")
    torch.testing.assert_close(found.sd("c"), want.sd("c"), rtol=1e-8, atol=1e-10)


@model
def cell():
    with plate("i", ordered=True), plate("j", ordered=True):
        x = latent("x", Flat())
        observe("y", Normal(x, 1.0))
        factor("right", Normal(shift(x, "j") - x, 0.3), at=0.0)
        factor("down", Normal(shift(x, "i") - x, 0.3), at=0.0)


def test_spreads_are_exact_by_default_and_loopy_ones_are_announced():
    data = {"y": np.random.default_rng(0).standard_normal((6, 6))}
    want = infer(cell, data, method="exact")
    found = infer(cell, data, method="gbp")
    torch.testing.assert_close(found.sd("x"), want.sd("x"), rtol=1e-8, atol=1e-10)
    assert found.diagnostics.verdict.startswith("good")
    assert "from a direct solve" in str(found.diagnostics.notes["means"])
    with pytest.warns(UserWarning, match="those of messages"):
        loopy = infer(cell, data, method="gbp", variance="check")
    assert loopy.diagnostics.verdict.startswith("check: standard deviations are those of messages")


@model
def stiff_cell():
    with plate("i", ordered=True), plate("j", ordered=True):
        x = latent("x", Flat())
        observe("y", Normal(x, 1.0))
        factor("right", Normal(shift(x, "j") - x, 0.1), at=0.0)
        factor("down", Normal(shift(x, "i") - x, 0.1), at=0.0)


def test_means_that_swing_to_and_fro_are_damped_a_little():
    """Even and odd elements of a grid hear only of each other: eigenvalues come in pairs r, -r."""
    data = {"y": np.random.default_rng(0).standard_normal((20, 20))}
    found = infer(stiff_cell, data, method="gbp")
    want = infer(stiff_cell, data, method="exact")
    assert found.diagnostics.converged and found.diagnostics.iterations < 400
    assert float(((found.mean("x") - want.mean("x")) / want.sd("x")).abs().max()) < 0.01
    with pytest.warns(UserWarning, match="not converged"):
        plain = infer(stiff_cell, data, method="gbp", damping=0.0, max_iters=400)
    assert not plain.diagnostics.converged


def test_means_that_are_not_there_yet_are_announced():
    data = {"y": np.random.default_rng(0).standard_normal((9, 9)) * 10}
    with pytest.warns(UserWarning, match="have not reached the optimum"):
        early = infer(cell, data, method="gbp", max_iters=3)
    assert "sd from a direct solve" in early.diagnostics.verdict


@model
def ranging():
    x = latent("x", Normal(torch.zeros(2), 1.0))
    with plate("beacon"):
        distance = (x - given("where")).square().sum().sqrt()
        observe("range", Normal(distance, 0.1))


def test_a_row_that_was_not_finite_for_a_moment_is_not_reported():
    """The root has no derivative where the first beacon stands: at the start, and nowhere later."""
    data = {"where": np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 0.5]]), "range": [0.6, 1.0, 1.6]}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = infer(ranging, data, method="gbp")
    torch.testing.assert_close(
        found.mean("x"), infer(ranging, data, method="laplace").mean("x"), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("group", [SO2, SE2, SO3, SE3], ids=lambda g: g.name)
def test_the_change_of_charts_in_closed_form_is_its_derivative(group):
    generator = torch.Generator().manual_seed(0)

    def draw(n):
        return torch.randn(n, group.dims, dtype=torch.float64, generator=generator)

    family = Family("x", ("n",), (20,), group.event_shape, group)
    origin = group.exp(draw(20))
    points = group.compose(origin, group.exp(0.7 * draw(20)))
    step, h = draw(20), 1e-6

    def old(delta):
        return family.local(origin, family.retract(points, delta))

    slope = (old(h * step) - old(-h * step)) / (2 * h)
    got = (change_of_chart(family, origin, points) @ step.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(got, slope, rtol=1e-7, atol=1e-7)


def test_loo_of_a_model_of_factors_alone_is_refused_in_words():
    chain = {name: values[:11] for name, values in square(12).items()}
    posterior = infer(drive, chain, method="gbp")
    with pytest.raises(ModelError, match="no observed site"):
        posterior.loo()
    assert "schedule tree" in {r.method: r.note for r in explain(drive, square()).rows}["gbp"]
