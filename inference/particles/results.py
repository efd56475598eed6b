"""The end of a run: a last weighting with many particles, in replicates, and what is read off it.

The replicates' estimates of the evidence are averaged before the log, and weigh the replicates' moments, so that both
improve with their number; their spread is the standard error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ppl import marginals as mg
from ppl.backend import Settings
from ppl.diagnostics import Diagnostics, tail_index
from ppl.errors import NumericalError, UnsupportedError
from ppl.inference.particles import picked
from ppl.inference.particles.approximation import Approximation, Learned, param_value
from ppl.inference.particles.blocks import Block, Member, make_blocks
from ppl.inference.particles.counts import final_counts, particle_counts, replicate_count
from ppl.inference.particles.estep import (
    Weights,
    draw_all,
    draw_in_parts,
    draws_in_parts,
    evaluated,
    weigh,
)
from ppl.inference.particles.forms import Sites
from ppl.inference.particles.large import (
    REPLICATES,
    Running,
    in_variable_order,
    picked_in_parts,
)
from ppl.inference.particles.memory import point_bytes
from ppl.inference.particles.options import ParticleOptions
from ppl.inference.particles.parents import flat_index
from ppl.inference.particles.problem import Problem
from ppl.inference.particles.proposals import Particles, Proposal, over_tensors
from ppl.inference.particles.shards import PartDraws, inner_blocks
from ppl.inference.particles.start import first_approximation, fitted
from ppl.inference.particles.tempering import Exponents, largest_exponents, may_differ
from ppl.inference.particles.weighting import DEFAULT_MEMORY, Weighting, make_weighting
from ppl.marginals import Marginal
from ppl.posterior import Evidence, Posterior
from ppl.streams import Streams

_FEW = 40  # effective particles of all replicates below which the last weights are tempered
_FEWEST = 5  # of one replicate
_FINER = (
    1.25  # factor by which exponents fall where one replicate has enough, and all together have not
)
_LEAST = 1e-6  # exponent at which weights count as equal
_SEARCHED = 30  # scalars up to which draws of the prior say where a mode was missed


class Replicate(NamedTuple):
    """One weighting: its particles, and what they weigh."""

    particles: Mapping[str, Particles]
    log_z: Tensor  # []
    marginals: dict[str, Tensor]  # axis -> [*plates, K]


def posterior(
    problem: Problem, q: Approximation, method: str, iterations: int, warnings: tuple[str, ...] = ()
) -> Posterior:
    """Weigh fresh particles and collect the results."""
    chosen, agreement, means = _best_restart(problem, q)
    counts = final_counts(problem.weighting, problem.options, problem.settings.memory)
    weighting = make_weighting(
        problem.bound,
        problem.blocks,
        counts,
        0,
        problem.settings.memory,
        problem.options.chains,
    )
    number = replicate_count(
        problem.options,
        [counts[b.axis] for b in problem.blocks if not (b.enumerated or b.is_nested)],
    )
    number, running = _kept(problem, weighting, number)
    above = picked.parent(weighting)
    chosen = chosen if above is None else picked.widened(chosen, above)
    replicates = [_replicate(problem, weighting, chosen, i, running) for i in range(number)]
    log_z = torch.stack([r.log_z for r in replicates])
    if bool(log_z.isnan().any()) or not bool(log_z.isfinite().any()):
        raise NumericalError(
            f"{method}, last weighting: no particle has a finite weight. Run longer, or with more particles."
        )
    shares = _shares(replicates)
    marginals = _marginals(weighting, replicates, shares, running)
    if running is None:
        warnings = (*warnings, *_missed(problem, weighting, chosen, log_z))
    diagnostics = _diagnostics(weighting, marginals, agreement, iterations, warnings, running)
    exponents = Exponents()
    if running is None and min(_effective(weighting, marginals)) < _enough(above):
        soften = _softened if above is None else _raised
        exponents, softened, marginals = soften(problem, weighting, chosen, replicates)
        shares = _shares(softened)
        diagnostics = _with_exponents(diagnostics, exponents)
        replicates = replicates if above is None else softened
    params = {
        n: param_value(problem.bound.graph.variables[n], p.free) for n, p in chosen.params.items()
    }
    result = Posterior(
        problem.bound,
        marginals,
        method=method,
        sampler=_sampler(problem, weighting, chosen, replicates, shares, exponents),
        log_evidence=_evidence(log_z),
        diagnostics=diagnostics,
        params=params,
        seed=problem.settings.streams.seed,
    )
    result.restart_means = means
    return result


def check_last(problem: Problem) -> None:
    """Refuse particles of the last weighting that do not fit, before the first iteration.

    Raises:
        UnsupportedError: with the largest array and the remedy.
    """
    counts = final_counts(problem.weighting, problem.options, problem.settings.memory)
    try:
        make_weighting(
            problem.bound,
            problem.blocks,
            counts,
            0,
            problem.settings.memory,
            problem.options.chains,
        )
    except UnsupportedError as error:
        raise UnsupportedError(
            f"the last weighting, with final_particles={problem.options.final_particles}: {error}"
        ) from None


def reweight(source: Posterior, particles: int, streams: Streams) -> Posterior:
    """Any backend's posterior as the proposal of massively parallel importance weighting.

    Each block's joint Gaussian is fitted to joint draws of the posterior.
    """
    options = ParticleOptions(particles=particles, final_particles=particles)
    bound = source.bound
    blocks = make_blocks(bound.graph, options)
    settings = Settings(streams)
    sizes = particle_counts(bound, blocks, options, settings)
    weighting = make_weighting(bound, blocks, sizes, 0, None)
    problem = Problem(bound, options, settings, weighting, 1)
    draws = source.samples(4000, seed=streams.seed)
    proposals = {b.axis: fitted(problem, b, draws) for b in blocks if not b.enumerated}
    start = first_approximation(replace(problem, options=replace(options, start="standard")))
    result = posterior(problem, start._replace(proposals=proposals), "qem", 0)
    result.model, result.why = source.model, f"reweighted from {source.method}"
    result.params = dict(source.params)
    return result


def _kept(problem: Problem, weighting: Weighting, number: int) -> tuple[int, Running | None]:
    """Replicates that there is room for, and what sums them up where their particles are too many to keep."""
    points = point_bytes(weighting.bound, weighting.blocks, weighting.sizes)
    room = (problem.settings.memory or DEFAULT_MEMORY) // 4 // max(points, 1)
    if room >= number:
        return number, None
    if problem.options.replicates is None:
        number = min(number, max(room, REPLICATES))
    if room >= number or not draws_in_parts(weighting):
        return number, None
    return number, Running(weighting, inner_blocks(weighting))


def _replicate(
    problem: Problem, weighting: Weighting, q: Approximation, number: int, running: Running | None
) -> Replicate:
    streams = problem.settings.streams.child(f"replicate {number}")
    draw = draw_all if running is None else draw_in_parts
    with torch.no_grad():
        particles = draw(weighting, q, streams, problem.options.tails)
        here = evaluated(problem, weighting, particles, q)
    weights = weigh(here, last=True, pairs=())
    log_z = weights.log_z.detach()
    marginals = {a: w.detach() for a, w in weights.marginals.items()}
    above = picked.parent(weighting)
    if above is not None:
        particles, marginals = picked.kept(weighting, above, particles, marginals, streams)
    if running is not None and isinstance(particles, PartDraws):
        running.add(particles, log_z, marginals)
        marginals = {a: w for a, w in marginals.items() if a not in running.squares}
    return Replicate(particles, log_z, marginals)


def _missed(
    problem: Problem, weighting: Weighting, q: Approximation, log_z: Tensor
) -> tuple[str, ...]:
    """A warning where particles of the prior find more evidence than those of the proposals: a mode was missed.

    Weights of fitted proposals cannot show it, for no particle lies there.
    """
    # Particles that share their noise do not show it by their number.
    if sum(b.dims for b in weighting.blocks) > _SEARCHED or picked.parent(weighting) is not None:
        return ()
    options = replace(problem.options, start="prior")
    first = first_approximation(replace(problem, weighting=weighting, options=options))
    wide = Approximation(first.proposals, q.params)
    try:
        found = _replicate(problem, weighting, wide, -1, None)
    except NumericalError:  # too far out to be weighed, so nothing is there
        return ()
    ess = min(
        (float((1 / w.square().sum(-1)).median()) for w in found.marginals.values()), default=0.0
    )
    gain = float(found.log_z - (log_z.logsumexp(0) - math.log(len(log_z))))
    if not ess >= _FEW / 2 or not gain > max(0.2, 3 / math.sqrt(ess)):
        return ()
    return (
        f"draws of the prior find {gain:.1f} nats more evidence than the fitted proposals: the posterior has another mode. "
        "Use restarts=, or more particles",
    )


def _effective(weighting: Weighting, marginals: Mapping[str, Marginal]) -> tuple[float, float]:
    """Effective particles of all replicates, outside and within plates: median over a latent's elements, least over latents."""
    least = {False: math.inf, True: math.inf}
    within = {n: bool(b.plates) for b in weighting.blocks for n in b.names}
    for name, m in marginals.items():
        if isinstance(m, mg.Weighted):
            ess = float((1 / m.weights.square().sum(0)).median())
            least[within[name]] = min(least[within[name]], ess)
    return least[False], least[True]


