"""Wrappers and mixtures: total mass by quadrature, draws against densities, special laws,
foreign laws.
"""

import math

import pytest
import scipy.stats as st
import torch
from torch import distributions as td

from ppl import distributions as d
from ppl.errors import ModelError

TRUNCATABLE = {
    "Normal": d.Normal(0.5, 2.0),
    "HalfNormal": d.HalfNormal(2.0),
    "LogNormal": d.LogNormal(0.2, 0.7),
    "Laplace": d.Laplace(0.5, 1.0),
    "Logistic": d.Logistic(0.5, 1.0),
    "Cauchy": d.Cauchy(0.5, 1.0),
    "HalfCauchy": d.HalfCauchy(1.0),
    "Exponential": d.Exponential(0.7),
    "Gamma": d.Gamma(2.5, 1.5),
    "Weibull": d.Weibull(2.0, 1.5),
    "Uniform": d.Uniform(-1.0, 4.0),
}
LIMITS = [(0.3, 2.5), (None, 2.5), (0.3, None)]
truncatable = pytest.mark.parametrize("law", TRUNCATABLE.values(), ids=TRUNCATABLE)
limited = pytest.mark.parametrize(("low", "high"), LIMITS, ids=["both", "high", "low"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tensor(x):
    return torch.as_tensor(x, dtype=torch.float64)


def mass(law, low, high, points=200_001):
    """Simpson's rule for the density, after x = sinh(t), which reaches far tails with few
    points.
    """
    ends = [math.asinh(low), math.asinh(high)]
    t = torch.linspace(*ends, points, dtype=torch.float64)
    density = law.log_prob(torch.sinh(t).clamp(low, high)).exp() * torch.cosh(t)
    weights = torch.ones_like(t)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return float((weights * density).sum() * (t[1] - t[0]) / 3)


@truncatable
@limited
def test_a_truncated_law_has_mass_one_and_draws_within_its_limits(law, low, high):
    cut = d.Truncated(law, low, high)
    ends = (-1e7 if low is None else low, 1e7 if high is None else high)
    assert mass(cut, *ends) == pytest.approx(1, abs=1e-4)  # some densities jump at an end
    draws = cut.sample((4000,), generator(3))
    assert bool(cut.support.check(draws).all())
    middle = tensor(0.9)
    below = (law.cdf(middle) - (0 if low is None else law.cdf(tensor(low)))) / (
        (1 if high is None else law.cdf(tensor(high)))
        - (0 if low is None else law.cdf(tensor(low)))
    )
    error = 5 * float((below * (1 - below) / 4000).sqrt())
    assert float((draws < middle).double().mean()) == pytest.approx(float(below), abs=error)
    outside = tensor([0.2 if low is not None else 2.6])
    assert cut.log_prob(outside).item() == -math.inf


@pytest.mark.parametrize(("low", "high"), [(8.0, 9.0), (-9.0, -8.0), (30.0, None), (-1.0, 12.0)])
def test_a_normal_cut_far_in_its_tail_equals_scipy(low, high):
    cut = d.Truncated(d.Normal(0.0, 1.0), low, high)
    x = tensor(low + 0.1)
    expected = st.truncnorm(low, math.inf if high is None else high).logpdf(float(x))
    assert cut.log_prob(x).item() == pytest.approx(expected, rel=1e-9)
    draws = cut.sample((2000,), generator(1))
    assert bool(torch.isfinite(draws).all()) and draws.unique().numel() > 1900


@truncatable
@limited
def test_a_censored_law_has_mass_one_with_its_tails(law, low, high):
    cut = d.Censored(law, low, high)
    total = mass(law, -1e7 if low is None else low, 1e7 if high is None else high)
    total += sum(float(cut.log_prob(tensor(end)).exp()) for end in (low, high) if end is not None)
    assert total == pytest.approx(1, abs=1e-4)
    draws = cut.sample((2000,), generator())
    if high is not None:
        at_limit = float((draws == high).double().mean())
        p = float(cut.log_prob(tensor(high + 1)).exp())
        assert at_limit == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 2000) + 1e-9)


