"""The law of a chain's first element may read values of the ordered plate: those of its first element."""

from __future__ import annotations

import pytest
import torch

from ppl import Bernoulli, Markov, ModelError, Normal, given, infer, latent, model, observe, plate

PUSH = torch.tensor([[0.5, -1.0, 2.0], [3.0, 0.0, 1.0]], dtype=torch.float64)
SEEN = torch.tensor([[0.9, -0.4, 2.3], [3.1, 3.5, 4.0]], dtype=torch.float64)
DATA = {"push": PUSH, "push_first": PUSH[:, 0], "y": SEEN}


def pushed(inside, noise=0.7):
    """Two series; the push at the first time comes with all others, or as an array of its own."""

    @model
    def program():
        rate = latent("rate", Normal(1.0, 0.5))
        with plate("series"):
            first = given("push_first")
            with plate("time", ordered=True):
                push = given("push")
                start = rate * (push if inside else first)
                path = Markov(Normal(start, noise), lambda last: Normal(last + rate * push, noise))
                observe("y", Normal(latent("x", path), 0.3))

    return program


@pytest.mark.filterwarnings("ignore:qem. not converged")
@pytest.mark.parametrize("method", ["exact", "laplace", "gbp", "qem"])
def test_every_backend_takes_the_first_element(method):
    left, right = (
        infer(pushed(inside), DATA, method=method, seed=0, max_iters=50) for inside in (True, False)
    )
    assert left.log_evidence.value == pytest.approx(right.log_evidence.value, abs=1e-8)
    for name in ("rate", "x"):
        assert torch.allclose(left.mean(name), right.mean(name), rtol=0, atol=1e-8)
        assert torch.allclose(left.sd(name), right.sd(name), rtol=0, atol=1e-8)


def test_draws_start_with_the_first_element():
    data = {"push": PUSH, "push_first": PUSH[:, 0]}
    drawn = pushed(inside=True, noise=1e-9).sample(4, data, seed=0)
    path = drawn["rate"][:, None, None] * PUSH.cumsum(-1)
    assert torch.allclose(drawn["x"], path, rtol=0, atol=1e-7)


def test_a_chain_of_states_takes_the_first_element():
    odds = torch.tensor([0.2, 0.7, 0.4], dtype=torch.float64)
    hit = torch.tensor([0.9, 0.1], dtype=torch.float64)

    @model
    def switching():
        with plate("time", ordered=True):
            p = given("odds")
            on = latent("on", Markov(Bernoulli(p), lambda last: Bernoulli(0.5 * p + 0.5 * last)))
            observe("seen", Bernoulli(0.1 + 0.8 * on))

    posterior = infer(switching, {"odds": odds, "seen": [1.0, 0.0, 1.0]}, method="exact")
    ahead = torch.stack([1 - odds[0], odds[0]]) * hit.flip(0)  # over (off, on)
    for t, seen in ((1, 0), (2, 1)):
        rise = 0.5 * odds[t] + torch.tensor([0.0, 0.5], dtype=torch.float64)
        moves = torch.stack([1 - rise, rise], -1)
        ahead = (ahead @ moves) * (hit.flip(0) if seen else hit)
    assert posterior.log_evidence.value == pytest.approx(float(ahead.sum().log()), abs=1e-12)


def test_values_of_closed_plates_are_refused():
    @model
    def stray():
        with plate("other"):
            level = latent("level", Normal(0.0, 1.0))
        with plate("time", ordered=True):
            slope = given("slope")
            latent("x", Markov(Normal(level + slope, 1.0), lambda last: Normal(last, 1.0)))

    with pytest.raises(ModelError, match="varies over plate 'other', which is not open"):
        stray.graph({"other": [0, 1], "slope": [0.0, 1.0]})
