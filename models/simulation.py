"""Draws of a model as data to fit it to, and covariates to draw from where there are none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ppl import Model


def simulated(
    program: Model[Any],
    known: Mapping[str, Any] | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Draw what a model observes, and the latents behind it.

    Args:
        program: its arguments are the true constants.
        known: the covariates, such as ``{"A": matrix}``.
        sizes: of plates that no covariate shows.
        seed: of the random numbers.

    Returns:
        ``known`` with the observed sites ``[*plates, *event]``, and the latents.

    >>> from ppl.models import local_level
    >>> known = {"level_sd": 0.1, "noise_sd": 1.0, "start_sd": 1.0}
    >>> data, truth = simulated(local_level, known, sizes={"time": 4})
    >>> data["y"].shape, list(truth)
    (torch.Size([4]), ['level'])
    """
    known = dict(known or {})
    drawn = program.sample(1, known, sizes=sizes, seed=seed)
    variables = program.graph(known, sizes=sizes).variables
    outcomes = {n: x[0] for n, x in drawn.items() if variables[n].role == "observed"}
    truth = {n: x[0] for n, x in drawn.items() if variables[n].role == "latent"}
    return {**known, **outcomes}, truth


# Shares of films of each genre in a catalogue: drama, comedy, ... down to film noir.
_GENRES = (
    (0.43, 0.30, 0.15, 0.15, 0.15, 0.08, 0.08, 0.07, 0.06)
    + (0.06, 0.055, 0.04, 0.036, 0.033, 0.03, 0.025, 0.016, 0.014)
)  # fmt: skip


def genre_flags(users: int, films: int, features: int = 18, *, seed: int = 0) -> np.ndarray:
    """Genres of the films that users were shown, for :func:`ppl.models.movielens`.

    Args:
        users: how many.
        films: how many each was shown.
        features: genres, at most 18; the most frequent come first.
        seed: of the random numbers.

    Returns:
        0 or 1 ``[user, film, features]``, at least one 1 a film.

    >>> flags = genre_flags(50, 5)
    >>> flags.shape, bool((flags.sum(-1) > 0).all())
    ((50, 5, 18), True)
    """
    rng = np.random.default_rng(seed)
    flags = rng.random((users, films, features)) < np.array(_GENRES[:features])
    spare = one_hot((users, films), features, seed=seed).astype(bool)
    return (flags | (spare & ~flags.any(-1, keepdims=True))).astype(float)


def one_hot(shape: tuple[int, ...], categories: int, *, seed: int = 0) -> np.ndarray:
    """A category for each row, as indicators ``[*shape, categories]`` with one 1 a row.

    >>> one_hot((2, 3), 4).sum(-1).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    drawn = np.random.default_rng(seed).integers(0, categories, shape)
    return np.eye(categories)[drawn]
