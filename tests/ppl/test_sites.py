"""What may stand where: looking up, reducing and shifting along plates, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch

from ppl import (
    DataError,
    Dirichlet,
    Markov,
    ModelError,
    MultivariateNormal,
    Normal,
    deterministic,
    dot,
    factor,
    given,
    latent,
    logsumexp,
    mean,
    model,
    observe,
    pick,
    plate,
    shift,
    sum,
)

HOUSES = {
    "zip": [0, 0, 1, 2, 2],
    "county": [1, 1, 0, 1, 1],
    "z": [1.0, 2.0, 3.0, 4.0, 6.0],
    "y": [0.0] * 5,
}
TREE = {"county": [0], "zip": [0, 1], "house": [0, 1, 2]}


def levels():
    county = plate("county")
    zipcode = plate("zip", within=county)
    return county, zipcode, plate("house", within=zipcode)


@pytest.mark.parametrize(
    ("reduce", "expected"), [(sum, [3.0, 13.0]), (mean, [3.0, 3.25]), (logsumexp, None)]
)
def test_a_reduction_inside_a_further_ancestor_is_that_of_its_group(reduce, expected):
    @model
    def m():
        county, _, house = levels()
        with house:
            z = given("z")
        with county:
            deterministic("group", reduce(z, over=house))

    out = m.sample(1, HOUSES, seed=0)["group"]
    if expected is None:
        z = torch.tensor(HOUSES["z"]).double()
        expected = [float(z[2]), float(z[[0, 1, 3, 4]].logsumexp(0))]
    torch.testing.assert_close(out, torch.tensor([expected]).double())


def test_a_reduction_with_only_its_own_plate_open_is_of_all_of_it():
    @model
    def m():
        _, _, house = levels()
        with house:
            z = given("z")
            deterministic("away", z - mean(z, over=house))

    expected = torch.tensor(HOUSES["z"]).double() - 3.2
    torch.testing.assert_close(m.sample(1, HOUSES, seed=0)["away"][0], expected)


def test_a_free_factor_counts_once_for_every_element_of_its_plate():
    @model
    def m():
        county, zipcode, _ = levels()
        with county:
            level = latent("level", Normal(0.0, 1.0))
        with zipcode:
            factor("pull", Normal(level, 1.0), at=0.0)
            factor("energy", -level.square())

    from ppl.lower import Compiler

    graph = m.graph(HOUSES)
    compiler = Compiler(graph, {"level": ("county",)}, tuple(graph.plates))
    for name in ("pull", "energy"):
        assert compiler.density(graph.factors[name]).axes == ("zip",)


def test_an_index_may_be_a_vector():
    @model
    def m():
        with plate("pose", 4) as pose:
            x = latent("x", Normal(0.0, 1.0), shape=2)
        with plate("edge"):
            ends = given("ends", index=pose)
            deterministic("both", x[ends])
            deterministic("step", x[ends][1] - x[ends][0])

    ends = torch.tensor([[0, 1], [3, 2], [1, 1]])
    draws = m.sample(5, {"ends": ends}, seed=0)
    torch.testing.assert_close(draws["both"], draws["x"][:, ends])
    torch.testing.assert_close(draws["step"], draws["x"][:, ends[:, 1]] - draws["x"][:, ends[:, 0]])


def test_an_index_is_no_membership():
    """As many edges as poses, and poses that repeat: a covariate of the poses stays one of the poses."""

    @model
    def m():
        with plate("pose") as pose:
            x = latent("x", Normal(given("guess"), 1.0))
        with plate("edge"):
            i, j = given("i", index=pose), given("j", index=pose)
            observe("gap", Normal(x[i] - x[j], given("sd")))

    data = {
        "guess": [5.0, 6.0, 7.0],
        "i": [0, 0, 1],
        "j": [1, 2, 2],
        "gap": [0.0] * 3,
        "sd": [1.0] * 3,
    }
    assert m.bind(data).values["guess"].tolist() == [5.0, 6.0, 7.0]


# ---- refused -------------------------------------------------------------------------------------


def shared_parent(body):
    def run():
        school = plate("school", 2)
        pupil = plate("pupil", within=school, by="pupil_school")
        teacher = plate("teacher", within=school, by="teacher_school")
        with school:
            level = latent("level", Normal(0.0, 1.0))
        with pupil, teacher:
            body(level)

    return run


def ragged(body):
    def run():
        patient = plate("patient", 2)
        with plate("visit", within=patient, ordered=True) as visit:
            body(visit)

    return run


def vectors(body):
    def run():
        with plate("a", 3) as a:
            x = latent("x", Normal(0.0, 1.0), shape=3)
            body(x, a)

    return run


WRONG = [
    ("grid", shared_parent(lambda x: latent("y", Normal(x, 1.0))), "both 'pupil' and 'teacher' lie within it"),
    (
        "ragged-chain",
        ragged(lambda v: latent("x", Markov(Normal(0.0, 1.0), lambda b: Normal(b, 1.0)))),
        "lies within 'patient': neighbours may belong",
    ),
    ("ragged-shift", ragged(lambda v: shift(latent("x", Normal(0.0, 1.0)), v)), "lies within 'patient'"),
    ("mask", vectors(lambda x, a: x[x > 0]), "truth values.*torch.where"),
    ("two-vectors", vectors(lambda x, a: (x[:, None] * x)[x.long(), x.long()]), "one axis at a time"),
    ("pick-value", vectors(lambda x, a: pick(x, a=x[0].long())), "pick takes a position"),
    ("dot-shapes", vectors(lambda x, a: dot(x, x[:2], over=a)), r"dot failed on one element \('x' \[3\]"),
    ("equal", vectors(lambda x, a: torch.equal(x, x)), "one Python truth"),
    ("allclose", vectors(lambda x, a: torch.allclose(x, x)), "one Python truth"),
    ("at-shape", vectors(lambda x, a: factor("f", Normal(x, 1.0), at=torch.ones(2))), "factor 'f'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "body", "text"), WRONG, ids=[w[0] for w in WRONG])
def test_a_wrong_statement_is_an_error_at_its_line(name, body, text):
    with pytest.raises(ModelError) as caught:
        model(body).graph()
    assert re.match(r"test_sites\.py:\d+: ", str(caught.value)), str(caught.value)
    assert re.search(text, str(caught.value)), str(caught.value)
    assert "/torch/" not in str(caught.traceback[-1].path)


def test_a_pick_outside_its_plate_is_said_before_anything_runs():
    @model
    def m():
        with plate("pose"):
            x = latent("x", Normal(0.0, 1.0))
        factor("anchor", Normal(pick(x, pose=3), 0.1), at=0.0)

    with pytest.raises(
        DataError, match=r"pick\(\.\.\., pose=3\) at test_sites\.py:\d+.*has 3 elements"
    ):
        m.graph(sizes={"pose": 3})
    assert m.graph(sizes={"pose": 4}).plates["pose"].size == 4


def test_two_ways_to_an_ancestor_have_to_agree():
    @model
    def m():
        school = plate("school")
        pupil = plate("pupil", within=school, by="pupil_school")
        teacher = plate("teacher", within=school, by="teacher_school")
        with school:
            level = latent("level", Normal(0.0, 1.0))
        with plate("lesson", within=(pupil, teacher)):
            observe("y", Normal(level, 1.0))

    data = {"pupil_school": [0, 1, 1], "teacher_school": [0, 1], "pupil": [0, 1, 2], "y": [0.0] * 3}
    assert m.bind({**data, "teacher": [0, 1, 1]}).maps["lesson", "school"].tolist() == [0, 1, 1]
    with pytest.raises(
        DataError, match="by way of 'pupil' and of 'teacher', which disagree for lesson 2"
    ):
        m.bind({**data, "teacher": [0, 1, 0]})


# ---- missing entries -----------------------------------------------------------------------------

NAN = float("nan")


def test_events_that_are_missing_in_part():
    def seen(law):
        @model
        def m():
            with plate("row"):
                observe("y", law)

        return m.bind({"y": [[0.25, 0.75], [NAN, 0.5], [NAN, NAN]]})

    for law in (Normal(torch.zeros(2), 1.0), MultivariateNormal(torch.zeros(2), torch.eye(2))):
        assert seen(law).masks["y"].tolist() == [[True, True], [False, True], [False, False]]
    with pytest.raises(DataError, match="'y': 1 events are missing in part, the first at row 1"):
        seen(Dirichlet(torch.ones(2)))


def test_an_observed_chain_has_no_gaps():
    @model
    def m():
        with plate("day", ordered=True):
            observe("y", Markov(Normal(0.0, 1.0), lambda before: Normal(before, 1.0)))

    with pytest.raises(
        DataError, match="'y': 1 entries are missing, and in an observed Markov chain"
    ):
        m.bind({"y": [1.0, NAN, 2.0]})
