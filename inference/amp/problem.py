"""The backend ``amp``: what is prepared once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ppl.backend import Settings
from ppl.binding import Bound
from ppl.errors import DataError, UnsupportedError
from ppl.inference.amp import gamp, vamp
from ppl.inference.amp.centering import Centered, Joined, remove_means
from ppl.inference.amp.coefficients import InUnits, Params, make_block
from ppl.inference.amp.learning import (
    Learner,
    Model,
    Rules,
    make_learner,
)
from ppl.inference.amp.mixing import Mixing, make_offset, make_operator
from ppl.inference.amp.operators import Operator
from ppl.inference.amp.options import AMP
from ppl.inference.amp.outcomes import OverUnits, make_outcome
from ppl.inference.amp.recognise import Linear, recognise
from ppl.inference.amp.rules.record import Rule
from ppl.inference.amp.safeguards import Choice, choose
from ppl.inference.amp.start import started
from ppl.inference.amp.structure import make_structure

_ITERATIONS = 500
# CHOICE: with EM, VAMP without damping ends in a cycle of two sweeps at m = 600, n = 2000, 10 % non-zero; GAMP takes
# half the sweeps there with a tenth.
_DAMPED_GAMP, _DAMPED_VAMP = 0.1, 0.2


@dataclass(frozen=True, eq=False)
class Problem:
    """What ``prepare`` returns."""

    bound: Bound
    options: AMP
    settings: Settings
    model: Model
    learner: Learner
    choice: Choice
    centered: Centered | None
    mixing: Mixing  # the operator, and the units of blocks and sites
    params: Params  # at the start, [R, *plates, *event]
    max_iters: int = _ITERATIONS

    @property
    def operator(self) -> Operator:
        """The linear map, in units."""
        return self.mixing.operator

    @property
    def restarts(self) -> int:
        """Independent runs."""
        return self.settings.restarts

    @cached_property
    def sizes(self) -> tuple[list[int], list[int]]:
        """Scalars of every mixed latent and rows of every observed site, of one right-hand side."""
        return [b.frame.count for b in self.model.blocks], [
            o.frame.count for o in self.model.outcomes
        ]

    def damping(self, default: float) -> float:
        """Share of the old messages that is kept."""
        if self.options.damping is not None:
            return self.options.damping
        moving = bool(self.learner.names) or self.model.structure is not None
        return default if moving else 0.0

    @cached_property
    def gamp(self) -> gamp.Problem:
        """GAMP on this map, with the means of the matrix removed if that was chosen."""
        operator = self.operator if self.centered is None else self.centered.operator
        top = 1.0 - self.damping(_DAMPED_GAMP)
        return gamp.Problem(operator, self.options.kind, self.choice.variances, top, min(0.01, top))

    @cached_property
    def vamp(self) -> vamp.Problem:
        """VAMP on this map."""
        top = 1.0 - self.damping(_DAMPED_VAMP)
        return vamp.Problem(
            self.operator, self.options.kind, self.choice.solver, top, min(0.2, top)
        )

    def rules(self, params: Params, cavities: tuple[Tensor, ...]) -> Rules:
        """Rules of every block and site."""
        return Rules(self.model.priors(params, cavities), self.model.channels(params))

    def joined(self, rules: Rules) -> tuple[Rule, Rule]:
        """One rule of all coefficients, one of all rows."""
        unknowns, rows = self.sizes
        priors: list[Rule] = list(rules.priors)
        channels: list[Rule] = list(rules.channels)
        if len(priors) > 1:
            priors = [InUnits(x, u) for x, u in zip(priors, self.mixing.columns, strict=True)]
        if len(channels) > 1:
            channels = [OverUnits(x, u) for x, u in zip(channels, self.mixing.rows, strict=True)]
        return _one(priors, unknowns), _one(channels, rows)


# ---- preparing ---------------------------------------------------------------------------------


def prepare(bound: Bound, options: AMP, settings: Settings) -> Problem:
    """Find the linear model, lower its parts, look at the matrix, pick the variant.

    Raises:
        UnsupportedError: an option of ``infer`` is not supported, a function is not linear.
        DataError: a number of the map is not finite.
    """
    if settings.minibatch is not None:
        raise UnsupportedError(
            "amp does not support minibatch=. Leave it out, or use method='qem'."
        )
    model = make_model(bound, settings.restarts, settings.memory)
    mixing = make_operator(bound, model.linear)
    operator = mixing.operator
    _check_finite(bound, operator)
    learner = make_learner(model, options)
    choice = _choice(operator, model, options)
    starts = {n: x.expand(settings.restarts, *x.shape[1:]).clone() for n, x in model.start.items()}
    problem = Problem(
        bound,
        options,
        settings,
        model,
        learner,
        choice,
        remove_means(operator) if choice.variant == "gamp" and choice.remove_means else None,
        mixing,
        starts,
    )
    if options.start == "data":
        problem = replace(problem, params=started(problem, starts))
    _check_kind(problem)
    return problem


def make_model(bound: Bound, restarts: int, memory: int | None) -> Model:
    """Recognise and lower a bound graph."""
    linear = recognise(bound.graph)
    assert isinstance(linear, Linear), "supports() refuses it"
    start = _param_starts(bound)
    structure = make_structure(bound, linear, restarts, memory)
    under = {e.block: e for e in structure.elements} if structure else {}
    blocks = [make_block(bound, linear, m, under.get(i)) for i, m in enumerate(linear.mixed)]
    outcomes = [make_outcome(bound, linear, o, start) for o in linear.outputs]
    offset = make_offset(bound, linear)
    return Model(linear, tuple(blocks), tuple(outcomes), offset, structure, start)


def describe(bound: Bound, options: AMP, settings: Settings) -> str:
    """What a run would do, for ``explain``."""
    linear = recognise(bound.graph)
    assert isinstance(linear, Linear), "supports() refuses it"
    operator = make_operator(bound, linear).operator
    names = ", ".join(m.name for m in linear.mixed)
    m, n = operator.shape
    choice = choose(operator)
    text = f"{choice.variant} on a {operator.kind} map from {n} scalars of {names} to {m} rows"
    text += f"; gates {', '.join(linear.gates)} summed exactly" if linear.gates else ""
    text += f"; right-hand sides: {', '.join(linear.batch)}" if linear.batch else ""
    return f"{text} ({choice.why})"


def _param_starts(bound: Bound) -> dict[str, Tensor]:
    found = {}
    for v in bound.graph.role("param"):
        value = torch.as_tensor(v.initial, dtype=bound.dtype, device=bound.device)
        found[v.name] = value.expand(1, *bound.shape(v)).clone()
    return found


def _check_finite(bound: Bound, operator: Operator) -> None:
    if not torch.isfinite(torch.tensor(operator.squared_frobenius)):
        raise DataError(
            "amp: the linear map has entries that are not finite, or a sum of squares beyond the largest number. "
            "Scale the covariates to order one."
        )


def _choice(operator: Operator, model: Model, options: AMP) -> Choice:
    """The variant, by the options where they say so, else by the probe."""
    if options.variant == "auto":
        found = choose(operator)
    else:
        why = f"{options.variant} was asked for"
        small = min(operator.shape) <= 6000
        means = options.variant == "gamp" and choose(operator).remove_means
        found = Choice(options.variant, "scalar", "factor" if small else "cg", means, why)
    if options.means != "auto":
        found = found._replace(remove_means=options.means == "remove")
    if options.solver != "auto":
        found = found._replace(solver=options.solver)
    found = found._replace(variances=_variances(operator, model, options))
    # The squares of a centred operator are always known, and scalar variances stall on it.
    is_centred = found.variant == "gamp" and found.remove_means
    return found._replace(variances="vector") if is_centred else found


def _variances(operator: Operator, model: Model, options: AMP) -> Any:
    if options.variances == "vector" and operator.squared_mv is None:
        raise UnsupportedError(
            f"amp: variances='vector' needs the squares of the entries, which a {operator.kind} map does not show. "
            "Use variances='scalar', or variant='vamp'."
        )
    if options.variances != "auto":
        return options.variances
    mixed = max(len(model.blocks), len(model.outcomes)) > 1 and operator.squared_mv is not None
    return "vector" if mixed else "scalar"


def _check_kind(problem: Problem) -> None:
    """Every rule has a maximum, if the mode is asked for."""
    if problem.options.kind == "sum":
        return
    if problem.model.structure is not None:
        names = ", ".join(problem.model.linear.gates)
        raise UnsupportedError(
            f"amp: kind='max' has no maximum over the gates {names} together with the spikes below them. Use kind='sum'."
        )
    mean, variance = prior_moments(problem, problem.params, ())
    prior, channel = problem.joined(problem.rules(problem.params, ()))
    prior.mode(mean, variance)
    image = problem.operator.mv(mean)
    channel.mode(image, torch.ones_like(image))


def prior_moments(
    problem: Problem, params: Params, cavities: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[R, B, n]`` of all coefficients, in units of their blocks, before any data."""
    parts = []
    blocks = zip(problem.model.priors(params, cavities), problem.model.blocks, strict=True)
    for (rule, block), u in zip(blocks, problem.mixing.columns, strict=True):
        shape = (problem.restarts, block.frame.repeats, block.frame.count)
        mean, spread = _moments(rule, shape, problem.bound)
        parts.append(((u * mean).expand(shape), (u**2 * spread).expand(shape)))
    means, variances = zip(*parts, strict=True)
    return torch.cat(means, -1), torch.cat(variances, -1)


def _moments(rule: Rule, shape: tuple[int, ...], bound: Bound) -> tuple[Tensor, Tensor]:
    zero = torch.zeros(shape, dtype=bound.dtype, device=bound.device)
    try:
        mean, spread = rule.prior_moments()
    except UnsupportedError:
        mean, spread, _ = rule.moments(zero, zero + 1e12)
    mean, spread = torch.broadcast_tensors(mean, spread)
    finite = mean.isfinite() & spread.isfinite() & (spread > 0)
    return torch.where(finite, mean, 0.0), torch.where(finite, spread, 1.0)


def _one(rules: list[Rule], sizes: list[int]) -> Rule:
    return rules[0] if len(rules) == 1 else Joined(tuple(rules), tuple(sizes))
