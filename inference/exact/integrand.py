"""The joint density as a function of the outer latents, everything else integrated out.

A *case* is a point of the outer latents on the unconstrained scale together with one configuration
of the listed latents. All cases of a chunk are evaluated at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.graph import Variable
from ppl.inference.exact.arrays import CASES, order, padded, static_arrays, variable_axes
from ppl.inference.exact.enumeration import Contraction, make_contraction, summed_factors
from ppl.inference.exact.gaussian import GaussianPart, make_part
from ppl.inference.exact.linear import gaussian_factors
from ppl.inference.exact.split import Split, bijection, free_shape
from ppl.lower import Compiler, Lowered

_CHUNK = 4_000_000  # numbers in the largest array of a chunk of cases


class Case(NamedTuple):
    """Cases: points of the outer latents and numbers of configurations."""

    point: Tensor  # [g, d], unconstrained
    configuration: Tensor  # [g], long

    def at(self, rows: slice | Tensor) -> Case:
        """Some of the cases."""
        return Case(self.point[rows], self.configuration[rows])

    @property
    def number(self) -> int:
        """Number of cases."""
        return len(self.point)


@dataclass(frozen=True, eq=False)
class Integrand:
    """What is evaluated at every case."""

    bound: Bound
    parts: Split
    rest: Lowered  # [1 | g, *plates] of every factor of outer and listed latents and data alone
    sizes: tuple[tuple[int, ...], ...]  # of those plates
    gaussian: GaussianPart | None
    contraction: Contraction | None

    def log_density(self, point: Tensor) -> Tensor:
        """Log joint density ``[n]`` of points ``[n, d]``, all other latents integrated out."""
        return self.by_configuration(point).logsumexp(-1)

    def by_configuration(self, point: Tensor) -> Tensor:
        """The same before configurations are summed: ``[n, C]``."""
        n, count = len(point), self.parts.configurations
        numbers = torch.arange(count, device=point.device)
        cases = Case(point.repeat_interleave(count, 0), numbers.repeat(n))
        logs = [self._evaluate(cases.at(rows)) for rows in self.chunks(n * count)]
        return torch.cat(logs).reshape(n, count)

    def chunks(self, count: int) -> Iterator[slice]:
        """Parts of ``count`` cases that fit into memory together."""
        step = max(1, _CHUNK // self.elements)
        for start in range(0, count, step):
            yield slice(start, min(start + step, count))

    @property
    def elements(self) -> int:
        """Numbers in the largest array of one case."""
        sizes = [math.prod(s) for s in self.sizes]
        if self.gaussian is not None:
            sizes += [self.gaussian.dims**2, self.gaussian.elements]
        if self.contraction is not None:
            sizes.append(self.contraction.elements)
        return max([1, *sizes])

    @property
    def flops(self) -> float:
        """Work of one case, about."""
        work = float(sum(math.prod(s) for s in self.sizes)) * 20
        if self.gaussian is not None:
            work += self.gaussian.dims**3 + self.gaussian.flops
        return work + (self.contraction.flops if self.contraction is not None else 0.0)

    def values(self, cases: Case) -> dict[str, Tensor]:
        """Arrays ``[g, *plates, *event]`` of outer and listed latents, on their own scale."""
        return self._placed(cases)[0]

    def around(self, case: Case) -> Integrand:
        """The same function with its Gaussian algebra centred at the solution of one case."""
        if self.gaussian is None:
            return self
        centre = self.gaussian.solve(self.values(case), 1).mean[0]
        return (
            replace(self, gaussian=self.gaussian.centred(centre))
            if bool(centre.isfinite().all())
            else self
        )

    def _evaluate(self, cases: Case) -> Tensor:
        arrays, total = self._placed(cases)
        for value, sizes in zip(self.rest(arrays), self.sizes, strict=True):
            whole = padded(value, 1 + len(sizes))
            total = total + whole.expand(-1, *sizes).reshape(len(whole), -1).sum(1)
        if self.gaussian is not None:
            total = total + self.gaussian.solve(arrays, cases.number).log_evidence
        if self.contraction is not None:
            total = total + self.contraction.log_evidence(arrays, cases.number)
        return torch.where(total.isnan() | (total == torch.inf), -torch.inf, total)

    def _placed(self, cases: Case) -> tuple[dict[str, Tensor], Tensor]:
        """Arrays of all cases, and the log-volume ``[g]`` of the change of variables."""
        arrays, start = {}, 0
        volume = cases.point.new_zeros(cases.number)
        for v in self.parts.outer:
            shape = (*(self.bound.size(p) for p in v.plates), *free_shape(v))
            size = math.prod(shape)
            free = cases.point[:, start : start + size].reshape(cases.number, *shape)
            start += size
            transform = bijection(v)
            arrays[v.name] = transform(free)
            log_det = transform.log_abs_det_jacobian(free, arrays[v.name])
            volume = volume + log_det.reshape(cases.number, -1).sum(-1)
        number = cases.configuration
        for v in self.parts.listed:
            arrays[v.name], number = _digits(number, v, self.bound.shape(v))
        return {k: x.to(self.bound.dtype) for k, x in arrays.items()}, volume


def _digits(number: Tensor, v: Variable, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Values of a listed latent by number of configuration, and what is left of the number."""
    base, size = v.cardinality or 1, math.prod(shape)
    powers = base ** torch.arange(size, device=number.device)
    digits = (number.unsqueeze(-1) // powers) % base
    return digits.reshape(-1, *shape), number // base**size


def make_integrand(bound: Bound, parts: Split, memory: int | None) -> Integrand:
    """Lower every factor into the part that integrates its latents."""
    rest, sizes = _rest(bound, parts)
    return Integrand(
        bound,
        parts,
        rest,
        sizes,
        make_part(bound, parts) if parts.gaussian else None,
        make_contraction(bound, parts, memory) if parts.summed else None,
    )


def _rest(bound: Bound, parts: Split) -> tuple[Lowered, tuple[tuple[int, ...], ...]]:
    graph = bound.graph
    taken = {f.name for f in (*gaussian_factors(parts), *summed_factors(parts))}
    compiler = Compiler(
        graph,
        variable_axes(graph, parts),
        order(graph, parts),
        dtype=bound.dtype,
        device=bound.device,
        masks=tuple(bound.masks),
    )
    outputs, sizes = [], []
    for factor in graph.densities:
        if factor.name in taken:
            continue
        for later in (False, True) if factor.chain else (False,):
            along = factor.chain[0] if factor.chain else ""
            plates = tuple(p for p in factor.plates if later or p != along)
            out = compiler.transition(factor) if later else compiler.density(factor)
            outputs.append(compiler.align(out, (CASES, *plates)))
            sizes.append(tuple(bound.size(p) - (p == along) for p in plates))
    lowered = compiler.finish(outputs)
    static = {k: v for k, v in static_arrays(bound).items() if k in lowered.inputs}
    return lowered.given(static), tuple(sizes)
