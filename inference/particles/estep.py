"""The E-step: draw particles of every block, evaluate all log-densities at them, weigh all combinations.

Source: [Bowyer2023]: weights are the gradient of log Z by log-factors that are zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.inference.contract import LogFactor
from ppl.inference.particles import proposals
from ppl.inference.particles.approximation import Approximation, param_value
from ppl.inference.particles.blocks import Block
from ppl.inference.particles.problem import Problem
from ppl.inference.particles.proposals import Particles
from ppl.inference.particles.weighting import Weighting, evaluate, evaluate_part, values_of
from ppl.streams import Streams


class Weights(NamedTuple):
    """Result of an E-step."""

    log_z: Tensor  # [*restart]
    marginals: dict[str, Tensor]  # particle axis -> [*restart, *plates, K]


def draw_all(
    weighting: Weighting, q: Approximation, streams: Streams, tails: float = math.inf
) -> dict[str, Particles]:
    """Particles of every sampled block."""
    return {
        b.axis: proposals.draw(b, q.proposals[b.axis], weighting.sizes[b.axis], streams, tails)
        for b in weighting.blocks
        if not b.enumerated
    }


def all_arrays(
    problem: Problem, weighting: Weighting, particles: Mapping[str, Particles], q: Approximation
) -> dict[str, Tensor]:
    """Inputs of the lowered factors: particles, values of enumerated latents, params."""
    arrays: dict[str, Tensor] = {}
    for block in weighting.blocks:
        if block.enumerated:
            arrays[block.members[0].name] = torch.arange(
                values_of(block), dtype=problem.bound.dtype, device=problem.bound.device
            )
        else:
            arrays |= particles[block.axis].values
    for name, learned in q.params.items():
        arrays[name] = param_value(problem.bound.graph.variables[name], learned.free)
    return arrays


class Evaluated(NamedTuple):
    """Log-densities and proposals at one set of particles, ready to be weighed: a list, or a maker of parts."""

    weighting: Weighting
    arrays: Mapping[str, Tensor]
    particles: Mapping[str, Particles]
    densities: list[LogFactor] | None  # None when a plate is processed in parts

    def factors(self, bridge: float = 1.0) -> list[LogFactor] | Callable[..., LogFactor]:
        """Factors of the contraction with log-weights scaled by ``bridge``."""
        proposed = proposal_terms(self.weighting, self.particles, bridge)
        if self.densities is not None:
            terms = (
                self.densities
                if bridge == 1.0
                else [f._replace(log=bridge * f.log) for f in self.densities]
            )
            return terms + proposed
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


def evaluated(
    problem: Problem, weighting: Weighting, particles: Mapping[str, Particles], q: Approximation
) -> Evaluated:
    """Evaluate every log-density, unless the plan wants them in parts."""
    arrays = all_arrays(problem, weighting, particles, q)
    whole = None if weighting.plan.split else evaluate(weighting, arrays)
    return Evaluated(weighting, arrays, particles, whole)


def weigh(at: Evaluated, bridge: float = 1.0, last: bool = False) -> Weights:
    """Sum over all combinations of particles; ``bridge`` < 1 targets ``q^(1 - b) p^b``.

    ``last`` says that the log-densities are not needed again, which saves the memory of a copy.
    """
    large = (
        last
        and at.densities is not None
        and max((f.log.numel() for f in at.densities), default=0) > 1 << 20
    )
    log_z, marginals = at.weighting.plan.marginals(at.factors(bridge), overwrite=large)
    return Weights(log_z, {axis: w for axis, w in marginals.items() if isinstance(axis, str)})


def proposal_terms(
    weighting: Weighting, particles: Mapping[str, Particles], bridge: float = 1.0
) -> list[LogFactor]:
    """Each sampled block's ``-log q - log K``."""
    sampled = [b for b in weighting.blocks if not b.enumerated]
    done = len(weighting.terms) - len(sampled)
    terms = []
    for term, block in zip(weighting.terms[done:], sampled, strict=True):
        log = -bridge * particles[block.axis].log_q - math.log(weighting.sizes[block.axis])
        order = [*range(len(weighting.lead)), *_plate_order(weighting, block), log.ndim - 1]
        terms.append(LogFactor(term.axes, log.permute(order)))
    return terms


def _plate_order(weighting: Weighting, block: Block) -> list[int]:
    """Positions of the block's plates in the order of the graph."""
    start = len(weighting.lead)
    return [
        start + block.plates.index(p) for p in weighting.bound.graph.plates if p in block.plates
    ]
