"""Ratings: users with a taste vector, films with genre flags."""

from __future__ import annotations

import torch

from ppl import Bernoulli, Normal, given, latent, model, observe, plate


@model
def movielens(features: int = 18) -> None:
    """Taste vectors of users around a common mean, and whether each user liked each film shown.

    ``mu_z ~ N(0, I)``, ``psi_z ~ N(0, I)``, ``z_u ~ N(mu_z, exp(psi_z))``, ``obs_uf ~ Bernoulli(logit = z_u . x_uf)``.

    Plates: ``user``, ``film`` (places in each user's list; their films differ). Data: ``obs`` 0 or 1 ``[user, film]``,
    ``x`` genre flags ``[user, film, features]``.

    Source: [Heap2025], the MovieLens experiment.
    """
    mu = latent("mu_z", Normal(0.0, 1.0), shape=features)
    psi = latent("psi_z", Normal(0.0, 1.0), shape=features)
    with plate("user"):
        taste = latent("z", Normal(mu, torch.exp(psi)))
        with plate("film"):
            observe("obs", Bernoulli(logits=(taste * given("x")).sum(-1)))
