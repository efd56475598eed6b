"""Blocks: which latents share a particle index, over which plates, and how each is proposed.

A block is one particle axis. Latents of one plate context that meet in a factor are grouped while their joint
Gaussian stays small; a latent that a factor reads across its own plate (an index, a reduction) has one particle for
the whole plate; a finite discrete latent is enumerated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import Transform

from ppl.distributions import Normal
from ppl.errors import ModelError, UnsupportedError, nearest
from ppl.graph import Graph, Variable
from ppl.inference.numerics.expfam import FAMILIES
from ppl.inference.particles import nested
from ppl.inference.particles.forms import (
    Asked,
    Form,
    GaussMarkov,
    LinearGaussian,
    Prior,
    Sites,
    Skewed,
    Table,
    Tilted,
    check_form,
    read_forms,
    read_latents,
)
from ppl.inference.particles.options import ParticleOptions
from ppl.inference.particles.sharing import (
    block_plates,
    is_enumerable,
    is_whole_path,
    named_groups,
)
from ppl.lower import variables_of
from ppl.manifolds import manifold_of
from ppl.passes import upstream

_REAL = ("Normal", "Laplace", "VonMises")  # families that leave no real value out

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
    path: str | None = None  # ordered plate of a chain whose particles are whole paths

    @property
    def name(self) -> str:
        """The latent's name."""
        return self.variable.name

    @cached_property
    def free_shape(self) -> tuple[int, ...]:
        """Event shape on the unconstrained scale."""
        shape = torch.Size(self.variable.event_shape)
        return (
            tuple(self.transform.inverse_shape(shape))
            if self.transform is not None
            else tuple(shape)
        )

    @cached_property
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
    form: Form | None = None  # how it is proposed given other blocks
    reads: tuple[str, ...] = ()  # latents of other blocks that its proposal is given
    tied: tuple[str, ...] = ()  # plates whose elements share the proposal's parameters
    stratified: bool = False  # whether the particles of an element are spread evenly

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the members."""
        return tuple(m.name for m in self.members)

    @property
    def index(self) -> str:
        """How a particle finds its parents."""
        return self.form.index if self.form is not None else "permutation"

    @property
    def is_nested(self) -> bool:
        """Whether each particle of its parents has particles of its own."""
        return self.index == "nested"

    @cached_property
    def gaussian(self) -> tuple[Member, ...]:
        """Members that share the joint Gaussian."""
        if self.enumerated or isinstance(self.form, (Tilted, Sites)):
            return ()
        own = self.form.takes if isinstance(self.form, Prior) else lambda name: False
        return tuple(m for m in self.members if m.family is None and not own(m.name))

    @cached_property
    def dims(self) -> int:
        """Scalars of the joint Gaussian."""
        return sum(m.dims for m in self.gaussian)


def make_blocks(graph: Graph, options: ParticleOptions, sites: bool = False) -> tuple[Block, ...]:
    """Partition the latents; with ``sites``, long Normal vectors in plates get these where they can have them.

    Raises:
        UnsupportedError: a latent has no proposal.
        ModelError: ``groups`` or ``q`` name something that is not there, or group latents of different plates.
    """
    asked = read_forms(options.q, graph)
    crossed = collapsed_plates(graph)
    members: dict[str, Member] = {}
    fixed: list[Block] = []
    for v in graph.latents:
        chain = graph.factors[v.name].chain if v.name in graph.factors else None
        if v.name not in asked and is_enumerable(v, options.enumerate_up_to):
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
        member = _member(graph, v, crossed.get(v.name, frozenset()), asked.get(v.name))
        if chain:
            if member.collapsed:
                raise UnsupportedError(
                    f"'{v.name}' is a Markov chain along '{chain[0]}', but a factor reads it across that plate. "
                    "Read the chain element by element."
                )
            if v.name in asked and (asked[v.name].form or asked[v.name].tied):
                raise UnsupportedError(
                    f"q={{'{v.name}': ...}}: '{v.name}' is a Markov chain; its proposal has no other form. Leave it out of q."
                )
            if is_whole_path(graph, member, options):
                members[v.name] = _as_path(graph, member, chain[0])
                continue
            joint = options.joint_chains and 0 < member.dims <= options.joint_up_to
            form = GaussMarkov() if joint and not member.family else None
            plates = block_plates(graph, member)
            fixed.append(Block(_axis([v.name]), (member,), plates, chain=chain[0], form=form))
        else:
            members[v.name] = member
    groups = named_groups(graph, members, options, asked)
    blocks = [_block(graph, [members[n] for n in g], asked) for g in groups]
    made = tuple(blocks + fixed)
    made = with_sites(graph, made, options, asked) if sites else made
    made = tuple(_spread(b, options) for b in made)
    check_order(graph, made)
    return made


def _spread(block: Block, options: ParticleOptions) -> Block:
    """The block, whose particles are spread evenly where that is asked for; forms that are given others draw one by one."""
    own = not block.enumerated and (block.form is None or isinstance(block.form, GaussMarkov))
    return replace(block, stratified=True) if own and options.stratifies(block.plates) else block


def with_sites(
    graph: Graph, blocks: tuple[Block, ...], options: ParticleOptions, asked: Mapping[str, Asked]
) -> tuple[Block, ...]:
    """The blocks with sites for long Normal vectors in plates that nothing was asked of, where these can have them."""
    found: list[Block] = []
    above: set[str] = set()
    for block in blocks:
        long = block.plates and block.dims > options.joint_limit(block.plates)
        if long and block.form is None and not set(block.names) & set(asked):
            reads = read_latents(Sites(), graph, block.names)
            new = replace(
                block,
                form=Sites(),
                reads=reads,
                members=tuple(replace(m, transform=None) for m in block.members),
            )
            if not lacks(graph, new, blocks):
                block = new
                above |= set(reads)
        found.append(block)
    return tuple(
        replace(b, form=Skewed()) if above & set(b.names) and b.gaussian == b.members else b
        for b in found
    )


def lacks(graph: Graph, block: Block, blocks: Sequence[Block]) -> str:
    """Why a block cannot have sites, in words; empty if it can."""
    if len(block.members) != 1 or block.tied or block.chain or block.members[0].collapsed:
        return "sites are those of one latent, element by element, not tied and no chain."
    name, law = block.names[0], graph.factors[block.names[0]].law
    if law is None or type(law.family) is not Normal:
        return f"'{name}' has no Normal law."
    if graph.role("param"):
        return "the model has params, which are learned from the factors of all laws."
    parents = [b for b in blocks if set(b.names) & set(block.reads)]
    if len(parents) != 1 or parents[0].enumerated or parents[0].reads or parents[0].chain:
        return f"the latents that '{name}' depends on are not one block with a Gaussian proposal. Group them: groups=[...]."
    if not set(parents[0].plates) < graph.closure(block.plates) or parents[0].members[0].collapsed:
        return f"{', '.join(parents[0].names)} do not lie outside the plates of '{name}'."
    near = {name, *parents[0].names}
    for factor in graph.densities:
        scope = variables_of(graph, factor)
        if factor.name == name or name not in scope:
            continue
        role = graph.variables[factor.name].role if factor.name in graph.variables else "factor"
        latents = {n for n in scope if graph.variables[n].role == "latent"}
        if role != "observed" or factor.chain or not latents <= near:
            return f"'{factor.name}' is not an observation of '{name}' and of what it depends on alone."
    return ""


def _as_path(graph: Graph, member: Member, plate: str) -> Member:
    """The chain with all its states in one particle."""
    return replace(member, collapsed=(plate,), sizes=(graph.plates[plate].size or 2,), path=plate)


def _block(graph: Graph, members: Sequence[Member], asked: Mapping[str, Asked]) -> Block:
    names = tuple(m.name for m in members)
    plates = block_plates(graph, members[0])
    said = [asked.get(n) for n in names]
    forms = {(a.form, a.tied) if a else (None, None) for a in said}
    if len(forms) > 1:
        raise ModelError(
            f"q=...: {', '.join(names)} share a particle index, so they have one form. Name them together: q={{{names}: ...}}."
        )
    form, tied = forms.pop()
    reads = read_latents(form, graph, names)
    if form is not None:
        check_form(form, graph, tuple(m.variable for m in members), reads)
        inside = [n for n in reads if n in names]
        if inside:
            raise ModelError(
                f"q=...: the proposal of {', '.join(names)} reads '{inside[0]}', which lies in the same block. "
                "Give each a block of its own."
            )
    over = () if tied is None else (tied.over or plates)
    over = (over,) if isinstance(over, str) else tuple(over)
    stray = [p for p in over if p not in plates]
    if stray or (tied is not None and not plates):
        raise ModelError(
            f"q=...: Tied over {stray or 'nothing'}: {', '.join(names)} lie in plates {list(plates)}."
        )
    return Block(_axis(names), tuple(members), plates, form=form, reads=reads, tied=over)


def check_order(graph: Graph, blocks: Sequence[Block]) -> tuple[Block, ...]:
    """The blocks with every one behind those that its proposal reads.

    Raises:
        ModelError: proposals read each other in a circle, or across plates.
    """
    home = {n: b for b in blocks for n in b.names}
    ordered: list[Block] = []
    waiting = list(blocks)
    while waiting:
        ready = [b for b in waiting if not any(home[n] in waiting for n in b.reads)]
        if not ready:
            circle = " and ".join("+".join(b.names) for b in waiting if b.reads)
            raise ModelError(
                f"q=...: proposals read each other in a circle: {circle}. Leave one of them without given=..."
            )
        ordered += ready
        waiting = [b for b in waiting if b not in ready]
    for block in blocks:
        above = graph.closure(block.plates)
        for name in block.reads:
            if not set(home[name].plates) <= above:
                raise ModelError(
                    f"q=...: the proposal of {', '.join(block.names)} (plates {list(block.plates)}) reads '{name}', which lies "
                    f"in plates {list(home[name].plates)}. A proposal reads latents of its own plates or of outer ones."
                )
        parents = [b for b in blocks if set(b.names) & set(block.reads)]
        _check_parents(graph, block, parents)
        if isinstance(block.form, Sites) and (why := lacks(graph, block, blocks)):
            raise ModelError(f"q=...: {', '.join(block.names)}: Sites(): {why}")
        nested.check(block, parents, [b for b in blocks if set(b.reads) & set(block.names)])
    return tuple(ordered)


def _check_parents(graph: Graph, block: Block, parents: Sequence[Block]) -> None:
    """Refuse parents whose joint weights cannot be had."""
    if not isinstance(block.form, (LinearGaussian, Tilted)):
        return
    if isinstance(block.form, Tilted) and len(parents) > 2:
        raise ModelError(
            f"q=...: the tilted law of {', '.join(block.names)} has parents in {len(parents)} blocks "
            f"({', '.join('+'.join(p.names) for p in parents)}), two are possible. Group them: groups=[...], or use Prior."
        )
    for a in parents:
        for b in parents:
            above, below = graph.closure(a.plates), graph.closure(b.plates)
            if not (above <= below or below <= above):
                raise ModelError(
                    f"q=...: the proposal of {', '.join(block.names)} reads {', '.join(a.names)} (plates {list(a.plates)}) and "
                    f"{', '.join(b.names)} (plates {list(b.plates)}), which cross. Give it one of them."
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


def _member(graph: Graph, v: Variable, crossed: frozenset[str], asked: Asked | None) -> Member:
    collapsed = tuple(p for p in v.plates if p in crossed)
    sizes = tuple(graph.plates[p].size or 2 for p in collapsed)
    form = asked.form if asked else None
    if isinstance(form, (Prior, Tilted, Sites, Table)) and collapsed:
        raise UnsupportedError(
            f"q={{'{v.name}': {type(form).__name__}(...)}}: '{v.name}' is read across its plate {list(collapsed)}, so all of "
            "that plate shares one particle. Use LinearGaussian, or no form."
        )
    if isinstance(form, (Tilted, Sites)) or (isinstance(form, Prior) and form.takes(v.name)):
        return Member(v, collapsed, sizes, None)
    override = asked.family if asked else None
    family, start = _family(
        v, _law_family(graph, v) if override is None and v.is_discrete else override
    )
    transform = None if family else transform_of(v)
    return Member(v, collapsed, sizes, transform, family, start)


def _law_family(graph: Graph, v: Variable) -> str | None:
    """The family of a discrete latent's own law, when a proposal of it needs nothing else to be fixed."""
    factor = graph.factors.get(v.name)
    name = type(factor.law.family).__name__ if factor is not None and factor.law is not None else ""
    return name if name in ("Bernoulli", "Categorical", "Poisson", "Geometric") else None


def transform_of(v: Variable) -> Transform | None:
    """The map from the real line to a latent's support; None where it is the identity.

    Raises:
        UnsupportedError: there is none; the message says why and what helps.
    """
    if v.is_discrete:
        raise UnsupportedError(
            f"'{v.name}': a discrete latent without a finite set of values needs a proposal. "
            f"Name one: q={{'{v.name}': 'Poisson'}}, or q={{'{v.name}': Prior()}} for its own law."
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
    if v.support is constraints.real and name not in _REAL:
        raise ModelError(
            f"q={{'{v.name}': {name}}}: '{v.name}' takes all real values, and {name} leaves some of them out. Use "
            f"{' or '.join(_REAL)}, or leave it out of q=."
        )
    return name, start


def _axis(names: Sequence[str]) -> str:
    return "k:" + "+".join(names)
