"""State evolution against closed forms and against runs of the algorithms.

One run at n = 6000 ends 0.3 dB from its limit, and so would the median of a few.  Hence many signals a matrix, as
batch axes of one run: their errors are all but independent, and their mean is known to 0.3 dB over the root of the count.
"""

import math
import time

import pytest
import torch

from ppl.errors import DataError, UnsupportedError
from ppl.inference.amp import gamp, vamp
from ppl.inference.amp.averages import Outcomes, estimate_coefficients
from ppl.inference.amp.operators import dense
from ppl.inference.amp.rules.channels import GaussianNoise, Probit
from ppl.inference.amp.rules.piecewise import Laplace
from ppl.inference.amp.rules.priors import BernoulliGaussian, Gaussian
from ppl.inference.amp.spectrum import Gram, Spectrum
from ppl.inference.amp.state_evolution import Setting, soft_threshold_curve, state_evolution_curve

ONE = torch.ones((), dtype=torch.float64)
SPARSE = BernoulliGaussian(torch.tensor(math.log(1 / 9), dtype=torch.float64), 0 * ONE, ONE)
NOISE = 0.1 / 0.5 / 1000  # 30 dB at m / n = 0.5, columns of norm one
SIGNS = Outcomes(torch.tensor([-1.0, 1.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64))


def quantile_signal(n, seed):
    """Support of exactly 10 %, amplitudes the quantiles of N(0, 1), permuted: little finite-size noise."""
    generator = torch.Generator().manual_seed(seed)
    count = n // 10
    levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    x = torch.zeros(n, dtype=torch.float64)
    amplitudes = torch.special.ndtri(levels)[torch.randperm(count, generator=generator)]
    x[torch.randperm(n, generator=generator)[:count]] = amplitudes
    return x


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def errors(module, problem, prior, channel, x, sweeps):
    """Mean squared error after every sweep."""
    mean, variance = (each.expand(x.shape) for each in prior.prior_moments())
    state, found = module.init(problem, mean, variance), []
    for _ in range(sweeps):
        state, _ = module.step(problem, state, prior, channel)
        found.append((state.mean - x).square().mean(-1))
    return torch.stack(found)


def gap(runs, predicted):
    """Largest distance in dB on the way, and at the end, of the mean over all runs."""
    mean = torch.cat(runs, -1).mean(-1)
    count = min(len(mean), len(predicted))
    distance = 10 * (mean[:count].log10() - predicted[:count].log10()).abs()
    return float(distance.max()), float(10 * abs(math.log10(mean[-1] / predicted[-1])))


def linear_runs(n, m, matrices, signals, sweeps=40):
    """Errors ``[sweeps, signals]``, a matrix at a time."""
    found = []
    for seed in range(matrices):
        matrix = normal(m, n, seed=seed) / m**0.5
        x = torch.stack([quantile_signal(n, 1000 * seed + each) for each in range(signals)])
        noise = NOISE**0.5 * normal(signals, m, seed=seed + 100)
        channel = GaussianNoise(x @ matrix.mT + noise, ONE * NOISE)
        found.append(errors(gamp, gamp.Problem(dense(matrix)), SPARSE, channel, x, sweeps))
    return found


def geometric_spectrum(n, m, condition=100.0):
    values = torch.logspace(0, -math.log10(condition), m, dtype=torch.float64).square()
    return Spectrum(values * n / values.sum(), torch.ones_like(values))


def vamp_runs(n, m, matrices, signals, sweeps=60):
    """Random singular vectors on the right; those on the left change nothing and are left out."""
    values, found = geometric_spectrum(n, m).values, []
    for seed in range(matrices):
        basis = torch.linalg.qr(normal(n, m, seed=seed))[0]
        x = torch.stack([quantile_signal(n, 1000 * seed + each) for each in range(signals)])
        operator = dense(values.sqrt().unsqueeze(-1) * basis.mT)
        operator.__dict__["gram"] = Gram(values, torch.eye(m, dtype=torch.float64))
        noise = NOISE**0.5 * normal(signals, m, seed=seed + 500)
        channel = GaussianNoise(operator.mv(x) + noise, ONE * NOISE)
        found.append(errors(vamp, vamp.Problem(operator), SPARSE, channel, x, sweeps))
    return found


def probit_runs(n, m, matrices, signals, sweeps=30):
    prior = BernoulliGaussian(SPARSE.logit, 0 * ONE, 10 * ONE)
    found = []
    for seed in range(matrices):
        matrix = normal(m, n, seed=seed) / n**0.5
        x = torch.stack([quantile_signal(n, 1000 * seed + each) for each in range(signals)])
        x = x * 10**0.5
        y = torch.sign(x @ matrix.mT + normal(signals, m, seed=seed + 100))
        found.append(errors(gamp, gamp.Problem(dense(matrix)), prior, Probit(y, ONE), x, sweeps))
    setting = Setting(prior, lambda y: Probit(y, ONE), m / n, gain=1.0, outcomes=SIGNS)
    return found, state_evolution_curve(setting)


# --- closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [1e-4, 0.1, 3.0])
def test_gaussian_prior_in_closed_form(noise):
    found = estimate_coefficients(Gaussian(0.5 * ONE, 2 * ONE), noise * ONE)
    assert float(found.mse) == pytest.approx(2 * noise / (2 + noise), rel=1e-9)
    assert float(found.power) == pytest.approx(0.25 + 4 / (2 + noise), rel=1e-9)
    assert abs(float(found.deficit)) < 1e-12


def test_lmmse_fixed_point():
    """With a Gaussian prior the fixed point solves a quadratic equation, as random matrix theory has it."""
    ratio, noise = 0.5, 0.1
    found = state_evolution_curve(Setting(Gaussian(0 * ONE, ONE), noise, ratio))
    tau = noise + found.fixed_point / ratio
    assert found.converged
    assert found.fixed_point == pytest.approx(tau / (1 + tau), rel=1e-4)


def test_a_mismatched_rule_equal_to_the_truth_changes_nothing():
    same = BernoulliGaussian(SPARSE.logit, SPARSE.mean, SPARSE.variance)
    plain = state_evolution_curve(Setting(SPARSE, NOISE, 0.5))
    other = state_evolution_curve(
        Setting(SPARSE, NOISE, 0.5, assumed_prior=same, assumed_channel=NOISE)
    )
    torch.testing.assert_close(plain.mse, other.mse, rtol=1e-9, atol=0.0)


def test_wrong_assumptions_cost_something():
    best = state_evolution_curve(Setting(SPARSE, NOISE, 0.5)).fixed_point
    wrong_noise = state_evolution_curve(Setting(SPARSE, NOISE, 0.5, assumed_channel=4 * NOISE))
    dense_prior = Gaussian(0 * ONE, 0.1 * ONE)
    wrong_prior = state_evolution_curve(Setting(SPARSE, NOISE, 0.5, assumed_prior=dense_prior))
    assert best < wrong_noise.fixed_point < wrong_prior.fixed_point


def test_gaussian_outcomes_on_a_grid_equal_the_closed_form():
    grid = torch.linspace(-12, 12, 1201, dtype=torch.float64)
    outcomes = Outcomes(grid, torch.full_like(grid, 0.02))
    prior = Gaussian(0 * ONE, ONE)
    closed = state_evolution_curve(Setting(prior, 0.3, 0.7))
    quadrature = state_evolution_curve(
        Setting(prior, lambda y: GaussianNoise(y, 0.3 * ONE), 0.7, outcomes=outcomes)
    )
    torch.testing.assert_close(closed.mse, quadrature.mse, rtol=1e-6, atol=0.0)


def test_mismatched_outcomes_on_a_grid_equal_the_closed_form():
    grid = torch.linspace(-12, 12, 1201, dtype=torch.float64)
    outcomes = Outcomes(grid, torch.full_like(grid, 0.02))
    prior = Gaussian(0 * ONE, ONE)
    closed = state_evolution_curve(Setting(prior, 0.3, 0.7, assumed_channel=1.0))
    quadrature = state_evolution_curve(
        Setting(
            prior,
            lambda y: GaussianNoise(y, 0.3 * ONE),
            0.7,
            outcomes=outcomes,
            assumed_channel=lambda y: GaussianNoise(y, ONE),
        )
    )
    torch.testing.assert_close(closed.mse, quadrature.mse, rtol=1e-5, atol=0.0)


def test_vamp_on_an_iid_spectrum_has_gamps_fixed_point():
    spectrum = dense(normal(1000, 2000, seed=0) / 1000**0.5).gram.spectrum
    one = state_evolution_curve(Setting(SPARSE, NOISE, 0.5)).fixed_point
    other = state_evolution_curve(Setting(SPARSE, NOISE, 0.5, spectrum=spectrum)).fixed_point
    assert abs(10 * math.log10(one / other)) < 0.02


def test_vamp_with_a_channel_by_quadrature():
    spectrum = dense(normal(1200, 600, seed=0) / 600**0.5).gram.spectrum
    prior = BernoulliGaussian(SPARSE.logit, 0 * ONE, 10 * ONE)
    setting = Setting(prior, lambda y: Probit(y, ONE), 2.0, 1.0, SIGNS)
    one = state_evolution_curve(setting).fixed_point
    other = state_evolution_curve(
        Setting(prior, setting.channel, 2.0, 1.0, SIGNS, spectrum=spectrum)
    ).fixed_point
    assert abs(10 * math.log10(one / other)) < 0.05


def test_what_is_refused():
    with pytest.raises(UnsupportedError, match="outcomes"):
        state_evolution_curve(Setting(SPARSE, lambda y: Probit(y, ONE), 2.0))
    few = Outcomes(torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    with pytest.raises(DataError, match="0.5000 of the probability"):
        state_evolution_curve(Setting(SPARSE, lambda y: Probit(y, ONE), 2.0, outcomes=few))
    spectrum = dense(torch.eye(3, dtype=torch.float64)).gram.spectrum
    with pytest.raises(UnsupportedError, match="VAMP"):
        state_evolution_curve(Setting(SPARSE, NOISE, 1.0, assumed_channel=1.0, spectrum=spectrum))


def test_it_takes_less_than_a_second():
    start = time.process_time()
    state_evolution_curve(Setting(SPARSE, NOISE, 0.5))
    assert time.process_time() - start < 1.0


# --- against runs -----------------------------------------------------------------------------------


def test_gamp_follows_its_curve():
    runs = linear_runs(2000, 1000, matrices=2, signals=48)  # standard error 0.06 dB
    worst, end = gap(runs, state_evolution_curve(Setting(SPARSE, NOISE, 0.5)).mse)
    assert worst < 0.7 and end < 0.2


def test_the_algorithm_knows_its_error():
    matrix, x = normal(1000, 2000, seed=7) / 1000**0.5, quantile_signal(2000, 7)
    channel = GaussianNoise(matrix @ x + NOISE**0.5 * normal(1000, seed=8), ONE * NOISE)
    problem = gamp.Problem(dense(matrix))
    mean, variance = (each.expand(2000) for each in SPARSE.prior_moments())
    state = gamp.init(problem, mean, variance)
    for _ in range(30):
        state, _ = gamp.step(problem, state, SPARSE, channel)
    achieved = float((state.mean - x).square().mean())
    assert abs(10 * math.log10(float(state.variance.mean()) / achieved)) < 1.0


def test_probit_follows_its_curve():
    runs, predicted = probit_runs(1000, 3000, matrices=2, signals=12)  # standard error 0.1 dB
    worst, end = gap(runs, predicted.mse)
    assert worst < 0.7 and end < 0.3


def test_vamp_follows_its_curve_at_condition_100():
    runs = vamp_runs(1000, 500, matrices=2, signals=40)  # standard error 0.14 dB
    spectrum = geometric_spectrum(1000, 500)
    predicted = state_evolution_curve(Setting(SPARSE, NOISE, 0.5, spectrum=spectrum))
    worst, end = gap(runs, predicted.mse)
    assert worst < 0.8 and end < 0.4


def test_max_sum_follows_the_lasso_curve():
    """Max-sum GAMP with a fixed penalty has the mismatched curve's fixed point."""
    rate = 40.0 * ONE
    setting = Setting(
        SPARSE, NOISE, 0.5, assumed_prior=Laplace(rate), assumed_channel=NOISE, kind="max"
    )
    predicted = state_evolution_curve(setting)
    matrix = normal(1000, 2000, seed=0) / 1000**0.5
    x = torch.stack([quantile_signal(2000, seed) for seed in range(24)])
    noise = NOISE**0.5 * normal(24, 1000, seed=9)
    channel = GaussianNoise(x @ matrix.mT + noise, ONE * NOISE)
    problem = gamp.Problem(dense(matrix), kind="max")
    found = errors(gamp, problem, Laplace(rate), channel, x, 100)
    assert gap([found], predicted.mse)[1] < 0.3


@pytest.mark.slow
def test_gamp_at_full_size():
    runs = linear_runs(6000, 3000, matrices=2, signals=32)  # standard error 0.035 dB
    worst, end = gap(runs, state_evolution_curve(Setting(SPARSE, NOISE, 0.5)).mse)
    assert worst < 0.7 and end < 0.1


@pytest.mark.slow
def test_probit_at_full_size():
    runs, predicted = probit_runs(2000, 6000, matrices=2, signals=24)  # standard error 0.05 dB
    worst, end = gap(runs, predicted.mse)
    assert worst < 0.5 and end < 0.2


@pytest.mark.slow
def test_vamp_at_full_size():
    spectrum = geometric_spectrum(4000, 2000)
    predicted = state_evolution_curve(Setting(SPARSE, NOISE, 0.5, spectrum=spectrum))
    runs = vamp_runs(4000, 2000, matrices=1, signals=64)  # standard error 0.09 dB
    worst, end = gap(runs, predicted.mse)
    assert worst < 0.7 and end < 0.2


def test_soft_threshold_recursion_against_its_own_average():
    predicted = soft_threshold_curve(Setting(SPARSE, NOISE, 0.5), 1.4)
    tau = NOISE + predicted.mse[-2] / 0.5
    assert float(predicted.noise[-1]) == pytest.approx(float(tau), rel=1e-12)
    x = quantile_signal(200_000, 0)
    r = x + tau.sqrt() * normal(200_000, seed=1)
    estimate = r.sign() * (r.abs() - 1.4 * tau.sqrt()).clamp(min=0.0)
    achieved = float((estimate - x).square().mean())
    assert abs(10 * math.log10(achieved / predicted.fixed_point)) < 0.1
