"""What variational inference computes once, what it carries from step to step, and what estimators share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import biject_to

from ppl.backend import Settings
from ppl.binding import Bound
from ppl.graph import Variable
from ppl.inference.numerics import flat_gaussian as gaussians
from ppl.inference.numerics.ascent import Ascent, Rule
from ppl.inference.numerics.flat_gaussian import Noise
from ppl.inference.vi.bounds import BoundOnEvidence
from ppl.inference.vi.coordinates import Group, Origin
from ppl.inference.vi.options import VI


@dataclass(frozen=True, eq=False)
class Param:
    """A learned constant: its place in the flat vector, on its unconstrained scale."""

    variable: Variable
    shape: tuple[int, ...]  # on the unconstrained scale
    where: slice


@dataclass(frozen=True, eq=False)
class Problem:
    """What ``prepare`` returns."""

    bound: Bound
    options: VI
    settings: Settings
    target: BoundOnEvidence
    params: tuple[Param, ...]
    rule: Rule
    max_iters: int

    @property
    def groups(self) -> tuple[Group, ...]:
        """What the Gaussians are over."""
        return self.target.groups


class State(NamedTuple):
    """What the next step needs."""

    ascent: Ascent  # theta [R, P]: every group's parameters, then the params
    origin: dict[str, Origin]
    failures: int  # steps in a row without a finite bound


Step = Callable[[Problem, State, float], tuple[Ascent, Tensor]]  # -> next, the bound [R]


def draw_noise(problem: Problem, like: Tensor) -> dict[str, Noise]:
    """Noise of every group for one step."""
    target = problem.target
    return {
        g.piece.name: gaussians.noise(
            g.piece,
            (target.restarts, target.draws),
            target.particles,
            like,
            problem.settings.streams.of(g.piece.name),
        )
        for g in problem.groups
    }


def unwhitened(origin: Origin, v: Tensor) -> Tensor:
    """``centre + unit v`` for ``v [R, G, *plates, K, D]``."""
    return origin.centre.unsqueeze(-2) + origin.unit.unsqueeze(-2) * v


def log_unit(origin: Origin) -> Tensor:
    """What the change to units of the origin takes from log-densities ``[*plates, 1]``."""
    return origin.unit.log().sum(-1, keepdim=True)


def param_values(problem: Problem, theta: Tensor) -> dict[str, Tensor]:
    """Learned constants ``[R, *shape]`` on their own scales."""
    return {
        p.variable.name: biject_to(p.variable.support)(
            theta[..., p.where].reshape(*theta.shape[:-1], *p.shape)
        )
        for p in problem.params
    }


def units(problem: Problem, theta: Tensor) -> Tensor:
    """The change of each coordinate ``[R, P]`` that counts as one: a posterior sd, or one in logs of scales."""
    out = torch.ones_like(theta)
    for g in problem.groups:
        where = slice(g.piece.offset, g.piece.offset + g.piece.size)
        out[..., where] = gaussians.unit(g.piece, theta)
    return out
