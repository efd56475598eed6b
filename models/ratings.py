"""Ratings: users with a taste vector, films with genre flags."""

from __future__ import annotations

import torch

from ppl import Bernoulli, Normal, given, latent, model, observe, plate
from ppl.models.units import normal_in_units


@model
def movielens(features: int = 18, rescaled: bool = False) -> None:
    """Taste vectors of users around a common mean, and whether each user liked each film shown.

    ``mu_z ~ N(0, I)``, ``psi_z ~ N(0, I)``, ``z_u ~ N(mu_z, exp(psi_z))``, ``obs_uf ~ Bernoulli(logit = z_u . x_uf)``.

    Plates: ``user``, ``film`` (places in each user's list; their films differ). Data: ``obs`` 0 or 1 ``[user, film]``,
    ``x`` genre flags ``[user, film, features]``.

    Args:
        features: how many genres there are.
        rescaled: whether z is stated in hundreds, as in the paper's comparison.

    Source: [Heap2025], the MovieLens experiment.

    >>> movielens(features=2).sample(3, {"x": [[[1, 0], [1, 1]]]}, seed=0)["z"].shape
    torch.Size([3, 1, 2])
    """
    mu = latent("mu_z", Normal(0.0, 1.0), shape=features)
    psi = latent("psi_z", Normal(0.0, 1.0), shape=features)
    with plate("user"):
        taste = normal_in_units("z", mu, torch.exp(psi), 100.0 if rescaled else 1.0)
        with plate("film"):
            observe("obs", Bernoulli(logits=(taste * given("x")).sum(-1)))
