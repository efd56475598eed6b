"""One particle index for all blocks, inside plates too: global importance weights, without massive parallelism.

Particles of every block are drawn as always, but particle k of one block meets particle k of the others only. The weights
are those of K joint draws; discrete latents with few values are summed exactly in each of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ppl import marginals as mg
from ppl.backend import Settings
from ppl.binding import Bound
from ppl.diagnostics import Diagnostics, effective_sample_size, tail_index
from ppl.errors import NumericalError, UnsupportedError
from ppl.inference.contract import LogFactor
from ppl.inference.particles import proposals
from ppl.inference.particles.approximation import Approximation, Learned
from ppl.inference.particles.blocks import Block, Member
from ppl.inference.particles.lanes import Lanes, make_lanes
from ppl.inference.particles.proposals import Particles, over_tensors
from ppl.inference.rws.options import RWS
from ppl.inference.rws.raw import Coordinates
from ppl.marginals import Marginal
from ppl.posterior import Evidence, Posterior
from ppl.streams import Streams

_FINAL = 2000  # joint draws of the last weighting


class Weighed(NamedTuple):
    """Particles of a step and what they weigh."""

    log_z: Tensor  # [*restart]
    particles: dict[str, Particles]
    weights: dict[str, Tensor]  # axis -> [*restart, *plates, K]
    params: dict[str, Learned]


@dataclass(frozen=True, eq=False)
class SharedIndex:
    """Joint draws and their weights."""

    bound: Bound
    options: RWS
    settings: Settings
    lanes: Lanes  # restarts times particles
    particles: int

    def weighed(self, coordinates: Sequence[Coordinates], q: Approximation) -> Weighed:
        """Joint draws of every restart, with weights that all blocks share."""
        k = self.particles
        with torch.no_grad():
            drawn, values, log_q = joint_draws(coordinates, q, k, self.settings.streams)
            log_joint = self.lanes.log_joint(values).reshape(log_q.shape)
        log_weights = log_joint - log_q.to(log_joint)  # [R, K]
        w = log_weights.softmax(-1)
        weights = {}
        for at in coordinates:
            shape = drawn[at.block.axis].log_q.shape
            plates = len(shape) - len(at.lead) - 1
            own = w if at.lead else w[0]
            own = own.reshape((*at.lead, *(1,) * plates, k))
            weights[at.block.axis] = own.expand(shape)
        log_z = log_weights.logsumexp(-1) - math.log(k)
        return Weighed(log_z, drawn, weights, q.params)

    def posterior(self, coordinates: Sequence[Coordinates], q: Approximation) -> Posterior:
        """A last weighting with more joint draws."""
        n = self.options.final_particles or _FINAL
        best = self._best(coordinates, q)
        alone = [replace(c, lead=()) for c in coordinates]
        lanes = make_lanes(self.bound, n, self.options.enumerate_up_to, self.settings.memory)
        with torch.no_grad():
            streams = self.settings.streams.child("last weighting")
            _, values, log_q = joint_draws(alone, best, n, streams)
            factors = lanes.factors(values)
            log_weights = lanes.plan.log_evidence(factors)
            log_weights = log_weights - log_q[0].to(log_weights)
        if bool(log_weights.isnan().any()) or not bool(log_weights.isfinite().any()):
            raise NumericalError("rws, last weighting: no draw has a finite weight. Run longer.")
        w = log_weights.softmax(0)
        found = _marginals(self.bound, lanes, factors, values, w)
        return Posterior(
            self.bound,
            found,
            method="rws",
            sampler=lambda count, streams: self._sample(values, w, count, streams),
            log_evidence=_evidence(log_weights),
            diagnostics=_diagnostics(found, w, n),
            seed=self.settings.streams.seed,
        )

    def _best(self, coordinates: Sequence[Coordinates], q: Approximation) -> Approximation:
        """The restart with the highest evidence."""
        if not any(c.lead for c in coordinates):
            return q
        best = int(self.weighed(coordinates, q).log_z.nan_to_num(nan=-math.inf).argmax())
        return Approximation(
            {a: over_tensors(lambda t: t[best], p) for a, p in q.proposals.items()}, {}
        )

    def _sample(
        self, values: Mapping[str, Tensor], w: Tensor, n: int, streams: Streams
    ) -> dict[str, Tensor]:
        """Joint draws by resampling; discrete latents given the others."""
        generator = streams.of("joint draws")
        picked = torch.multinomial(w, n, replacement=True, generator=generator)
        drawn = {name: v[picked] for name, v in values.items()}
        if not self.lanes.summed:
            return drawn
        with torch.no_grad():
            lanes = make_lanes(
                self.bound, n, self.options.enumerate_up_to, self.settings.memory, to_draw=True
            )
            index = lanes.plan.draw(lanes.factors(drawn), 1, generator)
        for s in lanes.summed:
            drawn[s.variable.name] = lanes.in_order(s, index[s.axis][0]).to(self.bound.dtype)
        return drawn


def prepare(bound: Bound, options: RWS, settings: Settings) -> SharedIndex:
    """Lanes for all joint draws of a step.

    Raises:
        UnsupportedError: the model has params, or the draws do not fit the memory budget.
    """
    params = [v.name for v in bound.graph.role("param")]
    if params:
        raise UnsupportedError(
            f"RWS(parallel=False) does not learn params, and the model has {', '.join(params)}. Use parallel=True."
        )
    k = options.shared_particles
    count = settings.restarts * k
    lanes = make_lanes(bound, count, options.enumerate_up_to, settings.memory)
    return SharedIndex(bound, options, settings, lanes, k)


def joint_draws(
    coordinates: Sequence[Coordinates], q: Approximation, k: int, streams: Streams
) -> tuple[dict[str, Particles], dict[str, Tensor], Tensor]:
    """Particles of every block, the same as lanes ``[R k, *plates, *event]``, and the density of the lanes ``[R, k]``."""
    drawn: dict[str, Particles] = {}
    values: dict[str, Tensor] = {}
    total: Tensor | float = 0.0
    for at in coordinates:
        block, lead = at.block, len(at.lead)
        drawn[block.axis] = proposals.draw(block, q.proposals[block.axis], k, streams)
        for member in block.members:
            value = drawn[block.axis].values[member.name]
            values[member.name] = _lanes_first(value if lead else value[None], block, member)
        log_q = drawn[block.axis].log_q
        log_q = log_q if lead else log_q[None]
        total = total + log_q.flatten(1, -2).sum(1) if log_q.ndim > 2 else total + log_q
    # Where all latents are summed, one lane is as good as another.
    return drawn, values, total if isinstance(total, Tensor) else torch.zeros(1, k)


def _lanes_first(value: Tensor, block: Block, member: Member) -> Tensor:
    """``[R k, *plates of the latent, *event]`` from ``[R, *block plates, k, *collapsed, *event]``."""
    have = (*block.plates, *member.collapsed)
    value = value.movedim(1 + len(block.plates), 1)
    order = [2 + have.index(p) for p in member.variable.plates]
    value = value.permute(0, 1, *order, *range(2 + len(have), value.ndim))
    return value.flatten(0, 1)


def _marginals(
    bound: Bound,
    lanes: Lanes,
    factors: list[LogFactor],
    values: Mapping[str, Tensor],
    w: Tensor,
) -> dict[str, Marginal]:
    found: dict[str, Marginal] = {}
    for v in bound.graph.latents:
        if v.name in values:
            points = values[v.name]
            shape = points.shape[: 1 + len(v.plates)]
            own = w.reshape(-1, *(1,) * len(v.plates)).expand(shape)
            found[v.name] = mg.Weighted(points, own)
    if lanes.summed:
        _, tables = lanes.plan.marginals(factors)
        for s in lanes.summed:
            table = lanes.in_order(s, tables[s.axis].detach())
            found[s.variable.name] = mg.Table(torch.tensordot(w, table, 1))
    return {v.name: found[v.name] for v in bound.graph.latents}


def _evidence(log_weights: Tensor) -> Evidence:
    n = len(log_weights)
    relative = (log_weights - log_weights.max()).exp()
    value = float(log_weights.max() + relative.mean().log())
    return Evidence(value, float(relative.std() / relative.mean() / math.sqrt(n)), "estimate")


def _diagnostics(found: Mapping[str, Marginal], w: Tensor, n: int) -> Diagnostics:
    sampled = [name for name, m in found.items() if isinstance(m, mg.Weighted)]
    ess = {name: effective_sample_size(w) for name in sampled}
    tails = {name: tail_index(w) for name in sampled}
    return Diagnostics(ess, tails, True, 0, 0.0, (), {"joint draws": n})
