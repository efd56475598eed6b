"""The end of a run of a network: batch statistics under weight draws, the bound, marginals, and what the report says.

The evidence is the bound that was maximised, at full weight of the KL term. Where the data are taken in batches its
log-likelihood is estimated from at most 64 of them, a weight draw each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import biject_to

from ppl import marginals as mg
from ppl.batches import Batch, batches_of
from ppl.binding import Bound
from ppl.diagnostics import Diagnostics
from ppl.inference.networks.costs import table
from ppl.inference.networks.fit import evaluate
from ppl.inference.networks.forward import leaves, values_of
from ppl.inference.networks.norms import estimated_statistics
from ppl.inference.networks.program import Program
from ppl.inference.networks.records import (
    Problem,
    Runs,
    State,
    kept,
    param_shapes,
    sds,
    sizes,
    slices,
)
from ppl.inference.networks.structure import Array
from ppl.marginals import Marginal
from ppl.posterior import Evidence, Independent, Posterior
from ppl.streams import Streams

_EVALUATIONS = 64  # of the log-likelihood, of a batch each
_FEW_DRAWS, _MANY_DRAWS, _WORK = 16, 400, 10**8  # of all data at once: as many as are quickly made
_POINTS = 2000  # draws behind the moments of a latent that is not on the real line
_NUMBERS = 2**24  # at most, in these
_STILL = 0.01  # nats a weight: below, a Gaussian is its prior
_GAIN = 0.05  # of the loss of the first step: below, nothing was learned


class Judged(NamedTuple):
    """A fitted run, judged on all data or a part of its batches."""

    log_likelihood: float
    se: float
    mean_log_likelihood: float  # at the mean weights
    kl: float
    kl_each: float  # median of weights with a known Normal law


def collect(problem: Problem, runs: Runs) -> Posterior:
    """The posterior of the best restart."""
    state, agreement = best(problem, runs)
    problem.spare.clear()
    with torch.no_grad():
        statistics = estimated_statistics(problem, state)
        bound = replace(problem.bound, values={**problem.bound.values, **statistics})
        judged = judge(problem, state, bound)
        found = marginals(problem, state)
    exact = all(a.transform is None for a in problem.arrays)
    return Posterior(
        bound,
        found,
        method=problem.method,
        sampler=Independent(found) if exact else _Sampler(problem, state, found),
        log_evidence=Evidence(judged.log_likelihood - judged.kl, judged.se, "bound"),
        diagnostics=_diagnostics(problem, state, judged, agreement, bool(statistics)),
        params=_params(problem, state),
        seed=problem.settings.streams.seed,
    )


@torch.no_grad()
def judge(problem: Problem, state: State, bound: Bound | None = None) -> Judged:
    """Log-likelihood of the data under weight draws and at the mean weights, and the divergence from the prior.

    Args:
        problem: what was fitted.
        state: a run.
        bound: with the statistics of batch norms; that of the problem by default.
    """
    own = problem.bound if bound is None else bound
    program = Program(own, problem.network, problem.program.plate, training=False)
    parts = _parts(problem)
    draws = [
        float(evaluate(problem, state, b, number=2000 + i, program=program).log_likelihood)
        for i, b in enumerate(parts)
    ]
    means = [
        float(evaluate(problem, state, b, at="mean", program=program).log_likelihood)
        for b in (parts if parts[0] is not None else parts[:1])
    ]
    count, mean = len(draws), sum(draws) / len(draws)
    spread = math.sqrt(sum((d - mean) ** 2 for d in draws) / max(count - 1, 1))
    kl, each = _divergence(problem, state)
    return Judged(mean, spread / math.sqrt(count), sum(means) / len(means), kl, each)


def _parts(problem: Problem) -> list[Batch | None]:
    batches = batches_of(
        problem.bound, problem.settings.minibatch, problem.settings.streams.child("judged")
    )
    if batches is None:
        work = problem.examples * sum(a.size for a in problem.arrays)
        return [None] * max(_FEW_DRAWS, min(_MANY_DRAWS, _WORK // max(work, 1)))
    return [batches.part(i) for i in range(min(batches.parts, _EVALUATIONS))]


def _divergence(problem: Problem, state: State) -> tuple[float, float]:
    """All of it, with the mean over draws where laws read latents or have no closed form; and the median of a weight."""
    sd, where = sds(problem, state), slices(problem, state)
    known = [i for i, prior in enumerate(problem.priors) if prior.is_fixed_normal]
    total, each = 0.0, []
    for i in known:
        prior, own = problem.priors[i], kept(problem, state, i)
        mean, scale = state.mean[where[i]], sd[where[i]]
        total += float(prior.divergence({}, mean, scale, mean, own))
        if problem.arrays[i].role == "weight" and mean.numel():
            loc, spread = prior.normal(own)
            ratio, apart = scale / spread, (mean - loc) / spread
            each.append(0.5 * (ratio.square() + apart.square() - 1.0) - ratio.log())
    others = [i for i in range(len(problem.priors)) if i not in known]
    generator = problem.settings.streams.of("final divergence")
    for _ in range(_FEW_DRAWS if others else 0):
        total += _at_draw(problem, state, sd, others, generator) / _FEW_DRAWS
    return total, float(torch.cat(each).median()) if each else math.nan


def _at_draw(
    problem: Problem, state: State, sd: Tensor, arrays: Sequence[int], generator: torch.Generator
) -> float:
    """Divergence of some arrays from their laws, which are read at a draw."""
    noise = torch.randn(sd.shape, generator=generator, dtype=sd.dtype, device=sd.device)
    counts, where = sizes(problem, state), slices(problem, state)
    draw = leaves(problem, state, sd, list(noise.split(counts)), ["draw"] * len(counts))
    values, total = values_of(problem, state, draw), 0.0
    for i in arrays:
        mean, scale, at = state.mean[where[i]], sd[where[i]], draw.arrays[i].mean
        total += float(
            problem.priors[i].divergence(values, mean, scale, at, kept(problem, state, i))
        )
    return total


def best(problem: Problem, runs: Runs) -> tuple[State, str]:
    """The restart with the lowest loss, and how far the others agree."""
    if len(runs.runs) == 1:
        return runs.runs[0], ""
    n = problem.examples
    losses = [s.loss + (problem.rule.tempering * s.kl / n if s.kl == s.kl else 0.0) for s in runs.runs]  # fmt: skip
    lowest = min(range(len(losses)), key=losses.__getitem__)
    text = f"losses {', '.join(f'{x:.4g}' for x in losses)}; the lowest is kept"
    return runs.runs[lowest], text


# ---- marginals ---------------------------------------------------------------------------------------------------


def marginals(problem: Problem, state: State) -> dict[str, Marginal]:
    """What is known of every latent: Gaussians, sparse ones where entries are left out, or points."""
    sd, found = sds(problem, state), {}
    for i, (array, where) in enumerate(zip(problem.arrays, slices(problem, state), strict=True)):
        mean, scale = state.mean[where].clone(), sd[where].clone()
        found[array.name] = _marginal(problem, state, i, mean, scale)
    return found


def _marginal(problem: Problem, state: State, at: int, mean: Tensor, sd: Tensor) -> Marginal:
    array = problem.arrays[at]
    if problem.is_sparse[at]:
        return mg.SparseGaussian(state.indices[at].clone(), mean, sd, array.shape)
    if array.transform is None:
        return mg.Gaussian(mean.view(array.shape), sd.view(array.shape))
    n = max(100, min(_POINTS, _NUMBERS // array.size))
    generator = problem.settings.streams.of(f"final moments {array.name}")
    points = _transformed(array, mean, sd, n, generator)
    weight = torch.full((), 1 / n, dtype=points.dtype, device=points.device)
    return mg.Weighted(points, weight.expand(points.shape[: 1 + len(array.variable.plates)]))


def _transformed(
    array: Array, mean: Tensor, sd: Tensor, n: int, generator: torch.Generator
) -> Tensor:
    noise = torch.randn(
        (n, *mean.shape), generator=generator, dtype=mean.dtype, device=generator.device
    )
    free = (mean + sd * noise.to(mean.device)).view(n, *array.free_shape)
    assert array.transform is not None
    return array.transform(free)  # type: ignore[no-any-return]


class _Sampler:
    """Independent draws, of latents that are not on the real line by way of it."""

    independent = True  # a file needs no draws of it

    def __init__(self, problem: Problem, state: State, found: Mapping[str, Marginal]) -> None:
        self.found = found
        where, sd = slices(problem, state), sds(problem, state)
        self.moved = {
            a.name: (a, state.mean[w].clone(), sd[w].clone())
            for a, w in zip(problem.arrays, where, strict=True)
            if a.transform is not None
        }

    def __call__(self, n: int, streams: Streams) -> dict[str, Tensor]:
        plain = {k: m for k, m in self.found.items() if k not in self.moved}
        draws = Independent(plain)(n, streams)
        for name, (array, mean, sd) in self.moved.items():
            draws[name] = _transformed(array, mean, sd, n, streams.of(name))
        return {name: draws[name] for name in self.found}


def _params(problem: Problem, state: State) -> dict[str, Tensor]:
    shapes = param_shapes(problem)
    flat = state.mean[state.raw.numel() :].split([math.prod(s) for s in shapes])
    return {
        v.name: biject_to(v.support)(u.view(s))
        for v, u, s in zip(problem.params, flat, shapes, strict=True)
    }


# ---- the report --------------------------------------------------------------------------------------------------


def _diagnostics(
    problem: Problem, state: State, judged: Judged, agreement: str, has_norms: bool
) -> Diagnostics:
    n, rule = problem.examples, problem.rule
    notes: dict[str, object] = {
        "data": f"N = {n} ({' x '.join(problem.network.plates)})",
        "nll": f"{-judged.log_likelihood / n:.4g} nats an example under weight draws, "
        f"{-judged.mean_log_likelihood / n:.4g} at the mean weights",
        "kl": f"{judged.kl:.4g} nats, {judged.kl / n:.3g} an example",
        "temperature": f"{rule.tempering:g}",
        "layers": "\n" + table(problem, state),
    }
    if agreement:
        notes["restarts"] = agreement
    if has_norms:
        notes["batch norms"] = "statistics were estimated anew under weight draws"
    warnings = []
    if rule.tempering != 1.0:
        warnings.append(f"the KL term was weighted by {rule.tempering:g}: not a posterior")
    learned = state.first + judged.log_likelihood / n
    if judged.kl_each < _STILL and not learned > _GAIN * abs(state.first):
        warnings.append(
            "the posterior of the weights is still the prior, and the loss that of the start: run longer, raise learning_rate, "
            "use warmup=, or a prior with a smaller scale"
        )
    return Diagnostics({}, {}, True, 0, 0.0, tuple(warnings), notes)


__all__ = ["Judged", "best", "collect", "judge", "marginals"]
