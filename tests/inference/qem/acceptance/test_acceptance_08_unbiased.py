"""Acceptance test 8: E[Zhat] = Z for conjugate models at K = 2, with conditional proposals above a plate too."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp
from torch.utils._pytree import tree_map

from ppl import Bernoulli, Markov, Normal, latent, model, observe, plate
from ppl.backend import Settings
from ppl.inference.particles import LinearGaussian, Prior, Table, Tilted
from ppl.inference.particles.estep import draw_all, evaluated, weigh
from ppl.inference.qem import QEM, init, prepare, step
from ppl.streams import Streams
from tests.inference.qem.acceptance import enumeration as en
from tests.smoothers import autoregression_smoother

Y = np.array([1.4, 1.0, 1.6])
NOISE = 1.0
WIDE = (
    0.3,
    1.2,
)  # mean and sd of the parents' proposals where the child is proposed from its prior
REPEATS = 20_000
ERRORS = 4.0  # standard errors of the mean of REPEATS


@model
def one_parent():
    u = latent("u", Normal(0.0, 1.0))
    with plate("row"):
        z = latent("z", Normal(u, 1.0))
        observe("y", Normal(z, NOISE))


@model
def two_parents():
    u, v = latent("u", Normal(0.0, 1.0)), latent("v", Normal(0.0, 1.0))
    with plate("row"):
        z = latent("z", Normal(u + v, 1.0))
        observe("y", Normal(z, NOISE))


PROGRAMS = {1: one_parent, 2: two_parents}
PARENTS = {1: ("u",), 2: ("u", "v")}
FORMS = {
    "prior": lambda names, index: Prior(index),
    "tilted prior": lambda names, index: Tilted(index),
    "linear Gaussian": LinearGaussian,
    "product": None,
}


def log_evidence(parents: int) -> float:
    """All rows share a mean of variance ``parents``."""
    cov = parents * np.ones((3, 3)) + (1 + NOISE**2) * np.eye(3)
    return stats.multivariate_normal(np.zeros(3), cov).logpdf(Y)


def options(parents, form, index, particles):
    make = FORMS[form]
    q = {} if make is None else {"q": {"z": make(PARENTS[parents], index)}}
    groups = [(n,) for n in (*PARENTS[parents], "z")]
    return QEM(particles=particles, groups=groups, joint_up_to=0, bridge=False, **q)


def fitted(parents, form, index):
    """Proposals after some iterations with many particles: close to the posterior, so that weights have a variance."""
    problem = prepare(
        PROGRAMS[parents].bind({"y": Y}), options(parents, form, index, 60), Settings(Streams(1))
    )
    state = init(problem)
    for _ in range(60):
        state, _ = step(problem, state)
    return widened(state.q, PARENTS[parents]) if form == "prior" else state.q


def widened(q, names):
    """Proposals of these latents that are wider than the prior, which bounds the weights."""
    made = dict(q.proposals)
    for name in names:
        old = made[f"k:{name}"]
        mean, cov = (
            torch.full_like(old.joint.mean, WIDE[0]),
            torch.full_like(old.joint.cov, WIDE[1] ** 2),
        )
        made[f"k:{name}"] = old._replace(joint=old.joint._replace(mean=mean, cov=cov))
    return q._replace(proposals=made)


def estimates(parents, form, index, particles=2, repeats=REPEATS):
    """Independent values of Zhat / Z: the restart axis holds the repeats."""
    q = tree_map(
        lambda t: t if t is None else t.expand(repeats, *t.shape), fitted(parents, form, index)
    )
    problem = prepare(
        PROGRAMS[parents].bind({"y": Y}),
        options(parents, form, index, particles),
        Settings(Streams(2), restarts=repeats),
    )
    drawn = draw_all(problem.weighting, q, problem.settings.streams)
    log_z = weigh(evaluated(problem, problem.weighting, drawn, q)).log_z
    assert log_z.shape == (repeats,)
    return np.exp(log_z.numpy() - log_evidence(parents))


def check_mean(ratios):
    mean, error = ratios.mean(), ratios.std() / math.sqrt(len(ratios))
    assert error < 0.02, error  # or nothing is tested
    assert abs(mean - 1) < ERRORS * error, (mean, error)


def check(parents, form, index, particles=2):
    check_mean(estimates(parents, form, index, particles))


@pytest.mark.parametrize("parents", [1, 2])
def test_08_unbiased_with_product_proposals(parents):
    check(parents, "product", "permutation")


@pytest.mark.parametrize("index", ["permutation", "categorical"])
@pytest.mark.parametrize("form", ["prior", "tilted prior", "linear Gaussian"])
def test_08_unbiased_with_one_parent(form, index):
    check(1, form, index)


@pytest.mark.parametrize("index", ["permutation", "categorical"])
@pytest.mark.parametrize("form", ["prior", "tilted prior", "linear Gaussian"])
def test_08_unbiased_with_two_parents(form, index):
    check(2, form, index)


@pytest.mark.parametrize("particles", [{"u": 2, "v": 3, "z": 4}, {"u": 3, "v": 2, "z": 1}], ids=str)
@pytest.mark.parametrize("index", ["permutation", "categorical"])
def test_08_unbiased_with_unequal_particles(index, particles):
    check(2, "prior", index, particles)


# ---- a discrete parent, and states of a series ------------------------------------------------


@model
def switched():
    with plate("row"):
        on = latent("on", Bernoulli(0.3))
        z = latent("z", Normal(1.5 * on, 1.0))
        observe("y", Normal(z, NOISE))


@pytest.mark.parametrize("index", ["permutation", "categorical"])
@pytest.mark.parametrize("enumerate_up_to", [64, 1], ids=["enumerated", "sampled"])
def test_08_unbiased_given_a_discrete_parent(enumerate_up_to, index):
    """A table: one proposal for each value of the parent."""
    made = partial(
        QEM, q={"z": Table("on", index=index)}, enumerate_up_to=enumerate_up_to,
        groups=[("z",)], joint_up_to=0, bridge=False,
    )  # fmt: skip
    sd = math.sqrt(1 + NOISE**2)
    truth = np.log(0.7 * stats.norm.pdf(Y, 0, sd) + 0.3 * stats.norm.pdf(Y, 1.5, sd)).sum()
    check_mean(repeated(switched, made, truth))


@model
def series():
    with plate("time", ordered=True):
        x = latent("x", Markov(Normal(0.5, 1.5), lambda before: Normal(0.8 * before, 0.7)))
        observe("y", Normal(x, NOISE))


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("form", ["independent", "given the state before"])
def test_08_unbiased_for_a_series(form, stratified):
    exact = autoregression_smoother(Y, 0.8, 0.7, NOISE, 0.5, 1.5)
    joint = 0 if form == "independent" else 6
    made = partial(QEM, joint_up_to=joint, bridge=False, stratified=stratified)
    problem = prepare(series.bind({"y": Y}), made(particles=2), Settings(Streams(0)))
    assert (problem.blocks[0].form is None) == (form == "independent")
    assert problem.blocks[0].stratified == stratified
    check_mean(repeated(series, made, exact.log_evidence))


def repeated(program, made, truth):
    """Values of Zhat / Z at K = 2, from proposals fitted with 60 particles."""
    problem = prepare(program.bind({"y": Y}), made(particles=60), Settings(Streams(1)))
    state = init(problem)
    for _ in range(60):
        state, _ = step(problem, state)
    q = tree_map(lambda t: t if t is None else t.expand(REPEATS, *t.shape), state.q)
    settings = Settings(Streams(2), restarts=REPEATS)
    problem = prepare(program.bind({"y": Y}), made(particles=2), settings)
    drawn = draw_all(problem.weighting, q, problem.settings.streams)
    log_z = weigh(evaluated(problem, problem.weighting, drawn, q)).log_z
    return np.exp(log_z.numpy() - truth)


# ---- the case that fails with shared maps, in NumPy -------------------------------------------


def zhat(parents: int, index: str, shared: bool, repeats: int, rng) -> np.ndarray:
    """Zhat / Z at K = 2 with proposals from the prior, ``z`` drawn given parents through index maps."""
    k, rows = 2, len(Y)
    above = rng.normal(*WIDE, (repeats, parents, k))
    log_q = stats.norm.logpdf(above, *WIDE)
    shape = (repeats, parents, 1 if shared else rows, k)
    if index == "permutation":
        maps = rng.random(shape).argsort(-1)
    else:
        maps = rng.integers(k, size=shape)
    maps = np.broadcast_to(maps, (repeats, parents, rows, k))
    wide = np.broadcast_to(above[:, :, None], (repeats, parents, rows, k))
    centre = np.take_along_axis(wide, maps, -1).sum(1)
    z = centre + rng.standard_normal(centre.shape)  # [repeats, rows, k]
    first = above[:, 0]
    centres = first[:, :, None] + above[:, 1][:, None] if parents == 2 else first[:, :, None]
    centres = centres.reshape(repeats, -1)  # of all combinations of parents
    log_p = stats.norm.logpdf(z[:, :, None], centres[:, None, :, None], 1.0)
    log_mix = logsumexp(log_p, 2) - math.log(centres.shape[1])
    inner = log_p + (stats.norm.logpdf(Y[:, None], z, NOISE) - log_mix - math.log(k))[:, :, None]
    below = logsumexp(inner, 3).sum(1)  # [repeats, combinations]
    outer = stats.norm.logpdf(above) - log_q - math.log(k)
    top = outer[:, 0, :, None] + outer[:, 1, None] if parents == 2 else outer[:, 0, :, None]
    return np.exp(logsumexp(below + top.reshape(repeats, -1), 1) - log_evidence(parents))


@pytest.mark.parametrize("parents", [1, 2])
@pytest.mark.parametrize("index", ["permutation", "categorical"])
def test_08_maps_of_each_plate_element_are_unbiased_in_the_oracle_too(parents, index):
    check_mean(zhat(parents, index, False, 40_000, np.random.default_rng(0)))


@pytest.mark.parametrize("parents, index", [(2, "permutation"), (1, "categorical")])
def test_08_shared_maps_would_be_told_apart(parents, index):
    """The defect that the tests above are for shifts the mean by far more than four standard errors."""
    ratios = zhat(parents, index, True, 40_000, np.random.default_rng(0))
    assert ratios.mean() - 1 > 8 * ratios.std() / math.sqrt(len(ratios))


# ---- the mixture density, particle by particle ------------------------------------------------


@pytest.mark.parametrize("index", ["permutation", "categorical"])
@pytest.mark.parametrize("parents", [1, 2])
def test_08_conditional_proposals_equal_enumeration_with_the_mixture_of_all_parents(parents, index):
    """Log Zhat and all weights, at particles whose proposal is the mixture over every combination of parents."""
    counts = {"u": 3, "v": 2, "z": 4}
    counts = {n: counts[n] for n in (*PARENTS[parents], "z")}
    problem = prepare(
        PROGRAMS[parents].bind({"y": Y}),
        options(parents, "prior", index, counts),
        Settings(Streams(4)),
    )
    q = init(problem).q
    drawn = draw_all(problem.weighting, q, problem.settings.streams)
    found = weigh(evaluated(problem, problem.weighting, drawn, q))
    values = {n: drawn[f"k:{n}"].values[n].numpy() for n in counts}
    log_q = {}
    for n in PARENTS[parents]:
        joint = q.proposals[f"k:{n}"].joint
        log_q[f"k:{n}"] = en.log_product_normal(
            joint.mean.numpy(), joint.cov.numpy(), values[n][:, None]
        )
    centres = values["u"] if parents == 1 else np.add.outer(values["u"], values["v"]).ravel()
    each = stats.norm.logpdf(values["z"][..., None], centres, 1.0)
    log_q["k:z"] = logsumexp(each, -1) - math.log(len(centres))
    axes = {f"k:{n}": en.Axis((n,), (3,) if n == "z" else (), k) for n, k in counts.items()}

    def log_joint(z):
        centre = sum(z[n] for n in PARENTS[parents])[:, None]
        above = sum(en.log_normal(z[n], 0.0, 1.0) for n in PARENTS[parents])
        return above + en.total(
            en.log_normal(z["z"], centre, 1.0) + en.log_normal(Y, z["z"], NOISE)
        )

    tuples = en.index_tuples(axes)
    log = en.log_weights(axes, tuples, values, log_q, log_joint)
    np.testing.assert_allclose(float(found.log_z), logsumexp(log), rtol=1e-10)
    for axis, w in found.marginals.items():
        wanted = en.marginal(axes[axis], tuples[axis], en.normalised(log))
        np.testing.assert_allclose(w.numpy(), wanted, rtol=1e-9, atol=1e-12)
