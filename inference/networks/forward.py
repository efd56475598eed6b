"""One evaluation of a network at a draw: the leaves to differentiate by, and the callables of its products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.distributions import biject_to

from ppl.inference.networks.estimators import Bias, Signs, draw_signs, flipout, local
from ppl.inference.networks.records import (
    Estimator,
    Problem,
    State,
    kept,
    param_shapes,
    product_of,
    sizes,
)
from ppl.inference.networks.structure import ProductNode

Wrap = Callable[[ProductNode, Callable[..., Tensor]], Callable[..., Tensor]]


class Leaf(NamedTuple):
    """What an array is in one evaluation.

    By local reparameterisation ``mean`` and the variance are differentiated by; by Flipout ``mean`` and the noise; by a
    weight draw ``mean`` is the draw.
    """

    kind: Estimator
    mean: Tensor  # [k]
    spread: Tensor | None  # [k], variance or noise
    eps: Tensor | None  # [k], standard noise behind a draw


class Draw(NamedTuple):
    """Leaves of one evaluation."""

    arrays: tuple[Leaf, ...]
    params: tuple[Tensor, ...]  # on the real line, flat

    def inputs(self) -> list[Tensor]:
        """Everything to differentiate by: means, then spreads, then params."""
        spreads = [leaf.spread for leaf in self.arrays if leaf.spread is not None]
        return [*(leaf.mean for leaf in self.arrays), *spreads, *self.params]


def leaves(
    problem: Problem,
    state: State,
    sd: Tensor,
    eps: Sequence[Tensor | None],
    estimators: Sequence[Estimator] | None = None,
    out: Tensor | None = None,
) -> Draw:
    """The leaves of one evaluation.

    Args:
        problem: what is fitted.
        state: of a run.
        sd: of all stored entries ``[S]``.
        eps: standard noise ``[k]`` of every array; None: a draw is the mean itself.
        estimators: of every array; those of the problem by default.
        out: memory for draws, variances or noise of all stored entries ``[S]``.
    """
    found, counts = [], sizes(problem, state)
    kinds = problem.estimators if estimators is None else estimators
    total = sum(counts)
    means, scales = state.mean[:total].split(counts), sd.split(counts)
    places: Sequence[Tensor | None] = [None] * len(counts) if out is None else out.split(counts)
    for kind, mean, scale, noise, place in zip(kinds, means, scales, eps, places, strict=True):
        found.append(_leaf(kind, mean, scale, noise, place))
    shapes = param_shapes(problem)
    params = state.mean[total:].split([torch.Size(s).numel() for s in shapes])
    return Draw(tuple(found), tuple(p.detach().requires_grad_() for p in params))


def _leaf(
    kind: Estimator, mean: Tensor, sd: Tensor, eps: Tensor | None, out: Tensor | None
) -> Leaf:
    fixed = mean.detach()
    if kind == "local":
        variance = torch.mul(sd, sd, out=out).detach()
        return Leaf(kind, fixed.requires_grad_(), variance.requires_grad_(), eps)
    if kind == "flipout" and eps is not None:
        noise = torch.mul(sd, eps, out=out).detach()
        return Leaf(kind, fixed.requires_grad_(), noise.requires_grad_(), eps)
    with torch.no_grad():
        at = fixed if eps is None else torch.addcmul(fixed, sd, eps, out=out)
    return Leaf("draw", at.detach().requires_grad_(), None, eps)


def values_of(problem: Problem, state: State, draw: Draw) -> dict[str, Any]:
    """Latents and params ``[*plates, *event]`` by name, but for arrays that only products read."""
    found: dict[str, Any] = {}
    for i, (array, leaf) in enumerate(zip(problem.arrays, draw.arrays, strict=True)):
        if array.role == "other":
            free = leaf.mean.view(array.free_shape)
            found[array.name] = free if array.transform is None else array.transform(free)
        assert array.role != "other" or kept(problem, state, i) is None
    shapes = param_shapes(problem)
    for v, u, shape in zip(problem.params, draw.params, shapes, strict=True):
        found[v.name] = biject_to(v.support)(u.view(shape))
    return found


def callables(
    problem: Problem,
    state: State,
    draw: Draw,
    generator: Generator,
    wrap: Wrap | None = None,
) -> dict[str, Callable[..., Tensor]]:
    """The functions of all products by ``source``.

    Args:
        problem: what is fitted.
        state: of a run.
        draw: the leaves.
        generator: of noise and signs.
        wrap: called with each product node and its function; returns the function that is used.
    """
    signs: dict[tuple[Any, ...], Signs] = {}
    found: dict[str, Callable[..., Tensor]] = {}
    for i, node in enumerate(problem.network.products):
        run: Callable[..., Tensor] = _Evaluated(problem, state, draw, i, generator, signs)
        found[node.source] = run if wrap is None else wrap(node, run)
    return found


class _Evaluated:
    """A product of a layer with its bias, as its estimator evaluates it."""

    def __init__(
        self,
        problem: Problem,
        state: State,
        draw: Draw,
        at: int,
        generator: Generator,
        signs: dict[tuple[Any, ...], Signs],
    ) -> None:
        self.node = problem.network.products[at]
        self.product = product_of(problem, state, at)
        self.weight = draw.arrays[self.node.weight]
        self.bias = None if self.node.bias is None else draw.arrays[self.node.bias]
        self.generator, self.signs = generator, signs

    def __call__(self, x: Tensor, *bias: Tensor) -> Tensor:
        node, leaf = self.node, self.weight
        if leaf.kind == "local":
            assert leaf.spread is not None
            made = local(self.product, leaf.mean, leaf.spread, x, self.generator, self._own_bias())
        elif leaf.kind == "flipout":
            assert leaf.spread is not None
            signs = self._signs(x)
            own = self._own_bias()
            made = flipout(self.product, leaf.mean, leaf.spread, x, signs, node.channel, own)
        else:
            made = self.product(leaf.mean, x)
            if self.bias is not None:
                made = made + self._beside(self.bias.mean)
        for b in (*bias, *([] if node.bias_constant is None else [node.bias_constant.to(made)])):
            made = made + self._beside(b)
        return made

    def _own_bias(self) -> Bias | None:
        if self.bias is None:
            return None
        assert self.bias.spread is not None
        return Bias(self._beside(self.bias.mean), self._beside(self.bias.spread))

    def _beside(self, bias: Tensor) -> Tensor:
        """``[*axes, out]`` where the outputs stand in a result."""
        if self.node.channel != -1:
            return bias[(..., *(None,) * (-1 - self.node.channel))]
        return bias.unsqueeze(-2) if self.node.rows and bias.ndim > 1 else bias

    def _signs(self, x: Tensor) -> Signs:
        rank = self.node.rows + 1 if self.node.kind == "linear" else -self.node.channel
        lead, units = tuple(x.shape[: x.ndim - rank]), x.shape[self.node.channel]
        key = (self.node.weight, lead, units)
        if key not in self.signs:
            out = self.node.shape[0]
            self.signs[key] = draw_signs(lead, out, units, x, self.generator)
        return self.signs[key]


__all__ = ["Draw", "Leaf", "Wrap", "callables", "leaves", "values_of"]
