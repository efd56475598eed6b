"""One run: a method on an experiment, step by step, with a clock that stops while it is judged."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from benchmarks.qem_paper.experiments import Experiment
from ppl import Normal, Posterior, backend
from ppl.backend import Settings
from ppl.inference.particles.estep import draw_in_parts, evaluated
from ppl.inference.particles.weighting import Weighting, make_weighting
from ppl.models.files import find
from ppl.streams import Streams

DRAWS = 100  # joint posterior draws of a predictive score
METHODS = ("qem", "qem default", "vi", "rws")
Units = Literal["original", "rescaled"] | None
LEARNING_RATE = {"vi": 0.03, "rws": 0.03}  # the best of three in the paper


class Trace(NamedTuple):
    """What a run left."""

    log_evidence: list[float]  # at every iteration, before its update; never tempered
    seconds: list[float]  # since the first state, at every iteration
    predicted: dict[int, tuple[float, float]]  # by iteration: joint and pointwise score, nats
    errors: dict[int, tuple[float, float]]  # by iteration: of means, of log standard deviations


class OutOfTime(Exception):
    """A run was not over when its time was."""


def is_there(method: str) -> bool:
    """Whether this version has the method."""
    return method.split()[0] in backend.names()


def options_of(
    method: str, experiment: Experiment, particles: int, units: Units = None
) -> dict[str, Any]:
    """Settings of the paper, or none at all: our defaults, with particles by the size of the model.

    All start from Normal(0, 1) for every latent. With other units qem starts at the same place as
    before, so Normal(0, 1 / unit); so that its random numbers are the same, too, the original of
    the comparison names these proposals as well. The gradient methods take Adam's step as it is, on
    raw parameters.
    """
    if method == "qem default":
        return {}
    groups = [list(g) for g in experiment.groups]
    common = {"particles": particles, "groups": groups, "joint_up_to": 0, "start": "standard"}
    if method == "qem":
        proposals = {"q": _standard(experiment, units == "rescaled")} if units else {}
        return {
            **common,
            **proposals,
            "step": experiment.step,
            "bridge": False,
            "stratified": False,
        }
    parallel = {**common, "learning_rate": LEARNING_RATE[method]}
    if method == "vi":
        parallel |= {"parallel": True, "estimator": "total"}
    known = {f.name for f in dataclasses.fields(backend.load(method).Options)}
    return {**parallel, **({"settle": False} if "settle" in known else {})}


def _standard(experiment: Experiment, rescaled: bool) -> dict[str, Normal]:
    """Normal(0, 1), in units of one, for each latent that has other units in the rescaled version."""
    variables = experiment.program.graph(experiment.load().train).variables
    scales = {n: 1 / u if rescaled else 1.0 for n, u in experiment.units.items()}
    shapes, double = {n: variables[n].event_shape for n in scales}, {"dtype": torch.float64}
    return {
        n: Normal(torch.zeros(shapes[n], **double), torch.full(shapes[n], s, **double))
        for n, s in scales.items()
    }


def run(
    experiment: Experiment,
    method: str,
    particles: int,
    iterations: int,
    seed: int,
    *,
    units: Units = None,
    every: int = 10,
    judge: bool = False,
    until: float | None = None,
) -> Trace:
    """Fit for some iterations.

    Args:
        experiment: what to fit.
        method: one of ``METHODS``.
        particles: of every block.
        iterations: how many.
        seed: of the random numbers.
        units: for the comparison of versions: "original", or "rescaled", the one in other units.
        every: iterations between two predictive scores; 0: none.
        judge: whether to compare moments with the reference, at eight iterations.
        until: reading of ``time.monotonic`` at which a run that is not over is given up.

    Raises:
        OutOfTime: it was not over then.
    """
    program = experiment.program(rescaled=True) if units == "rescaled" else experiment.program
    options = options_of(method, experiment, particles, units)
    bound = program.bind(experiment.load().train, dtype=torch.float64)
    name = method.split()[0]
    _, module, record = backend.resolve(name, options)

    def prepared(extra: Mapping[str, Any], stream: int) -> Any:
        known = {f.name for f in dataclasses.fields(record)}
        chosen = {**options, **{k: v for k, v in extra.items() if k in known}}
        settings = Settings(Streams(stream), max_iters=iterations)
        return module.prepare(bound, backend.resolve(name, chosen)[2], settings)

    problem = prepared({}, seed)
    # Judging draws from streams of its own, so that the run is the same whether it is judged or not.
    weighed = {"final_particles": particles, "replicates": 1}
    scorer, judged = prepared(weighed, seed + 1000), prepared({}, seed + 2000)
    held_out = experiment.held_out() if every else None
    trace, clock = Trace([], [], {}, {}), 0.0
    state = module.init(problem)
    for i in range(1, iterations + 1):
        if until is not None and time.monotonic() > until:
            raise OutOfTime(f"{experiment.name} by {method}: stopped before iteration {i}")
        before, begun = state, time.perf_counter()
        state, info = module.step(problem, state, None)
        clock += time.perf_counter() - begun
        level = info.metrics.get("log_evidence", info.metrics.get("bound"))  # the latter of vi
        if method == "qem default":  # its own has other particle counts, and is NaN while tempered
            level = evidence_at(problem, before, particles, i)
        trace.log_evidence.append(float(level))
        trace.seconds.append(clock)
        if every and (i % every == 0 or i in (1, 2, 5)):
            trace.predicted[i] = predictive(_posterior(module, scorer, state, program), held_out, i)
        if judge and experiment.nuts and not units and (i in _LOOKS or i == iterations):
            found = _posterior(module, judged, state, program)
            trace.errors[i] = moment_errors(found, experiment)
    return trace


def evidence_at(problem: Any, state: Any, particles: int, iteration: int) -> float:
    """Log evidence of the posterior's own weights at fresh particles, so many of every block, of the proposals of qem."""
    weighting = _weighting_at(problem, particles)
    streams = problem.settings.streams.child(f"level {iteration}")
    with torch.no_grad():
        drawn = draw_in_parts(weighting, state.q, streams)
        here = evaluated(problem, weighting, drawn, state.q)
        return float(weighting.plan.log_evidence(here.factors()))


