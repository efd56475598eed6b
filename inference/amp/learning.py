"""EM for the params of a model: closed updates where a rule has them, the gradient of the log normalisers elsewhere.

A param that stands alone as one parameter of one law is learned by that rule's statistics, averaged over whatever
shares it: everything, or the elements of one plate. Any other use (a cut point inside an expression, an intercept,
the transition of a chain, a scale in two laws) follows the gradient of the summed log normalisers, which by Fisher's
identity is the gradient of EM's expected log-density, with step sizes of its own for every number.

Sources: [Vila2013]; step sizes by the sign of the gradient [Riedmiller1993].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import biject_to

from ppl.graph import refs
from ppl.inference.amp import structure as gates
from ppl.inference.amp.coefficients import Params
from ppl.inference.amp.options import AMP
from ppl.inference.amp.outcomes import Seen
from ppl.inference.amp.rules.record import Rule
from ppl.inference.amp.seats import Closed, Model, Seat, all_seats, closed_update
from ppl.passes import upstream

_GROW, _SHRINK, _START, _LARGEST = 1.2, 0.5, 0.05, 0.5  # of the steps along gradients
_SLACK = 1e-12  # share of the objective that rounding may take


class Ascent(NamedTuple):
    """Memory of a param that follows a gradient; every field of its shape ``[R, ...]``."""

    gradient: Tensor
    size: Tensor  # longest step
    step: Tensor  # the last one, 0 if it was taken back


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

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All params that are learned."""
        return (*self.closed, *self.ascending)

    @cached_property
    def together(self) -> tuple[tuple[str, ...], ...]:
        """Closed updates that one rule makes at once: params of one law, each a single number (or vector)."""
        groups: dict[object, list[str]] = {}
        for name, one in self.closed.items():
            alone = one.entry is not None or one.seat.part == "gate"
            groups.setdefault(name if alone else one.seat[:2], []).append(name)
        return tuple(map(tuple, groups.values()))


def make_learner(model: Model, options: AMP) -> Learner:
    """Sort the params by how they can be learned."""
    graph = model.linear.graph
    seats: dict[str, list[Seat]] = {v.name: [] for v in graph.role("param")}
    for seat in all_seats(model):
        for i in refs(seat.argument):
            for name in upstream(graph, i) & set(seats):
                seats[name].append(seat)
    closed, ascending = {}, []
    for name, found in seats.items():
        if not options.learns(name):
            continue
        one = closed_update(model, graph.variables[name], found) if len(found) == 1 else None
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
        zero = torch.zeros_like(free)
        found[name] = Ascent(zero, _START * free.abs().clamp(min=1.0), zero)
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
) -> tuple[dict[str, Tensor], dict[str, Ascent], Tensor]:
    """One M-step for all params.

    Args:
        learner: what is learned.
        params: now, ``[R, *plates, *event]``.
        ascent: memory of those that follow gradients.
        at: pseudo-observations of the sweep.
        rules: of the sweep.
        tables: marginals of the gates ``[R, *plates, V]``.

    Returns:
        New params and memory, and the largest relative change of a param.
    """
    new, memory, seen = dict(params), {}, {}  # type: ignore[var-annotated]
    for names in learner.together:
        ones = {n: learner.closed[n] for n in names}
        new |= _closed_updates(learner.model, ones, params, at, rules, tables, seen)
    if learner.ascending:
        new, memory = _ascended(learner, new, ascent, at)
    new, moved = _compared(learner.names, params, new)
    return new, memory, moved