def _softened(
    problem: Problem, weighting: Weighting, q: Approximation, replicates: Sequence[Replicate]
) -> tuple[Exponents, list[Replicate], dict[str, Marginal]]:
    """The same particles under weights that are raised to the largest power that leaves enough of them effective.

    A handful of particles says less of the posterior than the proposal does; between the two lies ``q^(1 - b) p^b``, whose
    weights are bounded where those of the posterior are not ([Ionides2008] truncates them to the same end).
    """
    here = evaluated(problem, weighting, replicates[0].particles, q)
    fewest = min(weighting.sizes[b.axis] for b in weighting.blocks if not b.enumerated)
    enough = min(max(_FEW / len(replicates), _FEWEST) / fewest, 0.5)
    exponents, _ = largest_exponents(here, Exponents(), enough, may_differ(weighting))
    while True:  # one replicate says little of the others
        made = [_reweighed(problem, weighting, q, r, exponents) for r in replicates]
        marginals = _marginals(weighting, made, _shares(made), None)
        effective = _effective(weighting, marginals)
        if min(effective) >= _FEW or exponents.outside < _LEAST:
            return exponents, made, marginals
        within = exponents.within / (_FINER if effective[1] < _FEW else 1.0)
        exponents = Exponents(min(exponents.outside / _FINER, within), within)


