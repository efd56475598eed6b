"""Occupancy: whether a species is there, when not seeing it does not mean that it is not.

Normal(m, s) takes a standard deviation s; logit^-1 is the logistic function.
"""

from __future__ import annotations

from typing import Any

from ppl import Bernoulli, Normal, given, latent, model, observe, plate
from ppl.models.units import normal_in_units

# Logit of a detection where the species is not: once in 22 000 replicates, and the density of a
# detection stays finite.
_FALSE_ALARM = -10.0


@model
def occupancy(rescaled: bool = False) -> None:
    """Birds on visits of a survey: presence depends on the weather, detection on the visit's quality.

    bird_mean_mean, bird_mean_log_var, alpha_mean, alpha_log_var, beta_mean, beta_log_var ~ Normal(0,
    1). For each bird j bird_mean_j ~ Normal(bird_mean_mean, exp(bird_mean_log_var)), alpha_j ~
    Normal(alpha_mean, exp(alpha_log_var)), beta_j ~ Normal(beta_mean, exp(beta_log_var)); for each
    year m of it bird_year_mean_jm ~ Normal(bird_mean_j, 1); on each visit i the bird is there, z_jmi
    ~ Bernoulli(logit^-1(bird_year_mean_jm weather_jmi beta_j)), or not; in each replicate r it is
    detected, obs_jmir ~ Bernoulli(logit^-1(alpha_j quality_jmi)) where it is there and
    Bernoulli(logit^-1(-10)) where it is not.

    Latents: the first six are scalars (the ``_log_var`` are logs of standard deviations, whatever
    their names say), ``bird_mean``, ``alpha``, ``beta`` are ``[bird]``, ``bird_year_mean`` ``[bird,
    year]``; ``z``, 0 or 1, ``[bird, year, visit]``. Data: ``obs`` 0 or 1 ``[bird, year, visit,
    replicate]``, ``weather`` and ``quality`` ``[bird, year, visit]``.

    Args:
        rescaled: whether bird_year_mean is stated in thousands, as in the paper's comparison.

    Source: [Heap2025], occupancy.

    >>> visits = {"weather": [[[0.5, 1.0, -1.0]]], "quality": [[[1, 1, 0]]]}
    >>> drawn = occupancy.sample(4, visits, sizes={"replicate": 5}, seed=0)
    >>> drawn["z"].shape, drawn["obs"].shape
    (torch.Size([4, 1, 1, 3]), torch.Size([4, 1, 1, 3, 5]))
    """
    bird_mean_mean, bird_mean_spread = _common("bird_mean")
    alpha_mean, alpha_spread = _common("alpha")
    beta_mean, beta_spread = _common("beta")
    with plate("bird"):
        bird_mean = latent("bird_mean", Normal(bird_mean_mean, bird_mean_spread))
        alpha = latent("alpha", Normal(alpha_mean, alpha_spread))
        beta = latent("beta", Normal(beta_mean, beta_spread))
        with plate("year"):
            unit = 1000.0 if rescaled else 1.0
            bird_year_mean = normal_in_units("bird_year_mean", bird_mean, 1.0, unit)
            with plate("visit"):
                z = latent("z", Bernoulli(logits=bird_year_mean * given("weather") * beta))
                seen = alpha * given("quality") * z + _FALSE_ALARM * (1 - z)
                with plate("replicate"):
                    observe("obs", Bernoulli(logits=seen))


def _common(name: str) -> tuple[Any, Any]:
    """What birds have in common: the mean, and the standard deviation from its log."""
    mean = latent(f"{name}_mean", Normal(0.0, 1.0))
    return mean, latent(f"{name}_log_var", Normal(0.0, 1.0)).exp()
