"""Markov latents of every family and in every place: one weighting against the sum over all index tuples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit, logsumexp
from torch import Tensor

from ppl import (
    Bernoulli,
    Categorical,
    Gamma,
    LogNormal,
    Markov,
    MultivariateNormal,
    Normal,
    Poisson,
    StudentT,
    given,
    latent,
    model,
    observe,
    plate,
)
from ppl.backend import Settings
from ppl.inference.particles.estep import draw_all, evaluated, weigh
from ppl.inference.qem import QEM, init, prepare
from ppl.streams import Streams

norm = stats.norm.logpdf
Y = np.array([0.7, -0.4, 1.9, 0.2, -1.3, 0.8, 1.1, -0.6])


class Case(NamedTuple):
    program: Any
    data: Mapping[str, Any]
    log_joint: Callable[[Mapping[str, np.ndarray]], float]  # of one value for every element
    options: Mapping[str, Any] = {}


def weighed(case: Case, chain: str = "auto", seed: int = 0, **more: Any):
    """Log evidence and marginals of the code under test, and of the enumeration of the same particles."""
    options = QEM(**{"particles": 2, "chains": chain, **case.options, **more})
    problem = prepare(case.program.bind(case.data), options, Settings(Streams(seed)))
    q = init(problem).q
    drawn = draw_all(problem.weighting, q, problem.settings.streams)
    found = weigh(evaluated(problem, problem.weighting, drawn, q), pairs=())
    return problem, found, enumerated(problem, drawn, case.log_joint)


def enumerated(problem: Any, drawn: Any, log_joint: Any):
    """Every tuple of indices, one after the other."""
    elements, values, cost = [], {}, {}
    for block in problem.blocks:
        k = problem.weighting.sizes[block.axis]
        shape = problem.weighting.block_shape(block)
        for place in np.ndindex(*shape):
            elements.append((block, place, k))
        for member in block.members:
            if block.enumerated:
                values[member.name] = np.broadcast_to(np.arange(float(k)), (*shape, k))
            else:
                values[member.name] = drawn[block.axis].values[member.name].numpy()
        if not block.enumerated:
            cost[block.axis] = drawn[block.axis].log_q.numpy() + math.log(k)
    logs, tuples = [], list(itertools.product(*(range(k) for *_, k in elements)))
    for chosen in tuples:
        z, log = {}, 0.0
        for (block, place, _), i in zip(elements, chosen, strict=True):
            for name in block.names:
                z.setdefault(name, {})[place] = values[name][(*place, i)]
            if block.axis in cost:
                log -= cost[block.axis][(*place, i)]
        logs.append(log + log_joint({n: _stacked(at) for n, at in z.items()}))
    weights = np.exp(np.array(logs) - logsumexp(logs))
    marginals = {}
    for at, (block, place, k) in enumerate(elements):
        shape = problem.weighting.block_shape(block)
        table = marginals.setdefault(block.axis, np.zeros((*shape, k)))
        for chosen, w in zip(tuples, weights, strict=True):
            table[(*place, chosen[at])] += w
    return float(logsumexp(logs)), marginals


def _stacked(at: dict[tuple[int, ...], Any]) -> np.ndarray:
    if () in at:
        return np.asarray(at[()])
    shape = tuple(np.array(list(at)).max(0) + 1)
    flat = np.array([at[p] for p in np.ndindex(*shape)])
    return flat.reshape(*shape, *flat.shape[1:])


# ---- places ---------------------------------------------------------------------------------------------------------


@model
def covid_like():
    """Its first state, noise and dispersion share an index, and every step reads the noise."""
    drift = latent("drift", Normal(0.0, 1.0))
    with plate("region"):
        start, noise = latent("start", Normal(drift, 1.0)), latent("noise", Normal(0.0, 0.5))
        with plate("day", ordered=True):
            step = lambda before: Normal(before + drift + given("push"), noise.exp())  # noqa: E731
            x = latent("x", Markov(Normal(start, noise.exp()), step))
            observe("y", Normal(x, 0.5))


PUSH = Y[:6].reshape(2, 3)


def log_covid_like(z):
    before = np.concatenate([z["start"][:, None], z["x"][:, :-1] + z["drift"] + PUSH[:, 1:]], 1)
    out = norm(z["drift"], 0, 1) + norm(z["start"], z["drift"], 1).sum()
    out += norm(z["noise"], 0, 0.5).sum() + norm(z["x"], before, np.exp(z["noise"])[:, None]).sum()
    return out + norm(Y[:6].reshape(2, 3), z["x"], 0.5).sum()


@model
def time_outside():
    """The same nesting the other way round, with a plate that was declared before."""
    with plate("region"):
        base = latent("base", Normal(0.0, 1.0))
    with plate("day", ordered=True), plate("region"):
        x = latent("x", Markov(Normal(base, 1.0), lambda before: Normal(0.9 * before, 0.5)))
        observe("y", Normal(x, 0.5))


def log_time_outside(z):
    out = (
        norm(z["base"], 0, 1).sum()
        + norm(z["x"][0] if len(z["x"]) == 3 else z["x"][:, 0], z["base"], 1).sum()
    )
    x = z["x"] if len(z["x"]) == 3 else z["x"].T  # [day, region]
    out += norm(x[1:], 0.9 * x[:-1], 0.5).sum()
    return out + norm(Y[:6].reshape(3, 2), x, 0.5).sum()


@model
def siblings():
    """Two ordered plates side by side, a plain plate, and a latent that all of them read."""
    level = latent("level", Normal(0.0, 1.0))
    with plate("day", ordered=True):
        x = latent("x", Markov(Normal(level, 1.0), lambda before: Normal(before, 0.5)))
        observe("y", Normal(x, 0.5))
    with plate("shop"):
        a = latent("a", Normal(level, 2.0))
        observe("v", Normal(a, 1.0))
    with plate("week", ordered=True):
        w = latent(
            "w", Markov(Normal(level, 0.7), lambda before: Normal(level + 0.5 * before, 1.0))
        )
        observe("u", Normal(w, 0.4))


def log_siblings(z):
    out = norm(z["level"], 0, 1) + norm(z["x"][0], z["level"], 1)
    out += norm(z["x"][1:], z["x"][:-1], 0.5).sum() + norm(Y[:3], z["x"], 0.5).sum()
    out += norm(z["a"], z["level"], 2).sum() + norm(Y[3:5], z["a"], 1).sum()
    out += norm(z["w"][0], z["level"], 0.7) + norm(Y[5:8], z["w"], 0.4).sum()
    return out + norm(z["w"][1:], z["level"] + 0.5 * z["w"][:-1], 1).sum()


@model
def coupled():
    """Two chains on one plate that meet in the data and in a transition."""
    rate = latent("rate", Normal(0.0, 0.5))
    with plate("day", ordered=True):
        a = latent("a", Markov(Normal(0.0, 1.0), lambda before: Normal(before + rate, 0.5)))
        b = latent(
            "b", Markov(Normal(1.0, 1.0), lambda before: Normal(0.8 * before + 0.3 * a, 0.7))
        )
        observe("y", Normal(a + b, 0.6))


def log_coupled(z):
    a, b = z["a"], z["b"]
    out = norm(z["rate"], 0, 0.5) + norm(a[0], 0, 1) + norm(a[1:], a[:-1] + z["rate"], 0.5).sum()
    out += norm(b[0], 1, 1) + norm(b[1:], 0.8 * b[:-1] + 0.3 * a[1:], 0.7).sum()
    return out + norm(Y[:3], a + b, 0.6).sum()


@model
def switching():
    """An enumerated chain that governs a sampled one, with a plate below every day."""
    with plate("day", ordered=True):
        move = lambda on: Bernoulli(logits=2.0 * on - 1.0)  # noqa: E731
        on = latent("on", Markov(Bernoulli(0.3), move))
        x = latent("x", Markov(Normal(0.0, 1.0), lambda before: Normal(before + on, 0.5)))
        with plate("sensor"):
            bias = latent("bias", Normal(0.0, 0.2))
            observe("y", Normal(x + bias, 0.6))


def log_switching(z):
    on, x = z["on"], z["x"]
    odds = 2.0 * on[:-1] - 1.0
    out = stats.bernoulli.logpmf(on[0], 0.3) + (on[1:] * odds - np.logaddexp(0, odds)).sum()
    out += (
        norm(x[0], 0, 1) + norm(x[1:], x[:-1] + on[1:], 0.5).sum() + norm(z["bias"], 0, 0.2).sum()
    )
    return out + norm(Y[:4].reshape(2, 2), x[:, None] + z["bias"], 0.6).sum()


@model
def gaps():
    """Entries are missing in the middle and at the end."""
    sd = latent("sd", LogNormal(0.0, 0.5))
    with plate("day", ordered=True):
        x = latent("x", Markov(Normal(0.0, 1.0), lambda before: Normal(before, sd)))
        observe("y", Normal(x, 0.5))


def log_gaps(z):
    out = stats.lognorm.logpdf(z["sd"], 0.5) + norm(z["x"][0], 0, 1)
    out += norm(z["x"][1:], z["x"][:-1], z["sd"]).sum()
    return out + norm(Y[[0, 2]], z["x"][[0, 2]], 0.5).sum()


def chain_of(first: Any, step: Any, see: Any):
    @model
    def series():
        with plate("day", ordered=True):
            x = latent("x", Markov(first, step))
            observe("y", see(x))

    return series


def log_of(first: Any, step: Any, see: Any):
    def log_joint(z):
        x = z["x"]
        out = first(x[0]) + see(x).sum()
        return out + sum(float(step(b, a)) for b, a in itertools.pairwise(x))

    return log_joint


DRIFT, SPREAD = np.array([[1.0, 0.4], [0.0, 0.9]]), np.array([[0.5, 0.1], [0.1, 0.3]])
START = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
ROWS = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
POISSON = stats.poisson.logpmf
Y3 = {"y": Y[:3]}
AT = torch.as_tensor


def seen(x: Any) -> Normal:
    return Normal(x, 0.8)


def log_seen(x):
    return norm(Y[: len(x)], x, 0.8)


FAMILIES = {
    "LogNormal": Case(
        chain_of(LogNormal(0.0, 0.5), lambda b: LogNormal(0.5 * b.log(), 0.3), seen),
        Y3,
        log_of(
            lambda x: stats.lognorm.logpdf(x, 0.5),
            lambda b, x: stats.lognorm.logpdf(x, 0.3, scale=b**0.5),
            log_seen,
        ),
    ),
    "Gamma": Case(
        chain_of(Gamma(2.0, 1.0), lambda b: Gamma(3.0, 3.0 / b), seen),
        Y3,
        log_of(
            lambda x: stats.gamma.logpdf(x, 2),
            lambda b, x: stats.gamma.logpdf(x, 3, scale=b / 3),
            log_seen,
        ),
    ),
    "StudentT": Case(
        chain_of(StudentT(4.0, 0.0, 1.0), lambda b: StudentT(3.0, b, 0.5), seen),
        Y3,
        log_of(lambda x: stats.t.logpdf(x, 4), lambda b, x: stats.t.logpdf(x, 3, b, 0.5), log_seen),
    ),
    "MultivariateNormal": Case(
        chain_of(
            MultivariateNormal(torch.zeros(2), covariance_matrix=torch.eye(2)),
            lambda b: MultivariateNormal(AT(DRIFT) @ b, covariance_matrix=AT(SPREAD)),
            lambda x: Normal(x[0], 0.8),
        ),
        Y3,
        log_of(
            lambda x: norm(x, 0, 1).sum(),
            lambda b, x: stats.multivariate_normal(DRIFT @ b, SPREAD).logpdf(x),
            lambda x: norm(Y[:3], x[:, 0], 0.8),
        ),
    ),
    "Bernoulli": Case(
        chain_of(Bernoulli(0.3), lambda b: Bernoulli(logits=2.0 * b - 1.0), seen),
        Y3,
        log_of(
            lambda x: stats.bernoulli.logpmf(x, 0.3),
            lambda b, x: stats.bernoulli.logpmf(x, expit(2.0 * b - 1.0)),
            log_seen,
        ),
    ),
    "Categorical": Case(
        chain_of(Categorical(START), lambda b: Categorical(AT(ROWS)[b]), seen),
        Y3,
        log_of(
            lambda x: np.log([0.2, 0.5, 0.3])[int(x)],
            lambda b, x: np.log(ROWS)[int(b), int(x)],
            log_seen,
        ),
    ),
    "Categorical, sampled": Case(
        chain_of(Categorical(START), lambda b: Categorical(AT(ROWS)[b]), seen),
        Y3,
        log_of(
            lambda x: np.log([0.2, 0.5, 0.3])[int(x)],
            lambda b, x: np.log(ROWS)[int(b), int(x)],
            log_seen,
        ),
        {"enumerate_up_to": 2},
    ),
    "Poisson": Case(
        chain_of(Poisson(2.0), lambda b: Poisson(0.5 + 0.8 * b), seen),
        Y3,
        log_of(lambda x: POISSON(x, 2.0), lambda b, x: POISSON(x, 0.5 + 0.8 * b), log_seen),
    ),
}

PLACES = {
    "region and day": Case(
        covid_like,
        {"y": Y[:6].reshape(2, 3), "push": PUSH},
        log_covid_like,
        {"groups": [("start", "noise")]},
    ),
    "region and day, independent over time": Case(
        covid_like,
        {"y": Y[:6].reshape(2, 3), "push": PUSH},
        log_covid_like,
        {"groups": [("start", "noise")], "joint_up_to": 0, "start": "standard"},
    ),
    "day outside region": Case(time_outside, {"y": Y[:6].reshape(3, 2)}, log_time_outside),
    "sibling plates": Case(siblings, {"y": Y[:3], "v": Y[3:5], "u": Y[5:8]}, log_siblings),
    "coupled chains": Case(coupled, {"y": Y[:3]}, log_coupled),
    "enumerated and sampled": Case(switching, {"y": Y[:4].reshape(2, 2)}, log_switching),
    "gaps": Case(gaps, {"y": [Y[0], math.nan, Y[2], math.nan]}, log_gaps),
    "one element": Case(
        covid_like,
        {"y": Y[:2].reshape(2, 1), "push": PUSH[:, :1]},
        lambda z: (
            norm(z["drift"], 0, 1)
            + norm(z["start"], z["drift"], 1).sum()
            + norm(z["noise"], 0, 0.5).sum()
            + norm(z["x"][:, 0], z["start"], np.exp(z["noise"])).sum()
            + norm(Y[:2], z["x"][:, 0], 0.5).sum()
        ),
    ),
}


@pytest.mark.parametrize("chain", ["scan", "tree", "whole paths"])
@pytest.mark.parametrize("name", [*PLACES, *FAMILIES])
def test_evidence_and_marginals_equal_enumeration(name, chain):
    case = {**PLACES, **FAMILIES}[name]
    whole = chain == "whole paths"
    problem, found, (log_z, marginals) = weighed(
        case, "auto" if whole else chain, paths_up_to=24 if whole else 0
    )
    assert float(found.log_z) == pytest.approx(log_z, abs=1e-9)
    for axis, expected in marginals.items():
        np.testing.assert_allclose(found.marginals[axis].numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("name", ["Bernoulli", "Categorical"])
def test_enumerated_chains_have_the_evidence_of_all_paths(name):
    _, found, (log_z, _) = weighed(FAMILIES[name])
    case, k = FAMILIES[name], 2 if name == "Bernoulli" else 3
    paths = itertools.product(range(k), repeat=3)
    exact = logsumexp([case.log_joint({"x": np.array(p, dtype=float)}) for p in paths])
    assert float(found.log_z) == pytest.approx(float(exact), abs=1e-10)
    assert log_z == pytest.approx(float(exact), abs=1e-10)


def test_scan_and_tree_have_the_same_gradients():
    case = PLACES["region and day"]
    values = []
    for chain in ("scan", "tree"):
        options = QEM(particles=5, chains=chain, paths_up_to=0, **case.options)
        problem = prepare(case.program.bind(case.data), options, Settings(Streams(3)))
        q = init(problem).q
        drawn = draw_all(problem.weighting, q, Streams(3))
        pairs = [("k:x'", "k:x")]
        values.append(weigh(evaluated(problem, problem.weighting, drawn, q), pairs=pairs))
    scan, tree = values
    assert float(scan.log_z) == pytest.approx(float(tree.log_z), abs=1e-10)
    for axis, w in scan.marginals.items():
        torch.testing.assert_close(w, tree.marginals[axis], rtol=0, atol=1e-10)
    pair: Tensor = scan.joint["k:x'", "k:x"]
    torch.testing.assert_close(pair, tree.joint["k:x'", "k:x"], rtol=0, atol=1e-10)
    torch.testing.assert_close(pair.sum(-2), scan.marginals["k:x"][:, 1:], rtol=0, atol=1e-10)


def test_latents_around_a_chain_share_an_index_without_being_asked():
    """Each axis of its own would ride through every step of the sum over paths."""

    @model
    def several():
        with plate("region"):
            start, noise = latent("start", Normal(0.0, 1.0)), latent("noise", Normal(0.0, 0.5))
            spread = latent("spread", Normal(0.0, 1.0))
            with plate("day", ordered=True):
                x = latent("x", Markov(Normal(start, 1.0), lambda b: Normal(b, noise.exp())))
                observe("y", Normal(x, spread.exp()))

    bound = several.bind({"y": Y[:6].reshape(2, 3)})
    problem = prepare(bound, QEM(paths_up_to=0), Settings(Streams(0)))
    assert {b.names for b in problem.blocks} == {("start", "noise", "spread"), ("x",)}


def test_many_short_chains_have_whole_paths():
    """One chain can afford many particles a state; a start at the prior says too little of whole paths."""
    case = PLACES["region and day"]
    bound = case.program.bind(case.data)

    def found(**options: Any) -> set[tuple[str, ...]]:
        return {b.names for b in prepare(bound, QEM(**options), Settings(Streams(0))).blocks}

    assert ("start", "noise", "x") in found()
    assert ("x",) in found(paths_up_to=2)
    assert ("x",) in found(start="prior")
    alone = PLACES["gaps"].program.bind(PLACES["gaps"].data)
    chains = [b.chain for b in prepare(alone, QEM(), Settings(Streams(0))).blocks]
    assert "day" in chains
