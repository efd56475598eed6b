"""Oracles of the factor groups: the joint log-density by lowering, and random points."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.inference.groups import FactorGroups, Group, build, linearise
from ppl.lower import Compiler, map_name


def joint_log_density(
    bound: Bound, points: Mapping[str, Tensor], params: Mapping[str, Tensor]
) -> Tensor:
    """Sum of every factor's log-density, as :class:`ppl.lower.Compiler` computes it."""
    graph = bound.graph
    axes = {v.name: v.plates for v in graph.variables.values()}
    compiler = Compiler(graph, axes, tuple(graph.plates), masks=tuple(bound.masks))
    outputs, shapes = [], []
    for factor in graph.densities:
        plates = compiler.sorted_axes(factor.plates)
        if factor.chain is None:
            outputs.append(compiler.align(compiler.density(factor), plates))
            shapes.append([bound.size(p) for p in plates])
        else:
            outputs += [compiler.density(factor), compiler.transition(factor)]
            shapes += [None, None]
    arrays = dict(bound.values) | dict(params)
    arrays |= {map_name(*key): m for key, m in bound.maps.items()}
    arrays |= {name + "@mask": mask for name, mask in bound.masks.items()}
    for name, x in points.items():
        arrays[name] = x.reshape(bound.shape(graph.variables[name]))
    found = compiler.finish(outputs)(arrays)
    return sum((x if s is None else x.expand(s)).sum() for x, s in zip(found, shapes, strict=True))


def random_points(groups: FactorGroups, seed: int = 0) -> dict[str, Tensor]:
    """Standard Gaussian points, moved onto their manifolds."""
    generator = torch.Generator().manual_seed(seed)
    points = {}
    for name, family in groups.families.items():
        shape = (family.count, *family.event_shape)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        points[name] = x if family.manifold is None else family.manifold.project(x)
    return points


def check_density(bound: Bound) -> FactorGroups:
    """Groups of a model, compared with the lowered joint at three random points."""
    groups = build(bound)
    for seed in range(3):
        points = random_points(groups, seed)
        expected = joint_log_density(bound, points, groups.params)
        torch.testing.assert_close(
            groups.log_density(points), torch.as_tensor(expected), rtol=1e-10, atol=1e-10
        )
    return groups


def numeric_jacobian(group: Group, values, params, step: float = 1e-6) -> Tensor:
    """Derivative of the outputs by central differences, one tangent coordinate at a time."""
    columns = []
    for s, (slot, family) in enumerate(zip(group.slots, group.families, strict=True)):
        for b in range(slot.width):
            for k in range(family.dims):
                delta = torch.zeros(*slot.index.shape, family.dims, dtype=torch.float64)
                delta[:, b, k] = step
                ends = []
                for sign in (1, -1):
                    moved = list(values)
                    moved[s] = family.retract(values[s], sign * delta)
                    ends.append(group.outputs(moved, params))
                columns.append((ends[0] - ends[1]) / (2 * step))
    return torch.stack(columns, -1)


def columns_of(groups: FactorGroups, group: Group) -> Tensor:
    """Flat coordinate ``[F, D]`` of every column of a group's jacobian: families in order, element by element."""
    first, total = {}, 0
    for name, family in groups.families.items():
        first[name] = total
        total += family.count * family.dims
    parts = []
    for slot, family in zip(group.slots, group.families, strict=True):
        columns = slot.index.unsqueeze(-1) * family.dims + torch.arange(family.dims)
        parts.append((first[family.name] + columns).flatten(1))
    return torch.cat(parts, -1)


def row_covariances(groups: FactorGroups, covariance: Tensor) -> dict[str, Tensor]:
    """Joint covariance ``[F, D, D]`` of what each row touches, from that of all unknowns."""
    found = {}
    for group in groups.groups:
        at = columns_of(groups, group)
        found[group.name] = covariance[at.unsqueeze(-1), at.unsqueeze(-2)]
    return found


def dense_rows(
    groups: FactorGroups,
    points: Mapping[str, Tensor],
    params: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """All rows as one dense jacobian ``[R, n]`` and residual ``[R]``."""
    params = groups.params if params is None else params
    total = sum(f.count * f.dims for f in groups.families.values())
    jacobians, residuals = [], []
    for group in groups.groups:
        made = linearise(group, group.gather(points), params)
        dense = made.residual.new_zeros(*made.residual.shape, total)
        columns = columns_of(groups, group).unsqueeze(1)
        dense.scatter_add_(-1, columns.expand_as(made.jacobian), made.jacobian)
        jacobians.append(dense.flatten(0, 1))
        residuals.append(made.residual.flatten())
    return torch.cat(jacobians), torch.cat(residuals)
