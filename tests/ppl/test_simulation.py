"""Drawing forwards: shapes, moments, chains, laws from outside, missing neighbours, repeatability."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as td

from ppl import (
    Bernoulli,
    Beta,
    Categorical,
    Dirichlet,
    Flat,
    Gamma,
    Markov,
    MultivariateNormal,
    Normal,
    Poisson,
    UnsupportedError,
    deterministic,
    factor,
    given,
    latent,
    mean,
    model,
    observe,
    pick,
    plate,
    shift,
)
from ppl.simulation import Known, simulate
from ppl.streams import Streams

N = 4000


def near(draws: torch.Tensor, expected: float, spread: float) -> bool:
    """Whether the mean of independent draws lies within five standard errors."""
    return abs(float(draws.mean()) - expected) < 5 * spread / draws.numel() ** 0.5


@model
def crossed():
    user, film = plate("user"), plate("film")
    rating = plate("rating", within=(user, film))
    centre = latent("centre", Normal(1.0, 0.1))
    with user:
        taste = latent("taste", Normal(centre, 0.5), shape=2)
    with film:
        genre = given("genre")
    with rating:
        score = deterministic("score", (taste * genre).sum(-1))
        observe("stars", Normal(score, 0.1))
    factor("ignored", Normal(centre, 1.0), at=5.0)


CROSSED = {"user": [0, 1, 1], "film": [0, 1, 0], "genre": [[1.0, 0.0], [0.0, 2.0]]}


def test_every_site_is_drawn_given_those_before_it():
    draws = crossed.sample(N, CROSSED, seed=1)
    assert set(draws) == {"centre", "taste", "score", "stars"}
    assert draws["taste"].shape == (N, 2, 2)
    assert draws["stars"].shape == (N, 3)
    expected = torch.stack(
        [draws["taste"][:, 0, 0], 2 * draws["taste"][:, 1, 1], draws["taste"][:, 1, 0]], -1
    )
    torch.testing.assert_close(draws["score"], expected)
    assert near(draws["stars"] - draws["score"], 0.0, 0.1)
    assert near(draws["taste"][:, 0, 0], 1.0, 0.51)
    assert near((draws["taste"] - draws["centre"][:, None, None]).square(), 0.25, 0.36)


def test_the_same_seed_draws_the_same_and_leaves_the_global_generator(rng_untouched):
    first, second = (crossed.sample(3, CROSSED, seed=4)["stars"] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, crossed.sample(3, CROSSED, seed=5)["stars"])


def test_a_further_site_shifts_no_draw_of_the_others():
    @model
    def one():
        latent("x", Normal(0.0, 1.0))

    @model
    def two():
        latent("w", td.Normal(0.0, 1.0))
        latent("x", Normal(0.0, 1.0))

    assert torch.equal(one.sample(5, seed=0)["x"], two.sample(5, seed=0)["x"])


# ---- chains --------------------------------------------------------------------------------------


def chain_model(step):
    @model
    def walk():
        base = latent("base", Normal(3.0, 1e-6))
        time = plate("time", 4, ordered=True)
        with time:
            push = given("push")
        with plate("site", 2), time:
            latent(
                "x",
                Markov(Normal(base, 1e-6), lambda before: Normal(step(before, push, time), 1e-6)),
            )

    return walk


PUSH = [1.0, 2.0, 3.0, 4.0]
STEPS = {
    "own": (lambda b, p, t: b + p, [3.0, 5.0, 8.0, 12.0]),
    "average": (lambda b, p, t: b + mean(p, over=t), [3.0, 5.5, 8.0, 10.5]),
    "first": (lambda b, p, t: b + pick(p, time=0), [3.0, 4.0, 5.0, 6.0]),
    "last": (lambda b, p, t: b + pick(p, time=-1), [3.0, 7.0, 11.0, 15.0]),
    "behind": (lambda b, p, t: b + shift(p, t, -1), [3.0, 4.0, 6.0, 9.0]),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_a_chain_is_drawn_step_by_step(name):
    step, expected = STEPS[name]
    x = chain_model(step).sample(2, {"push": PUSH}, seed=0)["x"]
    assert x.shape == (2, 2, 4)
    torch.testing.assert_close(
        x, torch.tensor(expected).double().expand(2, 2, 4), atol=1e-4, rtol=0
    )


def test_a_chain_can_look_things_up_along_its_own_plate():
    @model
    def seasonal():
        time = plate("time", 4, ordered=True)
        with time:
            push, i = given("push"), given("i", index=time)
            latent("x", Markov(Normal(0.0, 1e-6), lambda before: Normal(before + push[i], 1e-6)))

    x = seasonal.sample(1, {"push": PUSH, "i": [0, 3, 1, 0]}, seed=0)["x"]
    expected = torch.tensor([[0.0, 4.0, 6.0, 7.0]]).double()
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=0)


def test_known_elements_of_a_chain_stay():
    bound = chain_model(lambda b, p, t: b + p).bind({"push": PUSH}, need_observed=False)
    values = torch.full((3, 2, 4), 100.0).double()
    mask = torch.tensor([[False, True, False, False]] * 2)
    x = simulate(bound, 3, Streams(0), known={"x": Known(values, mask)})["x"]
    expected = torch.tensor([3.0, 100.0, 103.0, 107.0]).double().expand(3, 2, 4)
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=0)


# ---- laws ----------------------------------------------------------------------------------------


class Pair(td.Distribution):
    """A law from outside: two numbers, the second twice the first."""

    arg_constraints = {"centre": td.constraints.real_vector}
    support = td.constraints.real_vector

    def __init__(self, centre, validate_args=None):
        self.centre = torch.as_tensor(centre)
        super().__init__(self.centre.shape[:-1], self.centre.shape[-1:], validate_args=False)

    def log_prob(self, value):
        return -(value - self.centre).square().sum(-1)

    def sample(self, sample_shape=()):
        return self.centre + torch.randn((*sample_shape, 1)) * torch.tensor([1.0, 2.0])


def test_a_law_from_outside_is_drawn_element_by_element():
    @model
    def m():
        with plate("a", 3):
            x = latent("x", Normal(0.0, 1.0))
            with plate("b", 2):
                latent("pair", Pair(torch.stack([x, -x])))
                latent("same", Pair(torch.zeros(2)))

    draws = m.sample(7, seed=0)
    assert draws["pair"].shape == (7, 3, 2, 2)
    away = draws["pair"] - torch.stack([draws["x"], -draws["x"]], -1)[:, :, None]
    torch.testing.assert_close(away[..., 1], 2 * away[..., 0], rtol=1e-5, atol=1e-5)
    assert len(away[..., 0].unique()) == away[..., 0].numel()
    assert draws["same"].shape == (7, 3, 2, 2)


def test_vector_laws_with_parameters_of_plates():
    @model
    def m():
        with plate("a", 3):
            x = latent("x", Normal(5.0, 1.0))
            latent(
                "v", MultivariateNormal(torch.stack([x, -x]), covariance_matrix=1e-6 * torch.eye(2))
            )
            latent("p", Dirichlet(torch.exp(torch.stack([x, x]))))
            latent("k", Categorical(logits=torch.stack([x, -x])))

    draws = m.sample(4, seed=0)
    torch.testing.assert_close(
        draws["v"], torch.stack([draws["x"], -draws["x"]], -1), atol=0.02, rtol=0
    )
    torch.testing.assert_close(draws["p"].sum(-1), torch.ones(4, 3).double())
    assert bool((draws["k"] == 0).double().mean() > 0.9)


def test_a_flat_law_cannot_be_drawn_from():
    @model
    def m():
        latent("x", Flat())

    with pytest.raises(UnsupportedError, match="'x' has the law Flat, which is improper"):
        m.sample(1)


def test_an_element_without_its_neighbour_is_nan_when_observed_and_refused_when_latent():
    @model
    def pairs(site):
        time = plate("time", 3, ordered=True)
        with time:
            x = latent("x", Normal(0.0, 1.0))
            site("y", Normal(shift(x, time, 1), 1e-6))

    draws = pairs(observe).sample(4, sizes={"time": 3}, seed=0)
    assert bool(draws["y"][:, 2].isnan().all())
    torch.testing.assert_close(draws["y"][:, :2], draws["x"][:, 1:], atol=1e-4, rtol=0)
    with pytest.raises(UnsupportedError, match="neighbour along plate 'time' is missing"):
        pairs(latent).sample(1)


# ---- moments in closed form --------------------------------------------------------------------


def check(draws, expected):
    """The mean over draws lies within five standard errors, as measured, of ``expected``."""
    draws, expected = draws.double(), torch.as_tensor(expected, dtype=torch.float64)
    error = draws.std(0) / math.sqrt(len(draws))
    assert bool(((draws.mean(0) - expected).abs() < 5 * error + 1e-12).all()), draws.mean(0)


def test_moments_of_a_ragged_hierarchy():
    @model
    def m():
        top = latent("top", Normal(1.0, 2.0))
        group = plate("group")
        with group:
            level = latent("level", Normal(top + given("x"), 0.5))
        with plate("row", within=group):
            observe("y", Normal(2 * level, 1.0))

    x = torch.tensor([0.0, 3.0, -1.0], dtype=torch.float64)
    draws = m.sample(5 * N, {"x": x, "group": [2, 0, 0, 1]}, seed=0)
    check(draws["level"], 1.0 + x)
    y = draws["y"] - 2 * (1.0 + x[[2, 0, 0, 1]])
    check(y, torch.zeros(4))
    check(y**2, torch.full((4,), 4 * 4.25 + 1))
    check(y[:, 1] * y[:, 2], 4 * 4.25)  # two rows of one group
    check(y[:, 0] * y[:, 1], 4 * 4.0)  # rows of two groups


def test_moments_of_conjugate_pairs():
    @model
    def m():
        p, rate = latent("p", Beta(2.0, 3.0)), latent("rate", Gamma(3.0, 2.0))
        with plate("row", 2):
            observe("hit", Bernoulli(p))
            observe("count", Poisson(rate))

    draws = m.sample(5 * N, seed=1)
    check(draws["hit"], torch.full((2,), 0.4))
    check(draws["hit"].double().prod(1), 0.4 * 0.6 / 6 + 0.16)
    check(draws["count"], torch.full((2,), 1.5))
    check(draws["count"].double().prod(1), 1.5**2 + 0.75)


def test_autocovariance_of_an_autoregression():
    a, q, steps = 0.8, 0.6, 6
    stationary = q / math.sqrt(1 - a**2)

    @model
    def m():
        with plate("runner", 2), plate("day", steps, ordered=True):
            latent("x", Markov(Normal(0.0, stationary), lambda x: Normal(a * x, q)))

    x = m.sample(5 * N, seed=0)["x"]
    expected = torch.tensor([stationary**2 * a**lag for lag in range(steps)])
    check(x[:, 0] * x[:, 1], torch.zeros(steps))
    check(x[:, 1, :1] * x[:, 1], expected)
    check(x[:, 1, 2:3] * x[:, 1], expected[[2, 1, 0, 1, 2, 3]])


def test_a_mixture_picks_by_its_index():
    @model
    def m():
        kind = plate("kind", 3)
        with kind:
            centre = latent("centre", Normal(given("where"), 0.1))
        with plate("point", 2):
            z = latent("z", Categorical(given("weight"), over=kind))
            observe("y", Normal(centre[z], 0.01))

    where = torch.tensor([-10.0, 0.0, 10.0], dtype=torch.float64)
    weight = torch.tensor([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]], dtype=torch.float64)
    draws = m.sample(5 * N, {"where": where, "weight": weight}, seed=0)
    picked = draws["centre"].gather(1, draws["z"].long())
    torch.testing.assert_close(draws["y"], picked, atol=0.1, rtol=0)
    check(draws["y"], weight @ where)
    check((draws["z"] == 2).double(), weight[:, 2])


def test_without_a_seed_the_global_generator_governs():
    @model
    def m():
        latent("x", Normal(0.0, 1.0))

    torch.manual_seed(3)
    first = m.sample(4)["x"]
    torch.manual_seed(3)
    assert torch.equal(first, m.sample(4)["x"])
    assert not torch.equal(first, m.sample(4)["x"])
