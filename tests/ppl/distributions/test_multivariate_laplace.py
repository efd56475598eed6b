"""The vector law of the group Lasso against the scalar Laplace, its radial integral and its own draws."""

import math

import pytest
import scipy.integrate
import torch

from ppl import distributions as d

LOC = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)


def test_one_entry_is_the_laplace_law():
    value = torch.tensor([[-2.0], [0.3], [4.0]], dtype=torch.float64)
    vector = d.MultivariateLaplace(LOC[:1], 1.3)
    scalar = d.Laplace(LOC[0], 1.3)
    torch.testing.assert_close(vector.log_prob(value), scalar.log_prob(value[:, 0]))
    torch.testing.assert_close(vector.variance, scalar.variance[None])


@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_the_density_integrates_to_one(size):
    law = d.MultivariateLaplace(torch.zeros(size, dtype=torch.float64), 0.7)
    surface = 2 * math.pi ** (size / 2) / math.gamma(size / 2)

    def shell(radius):
        value = torch.zeros(size, dtype=torch.float64)
        value[0] = radius
        return surface * radius ** (size - 1) * math.exp(law.log_prob(value))

    total, _ = scipy.integrate.quad(shell, 0, 60, epsabs=1e-12)
    assert total == pytest.approx(1.0, abs=1e-9)


def test_draws_have_the_moments_and_lengths_of_the_law():
    law = d.MultivariateLaplace(LOC, 2.0)
    draws = law.sample((100_000,), torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws.mean(0), law.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(draws.var(0), law.variance, rtol=0.03, atol=0)
    length = (draws - LOC).norm(dim=-1)  # Gamma of shape 3, scale 2
    assert float(length.mean()) == pytest.approx(6.0, rel=0.01)
    assert float(length.var()) == pytest.approx(12.0, rel=0.03)


def test_batches_of_parameters_broadcast():
    law = d.MultivariateLaplace(torch.stack([LOC, -LOC]), torch.tensor([1.0, 2.0]).double())
    assert law.batch_shape == (2,)
    assert law.event_shape == (3,)
    assert law.mean.shape == law.variance.shape == (2, 3)
    assert law.sample((5, 2)).shape == (5, 2, 3)
    parts = [d.MultivariateLaplace(x, s).log_prob(LOC + 1) for x, s in ((LOC, 1.0), (-LOC, 2.0))]
    torch.testing.assert_close(law.log_prob(LOC + 1), torch.stack(parts))


def test_the_gradient_at_the_centre_is_zero():
    value = LOC.clone().requires_grad_()
    d.MultivariateLaplace(LOC, 1.0).log_prob(value).backward()
    assert value.grad.tolist() == [0.0, 0.0, 0.0]
