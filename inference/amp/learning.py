"""EM for the params of a model: closed updates where a rule has them, the gradient of the log normalisers elsewhere.

A param that stands alone as one parameter of one law is learned by that rule's statistics, averaged over whatever
shares it: everything, or the elements of one plate. Any other use (a cut point inside an expression, an intercept,
the transition of a chain, a scale in two laws) follows the gradient of the summed log normalisers, which by Fisher's
identity is the gradient of EM's expected log-density, with step sizes of its own for every number.

Sources: amp.md 7 (8) and (9); [Vila2013]; step sizes by the sign of the gradient [Riedmiller1993].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributions import biject_to

from ppl.distributions import Bernoulli
from ppl.graph import Factor, Graph, Law, Ref, Variable, refs
from ppl.inference.amp import structure as gates
from ppl.inference.amp.coefficients import Block, Params
from ppl.inference.amp.laws import Link, translation
from ppl.inference.amp.mixing import Offset
from ppl.inference.amp.options import AMP
from ppl.inference.amp.outcomes import LINKS, Outcome, Seen
from ppl.inference.amp.recognise import Linear
from ppl.inference.amp.rules.record import Rule
from ppl.inference.amp.structure import Structure
from ppl.passes import upstream

_LOW_NOISE = 1e-10  # smallest noise variance, in units of the mean square of the data
_GROW, _SHRINK, _START, _LARGEST = 1.2, 0.5, 0.05, 0.5  # of the steps along gradients
_SLACK = 1e-12  # share of the objective that rounding may take
_COPIES = ("variable", "gather", "pick")


class Seat(NamedTuple):
    """A place where a param stands: a parameter of a law."""

    part: Literal["prior", "channel", "gate"]
    at: int  # which block, outcome or gate
    path: str
    argument: object


class Closed(NamedTuple):
    """A param that a rule learns by its statistics."""

    seat: Seat
    link: Link
    entry: Tensor | None  # long [B * k]: the entry that each element reads; None: there is one


class Ascent(NamedTuple):
    """Memory of a param that follows a gradient; every field of its shape ``[R, ...]``."""

    gradient: Tensor
    size: Tensor


@dataclass(frozen=True, eq=False)
class Model:
    """The parts of the run that read params."""

    linear: Linear
    blocks: tuple[Block, ...]
    outcomes: tuple[Outcome, ...]
    offset: Offset
    structure: Structure | None
    start: Params  # as the model gives them, [1, *plates, *event]

    def priors(self, params: Params, cavities: Sequence[Tensor]) -> list[Rule]:
        """One rule a block; ``cavities`` are those of the gated blocks, in order."""
        waiting = iter(cavities)
        return [b.rule(params, next(waiting) if b.is_gated else None) for b in self.blocks]

    def channels(self, params: Params) -> list[Rule]:
        """One rule an observed site."""
        offsets = self.offset(params)
        return [o.rule(params, x) for o, x in zip(self.outcomes, offsets, strict=True)]

    def evidence(self, params: Params, inputs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """What each gated block says of its gates."""
        pairs = zip(self.blocks, inputs, strict=True)
        return [b.evidence(params, r, vr) for b, (r, vr) in pairs if b.is_gated]


class Rules(NamedTuple):
    """Rules of all blocks and sites."""

    priors: list[Rule]
    channels: list[Rule]


class Pseudo(NamedTuple):
    """Pseudo-observations of all blocks and sites: ``(r, vr)`` and ``(p, vp)``."""

    blocks: list[tuple[Tensor, Tensor]]  # [R, B, n], [R, B, n or 1]
    sites: list[tuple[Tensor, Tensor]]  # [R, B, m], [R, B, m or 1]


@dataclass(frozen=True, eq=False)
class Learner:
    """What is learned, and how."""

    model: Model
    closed: Mapping[str, Closed]
    ascending: tuple[str, ...]
    seats: Mapping[str, tuple[Seat, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """All params that are learned."""
        return (*self.closed, *self.ascending)


def make_learner(model: Model, options: AMP) -> Learner:
    """Sort the params by how they can be learned."""
    graph = model.linear.graph
    seats: dict[str, list[Seat]] = {v.name: [] for v in graph.role("param")}
    for seat in _seats(model):
        for i in refs(seat.argument):
            for name in upstream(graph, i) & set(seats):
                seats[name].append(seat)
    closed, ascending = {}, []
    for name, found in seats.items():
        if not options.learns(name):
            continue
        one = _closed(model, graph.variables[name], found) if len(found) == 1 else None
        if one is not None and name not in model.offset.names:
            closed[name] = one
        elif found or name in model.offset.names:
            ascending.append(name)
    return Learner(model, closed, tuple(ascending), {k: tuple(v) for k, v in seats.items()})


def start_ascent(learner: Learner, params: Params) -> dict[str, Ascent]:
    """Memory before the first step: a twentieth of each number."""
    found = {}
    for name in learner.ascending:
        free = _free(learner, name, params[name])
        found[name] = Ascent(torch.zeros_like(free), _START * free.abs().clamp(min=1.0))
        if _is_plain(learner, name):
            size = torch.where(free == 0, torch.ones_like(free), free.abs())
            found[name] = found[name]._replace(size=_START * size)
    return found


def learned(
    learner: Learner,
    params: Params,
    ascent: Mapping[str, Ascent],
    at: Pseudo,
    rules: Rules,
    tables: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Ascent]]:
    """One M-step for all params.

    Args:
        learner: what is learned.
        params: now, ``[R, *plates, *event]``.
        ascent: memory of those that follow gradients.
        at: pseudo-observations of the sweep.
        rules: of the sweep.
        tables: marginals of the gates ``[R, *plates, V]``.

    Returns:
        New params and memory.
    """
    new = dict(params)
    model, seen = learner.model, {}  # type: ignore[var-annotated]
    for name, one in learner.closed.items():
        if one.seat.part == "gate":
            found = _gate_update(model, one, tables, params[name])
        elif one.seat.part == "prior":
            block = one.seat.at
            if ("prior", block) not in seen:
                seen["prior", block] = rules.priors[block].statistics(*at.blocks[block])
            shape, statistics = at.blocks[block][0].shape, seen["prior", block]
            found = _updated(rules.priors[block], one, shape, statistics, None, params[name])
        else:
            found = _channel_update(model, rules.channels[one.seat.at], one, at, params[name])
        new[name] = torch.where(found.isfinite(), found, params[name])
    if learner.ascending:
        return _ascended(learner, new, ascent, at)
    return new, {}


# ---- closed updates ----------------------------------------------------------------------------


def _channel_update(model: Model, rule: Rule, one: Closed, at: Pseudo, old: Tensor) -> Tensor:
    p, vp = at.sites[one.seat.at]
    outcome, keep = model.outcomes[one.seat.at], None
    if isinstance(rule, Seen):
        p, keep, rule = p + rule.offset, rule.keep, rule.rule
    found = _updated(rule, one, p.shape, rule.statistics(p, vp), keep, old)
    floor = (_LOW_NOISE * outcome.data.square().mean()).sqrt()
    return found.clamp(min=float(floor)) if one.link.name == "variance" else found


def _updated(
    rule: Rule,
    one: Closed,
    shape: torch.Size,
    statistics: Mapping[str, Tensor],
    keep: Tensor | None,
    old: Tensor,
) -> Tensor:
    """The param after one closed update of its rule, from statistics of elements ``[R, B, k]``."""
    size = old[0].numel() // _rest(rule, old)
    pooled = {k: _pooled(v, shape, one.entry, size, keep) for k, v in statistics.items()}
    name = one.link.name
    value = one.link.back(_attribute(rule.maximised(pooled, {name}), name))
    if one.entry is None:
        return value.reshape(value.shape[0], -1)[:, : old[0].numel()].reshape(old.shape)
    rest = value.shape[len(shape) :]
    flat = value.expand(*shape, *rest).reshape(shape[0], -1, *rest)
    whole = old.reshape(old.shape[0], size, *rest)
    return whole.index_copy(1, one.entry, flat).reshape(old.shape)


def _rest(rule: Rule, old: Tensor) -> int:
    """Numbers of the param that belong to one element: the components of a mixture."""
    return old.shape[-1] if rule.trailing and old.ndim > 1 else 1


def _attribute(rule: Rule, name: str) -> Tensor:
    for part in (rule, getattr(rule, "slab", None), getattr(rule, "noise", None)):
        if part is not None and hasattr(part, name):
            return getattr(part, name)
    raise AttributeError(name)


def _pooled(
    x: Tensor, shape: torch.Size, index: Tensor | None, size: int, keep: Tensor | None
) -> Tensor:
    """Averages over the elements that share an entry, in the shape of the elements or as ``[R, 1, 1]``."""
    rest = x.shape[len(shape) :]
    if index is None and keep is None:
        return x.expand(*shape, *rest).mean((1, 2), keepdim=True)
    x = x.expand(*shape, *rest)
    weight = x.new_ones(1, *shape[1:]) if keep is None else keep.to(x.dtype).expand(1, *shape[1:])
    weight = weight.reshape(*weight.shape, *(1,) * len(rest))
    if index is None:
        return (x * weight).sum((1, 2), keepdim=True) / weight.sum((1, 2), keepdim=True)
    flat = (x * weight).reshape(shape[0], -1, *rest)
    total = flat.new_zeros(shape[0], size, *rest).index_add(1, index, flat)
    count = weight.new_zeros(1, size, *(1,) * len(rest)).index_add(1, index, weight.flatten(1, 2))
    mean = total / count.clamp(min=torch.finfo(x.dtype).tiny)
    return mean.index_select(1, index).reshape(*shape, *rest)


def _gate_update(model: Model, one: Closed, tables: Mapping[str, Tensor], old: Tensor) -> Tensor:
    """Share of a Bernoulli gate that is on, where the gate's probability is the param itself."""
    assert model.structure is not None
    on = tables[model.linear.gates[one.seat.at]][..., 1]
    share = on if old.shape == on.shape else on.flatten(1).mean(1).reshape(old.shape)
    return one.link.back(one.link.there(share.clamp(1e-6, 1 - 1e-6)))


