"""Epidemics: the number of infected as a chain in time, seen through counts of cases.

Normal(m, s) takes a standard deviation s.
"""

from __future__ import annotations

import math

from ppl import Markov, NegativeBinomial, Normal, given, latent, model, observe, plate
from ppl.models.units import normal_in_units


@model
def covid(interventions: int = 9, rescaled: bool = False) -> None:
    """New cases of covid by region, and what interventions, masks and mobility do to their growth.

    CM_alpha_k ~ Normal(0, 1), Wearing_alpha ~ Normal(0, 0.4), Mobility_alpha ~ Normal(1.704, 0.44),
    RegionR ~ Normal(1.07, 0.6), InitialSize_log_mean ~ Normal(log 1000, 0.5),
    log_infected_noise_mean ~ Normal(log 0.01, 0.25). For each region r InitialSize_log_r ~
    Normal(InitialSize_log_mean, 0.5), log_infected_noise_r ~ Normal(log_infected_noise_mean, 0.25),
    psi_r ~ Normal(0, 1). At each time t = 1, 2, ... log_infected_rt ~ Normal(log_infected_r(t-1) +
    RegionR + CM_alpha . npis_rt + Wearing_alpha wearing_rt + Mobility_alpha mobility_rt,
    exp(log_infected_noise_r)), where log_infected_r0 is InitialSize_log_r, and obs_rt is negative
    binomial with mean exp(log_infected_rt) and size exp(psi_r).

    Latents: ``CM_alpha`` is ``[interventions]``, the next five are scalars, ``InitialSize_log``,
    ``log_infected_noise`` and ``psi`` are ``[region]``, ``log_infected`` is ``[region, time]``.
    Data: ``obs`` (cases) ``[region, time]``, ``npis`` ``[region, time, interventions]``, ``wearing``
    (share of people with masks) and ``mobility`` (its reduction) ``[region, time]``, in days or in
    weeks.

    Args:
        interventions: how many there are.
        rescaled: whether Wearing_alpha is stated in ten thousands, as in the paper's comparison.

    Source: [Heap2025], covid.

    >>> covariates = {"npis": [[[0.0], [1.0]]], "wearing": [[0.1, 0.2]], "mobility": [[0.0, 0.5]]}
    >>> covid(interventions=1).sample(3, covariates, seed=0)["log_infected"].shape
    torch.Size([3, 1, 2])
    """
    unit = 10_000.0 if rescaled else 1.0
    cm_alpha = latent("CM_alpha", Normal(0.0, 1.0), shape=interventions)
    wearing_alpha = normal_in_units("Wearing_alpha", 0.0, 0.4, unit)
    mobility_alpha = latent("Mobility_alpha", Normal(1.704, 0.44))
    region_r = latent("RegionR", Normal(1.07, 0.6))
    size_mean = latent("InitialSize_log_mean", Normal(math.log(1000), 0.5))
    noise_mean = latent("log_infected_noise_mean", Normal(math.log(0.01), 0.25))
    with plate("region"):
        before = latent("InitialSize_log", Normal(size_mean, 0.5))
        noise = latent("log_infected_noise", Normal(noise_mean, 0.25)).exp()
        psi = latent("psi", Normal(0.0, 1.0))
        with plate("time", ordered=True):
            by_npis = (cm_alpha * given("npis")).sum(-1)
            by_masks = wearing_alpha * given("wearing")
            growth = region_r + by_npis + by_masks + mobility_alpha * given("mobility")
            path = Markov(Normal(before + growth, noise), lambda last: Normal(last + growth, noise))
            log_infected = latent("log_infected", path)
            observe("obs", NegativeBinomial(total_count=psi.exp(), logits=log_infected - psi))
