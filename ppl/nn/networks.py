"""Networks made of layers: sequences, residual blocks, and three that everybody compares on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ppl.errors import ModelError
from ppl.nn.activations import Flatten, GlobalAvgPool2d, MaxPool2d, ReLU
from ppl.nn.base import Plates, check_count
from ppl.nn.batch_norm import BatchNorm
from ppl.nn.layers import Conv2d, Linear
from ppl.nn.points import point

Function = Callable[[Any], Any]
Norm = Callable[..., Function]  # of channels, name= and plates=


class Sequential:
    """Layers one after the other; any function of one element is a layer.

    >>> nn.Sequential(torch.exp, torch.log)(torch.tensor(2.0))
    tensor(2.)
    """

    def __init__(self, *layers: Function) -> None:
        for layer in layers:
            if not callable(layer):
                raise ModelError(
                    f"Sequential: a layer is a function of one element, got {layer!r}. Unpack lists: nn.Sequential(*layers)."
                )
        self.layers = layers

    def __call__(self, x: Tensor) -> Tensor:
        """The last layer's result."""
        for layer in self.layers:
            x = layer(x)
        return x


class Residual:
    """``body(x) + shortcut(x)``.

    Args:
        body: a layer.
        shortcut: a layer whose result has the shape of the body's; ``x`` itself by default.
    """

    def __init__(self, body: Function, shortcut: Function | None = None) -> None:
        self.body, self.shortcut = body, shortcut

    def __call__(self, x: Tensor) -> Tensor:
        """The layer at one element."""
        out = self.body(x)
        beside = x if self.shortcut is None else self.shortcut(x)
        if out.shape != beside.shape:
            raise ModelError(
                f"Residual: the body makes shape {list(out.shape)}, the shortcut {list(beside.shape)}. Give a shortcut that "
                "makes the body's shape, such as a Conv2d with a kernel of 1 and the same stride."
            )
        return out + beside


class MLP(Sequential):
    """Linear layers ``fc1``, ``fc2``, ... with an activation between them.

    Args:
        *sizes: inputs, widths of the hidden layers, outputs.
        name: put in front of the layers' names, with a dot; nothing by default.
        activation: the layer between.
        bias: of each layer, as for :class:`Linear`.
        prior: of each layer, as for :class:`Linear`.
        plates: of each layer, as for :class:`Linear`.

    >>> @model
    ... def digits():
    ...     net = nn.MLP(64, 32, 10)
    ...     with plate("image"):
    ...         observe("label", Categorical(logits=net(given("x"))))
    >>> graph = digits.graph({"x": torch.zeros(5, 64), "label": [0, 1, 2, 3, 4]})
    >>> [v.name for v in graph.latents]
    ['fc1.weight', 'fc1.bias', 'fc2.weight', 'fc2.bias']
    """

    def __init__(
        self,
        *sizes: int,
        name: str = "",
        activation: Function | None = None,
        bias: Any = True,
        prior: Any = None,
        plates: Plates = None,
    ) -> None:
        if len(sizes) < 2:
            raise ModelError(f"MLP needs a number of inputs and one of outputs, got {sizes}.")
        between = ReLU() if activation is None else activation
        layers: list[Function] = []
        for i, (inputs, outputs) in enumerate(zip(sizes[:-1], sizes[1:], strict=True), start=1):
            options: Any = {"bias": bias, "prior": prior, "plates": plates}
            layers += [Linear(inputs, outputs, name=_joined(name, f"fc{i}"), **options), between]
        super().__init__(*layers[:-1])


class LeNet(Sequential):
    """LeNet-5 with rectifiers: two convolutions with pools, three linear layers.

    Layers are ``conv1 conv2 fc1 fc2 fc3``: 6 and 16 maps, 120 and 84 units.

    Args:
        classes: number of outputs.
        channels: of the image.
        size: height and width of the image, at least 12; the first convolution pads by 2 below 32.
        name: as for :class:`MLP`.
        activation: as for :class:`MLP`.
        bias: as for :class:`MLP`.
        prior: as for :class:`MLP`.
        plates: as for :class:`MLP`.

    Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner. *Gradient-Based Learning Applied to Document Recognition.* Proc.
    IEEE 86(11), 1998, section II. Differs: every map reads all maps below, maxima instead of means, rectifiers.
    """

    def __init__(
        self,
        classes: int = 10,
        *,
        channels: int = 1,
        size: int = 28,
        name: str = "",
        activation: Function | None = None,
        bias: Any = True,
        prior: Any = None,
        plates: Plates = None,
    ) -> None:
        check_count("LeNet", "classes", classes)
        act = ReLU() if activation is None else activation
        options: Any = {"bias": bias, "prior": prior, "plates": plates}
        padding = 2 if size < 32 else 0
        side = ((size + 2 * padding - 4) // 2 - 4) // 2
        if side < 1:
            raise ModelError(
                f"LeNet needs images of at least 12 x 12, got size={size}. Use nn.MLP."
            )
        conv1 = Conv2d(channels, 6, 5, name=_joined(name, "conv1"), padding=padding, **options)
        conv2 = Conv2d(6, 16, 5, name=_joined(name, "conv2"), **options)
        widths = (16 * side * side, 120, 84, classes)
        fc = [
            Linear(a, b, name=_joined(name, f"fc{i}"), **options)
            for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True), start=1)
        ]
        pool = MaxPool2d(2)
        super().__init__(
            conv1, act, pool, conv2, act, pool, Flatten(), fc[0], act, fc[1], act, fc[2]
        )  # fmt: skip


