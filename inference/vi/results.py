"""The end of a run: moments of q itself, its bound, and the Pareto k of its importance weights.

Source: [Yao2018] for judging an approximation by the tail of its weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ppl import marginals as mg
from ppl.diagnostics import Diagnostics, tail_index
from ppl.errors import NumericalError
from ppl.inference.numerics import flat_gaussian as gaussians
from ppl.inference.particles.lanes import Lanes, make_lanes, summed_latents
from ppl.inference.vi.bounds import MassivelyParallel
from ppl.inference.vi.coordinates import Group, Part, in_variable_order, to_values
from ppl.inference.vi.estimators.reparameterised import bound_at
from ppl.inference.vi.problem import (
    Problem,
    State,
    draw_noise,
    log_unit,
    param_values,
)
from ppl.marginals import Marginal
from ppl.posterior import Evidence, Posterior
from ppl.streams import Streams

_NUMBERS = 2**24  # in the arrays of one chunk of draws
_KEPT = 2**26  # numbers in the draws behind moments of latents that are not on the real line
_REPEATS = 50  # of the massively parallel bound


class Draws(NamedTuple):
    """Independent draws of q, and the tables of the discrete latents that were summed."""

    log_weights: Tensor  # [n], log joint density minus log q
    tables: dict[str, Tensor]  # [*plates, V], averaged over draws


def posterior(problem: Problem, state: State) -> Posterior:
    """Collect the results of the best restart."""
    state = _averaged(state)
    best, agreement = _best(problem, state)
    fitted = _Fitted(problem, state, best)
    draws = _judge(fitted)
    if not bool(draws.log_weights.isfinite().any()):
        raise NumericalError(
            "no draw of q has a finite weight. Run longer, or lower learning_rate."
        )
    found = _marginals(fitted) | {n: mg.Table(t) for n, t in draws.tables.items()}
    latents = [v.name for v in problem.bound.graph.latents]
    return Posterior(
        problem.bound,
        {name: found[name] for name in latents},
        method="vi",
        sampler=fitted.sample,
        log_evidence=_evidence(fitted, draws),
        diagnostics=_diagnostics(fitted, draws, agreement),
        params={n: p[0] for n, p in fitted.constants.items()},
        seed=problem.settings.streams.seed,
    )


class _Fitted:
    """The approximation that is kept: one restart of the last state."""

    def __init__(self, problem: Problem, state: State, restart: int) -> None:
        self.problem, self.state, self.restart = problem, state, restart
        self.origin = state.origin
        self.theta = state.ascent.theta[restart : restart + 1]
        self.constants = param_values(problem, self.theta)

    def draw(self, n: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """Continuous latents ``[n, *plates, *event]``, and their log-density ``[n]``."""
        values: dict[str, Tensor] = {}
        log_q = self.theta.new_zeros(n)
        for g in self.problem.groups:
            piece, origin = g.piece, self.origin[g.piece.name]
            at = gaussians.views(piece, self.theta)
            v = gaussians.sample(
                piece, at, gaussians.noise(piece, (1, 1), n, self.theta, generator)
            )
            density = gaussians.log_density(piece, at, v) - log_unit(origin)
            u = origin.centre.unsqueeze(-2) + origin.unit.unsqueeze(-2) * v[0, 0]
            found, log_jacobian = to_values(g, u)
            for part in g.parts:
                name = part.variable.name
                values[name] = in_variable_order(g, part, found[name])
            log_q = log_q + (density[0, 0] - log_jacobian).reshape(-1, n).sum(0)
        return values, log_q

    def with_params(self, values: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
        """The values together with the learned constants."""
        return {**values, **{k: p.expand(n, *p.shape[1:]) for k, p in self.constants.items()}}

    def lanes(self, n: int, to_draw: bool = False) -> Lanes:
        """Log-densities of ``n`` draws."""
        options, settings = self.problem.options, self.problem.settings
        return make_lanes(
            self.problem.bound, n, options.enumerate_up_to, settings.memory, to_draw=to_draw
        )

    def sample(self, n: int, streams: Streams) -> dict[str, Tensor]:
        """Joint draws of all latents; discrete ones given the others."""
        generator = streams.of("joint draws")
        if not summed_latents(self.problem.bound.graph, self.problem.options.enumerate_up_to):
            return self.draw(n, generator)[0]
        parts = []
        with torch.no_grad():
            for size in _chunks(n, self._chunk(n)):
                values, _ = self.draw(size, generator)
                lanes = self.lanes(size, to_draw=True)
                factors = lanes.factors(self.with_params(values, size))
                index = lanes.plan.draw(factors, 1, generator)
                for s in lanes.summed:
                    chosen = lanes.in_order(s, index[s.axis][0])
                    values[s.variable.name] = chosen.to(self.problem.bound.dtype)
                parts.append(values)
        return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    def _chunk(self, n: int) -> int:
        per_draw = max([1, *(v.numel() for v in self.problem.bound.values.values())])
        return max(1, min(n, _NUMBERS // per_draw))

    def chunks(self, n: int) -> list[int]:
        """Sizes of the parts that ``n`` draws are made in."""
        return list(_chunks(n, self._chunk(n)))


def _chunks(n: int, size: int) -> Iterator[int]:
    for first in range(0, n, size):
        yield min(size, n - first)


def _averaged(state: State) -> State:
    """The state at the average of its last iterates, which moves less than the last of them."""
    return state._replace(ascent=state.ascent._replace(theta=state.ascent.mean))


# ---- the bound and its test --------------------------------------------------------------------------------------


def _best(problem: Problem, state: State) -> tuple[int, str]:
    """The restart with the highest bound, and how far the others agree."""
    if problem.target.restarts == 1:
        return 0, ""
    bounds = torch.stack([_bounds(problem, state) for _ in range(10)]).mean(0)
    near = int((bounds > bounds.max() - 3).sum())
    text = f"{near} of {len(bounds)} restarts reach the best bound within 3 nats"
    return int(bounds.nan_to_num(nan=-math.inf).argmax()), text


def _bounds(problem: Problem, state: State) -> Tensor:
    """One evaluation of the bound of every restart ``[R]``."""
    theta = state.ascent.theta
    with torch.no_grad():
        noise = draw_noise(problem, theta)
        draws = {}
        for g in problem.groups:
            at = gaussians.views(g.piece, theta)
            draws[g.piece.name] = gaussians.sample(g.piece, at, noise[g.piece.name])
        return bound_at(problem, state, draws, theta, param_values(problem, theta))


def _judge(fitted: _Fitted) -> Draws:
    """Weigh fresh joint draws of q."""
    problem = fitted.problem
    generator = problem.settings.streams.of("final draws")
    weights: list[Tensor] = []
    tables: dict[str, Tensor] = {}
    total = problem.options.final_draws
    lanes: Lanes | None = None
    for size in fitted.chunks(total):
        lanes = lanes if lanes is not None and lanes.count == size else fitted.lanes(size)
        with torch.no_grad():
            values, log_q = fitted.draw(size, generator)
            factors = lanes.factors(fitted.with_params(values, size))
            log_joint = lanes.plan.log_evidence(factors)
        weights.append(log_joint - log_q)
        if lanes.summed:
            _, found = lanes.plan.marginals(factors)
            for s in lanes.summed:
                table = lanes.in_order(s, found[s.axis].detach()).sum(0) / total
                tables[s.variable.name] = tables.get(s.variable.name, 0.0) + table
    return Draws(torch.cat(weights), tables)


def _evidence(fitted: _Fitted, draws: Draws) -> Evidence:
    """The bound that was maximised, without tempering, and its standard error."""
    problem = fitted.problem
    k = problem.options.particle_count
    if isinstance(problem.target, MassivelyParallel):
        values = torch.stack(
            [_bounds(problem, fitted.state)[fitted.restart] for _ in range(_REPEATS)]
        )
    else:
        usable = draws.log_weights[: len(draws.log_weights) // k * k].reshape(-1, k)
        values = usable.logsumexp(-1) - math.log(k)
    se = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return Evidence(float(values.mean()), se, "bound")


def _diagnostics(fitted: _Fitted, draws: Draws, agreement: str) -> Diagnostics:
    options = fitted.problem.options
    k = tail_index(draws.log_weights.softmax(0))
    family = options.family + (f" of rank {options.rank}" if options.family == "low_rank" else "")
    notes: dict[str, object] = {
        "moments": f"of the {family} Gaussian itself; posterior.reweight(1000) weighs its draws",
        "final draws": len(draws.log_weights),
    }
    if agreement:
        notes["restarts"] = agreement
    warnings = []
    if options.tempering != 1.0:
        warnings.append(f"the KL term was weighted by {options.tempering:g}: not a posterior")
    return Diagnostics({}, {"all latents together": k}, True, 0, 0.0, tuple(warnings), notes)


# ---- marginals ---------------------------------------------------------------------------------------------------


def _marginals(fitted: _Fitted) -> dict[str, Marginal]:
    problem = fitted.problem
    names = {p.variable.name for g in problem.groups for p in g.parts if p.transform is not None}
    points: dict[str, Tensor] = {}
    if names:
        generator = problem.settings.streams.of("final moments")
        cells = sum(g.piece.cells for g in problem.groups)
        n = max(min(problem.options.final_draws, _KEPT // max(cells, 1)), 100)
        kept = [fitted.draw(size, generator)[0] for size in fitted.chunks(n)]
        points = {name: torch.cat([k[name] for k in kept]) for name in names}
    found: dict[str, Marginal] = {}
    for group in problem.groups:
        for part in group.parts:
            name = part.variable.name
            if name in points:
                found[name] = _even(points[name], len(part.variable.plates))
            else:
                found[name] = _gaussian(fitted, group, part)
    return found


def _even(points: Tensor, plates: int) -> mg.Weighted:
    shape = points.shape[: 1 + plates]
    weight = torch.full((), 1 / len(points), dtype=points.dtype, device=points.device)
    return mg.Weighted(points, weight.expand(shape))


def _gaussian(fitted: _Fitted, group: Group, part: Part) -> Marginal:
    """The Gaussian of a latent on the real line; with covariances where its event is a vector and q has them."""
    piece, origin = group.piece, fitted.origin[group.piece.name]
    at = gaussians.views(piece, fitted.theta)
    loc = origin.centre + origin.unit * at.loc[0]
    if not part.free_shape or piece.family == "mean_field":
        sd = origin.unit * gaussians.sds(piece, at)[0]
        return mg.Gaussian(_cut(group, part, loc), _cut(group, part, sd))
    roots = origin.unit.unsqueeze(-1) * gaussians.roots(piece, at)[0]  # [*plates, D, m]
    roots = roots[..., part.start : part.stop, :]
    event = math.prod(part.free_shape)
    roots = roots.reshape(*piece.plates, *part.sizes, event, roots.shape[-1])
    covariance = roots @ roots.mT
    if piece.family == "low_rank":
        own = (origin.unit * at.raw[0].exp()).square()[..., part.start : part.stop]
        own = own.reshape(*piece.plates, *part.sizes, event)
        covariance = covariance + torch.diag_embed(own)
    have = (*group.plates, *part.inner)
    order = [have.index(p) for p in part.variable.plates]
    covariance = covariance.permute(*order, len(have), len(have) + 1)
    return mg.JointGaussian(_cut(group, part, loc), covariance)


def _cut(group: Group, part: Part, array: Tensor) -> Tensor:
    """A latent's ``[*plates, *event]`` out of ``[*plates of the group, D]``."""
    own = array[..., part.start : part.stop]
    own = own.reshape((*group.piece.plates, *part.sizes, *part.free_shape))
    return in_variable_order(group, part, own.unsqueeze(len(group.plates)))[0]
