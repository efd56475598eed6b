"""Label switching: what it does to a posterior, and draws whose components are numbered alike.

A posterior of exchangeable components (:mod:`ppl.symmetry`) has one copy for each numbering. Moments of a component
mean something only within one of them, so the numbering of each draw is chosen here: in the order of one site, or so
that the components of all draws are as alike as they can be.

Source: [Stephens2000], section 4: the numbering that makes the draws most probable under one Normal for each number of
each component, alternating between the Normals and an assignment problem for each draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ppl import marginals as mg
from ppl.diagnostics import Diagnostics
from ppl.errors import DataError, nearest
from ppl.save import Pool
from ppl.symmetry import Exchange, exchanges, may_exchange

if TYPE_CHECKING:
    from ppl.posterior import Posterior

_DRAWS = 200  # that the report looks at
_NUMBERS = 4_000_000  # in these draws, at most
_ROUNDS = 20
_RARE = 0.02  # share of draws below which a numbering does not count as visited
_APART = 1.0  # posterior standard deviations between means of components that differ


def relabelled(
    posterior: Posterior, what: str | None, by: str | None, n: int, seed: int | None
) -> Posterior:
    """See :meth:`ppl.posterior.Posterior.relabelled`."""
    draws = posterior.samples(n, seed=seed)
    exchange = _the_one(what, exchanges(posterior.bound, _point(posterior, draws)))
    order = ordered(exchange, draws, by) if by is not None else matched(exchange, draws)
    draws = exchange.renumbered(draws, order)
    return _from_draws(posterior, exchange, draws)


def report(posterior: Posterior) -> tuple[dict[str, object], tuple[str, ...]]:
    """Notes and warnings for the diagnostics: which labels are arbitrary, and how many numberings were seen."""
    if not may_exchange(posterior.bound):
        return {}, ()
    found = exchanges(posterior.bound, _point(posterior, posterior.samples(1)))
    if not found:
        return {}, ()
    draws = posterior.samples(_draws(posterior))
    notes: dict[str, object] = {}
    warnings = []
    for exchange in found:
        if not exchange.mixes and not _differ(exchange, draws):
            continue
        order = matched(exchange, draws)
        seen = _visited(order)
        warnings.append(_warning(posterior, exchange, seen))
        notes[_key(exchange)] = _seen(posterior, exchange, draws, order, seen)
    return notes, tuple(warnings)


def matched(exchange: Exchange, draws: Mapping[str, Tensor]) -> Tensor:
    """The numbering ``[n, size]`` of each draw that makes the components of all draws most alike.

    >>> centre = torch.tensor([[0.0, 5.0], [5.1, 0.1], [0.2, 5.2], [-0.1, 4.9]])
    >>> matched(Exchange("component", 2, {"centre": (0,)}, ()), {"centre": centre})
    tensor([[0, 1],
            [1, 0],
            [0, 1],
            [0, 1]])
    """
    x = _features(exchange, draws)  # [n, size, F]
    overall = x.flatten(0, 1).std(0, correction=0).clamp(min=1e-12)
    x = x / overall
    centre, spread = x[0], torch.ones_like(x[0])
    order = torch.arange(exchange.size).expand(len(x), -1)
    for round_ in range(_ROUNDS):
        before, order = order, _assigned(x, centre, spread)
        if round_ and torch.equal(before, order):
            break
        here = x.gather(1, order.unsqueeze(-1).expand_as(x))
        centre, spread = here.mean(0), here.std(0, correction=0).clamp(min=1e-3)
    return order


def ordered(exchange: Exchange, draws: Mapping[str, Tensor], by: str) -> Tensor:
    """The numbering ``[n, size]`` in which a site ascends; of a vector, its first entry does.

    Raises:
        DataError: the site has no value for each component.
    """
    if by not in exchange.axes:
        raise DataError(
            f"relabelled(by='{by}'): expected a site with one value for each component.{nearest(by, exchange.axes)} "
            f"Sites: {', '.join(exchange.axes)}."
        )
    only = Exchange(exchange.plate, exchange.size, {by: exchange.axes[by]}, ())
    return _features(only, draws)[..., 0].argsort(-1)


# ---- numbering --------------------------------------------------------------------------------------------------


def _features(exchange: Exchange, draws: Mapping[str, Tensor]) -> Tensor:
    """``[n, size, F]``: all numbers of each component; of a site with two such axes those on the diagonal."""
    parts = []
    for name, axes in exchange.axes.items():
        x = draws[name].detach().cpu().double()
        for axis in axes[:0:-1]:
            x = x.diagonal(dim1=1 + axes[0], dim2=1 + axis).movedim(-1, 1 + axes[0])
        parts.append(x.movedim(1 + axes[0], 1).flatten(2) if x.ndim > 2 else x.unsqueeze(-1))
    return torch.cat(parts, -1)


def _assigned(x: Tensor, centre: Tensor, spread: Tensor) -> Tensor:
    """For each draw the component ``[n, size]`` that takes each number, at the least total cost."""
    size = x.shape[1]
    apart = (x.unsqueeze(2) - centre) / spread  # [n, component, number, F]
    cost = (apart.square() / 2 + spread.log()).sum(-1).numpy()
    rows = [
        linear_sum_assignment(c.T)[1] for c in cost
    ]  # an assignment problem has no batched form
    return torch.from_numpy(np.array(rows, dtype=np.int64).reshape(-1, size))


def _visited(order: Tensor) -> int:
    """Number of numberings that more than a few draws have."""
    _, counts = order.unique(dim=0, return_counts=True)
    return int((counts > _RARE * len(order)).sum())


def _differ(exchange: Exchange, draws: Mapping[str, Tensor]) -> bool:
    """Whether components of the posterior as it is differ, which by symmetry they cannot."""
    x = _features(exchange, draws)
    means = x.mean(0)
    return bool(((means.amax(0) - means.amin(0)) > _APART * x.std(0).mean(0)).any())


# ---- words ------------------------------------------------------------------------------------------------------


def _warning(posterior: Posterior, exchange: Exchange, seen: int) -> str:
    call = f"posterior.relabelled('{exchange.plate or exchange.sites[0]}')"
    text = (
        f"{_opening(exchange)} are arbitrary: renumbering them changes nothing in the model, so the posterior has "
        f"{exchange.size}! = {exchange.copies} equal copies"
    )
    if seen > 1:
        return f"{text}, and the draws visit {seen} of them. Read single components from {call}"
    text = f"{text}. This result is one of them"
    evidence = posterior.log_evidence
    if evidence is not None and evidence.kind == "estimate":
        gap = math.log(exchange.copies)
        text += f", and its log evidence too: that of all is up to log {exchange.size}! = {gap:.2f} higher"
    return f"{text}. Compare runs by {call}, which numbers components alike, or give the model an order"


def _opening(exchange: Exchange) -> str:
    if exchange.plate is not None:
        return f"labels of the elements of plate '{exchange.plate}'"
    return f"labels of the {exchange.size} components of {', '.join(exchange.sites)}"


def _key(exchange: Exchange) -> str:
    return f"labels of {exchange.plate or ', '.join(exchange.sites)}"


def _seen(
    posterior: Posterior,
    exchange: Exchange,
    draws: Mapping[str, Tensor],
    order: Tensor,
    seen: int,
) -> str:
    text = f"{seen} of {exchange.copies} numberings in {len(order)} draws"
    means = posterior.restart_means
    if not means:
        return text
    n = len(next(iter(means.values())))
    here = exchange.renumbered(draws, order)
    middle = {k: here[k].double().mean(0, keepdim=True) for k in exchange.axes}
    sd = {k: here[k].double().std(0, keepdim=True).clamp(min=1e-12) for k in exchange.axes}
    x, centre, spread = (_features(exchange, d) for d in (means, middle, sd))
    found = _assigned(x, centre[0], spread[0])
    apart = (x.gather(1, found.unsqueeze(-1).expand_as(x)) - centre) / spread
    return (
        f"{text}; {len(found.unique(dim=0))} among the {n} restarts that reach the best log evidence within 3 nats, whose "
        f"means agree to {float(apart.square().mean().sqrt()):.2f} posterior standard deviations after matching"
    )


# ---- the posterior of renumbered draws --------------------------------------------------------------------------


def _draws(posterior: Posterior) -> int:
    """Draws that the report looks at, fewer of a posterior of very many numbers."""
    bound = posterior.bound
    numbers = sum(math.prod(bound.shape(v)) for v in bound.graph.latents)
    return max(min(_DRAWS, _NUMBERS // max(numbers, 1)), 2)


def _point(posterior: Posterior, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One draw, params included."""
    latents = [v.name for v in posterior.graph.latents]
    return {**{n: draws[n][0] for n in latents}, **posterior.params}


