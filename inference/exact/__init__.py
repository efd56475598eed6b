"""The oracle: enumeration, dense Gaussian algebra and small quadrature, combined in one scheme."""

from ppl.inference.exact.problem import Exact, cost, describe, init, posterior, prepare, step
from ppl.inference.exact.split import supports

Options = Exact

__all__ = [
    "Exact",
    "Options",
    "cost",
    "describe",
    "init",
    "posterior",
    "prepare",
    "step",
    "supports",
]
