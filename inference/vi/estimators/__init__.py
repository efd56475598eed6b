"""Ways to move an approximation up its bound: one module each, with one function ``step(problem, state, tempering)``.

The kernel looks a module up by the option ``estimator``; a new one is a module here and a line in ``ESTIMATORS``.
"""

from ppl.inference.vi.estimators import natural, reparameterised

ESTIMATORS = {
    "auto": reparameterised.pathwise,
    "pathwise": reparameterised.pathwise,
    "total": reparameterised.total,
    "natural": natural.step,
}

__all__ = ["ESTIMATORS"]
