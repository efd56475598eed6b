"""Reflections: which latents may change their signs together without changing a model's density with its data.

Products tell signs of each other only: of loadings and scores, or of an effect and a covariate's unknown direction. The posterior
then has a copy on either side of zero, and the means of such latents are zero whatever the data say. Sets of latents are tried
as a whole, each from one latent on: a factor whose log-density changes asks for another of the latents that it reads. What is
found leaves every factor as it is, to rounding, at all points that are given. Signs of single elements or columns are not
looked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import constraints

from ppl.binding import Bound
from ppl.graph import Factor, Graph, Variable
from ppl.lower import variables_of
from ppl.symmetry import Densities

_MOST = 40  # latents beyond which nothing is tried
_TRIES = 300  # sets of latents


@dataclass(frozen=True)
class Reflection:
    """Latents that change their signs together.

    >>> print(Reflection(("loading", "score")))
    signs of loading, score
    """

    sites: tuple[str, ...]

    def __str__(self) -> str:
        return f"signs of {', '.join(self.sites)}"


def reflections(bound: Bound, points: Sequence[Mapping[str, Tensor]]) -> tuple[Reflection, ...]:
    """The smallest sets of latents whose signs a model with its data does not know, apart from those it says nothing of.

    Args:
        bound: the graph and its data.
        points: of every latent and param a value ``[*plates, *event]`` at which the density is finite; those drawn from the
            prior will do, for what holds at one by chance does not hold at another.
    """
    graph = bound.graph
    real = [v.name for v in graph.latents if _is_real(v)]
    if not real or len(real) > _MOST:
        return ()
    search = _Search(bound, points, frozenset(real))
    found: list[Reflection] = []
    for name in real:
        if not any(name in r.sites for r in found):
            sites = search.from_one(frozenset((name,)))
            if sites is not None and _is_read(graph, sites):
                found.append(Reflection(tuple(n for n in real if n in sites)))
    return tuple(found)


class _Search:
    """Sets of latents, and which factors change when their signs do."""

    def __init__(
        self, bound: Bound, points: Sequence[Mapping[str, Tensor]], real: frozenset[str]
    ) -> None:
        self.points = points
        self.densities = [Densities(bound, p) for p in points]
        graph = bound.graph
        self.read = [variables_of(graph, f) & real for f in _factors(graph)]
        self.tried: set[frozenset[str]] = set()

    def from_one(self, sites: frozenset[str]) -> frozenset[str] | None:
        """The first set around these that changes no factor."""
        if sites in self.tried or len(self.tried) > _TRIES:
            return None
        self.tried.add(sites)
        changed = self._changed(sites)
        if not changed:
            return sites
        wanted = self.read[changed[0]] - sites
        for name in sorted(wanted):
            found = self.from_one(sites | {name})
            if found is not None:
                return found
        return None

    def _changed(self, sites: frozenset[str]) -> list[int]:
        """Numbers of the factors that change."""
        same = torch.stack(
            [
                d.unmoved({n: -p[n] for n in sites})
                for d, p in zip(self.densities, self.points, strict=True)
            ]
        )
        return (~same.all(0)).nonzero().flatten().tolist()


def _factors(graph: Graph) -> list[Factor]:
    """In the order of their densities."""
    return [*graph.densities, *(f for f in graph.densities if f.chain)]


def _is_real(v: Variable) -> bool:
    inner = getattr(v.support, "base_constraint", v.support)
    return not v.is_discrete and inner is constraints.real


def _is_read(graph: Graph, sites: frozenset[str]) -> bool:
    """Whether anything but their own laws reads them."""
    return any(f.name not in sites and variables_of(graph, f) & sites for f in graph.densities)
