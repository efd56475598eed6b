"""Blocks: which latents share a particle index, over which plates, and how each is proposed.

A block is one particle axis. Latents of one plate context that meet in a factor are grouped while their joint
Gaussian stays small; a latent that a factor reads across its own plate (an index, a reduction) has one particle for
the whole plate; a finite discrete latent is enumerated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import Transform

from ppl.errors import ModelError, UnsupportedError, nearest
from ppl.graph import Graph, Variable
from ppl.inference.numerics.expfam import FAMILIES
from ppl.inference.particles.options import ParticleOptions
from ppl.manifolds import manifold_of
from ppl.passes import upstream

RESTART = "restart"


@dataclass(frozen=True, eq=False)
class Member:
    """A latent in a block."""

    variable: Variable
    collapsed: tuple[str, ...]  # own plates that share the block's particle
    sizes: tuple[int, ...]  # of the collapsed plates
    transform: Transform | None  # unconstrained -> support; None where it is the identity
    family: str | None = None  # exponential family of its proposal, when it has one of its own
    start: Any = None  # a law with start values

    @property
    def name(self) -> str:
        """The latent's name."""
        return self.variable.name

    @property
    def free_shape(self) -> tuple[int, ...]:
        """Event shape on the unconstrained scale."""
        shape = torch.Size(self.variable.event_shape)
        return (
            tuple(self.transform.inverse_shape(shape))
            if self.transform is not None
            else tuple(shape)
        )

    @property
    def dims(self) -> int:
        """Unconstrained scalars of one block element."""
        return torch.Size((*self.sizes, *self.free_shape)).numel()


@dataclass(frozen=True, eq=False)
class Block:
    """Latents that share the particle axis ``axis`` in the plates ``plates``."""

    axis: str
    members: tuple[Member, ...]
    plates: tuple[str, ...]
    enumerated: bool = False
    chain: str | None = None  # ordered plate of a Markov latent

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the members."""
        return tuple(m.name for m in self.members)

    @property
    def gaussian(self) -> tuple[Member, ...]:
        """Members that share the joint Gaussian."""
        return tuple(m for m in self.members if m.family is None and not self.enumerated)

    @property
    def dims(self) -> int:
        """Scalars of the joint Gaussian."""
        return sum(m.dims for m in self.gaussian)


def make_blocks(graph: Graph, options: ParticleOptions) -> tuple[Block, ...]:
    """Partition the latents.

    Raises:
        UnsupportedError: a latent has no proposal.
        ModelError: ``groups`` or ``q`` name something that is not there, or group latents of different plates.
    """
    latents = {v.name: v for v in graph.latents}
    overrides = _overrides(options, latents)
    crossed = collapsed_plates(graph)
    members: dict[str, Member] = {}
    fixed: list[Block] = []
    for v in graph.latents:
        chain = graph.factors[v.name].chain if v.name in graph.factors else None
        if _is_enumerable(v, options):
            member = Member(v, (), (), None)
            fixed.append(
                Block(
                    _axis([v.name]),
                    (member,),
                    v.plates,
                    enumerated=True,
                    chain=chain[0] if chain else None,
                )
            )
            continue
        member = _member(graph, v, crossed.get(v.name, frozenset()), overrides.get(v.name))
        if chain:
            if member.collapsed:
                raise UnsupportedError(
                    f"'{v.name}' is a Markov chain along '{chain[0]}', but a factor reads it across that plate. "
                    "Read the chain element by element."
                )
            fixed.append(Block(_axis([v.name]), (member,), v.plates, chain=chain[0]))
        else:
            members[v.name] = member
    groups = _groups(graph, members, options)
    blocks = [
        Block(_axis(g), tuple(members[n] for n in g), _block_plates(graph, members[g[0]]))
        for g in groups
    ]
    return tuple(blocks + fixed)


def _is_enumerable(v: Variable, options: ParticleOptions) -> bool:
    # A vector of discrete values would have cardinality^length combinations in one element: its entries are sampled.
    return (
        v.is_discrete
        and v.cardinality is not None
        and not v.event_shape
        and v.cardinality <= options.enumerate_up_to
    )


def merge_blocks(blocks: Sequence[Block], groups: Sequence[Sequence[str]]) -> tuple[Block, ...]:
    """Blocks whose axes stand in one group share one particle index."""
    merged: list[Block] = []
    for block in blocks:
        group = next((g for g in groups if block.axis in g), (block.axis,))
        if block.axis != group[0]:
            continue
        members = tuple(m for b in blocks if b.axis in group for m in b.members)
        merged.append(replace(block, axis=_axis([m.name for m in members]), members=members))
    return tuple(merged)


def collapsed_plates(graph: Graph) -> dict[str, frozenset[str]]:
    """For each latent, the plates that some factor reads it across: by an index, a reduction, a pick or a shift."""
    found: dict[str, set[str]] = {}
    for node in graph.nodes:
        if node.op not in ("gather", "reduce", "dot", "pick", "shift", "collect"):
            continue
        across = node.name.split(",") if node.op == "collect" else [node.name]
        operands = list(node.operands())
        for operand in operands[:1] if node.op == "gather" else operands:
            for name in upstream(graph, operand):
                variable = graph.variables[name]
                if variable.role != "latent":
                    continue
                hit = {
                    p
                    for p in variable.plates
                    if any(p == a or a in graph.ancestors(p) for a in across)
                }
                found.setdefault(name, set()).update(hit)
    return {name: frozenset(plates) for name, plates in found.items() if plates}


def _member(graph: Graph, v: Variable, crossed: frozenset[str], override: Any) -> Member:
    collapsed = tuple(p for p in v.plates if p in crossed)
    sizes = tuple(graph.plates[p].size or 2 for p in collapsed)
    family, start = _family(
        v, _law_family(graph, v) if override is None and v.is_discrete else override
    )
    transform = None if family else _transform(v)
    return Member(v, collapsed, sizes, transform, family, start)


def _law_family(graph: Graph, v: Variable) -> str | None:
    """The family of a discrete latent's own law, when a proposal of it needs nothing else to be fixed."""
    factor = graph.factors.get(v.name)
    name = type(factor.law.family).__name__ if factor is not None and factor.law is not None else ""
    return name if name in ("Bernoulli", "Categorical", "Poisson", "Geometric") else None


