"""Gradients through the mode, without looking into how it was found.

At the mode the slope ``g(x, theta)`` of the energy is zero, whatever theta is; hence ``dx = -inv(H) dg/dtheta dtheta`` with
H the curvature there: one more solve. H is the whole second derivative, not ``J'J``, and is applied by
differentiating twice; ``J'J`` is its preconditioner. Source: implicit function theorem, [Blondel2022].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.errors import DataError, NumericalError
from ppl.inference.laplace.problem import Problem, State
from ppl.inference.laplace.systems import make_system
from ppl.inference.numerics.pcg import conjugate_gradients


class _Solve(torch.autograd.Function):
    """``inv(H) g`` for a symmetric H that is constant: its derivative is itself."""

    @staticmethod
    def forward(ctx: Any, solve: Callable[[Tensor], Tensor], g: Tensor) -> Tensor:  # type: ignore[override]
        ctx.solve = solve
        return solve(g)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, ctx.solve(grad)


def attached(
    problem: Problem, state: State, params: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The points of a converged state, as differentiable functions of data and params that require gradients.

    Args:
        problem: its groups hold the data.
        state: at the mode.
        params: to differentiate by; those of the state by default.
    """
    params = state.params if params is None else params
    at = problem.equations.at
    origin = state.gradient.new_zeros(at.size, requires_grad=True)
    energy = _energy(problem, state.points, origin, params)
    (slope,) = torch.autograd.grad(energy, origin, create_graph=True)
    delta = -_Solve.apply(_solver(problem, state), slope)
    # At the mode the step is zero but for rounding, which is taken off: only its derivative is wanted.
    delta = delta - delta.detach()
    return problem.groups.retract(state.points, at.split(delta))


def _energy(
    problem: Problem, points: Mapping[str, Tensor], delta: Tensor, params: Mapping[str, Tensor]
) -> Tensor:
    moved = problem.groups.retract(points, problem.equations.at.split(delta))
    return problem.groups.energy(moved, params)


def _solver(problem: Problem, state: State) -> Callable[[Tensor], Tensor]:
    """Solve with the whole curvature by conjugate gradients; ``J'J`` makes a few products enough."""
    at, system = problem.equations.at, make_system(problem, state)
    points = {k: v.detach() for k, v in state.points.items()}
    params = {k: v.detach() for k, v in state.params.items()}

    def product(vectors: Tensor) -> Tensor:
        with torch.enable_grad():
            origin = vectors.new_zeros(at.size, requires_grad=True)
            (slope,) = torch.autograd.grad(
                _energy(problem, points, origin, params), origin, create_graph=True
            )
            (image,) = torch.autograd.grad((slope * vectors.squeeze(-1)).sum(), origin)
        return image.detach().unsqueeze(-1)

    def solve(right: Tensor) -> Tensor:
        found = conjugate_gradients(
            product,
            right.detach().unsqueeze(-1),
            lambda x: system.solve(x.squeeze(-1)).unsqueeze(-1),
            tol=1e-12 if right.dtype == torch.float64 else 1e-6,
            max_iters=500,
        )
        if not bool((found.error < 1e-3).all()):
            raise NumericalError(
                "the gradient through the mode could not be solved for: the curvature there is not positive definite. "
                "Is the fit converged?"
            )
        return found.solution.squeeze(-1)

    return solve


def solution(
    model: Any, data: Any, *, params: Mapping[str, Tensor] | None = None, **options: Any
) -> dict[str, Tensor]:
    """The mode as a differentiable function of data and params.

    Args:
        model: what ``@model`` made.
        data: as for ``infer``; tensors that require gradients are differentiated by.
        params: values of params, by name, which are then not learned.
        **options: of :class:`~ppl.inference.laplace.options.LaplaceApproximation`.

    Returns:
        ``[*plates, *event]`` by latent.

    >>> import ppl
    >>> @ppl.model
    ... def shrunk():
    ...     x = ppl.latent("x", ppl.Normal(0.0, 1.0))
    ...     ppl.observe("y", ppl.Normal(x, 1.0))
    >>> y = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    >>> x = solution(shrunk, {"y": y})["x"]
    >>> round(x.item(), 6), torch.autograd.grad(x, y)[0].item()
    (1.5, 0.5)
    """
    from ppl.backend import Settings
    from ppl.inference.laplace import optimise
    from ppl.inference.laplace.options import LaplaceApproximation
    from ppl.inference.laplace.problem import prepare
    from ppl.inference.laplace.states import init, moved
    from ppl.streams import Streams

    bound = _with_gradients(model.bind(data), data)
    problem = prepare(
        bound, LaplaceApproximation(learn=False, **options), Settings(Streams(0, bound.device))
    )
    state = init(problem)
    state = state._replace(params=_given(state.params, params or {}))
    state = moved(problem, state, state.points)
    for _ in range(problem.max_iters):
        state, info = optimise.step(problem, state, None)
        if info.done:
            break
    points = attached(problem, state)
    return {name: problem.groups.shaped(name, x) for name, x in points.items()}


def _with_gradients(bound: Bound, data: Any) -> Bound:
    """The data as the user's own tensors, where these require gradients: binding cuts them off."""
    values = dict(bound.values)
    for name, value in data.items() if isinstance(data, Mapping) else ():
        if isinstance(value, Tensor) and value.requires_grad and name in values:
            values[name] = value.to(values[name]).reshape(values[name].shape)
    return replace(bound, values=values)


def _given(own: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, value in params.items():
        if name not in own:
            raise DataError(
                f"solution(params=...): the model has no param '{name}'. Params: {', '.join(own)}."
            )
        if value.shape != own[name].shape:
            raise DataError(
                f"solution(params=...): '{name}': expected shape {list(own[name].shape)}, got {list(value.shape)}."
            )
    return {**own, **params}
