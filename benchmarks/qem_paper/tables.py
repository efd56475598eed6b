"""Tables: ours beside what was published and what an independent implementation found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.qem_paper.experiments import COLUMNS, Experiment
from benchmarks.qem_paper.runs import Trace

_SMOOTH = 8  # iterations over which published curves are averaged
_PUBLISHED_SEEDS = 5
_ITERATIONS = 250  # of published runs and of the reference


def at(trace: Trace, column: Any, smooth: int = 1) -> float:
    """Log evidence at an iteration (mean of the ``smooth`` before it), or on the plateau.

    The plateau is the mean of the last fifth: iterations 201 to 250 of 250.
    """
    values = np.array(trace.log_evidence)
    if column == "plateau":
        return _mean(values[-max(1, len(values) // 5) :])
    if column > len(values):
        return math.nan
    return _mean(values[max(0, column - smooth) : column])


def level_table(experiment: Experiment, particles: int, traces: Sequence[Trace]) -> list[str]:
    """Rows of log evidence: published, reference, ours, and differences in units of their noise."""
    published = dict(experiment.published.get(particles, {}))
    reference = dict(experiment.reference.get(particles, {}))
    if len(traces[0].log_evidence) != _ITERATIONS:  # another plateau
        published.pop("plateau", None)
        reference.pop("plateau", None)
    smoothed = [[at(t, c, _SMOOTH) for t in traces] for c in COLUMNS]
    plain = [[at(t, c) for t in traces] for c in COLUMNS]
    name = f"{experiment.name}, K={particles}"
    lines = []
    if published:
        lines += [
            _line(name, "published", [_number(published.get(c)) for c in COLUMNS]),
            _line("", "ours, smoothed", [_mean_sd(v) for v in smoothed]),
            _line("", "difference / noise", _differences(smoothed, published)),
        ]
    lines += [_line("" if published else name, "ours", [_mean_sd(v) for v in plain])]
    if reference:
        pairs = [
            f"{_number(reference[c][0])} ({reference[c][1]:g})" if c in reference else ""
            for c in COLUMNS
        ]
        lines += [
            _line("", "reference", pairs),
            _line("", "difference / noise", _differences(plain, reference)),
        ]
    return lines


LEVEL_HEAD = [
    "| model | row | " + " | ".join(f"{c}" for c in COLUMNS) + " |",
    "|---|---|" + "--:|" * len(COLUMNS),
]


def speed_row(
    experiment: Experiment, particles: int, paper: Sequence[Trace], ours: Sequence[Trace]
) -> str:
    """When the final level of the paper's settings is reached by them, and by our defaults."""
    level, noise = final_level(paper)
    theirs, mine = ([reached(t, level - noise) for t in traces] for traces in (paper, ours))
    ratio = float(np.median(mine)) / float(np.median(theirs))
    cells = [
        f"{experiment.name}, K={particles}",
        f"{_number(level)} - {noise:.1f}",
        *(_median_range(found) for found in (theirs, mine)),
        f"{ratio:.2f}" if math.isfinite(ratio) else "not reached",
        _mean_sd([at(t, "plateau") for t in ours]),
    ]
    return "| " + " | ".join(cells) + " |"


SPEED_HEAD = [
    "| model | level | iterations, paper's settings | iterations, our defaults | ratio | plateau, our defaults |",
    "|---|--:|--:|--:|--:|--:|",
]


def final_level(traces: Sequence[Trace]) -> tuple[float, float]:
    """Plateau over all runs, and the standard deviation of an iteration within a run."""
    tails = [np.array(t.log_evidence)[-max(1, len(t.log_evidence) // 5) :] for t in traces]
    return _mean(np.concatenate(tails)), float(np.mean([np.nanstd(t) for t in tails]))


def reached(trace: Trace, level: float) -> float:
    """The first iteration at which the mean of the last 8 (that are untempered) is at ``level``.

    >>> reached(Trace([-9.0] * 4 + [-1.0] * 20, [], {}, {}), -1.5)
    12.0
    """
    values = np.array(trace.log_evidence)
    for i in range(_SMOOTH, len(values) + 1):  # a mean over a stretch without NaN
        if values[i - _SMOOTH : i].mean() >= level:
            return float(i)
    return math.inf


def score_rows(
    experiment: Experiment, particles: int, method: str, traces: Sequence[Trace]
) -> list[str]:
    """Predictive scores of the last fifth of a run, moment errors at its end, time of an iteration."""
    last = len(traces[0].log_evidence)
    scores = [[s for i, s in t.predicted.items() if i > last - last // 5] for t in traces]
    joint, pointwise = (
        [float(np.mean([s[k] for s in run])) if run else math.nan for run in scores] for k in (0, 1)
    )
    errors = [t.errors.get(last, (math.nan, math.nan)) for t in traces]
    ms = [1e3 * float(np.median(np.diff([0.0, *t.seconds]))) for t in traces]
    published = (
        experiment.published_test if method == "qem" and particles in experiment.published else None
    )
    cells = [
        f"{experiment.name}, K={particles}",
        method,
        _mean_sd([at(t, "plateau") for t in traces]),
        _number(published) if published is not None else "",
        _mean_sd(joint),
        _mean_sd(pointwise),
        *(
            "" if math.isnan(errors[0][k]) else f"{np.mean([e[k] for e in errors]):.3f}"
            for k in (0, 1)
        ),
        f"{np.median(ms):.2f}",
    ]
    return ["| " + " | ".join(cells) + " |"]


SCORE_HEAD = [
    "| model | method | log evidence, plateau | test, published | test, joint | test, pointwise | "
    "error of means | error of log sds | ms an iteration |",
    "|---|---|--:|--:|--:|--:|--:|--:|--:|",
]


def _differences(values: Sequence[Sequence[float]], others: Any) -> list[str]:
    """(ours - other) over the standard error of the difference; a published one has our spread.

    Two seeds say too little of that spread to judge a published value by.
    """
    cells = []
    for column, ours in zip(COLUMNS, values, strict=True):
        other = others.get(column)
        if other is None or len(ours) < (2 if isinstance(other, tuple) else 3):
            cells.append("")
            continue
        mean, sd = other if isinstance(other, tuple) else (other, np.std(ours, ddof=1))
        error = math.hypot(np.std(ours, ddof=1) / len(ours) ** 0.5, sd / _PUBLISHED_SEEDS**0.5)
        cells.append(f"{(np.mean(ours) - mean) / error:+.1f}" if error > 0 else "")
    return cells


def _mean(values: np.ndarray) -> float:
    """Over the iterations without a bridge; NaN where there is none."""
    kept = values[np.isfinite(values)]
    return float(kept.mean()) if len(kept) else math.nan


def _line(model: str, row: str, cells: Sequence[str]) -> str:
    return f"| {model} | {row} | " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return f"{value:.1f}" if abs(value) < 1e5 else f"{value:.3g}"


def _mean_sd(values: Sequence[float]) -> str:
    if not np.isfinite(values).any():
        return ""
    spread = f" ({np.std(values, ddof=1):.2g})" if len(values) > 1 else ""
    return _number(float(np.mean(values))) + spread


def _median_range(values: Sequence[float]) -> str:
    low, middle, high = min(values), float(np.median(values)), max(values)
    return f"{middle:.0f} ({low:.0f} - {high:.0f})"
