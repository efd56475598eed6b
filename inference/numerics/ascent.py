"""Stochastic gradient ascent that settles: Adam or SGD, and a step that shrinks once noise is all that moves it.

A run starts with a constant step. Windows of steps are compared: where their means differ by no more than the iterates
scatter, the run has arrived as far as this step can bring it, and the step falls to a third. Iterates of each
stage are averaged with weight on the later ones.

Sources: [Kingma2015] algorithm 1; averages of [Shamir2013] section 4 (polynomial decay).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

WINDOW = 50  # steps whose mean and scatter are compared with those before
_SHRINK = 1 / 3  # of the step, from stage to stage
_FIRST, _SECOND = 0.9, 0.999  # decay of Adam's moments; of SGD's momentum the first
_TAIL = 4.0  # weight of late iterates in the average
_DEADLINES = (0.6, 0.75, 0.9)  # shares of the horizon at which a step falls in any case


@dataclass(frozen=True)
class Rule:
    """How to ascend."""

    learning_rate: float
    optimiser: Literal["adam", "sgd"] = "adam"
    settles: bool = True  # False: a constant step for ever, and no average
    horizon: int = 1000  # steps that the run may take
    tol: float = 0.03  # scatter in the units of the problem at which the step is small enough
    second: float = _SECOND  # decay of Adam's squares


class Ascent(NamedTuple):
    """Coordinates ``[*lead, P]``, the optimiser's memory of each, and how far the run has settled."""

    theta: Tensor
    first: Tensor  # running mean of gradients
    second: Tensor  # running mean of squared gradients
    counts: Tensor  # [P], updates that each coordinate has had
    mean: Tensor  # average over the present stage
    total: Tensor  # sum and sum of squares over the present window
    squares: Tensor
    before: Tensor  # mean of the window before
    stage: int
    since: int  # steps in this stage
    iteration: int
    is_fine: bool  # the scatter is below ``tol``: the driver may stop the run


def start(theta: Tensor) -> Ascent:
    """The state before the first step.

    >>> start(torch.zeros(2)).iteration
    0
    """
    zero = torch.zeros_like(theta)
    counts = torch.zeros(theta.shape[-1], dtype=theta.dtype, device=theta.device)
    return Ascent(theta, zero, zero, counts, theta, zero, zero, zero, 0, 0, 0, False)


def rate(state: Ascent, rule: Rule) -> float:
    """The present step."""
    return rule.learning_rate * (_SHRINK**state.stage if rule.settles else 1.0)


def ascend(
    state: Ascent,
    gradient: Tensor,
    rule: Rule,
    units: Callable[[Tensor], Tensor],
    rows: Tensor | None = None,
) -> Ascent:
    """One step up.

    Args:
        state: before.
        gradient: ``[*lead, P]``, or ``[*lead, len(rows)]``; where it is not finite the coordinate stays.
        rule: how.
        units: from coordinates ``[*lead, P]`` to the change in each that counts as one.
        rows: coordinates that move, the others keep value and memory; None: all.

    >>> rule, state = Rule(0.1), start(torch.tensor([1.0]))
    >>> state = ascend(state, -state.theta, rule, torch.ones_like)
    >>> state.theta
    tensor([0.9000])
    """
    if rows is None:
        moved = _move(
            state.theta, state.first, state.second, state.counts + 1, gradient, state, rule
        )
        theta, first, second, counts = moved
    else:
        theta, first, second = (t[..., rows] for t in (state.theta, state.first, state.second))
        moved = _move(theta, first, second, state.counts[rows] + 1, gradient, state, rule)
        old = (state.theta, state.first, state.second, state.counts)
        theta, first, second, counts = (
            t.index_copy(-1, rows, new) for t, new in zip(old, moved, strict=True)
        )
    moved_state = state._replace(theta=theta, first=first, second=second, counts=counts)
    return advance(moved_state, rule, units)


def _move(
    theta: Tensor,
    first: Tensor,
    second: Tensor,
    counts: Tensor,
    gradient: Tensor,
    state: Ascent,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    usable = gradient.isfinite()
    gradient = torch.where(usable, gradient, 0.0)
    first = _FIRST * first + (1 - _FIRST) * gradient
    step = first / (1 - _FIRST**counts)
    if rule.optimiser == "adam":
        second = rule.second * second + (1 - rule.second) * gradient.square()
        step = step / ((second / (1 - rule.second**counts)).sqrt() + 1e-8)
    return torch.where(usable, theta + rate(state, rule) * step, theta), first, second, counts


def advance(
    state: Ascent,
    rule: Rule,
    units: Callable[[Tensor], Tensor],
    judged: Tensor | None = None,
) -> Ascent:
    """Count a step whose new coordinates are in ``state``, and shrink the next ones where it is time.

    Args:
        state: with the new coordinates.
        rule: how.
        units: as for :func:`ascend`.
        judged: coordinates that move in every step: the run has arrived where these have, and these are averaged. None: all.
    """
    since, iteration = state.since + 1, state.iteration + 1
    state = state._replace(since=since, iteration=iteration)
    if not rule.settles:
        return state._replace(mean=state.theta, is_fine=since >= WINDOW)
    share = (_TAIL + 1) / (since + _TAIL)
    mean = state.mean + share * (state.theta - state.mean)
    if judged is not None:
        mean = state.theta.index_copy(-1, judged, mean[..., judged])
    state = state._replace(
        mean=mean,
        total=state.total + state.theta,
        squares=state.squares + state.theta.square(),
    )
    late = any(iteration == int(part * rule.horizon) for part in _DEADLINES)
    if since % WINDOW == 0 or late:
        return _looked_back(state, rule, units(state.theta), late, judged)
    return state


def _looked_back(
    state: Ascent, rule: Rule, unit: Tensor, late: bool, judged: Tensor | None
) -> Ascent:
    """The end of a window: has the run arrived, and is its scatter small?"""
    steps = (state.since - 1) % WINDOW + 1
    mean = state.total / steps
    scatter = (state.squares / steps - mean.square()).clamp(min=0).sqrt()
    zero = torch.zeros_like(mean)
    before, state = state.before, state._replace(total=zero, squares=zero, before=mean)
    if late:
        return state._replace(stage=state.stage + 1, since=0)
    if state.since < 2 * WINDOW:
        return state
    # A steady drift moves the mean by 3.5 times the scatter that it causes within a window, noise by about one.
    least = 0.1 * rule.tol * unit
    moved = (mean - before) / torch.maximum(scatter, least)
    scatter = scatter / unit
    if judged is not None:
        moved, scatter = moved[..., judged], scatter[..., judged]
    if not bool(moved.square().mean() < 2.0):
        return state
    if bool(scatter.square().mean().sqrt() < rule.tol):
        return state._replace(is_fine=True)
    return state._replace(stage=state.stage + 1, since=0)
