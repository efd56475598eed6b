"""Layers of Bayesian neural networks, as words of a model: weights are latents in plates of their own."""

from ppl.nn.layers import Conv2d, Flatten, Linear, MaxPool2d, ReLU, Sequential, Tanh
from ppl.nn.priors import fan_in, isotropic

__all__ = [
    "Conv2d",
    "Flatten",
    "Linear",
    "MaxPool2d",
    "ReLU",
    "Sequential",
    "Tanh",
    "fan_in",
    "isotropic",
]
