"""Parts of groups that are updated together, and the order in which a round visits them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl.errors import DataError
from ppl.inference.gbp.options import GBP
from ppl.inference.gbp.structure import positions, tree_levels
from ppl.inference.gbp.wiring import Rows, Wire, count_of, present, wires
from ppl.inference.groups import FactorGroups, Group, Slot

_SCALARS = 2**15  # numbers of one temporary of a kernel: a few of them fit into the cache of a core


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of a group that are updated together."""

    group: Group
    rows: Rows
    wires: tuple[Wire, ...]
    is_whole: bool  # all rows that are there

    @property
    def count(self) -> int:
        """Number of rows."""
        return count_of(self.rows)

    @property
    def chunk(self) -> int:
        """Rows whose temporaries fit into the cache."""
        edges, d = sum(w.width for w in self.wires), max(f.dims for f in self.group.families)
        return max(_SCALARS * 2 // (edges * d**2), 64)


Block = tuple[Part, ...]  # parts that read the same beliefs


def ordered_plates(groups: FactorGroups) -> list[str]:
    """Names of the ordered plates, in the order of the program."""
    if groups.bound is None:
        return []
    return [p.name for p in groups.bound.graph.plates.values() if p.ordered]


def make_part(group: Group, rows: Rows, slots: Sequence[Slot], *, whole: bool = True) -> Part:
    return Part(group, rows, wires(group, slots, rows), whole)


def layout(
    groups: FactorGroups,
    parts: Sequence[Part],
    schedule: str,
    options: GBP,
    ordered: Sequence[str] | None,
) -> tuple[Block, ...]:
    """Blocks of one round, in the order of their updates.

    Args:
        groups: the model.
        parts: every group with edges, whole.
        schedule: a name of :class:`GBP`, ``"auto"`` resolved.
        options: of the user.
        ordered: plates to sweep along; those of the model by default.
    """
    edges = [p.group for p in parts]
    if not parts:
        return ()
    if schedule in ("flood", "random", "residual"):
        return (tuple(parts),)
    if schedule == "attention":
        return (_attended(groups, edges, options),)
    if schedule == "layers":
        return tuple((p,) for p in [*parts, *reversed(parts[:-1])])
    if schedule == "tree":
        up = _levelled(edges, tree_levels(groups.families, edges))[::-1]
        return (*up, *up[::-1])  # twice at the root, whose rows hear of each other only there
    plates = ordered_plates(groups) if ordered is None else list(ordered)
    return _swept(edges, parts, plates)


def _swept(
    edges: Sequence[Group], parts: Sequence[Part], plates: Sequence[str]
) -> tuple[Block, ...]:
    """Sites without an ordered plate one by one, then the others along the first such plate, forwards and backwards."""
    for plate in plates:
        places = [positions(g, plate) for g in edges]
        if any(p is not None for p in places):
            along = [(g, p[0].cpu()) for g, p in zip(edges, places, strict=True) if p is not None]
            first = [(q,) for q, p in zip(parts, places, strict=True) if p is None]
            there = _levelled([g for g, _ in along], [p for _, p in along])
            return (*first, *there, *there[-2::-1])
    return tuple((p,) for p in parts)


def _levelled(edges: Sequence[Group], levels: Sequence[Tensor]) -> list[Block]:
    """One block a level, in increasing order, of the rows that are there."""
    found: dict[int, list[Part]] = {}
    for group, level in zip(edges, levels, strict=True):
        here = present(group).nonzero().squeeze(-1)
        order = level[here.cpu()].argsort(stable=True)
        values, counts = level[here.cpu()][order].unique_consecutive(return_counts=True)
        pieces = here[order.to(here.device)].split(counts.tolist())
        for value, rows in zip(values.tolist(), pieces, strict=True):
            found.setdefault(value, []).append(make_part(group, rows, group.slots, whole=False))
    return [tuple(found[value]) for value in sorted(found)]


def _attended(groups: FactorGroups, edges: Sequence[Group], options: GBP) -> Block:
    rows = options.rows or {}
    known = {g.site for g in groups.groups} | {g.name for g in groups.groups}
    unknown = [name for name in rows if name not in known]
    if unknown:
        raise DataError(
            f"GBP(rows=...): the model has no factor '{unknown[0]}'. Factors: {', '.join(g.name for g in edges)}."
        )
    masks = {}
    for group in edges:
        mask = rows.get(group.name, rows.get(group.site))
        if mask is not None:
            device = group.slots[0].index.device
            masks[group.name] = torch.as_tensor(mask, dtype=torch.bool, device=device).reshape(-1)
    return attending(edges, masks)


def opened(blocks: Sequence[Block], masks: Mapping[str, Tensor]) -> tuple[Block, ...]:
    """The blocks of a round, without the rows that masks ``bool [F]`` by group close."""
    kept = [
        [p for part in block if (p := _opened(part, masks[part.group.name]))] for block in blocks
    ]
    return tuple(tuple(block) for block in kept if block)


def _opened(part: Part, mask: Tensor) -> Part | None:
    group = part.group
    rows = torch.arange(group.rows, device=mask.device)[part.rows]
    here = mask[rows]
    if bool(here.all()):
        return part
    at = rows[here & present(group)[rows]]
    return make_part(group, at, group.slots, whole=False) if len(at) else None


def attending(edges: Sequence[Group], masks: Mapping[str, Tensor]) -> Block:
    """The rows that masks ``bool [F]`` by group pick out; groups without a mask rest."""
    parts = []
    for group in edges:
        if group.name in masks:
            mask = masks[group.name]
            if len(mask) != group.rows:
                raise DataError(
                    f"GBP(rows=...): '{group.name}' has {group.rows} rows, the mask {len(mask)} entries."
                )
            at = (mask & present(group)).nonzero().squeeze(-1)
            parts.append(make_part(group, at, group.slots, whole=False))
    return tuple(parts)


__all__ = ["Block", "Part", "attending", "layout", "make_part", "opened", "ordered_plates"]
