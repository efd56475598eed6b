"""Energies and constants of the rows add up to the joint log-density, whatever a factor reads and how."""

from __future__ import annotations

import pytest
import torch

import ppl
from ppl import (
    SE2,
    SE3,
    SO2,
    Bernoulli,
    Categorical,
    ConcentratedNormal,
    Flat,
    Independent,
    Markov,
    MultivariateNormal,
    Normal,
    Poisson,
    StudentT,
    dot,
    factor,
    given,
    latent,
    model,
    observe,
    param,
    pick,
    plate,
    shift,
)
from ppl.plates import collect
from tests.inference.groups.oracle_of_groups import check_density

NAN = float("nan")
positive = torch.distributions.constraints.positive


@model
def line():
    slope = latent("slope", Normal(0.0, 1.0))
    base = latent("base", Normal(2 * slope, 3.0))
    with plate("n"):
        observe("y", Normal(slope * given("x") + base, 0.5))


@model
def counties():
    mean, spread = latent("mean", Normal(0.0, 1.0)), latent("spread", Normal(0.0, 1.0))
    county = plate("county")
    with county:
        level = latent("level", Normal(mean, spread.exp()))
    with plate("house", within=county):
        observe("y", Normal(level + given("x"), 1.0))


@model
def series():
    with plate("time", ordered=True):
        state = latent(
            "state",
            Markov(
                Normal(torch.zeros(2), 1.0), lambda before: Normal(0.9 * before + given("u"), 0.1)
            ),
        )
        covariance = torch.tensor([[1.0, 0.3], [0.3, 2.0]])
        observe("y", MultivariateNormal(state, covariance_matrix=covariance))


@model
def many_series():
    with plate("unit"), plate("time", ordered=True):
        state = latent("state", Markov(Normal(0.0, 1.0), lambda before: Normal(before.sin(), 0.1)))
        observe("y", Normal(state, 0.3))


@model
def poses():
    pose = plate("pose", 5)
    with pose:
        x = latent("x", ConcentratedNormal(SE2, torch.zeros(3), torch.tensor([1.0, 2.0, 0.5])))
    with plate("edge"):
        i, j = given("i", index=pose), given("j", index=pose)
        observe(
            "z", ConcentratedNormal(SE2, SE2.between(x[i], x[j]), precision_matrix=given("info"))
        )
    factor(
        "anchor",
        ConcentratedNormal(SE2, pick(x, pose=0), 0.1).robust("huber", 1.0),
        at=torch.zeros(3),
    )


@model
def rotations():
    with plate("n", 4, ordered=True) as n:
        angle = latent("angle", Flat(SO2))
        motion = latent("motion", Flat(SE3))
        observe("heading", ConcentratedNormal(SO2, angle, 0.2))
        observe("place", Normal(SE3.act(motion, given("point")), 0.1))
        factor("turn", ConcentratedNormal(SO2, SO2.compose(shift(angle, n), angle), 0.3), at=0.5)


@model
def image():
    with plate("row", ordered=True) as row, plate("column", ordered=True) as column:
        x = latent("x", Normal(0.0, 1.0))
        observe("y", Normal(x, given("s")))
        factor("right", Normal(x - shift(x, column), 0.3).robust("huber", 1.2), at=0.0)
        factor("up", Normal(x - shift(x, row, -1), 0.3), at=0.0)
        factor("free", -0.1 * (x - 0.3) ** 4)


@model
def ratings():
    user, item = plate("user"), plate("item")
    with user:
        a = latent(
            "a",
            MultivariateNormal(torch.zeros(2), scale_tril=torch.tensor([[1.0, 0.0], [0.5, 2.0]])),
        )
    with item:
        b = latent("b", MultivariateNormal(torch.zeros(2), torch.eye(2)))
    scale, k = param("scale", 0.7, support=positive), param("k", 2.0, support=positive)
    with plate("event"):
        i, j = given("i", index=user), given("j", index=item)
        observe("r", Normal((a[i] * b[j]).sum(), scale).robust("cauchy", k))


@model
def likelihoods():
    w = latent("w", Normal(torch.zeros(3, 2), 1.0))
    with plate("n"):
        f = given("x") @ w
        observe("c", Categorical(logits=f))
        observe("k", Poisson(f[0].exp()))
        observe("b", Bernoulli(logits=f))
        observe("t", StudentT(3.0, f[1], 2.0))
        observe("m", Independent(Normal(f, torch.ones(2)), 1).masked(given("keep")))