def _enough(above: Block | None) -> int:
    """Effective particles from which the last weights stay as they are."""
    return _FEW if above is None else max(_FEW, picked.enough(above))


def _raised(
    problem: Problem, weighting: Weighting, q: Approximation, replicates: Sequence[Replicate]
) -> tuple[Exponents, list[Replicate], dict[str, Marginal]]:
    """:func:`_softened` where one block's weights decide."""
    above = picked.parent(weighting)
    assert above is not None
    log_z = torch.stack([r.log_z for r in replicates])
    weights = [r.marginals[above.axis] for r in replicates]
    power = picked.exponent(log_z, weights, _enough(above))
    made = [
        Replicate(r.particles, *picked.raised(r.log_z, above, r.marginals, power))
        for r in replicates
    ]
    return Exponents(power, 1.0), made, _marginals(weighting, made, _shares(made), None)


def _reweighed(
    problem: Problem, weighting: Weighting, q: Approximation, r: Replicate, exponents: Exponents
) -> Replicate:
    here = evaluated(problem, weighting, r.particles, q)
    weights = weigh(here, exponents.outside, pairs=(), inner=exponents.within)
    found = {a: w.detach() for a, w in weights.marginals.items()}
    return r._replace(log_z=weights.log_z.detach(), marginals=found)


def _shares(replicates: Sequence[Replicate]) -> Tensor:
    """What each replicate counts."""
    return torch.stack([r.log_z for r in replicates]).softmax(0)


def _with_exponents(found: Diagnostics, exponents: Exponents) -> Diagnostics:
    notes = {**found.notes, "exponents of the last weights": tuple(exponents)}
    warning = (
        f"the last weights left few effective particles and are tempered (exponent {exponents.outside:.2g} of 1): "
        "moments lie between those of the proposal and of the posterior"
    )
    return replace(found, notes=notes, warnings=(*found.warnings, warning))


def _best_restart(
    problem: Problem, q: Approximation
) -> tuple[Approximation, str, dict[str, Tensor]]:
    """The restart with the highest evidence, how many others reach it, and the means of those that do."""
    if not problem.weighting.restarts:
        return q, "", {}
    particles = draw_all(problem.weighting, q, problem.settings.streams)
    weights = weigh(evaluated(problem, problem.weighting, particles, q))
    log_z = weights.log_z
    best = int(log_z.argmax())
    proposals = {a: _select(p, best) for a, p in q.proposals.items()}
    params = {n: Learned(*(t[best] for t in p)) for n, p in q.params.items()}
    near = [i for i in log_z.argsort(descending=True).tolist() if log_z[i] > log_z[best] - 3]
    text = f"{len(near)} of {len(log_z)} restarts reach the best log evidence within 3 nats"
    runs = [_one_restart(particles, weights, i) for i in near]
    return Approximation(proposals, params), text, _restart_means(problem.weighting, runs)


