"""The posterior as text: one row a scalar, and the lines that say how far to trust it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ppl import marginals as mg
from ppl.binding import Bound
from ppl.diagnostics import K_GOOD, K_USABLE
from ppl.distributions import Categorical
from ppl.errors import UnsupportedError
from ppl.marginals import Marginal
from ppl.nn import report

if TYPE_CHECKING:
    from ppl.posterior import Posterior

_ROWS = 20  # of a printed posterior
_LEVELS = (0.05, 0.5, 0.95)
_NUMBERS = ("mean", "sd", "q05", "q50", "q95")
# Deterministic sites are computed from 1000 joint draws; a posterior of more numbers prints
# without them.
_FEW_NUMBERS = 20_000


class Row(NamedTuple):
    """One scalar; what does not exist is nan: the mean of a category, the ESS of a Gaussian."""

    site: str
    name: str
    mean: float
    sd: float
    q05: float
    q50: float
    q95: float
    ess: float  # effective sample size
    pareto_k: float
    values: str = ""  # the likeliest values of a discrete site and their probabilities


@dataclass(frozen=True)
class Summary:
    """A table of scalars; ``print`` it, or make a data frame of it.

    >>> row = Row("mu", "mu", 4.4123, 3.21, -0.9, 4.4, 9.7, 812.0, 0.11)
    >>> print(Summary((row, row._replace(name="tau", mean=0.5, ess=90.4))))
         mean   sd   q05  q50  q95  ess  pareto_k
    mu    4.4  3.2  -0.9  4.4  9.7  812      0.11
    tau   0.5  3.2  -0.9  4.4  9.7   90      0.11
    """

    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "no sites"
        columns = [("", [r.name for r in self.rows])]
        columns += [(head, list(_numbers(self.rows, head))) for head in _NUMBERS]
        columns.append(("ess", [_round(r.ess, 1 if r.ess < 10 else 0) for r in self.rows]))
        columns.append(("pareto_k", [_round(r.pareto_k, 2) for r in self.rows]))
        columns.append(("probabilities", [r.values for r in self.rows]))
        shown = [_aligned(h, cells) for h, cells in columns if not h or any(cells)]
        return "\n".join("  ".join(line).rstrip() for line in zip(*shown, strict=True))

    __repr__ = __str__

    def to_frame(self) -> Any:
        """The table as a pandas data frame, indexed by name."""
        pandas = _pandas()
        frame = pandas.DataFrame(self.rows, columns=Row._fields).set_index("name")
        return frame.drop(columns="values") if not any(r.values for r in self.rows) else frame


def summarise(posterior: Posterior, names: Sequence[str] | None = None) -> Summary:
    """Mean, standard deviation, quantiles and quality of every scalar.

    Args:
        posterior: of a fit.
        names: sites to show; all latents, params and deterministic sites when left out.

    Raises:
        DataError: the posterior has no such site.
    """
    wanted = (names,) if isinstance(names, str) else names
    shown = sites(posterior) if wanted is None else wanted
    return Summary(tuple(row for name in shown for row in _rows(posterior, name)))


def headline(posterior: Posterior) -> str:
    """What ``print(posterior)`` shows: the start of the summary, and how far to trust it."""
    total = {n: _count(posterior, n) for n in sites(posterior)}
    deterministics = posterior.graph.deterministics
    if sum(total.values()) > _FEW_NUMBERS:
        shown = {n: c for n, c in total.items() if n not in deterministics}
    else:
        shown = total
    short = report.arrays_in_short(posterior)  # weights of layers: a line for each array
    shown = {n: c for n, c in shown.items() if n not in short}
    rows = [row for n, c in _shares(shown).items() for row in _rows(posterior, n, c)]
    rest = sum(total.values()) - len(rows) - sum(total[n] for n in short)
    lines = [str(Summary(tuple(rows)))] if rows or not short else []
    lines += [f"... and {rest} more: posterior.summary()"] if rest else []
    lines += [report.table(report.lines(posterior, short))] if short else []
    lines += ["", _run_line(posterior, total), *_quality_line(posterior)]
    lines += [line for line in [report.facts(posterior)] if short and line]
    verdict = posterior.diagnostics.verdict
    lines.append(f"verdict: {'good' if verdict.startswith('good') else verdict}")
    lines += [f"warning: {text}" for text in dict.fromkeys(posterior.diagnostics.warnings)]
    lines += [f"data: {text}" for text in dict.fromkeys(posterior.bound.report)]
    return "\n".join(lines)


# ---- sites and the names of their elements ----------------------------------------------------


def sites(posterior: Posterior) -> tuple[str, ...]:
    """Latents and params in the order of the program, then deterministic sites."""
    graph = posterior.graph
    known = {**posterior.marginals, **posterior.params}
    ordered = [n for n in graph.variables if n in known]
    return tuple(dict.fromkeys([*ordered, *known, *graph.deterministics]))


def plates_of(bound: Bound, name: str) -> tuple[str, ...]:
    """Plates of a variable or a deterministic site."""
    graph = bound.graph
    return graph.variables[name].plates if name in graph.variables else graph.factors[name].plates


def element_names(bound: Bound, name: str, shape: Sequence[int]) -> Iterator[str]:
    """``theta[B]`` for each scalar ``[*plates, *event]``: labels, then positions in the event."""
    axes: list[Sequence[Any]] = [bound.labels[p] for p in plates_of(bound, name)]
    axes += [range(size) for size in shape[len(axes) :]]
    for index in itertools.product(*axes):
        yield f"{name}[{', '.join(map(str, index))}]" if index else name


def is_nominal(bound: Bound, name: str) -> bool:
    """Whether a site's values are categories, of which a mean or an order says nothing."""
    variable, factor = bound.graph.variables.get(name), bound.graph.factors.get(name)
    if variable is None or not variable.is_discrete:
        return False
    law = None if factor is None else factor.law
    return variable.index_of is not None or (
        law is not None and isinstance(law.family, Categorical)
    )


