"""Turn a graph with its data into groups of factor rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.distributions import ConcentratedNormal, Flat, Normal, Robust
from ppl.errors import UnsupportedError
from ppl.graph import Factor
from ppl.inference.groups import losses
from ppl.inference.groups.entries import draw_dims, entries, per_residual
from ppl.inference.groups.expressions import Expression
from ppl.inference.groups.laws import Peeled, Residual, peel
from ppl.inference.groups.likelihoods import free, general, reads
from ppl.inference.groups.means import Mean, mean_of
from ppl.inference.groups.motions import Motion, motion_of
from ppl.inference.groups.parts import Part, chosen_rows, parts
from ppl.inference.groups.records import FactorGroups, Family, Group
from ppl.inference.groups.rows import Walk
from ppl.inference.groups.spreads import check_spread
from ppl.inference.groups.support import unsupported
from ppl.inference.groups.whitening import spread_of
from ppl.lower import Compiler, map_name, variables_of
from ppl.manifolds import manifold_of


def build(bound: Bound) -> FactorGroups:
    """Every factor of a model as groups of rows.

    Raises:
        UnsupportedError: latents that are discrete or constrained, unknown indices; see :func:`unsupported`.

    >>> import ppl
    >>> @ppl.model
    ... def line():
    ...     base = ppl.latent("base", ppl.Normal(0.0, 10.0))
    ...     with ppl.plate("point"):
    ...         ppl.observe("y", ppl.Normal(base, 1.0))
    >>> groups = build(line.bind({"y": [1.0, 2.0]}))
    >>> [(g.name, g.rows, g.dims) for g in groups.groups]
    [('base', 1, 1), ('y', 2, 1)]
    """
    graph = bound.graph
    if reasons := unsupported(graph):
        raise UnsupportedError("\n".join(map(str, reasons)))
    families = {v.name: _family(bound, v) for v in graph.latents}
    like = torch.zeros((), dtype=bound.dtype, device=bound.device)
    groups: list[Group] = []
    means: dict[str, Mean] = {}
    constant = like
    for factor in graph.densities:
        if not variables_of(graph, factor) & families.keys():
            constant = constant + _density(bound, factor)
            continue
        for part in parts(bound, factor):
            walk = Walk(bound, factor.name, part.places, part.rows)
            group = _group(bound, families, part, walk)
            if group is not None:
                groups.append(group)
            if factor.name in families and factor.name not in means and part.law is not None:
                means[factor.name] = mean_of(walk, part)
    params = {v.name: _initial(bound, v) for v in graph.role("param")}
    return FactorGroups(families, tuple(groups), params, constant, bound, means, like)


def subset(groups: FactorGroups, group: Group, rows: Tensor) -> Group:
    """Some rows of a group, as a group of their own ``rows [L]``: what concerns few rows then costs little.

    The groups must come from :func:`build`.
    """
    bound = groups.bound
    assert bound is not None
    found = parts(bound, bound.graph.factors[group.site])
    part = chosen_rows(next(p for p in found if p.name == group.name), rows)
    made = _group(bound, groups.families, part, Walk(bound, group.site, part.places, part.rows))
    assert made is not None
    return made


def _family(bound: Bound, variable: Any) -> Family:
    sizes = tuple(bound.size(p) for p in variable.plates)
    return Family(
        variable.name, variable.plates, sizes, tuple(variable.event_shape), manifold_of(variable)
    )


def _initial(bound: Bound, variable: Any) -> Tensor:
    start = torch.as_tensor(variable.initial, dtype=bound.dtype, device=bound.device)
    return start.expand(bound.shape(variable)).clone()


def _density(bound: Bound, factor: Factor) -> Tensor:
    """Log-density of a factor without latents."""
    graph = bound.graph
    axes = {v.name: v.plates for v in graph.role("given", "observed")}
    masks = tuple(n for n in bound.masks if n == factor.name)
    compiler = Compiler(
        graph, axes, tuple(graph.plates), dtype=bound.dtype, device=bound.device, masks=masks
    )
    made = [compiler.density(factor)]
    if factor.chain is not None:
        made.append(compiler.transition(factor))
    else:
        made = [compiler.align(made[0], compiler.sorted_axes(factor.plates))]
    arrays: dict[str, Tensor] = dict(bound.values)
    arrays |= {map_name(*key): m for key, m in bound.maps.items()}
    arrays |= {name + "@mask": mask for name, mask in bound.masks.items()}
    found = compiler.finish(made)(arrays)
    if factor.chain is not None:
        return found[0].sum() + found[1].sum()
    return found[0].expand([bound.size(p) for p in compiler.sorted_axes(factor.plates)]).sum()


# ---- groups ------------------------------------------------------------------------------------


def _group(bound: Bound, families: Mapping[str, Family], part: Part, walk: Walk) -> Group | None:
    """The group of a part; None where it says nothing."""
    if part.law is None:
        made = free(part, walk, families)
    elif isinstance(part.law.family, Flat):
        return None
    elif _is_residual(bound, peeled := peel(part.law)):
        made = _gaussian(bound, part, peeled, walk)
    else:
        made = general(bound, part, part.law, walk)
    slots = tuple(walk.slots)
    if not slots:
        return None
    touched = tuple(families[s.family] for s in slots)
    affine = made.pop("is_affine") and all(f.manifold is None for f in touched)
    params = made.pop("params")
    group = Group(
        part.name,
        slots,
        touched,
        site=part.factor.name,
        plates=part.plates,
        sizes=part.sizes,
        labels=bound.labels,
        row_labels=part.row_labels,
        params=params,
        is_affine=affine,
        **made,
    )
    is_fixed = affine and isinstance(group.loss, losses.Quadratic) and not params
    return replace(group, is_fixed=is_fixed)


def _is_residual(bound: Bound, peeled: Peeled) -> bool:
    """Whether a law is Gaussian, perhaps robust, with a spread and masks free of latents."""
    if peeled.gaussian is None:
        return False
    leaves = [x.path.split(".")[-1] for x in peeled.family.leaves()]
    fixed = [a for a, n in zip(peeled.arguments, leaves, strict=True) if n != "loc"]
    return not any(reads(bound, a) for a in (*fixed, *peeled.keeps))


def _gaussian(bound: Bound, part: Part, peeled: Peeled, walk: Walk) -> dict[str, Any]:
    family = peeled.gaussian
    assert family is not None
    value, loc, spread, *threshold = _visited(walk, part.factor.value, peeled)
    event = walk.event(value)
    batch = event[: walk.rank(value) - family.event_dim]
    keep, partly = entries(bound, part, walk, peeled.keeps, family.event_dim, batch)
    residual = _residual(family, walk, (value, loc, spread), partly, part.rows)
    if not residual.spread.reads:
        check_spread(bound, part, residual, keep)
        residual = replace(residual, fixed=residual.whitener({}))
    params = dict.fromkeys((*residual.ends.params, *residual.spread.params))
    loss: losses.Loss = losses.Quadratic()
    if isinstance(peeled.family, Robust):
        loss, more = _robust(peeled.family, threshold[0], walk, batch, part)
        params |= dict.fromkeys(more)
    return {
        "function": residual,
        "outputs_width": math.prod(batch) * draw_dims(family, event),
        "is_affine": not isinstance(family, ConcentratedNormal) and walk.is_affine(value, loc),
        "loss": loss,
        "norm": partial(residual.log_norm, batch, keep),
        "keep": per_residual(keep, family, event),
        "params": tuple(params),
    }


def _residual(
    family: Any, walk: Walk, items: tuple[Any, Any, Any], partly: Tensor | None, rows: int
) -> Residual:
    """The whitened residual of rewritten value, loc and spread."""
    value, loc, spread = items
    name, spread_rank = spread_of(family)
    rank = walk.rank(value)
    batch_rank = rank - family.event_dim
    ends = walk.compile([value, loc], [rank, rank])
    scaling = walk.compile([spread], [batch_rank + spread_rank])
    scale = walk.param_of(spread) if isinstance(family, Normal) else ""
    block = draw_dims(family, walk.event(value))
    made = Residual(family, ends, scaling, name, partly, rows, block=block, scale=scale)
    if isinstance(family, ConcentratedNormal) and not batch_rank:
        ways = [motion_of(walk, end, family.manifold) for end in (loc, value)]
        if None not in ways:
            made = replace(made, motion=Motion("between", tuple(ways)))  # type: ignore[arg-type]
    return made


def _visited(walk: Walk, value: Any, peeled: Peeled) -> list[Any]:
    """Value, loc, spread and threshold, rewritten for rows."""
    return [walk.visit(value), *(walk.visit(a) for a in peeled.arguments)]


def _robust(
    family: Robust, item: Any, walk: Walk, batch: tuple[int, ...], part: Part
) -> tuple[losses.Robust, tuple[str, ...]]:
    """The loss, and the params that its threshold reads."""
    expression = walk.compile([item], [len(batch)])
    single = isinstance(family.dist, Normal)  # one threshold for each entry, not for the vector
    if not single and math.prod(batch) != 1:
        raise UnsupportedError(
            f"'{part.name}': a robust law of several vectors in one element is not supported. Put its vectors in a "
            "plate."
        )
    shape = (part.rows, math.prod(batch)) if single else (part.rows,)
    k: Any = partial(_threshold, expression, batch, shape)
    per: Literal["row", "component"] = "component" if single else "row"
    return losses.Robust(family.kernel, k if expression.reads else k({}), per), expression.params


def _threshold(
    expression: Expression,
    batch: tuple[int, ...],
    shape: tuple[int, ...],
    params: Mapping[str, Tensor],
) -> Tensor:
    (k,) = expression([], params)
    return k.expand(shape[0], *batch).reshape(shape) if k.numel() != 1 else k.reshape(())


__all__ = ["build", "subset"]
