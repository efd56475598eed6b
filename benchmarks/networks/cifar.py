"""CIFAR-10, ResNet-18 and the settings of the authors' code; a reduced net on part of the images without a GPU.

Settings: batch 128, SGD with momentum 0.9, rate 0.01 with cosine annealing, temperature 0.01 after a linear warm-up over
the first half, set updates every 100 steps until 75 % of the run, density 0.1; crops after padding by 4, and flips. The
images of the data folder went through JPEG: compare methods, not accuracies with published ones.

Source: [Li2024].
"""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from benchmarks.networks.images import scores
from benchmarks.networks.records import Records, Row, markdown
from ppl import infer, nn
from ppl.inference.ssvi import SSVI
from ppl.models import classifier
from ppl.models.learning_sets import cifar10

DRAWS = 10


class Size(NamedTuple):
    """A table's effort."""

    net: dict[str, Any]
    images: int | None
    test: int | None
    epochs: int


SIZES = {
    "ci": Size({"net": "lenet"}, 5000, 1000, 20),
    "full": Size({"net": "resnet18"}, None, None, 200),
}


def augmented(x: Tensor, generator: Generator) -> Tensor:
    """Random crops after padding by 4 and random flips of images ``[n, 3, 32, 32]``."""
    n, _, size, _ = x.shape
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    at = torch.randint(0, 9, (2, n), generator=generator, device=x.device)
    steps = torch.arange(size, device=x.device)
    flip = torch.rand(n, generator=generator, device=x.device) < 0.5
    across = torch.where(flip[:, None], steps.flip(0), steps) + at[1][:, None]
    down = steps + at[0][:, None]
    rows = torch.arange(n, device=x.device)[:, None, None]
    return padded[rows, :, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)


def methods(size: str = "full") -> dict[str, SSVI]:
    """Name in the table -> options. The reduced net has no batch norms, and does not learn by the published rates."""
    if size == "ci":
        return {
            "all weights": SSVI(density=1.0),
            "ssvi 0.1": SSVI(),
            "ssvi 0.05": SSVI(density=0.05),
            "static 0.1": SSVI(rate=0.0),
            "ssvi 0.1, natural": SSVI(estimator="natural"),
        }
    return {
        "ssvi 0.1, as published": SSVI.paper(),
        "ssvi 0.05, as published": SSVI.paper(density=0.05),
        "all weights, as published": SSVI.paper(density=1.0),
        "static 0.1, as published": SSVI.paper(rate=0.0),
        "ssvi 0.1, T = 1, natural": SSVI(density=0.1, estimator="natural"),
    }


def run(chosen: list[str] | None, size: str, file: Path, device: str | None) -> str:
    """Fit what is not kept in ``file`` yet; returns the table."""
    effort, records = SIZES[size], Records(file)
    split = cifar10()
    train = {k: torch.as_tensor(v[: effort.images]) for k, v in split.train.items()}
    test = {k: torch.as_tensor(v[: effort.test]) for k, v in split.test.items()}
    known = methods(size)
    for method in chosen or known:
        key = {"size": size, "method": method, "seed": 0}
        records.row(key, lambda o=known[method]: fit(train, test, o, effort, device))
    return table([r for r in records.rows if r["size"] == size])


def fit(
    train: dict[str, Tensor],
    test: dict[str, Tensor],
    options: SSVI,
    effort: Size,
    device: str | None,
) -> Row:
    """One fit and its scores; unfamiliar images are those with their pixels in another order."""
    points: dict[str, Any] = {}
    if options.tempering < 1:  # as published: the prior is that of the authors' code
        points = {"prior": nn.isotropic(0.005), "bias": nn.point()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        posterior = infer(
            classifier(**effort.net, **points),
            train,
            method=replace(options, augment={"x": augmented}),
            seed=0,
            minibatch={"image": 128},
            max_iters=effort.epochs * math.ceil(len(train["label"]) / 128),
            device=device,
        )
        seconds = time.perf_counter() - start
        order = torch.randperm(32 * 32, generator=torch.Generator().manual_seed(0))
        strange = test["x"].flatten(2)[..., order].reshape(test["x"].shape)
        probs, unfamiliar = (
            posterior.predict({"x": x}, n=DRAWS, seed=0).probs("label").cpu()
            for x in (test["x"], strange)
        )
    row = scores(probs, test["label"], unfamiliar)
    return {**row, "density": float(posterior.density), "seconds": seconds}


def table(rows: list[Row]) -> str:
    """A row a method."""
    names = ("density", "accuracy", "nll", "ece", "brier", "auroc", "seconds")
    lines = [[r["method"], *(f"{r[c]:.4g}" for c in names)] for r in rows]
    return markdown(["method", *names], lines)


__all__ = ["SIZES", "augmented", "methods", "run", "table"]
