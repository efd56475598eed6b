"""Oracle of massively parallel importance weighting: every tuple of particle indices, one after the other, in NumPy.

Nothing here knows plates, elimination orders or lowering. A structure is a program together with its joint
log-density written a second time by hand, over arrays ``[n, *plates]`` whose first axis runs over index tuples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from scipy.special import logsumexp

Arrays = Mapping[str, np.ndarray]


class Axis(NamedTuple):
    """A particle axis: the latents that share it, the sizes of its plates, its particles."""

    names: tuple[str, ...]
    plates: tuple[int, ...]
    particles: int
    enumerated: bool = False


class Structure(NamedTuple):
    """A program, data for it, and what the oracle knows about it."""

    program: Any
    data: Mapping[str, Any]
    groups: tuple[tuple[str, ...], ...]
    plates: Mapping[str, tuple[int, ...]]  # latent -> sizes of its plates
    log_joint: Callable[[Arrays, Arrays], np.ndarray]
    discrete: tuple[str, ...] = ()


def log_normal(x, loc, scale):
    """Log-density of a Normal, by its formula."""
    return -0.5 * ((x - loc) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)


def total(log: np.ndarray) -> np.ndarray:
    """Sum over everything but the index tuples."""
    return log.reshape(len(log), -1).sum(1)


def index_tuples(axes: Mapping[str, Axis]) -> dict[str, np.ndarray]:
    """All combinations of one index for every element of every block, ``[n, *plates]`` an axis."""
    counts = {name: int(np.prod(axis.plates, initial=1)) for name, axis in axes.items()}
    ranges = [range(axes[name].particles) for name, c in counts.items() for _ in range(c)]
    table = np.array(list(itertools.product(*ranges)))
    found, at = {}, 0
    for name, count in counts.items():
        found[name] = table[:, at : at + count].reshape(-1, *axes[name].plates)
        at += count
    return found


def picked(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """``[n, *plates]`` from ``[*plates, K]`` at indices ``[n, *plates]``."""
    return np.take_along_axis(values[None], index[..., None], -1)[..., 0]


def log_weights(
    axes: Mapping[str, Axis],
    index: Arrays,
    values: Arrays,
    log_q: Arrays,
    log_joint: Callable[[Arrays], np.ndarray],
) -> np.ndarray:
    """Of every index tuple ``[n]``: model over proposals over the number of tuples."""
    z = {n: picked(values[n], index[a]) for a, axis in axes.items() for n in axis.names}
    log = log_joint(z)
    for name, axis in axes.items():
        if not axis.enumerated:
            log = log - total(picked(log_q[name], index[name]))
            log = log - np.prod(axis.plates, initial=1) * np.log(axis.particles)
    return log


def marginal(axis: Axis, index: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of every particle ``[*plates, K]`` from normalised weights of the tuples."""
    hit = index[..., None] == np.arange(axis.particles)
    return np.tensordot(weights, hit, 1)


def pair_marginal(a: Axis, ia: np.ndarray, b: Axis, ib: np.ndarray, w: np.ndarray) -> np.ndarray:
    """``[*plates of b, K_a, K_b]``, where the plates of ``a`` are the first ones of ``b``."""
    ia = ia.reshape(*ia.shape, *(1,) * (len(b.plates) - len(a.plates)))
    hit_a = (ia[..., None] == np.arange(a.particles))[..., :, None]
    hit_b = (ib[..., None] == np.arange(b.particles))[..., None, :]
    return np.tensordot(w, hit_a & hit_b, 1)


def normalised(log: np.ndarray) -> np.ndarray:
    """Weights that sum to one."""
    return np.exp(log - logsumexp(log))


def log_product_normal(mean: np.ndarray, variance: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Density of a block's particles ``[*plates, K, D]`` under a product of Normals, ``[*plates, K]``."""
    scale = np.sqrt(variance)[..., None, :]
    return stats.norm.logpdf(free, mean[..., None, :], scale).sum(-1)


def log_joint_normal(mean: np.ndarray, cov: np.ndarray, free: np.ndarray) -> np.ndarray:
    """The same under one multivariate Normal for each plate element."""
    lead = mean.shape[:-1]
    out = np.empty(free.shape[:-1])
    for place in np.ndindex(*lead):
        out[place] = stats.multivariate_normal(mean[place], cov[place]).logpdf(free[place])
    return out


def log_gauss_markov(mean: np.ndarray, cov: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Density of the states ``[*lead, T, K, D]`` of paths, each mixed over all particles of the time before.

    ``mean [*lead, T, 2 D]`` and ``cov [*lead, T, 2 D, 2 D]`` are those of (state before, state); the first state has
    the law of the second half.
    """
    d = free.shape[-1]
    out = np.empty(free.shape[:-1])
    for place in np.ndindex(*mean.shape[:-2]):
        for t in range(free.shape[-3]):
            m, c = mean[place][t], cov[place][t]
            gain = c[d:, :d] @ np.linalg.inv(c[:d, :d]) if t else np.zeros((d, d))
            rest = c[d:, d:] - gain @ c[:d, d:]
            before = free[place][max(t - 1, 0)]
            centres = m[d:] + (before - m[:d]) @ gain.T
            logs = [stats.multivariate_normal(c, rest).logpdf(free[place][t]) for c in centres]
            out[place][t] = logsumexp(logs, 0) - np.log(len(centres))
    return out


def chi_square_p(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Tail probability of the counts; the rarest cells are taken together until they expect five."""
    expected = counts.sum() * probabilities
    order = np.argsort(expected)
    rare = int((np.cumsum(expected[order]) < 5).sum()) + 1  # one more makes five
    while rare < len(order) and expected[order[rare]] < 5:
        rare += 1
    cells = [order[:rare], *([i] for i in order[rare:])]
    wanted = np.array([expected[c].sum() for c in cells])
    observed = np.array([counts[c].sum() for c in cells])
    assert len(cells) > 1, "nearly all probability in one cell: nothing is tested"
    return float(stats.chi2.sf(((observed - wanted) ** 2 / wanted).sum(), len(cells) - 1))
