"""What ``method="auto"`` picks, and the reason it gives."""

from __future__ import annotations

import pytest
import torch

from ppl import (
    SE2,
    ConcentratedNormal,
    Flat,
    HalfNormal,
    Normal,
    SpikeSlab,
    UnsupportedError,
    dot,
    factor,
    given,
    infer,
    latent,
    model,
    observe,
    param,
    pick,
    plate,
)
from ppl.inference.auto import choose
from tests.conjugate import coin


@model
def smooth():
    with plate("t", ordered=True):
        level = latent("level", Flat())
        observe("y", Normal(level, 1.0))
    factor("first", Normal(pick(level, t=0), 1.0), at=0.0)


@model
def poses():
    pose = plate("pose")
    with pose:
        x = latent("x", Flat(SE2))
    with plate("edge"):
        seen = SE2.between(x[given("i", index=pose)], x[given("j", index=pose)])
        factor("edge", ConcentratedNormal(SE2, given("z"), 0.1), at=seen)
    factor("anchor", ConcentratedNormal(SE2, torch.zeros(3), 0.1), at=pick(x, pose=0))


@model
def sparse():
    coef = plate("coef")
    with coef:
        x = latent("x", SpikeSlab(param("rate", 0.1), Normal(0.0, 1.0)))
    with plate("row"):
        with coef:
            design = given("A")
        observe("y", Normal(dot(design, x, over=coef), 0.1))


@model
def schools():
    spread = [latent(f"spread{i}", HalfNormal(1.0)) for i in range(6)]
    with plate("school"):
        level = latent("level", Normal(0.0, sum(spread)))
        observe("y", Normal(level, 1.0))


EDGES = {"i": [0, 1], "j": [1, 2], "z": torch.zeros(2, 3)}
CASES = {
    "exact": (coin(heads=1.0, tails=1.0), {"heads": [1, 0]}, {}, "integrated exactly"),
    "laplace": (smooth, {"y": torch.zeros(20_000)}, {}, "Gaussian and linear"),
    "amp": (sparse, {"A": torch.zeros(50, 300), "y": torch.zeros(50)}, {}, "one linear map"),
    "qem": (schools, {"y": [1.0, 2.0, 3.0]}, {}, "particles"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_graph_decides(name):
    program, data, sizes, reason = CASES[name]
    chosen, why = choose(program.bind(data, sizes=sizes))
    assert chosen == name and reason in why


def test_a_pose_graph_is_fitted_without_naming_a_method():
    posterior = infer(poses, EDGES, sizes={"pose": 3})
    assert posterior.method == "laplace"
    assert posterior.mean("x").abs().max() < 1e-6


def test_elements_tied_to_each_other_are_not_left_to_particles():
    @model
    def plane():
        pose = plate("pose")
        with pose:
            x = latent("x", Flat(2))
        with plate("edge"):
            a, b = x[given("i", index=pose)], x[given("j", index=pose)]
            observe("range", Normal((a - b).square().sum(), 0.1))
        factor("anchor", Normal(pick(x, pose=0), 1.0), at=0.0)

    data = {"i": [0, 1], "j": [1, 2], "range": [1.0, 2.0]}
    chosen, why = choose(plane.bind(data, sizes={"pose": 3}))
    assert chosen == "laplace" and "tied to each other" in why


def test_few_coefficients_are_not_left_to_averages():
    chosen, _ = choose(sparse.bind({"A": torch.zeros(5, 3), "y": torch.zeros(5)}))
    assert chosen != "amp"


def test_what_nothing_can_fit_is_refused_with_every_reason():
    @model
    def crossed():
        with plate("user", 3) as user:
            taste = latent("taste", HalfNormal(1.0))
        with plate("film", 4) as film:
            quality = latent("quality", HalfNormal(1.0))
        with user, film:
            observe("y", Normal(taste * quality, 1.0))

    with pytest.raises(UnsupportedError, match="(?s)exact: .*amp: .*qem: .*laplace: "):
        choose(crossed.bind({"y": torch.zeros(3, 4)}))
