"""Options of the sparse Laplace approximation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ppl.backend import refuse_idle
from ppl.errors import ModelError

_CHOICES = {
    "optimiser": ("lm", "gauss_newton", "dogleg"),
    "solver": ("auto", "superlu", "cholmod", "cg"),
    "matching": ("gradient", "energy"),
}


@dataclass(frozen=True)
class LaplaceApproximation:
    """Find the mode by nonlinear least squares, and put a Gaussian there.

    Args:
        optimiser: ``"lm"`` (Levenberg-Marquardt, which takes undamped steps as long as they go well),
            ``"gauss_newton"`` (every step in full), or ``"dogleg"`` (a trust region).
        solver: of the linear systems: SuperLU, CHOLMOD (needs scikit-sparse), or conjugate gradients for what is too
            large to factorise; ``"auto"`` decides by the predicted size of the factor.
        start: first values of latents, ``[*plates, *event]`` by name; prior means by default.
        matching: weights of robust kernels by slope (the mode of the robust density) or by height.
        graduated: start robust thresholds this many times too wide and shrink them (graduated non-convexity). By default
            10 where a kernel is not convex, and 1 (not at all) elsewhere.
        graduated_steps: number of steps until they have their own width.
        damping: of the first step of ``"lm"``, relative to the diagonal of ``J'J``; by default none, and a second
            attempt from the start with 1e-3 where the first full step led astray.
        tol: converged when a step is shorter than this many posterior standard deviations; ``infer(tol=...)`` replaces it.
        max_steps: most steps; ``infer(max_iters=...)`` replaces it.
        draws: of the posterior, from which covariances are estimated where no factor is at hand (``solver="cg"``).
        learn: whether params are learned (by expectation maximisation) or stay at their first values.

    >>> LaplaceApproximation(optimiser="dogleg").solver
    'auto'
    """

    optimiser: Literal["lm", "gauss_newton", "dogleg"] = "lm"
    solver: Literal["auto", "superlu", "cholmod", "cg"] = "auto"
    start: Mapping[str, Any] | None = None
    matching: Literal["gradient", "energy"] = "gradient"
    graduated: float | None = None
    graduated_steps: int = 60
    damping: float | None = None
    tol: float = 1e-6
    max_steps: int = 200
    draws: int = 200
    learn: bool = True

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ModelError(
                    f"LaplaceApproximation({name}=...): expected one of {', '.join(choices)}, got {getattr(self, name)!r}."
                )
        if self.graduated is not None and not self.graduated >= 1:
            raise ModelError(
                f"LaplaceApproximation(graduated=...): expected a factor of at least 1, got {self.graduated!r}."
            )
        for name in ("damping", "tol"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ModelError(
                    f"LaplaceApproximation({name}=...): expected a number of at least 0, got {getattr(self, name)!r}."
                )
        for name in ("max_steps", "draws", "graduated_steps"):
            if not getattr(self, name) >= 1:
                raise ModelError(
                    f"LaplaceApproximation({name}=...): expected at least 1, got {getattr(self, name)!r}."
                )
        refuse_idle(
            self,
            damping=(self.optimiser == "lm", "optimiser='lm'"),
            draws=(self.solver in ("auto", "cg"), "solver='cg'"),
            graduated_steps=(self.graduated != 1, "graduated above 1"),
        )
