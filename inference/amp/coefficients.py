"""The mixed latents as rules: one block each, with the gates of its law in place of a number where it has some.

A block builds its prior from the params of the run (every tensor ``[R, ...]``, ``R`` restarts), and, where gates
stand above it, says how much each joint value of them explains of every element.

Source: [Schniter2010] for the exchange with gates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.distributions import Distribution, Leaf, SpikeSlab
from ppl.inference.amp import laws
from ppl.inference.amp.mixing import LEAD, Frame, fixed, frame
from ppl.inference.amp.recognise import Linear, Mixed
from ppl.inference.amp.rules.priors import BernoulliGaussian, Sparse
from ppl.inference.amp.rules.record import Moments, Rule, bounded, log_normal
from ppl.inference.amp.structure import Elements, Gated
from ppl.lower import Compiler, Lowered

Params = Mapping[str, Tensor]  # [R, *plates, *event]


@dataclass(frozen=True)
class InUnits(Rule):
    """The prior of ``unit * x`` for the prior of ``x``."""

    rule: Rule
    unit: float

    def moments(self, r: Tensor, vr: Tensor) -> Moments:
        return self._answer(self.rule.moments(r / self.unit, vr / self.unit**2))

    def mode(self, r: Tensor, vr: Tensor) -> Moments:
        return self._answer(self.rule.mode(r / self.unit, vr / self.unit**2))

    def log_prob(self, x: Tensor) -> Tensor:
        return self.rule.log_prob(x / self.unit) - math.log(self.unit)

    def _answer(self, found: Moments) -> Moments:
        scaled = (self.unit * found.mean, self.unit**2 * found.variance)
        return Moments(*scaled, found.log_z - math.log(self.unit))


@dataclass(frozen=True, eq=False)
class Block:
    """One mixed latent."""

    mixed: Mixed
    frame: Frame
    family: Distribution
    lowered: Lowered  # leaves of the law, gates as trailing axes
    elements: Elements | None  # of a latent under gates

    @cached_property
    def parts(self) -> tuple[Leaf, ...]:
        """The parameters of the law."""
        return self.family.leaves()

    @property
    def is_gated(self) -> bool:
        """Whether gates stand above the latent."""
        return self.elements is not None

    def leaves(self, params: Params) -> dict[str, Tensor]:
        """Parameters of the law ``[R | 1, B | 1, n | 1, *rest]``; under gates ``[..., V | 1]`` more."""
        return self._leaves(params) if self.lowered.inputs else self._settled_leaves

    @cached_property
    def _settled_leaves(self) -> dict[str, Tensor]:
        """Those of a law that reads no param."""
        return self._leaves({})

    def _leaves(self, params: Params) -> dict[str, Tensor]:
        values = self.lowered({k: params[k] for k in self.lowered.inputs})
        gates = len(self.elements.parents) if self.elements else 0
        found = {}
        for leaf, value in zip(self.parts, values, strict=True):
            # A number of a vector-valued law stands for all entries of its vector.
            shared = max(self.family.event_dim - leaf.event_dim, 0)
            own = len(self.frame.event) - self.family.event_dim + leaf.event_dim
            rank = 1 + len(self.frame.plates) + gates + own
            value = value[(None,) * (rank - value.ndim)]
            value = value.reshape(*value.shape, *(1,) * shared)
            first = 1 + len(self.frame.plates)
            at = list(range(first, first + gates))
            value = value.movedim(at, list(range(rank - gates, rank)))
            trailing = leaf.event_dim if not self.family.event_dim else 0
            flat = self.frame.flat(value, trailing + gates)
            found[leaf.path] = self._joined(flat, gates)
        return found

    def _joined(self, leaf: Tensor, gates: int) -> Tensor:
        """The axes of the gates as one, left at one where the leaf does not vary over any."""
        if not gates or self.elements is None:
            return leaf
        shape = leaf.shape[leaf.ndim - gates :]
        if all(s == 1 for s in shape):
            return leaf.flatten(-gates)
        whole = leaf.expand(*leaf.shape[: leaf.ndim - gates], *self.elements.values)
        return whole.flatten(-gates)

    def base(self, params: Params) -> Rule:
        """The rule without gates; of a gated spike and slab, the rule that waits for its activity."""
        if not self.is_gated:
            return self._plain(self.leaves(params)) if self.lowered.inputs else self._settled
        leaves = self.leaves(params)
        single = {k: v[..., 0] for k, v in leaves.items()}
        if self.mixed.gate:
            mean, scale = single["loc"], single["scale"]
            return BernoulliGaussian(torch.zeros_like(mean), mean, scale.square())
        return laws.prior(self.family, single | {"probs": torch.full_like(single["probs"], 0.5)})

    def _plain(self, leaves: Mapping[str, Tensor]) -> Rule:
        if laws.is_lasting(self.family):
            known = self._translation
            return known.rule(leaves) if known else laws.quadrature(self.family, leaves)
        return laws.prior(self.family, leaves)

    @cached_property
    def _settled(self) -> Rule:
        """The rule of a law without params or gates."""
        return self._plain(self._settled_leaves)

    @cached_property
    def _translation(self) -> laws.Translation | None:
        """How the law is a closed rule, whatever the values of its parameters."""
        return laws.translation(self.family, dict.fromkeys(x.path for x in self.parts))

    @property
    def has_activity(self) -> bool:
        """Whether the gates only decide how probable the slab is, so that one rule serves all their values."""
        return bool(self.mixed.gate) or isinstance(self.family, SpikeSlab)

    def activities(self, params: Params) -> Tensor | None:
        """Probability of the slab for every joint value of the gates ``[R | 1, B | 1, n | 1, V]``."""
        if self.elements is None:
            return None
        if self.mixed.gate:
            at = self.elements.parents.index(self.mixed.gate)
            like = next(iter(self.lowered({k: params[k] for k in self.lowered.inputs})))
            values = torch.arange(self.elements.values[at], dtype=like.dtype, device=like.device)
            shape = [-1 if i == at else 1 for i in range(len(self.elements.values))]
            return values.reshape(shape).expand(self.elements.values).flatten()[None, None, None]
        leaves = self.leaves(params)
        others = [v for k, v in leaves.items() if k != "probs"]
        if not isinstance(self.family, SpikeSlab) or any(v.shape[-1] > 1 for v in others):
            return None
        return leaves["probs"]

    def rule(self, params: Params, cavity: Tensor | None) -> Rule:
        """The prior of the next sweep; ``cavity [R, B, n, V]`` are log-weights of the gates' values."""
        if self.elements is None or cavity is None:
            return self.base(params)
        activity = self.activities(params)
        if activity is None:
            return Gated(tuple(self.cases(params)), cavity)
        base = self.base(params)
        assert isinstance(base, Sparse)
        on = (cavity + activity.log()).logsumexp(-1)
        off = (cavity + torch.log1p(-activity)).logsumexp(-1)
        return base.with_activity((on - off).clamp(-60.0, 60.0))

    def evidence(self, params: Params, r: Tensor, vr: Tensor) -> Tensor:
        """Log normaliser of every element under each joint value of its gates ``[R, B, n, V]``."""
        assert self.elements is not None
        activity = self.activities(params)
        if activity is None:
            parts = [rule.moments(r, vr).log_z.expand_as(r) for rule in self.cases(params)]
            return torch.stack(parts, -1)
        base = self.base(params)
        assert isinstance(base, Sparse)
        odds = base.log_odds(r, vr).expand_as(r).unsqueeze(-1)
        log_on, log_off = activity.log(), torch.log1p(-activity)
        both = torch.logaddexp(log_off.expand(*odds.shape[:-1], -1), log_on + odds)
        return both + log_normal(r, bounded(vr)).unsqueeze(-1)

    def cases(self, params: Params) -> list[Rule]:
        """The law as a rule under each joint value of the gates."""
        assert self.elements is not None
        leaves = self.leaves(params)
        found = []
        for v in range(self.elements.combinations):
            case = {k: x[..., min(v, x.shape[-1] - 1)] for k, x in leaves.items()}
            found.append(laws.prior(self.family, case))
        return found


