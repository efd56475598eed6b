"""The E-step: draw particles of every block, evaluate all log-densities at them, weigh all combinations.

Source: [Bowyer2023]: weights are the gradient of log Z by log-factors that are zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.inference.contract import LogFactor
from ppl.inference.logspace import sum_of_few
from ppl.inference.particles import conditional, nested
from ppl.inference.particles.approximation import Approximation, param_value
from ppl.inference.particles.forms import Prior
from ppl.inference.particles.parents import Others
from ppl.inference.particles.problem import Problem
from ppl.inference.particles.proposals import Particles
from ppl.inference.particles.shards import PartDraws
from ppl.inference.particles.weighting import Weighting, evaluate, evaluate_part, values_of
from ppl.streams import Streams


@dataclass(frozen=True, eq=False)
class Weights:
    """Result of an E-step."""

    log_z: Tensor  # [*restart]
    marginals: dict[str, Tensor]  # particle axis -> [*restart, *plates, K]
    # Of pairs that proposals learn from, [..., K, K'].
    joint: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _sizes: dict[str, float] = field(default_factory=dict, repr=False)

    def effective(self, axis: str) -> float:
        """Effective number of a block's particles, median over its elements; NaN where a weight is not finite."""
        if axis not in self._sizes:
            each = sum_of_few(self.marginals[axis].square(), -1).reciprocal_()
            typical = float(each.median())
            # Zero and NaN are what weights leave that are not finite.
            fine = typical > 0 if each.ndim == 0 else float(each.min()) > 0
            self._sizes[axis] = typical if fine else math.nan
        return self._sizes[axis]


def draw_all(
    weighting: Weighting, q: Approximation, streams: Streams, tails: float = math.inf
) -> dict[str, Particles]:
    """Particles of every sampled block, those that a proposal is given before it."""
    drawn: dict[str, Particles] = {}
    arrays = _fixed_arrays(weighting, q)
    for b in weighting.draw_order:
        if not b.enumerated:
            others = Others(weighting, drawn, arrays)
            state, k = q.proposals[b.axis], weighting.sizes[b.axis]
            drawn[b.axis] = conditional.draw(others, b, state, k, streams, tails)
            arrays |= drawn[b.axis].values
    return drawn


def draw_in_parts(
    weighting: Weighting, q: Approximation, streams: Streams, tails: float = math.inf
) -> Mapping[str, Particles]:
    """Like :func:`draw_all`, but drawn part by part when they are needed where the plan splits a plate."""
    if not draws_in_parts(weighting):
        return draw_all(weighting, q, streams, tails)
    first = weighting.share.first if weighting.share else 0
    return PartDraws(weighting, q, streams, tails, draw_all, first)


def draws_in_parts(weighting: Weighting) -> bool:
    """Whether the plan splits a plate, and the particles can be drawn part by part.

    A form that reads other blocks' particles averages over pairs of them, which takes them whole.
    """
    plate = weighting.plan.split
    return plate is not None and not any(b.form or b.tied for b in weighting.blocks)


def all_arrays(
    problem: Problem, weighting: Weighting, particles: Mapping[str, Particles], q: Approximation
) -> dict[str, Tensor]:
    """Inputs of the lowered factors: particles, values of enumerated latents, params."""
    arrays = _fixed_arrays(weighting, q)
    for block in weighting.blocks:
        if not block.enumerated and block.axis in particles:
            values, at = particles[block.axis].values, len(weighting.lead) + len(block.plates)
            arrays |= {n: nested.apart(weighting, block, v, at) for n, v in values.items()}
    return arrays


def _fixed_arrays(weighting: Weighting, q: Approximation) -> dict[str, Tensor]:
    bound = weighting.bound
    arrays = {
        b.members[0].name: torch.arange(values_of(b), dtype=bound.dtype, device=bound.device)
        for b in weighting.blocks
        if b.enumerated
    }
    for name, learned in q.params.items():
        arrays[name] = param_value(bound.graph.variables[name], learned.free)
    return arrays


