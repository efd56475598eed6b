"""Log-densities of joint draws, discrete latents summed: closed forms, and the exact backend."""

from __future__ import annotations

import pytest
import torch

from ppl import Categorical, Markov, Normal, UnsupportedError, infer, latent, model, observe, plate
from ppl.inference.particles.lanes import check_lanes, make_lanes
from tests.small_programs import autoregression

SWITCH = torch.tensor([[0.9, 0.1], [0.2, 0.8]])


@model
def ratings():
    with plate("user", 3) as user:
        taste = latent("taste", Normal(0.0, 1.0))
    with plate("film", 4) as film:
        quality = latent("quality", Normal(0.0, 2.0))
    with user, film:
        observe("y", Normal(taste * quality, 0.5))


@model
def hidden(shift=None):
    shift = latent("shift", Normal(0.0, 1.0)) if shift is None else shift
    with plate("t", ordered=True):
        law = Categorical(torch.tensor([0.5, 0.5]))
        z = latent("z", Markov(law, lambda before: Categorical(SWITCH[before])))
        observe("y", Normal(shift + 3.0 * z, 1.0))


@model
def switching():
    with plate("t", ordered=True):
        z = latent("z", Categorical(torch.tensor([0.5, 0.5])))
        latent("x", Markov(Normal(0.0, 1.0), lambda before: Normal(before + z, 1.0)))


def log_normal(x, mean, sd):
    return torch.distributions.Normal(mean, sd).log_prob(x)


def test_latents_of_crossed_plates_may_meet():
    y = torch.randn(3, 4, dtype=torch.float64)
    taste, quality = (torch.randn(5, n, dtype=torch.float64) for n in (3, 4))
    found = make_lanes(ratings.bind({"y": y}), 5, 64).log_joint(
        {"taste": taste, "quality": quality}
    )
    mean = taste[:, :, None] * quality[:, None]
    want = log_normal(taste, 0.0, 1.0).sum(1) + log_normal(quality, 0.0, 2.0).sum(1)
    assert torch.allclose(found, want + log_normal(y, mean, 0.5).sum((1, 2)))


def test_a_chain_adds_its_transitions():
    y, x = torch.randn(3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    found = make_lanes(autoregression.bind({"y": y}), 4, 64).log_joint({"x": x})
    want = log_normal(x[:, 0], 0.0, 1.0) + log_normal(y, x, 0.7).sum(1)
    want = want + log_normal(x[:, 1:], 0.8 * x[:, :-1], 0.6).sum(1)
    assert torch.allclose(found, want)


def test_discrete_chains_are_summed_and_drawn_in_every_lane():
    data = {"y": [0.2, -0.5, 2.7, 3.5]}
    bound, shifts = hidden.bind(data), torch.tensor([-0.5, 0.0, 1.0], dtype=torch.float64)
    lanes = make_lanes(bound, 3, 64)
    factors = lanes.factors({"shift": shifts})
    log_joint, tables = lanes.plan.marginals(factors)
    many = make_lanes(bound, 3000, 64, to_draw=True)
    picked = many.plan.draw(many.factors({"shift": shifts.repeat(1000)}), 1)["k:z"][0]
    drawn = picked.reshape(1000, 3, 4).double().mean(0)
    for i, shift in enumerate(shifts.tolist()):
        exact = infer(hidden(shift), data, method="exact")
        prior = float(log_normal(shifts[i], 0.0, 1.0))
        assert float(log_joint[i]) == pytest.approx(exact.log_evidence.value + prior, abs=1e-9)
        assert torch.allclose(tables["k:z"][i], exact.probs("z"))
        error = (exact.probs("z")[:, 1] * exact.probs("z")[:, 0] / 1000).sqrt()
        assert bool(((drawn[i] - exact.probs("z")[:, 1]).abs() < 4.5 * error + 1e-9).all())


def test_a_chain_that_a_discrete_latent_of_its_plate_steers_is_refused_with_a_remedy():
    with pytest.raises(UnsupportedError, match="'x'.*discrete latent 'z'.*method='qem'"):
        check_lanes(switching.graph(), 64)
