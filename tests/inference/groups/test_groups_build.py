"""First points, labels, refusals and flags of factor groups; pose graphs with known energies."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import ppl
from ppl import (
    SE2,
    Beta,
    Categorical,
    ConcentratedNormal,
    Delta,
    Flat,
    Gamma,
    Markov,
    MultivariateNormal,
    Normal,
    SpikeSlab,
    Uniform,
    factor,
    given,
    latent,
    model,
    observe,
    param,
    plate,
)
from ppl.errors import DataError, UnsupportedError
from ppl.inference.groups import Quadratic, Robust, build, linearise, unsupported
from ppl.models import datasets

# ---- first points --------------------------------------------------------------------------------


@model
def nested():
    mean = latent("mean", Normal(3.0, 1.0))
    group = plate("group", 2)
    with group:
        level = latent("level", MultivariateNormal(torch.stack([mean, 2 * mean]), torch.eye(2)))
        pose = latent("pose", ConcentratedNormal(SE2, given("at"), 0.1))
        free = latent("free", Flat())
    with group, plate("time", 3, ordered=True):
        latent("walk", Markov(Normal(level[0] + free, 1.0), lambda before: Normal(before, 1.0)))
    with group:
        factor("pull", ConcentratedNormal(SE2, pose, 1.0), at=torch.zeros(3))


AT = [[1.0, 2.0, 0.5], [0.0, 1.0, -0.5]]


def test_points_start_at_prior_means():
    points = build(nested.bind({"at": AT})).start()
    assert points["mean"].tolist() == [3.0]
    assert points["level"].tolist() == [[3.0, 6.0], [3.0, 6.0]]
    assert points["pose"].tolist() == AT
    assert points["free"].tolist() == [0.0, 0.0]
    assert points["walk"].tolist() == [3.0] * 6


def test_points_of_the_user_come_first_and_others_follow_them():
    groups = build(nested.bind({"at": AT}))
    points = groups.start({"mean": 1.0, "pose": torch.tensor([[0.0, 0.0, 4.0]] * 2)})
    assert points["level"].tolist() == [[1.0, 2.0], [1.0, 2.0]]
    assert points["pose"][0, 2].item() == pytest.approx(4.0 - 2 * np.pi)
    assert groups.shaped("walk", points["walk"]).shape == (2, 3)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"means": 0.0}, "'means' is no latent of the model. Did you mean 'mean'"),
        (
            {"level": torch.zeros(2)},
            r"'level' \(plates group\): expected shape \[2, 2\], got \[2\]",
        ),
        ({"mean": float("nan")}, "'mean' has entries that are NaN"),
    ],
)
def test_first_points_are_checked(start, message):
    with pytest.raises(DataError, match=message):
        build(nested.bind({"at": AT})).start(start)


# ---- flags, labels, memory -----------------------------------------------------------------------


@model
def friends():
    person = plate("person")
    with person:
        x = latent("x", Normal(0.0, 1.0))
    with plate("pair"):
        i, j = given("i", index=person), given("j", index=person)
        observe("d", Normal(x[i] - x[j], given("sd")))
        observe("r", Normal(x[i] * x[j], 1.0).robust("huber", 2.0))
        observe("same", Normal(x[i] + 2 * x[i], 1.0))


PAIRS = {
    "i": ["ann", "bob"],
    "j": ["bob", "cy"],
    "sd": [1.0, 2.0],
    "d": [0.0, 1.0],
    "r": [0.0, 1.0],
    "same": [0.0, 1.0],
}


def test_flags_and_slots():
    groups = build(friends.bind(PAIRS))
    x, d, r, same = groups.groups
    assert x.slots[0].is_row and d.is_fixed and isinstance(d.loss, Quadratic)
    assert [s.index.flatten().tolist() for s in d.slots] == [[0, 1], [1, 2]]
    assert not r.is_affine and isinstance(r.loss, Robust) and r.loss.per == "component"
    assert len(same.slots) == 1  # one latent through one index is one slot
    assert groups.group("r") is r


def test_rows_are_named_in_the_words_of_the_user():
    groups = build(friends.bind(PAIRS))
    assert groups.group("x").label(2) == "person cy"
    assert groups.group("d").label(1) == "pair 1 (x: person bob; x: person cy)"


def test_rows_of_a_chain_are_named_by_their_own_element():
    groups = build(nested.bind({"at": AT}, labels={"time": ["mon", "tue", "wed"]}))
    assert groups.group("walk (first)").label(1) == "group 1 (walk: group 1, time mon)"
    assert (
        groups.group("walk (later)")
        .label(0)
        .startswith("group 0, time tue (walk: group 0, time mon")
    )


def test_large_groups_take_memory_in_proportion():
    @model
    def large():
        item = plate("item", 100)
        with item:
            a = latent("a", Normal(0.0, 1.0))
        w = latent("w", Normal(torch.zeros(3), 1.0))
        with plate("n"):
            observe("y", Normal(a[given("i", index=item)] + given("x") @ w, 1.0))

    n = 200_000
    data = {"i": torch.arange(n) % 100, "x": torch.randn(n, 3), "y": torch.randn(n)}
    groups = build(large.bind(data))
    group = groups.group("y")
    points = groups.start()
    values = group.gather(points)
    assert values[1].stride(0) == 0  # a shared latent is not repeated
    assert linearise(group, values, {}).jacobian.shape == (n, 1, 4)


def test_single_precision_stays():
    groups = build(friends.bind(PAIRS, dtype=torch.float32))
    points = groups.start()
    row = linearise(groups.group("d"), groups.group("d").gather(points), {})
    assert {x.dtype for x in (points["x"], row.jacobian, row.residual, groups.constant)} == {
        torch.float32
    }


# ---- refusals ------------------------------------------------------------------------------------


@model
def positive():
    latent("rate", Gamma(1.0, 1.0))


@model
def bounded():
    latent("share", Beta(1.0, 1.0))


@model
def discrete():
    k = latent("k", Categorical(torch.ones(3) / 3))
    observe("y", Normal(k * 1.0, 1.0))


@model
def edged():
    top = latent("top", Normal(0.0, 1.0))
    observe("y", Uniform(-100.0, top))


@model
def pointed():
    top = latent("top", Normal(0.0, 1.0))
    factor("tie", Delta(top), at=0.0)


@model
def unknown_index():
    group = plate("group", 3)
    with group:
        x = latent("x", Normal(0.0, 1.0))
    with plate("n"):
        k = latent("k", Categorical(torch.ones(3) / 3, over=group))
        observe("y", Normal(x[k], 1.0))


@model
def only_params():
    latent("x", Normal(0.0, 1.0))
    observe("y", Normal(param("mean", 0.0), 1.0))


@model
def nothing():
    observe("y", Normal(0.0, 1.0))


@model
def several_poses():
    latent("x", ConcentratedNormal(SE2, torch.zeros(2, 3), 1.0))


@model
def sparse():
    x = latent("x", SpikeSlab(0.1, Normal(0.0, 1.0)))
    observe("y", Normal(x, 1.0))


REFUSED = {
    "an atom": (sparse, "x", "exactly zero with positive probability", 'method="amp"'),
    "positive": (positive, "rate", "positive numbers only", "latent\\('log_rate'"),
    "bounded": (bounded, "share", "and a Gaussian has all numbers", "unconstrained transform"),
    "discrete": (discrete, "k", "is discrete", "Sum it out"),
    "edged": (edged, "y", "Uniform has no derivative", "smooth law"),
    "pointed": (pointed, "tie", "Delta has no derivative", "smooth law"),
    "unknown index": (
        unknown_index,
        "y",
        "index into plate 'group'.*depends on 'k'",
        "Observe the index",
    ),
    "only params": (only_params, "y", "param 'mean' but on no latent", "make it a latent"),
    "nothing": (nothing, "", "has no latent", ""),
    "several poses": (several_poses, "x", "several elements of SE2", "in a plate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_where_and_what_to_do(case):
    program, site, problem, remedy = REFUSED[case]
    y = [1.0] if case == "unknown index" else 1.0
    reasons = {r.site: r for r in unsupported(program.graph({"y": y}))}
    assert re.search(problem, reasons[site].problem)
    assert re.search(remedy, reasons[site].remedy)


@model
def by_precision():
    with plate("i"):
        x = latent("x", Normal(torch.zeros(2), 10.0))
        observe("y", MultivariateNormal(x, precision_matrix=2 * given("P")))


@pytest.mark.parametrize("method", ["laplace", "gbp"])
@pytest.mark.parametrize("bad", [[[1.0, 0.0], [0.0, 0.0]], [[1.0, 2.0], [2.0, 1.0]]])
def test_matrices_that_are_not_positive_definite_are_named(method, bad):
    data = {"P": np.stack([np.eye(2), bad, bad]), "y": np.ones((3, 2)), "i": ["a", "b", "c"]}
    message = (
        "'y': the precision_matrix of MultivariateNormal is not .* in 2 of 3 rows, the first at i b"
    )
    with pytest.raises(DataError, match=message):
        ppl.infer(by_precision, data, method=method)
    data["y"][1, 0] = np.nan  # a part of a vector is missing: its marginal is another matrix
    with pytest.raises(DataError, match=message):
        ppl.infer(by_precision, data, method=method)


def test_scales_that_are_not_positive_are_named():
    @model
    def scaled():
        with plate("i"):
            x = latent("x", Normal(0.0, 1.0))
            observe("y", Normal(x, given("sd") - 1.0))

    sd = np.array([2.0, 0.5, 0.5])
    with pytest.raises(DataError, match="'y': the scale of Normal is not positive in 2 of 3 rows"):
        build(scaled.bind({"y": [1.0, 2.0, 3.0], "sd": sd}))
    with pytest.raises(
        DataError, match="in 1 of 3 rows, the first at i 2"
    ):  # a missing row is none
        build(scaled.bind({"y": [1.0, np.nan, 3.0], "sd": sd}))


def test_one_matrix_for_all_rows_is_quoted():
    @model
    def shared():
        precision = -1.0 * given("P")
        with plate("i"):
            x = latent("x", Normal(torch.zeros(2), 10.0))
            observe("y", MultivariateNormal(x, precision_matrix=precision))

    with pytest.raises(DataError, match=r"is not positive definite: \[\[-1.0"):
        build(shared.bind({"y": np.ones((3, 2)), "P": np.eye(2)}))


def test_build_refuses_as_unsupported_does():
    with pytest.raises(UnsupportedError, match="'rate': its law allows positive numbers"):
        build(positive.bind({}))


def test_a_reduction_inside_two_groups_is_refused():
    @model
    def two():
        a, b = plate("a", 2), plate("b", 2)
        child = plate("child", within=(a, b))
        with child:
            x = latent("x", Normal(0.0, 1.0))
        with a, b:
            observe("y", Normal(ppl.sum(x, over=child), 1.0))

    data = {"a": [0, 1, 1], "b": [0, 0, 1], "y": torch.zeros(2, 2)}
    with pytest.raises(
        UnsupportedError, match="'y': a reduction over plate 'child'.*Open one plate"
    ):
        build(two.bind(data))


# ---- known energies ------------------------------------------------------------------------------


@model
def pose_graph():
    pose = plate("pose")
    with pose:
        x = latent("x", Flat(SE2))
    with plate("edge"):
        i, j = given("i", index=pose), given("j", index=pose)
        residual = SE2.between(given("z"), SE2.between(x[i], x[j]))
        factor(
            "edge", MultivariateNormal(torch.zeros(3), precision_matrix=given("info")), at=residual
        )


@pytest.mark.parametrize("name", ["manhattan3500", "intel", "synthetic_manhattan3500"])
def test_energies_of_pose_graphs(name):
    path = datasets.find(f"gbp/{name}.npz")
    if path is None:
        pytest.skip("the data folder is not there")
    data = np.load(path)
    rows, columns = np.triu_indices(3)
    info = np.zeros((len(data["i"]), 3, 3))
    info[:, rows, columns] = info[:, columns, rows] = data["info_upper"]
    bound = pose_graph.bind(
        {"i": data["i"], "j": data["j"], "z": data["z"], "info": info},
        sizes={"pose": len(data["opt"])},
    )
    energy = build(bound).energy({"x": torch.as_tensor(data["opt"])})
    anchor = 0.5 * data["anchor_precision"] * ((data["opt"][0] - data["anchor"]) ** 2).sum()
    assert float(energy + anchor) == pytest.approx(float(data["opt_energy"]), rel=1e-9)
