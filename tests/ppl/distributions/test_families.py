"""Every family in one table, against scipy.stats or torch.distributions."""

import inspect

import numpy as np
import pytest
import scipy.stats as st
import torch
from torch import distributions as td

from ppl import distributions as d

COV = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
TRIL = torch.linalg.cholesky(COV)
LOC = torch.tensor([1.0, -1.0], dtype=torch.float64)
P3 = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
SIMPLEX = [[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]
REALS, POSITIVES, UNITS = [-2.0, -0.3, 0.0, 1.7, 30.0], [0.1, 0.9, 2.5, 7.0], [0.05, 0.4, 0.93]
COUNTS, ONE_HOT = [0.0, 1.0, 3.0, 5.0], [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]

# Scalar families: name, arguments, frozen scipy law, values.  `None` compares with
# torch.distributions.
SCALAR = [
    ("Normal", dict(loc=1.0, scale=2.0), st.norm(1, 2), REALS),
    ("Laplace", dict(loc=1.0, scale=2.0), st.laplace(1, 2), REALS),
    ("Logistic", dict(loc=1.0, scale=2.0), st.logistic(1, 2), REALS),
    ("Cauchy", dict(loc=1.0, scale=2.0), st.cauchy(1, 2), REALS),
    ("Gumbel", dict(loc=1.0, scale=2.0), st.gumbel_r(1, 2), REALS),
    ("StudentT", dict(df=7.0, loc=1.0, scale=2.0), st.t(7, 1, 2), REALS),
    ("Uniform", dict(low=-2.5, high=2.0), st.uniform(-2.5, 4.5), REALS),
    ("Exponential", dict(rate=2.0), st.expon(scale=0.5), [-1.0, 0.0, *POSITIVES]),
    ("Gamma", dict(concentration=3.0, rate=2.0), st.gamma(3, scale=0.5), [-1.0, *POSITIVES]),
    ("InverseGamma", dict(concentration=5.5, rate=2.0), st.invgamma(5.5, scale=2), POSITIVES),
    ("HalfNormal", dict(scale=2.0), st.halfnorm(scale=2), [-1.0, *POSITIVES]),
    ("HalfCauchy", dict(scale=2.0), st.halfcauchy(scale=2), [-1.0, *POSITIVES]),
    ("LogNormal", dict(loc=0.3, scale=0.5), st.lognorm(0.5, scale=np.exp(0.3)), [-1.0, *POSITIVES]),
    ("Weibull", dict(scale=2.0, concentration=1.5), st.weibull_min(1.5, scale=2), POSITIVES),
    ("Beta", dict(concentration1=2.0, concentration0=3.0), st.beta(2, 3), [-1.0, *UNITS, 2.0]),
    ("Chi2", dict(df=4.0), st.chi2(4), POSITIVES),
    ("FisherSnedecor", dict(df1=5.0, df2=20.0), st.f(5, 20), POSITIVES),
    ("Pareto", dict(scale=0.5, alpha=6.0), st.pareto(6, scale=0.5), POSITIVES),
    (
        "GeneralizedPareto",
        dict(loc=0.0, scale=2.0, concentration=0.1),
        st.genpareto(0.1, 0, 2),
        POSITIVES,
    ),
    ("Kumaraswamy", dict(concentration1=2.0, concentration0=3.0), None, UNITS),
    ("ContinuousBernoulli", dict(probs=0.3), None, UNITS),
    ("VonMises", dict(loc=0.5, concentration=2.0), st.vonmises(2.0, 0.5), [-2.0, 0.0, 1.0]),
    ("RelaxedBernoulli", dict(temperature=0.7, probs=0.3), None, UNITS),
    ("Bernoulli", dict(probs=0.3), st.bernoulli(0.3), [0.0, 1.0, 2.0]),
    ("Bernoulli", dict(logits=0.4), st.bernoulli(1 / (1 + np.exp(-0.4))), [0.0, 1.0]),
    ("Binomial", dict(total_count=5, probs=0.3), st.binom(5, 0.3), [*COUNTS, 6.0, 0.5]),
    ("Binomial", dict(total_count=5, logits=0.4), st.binom(5, 1 / (1 + np.exp(-0.4))), COUNTS),
    ("Geometric", dict(probs=0.3), st.geom(0.3, loc=-1), COUNTS),
    ("NegativeBinomial", dict(total_count=2.5, probs=0.3), st.nbinom(2.5, 0.7), COUNTS),
    ("Poisson", dict(rate=2.5), st.poisson(2.5), [-1.0, *COUNTS]),
]
VECTOR = [
    ("Categorical", dict(probs=P3), [0, 2, 1]),
    ("Categorical", dict(logits=3 * P3), [0, 2, 1]),
    ("Dirichlet", dict(concentration=3 * P3), SIMPLEX),
    ("Multinomial", dict(total_count=4, probs=P3), [[1.0, 1.0, 2.0], [0.0, 4.0, 0.0]]),
    ("MultivariateNormal", dict(loc=LOC, covariance_matrix=COV), [[0.3, 0.7], [2.0, 1.0]]),
    ("MultivariateNormal", dict(loc=LOC, precision_matrix=COV), [[0.3, 0.7], [2.0, 1.0]]),
    ("MultivariateNormal", dict(loc=LOC, scale_tril=TRIL), [[0.3, 0.7], [2.0, 1.0]]),
    ("LowRankMultivariateNormal", dict(loc=LOC, cov_factor=TRIL, cov_diag=LOC**2), [[0.3, 0.7]]),
    ("OneHotCategorical", dict(probs=P3), ONE_HOT),
    ("OneHotCategoricalStraightThrough", dict(logits=P3), ONE_HOT),
    ("LogisticNormal", dict(loc=LOC, scale=LOC**2), SIMPLEX),
    ("RelaxedOneHotCategorical", dict(temperature=0.7, probs=P3), SIMPLEX),
    ("LKJCholesky", dict(dim=2, concentration=1.5), [[[1.0, 0.0], [0.6, 0.8]]]),
    ("Wishart", dict(df=4.0, covariance_matrix=COV), [[[2.0, 0.3], [0.3, 1.0]]]),
    ("Wishart", dict(df=4.0, precision_matrix=COV), [[[2.0, 0.3], [0.3, 1.0]]]),
]
ROWS = [(name, args, oracle, values) for name, args, oracle, values in SCALAR]
ROWS += [(name, args, None, values) for name, args, values in VECTOR]
IDS = [f"{name}-{'-'.join(args)}" for name, args, *_ in ROWS]
every_family = pytest.mark.parametrize(("name", "args", "oracle", "values"), ROWS, ids=IDS)


def tensor(x, dtype=torch.float64):
    return torch.as_tensor(x, dtype=dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def reference(name, args):
    exact = {
        k: v if k in ("dim", "total_count") and name != "NegativeBinomial" else tensor(v)
        for k, v in args.items()
    }
    return getattr(td, name)(**exact, validate_args=False)


@every_family
def test_log_prob_equals_the_oracle(name, args, oracle, values):
    law = getattr(d, name)(**args)
    value = torch.tensor(values) if name == "Categorical" else tensor(values)
    if oracle is None:
        expected = reference(name, args).log_prob(value)
    else:
        log = oracle.logpmf if law.is_discrete else oracle.logpdf
        expected = tensor(log(np.array(values)))
    torch.testing.assert_close(law.log_prob(value), expected, rtol=1e-10, atol=1e-10)


@every_family
def test_moments_equal_the_oracle(name, args, oracle, values):
    law = getattr(d, name)(**args)
    other = reference(name, args) if oracle is None or name == "VonMises" else None
    for moment in ("mean", "variance"):
        try:
            expected = (
                getattr(other, moment)
                if other is not None
                else getattr(oracle, moment[:4].rstrip("i"))()
            )
        except NotImplementedError:
            expected = torch.tensor(torch.nan)
        if not bool(torch.isfinite(tensor(expected)).all()):
            continue
        torch.testing.assert_close(getattr(law, moment), tensor(expected), rtol=1e-8, atol=1e-10)


@every_family
def test_draws_have_the_moments_of_the_law_within_five_standard_errors(name, args, oracle, values):
    law, n = getattr(d, name)(**args), 20000
    draws = law.sample((n,), generator(1)).double()
    assert bool(law.support.check(draws).all())
    assert draws.shape == (n, *law.event_shape)
    try:
        mean, variance = law.mean, law.variance
    except NotImplementedError:
        return
    if name == "VonMises":  # its moments are circular: those of exp(i x)
        draws = torch.cos(draws - mean)
        mean = 1 - variance
        variance = draws.var()
    if not bool((torch.isfinite(mean) & torch.isfinite(variance)).all()):
        return
    slack = 5 * (variance / n).sqrt() + 1e-12
    assert bool(((draws.mean(0) - mean).abs() <= slack).all())
    spread = (draws - draws.mean(0)).square()
    if name not in (
        "VonMises",
        "Pareto",
        "GeneralizedPareto",
        "InverseGamma",
    ):  # fourth moments too heavy
        error = 5 * spread.std(0) / n**0.5 + 1e-12
        assert bool(((spread.mean(0) - variance).abs() <= error).all())


@every_family
def test_draws_repeat_with_their_generator_and_leave_the_global_one(name, args, oracle, values):
    law, before = getattr(d, name)(**args), torch.random.get_rng_state()
    first, again = law.sample((3,), generator(7)), law.sample((3,), generator(7))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert law.sample((2, 3)).shape == (2, 3, *law.event_shape)


@every_family
def test_leaves_come_back_by_replace(name, args, oracle, values):
    law = getattr(d, name)(**args)
    leaves = law.leaves()
    assert [leaf.path for leaf in leaves] == [k for k in args if k != "dim"]
    assert all(leaf.event_dim == type(law).arg_event_dims[leaf.path] for leaf in leaves)
    value = torch.tensor(values) if name == "Categorical" else tensor(values)
    other = law.replace([tensor(leaf.value) for leaf in leaves])
    assert type(other) is type(law) and other is not law
    torch.testing.assert_close(other.log_prob(value), law.log_prob(value), rtol=0, atol=0)
    assert repr(law).startswith(f"{name}({leaves[0].path}=") or name == "LKJCholesky"


@every_family
def test_leaves_with_axes_broadcast_minimally(name, args, oracle, values):
    law = getattr(d, name)(**args)
    leaves, event = law.leaves(), law.event_dim
    axes = [(3, 1), (1, 4)]
    lowered = [
        tensor(leaf.value).expand(*axes[i % 2], *tensor(leaf.value).shape)
        for i, leaf in enumerate(leaves)
    ]
    one = torch.tensor(values[0]) if name == "Categorical" else tensor(values[0])
    value = one.expand(5, 1, 1, *one.shape)
    result = law.replace(lowered).log_prob(value)
    assert result.shape == (5, 3, 4 if len(leaves) > 1 else 1)
    torch.testing.assert_close(
        result, law.log_prob(one).expand(result.shape), rtol=1e-10, atol=1e-10
    )
    assert law.replace(lowered).batch_shape == result.shape[1:]
    assert law.replace(lowered).event_shape == law.event_shape
    assert one.ndim == event


@every_family
def test_densities_pass_through_vmap_and_float32(name, args, oracle, values):
    law = getattr(d, name)(**args)
    value = torch.tensor(values) if name == "Categorical" else tensor(values)
    leaves = [tensor(leaf.value) for leaf in law.leaves()]
    mapped = torch.func.vmap(lambda v: law.replace(leaves).log_prob(v))(value)
    torch.testing.assert_close(mapped, law.log_prob(value))
    single = law.replace([leaf.float() for leaf in leaves])
    result = single.log_prob(value if name == "Categorical" else value.float())
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), law.log_prob(value), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["covariance_matrix", "precision_matrix", "scale_tril"])
def test_normal_vectors_with_different_batches_equal_torch(name):
    matrix = torch.stack([COV, 2 * COV, 3 * COV])[:, None]
    matrix = torch.linalg.cholesky(matrix) if name == "scale_tril" else matrix
    loc = torch.randn(1, 4, 2, generator=generator(), dtype=torch.float64)
    value = torch.randn(5, 1, 1, 2, generator=generator(1), dtype=torch.float64)
    law = d.MultivariateNormal(loc, **{name: matrix})
    expected = td.MultivariateNormal(loc, **{name: matrix}).log_prob(value)
    torch.testing.assert_close(law.log_prob(value), expected)
    draws = law.sample((20000, 3, 4), generator(2))
    torch.testing.assert_close(draws.var(0), law.variance, rtol=0.06, atol=0)


