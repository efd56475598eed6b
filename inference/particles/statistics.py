"""Log-factors from sufficient statistics: plates summed before particles are combined.

A factor whose innermost plate holds no particles is a sum over its elements. As it stands it is an array
``[elements, K, K, ...]``; from statistics it is ``[K, K, ...]`` at once:

- the residual of a Normal is a sum of parts, each of which varies with few particle axes: its square needs the products
  of two parts, summed over the plate by a matrix product;
- the log-odds of a Bernoulli are such a sum, too: what is linear in them is summed part by part, and rows with
  equal covariates are counted;
- any other law is evaluated once for each distinct row, and multiplied by the number of its copies.

A Normal of three or more parts that keeps its plates becomes a factor for each two of them, so that elimination never holds
the array over all.

Source: sums of statistics of exponential families, [Wainwright2008] section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.densities import is_foreign, law_density, without_edges
from ppl.distributions import Bernoulli, Normal
from ppl.graph import Factor, Law, Ref
from ppl.inference.particles import sums
from ppl.lower import Compiler, Operand, variables_of
from ppl.lowered import joint_edges

_SMALL = 100_000  # entries of a factor that is left as it is rather than split
_WORTHWHILE = 0.7  # share of distinct rows up to which copies are counted
_MOST_ENTRIES = 1 << 24  # of the table whose distinct rows are looked for
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


@dataclass(eq=False)
class Rows:
    """Distinct rows of a factor along a plate, padded to the same number for all other elements."""

    plate: str
    names: dict[str, str]  # variable -> input with its distinct rows
    arrays: dict[str, tuple[tuple[str, ...], Tensor]]  # input -> axes, values


def pieces(c: Compiler, factor: Factor, later: bool, setting: Setting) -> list[Piece] | None:
    """The factor as log-factors from statistics; None where that does not pay or is not possible."""
    law = factor.law if not later else factor.chain and factor.chain[1]
    if law is None or c.rules != "all" or is_foreign(law.family) or factor.kind != "conditional":
        return None
    if factor.chain is not None:
        return _moves(c, factor, law, setting) if later else None
    plate = _closed_plate(c, factor, setting)
    if type(law.family) is Normal:
        return _normal(c, factor, law, plate, setting)
    if _is_coin(c, factor, law):
        return [Piece(_coin(c, factor, law), factor.plates)]
    return None if plate is None else _counted(c, factor, law, plate, setting)


# ---- which plate, which parts --------------------------------------------------------------------


def _closed_plate(c: Compiler, factor: Factor, setting: Setting) -> str | None:
    """An innermost plate of an observed factor in which nothing with particles lives."""
    graph = c.graph
    if graph.variables[factor.name].role != "observed" or graph.variables[factor.name].event_shape:
        return None
    names = variables_of(graph, factor)
    particle = {a for n in names for a in c.axes[n] if a in setting.owners}
    busy = graph.closure(tuple(p for a in particle for p in setting.owners[a]))
    open_plates = [
        p
        for p in factor.plates
        if p not in busy
        and p != setting.apart
        and not graph.ancestors(p)
        and not any(p in graph.ancestors(q) for q in factor.plates)
        and p in c.axes[factor.name]
    ]
    return max(open_plates, key=lambda p: setting.sizes[p], default=None)


def _summands(c: Compiler, item: object, sign: int) -> list[tuple[int, Operand]]:
    """The operands whose sum, with these signs, an expression is."""
    if isinstance(item, Ref):
        node = c.graph.nodes[item.id]
        if node.op == "call" and not node.kwargs and not node.event_shape:
            signs = (1, 1) if node.name in _ADD else (1, -1) if node.name in _SUBTRACT else None
            if signs and len(node.args) == 2:
                return [
                    x
                    for a, s in zip(node.args, signs, strict=True)
                    for x in _summands(c, a, sign * s)
                ]
            if node.name in _NEGATE and len(node.args) == 1:
                return _summands(c, node.args[0], -sign)
    return [(sign, c.operand(item))]


def _parts(
    c: Compiler, signed: Sequence[tuple[int, Operand]], setting: Setting
) -> list[Operand] | None:
    """The summands added up to parts without a particle axis in common; the constant goes to the first."""
    groups: list[tuple[frozenset[str], list[tuple[int, Operand]]]] = []
    plain = []
    for sign, operand in signed:
        if operand.edges or operand.event_ndim:
            return None
        axes = frozenset(a for a in operand.axes if _is_particle(a, setting))
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
    return [_added(c, m) for m in members]


def _is_particle(axis: str, setting: Setting) -> bool:
    return axis in setting.owners or axis.rstrip("'") in setting.owners


def _added(c: Compiler, signed: Sequence[tuple[int, Operand]]) -> Operand:
    axes = c.joint_axes([o for _, o in signed])
    first, *rest = sorted(signed, key=lambda x: -x[0])
    slot = c.place(first[1], axes)
    if first[0] < 0:
        slot = c.emit(torch.neg, slot)
    for sign, operand in rest:
        slot = c.emit(torch.add if sign > 0 else torch.sub, slot, c.place(operand, axes))
    return Operand(slot, axes, 0)


class _Frame(NamedTuple):
    """How the parts of a factor stand: batch axes, the summed plate, particle axes of each part."""

    batch: tuple[str, ...]
    plate: str
    own: list[tuple[str, ...]]

    @property
    def axes(self) -> tuple[str, ...]:
        return (*self.batch, *(a for own in self.own for a in own))


def _frame(
    c: Compiler, parts: Sequence[Operand], others: Sequence[Operand], plate: str, setting: Setting
) -> _Frame:
    joint = c.joint_axes([*parts, *others])
    batch = tuple(a for a in joint if not _is_particle(a, setting) and a != plate)
    own = [tuple(a for a in p.axes if _is_particle(a, setting)) for p in parts]
    return _Frame(batch, plate, own)


def _laid(c: Compiler, operand: Operand, frame: _Frame, own: tuple[str, ...]) -> int:
    """Slot of ``[*batch, plate, *own]``."""
    axes = (*frame.batch, frame.plate, *own)
    return c.spelled_out(operand, axes)


def _sorted(c: Compiler, slot: int, axes: tuple[str, ...]) -> Operand:
    return c.ordered(Operand(slot, axes, 0))


# ---- Normal --------------------------------------------------------------------------------------


def _normal(
    c: Compiler, factor: Factor, law: Law, plate: str | None, setting: Setting
) -> list[Piece] | None:
    value = c.operand(factor.value)
    loc, scale = law.arguments
    if value.event_ndim or _event(c, loc) or _event(c, scale):
        return None
    spread = c.operand(scale)
    parts = _parts(c, [(1, value), *_summands(c, loc, -1)], setting)
    if parts is None or spread.edges or _lifts(c, [*parts, spread]):
        return None
    if plate is not None and not (
        plate in spread.axes and any(_is_particle(a, setting) for a in spread.axes)
    ):
        return [_normal_sum(c, factor, parts, spread, plate, setting)]
    return _pairs(c, factor.plates, parts, spread, setting)


def _event(c: Compiler, item: object) -> int:
    if isinstance(item, Ref):
        return len(c.graph.nodes[item.id].event_shape)
    return item.ndim if isinstance(item, Tensor) else 0


def _lifts(c: Compiler, operands: Sequence[Operand]) -> bool:
    """Whether plates of the operands lie within one another: they would meet through memberships."""
    axes = [a for o in operands for a in o.axes]
    return c.related(axes, axes)


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
    frame = _frame(c, parts, beside, plate, setting)
    batch = len(frame.batch)
    laid = [_laid(c, p, frame, own) for p, own in zip(parts, frame.own, strict=True)]
    if beside:
        made = partial(_weights, mask is not None, bool(by_row))
        weights = c.emit(made, laid[0], *(_laid(c, o, frame, ()) for o in beside))
        square = c.emit(lambda w, *p: sums.total_square(batch, w[0], *p), weights, *laid)
        slot = c.emit(lambda w: w[1], weights)
        rest = Operand(slot, frame.batch, 0)
    else:
        square = c.emit(partial(sums.total_square, batch, None), *laid)
        rest = None
    total = _sorted(c, square, frame.axes)
    axes = c.joint_axes([total, *([] if by_row else [spread])])
    slots = [c.place(total, axes)]
    if by_row:
        assert rest is not None
        slot = c.emit(lambda q, k: k - 0.5 * q, *slots, c.place(rest, axes))
    else:
        count = c.emit(lambda x: x.shape[batch], laid[0]) if rest is None else c.place(rest, axes)
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
        dims = tuple(
            i - len(part.axes) for i, a in enumerate(part.axes) if _is_particle(a, setting)
        )
        keep = tuple(a for a in part.axes if not _is_particle(a, setting))
        slot = c.emit(lambda x, dims=dims: x.mean(dims), part.slot)
        means.append(Operand(slot, keep, 0))
        away = c.emit(torch.sub, c.place(part, part.axes), c.place(means[-1], part.axes))
        centred.append(part._replace(slot=away))
    return [_added(c, [(1, first), *((1, m) for m in means)]), *centred]


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
    if len(parts) < 3 or _entries(joint, setting) < _SMALL:
        return None
    scopes = [c.joint_axes([a, b, spread]) for a, b in combinations(parts, 2)]
    if any(set(s) == set(joint) for s in scopes):
        return None
    middle = _centred(c, parts, setting)
    out: list[Piece] = []
    squared: set[int] = set()
    for i, j in combinations(range(len(parts)), 2):
        with_squares = tuple(k not in squared for k in (i, j))
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


def _padded(c: Compiler, part: Operand, plate: str) -> Operand:
    """With a zero in front, for the first element of a chain; nothing to do for a part that is the same for all."""
    if plate not in part.axes:
        return part
    at = part.axes.index(plate)
    return part._replace(slot=c.emit(partial(sums.zero_first, at), part.slot))


def _entries(axes: Sequence[str], setting: Setting) -> int:
    return math.prod(setting.sizes.get(a, setting.sizes.get(a.rstrip("'"), 1)) for a in axes)


def _moves(c: Compiler, factor: Factor, law: Law, setting: Setting) -> list[Piece] | None:
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
        value = c.variable(factor.name, "next", plate)
        loc, scale = law.arguments
        if value.event_ndim or _event(c, loc) or _event(c, scale):
            return None
        spread = c.operand(scale)
        parts = _parts(c, [(1, value), *_summands(c, loc, -1)], setting)
        if parts is None or spread.edges or _lifts(c, [*parts, spread]):
            return None
        # The two states of the chain first: their factor takes the constant, which the first element has not.
        parts.sort(key=lambda p: not {own[0], own[0] + "'"} & set(p.axes))
        if any(plate not in p.axes for p in parts) or plate in spread.axes:
            return None
        return _pairs(c, factor.plates, parts, spread, setting, pad=plate)


# ---- counts --------------------------------------------------------------------------------------


def _counted(
    c: Compiler, factor: Factor, law: Law, plate: str, setting: Setting
) -> list[Piece] | None:
    """Other laws: as many terms as there are distinct rows."""
    leaves = law.family.leaves()
    logits = (
        type(law.family) is Bernoulli
        and leaves[0].path == "logits"
        and not _event(c, law.arguments[0])
    )
    key = factor.name, plate, not logits
    if key not in setting.rows:
        setting.rows[key] = _distinct(c, factor, plate, not logits, setting)
    rows = setting.rows[key]
    plates = tuple(p for p in factor.plates if p != plate)
    if rows is None:
        return None
    setting.arrays |= rows.arrays
    with c.renamed(factor.name, rows.names, {n: a for n, (a, _) in rows.arrays.items()}):
        ones, count = (_table(c, factor.name, kind) for kind in ("@ones", "@rows"))
        if logits:
            out = _bernoulli(c, law, ones, count, plate, setting)
            return None if out is None else [Piece(out, plates)]
        density = law_density(c, law, c.operand(factor.value), None, factor.plates)
        axes = c.joint_axes([density, count])
        if plate not in axes or density.edges:
            return None
        at = axes.index(plate) - len(axes)
        slots = c.place(density, axes), c.place(count, axes)
        slot = c.emit(lambda x, n: torch.where(n > 0, x * n, 0.0).sum(at), *slots)
        return [Piece(Operand(slot, tuple(a for a in axes if a != plate), 0), plates, axes)]


def _table(c: Compiler, name: str, kind: str) -> Operand:
    return c.ordered(Operand(c.input(name + kind), c.axes[name + kind], 0))


def _is_coin(c: Compiler, factor: Factor, law: Law) -> bool:
    """Whether a factor is the law of a latent that is zero or one, given its log-odds."""
    return (
        c.graph.variables[factor.name].role == "latent"
        and not c.graph.variables[factor.name].event_shape
        and type(law.family) is Bernoulli
        and law.family.leaves()[0].path == "logits"
        and not _event(c, law.arguments[0])
    )


def _coin(c: Compiler, factor: Factor, law: Law) -> Operand:
    """Its log-density, which need not look whether a value is zero or one."""
    value, odds = c.operand(factor.value), c.operand(law.arguments[0])
    both = [value, odds]
    axes = c.joint_axes(both, factor.plates)
    slot = c.emit(sums.coin, c.place(value, axes), c.place(odds, axes))
    return without_edges(c, Operand(slot, axes, 0, joint_edges(both)))


def _bernoulli(
    c: Compiler, law: Law, ones: Operand, count: Operand, plate: str, setting: Setting
) -> Operand | None:
    """``sum_i y_i x_i - log(1 + exp(x_i))``: the first part by part, the second over combinations."""
    parts = _parts(c, _summands(c, law.arguments[0], 1), setting)
    if parts is None or _lifts(c, [*parts, ones]):
        return None
    frame = _frame(c, parts, [ones, count], plate, setting)
    laid = [_laid(c, p, frame, own) for p, own in zip(parts, frame.own, strict=True)]
    tables = [_laid(c, o, frame, ()) for o in (ones, count)]
    # Parts that vary along the rows stand on one side, so that the other needs no copy for each.
    varying = [i for i, p in enumerate(parts) if plate in p.axes] or [0]
    if len(varying) == len(parts) > 1:
        varying = [max(varying, key=lambda i: _entries(frame.own[i], setting))]
    order = [*varying, *(i for i in range(len(parts)) if i not in varying)]
    axes = (*frame.batch, *(a for i in order for a in frame.own[i]))
    run = partial(sums.bernoulli_sum, len(frame.batch), len(varying))
    slot = c.emit(run, *tables, *(laid[i] for i in order))
    return _sorted(c, slot, axes)


def _distinct(
    c: Compiler, factor: Factor, plate: str, by_value: bool, setting: Setting
) -> Rows | None:
    """The distinct rows of everything that a factor reads along a plate; None where they are not known or not few.

    Args:
        c: the compiler.
        factor: an observed one.
        plate: the closed one.
        by_value: whether rows with other observed values are distinct.
        setting: has the arrays.
    """
    graph, values = c.graph, setting.values
    reads = {n for n in variables_of(graph, factor) if plate in c.axes[n] and n != factor.name}
    if values is None or any(n not in values for n in (*reads, factor.name)):
        return None
    outer = [
        p for p in graph.plates if p != plate and any(p in c.axes[n] for n in (*reads, factor.name))
    ]
    mask = values.get(factor.name + "@mask") if factor.name in c.masks else None
    if any(graph.ancestors(p) for p in outer) or (
        by_value and graph.variables[factor.name].event_shape
    ):
        return None
    shape = [setting.sizes[p] for p in (*outer, plate)]

    def laid(name: str, array: Tensor) -> Tensor:
        """``[*outer, plate, *event]``."""
        have = c.axes[name]
        order = [have.index(p) for p in (*outer, plate) if p in have]
        array = array.permute(*order, *range(len(have), array.ndim))
        index = tuple(slice(None) if p in have else None for p in (*outer, plate))
        return array[index].expand(*shape, *array.shape[len(order) :])

    observed = laid(factor.name, values[factor.name]).to(c.dtype)
    present = torch.ones_like(observed) if mask is None else laid(factor.name, mask).to(c.dtype)
    known = {n: laid(n, values[n]) for n in sorted(reads)}
    keyed = [k.reshape(observed.numel(), -1) for k in known.values()]
    keyed += [observed.reshape(-1, 1)] if by_value else []
    if sum(k.shape[-1] for k in keyed) * observed.numel() > _MOST_ENTRIES:
        return None
    cells, rows = math.prod(shape[:-1]), shape[-1]
    first, slot, most = sums.distinct_rows(cells, rows, keyed)
    if most > _WORTHWHILE * rows:
        return None
    short = (*shape[:-1], most)
    axes = (*outer, plate)
    arrays: dict[str, tuple[tuple[str, ...], Tensor]] = {}
    names = {}
    taken = {**known, **({factor.name: observed} if by_value else {})}
    for name, array in taken.items():
        names[name] = f"{name}@rows of {factor.name}"
        event = array.shape[len(shape) :]
        picked = array.reshape(cells * rows, *event)[first.reshape(-1)]
        arrays[names[name]] = axes, picked.reshape(*short, *event)
    zeros = observed.new_zeros(cells * most)
    for kind, weight in (("@rows", present), ("@ones", present * observed)):
        total = zeros.index_add(0, slot, torch.where(present > 0, weight, 0.0).reshape(-1))
        arrays[factor.name + kind] = axes, total.reshape(short)
    return Rows(plate, names, arrays)
