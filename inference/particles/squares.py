"""Normal log-factors from second moments: the square of a sum of parts is a sum of products of two.

Source: sums of statistics of exponential families, [Wainwright2008] section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from ppl.distributions import Normal
from ppl.graph import Factor, Law
from ppl.inference.particles import sums
from ppl.inference.particles.parts import (
    Piece,
    Setting,
    added,
    entries,
    event_of,
    frame_of,
    is_particle,
    laid,
    lifts,
    parts_of,
    sorted_by_axis,
    summands,
)
from ppl.lower import Compiler, Operand

_SMALL = 100_000  # entries of a factor that is left as it is rather than split


def normal(
    c: Compiler, factor: Factor, law: Law, plate: str | None, setting: Setting
) -> list[Piece] | None:
    """A Normal factor summed over ``plate``, or as a factor for each two parts; None where neither pays."""
    found = _residual(c, c.operand(factor.value), law, setting)
    if found is None:
        return None
    parts, spread = found
    if plate is not None and not (
        plate in spread.axes and any(is_particle(a, setting) for a in spread.axes)
    ):
        return [_normal_sum(c, factor, parts, spread, plate, setting)]
    return _pairs(c, factor.plates, parts, spread, setting)


def _normal_sum(
    c: Compiler,
    factor: Factor,
    parts: list[Operand],
    spread: Operand,
    plate: str,
    setting: Setting,
) -> Piece:
    """Sum over the plate: second moments of the parts, then the law at their total."""
    by_row = [spread] if plate in spread.axes else []
    mask = c._mask(factor)
    beside = [*([mask] if mask else []), *by_row]
    frame = frame_of(c, parts, beside, plate, setting)
    batch = len(frame.batch)
    placed = [laid(c, p, frame, own) for p, own in zip(parts, frame.own, strict=True)]
    if beside:
        made = partial(_weights, mask is not None, bool(by_row))
        weights = c.emit(made, placed[0], *(laid(c, o, frame, ()) for o in beside))
        square = c.emit(lambda w, *p: sums.total_square(batch, w[0], *p), weights, *placed)
        slot = c.emit(lambda w: w[1], weights)
        rest = Operand(slot, frame.batch, 0)
    else:
        square = c.emit(partial(sums.total_square, batch, None), *placed)
        rest = None
    total = sorted_by_axis(c, square, frame.axes)
    axes = c.joint_axes([total, *([] if by_row else [spread])])
    slots = [c.place(total, axes)]
    if by_row:
        assert rest is not None
        slot = c.emit(lambda q, k: k - 0.5 * q, *slots, c.place(rest, axes))
    else:
        count = c.emit(lambda x: x.shape[batch], placed[0]) if rest is None else c.place(rest, axes)
        slot = c.emit(sums.normal_from_square, *slots, c.place(spread, axes), count)
    return Piece(Operand(slot, axes, 0), tuple(p for p in factor.plates if p != plate))


def _weights(has_mask: bool, by_row: bool, like: Tensor, *beside: Tensor) -> tuple[Tensor, Tensor]:
    """Weight of every row, and the sum over rows of what is constant: their number, or the log scales."""
    present = beside[0].to(like.dtype) if has_mask else None
    if not by_row:
        assert present is not None
        return present, present.sum(-1)
    scale = beside[-1]
    weight, constant = scale.pow(-2), -(scale.log() + sums.HALF_LOG_2PI)
    if present is not None:
        weight, constant = weight * present, constant * present
    rows = like.shape[constant.ndim - 1]
    return weight, constant.expand(*constant.shape[:-1], rows).sum(-1)


def _centred(c: Compiler, parts: Sequence[Operand], setting: Setting) -> list[Operand]:
    """The parts without their means over particles, which go to the first; see :func:`sums.centred`."""
    first, *rest = parts
    means, centred = [], []
    for part in rest:
        dims = tuple(i - len(part.axes) for i, a in enumerate(part.axes) if is_particle(a, setting))
        keep = tuple(a for a in part.axes if not is_particle(a, setting))
        slot = c.emit(partial(sums.mean, dims), part.slot)
        means.append(Operand(slot, keep, 0))
        away = c.emit(torch.sub, c.place(part, part.axes), c.place(means[-1], part.axes))
        centred.append(part._replace(slot=away))
    return [added(c, [(1, first), *((1, m) for m in means)]), *centred]


def _pairs(
    c: Compiler,
    plates: tuple[str, ...],
    parts: list[Operand],
    spread: Operand,
    setting: Setting,
    pad: str | None = None,
) -> list[Piece] | None:
    """A factor for each two parts: their product, and the squares and the constant with the first that has them.

    ``pad`` names the ordered plate of a transition; factors that do not read the element before get a zero for the first.
    """
    joint = c.joint_axes([*parts, spread])
    if len(parts) < 3 or entries(joint, setting) < _SMALL:
        return None
    scopes = [c.joint_axes([a, b, spread]) for a, b in combinations(parts, 2)]
    if any(set(s) == set(joint) for s in scopes):
        return None
    middle = _centred(c, parts, setting)
    out: list[Piece] = []
    squared: set[int] = set()
    states = () if pad is None else _states(parts)
    for i, j in combinations(range(len(parts)), 2):
        if states and i in states and j not in states:
            if i == states[0]:
                three = [*(middle[n] for n in states), middle[j]]
                out.append(_beside(c, plates, three, spread, j not in squared, pad or ""))
                squared.add(j)
            continue
        with_squares = (i not in squared, j not in squared)
        squared |= {i, j}
        two = [middle[i], middle[j]]
        axes = c.joint_axes([*two, spread])
        if pad is not None and not any(a.endswith("'") for a in axes):
            two = [_padded(c, o, pad) for o in two]
        placed = [c.place(o, axes) for o in (*two, spread)]
        slot = c.emit(partial(sums.pair, with_squares, not out), *placed)
        operand = Operand(slot, axes, 0)
        out.append(Piece(operand, plates))
    return out


def _states(parts: Sequence[Operand]) -> tuple[int, ...]:
    """Which part reads the state after a step, and which the state before; nothing where one part reads both, or none."""
    before = [i for i, p in enumerate(parts) if any(a.endswith("'") for a in p.axes)]
    if len(before) != 1:
        return ()
    primed = {a for a in parts[before[0]].axes if a.endswith("'")}
    after = [i for i, p in enumerate(parts) if {a + "'" for a in p.axes} & primed]
    return (after[0], before[0]) if len(after) == 1 and after != before else ()


def _beside(
    c: Compiler,
    plates: tuple[str, ...],
    three: Sequence[Operand],
    spread: Operand,
    with_square: bool,
    pad: str,
) -> Piece:
    """A factor of every state for what its two steps say of it together with the last of three parts."""
    value, before, part = three
    before = c.ordered(before._replace(axes=tuple(a.rstrip("'") for a in before.axes)))
    axes = c.joint_axes([value, before, part, spread])
    run = partial(sums.moves_beside, axes.index(pad) - len(axes), with_square)
    placed = [c.spelled_out(o, axes) for o in (value, before, part, spread)]
    return Piece(Operand(c.emit(run, *placed), axes, 0), plates)


def _padded(c: Compiler, part: Operand, plate: str) -> Operand:
    """With a zero in front, for the first element of a chain; nothing to do for a part that is the same for all."""
    if plate not in part.axes:
        return part
    at = part.axes.index(plate)
    return part._replace(slot=c.emit(partial(sums.zero_first, at), part.slot))


def _residual(
    c: Compiler, value: Operand, law: Law, setting: Setting
) -> tuple[list[Operand], Operand] | None:
    """The parts of what a value differs from its mean by, and the standard deviation; None where it is no sum of numbers."""
    loc, scale = law.arguments
    if value.event_ndim or event_of(c, loc) or event_of(c, scale):
        return None
    spread = c.operand(scale)
    parts = parts_of(c, [(1, value), *summands(c, loc, -1)], setting)
    if parts is None or spread.edges or lifts(c, [*parts, spread]):
        return None
    return parts, spread


def moves(c: Compiler, factor: Factor, law: Law, setting: Setting) -> list[Piece] | None:
    """The transition of a latent chain whose steps are Normal with a sum of parts as its mean."""
    assert factor.chain is not None
    plate, graph = factor.chain[0], c.graph
    if graph.variables[factor.name].role == "observed" or type(law.family) is not Normal:
        return None
    own = [a for a in c.axes[factor.name] if a in setting.owners]
    home = graph.closure(factor.plates)
    beside = [a for a, p in setting.owners.items() if graph.closure(p) == home and a not in own]
    if beside:  # its sum would join the factors before the chain sees them
        return None
    with c._later(plate):
        found = _residual(c, c.variable(factor.name, "next", plate), law, setting)
        if found is None:
            return None
        parts, spread = found
        # The two states of the chain first: their factor takes the constant, which the first element has not.
        parts.sort(key=lambda p: not {own[0], own[0] + "'"} & set(p.axes))
        if any(plate not in p.axes for p in parts) or plate in spread.axes:
            return None
        return _pairs(c, factor.plates, parts, spread, setting, pad=plate)


def steps(c: Compiler, factor: Factor, law: Law, setting: Setting) -> list[Piece] | None:
    """All transitions of a chain whose particles are whole paths, summed along it; their laws are Normal."""
    assert factor.chain is not None
    plate = factor.chain[0]
    if type(law.family) is not Normal or c._mask(factor) is not None or plate == setting.apart:
        return None
    with c._later(plate):
        found = _residual(c, c.variable(factor.name, "next", plate), law, setting)
        if found is None:
            return None
        parts, spread = found
        if plate in spread.axes and any(is_particle(a, setting) for a in spread.axes):
            return None
        return [_normal_sum(c, factor, parts, spread, plate, setting)]
