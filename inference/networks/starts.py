"""Where a run starts: weights at random values that keep the scale of activations, all others at their prior.

Weights of layers: means from a Normal of variance ``2 / inputs``, K. He, X. Zhang, S. Ren, J. Sun, *Delving Deep into
Rectifiers*, ICCV 2015, eq. (10), with standard deviations that are small against it, so that noise does not drown the
activations. A law that was carried over from an earlier fit is its own start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import biject_to

from ppl.backend import Settings
from ppl.binding import Bound
from ppl.graph import Variable
from ppl.inference.networks.priors import Prior
from ppl.inference.networks.records import Start
from ppl.inference.networks.structure import Array, Network
from ppl.inference.particles.start import robust_moments
from ppl.nn.structure import PRODUCTS
from ppl.simulation import Known, simulate

_DRAWS, _FEW_DRAWS = 200, 20  # of a prior, and where they are large
_LARGE = 2**17  # numbers in one draw
_POINT = 0.2  # unit of params that are no weights: scales and shifts of norms, logarithms of scales


def make_starts(
    bound: Bound,
    network: Network,
    priors: Sequence[Prior],
    settings: Settings,
    initial_sd: float,
) -> tuple[Start, ...]:
    """The start of every array.

    Args:
        bound: the graph and its data.
        network: what was found in it.
        priors: of every array.
        settings: for the random streams.
        initial_sd: sd of the first Gaussians, in units of the spread of the first means, or of the prior.
    """
    moments = _prior_moments(bound, network, settings)
    zero = torch.zeros((), dtype=bound.dtype, device=bound.device)
    return tuple(
        _start(network, array, prior, moments.get(array.name), initial_sd, zero)
        for array, prior in zip(network.arrays, priors, strict=True)
    )


def first_params(bound: Bound, params: Sequence[Variable]) -> Tensor:
    """Initial values of all params on the real line, flat."""
    parts = [torch.zeros(0, dtype=bound.dtype, device=bound.device)]
    for v in params:
        start = torch.as_tensor(v.initial, dtype=bound.dtype, device=bound.device)
        parts.append(biject_to(v.support).inv(start.expand(bound.shape(v))).reshape(-1))
    return torch.cat(parts)


def fan_in(network: Network, array: Array) -> int:
    """Number of weights that meet in one unit of the layer that reads the array."""
    return math.prod(network.products[array.uses[0]].shape[1:])


def _start(
    network: Network,
    array: Array,
    prior: Prior,
    moments: tuple[Tensor, Tensor] | None,
    initial_sd: float,
    zero: Tensor,
) -> Start:
    if moments is not None:
        centre, spread = (m.reshape(array.free_shape) for m in moments)
        apart = spread if _is_matrix(network, array) else torch.zeros_like(spread)
        return Start(centre, apart, initial_sd * spread, float(spread.median()))
    loc = zero
    if prior.is_fixed_normal:
        at, scale = prior.normal(None)
        shape = array.free_shape
        if scale.ndim and _varies(at):  # a law that was carried over from an earlier fit
            unit = float(scale.median())
            centre = at.expand(scale.shape).reshape(shape)
            return Start(centre, zero, scale.reshape(shape), unit, is_carried=True)
        loc = at.reshape(shape) if at.ndim else at
    unit = fan_in(network, array) ** -0.5
    first = 2**0.5 * unit if array.role == "weight" else 0.0
    return Start(loc, zero + first, zero + initial_sd * 2**0.5 * unit, unit)


def _varies(x: Tensor) -> bool:
    return x.ndim > 0 and bool((x != x.reshape(-1)[0]).any())


def _is_matrix(network: Network, array: Array) -> bool:
    """Whether units differ by the start of the array only: weights of a family, or of a lifted module."""
    return any(
        w.variable == array.name and len(w.shape) > 1
        for layer in network.layers
        for key, w in layer.arrays.items()
        if layer.kind == "lift" or key == "weight"
    )


def param_units(bound: Bound, network: Network) -> tuple[Tensor, ...]:
    """Length in which the rate of each param is counted: ``inputs ** -0.5`` for weights of layers."""
    found = []
    for v in network.params:
        unit = _POINT
        for layer in network.layers:
            own = [w for w in layer.arrays.values() if w.variable == v.name]
            if own and layer.weight is not None and layer.kind in PRODUCTS:
                unit = math.prod(layer.weight.shape[1:]) ** -0.5
        found.append(torch.full((), unit, dtype=bound.dtype, device=bound.device))
    return tuple(found)


def _prior_moments(
    bound: Bound, network: Network, settings: Settings
) -> dict[str, tuple[Tensor, Tensor]]:
    """Median and spread on the real line of every latent that is drawn as a whole."""
    others = [a for a in network.arrays if a.role == "other"]
    if not others:
        return {}
    n = _DRAWS if sum(a.size for a in others) < _LARGE else _FEW_DRAWS
    streams = settings.streams.child("start")
    known = {}
    for v in bound.graph.latents:
        law = bound.graph.factors[v.name].law
        if law is not None and getattr(law.family, "is_improper", False):
            shape = (n, *bound.shape(v))
            free = torch.randn(shape, generator=streams.of(v.name), dtype=bound.dtype, device=bound.device)  # fmt: skip
            known[v.name] = Known(biject_to(v.support)(free))
    draws = simulate(bound, n, streams, known=known, sites=[a.name for a in others])
    found = {}
    for a in others:
        free = draws[a.name] if a.transform is None else a.transform.inv(draws[a.name])
        found[a.name] = robust_moments(free.reshape(n, -1))
    return found


__all__ = ["fan_in", "first_params", "make_starts", "param_units"]
