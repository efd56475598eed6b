"""What the laws of the latents take from the bound: KL terms of Gaussians, in closed form where there is one.

Of a Normal law the divergence is known, whatever its parameters read; of a Laplace law by the mean of a folded Normal; a
spike with a Normal slab costs the divergence from the slab and the log-odds of being there. All others are estimated
at a draw. Sums run over the entries that an array keeps; those outside are zero and, but for a spike, cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.densities import is_foreign
from ppl.distributions import Laplace, Normal, SpikeSlab
from ppl.distributions.base import Distribution
from ppl.inference.networks.program import data_arrays
from ppl.inference.networks.structure import Array, Network
from ppl.lower import Compiler, Lowered

Kind = Literal["normal", "laplace", "slab", "entries", "joint"]
_HALF_LOG_2PI_E = 0.5 * math.log(2 * math.pi * math.e)


@dataclass(frozen=True, eq=False)
class Prior:
    """The law of one latent.

    ``leaves`` are its parameters, ``[*plates, *event, *own axes]`` broadcast; None where they change from step to step
    and come from ``lowered``. Of kind "joint", ``lowered`` is the log-density of the whole array.
    """

    array: Array
    kind: Kind
    family: Distribution
    ranks: tuple[int, ...]  # own axes of each parameter
    leaves: tuple[Tensor, ...] | None
    lowered: Lowered

    @property
    def is_fixed_normal(self) -> bool:
        """Whether the divergence is that from a Normal with known parameters, up to a constant."""
        return self.leaves is not None and self.kind in ("normal", "slab")

    def normal(self, indices: Tensor | None) -> tuple[Tensor, Tensor]:
        """Location and scale of a fixed Normal (of the slab, beside a spike), ``[k]`` or numbers."""
        assert self.leaves is not None
        loc, scale = self._at(self.leaves, indices)[-2:]
        return loc, scale

    def divergence(
        self,
        values: Mapping[str, Any],
        mean: Tensor,
        sd: Tensor,
        draw: Tensor,
        indices: Tensor | None,
    ) -> Tensor:
        """KL from the law, a number; differentiable in ``mean``, ``sd``, ``draw`` and what the law reads.

        Args:
            values: latents and params that the law reads, ``[*plates, *event]``.
            mean: of the Gaussian on the real line ``[k]``.
            sd: likewise.
            draw: of it, where no closed form is known.
            indices: the entries that are kept ``[k]``; None: all.
        """
        if self.kind == "joint":
            return -_entropy(sd) - self._joint(values, draw)
        leaves = self._at(self._leaves(values), indices)
        if self.kind == "normal":
            return normal_divergence(mean, sd, *leaves)
        if self.kind == "laplace":
            return _laplace_divergence(mean, sd, *leaves)
        spike = self._spike(values, indices)
        if self.kind == "slab":
            return normal_divergence(mean, sd, *leaves[-2:]) + spike
        return -_entropy(sd) - self._entries(leaves, draw) + spike

    def density(self, values: Mapping[str, Any], draw: Tensor, indices: Tensor | None) -> Tensor:
        """Log-density at a draw on the real line, summed over the entries that are kept."""
        if self.kind == "joint":
            return self._joint(values, draw)
        leaves = self._at(self._leaves(values), indices)
        if self.kind == "slab":
            law = Normal(*leaves[-2:])
            return law.log_prob(draw).sum() - self._spike(values, indices)
        spike = self._spike(values, indices)
        return self._entries(leaves, draw) - spike

    def at_zero(self, values: Mapping[str, Any], indices: Tensor | None, count: int) -> Tensor:
        """Log-density at zero of the law, or of the slab beside a spike, for the ``count`` entries that are kept."""
        leaves = self._at(self._leaves(values), indices)
        law = Normal(*leaves[-2:]) if self.kind == "slab" else self.family.replace(leaves)
        return law.log_prob(leaves[0].new_zeros(count)).expand(count)

    def inclusion(self, values: Mapping[str, Any]) -> Tensor | None:
        """Prior probability that an entry is not zero, on average; None where the law has no spike."""
        return self._leaves(values)[0].mean() if isinstance(self.family, SpikeSlab) else None

    def constant(self, indices: Tensor | None) -> Tensor | float:
        """What a spike adds to the divergence from the slab."""
        return self._spike({}, indices)

    def _leaves(self, values: Mapping[str, Any]) -> tuple[Tensor, ...]:
        if self.leaves is not None:
            return self.leaves
        return tuple(self.lowered({n: values[n] for n in self.lowered.inputs}))

    def _at(self, leaves: tuple[Tensor, ...], indices: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(
            _entries_of(leaf, self.array.shape, rank, indices)
            for leaf, rank in zip(leaves, self.ranks, strict=True)
        )

    def _entries(self, leaves: tuple[Tensor, ...], draw: Tensor) -> Tensor:
        value, jacobian = _on_support(self.array, draw)
        law = self.family.replace(leaves)
        return law.log_prob(value).sum() + jacobian

    def _joint(self, values: Mapping[str, Any], draw: Tensor) -> Tensor:
        value, jacobian = _on_support(self.array, draw.reshape(self.array.free_shape))
        known = {**values, self.array.name: value}
        found = self.lowered({n: known[n] for n in self.lowered.inputs})
        return torch.stack([f.sum() for f in found]).sum() + jacobian

    def _spike(self, values: Mapping[str, Any], indices: Tensor | None) -> Tensor | float:
        """``-log pi`` of the entries that are kept and ``-log(1 - pi)`` of the others."""
        if not isinstance(self.family, SpikeSlab):
            return 0.0
        share, size = self._leaves(values)[0], self.array.size
        if share.numel() == 1:
            k = size if indices is None else len(indices)
            return -(k * share.log() + torch.special.xlog1py(size - k, -share)).sum()
        share = share.expand(self.array.shape).reshape(-1)
        if indices is None:
            return -share.log().sum()
        kept = torch.zeros_like(share, dtype=torch.bool)
        kept[indices] = True
        return -torch.where(kept, share.log(), torch.log1p(-share.masked_fill(kept, 0.0))).sum()


def make_priors(bound: Bound, network: Network) -> tuple[Prior, ...]:
    """The law of every latent.

    >>> from ppl.models.bnn import classifier
    >>> from ppl.inference.networks.structure import find_network
    >>> bound = classifier(hidden=(8,)).bind({"x": torch.zeros(3, 4), "label": [0, 1, 2]})
    >>> law = make_priors(bound, find_network(bound))[0]
    >>> law.kind, float(law.normal(None)[1])
    ('normal', 0.5)
    """
    return tuple(_prior(bound, array) for array in network.arrays)


def normal_divergence(mean: Tensor, sd: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """``sum KL(N(mean, sd^2) || N(loc, scale^2))``.

    >>> one = torch.ones(1)
    >>> float(normal_divergence(one, one, 0 * one, one))
    0.5
    """
    ratio, apart = sd / scale, (mean - loc) / scale
    return (0.5 * (ratio.square() + apart.square() - 1.0) - ratio.log()).sum()


def _laplace_divergence(mean: Tensor, sd: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    apart = (mean - loc).abs()
    r = apart / sd
    # E|x| = sd (r + 2 (phi(r) - r Q(r))): nothing cancels at large r.
    tail = torch.special.ndtr(-r)
    density = (-0.5 * r.square()).exp() / math.sqrt(2 * math.pi)
    folded = apart + 2 * sd * (density - r * tail)
    return (folded / scale + (2 * scale).log()).sum() - _entropy(sd)


def _entropy(sd: Tensor) -> Tensor:
    return sd.log().sum() + _HALF_LOG_2PI_E * sd.numel()


def _on_support(array: Array, free: Tensor) -> tuple[Tensor, Tensor | float]:
    if array.transform is None:
        return free, 0.0
    value = array.transform(free)
    return value, array.transform.log_abs_det_jacobian(free, value).sum()


def _entries_of(leaf: Tensor, shape: tuple[int, ...], own: int, indices: Tensor | None) -> Tensor:
    """A parameter for the entries that are kept: ``[k, *own]``, or ``[*own]`` where it is the same for all."""
    at = leaf.ndim - own
    lead, tail = leaf.shape[:at], leaf.shape[at:]
    if math.prod(lead) == 1:
        return leaf.reshape(tail)
    flat = leaf.expand(*shape, *tail).reshape(-1, *tail)
    return flat if indices is None else flat[indices]


def _prior(bound: Bound, array: Array) -> Prior:
    graph, v = bound.graph, array.variable
    factor = graph.factors[v.name]
    law = factor.law
    assert law is not None
    axes = {u.name: u.plates for u in graph.variables.values()}
    compiler = Compiler(graph, axes, tuple(graph.plates), dtype=bound.dtype, device=bound.device)
    known = {n: a[0] for n, a in data_arrays(bound).items()}
    family = law.family
    if family.event_dim or factor.chain is not None or is_foreign(family):
        outputs = [compiler.density(factor)]
        outputs += [compiler.transition(factor)] if factor.chain is not None else []
        lowered = _fixed(compiler.finish(outputs), known)
        return Prior(array, "joint", family, (), None, lowered)
    ranks = tuple(leaf.event_dim for leaf in family.leaves())
    event = len(v.event_shape)
    parts = [
        compiler.align(a, v.plates, max(event + r, a.event_ndim))
        for a, r in zip(compiler.arguments(law), ranks, strict=True)
    ]
    lowered = _fixed(compiler.finish(parts), known)
    leaves = tuple(t.to(bound.dtype) for t in lowered({})) if not lowered.inputs else None
    return Prior(array, _kind(array, family), family, ranks, leaves, lowered)


def _fixed(lowered: Lowered, known: Mapping[str, Tensor]) -> Lowered:
    return lowered.given({n: t for n, t in known.items() if n in lowered.inputs}).pruned()


def _kind(array: Array, family: Distribution) -> Kind:
    if array.transform is not None:
        return "entries"
    if type(family) is Normal:
        return "normal"
    if type(family) is Laplace:
        return "laplace"
    if type(family) is SpikeSlab and type(family.slab) is Normal:
        return "slab"
    return "entries"


__all__ = ["Prior", "make_priors", "normal_divergence"]