def _the_one(what: str | None, found: Sequence[Exchange]) -> Exchange:
    if not found:
        raise DataError(
            "relabelled(): no components of this model are exchangeable, so their labels mean what they say. Use the posterior "
            "as it is."
        )
    chosen = [e for e in found if what is None or what == e.plate or what in e.sites]
    if len(chosen) != 1:
        known = [e.plate or e.sites[0] for e in found]
        note = "" if what is None else nearest(what, known)
        raise DataError(
            f"relabelled({what!r}): expected the name of one set of exchangeable components.{note} Sets: {', '.join(known)}."
        )
    return chosen[0]


def _from_draws(posterior: Posterior, exchange: Exchange, draws: Mapping[str, Tensor]) -> Posterior:
    from ppl.posterior import Posterior  # whose method this is

    latents = {v.name: draws[v.name] for v in posterior.graph.latents}
    own = {n: _marginal(posterior, exchange, n, latents[n]) for n in exchange.sites}
    result = Posterior(
        posterior.bound,
        dict(posterior.marginals) | own,
        method=posterior.method,
        sampler=Pool(latents),
        log_evidence=posterior.log_evidence,
        diagnostics=_diagnostics(posterior.diagnostics, exchange),
        params=posterior.params,
        seed=posterior.seed,
    )
    result.model, result.why, result.trace = posterior.model, posterior.why, posterior.trace
    return result


def _marginal(posterior: Posterior, exchange: Exchange, name: str, draws: Tensor) -> mg.Marginal:
    dtype = posterior.bound.dtype
    if name in exchange.labels:
        shares = [(draws == value).to(dtype).mean(0) for value in range(exchange.size)]
        return mg.Table(torch.stack(shares, -1))
    plates = len(posterior.graph.variables[name].plates)
    even = torch.full(draws.shape[: 1 + plates], 1 / len(draws), dtype=dtype, device=draws.device)
    return mg.Weighted(draws.to(dtype), even)


def _diagnostics(found: Diagnostics, exchange: Exchange) -> Diagnostics:
    """What was known of single components holds of the worst of them."""
    ess = {n: e.min().expand_as(e) if n in exchange.sites else e for n, e in found.ess.items()}
    tails = {
        n: k.max().expand_as(k) if n in exchange.sites else k for n, k in found.pareto_k.items()
    }
    others = tuple(w for w in found.warnings if not w.startswith(_opening(exchange)))
    notes = {**found.notes, _key(exchange): "chosen alike in all draws"}
    return replace(found, ess=ess, pareto_k=tails, warnings=others, notes=notes)