class Evaluated(NamedTuple):
    """Log-densities and proposals at one set of particles, ready to be weighed: a list, or a maker of parts."""

    weighting: Weighting
    arrays: Mapping[str, Tensor]
    particles: Mapping[str, Particles]
    densities: list[LogFactor] | None  # None when a plate is processed in parts

    def factors(
        self, bridge: float = 1.0, inner: float | None = None
    ) -> list[LogFactor] | Callable[..., LogFactor]:
        """Factors of the contraction with log-weights scaled by ``bridge``, within plates by ``inner`` where it is given."""
        if isinstance(self.particles, PartDraws):
            return self._in_parts(self.particles, bridge)
        if self.densities is not None:
            return self._whole(bridge, bridge if inner is None else inner)
        proposed = proposal_terms(self.weighting, self.particles, bridge)
        count = len(self.weighting.terms) - len(proposed)

        def part(i: int, rows: Mapping[str, Tensor] | None = None) -> LogFactor:
            if i < count:
                made = evaluate_part(self.weighting, self.arrays, i, rows)
                return made._replace(log=bridge * made.log)
            axes, log = proposed[i - count]
            for at, axis in enumerate(axes):
                if rows and axis in rows:
                    log = log.index_select(at, rows[axis].to(log.device))
            return LogFactor(axes, log)

        return part

    def _whole(self, bridge: float, inner: float) -> list[LogFactor]:
        assert self.densities is not None
        terms = self.weighting.terms
        scales = [inner if w else bridge for w in self.weighting.lies_within]
        count = len(self.densities)
        made = [
            f if s == 1.0 else f._replace(log=s * f.log)
            for f, s in zip(self.densities, scales[:count], strict=True)
        ]
        return made + [
            proposal_term(self.weighting, i, self.particles, scales[i])
            for i in range(count, len(terms))
        ]

    def _in_parts(self, draws: PartDraws, bridge: float) -> Callable[..., LogFactor]:
        """A maker of factors whose particles are drawn for the rows that it is asked for."""
        weighting = self.weighting
        count = sum(1 for t in weighting.terms if t.name not in weighting.sizes)

        def part(i: int, rows: Mapping[str, Tensor] | None = None) -> LogFactor:
            here = draws if rows is None else draws.of_part(rows)
            if i >= count:
                return proposal_term(weighting, i, here, bridge)
            own = {n: v for a in here for n, v in here[a].values.items()}
            made = evaluate_part(weighting, {**self.arrays, **own}, i, rows, frozenset(own))
            return made._replace(log=bridge * made.log)

        return part


def evaluated(
    problem: Problem, weighting: Weighting, particles: Mapping[str, Particles], q: Approximation
) -> Evaluated:
    """Evaluate every log-density, unless the plan wants them in parts."""
    arrays = all_arrays(problem, weighting, particles, q)
    whole = None if weighting.plan.split else evaluate(weighting, arrays)
    return Evaluated(weighting, arrays, particles, whole)


def weigh(
    at: Evaluated,
    bridge: float = 1.0,
    last: bool = False,
    pairs: Sequence[tuple[str, str]] | None = None,
    inner: float | None = None,
    enumerated: bool = True,
) -> Weights:
    """Sum over all combinations of particles; ``bridge`` < 1 targets ``q^(1 - b) p^b``.

    With ``inner``, that is the exponent of the weights within plates, and ``bridge`` the exponent of what they sum up to for the
    blocks outside: where plates need no tempering, what they say of the rest is not distorted by it.

    ``last`` says that the log-densities are not needed again, which saves the memory of a copy. ``pairs`` are the blocks whose
    joint weights are wanted; None for those that proposals learn from. ``enumerated=False`` leaves out the weights of
    enumerated latents where no proposal learns from them.
    """
    blocks = at.weighting.blocks
    given = {n for b in blocks for n in b.reads if not isinstance(b.form, Prior)}
    needed = enumerated or any(b.enumerated and given & set(b.names) for b in blocks)
    only = None if needed else frozenset(b.axis for b in blocks if not b.enumerated)
    wanted = conditional.needed_pairs(at.weighting.blocks) if pairs is None else tuple(pairs)
    own = nested.pairs(blocks)
    wanted = tuple(dict.fromkeys((*wanted, *own)))
    large = (
        last
        and at.densities is not None
        and max((f.log.numel() for f in at.densities), default=0) > 1 << 20
    )
    log_z, found = at.weighting.plan.marginals(
        at.factors(bridge, inner),
        wanted,
        overwrite=large,
        power=bridge / (inner or bridge),
        only=only,
    )
    singles = {axis: w for axis, w in found.items() if isinstance(axis, str)}
    joint = {a: w for a, w in found.items() if not isinstance(a, str)}
    singles |= {pair[1]: joint[pair].flatten(-2) for pair in own}
    return Weights(log_z, singles, joint)


def proposal_terms(
    weighting: Weighting, particles: Mapping[str, Particles], bridge: float = 1.0
) -> list[LogFactor]:
    """Each sampled block's ``-log q - log K``."""
    sampled = sum(1 for b in weighting.blocks if not b.enumerated)
    done = len(weighting.terms) - sampled
    return [
        proposal_term(weighting, i, particles, bridge) for i in range(done, len(weighting.terms))
    ]


def proposal_term(
    weighting: Weighting, i: int, particles: Mapping[str, Particles], bridge: float = 1.0
) -> LogFactor:
    """Term ``i`` of the weighting, a sampled block's ``-log q - log K``."""
    term = weighting.terms[i]
    log_q = particles[term.name].log_q
    shift = -math.log(weighting.sizes[term.name])
    log = torch.rsub(log_q if bridge == 1.0 else bridge * log_q, shift)
    order = weighting.plate_orders[term.name]
    log = log if order is None else log.permute(order)
    block = next(b for b in weighting.blocks if b.axis == term.name)
    return LogFactor(term.axes, nested.apart(weighting, block, log, log.ndim - 1))
