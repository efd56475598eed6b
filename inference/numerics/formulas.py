"""Formulas of the continuous exponential families: one `Rules` record each, without names.

Laws on positive numbers have the base measure ``1 / z``, so that their natural parameters are
the shapes and not the shapes minus one, which would lose digits for shapes near zero.

Sources: [Bishop2006] section 2.4 and appendix B; inversions as cited in `special.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ppl.inference.numerics import special
from ppl.inference.numerics.family import Fixed, Mean, Natural, Rules, Standard
from ppl.inference.numerics.linalg import safe_cholesky, symmetrise

_LOG_2PI = math.log(2.0 * math.pi)


# --- borders: the nearest parameters and particles that are still inside ---------------------


def positive(x: Tensor, limits: torch.finfo) -> Tensor:
    """Hold a positive parameter where its square neither vanishes nor overflows."""
    return x.clamp(limits.tiny**0.5, limits.tiny**-0.5)


def _scale_floor(loc: Tensor, limits: torch.finfo) -> Tensor:
    """Smallest standard deviation that particles near ``loc`` can show in their dtype."""
    return limits.eps * loc.abs() + limits.tiny**0.25


def _above_zero(z: Tensor) -> Tensor:
    limits = torch.finfo(z.dtype)
    return z.clamp(limits.tiny, limits.max)


def _inside_unit(z: Tensor) -> Tensor:
    limits = torch.finfo(z.dtype)
    return z.clamp(limits.tiny, 1.0 - limits.eps / 2)


def log_inside(z: Tensor) -> Tensor:
    """Logarithm of positive particles; zero counts as the smallest normal number."""
    return _above_zero(z).log()


# --- Gaussian families: mean parameters in central form ---------------------------------------


def _normal_from_mean(mean: Mean, limits: torch.finfo, f: Fixed) -> dict[str, Tensor]:
    loc, variance = mean
    scale = variance.clamp(min=0.0).sqrt()
    return {"loc": loc, "scale": torch.maximum(scale, _scale_floor(loc, limits))}


def _normal_to_natural(p: Standard) -> Natural:
    precision = p["scale"] ** -2
    return p["loc"] * precision, -precision / 2


def _normal_from_natural(natural: Natural, f: Fixed) -> dict[str, Tensor]:
    variance = -0.5 / natural[1]
    return {"loc": natural[0] * variance, "scale": variance.sqrt()}


def _normal_log_partition(natural: Natural, f: Fixed) -> Tensor:
    return -(natural[0] ** 2) / (4 * natural[1]) - torch.log(-2 * natural[1]) / 2


NORMAL = Rules(
    statistics=lambda z, f: (z, z**2),
    to_mean=lambda p: (p["loc"], p["scale"] ** 2),
    from_mean=_normal_from_mean,
    to_natural=_normal_to_natural,
    from_natural=_normal_from_natural,
    log_partition=_normal_log_partition,
    log_base=lambda z, f: torch.full_like(z, -0.5 * _LOG_2PI),
)

LOG_NORMAL = replace(  # a Normal law on log z
    NORMAL,
    statistics=lambda z, f: (log_inside(z), log_inside(z) ** 2),
    log_base=lambda z, f: -log_inside(z) - 0.5 * _LOG_2PI,
)


def _mvn_from_mean(mean: Mean, limits: torch.finfo, f: Fixed) -> dict[str, Tensor]:
    loc, cov = mean
    missing = _scale_floor(loc, limits) ** 2 - cov.diagonal(dim1=-2, dim2=-1)
    cov = symmetrise(cov) + torch.diag_embed(missing.clamp(min=0.0))
    return {"loc": loc, "scale_tril": safe_cholesky(cov)}


def _mvn_to_natural(p: Standard) -> Natural:
    precision = torch.cholesky_inverse(p["scale_tril"])
    return (precision @ p["loc"].unsqueeze(-1)).squeeze(-1), -precision / 2


def _mvn_from_natural(natural: Natural, f: Fixed) -> dict[str, Tensor]:
    cov = torch.cholesky_inverse(torch.linalg.cholesky(symmetrise(-2 * natural[1])))
    loc = (cov @ natural[0].unsqueeze(-1)).squeeze(-1)
    return {"loc": loc, "scale_tril": safe_cholesky(symmetrise(cov))}


def _mvn_log_partition(natural: Natural, f: Fixed) -> Tensor:
    chol = torch.linalg.cholesky(symmetrise(-2 * natural[1]))
    white = torch.linalg.solve_triangular(chol, natural[0].unsqueeze(-1), upper=False)
    return (white**2).sum((-2, -1)) / 2 - chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)


MVN = Rules(
    statistics=lambda z, f: (z, z.unsqueeze(-1) * z.unsqueeze(-2)),
    to_mean=lambda p: (p["loc"], p["scale_tril"] @ p["scale_tril"].mT),
    from_mean=_mvn_from_mean,
    to_natural=_mvn_to_natural,
    from_natural=_mvn_from_natural,
    log_partition=_mvn_log_partition,
    log_base=lambda z, f: z.new_full(z.shape[:-1], -0.5 * z.shape[-1] * _LOG_2PI),
)


# --- one positive statistic with density exp(eta T), eta < 0 ----------------------------------

HALF_NORMAL = Rules(
    statistics=lambda z, f: (z**2,),
    to_mean=lambda p: (p["scale"] ** 2,),
    from_mean=lambda m, lim, f: {"scale": positive(m[0], lim).sqrt()},
    to_natural=lambda p: (-0.5 * p["scale"] ** -2,),
    from_natural=lambda n, f: {"scale": (-2 * n[0]) ** -0.5},
    log_partition=lambda n, f: -torch.log(-2 * n[0]) / 2,
    log_base=lambda z, f: torch.full_like(z, 0.5 * math.log(2 / math.pi)),
)

EXPONENTIAL = Rules(
    statistics=lambda z, f: (z,),
    to_mean=lambda p: (1 / p["rate"],),
    from_mean=lambda m, lim, f: {"rate": 1 / positive(m[0], lim)},
    to_natural=lambda p: (-p["rate"],),
    from_natural=lambda n, f: {"rate": -n[0]},
    log_partition=lambda n, f: -torch.log(-n[0]),
    log_base=lambda z, f: torch.zeros_like(z),
)

LAPLACE = Rules(
    statistics=lambda z, f: ((z - f["loc"]).abs(),),
    to_mean=lambda p: (p["scale"],),
    from_mean=lambda m, lim, f: {"scale": positive(m[0], lim)},
    to_natural=lambda p: (-1 / p["scale"],),
    from_natural=lambda n, f: {"scale": -1 / n[0]},
    log_partition=lambda n, f: math.log(2.0) - torch.log(-n[0]),
    log_base=lambda z, f: torch.zeros_like(z),
)


def _weibull_base(z: Tensor, f: Fixed) -> Tensor:
    shape = torch.as_tensor(f["concentration"], dtype=z.dtype, device=z.device)
    return shape.log() + (shape - 1) * log_inside(z)


WEIBULL = Rules(
    statistics=lambda z, f: (_above_zero(z) ** f["concentration"],),
    to_mean=lambda p: (p["scale"] ** p["concentration"],),
    from_mean=lambda m, lim, f: {"scale": positive(m[0], lim) ** (1 / f["concentration"])},
    to_natural=lambda p: (-(p["scale"] ** -p["concentration"]),),
    from_natural=lambda n, f: {"scale": (-n[0]) ** (-1 / f["concentration"])},
    log_partition=lambda n, f: -torch.log(-n[0]),
    log_base=_weibull_base,
)

PARETO = Rules(  # T = log(z / scale): the same law as T = log z, without its cancellation
    statistics=lambda z, f: (log_inside(z / f["scale"]).clamp(min=0.0),),
    to_mean=lambda p: (1 / p["alpha"],),
    from_mean=lambda m, lim, f: {"alpha": 1 / positive(m[0], lim)},
    to_natural=lambda p: (-p["alpha"],),
    from_natural=lambda n, f: {"alpha": -n[0]},
    log_partition=lambda n, f: -torch.log(-n[0]),
    log_base=lambda z, f: -log_inside(z),
)


# --- logarithmic statistics, inverted by Newton's method --------------------------------------


def _gamma_from_mean(mean_log: Tensor, mean: Tensor, limits: torch.finfo) -> dict[str, Tensor]:
    mean = positive(mean, limits)
    # A gap below its own rounding error means equal particles.
    floor = 4 * limits.eps * (1 + mean_log.abs())
    shape = special.gamma_shape(torch.maximum(mean.log() - mean_log, floor))
    return {"concentration": shape, "rate": shape / mean}


GAMMA = Rules(
    statistics=lambda z, f: (log_inside(z), z),
    to_mean=lambda p: (
        torch.digamma(p["concentration"]) - p["rate"].log(),
        p["concentration"] / p["rate"],
    ),
    from_mean=lambda m, lim, f: _gamma_from_mean(m[0], m[1], lim),
    to_natural=lambda p: (p["concentration"], -p["rate"]),
    from_natural=lambda n, f: {"concentration": n[0], "rate": -n[1]},
    log_partition=lambda n, f: torch.lgamma(n[0]) - n[0] * torch.log(-n[1]),
    log_base=lambda z, f: -log_inside(z),
)

INVERSE_GAMMA = Rules(  # a Gamma law on 1 / z
    statistics=lambda z, f: (log_inside(z), 1 / _above_zero(z)),
    to_mean=lambda p: (
        p["rate"].log() - torch.digamma(p["concentration"]),
        p["concentration"] / p["rate"],
    ),
    from_mean=lambda m, lim, f: _gamma_from_mean(-m[0], m[1], lim),
    to_natural=lambda p: (-p["concentration"], -p["rate"]),
    from_natural=lambda n, f: {"concentration": -n[0], "rate": -n[1]},
    log_partition=lambda n, f: torch.lgamma(-n[0]) + n[0] * torch.log(-n[1]),
    log_base=lambda z, f: -log_inside(z),
)

CHI2 = Rules(
    statistics=lambda z, f: (log_inside(z),),
    to_mean=lambda p: (torch.digamma(p["df"] / 2) + math.log(2.0),),
    from_mean=lambda m, lim, f: {
        "df": positive(2 * special.inverse_digamma(m[0] - math.log(2.0)), lim)
    },
    to_natural=lambda p: (p["df"] / 2,),
    from_natural=lambda n, f: {"df": 2 * n[0]},
    log_partition=lambda n, f: torch.lgamma(n[0]) + n[0] * math.log(2.0),
    log_base=lambda z, f: -log_inside(z) - z / 2,
)


def _dirichlet_mean(a: Tensor) -> Tensor:
    """``digamma(a) - digamma(sum a)``, as a ratio of logs plus terms that do not cancel."""
    total = a.sum(-1, keepdim=True)
    ratio = torch.log(a / total)
    return ratio - special.log_minus_digamma(a) + special.log_minus_digamma(total)


def _beta_from_mean(mean: Mean, limits: torch.finfo, f: Fixed) -> dict[str, Tensor]:
    a = special.dirichlet_concentration(torch.stack(mean, -1), limits.eps)
    return {"concentration1": a[..., 0], "concentration0": a[..., 1]}


BETA = Rules(
    statistics=lambda z, f: (_inside_unit(z).log(), torch.log1p(-_inside_unit(z))),
    to_mean=lambda p: _dirichlet_mean(
        torch.stack((p["concentration1"], p["concentration0"]), -1)
    ).unbind(-1),
    from_mean=_beta_from_mean,
    to_natural=lambda p: (p["concentration1"], p["concentration0"]),
    from_natural=lambda n, f: {"concentration1": n[0], "concentration0": n[1]},
    log_partition=lambda n, f: torch.lgamma(n[0]) + torch.lgamma(n[1]) - torch.lgamma(n[0] + n[1]),
    log_base=lambda z, f: -_inside_unit(z).log() - torch.log1p(-_inside_unit(z)),
)

DIRICHLET = Rules(
    statistics=lambda z, f: (log_inside(z),),
    to_mean=lambda p: (_dirichlet_mean(p["concentration"]),),
    from_mean=lambda m, lim, f: {"concentration": special.dirichlet_concentration(m[0], lim.eps)},
    to_natural=lambda p: (p["concentration"],),
    from_natural=lambda n, f: {"concentration": n[0]},
    log_partition=lambda n, f: torch.lgamma(n[0]).sum(-1) - torch.lgamma(n[0].sum(-1)),
    log_base=lambda z, f: -log_inside(z).sum(-1),
)


# --- angles -----------------------------------------------------------------------------------


def _von_mises_to_mean(p: Standard) -> Mean:
    length = special.bessel_ratio(p["concentration"])
    return length * torch.cos(p["loc"]), length * torch.sin(p["loc"])


def _von_mises_from_mean(mean: Mean, limits: torch.finfo, f: Fixed) -> dict[str, Tensor]:
    kappa = special.von_mises_concentration(torch.hypot(*mean), limits.eps)
    return {"loc": torch.atan2(mean[1], mean[0]), "concentration": kappa}


def _von_mises_log_partition(natural: Natural, f: Fixed) -> Tensor:
    kappa = torch.hypot(*natural)
    return torch.special.i0e(kappa).log() + kappa + _LOG_2PI


VON_MISES = Rules(
    statistics=lambda z, f: (torch.cos(z), torch.sin(z)),
    to_mean=_von_mises_to_mean,
    from_mean=_von_mises_from_mean,
    to_natural=lambda p: (
        p["concentration"] * torch.cos(p["loc"]),
        p["concentration"] * torch.sin(p["loc"]),
    ),
    from_natural=lambda n, f: {"loc": torch.atan2(n[1], n[0]), "concentration": torch.hypot(*n)},
    log_partition=_von_mises_log_partition,
    log_base=lambda z, f: torch.zeros_like(z),
)
