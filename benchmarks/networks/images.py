"""MNIST and Fashion-MNIST: accuracy, likelihood, calibration and unfamiliar inputs against density, over seeds.

Methods: Adam on the plain network; dense variational inference by local reparameterisation and by the natural step
(IVON), which are sparse subspaces of density 1; subspaces of several densities by both steps; the static random set of the
same size. The unfamiliar inputs
of a net for digits are clothes and the other way round; the score is the entropy of the predictive probabilities.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.networks import plain
from benchmarks.networks.records import Records, Row, markdown, mean_se
from ppl import infer, metrics
from ppl.models import classifier
from ppl.models.learning_sets import fashion_mnist, mnist

SETS = {"mnist": mnist, "fashion_mnist": fashion_mnist}
OTHER = {"mnist": "fashion_mnist", "fashion_mnist": "mnist"}
NETS = ("mlp", "lenet")
HIDDEN = (256, 256)
DENSITIES = (0.1, 0.05, 0.02)
DRAWS = 16


class Size(NamedTuple):
    """How much of everything a table takes."""

    images: int | None  # to fit; None: all
    test: int | None
    epochs: int
    batch: int
    seeds: int


SIZES = {
    "ci": Size(6000, 2000, 6, 128, 1),
    "cpu": Size(None, None, 8, 256, 3),
    "full": Size(None, None, 50, 128, 3),
}


def methods() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name in the table -> backend and options."""
    found: dict[str, tuple[str, dict[str, Any]]] = {
        "vi": ("vi", {"estimator": "local"}),
        "ivon": ("vi", {"estimator": "natural"}),
    }
    for density in DENSITIES:
        found[f"ssvi {density:g}"] = ("ssvi", {"density": density})
    for density in DENSITIES:
        options = {"density": density, "estimator": "natural"}
        found[f"ssvi ivon {density:g}"] = ("ssvi", options)
    for density in DENSITIES:
        found[f"static {density:g}"] = ("ssvi", {"density": density, "rate": 0.0})
    return found


PLAIN = "Adam, one point"


class Images(NamedTuple):
    """What one set gives: to fit, to test, and unfamiliar ones."""

    train: dict[str, Tensor]
    test: dict[str, Tensor]
    unfamiliar: Tensor


def load(name: str, size: Size) -> Images:
    """Images in single precision."""
    own, other = SETS[name](), SETS[OTHER[name]]()
    train = {k: torch.as_tensor(v[: size.images]) for k, v in own.train.items()}
    test = {k: torch.as_tensor(v[: size.test]) for k, v in own.test.items()}
    return Images(train, test, torch.as_tensor(other.test["x"][: size.test]))


def scores(probs: Tensor, label: Tensor, unfamiliar: Tensor) -> Row:
    """Accuracy, negative log-likelihood, calibration error, Brier score, and how well entropy tells the unfamiliar."""
    entropies = metrics.entropy(probs), metrics.entropy(unfamiliar)
    return {
        "accuracy": float(metrics.accuracy(probs, label)),
        "nll": float(metrics.nll(probs, label)),
        "ece": float(metrics.ece(probs, label)),
        "brier": float(metrics.brier(probs, label)),
        "auroc": float(metrics.auroc(*entropies)),
    }


def bayes(images: Images, net: str, method: str, size: Size, seed: int, device: str | None) -> Row:
    """One fit by a method of :func:`methods`, and its scores."""
    name, options = methods()[method]
    steps = size.epochs * math.ceil(len(images.train["label"]) / size.batch)
    model = classifier(net=net, hidden=HIDDEN) if net == "mlp" else classifier(net=net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.process_time()
        posterior = infer(
            model,
            images.train,
            method=name,
            seed=seed,
            minibatch={"image": size.batch},
            max_iters=steps,
            device=device,
            progress=False,
            **options,
        )
        seconds = time.process_time() - start
        probs, strange = (
            posterior.predict({"x": x}, n=DRAWS, seed=0).probs("label").cpu()
            for x in (images.test["x"], images.unfamiliar)
        )
    module = posterior.to_module("mean").eval()
    with torch.no_grad():
        mean = module(images.test["x"].to(posterior.bound.device)).softmax(-1).cpu()
    row = scores(probs, images.test["label"], strange)
    row |= {"nll of the mean": float(metrics.nll(mean, images.test["label"]))}
    return row | {"seconds": seconds, "density": float(posterior.density)}


def point(images: Images, net: str, size: Size, seed: int) -> Row:
    """The plain network by Adam, and its scores."""
    x, label = images.train["x"], images.train["label"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = plain.mlp(x[0].numel(), *HIDDEN, 10) if net == "mlp" else plain.lenet(1, x.shape[-1])
    loss = nn.CrossEntropyLoss()
    seconds = plain.train(made, loss, x, label, epochs=size.epochs, batch=size.batch, seed=seed)
    with torch.no_grad():
        probs, strange = (
            torch.cat([made(part).softmax(-1) for part in of.split(1000)])
            for of in (images.test["x"], images.unfamiliar)
        )
    return {**scores(probs, images.test["label"], strange), "seconds": seconds, "density": 1.0}


def run(
    sets: Sequence[str],
    nets: Sequence[str],
    chosen: Sequence[str] | None,
    size: str,
    file: Path,
    device: str | None = None,
) -> str:
    """Fit what is not kept in ``file`` yet; returns the tables."""
    records, effort = Records(file), SIZES[size]
    for name in sets:
        images = load(name, effort)
        for net in nets:
            for seed in range(effort.seeds):
                for method in chosen or (PLAIN, *methods()):
                    key = {"size": size, "set": name, "net": net, "method": method, "seed": seed}
                    if method == PLAIN:
                        records.row(key, lambda n=net, s=seed, i=images: point(i, n, effort, s))
                    else:
                        records.row(
                            key,
                            lambda n=net, m=method, s=seed, i=images: bayes(
                                i, n, m, effort, s, device
                            ),
                        )
    return tables([r for r in records.rows if r["size"] == size])


_COLUMNS = (
    ("accuracy", 4),
    ("nll", 4),
    ("nll of the mean", 4),
    ("ece", 4),
    ("brier", 4),
    ("auroc", 3),
    ("seconds", 0),
)


def tables(rows: Sequence[Row]) -> str:
    """A table for each set and net, a row a method."""
    order = [PLAIN, *methods()]
    rows = sorted(rows, key=lambda r: order.index(r["method"]))
    parts = []
    for name in SETS:
        for net in (n for n in NETS if any((r["set"], r["net"]) == (name, n) for r in rows)):
            own = [r for r in rows if r["set"] == name and r["net"] == net]
            lines = []
            for method in dict.fromkeys(r["method"] for r in own):
                same = [r for r in own if r["method"] == method]
                cells = [mean_se([r.get(c) for r in same], digits) for c, digits in _COLUMNS]
                lines.append([method, f"{same[0]['density']:.3f}", str(len(same)), *cells])
            header = ["method", "density", "seeds", *(c for c, _ in _COLUMNS)]
            parts.append(f"### {name}, {net}\n\n{markdown(header, lines)}")
    return "\n\n".join(parts)


__all__ = ["NETS", "PLAIN", "SETS", "SIZES", "methods", "run", "tables"]