@model
def links():
    w, spread = latent("w", Normal(torch.zeros(3), 1.0)), latent("spread", Normal(0.0, 1.0))
    rate = param("rate", 1.5, support=positive)
    with plate("n"):
        f = (given("x") * w).sum(-1)
        observe("k", Poisson(rate * given("exposure") * (f + 0.1).exp()))
        observe("b", Bernoulli(torch.sigmoid(torch.stack([f, 2 * f]))))
        observe("y", Normal(f.exp() + f, 0.1 + (0.3 * spread).exp()))
        observe("v", Normal(torch.stack([f, f]), rate * spread.exp()))
        observe("c", Categorical(probs=torch.softmax(torch.stack([f, 1 - f]), -1)))


@model
def per_group_params():
    group = plate("group")
    with group:
        scale = param("scale", 0.7, support=positive)
        level = latent("level", Normal(0.0, 1.0))
    with plate("n", within=group):
        observe("y", Normal(level, scale))
        observe("z", Normal(torch.stack([level, 2 * level]), scale * torch.ones(2)))


@model
def ragged():
    group = plate("group", 3)
    child = plate("child", within=group)
    with group:
        a = latent("a", Normal(0.0, 1.0))
    with child:
        b = latent("b", Normal(a, 1.0))
        squares, sums = b * b, a + b
    with group:
        observe("total", Normal(ppl.sum(b, over=child), 1.0))
        observe("average", Normal(ppl.mean(squares, over=child) * a, 1.0))
        observe("largest", Normal(ppl.logsumexp(sums, over=child) + a, 1.0))
    with child:
        observe("deviation", Normal(b - ppl.mean(b, over=child), 1.0))
        observe("other", Normal(a[given("i", index=group)] * b, 1.0))
        observe("mixed", Normal((a[given("is", index=group)] * given("w")).sum() + b, 1.0))


@model
def reductions():
    k, t = plate("k", 4), plate("t", 5, ordered=True)
    with k:
        w = latent("w", Normal(0.0, 1.0))
        e = w.exp()
    with t:
        q = latent("q", Normal(torch.zeros(2), 1.0))
        forward, back = shift(q, t) * q, shift(q, t, -2) * q
        factor("smooth", Normal(shift(q, t) - 2 * q + shift(q, t, -1), 0.3), at=0.0)
    with plate("n"):
        with k:
            x = given("x")
        observe("y", Normal(dot(x, w, over=k), 1.0))
        observe("z", Normal(ppl.mean(e, over=k) * pick(w, k=-1), 0.5))
    factor("all", Normal(collect(w, over=(k,)), torch.ones(4)), at=torch.ones(4))
    factor("one", -((pick(w, k=1) - pick(w, k=2)) ** 2))
    factor("lag", Normal(ppl.sum(forward, over=t), 1.0), at=torch.zeros(2))
    factor("lead", Normal(ppl.mean(back, over=t), 1.0), at=torch.zeros(2))


@model
def crossed():
    a_plate, b_plate = plate("a_plate", 3), plate("b_plate", 2)
    with a_plate:
        a = latent("a", Normal(0.0, 1.0))
    with b_plate:
        b = latent("b", Normal(0.0, 1.0))
    with a_plate, b_plate:
        c = latent("c", Normal(a * b, 1.0))
        observe("y", Normal(c + a, 1.0))
    with plate("n"):
        i = given("i", index=a_plate)
        with b_plate:
            observe("v", Normal(c[i] - b, 1.0))
    matrix = collect(c, over=(b_plate, a_plate))
    factor("matrix", Normal(matrix, 2.0), at=torch.ones(2, 3))


def _t(*shape):
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _partly():
    y = _t(4, 2)
    y[1, 0] = NAN
    y[2] = NAN
    return y


