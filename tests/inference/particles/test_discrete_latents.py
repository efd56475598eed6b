"""Discrete latents, summed or sampled, against sums over all their values by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from ppl import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    NegativeBinomial,
    Normal,
    Poisson,
    UnsupportedError,
    given,
    latent,
    model,
    observe,
    plate,
)
from tests.quiet import quiet_fit

PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MOVES = torch.tensor([[0.8, 0.2], [0.4, 0.6], [0.1, 0.9]], dtype=torch.float64)
LEVELS = torch.tensor([[-1.0, 0.5], [0.0, 1.5], [1.0, 3.0]], dtype=torch.float64)
SEEN = {"y": [[0.3, 1.4, -0.5, 2.2], [2.8, 1.9, 0.1, 3.1]]}


@model
def classes_in_groups():
    """The kind of a group is a parent of the states of its rows; both stand in the law of y."""
    with plate("group"):
        kind = latent("kind", Categorical(PRIOR))
        with plate("row"):
            state = latent("state", Categorical(MOVES[kind]))
            observe("y", Normal(LEVELS[kind][state], 0.7))


def by_enumeration(y):
    """Evidence, law of the kinds ``[group, 3]`` and of the states ``[group, row, 2]``."""
    density = stats.norm.pdf(np.asarray(y)[..., None, None], LEVELS.numpy(), 0.7)
    joint = MOVES.numpy() * density  # [group, row, kind, state]
    kinds = PRIOR.numpy() * joint.sum(-1).prod(1)
    total = kinds.sum(-1, keepdims=True)
    kinds = kinds / total
    given_kind = joint / joint.sum(-1, keepdims=True)
    return np.log(total).sum(), kinds, np.einsum("gk,grks->grs", kinds, given_kind)


def test_discrete_parents_of_discrete_latents_are_summed_exactly():
    posterior = quiet_fit(classes_in_groups, SEEN)
    evidence, kinds, states = by_enumeration(SEEN["y"])
    assert posterior.log_evidence.value == pytest.approx(evidence, abs=1e-9)
    np.testing.assert_allclose(posterior.probs("kind"), kinds, atol=1e-9)
    np.testing.assert_allclose(posterior.probs("state"), states, atol=1e-9)


def test_joint_draws_follow_the_joint_law_of_parent_and_child():
    draws = quiet_fit(classes_in_groups, SEEN).samples(20_000)
    _, kinds, _ = by_enumeration(SEEN["y"])
    joint = MOVES.numpy() * stats.norm.pdf(SEEN["y"][0][0], LEVELS.numpy(), 0.7)
    for kind, state in itertools.product(range(3), range(2)):
        both = (draws["kind"][:, 0] == kind) & (draws["state"][:, 0, 0] == state)
        chance = kinds[0, kind] * joint[kind, state] / joint[kind].sum()
        assert float(both.double().mean()) == pytest.approx(
            chance, abs=5 * math.sqrt(chance / 20_000)
        )


@pytest.mark.parametrize(
    "options", [{"enumerate_up_to": 2}, {"enumerate_up_to": 1}, {"q": {"kind": "Categorical"}}]
)
def test_sampled_kinds_agree_with_enumeration(options):
    posterior = quiet_fit(classes_in_groups, SEEN, particles=200, **options)
    evidence, kinds, states = by_enumeration(SEEN["y"])
    assert posterior.log_evidence.value == pytest.approx(evidence, abs=0.05)
    np.testing.assert_allclose(posterior.probs("kind"), kinds, atol=0.03)
    np.testing.assert_allclose(posterior.probs("state"), states, atol=0.03)


@model
def two_switches():
    """Two latents of one plate in one factor, with a continuous latent outside."""
    share = latent("share", Beta(2.0, 2.0))
    with plate("row"):
        left, right = latent("left", Bernoulli(share)), latent("right", Categorical(PRIOR))
        observe("y", Normal(left * (1.0 + right), 0.5))


def test_two_discrete_latents_in_one_factor():
    y = np.array([0.1, 2.1, 1.0, 2.9, 0.4])
    posterior = quiet_fit(two_switches, {"y": y})
    grid = (np.arange(2000) + 0.5) / 2000
    left = stats.bernoulli.pmf(np.arange(2)[:, None], grid)  # [2, share]
    mean = np.arange(2)[:, None] * (1.0 + np.arange(3))
    seen = stats.norm.pdf(y[:, None, None], mean, 0.5) * PRIOR.numpy()  # [row, 2, 3]
    each = np.einsum("rab,as->rs", seen, left)
    weight = stats.beta(2, 2).pdf(grid) * each.prod(0) / 2000
    assert posterior.log_evidence.value == pytest.approx(np.log(weight.sum()), abs=0.02)
    weight /= weight.sum()
    assert float(posterior.mean("share")) == pytest.approx(weight @ grid, abs=0.01)
    expected = np.einsum("rab,as,rs,s->rb", seen, left, 1 / each, weight)
    np.testing.assert_allclose(posterior.probs("right"), expected, atol=0.01)


@model
def hidden_counts():
    """Animals that are there, of which a share is seen: the count is a latent without a bound."""
    with plate("site"):
        there = latent("there", Poisson(given("mean")))
        with plate("visit"):
            observe("y", Normal(there, 1.0))


@pytest.mark.parametrize("q", [None, {"there": "Poisson"}])
def test_counts_without_a_bound_are_sampled(q):
    data = {"mean": [2.0, 5.0, 9.0], "y": [[1.2, 2.3], [5.5, 7.0], [8.0, 9.9]]}
    posterior = quiet_fit(hidden_counts, data, particles=100, q=q)
    n = np.arange(60)
    seen = stats.norm.pdf(np.array(data["y"])[..., None], n, 1.0).prod(1)
    joint = stats.poisson.pmf(n, np.array(data["mean"])[:, None]) * seen
    assert posterior.log_evidence.value == pytest.approx(np.log(joint.sum(-1)).sum(), abs=0.05)
    mean = (joint * n).sum(-1) / joint.sum(-1)
    np.testing.assert_allclose(posterior.mean("there"), mean, atol=0.1)


def test_a_category_of_many_values_is_sampled_above_the_limit():
    many = torch.arange(1.0, 41.0, dtype=torch.float64)

    @model
    def program():
        with plate("row"):
            z = latent("z", Categorical(many / many.sum()))
            observe("y", Normal(0.2 * z, 1.0))

    data = {"y": [1.0, 6.5]}
    exact = quiet_fit(program, data)
    assert exact.diagnostics.notes["particles"] == {"k:z": 40}
    sampled = quiet_fit(program, data, enumerate_up_to=39, particles=300)
    p = (many / many.sum()).numpy() * stats.norm.pdf(
        np.array(data["y"])[:, None], 0.2 * np.arange(40), 1.0
    )
    np.testing.assert_allclose(exact.probs("z"), p / p.sum(-1, keepdims=True), atol=1e-9)
    assert sampled.log_evidence.value == pytest.approx(exact.log_evidence.value, abs=0.05)
    assert torch.allclose(sampled.mean("z"), exact.mean("z"), atol=0.5)


def test_a_binomial_latent_is_summed():
    @model
    def program():
        n = latent("n", Binomial(6, 0.3))
        observe("y", Normal(n, 1.0))

    p = stats.binom.pmf(np.arange(7), 6, 0.3) * stats.norm.pdf(2.5, np.arange(7), 1.0)
    np.testing.assert_allclose(quiet_fit(program, {"y": 2.5}).probs("n"), p / p.sum(), atol=1e-9)


def test_a_count_without_a_proposal_is_refused_with_the_remedy():
    @model
    def program():
        n = latent("n", NegativeBinomial(3.0, 0.4))
        observe("y", Normal(n, 1.0))

    with pytest.raises(UnsupportedError, match=r"'n'.*finite.*q=\{'n': 'Poisson'\}"):
        quiet_fit(program, {"y": 2.5})
    n = np.arange(80)
    p = stats.nbinom.pmf(n, 3, 0.6) * stats.norm.pdf(2.5, n, 1.0)
    asked = quiet_fit(program, {"y": 2.5}, q={"n": "Poisson"})
    assert asked.log_evidence.value == pytest.approx(math.log(p.sum()), abs=0.05)
    assert float(asked.mean("n")) == pytest.approx((p * n).sum() / p.sum(), abs=0.1)
