"""Small models that tests of several backends fit; their constants are arguments."""

from __future__ import annotations

import torch

from ppl import (
    Categorical,
    Gamma,
    Markov,
    Normal,
    Poisson,
    given,
    latent,
    model,
    observe,
    param,
    plate,
)


@model
def line(scale: float = 3.0, noise: float = 0.5):
    """A straight line through points."""
    base, slope = latent("base", Normal(0.0, scale)), latent("slope", Normal(0.0, scale))
    with plate("row"):
        observe("y", Normal(base + slope * given("x"), noise))


@model
def rates():
    """A rate for every day, with a law of its own."""
    with plate("day"):
        rate = latent("rate", Gamma(2.0, given("pace")))
        observe("count", Poisson(rate))


@model
def schools():
    """Effects about a param."""
    centre = param("centre", 0.0)
    with plate("school"):
        effect = latent("effect", Normal(centre, 1.0))
        observe("y", Normal(effect, 1.0))


@model
def scaled(unit: float = 1.0):
    """Effects about a latent level, both in units of the user's choice."""
    level = latent("level", Normal(0.0, unit))
    with plate("row"):
        effect = latent("effect", Normal(level, unit))
        observe("y", Normal(effect / unit, 0.5))


@model
def clusters():
    """Two clusters at a known distance, with an unknown shift of both."""
    shift = latent("shift", Normal(0.0, 1.0))
    with plate("point"):
        z = latent("z", Categorical(torch.tensor([0.3, 0.7])))
        observe("x", Normal(shift + 3.0 * z, 1.0))


@model
def autoregression(
    gain: float = 0.8,
    step: float = 0.6,
    noise: float = 0.7,
    first_mean: float = 0.0,
    first_sd: float = 1.0,
):
    """A scalar series read with noise."""
    with plate("time", ordered=True):
        first = Normal(first_mean, first_sd)
        x = latent("x", Markov(first, lambda before: Normal(gain * before, step)))
        observe("y", Normal(x, noise))
