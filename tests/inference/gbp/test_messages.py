"""The three forms of a factor's messages against each other and against dense elimination."""

from __future__ import annotations

import functools

import pytest
import torch

from ppl.inference.gbp import messages
from ppl.inference.gbp.cavities import cavity, damped
from ppl.inference.gbp.messages import (
    factor_messages,
    leave_one_out,
    scalar_innovation,
)
from ppl.inference.gbp.schur import schur
from ppl.inference.numerics.gaussian import Gaussian, marginal


def random_rows(count: int, m: int, dims: list[tuple[int, int]], dtype=torch.float64):
    """Jacobians, residuals and proper cavities for slots of (edges, dims)."""
    jacobian = [torch.randn(count, b, m, d, dtype=dtype) for b, d in dims]
    cavities = []
    for b, d in dims:
        root = torch.randn(count, b, d, d, dtype=dtype)
        lam = root @ root.mT + torch.eye(d, dtype=dtype)
        cavities.append(Gaussian(torch.randn(count, b, d, dtype=dtype), lam))
    return jacobian, torch.randn(count, m, dtype=dtype), cavities


def dense_message(jacobian, residual, cavities, slot: int, edge: int) -> Gaussian:
    """The message by adding all other cavities and eliminating, in one dense matrix."""
    rows = torch.cat([j.transpose(1, 2).flatten(2) for j in jacobian], -1)
    lam, eta = rows.mT @ rows, -(rows.mT @ residual.unsqueeze(-1)).squeeze(-1)
    start = 0
    for s, c in enumerate(cavities):
        for b in range(c.eta.shape[1]):
            at = slice(start, start + c.eta.shape[-1])
            if (s, b) == (slot, edge):
                keep = at
            else:
                lam[:, at, at] += c.lam[:, b]
                eta[:, at] += c.eta[:, b]
            start = at.stop
    return marginal(Gaussian(eta, lam), keep)


