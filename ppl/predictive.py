"""What the laws of a site say of it, averaged over draws: less noisy than counting the labels drawn from them.

Given a draw of the latents a site has a law; the predictive law is their even mixture (Rao and Blackwell: a mean of
conditional expectations has no more variance than one of draws). Probabilities, entropies, means and variances are
summed up portion by portion, so that no array over all draws is made of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.distributions import Categorical, Distribution
from ppl.graph import Variable

_NUMBERS = 2**24  # in one table of probabilities over draws
_WORK = 2**31  # evaluations beyond which a table is not made at all


class Mixed(NamedTuple):
    """Averages over laws of one site; a field that the family does not have is None."""

    draws: int
    table: Tensor | None = None  # [*plates, *event, V] mean probabilities of the values 0 ... V-1
    entropy: Tensor | None = None  # [*plates, *event] mean entropy of a law, in nats
    mean: Tensor | None = None  # [*plates, *event] mean of the means
    within: Tensor | None = None  # [*plates, *event] mean variance of a law
    between: Tensor | None = None  # [*plates, *event] variance of the means

    @property
    def variance(self) -> Tensor | None:
        """Variance of the mixture."""
        return None if self.within is None or self.between is None else self.within + self.between

    def narrow(self, axis: int, start: int, length: int) -> Mixed:
        """Some elements of a plate."""
        kept = (None if t is None else t.narrow(axis, start, length) for t in self[1:])
        return Mixed(self.draws, *kept)


def mixed(variable: Variable, law: Distribution, shape: Sequence[int]) -> Mixed:
    """Average the laws of a site.

    Args:
        variable: the site.
        law: its parameters have every axis in front, draws first (size one where they do not vary).
        shape: ``[n, *plates, *event]`` of its draws.
    """
    count = variable.cardinality
    if count is not None and math.prod(shape) * count > _WORK:
        count = None
    slices = _slices(law, shape, count)
    return joined([_averaged(piece, (size, *shape[1:]), count) for piece, size in slices])


def joined(parts: Sequence[Mixed]) -> Mixed:
    """Averages over all draws from those over some of them each."""
    total = parts[0]
    for part in parts[1:]:
        total = _both(total, part)
    return total


def beside(parts: Sequence[Mixed], axis: int | None) -> Mixed:
    """Averages of all elements of a plate from those of some of them each; the first of them without an axis."""
    if axis is None or len(parts) == 1:
        return parts[0]
    fields = zip(*(p[1:] for p in parts), strict=True)
    made = (None if any(t is None for t in ts) else torch.cat(ts, axis) for ts in fields)  # type: ignore[arg-type]
    return Mixed(parts[0].draws, *made)


def _both(a: Mixed, b: Mixed) -> Mixed:
    # Chan, Golub and LeVeque: variances of two parts and the distance of their means.
    n = a.draws + b.draws
    share = b.draws / n
    table, entropy, mean, within, between = (
        None if x is None or y is None else torch.lerp(x, y, share)
        for x, y in zip(a[1:], b[1:], strict=True)
    )
    if between is not None:
        assert a.mean is not None and b.mean is not None
        between = between + share * (1 - share) * (a.mean - b.mean).square()
    return Mixed(n, table, entropy, mean, within, between)


def _slices(
    law: Distribution, shape: Sequence[int], values: int | None
) -> list[tuple[Distribution, int]]:
    """The law cut into some draws each, where a table over all of them would be large."""
    n, wide = shape[0], (values or 1) * math.prod(shape[1:])
    size = max(1, _NUMBERS // max(wide, 1))
    if size >= n:
        return [(law, n)]
    leaves = [x.value for x in law.leaves()]
    found = []
    for start in range(0, n, size):
        count = min(size, n - start)
        kept = [x.narrow(0, start, count) if x.shape[0] == n else x for x in leaves]
        found.append((law.replace(kept), count))
    return found


def _averaged(law: Distribution, shape: Sequence[int], values: int | None) -> Mixed:
    draws, rest = shape[0], tuple(shape[1:])
    table, entropy = _table(law, shape, values)
    mean, variance = _moments(law)
    if mean is None or variance is None:
        return Mixed(draws, table, entropy)
    return Mixed(
        draws,
        table,
        entropy,
        mean.mean(0).expand(rest),
        variance.mean(0).expand(rest),
        mean.var(0, correction=0).expand(rest),
    )


def _table(
    law: Distribution, shape: Sequence[int], count: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """Mean probabilities of the values ``0 ... V-1`` and mean entropy; None where the values are others or unknown."""
    values = _values(law)
    if values is None or count is None:
        return None, None
    if len(values) != count or not bool((values == torch.arange(count).to(values)).all()):
        return None, None
    if isinstance(law, Categorical):
        probs = law.probabilities()
    else:
        lead = values.reshape(-1, *(1,) * len(shape))
        probs = law.log_prob(lead).exp().movedim(0, -1)
    entropy = torch.special.entr(probs).sum(-1).mean(0)
    return probs.mean(0).expand(*shape[1:], count), entropy.expand(tuple(shape[1:]))


def _values(law: Distribution) -> Tensor | None:
    return law.enumerate_support() if law.is_discrete and law.event_dim == 0 else None


def _moments(law: Distribution) -> tuple[Tensor | None, Tensor | None]:
    """Mean and variance of each law, where the family has them and they are finite."""
    try:
        mean, variance = law.mean, law.variance
    except NotImplementedError:
        return None, None
    finite = bool(mean.isfinite().all()) and bool(variance.isfinite().all())
    return (mean, variance) if finite else (None, None)


__all__ = ["Mixed", "beside", "joined", "mixed"]
