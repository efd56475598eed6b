"""One update of the sets of a run: look at gradients of all weights, choose, and carry values to their new places.

Source: [Li2024] algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl.batches import Batch
from ppl.errors import NumericalError
from ppl.inference.networks import fit
from ppl.inference.networks import records as networks
from ppl.inference.networks.forward import Wrap, leaves, values_of
from ppl.inference.networks.noise import generator_of
from ppl.inference.networks.structure import ProductNode
from ppl.inference.ssvi import growth, moves, scores, sets
from ppl.inference.ssvi.growth import Score, Seen
from ppl.inference.ssvi.moves import Moving
from ppl.inference.ssvi.records import Layer, Problem, form_of
from ppl.inference.ssvi.schedule import is_last, share
from ppl.inference.ssvi.scores import REMOVAL, Members
from ppl.inference.ssvi.sets import Change

_TINY = 1e-6


class Observed(NamedTuple):
    """What an evaluation saw: of each array, in every batch, all of its uses."""

    loss: float  # mean over data and batches
    of_array: Mapping[int, list[list[Seen]]]
    at: Mapping[int, Tensor]  # the values it was evaluated at, [k], averaged over batches


class Updated(NamedTuple):
    """The state after an update, whose step is counted and moves no value."""

    state: networks.State
    loss: float
    new: float  # share of new members


def update(problem: Problem, state: networks.State, batch: Batch | None) -> Updated:
    """Move the sets of one run.

    Raises:
        NumericalError: a gradient or a score is not finite; the layer is named.
    """
    observed = observe(problem, state, batch)
    layers = [_moving(problem, state, layer, observed) for layer in problem.layers]
    changes = _changes(problem, state.step, layers)
    by_array = {layer.at: c for layer, c in zip(problem.layers, changes, strict=True)}
    total = sum(len(c.indices) for c in changes)
    new = sum(c.new for c in changes) / max(total, 1)
    return Updated(relaid(problem, state, by_array), observed.loss, new)


def _changes(problem: Problem, step: int, layers: Sequence[Moving]) -> list[Change]:
    options, part = problem.options, share(problem.plan, step)
    if options.density == "auto":
        # What is added last has no time left to show what it is worth.
        room = 0 if is_last(problem.plan, step) else math.floor(part * _room(problem, layers))
        return moves.by_evidence(layers, room)
    if options.budgets == "global":
        return moves.across_layers(layers, part)
    return moves.within_layers(layers, part, options.removal == "evidence")


def _room(problem: Problem, layers: Sequence[Moving]) -> int:
    """What a free set grows in proportion to: its size, or that of the start while it is smaller."""
    return max(sum(len(m.indices) for m in layers), sum(y.budget for y in problem.layers))


# ---- gradients of all weights ------------------------------------------------------------------------------------


def observe(problem: Problem, state: networks.State, batch: Batch | None) -> Observed:
    """Inputs of every layer and gradients of the mean loss at its outputs, at weight draws or at the means."""
    found: dict[int, list[list[Seen]]] = {layer.at: [] for layer in problem.layers}
    total, batches = 0.0, _batches(problem, state.step, batch)
    values = {at: torch.zeros(()) for at in found}
    for number, part in enumerate(batches):
        loss, seen, drawn = _observed(problem, state, part, number)
        total += loss / len(batches)
        for at, of_batch in found.items():
            of_batch.append(seen[at])
            values[at] = values[at] + drawn[at] / len(batches)
    return Observed(total, found, values)


def _batches(problem: Problem, step: int, batch: Batch | None) -> list[Batch | None]:
    """This batch and those of the next steps; without batches all data again, at other draws."""
    if problem.batches is None:
        return [batch] * problem.options.batch_count
    following = range(step + 1, step + problem.options.batch_count)
    return [batch, *(problem.batches.at(t) for t in following)]


def _observed(
    problem: Problem, state: networks.State, batch: Batch | None, number: int
) -> tuple[float, dict[int, list[Seen]], list[Tensor]]:
    inner = problem.inner
    seen: list[tuple[ProductNode, Tensor, Tensor]] = []
    with torch.enable_grad():
        made = fit.evaluate(
            inner, state, batch, at=problem.options.at, number=number, wrap=_recorder(seen), augmented=True
        )  # fmt: skip
        loss = -made.log_likelihood / inner.examples
        slopes = torch.autograd.grad(loss, [y for _, _, y in seen])
    found: dict[int, list[Seen]] = {}
    for (node, x, _), g in zip(seen, slopes, strict=True):
        if not bool(g.isfinite().all()):
            raise NumericalError(f"layer '{node.name}': the gradient at its outputs is not finite.")
        found.setdefault(node.weight, []).append(Seen(form_of(node), x.detach(), g))
    return float(loss.detach()), found, [leaf.mean.detach() for leaf in made.draw.arrays]


def _recorder(seen: list[tuple[ProductNode, Tensor, Tensor]]) -> Wrap:
    def wrap(node: ProductNode, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def recorded(x: Tensor, *bias: Tensor) -> Tensor:
            y = run(x, *bias)
            seen.append((node, x, y))
            return y

        return recorded

    return wrap


# ---- scores ------------------------------------------------------------------------------------------------------


def members_of(problem: Problem, state: networks.State, layer: Layer) -> Members:
    """What removal scores look at."""
    inner = problem.inner
    where = networks.slices(inner, state)[layer.at]
    mean, sd = state.mean[where], networks.sds(inner, state)[where]
    prior, values = inner.priors[layer.at], _at_mean(problem, state)
    log_prior = mean.new_zeros(())
    if prior.kind != "joint":
        log_prior = prior.at_zero(values, state.indices[layer.at], len(mean)).to(mean.dtype)
    generator = generator_of(inner, state, problem.options.batch_count + layer.at)
    noise = torch.rand(len(mean), generator=generator, dtype=mean.dtype, device=mean.device)
    return Members(mean, sd, log_prior, noise)


def _at_mean(problem: Problem, state: networks.State) -> dict[str, Any]:
    inner = problem.inner
    none = [None] * len(inner.arrays)
    draw = leaves(inner, state, networks.sds(inner, state), none, ["draw"] * len(none))
    with torch.no_grad():
        return values_of(inner, state, draw)


def _moving(problem: Problem, state: networks.State, layer: Layer, observed: Observed) -> Moving:
    options, members = problem.options, members_of(problem, state, layer)
    is_free = options.density == "auto"
    found = REMOVAL["evidence" if is_free else options.removal](members)
    if bool(found.isnan().any()):
        raise NumericalError(
            f"layer '{layer.name}': a removal score is NaN. Lower the learning rate."
        )
    pull = None
    if options.rejoin == "zero":
        pull = _curvature(problem, state, members) * observed.at[layer.at]
    # Twice the log-odds against a weight are what its evidence has to pay for.
    cost = 2 * _log_odds_against(problem, state, layer) if is_free else 0.0
    score = _growth_score(problem, state, members, cost)
    indices, seen = state.indices[layer.at], observed.of_array[layer.at]
    return Moving(layer.form, layer.groups, indices, found - cost, seen, score, pull)


def _curvature(problem: Problem, state: networks.State, members: Members) -> Tensor:
    """Of the mean loss ``[k]``: what the precision of a Gaussian owes to the data, an example."""
    inner = problem.inner
    examples = inner.examples / networks.temperature(inner.rule, state.step)
    # The Normal that has the prior's density at zero stands for a prior of another form.
    prior = (2 * (members.log_prior + scores.LOG_ROOT_2PI)).exp()
    return ((members.sd.pow(-2) - prior) / examples).clamp(min=0.0)


def _growth_score(problem: Problem, state: networks.State, members: Members, cost: float) -> Score:
    options, inner = problem.options, problem.inner
    if options.density != "auto" and options.addition != "evidence":
        return growth.t_like if options.addition == "t_like" else growth.magnitudes
    examples = inner.examples / networks.temperature(inner.rule, state.step)
    curvature = float(_curvature(problem, state, members).mean())
    prior = float((2 * (members.log_prior.mean() + scores.LOG_ROOT_2PI)).exp())
    return growth.gains(examples, curvature, prior, cost)


def _log_odds_against(problem: Problem, state: networks.State, layer: Layer) -> float:
    known = problem.inner.priors[layer.at].inclusion(_at_mean(problem, state))
    included = problem.options.prior_inclusion if known is None else float(known)
    return math.log1p(-included) - math.log(included)


# ---- values at their new places ----------------------------------------------------------------------------------


def relaid(
    problem: Problem, state: networks.State, changes: Mapping[int, Change]
) -> networks.State:
    """The state with values of the optimiser and of the Gaussians moved along with their weights.

    New weights have mean zero, a fresh scale, and nothing in the optimiser's memory.
    """
    inner = problem.inner
    fresh = {at: fresh_raw(problem, state, at) for at in changes}

    def whole(flat: Tensor) -> Tensor:
        return _relaid(inner, state, changes, flat, {})

    raw = _relaid(inner, state, changes, state.raw, fresh)
    memory = _memory(inner.rule, state.memory, whole)
    indices = tuple(
        changes[at].indices if at in changes else kept for at, kept in enumerate(state.indices)
    )
    return state._replace(
        mean=whole(state.mean), raw=raw, memory=memory, indices=indices, step=state.step + 1
    )


def _memory(
    rule: networks.Rule, memory: tuple[Tensor, ...], moved: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """Memories that have an entry for every weight move; those of params alone stay."""
    return (moved(memory[0]), *memory[1:]) if rule.natural else tuple(map(moved, memory))


def _relaid(
    inner: networks.Problem,
    state: networks.State,
    changes: Mapping[int, Change],
    flat: Tensor,
    fresh: Mapping[int, float],
) -> Tensor:
    parts = list(
        flat.split([*(counts := networks.sizes(inner, state)), flat.numel() - sum(counts)])
    )
    for at, change in changes.items():
        parts[at] = sets.carried(parts[at], change, fresh.get(at, 0.0))
    return torch.cat(parts)


def fresh_raw(problem: Problem, state: networks.State, at: int) -> float:
    """Raw scale of new weights of an array."""
    inner, kind = problem.inner, problem.options.fresh
    raw = state.raw[networks.slices(inner, state)[at]]
    if kind in ("median", "mean"):
        return float(raw.median() if kind == "median" else raw.mean())
    sd = raw.new_tensor(_TINY) if kind == "tiny" else inner.starts[at].sd.mean()
    return float(fit.raw_of(inner, sd, state.step + 1))  # the step that they are first read in


__all__ = ["Observed", "Updated", "fresh_raw", "members_of", "observe", "relaid", "update"]
