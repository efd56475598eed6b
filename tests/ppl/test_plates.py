"""Plates: declaration, reductions, shifts, and the operations along them against torch."""

from __future__ import annotations

import pytest
import torch

import ppl
from ppl import (
    ModelError,
    Normal,
    deterministic,
    dot,
    given,
    latent,
    logsumexp,
    mean,
    model,
    observe,
    pick,
    plate,
    shift,
)
from ppl.plates import collect


def declared(*makes):
    @model
    def m():
        for make in makes:
            make()
        latent("x", Normal(0.0, 1.0))

    return m


DECLARED = [
    ("size", lambda: plate("p", 0), "positive whole size, got 0"),
    ("negative", lambda: plate("p", -2), "positive whole size, got -2"),
    ("fraction", lambda: plate("p", 2.0), "positive whole size, got 2.0"),
    ("boolean", lambda: plate("p", True), "positive whole size, got True"),
    ("parent-name", lambda: plate("p", within="county"), r"within= needs plates, got str"),
    ("by-alone", lambda: plate("p", by="county"), "by= names 1 columns for 0 parents"),
    ("by-short", lambda: plate("p", within=(plate("a"), plate("b")), by="c"), "1 columns for 2"),
    ("size-read", lambda: plate("p").size, "takes its size from the data"),
    ("len", lambda: len(plate("p")), "takes its size from the data"),
    ("loop", lambda: list(plate("p", 3)), "opened, not iterated over"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "text"), DECLARED, ids=[d[0] for d in DECLARED])
def test_a_wrong_declaration_is_an_error_at_its_line(name, make, text):
    with pytest.raises(ModelError, match=rf"test_plates\.py:\d+: .*{text}"):
        declared(make).graph()


TWICE = [
    ("size", lambda: plate("p", 3), lambda: plate("p", 4), True),
    ("size-later", lambda: plate("p"), lambda: plate("p", 4), True),
    ("parent", lambda: plate("p", 3), lambda: plate("p", within=plate("q")), True),
    ("other-parent", lambda: plate("p", within=plate("q")), lambda: plate("p", within=plate("r")), True),
    ("column", lambda: plate("p", within=plate("q")), lambda: plate("p", within=plate("q"), by="k"), True),
    ("order", lambda: plate("p", 3), lambda: plate("p", 3, ordered=True), True),
    ("same", lambda: plate("p", 3), lambda: plate("p", 3), False),
    ("by-name", lambda: plate("p", 3, ordered=True), lambda: plate("p"), False),
    ("same-parent", lambda: plate("p", within=plate("q")), lambda: plate("p", within=plate("q")), False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "first", "second", "differs"), TWICE, ids=[t[0] for t in TWICE])
def test_a_name_stands_for_one_plate(name, first, second, differs):
    if not differs:
        assert "p" in declared(first, second).graph().plates
        return
    with pytest.raises(ModelError, match=r"plate 'p' is declared twice"):
        declared(first, second).graph()


def test_size_is_known_when_it_is_declared():
    sizes = []

    @model
    def m(k=3):
        group = plate("group", k)
        sizes.extend([group.size, len(group)])
        assert repr(group) == "plate('group')"

    m(k=5).graph()
    assert sizes == [5, 5]


def test_no_plate_of_that_name():
    @model
    def m():
        with plate("group", 2):
            x = latent("x", Normal(0.0, 1.0))
        mean(x, over="grp")

    with pytest.raises(ModelError, match="no plate 'grp'. Declared: group"):
        m.graph()


REDUCTIONS = [
    ("sum", ppl.sum, lambda t, d: t.sum(d)),
    ("mean", mean, lambda t, d: t.mean(d)),
    ("logsumexp", logsumexp, torch.logsumexp),
]


@pytest.mark.parametrize(("name", "ours", "torchs"), REDUCTIONS, ids=[r[0] for r in REDUCTIONS])
def test_reductions_equal_torch(name, ours, torchs):
    @model
    def m():
        row, column = plate("row", 2), plate("column", 3)
        with row, column:
            x = latent("x", Normal(0.0, 1.0), shape=2)
        with row:
            deterministic("rows", ours(x, over=column))
        with column:
            deterministic("columns", ours(x, over="row"))
        both = x
        with row:
            both = ours(both, over=column)
        deterministic("all", ours(both, over=row))

    draws = m.sample(4, seed=0)
    x = draws["x"]
    torch.testing.assert_close(draws["rows"], torchs(x, 2))
    torch.testing.assert_close(draws["columns"], torchs(x, 1))
    torch.testing.assert_close(draws["all"], torchs(torchs(x, 2), 1))


