"""Factors from sufficient statistics against the same factors evaluated element by element."""

from __future__ import annotations

import pytest
import scipy.stats
import torch

from ppl import (
    Bernoulli,
    Markov,
    NegativeBinomial,
    Normal,
    Poisson,
    given,
    latent,
    model,
    observe,
    plate,
)
from ppl.backend import Settings
from ppl.inference.particles import squares, sums, weighting
from ppl.inference.particles.estep import draw_all, evaluated, weigh
from ppl.inference.particles.proposals import standard_normal
from ppl.inference.qem import QEM, init, prepare
from ppl.streams import Streams

PLAIN = {"start": "standard", "joint_up_to": 0, "bridge": False}


@model
def lines(known_sd: bool = False):
    """A line a group: the paper's radon model, each latent a block of its own."""
    centre = latent("centre", Normal(0.0, 1.0))
    with plate("group"):
        level, slope = latent("level", Normal(centre, 1.0)), latent("slope", Normal(0.0, 1.0))
        log_sd = latent("log_sd", Normal(0.0, 0.5))
        with plate("row"):
            sd = given("sd") if known_sd else log_sd.exp()
            observe("y", Normal(level + slope * given("x"), sd))


@model
def choices(law: str = "bernoulli"):
    """Log-odds that repeat: a few kinds of rows in each group."""
    base, effect = latent("base", Normal(0.0, 1.0)), latent("effect", Normal(0.0, 1.0))
    with plate("group"):
        level = latent("level", Normal(base, 1.0))
        with plate("row"):
            eta = level + effect * given("x") - 0.3
            if law == "bernoulli":
                observe("y", Bernoulli(logits=eta))
            elif law == "probs":
                observe("y", Bernoulli(probs=torch.sigmoid(eta)))
            elif law == "poisson":
                observe("y", Poisson(eta.exp()))
            else:
                observe("y", NegativeBinomial(total_count=3.0, logits=eta))


@model
def replicated():
    level = latent("level", Normal(0.0, 1.0))
    with plate("visit"):
        here = latent("here", Normal(level, 1.0))
        with plate("replicate"):
            observe("y", Bernoulli(logits=here))


@model
def delayed():
    """A latent in the innermost plate, whose mean has parts from two other blocks."""
    base = latent("base", Normal(0.0, 1.0))
    with plate("group"):
        level = latent("level", Normal(0.0, 1.0))
        with plate("row"):
            late = latent("late", Normal(level - base * given("x"), 0.7))
            observe("y", Bernoulli(logits=late))


@model
def growing():
    drift = latent("drift", Normal(0.0, 1.0))
    with plate("region"):
        noise = latent("noise", Normal(0.0, 0.5)).exp()
        with plate("time", ordered=True):
            step = lambda last: Normal(last + drift * given("x"), noise)  # noqa: E731
            path = latent("path", Markov(Normal(drift, 1.0), step))
            observe("y", Normal(path, 0.5))


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gaps(y):
    gaps = torch.rand(y.shape, generator=torch.Generator().manual_seed(5)) < 0.3
    return y.masked_fill(gaps, torch.nan)


COUNTS = torch.floor(numbers(3, 30).abs() * 3)
KINDS = torch.floor(numbers(3, 30, seed=3).abs() * 2)
LINES = {"y": numbers(3, 9) + 1.0, "x": numbers(3, 9, seed=1)}
CASES = {
    "lines": (lines, LINES),
    "lines with gaps": (lines, {**LINES, "y": with_gaps(LINES["y"])}),
    "lines with known spreads": (lines(known_sd=True), {**LINES, "sd": numbers(3, 9, seed=2).exp()}),
    "known spreads and gaps": (
        lines(known_sd=True),
        {**LINES, "y": with_gaps(LINES["y"]), "sd": numbers(3, 9, seed=2).exp()},
    ),
    "far away": (lines, {**LINES, "y": LINES["y"] + 1e6}),
    "Bernoulli": (choices, {"y": (COUNTS > 1).double(), "x": KINDS}),
    "Bernoulli with gaps": (choices, {"y": with_gaps((COUNTS > 1).double()), "x": KINDS}),
    "large log-odds": (choices, {"y": (COUNTS > 1).double(), "x": 400 * KINDS}),
    "probabilities": (choices(law="probs"), {"y": (COUNTS > 1).double(), "x": KINDS}),
    "Poisson": (choices(law="poisson"), {"y": COUNTS.clamp(max=2), "x": KINDS.clamp(max=1)}),
    "NegativeBinomial": (
        choices(law="negative binomial"),
        {"y": with_gaps(COUNTS.clamp(max=2)), "x": KINDS.clamp(max=1)},
    ),
    "replicates": (replicated, {"y": (COUNTS > 1).double()}),
    "split": (delayed, {"y": (numbers(3, 4) > 0).double(), "x": numbers(3, 4, seed=1)}),
    "chain": (growing, {"y": numbers(2, 7), "x": numbers(2, 7, seed=1)}),
}  # fmt: skip
EXACT, SINGLE = {"rtol": 1e-10, "atol": 1e-10}, {"rtol": 1e-4, "atol": 2e-4}


