"""Start values read off the data, for a sparse linear regression of which nothing is known.

Source: amp.md 7; [Vila2013] section III-D. The share of non-zeros is where the Lasso's phase transition puts it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppl.inference.amp.rules.priors import BernoulliGaussian, Gaussian

if TYPE_CHECKING:
    from ppl.inference.amp.learning import Closed
    from ppl.inference.amp.problem import Problem

_SIGNAL_TO_NOISE = 100.0  # 20 dB


def started(problem: Problem, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """The params with those replaced that are a sparsity, a slab variance or a Gaussian noise of the model."""
    if any(o.kind != "gaussian" for o in problem.model.outcomes):
        return params
    power = torch.cat([o.data.flatten() for o in problem.model.outcomes]).square().mean()
    m, n = problem.operator.shape
    noise = power / (1.0 + _SIGNAL_TO_NOISE)
    signal = (power - noise) * m / problem.operator.squared_frobenius  # mean square of x
    new = dict(params)
    for name, one in problem.learner.closed.items():
        value = _value(problem, one, noise, signal, transition_share(m, n))
        if value is not None:
            new[name] = torch.full_like(params[name], float(one.link.back(value)))
    return new


def transition_share(m: int, n: int) -> float:
    """Share of non-zeros at which l1 recovery breaks down, at most a half.

    >>> round(transition_share(500, 1000), 2)
    0.19
    """
    c = torch.linspace(0.0, 5.0, 501, dtype=torch.float64)
    bell = torch.exp(-0.5 * c.square()) / math.sqrt(2 * math.pi)
    tail = 2.0 * ((1 + c.square()) * torch.special.ndtr(-c) - c * bell)
    share = (m / n) * ((1.0 - (n / m) * tail) / (1 + c.square() - tail)).max()
    return min(max(float(share), 1e-3), 0.5)


def _value(
    problem: Problem, one: Closed, noise: Tensor, signal: Tensor, share: float
) -> Tensor | None:
    """The rule's parameter at the start, None where the recipe has none."""
    if one.seat.part == "channel":
        return noise if one.link.name == "variance" else None
    if one.seat.part == "gate":
        return torch.tensor(share).logit()
    rule = problem.model.blocks[one.seat.at].base(problem.params)
    if isinstance(rule, BernoulliGaussian):
        return {
            "logit": torch.tensor(share).logit(),
            "mean": torch.zeros(()),
            "variance": signal / share,
        }[one.link.name]
    if isinstance(rule, Gaussian):
        return signal if one.link.name == "variance" else torch.zeros(())
    return (2.0 / signal).sqrt() if one.link.name == "rate" else None