@pytest.mark.parametrize(("name", "ours", "torchs"), REDUCTIONS, ids=[r[0] for r in REDUCTIONS])
def test_a_reduction_inside_a_parent_is_that_of_each_group(name, ours, torchs):
    @model
    def m():
        county = plate("county")
        house = plate("house", within=county)
        with house:
            x = latent("x", Normal(0.0, 1.0))
        with county:
            deterministic("each", ours(x, over=house))
        deterministic("whole", ours(x, over=house))

    members = ["b", "a", "b", "a", "b"]
    draws = m.sample(3, {"county": members}, seed=0)
    x = draws["x"]
    expected = torch.stack([torchs(x[:, [1, 3]], 1), torchs(x[:, [0, 2, 4]], 1)], 1)
    torch.testing.assert_close(draws["each"], expected)
    torch.testing.assert_close(draws["whole"], torchs(x, 1))


def test_dot_is_the_inner_product_over_a_plate():
    @model
    def m():
        column = plate("column", 3)
        with column:
            x = latent("x", Normal(0.0, 1.0))
        with plate("row"):
            with column:
                a = given("A")
            deterministic("y", dot(a, x, over=column))

    matrix = torch.randn(4, 3, dtype=torch.float64)
    draws = m.sample(2, {"A": matrix}, seed=0)
    torch.testing.assert_close(draws["y"], draws["x"] @ matrix.T)


def test_pick_takes_one_element():
    @model
    def m():
        with plate("pose", 4):
            x = latent("x", Normal(0.0, 1.0), shape=2)
        deterministic("first", pick(x, pose=0))
        deterministic("last", pick(x, pose=-1))

    draws = m.sample(2, seed=0)
    torch.testing.assert_close(draws["first"], draws["x"][:, 0])
    torch.testing.assert_close(draws["last"], draws["x"][:, -1])


def test_collect_makes_event_axes_of_plates():
    @model
    def m():
        out, inner = plate("out", 2), plate("in", 3)
        with out, inner:
            w = latent("w", Normal(0.0, 1.0))
        deterministic("matrix", collect(w, over=(out, inner)))
        deterministic("turned", collect(w, over=(inner, out)))

    draws = m.sample(2, seed=0)
    torch.testing.assert_close(draws["matrix"], draws["w"])
    torch.testing.assert_close(draws["turned"], draws["w"].mT)


def test_shift_needs_an_ordered_plate_and_a_value_on_it():
    def unordered():
        with plate("p", 3) as p:
            shift(latent("y", Normal(0.0, 1.0)), p)

    def elsewhere():
        shift(latent("y", Normal(0.0, 1.0)), plate("p", 3, ordered=True))

    with pytest.raises(ModelError, match="ordered=True"):
        model(unordered).graph()
    with pytest.raises(ModelError, match="varies over that plate"):
        model(elsewhere).graph()


def test_a_reduction_needs_its_plate():
    @model
    def m():
        group = plate("group", 2)
        mean(latent("x", Normal(0.0, 1.0)), over=group)

    with pytest.raises(
        ModelError, match="mean over plate 'group' needs a value that varies over it"
    ):
        m.graph()


def test_plates_of_a_grid_inside_a_tree():
    @model
    def m():
        county = plate("county")
        house, year = plate("house", within=county), plate("year", 2)
        with county, year:
            level = latent("level", Normal(0.0, 1.0))
        with house, year:
            deterministic("seen", level + 0)
            observe("y", Normal(level, 0.001))

    draws = m.sample(3, {"county": [1, 0, 1]}, seed=0)
    assert draws["level"].shape == (3, 2, 2)
    assert draws["y"].shape == (3, 3, 2)
    torch.testing.assert_close(draws["y"], draws["level"][:, [1, 0, 1]], atol=0.01, rtol=0)
