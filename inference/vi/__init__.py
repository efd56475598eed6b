"""Variational inference: a Gaussian on the unconstrained scale that maximises a bound on the log evidence.

Mean-field, low rank or full rank over all latents, or block by block on massively parallel particles; discrete latents
with few values are summed exactly. Sources: [Kucukelbir2017], [Burda2016], [Bowyer2023].
"""

from ppl.inference.vi.kernel import describe, init, posterior, prepare, step, supports
from ppl.inference.vi.options import VI

Options = VI

__all__ = ["VI", "Options", "describe", "init", "posterior", "prepare", "step", "supports"]
