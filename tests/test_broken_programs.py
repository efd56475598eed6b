"""Broken programs and data sets: each ends in one of our errors, at the user's line, with the remedy.

A row is: what is broken, the function that runs it, the error, and the parts of the message that help.
"""

from __future__ import annotations

import math
import re
import traceback

import numpy as np
import pytest
import torch

import ppl
from ppl import (
    Bernoulli,
    Categorical,
    DataError,
    Dirichlet,
    Exponential,
    Flat,
    HalfNormal,
    Markov,
    ModelError,
    Normal,
    Poisson,
    UnsupportedError,
    given,
    infer,
    latent,
    model,
    observe,
    plate,
)

Y = {"y": [1.0, 2.0, 3.0]}


@model
def line():
    slope = latent("slope", Normal(0.0, 1.0))
    with plate("point"):
        observe("y", Normal(slope * given("x"), 1.0))


@model
def grouped():
    group = plate("group")
    row = plate("row", within=group)
    with group:
        level = latent("level", Normal(0.0, 1.0))
    with row:
        observe("y", Normal(level, 1.0))


def outside_its_plate():
    @model
    def m():
        with plate("school"):
            theta = latent("theta", Normal(0.0, 1.0))
        observe("y", Normal(theta, 1.0))

    infer(m, {"y": 1.0}, method="qem")


def branch():
    @model
    def m():
        x = latent("x", Normal(0.0, 1.0))
        observe("y", Normal(x if x > 0 else -x, 1.0))

    infer(m, {"y": 1.0}, method="qem")


def assignment():
    @model
    def m():
        x = latent("x", Normal(0.0, 1.0), shape=2)
        x[0] = 1.0

    infer(m, method="qem")


def to_numpy():
    @model
    def m():
        x = latent("x", Normal(0.0, 1.0))
        observe("y", Normal(np.exp(x), 1.0))

    infer(m, {"y": 1.0}, method="qem")


def to_float():
    @model
    def m():
        observe("y", Normal(math.exp(latent("x", Normal(0.0, 1.0))), 1.0))

    infer(m, {"y": 1.0}, method="qem")


def duplicate_site():
    @model
    def m():
        latent("x", Normal(0.0, 1.0))
        latent("x", Normal(0.0, 1.0))

    infer(m, method="qem")


def sizes_disagree():
    infer(line, {"y": [1.0, 2.0, 3.0], "x": [1.0, 2.0]}, method="qem")


def wrong_index():
    @model
    def m():
        pose, film = plate("pose", 3), plate("film", 3)
        with pose:
            x = latent("x", Normal(0.0, 1.0))
        with plate("edge"):
            observe("y", Normal(x[given("i", index=film)], 1.0))

    infer(m, {"y": [1.0, 2.0], "i": [0, 1]}, method="qem")


def bad_event_shape():
    @model
    def m():
        w = latent("w", Normal(torch.zeros(3), 1.0), shape=2)
        observe("y", Normal(w.sum(), 1.0))

    infer(m, {"y": 1.0}, method="qem")


def torch_shapes_clash():
    @model
    def m():
        w = latent("w", Normal(0.0, 1.0), shape=3)
        observe("y", Normal((w * torch.ones(2)).sum(), 1.0))

    infer(m, {"y": 1.0}, method="qem")


def misspelt_covariate():
    infer(line, {"y": [1.0, 2.0], "xx": [1.0, 2.0]}, method="qem")


def missing_observation():
    infer(line, {"x": [1.0, 2.0]}, method="qem")


def outside_support():
    @model
    def m():
        rate = latent("rate", Exponential(1.0))
        with plate("day"):
            observe("count", Poisson(rate))

    infer(m, {"count": [1.0, -2.0, 3.0]}, method="qem")


def unknown_option():
    infer(line, {"y": [1.0], "x": [1.0]}, method="qem", particels=3)


def unknown_method():
    infer(line, {"y": [1.0], "x": [1.0]}, method="qme")


def nan_covariate():
    infer(line, {"y": [1.0, 2.0], "x": [1.0, float("nan")]}, method="qem")


def transposed():
    @model
    def m():
        x = latent("x", Normal(0.0, 1.0))
        with plate("a", 2), plate("b", 3):
            observe("y", Normal(x, 1.0))

    infer(m, {"y": torch.zeros(3, 2)}, method="qem")


def counted_from_one():
    infer(grouped, {"y": [1.0, 2.0, 3.0], "group": [1, 2, 3]}, method="qem", sizes={"group": 3})


def label_not_known():
    infer(
        grouped, {"y": [1.0, 2.0], "group": ["a", "b"]}, method="qem", labels={"group": ["a", "c"]}
    )


def no_membership():
    infer(grouped, {"y": [1.0, 2.0], "grp": ["a", "b"]}, method="qem")


def text_as_numbers():
    infer(line, {"y": [1.0, 2.0], "x": ["low", "high"]}, method="qem")


def ragged_rows():
    infer(line, {"y": [1.0, 2.0], "x": [[1.0], [1.0, 2.0]]}, method="qem")


def negative_scale():
    @model
    def m():
        latent("x", Normal(0.0, -1.0))

    infer(m, method="qem")


def plate_without_size():
    @model
    def m():
        with plate("nowhere"):
            latent("x", Normal(0.0, 1.0))

    infer(m, method="qem")


def markov_without_order():
    @model
    def m():
        with plate("day", 3):
            latent("x", Markov(Normal(0.0, 1.0), lambda before: Normal(before, 1.0)))

    infer(m, method="qem")


