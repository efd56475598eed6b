"""Latents that stand in spreads, found by themselves: a start for hierarchical models from a Gaussian method.

The joint mode of a scale and of what it scales is useless: with all deviations at zero the density grows without bound as
the scale shrinks. Here scales, and latents that no Gaussian can be fitted to, are set to the mode of their *marginal*
posterior instead. In turns the others get their Gaussian given the scales, and the scales move uphill by the mean score
of its draws (Fisher's identity), with the curvature that the same draws leave after taking off what they do not know
(Louis' identity): EM with the right step size. Source: [Dempster1977]; [Louis1982].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions.transforms import Transform

from ppl.binding import Bound
from ppl.graph import Graph, Law, Ref, Variable
from ppl.inference.particles.blocks import transform_of
from ppl.inference.particles.density import joint_density
from ppl.lower import variables_of
from ppl.manifolds import manifold_of
from ppl.passes import upstream
from ppl.posterior import Posterior
from ppl.streams import Streams

_PLACES = frozenset("loc logits rate probs mean log_rate".split())  # leaves that move a law
_ROUNDS = 30
_BOLD = 1.9  # of a step of EM, which converges up to twice
_FAR = 1.0  # largest move of one round, on the unconstrained scale
_NEAR = 0.05  # of a standard deviation: moves that end the search, their root mean square
_KNOWN = 0.05  # share of the curvature, were all else known, that is left at least
_PROBES = 8
_DRAWS = 200  # of a round, at most
_ENTRIES = 300_000  # of the arrays of draws of a round
_LIFTS = (0.0, 2.0)  # of the starts, on the unconstrained scale
_LEFT = 1e-2  # share of a step that may be missing
_PRODUCTS = 30  # with the precision, for one step

Fit = Callable[[Bound, Mapping[str, Tensor]], Posterior]


@dataclass(frozen=True, eq=False)
class Scores:
    """Slope and curvature of the log-density by held latents ``[D]``, at draws of the others."""

    slope: Tensor  # [n, D]
    complete: Tensor  # [D], the diagonal of the precision were the others known
    known: Tensor  # [D], the diagonal of the precision of the marginal posterior, about
    product: Callable[[Tensor], Tensor]  # the former precision times a vector

    def step(self) -> Tensor:
        """Newton's step to the mode of the marginal posterior; that of EM where its curvature has the wrong sign."""
        right = self.slope.mean(0)
        less = self.known - self.complete
        found = _solve(lambda v: self.product(v) + less * v, right, self.known)
        if found is None:
            found = _solve(self.product, right, self.complete.abs())
            return _BOLD * (right / self.complete.abs() if found is None else found)
        return found


def _solve(product: Callable[[Tensor], Tensor], right: Tensor, diagonal: Tensor) -> Tensor | None:
    """Conjugate gradients with a diagonal preconditioner; None where the matrix is not positive definite."""
    found, left = torch.zeros_like(right), right.clone()
    near = left / diagonal
    way = near.clone()
    fall = start = left @ near
    for _ in range(_PRODUCTS):
        if not bool(fall > _LEFT**2 * start):
            break
        image = product(way)
        bend = way @ image
        if not bool(bend > 1e-6 * (way * diagonal * way).sum()):
            return None
        found = found + (fall / bend) * way
        left = left - (fall / bend) * image
        near = left / diagonal
        before, fall = fall, left @ near
        way = near + (fall / before) * way
    return found


def held_latents(graph: Graph) -> tuple[str, ...]:
    """Latents in spreads of laws, and constrained ones; no chains.

    >>> import ppl
    >>> @ppl.model
    ... def schools():
    ...     middle = ppl.latent("middle", ppl.Normal(0.0, 5.0))
    ...     spread = ppl.latent("spread", ppl.HalfNormal(5.0))
    ...     with ppl.plate("school"):
    ...         ppl.observe("y", ppl.Normal(ppl.latent("effect", ppl.Normal(middle, spread)), 1.0))
    >>> held_latents(schools.graph({"y": [1.0, 2.0]}))
    ('spread',)
    """
    spreads: set[str] = set()
    for factor in graph.densities:
        laws = [law for law in (factor.law, factor.chain[1] if factor.chain else None) if law]
        spreads |= {n for law in laws for n in _in_spread(graph, law)}
    held = {v.name for v in graph.latents if _can_be_held(graph, v, v.name in spreads)}
    for v in reversed(graph.latents):  # what stands in laws of held latents alone moves with them
        children = {f.name for f in graph.densities if v.name in variables_of(graph, f)} - {v.name}
        if children and children <= held and _can_be_held(graph, v, True):
            held.add(v.name)
    return tuple(v.name for v in graph.latents if v.name in held)


def _in_spread(graph: Graph, law: Law) -> set[str]:
    leaves = zip(law.family.leaves(), law.arguments, strict=True)
    spreads = [a for leaf, a in leaves if leaf.path.split(".")[-1] not in _PLACES]
    return set().union(*(upstream(graph, a.id) for a in spreads if isinstance(a, Ref)), set())


def _can_be_held(graph: Graph, v: Variable, in_spread: bool) -> bool:
    if v.is_discrete or manifold_of(v) is not None or graph.factors[v.name].chain:
        return False
    return in_spread or transform_of(v) is not None


def hold(bound: Bound, values: Mapping[str, Tensor]) -> Bound:
    """The same model with some latents observed at ``values [*plates, *event]``."""
    graph = bound.graph
    variables = {
        n: replace(v, role="observed") if n in values else v for n, v in graph.variables.items()
    }
    return replace(
        bound, graph=replace(graph, variables=variables), values={**bound.values, **values}
    )


