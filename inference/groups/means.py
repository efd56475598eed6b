"""Means of the laws of latents: where they start when nobody says so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ppl.distributions import Distribution, Flat
from ppl.inference.groups.expressions import Expression
from ppl.inference.groups.parts import Part
from ppl.inference.groups.records import Family, Slot, gathered
from ppl.inference.groups.rows import Walk


@dataclass(frozen=True, eq=False)
class Mean:
    """The mean of a latent's law, given points of the latents that it reads."""

    family: Distribution
    arguments: Expression
    slots: tuple[Slot, ...]
    sizes: tuple[int, ...]  # of the rows
    at: int | None  # where the plate of a chain stands among the plates

    def __call__(
        self, family: Family, points: Mapping[str, Tensor], params: Mapping[str, Tensor]
    ) -> Tensor | None:
        """Points ``[N, *event]``, None where the law has no mean or reads what has no point yet."""
        needed = {self.slots[v.slot].family for v in self.arguments.views}
        if not needed <= points.keys() or isinstance(self.family, Flat):
            return None
        values: Any = [
            gathered(s, points[s.family]) if s.family in needed else None for s in self.slots
        ]
        found = self._centre(self.arguments(values, params))
        if found is None or not bool(found.isfinite().all()):
            return None
        mean = found.expand((math.prod(self.sizes), *family.event_shape))
        shaped = mean.reshape((*self.sizes, *family.event_shape))
        # CHOICE: later elements of a chain start at the mean of the first; one row after the other would take as many
        # steps as the chain is long, and a linear chain does not care.
        full = shaped if self.at is None else shaped.unsqueeze(self.at)
        whole = full.expand((*family.sizes, *family.event_shape))
        return whole.reshape((family.count, *family.event_shape))

    def _centre(self, leaves: list[Tensor]) -> Tensor | None:
        paths = [leaf.path.split(".")[-1] for leaf in self.family.leaves()]
        if "loc" in paths:
            return leaves[paths.index("loc")]
        try:
            return self.family.replace(leaves).mean
        except NotImplementedError:
            return None


def mean_of(walk: Walk, part: Part) -> Mean:
    """The mean of a latent's law, or of the first element of a chain."""
    assert part.law is not None
    law, along = part.law, part.factor.chain[0] if part.factor.chain else ""
    plates = part.factor.plates
    at = plates.index(along) if along else None
    rank = len(walk.bound.graph.variables[part.factor.name].event_shape)
    leaves, batch = law.family.leaves(), rank - law.family.event_dim
    ranks = [batch + x.event_dim for x in leaves]
    expression = walk.compile([walk.visit(a) for a in law.arguments], ranks)
    return Mean(law.family, expression, tuple(walk.slots), part.sizes, at)


__all__ = ["Mean", "mean_of"]
