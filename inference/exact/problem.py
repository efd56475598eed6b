"""The backend ``exact``: options, the one step, and the posterior it leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.backend import Info, Settings
from ppl.binding import Bound
from ppl.diagnostics import Diagnostics
from ppl.errors import NumericalError, UnsupportedError
from ppl.graph import Variable
from ppl.inference.exact.gaussian import GaussianPart, Solution, covariances, draw, variances
from ppl.inference.exact.integrand import Case, Integrand, make_integrand
from ppl.inference.exact.quadrature import expected_nodes, integrate, nodes_of
from ppl.inference.exact.split import split
from ppl.marginals import Gaussian, GaussianMixture, JointGaussian, Marginal, Table, Weighted
from ppl.posterior import Evidence, Posterior
from ppl.streams import Streams

_MOST_WORK = 1e14  # operations; half an hour or more
_NEGLIGIBLE = 1e-13  # share of the total weight below which the lightest cases are dropped


@dataclass(frozen=True)
class Exact:
    """Options of ``method="exact"``."""

    tol: float = 1e-6  # error of log evidence (nats) and moments (sd) of the quadrature


@dataclass(frozen=True, eq=False)
class Problem:
    """What ``prepare`` returns."""

    bound: Bound
    options: Exact
    integrand: Integrand
    max_iters: int = 1


class State(NamedTuple):
    """The nodes of the quadrature and the log-weights of all cases; empty before the step."""

    point: Tensor  # [n, d], unconstrained
    log_weight: Tensor  # [n, C], nats; they sum to the evidence
    error: Tensor  # [], of log evidence (nats) and moments (sd), estimated from coarser rules


def prepare(bound: Bound, options: Exact, settings: Settings) -> Problem:
    """Split the latents and lower every factor.

    Raises:
        UnsupportedError: an option of ``infer`` is not supported, or the work would take hours.
    """
    if settings.minibatch is not None:
        raise UnsupportedError("exact does not support minibatch=. Leave it out.")
    integrand = make_integrand(bound, split(bound.graph), settings.memory)
    work = _work(integrand)
    if work > _MOST_WORK:
        raise UnsupportedError(
            f"exact would need about {work:.1g} operations, more than {_MOST_WORK:.0g}. Use "
            "method='qem'."
        )
    return Problem(bound, options, integrand)


def init(problem: Problem) -> State:
    """An empty state."""
    zero = torch.zeros((), dtype=problem.bound.dtype, device=problem.bound.device)
    return State(zero.new_zeros(0, problem.integrand.parts.outer_dims), zero.new_zeros(0, 1), zero)


def step(problem: Problem, state: State, batch: object) -> tuple[State, Info]:
    """Integrate everything; one step is all there is.

    Raises:
        NumericalError: the posterior is improper, or no value is possible.
    """
    with torch.no_grad():
        found = _solved(problem)
    total = float(found.log_weight.flatten().logsumexp(0))
    return found, Info({"log_evidence": total}, done=True)


def _solved(problem: Problem) -> State:
    integrand, dims = problem.integrand, problem.integrand.parts.outer_dims
    start = torch.zeros(dims, dtype=problem.bound.dtype, device=problem.bound.device)
    if not dims:
        centred = _centred(integrand, start.unsqueeze(0))
        log = centred.by_configuration(start.unsqueeze(0))
        _check_possible(problem, log)
        return State(start.unsqueeze(0), log, start.new_zeros(()))
    # A first look places the Gaussian algebra; the integral is then taken around that centre.
    centred = _centred(integrand, _start(integrand, start))
    grid = integrate(centred.log_density, start, problem.options.tol)
    kept = grid.log_density + grid.log_weight > (grid.log_density + grid.log_weight).max() - 45.0
    point, rule = grid.point[kept], grid.log_weight[kept]
    log = centred.by_configuration(point) + rule.unsqueeze(-1)
    return State(point, log, start.new_tensor(grid.error))


def _start(integrand: Integrand, origin: Tensor) -> Tensor:
    """The best of some points around the origin: ``[1, d]``."""
    points = nodes_of(origin, 9)
    return points[integrand.log_density(points).argmax()].unsqueeze(0)


def _centred(integrand: Integrand, point: Tensor) -> Integrand:
    logs = integrand.by_configuration(point)[0]
    return integrand.around(Case(point, logs.argmax().reshape(1)))


def _check_possible(problem: Problem, log: Tensor) -> None:
    if bool((log > -torch.inf).any()):
        return
    if problem.integrand.gaussian is not None:
        names = ", ".join(f"'{v.name}'" for v in problem.integrand.parts.gaussian)
        raise NumericalError(
            f"the joint Gaussian of {names} is not proper: the data leave a direction free on "
            "which the priors are flat. "
            "Give proper priors, or drop a covariate that the others determine."
        )
    raise NumericalError(
        "the data have probability zero under every value of the latents. Check data and laws."
    )


# ---- the posterior -------------------------------------------------------------------------------


class _Cases(NamedTuple):
    """The cases that matter, and their posterior probabilities."""

    case: Case
    weight: Tensor  # [g]
    integrand: Integrand


def posterior(problem: Problem, state: State) -> Posterior:
    """Marginals of every latent, joint draws, evidence."""
    with torch.no_grad():
        cases = _cases(problem, state)
        marginals = _marginals(problem, cases)
    value = float(state.log_weight.flatten().logsumexp(0))
    return Posterior(
        problem.bound,
        marginals,
        method="exact",
        sampler=lambda n, streams: _draws(problem, cases, n, streams),
        log_evidence=Evidence(value, 0.0, _kind(problem)),
        diagnostics=_diagnostics(problem, state, cases),
    )


def _kind(problem: Problem) -> str:
    return "exact, improper prior" if problem.bound.graph.is_improper else "exact"


def _diagnostics(problem: Problem, state: State, cases: _Cases) -> Diagnostics:
    error, notes = float(state.error), []
    if not error <= problem.options.tol:
        notes.append(
            f"quadrature: log evidence and moments (in sd) may be wrong by {error:.1g}, more than "
            f"tol={problem.options.tol:.1g}; the integrand is not smooth, or has narrow parts"
        )
    about = {"nodes": len(state.point), "cases": cases.case.number, "quadrature error": error}
    return Diagnostics({}, {}, True, 1, 0.0, tuple(notes), about)


def _cases(problem: Problem, state: State) -> _Cases:
    """Every node and configuration of positive weight, the lightest dropped."""
    log = state.log_weight.flatten()
    weight = log.softmax(0)
    order = weight.argsort()
    kept = order[weight[order].cumsum(0) > _NEGLIGIBLE]
    count = state.log_weight.shape[1]
    case = Case(state.point[kept // count], kept % count)
    weight = weight[kept] / weight[kept].sum()
    integrand = problem.integrand.around(case.at(slice(-1, None)))
    return _Cases(case, weight, integrand)


def _marginals(problem: Problem, cases: _Cases) -> dict[str, Marginal]:
    integrand = cases.integrand
    found: dict[str, Marginal] = {}
    values = integrand.values(cases.case)
    for v in integrand.parts.outer:
        weights = cases.weight.reshape(-1, *(1,) * len(v.plates))
        shape = (cases.case.number, *(problem.bound.size(p) for p in v.plates))
        found[v.name] = Weighted(values[v.name], weights.expand(shape))
    for v in integrand.parts.listed:
        hits = values[v.name].unsqueeze(-1) == torch.arange(
            v.cardinality or 1, device=cases.weight.device
        )
        found[v.name] = Table(torch.tensordot(cases.weight, hits.to(cases.weight.dtype), 1))
    found |= _gaussian_marginals(cases) | _summed_marginals(cases)
    return {v.name: found[v.name] for v in problem.bound.graph.latents}


def _gaussian_marginals(cases: _Cases) -> dict[str, Marginal]:
    integrand = cases.integrand
    part = integrand.gaussian
    if part is None:
        return {}
    if cases.case.number == 1:
        solution = part.solve(integrand.values(cases.case), 1)
        return {v.name: _of_one_case(part, solution, v) for v in integrand.parts.gaussian}
    means, spreads = [], []
    for rows in integrand.chunks(cases.case.number):
        chunk = cases.case.at(rows)
        solution = part.solve(integrand.values(chunk), chunk.number)
        means.append(solution.mean)
        spreads.append(variances(solution).sqrt())
    loc, scale = part.sites(torch.cat(means)), part.sites(torch.cat(spreads))
    return {n: GaussianMixture(loc[n], scale[n], cases.weight) for n in loc}


def _of_one_case(part: GaussianPart, solution: Solution, variable: Variable) -> Marginal:
    """A Gaussian an element; of vectors with the covariance within each."""
    start, shape = part.places[variable.name]
    loc = part.sites(solution.mean[0])[variable.name]
    entries = variable.dims
    if entries == 1:
        return Gaussian(loc, part.sites(variances(solution)[0].sqrt())[variable.name])
    within = covariances(solution, start, math.prod(shape) // entries, entries)[0]
    plates = shape[: len(shape) - len(variable.event_shape)]
    return JointGaussian(loc, within.reshape(*plates, entries, entries))


def _summed_marginals(cases: _Cases) -> dict[str, Marginal]:
    integrand = cases.integrand
    totals: dict[str, Tensor] = {}
    if integrand.contraction is None:
        return {}
    for rows in integrand.chunks(cases.case.number):
        chunk = cases.case.at(rows)
        tables = integrand.contraction.tables(integrand.values(chunk), chunk.number)
        for name, table in tables.items():
            part = torch.tensordot(cases.weight[rows], table, 1)
            totals[name] = totals[name] + part if name in totals else part
    return {name: Table(table) for name, table in totals.items()}


def _draws(problem: Problem, cases: _Cases, n: int, streams: Streams) -> Mapping[str, Tensor]:
    """Joint draws: a case by its weight, then everything else given the case."""
    with torch.no_grad():
        generator = torch.Generator(cases.weight.device).manual_seed(streams.seed)
        chosen = torch.multinomial(cases.weight, n, replacement=True, generator=generator)
        drawn = dict(cases.integrand.values(cases.case.at(chosen)))
        drawn |= _gaussian_draws(cases, chosen, generator) | _summed_draws(cases, chosen, generator)
    return {v.name: drawn[v.name] for v in problem.bound.graph.latents}


def _gaussian_draws(cases: _Cases, chosen: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    part = cases.integrand.gaussian
    if part is None:
        return {}
    noise = torch.randn(
        (len(chosen), part.dims),
        generator=generator,
        dtype=cases.weight.dtype,
        device=cases.weight.device,
    )
    if cases.case.number == 1:
        solution = part.solve(cases.integrand.values(cases.case), 1)
        return part.sites(draw(solution, noise.unsqueeze(0))[0])
    flat = []
    for rows in cases.integrand.chunks(len(chosen)):
        chunk = cases.case.at(chosen[rows])
        solution = part.solve(cases.integrand.values(chunk), chunk.number)
        flat.append(draw(solution, noise[rows].unsqueeze(1))[:, 0])
    return part.sites(torch.cat(flat))


def _summed_draws(cases: _Cases, chosen: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    integrand = cases.integrand
    if integrand.contraction is None:
        return {}
    parts: dict[str, list[Tensor]] = {}
    for rows in integrand.chunks(len(chosen)):
        chunk = cases.case.at(chosen[rows])
        drawn = integrand.contraction.draw(integrand.values(chunk), chunk.number, generator)
        for name, index in drawn.items():
            parts.setdefault(name, []).append(index.to(cases.weight.dtype))
    return {name: torch.cat(pieces) for name, pieces in parts.items()}


# ---- what it would cost --------------------------------------------------------------------------


def cost(bound: Bound) -> float:
    """Operations that a fit takes, about."""
    return _work(make_integrand(bound, split(bound.graph), None))


def _work(integrand: Integrand) -> float:
    parts = integrand.parts
    return integrand.flops * parts.configurations * expected_nodes(parts.outer_dims)


def describe(bound: Bound, options: Exact, settings: Settings) -> str:
    """One line for ``explain``: how each latent is integrated out, and the work.

    Raises:
        UnsupportedError: as for :func:`prepare`.
    """
    integrand = prepare(bound, options, settings).integrand
    parts = integrand.parts
    texts = [
        (parts.gaussian, f"a joint Gaussian of {parts.gaussian_dims} scalars over"),
        (parts.summed, "contraction over"),
        (parts.listed, f"{parts.configurations} configurations of"),
        (parts.outer, f"quadrature in {parts.outer_dims} dimensions over"),
    ]
    said = [f"{text} {', '.join(v.name for v in group)}" for group, text in texts if group]
    return "; ".join([*said, f"about {_work(integrand):.1g} operations"])