@pytest.mark.parametrize(
    ("name", "args", "oracle"),
    [row[:3] for row in SCALAR if getattr(d, row[0]).has_cdf],
    ids=[row[0] for row in SCALAR if getattr(d, row[0]).has_cdf],
)
def test_distribution_functions_equal_scipy_and_are_inverted(name, args, oracle):
    law, p = getattr(d, name)(**args), np.array([1e-6, 0.2, 0.5, 0.9, 1 - 1e-6])
    x = oracle.ppf(p)
    for ours, theirs in [("cdf", "cdf"), ("log_cdf", "logcdf"), ("log_survival", "logsf")]:
        expected = tensor(getattr(oracle, theirs)(x))
        torch.testing.assert_close(getattr(law, ours)(tensor(x)), expected, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(law.icdf(tensor(p)), tensor(x), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(law.isf(tensor(p)), tensor(oracle.isf(p)), rtol=1e-6, atol=1e-9)


def test_gradients_outside_the_support_are_finite():
    for law in (d.Gamma(2.0, 1.0), d.Beta(2.0, 2.0), d.LogNormal(0.0, 1.0), d.Poisson(2.0)):
        value = tensor([-1.0, 0.5]).requires_grad_()
        law.log_prob(value)[-1].backward()
        assert bool(torch.isfinite(value.grad).all())


def test_finite_families_list_their_values():
    assert d.Bernoulli(0.5).enumerate_support().tolist() == [0, 1]
    assert d.Categorical(probs=P3).enumerate_support().tolist() == [0, 1, 2]
    assert d.Binomial(2, 0.5).enumerate_support().tolist() == [0, 1, 2]
    assert d.Poisson(1.0).enumerate_support() is None


def test_a_category_remembers_its_plate_and_is_minus_infinity_outside():
    law = d.Categorical(probs=P3, over="cluster").replace([P3.expand(4, 3)])
    assert law.over == "cluster"
    assert law.log_prob(torch.tensor([-1, 3])[:, None]).tolist() == [[-torch.inf] * 4] * 2


def test_every_torch_family_is_known():
    families = {
        name
        for name in td.__all__
        if inspect.isclass(getattr(td, name)) and issubclass(getattr(td, name), td.Distribution)
    }
    assert families - {"Distribution", "ExponentialFamily"} <= set(d.KNOWN)
    assert {name for name, *_ in ROWS} <= set(d.KNOWN)


@pytest.mark.parametrize(
    ("name", "args", "oracle", "values"),
    [
        row for row in ROWS if row[0] not in ("Logistic", "GeneralizedPareto")
    ],  # lacking; wrong dtype
)
def test_to_torch_is_the_same_law(name, args, oracle, values):
    law = getattr(d, name)(**args)
    value = torch.tensor(values) if name == "Categorical" else tensor(values)
    value = value[law.log_prob(value) > -torch.inf]  # torch gives numbers outside a support too
    torch.testing.assert_close(law.to_torch().log_prob(value), law.log_prob(value))
