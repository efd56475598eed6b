"""Weights of a network in a few lines: one for each array that layers read, in the place of one for each number."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ppl import marginals as mg
from ppl.nn.structure import find_layers

if TYPE_CHECKING:
    from ppl.posterior import Posterior

_MANY = 20  # numbers in the largest array that are printed one by one
_HEAD = ("weights", "shape", "active", "mean |mean|", "median sd")
_NOTES = {"data": "", "nll": "NLL ", "kl": "KL ", "temperature": "temperature "}


class Line(NamedTuple):
    """An array of weights: what is active, and how large that is."""

    name: str
    shape: tuple[int, ...]
    active: int
    size: float  # mean of the absolute posterior means of active entries
    sd: float  # median of their standard deviations


def arrays_in_short(posterior: Posterior) -> list[str]:
    """Arrays of latents or params that layers read; none where all are so small that their numbers are printed."""
    graph, bound = posterior.graph, posterior.bound
    names = dict.fromkeys(
        w.variable
        for layer in find_layers(graph)
        for w in layer.arrays.values()
        if w.role in ("latent", "param") and w.variable not in bound.values
    )
    largest = max((math.prod(bound.shape(graph.variables[n])) for n in names), default=0)
    return list(names) if largest > _MANY else []


def lines(posterior: Posterior, names: list[str]) -> list[Line]:
    """What is said of each array."""
    return [_line(posterior, name) for name in names]


def table(found: list[Line]) -> str:
    """The lines as text.

    >>> print(table([Line("fc1.weight", (32, 64), 205, 0.1234, 0.05), Line("fc1.bias", (32,), 32, 0.2, 0.01)]))
    weights     shape    active        mean |mean|  median sd
    fc1.weight  32 x 64  205 of 2,048  0.123        0.05
    fc1.bias    32       32            0.2          0.01
    """
    rows = [_HEAD, *((x.name, *_cells(x)) for x in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
    )


def facts(posterior: Posterior) -> str:
    """Number of data, likelihood, divergence and temperature in one line, as far as the method has noted them."""
    notes = posterior.diagnostics.notes
    return "; ".join(f"{words}{notes[key]}" for key, words in _NOTES.items() if key in notes)


def _line(posterior: Posterior, name: str) -> Line:
    marginal = posterior.marginal(name)
    shape = posterior.bound.shape(posterior.graph.variables[name])
    mean, sd = _active(marginal)
    if not mean.numel():
        return Line(name, shape, 0, math.nan, math.nan)
    return Line(name, shape, mean.numel(), float(mean.abs().mean()), float(sd.median()))


def _active(marginal: mg.Marginal) -> tuple[Tensor, Tensor]:
    """Means and standard deviations ``[k]`` of what is not zero with certainty."""
    if isinstance(marginal, mg.SparseGaussian):
        return marginal.loc, marginal.scale
    mean, sd = mg.mean(marginal).reshape(-1), mg.sd(marginal).reshape(-1)
    share = mg.inclusion(marginal)
    if share is None:
        return mean, sd
    kept = share.reshape(-1) > 0
    return mean[kept], sd[kept]


def _cells(x: Line) -> tuple[str, ...]:
    total = math.prod(x.shape)
    active = f"{x.active:,}" if x.active == total else f"{x.active:,} of {total:,}"
    numbers = ("" if math.isnan(v) else f"{v:.3g}" for v in (x.size, x.sd))
    return (" x ".join(map(str, x.shape)), active, *numbers)


__all__ = ["Line", "arrays_in_short", "facts", "lines", "table"]
