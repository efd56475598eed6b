"""QEM's iteration: draw particles, weigh all combinations of them, average moments into the proposals.

Source: [Heap2025], Algorithm 1; contraction and marginals as gradients after [Bowyer2023]. Differs from the paper:
a joint Gaussian for each block on the unconstrained scale, a bridge from proposal to posterior while the effective
sample size is low, and moments averaged in central form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import biject_to

from ppl.backend import Info
from ppl.graph import Variable
from ppl.inference.contract import LogFactor
from ppl.inference.numerics.expfam import FAMILIES
from ppl.inference.qem import proposals
from ppl.inference.qem.blocks import Block, Member
from ppl.inference.qem.problem import Problem, Weighting, evaluate, evaluate_part, values_of
from ppl.inference.qem.proposals import Joint, Particles, Proposal
from ppl.simulation import Known, simulate
from ppl.streams import Streams

_ENOUGH = (
    0.2  # share of the particles that the effective sample size must reach while the bridge is down
)
_STRIDE = 0.4  # step while the bridge is down
_COLLAPSED = 0.02  # share below which the bridge comes down again
_LEARNING_RATE = 0.1  # of params, on their unconstrained scale
_PRIOR_DRAWS = 500


class Learned(NamedTuple):
    """A param on its unconstrained scale, with the moments of Adam."""

    free: Tensor
    first: Tensor
    second: Tensor


class State(NamedTuple):
    """What the next step needs."""

    proposals: dict[str, Proposal]
    params: dict[str, Learned]
    bridge: float  # exponent of the weights, 1 once the posterior itself is the target
    crossed: int  # iterations since then
    iteration: int


class Weights(NamedTuple):
    """Result of an E-step."""

    log_z: Tensor  # [*restart]
    marginals: dict[str, Tensor]  # particle axis -> [*restart, *plates, K]


def init(problem: Problem) -> State:
    """Proposals from the moments of prior draws, or standard ones."""
    streams = problem.settings.streams
    # A family has no standard member, so its start is the prior's moments unless it was given.
    families = any(m.family and m.start is None for b in problem.blocks for m in b.members)
    wanted = problem.options.start == "prior" or families
    draws = _prior_draws(problem, streams.child("start")) if wanted else {}
    states = {
        b.axis: _first_proposal(problem, b, draws) for b in problem.blocks if not b.enumerated
    }
    params = {v.name: _first_param(problem, v) for v in problem.bound.graph.role("param")}
    bridge = 1.0
    return State(states, params, bridge, 0, 0)


def step(problem: Problem, state: State, batch: Any = None) -> tuple[State, Info]:
    """One iteration."""
    weighting, options = problem.weighting, problem.options
    particles = draw_all(weighting, state, problem.settings.streams)
    here = evaluated(problem, weighting, particles, state)
    bridge, weights = _cross(problem, state, here)
    l = options.step_at(state.crossed) if bridge == 1.0 else _STRIDE  # noqa: E741 - lambda of the source
    states = {}
    for block in weighting.blocks:
        if not block.enumerated:
            w = weights.marginals[block.axis]
            states[block.axis] = proposals.update(
                block,
                state.proposals[block.axis],
                particles[block.axis],
                w,
                l,
                options.variance_correction,
            )
    params = _learn(problem, state, here) if state.params else state.params
    crossed = state.crossed + 1 if bridge == 1.0 else 0
    if crossed > 1 and options.bridge and states and _share(weighting, weights) < _COLLAPSED:
        bridge, crossed = 0.25, 0
    new = State(states, params, bridge, crossed, state.iteration + 1)
    return new, _info(problem, new, weights)


# ---- E-step -----------------------------------------------------------------------------------------------------


def draw_all(
    weighting: Weighting, state: State, streams: Streams, tails: float = math.inf
) -> dict[str, Particles]:
    """Particles of every sampled block."""
    return {
        b.axis: proposals.draw(b, state.proposals[b.axis], weighting.sizes[b.axis], streams, tails)
        for b in weighting.blocks
        if not b.enumerated
    }


def all_arrays(
    problem: Problem, weighting: Weighting, particles: Mapping[str, Particles], state: State
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
    for name, learned in state.params.items():
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
    problem: Problem, weighting: Weighting, particles: Mapping[str, Particles], state: State
) -> Evaluated:
    """Evaluate every log-density, unless the plan wants them in parts."""
    arrays = all_arrays(problem, weighting, particles, state)
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


def _cross(problem: Problem, state: State, here: Evaluated) -> tuple[float, Weights]:
    """The largest exponent that leaves enough effective particles, and the weights there."""
    if not problem.options.bridge or not here.particles or state.crossed > 0:
        return 1.0, weigh(here, last=True)
    # Where some weights never even out (few particles, many plates) the bridge rises all the same.
    least = min(1.0, 1e-3 * 1.15 ** max(0, state.iteration - 60))
    bridge = min(1.0, state.bridge * 4)
    while True:
        weights = weigh(here, bridge)
        if bridge <= least or _share(here.weighting, weights) >= _ENOUGH or bridge < 1e-12:
            return bridge, weights
        bridge = bridge / 2


def _share(weighting: Weighting, weights: Weights) -> float:
    """Effective share of the particles: median over a block's elements, least over the blocks."""
    shares = []
    for block in weighting.blocks:
        if block.enumerated:
            continue
        w = weights.marginals[block.axis]
        if not bool(w.isfinite().all()):
            return 0.0
        k = w.shape[-1]
        ess = 1.0 / w.square().sum(-1)
        shares.append(((ess - 1) / max(k - 1, 1)).median())
    return float(torch.stack(shares).min()) if shares else 1.0


