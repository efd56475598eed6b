"""Sparse subspace variational inference: Gaussians on a small set of weights of a network, which moves while they are fitted.

Source: [Li2024].
"""

from ppl.graph import Graph
from ppl.inference.ssvi.kernel import describe, init, posterior, prepare, step, supports
from ppl.inference.ssvi.options import SSVI

Options = SSVI
takes_batch_norm = True  # trained on batches, with statistics estimated anew at the end


def single_precision(graph: Graph, options: SSVI) -> bool:
    """Whether data in single precision is fitted in it: networks always are."""
    return True


__all__ = [
    "SSVI",
    "Options",
    "describe",
    "init",
    "posterior",
    "prepare",
    "single_precision",
    "step",
    "supports",
    "takes_batch_norm",
]
