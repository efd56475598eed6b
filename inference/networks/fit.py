"""One stochastic gradient step of a Gaussian over the weights of a network, and the evaluations that go with it.

The loss is ``-(log-likelihood estimated from the batch) / N + T / N * KL``: N is the size of the data plate, whatever the
size of the batch. Steps are pure: a state is made of a state, and the same state, batch and seed give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl.backend import Info, Settings
from ppl.batches import Batch
from ppl.binding import Bound
from ppl.errors import ModelError
from ppl.inference.networks import checks
from ppl.inference.networks.costs import check_memory
from ppl.inference.networks.forward import Draw, Wrap, callables, leaves, values_of
from ppl.inference.networks.noise import generator_of, standard_noise
from ppl.inference.networks.priors import make_priors
from ppl.inference.networks.program import Program, likelihood_factors
from ppl.inference.networks.records import (
    Estimator,
    Factory,
    Problem,
    Rule,
    Runs,
    Start,
    State,
    curvature_of,
    memory_of,
    rate,
    sds,
    sizes,
    temperature,
)
from ppl.inference.networks.slopes import slopes_of
from ppl.inference.networks.starts import first_params, make_starts, param_units
from ppl.inference.networks.structure import Network, ProductNode, find_network
from ppl.inference.networks.updates import moved
from ppl.lower import variables_of
from ppl.nn.structure import buffers

_KL_EVERY = 10  # steps: a step does not need it, the report shows the last known
_MEMORY = 0.98  # of the running mean of the loss


class Evaluation(NamedTuple):
    """The log-likelihood of all data estimated from a batch, and what it was evaluated at."""

    log_likelihood: Tensor  # a number; differentiable in the leaves
    draw: Draw
    values: dict[str, Any]


def prepare(
    bound: Bound,
    settings: Settings,
    rule: Rule,
    wish: str,
    *,
    method: str = "vi",
    is_sparse: Sequence[bool] | None = None,
    factory: Factory | None = None,
    starts: Callable[[Network, tuple[Start, ...]], tuple[Start, ...]] | None = None,
) -> Problem:
    """Everything that is computed once.

    Args:
        bound: the graph and its data.
        settings: of the run.
        rule: how steps are taken.
        wish: "local", "flipout" or "draw": the estimator of layers where it applies.
        method: name of the backend, for messages.
        is_sparse: which arrays keep some of their entries only; none by default.
        factory: makes the products of such arrays.
        starts: changes where arrays start.
    """
    _check_augment(bound, rule, method)
    network = find_network(bound)
    plate = next(iter(settings.minibatch), None) if settings.minibatch else None
    found = [choose_estimator(network, i, wish) for i in range(len(network.arrays))]
    priors = make_priors(bound, network)
    usual = make_starts(bound, network, priors, settings, rule.initial_sd)
    return Problem(
        bound=bound,
        settings=settings,
        rule=rule,
        network=network,
        program=Program(
            bound, network, plate, training=_trains_norms(bound), changed=tuple(rule.augment)
        ),
        priors=priors,
        estimators=tuple(kind for kind, _ in found),
        why=tuple(why for _, why in found),
        starts=usual if starts is None else starts(network, usual),
        units=param_units(bound, network),
        is_sparse=tuple(is_sparse or [False] * len(network.arrays)),
        factory=factory or _no_factory,
        seed=settings.streams.child("networks").seed,
        made={},
        table={},
        method=method,
    )


def _check_augment(bound: Bound, rule: Rule, method: str) -> None:
    graph = bound.graph
    read = {n for f in likelihood_factors(graph) for n in variables_of(graph, f)}
    covariates = [v.name for v in graph.role("given") if v.name in read]
    for name in rule.augment:
        if name not in covariates:
            raise ModelError(
                f"{method.upper()}(augment={{{name!r}: ...}}): the likelihood reads no such covariate. Covariates: "
                f"{', '.join(covariates) or 'none'}."
            )


def _trains_norms(bound: Bound) -> bool:
    """Whether batch norms take the statistics of a batch: unless the data holds all of them."""
    return any(n not in bound.columns for pair in buffers(bound.graph) for n in pair)


def choose_estimator(network: Network, at: int, wish: str) -> tuple[Estimator, str]:
    """The estimator of an array, and why it is not the one wished for (empty where it is)."""
    array = network.arrays[at]
    if array.role == "other":
        return "draw", array.why
    if wish not in ("local", "flipout"):
        return "draw", ""
    node = network.products[array.uses[0]]
    uses = network.arrays[node.weight].uses
    nodes = [network.products[i] for i in uses]
    if any(n.meets for n in nodes) or len({n.plates for n in nodes}) > 1:
        return "draw", "what it puts out for different elements meets in one expression"
    if wish == "flipout":
        return "flipout", ""
    if len(uses) > 1:
        return "flipout", "it is used more than once in an example"
    if node.rows:
        return "flipout", "every example multiplies several vectors by it"
    return "local", ""


def init(problem: Problem) -> Runs:
    """First states of all restarts; all entries of every array are kept.

    Raises:
        UnsupportedError: a step would not fit into the memory budget.
    """
    empty = torch.empty(0, dtype=torch.long, device=problem.bound.device)
    sets = [empty] * len(problem.arrays)
    runs = Runs(tuple(first(problem, run, sets) for run in range(problem.settings.restarts)))
    check_memory(problem, runs)
    return runs


def first(problem: Problem, run: int, indices: Sequence[Tensor]) -> State:
    """First state of one restart.

    Args:
        problem: what is fitted.
        run: its number.
        indices: entries that are kept of every array that is sparse.
    """
    generator = problem.settings.streams.of(f"first means {run}")
    means, scales = [], []
    for array, start, own, sparse in zip(
        problem.arrays, problem.starts, indices, problem.is_sparse, strict=True
    ):
        mean, sd = _started(start, array.free_shape, generator)
        means.append(mean[own] if sparse else mean)
        scales.append(sd[own] if sparse else sd)
    none = torch.zeros(0, dtype=problem.bound.dtype, device=problem.bound.device)
    sd = torch.cat([none, *scales])
    mean = torch.cat([none, *means, first_params(problem.bound, problem.params)])
    raw = raw_of(problem, sd, 0)
    memory = memory_of(problem.rule, mean, raw)
    return State(mean, raw, memory, tuple(indices), 0, run, math.nan, math.nan, math.nan)


def raw_of(problem: Problem, sd: Tensor, step: int) -> Tensor:
    """What stands in ``raw`` for standard deviations ``[k]``."""
    if problem.rule.natural:
        return curvature_of(sd, problem.examples, temperature(problem.rule, step))
    return sd + torch.log(-torch.expm1(-sd))  # the inverse of softplus


def _started(
    start: Start, shape: tuple[int, ...], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    like = start.spread
    noise = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
    mean = start.loc + start.spread * noise
    return mean.reshape(-1), start.sd.expand(shape).reshape(-1)


def _no_factory(node: ProductNode, indices: Tensor) -> Any:
    raise AssertionError("no array is sparse")


# ---- a step ------------------------------------------------------------------------------------------------------


def step_all(problem: Problem, runs: Runs, batch: Batch | None = None) -> tuple[Runs, Info]:
    """One step of every restart; ``Info`` is that of the best."""
    made = [step(problem, state, batch) for state in runs.runs]
    best = min(made, key=lambda m: m[0].loss)
    return Runs(tuple(state for state, _ in made)), best[1]


def step(problem: Problem, state: State, batch: Batch | None = None) -> tuple[State, Info]:
    """One step of one run.

    Raises:
        NumericalError: the loss or a gradient is not finite, or the loss runs away.
    """
    rule = problem.rule
    weight = temperature(rule, state.step) / problem.examples
    # Draws and variances lie where the new means will, and new raw scales where the sds do.
    sd = sds(problem, state, problem.spare.like(state.raw))
    place = problem.spare.like(state.mean)
    loss, other_kl, slopes, param_slopes = slopes_of(problem, state, sd, batch, weight, place)
    checks.check_loss(problem, state, batch, loss)
    with_kl = state.step % _KL_EVERY == 0
    new = moved(problem, state, sd, slopes, param_slopes, with_kl, place)
    total = new.mean.sum() if rule.natural else new.mean.sum() + new.raw.sum()
    if not bool(total.isfinite()):  # a natural step divides by the curvature: one sum shows both
        checks.refuse_step(problem, state, batch, new.mean, new.raw)
    kl = state.kl if new.kl is None else float(new.kl) + other_kl
    first = loss if state.step == 0 else state.first
    mean_loss = loss if state.step == 0 else _MEMORY * state.loss + (1 - _MEMORY) * loss
    after = State(
        new.mean, new.raw, new.memory, state.indices, state.step + 1, state.run, mean_loss, first, kl
    )  # fmt: skip
    return after, info(problem, after, loss)


def info(problem: Problem, state: State, loss: float) -> Info:
    """What is shown of a step, from the state after it and the loss before."""
    n = problem.examples
    bound = -n * loss - temperature(problem.rule, state.step - 1) * state.kl
    metrics = {
        "nll": loss,
        "kl": state.kl,
        "bound": bound,
        "rate": problem.rule.learning_rate * rate(problem.rule, state.step - 1),
    }
    return Info(metrics, done=state.step == problem.rule.horizon)


# ---- evaluations -------------------------------------------------------------------------------------------------


def evaluate(
    problem: Problem,
    state: State,
    batch: Batch | None = None,
    *,
    at: str = "draw",
    number: int = 1000,
    wrap: Wrap | None = None,
    program: Program | None = None,
    also: Mapping[str, Any] | None = None,
    augmented: bool = False,
) -> Evaluation:
    """The log-likelihood of all data, estimated from a batch, without a step.

    Args:
        problem: what is fitted.
        state: of a run.
        batch: None: all data.
        at: "draw": a draw of all weights; "mean": their means.
        number: of the draw: another number, another draw; below 1000 are those of steps.
        wrap: called with each product node and its function ``(x, *bias)``; returns the function that is used in its place, such
            as one that keeps ``x`` and the result to differentiate by.
        program: another lowered form; that of the problem by default.
        also: more inputs of it.
        augmented: whether covariates are changed as in a step.
    """
    generator = generator_of(problem, state, number)
    eps: list[Tensor | None] = [None] * len(problem.arrays)
    if at == "draw" and state.raw.numel():
        noise = standard_noise(problem, state, generator, state.raw.numel())
        eps = list(noise.split(sizes(problem, state)))
    kinds: list[Estimator] = ["draw"] * len(problem.arrays)
    draw = leaves(problem, state, sds(problem, state), eps, kinds)
    values = values_of(problem, state, draw)
    functions = callables(problem, state, draw, generator, wrap)
    run = problem.program if program is None else program
    given = {**values, **functions, **(also or {})}
    augment = problem.rule.augment if augmented else None
    return Evaluation(run(given, batch, augment, generator), draw, values)


__all__ = [
    "Evaluation",
    "choose_estimator",
    "evaluate",
    "first",
    "info",
    "init",
    "prepare",
    "raw_of",
    "step",
    "step_all",
]
