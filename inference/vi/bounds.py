"""Lower bounds on the log evidence as functions of draws: one index for all latents, or one for every block.

Plain: the log of the mean of K joint importance weights (the ELBO for K = 1), [Burda2016]. Massively parallel: the
log of the mean over all combinations of the particles of all blocks, [Bowyer2023]; never below the plain one in
expectation. A draw ``u`` is ``[R, G, *plates, K, D]`` for R restarts and G draws whose bounds are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.errors import UnsupportedError
from ppl.inference.contract import LogFactor
from ppl.inference.particles.estep import Evaluated
from ppl.inference.particles.lanes import Lanes
from ppl.inference.particles.proposals import Particles
from ppl.inference.particles.weighting import Weighting, evaluate, values_of
from ppl.inference.vi.coordinates import Group, to_values


class BoundOnEvidence(Protocol):
    """What an estimator needs of a bound."""

    @property
    def groups(self) -> tuple[Group, ...]:
        """What the Gaussians are over."""
        ...

    @property
    def restarts(self) -> int:
        """Independent runs R."""
        ...

    @property
    def draws(self) -> int:
        """Estimates G that are averaged."""
        ...

    @property
    def particles(self) -> int:
        """Particles K of each."""
        ...

    @property
    def scale(self) -> float:
        """What multiplies all terms of the latents within a divided plate."""
        ...

    def __call__(
        self,
        us: Mapping[str, Tensor],
        log_qs: Mapping[str, Tensor],
        params: Mapping[str, Tensor],
        tempering: float = 1.0,
    ) -> Tensor:
        """The bound of each restart ``[R]``, averaged over draws."""
        ...


@dataclass(frozen=True, eq=False)
class Plain:
    """One particle index for all latents, inside plates too."""

    groups: tuple[Group, ...]  # one, or none
    lanes: Lanes
    restarts: int
    draws: int
    particles: int
    scale: float = 1.0

    def __call__(
        self,
        us: Mapping[str, Tensor],
        log_qs: Mapping[str, Tensor],
        params: Mapping[str, Tensor],
        tempering: float = 1.0,
    ) -> Tensor:
        """The bound of each restart ``[R]``, averaged over draws."""
        shape = (self.restarts, self.draws, self.particles)
        values: dict[str, Tensor] = {}
        correction: Tensor | float = 0.0
        for group in self.groups:
            name = group.piece.name
            found, log_jacobian = to_values(group, us[name].flatten(0, 2))
            values |= found
            correction = correction + (_shaped(log_jacobian, shape) - log_qs[name])
        each = self.draws * self.particles
        values |= {n: p.repeat_interleave(each, 0) for n, p in params.items()}
        continuous = frozenset(values) - frozenset(params) if tempering != 1.0 else frozenset()
        log_joint = self.lanes.log_joint(values, tempering, continuous).reshape(shape)
        weights = log_joint + tempering * correction
        if self.particles > 1:
            weights = weights.logsumexp(-1, keepdim=True) - math.log(self.particles)
        return weights.mean((1, 2))


@dataclass(frozen=True, eq=False)
class MassivelyParallel:
    """One particle index for every block, all combinations weighed."""

    groups: tuple[Group, ...]
    bound: Bound
    weighting: Weighting
    restarts: int
    draws: int
    particles: int
    scale: float = 1.0

    def __call__(
        self,
        us: Mapping[str, Tensor],
        log_qs: Mapping[str, Tensor],
        params: Mapping[str, Tensor],
        tempering: float = 1.0,
    ) -> Tensor:
        """The bound of each restart ``[R]``, averaged over draws."""
        lead = self.weighting.lead  # restarts and draws together
        arrays: dict[str, Tensor] = {}
        particles: dict[str, Particles] = {}
        for group in self.groups:
            name = group.piece.name
            u = us[name].reshape(*lead, *us[name].shape[2:])
            values, log_jacobian = to_values(group, u)
            arrays |= values
            log_q = log_qs[name].reshape(u.shape[:-1]) - log_jacobian
            particles[name] = Particles(values, log_q, u)
        arrays |= self._tables() | {n: self._repeated(p) for n, p in params.items()}
        log_z = self.weighting.plan.log_evidence(self._factors(arrays, particles, tempering))
        return log_z.reshape(self.restarts, self.draws).mean(1)

    def _factors(
        self, arrays: dict[str, Tensor], particles: dict[str, Particles], tempering: float
    ) -> list[LogFactor]:
        weighting = self.weighting
        if weighting.plan.split:
            if tempering != 1.0:
                raise UnsupportedError(
                    f"plate '{weighting.plan.split}' is processed in parts, which does not go with tempering or warmup. "
                    "Leave these out, or raise memory=."
                )
            return Evaluated(weighting, arrays, particles, None).factors()  # type: ignore[return-value]
        densities = evaluate(weighting, arrays)
        factors = Evaluated(weighting, arrays, particles, densities).factors()
        assert isinstance(factors, list)
        if tempering == 1.0:
            return factors
        return [
            self._tempered(factor, term.name, tempering)
            for factor, term in zip(factors, weighting.terms, strict=True)
        ]

    def _tempered(self, factor: LogFactor, name: str, tempering: float) -> LogFactor:
        """Priors of what is proposed, and proposals, scaled; the number of particles is not."""
        if name in {p.variable.name for g in self.groups for p in g.parts}:
            return factor._replace(log=tempering * factor.log)
        if name in {g.piece.name for g in self.groups}:
            left = (1 - tempering) * math.log(self.particles)
            return factor._replace(log=tempering * factor.log - left)
        return factor

    def _tables(self) -> dict[str, Tensor]:
        return {
            b.members[0].name: torch.arange(
                values_of(b), dtype=self.bound.dtype, device=self.bound.device
            )
            for b in self.weighting.blocks
            if b.enumerated
        }

    def _repeated(self, param: Tensor) -> Tensor:
        repeated = param.repeat_interleave(self.draws, 0)
        return repeated.reshape((*self.weighting.lead, *param.shape[1:]))


def _shaped(value: Tensor | float, shape: tuple[int, ...]) -> Tensor | float:
    return value.reshape(shape) if isinstance(value, Tensor) else value
