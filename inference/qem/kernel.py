"""QEM's iteration: draw particles, weigh all combinations of them, average moments into the proposals.

Source: [Heap2025], Algorithm 1; contraction and marginals as gradients after [Bowyer2023]. Differs from the paper:
a joint Gaussian for each block on the unconstrained scale, a bridge from proposal to posterior while the effective
sample size is low, and moments averaged in central form.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl.backend import Info, Settings
from ppl.binding import Bound
from ppl.inference.particles import proposals, results
from ppl.inference.particles.approximation import Approximation
from ppl.inference.particles.estep import Evaluated, Weights, draw_all, evaluated, weigh
from ppl.inference.particles.params import learn
from ppl.inference.particles.problem import Problem, prepare_particles
from ppl.inference.particles.proposals import Particles, Proposal
from ppl.inference.particles.start import first_approximation
from ppl.inference.particles.weighting import Weighting
from ppl.inference.qem.options import QEM
from ppl.posterior import Posterior

_ITERATIONS = 500
_ENOUGH = (
    0.2  # share of the particles that the effective sample size must reach while the bridge is down
)
_STRIDE = 0.4  # step while the bridge is down
_COLLAPSED = 0.02  # share below which the bridge comes down again


class State(NamedTuple):
    """What the next step needs."""

    q: Approximation
    bridge: float  # exponent of the weights, 1 once the posterior itself is the target
    crossed: int  # iterations since then
    iteration: int


def prepare(bound: Bound, options: QEM, settings: Settings) -> Problem:
    """Blocks, particle counts, lowered factors, plan.

    Raises:
        UnsupportedError: the plan does not fit the memory budget, or an option of ``infer`` is not supported.
    """
    return prepare_particles(bound, options, settings, settings.max_iters or _ITERATIONS)


def init(problem: Problem) -> State:
    """The first approximation, not tempered."""
    return State(first_approximation(problem), 1.0, 0, 0)


def step(problem: Problem, state: State, batch: Any = None) -> tuple[State, Info]:
    """One iteration."""
    weighting = problem.weighting
    particles = draw_all(weighting, state.q, problem.settings.streams)
    here = evaluated(problem, weighting, particles, state.q)
    bridge, weights = _cross(problem, state, here)
    averaged = _averaged(problem, state, particles, weights, bridge)
    params = state.q.params
    if params:
        params = learn(problem, params, here, state.iteration + 1)
    crossed = state.crossed + 1 if bridge == 1.0 else 0
    if crossed > 1 and problem.options.bridge and averaged:
        if _share(weighting, weights) < _COLLAPSED:
            bridge, crossed = 0.25, 0
    new = State(Approximation(averaged, params), bridge, crossed, state.iteration + 1)
    return new, _info(new, weights)


def posterior(problem: Problem, state: State) -> Posterior:
    """Weigh fresh particles and collect the results."""
    warnings = []
    if state.bridge < 1:
        warnings.append(f"the weights are still tempered (exponent {state.bridge:.2g} of 1)")
    return results.posterior(problem, state.q, "qem", state.iteration, tuple(warnings))


def _averaged(
    problem: Problem,
    state: State,
    particles: dict[str, Particles],
    weights: Weights,
    bridge: float,
) -> dict[str, Proposal]:
    """The M-step: new moments averaged into every proposal."""
    options = problem.options
    share = options.step_at(state.crossed) if bridge == 1.0 else _STRIDE
    return {
        b.axis: proposals.update(
            b,
            state.q.proposals[b.axis],
            particles[b.axis],
            weights.marginals[b.axis],
            share,
            options.variance_correction,
        )
        for b in problem.blocks
        if not b.enumerated
    }


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


# ---- what a person sees -----------------------------------------------------------------------------------------


def _info(state: State, weights: Weights) -> Info:
    ess = [1.0 / w.square().sum(-1) for a, w in weights.marginals.items() if a in state.q.proposals]
    metrics = {
        "log_evidence": float(weights.log_z.max()) if state.bridge == 1.0 else math.nan,
        "ess": float(torch.stack([e.median() for e in ess]).min()) if ess else math.inf,
        "bridge": state.bridge,
    }
    watch, unit = _watch(state)
    done = not state.q.proposals and not state.q.params
    return Info(metrics, done=done, watch=watch, unit=unit, ready=state.crossed > 10)


def _watch(state: State) -> tuple[Tensor | None, Tensor | None]:
    """Locations and log spreads of everything that is learned, and the spread to measure their change by."""
    parts, units = [], []
    for proposal in state.q.proposals.values():
        if proposal.joint is not None:
            mean, sd = proposal.joint.mean.reshape(-1), proposal.joint.sd.reshape(-1)
            parts += [mean, sd.log()]
            units += [sd, torch.ones_like(sd)]
        for moments in proposal.families.values():
            parts += [m.reshape(-1) for m in moments]
            units += [m.reshape(-1).abs().clamp(min=1e-12) for m in moments]
    for learned in state.q.params.values():
        parts.append(learned.free.reshape(-1))
        units.append(torch.full_like(parts[-1], 0.1))
    return (torch.cat(parts), torch.cat(units)) if parts else (None, None)
