"""Expectation maximisation: params that make the data most likely, given the beliefs of every factor's latents.

The M-step maximises the expected log-density of all rows that read a param, under Gaussian beliefs of what each row
touches. A scale of a Normal has a closed form, the root of the mean squared residual. Everything else is a few
quasi-Newton steps; expectations are means over sigma points, which are exact for polynomials of the third degree and so
for every Gaussian factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from ppl.distributions.robust import robust_log_norm
from ppl.errors import NumericalError
from ppl.inference.groups.laws import Arguments, Residual
from ppl.inference.groups.linearise import kept_energies, outputs_and_jacobian
from ppl.inference.groups.losses import Quadratic, Robust
from ppl.inference.groups.records import FactorGroups, Group

Params = Mapping[str, Tensor]
_STEPS = 20  # of the quasi-Newton method in one M-step
_TINY = 1e-300


@dataclass(frozen=True, eq=False)
class Expected:
    """Sigma points of a group that reads params; ``outputs(node, params)`` are its outputs at one of them."""

    group: Group
    nodes: Sequence[Any]
    outputs: Callable[[Any, Params], Tensor]

    def log_density(self, params: Params) -> Tensor:
        """Expected log-density of all rows, a scalar."""
        group = self.group
        energy = group.log_norm(params).new_zeros(())
        for node in self.nodes:
            energy = energy + kept_energies(group, self.outputs(node, params), params).sum()
        return group.log_norm(params).sum() - energy / len(self.nodes) - _normaliser(group, params)


def learn(
    groups: FactorGroups,
    points: Mapping[str, Tensor],
    params: Params,
    covariances: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """One M-step: the params of highest expected log-density.

    Args:
        groups: of the model.
        points: means of the latents ``[N, *event]``.
        params: their present values ``[*plates, *event]``.
        covariances: joint covariance ``[F, D, D]`` of what each row touches, by name of the group, in the order of
            the columns of its jacobian. Those of groups without params are not read.

    Returns:
        New values of all params, of the shapes of the old ones.

    Raises:
        NumericalError: the expected log-density is not finite at the present values.

    Source: [Dempster1977]; for state-space models [Shumway1982].
    """
    present = {name: value.detach() for name, value in params.items()}
    readers = [g for g in groups.groups if g.params]
    scales = [n for n in present if _is_scale(n, readers)]
    new = dict(present)
    for name in scales:
        own = [g for g in readers if name in g.params]
        new[name] = _scale(name, own, points, present, covariances)
    left = [n for n in present if n not in scales and any(n in g.params for g in readers)]
    if left:
        own = [g for g in readers if set(g.params) & set(left)]
        expected = [expectation(g, points, present, covariances[g.name]) for g in own]
        new |= _maximised(groups, left, new, expected)
    return new


# ---- scales in closed form ----------------------------------------------------------------------


def _is_scale(name: str, readers: Sequence[Group]) -> bool:
    """Whether a param is nothing but the scale of Normals."""
    own = [g for g in readers if name in g.params]
    return bool(own) and all(
        isinstance(g.function, Residual)
        and g.function.scale == name
        and isinstance(g.loss, Quadratic)
        and g.params == (name,)
        for g in own
    )


def _scale(
    name: str,
    groups: Sequence[Group],
    points: Mapping[str, Tensor],
    params: Params,
    covariances: Mapping[str, Tensor],
) -> Tensor:
    """Root of the mean expected square of the residuals that share each element of a scale."""
    # With scales s_f of the residuals, the derivative of sum_f w_f s_f by an element of the param is the sum of the
    # w_f that it belongs to: sums over ties of any form.
    value = params[name].detach().clone().requires_grad_(True)
    total, count = torch.zeros_like(value), torch.zeros_like(value)
    for group in groups:
        function = group.function
        assert isinstance(function, Residual)
        mean, covariance = _moments(group, points, params, covariances[group.name])
        square = mean.square() + covariance.diagonal(dim1=-2, dim2=-1)
        keep = torch.ones_like(square) if group.keep is None else _wide(group.keep, square)
        shape = function.inner(group.gather(points), params).shape
        with torch.enable_grad():
            scale = function.spread([], {name: value})[0].expand(shape).reshape(square.shape)
            total += torch.autograd.grad((keep * square * scale).sum(), value, retain_graph=True)[0]
            count += torch.autograd.grad((keep * scale).sum(), value)[0]
    found = (total / count.clamp(min=1.0)).clamp(min=_TINY).sqrt()
    return torch.where(count > 0, found, params[name])


def _wide(keep: Tensor, like: Tensor) -> Tensor:
    return (keep if keep.ndim == 2 else keep.unsqueeze(-1)).expand_as(like)


def _moments(
    group: Group, points: Mapping[str, Tensor], params: Params, covariance: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean ``[F, q]`` and covariance ``[F, q, q]`` of the inner outputs of a group."""
    function = group.function
    assert isinstance(function, (Residual, Arguments))
    width = group.residual_dims  # scaling keeps their number
    inner = replace(
        group,
        function=lambda v, p: function.inner(v, p).reshape(group.rows, width),
    )
    mean, jacobian = outputs_and_jacobian(inner, group.gather(points), params)
    return mean, jacobian @ covariance @ jacobian.mT