MIXTURES = {
    "list": d.Mixture([0.3, 0.7], [d.Normal(-1.0, 0.5), d.Laplace(2.0, 1.0)]),
    "one": d.Mixture([3.0, 7.0], d.Normal([-1.0, 2.0], 0.5)),
    "same_family": d.MixtureSameFamily(
        d.Categorical(logits=[0.1, 0.4]), d.Normal([-1.0, 2.0], 0.5)
    ),
}


@pytest.mark.parametrize("law", MIXTURES.values(), ids=MIXTURES)
def test_a_mixture_has_mass_one_and_the_moments_of_its_draws(law):
    assert mass(law, -200.0, 200.0) == pytest.approx(1, abs=1e-6)
    draws = law.sample((20000,), generator(2))
    assert float(draws.mean()) == pytest.approx(
        float(law.mean), abs=5 * float(draws.std()) / 20000**0.5
    )
    assert float(draws.var()) == pytest.approx(float(law.variance), rel=0.06)
    assert law.batch_shape == () and law.event_shape == ()


def test_mixtures_of_vectors_equal_torch_and_broadcast():
    loc, eye = tensor([[0.0, 0.0], [2.0, 1.0], [4.0, 0.0]]), torch.eye(2, dtype=torch.float64)
    ours = d.Mixture([0.2, 0.3, 0.5], d.MultivariateNormal(loc, covariance_matrix=eye))
    chooser = td.Categorical(probs=tensor([0.2, 0.3, 0.5]))
    oracle = td.MixtureSameFamily(chooser, td.MultivariateNormal(loc, covariance_matrix=eye))
    value = torch.randn(5, 2, dtype=torch.float64, generator=generator())
    torch.testing.assert_close(ours.log_prob(value), oracle.log_prob(value))
    torch.testing.assert_close(ours.mean, oracle.mean)
    torch.testing.assert_close(ours.variance, oracle.variance)
    parts = [d.MultivariateNormal(m, covariance_matrix=eye) for m in loc]
    torch.testing.assert_close(
        d.Mixture([0.2, 0.3, 0.5], parts).log_prob(value), oracle.log_prob(value)
    )
    assert [(x.path, x.event_dim) for x in ours.leaves()] == [
        ("weights", 1), ("components.loc", 2), ("components.covariance_matrix", 3)
    ]  # fmt: skip
    assert ours.event_dim == 1 and ours.sample((4,), generator()).shape == (4, 2)


def test_leaf_paths_name_the_component():
    paths = [leaf.path for leaf in MIXTURES["list"].leaves()]
    assert paths == [
        "weights",
        "components.0.loc",
        "components.0.scale",
        "components.1.loc",
        "components.1.scale",
    ]


@pytest.mark.parametrize("family", [d.ZeroInflated, d.Hurdle])
@pytest.mark.parametrize(
    "inner", [d.Poisson(2.0), d.NegativeBinomial(2.0, 0.4), d.Binomial(6, 0.3), d.Poisson(0.02)]
)
def test_a_law_with_other_zeros_has_mass_one(family, inner):
    law, x = family(inner, 0.25), torch.arange(200, dtype=torch.float64)
    p = law.log_prob(x).exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    assert float((p * x).sum()) == pytest.approx(float(law.mean))
    assert float((p * x**2).sum() - (p * x).sum() ** 2) == pytest.approx(float(law.variance))
    draws = law.sample((20000,), generator())
    for value in (0, 1, 2):
        share, chance = float((draws == value).double().mean()), float(p[value])
        assert share == pytest.approx(chance, abs=5 * math.sqrt(chance / 20000))


def test_a_hurdle_decides_alone_about_zeros():
    law = d.Hurdle(d.Poisson(3.0), 0.25)
    assert law.log_prob(tensor(0.0)).exp().item() == pytest.approx(0.25)
    expected = 0.75 * st.poisson(3).pmf(4) / st.poisson(3).sf(0)
    assert law.log_prob(tensor(4.0)).exp().item() == pytest.approx(expected)


