"""Supports with structure: discrete latents above the slab, summed exactly, exchanged by extrinsic log-odds (turbo).

What a user writes is the ordinary language. A gate is a discrete latent; it may stand in the law of a mixed latent or
multiply it, and have a law of any discrete shape above it::

    with group:                                   # group-sparse
        on = latent("on", Bernoulli(rho))
    with coef:                                    # coef = plate("coef", within=group)
        x = latent("x", SpikeSlab(on, slab=Normal(0.0, sd)))

    x = latent("x", SpikeSlab(on * share, ...))                # sparse-group: members have bits of their own
    on = latent("on", Markov(init=Bernoulli(0.1), step=...))   # a chain of supports, in an ordered plate
    v = on * latent("w", Normal(0.0, sd))                      # a product, written as one
    x = latent("x", Normal(0.0, torch.where(on == 1, 1.0, 0.01)))   # any law that reads a gate

Given the pseudo-observations the graph of the gates is what the contraction engine sums: for every element, each
value of its gates gets the log normaliser of the rule under that value; what comes back, without the element's
own part, is its activity in the next sweep.

Source: [Schniter2010], the turbo idea; every bit by its extrinsic log-odds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.errors import UnsupportedError
from ppl.graph import Graph, Variable, refs
from ppl.inference.amp.mixing import LEAD, Frame, fixed, frame
from ppl.inference.amp.recognise import Linear, Mixed
from ppl.inference.amp.rules.record import Moments, Rule
from ppl.inference.contract import Chain, Layout, LogFactor, PlateSpec, make_plan
from ppl.lower import Compiler, Lowered
from ppl.passes import upstream

CLIP = 30.0  # of log-odds that an element receives
_CLIP_SUM = (
    300.0  # of summed evidence inside the contraction, so that its inverse does not underflow
)
_RAMP = 10  # sweeps over which the evidence of large groups is let in


class Exchange(NamedTuple):
    """What the gates answer."""

    cavity: tuple[
        Tensor, ...
    ]  # an element set each: log-weights [R, B, k, V], own evidence left out
    log_evidence: Tensor  # [R] nats: of all gates, relative to the evidence summed in
    tables: Mapping[str, Tensor]  # gate -> [R, *plates, V]


@dataclass(frozen=True, eq=False)
class Elements:
    """A mixed latent that reads gates."""

    block: int  # position among the mixed latents
    parents: tuple[str, ...]
    values: tuple[int, ...]  # number of values of each parent
    target: tuple[str, ...]  # plates of the parents together
    sizes: tuple[int, ...]  # of these plates
    place: Tensor  # long [B * k]: where each element's evidence goes
    counts: Tensor  # [T]: elements a place
    seats: tuple[Tensor, ...]  # long [B * k] each: which element of a parent an element reads
    frame: Frame

    @property
    def combinations(self) -> int:
        """Joint values of the parents."""
        return math.prod(self.values)


@dataclass(frozen=True, eq=False)
class Structure:
    """All gates, lowered and planned."""

    linear: Linear
    elements: tuple[Elements, ...]
    lowered: Lowered
    scopes: tuple[tuple[str, ...], ...]
    plates: tuple[tuple[str, ...], ...]
    layout: Layout
    plan: Any
    memory: int | None

    @property
    def gates(self) -> tuple[Variable, ...]:
        """The discrete latents, in the order of the program."""
        return tuple(self.linear.graph.variables[n] for n in self.linear.gates)

    def factors(self, params: Mapping[str, Tensor]) -> list[LogFactor]:
        """The laws of the gates; ``params`` are ``[R, *plates, *event]``."""
        arrays = {k: params[k] for k in self.lowered.inputs}
        return [
            LogFactor(axes, log)
            for axes, log in zip(self.scopes, self.lowered(arrays), strict=True)
        ]


@dataclass(frozen=True)
class Gated(Rule):
    """A prior that is one of several rules, each with its log-weight: ``sum_d w_d p(x | d)``.

    ``rules`` have their parameters in the shape of ``r``; ``log_weights`` ``[*batch, n, V]`` sum to one over ``V``.
    """

    rules: tuple[Rule, ...]
    log_weights: Tensor

    def moments(self, r: Tensor, vr: Tensor) -> Moments:
        parts = [rule.moments(r, vr) for rule in self.rules]
        logs = torch.stack([p.log_z for p in parts], -1) + self.log_weights
        share = logs.softmax(-1)
        means = torch.stack([p.mean.expand_as(r) for p in parts], -1)
        spreads = torch.stack([p.variance.expand_as(r) for p in parts], -1)
        mean = (share * means).sum(-1)
        within = (share * (spreads + (means - mean.unsqueeze(-1)).square())).sum(-1)
        return Moments(mean, within, logs.logsumexp(-1))

    def prior_moments(self) -> tuple[Tensor, Tensor]:
        share = self.log_weights.exp()
        both = [rule.prior_moments() for rule in self.rules]
        means = torch.stack(torch.broadcast_tensors(*(m for m, _ in both)), -1)
        spreads = torch.stack(torch.broadcast_tensors(*(v for _, v in both)), -1)
        mean = (share * means).sum(-1)
        return mean, (share * (spreads + (means - mean.unsqueeze(-1)).square())).sum(-1)

    def log_prob(self, x: Tensor) -> Tensor:
        logs = torch.stack([rule.log_prob(x) for rule in self.rules], -1)
        return (logs + self.log_weights).logsumexp(-1)


def parents_of(graph: Graph, mixed: Mixed, gates: Sequence[str]) -> tuple[str, ...]:
    """The gates that the law of a mixed latent reads, or that multiply it."""
    law = graph.factors[mixed.latent].law
    assert law is not None
    found = {mixed.gate} - {""}
    for i in refs(law.arguments):
        found |= upstream(graph, i) & set(gates)
    return tuple(g for g in gates if g in found)


def make_structure(
    bound: Bound, linear: Linear, restarts: int, memory: int | None
) -> Structure | None:
    """Lower the laws of all gates and plan the sum over them; None when there are none.

    Raises:
        UnsupportedError: a gate is a vector, or no order of elimination is polynomial.
    """
    if not linear.gates:
        return None
    graph = linear.graph
    for name in linear.gates:
        if graph.variables[name].event_shape:
            raise UnsupportedError(
                f"amp: '{name}' gates another latent and is a vector. Open a plate over its entries."
            )
    found = [
        _elements(bound, linear, i)
        for i, m in enumerate(linear.mixed)
        if parents_of(graph, m, linear.gates)
    ]
    lowered, scopes, plates = _lowered(bound, linear)
    layout = _layout(bound, linear, restarts)
    outer = [*scopes, *(_scope(e) for e in found), *_own_scopes(linear)]
    inside = [
        *plates,
        *(e.target for e in found),
        *(graph.variables[g].plates for g in linear.gates),
    ]
    plan = make_plan(outer, layout, memory=memory, plates_of=inside)
    return Structure(linear, tuple(found), lowered, scopes, plates, layout, plan, memory)


def start(s: Structure, params: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Cavities before any evidence: the gates' own prior ``[R, B, k, V]``."""
    restarts = s.layout.sizes[LEAD]
    like = next(iter(s.factors(params))).log
    flat = [
        like.new_zeros(restarts, e.frame.repeats, e.frame.count, e.combinations) for e in s.elements
    ]
    return exchange(s, params, flat, sweep=0).cavity