def marginal_draws(
    bound: Bound, start: Mapping[str, Tensor], fit: Fit, count: int, streams: Streams
) -> dict[str, Tensor]:
    """Draws of all latents: the held ones around the mode of their marginal posterior, the others given that mode.

    There may be several modes, such as that of a chain that explains nothing next to a wide likelihood: the search
    begins at the start, and above it.

    Args:
        bound: graph and data.
        start: first values of the held latents ``[*plates, *event]``.
        fit: the posterior of a model; the second argument says where its latents may begin.
        count: how many draws.
        streams: of the draws.
    """
    held = Held(bound, start)
    first = held.free(start)
    found = [_climbed(bound, held, first + lift, fit, streams) for lift in _LIFTS]
    best = max(found, key=lambda f: f.height)
    others = best.posterior.samples(count, seed=streams.seed)
    noise = torch.randn(
        count, len(first), generator=streams.of("held"), dtype=first.dtype, device=first.device
    )
    return {**others, **held.values(best.free + noise / best.known.sqrt())}


class _Mode(NamedTuple):
    free: Tensor  # [D]
    known: Tensor  # [D], precisions
    posterior: Posterior  # of the others
    height: float  # log of its share of the evidence


def _climbed(bound: Bound, held: Held, free: Tensor, fit: Fit, streams: Streams) -> _Mode:
    """The mode of the marginal posterior of held latents that lies uphill."""
    score = scorer(bound, held)
    begin: dict[str, Tensor] = {}
    last, share = torch.zeros_like(free), torch.ones_like(free)
    rows = sum(math.prod(bound.shape(v)) for v in bound.graph.role("latent", "observed"))
    count = max(20, min(_DRAWS, _ENTRIES // rows))
    for _ in range(_ROUNDS):
        posterior = fit(hold(bound, held.values(free)), begin)
        begin = {n: posterior.mean(n) for n in posterior.marginals}
        found = score(free, posterior.samples(count, seed=streams.seed))
        move = found.step().clamp(-_FAR, _FAR)
        if float((move.square() * found.known).mean()) <= _NEAR**2:
            break
        # Where the curvature is not what it seems, steps go to and fro.
        share = torch.where(move * last < 0, share / 2, (1.5 * share).clamp(max=1.0))
        free, last = free + share * move, move
    evidence = posterior.log_evidence
    height = (evidence.value if evidence else 0.0) + float(held.log_jacobian(free[None]))
    return _Mode(free, found.known, posterior, height - 0.5 * float(found.known.log().sum()))


class Held:
    """Held latents as one vector on the unconstrained scale."""

    def __init__(self, bound: Bound, like: Mapping[str, Tensor]) -> None:
        self.maps = {n: transform_of(bound.graph.variables[n]) for n in like}
        self.shapes = {n: self._inverse(n, x).shape for n, x in like.items()}
        self.sizes = [s.numel() for s in self.shapes.values()]

    def free(self, values: Mapping[str, Tensor]) -> Tensor:
        """The vector of values ``[*plates, *event]``."""
        return torch.cat([self._inverse(n, values[n]).reshape(-1) for n in self.shapes])

    def values(self, free: Tensor) -> dict[str, Tensor]:
        """Values ``[..., *plates, *event]`` of vectors ``[..., D]``."""
        return {n: x if m is None else m(x) for (n, m), x in self._parts(free)}

    def log_jacobian(self, free: Tensor) -> Tensor:
        """Log-determinants ``[n]`` of the maps at vectors ``[n, D]``."""
        total = free.new_zeros(len(free))
        for (_, m), x in self._parts(free):
            if m is not None:
                total = total + m.log_abs_det_jacobian(x, m(x)).reshape(len(free), -1).sum(-1)
        return total

    def _parts(self, free: Tensor) -> Iterator[tuple[tuple[str, Transform | None], Tensor]]:
        parts = free.split(self.sizes, -1)
        shaped = (
            x.reshape((*x.shape[:-1], *s)) for x, s in zip(parts, self.shapes.values(), strict=True)
        )
        return zip(self.maps.items(), shaped, strict=True)

    def _inverse(self, name: str, value: Tensor) -> Tensor:
        transform = self.maps[name]
        return value if transform is None else transform.inv(value)


def scorer(bound: Bound, held: Held) -> Callable[[Tensor, Mapping[str, Tensor]], Scores]:
    """The function of held latents ``[D]`` and draws of the others that gives their scores."""
    total = joint_density(bound, tuple(held.shapes))

    def score(free: Tensor, draws: Mapping[str, Tensor]) -> Scores:
        n = len(next(iter(draws.values())))
        with torch.enable_grad():
            point = free.detach().expand(n, -1).clone().requires_grad_(True)
            value = total({**draws, **held.values(point)}) + held.log_jacobian(point)
            (slope,) = torch.autograd.grad(value.sum(), point, create_graph=True)

        def bent(vector: Tensor) -> Tensor:
            if not slope.requires_grad:  # linear
                return torch.zeros_like(vector)
            (image,) = torch.autograd.grad((slope * vector).sum(), point, retain_graph=True)
            return -image.mean(0)

        curvature = _diagonal(bent, slope[0])
        # What draws of the others do not agree on, the held latents are not known by.
        floor = curvature.abs().clamp(min=1e-8)
        known = torch.maximum(curvature - slope.detach().var(0), _KNOWN * floor)
        return Scores(slope.detach(), curvature, known, bent)

    return score


def _diagonal(product: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Diagonal of a matrix from products with random signs; Hutchinson's estimate."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (_PROBES, len(like)), generator=generator).to(like.detach()) * 2 - 1
    return torch.stack([s * product(s) for s in signs]).mean(0)


__all__ = ["Held", "Scores", "held_latents", "hold", "marginal_draws", "scorer"]
