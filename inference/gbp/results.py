"""The posterior: means, covariances, joints, evidence, and what a user must be told of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ppl.diagnostics import Diagnostics
from ppl.errors import NumericalError
from ppl.inference.gbp.evidence import joint_covariance, log_evidence
from ppl.inference.gbp.kernel import own_terms, rows_of
from ppl.inference.gbp.models import Rows, linear_model
from ppl.inference.gbp.monitor import cures, uninformed
from ppl.inference.gbp.problem import Problem, summary
from ppl.inference.gbp.relinearise import Charts, at_means
from ppl.inference.gbp.rounds import Setting, run_round, summed
from ppl.inference.gbp.state import State
from ppl.inference.groups import Robust
from ppl.inference.groups.equations import Equations
from ppl.inference.numerics.gaussian import Gaussian, inverse
from ppl.inference.numerics.sparse import Factor, NotPositive
from ppl.marginals import JointGaussian
from ppl.posterior import Evidence, Joint, Posterior
from ppl.streams import Streams

_CHEAP = 300_000, 10_000_000  # pairs of elements, entries of the factor: a second or two
_FEASIBLE = 3_000_000, 150_000_000
_OUTLIER = 0.1  # robust weight below which a row counts as one
_PRECISION_ROUNDS = 500  # for precisions without the proximal factor


@dataclass(frozen=True, eq=False)
class Final:
    """A finished run with its charts at the means, where everything is read off."""

    problem: Problem
    state: State
    charts: Charts
    rows: Mapping[str, Rows]
    beliefs: Mapping[str, Gaussian]

    @cached_property
    def equations(self) -> Equations:
        """The direct solve of the same factors."""
        return Equations(self.problem.groups)

    @cached_property
    def factor(self) -> Factor:
        """Sparse factor of the curvature at the means."""
        rows = self.equations.linearise(
            self.charts.points, self.state.params, matching=self.problem.options.matching
        )
        found = self.equations.factorise(self.equations.curvature(rows))
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


def posterior(problem: Problem, state: State) -> Posterior:
    """Read off the beliefs.

    Raises:
        NumericalError: a variable without absolute information, named with its label.
    """
    with torch.no_grad():
        final = finished(problem, state)
        notes, alarms = _notes(final), _alarms(final)
        is_exact = _checked(final, notes)
        covariances = final.exact if is_exact else final.covariances
        evidence = _evidence(final)
    return Posterior(
        problem.bound,
        {n: _marginal(final, n, c) for n, c in covariances.items()},
        method="gbp",
        sampler=lambda n, streams: draws(final, n, streams),
        log_evidence=evidence,
        diagnostics=Diagnostics(
            {}, {}, state.run.converged, state.round, 0.0, tuple(alarms), notes
        ),
        params=dict(state.params),
        seed=problem.seed,
        joints=lambda site: joint(final, site, is_exact),
    )


def finished(problem: Problem, state: State) -> Final:
    """Charts at the means: of the last state, or of the one of lowest energy if the run did not converge."""
    charts, means = state.charts, state.means
    if not state.run.converged and not state.run.energy <= state.best.energy:
        charts, means = state.best.charts, state.best.means
    charts = at_means(problem, charts, means)
    models = dict(charts.models)
    for group in problem.moving:
        models[group.name] = linear_model(group, charts.points, state.params).model
    charts = charts._replace(models=models)
    zero = {n: torch.zeros_like(m) for n, m in means.items()}
    rows = rows_of(problem, charts, zero, state.params, problem.options.graduate_rounds)
    prior = own_terms(problem, rows, zero, 0.0)
    if state.run.proximal:
        charts = charts._replace(messages=_unheld(problem, charts, rows, prior))
    return Final(problem, state, charts, rows, summed(problem, prior, charts.messages))


def _unheld(
    problem: Problem, charts: Charts, rows: Mapping[str, Rows], prior: Mapping[str, Gaussian]
) -> dict[str, tuple[Gaussian, ...]]:
    """Messages without the proximal factor: precisions converge whatever the means do [Du2018]."""
    messages = dict(charts.messages)
    setting = Setting({g.name: 0.0 for g in problem.edges}, torch.Generator().manual_seed(0))
    beliefs = summed(problem, prior, messages)
    for _ in range(_PRECISION_ROUNDS):
        before = beliefs
        made = run_round(problem, prior, messages, beliefs, rows, setting)
        messages, beliefs = made.messages, made.beliefs
        moves = [
            (beliefs[n].lam - b.lam).abs().amax() / b.lam.abs().amax() for n, b in before.items()
        ]
        if max(map(float, moves)) < 1e-10:
            break
    return messages


def _marginal(final: Final, name: str, covariance: Tensor) -> JointGaussian:
    groups = final.problem.groups
    family = groups.families[name]
    kind = None if family.manifold is None else family.manifold.name
    loc = groups.shaped(name, final.charts.points[name])
    return JointGaussian(loc, groups.shaped(name, covariance), kind)


# ---- variances -------------------------------------------------------------------------------------------------


def _checked(final: Final, notes: dict[str, Any]) -> bool:
    """Compare the beliefs' variances with exact ones where that is wanted or cheap; whether to report the latter."""
    problem, wanted = final.problem, final.problem.options.variance
    if problem.plan.is_tree and final.state.run.converged:
        notes["variances"] = "exact for the linearised factors: the graph is a tree"
        return False
    if wanted == "gbp" or (wanted == "auto" and not final.is_within(_CHEAP)):
        notes["variances"] = (
            "of the messages: too small on a graph with loops; variance='check' measures by how much, "
            "variance='exact' solves for them"
        )
        return False
    try:
        notes["variances"] = _ratios(final)
    except NotPositive as error:
        raise NumericalError(_free(final, error)) from None
    return wanted == "exact"


