"""One exponential family as a record: ``log p(z) = <T(z), eta> - A(eta) + log h(z)``.

Four ways to write the same law, and the roads between them:

- *standard* parameters: a dict with the names of ``torch.distributions``, fixed ones included;
- *natural* parameters ``eta``: a tuple, one tensor a statistic;
- *mean* parameters: a tuple of the expectations of the statistics;
- *mean* parameters of the Gaussian families: ``(loc, central second moment)`` instead, because a
  raw second moment loses all digits of the variance where ``|loc|`` is much larger than the scale.

A standard parameter that is not learned (the number of trials of a Binomial) is *fixed*: it
is passed by keyword, and is part of every standard dict.

All conversions run in double precision and return the dtype of their input.

Sources: [Wainwright2008] chapter 3; [Bishop2006] section 2.4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl.inference.numerics.linalg import weighted_moments

Fixed = Mapping[str, Any]  # fixed standard parameters: tensors or numbers
Mean = tuple[Tensor, ...]
Natural = tuple[Tensor, ...]
Standard = Mapping[str, Any]


@dataclass(frozen=True)
class Rules:
    """The formulas of one family; ``f`` are its fixed parameters, all tensors are double.

    ``from_mean`` also gets the limits of the caller's dtype, since what counts as the border of
    the parameter space (all particles equal, a probability of one) depends on it.
    """

    statistics: Callable[[Tensor, Fixed], tuple[Tensor, ...]]
    to_mean: Callable[[Standard], Mean]
    from_mean: Callable[[Mean, torch.finfo, Fixed], dict[str, Tensor]]
    to_natural: Callable[[Standard], Natural]
    from_natural: Callable[[Natural, Fixed], dict[str, Tensor]]
    log_partition: Callable[[Natural, Fixed], Tensor]
    log_base: Callable[[Tensor, Fixed], Tensor]


@dataclass(frozen=True)
class Family:
    """An exponential family: names, shapes, and the conversions described in the module.

    >>> from ppl.inference.numerics.expfam import FAMILIES
    >>> gamma = FAMILIES["Gamma"]
    >>> law = {"concentration": torch.tensor(3.0), "rate": torch.tensor(2.0)}
    >>> mean = gamma.mean_from_standard(law)
    >>> gamma.standard_from_mean(mean)
    {'concentration': tensor(3.), 'rate': tensor(2.)}
    """

    name: str
    params: tuple[str, ...]  # learned standard parameters
    rules: Rules
    fixed: tuple[str, ...] = ()  # names of the fixed parameters
    event_dim: int = 0  # event axes of z
    stat_dims: tuple[int, ...] = (0,)  # event axes of each statistic
    # The map to the coordinate in which the family is Gaussian; None: mean parameters are raw.
    gaussian_coordinate: Callable[[Tensor], Tensor] | None = None

    def statistics(self, z: Tensor, **fixed: Any) -> tuple[Tensor, ...]:
        """Sufficient statistics of ``z`` ``[*batch, *event]``, clipped so that all are finite.

        A particle at the border of the support counts as the nearest number inside.  Integers and
        booleans become float64.
        """
        return self.rules.statistics(z if z.is_floating_point() else z.double(), fixed)

    def mean_from_standard(self, params: Standard) -> Mean:
        """Mean parameters of the law with these standard parameters."""
        return _in_dtype(self.rules.to_mean(_double(params)), self._dtype(params))

    def standard_from_mean(self, mean: Mean, **fixed: Any) -> dict[str, Any]:
        """The law that has these mean parameters; the M-step.

        Mean parameters on the border of what the family can reach, as all particles equal or all
        successes, give a law just inside: finite, positive parameters.

        Returns:
            Standard parameters with the fixed ones, ready for ``torch.distributions``.
        """
        dtype = mean[0].dtype
        exact = tuple(m.double() for m in mean)
        found = self.rules.from_mean(exact, torch.finfo(dtype), _double(fixed))
        return {name: value.to(dtype) for name, value in found.items()} | fixed

    def natural_from_standard(self, params: Standard) -> Natural:
        """Natural parameters, one tensor a statistic."""
        return _in_dtype(self.rules.to_natural(_double(params)), self._dtype(params))

    def standard_from_natural(self, natural: Natural, **fixed: Any) -> dict[str, Any]:
        """Standard parameters, with the fixed ones, of the law with these natural parameters."""
        exact = tuple(eta.double() for eta in natural)
        found = self.rules.from_natural(exact, _double(fixed))
        return {name: value.to(natural[0].dtype) for name, value in found.items()} | fixed

    def log_partition(self, natural: Natural, **fixed: Any) -> Tensor:
        """``A(eta)`` ``[*batch]``; its gradient is the expectation of the statistics."""
        return self.rules.log_partition(natural, fixed)

    def log_base(self, z: Tensor, **fixed: Any) -> Tensor:
        """``log h(z)`` ``[*batch]``, the part of the log-density without parameters."""
        return self.rules.log_base(z if z.is_floating_point() else z.double(), fixed)

    def log_prob(self, z: Tensor, natural: Natural, **fixed: Any) -> Tensor:
        """Log-density of ``z`` ``[*batch, *event]`` as an inner product, ``[*batch]``.

        As accurate as the direct formula unless ``T(z)`` and ``eta`` are large and cancel, as for
        a Normal with ``|loc|`` much larger than its scale.
        """
        z = z if z.is_floating_point() else z.to(natural[0].dtype)
        value = self.log_base(z, **fixed) - self.log_partition(natural, **fixed)
        terms = zip(self.statistics(z, **fixed), natural, self.stat_dims, strict=True)
        for statistic, eta, dims in terms:
            product = statistic * eta
            value = value + (product.sum(tuple(range(-dims, 0))) if dims else product)
        return value

    def average(self, old: Mean, new: Mean, step: float | Tensor) -> Mean:
        """Mean parameters of the mixture ``(1 - step) old + step new``.

        For the Gaussian families the exact central form of averaging raw moments,
        ``cov = (1-l) C + l C' + l (1-l) (m' - m)(m' - m)^T``, which has no cancellation.

        Args:
            old: mean parameters, each ``[*batch, *statistic event]``.
            new: same shapes.
            step: in ``[0, 1]``, a number or ``[*batch]``.

        >>> from ppl.inference.numerics.expfam import FAMILIES
        >>> old, new = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0])
        >>> FAMILIES["Normal"].average(tuple(old), tuple(new), 0.5)  # between them: variance grows
        (tensor(1.), tensor(2.))
        """
        steps = [_trailing(step, dims) for dims in self.stat_dims]
        # Not torch.lerp: it refuses a step of another dtype.
        mixed = tuple((1 - s) * a + s * b for a, b, s in zip(old, new, steps, strict=True))
        if self.gaussian_coordinate is None:
            return mixed
        shift, s = new[0] - old[0], steps[1]
        return mixed[0], mixed[1] + s * (1 - s) * _square(shift, self.event_dim)

    def weighted_mean(self, z: Tensor, weights: Tensor, dim: int, **fixed: Any) -> Mean:
        """Expectation of the statistics under weighted particles, as mean parameters.

        Args:
            z: particles ``[*batch, *event]``, the particle axis among ``batch``.
            weights: as many axes as ``batch``, broadcast against it; sums to one over ``dim``.
            dim: the particle axis, counted among the axes of ``weights``.
            **fixed: the fixed parameters.

        Returns:
            Mean parameters ``[*batch without dim, *statistic event]``, in the wider dtype of the
            two: pass double weights to hold the state in double.

        >>> from ppl.inference.numerics.expfam import FAMILIES
        >>> z, w = torch.tensor([999.0, 1001.0]), torch.tensor([0.5, 0.5])
        >>> FAMILIES["Normal"].weighted_mean(z, w, dim=0)
        (tensor(1000.), tensor(1.))
        """
        dtype = torch.promote_types(z.dtype, weights.dtype)
        axis = dim % weights.dim()
        w = weights.double()
        if self.gaussian_coordinate is not None:
            # Clipping to the support must happen in the dtype of the particles.
            u = self.gaussian_coordinate(z).double()
            return _in_dtype(_central_moments(u, w, axis, self.event_dim), dtype)
        statistics = [t.double() for t in self.statistics(z, **fixed)]
        pairs = zip(statistics, self.stat_dims, strict=True)
        return _in_dtype(tuple((_trailing(w, dims) * t).sum(axis) for t, dims in pairs), dtype)

    def _dtype(self, params: Standard) -> torch.dtype:
        return params[self.params[0]].dtype


def _central_moments(u: Tensor, w: Tensor, axis: int, event_dim: int) -> Mean:
    if event_dim:
        return weighted_moments(u.movedim(axis, -2), w.movedim(axis, -1))
    mean = (w * u).sum(axis, keepdim=True)
    return mean.squeeze(axis), (w * (u - mean) ** 2).sum(axis)


def _square(shift: Tensor, event_dim: int) -> Tensor:
    return shift.unsqueeze(-1) * shift.unsqueeze(-2) if event_dim else shift**2


def _trailing(x: float | Tensor, dims: int) -> Any:
    """Append ``dims`` axes of size one to a tensor; leave a number alone."""
    return x[(...,) + (None,) * dims] if isinstance(x, Tensor) else x


def _double(params: Standard) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in params.items()}


def _in_dtype(values: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(v.to(dtype) for v in values)