_ROOT = _t(7, 3, 3)
_GROUPS = [0, 1, 0, 2, 1, 0, 0]
CASES = {
    "line, a missing entry": (line, {"x": [1.0, 2.0, 3.0], "y": [1.0, NAN, 2.0]}),
    "membership, latent scale": (
        counties,
        {"county": ["u", "v", "u", "w"], "x": [1.0, 2.0, 3.0, 4.0], "y": [1.0, 0.0, 2.0, 5.0]},
    ),
    "chain": (series, {"u": [0.1, 0.2, 0.3, 0.4], "y": _t(4, 2)}),
    "vectors missing in part": (series, {"u": [0.1, 0.2, 0.3, 0.4], "y": _partly()}),
    "chains in a plate": (many_series, {"y": _t(3, 5)}),
    "pose graph": (
        poses,
        {"i": [0, 1, 2, 3, 4, 0, 2], "j": [1, 2, 3, 4, 0, 3, 0], "z": _t(7, 3),
         "info": _ROOT @ _ROOT.mT + torch.eye(3)},
    ),
    "other manifolds": (rotations, {"heading": _t(4), "place": _t(4, 3), "point": _t(4, 3)}),
    "image": (image, {"y": _t(4, 5), "s": _t(4, 5).abs() + 0.1}),
    "two indices, params": (
        ratings,
        {"i": ["a", "b", "c", "a"], "j": ["x", "y", "x", "z"], "r": [1.0, 2.0, NAN, 4.0]},
    ),
    "likelihoods": (
        likelihoods,
        {"x": _t(6, 3), "c": [0, 1, 0, 0, 1, 1], "k": [0.0, 1.0, 2.0, NAN, 4.0, 5.0],
         "b": (_t(6, 2) > 0).double(), "t": _t(6), "m": _t(6, 2), "keep": [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]},
    ),
    "links": (
        links,
        {"x": _t(6, 3), "exposure": _t(6).abs(), "k": [0, 1, 2, 0, 3, 1], "b": (_t(6, 2) > 0).double(), "y": _t(6),
         "v": _t(6, 2), "c": [0, 1, 0, 0, 1, 1]},
    ),
    "params in a plate": (per_group_params, {"group": _GROUPS, "y": _t(7), "z": _t(7, 2)}),
    "ragged reductions": (
        ragged,
        {"group": _GROUPS, "total": _t(3), "average": _t(3), "largest": _t(3), "deviation": _t(7),
         "other": _t(7), "mixed": _t(7), "i": [0, 1, 2, 0, 1, 2, 2], "is": torch.tensor(_GROUPS * 2).reshape(7, 2),
         "w": _t(7, 2)},
    ),
    "reductions and shifts": (reductions, {"x": _t(6, 4), "y": _t(6), "z": _t(6)}),
    "crossed plates": (crossed, {"y": _t(3, 2), "i": [0, 2, 1, 2], "v": _t(4, 2)}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_rows_add_up_to_the_joint_density(case):
    program, data = CASES[case]
    check_density(program.bind(data))


def test_a_factor_without_latents_is_a_constant():
    @model
    def two():
        x = latent("x", Normal(0.0, 1.0))
        with plate("n", ordered=True):
            observe("z", Markov(Normal(0.0, 2.0), lambda before: Normal(before, 1.0)))
        with plate("m"):
            observe("y", Normal(x, 1.0))
            observe("v", Normal(1.0, 2.0))

    groups = check_density(two.bind({"z": [0.3, 1.0, 2.0], "y": [1.0, 2.0], "v": [0.0, NAN]}))
    assert [g.name for g in groups.groups] == ["x", "y"]


def test_flat_says_nothing():
    @model
    def flat():
        x = latent("x", Flat(2))
        observe("y", Normal(x, 1.0))

    groups = check_density(flat.bind({"y": [1.0, 2.0]}))
    assert [g.name for g in groups.groups] == ["y"]


def test_a_broadcast_equals_an_explicit_index():
    @model
    def nested():
        group = plate("group", 3)
        with group:
            a = latent("a", Normal(0.0, 1.0))
        with plate("n", within=group):
            observe("y", Normal(a * given("x"), 1.0))

    @model
    def indexed():
        group = plate("group", 3)
        with group:
            a = latent("a", Normal(0.0, 1.0))
        with plate("n"):
            observe("y", Normal(a[given("group", index=group)] * given("x"), 1.0))

    data = {"group": _GROUPS, "x": _t(7), "y": _t(7)}
    left, right = (ppl_groups(m, data) for m in (nested, indexed))
    points = {"a": _t(3)}
    for one, two in zip(left.groups, right.groups, strict=True):
        for a, b in zip(_linear(one, points), _linear(two, points), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def ppl_groups(program, data):
    from ppl.inference.groups import build

    return build(program.bind(data))


def _linear(group, points):
    from ppl.inference.groups import linearise

    made = linearise(group, group.gather(points), {})
    return made.jacobian, made.residual, made.energy
