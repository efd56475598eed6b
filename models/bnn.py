"""Bayesian networks: a classifier of images and a regression.

Layers know no method: the same model goes to any method that takes networks of its size. The number of data is that of
the plate, and nobody is asked for it. Data for both are in :mod:`ppl.models.learning_sets`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributions import constraints

from ppl import Categorical, Normal, given, model, nn, observe, param, plate
from ppl.errors import ModelError
from ppl.models.choices import check_choice

Net = Literal["mlp", "lenet", "resnet18"]


@model
def classifier(
    net: Net = "mlp",
    classes: int = 10,
    hidden: tuple[int, ...] = (256, 256),
    prior: Any = None,
    bias: Any = True,
    activation: Callable[[Tensor], Tensor] | None = None,
    norm: Any = None,
) -> None:
    """Images into classes by a network whose sizes follow the data.

    label ~ Categorical(logits=net(x)); weights as ``prior`` says, :func:`ppl.nn.fan_in` by default.

    Latents: weights and biases of the layers, ``fc1.weight`` ``[fc1.out, fc1.in]`` and so on. Data: ``x`` ``[image,
    *shape]`` (for an MLP any shape, else ``[image, channels, size, size]``), ``label`` ``[image]``.

    Args:
        net: "mlp", "lenet" or "resnet18".
        classes: number of labels.
        hidden: widths of the hidden layers of an MLP.
        prior: of the weights, see :mod:`ppl.nn.priors`.
        bias: of biases: False, or a prior such as ``nn.point()``; in a ResNet only the last layer has one.
        activation: rectifiers by default.
        norm: of a ResNet, such as ``nn.FRN`` with ``activation=nn.Identity()``; batch norms by default.

    >>> data = {"x": torch.zeros(3, 1, 8, 8), "label": [0, 1, 2]}
    >>> graph = classifier(hidden=(16,)).graph(data)
    >>> graph.variables["fc1.weight"].plates, graph.plates["fc1.in"].size, nn.examples(graph)
    (('fc1.out', 'fc1.in'), 64, 3)
    """
    check_choice("classifier: net", net, get_args(Net))
    options: dict[str, Any] = {"prior": prior, "bias": bias, "activation": activation, "plates": ()}
    with plate("image"):
        x = given("x")
        observe("label", Categorical(logits=_network(net, x, classes, hidden, options, norm)(x)))


@model
def regression(
    hidden: tuple[int, ...] = (50,),
    prior: Any = None,
    bias: Any = True,
    activation: Callable[[Tensor], Tensor] | None = None,
    noise: float = 1.0,
) -> None:
    """One number from a vector of features, by a network of 50 rectifiers.

    y ~ Normal(net(x), noise); weights as ``prior`` says, :func:`ppl.nn.fan_in` by default.

    Latents: weights and biases, ``fc1.weight`` ``[fc1.out, fc1.in]`` and so on. Data: ``x`` ``[row, feature]`` (an event)
    and ``y`` ``[row]``, both standardised. Params: ``noise``.

    Args:
        hidden: widths of the hidden layers.
        prior: of the weights, see :mod:`ppl.nn.priors`.
        bias: of biases: False, or a prior such as ``nn.point()``.
        activation: rectifiers by default.
        noise: standard deviation at the start.

    >>> graph = regression.graph({"x": torch.zeros(3, 4), "y": torch.zeros(3)})
    >>> [v.name for v in graph.latents]
    ['fc1.weight', 'fc1.bias', 'fc2.weight', 'fc2.bias']
    """
    scale = param("noise", noise, support=constraints.positive)
    with plate("row"):
        x = torch.flatten(given("x"))
        net = nn.MLP(
            x.shape[0], *hidden, 1, prior=prior, bias=bias, activation=activation, plates=()
        )
        observe("y", Normal(net(x)[0], scale))


def _network(
    net: Net,
    x: Tensor,
    classes: int,
    hidden: tuple[int, ...],
    options: dict[str, Any],
    norm: Any,
) -> Callable[[Tensor], Tensor]:
    if norm is not None and net != "resnet18":
        raise ModelError(f"classifier: norm= is of net='resnet18', got net={net!r}. Leave it out.")
    if net == "mlp":
        return nn.Sequential(nn.Flatten(), nn.MLP(math.prod(x.shape), *hidden, classes, **options))
    if x.ndim != 3 or x.shape[1] != x.shape[2]:
        raise ModelError(
            f"classifier: net={net!r} takes square images [image, channels, size, size], got elements of shape "
            f"{list(x.shape)}. Add the channel axis, or use net='mlp'."
        )
    if net == "lenet":
        return nn.LeNet(classes, channels=x.shape[0], size=x.shape[1], **options)
    if options["bias"] is True:
        options = {**options, "bias": None}
    return nn.ResNet18(
        classes, channels=x.shape[0], norm=nn.BatchNorm if norm is None else norm, **options
    )


__all__ = ["classifier", "regression"]
