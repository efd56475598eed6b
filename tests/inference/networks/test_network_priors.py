"""Divergences from laws: closed forms against draws, entries that are kept, and laws with latents of their own."""

from __future__ import annotations

import pytest
import torch
from torch import distributions as td

from ppl import (
    HalfNormal,
    Laplace,
    Normal,
    StudentT,
    given,
    latent,
    model,
    nn,
    observe,
    param,
    plate,
)
from ppl.inference.networks.priors import make_priors
from ppl.inference.networks.structure import find_network

X = torch.zeros(3, 2, dtype=torch.float64)


@model
def line(prior=None, **options):
    layer = nn.Linear(2, 3, name="fc", bias=False, prior=prior, **options)
    with plate("row"):
        observe("y", Normal(layer(given("x")).sum(), 1.0))


@model
def learned_scale():
    scale = latent("scale", HalfNormal(1.0))
    layer = nn.Linear(2, 3, name="fc", bias=False, prior=nn.isotropic(scale))
    with plate("row"):
        observe("y", Normal(layer(given("x")).sum(), 1.0))


def law_of(program):
    bound = program.bind({"x": X, "y": torch.zeros(3)})
    network = find_network(bound)
    found = {a.name: p for a, p in zip(network.arrays, make_priors(bound, network), strict=True)}
    return found["fc.weight"], found


LAWS = {
    "normal": (Normal(0.3, 0.7), td.Normal(0.3, 0.7), "normal"),
    "laplace": (Laplace(0.2, 0.5), td.Laplace(0.2, 0.5), "laplace"),
    "mixture": (
        nn.scale_mixture(wide=1.0, narrow=0.2, share=0.3),
        td.MixtureSameFamily(
            td.Categorical(torch.tensor([0.3, 0.7]).double()),
            td.Normal(torch.zeros(2).double(), torch.tensor([1.0, 0.2]).double() / 2**0.5),
        ),
        "entries",
    ),
    "t": (StudentT(4.0, 0.0, 0.5), td.StudentT(4.0, 0.0, 0.5), "entries"),
}


@pytest.mark.parametrize("case", LAWS)
@pytest.mark.parametrize("sparse", [False, True], ids=["all", "kept"])
def test_divergence_is_the_mean_of_log_ratios(case, sparse):
    prior, law, kind = LAWS[case]
    found, _ = law_of(line(prior=prior))
    assert found.kind == kind
    own = torch.tensor([1, 4]) if sparse else None
    k = 2 if sparse else 6
    mean, sd = torch.randn(k).double(), torch.rand(k).double() + 0.2
    q, n = td.Normal(mean, sd), 20000
    draws = q.sample((n,))
    ratios = (q.log_prob(draws) - law.log_prob(draws)).sum(-1)
    some = torch.stack([found.divergence({}, mean, sd, d, own) for d in draws[:2000]])
    error = (ratios.var() / n + some.var() / len(some)).sqrt()
    assert abs(some.mean() - ratios.mean()) < 4 * error
    density = found.density({}, draws[0], own)
    assert torch.allclose(density, law.log_prob(draws[0]).sum())


def test_a_spike_costs_the_log_odds_of_every_weight_that_is_there():
    found, _ = law_of(line(prior=nn.spike_slab(0.25, Normal(0.0, 0.5))))
    assert found.kind == "slab" and found.is_fixed_normal
    own = torch.tensor([0, 3, 5])
    mean, sd = torch.randn(3).double(), torch.rand(3).double() + 0.2
    slab = td.kl_divergence(td.Normal(mean, sd), td.Normal(0.0, 0.5)).sum()
    spike = -3 * torch.tensor(0.25).log() - 3 * torch.tensor(0.75).log()
    total = found.divergence({}, mean, sd, mean, own)
    assert torch.allclose(total, slab + spike.double(), rtol=1e-6)
    assert torch.allclose(slab + found.constant(own), total)
    full = found.divergence({}, mean.repeat(2), sd.repeat(2), mean.repeat(2), None)
    assert torch.allclose(full, 2 * slab - 6 * torch.tensor(0.25).double().log())


def test_a_scale_that_is_a_latent_is_differentiated_by():
    found, others = law_of(learned_scale)
    assert found.kind == "normal" and found.leaves is None and not found.is_fixed_normal
    assert others["scale"].kind == "entries"
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    mean, sd = torch.randn(6).double(), torch.rand(6).double() + 0.2
    total = found.divergence({"scale": scale}, mean, sd, mean, None)
    law = td.Normal(torch.zeros(6).double(), torch.full((6,), 0.7).double())
    assert torch.allclose(total, td.kl_divergence(td.Normal(mean, sd), law).sum())
    (slope,) = torch.autograd.grad(total, scale)
    expected = (6 / 0.7 - (mean.square() + sd.square()).sum() / 0.7**3).double()
    assert torch.allclose(slope, expected)


def test_latents_on_half_lines_have_their_jacobian():
    _, others = law_of(learned_scale)
    u = torch.tensor([-0.4], dtype=torch.float64)
    density = others["scale"].density({}, u, None)
    expected = td.HalfNormal(torch.tensor(1.0).double()).log_prob(u.exp()) + u
    assert torch.allclose(density, expected.sum())


def test_scales_of_single_units_broadcast_in_the_order_of_the_array():
    @model
    def grouped():
        layer = nn.Linear(2, 3, name="fc", bias=False, prior=nn.group_scale(over="in"))
        with plate("row"):
            observe("y", Normal(layer(given("x")).sum(), 1.0))

    bound = grouped.bind({"x": X, "y": torch.zeros(3)})
    network = find_network(bound)
    laws = dict(zip([a.name for a in network.arrays], make_priors(bound, network), strict=True))
    (name,) = [n for n in laws if n != "fc.weight"]
    assert laws["fc.weight"].leaves is None
    scale = torch.tensor([0.5, 2.0]).double()
    mean, sd = torch.randn(6).double(), torch.rand(6).double() + 0.2
    leaves = laws["fc.weight"]._at(laws["fc.weight"]._leaves({name: scale}), None)
    spread = leaves[1].expand(6).view(3, 2)
    assert torch.allclose(spread[0] / spread[0, 0], torch.tensor([1.0, 4.0]).double())
    assert torch.allclose(spread[0], spread[2])
    law = td.Normal(torch.zeros(6).double(), spread.reshape(-1))
    expected = td.kl_divergence(td.Normal(mean, sd), law).sum()
    assert torch.allclose(
        laws["fc.weight"].divergence({name: scale}, mean, sd, mean, None), expected
    )


def test_a_scale_that_is_a_param_is_read_in_every_step():
    @model
    def tuned():
        from torch.distributions import constraints

        scale = param("scale", 0.5, support=constraints.positive)
        layer = nn.Linear(2, 3, name="fc", bias=False, prior=nn.isotropic(scale))
        with plate("row"):
            observe("y", Normal(layer(given("x")).sum(), 1.0))

    found, _ = law_of(tuned)
    assert found.leaves is None
    zero, two = torch.zeros(6).double(), torch.full((6,), 2.0).double()
    total = found.divergence({"scale": two[0]}, zero, two, zero, None)
    assert torch.allclose(total, torch.zeros(()).double())
