"""Acceptance tests 1 to 3: evidence, weights and draws against the enumeration of all index tuples."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from tests.inference.qem.acceptance import enumeration as en
from tests.inference.qem.acceptance.structures import STRUCTURES
from tests.inference.qem.acceptance.weighing import e_step

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
# Particles of the blocks in the order of the latents: all different where there are few enough.
UNEQUAL = {
    "chain": {"a": 3, "b": 1, "c": 4},
    "fork": {"a": 4, "b": 2, "c": 3},
    "collider": {"a": 3, "b": 5, "c": 2},
    "block with parents": {"a": 3, "e": 4, "b": 2},
    "nested plates": {"mean": 4, "level": 3, "x": 2},
    "sibling plates": {"mean": 4, "a": 3, "b": 2},
    "latent after a plate": {"mean": 4, "a": 3, "later": 5, "b": 2},
    "plate without latents": {"mean": 3, "spread": 4},
    "latents without children": {"mean": 4, "alone": 2, "leaf": 3, "inner": 5},
    "series, init alone": {"first": 2, "noise": 4, "x": 3},
    "series, init in a shared block": {"first": 4, "x": 3},
    "series, T = 1": {"first": 4, "x": 3},
    "series in a plate": {"drift": 3, "first": 4, "x": 2},
    "discrete latents": {"share": 4, "x": 3},
}
every_structure = pytest.mark.parametrize("name", STRUCTURES)


def check_evidence(name, particles, joint=False):
    for seed in (0, 1):
        at = e_step(STRUCTURES[name], particles, joint=joint, seed=seed)
        found, _ = at.marginals()
        np.testing.assert_allclose(found, logsumexp(at.log), **CLOSE)
        np.testing.assert_allclose(float(at.plan.log_evidence(at.factors)), found, **CLOSE)


@every_structure
def test_01_enumeration_with_unequal_particles(name):
    check_evidence(name, UNEQUAL[name])


@every_structure
def test_01_enumeration_with_one_particle(name):
    check_evidence(name, 1)


@every_structure
def test_01_enumeration_with_three_of_one_and_one_of_the_others(name):
    for first in UNEQUAL[name]:
        check_evidence(name, dict.fromkeys(UNEQUAL[name], 1) | {first: 3})


@pytest.mark.parametrize(
    "name",
    ["block with parents", "sibling plates", "nested plates", "series, init alone",
     "series, init in a shared block", "series, T = 1", "series in a plate"],
)  # fmt: skip
def test_01_enumeration_with_joint_proposals(name):
    """Full covariances, and states of series given the ones before: their density is a mixture."""
    check_evidence(name, UNEQUAL[name], joint=True)


def test_01_the_tuples_of_a_shared_first_state_are_not_those_of_tied_states():
    """The wrong estimator that ties the state before to the block's index is told apart."""
    at = e_step(STRUCTURES["series, init in a shared block"], {"first": 3, "x": 3})
    block, x = (next(a for a, axis in at.axes.items() if n in axis.names) for n in ("first", "x"))
    tied = (at.index[x][:, :-1] == at.index[block][:, None]).all(1)
    found, _ = at.marginals()
    assert abs(found - logsumexp(at.log[tied])) > 0.01


# ---- 2: weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("particles", ["unequal", "one"])
@every_structure
def test_02_weights_sum_to_one_and_equal_enumeration(name, particles):
    at = e_step(STRUCTURES[name], UNEQUAL[name] if particles == "unequal" else 1)
    _, found = at.marginals()
    assert set(found) == set(at.axes)
    for axis, w in found.items():
        assert (w >= 0).all()
        np.testing.assert_allclose(w.sum(-1), 1.0, **CLOSE)
        np.testing.assert_allclose(
            w, en.marginal(at.axes[axis], at.index[axis], at.weights), **CLOSE
        )


def pairs_of(axes):
    """Pairs of axes, the one in fewer plates first; those of sibling plates have no joint weights."""
    for a, b in itertools.permutations(axes, 2):
        outer, inner = axes[a].plates, axes[b].plates
        if outer == inner[: len(outer)] and (outer != inner or a < b):
            yield a, b


SIBLINGS = {("sibling plates", "a", "b"), ("latent after a plate", "a", "b")}


@every_structure
def test_02_joint_weights_equal_enumeration_and_have_the_singles_as_margins(name):
    at = e_step(STRUCTURES[name], UNEQUAL[name])
    pairs = [
        (a, b)
        for a, b in pairs_of(at.axes)
        if (name, at.axes[a].names[0], at.axes[b].names[0]) not in SIBLINGS
    ]
    assert pairs
    _, found = at.plan.marginals(at.factors, joint=pairs)
    for a, b in pairs:
        joint, first, second = (found[k].numpy() for k in ((a, b), a, b))
        want = en.pair_marginal(at.axes[a], at.index[a], at.axes[b], at.index[b], at.weights)
        np.testing.assert_allclose(joint, want, **CLOSE)
        np.testing.assert_allclose(joint.sum(-2), second, **CLOSE)
        missing = len(at.axes[b].plates) - len(at.axes[a].plates)
        spread = first.reshape(*first.shape[:-1], *(1,) * missing, first.shape[-1])
        np.testing.assert_allclose(
            joint.sum(-1), np.broadcast_to(spread, joint.shape[:-1]), **CLOSE
        )