def crossed_latents():
    @model
    def m():
        with plate("user", 3) as user:
            taste = latent("taste", Normal(0.0, 1.0))
        with plate("film", 4) as film:
            quality = latent("quality", Normal(0.0, 1.0))
        with user, film:
            observe("y", Normal(taste + quality, 1.0))

    infer(m, {"y": torch.zeros(3, 4)}, method="qem")


def draw_from_flat():
    @model
    def m():
        latent("x", Flat())

    m.sample(2)


def not_a_law():
    @model
    def m():
        latent("x", Normal)

    infer(m, method="qem")


def not_a_model():
    infer(lambda: None, Y)


def data_of_no_kind():
    infer(line, 3.0, method="qem")


def budget_too_small():
    @model
    def m():
        x = latent("x", Normal(0.0, 1.0), shape=40)
        with plate("row"):
            observe("y", Normal(x.sum(), 1.0))

    infer(m, {"y": torch.zeros(1000)}, method="qem", particles=1000, memory="1KiB")


def simplex_index_wrong_size():
    @model
    def m():
        with plate("component", 3) as component:
            centre = latent("centre", Normal(0.0, 1.0))
        weight = latent("weight", Dirichlet(torch.ones(4)))
        with plate("point"):
            z = latent("z", Categorical(weight, over=component))
            observe("y", Normal(centre[z], 1.0))

    infer(m, Y, method="qem")


def both_parameters():
    @model
    def m():
        latent("x", Bernoulli(probs=0.5, logits=0.0))

    infer(m, method="qem")


def group_across_plates():
    infer(grouped, {"y": [1.0, 2.0], "group": ["a", "b"]}, method="qem", groups=[("level", "lvl")])


def nonsense_prior():
    @model
    def m():
        x = latent("x", HalfNormal(1.0))
        observe("y", Normal(0.0, x, 2.0))

    infer(m, {"y": 1.0}, method="qem")


HERE = r"test_broken_programs\.py:\d+"
ROWS = [
    (
        outside_its_plate,
        ModelError,
        [HERE, "'theta' varies over plate 'school'", "index it", "reduce it"],
    ),
    (branch, ModelError, [HERE, "may not branch", "torch.where"]),
    (assignment, ModelError, [HERE, "may not assign", "torch.stack"]),
    (to_numpy, ModelError, [HERE, "number or a NumPy array", "torch.exp"]),
    (to_float, ModelError, [HERE, "number or a NumPy array", "torch"]),
    (duplicate_site, ModelError, [HERE, "two sites are called 'x'", "scope"]),
    (sizes_disagree, DataError, ["plate 'point' has two sizes", "'y'", "'x'"]),
    (wrong_index, ModelError, [HERE, "indexes plate 'film'", "varies over pose"]),
    (bad_event_shape, ModelError, [HERE, "'w'", r"shape=\(2,\)"]),
    (torch_shapes_clash, ModelError, [HERE, "one element", "'w'"]),
    (misspelt_covariate, DataError, [HERE, r"given\('x'\)", "Did you mean 'xx'"]),
    (missing_observation, DataError, [HERE, r"observe\('y'\)", "The data has: x"]),
    (outside_support, DataError, ["'count'", "1 of 3 values", "day 1", "support"]),
    (unknown_option, ModelError, ["'particels'", "Did you mean 'particles'"]),
    (unknown_method, UnsupportedError, ["'qme'", "Did you mean 'qem'"]),
    (nan_covariate, DataError, ["'x'", "NaN", "point 1", "Drop"]),
    (transposed, DataError, [r"expected shape \[2, 3\]|two sizes", "3"]),
    (counted_from_one, DataError, ["'group'", "subtract 1"]),
    (label_not_known, DataError, ["'group'", "'b'", "labels="]),
    (no_membership, DataError, ["'group'", "Did you mean 'grp'|by="]),
    (text_as_numbers, DataError, ["'x' holds text", "labels"]),
    (ragged_rows, DataError, ["'x'", "different lengths", "within=parent"]),
    (negative_scale, ModelError, [HERE, "Normal", "scale", "-1"]),
    (plate_without_size, DataError, ["plate 'nowhere' has no size", "sizes="]),
    (markov_without_order, ModelError, [HERE, "'x' is Markov", "ordered=True"]),
    (crossed_latents, UnsupportedError, ["taste", "quality", "groups|another method"]),
    (draw_from_flat, UnsupportedError, ["'x'", "improper", "proper prior"]),
    (not_a_law, ModelError, [HERE, "Normal", r"Normal\("]),
    (not_a_model, ModelError, ["@model"]),
    (data_of_no_kind, DataError, ["float", "dictionary"]),
    (budget_too_small, UnsupportedError, ["particles", "memory|budget"]),
    (simplex_index_wrong_size, DataError, ["plate 'component' has two sizes", "'z'"]),
    (both_parameters, ModelError, [HERE, "probs", "logits"]),
    (group_across_plates, ModelError, ["'lvl'", "Did you mean 'level'"]),
    (nonsense_prior, ModelError, [HERE, "Normal", "loc, scale"]),
]


@pytest.mark.parametrize(("run", "error", "parts"), ROWS, ids=[row[0].__name__ for row in ROWS])
def test_the_error_says_where_and_what_to_do(run, error, parts):
    with pytest.raises(ppl.PPLError) as caught:
        run()
    assert type(caught.value) is error, str(caught.value)
    for part in parts:
        assert re.search(part, str(caught.value)), f"{part!r} is not in: {caught.value}"
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert "/torch/" not in last.filename, "the traceback ends inside torch"
