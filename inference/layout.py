"""Plates, particle axes and chains: what a contraction plan is made for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.errors import UnsupportedError

Context = frozenset[str]  # a set of plates, closed under "every ancestor is in it too"


@dataclass(frozen=True, eq=False)
class PlateSpec:
    """One plate: its size, and for every parent plate which parent element each element lies in."""

    name: str
    size: int
    parents: Mapping[str, Tensor] = field(default_factory=dict)  # parent plate -> long [size]


@dataclass(frozen=True)
class Chain:
    """A Markov chain over the elements of an ordered plate.

    ``axis`` is the particle axis of the state at t; ``previous`` names the axis of the state at t
    - 1 in the transition factors, which have ``size - 1`` elements along ``plate``.
    """

    plate: str
    axis: str
    previous: str

    @property
    def first(self) -> str:
        """Name of the axis of the first state in factors outside ``plate``."""
        return f"{self.axis}@first"


@dataclass(frozen=True, eq=False)
class Layout:
    """Everything static about a set of log-factors.

    ``sizes`` gives the number of particles of every particle axis and the length of every batch
    axis, ``owners`` the plates in which a particle axis lives (innermost ones; their ancestors are
    implied).
    """

    plates: Mapping[str, PlateSpec]
    sizes: Mapping[str, int]
    owners: Mapping[str, tuple[str, ...]]
    chains: tuple[Chain, ...] = ()
    batch: tuple[str, ...] = ()
    particles_first: bool = False  # whether particle axes stand in front of plates

    @cached_property
    def size_of(self) -> dict[str, int]:
        """Length of every axis: batch axes, plates, particle axes and the axes of chains."""
        sizes = {name: self.sizes[name] for name in self.batch}
        sizes |= {name: plate.size for name, plate in self.plates.items()}
        sizes |= {name: size for name, size in self.sizes.items() if name not in sizes}
        for chain in self.chains:
            sizes[chain.previous] = sizes[chain.first] = sizes[chain.axis]
        return sizes

    @cached_property
    def rank(self) -> dict[str, int]:
        """Canonical order of axes: batch, plates, particle axes; or plates last."""
        axes = list(self.size_of)
        if self.particles_first:
            axes.sort(key=lambda a: 0 if a in self.batch else 2 if a in self.plates else 1)
        return {name: i for i, name in enumerate(axes)}

    def canonical(self, axes: Iterable[str]) -> tuple[str, ...]:
        """The axes without duplicates in canonical order."""
        return tuple(sorted(set(axes), key=self.rank.__getitem__))

    def shape(self, axes: Iterable[str]) -> tuple[int, ...]:
        return tuple(self.size_of[a] for a in axes)

    @cached_property
    def context_of(self) -> dict[str, Context]:
        """The closed set of plates that each particle axis lives in."""
        contexts = {axis: self.closure(plates) for axis, plates in self.owners.items()}
        for chain in self.chains:
            contexts[chain.previous] = contexts[chain.axis]
            contexts[chain.first] = contexts[chain.axis] - {chain.plate}
        return contexts

    def is_particle(self, axis: str) -> bool:
        return axis in self.context_of

    @cached_property
    def ancestry(self) -> dict[str, dict[str, Tensor]]:
        """For every plate, each ancestor and the composed membership, long ``[size]``."""
        known: dict[str, dict[str, Tensor]] = {}
        for name in self.plates:
            self._trace(name, known)
        return known

    def _trace(self, name: str, known: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        if name in known:
            return known[name]
        found: dict[str, Tensor] = {}
        for parent, member in self.plates[name].parents.items():
            above = self._trace(parent, known)
            for top, index in {parent: member, **{t: m[member] for t, m in above.items()}}.items():
                if top in found and not torch.equal(found[top], index):
                    raise UnsupportedError(
                        f"plate {name!r} lies in plate {top!r} in two ways that disagree. "
                        f"Give {name!r} one path to {top!r}."
                    )
                found[top] = index
        known[name] = found
        return found

    def closure(self, plates: Iterable[str]) -> Context:
        """The plates with all their ancestors."""
        given = set(plates)
        return frozenset(given.union(*(self.ancestry[p] for p in given)))

    def innermost(self, context: Context) -> tuple[str, ...]:
        """The plates of a closed context that are ancestors of no other, in canonical order."""
        above = set().union(*(self.ancestry[p] for p in context))
        return self.canonical(context - above)

    def carrier(self, context: Context, plate: str) -> str:
        """The innermost plate of ``context`` whose elements determine the element of ``plate``."""
        found = [p for p in self.innermost(context) if p == plate or plate in self.ancestry[p]]
        if len(found) > 1:
            raise UnsupportedError(
                f"plate {plate!r} is reached through {' and '.join(map(repr, found))} at once, so "
                "a factor over both has no one element of it. Open only one of them, or leave out "
                f"{plate!r}."
            )
        return found[0]

    def member(self, plate: str, ancestor: str) -> Tensor:
        """Element of ``ancestor`` for each element of ``plate``, long ``[size]``."""
        if plate == ancestor:
            return torch.arange(self.plates[plate].size)
        return self.ancestry[plate][ancestor]

    def joint_member(self, plate: str, ancestors: Iterable[str]) -> Tensor:
        """Row-major index into the grid of several ancestors, long ``[size]``."""
        index = torch.zeros(self.plates[plate].size, dtype=torch.long)
        for name in ancestors:
            index = index * self.plates[name].size + self.member(plate, name)
        return index

    def narrowed(self, rows: Mapping[str, Tensor]) -> Layout:
        """The layout of a part: each plate in ``rows`` keeps only those elements."""
        plates = {}
        for name, plate in self.plates.items():
            parents = {}
            for parent, member in plate.parents.items():
                kept = member[rows[name]] if name in rows else member
                if parent in rows:
                    kept = torch.searchsorted(rows[parent], kept)
                parents[parent] = kept
            plates[name] = PlateSpec(name, len(rows[name]) if name in rows else plate.size, parents)
        return Layout(
            plates, self.sizes, self.owners, self.chains, self.batch, self.particles_first
        )

    def rows_below(self, plate: str, start: int, stop: int) -> dict[str, Tensor]:
        """Elements ``start..stop - 1`` of a plate and, of each descendant, those inside them."""
        rows = {plate: torch.arange(start, stop)}
        for name, above in self.ancestry.items():
            if plate in above:
                order, ends = self._by_ancestor(name, plate)
                rows[name] = order[ends[start] : ends[stop]].sort().values
        return rows

    def _by_ancestor(self, name: str, plate: str) -> tuple[Tensor, list[int]]:
        """Elements of ``name`` sorted by their element of ``plate``, and where each of those begins."""
        if (name, plate) not in self._sorted:
            member = self.ancestry[name][plate]
            count = torch.bincount(member, minlength=self.plates[plate].size)
            ends = torch.cat([count.new_zeros(1), count.cumsum(0)]).tolist()
            self._sorted[name, plate] = member.argsort(stable=True), ends
        return self._sorted[name, plate]

    @cached_property
    def _sorted(self) -> dict[tuple[str, str], tuple[Tensor, list[int]]]:
        return {}


class LogFactor(NamedTuple):
    """A log-factor: one tensor dimension for every axis name, in that order."""

    axes: tuple[str, ...]
    log: Tensor


class Term(NamedTuple):
    """A factor inside a plan: where its tensor is, its axes, the plates it is repeated over."""

    slot: int
    axes: tuple[str, ...]  # in canonical order
    context: Context
