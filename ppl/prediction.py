"""Predict with a posterior: new data and new groups; score held-out and left-out entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ppl import marginals as mg
from ppl.binding import Bound, positions_of
from ppl.diagnostics import LooResult, loo
from ppl.distributions import Distribution
from ppl.errors import DataError, ModelError, UnsupportedError, nearest
from ppl.graph import Variable
from ppl.lower import Compiler, map_name
from ppl.nn.structure import buffers
from ppl.portions import Portions, draws_of, is_large, layer_arrays, portions
from ppl.posterior import Posterior
from ppl.predictive import Mixed, beside, joined, mixed
from ppl.simulation import DRAW, Known, simulate
from ppl.streams import Streams

T = TypeVar("T")
_CHUNK = 2**24  # numbers in the largest array of one chunk of draws


@dataclass(frozen=True, eq=False)
class Prediction:
    """Draws of sites: ``draws[name]`` is ``[n, *plates, *event]``; ``labels`` names the elements of each plate.

    Of an observed site means, standard deviations, probabilities and entropies are those of the even mixture of its laws
    under the draws, where its family has them in closed form; of other sites they are those of the draws. Quantiles are
    always those of the draws.
    """

    draws: Mapping[str, Tensor]
    bound: Bound
    laws: Mapping[str, Mixed] = field(default_factory=dict)

    @property
    def labels(self) -> Mapping[str, Sequence[Any]]:
        """Names of the elements of each plate, in the order of the tensors."""
        return self.bound.labels

    def mean(self, name: str) -> Tensor:
        """Predictive mean ``[*plates, *event]``."""
        draws, law = self._site(name), self.laws.get(name)
        return draws.mean(0) if law is None or law.mean is None else law.mean.to(draws)

    def sd(self, name: str) -> Tensor:
        """Predictive standard deviation."""
        draws, law = self._site(name), self.laws.get(name)
        if law is None or law.variance is None:
            return draws.std(0, correction=0)
        return law.variance.sqrt().to(draws)

    def quantile(self, name: str, q: float | Sequence[float]) -> Tensor:
        """Predictive quantiles; the levels of a sequence come first."""
        draws = self._site(name)
        levels = torch.as_tensor(q, dtype=draws.dtype, device=draws.device)
        # torch.quantile refuses arrays of more than 2**24 numbers.
        columns = draws.reshape(len(draws), -1).split(max(1, _CHUNK // len(draws)), 1)
        found = torch.cat([torch.quantile(c, levels, dim=0) for c in columns], -1)
        return found.reshape(*levels.shape, *draws.shape[1:])

    def interval(self, name: str, mass: float = 0.9) -> Tensor:
        """Central predictive interval ``[2, *plates, *event]``."""
        return self.quantile(name, [(1 - mass) / 2, (1 + mass) / 2])

    def probs(self, name: str) -> Tensor:
        """Predictive probabilities ``[*plates, V]`` of a discrete site's values.

        The mean of the probabilities that its law has under each draw; where the law is none of finitely many values
        known by number, shares of the draws.
        """
        draws = self._site(name)
        variable = self.bound.graph.variables.get(name)
        if variable is None or not variable.is_discrete:
            raise DataError(f"probs('{name}'): the site is continuous. Use mean, sd or quantile.")
        law = self.laws.get(name)
        if law is not None and law.table is not None:
            return law.table.to(draws)
        weights = torch.full(draws.shape, 1 / len(draws), dtype=draws.dtype, device=draws.device)
        return mg.probs(mg.Weighted(draws, weights), variable.cardinality)

    def entropy(self, name: str) -> Tensor:
        """Entropy ``[*plates]`` of the predictive probabilities of a discrete site, in nats."""
        return torch.special.entr(self.probs(name)).sum(-1)

    def mutual_information(self, name: str) -> Tensor:
        """What a value would tell of the latents ``[*plates]``, in nats: the part of the entropy that data would remove.

        :meth:`entropy` less the mean entropy of the law under a draw. Near zero where the draws agree, however uncertain
        each of them is.

        Raises:
            DataError: the site is continuous, or its law has no table of probabilities.
        """
        whole, law = self.entropy(name), self.laws.get(name)
        if law is None or law.entropy is None:
            raise DataError(
                f"mutual_information('{name}'): it needs the probabilities under each draw, which are known for observed "
                "sites of finitely many values (Categorical, Bernoulli, Binomial, ...). Use entropy."
            )
        return (whole - law.entropy.to(whole)).clamp(min=0)

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


class Laws:
    """Takes in the laws of observed sites while they are drawn; ``found`` has their mixtures."""

    def __init__(self) -> None:
        self.found: dict[str, Mixed] = {}

    def __call__(self, variable: Variable, law: Distribution, shape: tuple[int, ...]) -> None:
        """Average the laws of one site."""
        self.found[variable.name] = mixed(variable, law, shape)


def predict(
    posterior: Posterior,
    data: Any = None,
    *,
    n: int | None = None,
    sites: Sequence[str] | None = None,
    seed: int | None = None,
    sizes: Mapping[str, int] | None = None,
    labels: Mapping[str, Sequence[Any]] | None = None,
) -> Prediction:
    """Draw observed sites anew, from the posterior predictive distribution.

    Elements of plates are matched to those of the fit by label (by position where there are no labels). Latents of
    elements that the fit has not seen are drawn from their law given the posterior draw of its parents. The new data
    needs covariates and memberships only; observed sites that it holds are not looked at.

    A network is evaluated in portions of draws and of data, so that memory grows with what is returned only, see
    :mod:`ppl.portions`. Large ones are those of more than 10 000 weights.

    Args:
        posterior: of the fit.
        data: covariates and memberships; those of the fit when left out.
        n: number of draws; 1000 by default, 30 of a large network.
        sites: which sites to return; observed, latent and deterministic ones by default, of a large network without the
            weights of its layers.
        seed: of the draws.
        sizes: of plates that no new array shows.
        labels: of plates.
    """
    streams = Streams(posterior.seed + 2 if seed is None else seed)
    bound = _rebound(posterior, data, sizes, labels)
    count = draws_of(bound, n)
    names = _wanted(bound, sites)
    drawn, laws = _drawn(posterior, bound, count, streams, names if is_large(bound) else None)
    return Prediction({name: drawn[name] for name in names}, bound, laws)


def _wanted(bound: Bound, sites: Sequence[str] | None) -> list[str]:
    """Sites to return, in the order of the program."""
    known = [f.name for f in bound.graph.factors.values() if f.kind != "potential"]
    if sites is None:
        left_out = set(layer_arrays(bound.graph)) if is_large(bound) else set()
        return [name for name in known if name not in left_out]
    unknown = [s for s in sites if s not in known]
    if unknown:
        raise DataError(f"predict: there is no site '{unknown[0]}'.{nearest(unknown[0], known)}")
    return list(sites)


def _drawn(
    posterior: Posterior, bound: Bound, n: int, streams: Streams, sites: Sequence[str] | None
) -> tuple[dict[str, Tensor], dict[str, Mixed]]:
    """Draws of sites and mixtures of the laws of observed ones, portion by portion."""
    cut = portions(bound, n)
    parts = cut.bounds(bound)
    draws: list[dict[str, Tensor]] = []
    laws: list[dict[str, Mixed]] = []
    make = partial(known_draws, posterior, bound)
    for i, known in enumerate(_made(make, bound, cut, streams)):
        size = cut.draws[i]
        watches = [Laws() for _ in parts]
        found = []
        for j, (part, watch) in enumerate(zip(parts, watches, strict=True)):
            own = Streams(_seed(streams, i, j), bound.device)  # no noise is used twice
            found.append(simulate(part, size, own, known=known, sites=sites, watch=watch))
        axes = {name: cut.along(plates_of(bound, name)) for name in found[0]}
        draws.append({k: _beside([f[k] for f in found], axis) for k, axis in axes.items()})
        laws.append({k: beside([w.found[k] for w in watches], axes[k]) for k in watches[0].found})
    whole = {
        k: torch.cat([d[k] for d in draws]) if len(draws) > 1 else draws[0][k] for k in draws[0]
    }
    return whole, {k: joined([part[k] for part in laws]) for k in laws[0]}


def _made(
    make: Callable[[int, int], dict[str, T]], bound: Bound, cut: Portions, streams: Streams
) -> Iterator[dict[str, T]]:
    """The draws of each portion: all are made at once and dealt out, unless they are large.

    Args:
        make: draws of latents, from their number and a seed.
        bound: the data.
        cut: the portions.
        streams: for the seeds.
    """
    if is_large(bound) or len(cut.draws) == 1:
        yield from (make(size, _seed(streams, i)) for i, size in enumerate(cut.draws))
        return
    whole, start = make(sum(cut.draws), streams.seed), 0
    for size in cut.draws:
        yield {k: _dealt(v, start, size) for k, v in whole.items()}
        start += size


def _dealt(draws: Any, start: int, size: int) -> Any:
    if isinstance(draws, Known):
        return Known(draws.values.narrow(0, start, size), draws.mask)
    return draws.narrow(0, start, size)


def _seed(streams: Streams, draws: int, rows: int = 0) -> int:
    """Seed of a portion; that of the first is the seed of the call."""
    return streams.seed if draws == rows == 0 else streams.child(f"portion {draws} {rows}").seed


def _beside(parts: Sequence[Tensor], axis: int | None) -> Tensor:
    return parts[0] if axis is None or len(parts) == 1 else torch.cat(list(parts), 1 + axis)


def known_draws(posterior: Posterior, bound: Bound, n: int, seed: int) -> dict[str, Known]:
    """Posterior draws of latents and params, laid out for the elements of ``bound``."""
    draws = posterior.latent_draws(n, seed=seed)
    return {
        name: _matched(posterior.bound, bound, name, draw)
        for name, draw in draws.items()
        if _is_site(bound, name)
    }


def log_likelihood(
    posterior: Posterior,
    data: Any = None,
    *,
    n: int | None = None,
    seed: int | None = None,
    **binding: Any,
) -> dict[str, Tensor]:
    """Log-likelihood of every observed entry under joint draws, in nats.

    Args:
        posterior: of the fit.
        data: held-out data with the observed sites; that of the fit when left out. New groups are drawn from their law.
        n: number of draws; 1000 by default, 30 of a large network, as in :func:`predict`.
        seed: of the draws.
        **binding: ``sizes`` and ``labels`` as in :func:`predict`.

    Returns:
        For each observed site ``[n, *plates]``; missing entries are 0.
    """
    streams = Streams(posterior.seed + 1 if seed is None else seed)
    bound = _rebound(posterior, data, binding.get("sizes"), binding.get("labels"), observed=True)
    cut = portions(bound, draws_of(bound, n))
    parts = cut.bounds(bound)
    found: list[dict[str, Tensor]] = []
    make = partial(_latents, posterior, bound, data is not None)
    for size, draws in zip(cut.draws, _made(make, bound, cut, streams), strict=True):
        each = [_densities(part, draws, size) for part in parts]
        axes = {k: cut.along(plates_of(bound, k)) for k in each[0]}
        found.append({k: _beside([e[k] for e in each], axes[k]) for k in each[0]})
    return {name: torch.cat([f[name] for f in found]) for name in found[0]}


def _latents(
    posterior: Posterior, bound: Bound, is_new: bool, n: int, seed: int
) -> dict[str, Tensor]:
    """Draws of all latents of the elements of ``bound``; those that the fit has not seen come from their law."""
    if not is_new:
        return posterior.latent_draws(n, seed=seed)
    known = known_draws(posterior, bound, n, seed)
    latents = [v.name for v in bound.graph.latents]
    drawn = simulate(bound, n, Streams(seed, bound.device), known=known, sites=latents)
    return {name: entry.values for name, entry in known.items()} | drawn


def _densities(bound: Bound, draws: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
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
    new = posterior.model.bind(
        data, sizes=sizes, labels=labels, need_observed=observed, dtype=old.dtype, device=old.device
    )
    # The statistics of batch norms belong to the fitted network, unless the new data say otherwise.
    kept = {n for pair in buffers(new.graph) for n in pair if n and n not in new.columns}
    return replace(new, values={**new.values, **{n: old.values[n] for n in kept}})


def _is_site(bound: Bound, name: str) -> bool:
    return name in bound.graph.variables and name not in bound.values


def plates_of(bound: Bound, name: str) -> tuple[str, ...]:
    """Plates of a variable or a deterministic site."""
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
