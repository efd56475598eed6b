"""Gates above the slab: against brute-force enumeration where the linear map is the identity and VAMP is exact."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ppl import (
    Bernoulli,
    Markov,
    Normal,
    SpikeSlab,
    dot,
    given,
    infer,
    latent,
    model,
    observe,
    param,
    plate,
)
from ppl.inference.amp.problem import make_model
from ppl.inference.amp.structure import exchange

# Seven elements believed wider than their messages: VAMP keeps old messages and says so.
pytestmark = pytest.mark.filterwarnings("ignore:amp.*refused")
SD, NOISE = 1.3, 0.4
EXACT = {"method": "amp", "variant": "vamp", "tolerance": 1e-10, "turbo": 1.0}


@model
def grouped():
    group = plate("group")
    coef = plate("coef", within=group)
    with group:
        on = latent("on", Bernoulli(0.3))
    with coef:
        x = latent("x", SpikeSlab(on, slab=Normal(0.2, SD)))
        observe("y", Normal(x, NOISE))


@model
def sparse_grouped():
    group = plate("group")
    coef = plate("coef", within=group)
    with group:
        on = latent("on", Bernoulli(0.3))
    with coef:
        x = latent("x", SpikeSlab(on * 0.6, slab=Normal(0.2, SD)))
        observe("y", Normal(x, NOISE))


@model
def chained():
    with plate("coef", ordered=True):
        stay, go = torch.tensor(0.85), torch.tensor(0.1)
        on = latent(
            "on",
            Markov(
                init=Bernoulli(0.2), step=lambda prev: Bernoulli(torch.where(prev == 1, stay, go))
            ),
        )
        x = latent("x", SpikeSlab(on, slab=Normal(0.2, SD)))
        observe("y", Normal(x, NOISE))


@model
def multiplied():
    with plate("coef"):
        on = latent("on", Bernoulli(0.3))
        w = latent("w", Normal(0.2, SD))
        observe("y", Normal(on * w, NOISE))


@model
def scaled():
    group = plate("group")
    coef = plate("coef", within=group)
    with group:
        on = latent("on", Bernoulli(0.3))
    with coef:
        x = latent("x", Normal(0.2 * on, torch.where(on == 1, SD, 0.05)))
        observe("y", Normal(x, NOISE))


@model
def tree():
    """A group bit above a bit of every member."""
    group = plate("group")
    coef = plate("coef", within=group)
    with group:
        top = latent("top", Bernoulli(0.4))
    with coef:
        on = latent("on", Bernoulli(0.05 + 0.7 * top))
        x = latent("x", SpikeSlab(on, slab=Normal(0.2, SD)))
        observe("y", Normal(x, NOISE))


Y = torch.tensor([0.1, -0.2, 1.9, -1.4, 0.6, 0.5, -2.2], dtype=torch.float64)
MEMBER = torch.tensor([0, 0, 0, 1, 1, 2, 2])


def log_normal(x, mean, variance):
    return -0.5 * ((x - mean) ** 2 / variance + torch.log(2 * math.pi * torch.as_tensor(variance)))


def enumerated(prior, slab):
    """Evidence, P(gate on) and E[x], by a sum over all joint values of the gates.

    ``prior(bits)`` is a log-probability; ``slab(bits)`` gives mean and variance ``[n]`` of ``x`` and a mask of what
    is not exactly zero.
    """
    gates = prior.count
    logs, means, all_bits = [], [], []
    for bits in itertools.product((0, 1), repeat=gates):
        b = torch.tensor(bits, dtype=torch.float64)
        mean, variance = slab(b)
        logs.append(prior(b) + log_normal(Y, mean, variance + NOISE**2).sum())
        means.append(mean + variance / (variance + NOISE**2) * (Y - mean))
        all_bits.append(b)
    logs = torch.stack(logs)
    weight = logs.softmax(0)
    return logs.logsumexp(0), weight @ torch.stack(all_bits), weight @ torch.stack(means)


class Prior:
    def __init__(self, count, log_prob):
        self.count, self.log_prob = count, log_prob

    def __call__(self, bits):
        return self.log_prob(bits)


def bernoulli(p):
    return lambda b: (b * math.log(p) + (1 - b) * math.log(1 - p)).sum()


def markov(b):
    p = torch.cat([torch.tensor([0.2], dtype=torch.float64), torch.where(b[:-1] == 1, 0.85, 0.1)])
    return (b * p.log() + (1 - b) * (1 - p).log()).sum()


def tree_prior(b):
    top, on = b[:3], b[3:]
    p = 0.05 + 0.7 * top[MEMBER]
    return bernoulli(0.4)(top) + (on * p.log() + (1 - on) * (1 - p).log()).sum()


def sparse(bits):
    return 0.2 * bits, SD**2 * bits


def two_scales(on):
    return 0.2 * on, torch.where(on == 1, SD, 0.05) ** 2


CASES = {
    "groups": (grouped, Prior(3, bernoulli(0.3)), lambda b: sparse(b[MEMBER])),
    "chain": (chained, Prior(7, markov), sparse),
    "two scales": (scaled, Prior(3, bernoulli(0.3)), lambda b: two_scales(b[MEMBER])),
    "tree": (tree, Prior(10, tree_prior), lambda b: sparse(b[3:])),
}


def fitted(program, **options):
    data = {"y": Y}
    if "group" in program.graph().plates:
        data["group"] = MEMBER
    return infer(program, data, **(EXACT | options))


@pytest.mark.parametrize("name", CASES)
def test_posterior_equals_the_sum_over_all_gates(name):
    program, prior, slab = CASES[name]
    evidence, on, mean = enumerated(prior, slab)
    posterior = fitted(program)
    bits = torch.cat(
        [posterior.probs(g)[..., 1] for g in ("top", "on") if g in posterior.marginals]
    )
    torch.testing.assert_close(bits, on, atol=1e-7, rtol=0)
    torch.testing.assert_close(posterior.mean("x"), mean, atol=1e-7, rtol=0)
    assert posterior.log_evidence.kind == "Bethe"
    assert posterior.log_evidence.value == pytest.approx(float(evidence), abs=1e-6)


def test_members_of_a_sparse_group_have_bits_of_their_own():
    def prior(b):
        on, own = b[:3], b[3:]
        p = 0.6 * on[MEMBER]
        return bernoulli(0.3)(on) + torch.where(own == 1, p.log(), (1 - p).log()).sum()

    evidence, bits, mean = enumerated(Prior(10, prior), lambda b: sparse(b[3:]))
    posterior = fitted(sparse_grouped)
    torch.testing.assert_close(posterior.probs("on")[:, 1], bits[:3], atol=1e-8, rtol=0)
    torch.testing.assert_close(posterior.inclusion("x"), bits[3:], atol=1e-8, rtol=0)
    torch.testing.assert_close(posterior.mean("x"), mean, atol=1e-8, rtol=0)
    assert posterior.log_evidence.value == pytest.approx(float(evidence), abs=1e-6)


def test_a_gate_times_a_normal_is_a_spike_and_slab_whose_factor_keeps_its_prior():
    _, on, mean = enumerated(Prior(7, bernoulli(0.3)), sparse)
    posterior = fitted(multiplied)
    torch.testing.assert_close(posterior.probs("on")[:, 1], on, atol=1e-8, rtol=0)
    draws = posterior.samples(20_000, seed=1)
    product = draws["on"] * draws["w"]
    se = product.std(0) / math.sqrt(20_000)
    assert bool(((product.mean(0) - mean).abs() < 5 * se).all())
    off = draws["w"][draws["on"] == 0]
    assert abs(float(off.mean()) - 0.2) < 5 * SD / math.sqrt(len(off))
    assert float(off.std()) == pytest.approx(SD, rel=0.05)


def test_joint_draws_of_a_chain_have_its_pair_probabilities():
    logs, pairs = [], []
    for bits in itertools.product((0, 1), repeat=7):
        b = torch.tensor(bits, dtype=torch.float64)
        mean, variance = sparse(b)
        logs.append(markov(b) + log_normal(Y, mean, variance + NOISE**2).sum())
        pairs.append(b[:-1] * b[1:])
    expected = torch.stack(logs).softmax(0) @ torch.stack(pairs)
    on = fitted(chained).samples(20_000, seed=3)["on"]
    found = (on[:, :-1] * on[:, 1:]).mean(0)
    se = (expected * (1 - expected) / 20_000).sqrt()
    assert bool(((found - expected).abs() < 5 * se + 1e-6).all())


def test_a_chain_learns_its_transitions_by_the_gradient():
    n = 3000
    generator = torch.Generator().manual_seed(5)
    u, on = torch.rand(n, generator=generator), torch.zeros(n, dtype=torch.float64)
    for i in range(1, n):
        on[i] = u[i] < (0.9 if on[i - 1] else 0.05)
    noise = torch.randn(2, n, generator=generator, dtype=torch.float64)

    @model
    def learning():
        unit = torch.distributions.constraints.unit_interval
        stay, go = param("stay", 0.6, support=unit), param("go", 0.3, support=unit)
        with plate("coef", ordered=True):
            gate = latent(
                "on",
                Markov(
                    init=Bernoulli(0.2),
                    step=lambda prev: Bernoulli(torch.where(prev == 1, stay, go)),
                ),
            )
            x = latent("x", SpikeSlab(gate, slab=Normal(0.0, 3.0)))
            observe("y", Normal(x, 0.3))

    y = 3.0 * on * noise[0] + 0.3 * noise[1]
    posterior = infer(learning, {"y": y}, method="amp", variant="vamp")
    assert float(posterior.params["stay"]) == pytest.approx(0.9, abs=0.03)
    assert float(posterior.params["go"]) == pytest.approx(0.05, abs=0.015)


def test_cavities_leave_out_the_own_evidence_and_survive_saturation():
    bound = grouped.bind({"y": Y, "group": MEMBER})
    structure = make_model(bound, 1, None).structure
    evidence = torch.zeros(1, 1, 7, 2, dtype=torch.float64)
    evidence[0, 0, :3, 1] = torch.tensor([2000.0, -1990.0, 7.0]).double()
    found = exchange(structure, {}, [evidence], sweep=100)
    odds = found.cavity[0][0, 0, :, 1] - found.cavity[0][0, 0, :, 0]
    prior = math.log(0.3 / 0.7)
    expected = [-1983.0 + prior, 2007.0 + prior, 10.0 + prior, prior, prior, prior, prior]
    wanted = torch.tensor(expected, dtype=torch.float64).clamp(-30, 30)
    torch.testing.assert_close(odds, wanted, atol=1e-9, rtol=0)


def test_large_groups_let_their_evidence_in_slowly():
    bound = grouped.bind({"y": Y, "group": MEMBER})
    structure = make_model(bound, 1, None).structure
    evidence = torch.zeros(1, 1, 7, 2, dtype=torch.float64)
    evidence[..., 1] = 3.0
    odds = []
    for sweep in (0, 5, 10, 100):
        cavity = exchange(structure, {}, [evidence], sweep=sweep).cavity[0]
        odds.append(float(cavity[0, 0, 0, 1] - cavity[0, 0, 0, 0]) - math.log(0.3 / 0.7))
    assert odds[0] == pytest.approx(
        6.0 / 3
    )  # two other members of three, a third of the evidence each
    assert odds[0] < odds[1] < odds[2] == pytest.approx(6.0)
    assert odds[3] == odds[2]


def group_regression(size):
    @model
    def regression():
        group = plate("group")
        coef = plate("coef", within=group)
        row = plate("row")
        rho, sd, noise = param("rho", 0.3), param("sd", 1.0), param("noise", 0.1)
        with group:
            on = latent("on", Bernoulli(rho))
        with coef:
            x = latent("x", SpikeSlab(on, slab=Normal(0.0, sd)))
        with row, coef:
            a = given("a")
        with row:
            observe("y", Normal(dot(a, x, over=coef), noise))

    n, m = 2000, 300
    generator = torch.Generator().manual_seed(size)
    bits = torch.zeros(n // size)
    bits[torch.randperm(n // size, generator=generator)[: n // size // 10]] = 1.0
    bits = bits.repeat_interleave(size)
    x = torch.randn(n, generator=generator, dtype=torch.float64) * bits
    a = torch.randn(m, n, generator=generator, dtype=torch.float64) / math.sqrt(m)
    z = a @ x
    noise = math.sqrt(float(z.square().mean()) * 1e-3)
    y = z + noise * torch.randn(m, generator=generator, dtype=torch.float64)
    return regression, {"a": a, "y": y, "group": torch.arange(n) // size}, x


def nmse_db(estimate, truth):
    return 10 * math.log10(float((estimate - truth).square().sum() / truth.square().sum()))


@pytest.mark.parametrize("size", [4, 10])
def test_groups_recover_what_single_coefficients_cannot(size):
    """n = 2000, m = 300, 30 dB, nothing known."""
    program, data, x = group_regression(size)
    posterior = infer(program, data, method="amp", start="data")
    assert nmse_db(posterior.mean("x"), x) < -25
    assert posterior.probs("on").shape == (2000 // size, 2)
