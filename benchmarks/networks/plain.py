"""The same networks without a posterior: plain torch modules trained by Adam, the price and the score to compare with."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Loss = Callable[[Tensor, Tensor], Tensor]


def mlp(*widths: int) -> nn.Sequential:
    """Rectifiers between linear layers, images flattened in front."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def lenet(channels: int, size: int, classes: int = 10) -> nn.Sequential:
    """The layers of ``ppl.nn.LeNet``: two convolutions of 5 x 5 with 6 and 16 channels, then 120, 84."""
    left = (size // 2 - 4) // 2
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16 * left * left, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, classes),
    )  # fmt: skip


class LearnedNoise(nn.Module):
    """Gaussian negative log-likelihood of standardised targets, with one learned standard deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.log_noise = nn.Parameter(torch.zeros(()))

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        """Mean over the batch, in nats."""
        variance = (2 * self.log_noise).exp().expand(len(y))
        return functional.gaussian_nll_loss(out.squeeze(-1), y, variance, full=True)


def train(
    net: nn.Module,
    loss: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    batch: int,
    seed: int,
    rate: float = 1e-3,
) -> float:
    """Adam with a cosine schedule; returns processor seconds."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [*net.parameters(), *loss.parameters()]
    optimiser = torch.optim.Adam(parameters, rate)
    parts = -(-len(x) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * parts)
    start = time.process_time()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            optimiser.zero_grad()
            loss(net(x[rows]), y[rows]).backward()
            optimiser.step()
            schedule.step()
    return time.process_time() - start
