"""Split the latents by the way in which each is integrated out.

*Gaussian*: jointly normal given all the others; dense algebra. *Outer*: a few scalars that are
left; quadrature. *Summed*: finite discrete; contraction. *Listed*: finite discrete, but tied to
the Gaussians or read across its own plate; every joint configuration is a case of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import Transform

from ppl.backend import Reason
from ppl.distributions import Flat
from ppl.errors import UnsupportedError
from ppl.graph import Factor, Graph, Law, Variable
from ppl.lower import variables_of
from ppl.manifolds import manifold_of
from ppl.passes import Degree, degree, gaussian_given, upstream

MAX_OUTER = 3  # scalars; each costs some 40 nodes
MAX_GAUSSIAN = 2000  # scalars of the joint Gaussian
MAX_LISTED = 4096  # joint configurations


@dataclass(frozen=True, eq=False)
class Split:
    """Every latent in one of four groups, in the order of the program."""

    gaussian: tuple[Variable, ...]
    outer: tuple[Variable, ...]
    summed: tuple[Variable, ...]
    listed: tuple[Variable, ...]
    graph: Graph

    @property
    def gaussian_dims(self) -> int:
        """Scalars of the joint Gaussian."""
        return sum(count(self.graph, v) for v in self.gaussian)

    @property
    def outer_dims(self) -> int:
        """Unconstrained scalars of the quadrature."""
        return sum(free_count(self.graph, v) for v in self.outer)

    @property
    def configurations(self) -> int:
        """Joint configurations of the listed latents."""
        return math.prod(configurations(self.graph, v) for v in self.listed)


def supports(graph: Graph) -> list[Reason]:
    """Why this graph cannot be integrated exactly; empty when it can."""
    reasons = [
        Reason(
            v.name,
            "is a param, and exact learns no constants.",
            "Use method='qem', or give it a prior.",
        )
        for v in graph.role("param")
    ]
    for v in graph.latents:
        reasons += _latent_reasons(v)
    if reasons:
        return reasons
    parts = split(graph)
    return [*_outer_reasons(parts), *_size_reasons(parts), *_sum_reasons(parts)]


def _latent_reasons(v: Variable) -> list[Reason]:
    if v.is_discrete and v.cardinality is None:
        problem = "has no fixed finite number of values and cannot be enumerated."
        return [Reason(v.name, problem, "Use Categorical over a range, or method='qem'.")]
    if not v.is_discrete and _bijection(v) is None:
        problem = f"has the support {v.support}, to which no fixed map from the real line leads."
        remedy = "Write it as a function of a latent with fixed support, or use method='qem'."
        if manifold_of(v) is not None:
            remedy = "Use method='laplace' or 'gbp'."
        return [Reason(v.name, problem, remedy)]
    return []


def _outer_reasons(parts: Split) -> list[Reason]:
    if parts.outer_dims <= MAX_OUTER:
        return []
    # The largest sites are the ones to do something about: small ones would be fine alone.
    sites = sorted(parts.outer, key=lambda v: free_count(parts.graph, v), reverse=True)
    return [
        Reason(
            v.name,
            f"{free_count(parts.graph, v)} scalars are neither discrete nor Gaussian given the "
            "rest; exact integrates "
            f"at most {MAX_OUTER} such scalars numerically, the model has {parts.outer_dims}.",
            "Use method='qem'.",
        )
        for v in sites
    ]


def _size_reasons(parts: Split) -> list[Reason]:
    reasons = []
    if parts.gaussian_dims > MAX_GAUSSIAN:
        name = max(parts.gaussian, key=lambda v: count(parts.graph, v)).name
        dims = parts.gaussian_dims
        problem = f"the joint Gaussian has {dims} scalars; exact takes {MAX_GAUSSIAN} at most."
        reasons.append(Reason(name, problem, "Use method='qem'."))
    if parts.configurations > MAX_LISTED:
        name = max(parts.listed, key=lambda v: configurations(parts.graph, v)).name
        problem = (
            "discrete latents that meet Gaussian ones, or are read across their plate, have "
            f"{parts.configurations:.3g} "
            f"joint configurations; exact lists {MAX_LISTED} at most."
        )
        reasons.append(Reason(name, problem, "Use method='qem'."))
    return reasons


def _sum_reasons(parts: Split) -> list[Reason]:
    if not parts.summed:
        return []
    from ppl.inference.exact.enumeration import check_contractible  # it takes a Split

    try:
        check_contractible(parts)
    except UnsupportedError as error:
        return [Reason("", str(error))]
    return []


# ---- the four groups -----------------------------------------------------------------------------


def split(graph: Graph) -> Split:
    """Partition the latents; the sizes of the groups are not judged here."""
    gaussian = gaussian_set(graph)
    crossed = crossed_latents(graph)
    parts = _with_discrete(graph, gaussian, crossed)
    if parts.configurations > MAX_LISTED:
        # A few Gaussians that meet many discrete latents are better integrated numerically.
        freed = gaussian - _meeting(graph, gaussian)
        other = _with_discrete(graph, freed, crossed)
        if other.outer_dims <= MAX_OUTER and other.configurations <= MAX_LISTED:
            return other
    return parts


def _with_discrete(graph: Graph, gaussian: frozenset[str], crossed: frozenset[str]) -> Split:
    tied: set[str] = set(crossed)
    for factor in graph.densities:
        touched = variables_of(graph, factor)
        if touched & gaussian:
            tied |= touched
    latents = graph.latents
    discrete = [v for v in latents if v.is_discrete]
    listed = [v for v in discrete if v.name in tied or v.event_shape]
    return Split(
        gaussian=tuple(v for v in latents if v.name in gaussian),
        outer=tuple(v for v in latents if not v.is_discrete and v.name not in gaussian),
        summed=tuple(v for v in discrete if v not in listed),
        listed=tuple(listed),
        graph=graph,
    )


def _meeting(graph: Graph, gaussian: frozenset[str]) -> frozenset[str]:
    """The Gaussian latents that share a factor with a discrete one."""
    found: set[str] = set()
    for factor in graph.densities:
        touched = variables_of(graph, factor)
        if any(
            graph.variables[n].is_discrete and graph.variables[n].role == "latent" for n in touched
        ):
            found |= touched & gaussian
    return frozenset(found)


def crossed_latents(graph: Graph) -> frozenset[str]:
    """Latents read across their own plate: by an index, a reduction, a pick or a shift."""
    found: set[str] = set()
    for node in graph.nodes:
        if node.op not in ("gather", "reduce", "dot", "pick", "shift", "collect"):
            continue
        across = frozenset(node.name.split(","))  # the plates that `collect` turns into event axes
        operands = list(node.operands())
        for operand in operands[:1] if node.op == "gather" else operands:
            for name in upstream(graph, operand):
                if graph.variables[name].role == "latent" and across & graph.closure(
                    graph.variables[name].plates
                ):
                    found.add(name)
    return frozenset(found)


def gaussian_set(graph: Graph) -> frozenset[str]:
    """The largest set of latents, found greedily, that is jointly Gaussian given all others.

    First goes whatever is not Gaussian by itself; then, where latents multiply each other, the
    fewest scalars whose removal makes the rest affine.
    """
    names = {v.name for v in graph.latents if _is_real(v)}
    while bad := {
        n
        for f in graph.densities
        for n in variables_of(graph, f) & names
        if not _is_normal(graph, f, {n})
    }:
        names -= bad
    failing = [f for f in graph.densities if not _is_normal(graph, f, names)]
    if not failing:
        return frozenset(names)
    involved = {n for f in failing for n in variables_of(graph, f) & names}
    for removed in _small_subsets(graph, involved):
        if all(_is_normal(graph, f, names - removed) for f in failing):
            return frozenset(names - removed)
    return frozenset(names - involved)


def _small_subsets(graph: Graph, names: Iterable[str]) -> list[frozenset[str]]:
    small = [n for n in sorted(names) if count(graph, graph.variables[n]) <= MAX_OUTER]
    subsets = [frozenset(c) for k in range(1, MAX_OUTER + 1) for c in combinations(small, k)]
    return sorted(subsets, key=lambda s: sum(count(graph, graph.variables[n]) for n in s))


def _is_normal(graph: Graph, factor: Factor, names: set[str] | frozenset[str]) -> bool:
    """Whether a factor is, in ``names``, a Normal density at something affine."""
    inside = frozenset(names) & variables_of(graph, factor)
    if not inside:
        return True
    if factor.law is None or degree(graph, factor.value, inside) > Degree.AFFINE:
        return False
    laws = [factor.law] + ([factor.chain[1]] if factor.chain else [])
    return all(is_flat(law) or gaussian_given(graph, law, inside) for law in laws)


def is_flat(law: Law) -> bool:
    """Whether the law is the constant density on the reals."""
    return type(law.family) is Flat


def _is_real(v: Variable) -> bool:
    support = getattr(v.support, "base_constraint", v.support)
    return not v.is_discrete and support is constraints.real


# ---- sizes ---------------------------------------------------------------------------------------


def count(graph: Graph, v: Variable) -> int:
    """Scalars of a latent; a plate without a size counts once."""
    return math.prod(graph.plates[p].size or 1 for p in v.plates) * v.dims


def free_count(graph: Graph, v: Variable) -> int:
    """Scalars of a latent on the unconstrained scale."""
    plates = math.prod(graph.plates[p].size or 1 for p in v.plates)
    return plates * math.prod(free_shape(v))


def free_shape(v: Variable) -> tuple[int, ...]:
    """Event shape of a latent on the unconstrained scale."""
    transform = _bijection(v)
    shape = torch.Size(v.event_shape)
    return tuple(transform.inverse_shape(shape)) if transform is not None else tuple(shape)


def configurations(graph: Graph, v: Variable) -> int:
    """Joint configurations of all elements of a discrete latent."""
    return (v.cardinality or 1) ** min(count(graph, v), 1000)


def bijection(v: Variable) -> Transform:
    """The map from the real line to the support of a latent."""
    transform = _bijection(v)
    assert transform is not None, "supports() refuses it"
    return transform


def _bijection(v: Variable) -> Transform | None:
    if v.support is None or v.support is constraints.dependent:
        return None
    try:
        return biject_to(v.support)
    except NotImplementedError:
        return None
