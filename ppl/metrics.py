"""Scores of predictions: accuracy, likelihood, calibration under each of its definitions, unfamiliar inputs, regression.

Probabilities are ``[*batch, rows, classes]``, labels ``[rows]`` or ``[*batch, rows]``; a score is the mean over rows, one
number for each element of ``batch``. Arrays may be torch, NumPy or lists; all is computed in double precision. Names of
calibration errors differ between papers:

=============================== ==================================================== ======================
function                        what is compared in each bin                         bins
=============================== ==================================================== ======================
:func:`ece`                     confidence of the top label and accuracy, L1         15, equal width
:func:`adaptive_ece`            the same                                             15, equal mass
:func:`max_calibration_error`   the same, the worst bin                              15, equal width
:func:`classwise_ece`           probability and frequency of each class, L1          15, equal width
:func:`marginal_calibration_error` the same, L2, without its bias                    15, equal mass
=============================== ==================================================== ======================

>>> probs = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
>>> float(accuracy(probs, [0, 1, 0])), round(float(nll(probs, [0, 1, 0])), 4)
(0.6666666666666666, 0.7419)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl.errors import DataError

_SUM = 1e-3  # by which probabilities of a row may miss one


# ---- classification ----------------------------------------------------------------------------------------------------


def accuracy(probs: Any, labels: Any) -> Tensor:
    """Share of rows ``[*batch]`` whose likeliest class is the label; of equal ones the first counts.

    Args:
        probs: ``[*batch, rows, classes]``.
        labels: ``[*batch, rows]`` or ``[rows]``, whole numbers.
    """
    p, y = _checked("accuracy", probs, labels)
    return (p.argmax(-1) == y).double().mean(-1)


def nll(probs: Any, labels: Any) -> Tensor:
    """Mean negative log-probability ``[*batch]`` of the labels, in nats.

    A label of probability zero counts as one of the smallest positive number of the probabilities' precision.

    Args:
        probs: ``[*batch, rows, classes]``.
        labels: ``[*batch, rows]`` or ``[rows]``.
    """
    p, y = _checked("nll", probs, labels)
    given = torch.as_tensor(probs).dtype if hasattr(probs, "dtype") else p.dtype
    dtype = given if given.is_floating_point else p.dtype
    hit = p.take_along_dim(y.unsqueeze(-1), -1).squeeze(-1)
    return -hit.clamp(min=torch.finfo(dtype).tiny).log().mean(-1)


def brier(probs: Any, labels: Any) -> Tensor:
    """Mean squared distance ``[*batch]``, between 0 and 2, of the probabilities from the label's indicator.

    Summed over classes, as in Brier (1950); for two classes twice the number that some programs print.

    Args:
        probs: ``[*batch, rows, classes]``.
        labels: ``[*batch, rows]`` or ``[rows]``.
    """
    p, y = _checked("brier", probs, labels)
    return (p - _one_hot(y, p)).square().sum(-1).mean(-1)


def entropy(probs: Any) -> Tensor:
    """Entropy ``[*batch]`` of probabilities ``[*batch, classes]``, in nats.

    >>> round(float(entropy([0.5, 0.5])), 4)
    0.6931
    """
    return torch.special.entr(_probabilities("entropy", probs)).sum(-1)


def mutual_information(probs: Any) -> Tensor:
    """What a label would tell of the draw, in nats: entropy of the mean less mean entropy.

    The part of the uncertainty that more data would remove, where draws are of a posterior; the other part is the mean
    entropy.

    Args:
        probs: ``[n, *batch, classes]``, one set of probabilities a draw.

    Returns:
        ``[*batch]``, between 0 and the entropy of the mean.
    """
    p = _probabilities("mutual_information", probs)
    if p.ndim < 2:
        raise DataError(
            f"mutual_information: expected probs [n, *batch, classes], got shape {list(p.shape)}. Give those of each draw."
        )
    whole = torch.special.entr(p.mean(0)).sum(-1)
    return (whole - torch.special.entr(p).sum(-1).mean(0)).clamp(min=0)


# ---- calibration -------------------------------------------------------------------------------------------------------


def ece(probs: Any, labels: Any, bins: int = 15) -> Tensor:
    """Expected calibration error of the top label, L1: mean gap between confidence and accuracy, between 0 and 1.

    ``sum_b n_b / n |accuracy_b - confidence_b|`` over bins ``((b - 1) / B, b / B]`` of the largest probability.
    Source: [Guo2017], equation (3).

    Args:
        probs: ``[*batch, rows, classes]``.
        labels: ``[*batch, rows]`` or ``[rows]``.
        bins: of equal width.
    """
    found = _top(probs, labels, bins, "ece")
    return (found.share * found.gap.abs()).sum(-1)


def max_calibration_error(probs: Any, labels: Any, bins: int = 15) -> Tensor:
    """The largest gap between confidence and accuracy over the bins of :func:`ece` that are not empty.

    Source: [Guo2017], equation (5). Arguments are those of :func:`ece`.
    """
    return _top(probs, labels, bins, "max_calibration_error").gap.abs().amax(-1)


def adaptive_ece(probs: Any, labels: Any, bins: int = 15) -> Tensor:
    """As :func:`ece`, over bins that hold equally many rows; equal confidences share a bin.

    Source: [Nixon2019], section 3, for the top label. Arguments are those of :func:`ece`.
    """
    _check_bins("adaptive_ece", bins)
    p, y = _checked("adaptive_ece", probs, labels)
    confidence, top = p.max(-1)
    found = _binned(confidence, (top == y).double(), _mass_edges(confidence, bins))
    return (found.share * found.gap.abs()).sum(-1)


def classwise_ece(probs: Any, labels: Any, bins: int = 15) -> Tensor:
    """Static calibration error: the L1 error of each class's probability over bins of equal width, mean over classes.

    Source: [Nixon2019], equation (2). Small where there are many classes, most of which are near probability zero.
    Arguments are those of :func:`ece`.
    """
    _check_bins("classwise_ece", bins)
    p, y = _checked("classwise_ece", probs, labels)
    each, hit = p.mT.contiguous(), _one_hot(y, p).mT.contiguous()  # [*batch, classes, rows]
    found = _binned(each, hit, _width_edges(each, bins))
    return (found.share * found.gap.abs()).sum(-1).mean(-1)


def marginal_calibration_error(probs: Any, labels: Any, bins: int = 15) -> Tensor:
    """L2 calibration error of all classes without its bias, as the package ``uncertainty-calibration`` has it by default.

    ``sqrt(mean_k max(0, sum_b n_b / n (gap_b^2 - f_b (1 - f_b) / (n_b - 1))))``, where ``f_b`` is the frequency of class
    ``k`` in the bin: the last term is the variance of ``f_b``. Bins hold equally many rows; where every class has fewer
    different probabilities than a quarter of the rows, each of these is a bin. Source: [Kumar2019], definition 2.5 and
    section 5; ``get_calibration_error(probs, labels)``. It stands as "ECE" in papers, and is not :func:`ece`.

    Arguments are those of :func:`ece`.
    """
    _check_bins("marginal_calibration_error", bins)
    p, y = _checked("marginal_calibration_error", probs, labels)
    each, hit = p.mT.contiguous(), _one_hot(y, p).mT.contiguous()
    tables = (t.reshape(-1, *t.shape[-2:]) for t in (each, hit))
    flat = [_binned(a, b, _kumar_edges(a, bins)) for a, b in zip(*tables, strict=True)]
    squares = torch.stack([_unbiased_square(found).clamp(min=0).mean(-1) for found in flat])
    return squares.sqrt().reshape(each.shape[:-2])


# ---- unfamiliar inputs -------------------------------------------------------------------------------------------------


def auroc(known: Any, unfamiliar: Any) -> Tensor:
    """How well a score tells unfamiliar inputs from known ones: ``P(unfamiliar > known) + P(equal) / 2``.

    The area under the receiver operating characteristic, by ranks (the statistic of Mann and Whitney); 0.5 is chance.

    Args:
        known: scores ``[*batch, rows]`` of inputs like those of the fit, such as their predictive :func:`entropy`.
        unfamiliar: scores ``[*batch, other rows]``; larger ones should mean "less familiar".

    >>> auroc([0.1, 0.2, 0.3], [0.3, 0.4])
    tensor(0.9167, dtype=torch.float64)
    """
    a, b = _scores("auroc: known", known), _scores("auroc: unfamiliar", unfamiliar)
    if a.shape[:-1] != b.shape[:-1]:
        raise DataError(
            f"auroc: expected the same leading axes, got known {list(a.shape)} and unfamiliar {list(b.shape)}."
        )
    ordered = a.sort(-1).values.contiguous()
    below = torch.searchsorted(ordered, b.contiguous())
    up_to = torch.searchsorted(ordered, b.contiguous(), right=True)
    return (below + up_to).double().mean(-1) / (2 * a.shape[-1])


# ---- regression --------------------------------------------------------------------------------------------------------


def rmse(prediction: Any, target: Any) -> Tensor:
    """Root mean squared error ``[*batch]``, in the unit of the target.

    Args:
        prediction: ``[*batch, rows]``.
        target: ``[*batch, rows]`` or ``[rows]``.
    """
    a, b = _scores("rmse: prediction", prediction), _scores("rmse: target", target)
    if a.shape[-1] != b.shape[-1] or (b.ndim > 1 and a.shape != b.shape):
        raise DataError(
            f"rmse: expected a target for each prediction, got prediction {list(a.shape)} and target {list(b.shape)}."
        )
    return (a - b.to(a.device)).square().mean(-1).sqrt()


def log_predictive_density(log_densities: Any) -> Tensor:
    """Mean over rows ``[*batch]`` of ``log (1/n) sum_s p(y | draw s)``, in nats (of the unit that the density is over).

    Args:
        log_densities: ``[n, *batch, rows]``, what ``posterior.log_likelihood(data)[site]`` is.

    >>> log_predictive_density(torch.log(torch.tensor([[0.2, 0.4], [0.6, 0.4]]))).exp()
    tensor(0.4000, dtype=torch.float64)
    """
    x = _as_double(log_densities)
    if x.ndim < 2 or x.numel() == 0:
        raise DataError(
            f"log_predictive_density: expected [n, *batch, rows], got shape {list(x.shape)}. Give one row a draw."
        )
    return (torch.logsumexp(x, 0) - math.log(len(x))).mean(-1)


def gaussian_mixture_log_density(value: Any, loc: Any, scale: Any) -> Tensor:
    """Log-density ``[*batch]`` of an even mixture of Gaussians, in nats: the predictive law of a regression network.

    Args:
        value: ``[*batch]``.
        loc: ``[n, *batch]``, the mean under each draw.
        scale: ``[n, *batch]``, or what broadcasts with it: standard deviations.

    >>> gaussian_mixture_log_density(0.0, [0.0, 0.0], [1.0, 1.0]).exp()
    tensor(0.3989, dtype=torch.float64)
    """
    y, m, s = _as_double(value), _as_double(loc), _as_double(scale)
    if m.ndim < 1 or m.shape[0] == 0:
        raise DataError(
            f"gaussian_mixture_log_density: expected loc [n, *batch], got shape {list(m.shape)}."
        )
    # Broadcasting would make a table of all pairs of [rows] and [n, rows, 1].
    apart = zip(reversed(s.shape), reversed(m.shape), strict=False)
    if y.shape != m.shape[1:] or s.ndim > m.ndim or any(a not in (1, b) for a, b in apart):
        raise DataError(
            f"gaussian_mixture_log_density: loc {list(m.shape)} needs values {list(m.shape[1:])} and scales that broadcast to "
            f"its shape, got values {list(y.shape)} and scales {list(s.shape)}."
        )
    if not bool((s > 0).all()):
        raise DataError("gaussian_mixture_log_density: a scale is not positive.")
    each = -0.5 * ((y - m) / s).square() - s.log() - 0.5 * math.log(2 * math.pi)
    return torch.logsumexp(each, 0) - math.log(len(each))


# ---- bins --------------------------------------------------------------------------------------------------------------


class _Bins(NamedTuple):
    """Per bin ``[*batch, B]``: rows, their share, frequency of hits, and frequency less mean probability."""

    rows: Tensor
    share: Tensor
    frequency: Tensor  # 0 where the bin is empty
    gap: Tensor  # 0 where the bin is empty


def _top(probs: Any, labels: Any, bins: int, name: str) -> _Bins:
    _check_bins(name, bins)
    p, y = _checked(name, probs, labels)
    confidence, top = p.max(-1)
    return _binned(confidence, (top == y).double(), _width_edges(confidence, bins))


def _binned(values: Tensor, hits: Tensor, edges: Tensor) -> _Bins:
    """Sort ``values [*batch, rows]`` into bins that end at ``edges [*batch, B - 1]``, the last one at infinity."""
    at = torch.searchsorted(edges, values)  # a value on an edge belongs to the bin below it
    shape = (*values.shape[:-1], edges.shape[-1] + 1)
    zero = torch.zeros(shape, dtype=values.dtype, device=values.device)
    count = zero.scatter_add(-1, at, torch.ones_like(values))
    some = count.clamp(min=1)
    frequency = zero.scatter_add(-1, at, hits) / some
    gap = frequency - zero.scatter_add(-1, at, values) / some
    return _Bins(count, count / values.shape[-1], frequency, gap)


def _width_edges(values: Tensor, bins: int) -> Tensor:
    inner = torch.arange(1, bins, dtype=values.dtype, device=values.device) / bins
    return inner.expand(*values.shape[:-1], bins - 1).contiguous()


def _mass_edges(values: Tensor, bins: int) -> Tensor:
    """Half-way between the last value of a bin and the first of the next."""
    n = values.shape[-1]
    bins = min(bins, n)
    ordered = values.sort(-1).values
    # The first n % bins parts have one row more, as numpy.array_split has it.
    ends = torch.tensor([(n // bins) * b + min(b, n % bins) for b in range(1, bins)])
    ends = ends.to(values.device, torch.long)
    return ((ordered[..., ends - 1] + ordered[..., ends]) / 2).contiguous()


def _kumar_edges(values: Tensor, bins: int) -> Tensor:
    """Edges ``[classes, B - 1]`` for ``values [classes, rows]``; infinite ones make no bin."""
    different = [row.unique() for row in values]
    if any(len(row) >= values.shape[-1] / 4 for row in different):
        return _mass_edges(values, bins)
    most = max(len(row) for row in different)
    edges = values.new_full((len(values), most - 1), torch.inf)
    for edge, row in zip(edges, different, strict=True):
        edge[: len(row) - 1] = (row[1:] + row[:-1]) / 2
    return edges


def _unbiased_square(found: _Bins) -> Tensor:
    """The square of a calibration error ``[*batch]`` less what noise in the frequencies adds to it."""
    variance = found.frequency * (1 - found.frequency) / (found.rows - 1).clamp(min=1)
    # A bin of one row has no estimate of its noise; the package counts it as zero.
    return torch.where(found.rows > 1, found.share * (found.gap.square() - variance), 0.0).sum(-1)


# ---- arguments ---------------------------------------------------------------------------------------------------------


def _checked(name: str, probs: Any, labels: Any) -> tuple[Tensor, Tensor]:
    p = _probabilities(name, probs)
    y = torch.as_tensor(labels)
    if p.ndim < 2 or p.shape[-2] == 0:
        raise DataError(
            f"{name}: expected probs [rows, classes], got shape {list(p.shape)}. Two classes have two columns: 1 - p and p."
        )
    if y.ndim == 0 or y.shape != p.shape[:-1][-y.ndim :]:
        raise DataError(
            f"{name}: probs {list(p.shape)} need labels {[p.shape[-2]]}, got {list(y.shape)}. Give one label a row."
        )
    whole = y.long()
    if not bool((whole == y).all()) or not bool(((whole >= 0) & (whole < p.shape[-1])).all()):
        bad = y[(whole != y) | (whole < 0) | (whole >= p.shape[-1])].reshape(-1)[0]
        raise DataError(
            f"{name}: a label is {bad.item():g}; expected whole numbers from 0 to {p.shape[-1] - 1}, one a class."
        )
    return p, whole.to(p.device).expand(p.shape[:-1])


def _probabilities(name: str, probs: Any) -> Tensor:
    p = _as_double(probs)
    if p.ndim < 1 or p.numel() == 0:
        raise DataError(f"{name}: expected probs [..., classes], got shape {list(p.shape)}.")
    off = (p.sum(-1) - 1).abs()
    if not bool((p >= 0).all()) or not bool((off <= _SUM).all()):
        worst = p.reshape(-1, p.shape[-1])[off.reshape(-1).nan_to_num(nan=torch.inf).argmax()]
        raise DataError(
            f"{name}: expected probabilities that sum to one in each row, got a row that sums to {float(worst.sum()):.4g} "
            f"with a smallest entry of {float(p.min()):.4g}. Of logits take logits.softmax(-1) first."
        )
    return p


def _scores(name: str, values: Any) -> Tensor:
    x = _as_double(values)
    if x.ndim < 1 or x.shape[-1] == 0:
        raise DataError(f"{name}: expected [*batch, rows], got shape {list(x.shape)}.")
    if bool(x.isnan().any()):
        raise DataError(f"{name}: {int(x.isnan().sum())} of {x.numel()} numbers are NaN.")
    return x


def _as_double(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64).detach()


def _check_bins(name: str, bins: int) -> None:
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise DataError(f"{name}: bins={bins!r}: expected a whole number of at least 1.")


def _one_hot(labels: Tensor, probs: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(labels, probs.shape[-1]).to(probs)


__all__ = [
    "accuracy",
    "adaptive_ece",
    "auroc",
    "brier",
    "classwise_ece",
    "ece",
    "entropy",
    "gaussian_mixture_log_density",
    "log_predictive_density",
    "marginal_calibration_error",
    "max_calibration_error",
    "mutual_information",
    "nll",
    "rmse",
]