# ---- where params stand ------------------------------------------------------------------------


def _seats(model: Model) -> Iterator[Seat]:
    graph = model.linear.graph
    for i, block in enumerate(model.blocks):
        yield from _law_seats("prior", i, graph.factors[block.mixed.latent].law)
    for i, outcome in enumerate(model.outcomes):
        yield from _law_seats("channel", i, graph.factors[outcome.site].law)
    for i, name in enumerate(model.linear.gates):
        factor = graph.factors[name]
        yield from _law_seats("gate", i, factor.law)
        if factor.chain is not None:
            yield from _law_seats("gate", i, factor.chain[1])


def _law_seats(
    part: Literal["prior", "channel", "gate"], at: int, law: Law | None
) -> Iterator[Seat]:
    if law is not None:
        for leaf, argument in zip(law.family.leaves(), law.arguments, strict=True):
            yield Seat(part, at, leaf.path, argument)


def _closed(model: Model, v: Variable, seats: Sequence[Seat]) -> Closed | None:
    """The closed update of a param that stands alone in one seat, None where there is none."""
    seat = seats[0]
    if not _stands_alone(model.linear.graph, seat.argument, v.name):
        return None
    if seat.part == "gate":
        factor = model.linear.graph.factors[model.linear.gates[seat.at]]
        return _closed_gate(factor, seat, v)
    link = _link(model, seat, v)
    if link is None:
        return None
    return Closed(seat, link, _index(model, seat, v))