def _free(final: Final, error: NotPositive) -> str:
    return (
        f"{final.equations.at.label(int(error.columns[0]))} has no absolute information: the factors leave a direction free "
        "on which its law is flat. Give it a proper law, or observe one element (an anchor)."
    )


def _ratios(final: Final) -> str:
    loopy = torch.cat([c.diagonal(dim1=-2, dim2=-1).flatten() for c in final.covariances.values()])
    exact = torch.cat([c.diagonal(dim1=-2, dim2=-1).flatten() for c in final.exact.values()])
    ratio = loopy / exact
    said = "exact" if final.problem.options.variance == "exact" else "of the messages, not exact"
    return (
        f"{said}; ratio of the messages' variances to exact ones: min {float(ratio.min()):.3g}, "
        f"median {float(ratio.median()):.3g}, max {float(ratio.max()):.3g}"
    )


def joint(final: Final, site: str, is_exact: bool) -> Joint:
    """The Gaussian of what the elements of a factor touch. Of a chain these are the transitions."""
    groups, charts = final.problem.groups, final.charts
    group = [g for g in groups.groups if g.site == site or g.name == site][-1]
    means = []
    for value in group.gather(charts.points):
        own = value.shape[2:] if value.shape[1] == 1 else value.shape[1:]
        means.append(value.reshape(*group.sizes, *own))
    with torch.no_grad():
        if is_exact:
            found = final.equations.joint_covariance(final.factor, group)
        else:
            sent = charts.messages.get(group.name)
            found = joint_covariance(
                final.problem, group, final.rows[group.name], sent, final.beliefs
            )
    names = tuple(slot.family for slot in group.slots)
    return Joint(names, tuple(means), found.reshape(*group.sizes, *found.shape[1:]))


# ---- draws -----------------------------------------------------------------------------------------------------


def draws(final: Final, n: int, streams: Streams) -> dict[str, Tensor]:
    """Joint draws ``[n, *plates, *event]`` of the linearised model, or independent ones where that is too large."""
    generator = streams.of("joint draws")
    with torch.no_grad():
        moves = _joint_moves(final, n, generator)
        if moves is None:
            warnings.warn(
                "gbp: the graph is too large for joint draws; those of different elements are independent",
                stacklevel=4,
            )
            moves = _independent_moves(final, n, generator)
        found = {}
        for name, family in final.problem.groups.families.items():
            points = final.charts.points[name]
            drawn = family.retract(points.expand(n, *points.shape), moves[name])
            found[name] = drawn.reshape(n, *family.sizes, *family.event_shape)
    return found


