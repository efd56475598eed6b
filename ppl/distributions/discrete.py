"""Counts and categories, each with its own log-probability of minimal shape.

Logarithms of probabilities are taken before they meet the values, at the shape of the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch import distributions as td
from torch.distributions import constraints
from torch.distributions.constraints import Constraint
from torch.nn.functional import logsigmoid

from ppl.distributions.arguments import (
    below_one,
    is_traced,
    positive_probability,
    real_vector,
    shape_of,
    weights,
)
from ppl.distributions.base import STATIC, Distribution, open_uniform, outside, times

_PROBS_OR_LOGITS = {"probs": constraints.unit_interval, "logits": constraints.real}
_NEITHER = {"probs": None, "logits": None}


class _Trials(Distribution):
    """Families with a success probability, given as ``probs`` or as log-odds ``logits``."""

    exactly_one = ("probs", "logits")
    is_discrete = True

    def _split(self, value: Tensor) -> tuple[Tensor, ...]:
        """Value, the parameters before the probability, log p and log(1 - p)."""
        *rest, last = self.against(value)
        if self.__dict__.get("probs") is not None:
            return (*rest, last.log(), torch.log1p(-last))
        return (*rest, logsigmoid(last), logsigmoid(-last))

    def _probs(self) -> Tensor:
        args = self.tensors()
        return args["probs"] if "probs" in args else torch.sigmoid(args["logits"])

    def _expanded_probs(
        self, shape: Sequence[int], generator: Generator | None
    ) -> tuple[Tensor, ...]:
        *rest, last = self.expanded(shape, generator)
        return (*rest, last if self.__dict__.get("probs") is not None else torch.sigmoid(last))


class Bernoulli(_Trials):
    """One trial: 1 with probability ``probs``, else 0.

    >>> Bernoulli(probs=0.25).enumerate_support()
    tensor([0., 1.], dtype=torch.float64)
    """

    arg_constraints = _PROBS_OR_LOGITS
    defaults = _NEITHER

    def log_prob(self, value: Tensor) -> Tensor:
        value, log_one, log_zero = self._split(value)
        return torch.where(value == 1, log_one, outside(value == 0, log_zero))

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        (probs,) = self._expanded_probs(shape, generator)
        return torch.bernoulli(probs, generator=generator)

    def enumerate_support(self) -> Tensor:
        last = next(iter(self.tensors().values()))
        return torch.arange(2, dtype=last.dtype, device=last.device)

    @property
    def support(self) -> Constraint:
        return constraints.boolean

    @property
    def mean(self) -> Tensor:
        return self.full(self._probs())

    @property
    def variance(self) -> Tensor:
        return self.full(self._probs() * (1 - self._probs()))


class Geometric(_Trials):
    """Failures before the first success."""

    arg_constraints = {"probs": positive_probability, "logits": constraints.real}
    defaults = _NEITHER

    def log_prob(self, value: Tensor) -> Tensor:
        value, log_success, log_failure = self._split(value)
        return outside(is_count(value), times(value, log_failure) + log_success)

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        (probs,) = self._expanded_probs(shape, generator)
        return (open_uniform(shape, probs, generator).log() / torch.log1p(-probs)).floor()

    @property
    def support(self) -> Constraint:
        return constraints.nonnegative_integer

    @property
    def mean(self) -> Tensor:
        return self.full(1 / self._probs() - 1)

    @property
    def variance(self) -> Tensor:
        return self.full((1 / self._probs() - 1) / self._probs())


class Binomial(_Trials):
    """Successes among ``total_count`` trials."""

    arg_constraints = {"total_count": constraints.nonnegative_integer, **_PROBS_OR_LOGITS}
    defaults = {"total_count": 1, **_NEITHER}
    total_count: Any

    def log_prob(self, value: Tensor) -> Tensor:
        value, count, log_success, log_failure = self._split(value)
        inside = is_count(value) & (value <= count)
        value = torch.where(inside, value, 0.0)
        choices = (
            torch.lgamma(count + 1) - torch.lgamma(value + 1) - torch.lgamma(count - value + 1)
        )
        return outside(
            inside, choices + times(value, log_success) + times(count - value, log_failure)
        )

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        count, probs = self._expanded_probs(shape, generator)
        return torch.binomial(count.contiguous(), probs.contiguous(), generator=generator)

    def enumerate_support(self) -> Tensor | None:
        """``0 ... total_count``, the largest one where it varies (values above a smaller one have
        no mass).
        """
        if is_traced(self.total_count):
            return None
        last = self.tensors()["total_count"]
        return torch.arange(int(last.max()) + 1, dtype=last.dtype, device=last.device)

    @property
    def support(self) -> Constraint:
        return constraints.integer_interval(0, self.total_count)

    @property
    def mean(self) -> Tensor:
        return self.full(self.tensors()["total_count"] * self._probs())

    @property
    def variance(self) -> Tensor:
        return self.full(self.tensors()["total_count"] * self._probs() * (1 - self._probs()))


class NegativeBinomial(_Trials):
    """Successes, each of probability ``probs``, before ``total_count`` failures (any positive
    number).
    """

    arg_constraints = {
        "total_count": constraints.nonnegative,
        "probs": below_one,
        "logits": constraints.real,
    }
    defaults = _NEITHER

    def log_prob(self, value: Tensor) -> Tensor:
        value, count, log_success, log_failure = self._split(value)
        inside = is_count(value)
        value = torch.where(inside, value, 0.0)
        choices = torch.lgamma(count + value) - torch.lgamma(value + 1) - torch.lgamma(count)
        # No failure to wait for: the count is 0, and the two infinite gamma functions cancel.
        choices = torch.where((count == 0) & (value == 0), 0.0, choices)
        return outside(inside, choices + times(value, log_success) + times(count, log_failure))

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        count, probs = self._expanded_probs(shape, generator)
        rate = torch._standard_gamma(count.contiguous(), generator=generator) * probs / (1 - probs)
        return torch.poisson(torch.where(count == 0, 0.0, rate), generator=generator)

    @property
    def support(self) -> Constraint:
        return constraints.nonnegative_integer

    @property
    def mean(self) -> Tensor:
        return self.full(self.tensors()["total_count"] * self._probs() / (1 - self._probs()))

    @property
    def variance(self) -> Tensor:
        return self.full(self.mean / (1 - self._probs()))


class Poisson(Distribution):
    """Counts of mean ``rate``."""

    arg_constraints = {"rate": constraints.nonnegative}
    is_discrete = True

    def log_prob(self, value: Tensor) -> Tensor:
        value, rate = self.against(value)
        inside = is_count(value)
        value = torch.where(inside, value, 0.0)
        return outside(inside, times(value, rate.log()) - rate - torch.lgamma(value + 1))

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        (rate,) = self.expanded(shape, generator)
        return torch.poisson(rate, generator=generator)

    @property
    def support(self) -> Constraint:
        return constraints.nonnegative_integer

    @property
    def mean(self) -> Tensor:
        return self.full(self.tensors()["rate"])

    @property
    def variance(self) -> Tensor:
        return self.full(self.tensors()["rate"])


class Categorical(Distribution):
    """A category ``0 ... S - 1`` with probabilities proportional to ``probs`` ``[*batch, S]``.

    ``over`` is the plate that the category indexes, so that ``x[k]`` picks one of its elements.
    """

    arg_constraints = {"probs": weights, "logits": real_vector, "over": STATIC}
    defaults = {"probs": None, "logits": None, "over": None}
    exactly_one = ("probs", "logits")
    is_discrete = True
    probs: Any
    logits: Any
    over: Any

    def log_prob(self, value: Tensor) -> Tensor:
        value, last = self.against(value)
        log = log_weights(self, last)
        count = log.shape[-1]
        inside = is_count(value) & (value < count)
        index = torch.where(inside, value, 0.0).long().unsqueeze(-1)
        if log.ndim > index.ndim:
            index = index.reshape((1,) * (log.ndim - index.ndim) + index.shape)
        elif log.ndim < index.ndim:
            log = log.reshape((1,) * (index.ndim - log.ndim) + log.shape)
        return outside(inside, torch.take_along_dim(log, index, -1).squeeze(-1))

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        (last,) = self.expanded(shape, generator)
        return draw_category(log_weights(self, last).exp(), generator)

    def probabilities(self) -> Tensor:
        """Normalised probabilities ``[*batch, S]``."""
        return self.log_shares().exp()

    def log_shares(self) -> Tensor:
        """Normalised log-probabilities ``[*batch, S]``."""
        args = self.tensors()
        return log_weights(self, args["probs" if "probs" in args else "logits"])

    def enumerate_support(self) -> Tensor:
        last = self.logits if self.__dict__.get("probs") is None else self.probs
        return torch.arange(shape_of(last)[-1], device=last.device)

    def to_torch(self) -> td.Distribution:
        return td.Categorical(probs=self.probabilities(), validate_args=False)

    @property
    def support(self) -> Constraint:
        return constraints.integer_interval(0, len(self.enumerate_support()) - 1)


class Multinomial(Distribution):
    """Counts ``[*batch, S]`` of ``total_count`` draws of a :class:`Categorical`."""

    arg_constraints = {
        "total_count": constraints.nonnegative_integer,
        "probs": weights,
        "logits": real_vector,
    }
    defaults = {"total_count": 1, **_NEITHER}
    exactly_one = ("probs", "logits")
    is_discrete = True
    event_dim = 1
    total_count: Any
    probs: Any

    def log_prob(self, value: Tensor) -> Tensor:
        value, count, last = self.against(value)
        inside = is_count(value).all(-1) & (value.sum(-1) == count)
        value = torch.where(is_count(value), value, 0.0)
        log = log_weights(self, last)
        each = times(value, log) - torch.lgamma(value + 1)
        return outside(inside, each.sum(-1) + torch.lgamma(count + 1))

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        """Draw category by category: each count is binomial given those before it."""
        left, last = self.expanded(shape, generator)
        probs = log_weights(self, last).exp()
        rest = probs.flip(-1).cumsum(-1).flip(-1)
        share = torch.where(rest > 0, probs / rest, 0.0).clamp(0, 1)
        draws = []
        for k in range(probs.shape[-1] - 1):
            draws.append(
                torch.binomial(left.contiguous(), share[..., k].contiguous(), generator=generator)
            )
            left = left - draws[-1]
        return torch.stack([*draws, left], -1)

    def to_torch(self) -> td.Distribution:
        args = self.tensors()
        return td.Multinomial(int(args.pop("total_count")), **args, validate_args=False)

    @property
    def support(self) -> Constraint:
        return constraints.multinomial(self.total_count)

    @property
    def mean(self) -> Tensor:
        count, last = self.tensors().values()
        return self.full(count[..., None] * log_weights(self, last).exp())

    @property
    def variance(self) -> Tensor:
        count, last = self.tensors().values()
        probs = log_weights(self, last).exp()
        return self.full(count[..., None] * probs * (1 - probs))


def log_weights(law: Distribution, last: Tensor) -> Tensor:
    """Normalised log-probabilities ``[*batch, S]`` of a law whose last parameter is ``probs`` or
    ``logits``.
    """
    if law.__dict__.get("probs") is None:
        return torch.log_softmax(last, -1)
    return last.log() - last.sum(-1, keepdim=True).log()


def is_count(value: Tensor) -> Tensor:
    """Where a value is an integer of at least zero."""
    return (value >= 0) & (value == value.floor())


def draw_category(probs: Tensor, generator: Generator | None) -> Tensor:
    """Draw one category for every row of ``probs`` ``[*batch, S]``."""
    rows = probs.reshape(-1, probs.shape[-1])
    return torch.multinomial(rows, 1, replacement=True, generator=generator).reshape(
        probs.shape[:-1]
    )
