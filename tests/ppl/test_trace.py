"""Tracing: which values are visible where, over which plates results vary, what is recorded."""

from __future__ import annotations

import re

import pytest
import torch

from ppl import (
    Categorical,
    DataError,
    Dirichlet,
    Markov,
    ModelError,
    MultivariateNormal,
    Normal,
    deterministic,
    factor,
    given,
    latent,
    mean,
    model,
    observe,
    param,
    plate,
    scope,
)


def plates_of(graph, name):
    """Plates of a reported quantity."""
    return graph.nodes[graph.factors[name].value.id].plates


@model
def schools():
    county = plate("county")
    school = plate("school", within=county)
    pupil = plate("pupil", within=school)
    top = latent("top", Normal(0.0, 1.0))
    with county:
        a = latent("a", Normal(top, 1.0))
    with school:
        b = latent("b", Normal(a, 1.0))
        deterministic("b_only", b + 1)
        deterministic("a_in_school", a + 1)
    with pupil:
        deterministic("both", a + b)
        deterministic("grand", a * top)
        observe("y", Normal(a + b + top, 1.0))


def test_a_result_has_the_finest_plates_of_its_operands_and_no_more():
    graph = schools.graph()
    assert plates_of(graph, "b_only") == ("school",)
    assert plates_of(graph, "a_in_school") == ("county",)
    assert plates_of(graph, "both") == ("school",)
    assert plates_of(graph, "grand") == ("county",)
    assert graph.variables["y"].plates == ("pupil",)
    assert graph.factors["y"].scope == ("y", "top", "a", "b")


def test_a_grid_varies_over_both_plates():
    @model
    def m():
        row, column = plate("row", 2), plate("column", 3)
        with row:
            r = latent("r", Normal(0.0, 1.0))
        with column:
            c = latent("c", Normal(0.0, 1.0))
        with row, column:
            deterministic("sum", r + c)
            observe("y", Normal(r + c, 1.0))
        with column, row:
            observe("turned", Normal(r + c, 1.0))

    graph = m.graph()
    assert set(plates_of(graph, "sum")) == {"row", "column"}
    assert graph.variables["y"].plates == ("row", "column")
    assert graph.variables["turned"].plates == ("column", "row")


def test_a_crossed_design_gives_the_ratings_and_never_the_grid():
    @model
    def m():
        user, film = plate("user"), plate("film")
        rating = plate("rating", within=(user, film))
        with user:
            taste = latent("taste", Normal(0.0, 1.0), shape=3)
        with film:
            kind = latent("kind", Normal(0.0, 1.0), shape=3)
        with rating:
            deterministic("score", (taste * kind).sum(-1))
            observe("stars", Normal(taste @ kind, 1.0))

    graph = m.graph()
    assert plates_of(graph, "score") == ("rating",)
    assert all("user" not in n.plates or "film" not in n.plates for n in graph.nodes)


def hidden_sibling():
    with plate("a", 2):
        x = latent("x", Normal(0.0, 1.0))
    with plate("b", 2):
        latent("y", Normal(x, 1.0))


def hidden_child():
    county = plate("county", 2)
    with plate("house", 3, within=county):
        x = latent("x", Normal(0.0, 1.0))
    with county:
        latent("y", Normal(x, 1.0))


def hidden_in_a_call():
    with plate("a", 2):
        x = latent("x", Normal(0.0, 1.0))
    torch.exp(x)


def hidden_result():
    with plate("a", 2):
        x = latent("x", Normal(0.0, 1.0)) + 1
    deterministic("z", x)


def hidden_factor():
    with plate("a", 2):
        x = latent("x", Normal(0.0, 1.0))
    factor("f", x)


def hidden_index_of_event():
    with plate("a", 2):
        x = latent("x", Normal(0.0, 1.0), shape=2)
    latent("y", Normal(x[0], 1.0))


def reduced_over_another():
    with plate("a", 2), plate("b", 3) as b:
        x = latent("x", Normal(0.0, 1.0))
    latent("y", Normal(mean(x, over=b), 1.0))