def test_spike_and_slab_is_a_mixed_measure():
    law = d.SpikeSlab(0.3, d.Normal(1.0, 2.0))
    assert law.log_prob(tensor(0.0)).exp().item() == pytest.approx(0.7)
    assert law.log_prob(tensor(2.0)).item() == pytest.approx(
        math.log(0.3) + st.norm(1, 2).logpdf(2)
    )
    draws = law.sample((20000,), generator())
    assert float((draws != 0).double().mean()) == pytest.approx(
        0.3, abs=5 * math.sqrt(0.21 / 20000)
    )
    assert float(draws.var()) == pytest.approx(float(law.variance), rel=0.06)


def test_independent_dimensions_are_one_draw():
    law = d.Independent(d.Normal(torch.zeros(2, 3, dtype=torch.float64), 1.0), 1)
    assert (law.batch_shape, law.event_shape, law.event_dim) == ((2,), (3,), 1)
    value = tensor([0.1, 0.2, 0.3])
    torch.testing.assert_close(law.log_prob(value), law.to_torch().log_prob(value))
    assert law.sample((4, 2), generator()).shape == (4, 2, 3)
    # A scalar leaf belongs to the event too: lowered, it gets a size-1 dimension for it.
    lowered = law.replace([torch.zeros(5, 1, 3), torch.ones(1, 6, 1)])
    assert lowered.log_prob(value.float()).shape == (5, 6)


def test_transforms_carry_the_density():
    scale = tensor([2.0, 3.0])
    law = d.TransformedDistribution(
        d.Normal(tensor([0.0, 1.0]), 1.0), [td.AffineTransform(1.0, scale), td.ExpTransform()]
    )
    value = tensor([[0.4, 9.0], [3.0, 1.0]])
    torch.testing.assert_close(law.log_prob(value), law.to_torch().log_prob(value))
    assert law.log_prob(tensor([-1.0, 1.0]))[0].item() == -math.inf
    assert [leaf.path for leaf in law.leaves()][2:] == ["transforms.parts.0.scale"]
    doubled = law.replace([leaf.value for leaf in law.leaves()][:2] + [2 * scale])
    other = d.TransformedDistribution(
        law.base_distribution, [td.AffineTransform(1.0, 2 * scale), td.ExpTransform()]
    )
    torch.testing.assert_close(doubled.log_prob(value), other.log_prob(value))
    assert (law.batch_shape, law.event_shape) == ((2,), ())
    assert bool(law.support.check(law.sample((9, 2), generator())).all())
    vector = d.TransformedDistribution(
        d.Normal(tensor([0.0, 1.0]), 1.0), td.StickBreakingTransform()
    )
    assert (vector.batch_shape, vector.event_shape, vector.event_dim) == ((), (3,), 1)
    x = vector.sample((4,), generator())
    torch.testing.assert_close(vector.log_prob(x), vector.to_torch().log_prob(x))


@pytest.mark.parametrize(
    "kernel", ["huber", "tukey", "cauchy", "geman_mcclure", "dcs", "truncated"]
)
def test_robust_losses_are_quadratic_inside_and_grow_slowly_outside(kernel):
    k = tensor(1.5)
    small, large = tensor([1e-3, -1e-3]), torch.linspace(0, 20, 2001, dtype=torch.float64)
    torch.testing.assert_close(d.robust_loss(kernel, small, k), 0.5 * small**2, rtol=1e-5, atol=0)
    loss = d.robust_loss(kernel, large, k)
    assert bool((loss.diff() >= -1e-12).all()) and bool((loss <= 0.5 * large**2 + 1e-12).all())
    assert float(loss.diff().max()) < 0.02  # continuous, and its slope stays below k
    law = d.Normal(1.0, 2.0).robust(kernel, 1.5)
    expected = -d.robust_loss(kernel, tensor(2.0), k) - math.log(2) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(law.log_prob(tensor(5.0)), expected)
    assert [leaf.path for leaf in law.leaves()] == ["dist.loc", "dist.scale", "k"]


def test_the_student_loss_is_that_of_a_student_t():
    r = torch.linspace(-9, 9, 7, dtype=torch.float64)
    difference = st.t(4).logpdf(0) - st.t(4).logpdf(r.numpy())
    torch.testing.assert_close(d.robust_loss("student", r, tensor(4.0)), tensor(difference))


