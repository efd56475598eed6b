"""What is computed once: the groups of factor rows, the pattern of their normal equations, how these are solved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppl.backend import Reason, Settings
from ppl.binding import Bound
from ppl.errors import UnsupportedError
from ppl.graph import Graph
from ppl.inference.groups.build import build
from ppl.inference.groups.equations import Equations
from ppl.inference.groups.losses import Quadratic, Robust
from ppl.inference.groups.records import FactorGroups
from ppl.inference.groups.support import refuse_settings, unsupported
from ppl.inference.laplace.options import LaplaceApproximation
from ppl.inference.numerics.sparse import Factor, has_cholmod

_MOST_FILL = (
    150_000_000  # entries of a factor, 2.4 GB with its indices; beyond it conjugate gradients
)
_MOST_PAIRS = (
    3_000_000  # pairs of elements beyond which even an order of elimination takes long to find
)


class Kept:
    """The last factorisation, for whoever asks for it again."""

    def __init__(self) -> None:
        self._made: tuple[Tensor, Tensor | None, Factor] | None = None

    @property
    def last(self) -> Factor | None:
        """The last one."""
        return self._made[2] if self._made is not None else None

    def factor(
        self, equations: Equations, curvature: Tensor, lift: Tensor | None, solver: Any
    ) -> Factor:
        """The factorisation of ``J'J + diag(lift)``; a curvature is known by its identity."""
        if self._made is not None and self._made[0] is curvature and _is_same(self._made[1], lift):
            return self._made[2]
        self._made = None  # two factors need not fit
        made = equations.factorise(curvature, lift, solver)
        self._made = (curvature, lift, made)
        return made


def _is_same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


@dataclass(frozen=True, eq=False)
class Problem:
    """What ``prepare`` returns.

    Attributes:
        solver: ``"superlu"``, ``"cholmod"`` or ``"cg"``.
        graduated: how much too wide robust thresholds are at first.
        is_linear: all factors are affine and Gaussian, so that one step is all there is to do.
    """

    groups: FactorGroups
    equations: Equations
    options: LaplaceApproximation
    settings: Settings
    solver: str
    is_linear: bool
    tol: float
    max_iters: int
    graduated: float = 1.0
    kept: Kept = field(default_factory=Kept, repr=False)

    @property
    def learns(self) -> bool:
        """Whether there are params to learn."""
        return bool(self.groups.params) and self.options.learn

    @property
    def bound(self) -> Bound:
        """The graph and its data."""
        assert self.groups.bound is not None, "the groups were made without a model"
        return self.groups.bound


@dataclass(frozen=True, eq=False)
class Window:
    """A problem of which the older elements have been summed up.

    Attributes:
        problem: the same families; what touched a closed element is replaced by a Gaussian on the others.
        closed: which elements are closed, by family ``[N]``.
        covariances: of closed elements, from when they were open, by family ``[N, d, d]``.
        lost: number of rows that came too late, because they touch closed elements.
    """

    problem: Problem
    closed: dict[str, Tensor]
    covariances: dict[str, Tensor]
    lost: int = 0


class State(NamedTuple):
    """A point, and the normal equations there."""

    points: dict[str, Tensor]  # [N, *event] by latent
    params: dict[str, Tensor]
    energy: Tensor  # [], of all rows
    gradient: Tensor  # [n]
    curvature: Tensor  # blocks of J'J, flat; empty with conjugate gradients
    damping: Tensor  # [], of Levenberg-Marquardt, or the radius of the trust region
    kernel_scale: Tensor  # [], factor of robust thresholds, 1 unless graduated
    iteration: Tensor  # [], long
    bad_rows: Tensor  # [], long: rows that are not finite
    length: Tensor  # [], of the last full step in posterior standard deviations; infinite if there was none
    change: Tensor  # [], of the params by the last M-step, relative; infinite if there was none
    origin: dict[str, Tensor]  # the first points
    held: Tensor  # curvature whose factorisation is used again; empty if none is, see `holding.py`
    moves: Tensor  # [k, n], the last steps with it
    turns: Tensor  # [k, n], changes of the gradient by them
    window: Window | None = None  # the part of the problem that is still open, see `online.py`


def supports(graph: Graph) -> list[Reason]:
    """Why this graph has no such approximation; empty when it has one."""
    return list(unsupported(graph))


def prepare(bound: Bound, options: LaplaceApproximation, settings: Settings) -> Problem:
    """Group the factors and choose a solver.

    Raises:
        UnsupportedError: an option of ``infer`` is not supported.
    """
    refuse_settings("laplace", settings)
    return make_problem(build(bound), options, settings)


def make_problem(
    groups: FactorGroups, options: LaplaceApproximation, settings: Settings
) -> Problem:
    """The problem of groups that are at hand already."""
    equations = Equations(groups)
    is_linear = all(g.is_affine and isinstance(g.loss, Quadratic) for g in groups.groups)
    graduated = options.graduated or _graduation(groups)
    steps = options.max_steps + (options.graduated_steps if graduated > 1 else 0)
    steps *= 10 if groups.params and options.learn else 1  # a few for each M-step
    return Problem(
        groups,
        equations,
        options,
        settings,
        choose_solver(equations, options),
        is_linear,
        options.tol if settings.tol is None else settings.tol,
        steps,
        graduated,
    )


def _graduation(groups: FactorGroups) -> float:
    """Ten where a loss has several minima: what a start far away ends in is then a matter of luck."""
    kernels = {g.loss.kernel for g in groups.groups if isinstance(g.loss, Robust)}
    return 10.0 if kernels - {"huber"} else 1.0


def choose_solver(equations: Equations, options: LaplaceApproximation) -> str:
    """Direct as long as the factor fits."""
    if options.solver == "cholmod" and not has_cholmod():
        raise UnsupportedError(
            "laplace: solver='cholmod' needs the package scikit-sparse. Install it, or leave solver= out."
        )
    if options.solver != "auto":
        return options.solver
    if len(equations.pairs.first) > _MOST_PAIRS or equations.ordering.fill > _MOST_FILL:
        return "cg"
    return "cholmod" if has_cholmod() else "superlu"


# ---- what it would cost --------------------------------------------------------------------------


def cost(bound: Bound) -> float:
    """Operations that a fit takes, about: ten factorisations."""
    equations = Equations(build(bound))
    heights = _heights(equations)
    return 10.0 * float(heights @ heights)


def describe(bound: Bound, options: LaplaceApproximation, settings: Settings) -> str:
    """One line for ``explain``: unknowns, rows, entries, bytes."""
    problem = prepare(bound, options, settings)
    groups, equations = problem.groups, problem.equations
    rows = sum(g.rows for g in groups.groups)
    size = 8 * sum(g.rows * g.residual_dims * g.dims for g in groups.groups)
    text = f"{equations.at.size} unknowns, {rows} factors in {len(groups.groups)} groups"
    if problem.solver == "cg":
        return f"{text}, conjugate gradients, about {size:.2g} bytes"
    fill = equations.ordering.fill
    return f"{text}, {fill} entries in the factor ({problem.solver}), about {size + 28 * fill:.2g} bytes"


def _heights(equations: Equations) -> np.ndarray:
    """Entries of every column of the factor ``[n]``."""
    pointers, rows = equations.ordering.lower
    sizes = equations.at.dims[equations.ordering.order].astype(float)
    below = np.concatenate([[0.0], np.cumsum(sizes[rows])])
    return np.repeat(sizes + below[pointers[1:]] - below[pointers[:-1]], sizes.astype(int))
