"""A finished run: everything at the means, from where the posterior is read off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ppl.errors import NumericalError
from ppl.inference.gbp.candidates import Setting
from ppl.inference.gbp.kernel import own_terms, rows_of
from ppl.inference.gbp.models import Rows, linear_model
from ppl.inference.gbp.monitor import uninformed
from ppl.inference.gbp.problem import Problem
from ppl.inference.gbp.relinearise import Charts, at_means
from ppl.inference.gbp.rounds import run_round, summed
from ppl.inference.gbp.state import State
from ppl.inference.groups import Linearised
from ppl.inference.groups.equations import Equations
from ppl.inference.numerics.gaussian import Gaussian, inverse
from ppl.inference.numerics.sparse import Factor, NotPositive

_PRECISION_ROUNDS = 500  # for precisions without the proximal factor


@dataclass(frozen=True, eq=False)
class Final:
    """A finished run with its charts at the means, where everything is read off."""

    problem: Problem
    state: State
    charts: Charts
    rows: Mapping[str, Rows]
    beliefs: Mapping[str, Gaussian]
    dropped: int = 0  # rows that are not finite and count as absent

    @cached_property
    def equations(self) -> Equations:
        """The direct solve of the same factors."""
        return Equations(self.problem.groups)

    @cached_property
    def linearised(self) -> list[Linearised]:
        """Every group at the means."""
        return self.equations.linearise(
            self.charts.points, self.state.params, matching=self.problem.options.matching
        )

    @cached_property
    def factor(self) -> Factor:
        """Sparse factor of the curvature at the means."""
        found = self.equations.factorise(self.equations.curvature(self.linearised))
        if not found.is_positive:
            raise NotPositive(found.undetermined)
        return found

    def is_within(self, limits: tuple[int, int]) -> bool:
        """Whether the factor has at most so many pairs of elements and entries."""
        edges = sum(g.rows * sum(s.width for s in g.slots) ** 2 for g in self.problem.groups.groups)
        if edges > 4 * limits[0]:  # not even an order of elimination is looked for
            return False
        at = self.equations
        return len(at.pairs.first) <= limits[0] and at.ordering.fill <= limits[1]

    @cached_property
    def is_proper(self) -> bool:
        """Whether the messages inform every variable."""
        return all(bool(inverse(b.lam).proper.all()) for b in self.beliefs.values())

    @cached_property
    def covariances(self) -> dict[str, Tensor]:
        """Of the beliefs ``[N, d, d]``."""
        found = {n: inverse(b.lam) for n, b in self.beliefs.items()}
        if not all(bool(f.proper.all()) for f in found.values()):
            raise NumericalError(uninformed(self.problem, self.beliefs))
        return {n: f.matrix for n, f in found.items()}

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        """Exact covariances of the linearised model ``[N, d, d]``."""
        return {n: self.equations.covariance(self.factor, n) for n in self.problem.groups.families}


def finished(problem: Problem, state: State) -> Final:
    """Charts at the means: of the last state, or of the one of lowest energy if the run did not converge."""
    charts, means = state.charts, state.means
    if not state.run.converged and not state.run.energy <= state.best.energy:
        charts, means = state.best.charts, state.best.means
    charts = at_means(problem, charts, means)
    models, dropped = dict(charts.models), state.run.dropped
    for group in problem.moving:
        made = linear_model(group, charts.points, state.params)
        models[group.name], dropped = made.model, dropped + made.dropped
    charts = charts._replace(models=models)
    zero = {n: torch.zeros_like(m) for n, m in means.items()}
    rows = rows_of(problem, charts, zero, state.params, problem.options.graduated_steps)
    prior = own_terms(problem, rows, zero, 0.0)
    if state.run.proximal:
        charts = charts._replace(messages=_unheld(problem, charts, rows, prior))
    return Final(problem, state, charts, rows, summed(problem, prior, charts.messages), dropped)


def _unheld(
    problem: Problem, charts: Charts, rows: Mapping[str, Rows], prior: Mapping[str, Gaussian]
) -> dict[str, tuple[Gaussian, ...]]:
    """Messages without the proximal factor: precisions converge whatever the means do [Du2018]."""
    messages = dict(charts.messages)
    setting = Setting({g.name: 0.0 for g in problem.edges}, torch.Generator().manual_seed(0))
    beliefs = summed(problem, prior, messages)
    still = max(1e-10, 10 * torch.finfo(problem.groups.like.dtype).eps)
    for _ in range(_PRECISION_ROUNDS):
        before = beliefs
        made = run_round(problem, prior, messages, beliefs, rows, setting)
        messages, beliefs = made.messages, made.beliefs
        moves = [
            (beliefs[n].lam - b.lam).abs().amax() / b.lam.abs().amax() for n, b in before.items()
        ]
        if max(map(float, moves)) < still:
            break
    return messages


__all__ = ["Final", "finished"]