def step_of(name, *, dtype=torch.float64, restarts=1, memory=None):
    """Names and axes of the factors, and what one weighing finds."""
    program, data = CASES[name]
    options = QEM(**PLAIN, particles=6)
    bound = program.bind(data, dtype=dtype)
    problem = prepare(bound, options, Settings(Streams(0), restarts=restarts, memory=memory))
    q = init(problem).q
    drawn = draw_all(problem.weighting, q, problem.settings.streams)
    here = evaluated(problem, problem.weighting, drawn, q)
    return problem, here, weigh(here)


@pytest.fixture
def pointwise(monkeypatch):
    """Switch statistics off."""

    def off():
        monkeypatch.setattr(weighting, "pieces", lambda *_, **__: None)

    return off


@pytest.fixture(autouse=True)
def split_small_factors(monkeypatch):
    monkeypatch.setattr(squares, "_SMALL", 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("restarts", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_evidence_and_weights_are_those_of_the_pointwise_factors(name, restarts, dtype, pointwise):
    problem, _, found = step_of(name, dtype=dtype, restarts=restarts)
    pointwise()
    plain, _, wanted = step_of(name, dtype=dtype, restarts=restarts)
    scopes = [{t.axes for t in p.weighting.terms} for p in (problem, plain)]
    assert scopes[0] != scopes[1]
    close = EXACT if dtype == torch.float64 else SINGLE
    torch.testing.assert_close(found.log_z, wanted.log_z, **close)
    if (
        dtype == torch.float64 and name != "far away"
    ):  # single precision of sums of 1e12 tells no weights apart
        for axis, w in wanted.marginals.items():
            torch.testing.assert_close(found.marginals[axis], w, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["lines with gaps", "Bernoulli with gaps", "split"])
def test_plates_in_parts_have_the_same_evidence(name):
    whole = step_of(name)[2]
    problem, here, _ = step_of(name)
    assert here.densities is not None
    singles = [
        weighting.evaluate_part(problem.weighting, here.arrays, i, None).log
        for i in range(len(here.densities))
    ]
    for alone, together in zip(singles, here.densities, strict=True):
        torch.testing.assert_close(alone, together.log, **EXACT)
    rows = {"group": torch.tensor([0, 2])}
    for i, term in enumerate(problem.weighting.terms[: len(singles)]):
        part = weighting.evaluate_part(problem.weighting, here.arrays, i, rows).log
        kept = singles[i]
        if "group" in term.axes:
            kept = kept.index_select(term.axes.index("group"), rows["group"])
        torch.testing.assert_close(part, kept, **EXACT)
    assert torch.isfinite(whole.log_z).all()


@pytest.mark.parametrize("name", ["lines", "Bernoulli", "split", "chain"])
def test_gradients_by_particles_are_those_of_the_pointwise_factors(name, pointwise):
    def gradients():
        problem, here, _ = step_of(name)
        live = {n: x.detach().requires_grad_() for n, x in here.arrays.items()}
        densities = weighting.evaluate(problem.weighting, live)
        total = problem.weighting.plan.log_evidence(
            here._replace(arrays=live, densities=densities).factors()
        )
        return dict(zip(live, torch.autograd.grad(total, list(live.values())), strict=True))

    found = gradients()
    pointwise()
    for latent_name, wanted in gradients().items():
        torch.testing.assert_close(found[latent_name], wanted, rtol=1e-8, atol=1e-9)


def test_plate_of_observations_is_summed_out():
    problem = step_of("lines")[0]
    (term,) = [t for t in problem.weighting.terms if t.name == "y"]
    assert "row" not in term.axes and "row" not in term.plates


def test_split_factor_has_no_array_over_all_blocks():
    problem = step_of("split")[0]
    scopes = [set(t.axes) for t in problem.weighting.terms if t.name == "late"]
    assert len(scopes) == 3 and all(len([a for a in s if a.startswith("k:")]) == 2 for s in scopes)


def test_squares_of_parts_far_from_zero_keep_their_digits():
    left, right = 1e8 + numbers(5, 4), numbers(5, 3, seed=1) - 1e8
    wanted = (left.unsqueeze(-1) + right.unsqueeze(-2)).square().sum(0)
    torch.testing.assert_close(
        sums.total_square(0, None, left, right), wanted, rtol=1e-6, atol=1e-6
    )


def test_distinct_rows_count_every_row_once():
    table = torch.tensor([[0, 1], [0, 1], [2, 1], [0, 1], [3, 3], [3, 3]])
    first, place, most = sums.distinct_rows(2, 3, [table])
    assert most == 2
    assert torch.equal(table[first[:, 0]], torch.tensor([[0, 1], [0, 1]]))
    assert torch.bincount(place, minlength=4).tolist() == [2, 1, 1, 2]


@pytest.mark.parametrize("scale", [1.0, 40.0, 200.0, 700.0])
def test_rows_in_pairs_have_the_same_log_partition(scale):
    g = torch.Generator().manual_seed(0)
    count = torch.tensor([[3, 1, 1, 2, 3, 1, 1, 0, 1, 1], [2, 2, 2, 2, 1, 1, 1, 1, 1, 1]]).double()
    left = scale * torch.rand(2, 10, 4, generator=g, dtype=torch.float64) - scale / 2
    right = scale * torch.rand(2, 1, 3, generator=g, dtype=torch.float64) - scale / 2
    order = sums.in_pairs(count)
    assert order is not None and order.shape == (2, 10)
    at = order.clamp(min=0)
    number = count.gather(1, at).masked_fill(order < 0, 0.0)
    assert (number[:, ::2] == number[:, 1::2]).logical_or_(number[:, 1::2] == 0).all()
    assert torch.equal(number.sum(-1), count.sum(-1))
    rows = left.gather(1, at.unsqueeze(-1).expand(-1, -1, 4))
    paired = sums.log_partition(1, number, rows, right, True)
    expected = sums.log_partition(1, count, left, right)
    assert torch.allclose(paired, expected, rtol=1e-13, atol=1e-13)
    both = left.unsqueeze(-1) + right.unsqueeze(-2)
    plain = (count[..., None, None] * torch.logaddexp(both, torch.zeros(()).double())).sum(1)
    assert torch.allclose(paired, plain, rtol=1e-13, atol=1e-13)


def test_large_sums_of_products_are_those_of_small_ones(monkeypatch):
    g = torch.Generator().manual_seed(0)
    a, b, c = (
        torch.randn(s, generator=g, dtype=torch.float64) for s in [(5, 4, 1), (1, 4, 3), (3,)]
    )
    small = sums.products([(a, b), (b, a)], [c, a])
    monkeypatch.setattr(sums, "_CACHE_ELEMENTS", 8)
    assert torch.allclose(sums.products([(a, b), (b, a)], [c, a]), small, rtol=1e-14)
    assert torch.allclose(small, 2 * a * b + c + a, rtol=1e-14)


@pytest.mark.parametrize("count", [7, 8191, 8192, 40_009])
def test_standard_normal_numbers_are_those_of_torch_many_in_single_precision(count):
    like, g = torch.zeros((), dtype=torch.float64), torch.Generator()
    dtype = torch.float64 if count < 8192 else torch.float32
    expected = torch.randn(count, generator=g.manual_seed(2), dtype=dtype)
    after = torch.rand(3, generator=g)
    found = standard_normal((count,), like, g.manual_seed(2))
    assert found.dtype == torch.float64
    assert torch.equal(found, expected.double())
    assert torch.equal(torch.rand(3, generator=g), after)  # as far on in the stream


def test_many_standard_normal_numbers_are_gaussian():
    like, g = torch.zeros((), dtype=torch.float64), torch.Generator().manual_seed(0)
    found = standard_normal((200_000,), like, g)
    assert scipy.stats.kstest(found.numpy(), "norm").pvalue > 0.01
    tail = (found.abs() > 4).double().mean()
    assert float(tail) == pytest.approx(2 * scipy.stats.norm.sf(4), rel=0.8)
