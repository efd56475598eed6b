"""The log-density of some factors at draws of all latents, as a function that can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.lower import Compiler, Operand, map_name, variables_of
from ppl.simulation import DRAW


def joint_density(bound: Bound, names: tuple[str, ...]) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The log-density ``[n]`` of all factors that read these latents, from draws of all latents ``[n, *plates, *event]``.

    >>> import ppl
    >>> @ppl.model
    ... def pair():
    ...     x = ppl.latent("x", ppl.Normal(0.0, 1.0))
    ...     ppl.observe("y", ppl.Normal(x, 1.0))
    >>> total = joint_density(pair.bind({"y": 1.0}), ("x",))
    >>> total({"x": torch.tensor([0.0, 1.0], dtype=torch.float64)})
    tensor([-2.3379, -2.3379], dtype=torch.float64)
    """
    compiler = _compiler(bound)
    outputs, sizes = [], []
    for factor in bound.graph.densities:
        if not set(names) & variables_of(bound.graph, factor):
            continue
        along = factor.chain[0] if factor.chain else None
        parts: list[tuple[Operand, tuple[str, ...]]] = [
            (compiler.density(factor), tuple(p for p in factor.plates if p != along))
        ]
        if along is not None:
            parts.append((compiler.transition(factor), factor.plates))
        for made, plates in parts:
            order = compiler.sorted_axes((DRAW, *plates))
            outputs.append(compiler.align(made, order))
            sizes.append([bound.size(p) - (p == along) for p in order[1:]])
    lowered, fixed = compiler.finish(outputs), _fixed(bound)

    def total(draws: Mapping[str, Tensor]) -> Tensor:
        arrays = {**fixed, **draws}
        found = lowered({k: arrays[k] for k in lowered.inputs})
        n = len(next(iter(draws.values())))
        each = [x.expand(n, *s).reshape(n, -1).sum(-1) for x, s in zip(found, sizes, strict=True)]
        return torch.stack(each).sum(0)

    return total


def _compiler(bound: Bound) -> Compiler:
    graph = bound.graph
    unknown = {v.name for v in graph.latents}
    axes = {
        v.name: (DRAW, *v.plates) if v.name in unknown else v.plates
        for v in graph.variables.values()
    }
    return Compiler(
        graph,
        axes,
        (DRAW, *graph.plates),
        dtype=bound.dtype,
        device=bound.device,
        masks=tuple(bound.masks),
    )


def _fixed(bound: Bound) -> dict[str, Tensor]:
    """Everything but draws: data, maps, masks, and params at their first values."""
    fixed = {**bound.dense, **{map_name(*k): m for k, m in bound.maps.items()}}
    fixed |= {name + "@mask": mask for name, mask in bound.masks.items()}
    for v in bound.graph.role("param"):
        first = torch.as_tensor(v.initial, dtype=bound.dtype, device=bound.device)
        fixed[v.name] = first.expand(bound.shape(v))
    return fixed


__all__ = ["joint_density"]
