"""Proposals that read other latents, against densities by scipy, closed forms and enumeration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

from ppl import (
    Bernoulli,
    Beta,
    Categorical,
    Dirichlet,
    Exponential,
    Gamma,
    HalfNormal,
    Markov,
    ModelError,
    MultivariateNormal,
    Normal,
    Poisson,
    UnsupportedError,
    given,
    latent,
    model,
    observe,
    plate,
)
from ppl.backend import Settings
from ppl.inference.numerics.expfam import FAMILIES
from ppl.inference.particles import LinearGaussian, Prior, Table, Tied, Tilted
from ppl.inference.particles.estep import draw_all, evaluated, weigh
from ppl.inference.particles.linear import regression
from ppl.inference.particles.parents import draw_index
from ppl.inference.particles.tilted import _cumulants
from ppl.inference.qem import QEM, init, prepare, step
from ppl.streams import Streams
from tests.inference.particles.ragged_houses import RAGGED, hierarchy
from tests.quiet import quiet_fit


@model
def switched():
    """A discrete latent in a plate decides where a continuous one lies."""
    share = latent("share", Beta(2.0, 2.0))
    with plate("row"):
        z = latent("z", Bernoulli(share))
        x = latent("x", Normal(4.0 * z, 1.0))
        observe("y", Normal(x, given("noise")))


SWITCHED = {"y": [0.2, 3.6, 1.9], "noise": [0.5, 0.5, 0.8]}


def fitted(program, data, seed=0, iterations=60, restarts=1, **options):
    problem = prepare(
        program.bind(data), QEM(**options), Settings(Streams(seed), restarts=restarts)
    )
    state = init(problem)
    for _ in range(iterations):
        state, _ = step(problem, state)
    return problem, state


# ---- densities ----------------------------------------------------------------------------------------------


def test_a_linear_gaussian_has_the_mixture_density_over_ragged_plates():
    q = {"level": LinearGaussian("mean"), "effect": LinearGaussian(("level", "mean"))}
    problem, state = fitted(hierarchy, RAGGED, particles={"mean": 3, "level": 4, "effect": 5}, q=q)
    drawn = draw_all(problem.weighting, state.q, problem.settings.streams)
    values = {n: drawn[f"k:{n}"].values[n].numpy() for n in ("mean", "level", "effect")}
    state = state.q.proposals["k:effect"].joint
    for row, county in enumerate(RAGGED["county"]):
        joint = type(state)(state.mean[row], state.cov[row])
        law = regression(joint, 2)
        at = {"mean": values["mean"], "level": values["level"][county]}
        order = [b.names[0] for b in problem.blocks if b.names[0] in at]
        grid = np.meshgrid(*(at[n] for n in order), indexing="ij")
        parents = np.stack(grid, -1).reshape(-1, 2)
        centres = law.mean.numpy() + (parents - law.centre.numpy()) @ law.slope.numpy()
        density = stats.norm.logpdf(values["effect"][row][:, None], centres.T, float(law.chol))
        expected = logsumexp(density, 1) - math.log(len(parents))
        assert np.allclose(drawn["k:effect"].log_q[row], expected, rtol=0, atol=1e-9)


def test_a_regression_is_that_of_the_joint_gaussian():
    root = torch.randn(5, 5, dtype=torch.float64)
    cov = root @ root.T
    law = regression(type("J", (), {"mean": torch.arange(5.0).double(), "cov": cov})(), 2)
    slope = torch.linalg.solve(cov[:2, :2], cov[:2, 2:])
    left = cov[2:, 2:] - cov[2:, :2] @ slope
    assert torch.allclose(law.slope, slope, rtol=0.02, atol=0.02)  # a ridge of 1e-4
    assert torch.allclose(law.chol @ law.chol.T, left, rtol=0.02, atol=0.02)


@model
def switched_rate():
    """The same with a positive latent."""
    with plate("row"):
        z = latent("z", Bernoulli(0.4))
        rate = latent("rate", Gamma(3.0, 1.0 + 3.0 * z))
        observe("count", Poisson(rate))


@pytest.mark.parametrize("sampled", [False, True])
def test_a_table_has_the_mixture_density(sampled):
    q = {"x": Table(given="z")}
    if sampled:
        q["z"] = "Bernoulli"
    problem, state = fitted(switched, SWITCHED, particles=6, q=q)
    drawn = draw_all(problem.weighting, state.q, problem.settings.streams)
    x = drawn["k:x"].values["x"].numpy()
    proposal = state.q.proposals["k:x"]
    mean = proposal.joint.mean[..., 0].numpy()
    variance = proposal.joint.cov.reshape(mean.shape).numpy()
    codes = drawn["k:z"].values["z"].numpy() if sampled else np.tile([0.0, 1.0], (3, 1))
    for row in range(3):
        c = codes[row].astype(int)
        density = stats.norm.logpdf(x[row][:, None], mean[row, c], variance[row, c] ** 0.5)
        expected = logsumexp(density, 1) - math.log(len(c))
        assert np.allclose(drawn["k:x"].log_q[row], expected, rtol=0, atol=1e-9)


def test_a_table_of_a_family_has_the_mixture_density():
    q = {"rate": Table(given="z", family="Gamma")}
    problem, state = fitted(switched_rate, {"count": [0, 4]}, particles=6, q=q)
    drawn = draw_all(problem.weighting, state.q, problem.settings.streams)["k:rate"]
    rate = drawn.values["rate"].numpy()
    law = FAMILIES["Gamma"].standard_from_mean(state.q.proposals["k:rate"].families["rate"])
    shape, scale = law["concentration"].numpy(), 1 / law["rate"].numpy()
    for row in range(2):
        density = stats.gamma.logpdf(rate[row][:, None], shape[row], scale=scale[row])
        expected = logsumexp(density, 1) - math.log(2)
        assert np.allclose(drawn.log_q[row], expected, rtol=0, atol=1e-9)


def test_tilted_laws_have_the_density_of_their_natural_parameters():
    problem, state = fitted(hierarchy, RAGGED, particles=6, q={"effect": Tilted()})
    drawn = draw_all(problem.weighting, state.q, problem.settings.streams)
    block = next(b for b in problem.blocks if "level" in b.names)
    level, effect = (
        drawn[a].values[n].numpy() for a, n in ((block.axis, "level"), ("k:effect", "effect"))
    )
    tilt = state.q.proposals["k:effect"].families["effect"][0].numpy()
    for row, county in enumerate(RAGGED["county"]):
        precision = 1 / 0.25 - 2 * tilt[row, 1]
        centre = (level[county] / 0.25 + tilt[row, 0]) / precision
        density = stats.norm.logpdf(effect[row][:, None], centre, precision**-0.5)
        expected = logsumexp(density, 1) - math.log(6)
        assert np.allclose(drawn["k:effect"].log_q[row], expected, rtol=0, atol=1e-9)


# ---- unbiased -----------------------------------------------------------------------------------------------


def log_evidence_of_the_switch():
    y, noise = np.array(SWITCHED["y"]), np.array(SWITCHED["noise"])
    spread = (1 + noise**2) ** 0.5
    p = (np.arange(4000) + 0.5) / 4000
    off, on = stats.norm.pdf(y, 0, spread), stats.norm.pdf(y, 4, spread)
    each = (1 - p[:, None]) * off + p[:, None] * on
    return math.log(np.mean(stats.beta.pdf(p, 2, 2) * each.prod(1)))


@pytest.mark.parametrize(
    "q",
    [
        {"x": Table(given="z")},
        {"x": Table(given="z"), "z": Prior()},
        {"x": Table(given="z", index="categorical"), "z": Prior("categorical")},
        {"x": Tilted(), "z": Tilted()},
        {"x": Prior(), "z": "Bernoulli"},
        {"x": Tied(Table(given="z")), "z": Tied("Bernoulli")},
        {"x": Tied(LinearGaussian("share")), "z": Tied(Tilted())},
        {("x",): Tied()},
    ],
    ids=str,
)
def test_the_evidence_is_unbiased_with_discrete_parents(q):
    repeats = 16_000  # the ratios have heavy tails
    problem, state = fitted(switched, SWITCHED, particles=30, q=q, iterations=30)
    wide = torch.utils._pytree.tree_map(
        lambda t: t.expand(repeats, *t.shape) if isinstance(t, torch.Tensor) else t, state.q
    )
    small = prepare(
        switched.bind(SWITCHED),
        QEM(particles=3, q=q),
        Settings(Streams(1), restarts=repeats),
    )
    drawn = draw_all(small.weighting, wide, small.settings.streams)
    log_z = weigh(evaluated(small, small.weighting, drawn, wide)).log_z.numpy()
    ratio = np.exp(log_z - log_evidence_of_the_switch())
    error = ratio.std() / repeats**0.5
    assert error < 0.05
    assert abs(ratio.mean() - 1) < 4 * error


def test_index_maps_are_uniform_and_permutations_use_every_parent():
    generator = torch.Generator().manual_seed(0)
    maps = draw_index((5000,), 4, 2, "permutation", generator)
    assert bool((maps.sort(-1).values == torch.tensor([0, 0, 1, 1])).all())
    for kind in ("permutation", "categorical"):
        maps = draw_index((30_000,), 2, 3, kind, generator)
        share = torch.stack([(maps == i).double().mean(0) for i in range(3)])
        assert float((share - 1 / 3).abs().max()) < 4 * (2 / 9 / 30_000) ** 0.5


# ---- what is learned ----------------------------------------------------------------------------------------


def exact_hierarchy():
    """Posterior mean and covariance of mean, levels, effects."""
    counties = np.array(RAGGED["county"])
    dims = 1 + 3 + 5
    precision, linear = np.zeros((dims, dims)), np.zeros(dims)

    def add(row, weight):
        precision[...] += weight * np.outer(row, row)

    eye = np.eye(dims)
    add(eye[0], 1.0)
    for c in range(3):
        add(eye[1 + c] - eye[0], 1 / 0.49)
    for i, c in enumerate(counties):
        add(eye[4 + i] - eye[1 + c], 1 / 0.25)
        add(eye[4 + i], 1.0)
        linear[4 + i] += RAGGED["y"][i]
    cov = np.linalg.inv(precision)
    return cov @ linear, cov


def test_a_linear_gaussian_learns_the_regression_of_the_posterior():
    q = {"level": LinearGaussian("mean"), "effect": LinearGaussian("level")}
    _, state = fitted(hierarchy, RAGGED, particles=150, q=q, iterations=150)
    mean, cov = exact_hierarchy()
    joint = state.q.proposals["k:effect"].joint
    for i, c in enumerate(RAGGED["county"]):
        keep = [1 + c, 4 + i]
        assert np.allclose(joint.mean[i], mean[keep], atol=0.05)
        assert np.allclose(joint.cov[i], cov[np.ix_(keep, keep)], atol=0.05)


def test_a_tilt_learns_the_natural_parameters_of_the_likelihood():
    """The posterior of ``effect`` given ``level`` is its law times the likelihood, which is a tilt by ``(y, -1/2)``."""
    _, state = fitted(hierarchy, RAGGED, particles=150, q={"effect": Tilted()}, iterations=150)
    tilt = state.q.proposals["k:effect"].families["effect"][0].numpy()
    assert np.allclose(tilt[:, 0], RAGGED["y"], atol=0.15)
    assert np.allclose(tilt[:, 1], -0.5, atol=0.1)


@model
def conjugate(case: str = "gamma"):
    with plate("row"):
        if case == "gamma":
            rate = latent("z", Gamma(3.0, 2.0))
            observe("y", Poisson(rate))
        elif case == "exponential":
            rate = latent("z", Exponential(2.0))
            observe("y", Normal(rate, 1.0))
        elif case == "beta":
            chance = latent("z", Beta(2.0, 3.0))
            observe("y", Bernoulli(chance))
        elif case == "bernoulli":
            z = latent("z", Bernoulli(0.3))
            observe("y", Normal(2.0 * z, 1.0))
        elif case == "categorical":
            z = latent("z", Categorical(torch.tensor([0.2, 0.3, 0.5])))
            observe("y", Normal(1.0 * z, 1.0))
        elif case == "dirichlet":
            chances = latent("z", Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
            observe("y", Categorical(chances))


@pytest.mark.parametrize(
    "case, y, expected",
    [
        ("gamma", [2, 0], [[2.0, -1.0], [0.0, -1.0]]),
        ("beta", [1, 0], [[1.0, 0.0], [0.0, 1.0]]),
        ("bernoulli", [1.2, 0.4], [[2 * 1.2 - 2.0], [2 * 0.4 - 2.0]]),
        ("dirichlet", [0, 2], [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
    ],
)
def test_tilts_of_every_kind_of_family_reach_conjugate_posteriors(case, y, expected):
    _, state = fitted(
        conjugate(case=case), {"y": y}, particles=200, q={"z": Tilted()}, iterations=100
    )
    tilt = state.q.proposals["k:z"].families["z"][0]
    assert torch.allclose(tilt, torch.tensor(expected, dtype=tilt.dtype), atol=0.15)


def test_a_tilted_categorical_reaches_its_posterior_up_to_a_constant():
    y = np.array([0.2, 2.4])
    _, state = fitted(
        conjugate(case="categorical"), {"y": y}, particles=200, q={"z": Tilted()}, iterations=100
    )
    tilt = state.q.proposals["k:z"].families["z"][0].numpy()
    shift = stats.norm.logpdf(y[:, None], np.arange(3.0), 1.0)
    apart = (tilt - tilt[:, :1]) - (shift - shift[:, :1])
    assert np.abs(apart).max() < 0.25


def test_closed_cumulants_are_derivatives_of_the_log_partition():
    eta = torch.tensor([[0.7, -0.4], [-3.0, -2.0]], dtype=torch.float64)
    family = FAMILIES["Normal"]
    first, second = _cumulants(family, eta, {})
    for row, mean, cov in zip(eta, first, second, strict=True):

        def log_partition(e):
            return family.log_partition((e[0], e[1]))

        assert torch.allclose(mean, torch.autograd.functional.jacobian(log_partition, row))
        assert torch.allclose(cov, torch.autograd.functional.hessian(log_partition, row))


def test_a_tilt_stays_inside_the_domain_where_the_data_want_less_precision():
    """An Exponential law cannot be tilted past an infinite mean."""
    _, state = fitted(
        conjugate(case="exponential"), {"y": [9.0, 0.1]}, particles=50, q={"z": Tilted()}
    )
    tilt = state.q.proposals["k:z"].families["z"][0]
    assert bool((tilt < 2.0).all()) and bool(tilt.isfinite().all())


@pytest.mark.parametrize("sampled", [False, True])
def test_a_table_of_a_family_learns_the_posterior_given_each_value(sampled):
    q = {"rate": Table(given="z", family="Gamma")} | ({"z": "Bernoulli"} if sampled else {})
    _, state = fitted(switched_rate, {"count": [1, 4]}, particles=200, q=q, iterations=150)
    law = FAMILIES["Gamma"].standard_from_mean(state.q.proposals["k:rate"].families["rate"])
    mean = (3.0 + np.array([[1], [4]])) / (np.array([1.0, 4.0]) + 1)
    assert np.allclose(law["concentration"] / law["rate"], mean, rtol=0.1)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_table_learns_the_posterior_given_each_value(sampled):
    q = {"x": Table(given="z")} | ({"z": "Bernoulli"} if sampled else {})
    _, state = fitted(switched, SWITCHED, particles=200, q=q, iterations=150)
    proposal = state.q.proposals["k:x"]
    y, noise = (np.array(SWITCHED[n])[:, None] for n in ("y", "noise"))
    precision = 1 + noise**-2
    mean = (np.array([0.0, 4.0]) + y / noise**2) / precision
    found = proposal.joint.mean[..., 0].numpy()
    likely = proposal.mass.numpy() > 0.05  # what never happens is never seen
    assert likely.sum() >= 4
    assert np.allclose(found[likely], mean[likely], atol=0.1)
    assert np.allclose(proposal.mass.sum(-1), 1)


def test_tied_parameters_average_the_elements():
    _, state = fitted(hierarchy, RAGGED, particles=150, q={"effect": Tied()}, iterations=150)
    mean, cov = exact_hierarchy()
    joint = state.q.proposals["k:effect"].joint
    assert joint.mean.shape == (1, 1)
    assert np.allclose(joint.mean, mean[4:].mean(), atol=0.05)
    spread = np.diag(cov)[4:].mean() + mean[4:].var()
    assert np.allclose(joint.cov.reshape(()), spread, atol=0.1)


# ---- through the front door ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "q",
    [
        {"effect": Prior()},
        {"effect": Tilted(), "level": Tilted()},
        {"effect": LinearGaussian(("level", "mean"))},
        {"effect": Tied(Tilted())},
        {"effect": Tied(LinearGaussian("level"))},
        {"effect": Tied("Normal")},
    ],
    ids=str,
)
@pytest.mark.parametrize("restarts", [1, 2])
def test_posteriors_and_joint_draws_are_right_with_every_form(q, restarts):
    posterior = quiet_fit(
        hierarchy,
        RAGGED,
        seed=0,
        q=q,
        particles=40,
        restarts=restarts,
        max_iters=60,
        final_particles=100,
        replicates=8,
    )
    mean, cov = exact_hierarchy()
    assert np.allclose(posterior.mean("effect"), mean[4:], atol=0.1)
    assert np.allclose(posterior.sd("level"), np.diag(cov)[1:4] ** 0.5, atol=0.1)
    draws = posterior.samples(4000, seed=1)
    found = np.cov(draws["level"][:, 2], draws["effect"][:, 4])[0, 1]
    assert abs(found - cov[3, 8]) < 0.1


def test_a_run_with_forms_can_be_resumed_and_saved(tmp_path):
    q = {"x": Table(given="z"), "z": Tilted()}
    whole = quiet_fit(
        switched, SWITCHED, seed=0, q=q, particles=20, final_particles=100, max_iters=20, tol=0.0
    )
    file = tmp_path / "state.pt"
    quiet_fit(
        switched,
        SWITCHED,
        seed=0,
        q=q,
        particles=20,
        final_particles=100,
        max_iters=8,
        tol=0.0,
        checkpoint=file,
    )
    resumed = quiet_fit(
        switched,
        SWITCHED,
        seed=0,
        q=q,
        particles=20,
        final_particles=100,
        max_iters=20,
        tol=0.0,
        checkpoint=file,
    )
    assert torch.allclose(whole.mean("x"), resumed.mean("x"), atol=0.1)
    whole.save(tmp_path / "fit.pt")


def test_a_funnel_is_weighed_better_by_its_own_law():
    """Tilted laws keep the funnel shape of a hierarchy, which no Gaussian has."""

    @model
    def funnel():
        scale = latent("scale", HalfNormal(2.0))
        with plate("row"):
            z = latent("z", Normal(0.0, scale))
            observe("y", Normal(z, 1.0))

    y = {"y": np.array([0.3, -0.2, 0.5, 0.1, -0.4, 0.2])}
    errors = []
    for q in (None, {"z": Tilted()}):
        problem, state = fitted(funnel, y, particles=30, q=q, iterations=100)
        log_z = []
        for _ in range(60):
            drawn = draw_all(problem.weighting, state.q, problem.settings.streams)
            log_z.append(float(weigh(evaluated(problem, problem.weighting, drawn, state.q)).log_z))
        errors.append(np.std(log_z))
    assert errors[1] < 0.7 * errors[0], errors


# ---- refusals -----------------------------------------------------------------------------------------------


@model
def crossed():
    user, film = plate("user"), plate("film")
    rating = plate("rating", within=(user, film))
    with user:
        latent("taste", Normal(0.0, 1.0))
    with film:
        latent("style", Normal(0.0, 1.0))
    with rating:
        mood = latent("mood", Normal(0.0, 1.0))
        observe("y", Normal(mood, 1.0))
    with plate("day", ordered=True):
        latent("walk", Markov(Normal(0.0, 1.0), lambda before: Normal(before, 1.0)))


CROSSED = {"user": [0, 1], "film": [0, 1], "y": [0.1, 0.2]}


@pytest.mark.parametrize(
    "program, data, q, message",
    [
        (hierarchy, RAGGED, {"efect": Prior()}, "Did you mean 'effect'"),
        (hierarchy, RAGGED, {"effect": LinearGaussian("nobody")}, "not a latent"),
        (hierarchy, RAGGED, {"mean": LinearGaussian("effect")}, "own plates or of outer ones"),
        (switched, SWITCHED, {"x": LinearGaussian("z")}, "discrete, so nothing is linear"),
        (switched, SWITCHED, {"x": Table("share")}, "no finite set of values"),
        (switched, SWITCHED, {"z": LinearGaussian("share")}, "no Gaussian proposal"),
        (switched, SWITCHED, {"x": Prior("shuffled")}, "'permutation' or 'categorical'"),
        (switched, SWITCHED, {("x", "z"): Prior()}, "lies in the same block"),
        (switched, SWITCHED, {"share": Tied()}, "Tied over"),
        (switched, SWITCHED, {"x": Tied(Tied())}, "one Tied is enough"),
        (crossed, CROSSED, {"mood": LinearGaussian(("taste", "style"))}, "cross"),
        (crossed, CROSSED, {"walk": Prior()}, "Markov chain"),
    ],
    ids=lambda v: None if callable(v) or isinstance(v, dict) else str(v)[:30],
)
def test_what_cannot_be_proposed_is_refused_in_words(program, data, q, message):
    with pytest.raises((ModelError, UnsupportedError), match=message):
        bound = program.bind(data, sizes={"day": 3} if program is crossed else None)
        prepare(bound, QEM(q=q), Settings(Streams(0)))


def test_circles_and_laws_without_natural_parameters_are_refused():
    @model
    def flat():
        a, b = latent("a", Normal(0.0, 1.0)), latent("b", Normal(0.0, 1.0))
        c = latent("c", MultivariateNormal(torch.zeros(2), torch.eye(2)))
        observe("y", Normal(a + b + c.sum(), 1.0))

    bound = flat.bind({"y": 0.0})
    with pytest.raises(ModelError, match="circle"):
        q = {"a": LinearGaussian("b"), "b": LinearGaussian("a")}
        prepare(bound, QEM(q=q), Settings(Streams(0)))
    with pytest.raises(ModelError, match="natural parameters"):
        prepare(bound, QEM(q={"c": Tilted()}), Settings(Streams(0)))
    with pytest.raises(ModelError, match="at least one latent"):
        LinearGaussian(())
    with pytest.raises(ModelError, match="they have one form"):
        prepare(bound, QEM(q={"a": Prior()}, groups=[("a", "b")]), Settings(Streams(0)))


def test_a_tilt_is_stable_where_the_law_follows_its_parent_closely():
    """Steps measured by the law's own small variance would run away from the noise of the parent's posterior."""

    @model
    def close():
        centre = latent("centre", Normal(0.0, 1.0))
        with plate("group"):
            z = latent("z", Normal(centre, 0.1))
            w = latent("w", Normal(0.0, 3.0))
            with plate("row"):
                observe("y", Normal(z + w, 1.0))

    y = np.random.default_rng(0).normal(size=(8, 4)) + 2.0
    _, state = fitted(close, {"y": y}, particles=20, q={"z": Tilted()}, iterations=120)
    assert state.bridge == 1.0
    assert float(state.q.proposals["k:z"].families["z"][0].abs().max()) < 20
