"""Scores of predictions against scikit-learn, scipy, and loops that spell the definitions out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from ppl import DataError, metrics


def case(seed=0, rows=400, classes=5, sharp=2.0):
    generator = np.random.default_rng(seed)
    logits = sharp * generator.normal(size=(rows, classes))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    labels = np.array([generator.choice(classes, p=p**0.5 / (p**0.5).sum()) for p in probs])
    return torch.as_tensor(probs), torch.as_tensor(labels)


def bins_by_loop(values, hits, edges):
    """(count, mean value, frequency) of each bin that is not empty; bins are open below, closed above."""
    found = []
    for low, high in zip([-np.inf, *edges], [*edges, np.inf], strict=True):
        inside = (values > low) & (values <= high)
        if inside.any():
            found.append((inside.sum(), values[inside].mean(), hits[inside].mean()))
    return found


def mass_edges_by_loop(values, bins):
    parts = np.array_split(np.sort(values), min(bins, len(values)))
    return [(a[-1] + b[0]) / 2 for a, b in zip(parts[:-1], parts[1:], strict=True)]


def test_scores_of_classes_are_those_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    probs, labels = case()
    p, y = probs.numpy(), labels.numpy()
    assert math.isclose(metrics.accuracy(probs, labels), sklearn.accuracy_score(y, p.argmax(-1)))
    assert math.isclose(metrics.nll(probs, labels), sklearn.log_loss(y, p), rel_tol=1e-12)
    one_hot = np.eye(5)[y]
    assert math.isclose(metrics.brier(probs, labels), ((p - one_hot) ** 2).sum(-1).mean())
    binary = probs[:, :2] / probs[:, :2].sum(-1, keepdim=True)
    ones = labels % 2
    theirs = sklearn.brier_score_loss(ones.numpy(), binary[:, 1].numpy())
    assert math.isclose(metrics.brier(binary, ones), 2 * theirs, rel_tol=1e-12)


def test_a_label_of_probability_zero_has_a_finite_likelihood():
    single = torch.tensor([[1.0, 0.0]])
    assert metrics.nll(single, [1]) == pytest.approx(-math.log(torch.finfo(torch.float32).tiny))
    assert metrics.nll(single.double(), [1]) > 700


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_calibration_of_the_top_label_is_the_definition(bins):
    probs, labels = case(1)
    confidence = probs.max(-1).values.numpy()
    hits = (probs.argmax(-1) == labels).double().numpy()
    equal = bins_by_loop(confidence, hits, np.arange(1, bins) / bins)
    gaps = [(n, abs(mean - frequency)) for n, mean, frequency in equal]
    assert metrics.ece(probs, labels, bins) == pytest.approx(sum(n * g for n, g in gaps) / 400)
    assert metrics.max_calibration_error(probs, labels, bins) == pytest.approx(
        max(g for _, g in gaps)
    )
    mass = bins_by_loop(confidence, hits, mass_edges_by_loop(confidence, bins))
    assert metrics.adaptive_ece(probs, labels, bins) == pytest.approx(
        sum(n * abs(mean - frequency) for n, mean, frequency in mass) / 400
    )


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    probs = torch.tensor([[0.6, 0.4], [0.61, 0.39]], dtype=torch.float64)
    assert metrics.ece(probs, [0, 1], bins=5) == pytest.approx((0.4 + 0.61) / 2)


def test_equal_confidences_share_a_bin_in_whatever_order_rows_come():
    probs = torch.tensor([[0.7, 0.3]] * 30, dtype=torch.float64)
    labels = torch.tensor([0] * 15 + [1] * 15)
    assert metrics.adaptive_ece(probs, labels) == pytest.approx(0.2)
    assert metrics.adaptive_ece(probs, labels.flip(0)) == pytest.approx(0.2)


def test_classwise_error_is_the_mean_over_classes():
    probs, labels = case(2)
    each = []
    for k in range(5):
        values, hits = probs[:, k].numpy(), (labels == k).double().numpy()
        found = bins_by_loop(values, hits, np.arange(1, 15) / 15)
        each.append(sum(n * abs(mean - frequency) for n, mean, frequency in found) / 400)
    assert metrics.classwise_ece(probs, labels) == pytest.approx(np.mean(each))


def marginal_by_loop(probs, labels, edges):
    squares = []
    for k in range(probs.shape[1]):
        values, hits = probs[:, k], (labels == k).astype(float)
        square = 0.0
        for n, mean, frequency in bins_by_loop(values, hits, edges(values)):
            if n > 1:
                noise = frequency * (1 - frequency) / (n - 1)
                square += n / len(values) * ((mean - frequency) ** 2 - noise)
        squares.append(max(square, 0.0))
    return math.sqrt(np.mean(squares))


def test_marginal_calibration_error_is_the_unbiased_one():
    probs, labels = case(3)
    expected = marginal_by_loop(
        probs.numpy(), labels.numpy(), lambda values: mass_edges_by_loop(values, 15)
    )
    assert metrics.marginal_calibration_error(probs, labels) == pytest.approx(expected)
    # The package uncertainty-calibration 0.1.4 on these numbers: get_calibration_error, get_ece.
    assert expected == pytest.approx(0.0910631307001793)
    assert metrics.ece(probs, labels) == pytest.approx(0.17229911159288291)


def test_marginal_calibration_error_of_a_few_different_predictions_has_a_bin_for_each():
    probs, labels = case(4, rows=400, classes=3)
    probs = probs[torch.arange(400) % 6]

    def edges(values):
        different = np.unique(values)
        return (different[1:] + different[:-1]) / 2

    expected = marginal_by_loop(probs.numpy(), labels.numpy(), edges)
    assert expected == pytest.approx(0.353829653471332)  # by the package
    assert metrics.marginal_calibration_error(probs, labels) == pytest.approx(expected)


def test_a_calibrated_forecast_has_less_unbiased_than_plain_error(rows=300, bias=0.03):
    """Labels drawn from the probabilities: the L1 error is all noise, and the unbiased one is near zero."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(40, rows, 4, generator=generator, dtype=torch.float64).softmax(-1)
    labels = torch.multinomial(probs.reshape(-1, 4), 1, generator=generator).reshape(40, rows)
    assert metrics.ece(probs, labels).mean() > bias
    assert metrics.marginal_calibration_error(probs, labels).mean() < bias