def _one_restart(particles: Mapping[str, Particles], weights: Weights, i: int) -> Replicate:
    own = {
        a: tree_map(lambda t: t[i] if isinstance(t, Tensor) else t, p) for a, p in particles.items()
    }
    marginals = {a: w[i].detach() for a, w in weights.marginals.items()}
    return Replicate(own, weights.log_z[i].detach(), marginals)


def _restart_means(weighting: Weighting, runs: Sequence[Replicate]) -> dict[str, Tensor]:
    """``[runs, *plates, *event]`` of every latent that is sampled."""
    members = [(b, m) for b in weighting.blocks if not b.enumerated for m in b.members]
    one = torch.ones(1, dtype=weighting.bound.dtype, device=weighting.bound.device)
    return {
        m.name: torch.stack([mg.mean(_weighted(weighting, b, m, [run], one)) for run in runs])
        for b, m in members
    }


def _select(p: Proposal, restart: int) -> Proposal:
    return over_tensors(lambda t: t[restart], p)


# ---- marginals --------------------------------------------------------------------------------------------------


def _marginals(
    weighting: Weighting, replicates: list[Replicate], shares: Tensor, running: Running | None
) -> dict[str, Marginal]:
    found: dict[str, Marginal] = {} if running is None else running.marginals()
    for block in weighting.blocks:
        if running is not None and block in running.blocks:
            continue
        for member in block.members:
            if block.enumerated:
                stacked = torch.stack(
                    [_in_order(r.marginals[block.axis], block, weighting) for r in replicates]
                )
                found[member.name] = mg.Table(torch.tensordot(shares, stacked, 1))
            else:
                found[member.name] = _weighted(weighting, block, member, replicates, shares)
    return {v.name: found[v.name] for v in weighting.bound.graph.latents}


def _in_order(weights: Tensor, block: Block, weighting: Weighting) -> Tensor:
    """Marginals ``[*plates, K]`` with the plates in the order of the block."""
    canonical = [p for p in weighting.bound.graph.plates if p in block.plates]
    return weights.permute(*(canonical.index(p) for p in block.plates), weights.ndim - 1)


def _weighted(
    weighting: Weighting, block: Block, member: Member, replicates: list[Replicate], shares: Tensor
) -> mg.Weighted:
    points, weights = [], []
    for share, r in zip(shares, replicates, strict=True):
        value = r.particles[block.axis].values[member.name]
        points.append(_variable_order(value, block, member))
        w = share * _in_order(r.marginals[block.axis], block, weighting).movedim(-1, 0)
        weights.append(_over_plates(w, block, member))
    return mg.Weighted(torch.cat(points), torch.cat(weights))


def _variable_order(value: Tensor, block: Block, member: Member) -> Tensor:
    """``[K, *plates of the variable, *event]`` from ``[*block plates, K, *collapsed, *event]``."""
    lead = len(block.plates)
    have = (*block.plates, *member.collapsed)
    value = value.movedim(lead, 0)
    return value.permute(
        0, *(1 + have.index(p) for p in member.variable.plates), *range(1 + len(have), value.ndim)
    )


def _over_plates(w: Tensor, block: Block, member: Member) -> Tensor:
    """Weights ``[K, *plates of the variable]``: collapsed plates share theirs."""
    have = (*block.plates, *member.collapsed)
    w = w.reshape(*w.shape, *(1,) * len(member.collapsed)).expand(*w.shape, *member.sizes)
    return w.permute(0, *(1 + have.index(p) for p in member.variable.plates))


def _evidence(log_z: Tensor) -> Evidence:
    n = len(log_z)
    relative = (log_z - log_z.max()).exp()
    value = float(log_z.max() + relative.mean().log())
    se = float(relative.std() / relative.mean() / math.sqrt(n)) if n > 1 else math.nan
    return Evidence(value, se, "estimate")


