"""Hidden Markov models: states summed exactly, whatever the continuous numbers beside them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

from ppl import (
    Categorical,
    Markov,
    ModelError,
    Normal,
    UnsupportedError,
    infer,
    latent,
    mean,
    model,
    observe,
    plate,
)
from ppl.backend import Settings
from ppl.inference.particles.estep import draw_all, evaluated, weigh
from ppl.inference.qem import QEM, init, prepare
from ppl.streams import Streams
from tests.smoothers import forward_backward, normal_log_likelihood

START = np.array([0.5, 0.3, 0.2])
ROWS = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.3, 0.6]])
Y = np.array([0.1, -0.3, 1.2, 1.9, 2.3, math.nan, 0.2, 0.9, 1.1, 2.0])


def states(y, places, sd):
    return forward_backward(START, ROWS, normal_log_likelihood(y, places, sd))


@model
def fixed():
    rows, places = torch.as_tensor(ROWS), torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    with plate("t", ordered=True):
        z = latent(
            "z", Markov(Categorical(START.tolist()), lambda before: Categorical(rows[before]))
        )
        observe("y", Normal(places[z], 0.5))


@model
def free():
    rows = torch.as_tensor(ROWS)
    shift, spread = latent("shift", Normal(0.0, 1.0)), latent("spread", Normal(-0.5, 0.3))
    with plate("t", ordered=True):
        z = latent(
            "z", Markov(Categorical(START.tolist()), lambda before: Categorical(rows[before]))
        )
        observe("y", Normal(shift + z, spread.exp()))


def test_a_model_without_continuous_latents_is_exact():
    posterior = infer(fixed, {"y": Y}, method="qem", seed=0)
    exact = states(Y, [0.0, 1.0, 2.0], 0.5)
    assert posterior.log_evidence.value == pytest.approx(exact.log_evidence, abs=1e-10)
    np.testing.assert_allclose(posterior.probs("z").numpy(), exact.single, atol=1e-10)
    draws = posterior.samples(4000)["z"].long()
    pairs = np.zeros((3, 3))
    np.add.at(pairs, (draws[:, 2].numpy(), draws[:, 3].numpy()), 1 / 4000)
    assert np.abs(pairs - exact.pairs[2]).max() < 4 * 0.5 / math.sqrt(4000)


@pytest.mark.parametrize("chains", ["scan", "tree"])
def test_every_particle_of_the_rest_has_the_evidence_of_the_forward_algorithm(chains):
    problem = prepare(free.bind({"y": Y}), QEM(particles=6, chains=chains), Settings(Streams(2)))
    q = init(problem).q
    drawn = draw_all(problem.weighting, q, Streams(2))
    found = weigh(evaluated(problem, problem.weighting, drawn, q))
    (axis,) = drawn
    shift, spread = (drawn[axis].values[n].numpy() for n in ("shift", "spread"))
    logs, tables = [], []
    for a, b, log_q in zip(shift, spread, drawn[axis].log_q.numpy(), strict=True):
        log, table, _ = states(Y, [a, a + 1, a + 2], math.exp(b))
        prior = stats.norm.logpdf(a) + stats.norm.logpdf(b, -0.5, 0.3)
        logs.append(log + prior - log_q - math.log(6))
        tables.append(table)
    weights = np.exp(np.array(logs) - logsumexp(logs))
    assert float(found.log_z) == pytest.approx(float(logsumexp(logs)), abs=1e-10)
    np.testing.assert_allclose(found.marginals[axis].numpy(), weights, atol=1e-10)
    np.testing.assert_allclose(
        found.marginals["k:z"].numpy(), np.tensordot(weights, np.array(tables), 1), atol=1e-10
    )


def test_continuous_numbers_beside_the_chain_agree_with_a_grid():
    posterior = infer(free, {"y": Y}, method="qem", seed=0)
    shifts, spreads = np.linspace(-3, 3, 61), np.linspace(-1.9, 0.9, 41)
    logs = np.array(
        [
            [
                states(Y, [a, a + 1, a + 2], math.exp(b)).log_evidence
                + stats.norm.logpdf(a)
                + stats.norm.logpdf(b, -0.5, 0.3)
                for b in spreads
            ]
            for a in shifts
        ]
    )
    cell = (shifts[1] - shifts[0]) * (spreads[1] - spreads[0])
    log = logsumexp(logs) + math.log(cell)
    weights = np.exp(logs - logsumexp(logs))
    mean = weights.sum(1) @ shifts
    sd = math.sqrt(weights.sum(1) @ (shifts - mean) ** 2)
    assert posterior.log_evidence.value == pytest.approx(log, abs=0.02)
    assert float(posterior.mean("shift")) == pytest.approx(mean, abs=0.05 * sd)
    assert float(posterior.sd("shift")) == pytest.approx(sd, rel=0.05)


def test_a_chain_that_is_read_across_time_is_refused_in_words():
    @model
    def summed():
        with plate("t", ordered=True):
            z = latent("z", Markov(Normal(0.0, 1.0), lambda before: Normal(before, 1.0)))
        observe("y", Normal(mean(z, over="t"), 1.0))

    with pytest.raises(UnsupportedError, match="'z' is a Markov chain along 't', but a factor"):
        infer(summed, {"y": 0.3}, sizes={"t": 4}, method="qem")


def test_a_longer_memory_is_refused_with_the_remedy():
    with pytest.raises(ModelError, match="order=2 is not supported.*vector that remembers"):
        Markov(Normal(0.0, 1.0), lambda before: Normal(before, 1.0), order=2)


def test_series_within_groups_are_refused_with_the_remedy():
    @model
    def ragged():
        with plate("day", within=plate("shop"), ordered=True):
            latent("x", Markov(Normal(0.0, 1.0), lambda before: Normal(before, 1.0)))

    with pytest.raises(ModelError, match="lies within 'shop'.*Make a grid"):
        ragged.sample(1, {"shop": [0, 0, 1]})


def test_series_of_different_lengths_are_a_grid_with_gaps():
    """What lies behind the end of a short series says nothing of the others."""

    @model
    def panel():
        with plate("shop"):
            with plate("day", ordered=True):
                z = latent(
                    "z",
                    Markov(
                        Categorical(START.tolist()), lambda b: Categorical(torch.as_tensor(ROWS)[b])
                    ),
                )
                observe("y", Normal(1.0 * z, 0.5))

    y = np.stack([Y, np.where(np.arange(10) < 4, Y, math.nan)])
    posterior = infer(panel, {"y": y}, method="qem", seed=0)
    places = [0.0, 1.0, 2.0]
    whole, part = states(Y, places, 0.5), states(Y[:4], places, 0.5)
    assert posterior.log_evidence.value == pytest.approx(whole[0] + part[0], abs=1e-10)
    np.testing.assert_allclose(posterior.probs("z")[1, :4].numpy(), part[1], atol=1e-10)