@lru_cache(maxsize=1)
def _weighting_at(problem: Any, particles: int) -> Weighting:
    """Particles one by one, as in the paper."""
    blocks = tuple(dataclasses.replace(b, stratified=False) for b in problem.blocks)
    sizes = {b.axis: problem.weighting.sizes[b.axis] if b.enumerated else particles for b in blocks}
    return make_weighting(problem.bound, blocks, sizes, 0, None, problem.options.chains)


_LOOKS = (1, 4, 10, 25, 50, 100, 160)


def _posterior(module: Any, problem: Any, state: Any, program: Any) -> Posterior:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a run that is not over has not converged
        posterior = module.posterior(problem, state)
    posterior.model = program
    return posterior


def predictive(
    posterior: Posterior, held_out: tuple[dict[str, Any], dict[str, Any], int], seed: int
) -> tuple[float, float]:
    """Joint and pointwise log-likelihood of held-out data, in nats.

    Latents of new plate elements are drawn from their law given the posterior draw. Joint: the log of
    the mean over draws of the density of all data. Pointwise: a sum over data of the logs of means.
    """
    data, binding, fitted = held_out
    density = posterior.log_likelihood(data, n=DRAWS, seed=seed, **binding)["obs"]
    if fitted:
        density = density[:, :, fitted:]
    density = density.reshape(DRAWS, -1)
    joint = torch.logsumexp(density.sum(1), 0) - math.log(DRAWS)
    pointwise = (torch.logsumexp(density, 0) - math.log(DRAWS)).sum()
    return float(joint), float(pointwise)


def moment_errors(posterior: Posterior, experiment: Experiment) -> tuple[float, float]:
    """Mean over scalars of |mean - reference| / reference sd, and of |log of the ratio of sds|."""
    path = find(f"nuts_reference/{experiment.nuts}.npz")
    if path is None:
        return math.nan, math.nan
    off, ratio = [], []
    with np.load(path) as reference:
        latents = {v.name for v in posterior.bound.graph.latents}
        names = [n.removesuffix("__mean") for n in reference.files if n.endswith("__mean")]
        for name in names:
            if name not in (experiment.judged or latents):
                continue
            mean, sd = posterior.mean(name).numpy(), posterior.sd(name).numpy()
            off.append(np.abs(mean - reference[f"{name}__mean"]) / reference[f"{name}__sd"])
            ratio.append(np.abs(np.log(np.maximum(sd, 1e-300) / reference[f"{name}__sd"])))
    return tuple(float(np.concatenate([x.ravel() for x in part]).mean()) for part in (off, ratio))