def _transform(v: Variable) -> Transform | None:
    if v.is_discrete:
        raise UnsupportedError(
            f"'{v.name}': a discrete latent without a finite set of values needs a proposal. "
            f"Name one: q={{'{v.name}': 'Poisson'}}."
        )
    if v.support is constraints.dependent:
        raise UnsupportedError(
            f"'{v.name}': its support depends on another latent, so there is no fixed change to the real line. "
            "Write it as a scale times a latent with fixed support."
        )
    if (
        v.support is constraints.real
        or getattr(v.support, "base_constraint", None) is constraints.real
    ):
        return None
    try:
        return biject_to(v.support)
    except NotImplementedError:
        remedy = f"Give it a proposal family: q={{'{v.name}': ...}}."
        if manifold_of(v) is not None:
            remedy = "Use method='laplace' or 'gbp'."
        raise UnsupportedError(
            f"'{v.name}': there is no map from the real line to the support {v.support}. {remedy}"
        ) from None


def _family(v: Variable, override: Any) -> tuple[str | None, Any]:
    if override is None:
        return None, None
    start = None
    if isinstance(override, str):
        name = override
    elif isinstance(override, type):
        name = override.__name__
    else:
        name, start = type(override).__name__, override
    if name == "MultivariateNormal":
        return None, start
    if name == "Normal" and start is None:
        return None, None
    if name not in FAMILIES:
        raise ModelError(
            f"q={{'{v.name}': {name}}}: no exponential family of that name.{nearest(name, FAMILIES)} "
            f"Families: {', '.join(FAMILIES)}."
        )
    return name, start


def _overrides(options: ParticleOptions, latents: Mapping[str, Variable]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in (options.q or {}).items():
        for name in key if isinstance(key, tuple) else (key,):
            _check_name("q", name, latents)
            found[name] = value
    return found


def _check_name(option: str, name: str, latents: Iterable[str]) -> None:
    if name not in latents:
        raise ModelError(
            f"{option}=... names '{name}', which is not a latent of the model.{nearest(name, latents)} "
            f"Latents: {', '.join(latents)}."
        )


def _groups(
    graph: Graph, members: Mapping[str, Member], options: ParticleOptions
) -> list[list[str]]:
    asked = [] if isinstance(options.groups, str) else [list(g) for g in options.groups]
    asked += [list(key) for key in (options.q or {}) if isinstance(key, tuple)]
    named: set[str] = set()
    for group in asked:
        for name in group:
            _check_name("groups", name, [v.name for v in graph.latents])
            if name not in members:
                raise ModelError(
                    f"groups=...: '{name}' is enumerated or a chain and has an index of its own."
                )
            if name in named:
                raise ModelError(f"groups=...: '{name}' stands in two groups.")
            named.add(name)
        contexts = {_block_plates(graph, members[n]) for n in group}
        if len(contexts) > 1:
            raise ModelError(
                f"groups=...: {group} lie in different plates {sorted(contexts)}. Group latents of one plate."
            )
    free = [n for n in members if n not in named]
    return [sorted(g, key=list(members).index) for g in asked] + _automatic(
        graph, members, free, options
    )


def _automatic(
    graph: Graph, members: Mapping[str, Member], free: Sequence[str], options: ParticleOptions
) -> list[list[str]]:
    """Merge latents of one context that meet in a factor while the joint Gaussian stays small."""
    groups = [[n] for n in free]
    limit = max(options.joint_up_to, 1)
    for scope in _meetings(graph, options):
        for a in scope:
            for b in scope:
                left, right = _find(groups, a), _find(groups, b)
                if left is None or right is None or left is right:
                    continue
                same = _block_plates(graph, members[left[0]]) == _block_plates(
                    graph, members[right[0]]
                )
                if same and sum(members[n].dims for n in left + right) <= limit:
                    left.extend(right)
                    groups.remove(right)
    return [sorted(g, key=list(members).index) for g in groups]


def _meetings(graph: Graph, options: ParticleOptions) -> list[tuple[str, ...]]:
    """Scopes of the factors, and of all factors around an enumerated latent together: it is summed out of their product."""
    scopes = [f.scope for f in graph.densities]
    for v in graph.latents:
        if _is_enumerable(v, options):
            around = [n for s in scopes if v.name in s for n in s]
            scopes = [*scopes, tuple(dict.fromkeys(around))]
    return scopes


def _find(groups: list[list[str]], name: str) -> list[str] | None:
    return next((g for g in groups if name in g), None)


def _block_plates(graph: Graph, member: Member) -> tuple[str, ...]:
    return graph.maximal(frozenset(member.variable.plates) - set(member.collapsed))


def _axis(names: Sequence[str]) -> str:
    return "k:" + "+".join(names)
