"""Hierarchical models: groups that share what they have in common.

Normal(m, s) takes a standard deviation s. Each model fits the data of the same name in
:mod:`ppl.models.datasets`; ``model.sample`` simulates from it.
"""

from __future__ import annotations

from ppl import HalfCauchy, HalfNormal, Normal, given, latent, model, observe, plate
from ppl.models.units import normal_in_units


@model
def eight_schools() -> None:
    """Effects of coaching in schools whose own estimates are noisy. Units: points of the SAT-V.

    mu ~ Normal(0, 5), tau ~ HalfCauchy(5). For each school j theta_j ~ Normal(mu, tau) and
    y_j ~ Normal(theta_j, sigma_j). The standard errors sigma are given.

    Latents: ``mu`` and ``tau`` are scalars, ``theta`` is ``[school]``. Data: ``y``, ``sigma``
    ``[school]``; ``school`` (labels) may be left out.

    Source: [Rubin1981], [Gelman2013] section 5.5; priors as in Stan's and NumPyro's examples.

    >>> data = {"sigma": [15.0, 10.0, 16.0]}
    >>> eight_schools.sample(100, data, seed=0)["theta"].shape
    torch.Size([100, 3])
    """
    mu = latent("mu", Normal(0.0, 5.0))
    tau = latent("tau", HalfCauchy(5.0))
    with plate("school"):
        theta = latent("theta", Normal(mu, tau))
        observe("y", Normal(theta, given("sigma")))


@model
def rats() -> None:
    """Growth of rats: each has a line of its own. Units: grams and days.

    mu_alpha, mu_beta ~ Normal(0, 100); sigma_alpha ~ HalfNormal(100), sigma_beta ~ HalfNormal(10),
    sigma_y ~ HalfNormal(50). For each rat i alpha_i ~ Normal(mu_alpha, sigma_alpha) is its weight
    at 22 days and beta_i ~ Normal(mu_beta, sigma_beta) its growth a day; at each time t
    weight_it ~ Normal(alpha_i + beta_i (age_t - 22), sigma_y).

    Latents: ``mu_*`` and ``sigma_*`` are scalars, ``alpha`` and ``beta`` are ``[rat]``. Data:
    ``weight`` ``[rat, time]``, ``age`` ``[time]``.

    Source: Gelfand et al. (1990), see :func:`ppl.models.datasets.rats`. Differs from the version of
    posteriordb in the laws of the scales, which are flat there and so cannot be drawn from.

    >>> drawn = rats.sample(10, {"age": [8.0, 22.0, 36.0]}, sizes={"rat": 4}, seed=0)
    >>> drawn["weight"].shape
    torch.Size([10, 4, 3])
    """
    rat, time = plate("rat"), plate("time")
    mu_alpha = latent("mu_alpha", Normal(0.0, 100.0))
    mu_beta = latent("mu_beta", Normal(0.0, 100.0))
    sigma_alpha = latent("sigma_alpha", HalfNormal(100.0))
    sigma_beta = latent("sigma_beta", HalfNormal(10.0))
    sigma_y = latent("sigma_y", HalfNormal(50.0))
    with time:
        days = given("age") - 22.0
    with rat:
        alpha = latent("alpha", Normal(mu_alpha, sigma_alpha))
        beta = latent("beta", Normal(mu_beta, sigma_beta))
        with time:
            observe("weight", Normal(alpha + beta * days, sigma_y))


@model
def radon(uranium: bool = True) -> None:
    """Radon in houses that belong to counties, as many houses in a county as there happen to be.

    base ~ Normal(0, 3), slope, effect ~ Normal(0, 1); spread, noise ~ HalfNormal(1). For each
    county level_c ~ Normal(base + slope uranium_c, spread); for each house h of county c(h)
    log_radon_h ~ Normal(level_c(h) + effect floor_h, noise). Units: log pCi/L and log ppm.

    Latents: ``level`` is ``[county]``, the others are scalars. Data: a table with one row a house:
    ``log_radon``, ``floor``, ``county`` and ``uranium``, which is constant within a county.

    Args:
        uranium: whether the level of a county depends on its soil; without it ``slope`` is gone.

    Source: [GelmanHill2006] section 12.6.

    >>> houses = {"county": ["a", "a", "b"], "floor": [0, 1, 0], "uranium": [0.3, 0.3, -0.2]}
    >>> radon.sample(5, houses, seed=0)["level"].shape
    torch.Size([5, 2])
    """
    county = plate("county")
    house = plate("house", within=county)
    base, effect = latent("base", Normal(0.0, 3.0)), latent("effect", Normal(0.0, 1.0))
    spread, noise = latent("spread", HalfNormal(1.0)), latent("noise", HalfNormal(1.0))
    slope = latent("slope", Normal(0.0, 1.0)) if uranium else 0.0
    with county:
        centre = base + slope * given("uranium") if uranium else base
        level = latent("level", Normal(centre, spread))
    with house:
        observe("log_radon", Normal(level + effect * given("floor"), noise))


