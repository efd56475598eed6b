"""The first state: sets, the kernels that a timing chooses, first means, and scales that leave little noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ppl.inference.networks import fit
from ppl.inference.networks import records as networks
from ppl.inference.networks.costs import check_memory
from ppl.inference.networks.records import Runs
from ppl.inference.networks.structure import ProductNode
from ppl.inference.ssvi import initial, scores, sets, structured, timing
from ppl.inference.ssvi.patterns import KERNELS
from ppl.inference.ssvi.records import Layer, Problem, State, form_of
from ppl.inference.ssvi.timing import Timing

_TIMED_BATCH = 512  # examples that a kernel is timed with, at most


def init(problem: Problem) -> State:
    """First sets, kernels by a timing, first means, and scales that leave little noise.

    Raises:
        UnsupportedError: a step would not fit into the memory budget.
    """
    restarts = problem.inner.settings.restarts
    kernels = tuple(KERNELS.index(t.kernel) for t in timings(problem))
    problem.running.take(problem, kernels)
    runs = [fit.first(problem.inner, run, first_sets(problem, run)) for run in range(restarts)]
    check_memory(problem.inner, Runs(tuple(runs)))
    quiet = tuple(_quietened(problem, state) for state in runs)
    return State(Runs(quiet), kernels, (0,) * restarts, (1.0,) * restarts)


def first_sets(problem: Problem, run: int) -> list[Tensor]:
    """Random entries of every sparse array; of one whose law an earlier fit left, those that it is surest of."""
    inner, device = problem.inner, problem.inner.bound.device
    generator = inner.settings.streams.of(f"first sets {run}")
    found = [torch.empty(0, dtype=torch.long, device=device) for _ in inner.arrays]
    for layer in problem.layers:
        start, groups = inner.starts[layer.at], layer.groups
        known = scores.snr(start.loc, start.sd).reshape(-1) if start.is_carried else None
        if groups is not None:
            count = max(1, round(layer.budget / layer.form.size * groups.number))
            if known is not None:
                every = torch.arange(layer.form.size, device=device)
                known = structured.group_scores(groups, every, known, is_sum=False)[1]
            chosen = _chosen(known, groups.number, count, generator, device)
            found[layer.at] = structured.members(groups, chosen)
            continue
        drawn = _chosen(known, layer.form.size, layer.budget, generator, device)
        if problem.options.is_shared:
            drawn = sets.cover_rows(drawn, layer.form.rows, layer.form.columns, generator)
        found[layer.at] = drawn
    return found


def _chosen(
    known: Tensor | None, size: int, count: int, generator: torch.Generator, device: torch.device
) -> Tensor:
    """The ``count`` of highest score, ascending; at random where there are none."""
    if known is None:
        return sets.random_set(size, count, generator, device)
    return known.topk(min(count, size)).indices.sort().values


def timings(problem: Problem) -> list[Timing]:
    """The kernel of every product, and how fast it is."""
    layers = {layer.at: layer for layer in problem.layers}
    return [
        _timing(problem, layers[node.weight], i) if node.weight in layers else timing.UNTIMED
        for i, node in enumerate(problem.inner.network.products)
    ]


def _timing(problem: Problem, layer: Layer, at: int) -> Timing:
    inner, wish = problem.inner, problem.options.kernel
    form, bound = form_of(inner.network.products[at]), inner.bound
    compact = None if layer.groups is None else layer.groups.kernel
    if compact is not None:
        return timing.UNTIMED._replace(kernel=compact)
    if wish != "auto":
        return timing.UNTIMED._replace(kernel=wish if form.kind == "linear" else "dense")
    minibatch = inner.settings.minibatch
    batch = next(iter(minibatch.values())) if minibatch else inner.examples
    return timing.choose(form, layer.budget, min(batch, _TIMED_BATCH), bound.dtype, bound.device)


def _quietened(problem: Problem, state: networks.State) -> networks.State:
    """Scales so small that noise starts below 5 % of the variance of every layer's outputs."""
    if not problem.layers:
        return state  # as in ``vi``
    shares = noise_shares(problem, state)
    inner, factors = problem.inner, torch.ones_like(state.raw)
    wheres = networks.slices(inner, state)
    for node, found in zip(inner.network.products, shares, strict=True):
        part = factors[wheres[node.weight]]
        torch.minimum(part, initial.shrinkage(found), out=part)
    sd = networks.sds(inner, state) * factors
    return state._replace(raw=fit.raw_of(inner, sd, 0))


def noise_shares(problem: Problem, state: networks.State) -> list[Tensor]:
    """Share of noise in the variance of the outputs of every product, at the means of what comes before it."""
    inner = problem.inner
    variances = networks.sds(inner, state).square()
    wheres = networks.slices(inner, state)
    places = {node.node.id: i for i, node in enumerate(inner.network.products)}
    found = [state.mean.new_zeros(()) for _ in inner.network.products]

    def wrap(node: ProductNode, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def measured(x: Tensor, *bias: Tensor) -> Tensor:
            at, where = places[node.node.id], wheres[node.weight]
            product = networks.product_of(inner, state, at)
            m, v = product(state.mean[where], x), product(variances[where], x.square())
            found[at] = initial.noise_share(m, v)
            return run(x, *bias)

        return measured

    batch = None if problem.batches is None else problem.batches.at(0)
    with torch.no_grad():
        fit.evaluate(inner, state, batch, at="mean", wrap=wrap)
    return found


__all__ = ["first_sets", "init", "noise_shares", "timings"]
