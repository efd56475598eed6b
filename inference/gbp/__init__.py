"""Gaussian belief propagation on linearised factors: means and covariances by messages along a factor graph.

Exact on trees of linear factors. On loops the means are right where the messages converge and variances are too small;
the diagnostics say by how much. Source: [Ortiz2021], [Weiss2001], [Malioutov2006].
"""

from ppl.inference.gbp.extend import extend
from ppl.inference.gbp.kernel import init
from ppl.inference.gbp.learning import step
from ppl.inference.gbp.options import GBP
from ppl.inference.gbp.problem import cost, describe, prepare, supports
from ppl.inference.gbp.results import posterior

Options = GBP
looks_inside = True

__all__ = [
    "GBP",
    "Options",
    "cost",
    "describe",
    "extend",
    "init",
    "looks_inside",
    "posterior",
    "prepare",
    "step",
    "supports",
]
