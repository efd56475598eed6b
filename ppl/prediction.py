"""Predict with a posterior: new data, new groups, the future of a chain; score held-out and left-out entries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl import marginals as mg
from ppl.binding import Bound, positions_of
from ppl.diagnostics import LooResult, loo
from ppl.errors import DataError, ModelError, UnsupportedError, nearest
from ppl.lower import Compiler, map_name, variables_of
from ppl.posterior import Posterior
from ppl.simulation import DRAW, Known, simulate
from ppl.streams import Streams

_CHUNK = 2**24  # numbers in the largest array of one chunk of draws


@dataclass(frozen=True, eq=False)
class Prediction:
    """Draws of sites: ``draws[name]`` is ``[n, *plates, *event]``; ``labels`` names the elements of each plate."""

    draws: Mapping[str, Tensor]
    bound: Bound

    @property
    def labels(self) -> Mapping[str, Sequence[Any]]:
        """Names of the elements of each plate, in the order of the tensors."""
        return self.bound.labels

    def mean(self, name: str) -> Tensor:
        """Predictive mean ``[*plates, *event]``."""
        return self._site(name).mean(0)

    def sd(self, name: str) -> Tensor:
        """Predictive standard deviation."""
        return self._site(name).std(0, correction=0)

    def quantile(self, name: str, q: float | Sequence[float]) -> Tensor:
        """Predictive quantiles; the levels of a sequence come first."""
        draws = self._site(name)
        return torch.quantile(
            draws, torch.as_tensor(q, dtype=draws.dtype, device=draws.device), dim=0
        )

    def interval(self, name: str, mass: float = 0.9) -> Tensor:
        """Central predictive interval ``[2, *plates, *event]``."""
        return self.quantile(name, [(1 - mass) / 2, (1 + mass) / 2])

    def probs(self, name: str) -> Tensor:
        """Predictive probabilities ``[*plates, V]`` of a discrete site's values."""
        draws = self._site(name)
        weights = torch.full(draws.shape, 1 / len(draws), dtype=draws.dtype, device=draws.device)
        variable = self.bound.graph.variables[name]
        if not variable.is_discrete:
            raise DataError(f"probs('{name}'): the site is continuous. Use mean, sd or quantile.")
        return mg.probs(mg.Weighted(draws, weights), variable.cardinality)

    def samples(self) -> dict[str, Tensor]:
        """All draws."""
        return dict(self.draws)

    def _site(self, name: str) -> Tensor:
        if name not in self.draws:
            raise DataError(
                f"nothing was predicted for '{name}'.{nearest(name, self.draws)} Sites: {', '.join(self.draws)}."
            )
        return self.draws[name].to(self.bound.dtype)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in self.draws.items())
        return f"Prediction({shapes})"


def predict(
    posterior: Posterior,
    data: Any = None,
    *,
    n: int = 1000,
    sites: Sequence[str] | None = None,
    seed: int | None = None,
    sizes: Mapping[str, int] | None = None,
    labels: Mapping[str, Sequence[Any]] | None = None,
) -> Prediction:
    """Draw observed sites anew, from the posterior predictive distribution.

    Elements of plates are matched to those of the fit by label (by position where there are no labels). Latents of
    elements that the fit has not seen are drawn from their law given the posterior draw of its parents. The new data
    needs covariates and memberships only; observed sites that it holds are not looked at.

    Args:
        posterior: of the fit.
        data: covariates and memberships; those of the fit when left out.
        n: number of draws.
        sites: which sites to return; observed, latent and deterministic ones by default.
        seed: of the draws.
        sizes: of plates that no new array shows.
        labels: of plates.
    """
    streams = Streams(posterior.seed + 2 if seed is None else seed)
    draws = posterior.samples(n, seed=streams.seed)
    bound = _rebound(posterior, data, sizes, labels)
    known = {
        name: _matched(posterior.bound, bound, name, draw)
        for name, draw in draws.items()
        if _is_site(bound, name)
    }
    drawn = simulate(bound, n, Streams(streams.seed, bound.device), known=known)
    if sites is not None:
        unknown = [s for s in sites if s not in drawn]
        if unknown:
            raise DataError(
                f"predict: there is no site '{unknown[0]}'.{nearest(unknown[0], drawn)}"
            )
        drawn = {name: drawn[name] for name in sites}
    return Prediction(drawn, bound)


