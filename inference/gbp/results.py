"""The posterior: means, covariances, joints, evidence, and what a user must be told of them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ppl.diagnostics import Diagnostics
from ppl.inference.gbp.cures import cures
from ppl.inference.gbp.evidence import joint_covariance, log_evidence
from ppl.inference.gbp.exactness import checked
from ppl.inference.gbp.final import Final, finished
from ppl.inference.gbp.problem import Problem, summary
from ppl.inference.gbp.state import State
from ppl.inference.groups import Robust
from ppl.inference.groups.weights import RobustWeights
from ppl.inference.numerics.sparse import NotPositive
from ppl.marginals import JointGaussian
from ppl.posterior import Evidence, Joint, Posterior
from ppl.streams import Streams

_FEASIBLE = 3_000_000, 150_000_000


def posterior(problem: Problem, state: State) -> Posterior:
    """Read off the beliefs.

    Raises:
        NumericalError: a variable without absolute information, named with its label.
    """
    with torch.no_grad():
        final = finished(problem, state)
        notes, alarms = _notes(final), _alarms(final)
        is_exact = checked(final, notes, alarms)
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


def _marginal(final: Final, name: str, covariance: Tensor) -> JointGaussian:
    groups = final.problem.groups
    family = groups.families[name]
    kind = None if family.manifold is None else family.manifold.name
    loc = groups.shaped(name, final.charts.points[name])
    return JointGaussian(loc, groups.shaped(name, covariance), kind)


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
    if problem.bound.graph.is_improper:
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
    return notes


def _robust_weights(final: Final) -> RobustWeights:
    """Weights of robust rows at the means."""
    found = {}
    for group in final.problem.groups.groups:
        if isinstance(group.loss, Robust):
            outputs = final.charts.models[group.name].outputs
            matching = final.problem.options.matching
            weight = group.loss.terms(outputs, final.state.params, matching, 1.0).weight
            assert weight is not None
            found[group] = weight
    return RobustWeights(found)


def _alarms(final: Final) -> list[str]:
    run, found = final.state.run, []
    if run.failed:
        tried = f", {len(cures(final.problem))} cures tried" if run.stage else ""
        found.append(
            f"the messages do not converge ({run.failed}{tried}); this is the state of lowest energy. Try damping=, "
            "proximal=, a start near the solution, or method='laplace'"
        )
    if final.dropped:
        found.append(f"{final.dropped} rows of factors are not finite and were left out")
    if run.tally.bad:
        found.append(
            f"{run.tally.bad} rows kept old messages in the last round: the new ones were not finite"
        )
    return found


__all__ = ["draws", "joint", "posterior"]
