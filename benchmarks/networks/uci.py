"""Nine regressions with their standard splits: networks of 50 rectifiers, mean-field and sparse, beside published figures.

Protocol of the literature: inputs and target standardised by the training part; RMSE of the predictive mean in the unit of
the target; log-likelihood per point in nats in that unit. The noise is a learned constant, every weight and bias has a
standard Normal prior, 400 passes over sets of less than 2000 rows, fewer over larger ones. Prior and warm-up were chosen
on split 0, which the table leaves out.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.networks import plain
from benchmarks.networks.records import Records, Row, markdown, mean_se
from ppl import infer, metrics, nn
from ppl.models import regression
from ppl.models.learning_sets import UCI, Table, uci

HIDDEN = {"protein": 100}
# Method -> backend and options.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "vi": ("vi", {"estimator": "local"}),
    "ivon": ("vi", {"estimator": "natural"}),
    "ssvi 0.1": ("ssvi", {"density": 0.1}),
    "ssvi ivon 0.1": ("ssvi", {"density": 0.1, "estimator": "natural"}),
    "static 0.1": ("ssvi", {"density": 0.1, "rate": 0.0}),
}
WARMUP = 0.8  # of a run: units of small networks that the KL term has silenced do not come back
PLAIN = "Adam, one point"


class Published(NamedTuple):
    """Root mean squared error and log-likelihood per point, with standard errors where they are known."""

    rmse: str
    log_likelihood: str


# The best mean-field figure that is known for each set, and who has it: measured on the first splits for four of them
# (Bayes by backprop with local reparameterisation or Flipout, or IVON), of probabilistic backpropagation for the others.
MEAN_FIELD: Mapping[str, Published] = {
    "boston": Published("2.80 ± 0.21 (IVON)", "-2.50 ± 0.04 (IVON)"),
    "concrete": Published("5.28 ± 0.16 (IVON)", "-3.08 ± 0.02 (IVON)"),
    "energy": Published("0.51 ± 0.04 (VI)", "-0.75 ± 0.05 (VI, Flipout)"),
    "kin8nm": Published("0.10 (PBP)", "0.90 (PBP)"),
    "naval": Published("0.01 (PBP)", "3.73 (PBP)"),
    "power": Published("4.12 (PBP)", "-2.84 (PBP)"),
    "protein": Published("4.73 (PBP)", "-2.97 (PBP)"),
    "wine": Published("0.64 (PBP)", "-0.97 (PBP)"),
    "yacht": Published("0.79 ± 0.08 (VI)", "-1.23 ± 0.04 (VI)"),
}
DROPOUT = {  # grid search over rates, 2018
    "boston": ("2.90", "-2.40"),
    "concrete": ("4.82", "-2.93"),
    "energy": ("0.54", "-1.21"),
    "kin8nm": ("0.08", "1.14"),
    "naval": ("0.00", "4.45"),
    "power": ("4.01", "-2.80"),
    "protein": ("4.27", "-2.87"),
    "wine": ("0.62", "-0.93"),
    "yacht": ("0.67", "-1.25"),
}


class Effort(NamedTuple):
    """How long a set is worked on."""

    batch: int
    epochs: int


def effort(rows: int) -> Effort:
    """About 6000 steps for every set."""
    if rows < 2000:
        return Effort(32, 400)
    return Effort(128, 100) if rows < 20_000 else Effort(256, 40)


def bayes(table: Table, width: int, method: str, seed: int, draws: int = 100) -> Row:
    """One fit by a method of :data:`METHODS`, and its scores on the test part."""
    name, options = METHODS[method]
    data = {k: torch.as_tensor(v, dtype=torch.float32) for k, v in table.train.items()}
    test = {k: torch.as_tensor(v, dtype=torch.float32) for k, v in table.test.items()}
    rows = len(data["y"])
    batch, epochs = effort(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.process_time()  # as for the plain network
        posterior = infer(
            regression(hidden=(width,), prior=nn.isotropic(1.0)),
            data,
            method=name,
            seed=seed,
            minibatch={"row": min(batch, rows)},
            max_iters=epochs * math.ceil(rows / batch),
            progress=False,
            warmup=WARMUP,
            **options,
        )
        seconds = time.process_time() - start
        mean = posterior.predict({"x": test["x"]}, n=draws, seed=0).mean("y")
        densities = posterior.log_likelihood(test, n=draws, seed=0)["y"]
    return {
        "rmse": table.scale * float(metrics.rmse(mean, test["y"])),
        "log_likelihood": float(metrics.log_predictive_density(densities)) - math.log(table.scale),
        "noise": float(posterior.params["noise"]),
        "seconds": seconds,
    }


def point(table: Table, width: int, seed: int) -> Row:
    """One network by Adam with learned noise."""
    part = {k: torch.as_tensor(v, dtype=torch.float32) for k, v in table.train.items()}
    test = {k: torch.as_tensor(v, dtype=torch.float32) for k, v in table.test.items()}
    batch, epochs = effort(len(part["y"]))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = plain.mlp(part["x"].shape[1], width, 1)
    loss = plain.LearnedNoise()
    seconds = plain.train(net, loss, part["x"], part["y"], epochs=epochs, batch=batch, seed=seed)
    with torch.no_grad():
        out = net(test["x"])
        density = -float(loss(out, test["y"])) - math.log(table.scale)
        rmse = table.scale * float(metrics.rmse(out.squeeze(-1), test["y"]))
    return {
        "rmse": rmse,
        "log_likelihood": density,
        "noise": float(loss.log_noise.detach().exp()),
        "seconds": seconds,
    }


def run(sets: Sequence[str], methods: Sequence[str], splits: int, file: Path) -> str:
    """Fit what is not kept in ``file`` yet; returns the table."""
    records = Records(file)
    for name in sets:
        for split in range(1, 1 + min(splits, 4 if name == "protein" else 19)):
            table = uci(name, split)
            width = HIDDEN.get(name, 50)
            for method in methods:
                key = {"set": name, "split": split, "method": method}
                if method == PLAIN:
                    records.row(key, lambda t=table, w=width, s=split: point(t, w, s))
                else:
                    records.row(key, lambda t=table, w=width, m=method, s=split: bayes(t, w, m, s))
    return tables(records.rows)


def tables(rows: Sequence[Row]) -> str:
    """Both scores, a row a set and a column a method."""
    methods = [m for m in (PLAIN, *METHODS) if any(r["method"] == m for r in rows)]
    parts = []
    for score, place, digits in (("log_likelihood", 1, 2), ("rmse", 0, 3)):
        lines = []
        for name in (n for n in UCI if any(r["set"] == n for r in rows)):
            own = [r for r in rows if r["set"] == name]
            splits = len({r["split"] for r in own})
            cells = [
                mean_se([r[score] for r in own if r["method"] == method], digits)
                for method in methods
            ]
            best = MEAN_FIELD[name][place]
            lines.append([f"{name} ({splits})", *cells, best, DROPOUT[name][place]])
        title = {"rmse": "Root mean squared error", "log_likelihood": "Log-likelihood per point"}
        header = ["set (splits)", *methods, "best mean-field known", "dropout, grid"]
        parts.append(f"### {title[score]}\n\n{markdown(header, lines)}")
    seconds = [
        f"{m} {np.mean([r['seconds'] for r in rows if r['method'] == m]):.0f} s" for m in methods
    ]
    return "\n\n".join([*parts, "Time of one fit, mean: " + ", ".join(seconds) + "."])


__all__ = ["METHODS", "PLAIN", "UCI", "run", "tables"]
