"""What does a step on the weights of a network cost, beside one of plain Adam on the same network and batch?

MLP 784-1024-1024-10, batch 128, float32. All methods take their steps in turns in one process, so that whatever else the
machine does falls on all of them; times are medians, ratios are medians over those of the plain step. Backends are
driven as ``infer`` drives them: a bound model, ``prepare``, ``init``, then ``step`` on minibatches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from benchmarks.networks import plain
from benchmarks.networks.records import Records, markdown
from ppl import backend as backends
from ppl.backend import Settings
from ppl.batches import batches_of
from ppl.models.bnn import classifier
from ppl.streams import Streams

WIDTHS = (784, 1024, 1024, 10)
BATCH, EXAMPLES = 128, 2048
ROUNDS, WARM = 25, 5  # steps that count, and steps before
PLAIN = "plain Adam"

# label -> method and options; a new row is a line here.
METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "vi local": ("vi", {"estimator": "local"}),
    "vi flipout": ("vi", {"estimator": "flipout"}),
    "vi pathwise": ("vi", {"estimator": "pathwise"}),
    "vi natural": ("vi", {"estimator": "natural"}),
    "ssvi local, density 0.05": ("ssvi", {"density": 0.05, "estimator": "local"}),
    "ssvi natural, density 0.05": ("ssvi", {"density": 0.05, "estimator": "natural"}),
    "ssvi local, density 0.05, masks": (
        "ssvi",
        {"density": 0.05, "estimator": "local", "kernel": "dense"},
    ),
}


class Stepper(NamedTuple):
    """Something that takes steps, and the bytes of what it keeps between them."""

    step: Callable[[], None]
    state_bytes: Callable[[], int]


def run(file: Path, methods: Mapping[str, tuple[str, Mapping[str, Any]]] = METHODS) -> str:
    """Measure what the file does not have yet; returns the table."""
    records = Records(file)
    missing = [name for name in methods if not any(r["method"] == name for r in records.rows)]
    if missing:
        times, sizes = measured({name: methods[name] for name in missing})
        for name in missing:
            records.row({"method": name}, lambda name=name: _figures(name, times, sizes))  # type: ignore[misc]
    rows = [
        (r["method"], f"{r['ms']:.1f}", f"{r['plain_ms']:.1f}", f"{r['ratio']:.2f}", f"{r['state_mb']:.1f}")
        for r in records.rows
        if r["method"] in methods
    ]  # fmt: skip
    head = ("method", "ms a step", "plain Adam, same run", "ratio", "state, MB")
    return markdown(head, rows)


def measured(
    methods: Mapping[str, tuple[str, Mapping[str, Any]]], rounds: int = ROUNDS
) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds of a step of every method and of the plain one, and bytes of state."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(EXAMPLES, WIDTHS[0], generator=generator)
    label = torch.randint(WIDTHS[-1], (EXAMPLES,), generator=generator)
    steppers = {PLAIN: plain_stepper(x, label)}
    steppers |= {k: backend_stepper(m, o, x, label) for k, (m, o) in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for turn in range(WARM + rounds):
        for name, stepper in steppers.items():
            start = time.perf_counter()
            stepper.step()
            if turn >= WARM:
                times[name].append(time.perf_counter() - start)
    sizes = {name: s.state_bytes() for name, s in steppers.items()}
    return {name: median(seen) for name, seen in times.items()}, sizes


def plain_stepper(x: torch.Tensor, label: torch.Tensor) -> Stepper:
    """``torch.optim.Adam`` with its defaults."""
    net = plain.mlp(*WIDTHS)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    at = iter(range(10**9))

    def step() -> None:
        start = next(at) * BATCH % (len(x) - BATCH)
        optimiser.zero_grad()
        loss = functional.cross_entropy(net(x[start : start + BATCH]), label[start : start + BATCH])
        loss.backward()
        optimiser.step()
        float(loss.detach())

    def size() -> int:
        kept = [t for s in optimiser.state.values() for t in s.values()] + list(net.parameters())
        return sum(t.numel() * t.element_size() for t in kept)

    return Stepper(step, size)


def backend_stepper(
    method: str, options: Mapping[str, Any], x: torch.Tensor, label: torch.Tensor
) -> Stepper:
    """A backend on the classifier of ``ppl.models``, as ``infer`` drives it."""
    module = backends.load(method)
    data = {"x": x, "label": label}
    bound = classifier(hidden=WIDTHS[1:-1]).bind(data, dtype=torch.float32)
    settings = Settings(Streams(0, bound.device), minibatch={"image": BATCH}, max_iters=10_000)
    problem = module.prepare(bound, module.Options(**options), settings)
    batches = batches_of(bound, settings.minibatch, settings.streams)
    assert batches is not None
    now = [module.init(problem)]
    at = iter(range(10**9))

    def step() -> None:
        now[0], _ = module.step(problem, now[0], batches.at(next(at)))

    def size() -> int:
        kept = [t for t in tree_leaves(now[0]) if isinstance(t, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in kept)

    return Stepper(step, size)


def _figures(name: str, times: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, Any]:
    own, base = times[name], times[PLAIN]
    return {
        "ms": 1e3 * own,
        "plain_ms": 1e3 * base,
        "ratio": own / base,
        "state_mb": sizes[name] / 1e6,
        "torch": torch.__version__,
    }


__all__ = ["METHODS", "backend_stepper", "measured", "plain_stepper", "run"]