@model
def radon_states(rescaled: bool = False) -> None:
    """Radon by state, with a line in basement and uranium for each. Units: log pCi/L, log ppm.

    global_mean, global_log_sigma ~ Normal(0, 1). For each state s State_mean_s ~
    Normal(global_mean, exp(global_log_sigma)); State_log_sigma_s, Beta_u_s, Beta_basement_s ~
    Normal(0, 1); for each zip code z of it obs_sz ~ Normal(State_mean_s + basement_sz
    Beta_basement_s + log_uranium_sz Beta_u_s, exp(State_log_sigma_s)).

    Latents: ``global_*`` are scalars, the others ``[State]``. Data: ``obs``, ``basement``,
    ``log_uranium``, all ``[State, Zip]``.

    Args:
        rescaled: whether State_mean is stated in thousands, as in the paper's comparison.

    Source: [Heap2025], radon.

    >>> houses = {"basement": [[1, 0, 1], [1, 1, 0]], "log_uranium": [[0.1] * 3, [0.2] * 3]}
    >>> radon_states.sample(5, houses, seed=0)["obs"].shape
    torch.Size([5, 2, 3])
    """
    global_mean = latent("global_mean", Normal(0.0, 1.0))
    global_log_sigma = latent("global_log_sigma", Normal(0.0, 1.0))
    with plate("State"):
        unit = 1000.0 if rescaled else 1.0
        mean = normal_in_units("State_mean", global_mean, global_log_sigma.exp(), unit)
        log_sigma = latent("State_log_sigma", Normal(0.0, 1.0))
        beta_u = latent("Beta_u", Normal(0.0, 1.0))
        beta_basement = latent("Beta_basement", Normal(0.0, 1.0))
        with plate("Zip"):
            centre = mean + given("basement") * beta_basement + given("log_uranium") * beta_u
            observe("obs", Normal(centre, log_sigma.exp()))


@model
def radon_counties(rescaled: bool = False) -> None:
    """Radon by county within state, with a line in basement and uranium for each county.

    global_mean, global_log_sigma ~ Normal(0, 1). For each state s State_mean_s ~ Normal(global_mean,
    exp(global_log_sigma)) and State_log_sigma_s ~ Normal(0, 1); for each county c of it
    County_mean_sc ~ Normal(State_mean_s, exp(State_log_sigma_s)); County_log_sigma_sc, Beta_u_sc,
    Beta_basement_sc ~ Normal(0, 1); for each zip code z of it obs_scz ~ Normal(County_mean_sc +
    basement_scz Beta_basement_sc + log_uranium_scz Beta_u_sc, exp(County_log_sigma_sc)). Units: log
    pCi/L, log ppm.

    Latents: ``global_*`` are scalars, ``State_*`` ``[State]``, the others ``[State, County]``. Data:
    ``obs``, ``basement``, ``log_uranium``, all ``[State, County, Zip]``.

    Args:
        rescaled: whether County_mean is stated in hundreds, Beta_u in tens and Beta_basement in
            thousands, as in the paper's comparison.

    Source: [Heap2025], radon, the earlier revision, which is behind the published curves.

    >>> houses = {"basement": [[[1, 0], [1, 1]]], "log_uranium": [[[0.1, 0.1], [0.2, 0.2]]]}
    >>> radon_counties.sample(5, houses, seed=0)["Beta_u"].shape
    torch.Size([5, 1, 2])
    """
    of_mean, of_uranium, of_basement = (100.0, 10.0, 1000.0) if rescaled else (1.0, 1.0, 1.0)
    global_mean = latent("global_mean", Normal(0.0, 1.0))
    global_log_sigma = latent("global_log_sigma", Normal(0.0, 1.0))
    with plate("State"):
        state_mean = latent("State_mean", Normal(global_mean, global_log_sigma.exp()))
        state_log_sigma = latent("State_log_sigma", Normal(0.0, 1.0))
        with plate("County"):
            mean = normal_in_units("County_mean", state_mean, state_log_sigma.exp(), of_mean)
            log_sigma = latent("County_log_sigma", Normal(0.0, 1.0))
            beta_u = normal_in_units("Beta_u", 0.0, 1.0, of_uranium)
            beta_basement = normal_in_units("Beta_basement", 0.0, 1.0, of_basement)
            with plate("Zip"):
                centre = mean + given("basement") * beta_basement + given("log_uranium") * beta_u
                observe("obs", Normal(centre, log_sigma.exp()))
