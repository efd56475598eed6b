"""What the statistics of a factor are made from: the summands of an expression, by the particle axes that they have.

A part is a sum of operands; different parts have no particle axis in common.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.graph import Ref
from ppl.lower import Compiler, Operand

_ADD = frozenset(("add", "__add__", "__radd__"))
_SUBTRACT = frozenset(("sub", "subtract", "__sub__"))
_NEGATE = frozenset(("neg", "negative", "__neg__"))


class Piece(NamedTuple):
    """A log-factor that stands for a factor of the model or for a summand of it."""

    out: Operand
    plates: tuple[str, ...]  # over which it is repeated
    inside: tuple[str, ...] = ()  # axes of the largest array that it makes on the way


@dataclass(eq=False)
class Setting:
    """What is known of the axes and the data when factors are lowered."""

    owners: Mapping[str, tuple[str, ...]]  # particle axis -> its plates
    sizes: Mapping[str, int]  # of all axes
    values: Mapping[str, Tensor] | None = None  # inputs that never change; None: not bound yet
    # Distinct rows by factor, plate, and whether the observed values tell them apart; one table for all settings of a bound.
    rows: dict[tuple[str, str, bool], Rows | None] = field(default_factory=dict)
    arrays: dict[str, tuple[tuple[str, ...], Tensor]] = field(default_factory=dict)  # inputs added
    apart: str | None = None  # a plate that is never summed beforehand: only some elements are here
    coins: bool = False  # whether observed zeros and ones are taken as such without a look


@dataclass(eq=False)
class Rows:
    """Distinct rows of a factor along a plate, padded to the same number for all other elements."""

    plate: str
    names: dict[str, str]  # variable -> input with its distinct rows
    arrays: dict[str, tuple[tuple[str, ...], Tensor]]  # input -> axes, values
    are_paired: bool = False  # rows 2i and 2i + 1 have equal numbers, or the second has none


def summands(c: Compiler, item: object, sign: int) -> list[tuple[int, Operand]]:
    """The operands whose sum, with these signs, an expression is."""
    if isinstance(item, Ref):
        node = c.graph.nodes[item.id]
        if node.op == "call" and not node.kwargs and not node.event_shape:
            signs = (1, 1) if node.name in _ADD else (1, -1) if node.name in _SUBTRACT else None
            if signs and len(node.args) == 2:
                return [
                    x
                    for a, s in zip(node.args, signs, strict=True)
                    for x in summands(c, a, sign * s)
                ]
            if node.name in _NEGATE and len(node.args) == 1:
                return summands(c, node.args[0], -sign)
    return [(sign, c.operand(item))]


def parts_of(
    c: Compiler, signed: Sequence[tuple[int, Operand]], setting: Setting
) -> list[Operand] | None:
    """The summands added up to parts without a particle axis in common; the constant goes to the first."""
    groups: list[tuple[frozenset[str], list[tuple[int, Operand]]]] = []
    plain = []
    for sign, operand in signed:
        if operand.edges or operand.event_ndim:
            return None
        axes = frozenset(a for a in operand.axes if is_particle(a, setting))
        if not axes:
            plain.append((sign, operand))
            continue
        met = [g for g in groups if g[0] & axes]
        groups = [g for g in groups if not g[0] & axes]
        groups.append(
            (axes.union(*(g[0] for g in met)), [x for g in met for x in g[1]] + [(sign, operand)])
        )
    if not groups:
        return None
    # The part with the most plates can take what is constant along particles, and the means of the others.
    groups.sort(key=lambda g: -max(len(o.axes) - len(g[0]) for _, o in g[1]))
    members = [list(g[1]) for g in groups]
    members[0] += plain
    return [added(c, m) for m in members]


def is_particle(axis: str, setting: Setting) -> bool:
    """Whether an axis holds particles, of this element of a chain or of the one before."""
    return axis in setting.owners or axis.rstrip("'") in setting.owners


def added(c: Compiler, signed: Sequence[tuple[int, Operand]]) -> Operand:
    """The sum of operands with these signs."""
    axes = c.joint_axes([o for _, o in signed])
    first, *rest = sorted(signed, key=lambda x: -x[0])
    slot = c.place(first[1], axes)
    if first[0] < 0:
        slot = c.emit(torch.neg, slot)
    for sign, operand in rest:
        slot = c.emit(torch.add if sign > 0 else torch.sub, slot, c.place(operand, axes))
    return Operand(slot, axes, 0)


class Frame(NamedTuple):
    """How the parts of a factor stand: batch axes, the summed plate, particle axes of each part."""

    batch: tuple[str, ...]
    plate: str
    own: list[tuple[str, ...]]

    @property
    def axes(self) -> tuple[str, ...]:
        return (*self.batch, *(a for own in self.own for a in own))


def frame_of(
    c: Compiler, parts: Sequence[Operand], others: Sequence[Operand], plate: str, setting: Setting
) -> Frame:
    """The frame in which parts and what stands beside them meet."""
    joint = c.joint_axes([*parts, *others])
    batch = tuple(a for a in joint if not is_particle(a, setting) and a != plate)
    own = [tuple(a for a in p.axes if is_particle(a, setting)) for p in parts]
    return Frame(batch, plate, own)


def laid(c: Compiler, operand: Operand, frame: Frame, own: tuple[str, ...]) -> int:
    """Slot of an operand as ``[*batch, plate, *own]``."""
    axes = (*frame.batch, frame.plate, *own)
    return c.spelled_out(operand, axes)


def sorted_by_axis(c: Compiler, slot: int, axes: tuple[str, ...]) -> Operand:
    """A slot with these axes, in the order of results."""
    return c.ordered(Operand(slot, axes, 0))


def event_of(c: Compiler, item: object) -> int:
    """Number of event axes of an argument."""
    if isinstance(item, Ref):
        return len(c.graph.nodes[item.id].event_shape)
    return item.ndim if isinstance(item, Tensor) else 0


def lifts(c: Compiler, operands: Sequence[Operand]) -> bool:
    """Whether plates of the operands lie within one another: they would meet through memberships."""
    axes = [a for o in operands for a in o.axes]
    return c.related(axes, axes)


def entries(axes: Sequence[str], setting: Setting) -> int:
    """Entries of an array over these axes."""
    return math.prod(setting.sizes.get(a, setting.sizes.get(a.rstrip("'"), 1)) for a in axes)
