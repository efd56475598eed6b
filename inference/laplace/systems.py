"""The linear systems of one step, by a factorisation or by conjugate gradients."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ppl.errors import NumericalError
from ppl.inference.groups.records import Linearised
from ppl.inference.laplace.problem import Problem, State
from ppl.inference.numerics.pcg import block_jacobi, conjugate_gradients
from ppl.inference.numerics.sparse import Factor, NotPositive


class System(Protocol):
    """``J'J`` at the point of a state."""

    def solve(self, right: Tensor, lift: Tensor | None = None) -> Tensor:
        """Solution of ``(J'J + diag(lift)) x = right``, vectors ``[n]``; NotPositive if there is none."""
        ...

    def product(self, vector: Tensor) -> Tensor:
        """``J'J @ vector`` ``[n]``."""
        ...

    def diagonal(self) -> Tensor:
        """Diagonal of ``J'J`` ``[n]``."""
        ...


def make_system(problem: Problem, state: State) -> System:
    """The system of a state.

    >>> import ppl
    >>> from ppl.backend import Settings
    >>> from ppl.inference.laplace import LaplaceApproximation, init, prepare
    >>> from ppl.streams import Streams
    >>> @ppl.model
    ... def shrunk():
    ...     x = ppl.latent("x", ppl.Normal(0.0, 1.0))
    ...     ppl.observe("y", ppl.Normal(x, 1.0))
    >>> problem = prepare(shrunk.bind({"y": 3.0}), LaplaceApproximation(), Settings(Streams(0)))
    >>> state = init(problem)
    >>> make_system(problem, state).solve(-state.gradient)
    tensor([1.5000], dtype=torch.float64)
    """
    if problem.solver == "cg":
        return Iterative(problem, rows_at(problem, state))
    return Direct(problem, state.curvature, is_checked=int(state.iteration) > 0)


def rows_at(problem: Problem, state: State) -> list[Linearised]:
    """All rows near the points of a state."""
    return problem.equations.linearise(
        state.points,
        state.params,
        matching=problem.options.matching,
        kernel_scale=float(state.kernel_scale),
    )


class Direct:
    """By a factorisation."""

    def __init__(self, problem: Problem, curvature: Tensor, *, is_checked: bool = False) -> None:
        self.problem, self.equations, self.curvature = problem, problem.equations, curvature
        self.is_checked = (
            is_checked  # known to be positive definite, which takes a while to find out
        )

    def factor(self, lift: Tensor | None = None) -> Factor:
        problem = self.problem
        return problem.kept.factor(self.equations, self.curvature, lift, problem.solver)

    def solve(self, right: Tensor, lift: Tensor | None = None) -> Tensor:
        factor = self.factor(lift)
        if lift is None and not self.is_checked:
            if not factor.is_positive:
                raise NotPositive(factor.undetermined)
            self.is_checked = True
        found = factor.solve(right.detach().to("cpu", torch.float64).numpy())
        return torch.from_numpy(found).to(right)

    def product(self, vector: Tensor) -> Tensor:
        ordering = self.equations.ordering
        flat = vector.detach().to("cpu", torch.float64).numpy()[ordering.columns]
        image = self.equations.matrix(self.curvature) @ flat
        return torch.from_numpy(image[ordering.positions]).to(vector)

    def diagonal(self) -> Tensor:
        return self.equations.diagonal(self.curvature)


class Iterative:
    """By conjugate gradients, preconditioned by the diagonal blocks."""

    def __init__(self, problem: Problem, rows: list[Linearised]) -> None:
        self.problem, self.rows = problem, rows
        self.equations = problem.equations
        self.blocks = self.equations.diagonal_blocks(rows)

    def solve(self, right: Tensor, lift: Tensor | None = None) -> Tensor:
        return self.solve_many(right.unsqueeze(-1), lift).squeeze(-1)

    def solve_many(
        self, right: Tensor, lift: Tensor | None = None, tol: float | None = None
    ) -> Tensor:
        """Several right-hand sides ``[n, k]``; ``tol`` is that of their residuals, relative."""
        at = self.equations.at

        def product(x: Tensor) -> Tensor:
            image = self.equations.pullback(self.rows, self.equations.pushforward(self.rows, x))
            return image if lift is None else image + lift.unsqueeze(-1) * x

        lifts = {} if lift is None else at.split(lift)
        jacobi = {
            name: block_jacobi(_lifted(block, lifts.get(name)))
            for name, block in self.blocks.items()
        }

        def precondition(x: Tensor) -> Tensor:
            parts = at.split(x)
            return at.joined(
                {n: jacobi[n](p.flatten(0, 1)).reshape(p.shape) for n, p in parts.items()}
            )

        tol = tol or (1e-5 if right.dtype == torch.float32 else 1e-10)
        most = max(1000, min(10 * at.size, 20_000))
        return conjugate_gradients(product, right, precondition, tol=tol, max_iters=most).solution

    def product(self, vector: Tensor) -> Tensor:
        pushed = self.equations.pushforward(self.rows, vector.unsqueeze(-1))
        return self.equations.pullback(self.rows, pushed).squeeze(-1)

    def diagonal(self) -> Tensor:
        diagonals = {n: b.diagonal(dim1=1, dim2=2) for n, b in self.blocks.items()}
        return self.equations.at.joined(diagonals)


def _lifted(blocks: Tensor, lift: Tensor | None) -> Tensor:
    if lift is not None:
        blocks = blocks + torch.diag_embed(lift)
    # Elements without a factor of their own have nothing to be preconditioned by.
    size = blocks.diagonal(dim1=1, dim2=2).amax(-1)
    floor = torch.where(size > 0, 1e-12 * size, 1.0)
    return blocks + floor[:, None, None] * torch.eye(blocks.shape[1]).to(blocks)


def check_touched(problem: Problem) -> None:
    """Refuse elements that no factor speaks of.

    Raises:
        NumericalError: it names them.
    """
    families = problem.groups.families
    seen = {n: torch.zeros(f.count, dtype=torch.bool) for n, f in families.items()}
    for group in problem.groups.groups:
        rows = slice(None) if group.keep is None else group.keep.reshape(group.rows, -1).any(1)
        for slot in group.slots:
            seen[slot.family][slot.index[rows].reshape(-1).cpu()] = True
    for name, touched in seen.items():
        if not bool(touched.all()):
            free = torch.nonzero(~touched)
            first = [problem.equations.at.place(name, int(e)) for e in free[:3]]
            more = f" and {len(free) - 3} more" if len(free) > 3 else ""
            which = f"{len(free)} of {len(touched)} elements of '{name}' ({', '.join(first)}{more})"
            raise NumericalError(
                f"laplace: {which if first[0] else repr(name)} {'are' if len(free) > 1 else 'is'} in no factor that has data, so "
                f"that nothing determines {'them' if len(free) > 1 else 'it'}. Give '{name}' a proper prior, or correct the "
                "pointers or sizes= that made the plate so large."
            )


def undetermined(problem: Problem, scalars: np.ndarray) -> NumericalError:
    """The error of a singular system: which elements are left free, in the user's words."""
    at = problem.equations.at
    labels = list(dict.fromkeys(at.label(int(s)) for s in scalars[:50]))
    shown = ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
    verb = "is" if len(labels) == 1 else "are"
    return NumericalError(
        f"{shown} {verb} not determined: the factors leave a direction free. Add a prior or an anchor (a factor that "
        "says where it stands, not only how it stands to others)."
    )