def _closed_gate(factor: Factor, seat: Seat, v: Variable) -> Closed | None:
    law = factor.law
    same = v.plates in ((), factor.plates) and v.event_shape == ()
    if factor.chain is not None or law is None or type(law.family) is not Bernoulli or not same:
        return None
    found = translation(law.family, {seat.path: torch.zeros(())})
    return None if found is None else Closed(seat, found.links[seat.path], None)


def _stands_alone(graph: Graph, argument: object, name: str) -> bool:
    """Whether an argument is the param itself, or an element of it looked up."""
    while isinstance(argument, Ref):
        node = graph.nodes[argument.id]
        if node.op == "variable":
            return node.name == name
        if node.op not in _COPIES:
            return False
        argument = node.args[0]
    return False


def _link(model: Model, seat: Seat, v: Variable) -> Link | None:
    params = model.start
    if seat.part == "channel":
        outcome = model.outcomes[seat.at]
        if outcome.kind == "additive":
            found = translation(outcome.family, outcome.leaves(0.0, params))
            links = {} if found is None else found.links
        else:
            links = LINKS.get(outcome.kind, {})
        rule: Rule = outcome.rule(params, None)
    else:
        block = model.blocks[seat.at]
        if block.is_gated and (not block.has_activity or seat.path == "probs"):
            return None
        found = translation(block.family, block.leaves(params))
        links = {} if found is None else found.links
        rule = block.base(params)
    link = links.get(seat.path)
    inner = rule.rule if isinstance(rule, Seen) else rule
    if link is None or link.name not in inner.learnable:
        return None
    return link if bool(v.event_shape) == bool(inner.trailing) or not v.event_shape else None


