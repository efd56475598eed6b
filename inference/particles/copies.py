"""Log-factors of discrete laws: rows of a plate that are alike are evaluated once, and counted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ppl.densities import law_density, without_edges
from ppl.distributions import Bernoulli
from ppl.graph import Factor, Law
from ppl.inference.particles import sums
from ppl.inference.particles.parts import (
    Piece,
    Rows,
    Setting,
    entries,
    event_of,
    frame_of,
    laid,
    lifts,
    parts_of,
    sorted_by_axis,
    summands,
)
from ppl.lower import Compiler, Operand, variables_of
from ppl.lowered import joint_edges

_WORTHWHILE = 0.7  # share of distinct rows up to which copies are counted
_MOST_ENTRIES = 1 << 24  # of the table whose distinct rows are looked for


def is_coin(c: Compiler, factor: Factor, law: Law, observed: bool = False) -> bool:
    """Whether a factor is the law of a latent that is zero or one, given its log-odds; or of data without gaps."""
    role = c.graph.variables[factor.name].role
    return (
        (role == "latent" or (observed and role == "observed" and factor.name not in c.masks))
        and not c.graph.variables[factor.name].event_shape
        and type(law.family) is Bernoulli
        and law.family.leaves()[0].path == "logits"
        and not event_of(c, law.arguments[0])
    )


def coin(c: Compiler, factor: Factor, law: Law) -> Operand:
    """Its log-density, which need not look whether a value is zero or one."""
    value, odds = c.operand(factor.value), c.operand(law.arguments[0])
    both = [value, odds]
    axes = c.joint_axes(both, factor.plates)
    slot = c.emit(sums.coin, c.place(value, axes), c.place(odds, axes))
    return without_edges(c, Operand(slot, axes, 0, joint_edges(both)))


def counted(
    c: Compiler, factor: Factor, law: Law, plate: str, setting: Setting
) -> list[Piece] | None:
    """Other laws: as many terms as there are distinct rows."""
    leaves = law.family.leaves()
    logits = (
        type(law.family) is Bernoulli
        and leaves[0].path == "logits"
        and not event_of(c, law.arguments[0])
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
            out = _bernoulli(c, law, ones, count, plate, setting, rows.are_paired)
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


def _bernoulli(
    c: Compiler,
    law: Law,
    ones: Operand,
    count: Operand,
    plate: str,
    setting: Setting,
    are_paired: bool,
) -> Operand | None:
    """``sum_i y_i x_i - log(1 + exp(x_i))``: the first part by part, the second over combinations."""
    parts = parts_of(c, summands(c, law.arguments[0], 1), setting)
    if parts is None or lifts(c, [*parts, ones]):
        return None
    frame = frame_of(c, parts, [ones, count], plate, setting)
    placed = [laid(c, p, frame, own) for p, own in zip(parts, frame.own, strict=True)]
    tables = [laid(c, o, frame, ()) for o in (ones, count)]
    # Parts that vary along the rows stand on one side, so that the other needs no copy for each.
    varying = [i for i, p in enumerate(parts) if plate in p.axes] or [0]
    if len(varying) == len(parts) > 1:
        varying = [max(varying, key=lambda i: entries(frame.own[i], setting))]
    order = [*varying, *(i for i in range(len(parts)) if i not in varying)]
    axes = (*frame.batch, *(a for i in order for a in frame.own[i]))
    run = partial(sums.bernoulli_sum, len(frame.batch), len(varying), are_paired)
    slot = c.emit(run, *tables, *(placed[i] for i in order))
    return sorted_by_axis(c, slot, axes)


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
    named = [*reads, factor.name]
    outer = [p for p in graph.plates if p != plate and any(p in c.axes[n] for n in named)]
    if any(graph.ancestors(p) for p in outer):
        return None
    if by_value and graph.variables[factor.name].event_shape:
        return None
    spread = partial(_spread, c, (*outer, plate), [setting.sizes[p] for p in (*outer, plate)])
    observed = spread(factor.name, values[factor.name]).to(c.dtype)
    present = torch.ones_like(observed)
    if factor.name in c.masks:
        present = spread(factor.name, values[factor.name + "@mask"]).to(c.dtype)
    known = {n: spread(n, values[n]) for n in sorted(reads)}
    known |= {factor.name: observed} if by_value else {}
    made = _tables(factor.name, known, observed, present, not by_value)
    if made is None:
        return None
    names, arrays, are_paired = made
    return Rows(plate, names, {n: ((*outer, plate), a) for n, a in arrays.items()}, are_paired)


def _spread(
    c: Compiler, plates: tuple[str, ...], shape: Sequence[int], name: str, array: Tensor
) -> Tensor:
    """``[*plates, *event]`` of the array of a variable."""
    have = c.axes[name]
    order = [have.index(p) for p in plates if p in have]
    array = array.permute(*order, *range(len(have), array.ndim))
    index = tuple(slice(None) if p in have else None for p in plates)
    return array[index].expand(*shape, *array.shape[len(order) :])


def _tables(
    factor: str, known: Mapping[str, Tensor], observed: Tensor, present: Tensor, in_pairs: bool
) -> tuple[dict[str, str], dict[str, Tensor], bool] | None:
    """Inputs with the distinct rows of each variable, and with their numbers; None where there are too many.

    With ``in_pairs`` rows with equal numbers stand two and two where that takes few more, which is said at the end.
    """
    keyed = [k.reshape(observed.numel(), -1) for k in known.values()]
    if sum(k.shape[-1] for k in keyed) * observed.numel() > _MOST_ENTRIES:
        return None
    shape = observed.shape
    cells, rows = math.prod(shape[:-1]), shape[-1]
    first, slot, most = sums.distinct_rows(cells, rows, keyed)
    if most > _WORTHWHILE * rows:
        return None
    zeros = observed.new_zeros(cells * most)
    totals = {}
    for kind, weight in (("@rows", present), ("@ones", present * observed)):
        total = zeros.index_add(0, slot, torch.where(present > 0, weight, 0.0).reshape(-1))
        totals[kind] = total.reshape(cells, most)
    order = sums.in_pairs(totals["@rows"]) if in_pairs else None
    if order is not None:
        safe = order.clamp(min=0)
        first = first.gather(1, safe)
        totals = {k: t.gather(1, safe).masked_fill(order < 0, 0.0) for k, t in totals.items()}
    short = (*shape[:-1], first.shape[1])
    arrays = {factor + kind: total.reshape(short) for kind, total in totals.items()}
    names = {name: f"{name}@rows of {factor}" for name in known}
    for name, array in known.items():
        event = array.shape[len(shape) :]
        picked = array.reshape(cells * rows, *event)[first.reshape(-1)]
        arrays[names[name]] = picked.reshape(*short, *event)
    return names, arrays, order is not None
