"""Exchangeable components are found, and nothing that is identified is taken for one."""

from __future__ import annotations

import math

import pytest
import torch

from ppl import (
    Categorical,
    Dirichlet,
    HalfNormal,
    Markov,
    Mixture,
    MixtureSameFamily,
    Normal,
    dot,
    factor,
    given,
    latent,
    model,
    observe,
    pick,
    plate,
    sum,  # noqa: A004 - the word of the language
)
from ppl.models import eight_schools, mixture, ordered_mixture
from ppl.symmetry import exchanges, may_exchange
from tests.models.joint_density import joint_density

X = [0.5, -1.0, 2.0, 3.5]
SCHOOLS = {"y": [3.0, 1.0, 2.0], "sigma": [1.0, 1.0, 1.0]}


def found(program, data, **sizes):
    """Exchanges at a draw of the prior, as (plate, size, sites)."""
    bound = program.bind(data, sizes=sizes or None)
    drawn = program.sample(1, data, sizes=sizes or None, seed=3)
    point = {v.name: drawn[v.name][0].to(bound.dtype) for v in bound.graph.latents}
    return bound, point, exchanges(bound, point)


@model
def summed(weights=(1.0, 1.0, 1.0)):
    weight = latent("weight", Dirichlet(torch.tensor(weights)))
    centre = latent("centre", Normal(0.0, 5.0), shape=3)
    with plate("point"):
        observe("x", Mixture(weight, Normal(centre, 1.0)))


@model
def same_family():
    weight = latent("weight", Dirichlet(torch.ones(3)))
    centre = latent("centre", Normal(0.0, 5.0), shape=3)
    with plate("point"):
        observe("x", MixtureSameFamily(Categorical(weight), Normal(centre, 1.0)))


@model
def labelled_event():
    """Classes along an event axis, with means of the centres that are exchangeable, too."""
    weight = latent("weight", Dirichlet(torch.ones(3)))
    top = latent("top", Normal(0.0, 5.0), shape=3)
    centre = latent("centre", Normal(top, 1.0))
    with plate("point"):
        z = latent("z", Categorical(weight))
        observe("x", Normal(centre[z], 1.0))


@model
def hidden_chain():
    """States of a chain: rows and columns of the transition matrix are renumbered together."""
    state = plate("state", 3)
    with state:
        row = latent("row", Dirichlet(torch.ones(3)))
        level = latent("level", Normal(0.0, 5.0))
    with plate("point", ordered=True):
        first = Categorical(torch.ones(3) / 3, over=state)
        z = latent("z", Markov(first, lambda before: Categorical(row[before], over=state)))
        observe("x", Normal(level[z], 1.0))


@model
def topics():
    """One set of centres, with a weight of each in every group."""
    component = plate("component", 3)
    with component:
        centre = latent("centre", Normal(0.0, 5.0))
    with plate("group", 2):
        weight = latent("weight", Dirichlet(torch.ones(3)))
        with plate("row", 4):
            z = latent("z", Categorical(weight, over=component))
            observe("y", Normal(centre[z], 1.0))


@model
def factors():
    """Products of loadings and scores, summed over factors that nothing tells apart."""
    row, part = plate("point"), plate("part", 2)
    with part:
        loading = latent("loading", Normal(0.0, 1.0))
    with row:
        with part:
            score = latent("score", Normal(0.0, 1.0))
        observe("x", Normal(dot(score, loading, over=part), 0.5))


