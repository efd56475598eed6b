"""A posterior as the prior of the next fit, judged by the fit of all data at once."""

from __future__ import annotations

import math

import pytest
import torch

import ppl
from ppl import marginals as mg
from ppl.continual import with_prior
from ppl.distributions import (
    Bernoulli,
    ConcentratedNormal,
    Flat,
    HalfNormal,
    Markov,
    MultivariateNormal,
    Normal,
    StudentT,
)
from ppl.errors import DataError, ModelError, NumericalError, UnsupportedError
from ppl.manifolds import SE2
from ppl.model import model
from ppl.plates import plate
from ppl.posterior import Posterior
from ppl.save import load
from ppl.sites import given, latent, observe, param
from tests.conjugate import normal_mean

F64 = torch.float64
close = torch.testing.assert_close


@model
def line(dims=3, joint=True):
    if joint:
        prior = MultivariateNormal(torch.zeros(dims), covariance_matrix=4.0 * torch.eye(dims))
        weights = latent("weights", prior)
    else:
        weights = latent("weights", Normal(0.0, 2.0), shape=dims)
    with plate("row"):
        observe("y", Normal(weights @ given("x"), 0.3))


def rows(count, dims=3):
    x = torch.randn(count, dims, dtype=F64)
    return {"x": x, "y": x.sum(-1) + 0.3 * torch.randn(count, dtype=F64)}


def both(*parts):
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def exact(program, data, **options):
    return ppl.infer(program, data, method="exact", **options)


@pytest.mark.parametrize("joint", [True, False])
def test_two_batches_in_sequence_are_one(joint):
    program = line(joint=joint)
    first, second, third = rows(5), rows(4), rows(2)
    whole = exact(program, both(first, second, third))
    steps = exact(program, first)
    evidence = steps.log_evidence.value
    for batch in (second, third):
        steps = exact(program, batch, prior=steps)
        evidence += steps.log_evidence.value
    close(steps.mean("weights"), whole.mean("weights"), atol=1e-10, rtol=0)
    close(steps.covariance("weights"), whole.covariance("weights"), atol=1e-10, rtol=0)
    assert evidence == pytest.approx(whole.log_evidence.value, abs=1e-9)


def test_scalars_are_carried_over():
    y = torch.randn(7, dtype=F64)
    whole = exact(normal_mean, {"y": y})
    steps = exact(normal_mean, {"y": y[3:]}, prior=exact(normal_mean, {"y": y[:3]}))
    close(steps.mean("mean"), whole.mean("mean"), atol=1e-12, rtol=0)
    close(steps.sd("mean"), whole.sd("mean"), atol=1e-12, rtol=0)


@model
def groups():
    group = plate("group")
    with group:
        slope = latent("slope", Normal(1.0, 2.0), shape=2)
    with plate("row", within=group):
        observe("y", Normal(slope @ given("x"), 0.5))


def test_elements_of_plates_are_matched_by_label_and_new_ones_keep_their_law():
    first = rows(4, 2) | {"group": ["b", "a", "b", "c"]}
    second = rows(4, 2) | {"group": ["d", "c", "b", "d"]}
    whole = exact(groups, both_text(first, second))
    steps = exact(groups, second, prior=exact(groups, first))
    assert steps.labels["group"] == ["b", "c", "d"]
    for label in ("b", "c", "d"):
        here, there = steps.labels["group"].index(label), whole.labels["group"].index(label)
        close(steps.mean("slope")[here], whole.mean("slope")[there], atol=1e-10, rtol=0)
        close(steps.covariance("slope")[here], whole.covariance("slope")[there], atol=1e-10, rtol=0)


def both_text(first, second):
    numbers = {k: torch.cat([first[k], second[k]]) for k in ("x", "y")}
    return numbers | {"group": [*first["group"], *second["group"]]}


def test_a_model_none_of_whose_elements_was_seen_keeps_its_law():
    second = rows(2, 2) | {"group": ["e", "f"]}
    before = exact(groups, rows(4, 2) | {"group": ["b", "a", "b", "c"]})
    steps = exact(groups, second, prior=before)
    alone = exact(groups, second)
    close(steps.mean("slope"), alone.mean("slope"))
    assert str(steps.graph.factors["slope"].law) == "Normal"


