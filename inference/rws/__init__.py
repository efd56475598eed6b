"""Reweighted wake-sleep: proposals follow the gradient of ``E_post[log q]`` on massively parallel importance weights.

Sources: [Heap2023], [Bornschein2015].
"""

from ppl.inference.particles.problem import describe, supports
from ppl.inference.rws.kernel import init, posterior, prepare, step
from ppl.inference.rws.options import RWS

Options = RWS

__all__ = ["RWS", "Options", "describe", "init", "posterior", "prepare", "step", "supports"]
