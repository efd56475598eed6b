"""Names of the axes that this backend puts around a factor, and the arrays that never change."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ppl.binding import Bound
from ppl.graph import Graph
from ppl.inference.exact.split import Split
from ppl.lower import map_name

# Lowering treats these two names as axes that an element of a chain shares with the one before it.
CASES = "restart"  # quadrature nodes times configurations of listed latents
BASIS = "draw"  # zero and the unit vectors, at which affine expressions are evaluated


def particle(name: str) -> str:
    """Axis of the values of a summed latent."""
    return f"k:{name}"


def order(graph: Graph, parts: Split) -> tuple[str, ...]:
    """All axes in the order that results have them."""
    own = [particle(v.name) for v in parts.summed]
    return (CASES, BASIS, *graph.plates, *own, *(a + "'" for a in own))


def variable_axes(graph: Graph, parts: Split) -> dict[str, tuple[str, ...]]:
    """Leading axes of every variable's array."""
    axes = {v.name: v.plates for v in graph.role("given", "observed")}
    axes |= {v.name: (BASIS, *v.plates) for v in parts.gaussian}
    axes |= {v.name: (CASES, *v.plates) for v in (*parts.outer, *parts.listed)}
    return axes | {v.name: (particle(v.name),) for v in parts.summed}


def static_arrays(bound: Bound) -> Mapping[str, Tensor]:
    """Data, masks and memberships."""
    arrays = dict(bound.values)
    arrays |= {map_name(*key): m for key, m in bound.maps.items()}
    return arrays | {name + "@mask": mask for name, mask in bound.masks.items()}


def padded(tensor: Tensor, rank: int) -> Tensor:
    """The tensor with leading axes of length one up to ``rank``; lowering leaves them out."""
    return tensor[(None,) * (rank - tensor.ndim)] if tensor.ndim < rank else tensor
