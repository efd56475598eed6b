"""Where the params of a model stand, and which of them a rule learns in closed form.

Source: [Vila2013] for the updates that exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ppl.distributions import Bernoulli
from ppl.graph import Factor, Graph, Law, Ref, Variable
from ppl.inference.amp.coefficients import Block, Params
from ppl.inference.amp.laws import Link, translation
from ppl.inference.amp.mixing import Offset
from ppl.inference.amp.outcomes import LINKS, Outcome, Seen
from ppl.inference.amp.recognise import Linear
from ppl.inference.amp.rules.record import Rule
from ppl.inference.amp.structure import Structure

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


def all_seats(model: Model) -> Iterator[Seat]:
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


def closed_update(model: Model, v: Variable, seats: Sequence[Seat]) -> Closed | None:
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
