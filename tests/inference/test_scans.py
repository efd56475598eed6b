"""The scan over a chain against the tree and against sums by logarithms."""

import pytest
import torch

from ppl.inference import scans
from ppl.inference.chains import filtered, tree, with_leave
from ppl.inference.logspace import exp_of_shifted, log_sum


def chain(states, outer=(4, 3), times=9, spread=1.0, seed=0):
    """Random log-factors of a chain whose matrices are shared along the second outer dimension."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return spread * torch.randn(shape, generator=g, dtype=torch.float64)

    first = normal(*outer, states)
    units = [normal(*outer, times, states), normal(outer[0], 1, times, states)]
    step = normal(outer[0], 1, times - 1, states, states)
    return first, units, step, normal(*outer, times - 1, states)


def by_logs(first, units, step, leave):
    return log_sum(filtered(first, sum(units), with_leave(step, leave))[-1], (-1,))


def weights(total, first, units, step, leave):
    leaves = [x.clone().requires_grad_() for x in (first, *units, leave)]
    out = total(leaves[0], leaves[1:-1], step, leaves[-1])
    return out.detach(), torch.autograd.grad(out.sum(), leaves)


@pytest.mark.parametrize("states", [2, 3, 7])
@pytest.mark.parametrize("spread", [1.0, 150.0, 3000.0])
def test_the_scan_is_the_sum_by_logarithms_however_far_numbers_spread(states, spread):
    given = chain(states, spread=spread)
    log, found = weights(scans.scan, *given)
    expected, wanted = weights(by_logs, *given)
    assert torch.allclose(log, expected, rtol=1e-12)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    first, units, step, leave = given
    assert torch.allclose(log, tree(first, sum(units), with_leave(step, leave)), rtol=1e-12)


@pytest.mark.parametrize("states", [3, 7])
def test_chains_that_lose_numbers_are_summed_again_alone(states, monkeypatch):
    first, units, step, leave = chain(states, outer=(10, 3))
    step[4] *= 4000  # the three with these transitions lose numbers
    seen = []
    again = scans._again
    monkeypatch.setattr(scans, "_again", lambda *a: seen.append(int(a[-1].sum())) or again(*a))
    log, found = weights(scans.scan, first, units, step, leave)
    assert seen == [3]
    expected, wanted = weights(by_logs, first, units, step, leave)
    assert torch.allclose(log, expected, rtol=1e-12)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("states", [3, 7])
def test_impossible_states_and_chains(states):
    first, units, step, leave = chain(states, outer=(10, 3))
    units[0][..., 5, 0] = -torch.inf
    step[:, :, 2, 1, :] = -torch.inf
    units[0][3, 2, 8] = -torch.inf  # nothing is possible at the last time
    log, found = weights(scans.scan, first, units, step, leave)
    expected, wanted = weights(by_logs, first, units, step, leave)
    assert log[3, 2] == -torch.inf and torch.allclose(log, expected, rtol=1e-12)
    assert (found[1][..., 5, 0] == 0).all()
    possible = torch.ones(10, 3, dtype=torch.bool)
    possible[3, 2] = False
    assert torch.allclose(found[1][possible], wanted[1][possible], atol=1e-12)


def test_a_single_chain_without_outer_dimensions():
    g = torch.Generator().manual_seed(1)
    unit = 1000 * torch.randn(6, 3, generator=g, dtype=torch.float64)
    step = 1000 * torch.randn(5, 3, 3, generator=g, dtype=torch.float64)
    first = torch.zeros(3, dtype=torch.float64)
    assert torch.allclose(scans.scan(first, [unit], step), tree(first, unit, step), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponentials_of_shifted_numbers(dtype):
    x = torch.tensor([0.0, -1.0, -50.0, -1e4, -torch.inf], dtype=dtype)
    expected = x.exp()
    assert torch.equal(exp_of_shifted(x.clone()), expected)
    assert exp_of_shifted(torch.tensor([torch.nan], dtype=dtype)).isnan().all()