class ResNet18(Sequential):
    """The residual network of 18 layers for images of 32 x 32: a stem of 3 x 3, no pool after it.

    Four stages of two blocks, 64, 128, 256 and 512 channels. Layers have the names of torchvision's: ``conv1``,
    ``bn1``, ``layer1.0.conv1``, ..., ``layer2.0.downsample.0``, ``fc``. Convolutions have no bias, and the bias of ``fc``
    and the norms are points: 11 164 352 weights have the prior (ten classes, three channels).

    Args:
        classes: number of outputs.
        channels: of the image.
        width: channels of the first stage.
        norm: the layer between a convolution and its activation, made by ``norm(channels, name=..., plates=...)``;
            for group norms ``functools.partial(nn.GroupNorm, groups=8)``.
        activation: with ``norm=nn.FRN``, which brings a threshold, ``nn.Identity()``.
        name: as for :class:`MLP`.
        bias: of ``fc``, as for :class:`Linear`; a point by default.
        prior: of the weights of convolutions and of ``fc``.
        plates: as for :class:`MLP`.

    Source: K. He, X. Zhang, S. Ren, J. Sun. *Deep Residual Learning for Image Recognition.* CVPR 2016, table 1, with the stem
    of section 4.2.
    """

    def __init__(
        self,
        classes: int = 10,
        *,
        channels: int = 3,
        width: int = 64,
        norm: Norm = BatchNorm,
        activation: Function | None = None,
        name: str = "",
        bias: Any = None,
        prior: Any = None,
        plates: Plates = None,
    ) -> None:
        make = _Blocks(norm, ReLU() if activation is None else activation, prior, plates)
        widths = [width * 2**i for i in range(4)]
        blocks: list[Function] = make.stem(channels, width, name)
        before = width
        for stage, outputs in enumerate(widths, start=1):
            for i in range(2):
                stride = 2 if stage > 1 and i == 0 else 1
                label = _joined(name, f"layer{stage}.{i}")
                blocks += [make.block(before, outputs, stride, label), make.activation]
                before = outputs
        head = Linear(
            before,
            classes,
            name=_joined(name, "fc"),
            bias=point() if bias is None else bias,
            prior=prior,
            plates=plates,
        )
        super().__init__(*blocks, GlobalAvgPool2d(), head)


class _Blocks:
    """Makes the parts of a residual network."""

    def __init__(self, norm: Norm, activation: Function, prior: Any, plates: Plates) -> None:
        self.norm, self.activation, self.prior, self.plates = norm, activation, prior, plates

    def stem(self, channels: int, width: int, name: str) -> list[Function]:
        conv = self.conv(channels, width, 3, 1, _joined(name, "conv1"))
        return [conv, self.normed(width, _joined(name, "bn1")), self.activation]

    def block(self, inputs: int, outputs: int, stride: int, name: str) -> Residual:
        body = Sequential(
            self.conv(inputs, outputs, 3, stride, f"{name}.conv1"),
            self.normed(outputs, f"{name}.bn1"),
            self.activation,
            self.conv(outputs, outputs, 3, 1, f"{name}.conv2"),
            self.normed(outputs, f"{name}.bn2"),
        )
        if stride == 1 and inputs == outputs:
            return Residual(body)
        shortcut = Sequential(
            self.conv(inputs, outputs, 1, stride, f"{name}.downsample.0"),
            self.normed(outputs, f"{name}.downsample.1"),
        )
        return Residual(body, shortcut)

    def normed(self, channels: int, name: str) -> Function:
        return self.norm(channels, name=name, plates=self.plates)

    def conv(self, inputs: int, outputs: int, kernel: int, stride: int, name: str) -> Conv2d:
        return Conv2d(
            inputs,
            outputs,
            kernel,
            name=name,
            stride=stride,
            padding=kernel // 2,
            bias=False,
            prior=self.prior,
            plates=self.plates,
        )


def _joined(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


__all__ = ["MLP", "LeNet", "ResNet18", "Residual", "Sequential"]
