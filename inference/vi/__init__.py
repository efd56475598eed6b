"""Variational inference: a Gaussian on the unconstrained scale that maximises a bound on the log evidence.

Mean-field, low rank or full rank over all latents, or block by block on massively parallel particles; discrete latents
with few values are summed exactly. Networks are fitted by local reparameterisation, Flipout, weight draws or natural
steps, see :mod:`ppl.inference.vi.networks`. Sources: [Kucukelbir2017], [Burda2016], [Bowyer2023].
"""

from ppl.inference.vi.kernel import describe, init, posterior, prepare, step, supports
from ppl.inference.vi.networks import single_precision
from ppl.inference.vi.options import VI

Options = VI
takes_batch_norm = True  # where the model is fitted as a network

__all__ = [
    "VI",
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
