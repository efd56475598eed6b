"""QEM: expectation maximisation on massively parallel importance weights.

Draws ``K`` particles of every block of latents, weighs all ``K^n`` combinations by tensor contraction, and moves each
proposal to the posterior moments that come out; no gradients of the model are taken. Source: [Heap2025], [Bowyer2023].
"""

from ppl.inference.particles.problem import supports
from ppl.inference.particles.results import reweight
from ppl.inference.qem.kernel import describe
from ppl.inference.qem.minibatch import init, posterior, prepare, step
from ppl.inference.qem.options import QEM

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
