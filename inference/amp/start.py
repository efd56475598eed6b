"""Start values read off the data, for a sparse linear regression of which nothing is known.

For a linear response the noise is 20 dB below the data, and the share of non-zeros where the phase transition of the
Lasso puts it, as in [Vila2013] section III-D. For categories only the ratio of the predictor to the noise of the link
shows, and not at all clearly: it starts at three. For counts, the variance of their logarithms stands for that of the
predictor.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppl.inference.amp.rules.priors import Sparse
from ppl.inference.amp.vectors import MultivariateLaplace

if TYPE_CHECKING:
    from ppl.inference.amp.coefficients import Params
    from ppl.inference.amp.outcomes import Outcome
    from ppl.inference.amp.problem import Problem
    from ppl.inference.amp.seats import Closed

_SIGNAL_TO_NOISE = 100.0  # 20 dB
_LATENT_TO_NOISE = (
    3.0  # of the predictor of categories to the noise of their link (logistic: pi^2 / 3)
)


def started(problem: Problem, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """The params with those replaced that are a sparsity, a scale of the prior or a Gaussian noise of the model.

    What the predictor's mean square and the noise may be is read off the first observed site that shows them; where
    none does, the params start as the model gives them.
    """
    seen = [_powers(o, params) for o in problem.model.outcomes]
    found = next((each for each in seen if each is not None), None)
    if found is None:
        return params
    power, noise = found
    m, n = problem.operator.shape
    signal = power * m / problem.operator.squared_frobenius  # mean square of x
    new = dict(params)
    for name, one in problem.learner.closed.items():
        value = _value(problem, one, noise, signal, transition_share(m, n))
        if value is not None:
            new[name] = torch.full_like(params[name], float(one.link.back(value)))
    return new


def _powers(outcome: Outcome, params: Params) -> tuple[Tensor, Tensor | None] | None:
    """About the mean squares of the predictor and of its Gaussian noise, None where an outcome does not show them."""
    y = outcome.data
    if outcome.kind in ("gaussian", "additive", "censored", "modulus", "rectified"):
        noise = y.square().mean() / (1.0 + _SIGNAL_TO_NOISE)
        whole = 2.0 if outcome.kind == "rectified" else 1.0  # half of the predictors show
        return whole * (y.square().mean() - noise), noise
    if outcome.kind == "poisson":
        rate = outcome.leaves(0.0, params)["rate"]
        return ((y + 0.5) / rate).log().var().clamp(min=0.01), None
    if outcome.kind.startswith("logistic"):
        return y.new_tensor(_LATENT_TO_NOISE * math.pi**2 / 3.0), None
    if outcome.kind in ("probit", "ordinal") and outcome.cuts is not None:
        return _LATENT_TO_NOISE * outcome.cuts.scale.square().mean(), None
    return None


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
    problem: Problem, one: Closed, noise: Tensor | None, signal: Tensor, share: float
) -> Tensor | None:
    """The rule's parameter at the start, None where the recipe has none."""
    if one.seat.part == "channel":
        return noise if one.link.name == "variance" else None
    if one.seat.part == "gate":
        return torch.tensor(share).logit()
    rule = problem.model.blocks[one.seat.at].base(problem.params)
    spread = signal / share if isinstance(rule, Sparse) else signal
    recipes = {"mean": torch.zeros(()), "variance": spread, "rate": (2.0 / spread).sqrt()}
    if isinstance(rule, Sparse):
        recipes["logit"] = torch.tensor(share).logit()
    if isinstance(rule, MultivariateLaplace):
        recipes["scale"] = (spread / (rule.d + 1)).sqrt()
    return recipes.get(one.link.name)
