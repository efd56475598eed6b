"""Pictures of a posterior: how the run went, what was learned, does the model make such data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ppl import marginals as mg
from ppl.errors import DataError, UnsupportedError, nearest
from ppl.summary import element_names, is_nominal, sites

if TYPE_CHECKING:
    from ppl.posterior import Posterior

_BLUE, _DARK, _GREY, _ORANGE = "#4c78a8", "#1f3552", "#8a8f98", "#e4572e"
_LABELLED = 40  # a site of more scalars is drawn sorted and without names
_MANY_VALUES = 30  # a count of more different values is drawn as a density
_INTERVAL_DRAWS = 1000  # replicates behind an interval,
_NUMBERS = 5_000_000  # fewer when the data is so large that they would hold more numbers
_FEW_ENTRIES = 15  # a density of fewer entries shows its bandwidth and little else
_AXES = {
    "log_evidence": "log evidence (nats)",
    "ess": "effective sample size\n(particles)",
    "bridge": "tempering exponent",
}


class Plots:
    """``posterior.plot``: every method returns the Matplotlib figure.

    ``ax`` draws into existing axes (one, or a list with one a panel); ``file`` writes the picture,
    its ending names the format.
    """

    def __init__(self, posterior: Posterior) -> None:
        self.posterior = posterior

    def trace(self, *, ax: Any = None, file: str | Path | None = None) -> Any:
        """Log evidence, effective sample size and what else the backend reported, by iteration."""
        metrics = {k: v for k, v in self.posterior.trace.items() if len(v) > 1 and _moves(v)}
        if not metrics:
            raise DataError(
                f"plot.trace: {self.posterior.method} reported nothing that changes from step to "
                "step. "
                "print(posterior.diagnostics) says how the run went."
            )
        figure, axes = _panels(ax, [1.9] * len(metrics), sharex=True)
        for panel, (name, values) in zip(axes, metrics.items(), strict=True):
            self._metric(panel, name, values.cpu().double().numpy())
        axes[-1].set_xlabel("iteration")
        return _finished(figure, ax, file, f"{self.posterior.method}: course of the run")

    def forest(
        self, names: Sequence[str] | None = None, *, ax: Any = None, file: str | Path | None = None
    ) -> Any:
        """Median, 50 % and 90 % interval of every scalar; sites of one scale share an axis."""
        rows = [self._intervals(name) for name in self._ordered_sites(names)]
        groups = (
            [rows] if ax is not None and not isinstance(ax, (list, np.ndarray)) else _by_scale(rows)
        )
        heights = [0.24 * sum(r.height for r in group) + 0.45 for group in groups]
        figure, axes = _panels(ax, heights)
        for panel, group in zip(axes, groups, strict=True):
            _draw_forest(panel, group)
        return _finished(figure, ax, file, "Median, 50 % and 90 % intervals")

    def ppc(
        self,
        site: str | None = None,
        n: int = 50,
        *,
        seed: int | None = None,
        ax: Any = None,
        file: str | Path | None = None,
    ) -> Any:
        """Observed data against ``n`` data sets that the fitted model makes.

        Args:
            site: an observed site; all of them when left out.
            n: number of replicated data sets shown as curves; intervals use up to 1000.
            seed: of the replicates.
            ax: axes to draw into.
            file: picture to write.
        """
        shown = self._observed(site)
        largest = max(self.posterior.bound.values[name].numel() for name in shown)
        # Quantiles need more replicates than an eye can take in as curves.
        enough = max(n, min(_INTERVAL_DRAWS, _NUMBERS // max(largest, 1)))
        drawn = self.posterior.predict(n=enough, sites=shown, seed=seed)
        figure, axes = _panels(ax, [2.9] * len(shown))
        for panel, name in zip(axes, shown, strict=True):
            self._compare(panel, name, drawn.samples()[name], n)
        return _finished(figure, ax, file, "Posterior predictive check")

    # ---- one panel each ------------------------------------------------------------------------

    def _metric(self, panel: Any, name: str, values: np.ndarray) -> None:
        steps = np.arange(1, len(values) + 1)
        panel.plot(steps, values, color=_BLUE, linewidth=1.3)
        panel.set_ylabel(_AXES.get(name, name.replace("_", " ")))
        panel.set_xlim(1, len(values))
        evidence = self.posterior.log_evidence
        if name == "log_evidence":
            if evidence is not None:
                panel.axhline(
                    evidence.value, color=_ORANGE, linewidth=1, label=f"final: {evidence}"
                )
                panel.legend(loc="lower right", frameon=False, fontsize=9)
            _zoom_on_the_end(panel, values, None if evidence is None else evidence.value)
        elif name == "ess":
            panel.set_ylim(bottom=0)

    def _ordered_sites(self, names: Sequence[str] | None) -> Sequence[str]:
        bound = self.posterior.bound
        if names is None:
            # The quantiles of a table of a few values say less than its probabilities, which the
            # summary shows.
            tables = [n for n, m in self.posterior.marginals.items() if isinstance(m, mg.Table)]
            found = [
                n for n in sites(self.posterior) if n not in tables and not is_nominal(bound, n)
            ]
            if not found:
                raise DataError(
                    "plot.forest: all sites are discrete. Use posterior.probs(name), print the "
                    "summary, or name them."
                )
            return found
        wanted = [names] if isinstance(names, str) else list(names)
        for name in wanted:
            if is_nominal(bound, name):
                raise DataError(
                    f"plot.forest: '{name}' is a category, which has no intervals. Use "
                    f"probs('{name}')."
                )
        return wanted

    def _intervals(self, name: str) -> _Intervals:
        marginal = self.posterior.marginal(name)
        centre = mg.mean(marginal)
        levels = torch.tensor(
            [0.05, 0.25, 0.5, 0.75, 0.95], dtype=centre.dtype, device=centre.device
        )
        table = mg.quantile(marginal, levels).reshape(5, -1).cpu().double().numpy()
        labels = list(element_names(self.posterior.bound, name, centre.shape))
        return _Intervals(name, labels, table)

    def _observed(self, site: str | None) -> list[str]:
        graph, values = self.posterior.graph, self.posterior.bound.values
        known = [v.name for v in graph.role("observed") if v.name in values]
        if site is None and known:
            return known
        if site is None or site not in known:
            raise DataError(
                f"plot.ppc: {site!r} is not an observed site.{nearest(str(site), known)} "
                f"Observed: {', '.join(known) or 'none'}."
            )
        return [site]

    def _compare(self, panel: Any, name: str, drawn: torch.Tensor, curves: int) -> None:
        bound = self.posterior.bound
        variable, observed = bound.graph.variables[name], bound.values[name].double()
        drawn = drawn.double().reshape(len(drawn), -1)
        mask = bound.masks.get(name)
        keep = slice(None) if mask is None else mask.expand(observed.shape).reshape(-1).cpu()
        truth, copies = observed.reshape(-1).cpu().numpy()[keep], drawn.cpu().numpy()[:, keep]
        few = len(np.unique(np.concatenate([truth, copies.ravel()]))) <= _MANY_VALUES
        if variable.is_discrete and few:
            _draw_bars(panel, truth, copies)
            if variable.index_of:
                ticks = [str(v) for v in bound.labels[variable.index_of]]
                panel.set_xticks(range(len(ticks)), ticks)
        elif len(truth) <= _FEW_ENTRIES:
            labels = np.array(list(element_names(bound, name, observed.shape)))[keep]
            _draw_entries(panel, truth, copies, labels)
        else:
            _draw_densities(panel, truth, copies[:curves])
        panel.set_xlabel(name)


class _Intervals(NamedTuple):
    """Quantiles ``[5, scalars]`` of a site, and a name for each scalar."""

    name: str
    labels: list[str]
    table: np.ndarray

    @property
    def height(self) -> int:
        """Lines that the site takes; a long one is drawn as a band."""
        return min(len(self.labels), _LABELLED // 2 if len(self.labels) > _LABELLED else _LABELLED)

    @property
    def span(self) -> tuple[float, float]:
        """The axis that it would like."""
        return float(self.table.min()), float(self.table.max())


def _by_scale(rows: Sequence[_Intervals]) -> list[list[_Intervals]]:
    """Neighbours share an axis unless one of them would shrink to less than a sixth of it."""
    groups: list[list[_Intervals]] = []
    for row in rows:
        together = [*groups[-1], row] if groups else []
        low = min((r.span[0] for r in together), default=0.0)
        high = max((r.span[1] for r in together), default=0.0)
        if together and all(6 * (r.span[1] - r.span[0]) >= high - low for r in together):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _draw_forest(panel: Any, group: Sequence[_Intervals]) -> None:
    place = 0.0
    ticks: list[float] = []
    names: list[str] = []
    for row in group:
        crowded = len(row.labels) > _LABELLED
        table = row.table[:, np.argsort(row.table[2])] if crowded else row.table
        count = table.shape[1]
        y = place + np.linspace(0, row.height - 1, count)
        panel.hlines(
            y, table[0], table[4], color=_BLUE, linewidth=0.7 if crowded else 1.4, alpha=0.75
        )
        panel.hlines(y, table[1], table[3], color=_BLUE, linewidth=1.4 if crowded else 4.5)
        panel.scatter(table[2], y, s=3 if crowded else 22, color=_DARK, zorder=3, linewidths=0)
        ticks += [float(y.mean())] if crowded else y.tolist()
        names += [f"{row.name}\n{count} scalars,\nsorted"] if crowded else row.labels
        place += row.height
    panel.set_yticks(ticks, names)
    panel.set_ylim(place - 0.4, -0.6)
    panel.grid(axis="x", color="#e6e8eb", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)


def _draw_bars(panel: Any, truth: np.ndarray, copies: np.ndarray) -> None:
    values = np.arange(min(truth.min(), copies.min()), max(truth.max(), copies.max()) + 1)
    share = np.array([(truth == v).mean() for v in values])
    shares = np.stack([(copies == v).mean(1) for v in values])
    low, middle, high = np.quantile(shares, [0.05, 0.5, 0.95], axis=1)
    panel.bar(values, share, width=0.7, color=_ORANGE, alpha=0.55, label="observed")
    spread = np.stack([middle - low, high - middle])
    panel.errorbar(
        values,
        middle,
        spread,
        fmt="o",
        color=_DARK,
        markersize=4,
        capsize=3,
        label="replicated, 90 % interval",
    )
    panel.set_xticks(values[:: max(1, len(values) // 15)])
    panel.set_xlim(values[0] - 1, values[-1] + 1)
    panel.set_ylabel("share of entries")
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False, fontsize=9)


def _draw_entries(panel: Any, truth: np.ndarray, copies: np.ndarray, labels: np.ndarray) -> None:
    low, inner_low, inner_high, high = np.quantile(copies, [0.05, 0.25, 0.75, 0.95], axis=0)
    y = np.arange(len(truth))
    panel.hlines(y, low, high, color=_BLUE, linewidth=1.4, alpha=0.75)
    panel.hlines(
        y,
        inner_low,
        inner_high,
        color=_BLUE,
        linewidth=4.5,
        label="replicated, 50 % and 90 % intervals",
    )
    panel.scatter(truth, y, color=_ORANGE, s=34, zorder=3, linewidths=0, label="observed")
    panel.set_yticks(y, labels)
    panel.set_ylim(len(truth) - 0.4, -0.6)
    panel.grid(axis="x", color="#e6e8eb", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _draw_densities(panel: Any, truth: np.ndarray, copies: np.ndarray) -> None:
    # Heavy tails would squeeze everything else: the axis follows the data and the bulk of the
    # replicates.
    low, high = np.quantile(copies, [0.01, 0.99])
    width = np.ptp(truth) or max(high - low, 1.0)
    low = min(truth.min(), max(low, truth.min() - width)) - 0.1 * width
    high = max(truth.max(), min(high, truth.max() + width)) + 0.1 * width
    bottom = min(truth.min(), copies.min())
    grid = np.linspace(max(low, bottom), high, 256)
    # One bandwidth for all, so that curves differ by their values alone.
    bandwidth = (
        float(np.median([_bandwidth(values) for values in (truth, *copies)])) or np.ptp(grid) / 50
    )
    for number, copy in enumerate(copies):
        label = f"{len(copies)} replicates" if number == 0 else None
        panel.plot(
            grid,
            _density(copy, grid, bandwidth),
            color=_BLUE,
            linewidth=0.7,
            alpha=0.35,
            label=label,
        )
    panel.plot(
        grid, _density(truth, grid, bandwidth), color=_ORANGE, linewidth=2.2, label="observed"
    )
    panel.set_ylabel("density")
    panel.set_ylim(bottom=0)
    panel.set_xlim(grid[0], grid[-1])
    panel.set_yticks([])
    panel.spines["left"].set_visible(False)
    legend = panel.legend(frameon=False, fontsize=9)
    for line in legend.get_lines():
        line.set_alpha(1.0)


def _bandwidth(values: np.ndarray) -> float:
    """Silverman's rule, with the quartiles against outliers."""
    low, high = np.quantile(values, [0.25, 0.75])
    spread = min(values.std(), (high - low) / 1.349) or values.std()
    return float(0.9 * spread * len(values) ** -0.2)