def _joint_moves(final: Final, n: int, generator: torch.Generator) -> dict[str, Tensor] | None:
    if not final.is_within(_FEASIBLE):
        return None
    try:
        factor = final.factor
    except NotPositive:
        return None
    noise = torch.randn(final.equations.at.size, n, generator=generator, dtype=torch.float64)
    flat = torch.from_numpy(factor.draws(noise.numpy())).to(final.problem.groups.like)
    return {name: x.movedim(-1, 0) for name, x in final.equations.at.split(flat).items()}


def _independent_moves(final: Final, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    found = {}
    for name, covariance in final.covariances.items():
        root = torch.linalg.cholesky(covariance)
        shape = (n, *covariance.shape[:-1])
        noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(root)
        found[name] = (root @ noise.unsqueeze(-1)).squeeze(-1)
    return found


# ---- evidence and diagnostics ----------------------------------------------------------------------------------


def _evidence(final: Final) -> Evidence | None:
    problem, state = final.problem, final.state
    if state.run.proximal or not state.run.converged:
        return None  # the messages are not a fixed point of the model's own
    groups = problem.groups
    at_charts = groups.log_density(final.charts.points, state.params)
    value = log_evidence(problem, final.rows, final.charts.messages, final.beliefs, at_charts)
    if value is None:
        return None
    kind = ("exact" if problem.plan.is_linear else "Laplace") if problem.plan.is_tree else "Bethe"
    laws = [f.law for f in problem.bound.graph.densities if f.law is not None]
    if any(getattr(law.family, "is_improper", False) for law in laws):
        kind += ", improper prior"
    return Evidence(value, 0.0, kind)


def _notes(final: Final) -> dict[str, Any]:
    problem, run = final.problem, final.state.run
    points = final.charts.points
    notes: dict[str, Any] = {
        "graph": summary(problem),
        "energy": float(problem.groups.energy(points, final.state.params)),
        "rate": run.rate,
    }
    if run.tally.floored:
        notes["floored cavities in the last round"] = run.tally.floored
    if problem.moving:
        notes["rows linearised again"] = f"{run.moved} in the last round, {run.moved_in_all} in all"
    if run.stage:
        notes["cure"] = (
            f"damping {run.damping:g}, proximal {run.proximal:g}, relinearise {run.policy}"
        )
    weights = _robust_weights(final)
    if weights:
        notes["robust weights"] = weights
        notes["outliers"] = {
            name: f"{int((w < _OUTLIER).sum())} of {w.numel()} have a weight below {_OUTLIER}"
            for name, w in weights.items()
        }
    return notes


def _robust_weights(final: Final) -> dict[str, Tensor]:
    """Weights ``[*plates]`` of robust rows at the means, by group."""
    found = {}
    for group in final.problem.groups.groups:
        if isinstance(group.loss, Robust):
            outputs = final.charts.models[group.name].outputs
            matching = final.problem.options.matching
            weight = group.loss.terms(outputs, final.state.params, matching, 1.0).weight
            assert weight is not None
            found[group.name] = weight.reshape(*group.sizes, *weight.shape[1:])
    return found


def _alarms(final: Final) -> list[str]:
    run, found = final.state.run, []
    if run.failed:
        tried = f", {len(cures(final.problem))} cures tried" if run.stage else ""
        found.append(
            f"the messages do not converge ({run.failed}{tried}); this is the state of lowest energy. Try damping=, "
            "proximal=, a start near the solution, or method='laplace'"
        )
    if run.dropped:
        found.append(f"{run.dropped} rows of factors are not finite and were left out")
    if run.tally.bad:
        found.append(
            f"{run.tally.bad} rows kept old messages in the last round: the new ones were not finite"
        )
    return found


__all__ = ["Final", "draws", "finished", "joint", "posterior"]
