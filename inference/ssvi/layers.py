"""The arrays of weights that are sparse: their budgets, and what follows from them for starts and laws."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ppl.errors import ModelError, nearest
from ppl.inference.networks import records as networks
from ppl.inference.networks.priors import Prior
from ppl.inference.networks.records import Start
from ppl.inference.networks.structure import Network
from ppl.inference.ssvi import budgets, initial, structured
from ppl.inference.ssvi.options import SSVI
from ppl.inference.ssvi.records import Layer, form_of

_FIRST_DENSITY = 0.1  # of a set whose size the evidence decides


def find_layers(network: Network, options: SSVI) -> tuple[Layer, ...]:
    """The arrays of weights that are sparse, with their budgets.

    Raises:
        ModelError: a layer that should stay dense is not there.
    """
    names = [network.arrays[i].layer for i in network.weights]
    for name in options.dense:
        if name not in names:
            raise ModelError(
                f"SSVI(dense=...): there is no layer {name!r} with weights.{nearest(name, names)} Layers: {', '.join(names)}."
            )
    # The outputs of the last layer are what the model reads: no set of outputs may leave one out.
    last = network.weights[-1:] if options.sets == "output" else ()
    free = [
        i
        for i, name in zip(network.weights, names, strict=True)
        if name not in options.dense and i not in last
    ]
    forms = [form_of(network.products[network.arrays[i].uses[0]]) for i in free]
    found = []
    for at, form, count in zip(
        free, forms, _counts([f.shape for f in forms], options), strict=True
    ):
        groups = structured.groups_of(options.sets, form, options.block)
        if groups is not None:
            kept = max(1, round(count / form.size * groups.number))
            count = len(structured.members(groups, torch.arange(kept)))
        if count < form.size or options.is_shared:
            found.append(Layer(at, network.arrays[at].layer, form, groups, count))
    return tuple(found)


def _counts(shapes: Sequence[tuple[int, ...]], options: SSVI) -> list[int]:
    density = _FIRST_DENSITY if options.density == "auto" else options.density
    if density == 1:
        return [math.prod(s) for s in shapes]
    if options.budgets == "uniform":
        return budgets.uniform(shapes, density, options.output)
    return budgets.erk(shapes, density)


def effective_starts(
    network: Network, layers: Sequence[Layer], options: SSVI, starts: tuple[Start, ...]
) -> tuple[Start, ...]:
    """First means and scales by the number of inputs that units have, or of all weights as they were asked for.

    A law that an earlier fit left is its own start.
    """
    found = list(starts)
    for layer in layers:
        start = starts[layer.at]
        if start.is_carried:
            continue
        factor = math.sqrt(layer.form.columns / initial.effective_inputs(layer.form, layer.budget))
        found[layer.at] = start._replace(
            spread=factor * start.spread, sd=factor * start.sd, unit=factor * start.unit
        )
    if options.initial_mean is None:
        return tuple(found)
    for at in (i for i in network.weights if not starts[i].is_carried):
        spread = torch.full_like(found[at].spread, options.initial_mean)
        found[at] = found[at]._replace(spread=spread, sd=options.initial_sd * spread)
    return tuple(found)


def effective_priors(
    inner: networks.Problem, layers: Sequence[Layer], options: SSVI
) -> tuple[Prior, ...]:
    found = list(inner.priors)
    if options.prior_inputs == "active":
        for layer in layers:
            found[layer.at] = initial.widened(found[layer.at], layer.form, layer.budget)
    return tuple(found)


__all__ = ["effective_priors", "effective_starts", "find_layers"]
