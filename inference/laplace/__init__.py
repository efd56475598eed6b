"""The sparse Laplace approximation: nonlinear least squares by a sparse direct solver, and a Gaussian at the mode."""

from ppl.inference.laplace.implicit import solution
from ppl.inference.laplace.online import extend
from ppl.inference.laplace.optimise import step
from ppl.inference.laplace.options import LaplaceApproximation
from ppl.inference.laplace.problem import cost, describe, prepare, supports
from ppl.inference.laplace.results import posterior
from ppl.inference.laplace.states import init

Options = LaplaceApproximation
looks_inside = True

__all__ = [
    "LaplaceApproximation",
    "Options",
    "cost",
    "describe",
    "extend",
    "init",
    "looks_inside",
    "posterior",
    "prepare",
    "solution",
    "step",
    "supports",
]