def forecast(
    posterior: Posterior,
    data: Mapping[str, Any] | None = None,
    *,
    n: int = 1000,
    seed: int | None = None,
    **steps: int,
) -> Prediction:
    """Draw the next elements of an ordered plate, from the last state of each joint draw on.

    Args:
        posterior: of a model with a Markov latent in that plate.
        data: what is known of the new elements: covariates along the plate, with as many elements there as steps, and
            labels under the plate's name.
        n: number of draws.
        seed: of the draws.
        **steps: name of the plate and how many elements to add: ``year=10``.

    Returns:
        Draws for the new elements only.

    Raises:
        DataError: no such ordered plate, or a covariate of the new elements is missing or has another shape.
    """
    plate, count = _forecast_plate(posterior, steps)
    bound = _extended(posterior.bound, plate, count, dict(data or {}))
    streams = Streams(posterior.seed + 3 if seed is None else seed)
    draws = posterior.samples(n, seed=streams.seed)
    known = {
        name: _matched(posterior.bound, bound, name, d)
        for name, d in draws.items()
        if _is_site(bound, name)
    }
    drawn = simulate(bound, n, Streams(streams.seed, bound.device), known=known)
    start = posterior.bound.size(plate)
    future = {}
    for name, draw in drawn.items():
        plates = _plates_of(bound, name)
        if plate in plates:
            future[name] = draw.narrow(1 + plates.index(plate), start, count)
    graph = replace(
        bound.graph,
        plates={**bound.graph.plates, plate: replace(bound.graph.plates[plate], size=count)},
    )
    labels = {**bound.labels, plate: list(bound.labels[plate])[start:]}
    return Prediction(future, replace(bound, graph=graph, labels=labels))


def log_likelihood(
    posterior: Posterior,
    data: Any = None,
    *,
    n: int = 1000,
    seed: int | None = None,
    **binding: Any,
) -> dict[str, Tensor]:
    """Log-likelihood of every observed entry under joint draws, in nats.

    Args:
        posterior: of the fit.
        data: held-out data with the observed sites; that of the fit when left out. New groups are drawn from their law.
        n: number of draws.
        seed: of the draws.
        **binding: ``sizes`` and ``labels`` as in :func:`predict`.

    Returns:
        For each observed site ``[n, *plates]``; missing entries are 0.
    """
    streams = Streams(posterior.seed + 1 if seed is None else seed)
    draws = posterior.samples(n, seed=streams.seed)
    bound = _rebound(posterior, data, binding.get("sizes"), binding.get("labels"), observed=True)
    if data is not None:
        known = {
            name: _matched(posterior.bound, bound, name, d)
            for name, d in draws.items()
            if _is_site(bound, name)
        }
        latents = [v.name for v in bound.graph.latents]
        draws |= simulate(bound, n, Streams(streams.seed, bound.device), known=known, sites=latents)
    parts = [_entry_densities(bound, chunk) for chunk in _chunks(bound, draws, n)]
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def leave_one_out(posterior: Posterior, *, n: int = 1000, seed: int | None = None) -> LooResult:
    """PSIS-LOO over all observed entries that are present. Source: [Vehtari2017]."""
    terms = []
    for name, values in log_likelihood(posterior, n=n, seed=seed).items():
        mask = posterior.bound.masks.get(name)
        flat = values.reshape(n, -1)
        if mask is not None:
            keep = mask.reshape(*values.shape[1:], -1).any(-1).reshape(-1)
            flat = flat[:, keep]
        terms.append(flat)
    if not terms:
        raise ModelError(
            "loo: the model has no observed site, and only those are left out. "
            "Write observe(name, law) in place of factor(name, law, at=value)."
        )
    return loo(torch.cat(terms, 1))


