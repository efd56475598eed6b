"""Figures like those of the paper: means over seeds, with bands from the least to the greatest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.qem_paper.runs import Trace

Runs = Mapping[str, Sequence[Trace]]  # by method
_COLOUR = {"qem": "tab:blue", "qem default": "tab:green", "vi": "tab:red", "rws": "tab:orange"}
_LABEL = {"qem": "QEM, the paper's settings", "qem default": "QEM, our defaults"}
_LABEL |= {"vi": "VI, massively parallel", "rws": "RWS, massively parallel"}
# The peers of nuts_reference.py.
_COLOUR |= {"numpyro mean-field": "0.3", "numpyro mean-field, standardised": "0.6"}
_COLOUR |= {"numpyro full rank": "tab:purple"}
_LABEL |= {name: name.replace("numpyro ", "NumPyro, ") for name in _COLOUR if "numpyro" in name}
_SMOOTH = 8  # iterations, as in the paper's figures


def curves(name: str, runs: Runs, particles: int, path: Path, published: float | None) -> None:
    """Log evidence and predictive log-likelihood, against iteration and against time."""
    figure, axes = _axes(2, 2, (9, 6))
    for method, traces in runs.items():
        evidence = np.array([_smooth(t.log_evidence) for t in traces])
        seconds = np.mean([t.seconds for t in traces], 0)
        looks = sorted(traces[0].predicted)
        scores = np.array([[t.predicted[i][0] for i in looks] for t in traces])
        for row, (x, values) in enumerate(
            ((range(1, len(seconds) + 1), evidence), (looks, scores))
        ):
            if not len(x):
                continue
            times = seconds[np.array(list(x)) - 1]
            for column, horizontal in enumerate((list(x), times)):
                _band(axes[row, column], horizontal, values, method)
    if published is not None:
        axes[0, 0].axhline(published, color="0.4", lw=0.8, ls="--", label="published plateau")
    for row, quantity in enumerate(("log evidence, nats", "test log-likelihood, nats")):
        axes[row, 0].set(ylabel=quantity, xlabel="iteration")
        axes[row, 1].set(xlabel="seconds", xscale="log")
        for axis in axes[row]:
            _cut(axis)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{name}, {particles} particles")
    _save(figure, path)


def timings(table: Mapping[str, Mapping[tuple[str, int], float]], path: Path) -> None:
    """Milliseconds an iteration by number of particles, one panel a model."""
    figure, axes = _axes(1, len(table), (2.4 * len(table) + 1, 3))
    for axis, (name, times) in zip(axes[0], table.items(), strict=True):
        for method in dict.fromkeys(m for m, _ in times):
            counts = [k for m, k in times if m == method]
            line = [times[method, k] for k in counts]
            axis.plot(counts, line, "o-", color=_COLOUR[method], label=_LABEL.get(method))
        axis.set(title=name, xscale="log", yscale="log", xlabel="particles")
        counts = sorted({k for _, k in times})
        axis.set_xticks(counts, [str(k) for k in counts])
        axis.set_xticks([], minor=True)
    axes[0, 0].set_ylabel("ms an iteration")
    axes[0, 0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def errors(
    runs: Mapping[str, Runs], path: Path, clock: str = "seconds, without the last weighting"
) -> None:
    """Error of posterior means and of standard deviations against time, one column a model."""
    figure, axes = _axes(2, len(runs), (2.8 * len(runs) + 1, 5))
    for column, by_method in enumerate(runs.values()):
        for method, traces in by_method.items():
            looks = sorted(set.intersection(*(set(t.errors) for t in traces)))
            times = [np.mean([t.seconds[i - 1] for t in traces]) for i in looks]
            for row in (0, 1):
                values = np.array([[t.errors[i][row] for i in looks] for t in traces])
                _band(axes[row, column], times, values, method)
    for column, name in enumerate(runs):
        axes[0, column].set_title(name)
        for row in (0, 1):
            axes[row, column].axhline(0.1, color="0.4", lw=0.8, ls="--", label="0.1")
            axes[row, column].set(xscale="log", yscale="log")
        axes[1, column].set_xlabel(clock)
    axes[0, 0].set_ylabel("mean |error of mean| / sd")
    axes[1, 0].set_ylabel("mean |log ratio of sds|")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    _save(figure, path)


def rescaled(pairs: Mapping[str, Mapping[str, tuple[Trace, Trace]]], path: Path) -> None:
    """Log evidence of the original and of the version in other units, from the same seed."""
    figure, axes = _axes(1, len(pairs), (3.2 * len(pairs) + 1, 3.4))
    for axis, (name, by_method) in zip(axes[0], pairs.items(), strict=True):
        for method, (plain, other) in by_method.items():
            for trace, style in ((plain, "-"), (other, "--")):
                label = _LABEL[method] + (", rescaled" if style == "--" else "")
                wide = {"lw": 2.5, "alpha": 0.4} if style == "-" else {"lw": 1.2}
                values = _smooth(trace.log_evidence)
                axis.plot(values, style, color=_COLOUR[method], label=label, **wide)
        axis.set(title=name, xlabel="iteration")
        _cut(axis)
    axes[0, 0].set_ylabel("log evidence, nats")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="lower right")
    _save(figure, path)


def _axes(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _band(axis: Any, x: Any, values: np.ndarray, method: str) -> None:
    axis.plot(x, values.mean(0), color=_COLOUR[method], label=_LABEL[method])
    if len(values) > 1:
        axis.fill_between(x, values.min(0), values.max(0), color=_COLOUR[method], alpha=0.15, lw=0)


def _smooth(values: Sequence[float]) -> np.ndarray:
    kept = np.array(values)
    starts = np.maximum(0, np.arange(len(kept)) - _SMOOTH + 1)
    return np.array([kept[a : i + 1].mean() for i, a in enumerate(starts)])


def _cut(axis: Any) -> None:
    """Leave the first steps of a bad start out of the picture: what counts is near the end."""
    lines = [line.get_ydata() for line in axis.get_lines() if len(line.get_ydata()) > 2]
    tails = [np.asarray(y, dtype=float)[len(y) // 20 :] for y in lines]
    values = np.concatenate([np.zeros(0), *tails])  # a run may have been scored nowhere
    values = values[np.isfinite(values)]
    if len(values):
        low, high = values.min(), values.max()
        axis.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low))
