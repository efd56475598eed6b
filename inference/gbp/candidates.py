"""New messages of some rows from the beliefs before them, a chunk at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.errors import NumericalError
from ppl.inference.gbp.cavities import cavity, damped
from ppl.inference.gbp.layout import Block, Part
from ppl.inference.gbp.messages import factor_messages, informed, scalar_innovation, silenced
from ppl.inference.gbp.models import Rows, plain
from ppl.inference.gbp.problem import Problem
from ppl.inference.numerics.gaussian import Gaussian

Messages = Mapping[str, tuple[Gaussian, ...]]  # group -> slot: eta [F, B, d], lam [F, B, d, d]
Beliefs = Mapping[str, Gaussian]  # family: eta [N, d], lam [N, d, d]
_MOST_BAD = 0.01  # share of rows that may come out not finite


class Setting(NamedTuple):
    """How messages are written in a round."""

    damping: Mapping[str, float | Tensor]  # by group: a number or [F]
    rng: torch.Generator  # of dropout and random schedules; used up by the round


class Tally(NamedTuple):
    """What happened in a round."""

    floored: int = 0  # cavities that rounding had made negative
    improper: int = 0  # rows computed in Schur form because a cavity knows too little
    bad: int = 0  # rows that kept their old messages because the new ones were not finite


@dataclass
class Desk:
    """What a round works on; its own copies only."""

    problem: Problem
    rows: Mapping[str, Rows]
    setting: Setting
    messages: dict[str, tuple[Gaussian, ...]]
    beliefs: dict[str, Gaussian]
    blocks: tuple[Block, ...]
    copied: set[str] = field(default_factory=set)
    tally: Tally = Tally()

    @property
    def adds_up(self) -> bool:
        """Whether few rows are at work, so that beliefs are changed, not summed anew."""
        return bool(self.problem.kept) or self.problem.plan.schedule == "attention"

    def count(self, floored: int = 0, improper: int = 0, bad: int = 0) -> None:
        old = self.tally
        self.tally = Tally(old.floored + floored, old.improper + improper, old.bad + bad)


def candidates(desk: Desk, part: Part) -> list[Gaussian]:
    """New messages of a part's rows, computed a chunk at a time so that temporaries stay in the cache."""
    rows = _taken(desk.rows[part.group.name], part)
    old = sent_before(desk, part)
    share = desk.setting.damping[part.group.name]
    if isinstance(share, Tensor):
        share = share[part.rows]
    new = [Gaussian(torch.empty_like(m.eta), torch.empty_like(m.lam)) for m in old]
    is_scalar = rows.residual.shape[1] == 1 and all(m.eta.shape[-1] == 1 for m in old)
    if not is_scalar or desk.problem.options.form == "schur":
        rows, kernel = plain(rows), _vector_chunk
    else:
        kernel = _scalar_chunk
    for start in range(0, part.count, part.chunk):
        kernel(desk, part, rows, old, share, new, slice(start, min(start + part.chunk, part.count)))
    return new


def _taken(rows: Rows, part: Part) -> Rows:
    if isinstance(part.rows, slice) and part.count == part.group.rows:
        return rows
    weight = None if rows.weight is None else rows.weight[part.rows]
    return Rows(tuple(j[part.rows] for j in rows.jacobian), rows.residual[part.rows], weight)


def _vector_chunk(
    desk: Desk,
    part: Part,
    rows: Rows,
    old: list[Gaussian],
    share: float | Tensor,
    new: list[Gaussian],
    at: slice,
) -> None:
    cavities = []
    for wire, sent in zip(part.wires, old, strict=True):
        belief = desk.beliefs[wire.family]
        here = Gaussian(
            wire.gather(belief.eta, at.start, at.stop), wire.gather(belief.lam, at.start, at.stop)
        )
        held, floored = cavity(here, Gaussian(sent.eta[at], sent.lam[at]), desk.problem.floor)
        cavities.append(held)
        desk.count(floored=floored)
    jacobian = [j[at] for j in rows.jacobian]
    made = factor_messages(jacobian, rows.residual[at], cavities, desk.problem.options.form)
    desk.count(improper=made.improper)
    kept = share[at] if isinstance(share, Tensor) else share
    for target, message, before in zip(new, made.messages, old, strict=True):
        mixed = damped(message, Gaussian(before.eta[at], before.lam[at]), kept)
        target.eta[at], target.lam[at] = mixed.eta, mixed.lam


