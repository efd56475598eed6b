"""Particles within plates, one from each of as many shares of their proposal as there are particles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._pytree import tree_map

from ppl import ModelError
from ppl.backend import Settings
from ppl.inference.particles.estep import draw_all, evaluated, weigh
from ppl.inference.particles.proposals import stratified_normal
from ppl.inference.qem import QEM, init, prepare
from ppl.streams import Streams
from tests.inference.qem.nested_normals import Y, nested, nested_evidence

GROUPS = [("mean",), ("level",), ("x",)]
REPEATS = 5000


def noise(shape, seed=0, dtype=torch.float64):
    like = torch.zeros((), dtype=dtype)
    return stratified_normal(shape, like, torch.Generator().manual_seed(seed))


def problem_of(restarts=1, **options):
    options = {"groups": GROUPS, "start": "standard", "joint_up_to": 0} | options
    bound = nested.bind({"y": Y}, dtype=torch.float64)
    return prepare(bound, QEM(**options), Settings(Streams(3), restarts=restarts))


def estimates(particles, stratified):
    """``REPEATS`` independent values of log Zhat, along the restart axis, from one set of proposals."""
    first = init(problem_of(particles=particles)).q
    q = tree_map(lambda t: t if t is None else t.expand(REPEATS, *t.shape), first)
    problem = problem_of(REPEATS, particles=particles, stratified=stratified)
    drawn = draw_all(problem.weighting, q, problem.settings.streams)
    return weigh(evaluated(problem, problem.weighting, drawn, q)).log_z.numpy()


@pytest.mark.parametrize("dims", [1, 3])
def test_every_share_holds_one_value_of_each_coordinate(dims):
    shares = (torch.special.ndtr(noise((5, 7, dims))) * 7).long().sort(-2).values
    assert (shares == torch.arange(7).unsqueeze(-1)).all()


def test_each_particle_has_the_law_of_a_single_draw_and_elements_are_independent():
    drawn = noise((40_000, 3, 2))
    for coordinate in drawn[:, 0].T:
        assert stats.kstest(coordinate, "norm").pvalue > 1e-3
    assert abs(float(torch.corrcoef(drawn[:, 0].T)[0, 1])) < 4 / 200
    pairs = drawn[:, 0].reshape(-1, 2, 2)  # the same place in two elements
    assert abs(float(torch.corrcoef(pairs[..., 1].T)[0, 1])) < 4 / math.sqrt(20_000)


def test_float32_stays_finite():
    assert noise((1000, 100, 2), dtype=torch.float32).isfinite().all()


@pytest.mark.parametrize("particles", [1, 2, 4])
def test_the_estimate_of_the_evidence_has_no_bias(particles):
    """E[Zhat] = Z with stratified particles in both plates, within four standard errors."""
    ratio = np.exp(estimates(particles, True) - nested_evidence())
    error = ratio.std() / math.sqrt(REPEATS)
    assert abs(ratio.mean() - 1) < 4 * error, (ratio.mean(), error)
    assert particles == 1 or error < 0.2  # the test could fail


def test_the_estimate_of_the_evidence_has_less_noise():
    plain, even = (estimates(10, s).std() for s in (False, True))
    assert even < 0.6 * plain, (even, plain)


def test_one_particle_is_drawn_as_ever():
    plain, even = (estimates(1, s) for s in (False, True))
    assert stats.ks_2samp(plain, even).pvalue > 1e-3


def test_blocks_within_plates_are_stratified_where_the_bridge_is():
    def which(**options):
        return {b.names[0]: b.stratified for b in problem_of(particles=3, **options).blocks}

    assert which() == {"mean": False, "level": True, "x": True}
    assert not any(which(bridge=False).values()) and not any(which(stratified=False).values())
    assert which(bridge=False, stratified=True) == which()


def test_an_option_that_is_neither_true_nor_false_is_refused():
    with pytest.raises(ModelError, match="stratified"):
        QEM(stratified="yes")
