"""Hierarchical logistic regressions: school buses that are late, chimpanzees that pull levers.

Normal(m, s) takes a standard deviation s; logit^-1 is the logistic function. Each model fits the
data of the same name in :mod:`ppl.models.datasets`; ``model.sample`` simulates from it.
"""

from __future__ import annotations

from ppl import Bernoulli, Normal, given, latent, model, observe, plate
from ppl.models.units import normal_in_units


@model
def bus_breakdown(
    companies: int = 59, run_types: int = 8, delays: bool = False, rescaled: bool = False
) -> None:
    """Whether a school bus was more than half an hour late, by year, borough, company, kind of run.

    psi_r, phi_c, sigma_beta, mu_beta ~ Normal(0, 1). For each year m beta_m ~ Normal(mu_beta,
    exp(sigma_beta)) and sigma_alpha_m ~ Normal(0, 1); for each borough j of it alpha_mj ~
    Normal(beta_m, exp(sigma_alpha_m)); for each report i obs_mji ~ Bernoulli(logit^-1(alpha_mj +
    phi . company_mji + psi . run_type_mji)).

    Latents: ``psi`` is ``[run_types]``, ``phi`` ``[companies]``, ``sigma_beta`` and ``mu_beta`` are
    scalars, ``beta`` and ``sigma_alpha`` ``[year]``, ``alpha`` ``[year, borough]``. Data: ``obs`` 0
    or 1 ``[year, borough, report]``, ``company`` and ``run_type`` with one 1 in each row ``[year,
    borough, report, companies]`` and ``[year, borough, report, run_types]``.

    Args:
        companies: how many there are.
        run_types: how many there are.
        delays: whether each report has a ``delay`` of its own, Normal around the above with
            standard deviation 1, and obs ~ Bernoulli(logit^-1(delay)): the earlier revision of the
            model, which is behind the published curves.
        rescaled: whether alpha is stated in thousands, as in the paper's comparison.

    Source: [Heap2025], bus breakdown.

    >>> rows = {"company": [[[[1, 0]], [[0, 1]]]], "run_type": [[[[1]], [[1]]]]}
    >>> bus_breakdown(companies=2, run_types=1).sample(5, rows, seed=0)["obs"].shape
    torch.Size([5, 1, 2, 1])
    """
    psi = latent("psi", Normal(0.0, 1.0), shape=run_types)
    phi = latent("phi", Normal(0.0, 1.0), shape=companies)
    sigma_beta = latent("sigma_beta", Normal(0.0, 1.0))
    mu_beta = latent("mu_beta", Normal(0.0, 1.0))
    with plate("year"):
        beta = latent("beta", Normal(mu_beta, sigma_beta.exp()))
        sigma_alpha = latent("sigma_alpha", Normal(0.0, 1.0))
        with plate("borough"):
            unit = 1000.0 if rescaled else 1.0
            alpha = normal_in_units("alpha", beta, sigma_alpha.exp(), unit)
            with plate("report"):
                by_company = (phi * given("company")).sum(-1)
                late = alpha + by_company + (psi * given("run_type")).sum(-1)
                if delays:
                    late = latent("delay", Normal(late, 1.0))
                observe("obs", Bernoulli(logits=late))


@model
def chimpanzees(rescaled: bool = False) -> None:
    """Which of two levers a chimpanzee pulls, by actor and block of the experiment.

    sigma_block, sigma_actor ~ Normal(0, 1); beta_PC, beta_P, alpha ~ Normal(0, 10). For each actor a
    alpha_actor_a ~ Normal(0, exp(sigma_actor)), for each block b of it alpha_block_ab ~ Normal(0,
    exp(sigma_block)), for each repeat r obs_abr ~ Bernoulli(logit^-1(alpha + alpha_actor_a +
    alpha_block_ab + (beta_P + beta_PC condition_abr) prosoc_left_abr)).

    Latents: ``alpha_actor`` is ``[actor]``, ``alpha_block`` ``[actor, block]``, the others are
    scalars. Data: ``obs`` (1: the left lever), ``condition`` (1: there is a partner) and
    ``prosoc_left`` (1: the left lever feeds the partner, too), 0 or 1, all ``[actor, block,
    repeat]``.

    Args:
        rescaled: whether alpha_block is stated in thousands.

    Source: [Heap2025], chimpanzees; the data are those of the R package rethinking.

    >>> rows = {"condition": [[[0, 1], [1, 0]]], "prosoc_left": [[[1, 1], [0, 1]]]}
    >>> chimpanzees.sample(5, rows, seed=0)["obs"].shape
    torch.Size([5, 1, 2, 2])
    """
    sigma_block = latent("sigma_block", Normal(0.0, 1.0))
    sigma_actor = latent("sigma_actor", Normal(0.0, 1.0))
    beta_pc = latent("beta_PC", Normal(0.0, 10.0))
    beta_p = latent("beta_P", Normal(0.0, 10.0))
    alpha = latent("alpha", Normal(0.0, 10.0))
    with plate("actor"):
        alpha_actor = latent("alpha_actor", Normal(0.0, sigma_actor.exp()))
        with plate("block"):
            unit = 1000.0 if rescaled else 1.0
            alpha_block = normal_in_units("alpha_block", 0.0, sigma_block.exp(), unit)
            with plate("repeat"):
                effect = (beta_p + beta_pc * given("condition")) * given("prosoc_left")
                observe("obs", Bernoulli(logits=alpha + alpha_actor + alpha_block + effect))