def exchange(
    s: Structure, params: Mapping[str, Tensor], evidence: Sequence[Tensor], sweep: int
) -> Exchange:
    """One inward and one outward pass over the gates.

    Args:
        s: the planned gates.
        params: ``[R, *plates, *event]``.
        evidence: log normalisers ``[R, B, k, V]`` of each set of elements, by joint value of its gates.
        sweep: large groups let their evidence in over the first ten.

    Source: [Schniter2010]; tempering and clips are this module's own.
    """
    shares = [_temper(e, sweep) for e in s.elements]
    relative = [u - u[..., :1] for u in evidence]
    sums = [_gathered(e, u) * k for e, u, k in zip(s.elements, relative, shares, strict=True)]
    inside = [_limited(x) for x in sums]
    log_z, beliefs, tables = _contracted(s, params, inside)
    cavities = []
    for e, u, total, clipped, belief, k in zip(
        s.elements, relative, sums, inside, beliefs, shares, strict=True
    ):
        outside = belief.clamp(min=torch.finfo(belief.dtype).tiny).log() - clipped
        whole = (outside + total).index_select(1, e.place)  # [R, B * k, V]
        own = u.reshape(whole.shape) * k.index_select(1, e.place)
        log = (whole - own).log_softmax(-1)
        cavities.append(_clipped(log).reshape(u.shape))
    return Exchange(tuple(cavities), log_z, tables)


