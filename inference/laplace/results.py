"""The Gaussian at the mode: marginal and joint covariances, draws, evidence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ppl.diagnostics import Diagnostics
from ppl.inference.groups.losses import Robust
from ppl.inference.groups.records import FactorGroups
from ppl.inference.groups.weights import RobustWeights
from ppl.inference.laplace.problem import Problem, State
from ppl.inference.laplace.refinement import INACCURATE
from ppl.inference.laplace.spread import Deferred, Spread, is_positive
from ppl.inference.laplace.systems import rows_at
from ppl.marginals import JointGaussian, Marginal
from ppl.posterior import Joint, Posterior
from ppl.streams import Streams


def posterior(problem: Problem, state: State) -> Posterior:
    """Put a Gaussian at the last point; covariances and evidence are worked out when they are first asked for.

    Raises:
        NumericalError: an unknown is not determined.
    """
    spread = Deferred(problem, state)
    if not is_positive(problem, state):
        spread.evidence()  # or an error, now rather than later
    points = state.points
    result = Posterior(
        problem.bound,
        {},
        method="laplace",
        sampler=lambda n, streams: draw(problem, state, spread, n, streams),
        log_evidence=spread.evidence,
        diagnostics=_diagnostics(problem, state),
        params=state.params,
        seed=problem.settings.streams.seed,
        joints=lambda site: joint(problem.groups, points, spread, site),
    )
    # Set last: a plain dictionary would ask for every covariance at once.
    result.marginals = Marginals(problem.groups, points, spread)  # type: ignore[assignment]
    return result


class Marginals(Mapping[str, Marginal]):
    """The Gaussian of every latent; covariances are found on first use."""

    def __init__(self, groups: FactorGroups, points: Mapping[str, Tensor], spread: Spread) -> None:
        self._groups, self._points, self._spread = groups, points, spread
        self._found: dict[str, Marginal] = {}

    def __getitem__(self, name: str) -> Marginal:
        if name not in self._found:
            family = self._groups.families[name]  # KeyError for an unknown name, as it should be
            covariance = self._groups.shaped(name, self._spread.covariance(name))
            kind = None if family.manifold is None else family.manifold.name
            loc = self._groups.shaped(name, self._points[name])
            self._found[name] = JointGaussian(loc, covariance, kind)
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups.families)

    def __len__(self) -> int:
        return len(self._groups.families)

    def __contains__(self, name: object) -> bool:
        return name in self._groups.families


# ---- what the user asks for ----------------------------------------------------------------------


def draw(
    problem: Problem, state: State, spread: Spread, n: int, streams: Streams
) -> dict[str, Tensor]:
    """Joint draws of all latents ``[n, *plates, *event]``."""
    generator = streams.of("joint draws")
    with torch.no_grad():
        moves = spread.draws(
            lambda size: torch.randn(size, n, generator=generator, dtype=torch.float64)
        )
        found = {}
        for name, step in problem.equations.at.split(moves).items():
            family = problem.groups.families[name]
            points = state.points[name].expand(n, *state.points[name].shape)
            drawn = family.retract(points, step.movedim(-1, 0))
            found[name] = drawn.reshape(n, *family.sizes, *family.event_shape)
    return found


def joint(groups: FactorGroups, points: Mapping[str, Tensor], spread: Spread, site: str) -> Joint:
    """What the elements of a factor touch, as one Gaussian each. Of a chain these are the transitions."""
    group = [g for g in groups.groups if g.site == site or g.name == site][-1]
    lead = group.sizes
    means = [v.reshape(*lead, *_own(v.shape[1:])) for v in group.gather(points)]
    covariance = spread.joint(group)
    names = tuple(slot.family for slot in group.slots)
    return Joint(names, tuple(means), covariance.reshape(*lead, *covariance.shape[1:]))


def _own(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a slot's value: one element has no axis of its own."""
    return shape[1:] if shape[0] == 1 else shape


def _diagnostics(problem: Problem, state: State) -> Diagnostics:
    warnings = []
    if int(state.bad_rows):
        warnings.append(f"{int(state.bad_rows)} rows of factors are not finite and were left out")
    if float(state.kernel_scale) > 1:
        warnings.append(
            f"robust thresholds are still {float(state.kernel_scale):.3g} times too wide"
        )
    if state.window is not None and state.window.lost:
        warnings.append(
            f"{state.window.lost} new rows touch closed elements (lag=...) and were left out"
        )
    if problem.is_linear and INACCURATE < float(state.length) < math.inf:
        warnings.append(
            f"means are off by up to {float(state.length):.1g} standard deviations: scales differ too much for the arithmetic. "
            "Give latents units in which their spreads are alike"
            + (", or use float64" if problem.groups.like.dtype != torch.float64 else "")
        )
    if problem.solver == "cg":
        share = math.sqrt(2 / problem.options.draws)
        warnings.append(
            f"covariances are estimated from {problem.options.draws} draws (variances to {share:.0%} or better); "
            "draws= sets their number"
        )
    return Diagnostics(
        {}, {}, True, int(state.iteration), 0.0, tuple(warnings), _notes(problem, state)
    )


def _notes(problem: Problem, state: State) -> dict[str, Any]:
    notes: dict[str, Any] = {
        "energy": float(state.energy),
        "unknowns": problem.equations.at.size,
        "solver": problem.solver,
    }
    weights = _robust_weights(problem, state)
    if weights:
        notes["robust weights"] = weights
    return notes


def _robust_weights(problem: Problem, state: State) -> RobustWeights:
    """Weights of robust rows, by group."""
    problem = problem if state.window is None else state.window.problem
    if not any(isinstance(g.loss, Robust) for g in problem.groups.groups):
        return RobustWeights({})
    pairs = list(zip(problem.groups.groups, rows_at(problem, state), strict=True))
    return RobustWeights({g: r.weight for g, r in pairs if r.weight is not None})