def _compared(
    names: Sequence[str], old: Params, new: dict[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """New numbers where they are finite, and their largest relative change; all params as one vector."""
    sizes = [math.prod(old[n].shape[1:]) for n in names]
    before = torch.cat([old[n].reshape(-1, k) for n, k in zip(names, sizes, strict=True)], 1)
    after = torch.cat([new[n].reshape(-1, k) for n, k in zip(names, sizes, strict=True)], 1)
    step = (after - before).abs()
    is_finite = step < torch.inf
    moved = torch.where(is_finite, step / (before.abs() + 1e-8), 0.0).amax()
    parts = torch.where(is_finite, after, before).split(sizes, 1)
    found = {n: x.reshape(old[n].shape) for n, x in zip(names, parts, strict=True)}
    return {**new, **found}, moved


# ---- closed updates ----------------------------------------------------------------------------


def _closed_updates(
    model: Model,
    ones: Mapping[str, Closed],
    params: Params,
    at: Pseudo,
    rules: Rules,
    tables: Mapping[str, Tensor],
    seen: dict[int, Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """Params of one law; ``seen`` keeps the statistics of a block for those that are pooled another way."""
    name, one = next(iter(ones.items()))
    part, place = one.seat.part, one.seat.at
    if part == "gate":
        return {name: _gate_update(model, one, tables, params[name])}
    if part == "prior":
        rule, (r, vr) = rules.priors[place], at.blocks[place]
        if place not in seen:
            seen[place] = rule.statistics(r, vr)
        return _updated(rule, ones, r.shape, seen[place], None, params)
    rule, (p, vp), keep = rules.channels[place], at.sites[place], None
    if isinstance(rule, Seen):
        p, keep, rule = p + rule.offset, rule.keep, rule.rule
    found = _updated(rule, ones, p.shape, rule.statistics(p, vp), keep, params)
    least = model.outcomes[place].least_scale
    noises = [n for n, each in ones.items() if each.link.name == "variance"]
    return found | {n: found[n].maximum(least) for n in noises}


def _updated(
    rule: Rule,
    ones: Mapping[str, Closed],
    shape: torch.Size,
    statistics: Mapping[str, Tensor],
    keep: Tensor | None,
    params: Params,
) -> dict[str, Tensor]:
    """Params after one closed update of their rule, from statistics of elements ``[R, B, k]``.

    They are pooled alike: several of them only where each is a single number or vector.
    """
    name, one = next(iter(ones.items()))
    size = params[name][0].numel() // _rest(rule, params[name])
    pooled = {k: _pooled(v, shape, one.entry, size, keep) for k, v in statistics.items()}
    better = rule.maximised(pooled, {each.link.name for each in ones.values()})
    found = {}
    for name, each in ones.items():
        value, old = each.link.back(_attribute(better, each.link.name)), params[name]
        if each.entry is None:
            found[name] = value.reshape(value.shape[0], -1)[:, : old[0].numel()].reshape(old.shape)
        else:
            rest = value.shape[len(shape) :]
            flat = value.expand(*shape, *rest).reshape(shape[0], -1, *rest)
            whole = old.reshape(old.shape[0], size, *rest)
            found[name] = whole.index_copy(1, each.entry, flat).reshape(old.shape)
    return found


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
        x = x if x.shape == shape else x.expand(*shape, *rest)
        return x.mean((1, 2), keepdim=True)
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
    """A secant step for every number by itself, where two gradients show that it climbs a hill.

    It is no longer than a size that grows where the sign of the gradient stays and shrinks where it turns; elsewhere
    that size is the step.
    """
    known = torch.zeros_like(free) if grad is None else grad.nan_to_num(0.0, 0.0, 0.0)
    agree = known * before.gradient
    factor = torch.where(agree > 0, _GROW, torch.where(agree < 0, _SHRINK, 1.0))
    size = torch.minimum(before.size * factor, _LARGEST * free.abs().clamp(min=1.0))
    change = known - before.gradient
    secant = -known * before.step / change
    step = torch.where(change * before.step < 0, secant.clamp(-size, size), size * known.sign())
    return Ascent(known, size, step), free + step


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
        gradient, size, step = memory[name]
        up = better.reshape(-1, *(1,) * (size.ndim - 1))
        memory[name] = Ascent(
            gradient, torch.where(up, size, _SHRINK * size), torch.where(up, step, 0.0)
        )
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
