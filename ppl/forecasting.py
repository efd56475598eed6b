"""The future of a chain: draws of the next elements of an ordered plate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl.binding import Bound, positions_of
from ppl.errors import DataError, nearest
from ppl.lower import variables_of
from ppl.posterior import Posterior
from ppl.prediction import Laws, Prediction, known_draws, plates_of
from ppl.simulation import simulate
from ppl.streams import Streams


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
    known = known_draws(posterior, bound, n, streams.seed)
    laws = Laws()
    drawn = simulate(bound, n, Streams(streams.seed, bound.device), known=known, watch=laws)
    start = posterior.bound.size(plate)
    at = {n: plates_of(bound, n).index(plate) for n in drawn if plate in plates_of(bound, n)}
    future = {name: drawn[name].narrow(1 + axis, start, count) for name, axis in at.items()}
    mixtures = {n: m.narrow(at[n], start, count) for n, m in laws.found.items() if n in at}
    graph = replace(
        bound.graph,
        plates={**bound.graph.plates, plate: replace(bound.graph.plates[plate], size=count)},
    )
    labels = {**bound.labels, plate: list(bound.labels[plate])[start:]}
    return Prediction(future, replace(bound, graph=graph, labels=labels), mixtures)


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
    if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
        raise DataError(
            f"forecast({plate}={count!r}): expected a whole number of steps, at least 1."
        )
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
    if all(isinstance(v, Integral) for v in known):  # of NumPy, too
        step = known[-1] - known[-2] if len(known) > 1 else 1
        return known + [known[-1] + step * (i + 1) for i in range(count)]
    return known + [f"+{i + 1}" for i in range(count)]


__all__ = ["forecast"]