def _entry_densities(bound: Bound, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    graph = bound.graph
    axes = {
        v.name: (DRAW, *v.plates) if v.name in draws else v.plates for v in graph.variables.values()
    }
    compiler = Compiler(
        graph,
        axes,
        (DRAW, *graph.plates),
        dtype=bound.dtype,
        device=bound.device,
        masks=tuple(bound.masks),
    )
    sites = [
        f
        for f in graph.densities
        if f.kind == "conditional" and graph.variables[f.name].role == "observed"
    ]
    for site in sites:
        if site.chain is not None:
            raise UnsupportedError(
                f"'{site.name}' is an observed Markov chain: its entries are not independent given the latents, so there "
                "is no log-likelihood for each. Observe a latent chain through a law of its own."
            )
    # Exactly the site's plates, in its own order: a result that does not vary over one is expanded below.
    outputs = [compiler.align(compiler.density(f), _sorted_axes(graph, f.plates)) for f in sites]
    lowered = compiler.finish(outputs)
    arrays = {**bound.dense, **draws, **{map_name(*k): m for k, m in bound.maps.items()}}
    arrays |= {name + "@mask": mask for name, mask in bound.masks.items()}
    n = len(next(iter(draws.values())))
    out = {}
    for site, value in zip(sites, lowered({k: arrays[k] for k in lowered.inputs}), strict=True):
        have = _sorted_axes(graph, site.plates)
        full = value.expand(n, *(bound.size(p) for p in have[1:]))
        out[site.name] = full.permute(0, *(have.index(p) for p in site.plates))
    return out


def _sorted_axes(graph: Any, plates: Sequence[str]) -> tuple[str, ...]:
    return (DRAW, *(p for p in graph.plates if p in plates))


def _chunks(bound: Bound, draws: Mapping[str, Tensor], n: int) -> Iterator[dict[str, Tensor]]:
    largest = max((v.numel() for v in bound.values.values()), default=1)
    rows = max(1, min(n, _CHUNK // max(largest, 1)))
    for start in range(0, n, rows):
        yield {name: draw[start : start + rows] for name, draw in draws.items()}


def _rebound(
    posterior: Posterior, data: Any, sizes: Any, labels: Any, *, observed: bool = False
) -> Bound:
    if data is None and sizes is None and labels is None:
        return posterior.bound
    if posterior.model is None:
        raise DataError(
            "this posterior does not know its model, so new data cannot be bound. Load it with load(file, model)."
        )
    old = posterior.bound
    return posterior.model.bind(
        data, sizes=sizes, labels=labels, need_observed=observed, dtype=old.dtype, device=old.device
    )


def _is_site(bound: Bound, name: str) -> bool:
    return name in bound.graph.variables and name not in bound.values


def _plates_of(bound: Bound, name: str) -> tuple[str, ...]:
    graph = bound.graph
    return graph.variables[name].plates if name in graph.variables else graph.factors[name].plates


def _matched(old: Bound, new: Bound, name: str, draw: Tensor) -> Known:
    """Posterior draws laid out for the new elements; the mask marks those that the fit has seen."""
    plates = new.graph.variables[name].plates
    if old is new or all(old.labels[p] == new.labels[p] for p in plates):
        return Known(draw)
    mask = torch.ones([new.size(p) for p in plates], dtype=torch.bool, device=draw.device)
    for at, plate in enumerate(plates):
        rows = positions_of(old.labels[plate], new.labels[plate]).to(draw.device)
        draw = draw.index_select(at + 1, rows.clamp(min=0))
        seen = rows >= 0
        mask &= seen.reshape([-1 if i == at else 1 for i in range(len(plates))])
    return Known(draw, mask)


def _forecast_plate(posterior: Posterior, steps: Mapping[str, int]) -> tuple[str, int]:
    plates = posterior.bound.graph.plates
    if len(steps) != 1:
        raise DataError(
            f"forecast: expected one ordered plate and a number of steps, such as forecast(year=10), got {dict(steps)}."
        )
    ((plate, count),) = steps.items()
    if plate not in plates or not plates[plate].ordered:
        ordered = [p for p in plates if plates[p].ordered]
        raise DataError(
            f"forecast: '{plate}' is not an ordered plate.{nearest(plate, ordered)} Ordered: {ordered or 'none'}."
        )
    if count < 1:
        raise DataError(f"forecast({plate}={count}): expected at least one step.")
    return plate, count


def _extended(bound: Bound, plate: str, count: int, future: Mapping[str, Any]) -> Bound:
    """The data with ``count`` more elements of ``plate``."""
    graph = bound.graph
    below = [p.name for p in graph.plates.values() if plate in p.parents]
    if below:
        raise DataError(
            f"forecast: plate '{below[0]}' lies within '{plate}'. Use predict with new data for both."
        )
    size = bound.size(plate)
    plates = {**graph.plates, plate: replace(graph.plates[plate], size=size + count)}
    values = {**bound.values, **_continued_covariates(bound, plate, count, future)}
    new = future.get(plate)
    if new is not None and len(new) != count:
        raise DataError(
            f"forecast({plate}={count}): '{plate}' has {len(new)} labels. Give {count}."
        )
    own = bound.labels[plate]
    continued = _continued(own, count) if new is None else [*own, *list(new)]
    maps = {key: m for key, m in bound.maps.items() if key[0] != plate}
    longer = replace(graph, plates=plates)
    labels = {**bound.labels, plate: continued}
    return replace(bound, graph=longer, values=values, labels=labels, maps=maps)


def _continued_covariates(
    bound: Bound, plate: str, count: int, future: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Covariates along the plate with those of the new elements behind them."""
    graph = bound.graph
    along = {v.name: v for v in graph.role("given") if plate in v.plates}
    stray = [name for name in future if name not in along and name != plate]
    if stray:
        raise DataError(
            f"forecast({plate}={count}): '{stray[0]}' is no covariate along {plate}.{nearest(stray[0], along)} "
            f"Covariates: {', '.join(along) or 'none'}."
        )
    reads = {n for f in graph.factors.values() for n in variables_of(graph, f)}
    lacking = [name for name in along if name in reads and name not in future]
    if lacking:
        raise DataError(
            f"forecast({plate}={count}): the model reads '{lacking[0]}' along {plate}, whose future is not known. "
            f"Pass it for the {count} new elements: forecast({{'{lacking[0]}': ...}}, {plate}={count})."
        )
    return {name: _with_future(bound, along[name], plate, count, future[name]) for name in along
            if name in future}  # fmt: skip


def _with_future(bound: Bound, variable: Any, plate: str, count: int, new: Any) -> Tensor:
    known = bound.values[variable.name]
    at = variable.plates.index(plate)
    if variable.index_of is not None:
        wanted = list(np.asarray(new).reshape(-1).tolist())
        rows = positions_of(bound.labels[variable.index_of], wanted)
        if bool((rows < 0).any()):
            unknown = wanted[int((rows < 0).nonzero()[0])]
            raise DataError(f"forecast: '{variable.name}': {variable.index_of} has no {unknown!r}.")
        tensor = rows.reshape(np.shape(new)).to(known)
    else:
        tensor = torch.as_tensor(np.asarray(new)).to(known)
    shape = [*known.shape[:at], count, *known.shape[at + 1 :]]
    if list(tensor.shape) != shape:
        raise DataError(
            f"forecast({plate}={count}): '{variable.name}': expected shape {shape} for the new elements, "
            f"got {list(tensor.shape)}."
        )
    return torch.cat([known, tensor], at)


def _continued(labels: Sequence[Any], count: int) -> Sequence[Any]:
    known = list(labels)
    if all(isinstance(v, int) for v in known):
        step = known[-1] - known[-2] if len(known) > 1 else 1
        return known + [known[-1] + step * (i + 1) for i in range(count)]
    return known + [f"+{i + 1}" for i in range(count)]
