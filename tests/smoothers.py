"""Posteriors of chains by the textbook recursions, written with NumPy and scipy only; NaN is a missing observation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats


class Smoothed(NamedTuple):
    """Posterior of a linear-Gaussian chain."""

    mean: np.ndarray  # [T, d]
    cov: np.ndarray  # [T, d, d]
    lag: np.ndarray  # [T-1, d, d], covariance of x_t+1 and x_t
    log_evidence: float
    filtered: tuple[
        np.ndarray, np.ndarray
    ]  # mean [T, d] and covariance [T, d, d] given y_1 ... y_t


def kalman_smoother(y, start, start_cov, move, move_cov, read, noise_cov, push=None) -> Smoothed:
    """Filter forwards, Rauch-Tung-Striebel backwards; ``push [T, d]`` is added to each state but the first."""
    mean, cov, log = np.asarray(start, float), np.asarray(start_cov, float), 0.0
    filtered, predicted = [], []
    for t, value in enumerate(np.asarray(y, float)):
        if t:
            mean, cov = move @ mean, move @ cov @ move.T + move_cov
            mean = mean if push is None else mean + push[t]
        predicted.append((mean, cov))
        if not np.isnan(value).any():
            spread = read @ cov @ read.T + noise_cov
            log += stats.multivariate_normal(read @ mean, spread).logpdf(value)
            gain = cov @ read.T @ np.linalg.inv(spread)
            mean, cov = mean + gain @ (np.atleast_1d(value) - read @ mean), cov - gain @ read @ cov
        filtered.append((mean, cov))
    means, covs, lags = [filtered[-1][0]], [filtered[-1][1]], []
    for (m, c), (pm, pc) in zip(filtered[-2::-1], predicted[:0:-1], strict=True):
        back = c @ move.T @ np.linalg.inv(pc)
        lags.append(covs[-1] @ back.T)
        means.append(m + back @ (means[-1] - pm))
        covs.append(c + back @ (covs[-1] - pc) @ back.T)
    lag = np.array(lags[::-1]).reshape(-1, *cov.shape)
    ahead = np.array([m for m, _ in filtered]), np.array([c for _, c in filtered])
    return Smoothed(np.array(means[::-1]), np.array(covs[::-1]), lag, float(log), ahead)


def autoregression_smoother(
    y: Sequence[float],
    gain: float,
    step: float,
    noise: float,
    first_mean: float = 0.0,
    first_sd: float = 1.0,
    push: Any = None,
) -> Smoothed:
    """Of ``tests.small_programs.autoregression``, in the same words; ``push [T]``."""
    one = np.eye(1)
    return kalman_smoother(
        y, [first_mean], first_sd**2 * one, gain * one, step**2 * one, one, noise**2 * one,
        None if push is None else np.asarray(push)[:, None],
    )  # fmt: skip


class States(NamedTuple):
    """Posterior of a hidden Markov chain."""

    log_evidence: float
    single: np.ndarray  # [T, S], p(z_t | y)
    pairs: np.ndarray  # [T-1, S, S], p(z_t, z_t+1 | y)


def normal_log_likelihood(y, places, sd) -> np.ndarray:
    """``log p(y_t | z_t)`` ``[T, S]`` of Normals about ``places [S]``, zero where ``y_t`` is missing."""
    y = np.asarray(y, float)[:, None]
    return np.where(np.isnan(y), 0.0, stats.norm.logpdf(y, np.asarray(places, float), sd))


def forward_backward(start, move, log_likelihood) -> States:
    """From ``p(z_1)`` ``[S]``, ``p(z_t+1 | z_t)`` ``[S, S]`` and ``log p(y_t | z_t)`` ``[T, S]``."""
    steps, states = log_likelihood.shape
    top = log_likelihood.max(1, keepdims=True)
    see = np.exp(log_likelihood - top)
    forward, backward, scale = np.empty((steps, states)), np.ones((steps, states)), np.empty(steps)
    for t in range(steps):
        ahead = (start if t == 0 else forward[t - 1] @ move) * see[t]
        scale[t] = ahead.sum()
        forward[t] = ahead / scale[t]
    for t in range(steps - 2, -1, -1):
        backward[t] = move @ (see[t + 1] * backward[t + 1]) / scale[t + 1]
    later = see[1:] * backward[1:] / scale[1:, None]
    pairs = forward[:-1, :, None] * move * later[:, None, :]
    return States(float(np.log(scale).sum() + top.sum()), forward * backward, pairs)