@every_structure
def test_02_moments_from_weights_equal_those_of_injected_sources(name):
    """The derivative of log Z by s, where s f(z) is added to the log-factors, is E f."""
    at = e_step(STRUCTURES[name], UNEQUAL[name])
    _, weights = at.marginals()
    scopes = [t.axes for t in at.problem.weighting.terms]
    for axis, block in at.axes.items():
        if block.enumerated:
            continue
        i = max(i for i, scope in enumerate(scopes) if scope[-1] == axis)
        for latent in block.names:
            for f in (lambda z: z, np.square, lambda z: np.exp(0.3 * z)):
                source = torch.zeros((), dtype=torch.float64, requires_grad=True)
                values = torch.as_tensor(f(at.values[latent]))
                factors = list(at.factors)
                assert factors[i].log.shape == values.shape  # the block's own term
                factors[i] = factors[i]._replace(log=factors[i].log + source * values)
                (slope,) = torch.autograd.grad(at.plan.log_evidence(factors), source)
                moment = (weights[axis] * f(at.values[latent])).sum()
                np.testing.assert_allclose(float(slope), moment, rtol=1e-9, atol=1e-9)


# ---- 3: draws ---------------------------------------------------------------------------------

FEW = {
    "chain": {"a": 3, "b": 2, "c": 3},
    "collider": {"a": 2, "b": 3, "c": 2},
    "nested plates": {"mean": 3, "level": 2, "x": 2},
    "sibling plates": {"mean": 3, "a": 2, "b": 2},
    "latent after a plate": {"mean": 2, "a": 2, "later": 3, "b": 2},
    "series, init alone": {"first": 2, "noise": 2, "x": 2},
    "series, init in a shared block": {"first": 3, "x": 2},
    "series in a plate": {"drift": 2, "first": 2, "x": 2},
    "discrete latents": {"share": 3, "x": 2},
}
DRAWS = 20_000
FLAT = 0.2  # power of the weights, so that all tuples are drawn now and then


def drawn_table(at, seed):
    """Indices of every block element ``[draws, elements]``, drawn and enumerated, and the sizes."""
    generator = torch.Generator().manual_seed(seed)
    drawn = at.plan.draw(at.here.factors(FLAT), DRAWS, generator)
    tables = [np.concatenate([t[a].reshape(len(t[a]), -1) for a in at.axes], 1) for t in (
        {a: i.numpy() for a, i in drawn.items()}, at.index
    )]  # fmt: skip
    sizes = [
        k.particles for k in at.axes.values() for _ in range(int(np.prod(k.plates, initial=1)))
    ]
    return *tables, sizes


@pytest.mark.parametrize("name", FEW)
def test_03_draws_of_whole_index_tuples_pass_chi_square(name):
    """Every tuple, hence every joint pair over time and over plates; p > 1e-4."""
    at = e_step(STRUCTURES[name], FEW[name], seed=2)
    drawn, enumerated, sizes = drawn_table(at, seed=4)
    code = np.ravel_multi_index(drawn.T, sizes)
    assert (np.ravel_multi_index(enumerated.T, sizes) == np.arange(len(at.log))).all()
    counts = np.bincount(code, minlength=len(at.log))
    assert en.chi_square_p(counts, en.normalised(FLAT * at.log)) > 1e-4


@pytest.mark.parametrize("name", FEW)
def test_03_draws_of_every_pair_of_indices_pass_chi_square(name):
    """Neighbouring times, times of two regions, a plate element and its parent; p > 1e-4 after Bonferroni."""
    at = e_step(STRUCTURES[name], FEW[name], seed=3)
    drawn, enumerated, sizes = drawn_table(at, seed=5)
    flat, pairs = en.normalised(FLAT * at.log), list(itertools.combinations(range(len(sizes)), 2))
    for i, j in pairs:
        shape = (sizes[i], sizes[j])
        counts = np.bincount(drawn[:, i] * sizes[j] + drawn[:, j], minlength=shape[0] * shape[1])
        code = enumerated[:, i] * sizes[j] + enumerated[:, j]
        wanted = np.bincount(code, weights=flat, minlength=shape[0] * shape[1])
        assert en.chi_square_p(counts, wanted) > 1e-4 / len(pairs), (i, j)


def test_03_the_chi_square_rejects_draws_from_the_marginals():
    """Independent draws of each index, the defect to be found, fail the same test."""
    at = e_step(STRUCTURES["series in a plate"], FEW["series in a plate"], seed=2)
    drawn, _, sizes = drawn_table(at, seed=4)
    rng = np.random.default_rng(0)
    shuffled = np.stack([rng.permutation(column) for column in drawn.T])
    counts = np.bincount(np.ravel_multi_index(shuffled, sizes), minlength=len(at.log))
    assert en.chi_square_p(counts, en.normalised(FLAT * at.log)) < 1e-6