@pytest.mark.parametrize(
    "program, plate_name, sites",
    [
        pytest.param(mixture(), "component", {"weight", "centre", "spread", "z"}, id="labels"),
        pytest.param(summed(), None, {"weight", "centre"}, id="summed"),
        pytest.param(same_family, None, {"weight", "centre"}, id="same family"),
        pytest.param(labelled_event, None, {"weight", "top", "centre", "z"}, id="event labels"),
        pytest.param(hidden_chain, "state", {"row", "level", "z"}, id="chain"),
        pytest.param(factors, "part", {"loading", "score"}, id="factors"),
    ],
)
def test_exchangeable_components_are_found(program, plate_name, sites):
    bound, point, (exchange,) = found(program, {"x": X})
    assert (exchange.plate, set(exchange.sites)) == (plate_name, sites)
    assert exchange.copies == math.factorial(exchange.size)
    order = torch.arange(exchange.size).roll(1)
    draws = {n: t.unsqueeze(0) for n, t in point.items()}
    moved = exchange.renumbered(draws, order.unsqueeze(0))
    there = joint_density(bound, {n: t[0] for n, t in moved.items()})
    assert there == pytest.approx(joint_density(bound, point), rel=1e-10)
    assert any(not torch.equal(moved[n][0], point[n]) for n in exchange.sites)


def test_weights_inside_a_plate_are_renumbered_along_their_event():
    _, _, (exchange,) = found(topics, {"y": torch.randn(2, 4)})
    assert exchange.axes == {"centre": (0,), "weight": (1,)}


def test_vectors_of_as_many_entries_as_components_keep_their_entries():
    _, _, (exchange,) = found(mixture(k=2, dim=2), {"x": [[0.0, 1.0], [2.0, 3.0]]})
    assert exchange.axes == {"weight": (0,), "centre": (0,), "spread": (0,)}


@model
def broken(how: str):
    component = plate("component", 3)
    weight = latent("weight", Dirichlet(torch.ones(3)))
    with component:
        middle = given("middle") if how == "covariate" else 0.0
        centre = latent("centre", Normal(middle, 5.0))
        if how == "data":
            observe("seen", Normal(centre, 1.0))
    if how == "pick":
        observe("anchor", Normal(pick(centre, component=0), 1.0))
    if how == "factor":
        rises = pick(centre, component=0) < pick(centre, component=1)
        factor("order", torch.where(rises, 0.0, -1.0))
    with plate("point"):
        z = latent("z", Categorical(weight, over=component))
        observe("x", Normal(centre[z], 1.0))


@model
def regression_on_kinds():
    """An index that is data says which element is which."""
    kind = plate("kind", 3)
    with kind:
        level = latent("level", Normal(0.0, 1.0))
    with plate("point"):
        observe("x", Normal(level[given("which", index=kind)], 1.0))


THREE = [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    "program, data",
    [
        pytest.param(ordered_mixture(), {"x": X}, id="ordered"),
        pytest.param(summed((1.0, 2.0, 3.0)), {"x": X}, id="unlike weights"),
        pytest.param(broken("covariate"), {"x": X, "middle": THREE}, id="covariate"),
        pytest.param(broken("data"), {"x": X, "seen": THREE}, id="data"),
        pytest.param(broken("pick"), {"x": X, "anchor": 0.3}, id="pick"),
        pytest.param(broken("factor"), {"x": X}, id="factor"),
        pytest.param(regression_on_kinds, {"x": X, "which": [0, 1, 2, 0]}, id="index of data"),
        pytest.param(eight_schools, SCHOOLS, id="groups with data"),
    ],
)
def test_identified_components_raise_no_alarm(program, data):
    assert found(program, data)[2] == ()


def test_elements_that_nothing_reads_together_need_no_check():
    @model
    def apart():
        with plate("item", 3):
            size = latent("size", HalfNormal(1.0))
        observe("x", Normal(pick(size, item=0), 1.0))

    assert not may_exchange(apart.bind({"x": 1.0}))


def test_a_sum_of_unknowns_is_exchangeable():
    @model
    def total():
        item = plate("item", 3)
        with item:
            size = latent("size", HalfNormal(1.0))
        observe("x", Normal(sum(size, over=item), 1.0))

    _, _, (exchange,) = found(total, {"x": 1.0})
    assert (exchange.plate, exchange.mixes) == ("item", False)