# ---- start ------------------------------------------------------------------------------------------------------


def _prior_draws(problem: Problem, streams: Streams) -> dict[str, Tensor]:
    bound = problem.bound
    known = {}
    for v in bound.graph.latents:
        law = bound.graph.factors[v.name].law
        if law is not None and getattr(law.family, "is_improper", False):
            known[v.name] = Known(_standard_draws(problem, v, streams))
    names = [v.name for v in bound.graph.latents]
    return simulate(bound, _PRIOR_DRAWS, streams, known=known, sites=names)


def _standard_draws(problem: Problem, v: Variable, streams: Streams) -> Tensor:
    """Draws of an improper latent: standard Normal on the unconstrained scale."""
    shape = (_PRIOR_DRAWS, *problem.bound.shape(v))
    free = torch.randn(
        shape, generator=streams.of(v.name), dtype=problem.bound.dtype, device=problem.bound.device
    )
    return biject_to(v.support)(free)


def _first_proposal(problem: Problem, block: Block, draws: Mapping[str, Tensor]) -> Proposal:
    shape = problem.weighting.block_shape(block)
    families = {m.name: _first_family(problem, block, m, draws) for m in block.members if m.family}
    joint = _first_joint(problem, block, draws, shape) if block.gaussian else None
    return Proposal(joint, families)


def _first_joint(
    problem: Problem, block: Block, draws: Mapping[str, Tensor], shape: tuple[int, ...]
) -> Joint:
    bound = problem.bound
    mean = torch.zeros((*shape, block.dims), dtype=bound.dtype, device=bound.device)
    sd = torch.ones_like(mean)
    if problem.options.start == "prior":
        laid = {
            m.name: _laid_out(bound.graph.variables[m.name], block, m, draws[m.name])
            for m in block.gaussian
        }
        free = proposals.to_free(block, laid, 1 + len(block.plates))
        mean, sd = (part.expand(*shape, -1).clone() for part in _robust_moments(free))
    mean, sd = _asked_start(block, mean, sd)
    if problem.weighting.restarts:
        # Restarts begin at different places, or they would all tell the same story.
        generator = problem.settings.streams.of("restarts")
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        mean = mean + sd * noise
    full = 0 < block.dims <= max(problem.options.joint_up_to, 0) or _asked_joint(problem, block)
    return Joint(mean, torch.diag_embed(sd.square()) if full else sd.square())


def _asked_joint(problem: Problem, block: Block) -> bool:
    asked = problem.options.q or {}
    return any(isinstance(key, tuple) and set(key) == set(block.names) for key in asked)


def _robust_moments(free: Tensor) -> tuple[Tensor, Tensor]:
    """Median and scaled interquartile range over draws: prior draws of scales have heavy tails."""
    free = free.nan_to_num(nan=0.0, posinf=1e6, neginf=-1e6)
    low, middle, high = torch.quantile(
        free, torch.tensor([0.25, 0.5, 0.75], dtype=free.dtype, device=free.device), dim=0
    )
    return middle, ((high - low) / 1.349).clamp(min=1e-6)


