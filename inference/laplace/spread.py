"""The Gaussian around the mode: from a factor, from draws, or from a window and what was before it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ppl.errors import UnsupportedError
from ppl.inference.groups.records import Group
from ppl.inference.laplace.problem import Problem, State, Window
from ppl.inference.laplace.systems import Direct, Iterative, rows_at, undetermined
from ppl.inference.numerics.pcg import covariance_from_draws
from ppl.inference.numerics.sparse import Factor, NotPositive
from ppl.posterior import Evidence

_CLEAR = 1e-11  # of the diagonal: no pivot above it vanishes by a short step
_DRAWN = 1e-5  # relative error of a draw, which is small beside that of a thousand of them


class Spread(Protocol):
    """What is known of the Gaussian around the mode."""

    def covariance(self, name: str) -> Tensor:
        """Of each element of a family ``[N, d, d]``."""
        ...

    def joint(self, group: Group) -> Tensor:
        """Of what each row touches ``[F, D, D]``."""
        ...

    def draws(self, noise: Callable[[int], Tensor]) -> Tensor:
        """Tangent vectors ``[n, k]``; ``noise(n)`` is standard Normal ``[n, k]``."""
        ...


# ---- by a factor ---------------------------------------------------------------------------------


class Factored:
    """Everything from a sparse factor."""

    def __init__(self, problem: Problem, factor: Factor) -> None:
        self.equations, self.factor = problem.equations, factor

    def covariance(self, name: str) -> Tensor:
        return self.equations.covariance(self.factor, name)

    def joint(self, group: Group) -> Tensor:
        return self.equations.joint_covariance(self.factor, group)

    def draws(self, noise: Callable[[int], Tensor]) -> Tensor:
        standard = noise(self.equations.at.size).to("cpu", torch.float64).numpy()
        return torch.from_numpy(self.factor.draws(standard)).to(self.equations.groups.like)


class Deferred:
    """The Gaussian around the last point, and the evidence, worked out when they are first asked for."""

    def __init__(self, problem: Problem, state: State) -> None:
        self._problem, self._state = problem, state

    @cached_property
    def found(self) -> tuple[Spread, Evidence | None]:
        with torch.no_grad():
            return spread_of(self._problem, self._state)

    def evidence(self) -> Evidence | None:
        return self.found[1]

    def covariance(self, name: str) -> Tensor:
        return self.found[0].covariance(name)

    def joint(self, group: Group) -> Tensor:
        return self.found[0].joint(group)

    def draws(self, noise: Callable[[int], Tensor]) -> Tensor:
        return self.found[0].draws(noise)


def spread_of(problem: Problem, state: State) -> tuple[Spread, Evidence | None]:
    """The Gaussian around the last point, and the evidence.

    Raises:
        NumericalError: an unknown is not determined.
    """
    if state.window is not None:
        spread, evidence = spread_of(state.window.problem, state._replace(window=None))
        return Windowed(spread, state.window), evidence
    if problem.solver == "cg":
        return Estimated(problem, state), None
    try:
        factor = Direct(problem, state.curvature).factor()
    except NotPositive as error:
        raise undetermined(problem, error.columns) from error
    if not factor.is_positive:
        raise undetermined(problem, factor.undetermined)
    return Factored(problem, factor), _evidence(problem, state, factor)


def is_positive(problem: Problem, state: State) -> bool:
    """Whether the system has a solution beyond doubt: that of the last step had one, which was undamped."""
    problem = problem if state.window is None else state.window.problem
    last = problem.kept.last
    if last is None or not bool(state.length.isfinite()):
        return False
    return bool((last.pivots > _CLEAR * np.abs(last.diagonal)).all())


def _evidence(problem: Problem, state: State, factor: Factor) -> Evidence:
    """Log-density at the mode, and half the log determinant of what is integrated over."""
    groups = problem.groups
    norms = [g.log_norm(state.params).sum() for g in groups.groups]
    top = float(sum(norms, groups.constant)) - float(state.energy)
    volume = problem.equations.at.size * math.log(2 * math.pi) - factor.log_det
    return Evidence(top + volume / 2, 0.0, _kind(problem))


def _kind(problem: Problem) -> str:
    kind = "exact" if problem.is_linear else "Laplace"
    if problem.bound.graph.is_improper:
        kind += ", improper prior"
    return kind


class Windowed:
    """As of an open window; closed elements keep the covariance that they had, and are drawn by themselves."""

    def __init__(self, spread: Spread, window: Window) -> None:
        self.spread, self.window = spread, window

    def covariance(self, name: str) -> Tensor:
        now, before = self.spread.covariance(name), self.window.covariances[name]
        closed = self.window.closed[name].to(now.device)
        return torch.where(closed[:, None, None], before, now)

    def joint(self, group: Group) -> Tensor:
        found = self.spread.joint(group)
        for slot in group.slots:
            if bool(self.window.closed[slot.family][slot.index.to("cpu")].any()):
                raise UnsupportedError(
                    f"joint('{group.site}'): some elements that it touches are closed (lag=...). Ask for marginals."
                )
        return found

    def draws(self, noise: Callable[[int], Tensor]) -> Tensor:
        at = self.window.problem.equations.at
        found = at.split(self.spread.draws(noise))
        for name, closed in self.window.closed.items():
            which = torch.nonzero(closed).flatten().to(found[name].device)
            # A closed element was pinned by a unit Gaussian: its draws are standard Normal.
            root = torch.linalg.cholesky(self.window.covariances[name][which])
            found[name] = found[name].index_copy(0, which, root @ found[name][which])
        return at.joined(found)


# ---- by draws ------------------------------------------------------------------------------------


class Estimated:
    """Covariances from random draws, for systems too large for a factor.

    ``x`` with ``J'J x = J' z`` and standard Normal z has covariance ``inv(J'J)``. Source: [Papandreou2010].
    """

    def __init__(self, problem: Problem, state: State) -> None:
        self.problem, self.rows = problem, rows_at(problem, state)
        self.system = Iterative(problem, self.rows)
        self._pool: tuple[Tensor, Tensor] | None = None

    def pool(self) -> tuple[Tensor, Tensor]:
        """Draws ``[n, k]`` that are kept, and ``J'J`` times them."""
        if self._pool is None:
            streams = self.problem.settings.streams.child("covariances")
            generator = streams.of("draws")
            self._pool = self._drawn(
                lambda *shape: torch.randn(*shape, self.problem.options.draws, generator=generator)
            )
        return self._pool

    def _drawn(self, noise: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        right = self.problem.equations.pullback(
            self.rows, [noise(*r.residual.shape).to(r.residual) for r in self.rows]
        )
        return self.system.solve_many(right, tol=_DRAWN), right

    def covariance(self, name: str) -> Tensor:
        at = self.problem.equations.at
        draws, pulled = (at.split(x)[name] for x in self.pool())
        own = self.system.blocks[name]
        return covariance_from_draws(draws, pulled, own)

    def joint(self, group: Group) -> Tensor:
        scalars = torch.from_numpy(self.problem.equations.at.touched(group))
        draws = self.pool()[0][scalars]
        return draws @ draws.mT / draws.shape[-1]

    def draws(self, noise: Callable[[int], Tensor]) -> Tensor:
        total = sum(r.residual.numel() for r in self.rows)
        parts = noise(total).split([r.residual.numel() for r in self.rows])
        shaped = iter(
            [p.reshape(*r.residual.shape, -1) for p, r in zip(parts, self.rows, strict=True)]
        )
        return self._drawn(lambda *shape: next(shaped))[0]
