"""Derivatives of the loss of one step by every array and param, averaged over draws.

The divergence from Normal laws with known parameters is left out here: it is differentiated by hand where the step is
taken (:mod:`ppl.inference.networks.updates`). That from any other law is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppl.batches import Batch
from ppl.inference.networks.forward import Draw, callables, leaves, values_of
from ppl.inference.networks.noise import generator_of, standard_noise
from ppl.inference.networks.records import Problem, State, kept, sizes
from ppl.inference.networks.updates import Slope


def slopes_of(
    problem: Problem, state: State, sd: Tensor, batch: Batch | None, weight: float, place: Tensor
) -> tuple[float, float, list[Slope], list[Tensor]]:
    """Mean negative log-likelihood, divergence from laws that are no known Normals, and all slopes.

    Args:
        problem: what is fitted.
        state: of a run.
        sd: of all entries ``[S]``.
        batch: None: all data.
        weight: of the divergence, ``T / N``.
        place: memory for a draw of all entries.
    """
    draws = problem.rule.draws
    found = [_one(problem, state, sd, batch, weight, i, None if i else place) for i in range(draws)]
    loss = sum(f[0] for f in found) / draws
    kl = sum(f[1] for f in found) / draws
    if draws == 1:
        return loss, kl, found[0][2], found[0][3]
    slopes = [_averaged([f[2][i] for f in found]) for i in range(len(problem.arrays))]
    params = [torch.stack(ps).mean(0) for ps in zip(*(f[3] for f in found), strict=True)]
    return loss, kl, slopes, params


def _one(
    problem: Problem,
    state: State,
    sd: Tensor,
    batch: Batch | None,
    weight: float,
    number: int,
    place: Tensor | None,
) -> tuple[float, float, list[Slope], list[Tensor]]:
    generator = generator_of(problem, state, number)
    with torch.enable_grad():
        draw = drawn(problem, state, sd, generator, place)
        values = values_of(problem, state, draw)
        functions = callables(problem, state, draw, generator)
        augment = problem.rule.augment
        log_lik = problem.program({**values, **functions}, batch, augment, generator)
        loss = -log_lik / problem.examples
        kl, extra = _divergences(problem, state, draw, values, sd)
        total = loss if kl is None else loss + weight * kl
        inputs = draw.inputs()
        grads = torch.autograd.grad(
            total, [*inputs, *(t for pair in extra.values() for t in pair)],
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
    slopes = _sorted(problem, draw, list(grads), extra)
    params = list(grads[len(inputs) - len(draw.params) : len(inputs)])
    return float(loss.detach()), 0.0 if kl is None else float(kl.detach()), slopes, params


def drawn(
    problem: Problem,
    state: State,
    sd: Tensor,
    generator: torch.Generator,
    place: Tensor | None = None,
) -> Draw:
    """Leaves of a step, with noise for the arrays that need it; arguments are those of :func:`slopes_of`."""
    counts = noise_counts(problem, state)
    eps: list[Tensor | None] = [None] * len(counts)
    if any(counts):
        noise = standard_noise(problem, state, generator, sum(counts)).split(counts)
        eps = [part if count else None for part, count in zip(noise, counts, strict=True)]
    return leaves(problem, state, sd, eps, out=None if place is None else place[: len(sd)])


def noise_counts(problem: Problem, state: State) -> list[int]:
    """Standard normal numbers that a step draws for every array; none where its outputs are drawn."""
    return [
        0 if kind == "local" and _has_closed_form(problem, i) else count
        for i, (kind, count) in enumerate(
            zip(problem.estimators, sizes(problem, state), strict=True)
        )
    ]


def _has_closed_form(problem: Problem, at: int) -> bool:
    return problem.priors[at].kind in ("normal", "slab", "laplace")


def _divergences(
    problem: Problem, state: State, draw: Draw, values: dict[str, Any], sd: Tensor
) -> tuple[Tensor | None, dict[int, tuple[Tensor, Tensor]]]:
    """KL from every law that is no known Normal, and the means and sds it is differentiated by.

    Natural steps know the entropy; what they need is the law's slope at the draw that the likelihood was evaluated at.
    """
    total: Tensor | None = None
    extra: dict[int, tuple[Tensor, Tensor]] = {}
    counts = sizes(problem, state)
    means, scales = state.mean[: sum(counts)].split(counts), sd.split(counts)
    for i, prior in enumerate(problem.priors):
        if prior.is_fixed_normal:
            if prior.kind == "slab":  # the rest is known where the step is taken
                spike = torch.as_tensor(prior.constant(kept(problem, state, i)))
                total = spike if total is None else total + spike
            continue
        leaf, own = draw.arrays[i], kept(problem, state, i)
        if problem.rule.natural:
            part = -prior.density(values, leaf.mean, own)
        else:
            mean, scale = means[i].detach().requires_grad_(), scales[i].detach().requires_grad_()
            at = mean if leaf.eps is None else torch.addcmul(mean, scale, leaf.eps)
            part = prior.divergence(values, mean, scale, at, own)
            extra[i] = (mean, scale)
        total = part if total is None else total + part
    return total, extra


def _sorted(
    problem: Problem, draw: Draw, grads: list[Tensor], extra: dict[int, tuple[Tensor, Tensor]]
) -> list[Slope]:
    means = grads[: len(draw.arrays)]
    spreads = iter(grads[len(draw.arrays) :])
    rest = iter(grads[len(draw.inputs()) :])
    seconds = [None if leaf.spread is None else next(spreads) for leaf in draw.arrays]
    names = {"local": "variance", "flipout": "noise", "draw": "draw"}
    slopes = []
    for i, leaf in enumerate(draw.arrays):
        pair = (next(rest), next(rest)) if i in extra else (None, None)
        slopes.append(Slope(means[i], seconds[i], names[leaf.kind], leaf.eps, *pair))
    return slopes


def _averaged(slopes: Sequence[Slope]) -> Slope:
    """The mean over draws; of draws and Flipout in terms of the sd."""
    first = slopes[0]
    eps = _mean([s.eps for s in slopes])
    priors = _mean([s.prior_mean for s in slopes]), _mean([s.prior_sd for s in slopes])
    mean = torch.stack([s.mean for s in slopes]).mean(0)
    if first.kind == "variance":
        return Slope(mean, _mean([s.second for s in slopes]), "variance", eps, *priors)
    return Slope(mean, _mean([_by_sd(s) for s in slopes]), "sd", eps, *priors)


def _by_sd(slope: Slope) -> Tensor:
    assert slope.eps is not None
    return (slope.mean if slope.second is None else slope.second) * slope.eps


def _mean(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [p for p in parts if p is not None]
    return torch.stack(known).mean(0) if known else None


__all__ = ["drawn", "noise_counts", "slopes_of"]