def make_block(bound: Bound, linear: Linear, mixed: Mixed, elements: Elements | None) -> Block:
    """Lower the law of one mixed latent."""
    graph = linear.graph
    v, law = graph.variables[mixed.latent], graph.factors[mixed.latent].law
    assert law is not None
    axes = {x.name: (LEAD, *x.plates) for x in graph.role("latent", "param")}
    axes |= {x.name: x.plates for x in graph.role("given", "observed")}
    particles = tuple(f"k:{g}" for g in (elements.parents if elements else ()))
    axes |= {g: (f"k:{g}",) for g in (elements.parents if elements else ())}
    order = (LEAD, *graph.plates, *particles)
    c = Compiler(graph, axes, order, dtype=bound.dtype, device=bound.device)
    event = len(v.event_shape) - law.family.event_dim
    outputs = []
    for leaf, argument in zip(law.family.leaves(), law.arguments, strict=True):
        operand = c.operand(argument)
        rank = max(event + leaf.event_dim, operand.event_ndim)
        outputs.append(c.align(operand, (LEAD, *v.plates, *particles), rank))
    lowered = fixed(c.finish(outputs), bound)
    support = {
        g: torch.arange(k, dtype=bound.dtype, device=bound.device)
        for g, k in zip(elements.parents, elements.values, strict=True)
    } if elements else {}  # fmt: skip
    lowered = lowered.given({k: x for k, x in support.items() if k in lowered.inputs})
    return Block(
        mixed,
        frame(bound, graph.variables[mixed.name], linear.batch),
        law.family,
        lowered,
        elements,
    )
