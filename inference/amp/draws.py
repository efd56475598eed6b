"""Draws from what a rule believes of each element: its law times the Gaussian pseudo-observation.

Elements are independent given the gates, as message passing takes them to be. Mixtures and spikes are drawn exactly;
any other law by inverting its distribution function on a grid of places around the posterior mean.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from ppl.inference.amp.rules.mixtures import Discrete, GaussianMixture
from ppl.inference.amp.rules.piecewise import Exponential, HalfNormal
from ppl.inference.amp.rules.priors import Gaussian, Sparse, TwoPoint
from ppl.inference.amp.rules.record import Rule, bounded
from ppl.inference.amp.structure import Gated
from ppl.inference.amp.vectors import MultivariateLaplace

_PLACES = 257
_REACH = 9.0  # posterior standard deviations


def drawn(rule: Rule, r: Tensor, vr: Tensor, n: int, generator: Generator) -> Tensor:
    """Draws ``[n, *batch, k]`` of every element.

    Args:
        rule: parameters broadcast with ``r``.
        r: pseudo-observation ``[*batch, k]``.
        vr: its variance.
        n: number of draws.
        generator: on the CPU.
    """
    vr = vr.expand_as(r)
    if isinstance(rule, Sparse):
        return _sparse(rule, r, vr, n, generator)
    if isinstance(rule, TwoPoint):
        share = (rule.moments(r, vr).mean - rule.low) / (rule.high - rule.low)
        return torch.where(_bits(share, n, generator), rule.high, rule.low)
    if isinstance(rule, Gaussian):
        found = rule.moments(r, vr)
        return _normal(found.mean, found.variance, n, generator)
    if isinstance(rule, (GaussianMixture, Discrete)):
        return _components(*rule.posterior(r, vr), n, generator)
    if isinstance(rule, MultivariateLaplace):
        return rule.drawn(r, vr, n, generator)
    if isinstance(rule, Gated):
        return _gated(rule, r, vr, n, generator)
    return _by_grid(rule, r, vr, n, generator)


def _sparse(rule: Sparse, r: Tensor, vr: Tensor, n: int, generator: Generator) -> Tensor:
    on = _bits(rule.inclusion(r, vr).expand_as(r), n, generator)
    return torch.where(on, drawn(slab_of(rule), r, vr, n, generator), 0.0)


def slab_of(rule: Sparse) -> Rule:
    """The law of an element that is not zero."""
    slab = getattr(rule, "slab", None)
    return Gaussian(rule.mean, rule.variance) if slab is None else slab  # type: ignore[attr-defined]


def _gated(rule: Gated, r: Tensor, vr: Tensor, n: int, generator: Generator) -> Tensor:
    logs = torch.stack([each.moments(r, vr).log_z.expand_as(r) for each in rule.rules], -1)
    share = (logs + rule.log_weights).softmax(-1)
    which = _choices(share, n, generator)
    parts = [drawn(each, r, vr, n, generator) for each in rule.rules]
    out = parts[0]
    for k, part in enumerate(parts[1:], start=1):
        out = torch.where(which == k, part, out)
    return out


def _components(
    weight: Tensor, mean: Tensor, variance: Tensor, n: int, generator: Generator
) -> Tensor:
    which = _choices(weight, n, generator).unsqueeze(-1)
    shape = (n, *weight.shape)
    centre = mean.expand(shape[1:]).expand(shape).gather(-1, which).squeeze(-1)
    spread = variance.expand(shape[1:]).expand(shape).gather(-1, which).squeeze(-1)
    noise = torch.randn(centre.shape, generator=generator, dtype=centre.dtype).to(centre.device)
    return centre + spread.sqrt() * noise


def _by_grid(rule: Rule, r: Tensor, vr: Tensor, n: int, generator: Generator) -> Tensor:
    """Invert the distribution function, linear between places."""
    level, places = _distribution(rule, r, vr)
    u = torch.rand((*r.shape, n), generator=generator, dtype=r.dtype).to(r.device)
    return _interpolated(level, places, u).movedim(-1, 0)


def stretches(rule: Rule, r: Tensor, vr: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Edges ``[count + 1, *batch, k]`` and probabilities ``[count]`` of stretches, shorter in the tails."""
    level, places = _distribution(rule, r, vr.expand_as(r))
    u = torch.special.ndtr(torch.linspace(-4.0, 4.0, count + 1, dtype=r.dtype, device=r.device))
    u[0], u[-1] = 0.0, 1.0
    edges = _interpolated(level, places, u.expand(*r.shape, -1).contiguous()).movedim(-1, 0)
    return edges, u.diff()


def _distribution(rule: Rule, r: Tensor, vr: Tensor) -> tuple[Tensor, Tensor]:
    """The distribution function on a grid of places, both ``[*batch, k, G]``."""
    found = rule.moments(r, vr)
    scale = found.variance.clamp(min=0.0).sqrt().expand_as(r)
    steps = torch.linspace(-_REACH, _REACH, _PLACES, dtype=r.dtype, device=r.device)
    places = found.mean + scale * steps.reshape(-1, *(1,) * r.ndim)  # [G, *batch, k]
    low, high = _edges(rule, r)
    places = torch.minimum(torch.maximum(places, low), high)
    logs = rule.log_prob(places) - 0.5 * (places - r).square() / bounded(vr)
    logs = torch.where(logs.isfinite(), logs, -math.inf)
    density = (logs - logs.amax(0)).exp()
    mass = 0.5 * (density[1:] + density[:-1]) * places.diff(dim=0)
    level = mass.cumsum(0) / mass.sum(0)
    level = torch.cat([torch.zeros_like(level[:1]), level]).movedim(0, -1).contiguous()
    return level, places.movedim(0, -1).contiguous()


def _interpolated(level: Tensor, places: Tensor, u: Tensor) -> Tensor:
    right = torch.searchsorted(level, u).clamp(1, level.shape[-1] - 1)
    below, above = level.gather(-1, right - 1), level.gather(-1, right)
    share = ((u - below) / (above - below).clamp(min=1e-300)).clamp(0, 1)
    start = places.gather(-1, right - 1)
    return start + share * (places.gather(-1, right) - start)


def _edges(rule: Rule, like: Tensor) -> tuple[Tensor, Tensor]:
    """Support of a rule."""
    is_positive = isinstance(rule, (HalfNormal, Exponential))
    low = 0.0 if is_positive else getattr(rule, "low", -math.inf)
    high = getattr(rule, "high", math.inf)
    return torch.as_tensor(low).to(like), torch.as_tensor(high).to(like)


def _bits(share: Tensor, n: int, generator: Generator) -> Tensor:
    return (
        torch.rand((n, *share.shape), generator=generator, dtype=share.dtype).to(share.device)
        < share
    )


def _choices(share: Tensor, n: int, generator: Generator) -> Tensor:
    """Component indices ``[n, *batch, k]`` from ``share [*batch, k, V]``."""
    level = share.cumsum(-1).contiguous()
    u = torch.rand((*share.shape[:-1], n), generator=generator, dtype=share.dtype).to(share.device)
    found = torch.searchsorted(level, u * level[..., -1:])
    return found.clamp(max=share.shape[-1] - 1).movedim(-1, 0)


def _normal(mean: Tensor, variance: Tensor, n: int, generator: Generator) -> Tensor:
    noise = torch.randn((n, *mean.shape), generator=generator, dtype=mean.dtype).to(mean.device)
    return mean + variance.expand_as(mean).sqrt() * noise
