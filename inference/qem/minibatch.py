"""QEM on a few elements of a plate at a time.

A step weighs the batch's elements against a stand-in for all others: a Gaussian *site* for each part of the plate, on the
unconstrained scale of the blocks outside the plate. The target of a step is

    p(u) f_j(u) prod_{i != j} s_i(u),

with ``f_j`` what the elements of part ``j`` say of the outer latents ``u``, their own latents summed out, and the moments
of this target are averaged into the proposals as in a plain step. The contraction gives ``log f_j`` at every particle, as
the log-ratio of its marginal weights with and without the part, and the site is moved to its least squares fit there. As
what a part says gets closer to a quadratic, the residuals of that fit, and with them the noise of the sites, go to zero.

Source: expectation propagation on a partition of the data, [Vehtari2020], with sites fitted by regression in the place
of a division of Gaussians. With one part it is the plain step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ppl.backend import Info, Settings
from ppl.batches import Batch, batches_of
from ppl.binding import Bound
from ppl.errors import UnsupportedError
from ppl.inference.contract import Layout, LogFactor, Plan, make_plan
from ppl.inference.numerics.linalg import safe_cholesky
from ppl.inference.particles.approximation import Approximation
from ppl.inference.particles.blocks import Block
from ppl.inference.particles.conditional import update_all
from ppl.inference.particles.estep import Evaluated, Weights, draw_all, evaluated, proposal_term
from ppl.inference.particles.problem import Problem
from ppl.inference.particles.proposals import Joint, Particles, Proposal
from ppl.inference.particles.shards import lies_within, narrowed, scatter
from ppl.inference.particles.tempering import effective_share
from ppl.inference.particles.weighting import Weighting, make_weighting, real_plates
from ppl.inference.qem import distributed, kernel
from ppl.inference.qem.options import QEM
from ppl.posterior import Posterior

_ROUNDS = 2  # visits of every part before the schedule of step sizes starts
_VISITS = 12  # of every part before the run may stop
_EPOCHS = 100
_RIDGE = 0.3  # of the regression, in units of coefficients per effective particle
_LEAST = 0.1  # share of a new fit in a site
_STRIDE = 0.4  # step while the weights are tempered
_KEPT_PARTS = 64


class Sites(NamedTuple):
    """For every part the site ``h.u - u.P u / 2`` of a block outside the plate."""

    linear: Tensor  # [parts, *restart, *plates, D]
    precision: Tensor  # [parts, *restart, *plates, D, D], or [..., D] for products of scalars


class State(NamedTuple):
    """What the next step needs. Arrays of elements are overwritten: copying them all would cost more than a step."""

    q: Approximation
    bridge: float
    crossed: int
    iteration: int
    sites: dict[str, Sites]
    visits: Tensor  # [parts]


def prepare(bound: Bound, options: QEM, settings: Settings) -> Problem:
    """As for the plain method; the particles are counted for one part of the plate.

    Raises:
        UnsupportedError: the plan does not fit the memory budget, or an option of ``infer`` is not supported.
    """
    if options.distribute is not None:
        return distributed.prepare(bound, options, settings)
    batches = batches_of(bound, settings.minibatch, settings.streams)
    problem = kernel.prepare(bound, options, settings)
    if batches is None or batches.parts == 1:
        return problem
    _check(problem, batches.plate)
    _part(problem, batches.part(0))  # raises where a part exceeds the budget
    limit = settings.max_iters or max(problem.max_iters, _EPOCHS * batches.parts)
    return replace(problem, max_iters=limit)


def init(problem: Problem) -> Any:
    """The first approximation, and sites that say nothing."""
    batches = batches_of(problem.bound, problem.settings.minibatch, problem.settings.streams)
    plain = kernel.init(problem)
    if batches is None or batches.parts == 1:
        return plain
    sites = {}
    for block in _outer(problem.weighting, batches.plate):
        joint = plain.q.proposals[block.axis].joint
        assert joint is not None
        sites[block.axis] = Sites(
            *(x.new_zeros((batches.parts, *x.shape), dtype=torch.float64) for x in joint)
        )
    visits = torch.zeros(batches.parts, dtype=torch.long)
    return State(plain.q, 1.0, 0, 0, sites, visits)


def step(problem: Problem, state: Any, batch: Batch | None = None) -> tuple[Any, Info]:
    """One iteration: on all elements without a batch, else on those of the batch."""
    if batch is None or batch.parts == 1:
        return kernel.step(problem, state)
    part, plan = _part(problem, batch)
    weighting = part.weighting
    q = narrowed(problem.weighting, state.q, batch.rows)
    view = kernel.State(q, state.bridge, state.crossed, state.iteration)
    outer = _outer(weighting, batch.plate)
    particles = draw_all(weighting, q, problem.settings.streams)
    for block in outer:
        particles[block.axis] = _with_others(
            particles[block.axis], state.sites[block.axis], batch.part
        )
    here = evaluated(part, weighting, particles, q)
    rest = _outer_factors(here, batch.plate)
    bridge, _, weights = kernel.cross(part, view, here)
    without = plan.marginals(_tempered(here, rest, batch.plate, bridge))[1]
    averaged = _averaged(part, state, q, here, weights, bridge, batch)
    sites = dict(state.sites)
    # Tempered weights, stretched back, describe a part far from the posterior: sites fitted there run away.
    for block in outer if bridge == 1.0 else ():
        joint, ratio = q.proposals[block.axis].joint, _message(block, weights, without, bridge)
        assert joint is not None
        sites[block.axis] = _moved(
            state.sites[block.axis],
            batch.part,
            joint,
            particles[block.axis],
            weights.marginals[block.axis],
            ratio,
            int(state.visits[batch.part]),
        )
    share = effective_share(weighting, weights)
    new = _next(problem, state, batch, averaged, bridge, share, sites)
    return new, _info(problem, new, batch.plate, weights)


def posterior(problem: Problem, state: Any) -> Posterior:
    """Weigh fresh particles of the whole plate, in parts where memory asks for it, and collect the results.

    The last weighting is exact: sites are not part of it.
    """
    if problem.whole is not None:
        return distributed.posterior(problem, state)
    if not isinstance(state, State):
        return kernel.posterior(problem, state)
    q = torch.utils._pytree.tree_map_only(Tensor, torch.clone, state.q)
    return kernel.posterior(problem, kernel.State(q, state.bridge, state.crossed, state.iteration))


# ---- the step ---------------------------------------------------------------------------------------------------


def _check(problem: Problem, plate: str) -> None:
    """Refuse what has no Gaussian site.

    Raises:
        UnsupportedError: in words.
    """
    if problem.bound.graph.role("param"):
        names = ", ".join(v.name for v in problem.bound.graph.role("param"))
        raise UnsupportedError(
            f"minibatch: the params {names} are learned from all elements at once. Make them latents, or leave minibatch= out."
        )
    for block in _outer(problem.weighting, plate):
        plain = not block.enumerated and block.form is None and not block.tied
        if not plain or any(m.family for m in block.members) or block.chain:
            raise UnsupportedError(
                f"minibatch: {', '.join(block.names)} outside plate '{plate}' need a Gaussian proposal on the unconstrained "
                "scale, which stands in for the elements that are not in the batch. Leave them out of q=, or leave "
                "minibatch= out."
            )


def _outer(weighting: Weighting, plate: str) -> list[Block]:
    return [b for b in weighting.blocks if not lies_within(weighting.bound, b.plates, plate)]


# Parts of a plate as problems of their own, the latest of each run; they go with it.
_PARTS: WeakKeyDictionary[Problem, dict[int, tuple[Problem, Plan]]] = WeakKeyDictionary()


def _part(problem: Problem, batch: Batch) -> tuple[Problem, Plan]:
    made = _PARTS.setdefault(problem, {})
    if batch.part not in made:
        if len(made) >= _KEPT_PARTS:
            made.pop(next(iter(made)))
        made[batch.part] = _narrowed(problem, batch)
    return made[batch.part]


def _narrowed(problem: Problem, batch: Batch) -> tuple[Problem, Plan]:
    bound = problem.bound.narrowed(batch.rows)
    whole = problem.weighting
    try:
        weighting = make_weighting(
            bound,
            whole.blocks,
            whole.sizes,
            whole.restarts,
            problem.settings.memory,
            problem.options.chains,
            apart=batch.plate,
        )
    except UnsupportedError as error:
        raise UnsupportedError(f"{error} A smaller minibatch= needs less, too.") from None
    part = replace(problem, bound=bound, weighting=weighting)
    return part, _outer_plan(weighting, batch.plate)


def _outer_terms(weighting: Weighting, plate: str) -> list[int]:
    """Factors that neither are repeated over the plate nor mention a particle index of it."""
    inside = {b.axis for b in weighting.blocks if lies_within(weighting.bound, b.plates, plate)}
    return [
        i
        for i, t in enumerate(weighting.terms)
        if not lies_within(weighting.bound, t.plates, plate) and not inside & set(t.axes)
    ]


def _outer_plan(weighting: Weighting, plate: str) -> Plan:
    terms = [weighting.terms[i] for i in _outer_terms(weighting, plate)]
    outer = _outer(weighting, plate)
    lead = terms[0].axes[: len(weighting.lead)]
    sizes = {b.axis: weighting.sizes[b.axis] for b in outer}
    layout = Layout(
        real_plates(weighting.bound),
        {**sizes, **dict(zip(lead, weighting.lead, strict=True))},
        {b.axis: b.plates for b in outer},
        batch=lead,
    )
    return make_plan([t.axes for t in terms], layout, plates_of=[t.plates for t in terms])


def _outer_factors(here: Evaluated, plate: str) -> list[LogFactor]:
    """Copies of the log-densities outside the plate: weighing may use up the originals."""
    made, found = here.factors(), []
    for i in _outer_terms(here.weighting, plate):
        axes, log = made(i, None) if callable(made) else made[i]
        found.append(LogFactor(axes, log.clone()))
    return found


def _tempered(here: Evaluated, rest: list[LogFactor], plate: str, bridge: float) -> list[LogFactor]:
    """These factors with log-weights scaled by ``bridge``; the ``-log K`` of a proposal is none."""
    kept = []
    for i, factor in zip(_outer_terms(here.weighting, plate), rest, strict=True):
        own = here.weighting.terms[i].name in here.particles
        kept.append(
            proposal_term(here.weighting, i, here.particles, bridge)
            if own
            else factor._replace(log=bridge * factor.log)
        )
    return kept


def _with_others(drawn: Particles, sites: Sites, part: int) -> Particles:
    """Particles whose proposal density is divided by the sites of the other parts."""
    assert drawn.free is not None
    others = Sites(*(x.sum(0) - x[part] for x in sites))
    said = _value(others, drawn.free).to(drawn.log_q.dtype)
    return drawn._replace(log_q=drawn.log_q - said)


def _value(site: Sites, free: Tensor) -> Tensor:
    """``h.u - u.P u / 2`` at particles ``u [*restart, *plates, K, D]``."""
    u = free.double()
    linear, precision = site.linear.unsqueeze(-2), site.precision
    if precision.ndim == site.linear.ndim:
        return (linear * u - 0.5 * precision.unsqueeze(-2) * u.square()).sum(-1)
    return (linear * u).sum(-1) - 0.5 * ((u @ precision) * u).sum(-1)


def _message(
    block: Block, weights: Weights, without: Mapping[Any, Tensor], bridge: float
) -> Tensor:
    """What the batch says at each particle, up to a constant: ``[*restart, *plates, K]``; NaN where no weight is left."""
    ratio = weights.marginals[block.axis].double().log() - without[block.axis].double().log()
    return torch.where(ratio.isfinite(), ratio / bridge, math.nan)


def _moved(
    sites: Sites,
    part: int,
    joint: Joint,
    drawn: Particles,
    weights: Tensor,
    ratio: Tensor,
    visits: int,
) -> Sites:
    """The sites with that of one part moved towards the least squares fit of what it says.

    The residual is regressed, with the particles' weights, on the Hermite polynomials of degrees one and two of the
    proposal, which are orthonormal where proposal and target agree. There may be more of them than particles: the ridge
    is that of coefficients as large as their errors, so that directions that these particles do not show stay as they are.
    """
    assert drawn.free is not None
    old = Sites(*(x[part] for x in sites))
    residual = ratio - _value(old, drawn.free)
    w = torch.where(residual.isfinite(), weights.double(), 0.0)
    w = w / w.sum(-1, keepdim=True).clamp(min=1e-300)
    residual = residual.nan_to_num(nan=0.0)
    residual = residual - (w * residual).sum(-1, keepdim=True)
    mean, root = joint.mean.double(), _root(joint)
    features = _features(_whitened(drawn.free.double() - mean.unsqueeze(-2), root), joint.is_full)
    features = features - (w.unsqueeze(-1) * features).sum(-2, keepdim=True)
    scaled = w.sqrt().unsqueeze(-1) * features
    effective = 1.0 / w.square().sum(-1).clamp(min=1e-300)
    ridge = _RIDGE * features.shape[-1] / effective
    gram = scaled @ scaled.mT + torch.diag_embed(ridge.unsqueeze(-1).expand_as(w))
    fit = torch.linalg.solve(gram, (w.sqrt() * residual).unsqueeze(-1))
    move = _natural((scaled.mT @ fit).squeeze(-1), mean, root, joint.is_full)
    share = max((visits + 1.0) ** -0.6, _LEAST)
    new = []
    for stack, change in zip(sites, move, strict=True):
        stack = stack.clone()
        # One surviving particle says nothing of a slope.
        trust = share * ((effective - 1) / 4).clamp(0, 1)
        trust = trust.reshape(*trust.shape, *(1,) * (change.ndim - trust.ndim))
        stack[part] += trust * torch.where(change.isfinite(), change, 0.0)
        new.append(stack)
    return Sites(*new)


def _root(joint: Joint) -> Tensor:
    """Cholesky factor of the covariance, or standard deviations."""
    cov = joint.cov.double()
    return safe_cholesky(cov) if joint.is_full else cov.sqrt()


def _whitened(apart: Tensor, root: Tensor) -> Tensor:
    if root.ndim < apart.ndim:
        return apart / root.unsqueeze(-2)
    return torch.linalg.solve_triangular(root, apart.mT, upper=False).mT


def _features(z: Tensor, full: bool) -> Tensor:
    """``z``, ``(z^2 - 1) / sqrt(2)`` and, of a full covariance, the products of two: ``[..., K, p]``."""
    parts = [z, (z.square() - 1) / math.sqrt(2)]
    if full:
        a, b = torch.triu_indices(z.shape[-1], z.shape[-1], 1)
        parts.append(z[..., a] * z[..., b])
    return torch.cat(parts, -1)


def _natural(fit: Tensor, mean: Tensor, root: Tensor, full: bool) -> Sites:
    """Coefficients of the features as linear and quadratic parts on the blocks' own scale."""
    d = mean.shape[-1]
    slope, curve = fit[..., :d], math.sqrt(2) * fit[..., d : 2 * d]
    if not full:
        precision = -curve / root.square()
        return Sites(slope / root + precision * mean, precision)
    a, b = torch.triu_indices(d, d, 1)
    inner = torch.diag_embed(curve)
    inner[..., a, b] = inner[..., b, a] = fit[..., 2 * d :]
    inverse = torch.linalg.solve_triangular(
        root, torch.eye(d, dtype=root.dtype, device=root.device).expand_as(root), upper=False
    )
    precision = -inverse.mT @ inner @ inverse
    linear = (inverse.mT @ slope.unsqueeze(-1) + precision @ mean.unsqueeze(-1)).squeeze(-1)
    return Sites(linear, precision)


