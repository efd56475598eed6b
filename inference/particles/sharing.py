"""Which latents share a particle index: those named together, and those of one context that meet in a factor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ppl.errors import ModelError, nearest
from ppl.graph import Graph, Variable
from ppl.inference.particles.forms import Asked
from ppl.inference.particles.options import CHEAP, ParticleOptions
from ppl.lower import variables_of

if TYPE_CHECKING:
    from ppl.inference.particles.blocks import Member


def named_groups(
    graph: Graph,
    members: Mapping[str, Member],
    options: ParticleOptions,
    asked: Mapping[str, Asked],
) -> list[list[str]]:
    """Names of the latents of every block: as asked, the others by their factors."""
    wanted = [] if isinstance(options.groups, str) else [list(g) for g in options.groups]
    wanted += [list(key) for key in (options.q or {}) if isinstance(key, tuple)]
    together = {n for group in wanted for n in group}
    # A latent whose proposal has a form of its own has an index of its own, unless it is grouped by name.
    alone = (n for n, a in asked.items() if (a.form or a.tied) and n not in together)
    wanted += [[n] for n in alone if n in members]
    named: set[str] = set()
    for group in wanted:
        for name in group:
            _check_name("groups", name, [v.name for v in graph.latents])
            if name not in members:
                raise ModelError(
                    f"groups=...: '{name}' is enumerated or a chain and has an index of its own."
                )
            if name in named:
                raise ModelError(f"groups=...: '{name}' stands in two groups.")
            named.add(name)
        contexts = {block_plates(graph, members[n]) for n in group}
        if len(contexts) > 1:
            raise ModelError(
                f"groups=...: {group} lie in different plates {sorted(contexts)}. Group latents of one plate."
            )
    free = [n for n in members if n not in named]
    return [sorted(g, key=list(members).index) for g in wanted] + _automatic(
        graph, members, free, options, asked
    )


def _automatic(
    graph: Graph,
    members: Mapping[str, Member],
    free: Sequence[str],
    options: ParticleOptions,
    asked: Mapping[str, Asked],
) -> list[list[str]]:
    """Merge latents of one context that meet in a factor while the joint Gaussian stays small."""
    groups = [[n] for n in free]
    paths = frozenset(n for n in members if members[n].path)
    for scope in _meetings(graph, options, asked, paths):
        for a in scope:
            for b in scope:
                left, right = _find(groups, a), _find(groups, b)
                if left is None or right is None or left is right:
                    continue
                plates = block_plates(graph, members[left[0]])
                if plates != block_plates(graph, members[right[0]]):
                    continue
                both = left + right
                limit = options.joint_limit(plates, not paths.isdisjoint(both))
                if sum(members[n].dims for n in both) <= limit:
                    left.extend(right)
                    groups.remove(right)
    return [sorted(g, key=list(members).index) for g in groups]


def is_enumerable(v: Variable, up_to: int) -> bool:
    """Whether a latent is summed over all its values, of which there may be ``up_to``."""
    # A vector of discrete values would have cardinality^length combinations in one element: its entries are sampled.
    return (
        v.is_discrete and v.cardinality is not None and not v.event_shape and v.cardinality <= up_to
    )


def is_whole_path(graph: Graph, member: Member, options: ParticleOptions) -> bool:
    """Whether all states of a chain share one particle: one of many short chains of real numbers.

    A chain on its own can afford many particles a state; many chains cannot, and their paths are near Gaussian where a cheap
    method has said where they are.
    """
    chain = graph.factors[member.name].chain
    assert chain is not None
    length = graph.plates[chain[0]].size
    # Where it may not be tempered, a run begins at the prior unless it is told otherwise.
    starts = CHEAP if not getattr(options, "bridge", True) else ("auto", *CHEAP)
    if length is None or member.family or options.start not in starts:
        return False
    many = set(graph.closure(member.variable.plates)) - {chain[0]}
    fits = 1 < length and 0 < length * member.dims <= options.paths_up_to
    return options.joint_chains and bool(many) and fits and not _is_read_later(graph, member.name)


def _is_read_later(graph: Graph, name: str) -> bool:
    """Whether steps of another chain read this one."""
    others = (f for f in graph.densities if f.chain and f.name != name)
    return any(name in variables_of(graph, f) for f in others)


def _meetings(
    graph: Graph,
    options: ParticleOptions,
    asked: Mapping[str, Asked],
    paths: frozenset[str] = frozenset(),
) -> list[tuple[str, ...]]:
    """Scopes of the factors, and of all factors around a latent together that is summed out of their product first.

    Such are enumerated latents, chains (an axis of any factor along a chain rides through every step of its sum), and
    all latents of inner plates.
    """
    scopes = [f.scope for f in graph.densities]
    for v in graph.latents:
        chain = v.name in graph.factors and graph.factors[v.name].chain and v.name not in paths
        if chain or (v.name not in asked and is_enumerable(v, options.enumerate_up_to)):
            around = [n for s in scopes if v.name in s for n in s]
            scopes = [*scopes, tuple(dict.fromkeys(around))]
    return [*scopes, *_around_plates(graph, scopes)]


def _around_plates(graph: Graph, scopes: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Outer latents around every connected set of latents of an inner context, the innermost first."""
    context = {v.name: graph.closure(v.plates) for v in graph.latents}
    left = [frozenset(s) & context.keys() for s in scopes]
    found: list[tuple[str, ...]] = []
    for plates in sorted(set(context.values()), key=len, reverse=True):
        inside = {n for n in context if context[n] == plates}
        if not plates:
            break
        joined: list[frozenset[str]] = []
        for scope in (s for s in left if s & inside):
            touching = [j for j in joined if j & scope & inside]
            joined = [j for j in joined if j not in touching]
            joined.append(scope.union(*touching))
        outer = [j - inside for j in joined]
        left = [s for s in left if not s & inside] + outer
        found += [tuple(n for n in context if n in o) for o in outer if len(o) > 1]
    return found


def _check_name(option: str, name: str, latents: Iterable[str]) -> None:
    if name not in latents:
        raise ModelError(
            f"{option}=... names '{name}', which is not a latent of the model.{nearest(name, latents)} "
            f"Latents: {', '.join(latents)}."
        )


def _find(groups: list[list[str]], name: str) -> list[str] | None:
    return next((g for g in groups if name in g), None)


def block_plates(graph: Graph, member: Member) -> tuple[str, ...]:
    """The innermost plates that each have particles of their own."""
    return graph.maximal(frozenset(member.variable.plates) - set(member.collapsed))