def _asked_start(block: Block, mean: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
    at = 0
    for member in block.gaussian:
        if member.start is not None:  # a MultivariateNormal, on the unconstrained scale
            loc = torch.as_tensor(member.start.loc, dtype=mean.dtype, device=mean.device)
            scale = torch.as_tensor(
                member.start.variance, dtype=mean.dtype, device=mean.device
            ).sqrt()
            mean[..., at : at + member.dims] = loc.reshape(-1)
            sd[..., at : at + member.dims] = scale.reshape(-1)
        at += member.dims
    return mean, sd


def _laid_out(v: Variable, block: Block, member: Member, draw: Tensor) -> Tensor:
    """``[n, *plates, *event]`` with block plates in front, collapsed ones behind them."""
    order = [1 + v.plates.index(p) for p in (*block.plates, *member.collapsed)]
    return draw.permute(0, *order, *range(1 + len(v.plates), draw.ndim))


def _first_family(
    problem: Problem, block: Block, member: Member, draws: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    family = FAMILIES[member.family or ""]
    shape = problem.weighting.block_shape(block)
    fixed = proposals._fixed(member)
    if member.start is not None:
        standard = {
            n: _full(getattr(member.start, n), (*shape, *member.sizes), problem)
            for n in family.params
        }
        return family.mean_from_standard({**standard, **fixed})
    laid = _laid_out(member.variable, block, member, draws[member.name])
    batch = laid.shape[: laid.ndim - family.event_dim]
    weights = torch.full(batch, 1 / batch[0], dtype=laid.dtype, device=laid.device)
    mean = family.weighted_mean(laid, weights, dim=0, **fixed)
    if problem.weighting.restarts:
        mean = tuple(m.expand(problem.weighting.restarts, *m.shape).clone() for m in mean)
    return mean


def _full(value: Any, shape: tuple[int, ...], problem: Problem) -> Tensor:
    tensor = torch.as_tensor(value, dtype=problem.bound.dtype, device=problem.bound.device)
    return tensor.expand((*shape, *tensor.shape)).clone()


# ---- params -----------------------------------------------------------------------------------------------------


def _first_param(problem: Problem, v: Variable) -> Learned:
    bound = problem.bound
    start = torch.as_tensor(v.initial, dtype=bound.dtype, device=bound.device)
    start = start.expand((*problem.weighting.lead, *bound.shape(v))).clone()
    free = biject_to(v.support).inv(start)
    return Learned(free, torch.zeros_like(free), torch.zeros_like(free))


def param_value(v: Variable, free: Tensor) -> Tensor:
    """A param on its own scale."""
    return biject_to(v.support)(free)


def _learn(problem: Problem, state: State, here: Evaluated) -> dict[str, Learned]:
    """One ascent step of the log evidence in the params, particles held fixed (the gradient of EM's M-step)."""
    graph = problem.bound.graph
    free = {n: p.free.detach().requires_grad_() for n, p in state.params.items()}
    with torch.enable_grad():
        live = {**here.arrays, **{n: param_value(graph.variables[n], f) for n, f in free.items()}}
        densities = None if here.densities is None else evaluate(here.weighting, live)
        log_z = here.weighting.plan.log_evidence(
            here._replace(arrays=live, densities=densities).factors()
        )
        grads = torch.autograd.grad(log_z.sum(), list(free.values()), allow_unused=True)
    t = state.iteration + 1
    rate = _LEARNING_RATE * min(1.0, 10 * t**-0.6)
    learned = {}
    for (name, old), grad in zip(state.params.items(), grads, strict=True):
        if grad is None or not bool(grad.isfinite().all()):
            learned[name] = old
            continue
        first = 0.9 * old.first + 0.1 * grad
        second = 0.99 * old.second + 0.01 * grad.square()
        move = (first / (1 - 0.9**t)) / ((second / (1 - 0.99**t)).sqrt() + 1e-12)
        learned[name] = Learned(old.free + rate * move, first, second)
    return learned


# ---- what a person sees -----------------------------------------------------------------------------------------


def _info(problem: Problem, state: State, weights: Weights) -> Info:
    ess = [1.0 / w.square().sum(-1) for a, w in weights.marginals.items() if a in state.proposals]
    metrics = {
        "log_evidence": float(weights.log_z.max()) if state.bridge == 1.0 else math.nan,
        "ess": float(torch.stack([e.median() for e in ess]).min()) if ess else math.inf,
        "bridge": state.bridge,
    }
    watch, unit = _watch(state)
    done = not state.proposals and not state.params
    return Info(metrics, done=done, watch=watch, unit=unit, ready=state.crossed > 10)


def _watch(state: State) -> tuple[Tensor | None, Tensor | None]:
    """Locations and log spreads of everything that is learned, and the spread to measure their change by."""
    parts, units = [], []
    for proposal in state.proposals.values():
        if proposal.joint is not None:
            mean, sd = proposal.joint.mean.reshape(-1), proposal.joint.sd.reshape(-1)
            parts += [mean, sd.log()]
            units += [sd, torch.ones_like(sd)]
        for moments in proposal.families.values():
            parts += [m.reshape(-1) for m in moments]
            units += [m.reshape(-1).abs().clamp(min=1e-12) for m in moments]
    for learned in state.params.values():
        parts.append(learned.free.reshape(-1))
        units.append(torch.full_like(parts[-1], 0.1))
    return (torch.cat(parts), torch.cat(units)) if parts else (None, None)
