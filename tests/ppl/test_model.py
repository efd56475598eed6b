"""Models: structure, conditions, interventions, scopes, and when a model is traced."""

from __future__ import annotations

import pytest
import torch

from ppl import (
    Categorical,
    DataError,
    ModelError,
    Normal,
    deterministic,
    given,
    latent,
    model,
    observe,
    plate,
    scope,
)


@model
def polynomial(degree: int = 1):
    """A curve of a given degree."""
    weights = latent("weights", Normal(0.0, 1.0), shape=degree + 1)
    with plate("point"):
        powers = torch.stack([given("x") ** k for k in range(degree + 1)])
        observe("y", Normal((weights * powers).sum(-1), 0.1))


DATA = {"x": [0.0, 1.0, 2.0], "y": [1.0, 2.0, 3.0]}


def test_parameters_are_structure():
    cubic = polynomial(degree=3)
    assert cubic.graph(DATA).variables["weights"].event_shape == (4,)
    assert polynomial(2)().graph(DATA).variables["weights"].event_shape == (3,)
    assert repr(cubic) == "model polynomial(degree=3)"
    assert (cubic.name, polynomial.__doc__) == ("polynomial", "A curve of a given degree.")


def test_an_unknown_parameter_and_an_array_are_refused():
    with pytest.raises(
        ModelError, match=r"test_model\.py:\d+: polynomial.*arrays come in by given"
    ):
        polynomial(power=2)
    with pytest.raises(ModelError, match=r"degree=\.\.\..*is an array.*given\('degree'\)"):
        polynomial(degree=torch.ones(3))


def test_a_graph_without_data_has_structure_only():
    graph = polynomial.graph()
    assert graph.plates["point"].size is None
    assert polynomial.graph(DATA).plates["point"].size == 3
    assert polynomial.graph(sizes={"point": 7}).plates["point"].size == 7
    assert graph.fingerprint() == polynomial.graph().fingerprint()
    assert graph.fingerprint() != polynomial(degree=2).graph().fingerprint()


def test_a_site_is_observed_if_and_only_if_the_data_has_its_name():
    assert polynomial.graph(DATA).variables["weights"].role == "latent"
    assert polynomial.graph({**DATA, "weights": [1.0, 2.0]}).variables["weights"].role == "observed"


def test_condition_observes_and_does_not_touch_the_model():
    fixed = polynomial.condition(weights=[1.0, 2.0])
    assert fixed.graph(DATA).variables["weights"].role == "observed"
    assert polynomial.graph(DATA).variables["weights"].role == "latent"
    bound = fixed.condition(y=[0.0, 0.0, 0.0]).bind(DATA)
    assert bound.values["y"].tolist() == [0.0, 0.0, 0.0]
    assert bound.values["weights"].tolist() == [1.0, 2.0]


def test_do_cuts_the_law_and_keeps_what_depends_on_it():
    graph = polynomial.do(weights=[1.0, 2.0]).graph(DATA)
    assert graph.variables["weights"].role == "given"
    assert list(graph.factors) == ["y"]
    draws = polynomial.do(weights=[1.0, 2.0]).sample(200, {"x": DATA["x"]}, seed=0)
    expected = torch.tensor([1.0, 3.0, 5.0]).double()
    torch.testing.assert_close(draws["y"].mean(0), expected, atol=0.05, rtol=0)


def test_do_on_an_index_still_picks():
    @model
    def mixture():
        component = plate("component", 2)
        with component:
            centre = latent("centre", Normal(0.0, 1.0))
        with plate("point"):
            z = latent("z", Categorical(torch.ones(2), over=component))
            observe("y", Normal(centre[z], 1e-6))

    draws = mixture.do(z=[1, 0, 1]).sample(3, seed=0)
    torch.testing.assert_close(draws["y"], draws["centre"][:, [1, 0, 1]], atol=1e-4, rtol=0)


@pytest.mark.parametrize("word", ["condition", "do"])
def test_an_unknown_site_is_refused(word):
    changed = getattr(polynomial, word)(wieghts=[1.0, 2.0])
    with pytest.raises(DataError, match=rf"{word}\(wieghts=.*Did you mean 'weights'"):
        changed.graph(DATA)


# ---- models inside models ------------------------------------------------------------------------


@model
def level(spread: float = 1.0):
    point = plate("point", 3)
    mu = latent("mu", Normal(0.0, spread))
    with point:
        x = latent("x", Normal(mu, 1.0))
    return x


@model
def pair():
    with scope("left"):
        left = level()
    with scope("right"):
        right = level(spread=2.0)
    with plate("point"):
        deterministic("gap", left - right)


def test_scopes_prefix_names_and_share_plates():
    graph = pair.graph()
    assert list(graph.variables) == ["left.mu", "left.x", "right.mu", "right.x"]
    assert list(graph.plates) == ["point"]
    assert graph.parents("right.x") == ("right.mu",)
    assert graph.factors["gap"].plates == ("point",)
    draws = pair.sample(2, seed=0)
    torch.testing.assert_close(draws["gap"], draws["left.x"] - draws["right.x"])


def test_scopes_nest_and_prefix_data_names():
    @model
    def inner():
        observe("y", Normal(given("shift"), 1.0))

    @model
    def outer():
        with scope("a"), scope("b"):
            inner()

    graph = outer.graph({"a.b.y": 1.0, "a.b.shift": 2.0})
    assert graph.variables["a.b.y"].role == "observed"
    with pytest.raises(DataError, match=r"given\('a.b.shift'\)"):
        outer.graph({"a.b.y": 1.0})


def test_the_same_model_twice_without_a_scope_is_refused():
    @model
    def twice():
        level()
        level()

    with pytest.raises(ModelError, match=r"test_model\.py:\d+: two sites are called 'mu'.*scope"):
        twice.graph()


def test_tracing_leaves_generators_and_settings_alone(rng_untouched):
    polynomial.graph(DATA)
    pair.sample(2, seed=3)


def test_constants_follow_the_run_and_not_torch():
    @model
    def m():
        x = latent("x", Normal(0.0, 1.0), shape=3)
        deterministic("y", torch.eye(3) @ x + torch.tensor(0.1) + x.float())

    assert m.sample(2, seed=0)["y"].dtype == torch.float64
    bound = m.bind(dtype=torch.float32, need_observed=False)
    assert bound.dtype == torch.float32
