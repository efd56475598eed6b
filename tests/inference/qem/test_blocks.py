"""Which latents share a particle index, how discrete ones are proposed, what memory does."""

from __future__ import annotations

import pytest
import torch

from ppl import (
    Bernoulli,
    Categorical,
    Dirichlet,
    HalfNormal,
    Markov,
    MultivariateNormal,
    Normal,
    Poisson,
    UnsupportedError,
    dot,
    latent,
    model,
    observe,
    plate,
)
from ppl.inference.particles.blocks import make_blocks
from ppl.inference.qem import QEM
from tests.quiet import quiet_fit


def names(program, options=None, **binding):
    blocks = make_blocks(program.graph(**binding), options or QEM())
    return {b.names: (b.plates, b.enumerated) for b in blocks}


@model
def hierarchy():
    mean, spread = latent("mean", Normal(0.0, 1.0)), latent("spread", HalfNormal(1.0))
    with plate("group", 3):
        level = latent("level", Normal(mean, spread))
        noise = latent("noise", HalfNormal(1.0))
        with plate("row", 4):
            observe("y", Normal(level, noise))


def test_latents_of_one_context_that_meet_share_an_index():
    assert names(hierarchy, sizes={}) == {
        ("mean", "spread"): ((), False),
        ("level", "noise"): (("group",), False),
    }


def test_groups_can_be_given_and_joint_blocks_kept_small():
    assert set(names(hierarchy, QEM(groups=[("mean",), ("spread",)]), sizes={})) == {
        ("mean",),
        ("spread",),
        ("level", "noise"),
    }
    small = names(hierarchy, QEM(joint_up_to=1), sizes={})
    assert ("level",) in small and ("noise",) in small
    assert ("mean", "spread") in small  # outside all plates a block may be larger
    assert all(len(n) == 1 for n in names(hierarchy, QEM(joint_up_to=0), sizes={}))


def test_a_plate_that_is_indexed_or_reduced_shares_one_particle():
    @model
    def mixture():
        weight = latent("weight", Dirichlet(torch.ones(3)))
        with plate("component", 3) as component:
            centre = latent("centre", Normal(0.0, 3.0))
        with plate("point", 5):
            z = latent("z", Categorical(weight, over=component))
            observe("x", Normal(centre[z], 1.0))

    assert names(mixture, sizes={}) == {
        ("weight", "centre"): ((), False),
        ("z",): (("point",), True),
    }

    @model
    def regression():
        with plate("column", 2) as column:
            slope = latent("slope", Normal(0.0, 1.0))
        observe("y", Normal(dot(slope, slope, over=column), 1.0))

    assert names(regression, sizes={}) == {("slope",): ((), False)}


def test_a_chain_keeps_its_plate_and_an_index_of_its_own():
    @model
    def chain():
        drift = latent("drift", Normal(0.0, 1.0))
        with plate("t", 4, ordered=True):
            latent("x", Markov(Normal(0.0, 1.0), lambda before: Normal(before + drift, 1.0)))

    blocks = make_blocks(chain.graph(sizes={}), QEM())
    assert [(b.names, b.plates, b.chain) for b in blocks] == [
        (("drift",), (), None),
        (("x",), ("t",), "t"),
    ]


@model
def contaminated():
    share = latent("share", Normal(0.0, 1.0))
    with plate("point"):
        bad = latent("bad", Bernoulli(logits=share))
        observe("x", Normal(4.0 * bad, 1.0))


def test_sampled_and_enumerated_discrete_latents_agree():
    data = {"x": [0.1, 3.9, 2.0, -0.5, 4.4, 0.3]}
    enumerated = quiet_fit(contaminated, data)
    sampled = quiet_fit(contaminated, data, enumerate_up_to=1)
    assert torch.allclose(enumerated.probs("bad"), sampled.probs("bad"), atol=0.03)
    assert abs(float(enumerated.mean("share") - sampled.mean("share"))) < 0.1
    assert abs(enumerated.log_evidence.value - sampled.log_evidence.value) < 0.1


def test_vectors_of_discrete_values_are_sampled():
    @model
    def switches():
        on = latent("on", Bernoulli(0.5), shape=3)
        observe("y", Normal((on * torch.tensor([1.0, 2.0, 4.0])).sum(), 0.3))

    probs = quiet_fit(switches, {"y": 5.0}).probs("on")[:, 1]
    assert torch.allclose(probs, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64), atol=0.05)


def test_counts_without_a_bound_have_a_proposal_of_their_own_family():
    @model
    def counted():
        n = latent("n", Poisson(4.0))
        observe("y", Normal(n, 1.0))

    values = torch.arange(60.0, dtype=torch.float64)
    log = torch.distributions.Poisson(4.0).log_prob(values) + torch.distributions.Normal(
        values, 1.0
    ).log_prob(torch.tensor(7.0))
    posterior = quiet_fit(counted, {"y": 7.0})
    exact = (log.softmax(0) * values).sum()
    assert abs(float(posterior.mean("n") - exact)) < 0.05
    assert abs(posterior.log_evidence.value - float(log.logsumexp(0))) < 0.05


@model
def wide():
    a, b, c = (latent(n, Normal(0.0, 1.0)) for n in "abc")
    observe("y", Normal(a + b + c, 1.0))


def test_blocks_are_merged_where_no_plate_can_be_split():
    apart = quiet_fit(
        wide, {"y": 1.0}, joint_up_to=0, particles=40, final_particles=40, max_iters=3
    )
    assert len(apart.diagnostics.notes["particles"]) == 3
    merged = quiet_fit(
        wide,
        {"y": 1.0},
        joint_up_to=0,
        particles=40,
        final_particles=40,
        max_iters=3,
        memory="100KiB",
    )
    assert len(merged.diagnostics.notes["particles"]) < 3


def test_a_budget_that_nothing_fits_is_an_error_with_the_remedy():
    with pytest.raises(UnsupportedError, match=r"particles.* memory"):
        quiet_fit(wide, {"y": 1.0}, particles=1000, memory="1KiB")


def test_a_split_plate_gives_the_same_answer():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    whole, split = (
        quiet_fit(
            hierarchy, {"y": y}, particles=30, final_particles=30, max_iters=20, tol=0, memory=m
        )
        for m in (None, "60KiB")
    )
    assert (
        "parts" in split.diagnostics.notes["plan"]
        and "parts" not in whole.diagnostics.notes["plan"]
    )
    # Parts have random streams of their own; that their weights are those of the whole is tested with the memory budget.
    apart = (whole.mean("level") - split.mean("level")).abs() / whole.sd("level")
    assert apart.max() < 0.6


def test_a_family_starts_at_the_prior_where_nothing_else_is_given():
    @model
    def rate():
        level = latent("level", HalfNormal(1.0))
        with plate("day"):
            observe("count", Poisson(level))

    data = {"count": [1, 0, 2]}
    plain, family = (
        quiet_fit(rate, data, start="standard", q=q) for q in (None, {"level": "Gamma"})
    )
    assert abs(float(plain.mean("level") - family.mean("level"))) < 0.03


def test_a_joint_proposal_starts_where_it_is_told():
    @model
    def vector():
        w = latent("w", Normal(0.0, 1.0), shape=2)
        observe("y", Normal(w.sum(), 1.0))

    start = MultivariateNormal(torch.tensor([0.3, 0.3]), 0.5 * torch.eye(2))
    posterior = quiet_fit(vector, {"y": 1.0}, q={"w": start})
    assert torch.allclose(
        posterior.mean("w"), torch.full((2,), 1 / 3, dtype=torch.float64), atol=0.03
    )
