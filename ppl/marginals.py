"""What a posterior knows of one site: weighted points, Gaussians, whole or sparse, pieces, or a table of probabilities.

All answer the same questions; shapes are ``[*plates, *event]``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ppl.manifolds import Manifold, by_name
from ppl.pieces import Pieces, quantiles


class Weighted(NamedTuple):
    """Weighted points, as importance sampling leaves them."""

    points: Tensor  # [S, *plates, *event]
    weights: Tensor  # [S, *plates], sums to one over S


class Gaussian(NamedTuple):
    """Independent Gaussians, or the diagonal of a joint one."""

    loc: Tensor  # [*plates, *event]
    scale: Tensor  # [*plates, *event]


class SparseGaussian(NamedTuple):
    """Independent Gaussians at some coordinates, the active ones; zero with certainty at all others.

    >>> m = SparseGaussian(torch.tensor([1, 5]), torch.tensor([0.5, -2.0]), torch.tensor([0.1, 0.2]), (2, 3))
    >>> mean(m)
    tensor([[ 0.0000,  0.5000,  0.0000],
            [ 0.0000,  0.0000, -2.0000]])
    >>> inclusion(m).sum()
    tensor(2.)
    """

    index: Tensor  # type: ignore[assignment]  # [k] long, ascending: places of the active coordinates in the array, row by row
    loc: Tensor  # [k]
    scale: Tensor  # [k]
    shape: tuple[int, ...]  # of the whole array, [*plates, *event]

    @property
    def density(self) -> float:
        """Share of the coordinates that is active."""
        return len(self.index) / max(math.prod(self.shape), 1)

    def spread(self, values: Tensor) -> Tensor:
        """Numbers of the active coordinates ``[*lead, k]`` in the whole array ``[*lead, *shape]``, zero elsewhere."""
        lead = values.shape[:-1]
        whole = values.new_zeros((*lead, math.prod(self.shape)))
        return whole.index_copy_(-1, self.index, values).reshape(*lead, *self.shape)


class GaussianMixture(NamedTuple):
    """A mixture of Gaussians, one component for each value of what was integrated numerically."""

    loc: Tensor  # [S, *plates, *event]
    scale: Tensor  # [S, *plates, *event]
    weights: Tensor  # [S], sums to one


class JointGaussian(NamedTuple):
    """A Gaussian vector for each element of the plates, with the covariance within it.

    On a manifold ``loc`` is an element of the group, and ``d`` counts tangent coordinates at it:
    the site is ``loc o exp(noise)`` with noise of this covariance. Otherwise ``d`` is the number of
    entries of the event, in row-major order.
    """

    loc: Tensor  # [*plates, *event]
    covariance: Tensor  # [*plates, d, d]
    manifold: str | None = None  # "SE2", ...


class Table(NamedTuple):
    """A finite discrete site: the probability of each of its values 0, 1, ..., V-1."""

    table: Tensor  # [*plates, V]


Marginal = Weighted | Gaussian | SparseGaussian | GaussianMixture | JointGaussian | Pieces | Table
KINDS = {
    "weighted": Weighted,
    "gaussian": Gaussian,
    "sparse": SparseGaussian,
    "mixture": GaussianMixture,
    "joint": JointGaussian,
    "pieces": Pieces,
    "table": Table,
}
_STEPS = 80  # of the search for a quantile; fewer than ten are usual


def mean(m: Marginal) -> Tensor:
    """Posterior mean ``[*plates, *event]``; on a manifold the centre, an element of the group.

    >>> mean(Weighted(torch.tensor([0.0, 1.0]), torch.tensor([0.25, 0.75])))
    tensor(0.7500)
    """
    if isinstance(m, (Gaussian, JointGaussian)):
        return m.loc
    if isinstance(m, SparseGaussian):
        return m.spread(m.loc)
    if isinstance(m, Pieces):
        return m.centre
    if isinstance(m, GaussianMixture):
        return torch.tensordot(m.weights, m.loc, 1)
    if isinstance(m, Table):
        return (m.table * _values(m)).sum(-1)
    return (_spread_weights(m) * m.points).sum(0)


def sd(m: Marginal) -> Tensor:
    """Posterior standard deviation ``[*plates, *event]``; on a manifold that of the tangent
    coordinates at the mean, ``[*plates, d]``.
    """
    if isinstance(m, Gaussian):
        return m.scale
    if isinstance(m, SparseGaussian):
        return m.spread(m.scale)
    if isinstance(m, Pieces):
        return m.spread
    if isinstance(m, JointGaussian):
        spread = m.covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        return spread if m.manifold else spread.reshape(m.loc.shape)
    if isinstance(m, GaussianMixture):
        variance = m.scale.square() + (m.loc - mean(m)).square()
        return torch.tensordot(m.weights, variance, 1).sqrt()
    if isinstance(m, Table):
        values = _values(m)
        centre = mean(m).unsqueeze(-1)
        return (m.table * (values - centre).square()).sum(-1).sqrt()
    return (_spread_weights(m) * (m.points - mean(m)).square()).sum(0).sqrt()


def entry_sd(m: Marginal) -> Tensor:
    """Standard deviation ``[*plates, *event]`` of each number that :func:`mean` shows.

    On a manifold these are the numbers that an element is stored as (a pose's x, y and heading in
    the world, a quaternion's entries), to first order in the noise.
    """
    if not isinstance(m, JointGaussian) or m.manifold is None:
        return sd(m)
    slope = _storage_jacobian(by_name(m.manifold), m.loc)
    return ((slope @ m.covariance) * slope).sum(-1).clamp(min=0).sqrt().reshape(m.loc.shape)


def quantile(m: Marginal, q: Tensor) -> Tensor:
    """Quantiles ``[Q, *plates, *event]`` for levels ``q`` of shape ``[Q]``.

    On a manifold: of the numbers that an element is stored as, see :func:`entry_sd`.
    """
    if isinstance(m, SparseGaussian):
        return m.spread(m.loc + m.scale * torch.special.ndtri(q.to(m.loc)).unsqueeze(-1))
    levels = q.reshape(-1, *(1,) * mean(m).ndim)
    if isinstance(m, (Gaussian, JointGaussian)):
        return mean(m) + entry_sd(m) * torch.special.ndtri(levels)
    if isinstance(m, GaussianMixture):
        return torch.stack([_mixture_quantile(m, float(level)) for level in q])
    if isinstance(m, Pieces):
        return quantiles(m, q)
    if isinstance(m, Table):
        reached = m.table.cumsum(-1).unsqueeze(0) >= levels.unsqueeze(-1) - 1e-12
        return reached.to(torch.int8).argmax(-1).to(m.table.dtype)
    return _weighted_quantile(m, q)


def first(m: Marginal, count: int) -> Marginal:
    """The marginals ``[count]`` of the first scalars, row by row, of an array of Gaussians; others as they are.

    What prints a few elements of a large array needs no more than these.
    """
    if isinstance(m, Gaussian):
        return Gaussian(m.loc.reshape(-1)[:count], m.scale.reshape(-1)[:count])
    if isinstance(m, SparseGaussian):
        count = min(count, math.prod(m.shape))
        kept = int(torch.searchsorted(m.index, count))
        return SparseGaussian(m.index[:kept], m.loc[:kept], m.scale[:kept], (count,))
    return m


def covariance(m: Marginal, event_ndim: int) -> Tensor:
    """Covariance ``[*plates, d, d]`` of the entries of an event, in row-major order.

    Of a Gaussian that is kept entry by entry, or a mixture of such, nothing is known beyond the
    diagonal: it is refused for events of more than one entry.

    Args:
        m: of a continuous site.
        event_ndim: number of trailing axes of the mean that are one event.

    >>> covariance(Gaussian(torch.zeros(3), torch.full((3,), 2.0)), 0).shape
    torch.Size([3, 1, 1])
    """
    if isinstance(m, JointGaussian):
        return m.covariance
    centre = mean(m)
    plates = centre.shape[: centre.ndim - event_ndim]
    d = math.prod(centre.shape[len(plates) :])
    if isinstance(m, Weighted):
        off = (m.points - centre).reshape(len(m.points), *plates, d)
        weights = _spread_weights(m).expand_as(m.points).reshape(off.shape)
        return torch.einsum("s...i,s...j->...ij", weights * off, off)
    if d > 1:
        raise ValueError("only the variances of its entries are kept, not their covariances")
    return sd(m).square().reshape(*plates, 1, 1)


def draw(m: Marginal, n: int, generator: Generator | None = None) -> Tensor:
    """Draws ``[n, *plates, *event]``: joint within an event where the marginal is, independent otherwise.

    Raises:
        ValueError: of mixtures and pieces; a posterior that keeps them has draws of its own.
    """
    if isinstance(m, Gaussian):
        return m.loc + m.scale * _noise((n, *m.loc.shape), m.loc, generator)
    if isinstance(m, SparseGaussian):
        return m.spread(m.loc + m.scale * _noise((n, len(m.loc)), m.loc, generator))
    if isinstance(m, Table):
        flat = m.table.reshape(-1, m.table.shape[-1])
        device = flat.device if generator is None else generator.device
        found = torch.multinomial(flat.to(device), n, replacement=True, generator=generator)
        return found.mT.reshape(n, *m.table.shape[:-1]).to(m.table)
    if isinstance(m, JointGaussian):
        return _draw_joint(m, n, generator)
    if isinstance(m, Weighted):
        return _draw_points(m, n, generator)
    raise ValueError(
        f"there is no draw of a {type(m).__name__} by itself; use posterior.samples(n)"
    )


def _draw_points(m: Weighted, n: int, generator: Generator | None) -> Tensor:
    """Points picked by their weights, for each element of the plates by itself."""
    plates, event = m.weights.shape[1:], m.points.shape[m.weights.ndim :]
    flat = m.weights.reshape(len(m.weights), -1).mT
    device = flat.device if generator is None else generator.device
    chosen = torch.multinomial(flat.to(device), n, replacement=True, generator=generator)
    points = m.points.reshape(len(m.points), -1, math.prod(event))  # [S, elements, event]
    found = points.gather(
        0, chosen.mT.to(points.device).unsqueeze(-1).expand(-1, -1, points.shape[-1])
    )
    return found.reshape(n, *plates, *event)


def _noise(shape: tuple[int, ...], like: Tensor, generator: Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


def _draw_joint(m: JointGaussian, n: int, generator: Generator | None) -> Tensor:
    root = torch.linalg.cholesky(m.covariance)
    shape = (n, *m.covariance.shape[:-1])
    step = (root @ _noise(shape, m.loc, generator).unsqueeze(-1)).squeeze(-1)
    if m.manifold is not None:
        return by_name(m.manifold).retract(m.loc, step)
    return m.loc + step.reshape(n, *m.loc.shape)


def _storage_jacobian(manifold: Manifold, loc: Tensor) -> Tensor:
    """``[*plates, entries, d]``: how stored numbers move with tangent coordinates at ``loc``."""
    lead = loc.shape[: loc.ndim - len(manifold.event_shape)]
    with torch.enable_grad():
        step = torch.zeros((*lead, manifold.dims), dtype=loc.dtype, device=loc.device)
        step.requires_grad_()
        moved = manifold.retract(loc.detach(), step).reshape(*lead, -1)
        # Elements do not touch each other: the sum over them has the gradient of each.
        rows = [torch.autograd.grad(x.sum(), step, retain_graph=True)[0] for x in moved.unbind(-1)]
    return torch.stack(rows, -2)


def _mixture_quantile(m: GaussianMixture, level: float) -> Tensor:
    """Newton's method on the distribution function, inside a bracket that every step narrows."""
    loc, scale = m.loc, m.scale.clamp(min=torch.finfo(m.scale.dtype).tiny)
    reach = float(torch.special.ndtri(torch.tensor(level, dtype=torch.float64)))
    if not math.isfinite(reach):
        return torch.full_like(loc[0], reach)
    ends = loc + scale * reach  # the quantile of a mixture lies between those of its components
    low, high = ends.amin(0), ends.amax(0)
    x, width = (low + high) / 2, sd(m)
    for _ in range(_STEPS):
        z = (x - loc) / scale
        below = torch.tensordot(m.weights, torch.special.ndtr(z), 1)
        bells = (-0.5 * z.square()).exp() / (scale * math.sqrt(2 * math.pi))
        density = torch.tensordot(m.weights, bells, 1)
        low, high = torch.where(below < level, x, low), torch.where(below < level, high, x)
        step = x - (below - level) / density
        inside = (step > low) & (step < high)
        new = torch.where(inside, step, (low + high) / 2)
        if bool(((new - x).abs() <= 1e-12 * width).all()):
            return new
        x = new
    return x


def _weighted_quantile(m: Weighted, q: Tensor) -> Tensor:
    # Midpoint rule: the i-th smallest point stands at the middle of its share of the total weight; linear in between.
    points, order = m.points.sort(0)
    weights = _spread_weights(m).expand_as(m.points).gather(0, order)
    level = (weights.cumsum(0) - weights / 2).movedim(0, -1).contiguous()
    at = points.movedim(0, -1)
    wanted = q.to(level).expand(*level.shape[:-1], len(q)).contiguous()
    right = torch.searchsorted(level, wanted).clamp(1, level.shape[-1] - 1)
    low, high = level.gather(-1, right - 1), level.gather(-1, right)
    share = ((wanted - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
    left_point = at.gather(-1, right - 1)
    return (left_point + share * (at.gather(-1, right) - left_point)).movedim(-1, 0)


def probs(m: Marginal, values: int | None = None) -> Tensor:
    """Probabilities ``[*plates, V]`` of a discrete site's values 0, 1, ..., V-1."""
    if isinstance(m, Table):
        return m.table
    if isinstance(m, (Gaussian, SparseGaussian, GaussianMixture, JointGaussian, Pieces)):
        raise ValueError("a continuous site has no table of probabilities")
    top = int(m.points.max().item()) + 1 if values is None else values
    hits = m.points.unsqueeze(-1) == torch.arange(top, dtype=m.points.dtype, device=m.points.device)
    return (_spread_weights(m).unsqueeze(-1) * hits).sum(0)


def inclusion(m: Marginal) -> Tensor | None:
    """Probability ``[*plates, *event]`` of not being exactly zero; None where no mass stands at zero."""
    if isinstance(m, SparseGaussian):
        return m.spread(torch.ones_like(m.loc))
    return m.share if isinstance(m, Pieces) else None


def _spread_weights(m: Weighted) -> Tensor:
    return m.weights.reshape(*m.weights.shape, *(1,) * (m.points.ndim - m.weights.ndim))


def _values(m: Table) -> Tensor:
    return torch.arange(m.table.shape[-1], dtype=m.table.dtype, device=m.table.device)
