"""More data behind the old: the extended binding equals that of all data, and the hook of a backend."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch

import ppl
from ppl import marginals as mg
from ppl.backend import Info
from ppl.continual import with_prior
from ppl.distributions import Flat, Markov, Normal
from ppl.errors import DataError, ModelError, UnsupportedError
from ppl.growth import grown
from ppl.model import model
from ppl.plates import plate
from ppl.posterior import Posterior
from ppl.sites import given, latent, observe

F64 = torch.float64


@model
def edges():
    pose, edge = plate("pose"), plate("edge")
    with pose:
        x = latent("x", Normal(0.0, 10.0))
    with edge:
        i, j = given("i", index=pose), given("j", index=pose)
        observe("z", Normal(x[j] - x[i], 0.1))


@model
def radon():
    county = plate("county")
    with county:
        level = latent("level", Normal(0.3 * given("uranium"), 1.0))
    with plate("house", within=county):
        observe("y", Normal(level, 1.0))


@model
def walk(sensors=1):
    with plate("time", ordered=True):
        x = latent("x", Markov(Normal(0.0, 1.0), lambda before: Normal(before, 1.0)))
        with plate("sensor"):
            observe("y", Normal(x, 1.0))


def same(left, right):
    assert {p: list(ls) for p, ls in left.labels.items()} == {
        p: list(ls) for p, ls in right.labels.items()
    }
    assert left.values.keys() == right.values.keys() and left.maps.keys() == right.maps.keys()
    for name, value in right.values.items():
        torch.testing.assert_close(left.values[name], value, equal_nan=True)
    for key, value in right.maps.items():
        assert left.maps[key].tolist() == value.tolist()


def test_positions_grow_with_what_points_at_them():
    first = {"i": [0, 1], "j": [1, 2], "z": [1.0, 1.0]}
    second = {"i": [2, 0], "j": [3, 3], "z": [1.0, 3.0]}
    whole = {k: first[k] + second[k] for k in first}
    bound = grown(edges, edges.bind(first), second)
    same(bound, edges.bind(whole))
    assert bound.labels["pose"] == range(4)
    # a pose that no edge points at yet, and one that the size alone tells of
    wide = grown(edges, edges.bind(first, sizes={"pose": 5}), second)
    assert wide.size("pose") == 5
    assert grown(edges, edges.bind(first), second, sizes={"pose": 6}).size("pose") == 6


def test_new_labels_stand_behind_old_ones():
    first = {"i": ["m", "b"], "j": ["b", "c"], "z": [1.0, 1.0]}
    second = {"i": ["c", "a"], "j": ["a", "aa"], "z": [1.0, 3.0]}
    bound = grown(edges, edges.bind(first), second)
    assert bound.labels["pose"] == ["b", "c", "m", "a", "aa"]
    assert bound.values["i"].tolist() == [2, 0, 1, 3]
    numbers = {"i": [55, 99], "j": [99, 70], "z": [0.0, 0.0]}
    more = {"i": [70], "j": [12], "z": [0.0]}
    assert grown(edges, edges.bind(numbers), more).labels["pose"] == [55, 70, 99, 12]


def test_rows_within_groups_and_their_covariates():
    first = {"y": [1.0, 2.0, 3.0], "county": ["b", "a", "b"], "uranium": [0.1, 0.2]}
    more = {"y": [4.0, 5.0], "county": ["b", "a"]}
    bound = grown(radon, radon.bind(first), more)
    assert bound.labels["county"] == ["a", "b"] and bound.size("house") == 5
    assert bound.maps["house", "county"].tolist() == [1, 0, 1, 1, 0]
    new = {"y": [4.0, 5.0], "county": ["0", "a"], "uranium": [0.7]}
    bound = grown(radon, radon.bind(first), new)
    assert bound.labels["county"] == ["a", "b", "0"]
    torch.testing.assert_close(bound.values["uranium"], torch.tensor([0.1, 0.2, 0.7], dtype=F64))
    with pytest.raises(DataError, match="plate 'county' has"):
        grown(radon, radon.bind(first), {"y": [4.0], "county": ["0"]})


def test_data_frames_grow_row_by_row():
    pandas = pytest.importorskip("pandas")
    table = {
        "y": [1.0, 2.0, 3.0, np.nan, 5.0],
        "county": ["b", "a", "b", "c", "a"],
        "uranium": [0.1, 0.2, 0.1, 0.3, 0.2],
        "note": list("vwxyz"),
    }
    whole = pandas.DataFrame(table)
    for kind in (str, "category"):
        frame = whole.astype({"county": kind})
        bound = grown(radon, radon.bind(frame[:4]), frame[4:])
        same(bound, radon.bind(whole))
        assert bound.report == ("1 of 5 entries of 'y' are missing and were marginalised",)
    with pytest.raises(DataError, match="'uranium': the new rows of the data frame lack"):
        grown(radon, radon.bind(whole[:3]), whole[3:].drop(columns="uranium"))
    mapping = {"y": [7.0], "county": ["a"], "uranium": [0.2]}
    assert grown(radon, radon.bind(whole), mapping).size("house") == 6


def test_two_data_frames_are_matched_by_their_columns():
    pandas = pytest.importorskip("pandas")
    houses = pandas.DataFrame({"y": [1.0, 2.0], "county": ["b", "a"]})
    counties = pandas.DataFrame({"county": ["a", "b"], "uranium": [0.1, 0.2]})
    more = pandas.DataFrame({"county": ["c"], "uranium": [0.4]})
    new = pandas.DataFrame({"y": [1.5], "county": ["c"]})
    bound = grown(radon, radon.bind([houses, counties]), [more, new])
    assert bound.labels["county"] == ["a", "b", "c"] and bound.size("house") == 3
    torch.testing.assert_close(bound.values["uranium"], torch.tensor([0.1, 0.2, 0.4], dtype=F64))


def test_a_grid_grows_along_the_axis_that_differs_or_is_ordered():
    y = torch.randn(6, 3, dtype=F64)
    for split in (2, 3):  # three rows of three: the ordered plate decides
        bound = grown(walk, walk.bind({"y": y[:split]}), {"y": y[split:]})
        same(bound, walk.bind({"y": y}))
    wide = grown(walk, walk.bind({"y": y[:3]}), {"y": y[3:]}, along="sensor")
    assert (wide.size("time"), wide.size("sensor")) == (3, 6)
    with pytest.raises(DataError, match="not clear along which plate"):
        grown(walk, walk.bind({"y": y}), {"y": y[:2, :2]})


def test_names_of_new_elements_are_asked_for():
    y = torch.zeros(2, 1)
    days = {"time": ["mon", "tue"]}
    old = walk.bind({"y": y}, labels=days)
    bound = grown(walk, old, {"y": y[:1]}, labels={"time": ["wed"]})
    assert bound.labels["time"] == ["mon", "tue", "wed"]
    with pytest.raises(DataError, match="Name the new ones: labels="):
        grown(walk, old, {"y": y[:1]})


def test_laws_taken_from_a_posterior_stay():
    first = {"i": [0], "j": [1], "z": [1.0]}
    before = Posterior(
        edges.bind(first),
        {"x": mg.Gaussian(torch.tensor([5.0, 6.0]), torch.tensor([0.5, 0.6]))},
        method="made",
        sampler=lambda n, streams: {},
    )
    bound = grown(edges, with_prior(edges.bind(first), before), {"i": [1], "j": [2], "z": [1.0]})
    torch.testing.assert_close(bound.values["x@loc"], torch.tensor([5.0, 6.0, 0.0], dtype=F64))
    torch.testing.assert_close(bound.values["x@scale"].float(), torch.tensor([0.5, 0.6, 10.0]))


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ({"w": [1.0]}, "none of the columns of the model"),
        ({"z": [1.0], "x": [0.0]}, "'x' is in the new data, but was not"),
        ({"z": [1.0]}, "plate 'edge' has two sizes"),
        ({"z": ["a"], "i": [0], "j": [1]}, "'z': expected numbers as before, got labels"),
    ],
)
def test_rows_that_do_not_fit_are_refused(new, message):
    old = edges.bind({"i": [0, 1], "j": [1, 2], "z": [1.0, 1.0]})
    with pytest.raises(DataError, match=message):
        grown(edges, old, new)


# ---- the hook -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    steps: int = 3


class State(NamedTuple):
    mean: torch.Tensor  # [pose]
    count: int


class Problem(NamedTuple):
    bound: object
    options: Options
    max_iters: int


def _backend(with_extend):
    """A backend that moves every pose one unit a step."""
    module = ModuleType("fake_backend")
    module.Options = Options
    module.supports = lambda graph: []
    module.prepare = lambda bound, options, settings: Problem(bound, options, options.steps)
    module.init = lambda problem: State(torch.zeros(problem.bound.size("pose")), 0)

    def step(problem, state, batch):
        count = state.count + 1
        return State(state.mean + 1, count), Info(
            {"count": float(count)}, done=count >= problem.max_iters
        )

    def posterior(problem, state):
        marginal = mg.Gaussian(state.mean.double(), torch.ones(len(state.mean), dtype=F64))
        return Posterior(problem.bound, {"x": marginal}, method="fake", sampler=lambda n, s: {})

    def extend(old_problem, old_state, new_problem, *, lag=None):
        fresh = torch.full(
            (new_problem.bound.size("pose"),), 100.0 if lag is None else float(lag["pose"])
        )
        fresh[: old_problem.bound.size("pose")] = old_state.mean
        return State(fresh, 0)

    module.step, module.posterior = step, posterior
    if with_extend:
        module.extend = extend
    return module


@pytest.fixture
def fake(monkeypatch):
    def register(with_extend=True):
        monkeypatch.setitem(sys.modules, "fake_backend", _backend(with_extend))
        monkeypatch.setitem(ppl.backend._REGISTRY, "fake", "fake_backend")

    return register


def test_a_run_goes_on_from_the_state_that_the_backend_extends(fake):
    fake()
    first = ppl.infer(edges, {"i": [0], "j": [1], "z": [1.0]}, method="fake", seed=0)
    more = first.extend({"i": [1], "j": [2], "z": [1.0]})
    assert more.mean("x").tolist() == [6.0, 6.0, 103.0]
    assert first.mean("x").tolist() == [3.0, 3.0]
    assert more.diagnostics.converged and len(more.trace["count"]) == 3
    assert more.bound.size("edge") == 2
    lagged = more.extend({"i": [2], "j": [3], "z": [0.0]}, lag={"pose": 7})
    assert lagged.mean("x").tolist() == [9.0, 9.0, 106.0, 10.0]
    with pytest.warns(UserWarning, match="not converged after 2"):
        first.extend({"i": [1], "j": [0], "z": [0.0]}, max_iters=2)
    with pytest.raises(ModelError, match="extend: fake has no option 'lagg'. Did you mean 'lag'"):
        first.extend({"i": [1], "j": [0], "z": [0.0]}, lagg=1)


def test_a_backend_that_cannot_extend_names_the_prior(fake, tmp_path):
    fake(with_extend=False)
    fitted = ppl.infer(edges, {"i": [0], "j": [1], "z": [1.0]}, method="fake", seed=0)
    with pytest.raises(UnsupportedError, match="fake cannot continue.*prior=posterior"):
        fitted.extend({"i": [1], "j": [2], "z": [1.0]})
    fitted._extend = None
    with pytest.raises(UnsupportedError, match="loaded from a file.*prior=posterior"):
        fitted.extend({"z": [1.0]})


def test_a_flat_latent_may_grow(fake):
    @model
    def free():
        with plate("pose"):
            x = latent("x", Flat())
            observe("y", Normal(x, 1.0))

    fake()
    fitted = ppl.infer(free, {"y": [0.0, 1.0]}, method="fake", seed=0)
    assert fitted.extend({"y": [2.0]}).mean("x").shape == (3,)


def test_a_plate_to_grow_along_that_the_model_lacks_is_refused():
    bound = walk.bind({"y": torch.zeros(3, 2)})
    with pytest.raises(DataError, match="along='tim' is no plate.*'time'.*Plates: time, sensor"):
        grown(walk, bound, {"y": torch.zeros(1, 2)}, along="tim")
