"""Learning of params by ascent of the log evidence: empirical Bayes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ppl.inference.particles.approximation import Learned, param_value
from ppl.inference.particles.estep import Evaluated
from ppl.inference.particles.problem import Problem
from ppl.inference.particles.weighting import evaluate

_LEARNING_RATE = 0.1  # of params, on their unconstrained scale


def learn(
    problem: Problem, params: Mapping[str, Learned], here: Evaluated, t: int
) -> dict[str, Learned]:
    """One ascent step of the log evidence in the params, particles held fixed (the gradient of EM's M-step).

    ``t`` = 1, 2, ... counts the steps, for the moments of Adam.
    """
    graph = problem.bound.graph
    free = {n: p.free.detach().requires_grad_() for n, p in params.items()}
    with torch.enable_grad():
        live = {**here.arrays, **{n: param_value(graph.variables[n], f) for n, f in free.items()}}
        densities = None if here.densities is None else evaluate(here.weighting, live)
        log_z = here.weighting.plan.log_evidence(
            here._replace(arrays=live, densities=densities).factors()
        )
        grads = torch.autograd.grad(log_z.sum(), list(free.values()), allow_unused=True)
    rate = _LEARNING_RATE * min(1.0, 10 * t**-0.6)
    learned = {}
    for (name, old), grad in zip(params.items(), grads, strict=True):
        if grad is None or not bool(grad.isfinite().all()):
            learned[name] = old
            continue
        first = 0.9 * old.first + 0.1 * grad
        second = 0.99 * old.second + 0.01 * grad.square()
        move = (first / (1 - 0.9**t)) / ((second / (1 - 0.99**t)).sqrt() + 1e-12)
        learned[name] = Learned(old.free + rate * move, first, second)
    return learned
