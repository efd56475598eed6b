"""The log joint density of a model with its data at one value of all latents, by the lowered graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ppl.binding import Bound
from ppl.lower import Compiler, map_name


def joint_density(bound: Bound, point: Mapping[str, Any]) -> float:
    """Sum of all log-densities of the graph, event and plates summed.

    Args:
        bound: a model with its data.
        point: each latent ``[*plates, *event]``; params are where they start.
    """
    graph = bound.graph
    compiler = Compiler(
        graph, {v.name: v.plates for v in graph.variables.values()}, (*graph.plates,)
    )
    outputs = [compiler.density(f) for f in graph.densities]
    outputs += [compiler.transition(f) for f in graph.densities if f.chain]
    arrays = dict(bound.values) | {map_name(*key): m for key, m in bound.maps.items()}
    arrays |= {
        v.name: torch.as_tensor(v.initial, dtype=bound.dtype).expand(bound.shape(v))
        for v in graph.role("param")
    }
    arrays |= {name: torch.as_tensor(value) for name, value in point.items()}
    lowered = compiler.finish(outputs)
    return sum(float(part.sum()) for part in lowered({k: arrays[k] for k in lowered.inputs}))
