"""What a network costs: weights, bytes of state, and multiply-accumulates of a step and of a prediction, by layer.

Counts are those of [Li2024]: a forward pass and twice as much backwards, all of it twice where two products are formed.
They count arithmetic, not time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ppl.errors import UnsupportedError
from ppl.inference.networks.noise import table_size
from ppl.inference.networks.records import Problem, Runs, State, sizes
from ppl.inference.networks.slopes import noise_counts


class Cost(NamedTuple):
    """One layer, or latents outside layers."""

    name: str
    weights: int  # numbers in its arrays
    active: int  # that are kept
    estimator: str  # how it is evaluated
    why: str  # it is not the one that was asked for
    state_bytes: int  # of means, scales and the optimiser's memory, with the places of what is kept
    step_flops: int  # multiply-accumulates of a step, for one example
    draw_flops: int  # of a prediction with one draw, for one example


_NAMES = {"local": "local reparameterisation", "flipout": "Flipout", "draw": "weight draw"}


def costs(problem: Problem, state: State | None = None) -> tuple[Cost, ...]:
    """The cost of every layer with weights, in the order of evaluation, then of all other latents together.

    Args:
        problem: what is fitted.
        state: with the entries that are kept; None: all are, or as many as will be.
    """
    counts = [a.size for a in problem.arrays] if state is None else sizes(problem, state)
    rows: dict[str, Cost] = {}
    for at, count in enumerate(counts):
        row = _array(problem, at, count)
        rows[row.name] = _joined(rows[row.name], row) if row.name in rows else row
    return tuple(rows.values())


def table(problem: Problem, state: State | None = None) -> str:
    """The costs as text, a line for each layer and one for their sum."""
    found = costs(problem, state)
    lines = [_ROW.format("layer", "weights", "active", "state", "MAC/step", "MAC/draw", "estimator")]  # fmt: skip
    for c in found:
        how = c.estimator + (f": {c.why}" if c.why else "")
        lines.append(_line(c, how))
    sums = {f: sum(getattr(c, f) for c in found) for f in _COUNTED}
    total = Cost(name="sum", estimator="", why="", **sums)
    return "\n".join([*lines, _line(total, f"N = {problem.examples}, for one example")])


def check_memory(problem: Problem, runs: Runs) -> None:
    """Refuse a step that would need more than the budget: states before and after, noise, and outputs of layers for a batch.

    Raises:
        UnsupportedError: it names the layer whose outputs are largest.
    """
    limit = problem.settings.memory
    if limit is None:
        return
    kept = 2 * sum(
        t.nbytes for run in runs.runs for t in (run.mean, run.raw, *run.memory, *run.indices)
    )
    kept += problem.bound.dtype.itemsize * sum(
        table_size(sum(noise_counts(problem, run))) for run in runs.runs
    )
    batch = math.ceil(problem.examples / problem.parts)
    item = problem.bound.dtype.itemsize * _COPIES
    outputs = {
        p.name: batch * math.prod(p.node.event_shape) * item for p in problem.network.products
    }
    made = sum(outputs.values())
    if kept + made > limit:
        name = max(outputs, key=outputs.__getitem__, default="")
        raise UnsupportedError(
            f"{problem.method}: a step takes about {_bytes(kept)} for weights and {_bytes(made)} for what layers put out on "
            f"{batch} examples, '{name}' {_bytes(outputs.get(name, 0))} of it; memory= allows {_bytes(limit)}. Take fewer "
            "examples a step with minibatch=..., or raise memory=."
        )


_COPIES = 4  # of a layer's output: mean, variance, noise, and the gradient
_COUNTED = ("weights", "active", "state_bytes", "step_flops", "draw_flops")
_ROW = "{:<24} {:>10} {:>10} {:>9} {:>9} {:>9}  {}"


def _line(c: Cost, how: str) -> str:
    return _ROW.format(
        c.name, c.weights, c.active, _bytes(c.state_bytes), _count(c.step_flops), _count(c.draw_flops), how
    ).rstrip()  # fmt: skip


def _array(problem: Problem, at: int, active: int) -> Cost:
    array, rule = problem.arrays[at], problem.rule
    kind = problem.estimators[at]
    item = problem.bound.dtype.itemsize
    vectors = 3 if rule.natural else (6 if rule.optimiser == "adam" else 4)
    index = 8 if problem.is_sparse[at] else 0
    dense = 0
    if array.role == "weight":
        dense = sum(problem.network.products[u].multiplications for u in array.uses)
    elif array.role == "other" and array.layer:
        own = [y for y in problem.network.layers if y.name == array.layer]
        dense = sum(y.multiplications for y in own if y.weight and y.weight.variable == array.name)
    forward = dense * active // max(array.size, 1)
    twice = 1 if kind == "draw" else 2
    how = "natural step at a weight draw" if rule.natural else _NAMES[kind]
    name = array.layer or "other latents"
    return Cost(
        name, array.size, active, how, problem.why[at], active * (vectors * item + index),
        3 * twice * rule.draws * forward, forward,
    )  # fmt: skip


def _joined(a: Cost, b: Cost) -> Cost:
    main = a if a.weights >= b.weights else b
    return Cost(
        a.name, a.weights + b.weights, a.active + b.active, main.estimator, main.why,
        a.state_bytes + b.state_bytes, a.step_flops + b.step_flops, a.draw_flops + b.draw_flops,
    )  # fmt: skip


def _bytes(n: int) -> str:
    """A number of bytes for people.

    >>> _bytes(1536)
    '1.5 KiB'
    """
    size = float(n)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"


def _count(n: int) -> str:
    """A count for people.

    >>> _count(803_000)
    '803 k'
    """
    size = float(n)
    for unit in ("", " k", " M", " G"):
        if size < 1000:
            return f"{size:.3g}{unit}"
        size /= 1000
    return f"{size:.3g} T"


__all__ = ["Cost", "check_memory", "costs", "table"]
