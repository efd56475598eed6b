"""Gaussian noise around an element of a group of rotations or rigid motions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from ppl.distributions.arguments import shape_of
from ppl.distributions.base import STATIC, Distribution, standard
from ppl.distributions.continuous import HALF_LOG_2PI
from ppl.distributions.multivariate import colouring, covariance_of, times_matrix, whitening
from ppl.errors import ModelError
from ppl.manifolds import MANIFOLDS, Manifold

_MATRICES = ("covariance_matrix", "precision_matrix", "scale_tril")


class ConcentratedNormal(Distribution):
    """``loc o exp(noise)`` with Gaussian noise in the tangent coordinates of ``loc``.

    Args (one of the last four):
        manifold: SO2, SE2, SO3 or SE3.
        loc: the element at the centre ``[*batch, *event]``.
        scale: standard deviation of every tangent coordinate, one number or ``[*batch, dims]``.
        covariance_matrix: of the tangent coordinates ``[*batch, dims, dims]``; likewise
            ``precision_matrix`` and ``scale_tril``.

    The density is that of the noise, in tangent coordinates: the curvature of the group's volume
    is neglected and rotations of more than pi are not added up, which is accurate while the
    rotation's standard deviation is well below pi. Source: [Sola2018] section 2.4.

    >>> from ppl.manifolds import SE2
    >>> pose = ConcentratedNormal(SE2, [1.0, 2.0, 0.0], 0.1)
    >>> pose.sample((5,), torch.Generator().manual_seed(0)).shape
    torch.Size([5, 3])
    """

    manifold: Manifold
    loc: Any

    def __init__(
        self,
        manifold: Manifold,
        loc: Any,
        scale: Any = None,
        *,
        covariance_matrix: Any = None,
        precision_matrix: Any = None,
        scale_tril: Any = None,
    ) -> None:
        if not isinstance(manifold, Manifold):
            raise ModelError(
                f"ConcentratedNormal: manifold must be one of {', '.join(MANIFOLDS)}, got {manifold!r}. "
                "Use MultivariateNormal for ordinary vectors."
            )
        event = len(manifold.event_shape)
        # What an argument must be depends on the group, so both tables belong to the law.
        self.arg_constraints = {  # type: ignore[misc]
            "manifold": STATIC,
            "loc": manifold.support,
            "scale": constraints.positive,
            "covariance_matrix": constraints.positive_definite,
            "precision_matrix": constraints.positive_definite,
            "scale_tril": constraints.lower_cholesky,
        }
        self.arg_event_dims = {"loc": event, "scale": 1, **dict.fromkeys(_MATRICES, 2)}  # type: ignore[misc]
        self.defaults = dict.fromkeys(("scale", *_MATRICES))  # type: ignore[misc]
        self.exactly_one = ("scale", *_MATRICES)  # type: ignore[misc]
        self.event_dim = event
        super().__init__(
            manifold,
            loc,
            scale=scale,
            covariance_matrix=covariance_matrix,
            precision_matrix=precision_matrix,
            scale_tril=scale_tril,
        )

    def check(self) -> None:
        dims, event = self.manifold.dims, self.manifold.event_shape
        (_, loc), (name, spread) = self._items()
        if event and shape_of(loc)[-1:] != event:
            raise ModelError(
                f"ConcentratedNormal: loc must be an element of {self.manifold.name}, {list(event)} numbers, got shape "
                f"{list(shape_of(loc))}. ppl.manifolds says what they are."
            )
        shape = shape_of(spread)
        expected = (dims, dims) if name in _MATRICES else (dims,)
        fits = name == "scale" and shape[-1:] in ((), (1,))
        if not fits and shape[-len(expected) :] != expected:
            raise ModelError(
                f"ConcentratedNormal: {name} must be {list(expected)} for the {dims} tangent coordinates of "
                f"{self.manifold.name}, got shape {list(shape)}. Translation comes first, then rotation."
            )

    def log_prob(self, value: Tensor) -> Tensor:
        residual, log_norm = self.whitened(value)
        return log_norm - 0.5 * residual.square().sum(-1)

    def whitened(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Residual ``[*batch, dims]`` of unit covariance, and the log-density ``[*batch]`` at zero."""
        value, loc, spread = self.against(value)
        name, dims = self._items()[1][0], self.manifold.dims
        residual = self.manifold.local(loc, value)
        if name == "scale":
            every = spread if spread.ndim else spread.unsqueeze(-1)
            log_scale = every.log().expand(*every.shape[:-1], dims).sum(-1)
            return residual / every, -log_scale - dims * HALF_LOG_2PI
        white, log_det = whitening(name, spread)
        return times_matrix(residual, white), log_det - dims * HALF_LOG_2PI

    def sample(self, shape: Sequence[int] = (), generator: Generator | None = None) -> Tensor:
        loc, spread = (self.tensors(generator=generator)[n] for n, _ in self._items())
        noise = standard(torch.randn, (*shape, self.manifold.dims), loc, generator)
        name = self._items()[1][0]
        if name == "scale":
            return self.manifold.retract(loc, noise * spread)
        return self.manifold.retract(loc, times_matrix(noise, colouring(name, spread)))

    @property
    def support(self) -> Constraint:
        return self.manifold.support

    @property
    def event_shape(self) -> torch.Size:
        return torch.Size(self.manifold.event_shape)

    @property
    def mean(self) -> Tensor:
        """The centre: the element that the noise is added to."""
        return self.full(self.tensors()["loc"])

    @property
    def covariance(self) -> Tensor:
        """Covariance ``[*batch, dims, dims]`` of the tangent coordinates at ``loc``."""
        name = self._items()[1][0]
        spread, dims = self.tensors()[name], self.manifold.dims
        if name != "scale":
            return covariance_of(name, spread)
        every = spread if spread.ndim else spread.unsqueeze(-1)
        return torch.diag_embed(every.square().expand(*every.shape[:-1], dims))