def test_the_laws_of_the_graph_are_replaced_and_their_parents_left():
    @model
    def deep():
        base = latent("base", Normal(0.0, 1.0))
        with plate("group"):
            level = latent("level", Normal(base, 1.0))
            observe("y", Normal(level, 1.0))

    data = {"y": torch.randn(3, dtype=F64)}
    prior = exact(deep, data)
    bound = with_prior(deep.bind(data), prior)
    graph = bound.graph
    assert graph.factors["level"].scope == ("level", "level@loc", "level@scale")
    close(bound.values["level@loc"], prior.mean("level"))
    draws = ppl.simulation.simulate(bound, 4000, ppl.streams.Streams(0))
    close(draws["level"].mean(0), prior.mean("level"), atol=0.1, rtol=0)
    assert "level@loc" in str(graph)


def test_qem_and_params_take_a_prior_too():
    @model
    def scaled():
        offset = param("offset", 0.0)
        mu = latent("mu", Normal(0.0, 10.0))
        with plate("row"):
            observe("y", Normal(mu + offset, 1.0))

    y = 2 + torch.randn(20, dtype=F64)
    prior = ppl.infer(line(dims=2), rows(20, 2), method="qem", seed=0)
    after = ppl.infer(line(dims=2), rows(20, 2), method="qem", seed=1, prior=prior)
    assert float(after.sd("weights").max()) < 1.1 * float(prior.sd("weights").max())
    first = made(scaled.bind({"y": y}), {"mu": mg.Gaussian(torch.ones(()), torch.ones(()))})
    first.params = {"offset": torch.tensor(0.7, dtype=F64)}
    bound = with_prior(scaled.bind({"y": y}), first)
    assert float(bound.graph.variables["offset"].initial) == 0.7


def test_poses_are_carried_over_in_their_own_coordinates():
    @model
    def walk():
        pose = plate("pose")
        with pose:
            x = latent("x", ConcentratedNormal(SE2, [0.0, 0.0, 0.0], 1.0))
            observe("z", ConcentratedNormal(SE2, x, 0.1))

    data = {"z": torch.zeros(3, 3, dtype=F64)}
    bound = walk.bind({"z": torch.zeros(2, 3, dtype=F64)})
    loc = SE2.exp(torch.randn(2, 3, dtype=F64))
    covariance = torch.diag_embed(torch.rand(2, 3, dtype=F64))
    posterior = made(bound, {"x": mg.JointGaussian(loc, covariance, "SE2")})
    new = with_prior(walk.bind(data), posterior)
    law = new.graph.factors["x"].law
    assert isinstance(law.family, ConcentratedNormal)
    close(new.values["x@loc"], torch.cat([loc, torch.zeros(1, 3, dtype=F64)]))
    close(new.values["x@scale"][:2], covariance.sqrt())
    close(new.values["x@scale"][2], torch.eye(3, dtype=F64))
    plain = made(bound, {"x": mg.Gaussian(loc, torch.ones(2, 3))})
    with pytest.raises(UnsupportedError, match="keeps no tangent coordinates of SE2"):
        with_prior(walk.bind(data), plain)


def made(bound, marginals):
    return Posterior(bound, marginals, method="made", sampler=lambda n, streams: {})


def test_a_saved_posterior_keeps_the_laws_it_was_given(tmp_path):
    first = rows(4, 2) | {"group": ["b", "a", "b", "c"]}
    second = rows(2, 2) | {"group": ["b", "a"]}
    program = groups
    steps = exact(program, second, prior=exact(program, first))
    steps.save(tmp_path / "steps.pt")
    again = load(tmp_path / "steps.pt", program)
    close(again.bound.values["slope@loc"], steps.bound.values["slope@loc"])
    third = rows(2, 2) | {"group": ["b", "c"]}
    close(
        exact(program, third, prior=again).mean("slope"),
        exact(program, third, prior=steps).mean("slope"),
    )
    close(
        steps.predict(second, n=10, seed=0).mean("y"),
        again.predict(second, n=10, seed=0).mean("y"),
        atol=3,
        rtol=1,
    )


# ---- refusals -----------------------------------------------------------------------------------


@model
def hard():
    scale = latent("scale", HalfNormal(1.0))
    flag = latent("flag", Bernoulli(0.5))
    table = latent("table", Normal(0.0, 1.0), shape=(2, 2))
    with plate("row"):
        observe("y", Normal(flag + table.sum(), scale))