def test_a_batch_of_predictions_is_scored_one_by_one():
    cases = [case(seed) for seed in range(6)]
    probs = torch.stack([p for p, _ in cases]).reshape(2, 3, 400, 5)
    labels = torch.stack([y for _, y in cases]).reshape(2, 3, 400)
    names = [n for n in metrics.__all__ if n.endswith(("ece", "error"))]
    for name in [*names, "accuracy", "nll", "brier"]:
        score = getattr(metrics, name)
        together = score(probs, labels)
        assert together.shape == (2, 3), name
        apart = torch.stack([score(p, y) for p, y in cases]).reshape(2, 3)
        torch.testing.assert_close(together, apart)
        one = score(probs[0], labels[0, 0])  # the same labels for a batch of predictions
        torch.testing.assert_close(one[0], together[0, 0])


def test_auroc_is_that_of_scikit_learn_with_ties():
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    known, strange = generator.integers(0, 6, 200), generator.integers(2, 9, 300)
    truth = np.r_[np.zeros(200), np.ones(300)]
    theirs = sklearn.roc_auc_score(truth, np.r_[known, strange])
    assert metrics.auroc(known, strange) == pytest.approx(theirs)
    u = stats.mannwhitneyu(strange, known).statistic
    assert metrics.auroc(known, strange) == pytest.approx(u / (200 * 300))
    both = metrics.auroc(np.stack([known, -known]), np.stack([strange, -strange]))
    assert both.tolist() == pytest.approx([theirs, 1 - theirs])
    assert metrics.auroc([1.0, 1.0], [1.0]) == 0.5


