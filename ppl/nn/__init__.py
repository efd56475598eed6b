"""Layers of Bayesian neural networks, as words of a model: weights are latents in plates of their own.

A layer is a function of one element. It is built anywhere, before the plate of the data is opened, and called
inside; its weights are declared on the first call. ``prior=`` says what they are, see :mod:`ppl.nn.priors`.
:func:`find_layers` finds the layers in a graph, for methods that fit networks.

Of a fit, ``posterior.to_module()`` is the network as a ``torch.nn.Module`` (:class:`Network`), ``posterior.support`` and
``posterior.density`` say which weights are not zero, ``posterior.compress()`` keeps those only (:class:`Compressed`).
"""

from ppl.nn.activations import (
    ELU,
    GELU,
    Activation,
    AvgPool1d,
    AvgPool2d,
    Flatten,
    GlobalAvgPool1d,
    GlobalAvgPool2d,
    Identity,
    LeakyReLU,
    MaxPool1d,
    MaxPool2d,
    ReLU,
    Sigmoid,
    SiLU,
    Softplus,
    Tanh,
)
from ppl.nn.batch_norm import BatchNorm
from ppl.nn.compression import Compressed, load_compressed
from ppl.nn.export import Network
from ppl.nn.groups import group_scale, group_sparse
from ppl.nn.layers import Conv1d, Conv2d, Linear
from ppl.nn.lift import lift
from ppl.nn.networks import MLP, LeNet, Residual, ResNet18, Sequential
from ppl.nn.norms import FRN, GroupNorm, LayerNorm
from ppl.nn.points import fixed, point
from ppl.nn.priors import (
    fan_in,
    isotropic,
    laplace,
    scale_mixture,
    spike_slab,
)
from ppl.nn.structure import LayerNode, Weights, buffers, data_plates, examples, find_layers

__all__ = [
    "ELU",
    "FRN",
    "GELU",
    "MLP",
    "Activation",
    "AvgPool1d",
    "AvgPool2d",
    "BatchNorm",
    "Compressed",
    "Conv1d",
    "Conv2d",
    "Flatten",
    "GlobalAvgPool1d",
    "GlobalAvgPool2d",
    "GroupNorm",
    "Identity",
    "LayerNode",
    "LayerNorm",
    "LeNet",
    "LeakyReLU",
    "Linear",
    "MaxPool1d",
    "MaxPool2d",
    "Network",
    "ReLU",
    "ResNet18",
    "Residual",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Tanh",
    "Weights",
    "buffers",
    "data_plates",
    "examples",
    "fan_in",
    "find_layers",
    "fixed",
    "group_scale",
    "group_sparse",
    "isotropic",
    "laplace",
    "lift",
    "load_compressed",
    "point",
    "scale_mixture",
    "spike_slab",
]
