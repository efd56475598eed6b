"""Variational inference of networks: the options of ``vi`` as a rule for :mod:`ppl.inference.networks`.

Taken where a layer reads weights that are latents and q is one mean-field Gaussian with one particle. Everything else of a
model may be what it likes, but for discrete latents and latents of the elements of the data, which the general
code knows.
"""

from __future__ import annotations

from ppl.backend import Settings
from ppl.binding import Bound
from ppl.errors import ModelError, UnsupportedError
from ppl.graph import Graph
from ppl.inference.networks import fit
from ppl.inference.networks.costs import table
from ppl.inference.networks.records import Problem, Rule, horizon
from ppl.inference.networks.structure import reasons
from ppl.inference.vi.options import NETWORK_OPTIONS, VI

_WARMUP = 0.5  # share of a run
_NATURAL_RATE = 0.05  # with twice as much, convolutional networks are lost in the first steps
_WISHES = {"auto": "local", "local": "local", "flipout": "flipout"}


def applies(graph: Graph, options: VI, settings: Settings | None = None) -> bool:
    """Whether the model is fitted as a network.

    Raises:
        UnsupportedError: an estimator for layers was asked for, and cannot be had; the message says why.
        ModelError: options for networks stand beside a model without one.
    """
    problems = _problems(graph, options, settings)
    if not problems:
        return True
    if options.estimator in ("local", "flipout"):
        raise UnsupportedError(
            f"vi cannot use estimator='{options.estimator}':\n    " + "\n    ".join(problems)
        )
    default = VI()
    extra = [n for n in NETWORK_OPTIONS if getattr(options, n) != getattr(default, n)]
    if extra:
        raise ModelError(
            f"VI({extra[0]}=...) is an option for networks, and this model is not fitted as one: {problems[0]}"
        )
    return False


def single_precision(graph: Graph, options: VI) -> bool:
    """Whether data in single precision is fitted in it: networks are."""
    return not _problems(graph, options, None)


def _problems(graph: Graph, options: VI, settings: Settings | None) -> list[str]:
    found = [" ".join(p for p in (f"'{s}'" if s else "", what, do) if p) for s, what, do in reasons(graph)]  # fmt: skip
    if options.family != "mean_field":
        found.append(f"family='{options.family}': estimators of layers are of a mean-field Gaussian.")  # fmt: skip
    if options.parallel or options.particle_count > 1:
        found.append("several particles have bounds of their own: leave particles= and parallel= out.")  # fmt: skip
    if options.estimator == "total":
        found.append("estimator='total' is of the general code.")
    plate = next(iter(settings.minibatch), None) if settings and settings.minibatch else None
    inside = [v.name for v in graph.latents if plate in graph.closure(v.plates)]
    if inside:
        found.append(f"'{inside[0]}' is a latent of the elements of plate '{plate}', which is taken in batches.")  # fmt: skip
    return found


def prepare(bound: Bound, options: VI, settings: Settings) -> Problem:
    """The problem of a network.

    Raises:
        ModelError: an option that only other models have was given, or ``augment=`` names no covariate.
    """
    if options.start != "prior":
        raise ModelError(
            "VI(start='standard'): a network starts at random weights of the scale that its layers need. Leave start= out, or "
            "give initial_sd=."
        )
    if options.final_draws != VI.final_draws:
        raise ModelError(
            "VI(final_draws=...): a network takes as many as its size and that of the data allow. Leave it out."
        )
    return fit.prepare(bound, settings, rule_of(bound, options, settings), _wish(options))


def rule_of(bound: Bound, options: VI, settings: Settings) -> Rule:
    """How steps are taken."""
    natural = options.estimator == "natural"
    steps, rate = horizon(bound, settings), options.rate
    if natural and options.learning_rate is None:
        rate = _NATURAL_RATE
    return Rule(
        natural=natural,
        optimiser=options.optimiser,
        learning_rate=rate,
        scale_rate=rate,
        point_rate=Rule.point_rate if natural else rate,  # a share of a Newton step has no unit
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        schedule="cosine" if options.settle else "constant",
        warmup=options.warmup_steps(steps, _WARMUP),
        tempering=options.tempering,
        draws=options.draws or 1,
        horizon=steps,
        initial_sd=options.initial_sd,
        augment=dict(options.augment),
    )


def describe(problem: Problem) -> str:
    """For ``explain``: N, and a line for each layer."""
    rule = problem.rule
    how = "natural steps" if rule.natural else rule.optimiser
    return (
        f"a mean-field Gaussian over a network, N = {problem.examples}; {how}, {rule.draws} "
        f"draw{'s' if rule.draws > 1 else ''} a step\n{table(problem)}"
    )


def _wish(options: VI) -> str:
    return _WISHES.get(options.estimator, "draw")


__all__ = ["applies", "describe", "prepare", "rule_of", "single_precision"]
