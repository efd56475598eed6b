"""Formulas of the discrete exponential families: one `Rules` record each, without names.

Source: [Bishop2006] section 2.4 and appendix B.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot, softplus

from ppl.inference.numerics import special
from ppl.inference.numerics.family import Fixed, Rules
from ppl.inference.numerics.formulas import positive


def _probability(p: Tensor, limits: torch.finfo) -> Tensor:
    return p.clamp(limits.eps, 1.0 - limits.eps)


def _probabilities(p: Tensor, limits: torch.finfo) -> Tensor:
    floored = p.clamp(min=limits.eps)
    return floored / floored.sum(-1, keepdim=True)


def _log_choose(n: Tensor | float, z: Tensor) -> Tensor:
    n = torch.as_tensor(n, dtype=z.dtype, device=z.device)
    return torch.lgamma(n + 1) - torch.lgamma(z + 1) - torch.lgamma(n - z + 1)


BERNOULLI = Rules(
    statistics=lambda z, f: (z,),
    to_mean=lambda p: (p["probs"],),
    from_mean=lambda m, lim, f: {"probs": _probability(m[0], lim)},
    to_natural=lambda p: (torch.logit(p["probs"]),),
    from_natural=lambda n, f: {"probs": torch.sigmoid(n[0])},
    log_partition=lambda n, f: softplus(n[0], threshold=40.0),
    log_base=lambda z, f: torch.zeros_like(z),
)

BINOMIAL = Rules(
    statistics=lambda z, f: (z,),
    to_mean=lambda p: (p["total_count"] * p["probs"],),
    from_mean=lambda m, lim, f: {"probs": _probability(m[0] / f["total_count"], lim)},
    to_natural=lambda p: (torch.logit(p["probs"]),),
    from_natural=lambda n, f: {"probs": torch.sigmoid(n[0])},
    log_partition=lambda n, f: f["total_count"] * softplus(n[0], threshold=40.0),
    log_base=lambda z, f: _log_choose(f["total_count"], z),
)

POISSON = Rules(
    statistics=lambda z, f: (z,),
    to_mean=lambda p: (p["rate"],),
    from_mean=lambda m, lim, f: {"rate": positive(m[0], lim)},
    to_natural=lambda p: (p["rate"].log(),),
    from_natural=lambda n, f: {"rate": n[0].exp()},
    log_partition=lambda n, f: n[0].exp(),
    log_base=lambda z, f: -torch.lgamma(z + 1),
)

GEOMETRIC = Rules(  # failures before the first success
    statistics=lambda z, f: (z,),
    to_mean=lambda p: ((1 - p["probs"]) / p["probs"],),
    from_mean=lambda m, lim, f: {"probs": _probability(1 / (1 + m[0]), lim)},
    to_natural=lambda p: (torch.log1p(-p["probs"]),),
    from_natural=lambda n, f: {"probs": -torch.expm1(n[0])},
    log_partition=lambda n, f: -special.log1mexp(n[0]),
    log_base=lambda z, f: torch.zeros_like(z),
)


def _negative_binomial_base(z: Tensor, f: Fixed) -> Tensor:
    r = torch.as_tensor(f["total_count"], dtype=z.dtype, device=z.device)
    return torch.lgamma(z + r) - torch.lgamma(r) - torch.lgamma(z + 1)


NEGATIVE_BINOMIAL = Rules(  # successes before the total_count-th failure, as in torch
    statistics=lambda z, f: (z,),
    to_mean=lambda p: (p["total_count"] * p["probs"] / (1 - p["probs"]),),
    from_mean=lambda m, lim, f: {"probs": _probability(m[0] / (m[0] + f["total_count"]), lim)},
    to_natural=lambda p: (p["probs"].log(),),
    from_natural=lambda n, f: {"probs": n[0].exp()},
    log_partition=lambda n, f: -f["total_count"] * special.log1mexp(n[0]),
    log_base=_negative_binomial_base,
)

MULTINOMIAL = Rules(
    statistics=lambda z, f: (z,),
    to_mean=lambda p: (p["total_count"] * p["probs"],),
    from_mean=lambda m, lim, f: {"probs": _probabilities(m[0] / f["total_count"], lim)},
    to_natural=lambda p: (p["probs"].log(),),
    from_natural=lambda n, f: {"probs": n[0].softmax(-1)},
    log_partition=lambda n, f: f["total_count"] * n[0].logsumexp(-1),
    log_base=lambda z, f: torch.lgamma(z.sum(-1) + 1) - torch.lgamma(z + 1).sum(-1),
)


def _indicators(z: Tensor, f: Fixed) -> tuple[Tensor, ...]:
    return (one_hot(z.long(), f["categories"]).to(z.dtype),)


CATEGORICAL = Rules(  # one natural parameter a category, log p; any common shift is the same law
    statistics=_indicators,
    to_mean=lambda p: (p["probs"],),
    from_mean=lambda m, lim, f: {"probs": _probabilities(m[0], lim)},
    to_natural=lambda p: (p["probs"].log(),),
    from_natural=lambda n, f: {"probs": n[0].softmax(-1)},
    log_partition=lambda n, f: n[0].logsumexp(-1),
    log_base=lambda z, f: torch.zeros_like(z),
)

ONE_HOT = replace(
    CATEGORICAL,
    statistics=lambda z, f: (z,),
    log_base=lambda z, f: torch.zeros_like(z[..., 0]),
)
