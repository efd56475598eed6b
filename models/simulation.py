"""Draws of a model as data to fit it to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