HIDDEN = [
    hidden_sibling,
    hidden_child,
    hidden_in_a_call,
    hidden_result,
    hidden_factor,
    hidden_index_of_event,
    reduced_over_another,
]


@pytest.mark.parametrize("function", HIDDEN, ids=lambda f: f.__name__)
def test_a_value_is_visible_only_where_its_plates_are_open(function):
    with pytest.raises(ModelError) as caught:
        model(function).graph()
    assert re.search(
        r"test_trace\.py:\d+: .*varies over plate '\w+', which is not open", str(caught.value)
    )
    assert str(caught.traceback[-1].path) == __file__


def test_opening_a_plate_again_sees_the_same_elements():
    @model
    def m():
        group = plate("group", 4)
        with group:
            x = latent("x", Normal(0.0, 1.0))
        with group:
            y = latent("y", Normal(x, 0.001))
        with plate("group"), group:
            latent("z", Normal(x + y, 0.001))

    graph = m.graph()
    assert all(graph.variables[n].plates == ("group",) for n in "xyz")
    draws = m.sample(2, seed=0)
    torch.testing.assert_close(draws["z"], 2 * draws["x"], atol=0.02, rtol=0)


def test_an_error_inside_a_plate_closes_it():
    @model
    def m():
        group = plate("group", 2)
        try:
            with group:
                raise KeyError("x")
        except KeyError:
            pass
        latent("x", Normal(0.0, 1.0))

    assert m.graph().variables["x"].plates == ()


# ---- names -------------------------------------------------------------------------------------


def test_scopes_prefix_sites_and_data_and_share_plates():
    @model
    def pair():
        with plate("row"):
            x = given("x")
            for side in ("left", "right"):
                with scope(side):
                    observe("y", Normal(latent("gain", Normal(0.0, 1.0)) * given("x") + x, 1.0))

    graph = pair.graph(
        {"x": [0.0, 1.0], "left.x": [1.0, 2.0], "right.x": [3.0, 4.0], "left.y": [0.0, 1.0]}
    )
    assert list(graph.plates) == ["row"] and graph.plates["row"].size == 2
    assert graph.factors["left.y"].scope == ("left.y", "x", "left.gain", "left.x")
    assert graph.variables["right.y"].role == "observed"


def test_a_model_inside_a_model_runs_there_and_gives_its_result():
    @model
    def trend(scale=1.0):
        return latent("slope", Normal(0.0, scale)) * given("t")

    @model
    def whole():
        with plate("row"):
            with scope("trend"):
                first = trend(scale=2.0)
            second = trend()
            observe("y", Normal(first + second, 1.0))

    graph = whole.graph({"y": [1.0, 2.0], "trend.t": [0.0, 1.0], "t": [0.0, 1.0]})
    assert set(graph.variables) == {"trend.slope", "slope", "trend.t", "t", "y"}
    assert graph.variables["slope"].plates == ("row",)
    assert graph.factors["y"].scope == ("y", "trend.slope", "trend.t", "slope", "t")


@pytest.mark.parametrize("word", ["latent", "factor", "deterministic", "given"])
def test_a_name_is_taken_once(word):
    @model
    def m():
        x = latent("x", Normal(0.0, 1.0))
        if word == "latent":
            observe("x", Normal(0.0, 1.0))
        elif word == "factor":
            factor("x", x)
        elif word == "deterministic":
            deterministic("x", x)
        else:
            deterministic("x.", x)
            latent("x.", Normal(0.0, 1.0))

    with pytest.raises(ModelError, match=r"test_trace\.py:\d+: two sites are called 'x"):
        m.graph()


@pytest.mark.parametrize("name", ["", 3, None])
def test_a_site_needs_a_name(name):
    @model
    def m():
        latent(name, Normal(0.0, 1.0))

    with pytest.raises(ModelError, match="non-empty string"):
        m.graph()


