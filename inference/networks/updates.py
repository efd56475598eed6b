"""New values of all Gaussians and params from the slopes of a loss: Adam, SGD and the natural step, on flat vectors.

All vectors are gone through in stretches that stay in the cache, and the divergence from Normal laws with known
parameters is differentiated by hand: the arithmetic of a step beside the gradient is a few passes.

Sources: Adam, [Kingma2015] algorithm 1; natural steps, [Shen2024] algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.inference.networks.records import (
    Problem,
    Rule,
    State,
    kept,
    rate,
    slices,
    temperature,
)
from ppl.inference.numerics.ivon import MOMENTUM, total_curvature_step

_STRETCH = 2**17  # numbers in one: fewer calls count for more than a nearer cache
_FIRST, _SECOND, _LEAST = 0.9, 0.999, 1e-8  # of Adam
# Share of a new curvature in the average: at most, times the number of steps later, and at least.
_SHARE, _LATE, _LEAST_SHARE = 0.05, 4.0, 1e-5


class Slope(NamedTuple):
    """Derivatives of the loss by one array, ``[k]`` each."""

    mean: Tensor
    second: Tensor | None  # by ``kind``; None of draws: mean times eps is that by the sd
    kind: str  # "variance", "noise", "sd", "draw"
    eps: Tensor | None
    prior_mean: Tensor | None = None  # of the law, where it is not a known Normal
    prior_sd: Tensor | None = None


class Moved(NamedTuple):
    """What a step makes."""

    mean: Tensor
    raw: Tensor
    memory: tuple[Tensor, ...]
    kl: Tensor | None  # before the step, from known Normals; None where it was not asked for


def moved(
    problem: Problem,
    state: State,
    sd: Tensor,
    slopes: Sequence[Slope],
    param_slopes: Sequence[Tensor],
    with_kl: bool,
    place: Tensor,
) -> Moved:
    """All values after a step; of what was given ``sd`` and ``place`` are written to.

    Args:
        problem: what is fitted.
        state: before.
        sd: of all entries ``[S]``.
        slopes: of every array.
        param_slopes: of every param.
        with_kl: whether the divergence is wanted too.
        place: memory for the means ``[S + P]``.
    """
    new = Moved(place, sd, tuple([problem.spare.like(m) for m in state.memory]), None)
    total = state.mean.new_zeros(()) if with_kl else None
    move = _natural if problem.rule.natural else _euclidean
    for at, (where, slope) in enumerate(zip(slices(problem, state), slopes, strict=True)):
        array = _Array(problem, state, at, slope)
        for start in range(where.start, where.stop, _STRETCH):
            part = slice(start, min(start + _STRETCH, where.stop))
            array.now(part, where.start)
            if total is not None:
                total = total + array.divergence(sd[part])
            move(array, sd[part], new)
    _params(problem, state, param_slopes, new)
    return new._replace(kl=total)


class _Array:
    """One array on its way through the stretches."""

    def __init__(self, problem: Problem, state: State, at: int, slope: Slope) -> None:
        self.problem, self.state, self.slope, self.rule = problem, state, slope, problem.rule
        self.weight = temperature(problem.rule, state.step) / problem.examples
        self.loc: Tensor | float = 0.0
        self.scale: Tensor | float | None = None  # of a known Normal
        prior = problem.priors[at]
        if prior.is_fixed_normal:
            loc, scale = prior.normal(kept(problem, state, at))
            self.loc = float(loc) if loc.ndim == 0 else loc
            self.scale = float(scale) if scale.ndim == 0 else scale
        self.start = problem.starts[at]
        self.unit = self.start.unit if problem.rule.optimiser == "adam" else 1.0

    def now(self, part: slice, start: int) -> None:
        """The stretch that comes next: in the flat vectors, and in the array."""
        self.part, self.own = part, slice(part.start - start, part.stop - start)
        self.mean = self.state.mean[part]
        self.apart = self._apart()

    def _apart(self) -> Tensor:
        """Distance from the location of the law."""
        if isinstance(self.loc, float):
            return self.mean if self.loc == 0.0 else self.mean - self.loc
        return self.mean - self.loc[self.own]

    def precision(self) -> Tensor | float:
        """Of the law."""
        if self.scale is None:
            return 0.0
        scale = self.scale if isinstance(self.scale, float) else self.scale[self.own]
        return scale**-2

    def by_mean(self) -> Tensor:
        """Slope of the loss by the mean, that of the law left out where it is a known Normal."""
        slope = self.slope.mean[self.own]
        extra = self.slope.prior_mean
        return slope if extra is None else slope + extra[self.own]

    def by_sd(self, sd: Tensor) -> Tensor:
        """Slope of the loss by the sd, likewise; a tensor of its own."""
        s = self.slope
        if s.kind == "draw":
            assert s.eps is not None
            found = s.mean[self.own] * s.eps[self.own]
        else:
            assert s.second is not None
            found = s.second[self.own]
            if s.kind == "variance":
                found = (found * sd).mul_(2.0)
            elif s.kind == "noise":
                assert s.eps is not None
                found = found * s.eps[self.own]
            else:
                found = found.clone()
        return found if s.prior_sd is None else found.add_(s.prior_sd[self.own])

    def centred(self, decay: float) -> Tensor:
        """Standard noise times the slope, less its running mean: of the same mean, and far less noisy on a slope.

        Differs from the source, whose estimate of the curvature is ``slope eps / sd``. What is taken away was known before
        ``eps``.
        """
        s, t = self.slope, self.state.step
        assert s.eps is not None
        eps, expected = s.eps[self.own], self.state.memory[0][self.part]
        scale = -1 / (1 - decay**t) if t else 0.0
        if s.kind == "draw":
            return torch.add(s.mean[self.own], expected, alpha=scale).mul_(eps)
        assert s.second is not None  # already averaged over draws, as is eps
        return torch.addcmul(s.second[self.own], expected, eps, value=scale)

    def divergence(self, sd: Tensor) -> Tensor | float:
        """From a known Normal."""
        if self.scale is None:
            return 0.0
        if isinstance(self.scale, float):
            squares = (torch.dot(sd, sd) + torch.dot(self.apart, self.apart)) / self.scale**2
            return 0.5 * squares - sd.log().sum() + len(sd) * (math.log(self.scale) - 0.5)
        ratio, apart = sd / self.scale[self.own], self.apart / self.scale[self.own]
        return (0.5 * (ratio.square() + apart.square() - 1.0) - ratio.log()).sum()


# ---- gradients ---------------------------------------------------------------------------------------------------


def _euclidean(array: _Array, sd: Tensor, new: Moved) -> None:
    slope, by_sd = array.by_mean(), array.by_sd(sd)
    if array.scale is not None:
        precision = array.precision()
        if isinstance(precision, float):
            pull = array.weight * precision
            slope = torch.add(slope, array.apart, alpha=pull)
            by_sd.add_(sd, alpha=pull)
        else:
            slope = torch.addcmul(slope, array.apart, precision, value=array.weight)
            by_sd.addcmul_(sd, precision, value=array.weight)
        by_sd.sub_(sd.reciprocal(), alpha=array.weight)
    # softplus'(raw) = 1 - exp(-softplus(raw))
    by_raw = by_sd.mul_(torch.expm1(-sd).neg_())
    rule, share, part = array.rule, rate(array.rule, array.state.step), array.part
    state, half = array.state, len(array.state.memory) // 2
    move = _adam if rule.optimiser == "adam" else _sgd
    means = _Vector(state.mean, new.mean, state.memory[:half], new.memory[:half])
    raws = _Vector(state.raw, new.raw, state.memory[half:], new.memory[half:])
    move(rule, state.step, share * rule.learning_rate * array.unit, slope, means, part)
    move(rule, state.step, share * rule.scale_rate, by_raw, raws, part)


class _Vector(NamedTuple):
    """A flat vector and the optimiser's memory of it, before a step and after."""

    old: Tensor
    new: Tensor
    before: tuple[Tensor, ...]
    after: tuple[Tensor, ...]


