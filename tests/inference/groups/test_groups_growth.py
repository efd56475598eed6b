"""Graphs that grow: where old elements stand, and where new ones start."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from ppl import Markov, Normal, infer, latent, model, observe, plate
from ppl.errors import DataError
from ppl.inference.groups import Family, build
from ppl.inference.groups.growth import grown_points, lagging, newcomers, places


@pytest.mark.parametrize(
    ("old", "new"), [((), ()), ((2,), (5,)), ((2, 3), (4, 3)), ((1, 2, 2), (2, 2, 3))]
)
def test_old_elements_keep_their_positions(old, new):
    where = product(*map(range, new))
    inside = torch.tensor([all(a < n for a, n in zip(at, old, strict=True)) for at in where])
    assert torch.equal(places(old, new), inside.nonzero().squeeze(-1))
    assert torch.equal(newcomers(old, new), ~inside)


@pytest.mark.parametrize(("old", "new"), [((3,), (2,)), ((3,), (3, 1))])
def test_plates_only_grow(old, new):
    with pytest.raises(DataError, match="plates only grow"):
        places(old, new)


def test_a_lag_names_a_plate_and_leaves_something_open():
    families = {"x": Family("x", ("t",), (5,))}
    assert lagging(families, {"t": 9}) == {"t": 0}
    with pytest.raises(DataError, match="no latent lies in plate 'time'. Plates: t"):
        lagging(families, {"time": 1})
    for length in (0, -1):
        with pytest.raises(DataError, match=f"at least 1 element of 't', got {length}"):
            lagging(families, {"t": length})


@model
def doubling():
    with plate("t", ordered=True):
        x = latent("x", Markov(Normal(0.0, 1.0), lambda last: Normal(last.exp() - 1, 0.1)))
        observe("y", Normal(x, 0.5))


def test_new_elements_start_where_their_factors_place_them():
    old = build(doubling.bind({"y": torch.zeros(2)}))
    new = build(doubling.bind({"y": torch.zeros(3)}))
    before = {"x": torch.tensor([0.1, 0.2], dtype=old.like.dtype)}
    found = grown_points(old, before, new, {})["x"]
    assert torch.equal(found[:2], before["x"])
    row = {0.0: "the datum", float(torch.tensor(0.2).exp() - 1): "the step"}
    assert min(abs(float(found[2]) - value) for value in row) < 1e-6


@pytest.mark.parametrize("method", ["laplace", "gbp"])
def test_new_elements_stay_open_whatever_the_lag(method):
    """Those before the lag are smoothed with the data that came with them; none is without a spread."""

    @model
    def walk():
        with plate("t", ordered=True):
            x = latent("x", Markov(Normal(0.0, 1.0), lambda last: Normal(last, 0.3)))
            observe("y", Normal(x, 0.5))

    y = torch.linspace(0, 2, 10, dtype=torch.float64)
    posterior = infer(walk, {"y": y[:6]}, method=method).extend({"y": y[6:]}, lag={"t": 1})
    want = infer(walk, {"y": y}, method="exact")
    torch.testing.assert_close(posterior.mean("x")[6:], want.mean("x")[6:], rtol=0, atol=1e-9)
    torch.testing.assert_close(posterior.sd("x")[6:], want.sd("x")[6:], rtol=0, atol=1e-9)


def test_one_set_of_options_fits_both_methods():
    y = torch.zeros(6, dtype=torch.float64)
    y[3] = 9.0

    @model
    def robust_walk():
        with plate("t", ordered=True):
            x = latent("x", Markov(Normal(0.0, 1.0), lambda last: Normal(last, 0.3)))
            observe("y", Normal(x, 0.5).robust("tukey", 4.685))

    found = [
        infer(robust_walk, {"y": y}, method=m, tol=1e-9, graduated=10.0, graduated_steps=20)
        for m in ("laplace", "gbp")
    ]
    torch.testing.assert_close(found[0].mean("x"), found[1].mean("x"), rtol=0, atol=1e-6)
