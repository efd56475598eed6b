"""Signs that a model does not know are found, and none is found where something tells them."""

from __future__ import annotations

from ppl import HalfNormal, Normal, given, latent, model, observe, plate
from ppl.models import bus_breakdown, eight_schools, occupancy, radon_states
from ppl.reflections import reflections

SCHOOLS = {"y": [3.0, 1.0, 2.0], "sigma": [1.0, 1.0, 1.0]}


def found(program, data, **sizes):
    """Latents of each reflection, from two draws of the prior."""
    bound = program.bind(data, sizes=sizes or None)
    drawn = program.sample(2, data, sizes=sizes or None, seed=3)
    latents = [v.name for v in bound.graph.latents]
    points = [{n: drawn[n][i].to(bound.dtype) for n in latents} for i in range(2)]
    return [set(r.sites) for r in reflections(bound, points)]


@model
def factors(known=0.0):
    """Answers of people by what they have of two things, and how much these count."""
    spread = latent("spread", HalfNormal(1.0))
    loading = latent("loading", Normal(known, spread), shape=2)
    with plate("person"):
        score = latent("score", Normal(0.0, 1.0), shape=2)
        with plate("answer"):
            observe("y", Normal((loading * score).sum(-1), 0.5))


ANSWERS = {"y": [[0.3, -1.0], [0.2, 0.7]]}
HOUSES = {"obs": [[0.3, -1.0]], "basement": [[1.0, 0.0]], "log_uranium": [[0.3, 0.1]]}
REPORTS = {"obs": [[[1.0, 1.0]]], "company": [[[[1.0, 0.0]] * 2]], "run_type": [[[[1.0]] * 2]]}


def survey():
    visits = {"weather": [[[0.5, 1.0, 2.0]]] * 2, "quality": [[[1.0, 1.0, 0.0]]] * 2}
    drawn = occupancy.sample(1, visits, sizes={"replicate": 2}, seed=0)
    return {**visits, "obs": drawn["obs"][0]}


def test_the_signs_of_products():
    assert found(factors, ANSWERS) == [{"loading", "score"}]
    assert found(factors(known=1.0), ANSWERS) == []


def test_a_hierarchy_changes_its_signs_as_a_whole():
    sites = {"bird_mean_mean", "beta_mean", "bird_mean", "beta", "bird_year_mean"}
    assert found(occupancy, survey()) == [sites]


@model
def square():
    x = latent("x", Normal(0.0, 1.0))
    other = latent("other", Normal(0.0, 1.0))
    observe("y", Normal(x * x + other, 0.3))


@model
def two_products():
    a, b, c, d = (latent(n, Normal(0.0, 1.0)) for n in "abcd")
    observe("y", Normal(a * b, 0.3))
    observe("w", Normal(c * d, 0.3))


def test_sets_are_small_and_each_is_found():
    assert found(square, {"y": 1.0}) == [{"x"}]
    assert found(two_products, {"y": 1.0, "w": -1.0}) == [{"a", "b"}, {"c", "d"}]


@model
def regression():
    slope = latent("slope", Normal(0.0, 1.0))
    with plate("row"):
        observe("y", Normal(slope * given("x"), 1.0))


@model
def silent():
    middle = latent("middle", Normal(0.0, 1.0))
    with plate("row"):
        latent("effect", Normal(middle, 1.0))


def test_none_where_the_data_tell_or_say_nothing():
    assert found(regression, {"x": [1.0, 2.0], "y": [0.5, 0.0]}) == []
    assert found(eight_schools, SCHOOLS) == []
    assert found(silent, {}, row=3) == []
    assert found(radon_states, HOUSES) == []
    assert found(bus_breakdown(companies=2, run_types=1), REPORTS) == []
