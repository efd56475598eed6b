"""Laws made of several: finite mixtures, and mixtures with a point mass at zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch import distributions as td
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from ppl.distributions.arguments import OrZero, shape_of, weights
from ppl.distributions.base import NESTED, Distribution, open_uniform
from ppl.distributions.discrete import Categorical, draw_category
from ppl.errors import ModelError

# A count that is over zero is found in so many draws unless that is rarer than once in a hundred; then it is small.
_TRIES, _LONGEST = 100, 10_000


class _Mixture(Distribution):
    """A component drawn by its weight, a value drawn from that component."""

    def _log_shares(self) -> Tensor:
        raise NotImplementedError

    def _components(self) -> Distribution | tuple[Distribution, ...]:
        raise NotImplementedError

    def _check_components(self, count: int) -> None:
        family, components = type(self).__name__, self._components()
        if isinstance(components, Distribution):
            self.event_dim, self.is_discrete = components.event_dim, components.is_discrete
            axis = (components.batch_shape or (1,))[-1]
            if axis not in (1, count):
                raise ModelError(
                    f"{family}: {count} weights need {count} components along the last axis of "
                    "the parameters of "
                    f"{components!r}, got {axis}. Transpose them, or pass a list of distributions."
                )
            return
        if len(components) != count or len({c.event_dim for c in components}) != 1:
            raise ModelError(
                f"{family}: {count} weights need as many components, all with draws of one shape; "
                "got "
                f"{list(components)!r}. Give one weight for each component."
            )
        self.event_dim = components[0].event_dim
        self.is_discrete = all(c.is_discrete for c in components)

    def log_prob(self, value: Tensor) -> Tensor:
        log_shares, components = self._log_shares(), self._components()
        if isinstance(components, Distribution):
            return (
                log_shares + components.log_prob(value.unsqueeze(-1 - self.event_dim))
            ).logsumexp(-1)
        terms = [log_shares[..., k] + c.log_prob(value) for k, c in enumerate(components)]
        return torch.stack(torch.broadcast_tensors(*terms)).logsumexp(0)

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        log_shares, components = self._log_shares(), self._components()
        shares = log_shares.exp().expand(*shape, log_shares.shape[-1])
        index = draw_category(shares, generator)
        axis = len(tuple(shape))
        if isinstance(components, Distribution):
            draws = components.sample((*shape, shares.shape[-1]), generator)
        else:
            draws = torch.stack([c.sample(shape, generator) for c in components], axis)
        index = index.reshape(*index.shape, *(1,) * (1 + self.event_dim))
        return torch.take_along_dim(draws, index.to(draws.device), axis).squeeze(axis)

    @property
    def event_shape(self) -> torch.Size:
        components = self._components()
        return (components if isinstance(components, Distribution) else components[0]).event_shape

    @property
    def support(self) -> Constraint:
        components = self._components()
        if isinstance(components, Distribution):
            return components.support
        supports = [c.support for c in components]
        same = all(str(s) == str(supports[0]) for s in supports)
        return supports[0] if same else Either(supports)

    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Shares, means and variances with the component axis after the batch axes."""
        components = self._components()
        shares = self._log_shares().exp()
        shares = shares.reshape(*shares.shape, *(1,) * self.event_dim)
        if isinstance(components, Distribution):
            return shares, components.mean, components.variance
        axis, both = -1 - self.event_dim, [(c.mean, c.variance) for c in components]
        means = torch.stack(torch.broadcast_tensors(*(m for m, _ in both)), axis)
        return shares, means, torch.stack(torch.broadcast_tensors(*(v for _, v in both)), axis)

    @property
    def mean(self) -> Tensor:
        shares, means, _ = self._moments()
        return self.full((shares * means).sum(-1 - self.event_dim))

    @property
    def variance(self) -> Tensor:
        shares, means, variances = self._moments()
        axis = -1 - self.event_dim
        spread = (means - (shares * means).sum(axis, keepdim=True)).square()
        return self.full((shares * (variances + spread)).sum(axis))


