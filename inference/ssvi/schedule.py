"""When the sets move, and how much of them.

Source: [Li2024] section 3.2 and its public code: every M steps until 75 % of the run, a share that falls as a cosine.
"""

from __future__ import annotations

import math
from typing import NamedTuple

_STILL = 0.01  # share of new members below which sets hardly moved
_PATIENCE = 3  # such updates in a row: one may be a chance of a noisy gradient


class Schedule(NamedTuple):
    """Steps at which sets move: every ``every``-th until ``until``."""

    rate: float  # share of a set that is replaced at the start
    every: int  # steps between updates
    until: int  # step from which sets stay


def schedule(rate: float, every: int | None, until: float, steps: int) -> Schedule:
    """The schedule of a run of so many steps.

    Args:
        rate: share of a set that is replaced at the start.
        every: steps between updates; by default a fortieth of the run, at least 20 and at most 100.
        until: share of the run after which sets stay.
        steps: of the run.

    >>> schedule(0.5, None, 0.75, 2000)
    Schedule(rate=0.5, every=50, until=1500)
    """
    usual = max(20, min(100, steps // 40))
    return Schedule(rate, usual if every is None else every, round(until * steps))


def is_due(plan: Schedule, step: int) -> bool:
    """Whether sets move at this step, counted from 0; never at the first.

    >>> [t for t in range(9) if is_due(Schedule(0.5, 2, 7), t)]
    [2, 4, 6]
    """
    return plan.rate > 0 and step > 0 and step % plan.every == 0 and step < plan.until


def is_last(plan: Schedule, step: int) -> bool:
    """Whether the update at this step is the last one.

    >>> is_last(Schedule(0.5, 2, 7), 6)
    True
    """
    return is_due(plan, step) and not is_due(plan, step + plan.every)


def share(plan: Schedule, step: int) -> float:
    """Share of a set that the update of this step replaces: ``rate / 2 (1 + cos(pi step / until))``.

    >>> share(Schedule(0.3, 10, 100), 50)
    0.15
    """
    if step >= plan.until:
        return 0.0
    return plan.rate / 2 * (1 + math.cos(math.pi * step / plan.until))


def stillness(before: int, new: float) -> int:
    """Number of updates in a row in which hardly a member was new.

    Args:
        before: that number before the update.
        new: share of new members in the update.

    >>> stillness(2, 0.003), stillness(2, 0.2)
    (3, 0)
    """
    return before + 1 if new < _STILL else 0


def is_settled(still: int) -> bool:
    """Whether sets have found their places, and need not move again.

    >>> is_settled(1)
    False
    """
    return still >= _PATIENCE