def test_words_outside_a_model_say_so():
    for word, use in (
        ("latent", lambda: latent("x", Normal(0.0, 1.0))),
        ("plate", lambda: plate("p")),
        ("given", lambda: given("x")),
        ("param", lambda: param("x", 0.0)),
    ):
        with pytest.raises(ModelError, match=f"'{word}' is a word of a model"):
            use()


# ---- event shapes ------------------------------------------------------------------------------

SHAPES = [
    ("scalar", lambda: Normal(0.0, 1.0), (), ()),
    ("shape", lambda: Normal(0.0, 1.0), 3, (3,)),
    ("matrix", lambda: Normal(0.0, 1.0), (3, 2), (3, 2)),
    ("vector-parameter", lambda: Normal(torch.zeros(3), 1.0), (), (3,)),
    ("broadcast", lambda: Normal(torch.zeros(3), 1.0), (2, 3), (2, 3)),
    ("stretched", lambda: Normal(torch.zeros(2, 1), 1.0), (2, 3), (2, 3)),
    ("two-parameters", lambda: Normal(torch.zeros(3, 1), torch.ones(2)), (), (3, 2)),
    ("simplex", lambda: Dirichlet(torch.ones(4)), (), (4,)),
    ("simplexes", lambda: Dirichlet(torch.ones(4)), 2, (2, 4)),
    ("mvn", lambda: MultivariateNormal(torch.zeros(2), torch.eye(2)), (), (2,)),
    ("category", lambda: Categorical(torch.ones(5) / 5), (), ()),
]  # fmt: skip


@pytest.mark.parametrize(("name", "law", "shape", "event"), SHAPES, ids=[s[0] for s in SHAPES])
def test_shape_is_broadcast_with_the_parameters(name, law, shape, event):
    @model
    def m():
        with plate("p", 2):
            latent("x", law(), shape=shape)

    variable = m.graph().variables["x"]
    assert variable.event_shape == event and variable.plates == ("p",)
    assert m.sample(3, seed=0)["x"].shape == (3, 2, *event)


def test_shape_never_shrinks_a_law():
    @model
    def m():
        latent("x", Normal(torch.zeros(3), 1.0), shape=2)

    with pytest.raises(ModelError, match=r"shape=\(2,\) does not fit .* shape \(3,\)"):
        m.graph()


def test_a_vector_latent_under_a_scalar_spread_is_one_vector_per_user():
    # The pitfall of ratings models: psi [18] a user with scalar hyperparameters of shape [18].
    @model
    def m():
        mu = latent("mu", Normal(0.0, 1.0), shape=18)
        user = plate("user", 4)
        with user:
            z = latent("z", Normal(mu, 1.0))
        with plate("rating", within=user):
            observe("y", Normal((z * given("x")).sum(-1), 1.0))

    data = {"y": torch.zeros(6), "x": torch.zeros(6, 18), "user": [0, 1, 2, 3, 0, 1]}
    graph = m.graph(data)
    assert graph.variables["z"].event_shape == (18,)
    assert graph.variables["x"].event_shape == (18,)
    assert graph.variables["y"].event_shape == ()


def test_an_array_with_an_extra_axis_meets_the_shape_of_its_law():
    @model
    def m():
        with plate("row"):
            observe("y", Normal(0.0, 1.0))

    with pytest.raises(
        DataError, match=r"'y' \(observed, plate row\): expected shape \[3\], got \[3, 2\]"
    ):
        m.bind({"y": torch.zeros(3, 2)})


# ---- interventions, conditions, chains ---------------------------------------------------------


@model
def cause():
    rain = latent("rain", Normal(0.0, 1.0))
    with plate("lawn", 3):
        wet = latent("wet", Normal(rain, 1.0))
        latent("grass", Normal(wet, 0.01))


def test_do_cuts_the_law_and_keeps_what_depends_on_it():
    graph = cause.do(wet=[1.0, 2.0, 3.0]).graph()
    assert sorted(graph.factors) == ["grass", "rain"]
    assert graph.variables["wet"].role == "given"
    draws = cause.do(wet=[1.0, 2.0, 3.0]).sample(50, seed=0)
    torch.testing.assert_close(
        draws["grass"].mean(0), torch.tensor([1.0, 2.0, 3.0]).double(), atol=0.02, rtol=0
    )
    assert "wet" not in draws