# ---- sigma points -------------------------------------------------------------------------------


def expectation(
    group: Group, points: Mapping[str, Tensor], params: Params, covariance: Tensor
) -> Expected:
    """Sigma points of a group: of residuals or arguments where params come in behind them, else of the latents."""
    function = group.function
    if isinstance(function, (Residual, Arguments)) and not function.inner_params:
        mean, spread = _moments(group, points, params, covariance)
        shape = function.inner(group.gather(points), params).shape
        nodes = [node.reshape(shape) for node in sigma_points(mean, spread, function.block)]
        return Expected(group, nodes, function.outer)
    origin = covariance.new_zeros(covariance.shape[:2])
    sizes = [s.width * f.dims for s, f in zip(group.slots, group.families, strict=True)]
    values = group.gather(points)
    moved: list[list[Tensor]] = []
    for delta in sigma_points(origin, covariance, covariance.shape[-1]):
        parts = zip(group.slots, group.families, values, delta.split(sizes, -1), strict=True)
        moved.append([f.retract(v, d.reshape(*s.index.shape, f.dims)) for s, f, v, d in parts])
    return Expected(group, moved, group.outputs)


def sigma_points(mean: Tensor, covariance: Tensor, block: int) -> list[Tensor]:
    """Points with the moments of a Gaussian, ``2 block`` of them; blocks of coordinates vary at the same time.

    Args:
        mean: ``[F, q]``.
        covariance: ``[F, q, q]``; only its diagonal blocks are read.
        block: divides ``q``.

    Source: the third-degree cubature rule of [Arasaratnam2009].

    >>> left, right = sigma_points(torch.zeros(1, 1), torch.full((1, 1, 1), 4.0), 1)
    >>> left.item(), right.item()
    (2.0, -2.0)
    """
    rows, count = len(mean), mean.shape[1] // block
    split = covariance.reshape(rows, count, block, count, block)
    blocks = split.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # [F, count, block, block]
    if block == 1:
        root = blocks.clamp(min=0.0).sqrt()
    else:
        values, vectors = torch.linalg.eigh(0.5 * (blocks + blocks.mT))
        root = vectors * values.clamp(min=0.0).sqrt().unsqueeze(-2)
    steps = [math.sqrt(block) * root[..., k].reshape(mean.shape) for k in range(block)]
    return [mean + sign * step for step in steps for sign in (1, -1)]


def _normaliser(group: Group, params: Params) -> Tensor | float:
    """What a learned robust threshold adds to the Gaussian normaliser, over all rows."""
    loss = group.loss
    if not isinstance(loss, Robust) or not callable(loss.k):
        return 0.0
    k = loss.k(params)
    dims = 1 if loss.per == "component" else group.residual_dims
    more = robust_log_norm(loss.kernel, k, dims) - 0.5 * dims * math.log(2 * math.pi)
    width = (group.rows, group.residual_dims) if loss.per == "component" else (group.rows,)
    each = more.expand(width)
    if group.keep is None:
        return each.sum()
    keep = group.keep
    if each.ndim == 1 and keep.ndim == 2:
        keep = keep.amax(-1)
    elif each.ndim == 2 and keep.ndim == 1:
        keep = keep.unsqueeze(-1)
    return (keep * each).sum()


# ---- everything else ----------------------------------------------------------------------------


def _maximised(
    groups: FactorGroups, names: Sequence[str], params: Params, expected: Sequence[Expected]
) -> dict[str, Tensor]:
    """Values of these params that maximise the expected log-density; never worse than the present ones."""
    supports = {n: _support(groups, n) for n in names}
    maps = {n: biject_to(s) for n, s in supports.items()}
    free = [maps[n].inv(params[n]).detach().clone().requires_grad_(True) for n in names]

    def values() -> dict[str, Tensor]:
        return {n: maps[n](x) for n, x in zip(names, free, strict=True)}

    def loss() -> Tensor:
        live = {**params, **values()}
        return -sum((e.log_density(live) for e in expected), params[names[0]].new_zeros(()))

    with torch.enable_grad():
        before = float(loss().detach())
        if not math.isfinite(before):
            raise NumericalError(
                f"param '{names[0]}': the expected log-density of {', '.join(e.group.name for e in expected)} is not "
                "finite at its present value. Start it at another value, param(name, init)."
            )
        _descend(free, loss)
        after = float(loss().detach())
    if not after <= before:  # NaN included
        return {n: params[n] for n in names}
    return {n: x.detach() for n, x in values().items()}


def _descend(free: Sequence[Tensor], loss: Callable[[], Tensor]) -> None:
    """A few quasi-Newton steps, in place."""
    optimiser = torch.optim.LBFGS(
        free, max_iter=_STEPS, line_search_fn="strong_wolfe", tolerance_grad=1e-10
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)  # type: ignore[arg-type]


def _support(groups: FactorGroups, name: str) -> Any:
    if groups.bound is None:
        return constraints.real
    return groups.bound.graph.variables[name].support or constraints.real


__all__ = ["Expected", "expectation", "learn", "sigma_points"]
