"""Which models have groups of linearised rows: latents on all reals or on a manifold, known indices."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from torch.distributions import constraints

from ppl.backend import Reason, Settings
from ppl.distributions import Delta, Distribution, Robust, SpikeSlab, Uniform
from ppl.errors import UnsupportedError
from ppl.graph import Factor, Graph, Ref, Variable, refs
from ppl.inference.groups.laws import peel
from ppl.lower import variables_of
from ppl.manifolds import manifold_of
from ppl.passes import upstream

NORMALISED = ("huber", "cauchy", "student")  # kernels whose exp(-rho) can be integrated
_OTHERS = 'use method="qem" or method="exact".'


def unsupported(graph: Graph) -> list[Reason]:
    """Reasons why a model cannot be written as rows of linearised factors; empty when it can.

    >>> import ppl
    >>> @ppl.model
    ... def counts():
    ...     ppl.latent("rate", ppl.Gamma(1.0, 1.0))
    >>> unsupported(counts.graph())[0].problem
    'its law allows positive numbers only, and a Gaussian has all.'
    """
    reasons = [r for v in graph.latents if (r := _latent(v))]
    reasons += _atoms(graph, {v.name for v in graph.latents})
    reasons += [r for f in graph.densities for r in _factor(graph, f)]
    if not graph.latents:
        reasons.append(Reason("", "the model has no latent."))
    return reasons


def refuse_settings(method: str, settings: Settings) -> None:
    """Refuse what no method on groups can use: parts of the data, and several first points.

    Raises:
        UnsupportedError: it was asked for.

    >>> from ppl.streams import Streams
    >>> refuse_settings("gbp", Settings(Streams(0), restarts=2))
    Traceback (most recent call last):
    ...
    ppl.errors.UnsupportedError: gbp does not support restarts=: it starts at one point. Call infer with several start=.
    """
    if settings.minibatch is not None:
        raise UnsupportedError(
            f"{method} does not support minibatch=. Fit part after part with prior=posterior or "
            "posterior.extend(new_data)."
        )
    if settings.restarts > 1:
        raise UnsupportedError(
            f"{method} does not support restarts=: it starts at one point. Call infer with several start=."
        )


def _atoms(graph: Graph, names: set[str]) -> list[Reason]:
    """Latents whose law puts probability on single points: no Gaussian comes near that."""
    laws = {f.name: f.law for f in graph.densities if f.law is not None and f.name in names}
    return [
        Reason(
            name,
            "can be exactly zero with positive probability, which no Gaussian can say.",
            'Use method="amp", where one linear map mixes many of them, or method="qem".',
        )
        for name, law in laws.items()
        if _has_atom(law.family)
    ]


def _has_atom(family: Any) -> bool:
    inside = [part for v in vars(family).values() for part in (v if isinstance(v, tuple) else (v,))]
    parts = [part for part in inside if isinstance(part, Distribution)]
    return isinstance(family, (Delta, SpikeSlab)) or any(_has_atom(part) for part in parts)


def _latent(variable: Variable) -> Reason | None:
    name, manifold = variable.name, manifold_of(variable)
    if variable.is_discrete:
        return Reason(
            name, "is discrete, and only Gaussians are passed.", f"Sum it out, or {_OTHERS}"
        )
    if manifold is not None:
        if tuple(variable.event_shape) == manifold.event_shape:
            return None
        return Reason(
            name, f"one element holds several elements of {manifold.name}.", "Put them in a plate."
        )
    if _is_real(variable.support):
        return None
    what = _kind(variable.support)
    if what == "positive numbers":
        return Reason(
            name,
            "its law allows positive numbers only, and a Gaussian has all.",
            f"Put the prior on log({name}): latent('log_{name}', Normal(...)) and torch.exp.",
        )
    return Reason(
        name,
        f"its law allows {what} only, and a Gaussian has all numbers.",
        f"Put a Normal prior on an unconstrained transform of it, or {_OTHERS}",
    )


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is None or support in (constraints.real, constraints.real_vector)


def _kind(support: Any) -> str:
    if support in (constraints.positive, constraints.nonnegative):
        return "positive numbers"
    if support is constraints.dependent:
        return "numbers within bounds that are themselves unknown"
    return f"values of {support}"


def _factor(graph: Graph, factor: Factor) -> list[Reason]:
    names = {v.name for v in graph.latents}
    read = variables_of(graph, factor)
    if not read & names:
        return _learned_alone(graph, factor, read)
    reasons = []
    laws = [law for law in (factor.law, factor.chain[1] if factor.chain else None) if law]
    for law in laws:
        kind = _edged(graph, law, names)
        if kind:
            reasons.append(
                Reason(
                    factor.name,
                    f"the density of {kind} has no derivative in what it depends on.",
                    "Use a smooth law, such as a Normal of small scale.",
                )
            )
        if reason := _unnormalised(graph, factor, law):
            reasons.append(reason)
    return reasons + _indices(graph, factor, names)


def _learned_alone(graph: Graph, factor: Factor, read: Set[str]) -> list[Reason]:
    """A param of a factor without latents: no row of any group reads it."""
    learned = sorted(v.name for v in graph.role("param") if v.name in read)
    if not learned:
        return []
    problem = f"depends on the param '{learned[0]}' but on no latent."
    return [Reason(factor.name, problem, "Give the param a prior and make it a latent.")]


def _unnormalised(graph: Graph, factor: Factor, law: Any) -> Reason | None:
    """A robust law that tends to a constant: the wider its scale or threshold, the likelier the data."""
    peeled = peel(law)
    if not isinstance(peeled.family, Robust) or peeled.family.kernel in NORMALISED:
        return None
    learned = {v.name for v in graph.role("param")}
    for leaf, item in zip(peeled.family.leaves(), peeled.arguments, strict=True):
        read = upstream(graph, item.id) & learned if isinstance(item, Ref) else frozenset()
        if read and leaf.path != "dist.loc":
            return Reason(
                factor.name,
                f"param '{min(read)}' is learned through the kernel {peeled.family.kernel!r}, which has no normaliser: "
                "every residual could be explained by leaving it out.",
                f"Give it a value, or use one of the kernels {', '.join(NORMALISED)}.",
            )
    return None


def _edged(graph: Graph, law: Any, names: set[str]) -> str:
    """Name of a law whose density is flat or a point where it is positive, if its parameters are latent."""
    if not isinstance(law.family, (Delta, Uniform)):
        return ""
    varying = any(isinstance(a, Ref) and upstream(graph, a.id) & names for a in law.arguments)
    return type(law.family).__name__ if varying else ""


def _indices(graph: Graph, factor: Factor, names: set[str]) -> list[Reason]:
    learned = {v.name for v in graph.role("param")}
    for node in _nodes(graph, factor):
        if node.op != "gather" or not isinstance(node.args[1], Ref):
            continue
        unknown = sorted(upstream(graph, node.args[1].id) & (names | learned))
        if unknown:
            return [
                Reason(
                    factor.name,
                    f"the index into plate '{node.name}' ({node.where}) depends on '{unknown[0]}', which is not known.",
                    f"Observe the index, or {_OTHERS}",
                )
            ]
    return []


def _nodes(graph: Graph, factor: Factor) -> list[Any]:
    laws = [law for law in (factor.law, factor.chain[1] if factor.chain else None) if law]
    queue = list(refs((factor.value, *(law.arguments for law in laws))))
    seen: set[int] = set()
    found = []
    while queue:
        node = graph.nodes[queue.pop()]
        if node.id in seen:
            continue
        seen.add(node.id)
        found.append(node)
        queue.extend(node.operands())
    return found


__all__ = ["refuse_settings", "unsupported"]