def test_condition_keeps_the_law_and_observes():
    graph = cause.condition(wet=[1.0, 2.0, 3.0]).graph()
    assert sorted(graph.factors) == ["grass", "rain", "wet"]
    assert graph.variables["wet"].role == "observed"
    assert cause.graph().variables["wet"].role == "latent"


@pytest.mark.parametrize("word", ["do", "condition"])
def test_do_and_condition_name_the_nearest_site(word):
    with pytest.raises(DataError, match=rf"{word}\(rian=...\).*Did you mean 'rain'"):
        getattr(cause, word)(rian=1.0).graph()


def test_the_parents_of_a_chain_are_those_of_both_laws():
    @model
    def m():
        start, pull = latent("start", Normal(0.0, 1.0)), latent("pull", Normal(0.0, 0.1))
        with plate("runner", 2):
            own = latent("own", Normal(0.0, 1.0))
            with plate("day", 5, ordered=True):
                x = latent("x", Markov(Normal(start, 1.0), lambda x: Normal(pull * x + own, 1.0)))
                observe("y", Normal(x, 1.0))

    graph = m.graph()
    assert graph.factors["x"].scope == ("x", "start", "pull", "own")
    assert graph.factors["x"].chain[0] == "day"
    assert graph.variables["x"].plates == ("runner", "day")
    assert "lag" in graph.access("x", "x")


def test_the_start_of_a_chain_sees_the_first_element_of_time():
    @model
    def m():
        with plate("day", 5, ordered=True):
            drift = latent("drift", Normal(0.0, 1.0))
            latent("x", Markov(Normal(drift, 1.0), lambda x: Normal(x + drift, 1.0)))

    graph = m.graph()
    assert graph.parents("x") == ("drift",)
    assert any(n.op == "pick" and n.name == "day" for n in graph.nodes)


def test_reading_a_covariate_twice_gives_one_node():
    @model
    def m():
        with plate("row"):
            a, b = given("x"), given("x")
            observe("y", Normal(a + b, 1.0))

    graph = m.graph({"x": [1.0, 2.0], "y": [0.0, 0.0]})
    assert sum(n.op == "variable" and n.name == "x" for n in graph.nodes) == 1


def test_reading_a_covariate_in_other_plates_is_refused():
    @model
    def m():
        with plate("row"):
            given("x")
        given("x")

    with pytest.raises(ModelError, match=r"given\('x'\) was first read at test_trace\.py:\d+"):
        m.graph({"x": [1.0, 2.0]})


def test_a_param_starts_inside_its_support():
    @model
    def m():
        param("scale", -1.0, support=torch.distributions.constraints.positive)

    with pytest.raises(ModelError, match="'scale' starts at -1.0, outside its support"):
        m.graph()


def test_an_index_declared_for_a_plate_picks_along_it():
    @model
    def m():
        pose, edge = plate("pose", 3), plate("edge")
        with pose:
            x = latent("x", Normal(0.0, 1.0), shape=2)
        with edge:
            i, j = given("i", index=pose), given("j", index="pose")
            deterministic("step", x[j] - x[i])
            deterministic("first", x[i][0])
            deterministic("same", x[i, 0])
            observe("y", Normal(x[j] - x[i], 1.0))

    data = {"i": [0, 1], "j": [1, 2], "y": torch.zeros(2, 2)}
    graph = m.graph(data)
    assert plates_of(graph, "step") == ("edge",)
    assert graph.access("y", "x") == {"gather"}
    draws = m.sample(2, {"i": [0, 1], "j": [1, 2]}, seed=0)
    x = draws["x"]
    torch.testing.assert_close(draws["step"], x[:, [1, 2]] - x[:, [0, 1]])
    torch.testing.assert_close(draws["same"], x[:, [0, 1], 0])
    torch.testing.assert_close(draws["first"], draws["same"])