def log_evidence(s: Structure, params: Mapping[str, Tensor], evidence: Sequence[Tensor]) -> Tensor:
    """Log of the sum over all gates, ``[R]``, differentiable in params and evidence."""
    inside = [
        _gathered(e, u - u[..., :1].detach()) for e, u in zip(s.elements, evidence, strict=True)
    ]
    offset = sum(u[..., 0].detach().flatten(1).sum(1) for u in evidence)
    return s.plan.log_evidence(_all_factors(s, params, inside)) + offset


def draw(
    s: Structure,
    params: Mapping[str, Tensor],
    evidence: Sequence[Tensor],
    n: int,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """Joint draws of all gates, long ``[n, *plates]``, given the evidence of one restart (R = 1)."""
    layout = Layout(s.layout.plates, {k: v for k, v in s.layout.sizes.items() if k != LEAD},
                    s.layout.owners, s.layout.chains)  # fmt: skip
    inside = [_gathered(e, u - u[..., :1]) for e, u in zip(s.elements, evidence, strict=True)]
    factors = [_without_lead(f) for f in _all_factors(s, params, inside)]
    plates = [*s.plates, *(e.target for e in s.elements), *(v.plates for v in s.gates)]
    plan = make_plan([f.axes for f in factors], layout, memory=s.memory, plates_of=plates)
    drawn = plan.draw(factors, n, generator)
    declared = list(s.layout.plates)
    found = {}
    for v in s.gates:
        canonical = [p for p in declared if p in v.plates]
        order = [1 + canonical.index(p) for p in v.plates]
        found[v.name] = drawn[_particle(v.name)].permute(0, *order)
    return found


def joint_values(e: Elements, drawn: Mapping[str, Tensor]) -> Tensor:
    """Joint value of its gates for every element, long ``[n, B * k]``, from :func:`draw`."""
    first = next(iter(drawn.values()))
    total = torch.zeros(len(first), 1, dtype=torch.long, device=first.device)
    for name, size, at in zip(e.parents, e.values, e.seats, strict=True):
        total = total * size + drawn[name].long().flatten(1).index_select(1, at)
    return total


# ---- inside ------------------------------------------------------------------------------------


def _particle(name: str) -> str:
    return f"k:{name}"


def _scope(e: Elements) -> tuple[str, ...]:
    return (LEAD, *e.target, *(_particle(p) for p in e.parents))


def _own_scopes(linear: Linear) -> list[tuple[str, ...]]:
    graph = linear.graph
    return [(LEAD, *graph.variables[g].plates, _particle(g)) for g in linear.gates]


def _elements(bound: Bound, linear: Linear, block: int) -> Elements:
    graph, mixed = linear.graph, linear.mixed[block]
    parents = parents_of(graph, mixed, linear.gates)
    v = graph.variables[mixed.name]
    own = frame(bound, v, linear.batch)
    target = graph.maximal(frozenset(p for g in parents for p in graph.variables[g].plates))
    place = _places(bound, v, target, own)
    sizes = tuple(bound.size(p) for p in target)
    return Elements(
        block,
        parents,
        tuple(graph.variables[g].cardinality or 2 for g in parents),
        target,
        sizes,
        place,
        torch.bincount(place, minlength=math.prod(sizes)).to(bound.dtype),
        tuple(_places(bound, v, graph.variables[g].plates, own) for g in parents),
        own,
    )


def _places(bound: Bound, v: Variable, target: tuple[str, ...], own: Frame) -> Tensor:
    """Row-major position in the grid of ``target`` of every element, long ``[B * k]``."""
    shape = [bound.size(p) for p in v.plates]
    index = torch.zeros(*shape, dtype=torch.long, device=bound.device)
    for plate in target:
        child = next(p for p in v.plates if p == plate or plate in bound.graph.ancestors(p))
        size = bound.size(plate)
        whole = torch.arange(size, device=bound.device)
        at = whole if child == plate else bound.maps[child, plate]
        axis = v.plates.index(child)
        index = index * size + at.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    index = index.reshape(1, *shape, *(1,) * len(v.event_shape)).expand(1, *shape, *v.event_shape)
    return own.flat(index).expand(1, own.repeats, own.count).flatten()


def _lowered(
    bound: Bound, linear: Linear
) -> tuple[Lowered, tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]:
    graph = linear.graph
    axes = {v.name: (LEAD, *v.plates) for v in graph.role("latent", "param")}
    axes |= {v.name: v.plates for v in graph.role("given", "observed")}
    axes |= {g: (_particle(g),) for g in linear.gates}
    own = [_particle(g) for g in linear.gates]
    order = (LEAD, *graph.plates, *own, *(a + "'" for a in own))
    c = Compiler(graph, axes, order, dtype=bound.dtype, device=bound.device)
    outputs, plates = [], []
    for name in linear.gates:
        factor = graph.factors[name]
        for later in (False, True) if factor.chain else (False,):
            outputs.append(c.transition(factor) if later else c.density(factor))
            first = factor.chain is not None and not later
            plates.append(
                tuple(p for p in factor.plates if not (first and p == factor.chain[0]))  # type: ignore[index]
            )
    lowered = fixed(c.finish(outputs), bound)
    support = {
        g: torch.arange(graph.variables[g].cardinality or 2, dtype=bound.dtype, device=bound.device)
        for g in linear.gates
    }
    lowered = lowered.given({k: v for k, v in support.items() if k in lowered.inputs})
    return lowered, tuple(o.axes for o in outputs), tuple(plates)


def _layout(bound: Bound, linear: Linear, restarts: int) -> Layout:
    graph = linear.graph
    plates = {
        p.name: PlateSpec(p.name, bound.size(p.name), {q: bound.maps[p.name, q] for q in p.parents})
        for p in graph.plates.values()
    }
    chains = []
    for g in linear.gates:
        factor = graph.factors[g]
        if factor.chain is not None:
            chains.append(Chain(factor.chain[0], _particle(g), _particle(g) + "'"))
    sizes = {_particle(g): graph.variables[g].cardinality or 2 for g in linear.gates}
    owners = {_particle(g): graph.variables[g].plates for g in linear.gates}
    return Layout(plates, {LEAD: restarts, **sizes}, owners, tuple(chains), (LEAD,))


def _all_factors(
    s: Structure, params: Mapping[str, Tensor], inside: Sequence[Tensor]
) -> list[LogFactor]:
    """Laws, evidence, and a zero for every gate, whose gradient is its marginal."""
    restarts = inside[0].shape[0]
    shaped = [
        LogFactor(_scope(e), u.reshape(restarts, *e.sizes, *e.values))
        for e, u in zip(s.elements, inside, strict=True)
    ]
    zeros = []
    for scope, v in zip(_own_scopes(s.linear), s.gates, strict=True):
        shape = [restarts, *(s.layout.plates[p].size for p in v.plates), v.cardinality or 2]
        zeros.append(LogFactor(scope, inside[0].new_zeros(shape)))
    return [*s.factors(params), *shaped, *zeros]


def _contracted(
    s: Structure, params: Mapping[str, Tensor], inside: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Log evidence, the belief in every joint value ``[R, T, V]``, and the marginals of the gates."""
    with torch.enable_grad():
        live = [u.detach().requires_grad_() for u in inside]
        factors = _all_factors(s, {k: v.detach() for k, v in params.items()}, live)
        zeros = [f.log.requires_grad_() for f in factors[len(factors) - len(s.gates) :]]
        log_z = s.plan.log_evidence(factors)
        grads = torch.autograd.grad(log_z.sum(), [*live, *zeros])
    tables = {v.name: g for v, g in zip(s.gates, grads[len(live) :], strict=True)}
    return log_z.detach(), list(grads[: len(live)]), tables


def _gathered(e: Elements, evidence: Tensor) -> Tensor:
    """Evidence ``[R, B, k, V]`` summed over the elements of each place: ``[R, T, V]``."""
    flat = evidence.reshape(evidence.shape[0], -1, evidence.shape[-1])
    total = flat.new_zeros(flat.shape[0], math.prod(e.sizes), flat.shape[-1])
    return total.index_add(1, e.place, flat)


def _temper(e: Elements, sweep: int) -> Tensor:
    """Share of the evidence that is let in, ``[1, T, 1]``: from one over the group's size to one."""
    left = max(0.0, 1.0 - sweep / _RAMP)
    return e.counts.clamp(min=1.0).pow(-left).reshape(1, -1, 1)


def _limited(total: Tensor) -> Tensor:
    top = total.amax(-1, keepdim=True)
    return (total - top).clamp(min=-_CLIP_SUM)


def _clipped(log: Tensor) -> Tensor:
    """Log-weights no further than the clip below the largest one, normalised."""
    return (log - log.amax(-1, keepdim=True)).clamp(min=-CLIP).log_softmax(-1)


def _without_lead(factor: LogFactor) -> LogFactor:
    if LEAD not in factor.axes:
        return factor
    at = factor.axes.index(LEAD)
    return LogFactor(tuple(a for a in factor.axes if a != LEAD), factor.log.select(at, 0))
