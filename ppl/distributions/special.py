"""Laws that are not proper families: flat densities, a point mass, and the marker of a chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from ppl.distributions.arguments import Point
from ppl.distributions.base import NESTED, STATIC, Distribution, outside
from ppl.errors import ModelError
from ppl.manifolds import Manifold
from ppl.shapes import broadcast_shapes


class Flat(Distribution):
    """Log-density 0 on all reals: improper, so there is nothing to draw; ``sample`` gives zeros as
    a start.

    ``size`` is the shape of one element: ``Flat()`` is one number, ``Flat(3)`` three independent
    ones, ``Flat(SE2)`` one element of a group (started at the identity).

    >>> Flat(3).batch_shape
    torch.Size([3])
    """

    arg_constraints = {"size": STATIC}
    defaults = {"size": None}
    is_improper = True
    size: Any

    def check(self) -> None:
        if isinstance(self.size, Manifold) and type(self) is Flat:
            self.event_dim = len(self.size.event_shape)
            return
        sizes = (
            () if self.size is None else (self.size,) if isinstance(self.size, int) else self.size
        )
        if not isinstance(sizes, (tuple, list)) or not all(
            isinstance(n, int) and n >= 0 for n in sizes
        ):
            raise ModelError(
                f"{type(self).__name__}: size must be a shape, got {self.size!r}. Pass 3 or (2, 3)."
            )
        self.size = tuple(sizes) or None

    def log_prob(self, value: Tensor) -> Tensor:
        (value,) = self.against(value)
        batch = value.shape[: value.ndim - self.event_dim]
        return value.new_zeros(broadcast_shapes(batch, self.batch_shape))

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        device = generator.device if generator else None
        if isinstance(self.size, Manifold):
            start = self.size.identity(device=device)
            return start.expand((*shape, *start.shape)).clone()
        return torch.zeros(tuple(shape), dtype=torch.float64, device=device)

    @property
    def support(self) -> Constraint:
        return self.size.support if isinstance(self.size, Manifold) else constraints.real

    @property
    def batch_shape(self) -> torch.Size:
        return torch.Size(() if isinstance(self.size, Manifold) else self.size or ())

    @property
    def event_shape(self) -> torch.Size:
        return torch.Size(self.size.event_shape if isinstance(self.size, Manifold) else ())


class HalfFlat(Flat):
    """Log-density 0 on the positive reals; improper, ``sample`` gives ones as a start."""

    def log_prob(self, value: Tensor) -> Tensor:
        return outside(self.against(value)[0] > 0, super().log_prob(value))

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        return super().sample(shape, generator) + 1

    @property
    def support(self) -> Constraint:
        return constraints.positive


class Delta(Distribution):
    """All mass at the point ``v``."""

    arg_constraints = {"v": constraints.real}
    v: Any

    def log_prob(self, value: Tensor) -> Tensor:
        value, v = self.against(value)
        return outside(value == v, torch.zeros_like(v))

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        return self.expanded(shape, generator)[0].clone()

    @property
    def support(self) -> Constraint:
        return Point(self.v)

    @property
    def mean(self) -> Tensor:
        return self.full(self.tensors()["v"])

    @property
    def variance(self) -> Tensor:
        return torch.zeros_like(self.mean)


class Markov(Distribution):
    """Law of a latent in an ordered plate: ``init`` for its first element, ``step(previous)`` for
    the others.

    It only carries its two parts; the language opens them along the plate. In ``init``, values
    that vary over the plate are those of its first element.
    """

    arg_constraints = {"init": NESTED, "step": STATIC, "order": STATIC}
    defaults = {"order": 1}
    is_markov = True
    init: Distribution
    step: Callable[[Any], Distribution]
    order: int

    def check(self) -> None:
        if not callable(self.step):
            raise ModelError(
                "Markov: step must be a function of the previous value that returns a "
                "distribution, got "
                f"{type(self.step).__name__}. Write step=lambda previous: Normal(previous, scale)."
            )
        if not isinstance(self.order, int) or self.order < 1:
            raise ModelError(
                f"Markov: order must be an integer of at least 1, got {self.order!r}. Use order=1."
            )
        if self.order > 1:
            raise ModelError(
                f"Markov: order={self.order} is not supported; a step sees one element before it. Let the state be a "
                f"vector that remembers: init=Normal(torch.zeros({self.order}), ...) and step=lambda last: "
                "Normal(torch.stack([..., last[0]]), ...), whose copied parts have a small scale of their own; "
                "an observed series may take its lags as covariates."
            )
        self.event_dim, self.is_discrete = self.init.event_dim, self.init.is_discrete

    def log_prob(self, value: Tensor) -> Tensor:
        raise _not_open()

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        raise _not_open()

    @property
    def support(self) -> Constraint:
        return self.init.support

    @property
    def event_shape(self) -> torch.Size:
        return self.init.event_shape


def _not_open() -> ModelError:
    return ModelError(
        "Markov opens only in an ordered plate, where it has a previous element. "
        "Declare plate('time', ordered=True), open it, and use latent('x', Markov(init, step))."
    )