class Mixture(_Mixture):
    """Mixture with ``weights`` ``[*batch, K]``, normalised, of ``K`` components.

    ``components`` is a list of distributions, or one distribution whose last batch dimension counts
    the components.

    >>> from ppl.distributions import Normal
    >>> Mixture([0.25, 0.75], [Normal(0.0, 1.0), Normal(4.0, 1.0)]).mean
    tensor(3., dtype=torch.float64)
    """

    arg_constraints = {"weights": weights, "components": NESTED}
    weights: Any
    components: Any

    def _argument(self, name: str, value: Any) -> Any:
        if name == "components" and isinstance(value, (list, tuple)):
            return tuple(super(Mixture, self)._argument(name, part) for part in value)
        return super()._argument(name, value)

    def check(self) -> None:
        self._check_components(shape_of(self.weights)[-1])

    def extra_dims(self, name: str) -> int:
        return int(isinstance(self.components, Distribution))

    def _log_shares(self) -> Tensor:
        shares = self.tensors()["weights"]
        return shares.log() - shares.sum(-1, keepdim=True).log()

    def _components(self) -> Distribution | tuple[Distribution, ...]:
        return self.components


class MixtureSameFamily(_Mixture):
    """Mixture of the components along the last batch dimension of one distribution, chosen by a
    Categorical.
    """

    arg_constraints = {"mixture_distribution": NESTED, "component_distribution": NESTED}
    mixture_distribution: Categorical
    component_distribution: Distribution

    def check(self) -> None:
        if not isinstance(self.mixture_distribution, Categorical):
            raise ModelError(
                "MixtureSameFamily: mixture_distribution must be a Categorical, got "
                f"{self.mixture_distribution!r}. Write Categorical(probs=...)."
            )
        self._check_components(len(self.mixture_distribution.enumerate_support()))

    def extra_dims(self, name: str) -> int:
        return int(name == "component_distribution")

    def _log_shares(self) -> Tensor:
        return self.mixture_distribution.log_shares()

    def _components(self) -> Distribution:
        return self.component_distribution

    def to_torch(self) -> td.Distribution:
        chooser, family = (
            self.mixture_distribution.to_torch(),
            self.component_distribution.to_torch(),
        )
        return td.MixtureSameFamily(chooser, family, validate_args=False)  # type: ignore[arg-type]


class SpikeSlab(Distribution):
    """Exactly zero with probability ``1 - probs``, else drawn from ``slab``.

    A mixed measure: ``log_prob`` is a log-probability at zero and a log-density elsewhere, so it
    integrates to one over the sum of a point mass at zero and length. The slab is scalar and
    continuous.
    """

    arg_constraints = {"probs": constraints.unit_interval, "slab": NESTED}
    probs: Any
    slab: Distribution

    def check(self) -> None:
        if self.slab.event_dim or self.slab.is_discrete:
            raise ModelError(
                f"SpikeSlab: slab must be a scalar continuous law, got {self.slab!r}. "
                "For counts use ZeroInflated; for vectors open a plate over the entries."
            )

    def log_prob(self, value: Tensor) -> Tensor:
        value, probs = self.against(value)
        return torch.where(value == 0, torch.log1p(-probs), probs.log() + self.slab.log_prob(value))

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        (probs,) = self.expanded(shape, generator)
        return self.slab.sample(shape, generator) * torch.bernoulli(probs, generator=generator)

    @property
    def support(self) -> Constraint:
        inner = self.slab.support
        return inner if inner is constraints.real else OrZero(inner)

    @property
    def mean(self) -> Tensor:
        return self.full(self.tensors()["probs"] * self.slab.mean)

    @property
    def variance(self) -> Tensor:
        probs, mean = self.tensors()["probs"], self.slab.mean
        return self.full(probs * (self.slab.variance + (1 - probs) * mean.square()))