def _index(model: Model, seat: Seat, v: Variable) -> Tensor | None:
    """Which entry of a param each element reads, found by looking up positions in the place of values."""
    start = model.start[v.name]
    positions = torch.arange(start.numel()).to(start).reshape(start.shape)
    params = {**model.start, v.name: positions}
    part = model.blocks[seat.at] if seat.part == "prior" else model.outcomes[seat.at]
    leaves = part.leaves(params) if isinstance(part, Block) else part.leaves(0.0, params)
    found = leaves[seat.path]
    if isinstance(part, Block) and part.is_gated:
        found = found[..., 0]
    rest = found.shape[-1] if found.ndim > 3 else 1
    if start.numel() == rest:
        return None
    found = found[..., 0] / rest if found.ndim > 3 else found
    return found.expand(1, part.frame.repeats, part.frame.count).round().long().flatten()


# ---- gradients ---------------------------------------------------------------------------------


def _ascended(
    learner: Learner, params: dict[str, Tensor], ascent: Mapping[str, Ascent], at: Pseudo
) -> tuple[dict[str, Tensor], dict[str, Ascent]]:
    """A step uphill for every param without a closed update, its length by the signs of its gradients."""
    with torch.enable_grad():
        free = {
            n: _free(learner, n, params[n]).detach().requires_grad_() for n in learner.ascending
        }
        live = {**params, **{n: _bound(learner, n, x) for n, x in free.items()}}
        total = objective(learner, live, at)
        grads = torch.autograd.grad(total.sum(), list(free.values()), allow_unused=True)
        tried, memory = dict(params), {}
        for (name, x), grad in zip(free.items(), grads, strict=True):
            memory[name], moved = _climbed(ascent[name], x.detach(), grad)
            tried[name] = _bound(learner, name, moved)
        with torch.no_grad():
            better = objective(learner, tried, at) >= total - _SLACK * total.abs()
    return _kept(learner.ascending, params, tried, memory, better)


def _climbed(before: Ascent, free: Tensor, grad: Tensor | None) -> tuple[Ascent, Tensor]:
    """A longer step where the sign of the gradient stays, a shorter one where it turns."""
    known = torch.zeros_like(free) if grad is None else grad.nan_to_num(0.0, 0.0, 0.0)
    agree = known * before.gradient
    factor = torch.where(agree > 0, _GROW, torch.where(agree < 0, _SHRINK, 1.0))
    size = torch.minimum(before.size * factor, _LARGEST * free.abs().clamp(min=1.0))
    return Ascent(known, size), free + size * known.sign()


def _kept(
    names: Sequence[str],
    params: dict[str, Tensor],
    tried: Mapping[str, Tensor],
    memory: dict[str, Ascent],
    better: Tensor,
) -> tuple[dict[str, Tensor], dict[str, Ascent]]:
    """The restarts ``[R]`` that went up move; the others (also those that fell off an edge) try half the step."""
    for name in names:
        up = better.reshape(-1, *(1,) * (params[name].ndim - 1))
        params[name] = torch.where(up, tried[name], params[name])
        gradient, size = memory[name]
        up = better.reshape(-1, *(1,) * (size.ndim - 1))
        memory[name] = Ascent(gradient, torch.where(up, size, _SHRINK * size))
    return params, memory


def objective(learner: Learner, params: Params, at: Pseudo) -> Tensor:
    """Summed log normalisers ``[R]`` of every rule that reads a param without a closed update."""
    model, names = learner.model, set(learner.ascending)
    seats = {(s.part, s.at) for n in names for s in learner.seats[n]}
    total = next(iter(params.values())).new_zeros(())
    for i, (block, (r, vr)) in enumerate(zip(model.blocks, at.blocks, strict=True)):
        if ("prior", i) in seats and not block.is_gated:
            total = total + block.rule(params, None).moments(r, vr).log_z.expand_as(r).sum((1, 2))
    reads_gates = any(
        part == "gate" or (part == "prior" and model.blocks[i].is_gated) for part, i in seats
    )
    if model.structure is not None and reads_gates:
        evidence = model.evidence(params, at.blocks)
        total = total + gates.log_evidence(model.structure, params, evidence)
    shifted = bool(names & set(model.offset.names))
    offsets = model.offset(params)
    for i, (outcome, (p, vp)) in enumerate(zip(model.outcomes, at.sites, strict=True)):
        if ("channel", i) in seats or shifted:
            rule = outcome.rule(params, offsets[i])
            total = total + rule.moments(p, vp).log_z.expand_as(p).sum((1, 2))
    return total


def _is_plain(learner: Learner, name: str) -> bool:
    return "real" in str(learner.model.linear.graph.variables[name].support).lower()


def _free(learner: Learner, name: str, value: Tensor) -> Tensor:
    return biject_to(learner.model.linear.graph.variables[name].support).inv(value)


def _bound(learner: Learner, name: str, free: Tensor) -> Tensor:
    return biject_to(learner.model.linear.graph.variables[name].support)(free)