def test_every_latent_that_cannot_be_carried_over_is_named():
    bound = hard.bind({"y": torch.zeros(3)})
    marginals = {
        "scale": mg.Weighted(torch.rand(5, dtype=F64), torch.full((5,), 0.2, dtype=F64)),
        "flag": mg.Table(torch.tensor([0.5, 0.5], dtype=F64)),
        "table": mg.JointGaussian(torch.zeros(2, 2, dtype=F64), torch.eye(4, dtype=F64)),
    }
    with pytest.raises(UnsupportedError) as error:
        with_prior(bound, made(bound, marginals))
    for words in (
        "'scale': its support",
        "'flag': it is discrete",
        "'table': its elements are arrays",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize("law", [StudentT(3.0, 0.0, 1.0), Flat()])
def test_new_elements_need_a_gaussian_law(law):
    @model
    def other():
        with plate("group"):
            x = latent("x", law)
            observe("y", Normal(x, 1.0))

    old = other.bind({"y": torch.zeros(2)})
    known = made(old, {"x": mg.Gaussian(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64))})
    assert with_prior(other.bind({"y": torch.zeros(2)}), known).prior["x"].loc.shape == (2,)
    with pytest.raises(
        UnsupportedError, match="1 elements are new to the posterior.*constant parameters"
    ):
        with_prior(other.bind({"y": torch.zeros(3)}), known)


def test_a_chain_cannot_grow_by_a_prior():
    @model
    def walk():
        with plate("time", ordered=True):
            x = latent("x", Markov(Normal(0.0, 1.0), lambda before: Normal(before, 1.0)))
            observe("y", Normal(x, 1.0))

    before = exact(walk, {"y": torch.zeros(3)})
    again = exact(walk, {"y": torch.ones(3)}, prior=before)
    assert again.graph.factors["x"].chain is None
    with pytest.raises(
        UnsupportedError, match="Markov chain they depend on the ones before.*extend"
    ):
        exact(walk, {"y": torch.zeros(4)}, prior=before)


def test_what_is_no_fit_of_this_model_is_refused():
    data = rows(3)
    with pytest.raises(ModelError, match="expected a posterior"):
        exact(line(), data, prior={"weights": 0.0})
    with pytest.raises(DataError, match="fitted with plates"):
        exact(line(dims=2), rows(3, 2), prior=exact(line(dims=3), data))

    with pytest.raises(DataError, match="knows none of this model's latents"):
        exact(normal_mean, {"y": [0.0]}, prior=exact(line(), data))
    bound = normal_mean.bind({"y": [0.0]})
    flat = made(bound, {"mean": mg.Gaussian(torch.zeros((), dtype=F64), torch.tensor(math.inf))})
    with pytest.raises(NumericalError, match="zero or not finite"):
        with_prior(bound, flat)


@pytest.mark.parametrize(("old", "new"), [([0, 1], ["a", "b"]), (["a", "b"], [0, 1])])
def test_elements_named_in_one_fit_and_counted_in_the_other_are_refused(old, new):
    @model
    def named():
        group = plate("group")
        with group:
            x = latent("x", Normal(0.0, 1.0))
        with plate("row"):
            observe("y", Normal(x[given("at", index=group)], 1.0))

    before = exact(named, {"at": old, "y": [1.0, 2.0]})
    with pytest.raises(DataError, match="plate 'group', over which 'x' varies.*same labels"):
        exact(named, {"at": new, "y": [1.0, 2.0]}, prior=before)


@pytest.mark.parametrize("was_grouped", [True, False])
def test_a_param_of_another_shape_is_refused(was_grouped):
    @model
    def shifted(grouped):
        group = plate("group")
        base = None if grouped else param("base", 0.0)
        with group:
            base = param("base", 0.0) if grouped else base
            observe("y", Normal(latent("x", Normal(base, 1.0)), 1.0))

    y = torch.zeros(3)
    before = made(shifted(was_grouped).bind({"y": y}), {})
    before.params["base"] = torch.zeros(3 if was_grouped else (), dtype=F64)
    with pytest.raises(DataError, match="'base' was fitted with plates.*same model for both"):
        with_prior(shifted(not was_grouped).bind({"y": y}), before)
