"""What ``method="auto"`` runs, and why: exact where it can be, otherwise what the graph asks for."""

from __future__ import annotations

import math

from ppl import backend as backends
from ppl.backend import Reason
from ppl.binding import Bound
from ppl.distributions import Flat
from ppl.errors import UnsupportedError
from ppl.graph import Graph
from ppl.nn.structure import PRODUCTS, find_layers
from ppl.passes import gaussian_given, upstream

_CHEAP = 3e11  # operations; some ten seconds on two CPU cores
_LARGE_NET = 10_000  # weights of layers from which most of them are better left out
_MANY = 200  # unknowns from which the averages that message passing rests on can be trusted
# After exact, the first that supports the model: mixing of many unknowns, particles, then a mode with its curvature.
_ORDER = {
    "amp": "many unknowns are mixed by one linear map",
    "qem": "particles weigh every combination of latents",
    "laplace": "latents are real, and each factor touches few of them: mode and curvature by a sparse solve",
}


def choose(bound: Bound) -> tuple[str, str]:
    """Name of the method to run, and the reason for it.

    Raises:
        UnsupportedError: no method can fit the model; the reasons of each are listed.

    >>> from ppl.model import model
    >>> from ppl import latent, Normal
    >>> @model
    ... def pick_one():
    ...     latent("x", Normal(0.0, 1.0))
    >>> choose(pick_one.bind())[0]
    'exact'
    """
    if bound.sparse and not backends.load("amp").supports(bound.graph):
        return "amp", f"'{bound.sparse[0]}' is a sparse matrix, which it keeps sparse"
    refused = {"exact": _exact_reasons(bound)}
    if not refused["exact"]:
        return "exact", "every latent can be integrated exactly, at little cost"
    why = f"exact cannot: {refused['exact'][0]}"
    if _is_linear_gaussian(bound.graph) and not backends.load("laplace").supports(bound.graph):
        return "laplace", "every factor is Gaussian and linear, so a sparse solve is exact"
    weights = _layer_weights(bound)
    if weights > _LARGE_NET:
        refused["ssvi"] = backends.load("ssvi").supports(bound.graph)
        if not refused["ssvi"]:
            return (
                "ssvi",
                f"the layers have {weights} weights, of which it keeps and moves a small set; {why}",
            )
    for name, what in _preferred(bound.graph).items():
        refused[name] = [*backends.load(name).supports(bound.graph), *_too_few(name, bound)]
        if not refused[name]:
            return name, f"{what}; {why}"
    lines = [f"{name}: {reason}" for name, reasons in refused.items() for reason in reasons]
    table = "\n    ".join(lines)
    raise UnsupportedError(f"no method can fit this model:\n    {table}")


def _preferred(graph: Graph) -> dict[str, str]:
    """Methods in the order in which they are tried.

    Where elements of one plate are tied to each other (poses by edges, pixels by neighbours), they must move together:
    particles of single elements would have to hit them all at once.
    """
    latents = frozenset(v.name for v in graph.latents)
    tied = any(n.op in ("gather", "shift") and upstream(graph, n.id) & latents for n in graph.nodes)
    if not tied:
        return _ORDER
    rest = {name: what for name, what in _ORDER.items() if name != "laplace"}
    return {"laplace": "elements of a plate are tied to each other", **rest}


def _layer_weights(bound: Bound) -> int:
    """Number of latent weights of linear layers and convolutions."""
    names = {
        layer.weight.variable
        for layer in find_layers(bound.graph)
        if layer.kind in PRODUCTS and layer.weight is not None and layer.weight.role == "latent"
    }
    return sum(math.prod(bound.shape(bound.graph.variables[n])) for n in names)


def _too_few(name: str, bound: Bound) -> list[Reason]:
    count = sum(math.prod(bound.shape(v)) for v in bound.graph.latents)
    if name != "amp" or count >= _MANY:
        return []
    return [Reason("", f"{count} unknowns are few for it.", "Ask for it by name if that is fine.")]


def _is_linear_gaussian(graph: Graph) -> bool:
    """Whether every density is Gaussian with a mean affine in all latents together."""
    latents = frozenset(v.name for v in graph.latents)
    laws = [law for f in graph.densities for law in (f.law, f.chain[1] if f.chain else f.law)]
    return all(
        law is not None and (isinstance(law.family, Flat) or gaussian_given(graph, law, latents))
        for law in laws
    )


def _exact_reasons(bound: Bound) -> list[Reason]:
    exact = backends.load("exact")
    reasons = exact.supports(bound.graph)
    if reasons:
        return reasons
    work = exact.cost(bound)  # type: ignore[attr-defined]
    if work <= _CHEAP:
        return []
    return [
        Reason(
            "", f"it would take about {work:.1g} operations.", "Ask for it by name if that is fine."
        )
    ]