def _density(values: np.ndarray, grid: np.ndarray, bandwidth: float) -> np.ndarray:
    """A Gaussian kernel density estimate ``[grid]``."""
    # Binned first, so that the cost does not grow with the number of entries; a bin is far below
    # the bandwidth.
    edges = np.linspace(grid[0] - 4 * bandwidth, grid[-1] + 4 * bandwidth, 2049)
    counts, _ = np.histogram(values, edges)
    centres = (edges[1:] + edges[:-1]) / 2
    kernel = np.exp(-0.5 * ((grid[:, None] - centres) / bandwidth) ** 2)
    return kernel @ counts / (len(values) * bandwidth * np.sqrt(2 * np.pi))


# ---- figures ----------------------------------------------------------------------------------


def _panels(ax: Any, heights: Sequence[float], *, sharex: bool = False) -> tuple[Any, list[Any]]:
    """A figure and one axes a panel: new ones, or those of the caller."""
    if ax is not None:
        axes = list(np.ravel(np.asarray(ax, dtype=object)))
        if len(axes) != len(heights):
            raise DataError(
                f"plot: expected {len(heights)} axes, one a panel, got {len(axes)}. Leave ax= out "
                "for a new figure."
            )
        figure = axes[0].figure
    else:
        size = (7.0, sum(heights) + 0.6)
        figure, table = _pyplot().subplots(
            len(heights),
            1,
            figsize=size,
            sharex=sharex,
            squeeze=False,
            layout="constrained",
            height_ratios=list(heights),
        )
        axes = list(table[:, 0])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finished(figure: Any, ax: Any, file: str | Path | None, title: str) -> Any:
    if ax is None:
        figure.suptitle(title, fontsize=11, x=0.02, ha="left")
    if file is not None:
        figure.savefig(file, dpi=150)
        if ax is None:
            _pyplot().close(figure)
    return figure


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError:
        raise UnsupportedError(
            "plots need the extra 'plot': pip install factorppl[plot]. posterior.summary() and "
            "posterior.samples() "
            "hold the same numbers."
        ) from None
    return pyplot


def _moves(values: torch.Tensor) -> bool:
    finite = values[values.isfinite()]
    return len(finite) > 1 and bool((finite != finite[0]).any())


def _zoom_on_the_end(panel: Any, values: np.ndarray, target: float | None) -> None:
    """Cut the climb of the first steps off when it would flatten all the rest."""
    finite = values[np.isfinite(values)]
    late = finite[len(finite) // 4 :]
    kept = late if target is None else np.append(late, target)
    low, high = kept.min(), kept.max()
    room = max(high - low, 1e-9)
    if finite.min() < low - 2 * room:
        panel.set_ylim(low - 0.6 * room, max(high, finite.max()) + 0.1 * room)
        panel.annotate(
            "earlier steps lie below",
            (0.01, 0.03),
            xycoords="axes fraction",
            fontsize=8,
            color=_GREY,
        )
