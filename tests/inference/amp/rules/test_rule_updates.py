"""Closed updates of parameters, gradients of log Z in every parameter, evidence for groups, predictions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from ppl.errors import UnsupportedError
from ppl.inference.amp import rules
from ppl.inference.amp.rules import log_normal
from tests.inference.amp.rules.cases import (
    COUNT,
    Case,
    column,
    every_learnable,
    every_prior,
    every_rule,
    observations,
    uniform,
)


def tensors(rule: rules.Rule) -> dict[str, Tensor]:
    """Tensor fields of a rule that are parameters, not data."""
    own = {f.name: getattr(rule, f.name) for f in fields(rule)}  # type: ignore[arg-type]
    data = ("y", "low", "high", "trials", "density", "centre", "width", "points")
    return {k: v for k, v in own.items() if isinstance(v, Tensor) and k not in data}


@every_rule
def test_log_z_differentiates_in_every_parameter(build: Callable[[], Case]) -> None:
    rule, (r, vr) = build().rule, observations()
    for name, value in tensors(rule).items():
        if bool((value == 0).all()):
            continue  # a limit, such as the noise of the sign channel
        leaf = value.clone().requires_grad_()
        log_z = replace(rule, **{name: leaf}).moments(r, vr).log_z  # type: ignore[type-var]
        (found,) = torch.autograd.grad(log_z.sum(), leaf)
        along = torch.randn_like(value)
        step = 1e-5 * value.abs().clamp(min=0.1)
        above, below = (
            replace(rule, **{name: value + s * step * along}).moments(r, vr).log_z.sum()  # type: ignore[type-var]
            for s in (1.0, -1.0)
        )
        expected = (above - below) / 2.0
        torch.testing.assert_close((found * step * along).sum(), expected, rtol=2e-4, atol=1e-9)


def nodes(low: float, high: float, count: int = 40_001) -> Tensor:
    return torch.linspace(low, high, count, dtype=torch.float64)


def posterior(rule: rules.Rule, x: Tensor, r: Tensor, vr: Tensor) -> Tensor:
    """Normalised weights ``[n, G]`` of the tilted density on a grid."""
    logs = rule.log_prob(x.expand(len(r), -1).T).T + log_normal(x - column(r), column(vr))
    return logs.softmax(-1)


COMPLETE = {
    "gaussian": lambda: rules.Gaussian(torch.tensor(0.5).double(), torch.tensor(0.8).double()),
    "laplace": lambda: rules.Laplace(torch.tensor(1.3).double()),
    "exponential": lambda: rules.Exponential(torch.tensor(0.7).double()),
    "half_normal": lambda: rules.HalfNormal(torch.tensor(0.6).double()),
    "gaussian_noise": lambda: rules.GaussianNoise(uniform(-2, 2), torch.tensor(0.3).double()),
    "relu": lambda: rules.ReLU(uniform(0, 2), torch.tensor(0.3).double()),
    "modulus": lambda: rules.Modulus(uniform(0, 2), torch.tensor(0.3).double()),
    "laplace_noise": lambda: rules.AdditiveNoise(
        uniform(-2, 2), rules.Laplace(torch.tensor(1.5).double())
    ),
}


@pytest.mark.parametrize("name", COMPLETE)
def test_update_maximises_the_integrated_log_density(name: str) -> None:
    rule, (r, vr) = COMPLETE[name](), observations()
    positive = name in ("exponential", "half_normal")
    x = nodes(0.0, 40.0)[1:] - 0.0005 if positive else nodes(-40.0, 40.0)
    r = r.abs() if positive else r
    weight = posterior(rule, x, r, vr)
    pooled = {k: v.mean() for k, v in rule.statistics(r, vr).items()}
    for parameter in rule.learnable:
        found = rule.maximised(pooled)
        inner = isinstance(found, rules.AdditiveNoise)
        best = getattr(found.noise if inner else found, parameter)

        def expected(value: Tensor, found=found, inner=inner, parameter=parameter) -> Tensor:
            if inner:
                moved = replace(found, noise=replace(found.noise, **{parameter: value}))
            else:
                moved = replace(found, **{parameter: value})
            return (weight * moved.log_prob(x.expand(COUNT, -1).T).T).sum()

        step = 1e-4 * best.abs()
        middle, above, below = expected(best), expected(best + step), expected(best - step)
        assert middle > above and middle > below
        assert (above - below).abs() < 0.05 * (2 * middle - above - below), "the top is elsewhere"


def test_update_of_the_bernoulli_gaussian_is_the_published_one() -> None:
    rule = rules.BernoulliGaussian(*torch.tensor([-1.0, 0.3, 0.8]).double())
    r, vr = observations()
    share = rule.inclusion(r, vr)
    v1 = 1 / (1 / rule.variance + 1 / vr)
    m1 = v1 * (rule.mean / rule.variance + r / vr)
    mean = (share * m1).sum() / share.sum()
    found = rule.maximised({k: v.mean() for k, v in rule.statistics(r, vr).items()})
    torch.testing.assert_close(found.logit.sigmoid(), share.mean())
    torch.testing.assert_close(found.mean, mean)
    expected = (share * ((m1 - mean) ** 2 + v1)).sum() / share.sum()
    torch.testing.assert_close(found.variance, expected)
    held = rule.maximised({k: v.mean() for k, v in rule.statistics(r, vr).items()}, ["variance"])
    assert held.mean is rule.mean and held.logit is rule.logit
    around = (share * ((m1 - rule.mean) ** 2 + v1)).sum() / share.sum()
    torch.testing.assert_close(held.variance, around)


def test_updates_pool_at_any_level() -> None:
    rule = rules.BernoulliGaussian(
        torch.tensor(-1.0).double(),
        torch.tensor([[0.0], [1.0]]).double(),
        torch.ones(2, 1).double(),
    )
    r, vr = torch.randn(2, 50).double(), torch.tensor(0.1).double()
    found = rule.statistics(r, vr)
    rows = rule.maximised(
        {k: v.mean(-1, keepdim=True) for k, v in found.items()}, ["mean", "variance"]
    )
    for i in range(2):
        one = rules.BernoulliGaussian(rule.logit, rule.mean[i], rule.variance[i])
        own = one.maximised({k: v.mean() for k, v in one.statistics(r[i], vr).items()})
        torch.testing.assert_close(rows.mean[i], own.mean.reshape(1))
        torch.testing.assert_close(rows.variance[i], own.variance.reshape(1))
    assert rows.logit is rule.logit


def test_mixture_update_equals_that_of_its_responsibilities() -> None:
    rule = rules.GaussianMixture(*torch.tensor([[0.2, -0.5], [-1.0, 1.5], [0.5, 0.0]]).double())
    r, vr = observations()
    each = rule.posterior(r, vr)
    found = rule.maximised({k: v.mean(0) for k, v in rule.statistics(r, vr).items()})
    share = each.weight.mean(0)
    torch.testing.assert_close(found.logits.softmax(-1), share)
    means = (each.weight * each.mean).mean(0) / share
    torch.testing.assert_close(found.means, means)
    spread = (each.weight * ((each.mean - means) ** 2 + each.variance)).mean(0) / share
    torch.testing.assert_close(found.variances[0], spread[0])
    assert found.variances[1] == 0, "a point mass stays one"


LATENT = {
    "probit": lambda v: rules.Probit((torch.rand(COUNT) > 0.5).double(), v),
    "interval": lambda v: rules.Interval(uniform(-2, 0), uniform(0.1, 2), v),
    "censored": lambda v: rules.Censored(
        uniform(-3, 3).clamp(-1, 1.5), torch.tensor(-1.0).double(), torch.tensor(1.5).double(), v
    ),
    "student_t": lambda v: rules.StudentT(
        torch.tensor(3.0).double(), torch.tensor(0.2).double(), v
    ),
    "horseshoe": lambda v: rules.Horseshoe(torch.tensor(0.2).double(), v),
    "relu": lambda v: rules.ReLU(uniform(0, 2), v),
    "student_noise": lambda v: rules.AdditiveNoise(
        uniform(-2, 2),
        rules.StudentT(torch.tensor(3.0).double(), torch.tensor(0.0).double(), v),
    ),
}


@pytest.mark.parametrize("name", LATENT)
def test_variance_update_obeys_the_identity_of_fisher(name: str) -> None:
    # d log Z / dv = E[e^2] / (2 v^2) - 1 / (2 v) for Gaussian e ~ N(0, v), seen or not.
    variance = torch.tensor(0.6).double().requires_grad_()
    rule, (r, vr) = LATENT[name](variance), observations()
    log_z = rule.moments(r, vr).log_z
    (slope,) = torch.autograd.grad(log_z.mean(), variance)
    pooled = {k: v.detach().mean() for k, v in rule.statistics(r, vr).items()}
    found = rule.maximised(pooled, ["variance"])
    found = found.noise if isinstance(found, rules.AdditiveNoise) else found
    expected = variance + 2 * variance**2 * slope
    torch.testing.assert_close(found.variance, expected.detach(), rtol=1e-5, atol=0)


def test_probit_update_equals_monte_carlo() -> None:
    # y = sign(z + e), and the mean of e^2 given y, by weighting exact draws.
    v, p, vp = (torch.tensor(x).double() for x in (0.7, -0.4, 1.3))
    noise = v.sqrt() * torch.randn(1_000_000, dtype=torch.float64)
    chance = torch.special.ndtr((p + noise) / vp.sqrt())  # of z + e > 0 given e
    expected = (chance * noise**2).mean() / chance.mean()
    found = rules.Probit(torch.ones(1).double(), v).statistics(p.reshape(1), vp)["square"]
    torch.testing.assert_close(found[0], expected, rtol=5e-3, atol=0)  # five standard errors
    s, t = v + vp, p / (v + vp).sqrt()
    h = (log_normal(t, torch.ones(()).double()) - torch.special.log_ndtr(t)).exp()
    torch.testing.assert_close(found[0], v * (1 - v / s * t * h))


@every_learnable
def test_an_update_never_lowers_the_evidence(build: Callable[[], Case]) -> None:
    rule, (r, vr) = build().rule, observations()
    for _ in range(3):
        before = rule.moments(r, vr).log_z
        rule = rule.maximised(rule.statistics(r, vr))  # a parameter of its own for each element
        assert (rule.moments(r, vr).log_z >= before - 1e-6).all()


def test_group_evidence_equals_enumeration_over_the_bits() -> None:
    members, vr = 4, torch.tensor(0.2).double()
    rule = rules.BernoulliGaussian(*torch.tensor([-0.5, 0.2, 1.0]).double())
    r, group = torch.randn(members).double(), torch.tensor(-1.0).double()
    odds = rule.group_log_odds(r, vr)
    off = log_normal(r, vr).sum()
    on = rule.moments(r, vr).log_z.sum()  # the element's own bit is summed inside
    torch.testing.assert_close(odds.sum(), on - off)
    active = (group + odds.sum() - odds).sigmoid()  # extrinsic: all but the element itself
    inner = torch.logit(active * rule.logit.sigmoid())
    share = rule.with_activity(inner).inclusion(r, vr)
    belief = (group + odds.sum()).sigmoid() * rule.inclusion(r, vr)
    torch.testing.assert_close(share, belief, rtol=1e-12, atol=0)


@pytest.mark.parametrize("slab", ["half_normal", "exponential", "laplace", "mixture", "gaussian"])
def test_log_odds_are_evidence_of_the_slab_alone(slab: str) -> None:
    one = torch.tensor(0.7).double()
    inner = {
        "half_normal": rules.HalfNormal(one),
        "exponential": rules.Exponential(one),
        "laplace": rules.Laplace(one),
        "mixture": rules.GaussianMixture(*torch.tensor([[0.1, 0], [-1, 1], [0.3, 2]]).double()),
        "gaussian": rules.Gaussian(one, one),
    }[slab]
    rule, (r, vr) = rules.SpikeSlab(-one, inner), observations()
    expected = inner.moments(r, vr).log_z - log_normal(r, vr)
    torch.testing.assert_close(rule.log_odds(r, vr), expected)
    if slab == "gaussian":
        same = rules.BernoulliGaussian(-one, one, one)
        for a, b in zip(same.moments(r, vr), rule.moments(r, vr), strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(UnsupportedError, match="infinitely denser than its slab"):
        rule.mode(r, vr)


def test_log_odds_keep_their_digits_where_both_evidences_are_huge() -> None:
    rule = rules.SpikeSlab(torch.zeros(()).double(), rules.HalfNormal(torch.ones(()).double()))
    r, vr = torch.tensor([-1.0]).double(), torch.tensor(1e-12, dtype=torch.float64)
    # half a Gaussian of sd 1e-6 a million deviations off: e / t with t = 1e6, density 2 phi(0)
    expected = math.log(2 / math.sqrt(2 * math.pi) * 1e-12)
    assert float(rule.log_odds(r, vr)) == pytest.approx(expected, abs=1e-9)


@every_prior
def test_prior_moments_are_those_without_an_observation(build: Callable[[], Case]) -> None:
    rule = build().rule
    mean, variance = rule.prior_moments()
    r = torch.zeros(COUNT, dtype=torch.float64)
    found = rule.moments(r, torch.tensor(math.inf).double())
    torch.testing.assert_close(found.mean, mean.expand(COUNT), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.variance, variance.expand(COUNT), rtol=1e-8, atol=1e-12)


def _mean_of_y(name: str, z: Tensor) -> Tensor:
    limited = torch.distributions.Normal(torch.zeros(()).double(), math.sqrt(0.3))
    if name == "censored":
        draws = z.unsqueeze(-1) + math.sqrt(0.3) * torch.special.ndtri(nodes(0, 1, 4001)[1:-1])
        return draws.clamp(-1, 1.5).mean(-1)
    return {
        "gaussian": z,
        "probit": limited.cdf(z),
        "logistic": z.sigmoid(),
        "relu": z.relu(),
        "modulus": z.abs(),
        "poisson": 2 * z.exp(),
        "negative_binomial": z.exp(),
        "interval": limited.cdf(1 - z) - limited.cdf(-0.5 - z),
    }[name]


def test_predictions_equal_integration() -> None:
    p, vp, y = (
        torch.tensor([-1.0, 0.4]).double(),
        torch.tensor(0.8).double(),
        torch.ones(2).double(),
    )
    v = torch.tensor(0.3).double()
    cases = {
        "gaussian": rules.GaussianNoise(y, v),
        "probit": rules.Probit(y, v),
        "logistic": rules.Logistic(y),
        "relu": rules.ReLU(y, v),
        "modulus": rules.Modulus(y, v),
        "poisson": rules.Poisson(y, 2 * y),
        "negative_binomial": rules.NegativeBinomial(y, 3 * y),
        "interval": rules.Interval(-0.5 * y, y, v),
        "censored": rules.Censored(y, -y, 1.5 * y, v),
    }
    z = nodes(-9, 9, 2001)
    weight = log_normal(z - column(p), vp).softmax(-1)
    for name, rule in cases.items():
        expected = (weight * _mean_of_y(name, z)).sum(-1)
        torch.testing.assert_close(rule.predict(p, vp), expected, rtol=1e-3, atol=1e-4, msg=name)


def test_what_a_rule_lacks_is_refused_in_words() -> None:
    one = torch.ones(()).double()
    with pytest.raises(UnsupportedError, match="Horseshoe has no mode: .* Laplace"):
        rules.Horseshoe(one, one).mode(one, one)
    with pytest.raises(UnsupportedError, match="Uniform has no closed update"):
        rules.Uniform(-one, one).statistics(one, one)
    with pytest.raises(UnsupportedError, match="Probit has no moments of its own"):
        rules.Probit(one, one).prior_moments()
    with pytest.raises(UnsupportedError, match="Laplace has no prediction"):
        rules.Laplace(one).predict(one, one)
    with pytest.raises(UnsupportedError, match="infinitely denser than a Gaussian"):
        rules.GaussianMixture(*torch.zeros(3, 2).double()).mode(one, one)