SHAPES = {
    "two scalars": (1, [(1, 1), (1, 1)]),
    "poses": (3, [(1, 3), (1, 3)]),
    "camera and point": (2, [(1, 6), (1, 3)]),
    "three slots": (2, [(1, 2), (1, 1), (1, 4)]),
    "a reduced plate": (1, [(5, 1), (1, 1)]),
    "vectors of a reduced plate": (2, [(3, 2), (1, 3)]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_schur_innovation_and_scalar_form_agree(name):
    """Algebra: Schur (4.1), innovation (4.2) and scalar form (5) agree, 1e-9."""
    m, dims = SHAPES[name]
    rows = random_rows(20, m, dims)
    innovation = factor_messages(*rows, "innovation").messages
    for s, (a, b) in enumerate(zip(innovation, schur(*rows), strict=True)):
        torch.testing.assert_close(a.eta, b.eta, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(a.lam, b.lam, rtol=1e-9, atol=1e-9)
        for edge in range(dims[s][0]):
            want = dense_message(*rows, s, edge)
            torch.testing.assert_close(a.lam[:, edge], want.lam, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(a.eta[:, edge], want.eta, rtol=1e-9, atol=1e-9)


def scalar_rows(count: int, edges: int, sigma: float, vague: float, dtype):
    slopes = torch.randn(count, edges, dtype=torch.float64) / sigma
    lams = torch.rand(count, edges, dtype=torch.float64) + 0.5
    lams[:, edges // 2] /= vague
    etas = torch.randn(count, edges, dtype=torch.float64)
    residual = torch.randn(count, dtype=torch.float64) / sigma
    return [slopes.to(dtype)], residual.to(dtype), [etas.to(dtype)], [lams.to(dtype)]


@pytest.mark.parametrize("sigma", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("vague", [1.0, 1e4])
def test_scalar_form_keeps_its_digits_in_float32(sigma, vague):
    """Algebra: (5) in float32 within 1e-5 relative of float64, one edge 1e4 times vaguer."""
    torch.manual_seed(0)
    precise = scalar_rows(500, 27, sigma, vague, torch.float64)
    ((_, want),) = scalar_innovation(*precise)
    single = [[x.float() for x in p] if isinstance(p, list) else p.float() for p in precise]
    ((_, got),) = scalar_innovation(*single)
    assert float(((got - want) / want).abs().max()) < 1e-5


def test_no_precision_is_negative():
    """Algebra: no non-positive precision in 1e5 random factors."""
    ((_, lam),) = scalar_innovation(*scalar_rows(100_000, 4, 0.01, 1e4, torch.float32))
    assert bool((lam > 0).all())


def test_leave_one_out_has_no_cancellation():
    parts = [torch.tensor([[1e20, 1.0, 2.0]]), torch.tensor([[3.0]])]
    first, second = leave_one_out(parts)
    assert first[0, 0] == 6.0 and second[0, 0] == 1e20


def test_a_row_that_meets_an_empty_cavity_says_what_the_limit_says():
    """with nothing known of one variable, a difference says nothing about the other."""
    jacobian, residual, cavities = random_rows(5, 2, [(1, 2), (1, 2)])
    nothing = Gaussian(torch.zeros(5, 1, 2), torch.zeros(5, 1, 2, 2))
    empty = Gaussian(nothing.eta.double(), nothing.lam.double())
    sent = factor_messages(jacobian, residual, [cavities[0], empty])
    assert sent.improper == 5
    assert float(sent.messages[0].lam.abs().max()) == 0.0
    assert float(sent.messages[1].lam.diagonal(dim1=-2, dim2=-1).min()) > 0


def test_more_outputs_than_one_unknown_pass_an_empty_cavity():
    """what a row says of one variable alone survives the other's being unknown."""
    jacobian, residual, cavities = random_rows(4, 5, [(1, 2), (1, 2)])
    empty = Gaussian(torch.zeros_like(cavities[1].eta), torch.zeros_like(cavities[1].lam))
    rows = jacobian, residual, [cavities[0], empty]
    got, want = factor_messages(*rows).messages[0], dense_message(*rows, 0, 0)
    torch.testing.assert_close(got.lam[:, 0], want.lam, rtol=1e-9, atol=1e-9)


def test_damping_keeps_the_share_of_the_old_message():
    new, old = (Gaussian(torch.full((2, 1, 1), v), torch.full((2, 1, 1, 1), v)) for v in (1.0, 3.0))
    assert damped(new, old, 0.25).eta.flatten().tolist() == [1.5, 1.5]
    assert damped(new, old, torch.tensor([0.0, 1.0])).lam.flatten().tolist() == [1.0, 3.0]


def test_floored_cavity_keeps_the_mean_of_the_belief():
    """where the floor acts, the mean stays put; nothing known stays nothing known."""
    belief = Gaussian(torch.tensor([[[6.0]], [[6.0]]]), torch.tensor([[[[2.0]]], [[[2.0]]]]))
    message = Gaussian(torch.tensor([[[6.0]], [[6.5]]]), torch.tensor([[[[2.0]]], [[[2.1]]]]))
    made, floored = cavity(belief, message, 1e-3)
    assert floored == 1
    assert made.lam.flatten().tolist() == [0.0, pytest.approx(2e-3)]
    assert float(made.eta[1] / made.lam[1, 0]) == pytest.approx(3.0)


def test_equal_slots_as_one_slot_are_the_same_messages(monkeypatch):
    g = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=g, dtype=torch.float64)
    jacobian, residual = [draw(7, 1, 3, 3) for _ in range(2)], draw(7, 3)
    roots = [draw(7, 1, 3, 3) for _ in range(2)]
    cavities = [Gaussian(draw(7, 1, 3), a @ a.mT + 0.1 * torch.eye(3)) for a in roots]
    cavities[1].eta[2], cavities[1].lam[2] = 0.0, 0.0  # knows nothing
    few = messages.factor_messages(jacobian, residual, cavities)
    monkeypatch.setattr(messages, "_FEW", 0)
    many = messages.factor_messages(jacobian, residual, cavities)
    assert few.improper == many.improper == 1
    for a, b in zip(few.messages, many.messages, strict=True):
        torch.testing.assert_close(a.eta, b.eta, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(a.lam, b.lam, rtol=1e-12, atol=1e-12)