def _count(posterior: Posterior, name: str) -> int:
    return math.prod(_shape(posterior, name))


def _shares(sizes: dict[str, int], room: int = _ROWS) -> dict[str, int]:
    """Rows for each site: small sites are shown whole, large ones share what is left."""
    shares: dict[str, int] = {}
    ascending = sorted(list(sizes)[:room], key=lambda n: sizes[n])
    for place, name in enumerate(ascending):
        shares[name] = min(sizes[name], room // (len(ascending) - place))
        room -= shares[name]
    return {n: shares[n] for n in sizes if n in shares}


# ---- rows -------------------------------------------------------------------------------------


def _rows(posterior: Posterior, name: str, most: int | None = None) -> list[Row]:
    whole = posterior.marginal(name)
    shape = _shape(posterior, name)
    marginal = whole if most is None else mg.first(whole, most)
    centre = mg.mean(marginal)
    if is_nominal(posterior.bound, name):
        numbers = [torch.full_like(centre, torch.nan)] * 5
    else:
        levels = torch.tensor(_LEVELS, dtype=centre.dtype, device=centre.device)
        numbers = [centre, mg.entry_sd(marginal), *mg.quantile(marginal, levels)]
    quality = posterior.diagnostics
    numbers += [_per_scalar(table.get(name), shape) for table in (quality.ess, quality.pareto_k)]
    cells = zip(*(t.reshape(-1)[:most].tolist() for t in numbers), strict=True)
    texts = _values(posterior, name, marginal, shape, most)
    names = element_names(posterior.bound, name, shape)
    return [Row._make((name, n, *c, v)) for n, c, v in zip(names, cells, texts, strict=False)]


def _shape(posterior: Posterior, name: str) -> tuple[int, ...]:
    """``[*plates, *event]`` of a site."""
    bound = posterior.bound
    if name in bound.graph.variables:
        return bound.shape(bound.graph.variables[name])
    factor = bound.graph.factors[name]
    event = bound.graph.nodes[factor.value.id].event_shape
    return (*(bound.size(p) for p in factor.plates), *event)


def _per_scalar(values: Tensor | None, shape: Sequence[int]) -> Tensor:
    """One number a scalar from one number an element: an event shares what its element has."""
    values = torch.full((), torch.nan) if values is None else torch.as_tensor(values)
    return values.reshape((*values.shape, *(1,) * (len(shape) - values.ndim))).expand(tuple(shape))


def _values(
    posterior: Posterior, name: str, marginal: Marginal, shape: Sequence[int], most: int | None
) -> Iterator[str]:
    variable = posterior.graph.variables.get(name)
    count = None if variable is None or isinstance(marginal, mg.Gaussian) else variable.cardinality
    if count is None:
        return itertools.repeat("")
    table = mg.probs(marginal, count)
    if table.shape[:-1] != shape:
        return itertools.repeat("")
    index_of = variable.index_of  # type: ignore[union-attr]
    labels = posterior.bound.labels[index_of] if index_of else range(table.shape[-1])
    likely, which = table.reshape(-1, table.shape[-1])[:most].topk(min(3, table.shape[-1]))
    return map(lambda p, v: _likeliest(p, v, labels), likely.tolist(), which.tolist())


def _likeliest(probs: Sequence[float], values: Sequence[int], labels: Sequence[Any]) -> str:
    pairs = [f"{labels[v]}: {p:.2f}" for p, v in zip(probs, values, strict=True) if p >= 0.005]
    more = len(labels) > len(values) and sum(probs) < 0.995
    return ", ".join(pairs) + (", ..." if more else "")


# ---- text -------------------------------------------------------------------------------------


def _numbers(rows: Sequence[Row], head: str) -> Iterator[str]:
    """Cells of a column, with the decimals of a site: two digits of its least deviation."""
    for _, group in itertools.groupby(rows, key=lambda r: r.site):
        members = list(group)
        spreads = [r.sd for r in members if r.sd > 0 and math.isfinite(r.sd)]
        size = min(spreads) if spreads else max(abs(r.mean) for r in members) / 100
        decimals = 1 - math.floor(math.log10(size)) if size > 0 and math.isfinite(size) else 0
        yield from (_round(getattr(r, head), decimals) for r in members)


def _round(x: float, decimals: int) -> str:
    if math.isnan(x):
        return ""
    if math.isinf(x) or abs(x) >= 1e6 or decimals > 6:
        return f"{x:.3g}"
    text = f"{x:.{max(decimals, 0)}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def _aligned(head: str, cells: Sequence[str]) -> list[str]:
    """A column of equal width: names and texts to the left, numbers by their decimal points."""
    if head in ("", "probabilities"):
        return [text.ljust(max(map(len, (head, *cells)))) for text in (head, *cells)]
    parts = [cell.partition(".") for cell in cells]
    left, right = max(len(a) for a, _, _ in parts), max(len(b + c) for _, b, c in parts)
    body = [a.rjust(left) + (b + c).ljust(right) for a, b, c in parts]
    width = max(len(head), left + right)
    return [text.rjust(width) for text in (head, *body)]


def _run_line(posterior: Posterior, sizes: dict[str, int]) -> str:
    quality, bound = posterior.diagnostics, posterior.bound
    fitted = [n for n in sizes if n in posterior.marginals or n in posterior.params]
    numbers = sum(sizes[n] for n in fitted)
    parts = [f"{posterior.method} on {_plural(len(fitted), 'site')} ({_plural(numbers, 'number')})"]
    if quality.iterations > 1:
        parts.append(f"{quality.iterations} iterations")
    if quality.iterations > 1 or not quality.converged:
        parts.append("converged" if quality.converged else "not converged")
    dtype = str(bound.dtype).removeprefix("torch.")
    return ", ".join([*parts, f"{quality.seconds:.1f} s on {bound.device} {dtype}"])


def _quality_line(posterior: Posterior) -> list[str]:
    """What is known of the quality, in one line, or no line."""
    quality, facts = posterior.diagnostics, []
    if posterior.log_evidence is not None:
        facts.append(f"log evidence {posterior.log_evidence}")
    tails = {n: k for n, v in quality.pareto_k.items() if (k := _extreme(v, max)) is not None}
    if tails:
        site, k = max(tails.items(), key=lambda item: item[1])
        word = "good" if k < K_GOOD else "usable" if k < K_USABLE else "too high"
        facts.append(f"Pareto k {k:.2f} ({word}{'' if word == 'good' else f', {site}'})")
    sizes = {n: e for n, v in quality.ess.items() if (e := _extreme(v, min)) is not None}
    if sizes:
        site, ess = min(sizes.items(), key=lambda item: item[1])
        facts.append(f"smallest ESS {_round(ess, 1 if ess < 10 else 0)} ({site})")
    return ["; ".join(facts)] if facts else []


def _extreme(values: Tensor, pick: Any) -> float | None:
    known = [v for v in torch.as_tensor(values).reshape(-1).tolist() if not math.isnan(v)]
    return pick(known) if known else None


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise UnsupportedError(
            "to_frame needs pandas, which the extras 'arviz' and 'tutorials' bring: pip install "
            "factorppl[arviz]. "
            "str(posterior.summary()) and posterior.summary().rows need nothing."
        ) from None
    return pandas