def test_a_mask_keeps_or_drops_an_element():
    law = d.Normal(0.0, 1.0).masked([True, False])
    torch.testing.assert_close(law.log_prob(tensor(0.5)), tensor([st.norm.logpdf(0.5), 0.0]))
    assert law.leaves()[-1].path == "keep"


def test_flat_laws_have_no_density_to_speak_of():
    assert d.Flat(3).batch_shape == (3,) and d.Flat(3).log_prob(tensor(1.0)).tolist() == [0, 0, 0]
    assert d.HalfFlat().log_prob(tensor([-1.0, 1.0])).tolist() == [-math.inf, 0]
    assert d.Flat().is_improper and d.Flat().sample((2,)).tolist() == [0, 0]
    assert d.HalfFlat().sample((2,)).tolist() == [1, 1] and d.Flat(2).leaves() == ()


def test_a_delta_sits_at_its_point():
    law = d.Delta(2.0)
    assert law.log_prob(tensor([2.0, 2.1])).tolist() == [0, -math.inf]
    assert law.sample((2,)).tolist() == [2, 2] and bool(law.support.check(law.sample()))


def test_a_chain_law_only_carries_its_parts():
    law = d.Markov(d.Normal(0.0, 1.0), lambda x: d.Normal(x, 1.0))
    assert law.is_markov and law.init.leaves()[1].value == 1.0 and law.order == 1
    with pytest.raises(ModelError, match="ordered plate"):
        law.log_prob(tensor(0.0))


class Shifted(td.Distribution):
    """A user's law: a Normal whose parameter sits in a nested distribution."""

    arg_constraints = {}
    support = td.constraints.real

    def __init__(self, shift, scale):
        self.inner, self.shift = td.Normal(0.0, scale), shift
        super().__init__(torch.as_tensor(shift).shape)

    def log_prob(self, value):
        return self.inner.log_prob(value - self.shift)

    def sample(self, sample_shape=()):
        return self.shift + self.inner.sample(sample_shape)


def test_a_users_law_is_wrapped_with_all_its_tensors():
    law = d.as_distribution(Shifted(tensor(1.0), tensor(2.0)))
    assert law.needs_vmap and [leaf.path for leaf in law.leaves()] == [
        "inner.loc",
        "inner.scale",
        "shift",
    ]
    moved = law.replace([tensor(0.0), tensor(2.0), tensor(3.0)])
    assert moved.log_prob(tensor(5.0)).item() == pytest.approx(st.norm(3, 2).logpdf(5))
    assert law.log_prob(tensor(5.0)).item() == pytest.approx(st.norm(1, 2).logpdf(5))
    torch.testing.assert_close(law.sample((3,), generator()), law.sample((3,), generator()))
    each = torch.func.vmap(lambda s: law.replace([0 * s, s, s]).log_prob(tensor(5.0)))(
        tensor([1.0, 2.0])
    )
    torch.testing.assert_close(each, tensor(st.norm([1, 2], [1, 2]).logpdf(5)))


def test_torchs_own_laws_become_ours():
    law = d.as_distribution(td.Normal(tensor(1.0), tensor(2.0)))
    assert type(law) is d.Normal and law.scale.item() == 2.0
    assert type(d.as_distribution(td.Bernoulli(logits=tensor(0.3)))) is d.Bernoulli
    wrapped = d.as_distribution(td.Independent(td.Normal(torch.zeros(2), 1.0), 1))
    assert wrapped.needs_vmap and wrapped.event_dim == 1


def test_what_torch_caches_does_not_outlive_its_parameters():
    inner = td.Independent(td.Bernoulli(probs=tensor([0.2, 0.6])), 1)
    law, x = d.Foreign(inner), tensor([1.0, 0.0])
    leaves = law.leaves()
    law.log_prob(x)  # torch now remembers the logits
    moved = law.replace([torch.full_like(leaf.value, 0.5) for leaf in leaves])
    assert moved.log_prob(x).item() == pytest.approx(2 * math.log(0.5))
