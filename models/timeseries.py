"""Time series: levels, trends, autoregression, tracking, volatility.

``model.sample`` simulates each of them; :func:`simulated` gives data to fit together with the truth.
A standard deviation is a covariate, a constant to be learned, or a latent: see ``scales=``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

from ppl import (
    ConcentratedNormal,
    HalfNormal,
    Markov,
    Model,
    MultivariateNormal,
    Normal,
    given,
    latent,
    model,
    observe,
    param,
    plate,
)
from ppl.manifolds import SO2
from ppl.models import simulation
from ppl.models.choices import check_choice

Scales = Literal["given", "learned", "latent"]


@model
def local_level(scales: Scales = "given") -> None:
    """A level that wanders, seen with noise.

    level_0 ~ Normal(start, start_sd), level_t ~ Normal(level_{t-1}, level_sd), y_t ~ Normal(level_t,
    noise_sd).

    Latents: ``level`` ``[time]``. Data: ``y`` ``[time]`` (NaN where it is missing), ``level_sd`` and
    ``noise_sd``; ``start`` and ``start_sd`` may be left out (0 and 1000).

    Args:
        scales: what ``level_sd`` and ``noise_sd`` are: "given"; "learned" (constants, by EM); or
            "latent", HalfNormal(1).

    >>> drawn = local_level.sample(2, {"level_sd": 0.1, "noise_sd": 1.0}, sizes={"time": 5}, seed=0)
    >>> drawn["y"].shape
    torch.Size([2, 5])
    """
    level_sd, noise_sd = _scale("level_sd", scales), _scale("noise_sd", scales)
    first = Normal(given("start", default=0.0), given("start_sd", default=1000.0))
    with plate("time", ordered=True):
        level = latent("level", Markov(first, lambda previous: Normal(previous, level_sd)))
        observe("y", Normal(level, noise_sd))


@model
def local_linear_trend(scales: Scales = "given") -> None:
    """A level with a slope, both of which wander, seen with noise.

    state = (level, slope). state_0 ~ Normal(0, start_sd), level_t ~ Normal(level_{t-1} +
    slope_{t-1}, level_sd), slope_t ~ Normal(slope_{t-1}, slope_sd), y_t ~ Normal(level_t, noise_sd).

    Latents: ``state`` ``[time, 2]``. Data: ``y`` ``[time]``, ``level_sd``, ``slope_sd``,
    ``noise_sd``; ``start_sd`` may be left out (1000).

    Args:
        scales: as in :func:`local_level`.
    """
    sd = torch.stack([_scale("level_sd", scales), _scale("slope_sd", scales)])
    noise_sd = _scale("noise_sd", scales)
    start_sd = given("start_sd", default=1000.0)

    def step(previous: Tensor) -> Normal:
        return Normal(torch.stack([previous[0] + previous[1], previous[1]]), sd)

    with plate("time", ordered=True):
        state = latent("state", Markov(Normal(torch.zeros(2), start_sd), step))
        observe("y", Normal(state[0], noise_sd))


@model
def autoregression(order: int = 2, scales: Scales = "given") -> None:
    """Each value from those before it.

    intercept ~ Normal(0, 10), phi ~ Normal(0, 1); y_t ~ Normal(intercept + sum_k phi_k y_{t-k},
    noise_sd).

    Latents: ``intercept`` is a scalar, ``phi`` is ``[order]``. Data, as of :func:`lagged`: ``y``
    ``[time]`` and ``lags`` ``[time, order]``, the latest first; ``noise_sd``.

    Args:
        order: how many values before count.
        scales: as in :func:`local_level`.
    """
    intercept = latent("intercept", Normal(0.0, 10.0))
    phi = latent("phi", Normal(0.0, 1.0), shape=order)
    noise_sd = _scale("noise_sd", scales)
    with plate("time", ordered=True):
        observe("y", Normal(intercept + (phi * given("lags")).sum(-1), noise_sd))


@model
def tracking(step: float = 1.0, acceleration: float = 0.1) -> None:
    """Something that moves in the plane, seen from a sensor by distance and direction.

    state = (x, y, velocity of x, velocity of y), and velocity changes by white noise acceleration.
    range_t ~ Normal(|place_t - sensor_t|, range_sd); the bearing, an angle that does not wrap
    wrongly, lies around the direction from the sensor by bearing_sd.

    Latents: ``state`` ``[time, 4]``. Data: ``range`` and ``bearing`` (radians) ``[time]``,
    ``sensor`` ``[time, 2]``, ``range_sd``, ``bearing_sd``, ``start`` ``[4]`` and ``start_sd``
    ``[4]``.

    Args:
        step: time between two sightings.
        acceleration: standard deviation of the velocity's change in one unit of time.
    """
    t, q = step, acceleration**2
    within = torch.tensor([[t**3 / 3, t**2 / 2], [t**2 / 2, t]], dtype=torch.float64)
    covariance = q * torch.kron(within, torch.eye(2, dtype=torch.float64))
    first = Normal(given("start"), given("start_sd"))

    def move(previous: Tensor) -> MultivariateNormal:
        place = previous[:2] + t * previous[2:]
        return MultivariateNormal(torch.cat([place, previous[2:]]), covariance_matrix=covariance)

    range_sd, bearing_sd = given("range_sd"), given("bearing_sd")
    with plate("time", ordered=True):
        state = latent("state", Markov(first, move))
        away = state[:2] - given("sensor")
        observe("range", Normal((away * away).sum(-1).sqrt(), range_sd))
        direction = torch.atan2(away[1], away[0])
        observe("bearing", ConcentratedNormal(SO2, direction, bearing_sd))


@model
def stochastic_volatility(
    mean: float = -1.0, persistence: float = 0.95, spread: float = 0.3
) -> None:
    """Returns whose variance wanders.

    h_0 ~ Normal(mean, spread / sqrt(1 - persistence^2)), h_t ~ Normal(mean + persistence (h_{t-1} -
    mean), spread) is the log of the variance; y_t ~ Normal(0, exp(h_t / 2)).

    Latents: ``h`` ``[time]``. Data: ``y`` ``[time]``.

    Args:
        mean: of the log variance.
        persistence: between 0 and 1.
        spread: standard deviation of a change of h.

    Source: [Kim1998].

    >>> stochastic_volatility.sample(3, sizes={"time": 4}, seed=0)["h"].shape
    torch.Size([3, 4])
    """
    first = Normal(mean, spread / (1 - persistence**2) ** 0.5)
    with plate("time", ordered=True):
        h = latent(
            "h", Markov(first, lambda last: Normal(mean + persistence * (last - mean), spread))
        )
        observe("y", Normal(0.0, torch.exp(h / 2)))


def lagged(y: Any, order: int = 2) -> dict[str, np.ndarray]:
    """A series as data for :func:`autoregression`: each value with the ``order`` ones before it.

    >>> {name: array.tolist() for name, array in lagged([1.0, 2.0, 3.0, 4.0]).items()}
    {'y': [3.0, 4.0], 'lags': [[2.0, 1.0], [3.0, 2.0]]}
    """
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(y, dtype=float), order + 1)
    return {"y": windows[:, -1].copy(), "lags": windows[:, -2::-1].copy()}


def simulated(
    program: Model[Any], times: int, known: Mapping[str, Any] | None = None, *, seed: int = 0
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Draw a series of a model, as data to fit it to, and the latents behind it.

    Args:
        program: one of this module.
        times: length of the series.
        known: the covariates, such as ``{"level_sd": 0.1, "noise_sd": 1.0}``.
        seed: of the random numbers.

    Returns:
        ``known`` with the observed sites, and the latents.

    >>> data, truth = simulated(local_level, 4, {"level_sd": 0.1, "noise_sd": 1.0, "start_sd": 1.0})
    >>> data["y"].shape, list(truth)
    (torch.Size([4]), ['level'])
    """
    return simulation.simulated(program, known, sizes={"time": times}, seed=seed)


def lighthouse(times: int = 50, *, seed: int = 0) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Data for :func:`tracking`: a boat that passes a lighthouse at the origin, and the true states.

    The boat crosses the direction of pi, where angles wrap.
    """
    known = {
        "sensor": np.zeros((times, 2)),
        "start": [-20.0, -0.5 * times / 2, 0.0, 0.5],
        "start_sd": [1.0, 1.0, 0.1, 0.1],
        "range_sd": 0.5,
        "bearing_sd": 0.05,
    }
    return simulated(tracking, times, known, seed=seed)


def _scale(name: str, scales: Scales) -> Any:
    check_choice("scales", scales, get_args(Scales))
    if scales == "given":
        return given(name)
    if scales == "learned":
        return param(name, 1.0, support=constraints.positive)
    return latent(name, HalfNormal(1.0))
