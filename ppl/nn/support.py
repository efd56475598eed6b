"""Which weights of a network's layers are not exactly zero."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppl import marginals as mg
from ppl.nn.structure import PRODUCTS, find_layers

if TYPE_CHECKING:
    from ppl.graph import Graph
    from ppl.posterior import Posterior


def weight_arrays(graph: Graph) -> tuple[str, ...]:
    """Latents and params that are the weights of linear layers, convolutions and lifted modules; no biases, no norms."""
    names = []
    for layer in find_layers(graph):
        for key, w in layer.arrays.items():
            is_weight = layer.kind == "lift" or (layer.kind in PRODUCTS and key == "weight")
            if is_weight and w.role in ("latent", "param"):
                names.append(w.variable)
    return tuple(dict.fromkeys(names))


def support(posterior: Posterior) -> dict[str, Tensor]:
    """For each array of weights the places, ascending and row by row, of those that are not exactly zero."""
    return {name: _active(posterior, name) for name in weight_arrays(posterior.graph)}


def density(posterior: Posterior) -> float:
    """Share of the weights of all layers that is not exactly zero; 1 where there is none."""
    found = support(posterior)
    graph, bound = posterior.graph, posterior.bound
    total = sum(math.prod(bound.shape(graph.variables[name])) for name in found)
    return sum(len(index) for index in found.values()) / total if total else 1.0


def _active(posterior: Posterior, name: str) -> Tensor:
    marginal = posterior.marginal(name)
    if isinstance(marginal, mg.SparseGaussian):
        return marginal.index
    if name in posterior.params:
        return _places(posterior.params[name] != 0)
    share = mg.inclusion(marginal)
    if share is not None:
        return _places(share > 0)
    if isinstance(marginal, mg.Weighted):  # points of a law with mass at zero may all be there
        return _places((marginal.points != 0).any(0))
    count = math.prod(posterior.bound.shape(posterior.graph.variables[name]))
    return torch.arange(count, device=posterior.bound.device)


def _places(is_active: Tensor) -> Tensor:
    return is_active.reshape(-1).nonzero().squeeze(-1)


__all__ = ["density", "support", "weight_arrays"]
