"""What a run says where elements are free, scales differ too much, or rows hardly count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ppl import (
    Flat,
    Markov,
    Normal,
    factor,
    given,
    infer,
    latent,
    load,
    model,
    observe,
    pick,
    plate,
)
from ppl.errors import NumericalError


@model
def turning():
    """A chain of headings whose differences are measured by their sines."""
    node, edge = plate("node"), plate("edge")
    with node:
        x = latent("x", Flat())
    with edge:
        i, j = given("i", index=node), given("j", index=node)
        observe("z", Normal((x[j] - x[i]).sin(), 0.1))
    factor("anchor", Normal(pick(x, node=0), 1e-3), at=0.0)


@model
def loose():
    """The same without an anchor."""
    node = plate("node")
    with node:
        x = latent("x", Flat())
    with plate("edge"):
        i, j = given("i", index=node), given("j", index=node)
        observe("z", Normal((x[j] - x[i]).sin(), 0.1))


DATA = {"i": [0, 1], "j": [1, 2], "z": [0.3, 0.2]}


@pytest.mark.parametrize("options", [{}, {"optimiser": "dogleg"}, {"solver": "cg"}])
def test_elements_in_no_factor_are_named(options):
    names = {"node": ["a", "b", "c", "d", "e"]}
    data = {"i": ["a", "b"], "j": ["b", "c"], "z": [0.3, 0.2]}
    with pytest.raises(NumericalError, match=r"2 of 5 elements of 'x' \(node d, node e\) are in"):
        infer(turning, data, method="laplace", labels=names, **options)


def test_a_latent_outside_plates_in_no_factor_is_named():
    @model
    def apart():
        latent("idle", Flat())
        x = latent("x", Normal(0.0, 1.0))
        observe("y", Normal(x, 1.0))

    with pytest.raises(NumericalError, match="laplace: 'idle' is in no factor"):
        infer(apart, {"y": 1.0}, method="laplace")


def test_elements_that_extend_leaves_open_are_named():
    fitted = infer(turning, DATA, method="laplace")
    with pytest.raises(NumericalError, match=r"6 of 10 elements of 'x' \(node 3, .* 3 more\)"):
        fitted.extend({"i": [2], "j": [9], "z": [0.1]})


def test_elements_whose_rows_are_all_missing_are_named():
    @model
    def means():
        with plate("n"):
            x = latent("x", Flat())
            observe("y", Normal(x.sin(), 1.0))

    with pytest.raises(NumericalError, match=r"1 of 3 elements of 'x' \(n 1\) is in"):
        infer(means, {"y": [0.1, np.nan, 0.2]}, method="laplace")


def test_a_direction_that_only_damping_holds_is_named():
    with pytest.raises(NumericalError, match=r"'x' \(node \d\) is not determined"):
        infer(loose, {"i": [0], "j": [1], "z": [0.3]}, method="laplace")


# ---- scales ----------------------------------------------------------------------------------------


@model
def apart_by_sixteen_digits():
    a = latent("a", Normal(0.0, 1e8))
    b = latent("b", Normal(a, 1e-8))
    c = latent("c", Normal(b, 1e4))
    observe("y", Normal(a + c, 1e-6))
    observe("z", Normal(c - b, 1e-2))


def test_digits_that_the_factor_loses_come_back():
    data = {"y": 3.0, "z": 1e5}
    found = infer(apart_by_sixteen_digits, data, method="laplace")
    exact = infer(apart_by_sixteen_digits, data, method="exact")
    for name in "abc":
        gap = float((found.mean(name) - exact.mean(name)).abs() / exact.sd(name))
        assert gap < 1e-6
    assert found.diagnostics.notes["energy"] == pytest.approx(50.0, abs=1e-6)
    assert found.diagnostics.verdict.startswith("good")


@model
def stiff():
    with plate("t", ordered=True):
        x = latent("x", Markov(Normal(0.0, 1e8), lambda before: Normal(before, 1e-3)))
        observe("y", Normal(x, 1.0))


def test_digits_that_the_numbers_do_not_have_are_missed():
    y = 1e3 + np.random.default_rng(0).normal(size=20)
    with pytest.warns(UserWarning, match=r"means are off by up to .* or use float64"):
        found = infer(stiff, {"y": y}, method="laplace", dtype=torch.float32)
    assert found.diagnostics.verdict.startswith("check")
    assert infer(stiff, {"y": y}, method="laplace").diagnostics.verdict.startswith("good")


# ---- robust weights --------------------------------------------------------------------------------


def test_weights_print_as_a_line_and_survive_a_file(tmp_path):
    @model
    def location():
        centre = latent("centre", Normal(0.0, 10.0))
        with plate("row"):
            observe("y", Normal(centre, 1.0).robust("huber", 1.5))

    found = infer(location, {"y": [0.1, -0.2, 99.0]}, method="laplace")
    line = "robust weights: y: 1 of 3 below 0.1, the least 0.015 at row 2"
    assert line in str(found.diagnostics).splitlines()
    found.save(tmp_path / "fit.ppl")
    again = load(tmp_path / "fit.ppl", location)
    assert again.diagnostics.notes["robust weights"]["y"] is not None
