"""A density that overflows in one block leaves the others as they are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ppl import Markov, NegativeBinomial, Normal, given, infer, latent, model, observe, plate
from ppl.inference.groups.losses import LogDensity


def spread_out(u, params):
    """A Normal of which value, location and log spread are all unknown."""
    x, loc, log_scale = u.unbind(-1)
    return -0.5 * ((x - loc) / log_scale.exp()).square() - log_scale


def test_one_block_that_overflows_spoils_no_other():
    loss = LogDensity(spread_out, block=3)
    good = torch.tensor([[0.0, 0.5, 0.1], [1.0, -1.0, -0.5]], dtype=torch.float64)
    far = torch.tensor([[800.0, 0.0, -720.0]], dtype=torch.float64)  # its curvature is no number
    alone = loss.terms(good, {}, "gradient", 1.0)
    found = loss.terms(torch.cat([good, far]), {}, "gradient", 1.0)
    for part, whole in zip(alone[:3], found[:3], strict=True):
        assert torch.allclose(part, whole[:2], rtol=1e-12)
    assert not bool(found.residual[2].isfinite().all())


def test_blocks_of_any_size_have_the_curvature_as_their_square():
    """Up to 1e200 apart, where the squares of entries overflow."""
    scale = torch.tensor([[1e-150], [1.0], [1e100]], dtype=torch.float64)
    bend = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)

    def log_prob(u, params):
        return -0.5 * scale * torch.einsum("fei,ij,fej->fe", u, bend, u)

    loss = LogDensity(log_prob, block=2)
    root = loss.terms(torch.zeros(3, 2, dtype=torch.float64), {}, "gradient", 1.0).root[:, 0]
    assert torch.allclose(root.mT @ root / scale[:, :, None], bend.expand(3, 2, 2), rtol=1e-9)


@pytest.mark.filterwarnings("ignore:laplace")
def test_a_prior_that_overflows_is_no_error():
    """Growth of e^100 a step at the prior mean: the first points are infinitely unlikely, the answer is not."""

    @model
    def growing():
        rate, noise = latent("rate", Normal(100.0, 20.0)), latent("noise", Normal(-1.0, 0.1))
        size = latent("size", Normal(3.0, 1.0))
        with plate("time", ordered=True):
            moved = rate * given("one")
            law = Markov(
                Normal(4.0 + moved, noise.exp()), lambda last: Normal(last + moved, noise.exp())
            )
            x = latent("x", law)
            observe("y", NegativeBinomial(total_count=size.exp(), logits=x - size))

    y = np.random.default_rng(0).poisson(60.0, 12).astype(float)
    posterior = infer(growing, {"y": y, "one": np.ones(12)}, method="laplace")
    assert posterior.diagnostics.converged
    assert np.abs(posterior.mean("x").numpy() - math.log(60.0)).max() < 0.5
