"""One round of messages: every block of the schedule in turn, its parts from the same beliefs.

Nothing that the caller holds is written to: a group's messages are copied before the first block that changes some of
them, and beliefs are summed anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ppl.inference.gbp.candidates import (
    Beliefs,
    Desk,
    Messages,
    Setting,
    Tally,
    candidates,
    checked,
    chosen,
    sent_before,
)
from ppl.inference.gbp.layout import Block, Part
from ppl.inference.gbp.models import Rows
from ppl.inference.gbp.problem import Problem
from ppl.inference.gbp.sending import Offer, accepted
from ppl.inference.gbp.wiring import Wire
from ppl.inference.numerics.gaussian import Gaussian


class Outcome(NamedTuple):
    """A round's messages, and the beliefs they add up to."""

    messages: dict[str, tuple[Gaussian, ...]]
    beliefs: dict[str, Gaussian]
    tally: Tally


def run_round(
    problem: Problem,
    prior: Beliefs,
    messages: Messages,
    beliefs: Beliefs,
    rows: Mapping[str, Rows],
    setting: Setting,
) -> Outcome:
    """Run the schedule once.

    Args:
        problem: wires and blocks.
        prior: the variables' own terms.
        messages: of the last round.
        beliefs: ``prior`` plus the sum of ``messages``.
        rows: of every group with edges, weights included.
        setting: damping and randomness.
    """
    blocks = problem.at_work
    desk = Desk(problem, rows, setting, dict(messages), dict(beliefs), blocks)
    for block in blocks:
        _run(desk, block)
    if desk.adds_up:
        return Outcome(desk.messages, desk.beliefs, desk.tally)
    if blocks:
        desk.beliefs = summed(problem, prior, desk.messages)  # without the rounding of many updates
    return Outcome(desk.messages, desk.beliefs, desk.tally)


def summed(problem: Problem, prior: Beliefs, messages: Messages) -> dict[str, Gaussian]:
    """Beliefs: the variables' own terms plus all messages."""
    total = {name: Gaussian(b.eta.clone(), b.lam.clone()) for name, b in prior.items()}
    for part in problem.wholes:
        for wire, sent in zip(part.wires, messages[part.group.name], strict=True):
            wire.add(total[wire.family].eta, sent.eta[part.rows])
            wire.add(total[wire.family].lam, sent.lam[part.rows])
    return total


def _run(desk: Desk, block: Block) -> None:
    """Update the parts of a block from the beliefs before it."""
    offers = [Offer(p, checked(desk, p, candidates(desk, p)), sent_before(desk, p)) for p in block]
    masks = accepted(desk.problem, offers, desk.beliefs, desk.setting.rng)
    for (part, new, old), mask in zip(offers, masks, strict=True):
        if mask is not None:
            new = [chosen(m, n, o) for m, n, o in zip(mask, new, old, strict=True)]
        if desk.adds_up or len(desk.blocks) > 1:
            for wire, n, o in zip(part.wires, new, old, strict=True):
                _add(desk, wire, n - o)
        _write(desk, part, new)


def _add(desk: Desk, wire: Wire, change: Gaussian) -> None:
    family = wire.family
    if family not in desk.copied:
        desk.copied.add(family)
        belief = desk.beliefs[family]
        desk.beliefs[family] = Gaussian(belief.eta.clone(), belief.lam.clone())
    wire.add(desk.beliefs[family].eta, change.eta)
    wire.add(desk.beliefs[family].lam, change.lam)


def _write(desk: Desk, part: Part, new: list[Gaussian]) -> None:
    name = part.group.name
    if part.count == part.group.rows and isinstance(part.rows, slice):
        desk.messages[name] = tuple(new)
        return
    if isinstance(part.rows, slice):
        desk.messages[name] = tuple(
            Gaussian(_widened(n.eta, part), _widened(n.lam, part)) for n in new
        )
        return
    key = "messages of " + name
    if key not in desk.copied:
        desk.copied.add(key)
        old = desk.messages[name]
        desk.messages[name] = tuple(Gaussian(m.eta.clone(), m.lam.clone()) for m in old)
    for mine, n in zip(desk.messages[name], new, strict=True):
        mine.eta[part.rows], mine.lam[part.rows] = n.eta, n.lam


def _widened(values: Tensor, part: Part) -> Tensor:
    """``[F, ...]`` from the rows of a slice; absent rows before and after send nothing."""
    assert isinstance(part.rows, slice)
    full = values.new_empty(part.group.rows, *values.shape[1:])
    full[: part.rows.start], full[part.rows.stop :] = 0, 0
    full[part.rows] = values
    return full


__all__ = ["Outcome", "run_round", "summed"]