def _scalar_chunk(
    desk: Desk,
    part: Part,
    rows: Rows,
    old: list[Gaussian],
    share: float | Tensor,
    new: list[Gaussian],
    at: slice,
) -> None:
    """As :func:`_vector_chunk` for scalar residuals of scalar variables, on arrays without unit axes."""
    etas, lams, is_silent = [], [], False
    for wire, sent in zip(part.wires, old, strict=True):
        belief = desk.beliefs[wire.family]
        whole = wire.gather(belief.lam[:, 0, 0], at.start, at.stop)
        eta = wire.gather(belief.eta[:, 0], at.start, at.stop) - sent.eta[at, :, 0]
        lam = whole - sent.lam[at, :, 0, 0]
        if bool(lam.amin() <= desk.problem.floor * whole.amax()):
            info = wire.gather(belief.eta[:, 0], at.start, at.stop)
            eta, lam, empty = _raised(desk, eta, lam, whole, info)
            is_silent = is_silent or empty
        etas.append(eta)
        lams.append(lam)
    slopes = [j[at, :, 0, 0] for j in rows.jacobian]
    weight = None if rows.weight is None else rows.weight[at]
    made = scalar_innovation(slopes, rows.residual[at, 0], etas, lams, weight)
    made = silenced(made, slopes) if is_silent else made
    kept: float | Tensor = share[at, None] if isinstance(share, Tensor) else share
    for target, (eta, lam), before in zip(new, made, old, strict=True):
        _mix(target.eta[at, :, 0], eta, before.eta[at, :, 0], kept)
        _mix(target.lam[at, :, 0, 0], lam, before.lam[at, :, 0, 0], kept)


def _raised(
    desk: Desk, eta: Tensor, lam: Tensor, whole: Tensor, info: Tensor
) -> tuple[Tensor, Tensor, bool]:
    """Cavities raised to the floor where rounding has made them too small; those that know nothing stay so."""
    low = (lam < desk.problem.floor * whole) & (lam != 0)
    if bool(low.any()):
        desk.count(floored=int(low.sum()))
        lam = torch.where(low, desk.problem.floor * whole, lam)
        eta = torch.where(low, desk.problem.floor * info, eta)  # the mean stays that of the belief
    return informed(eta, lam)


def _mix(target: Tensor, new: Tensor, old: Tensor, share: float | Tensor) -> None:
    if isinstance(share, float) and share == 0.0:
        target.copy_(new)
    else:
        torch.lerp(new, old, share, out=target) if target.is_contiguous() else target.copy_(
            torch.lerp(new, old, share)
        )


def checked(desk: Desk, part: Part, new: list[Gaussian]) -> list[Gaussian]:
    """Keep the old messages of rows whose new ones are not finite; too many of them are an error."""
    if all(bool((m.eta.sum() + m.lam.sum()).isfinite()) for m in new):
        return new
    good = torch.stack(
        [m.eta.isfinite().flatten(1).all(1) & m.lam.isfinite().flatten(1).all(1) for m in new]
    ).all(0)
    bad = int((~good).sum())
    desk.count(bad=bad)
    if bad > _MOST_BAD * part.count:
        first = int((~good).nonzero()[0])
        row = first + part.rows.start if isinstance(part.rows, slice) else int(part.rows[first])
        raise NumericalError(
            f"'{part.group.name}': {bad} of {part.count} rows send messages that are not finite, the first at "
            f"{part.group.label(row)}. Give the variables start values inside the range of the factor, or scale the data."
        )
    old = sent_before(desk, part)
    return [chosen(good.reshape(-1, 1), n, o) for n, o in zip(new, old, strict=True)]


def chosen(mask: Tensor, new: Gaussian, old: Gaussian) -> Gaussian:
    return Gaussian(
        torch.where(mask[..., None], new.eta, old.eta),
        torch.where(mask[..., None, None], new.lam, old.lam),
    )


def sent_before(desk: Desk, part: Part) -> list[Gaussian]:
    sent = desk.messages[part.group.name]
    return [Gaussian(m.eta[part.rows], m.lam[part.rows]) for m in sent]


__all__ = [
    "Beliefs",
    "Desk",
    "Messages",
    "Setting",
    "Tally",
    "candidates",
    "checked",
    "chosen",
    "sent_before",
]