class ZeroInflated(Distribution):
    """Zero with probability ``gate``, else a draw of the count law ``dist`` (maybe zero too)."""

    arg_constraints = {"dist": NESTED, "gate": constraints.unit_interval}
    is_discrete = True
    dist: Distribution
    gate: Any

    def check(self) -> None:
        if self.dist.event_dim or not self.dist.is_discrete:
            raise ModelError(
                "ZeroInflated: dist must be a scalar count law such as Poisson, got "
                f"{self.dist!r}. "
                "For a continuous law use SpikeSlab(probs, slab)."
            )

    def log_prob(self, value: Tensor) -> Tensor:
        value, gate = self.against(value)
        from_dist = torch.log1p(-gate) + self.dist.log_prob(value)
        return torch.where(value == 0, torch.logaddexp(gate.log(), from_dist), from_dist)

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        (gate,) = self.expanded(shape, generator)
        return self.dist.sample(shape, generator) * torch.bernoulli(1 - gate, generator=generator)

    def enumerate_support(self) -> Tensor | None:
        return self.dist.enumerate_support()

    @property
    def support(self) -> Constraint:
        return self.dist.support

    @property
    def mean(self) -> Tensor:
        return self.full((1 - self.tensors()["gate"]) * self.dist.mean)

    @property
    def variance(self) -> Tensor:
        gate, mean = self.tensors()["gate"], self.dist.mean
        return self.full((1 - gate) * (self.dist.variance + gate * mean.square()))


class Hurdle(Distribution):
    """Zero with probability ``gate``, else a draw of the count law ``dist`` given that it is not zero.

    >>> from ppl.distributions import Poisson
    >>> Hurdle(Poisson(2.0), 0.3).log_prob(torch.tensor(0.0, dtype=torch.float64)).exp()
    tensor(0.3000, dtype=torch.float64)
    """

    arg_constraints = {"dist": NESTED, "gate": constraints.unit_interval}
    is_discrete = True
    dist: Distribution
    gate: Any

    def check(self) -> None:
        if self.dist.event_dim or not self.dist.is_discrete:
            raise ModelError(
                f"Hurdle: dist must be a scalar count law such as Poisson, got {self.dist!r}. "
                "For a continuous law use SpikeSlab(probs, slab)."
            )

    def log_prob(self, value: Tensor) -> Tensor:
        value, gate = self.against(value)
        over = torch.log1p(-gate) + self.dist.log_prob(value) - self._log_over(value)
        return torch.where(value == 0, gate.log(), over)

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        (gate,) = self.expanded(shape, generator)
        return self._over(shape, generator) * torch.bernoulli(1 - gate, generator=generator)

    def enumerate_support(self) -> Tensor | None:
        return self.dist.enumerate_support()

    @property
    def support(self) -> Constraint:
        return self.dist.support

    @property
    def mean(self) -> Tensor:
        gate = self.tensors()["gate"]
        return self.full((1 - gate) * self.dist.mean / self._log_over(gate).exp())

    @property
    def variance(self) -> Tensor:
        gate, mean = self.tensors()["gate"], self.dist.mean
        square = (self.dist.variance + mean.square()) / self._log_over(gate).exp()
        return self.full((1 - gate) * square - self.mean.square())

    def _log_over(self, like: Tensor) -> Tensor:
        """Log-probability that a draw of ``dist`` is not zero."""
        return (-torch.expm1(self.dist.log_prob(torch.zeros_like(like)))).log()

    def _over(self, shape: Sequence[int], generator: Generator | None) -> Tensor:
        """Draws of ``dist`` that are not zero: by rejection, and by inversion where nearly all would be rejected."""
        draws = self.dist.sample(shape, generator)
        for _ in range(_TRIES):
            if bool((draws > 0).all()):
                return draws
            draws = torch.where(draws > 0, draws, self.dist.sample(shape, generator))
        left = open_uniform(shape, draws, generator) * self._log_over(draws).exp()
        count, at = torch.zeros_like(draws), 0
        while bool(((draws == 0) & (left > 0)).any()) and at < _LONGEST:
            at += 1
            count = torch.where(left > 0, float(at), count)
            left = left - self.dist.log_prob(torch.full_like(left, float(at))).exp()
        return torch.where(draws > 0, draws, count)


class Either(Constraint):
    """The union of several supports."""

    def __init__(self, parts: Sequence[Constraint]) -> None:
        self.parts = tuple(parts)
        self.event_dim = parts[0].event_dim
        self.is_discrete = all(p.is_discrete for p in parts)
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        inside = self.parts[0].check(value)
        for part in self.parts[1:]:
            inside = inside | part.check(value)
        return inside