def _averaged(
    problem: Problem,
    state: State,
    q: Approximation,
    here: Evaluated,
    weights: Weights,
    bridge: float,
    batch: Batch,
) -> dict[str, Proposal]:
    """The M-step: outer blocks with the step size of the run, those in the plate with that of their own visits."""
    weighting = problem.weighting
    seen = max(0, int(state.visits[batch.part]) - _ROUNDS)
    outer = {b.axis for b in _outer(weighting, batch.plate)}
    found: dict[str, Proposal] = {}
    for inside, count in ((False, state.crossed), (True, seen)):
        share = problem.options.step_at(count) if bridge == 1.0 else _STRIDE
        found |= update_all(
            weighting,
            q.proposals,
            here.particles,
            here.arrays,
            weights,
            share,
            problem.options.variance_correction,
            [b for b in weighting.blocks if (b.axis not in outer) == inside],
        )
    return found


def _next(
    problem: Problem,
    state: State,
    batch: Batch,
    averaged: Mapping[str, Proposal],
    bridge: float,
    share: float,
    sites: dict[str, Sites],
) -> State:
    whole = problem.weighting
    proposals = {
        b.axis: scatter(whole, state.q.proposals[b.axis], averaged[b.axis], b, batch.rows)
        for b in whole.blocks
        if b.axis in averaged
    }
    visits = state.visits.clone()
    visits[batch.part] += 1
    all_seen = int(visits.min()) >= _ROUNDS
    crossed = state.crossed + 1 if bridge == 1.0 and all_seen else 0
    if crossed > 1 and problem.options.bridge and share < kernel.COLLAPSED:
        bridge, crossed = 0.25, 0
    q = Approximation(proposals, state.q.params)
    return State(q, bridge, crossed, state.iteration + 1, sites, visits)


def _info(problem: Problem, state: State, plate: str, weights: Weights) -> Info:
    """Like that of the plain method; what must settle are the blocks outside the plate. There is no evidence to tell."""
    outer = {b.axis for b in _outer(problem.weighting, plate)}
    proposals = {a: p for a, p in state.q.proposals.items() if a in outer}
    q = Approximation(proposals, {})
    # The exponent of one batch says nothing of the others': it never counts as settled.
    shown = kernel.State(q, state.bridge, state.crossed, state.iteration, risen=state.iteration)
    info = kernel.info(shown, weights)
    ready = info.ready and int(state.visits.min()) >= _VISITS
    metrics = {**info.metrics, "log_evidence": math.nan}
    return info._replace(metrics=metrics, ready=ready, done=False)
