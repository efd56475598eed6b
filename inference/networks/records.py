"""What the methods for networks compute once, and what they carry from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributions import biject_to

from ppl.backend import Settings
from ppl.binding import Bound
from ppl.graph import Variable
from ppl.inference.networks.priors import Prior
from ppl.inference.networks.products import Dense, Product
from ppl.inference.networks.program import Augment, Program
from ppl.inference.networks.spare import Spare
from ppl.inference.networks.structure import Array, Network, ProductNode

_EPOCHS, _LEAST_STEPS = 20, 2000  # of a run that was not told how long to last

Estimator = Literal["local", "flipout", "draw"]
# A product of a node by the entries of its array that are kept; the entries are empty where all are.
Factory = Callable[[ProductNode, Tensor], Product]


@dataclass(frozen=True)
class Rule:
    """How to take a step; every method for networks makes one from its options."""

    natural: bool = False  # IVON; otherwise Adam or SGD on means and raw scales
    optimiser: Literal["adam", "sgd"] = "adam"
    learning_rate: float = (
        0.05  # of means: of Adam in units of ``Start.unit``; natural: share of a Newton step
    )
    scale_rate: float = 0.05  # of raw scales
    point_rate: float = 0.05  # of params, by Adam in units of ``Problem.units``, or by SGD
    momentum: float = 0.9
    weight_decay: float = 0.0  # of params, which have no law
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = 0  # steps over which the weight of the KL term rises to ``tempering``
    tempering: float = 1.0
    draws: int = 1  # that a step averages
    horizon: int = 2000  # steps
    initial_sd: float = 0.1  # of weights, in units of the spread of the first means
    augment: Augment = field(default_factory=dict)


class Start(NamedTuple):
    """Where an array of weights starts."""

    loc: Tensor  # [*free shape] or a number: centre of the first means
    spread: Tensor  # sd of the first means around it
    sd: Tensor  # of the first Gaussians
    unit: float = 1.0  # length that Adam's rate for the means is in: ``inputs ** -0.5`` of a layer
    is_carried: bool = False  # whether it is the law that an earlier fit left


@dataclass(frozen=True, eq=False)
class Problem:
    """What ``prepare`` returns."""

    bound: Bound
    settings: Settings
    rule: Rule
    network: Network
    program: Program
    priors: tuple[Prior, ...]  # of every array
    estimators: tuple[Estimator, ...]  # of every array
    why: tuple[str, ...]  # that estimator
    starts: tuple[Start, ...]
    units: tuple[Tensor, ...]  # of every param: the length that Adam's rate is in, a number
    is_sparse: tuple[bool, ...]  # arrays of which some entries are kept only
    factory: Factory
    seed: int
    made: dict[tuple[int, int], tuple[Tensor, Product]]  # a cache: products of each node and run
    table: dict[int, Any]  # a cache: noise of the present block of steps
    method: str = "vi"
    spare: Spare = field(default_factory=Spare)  # a cache: memory of states that are gone

    @property
    def max_iters(self) -> int:
        """Steps that a run may take."""
        return self.rule.horizon

    @property
    def parts(self) -> float:
        """Steps that see all data once: N over the size of a batch."""
        if not self.settings.minibatch:
            return 1.0
        ((plate, size),) = self.settings.minibatch.items()
        return max(1.0, self.bound.size(plate) / size)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """All latents."""
        return self.network.arrays

    @property
    def params(self) -> tuple[Variable, ...]:
        """Learned constants."""
        return self.network.params

    @property
    def examples(self) -> int:
        """N."""
        return self.network.examples


class State(NamedTuple):
    """One run: what the next step needs. Nothing but tensors and numbers."""

    mean: Tensor  # [S + P]: kept entries of every array one after the other, then params on the real line
    raw: Tensor  # [S]: raw scales, softplus(raw) = sd; of natural steps the curvature h + delta
    memory: tuple[Tensor, ...]  # of the optimiser: see ``memory_of``
    indices: tuple[Tensor, ...]  # of every array: entries that are kept [k], ascending; empty: all
    step: int  # steps done
    run: int  # which restart
    loss: float  # running mean of the loss
    first: float  # loss of the first step
    kl: float  # last known


class Runs(NamedTuple):
    """All restarts."""

    runs: tuple[State, ...]


def sizes(problem: Problem, state: State) -> list[int]:
    """Number of stored entries of every array."""
    return [
        len(i) if sparse else a.size
        for a, i, sparse in zip(problem.arrays, state.indices, problem.is_sparse, strict=True)
    ]


def slices(problem: Problem, state: State) -> list[slice]:
    """Where each array stands in ``mean`` and ``raw``."""
    found, start = [], 0
    for size in sizes(problem, state):
        found.append(slice(start, start + size))
        start += size
    return found


def kept(problem: Problem, state: State, at: int) -> Tensor | None:
    """The entries of an array that are stored; None: all."""
    return state.indices[at] if problem.is_sparse[at] else None


def param_shapes(problem: Problem) -> list[tuple[int, ...]]:
    """Shape of every param on the real line."""
    shapes = []
    for v in problem.params:
        inverse = biject_to(v.support).inv
        shapes.append(tuple(inverse.forward_shape(torch.Size(problem.bound.shape(v)))))
    return shapes


def memory_of(rule: Rule, mean: Tensor, raw: Tensor) -> tuple[Tensor, ...]:
    """The optimiser's memory before the first step.

    Adam: first and second moments of ``mean``, then of ``raw``. SGD: momentum of both. Natural: momentum of ``mean``, and
    second moments of the params at its end.
    """
    if rule.natural:
        return (torch.zeros_like(mean), mean.new_zeros(mean.numel() - raw.numel()))
    if rule.optimiser == "sgd":
        return torch.zeros_like(mean), torch.zeros_like(raw)
    return tuple(torch.zeros_like(t) for t in (mean, mean, raw, raw))


def horizon(bound: Bound, settings: Settings) -> int:
    """Steps of a run: those that were asked for, or some twenty epochs."""
    if settings.max_iters is not None:
        return max(settings.max_iters, 1)
    if not settings.minibatch:
        return _LEAST_STEPS
    ((plate, size),) = settings.minibatch.items()
    return max(_LEAST_STEPS, _EPOCHS * math.ceil(bound.size(plate) / size))


def warmup_steps(warmup: float, steps: int) -> int:
    """Steps that a warm-up takes of a run; below 1 it is a share.

    >>> warmup_steps(0.5, 2000), warmup_steps(30, 2000)
    (1000, 30)
    """
    return round(warmup * steps if warmup < 1 else warmup)


def rate(rule: Rule, step: int) -> float:
    """Share of the first rates that step ``step``, from 0, takes.

    >>> [round(rate(Rule(horizon=4), t), 3) for t in range(5)]
    [1.0, 0.854, 0.5, 0.146, 0.01]
    """
    if rule.schedule == "constant":
        return 1.0
    # A little is left after the end, for runs that are continued.
    return max(0.5 * (1 + math.cos(math.pi * min(1.0, step / rule.horizon))), 0.01)


def temperature(rule: Rule, step: int) -> float:
    """Weight of the KL term in step ``step``, from 0."""
    return rule.tempering * (min(1.0, (step + 1) / rule.warmup) if rule.warmup else 1.0)


def curvature_of(sd: Tensor, examples: int, weight: float) -> Tensor:
    """``h + delta`` of a Gaussian with scale ``sd``: ``1 / (lambda sd^2)`` with ``lambda = N / T``."""
    return weight / (examples * sd.square())


def sds(problem: Problem, state: State, out: Tensor | None = None) -> Tensor:
    """Standard deviations of all stored entries ``[S]``, written to ``out`` where it is given."""
    if not problem.rule.natural:
        return torch.logaddexp(state.raw, state.raw.new_zeros(()), out=out)  # softplus
    weight = temperature(problem.rule, state.step)
    return torch.mul(state.raw, problem.examples / weight, out=out).rsqrt_()


def product_of(problem: Problem, state: State, at: int) -> Product:
    """The product of a node, rebuilt where the entries that are kept have changed."""
    node = problem.network.products[at]
    indices = state.indices[node.weight]
    known = problem.made.get((at, state.run))
    if known is None or known[0] is not indices:
        sparse = problem.is_sparse[node.weight]
        known = (indices, problem.factory(node, indices) if sparse else Dense(node))
        problem.made[at, state.run] = known
    return known[1]


__all__ = [
    "Estimator",
    "Factory",
    "Problem",
    "Rule",
    "Runs",
    "Start",
    "State",
    "curvature_of",
    "horizon",
    "kept",
    "memory_of",
    "param_shapes",
    "product_of",
    "rate",
    "sds",
    "sizes",
    "slices",
    "temperature",
    "warmup_steps",
]