def _diagnostics(
    weighting: Weighting,
    marginals: Mapping[str, Marginal],
    agreement: str,
    iterations: int,
    warnings: tuple[str, ...],
    running: Running | None,
) -> Diagnostics:
    ess, tails = ({} if running is None else running.effective()), {}
    for name, m in marginals.items():
        if isinstance(m, mg.Weighted) and name not in ess:
            ess[name] = 1.0 / m.weights.square().sum(0)
            tails[name] = tail_index(m.weights.movedim(0, -1))
    notes: dict[str, object] = {"plan": str(weighting.plan), "particles": dict(weighting.sizes)}
    made = [
        f"{n} given {', '.join(b.reads)}"
        for b in weighting.blocks
        for n in b.names
        if isinstance(b.form, Sites)
    ]
    if made:
        notes["sites"] = "; ".join(made)
    if agreement:
        notes["restarts"] = agreement
    return Diagnostics(ess, tails, True, iterations, 0.0, warnings, notes)


# ---- joint draws ------------------------------------------------------------------------------------------------


def _sampler(
    problem: Problem,
    weighting: Weighting,
    q: Approximation,
    replicates: list[Replicate],
    shares: Tensor,
    exponents: Exponents,
) -> Any:
    def sample(n: int, streams: Streams) -> dict[str, Tensor]:
        generator = streams.of("joint draws")
        counts = torch.bincount(
            torch.multinomial(shares.cpu(), n, replacement=True, generator=generator),
            minlength=len(replicates),
        )
        parts = [
            _draw_from(problem, weighting, q, r, int(c), generator, exponents)
            for r, c in zip(replicates, counts, strict=True)
            if c > 0
        ]
        shuffled = torch.randperm(n, generator=generator)
        return {name: torch.cat([p[name] for p in parts])[shuffled] for name in parts[0]}

    return sample


def _draw_from(
    problem: Problem,
    weighting: Weighting,
    q: Approximation,
    r: Replicate,
    n: int,
    generator: torch.Generator,
    exponents: Exponents,
) -> dict[str, Tensor]:
    above = picked.parent(weighting)
    if above is not None:
        return _together(weighting, above, r, n, generator)
    with torch.no_grad():
        factors = evaluated(problem, weighting, r.particles, q).factors(*exponents)
        power = exponents.outside / exponents.within
        indices = weighting.plan.draw(factors, n, generator, power=power)
    drawn: dict[str, Tensor] = {}
    blocks: Sequence[Block] = weighting.blocks
    if isinstance(r.particles, PartDraws):
        budget = problem.settings.memory or DEFAULT_MEMORY
        found = picked_in_parts(r.particles, indices, budget)
        drawn = in_variable_order(found, r.particles.inner)
        blocks = [b for b in blocks if b.enumerated or b not in r.particles.inner]
    for block in blocks:
        index = indices[block.axis]  # [n, *plates in the order of the graph]
        canonical = [p for p in weighting.bound.graph.plates if p in block.plates]
        index = index.permute(0, *(1 + canonical.index(p) for p in block.plates))
        index = flat_index(weighting, block, indices, index)
        for member in block.members:
            if block.enumerated:
                drawn[member.name] = index.to(problem.bound.dtype)
            else:
                value = r.particles[block.axis].values[member.name]
                drawn[member.name] = _picked(value, index, block, member)
    return drawn


def _together(
    weighting: Weighting, above: Block, r: Replicate, n: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Joint draws where each of the parents' particles has one particle of every other block."""
    weights = r.marginals[above.axis].cpu()
    chosen = torch.multinomial(weights, n, replacement=True, generator=generator)
    drawn = {}
    for block in weighting.blocks:
        shape = [weighting.bound.size(p) for p in block.plates]
        index = chosen.to(r.log_z.device).reshape(n, *(1,) * len(shape)).expand(n, *shape)
        for member in block.members:
            value = r.particles[block.axis].values[member.name]
            drawn[member.name] = _picked(value, index, block, member)
    return drawn


def _picked(value: Tensor, index: Tensor, block: Block, member: Member) -> Tensor:
    lead = len(block.plates)
    moved = value.movedim(lead, 0)  # [K, *block plates, *collapsed, *event]
    rest = moved.ndim - 1 - lead
    wide = index.reshape(*index.shape, *(1,) * rest).expand(*index.shape, *moved.shape[1 + lead :])
    taken = moved.gather(0, wide)
    have = (*block.plates, *member.collapsed)
    return taken.permute(
        0, *(1 + have.index(p) for p in member.variable.plates), *range(1 + len(have), taken.ndim)
    )