def test_entropy_and_mutual_information_are_the_definitions():
    probs, _ = case(5, rows=12)
    draws = probs.reshape(4, 3, 5)
    torch.testing.assert_close(
        metrics.entropy(draws), torch.as_tensor(stats.entropy(draws.numpy(), axis=-1))
    )
    expected = stats.entropy(draws.mean(0).numpy(), axis=-1) - stats.entropy(draws, axis=-1).mean(0)
    torch.testing.assert_close(metrics.mutual_information(draws), torch.as_tensor(expected))
    assert metrics.entropy([0.0, 1.0]) == 0
    certain = torch.eye(2, dtype=torch.float64)
    assert metrics.mutual_information(certain) == pytest.approx(math.log(2))


def test_regression_scores_are_those_of_scipy():
    generator = np.random.default_rng(0)
    y, loc = generator.normal(size=7), generator.normal(size=(30, 7))
    scale = 0.5 + generator.random((30, 1))
    direct = np.log(stats.norm(loc, scale).pdf(y).mean(0))
    found = metrics.gaussian_mixture_log_density(y, loc, scale)
    torch.testing.assert_close(found, torch.as_tensor(direct))
    densities = stats.norm(loc, scale).logpdf(y)
    assert metrics.log_predictive_density(densities) == pytest.approx(direct.mean())
    far = metrics.gaussian_mixture_log_density(1e3, [0.0, 0.0], 1.0)
    assert float(far) == pytest.approx(stats.norm.logpdf(1e3))
    assert metrics.rmse(loc[0], y) == pytest.approx(np.sqrt(((loc[0] - y) ** 2).mean()))
    assert metrics.rmse(loc, y).shape == (30,)


def test_lists_and_arrays_are_read_in_the_precision_that_they_have():
    target = [0.1 + 1e-12, 0.2]
    assert float(metrics.rmse([0.1, 0.2], target)) == pytest.approx(1e-12 / 2**0.5, rel=1e-3)
    for dtype in (np.float32, np.float64):
        sure = np.array([[1.0, 0.0]], dtype=dtype)
        smallest = -math.log(np.finfo(dtype).tiny)
        assert float(metrics.nll(sure, [1])) == pytest.approx(smallest)
        assert float(metrics.nll(torch.as_tensor(sure), [1])) == pytest.approx(smallest)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.ece([[2.0, -1.0]], [0]), "sum to one.*softmax"),
        (lambda: metrics.nll([[0.5, 0.6]], [0]), "sums to 1.1"),
        (lambda: metrics.nll([[float("nan"), 1.0]], [0]), "sum to one"),
        (lambda: metrics.accuracy([0.5, 0.5], [0]), r"\[rows, classes\]"),
        (lambda: metrics.accuracy([[0.5, 0.5]], [0, 1]), "one label a row"),
        (lambda: metrics.accuracy([[0.5, 0.5]], [2]), "a label is 2; .* 0 to 1"),
        (lambda: metrics.accuracy([[0.5, 0.5]], [0.5]), "a label is 0.5"),
        (lambda: metrics.ece([[0.5, 0.5]], [0], bins=0), "bins=0"),
        (lambda: metrics.auroc([float("nan")], [1.0]), "known: 1 of 1 numbers are NaN"),
        (lambda: metrics.auroc([], [1.0]), r"\[\*batch, rows\]"),
        (lambda: metrics.auroc([[1.0], [2.0]], [1.0]), "same leading axes"),
        (lambda: metrics.rmse([1.0, 2.0], [1.0]), "a target for each prediction"),
        (lambda: metrics.log_predictive_density([1.0]), "one row a draw"),
        (lambda: metrics.mutual_information([0.5, 0.5]), "of each draw"),
        (lambda: metrics.gaussian_mixture_log_density(0.0, [0.0], 0.0), "not positive"),
        (
            lambda: metrics.gaussian_mixture_log_density([0.0, 1.0], [[[0.0], [1.0]]], 1.0),
            r"loc \[1, 2, 1\] needs values \[2, 1\].* got values \[2\]",
        ),
        (
            lambda: metrics.gaussian_mixture_log_density(0.0, [0.0], [1.0, 2.0]),
            r"scales that broadcast.* got .* scales \[2\]",
        ),
    ],
)
def test_wrong_arguments_are_refused_in_words(call, words):
    with pytest.raises(DataError, match=words):
        call()
