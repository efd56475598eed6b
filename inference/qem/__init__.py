"""QEM: expectation maximisation on massively parallel importance weights.

Draws ``K`` particles of every block of latents, weighs all ``K^n`` combinations by tensor contraction, and moves each
proposal to the posterior moments that come out; no gradients of the model are taken. Source: [Heap2025], [Bowyer2023].
"""

from ppl.inference.qem.kernel import init, step
from ppl.inference.qem.options import QEM
from ppl.inference.qem.problem import describe, prepare, supports
from ppl.inference.qem.results import posterior, reweight

Options = QEM

__all__ = [
    "QEM",
    "Options",
    "describe",
    "init",
    "posterior",
    "prepare",
    "reweight",
    "step",
    "supports",
]
