"""Rows in groups around a common mean, all Normal, with some data and its evidence in closed form."""

from __future__ import annotations

import numpy as np
from scipy import stats

from ppl import Normal, latent, model, observe, plate

Y = np.array([[0.3, 1.1], [-0.4, 0.2], [2.0, 1.3]])


@model
def nested():
    mean = latent("mean", Normal(0.0, 1.0))
    with plate("group"):
        level = latent("level", Normal(mean, 0.8))
        with plate("row"):
            x = latent("x", Normal(level, 1.0))
            observe("y", Normal(x, 0.7))


def nested_evidence() -> float:
    """All rows share ``mean``, those of a group ``level``."""
    same = np.kron(np.eye(3), np.ones((2, 2)))
    cov = 1.0 + 0.64 * same + (1.0 + 0.49) * np.eye(6)
    return float(stats.multivariate_normal(np.zeros(6), cov).logpdf(Y.ravel()))