def _adam(rule: Rule, t: int, length: float, slope: Tensor, of: _Vector, part: slice) -> None:
    first, second = (m[part] for m in of.after)
    torch.lerp(of.before[0][part], slope, 1 - _FIRST, out=first)
    torch.mul(of.before[1][part], _SECOND, out=second).addcmul_(slope, slope, value=1 - _SECOND)
    root = second.sqrt().mul_((1 - _SECOND ** (t + 1)) ** -0.5).add_(_LEAST)
    value = -length / (1 - _FIRST ** (t + 1))
    torch.addcdiv(of.old[part], first, root, value=value, out=of.new[part])


def _sgd(rule: Rule, t: int, length: float, slope: Tensor, of: _Vector, part: slice) -> None:
    momentum = torch.add(slope, of.before[0][part], alpha=rule.momentum, out=of.after[0][part])
    torch.add(of.old[part], momentum, alpha=-length, out=of.new[part])


# ---- natural steps -----------------------------------------------------------------------------------------------


def _natural(array: _Array, sd: Tensor, new: Moved) -> None:
    state, part, t = array.state, array.part, array.state.step + 1
    slope, e = array.by_mean(), array.centred(MOMENTUM)
    decay = array.weight * array.precision()
    share = share_of_new(state.step, array.problem.parts)
    curvature = total_curvature_step(
        state.raw[part], e, sd, share, decay, 1.0 / array.weight, out=sd
    )
    momentum = torch.lerp(state.memory[0][part], slope, 1 - MOMENTUM, out=new.memory[0][part])
    length = rate(array.rule, state.step) * array.rule.learning_rate
    debiased = 1 / (1 - MOMENTUM**t)
    if isinstance(decay, float):
        newton = torch.add(momentum, array.apart, alpha=decay / debiased)
    else:
        newton = torch.addcmul(momentum, array.apart, decay, value=1 / debiased)
    # A Newton step is at most as long as the weights that the start is made of.
    longest = array.start.unit / debiased
    newton = newton.div_(curvature).clamp_(-longest, longest)
    torch.add(state.mean[part], newton, alpha=-length * debiased, out=new.mean[part])


def share_of_new(step: int, parts: float) -> float:
    """Share of a new curvature in the average, in step ``step`` from 0.

    Near the posterior the estimate scatters by ``sqrt(parts)`` times itself, where a step sees one part of the data: the
    average goes over at least as many steps. Where that allows, the start, which is a guess, is forgotten soon, and the average
    then runs over the last quarter of all steps. Differs from the source, where the share is an option.

    Args:
        step: its number.
        parts: N over the size of a batch.

    >>> share_of_new(1, 1.0), share_of_new(399, 1.0), share_of_new(399, 1000.0)
    (0.05, 0.01, 0.001)
    """
    # In the first step no mean slope is known, and the estimate is mostly noise.
    return min(_SHARE, 1 / parts, max(_LATE / (step + 1), _LEAST_SHARE)) if step else 0.0


# ---- params ------------------------------------------------------------------------------------------------------


def _params(problem: Problem, state: State, slopes: Sequence[Tensor], new: Moved) -> None:
    start = state.raw.numel()
    if start == state.mean.numel():
        return
    part, rule = slice(start, state.mean.numel()), problem.rule
    slope = torch.cat([s.reshape(-1) for s in slopes])
    if rule.weight_decay:
        slope = slope + rule.weight_decay * state.mean[part]
    step = rate(rule, state.step) * rule.point_rate
    if rule.optimiser == "sgd" and not rule.natural:
        means = _Vector(state.mean, new.mean, state.memory[:1], new.memory[:1])
        _sgd(rule, state.step, step, slope, means, part)
        return
    # Adam, whose second moments are those of all means, or of the params alone.
    t, offset = state.step + 1, 0 if new.memory[1].numel() == state.mean.numel() else start
    own = slice(part.start - offset, part.stop - offset)
    first = torch.lerp(state.memory[0][part], slope, 1 - _FIRST, out=new.memory[0][part])
    second = _SECOND * state.memory[1][own] + (1 - _SECOND) * slope.square()
    new.memory[1][own] = second
    root = (second / (1 - _SECOND**t)).sqrt() + _LEAST
    lengths = torch.cat([u.expand(s.numel()) for u, s in zip(problem.units, slopes, strict=True)])
    new.mean[part] = state.mean[part] - step * lengths * first / (1 - _FIRST**t) / root


__all__ = ["Moved", "Slope", "moved", "share_of_new"]
