"""How far to trust a result: effective sample sizes, Pareto k, leave-one-out, one verdict.

Sources: [Vehtari2024] "Pareto smoothed importance sampling" (JMLR 25); [ZhangStephens2009] "A new
and efficient estimation method for the generalized Pareto distribution"; [Vehtari2017]
"Practical Bayesian model evaluation using leave-one-out cross-validation and WAIC";
[Gelman2013] section 11.4 for split R-hat.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

# [Vehtari2024] section 3.2.4: below 0.5 errors shrink as for finite variance, above 0.7 hardly.
K_GOOD, K_USABLE = 0.5, 0.7
# CHOICE: ten equal particles give a mean to a third of a standard deviation, three hardly any.
ESS_GOOD, ESS_USABLE = 10.0, 3.0
_MIN_TAIL = 5  # fewer points than this do not fit a two-parameter tail
_CHUNK = 2**22  # numbers in one intermediate of the fit


class LooResult(NamedTuple):
    """Leave-one-out predictive score, higher is better.

    >>> print(LooResult(-30.8, 1.4, 1.0, torch.full((8,), -3.85), torch.full((8,), 0.2)))
    elpd -30.8 (se 1.4), effective parameters 1.0, 8 observations, all Pareto k below 0.7
    """

    elpd: float  # sum of the pointwise log predictive densities, nats
    se: float  # standard error of elpd over observations, nats
    p_loo: float  # effective number of parameters
    pointwise: Tensor  # [n], nats
    pareto_k: Tensor  # [n]

    def __str__(self) -> str:
        high = int((self.pareto_k >= K_USABLE).sum())
        tail = f"{high} with Pareto k over {K_USABLE}" if high else f"all Pareto k below {K_USABLE}"
        return (
            f"elpd {self.elpd:.1f} (se {self.se:.1f}), effective parameters {self.p_loo:.1f}, "
            f"{self.pointwise.numel()} observations, {tail}"
        )


@dataclass(frozen=True)
class Diagnostics:
    """What a backend knows about the quality of its own result.

    >>> print(Diagnostics({"mu": torch.tensor(25.0)}, {"mu": torch.tensor(0.6)}, True, 80, 1.5))
    check: Pareto k is 0.60 at 'mu' (good is below 0.5).
    80 iterations in 1.5 s, converged
    mu: effective sample size at least 25.0, Pareto k at most 0.60
    """

    ess: Mapping[str, Tensor]  # site -> effective sample size of each element
    pareto_k: Mapping[str, Tensor]  # site -> tail shape of the weights of each element
    converged: bool
    iterations: int
    seconds: float
    warnings: tuple[str, ...] = ()
    notes: Mapping[str, object] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """One sentence that starts with ``good``, ``check`` or ``unreliable``, and says why."""
        bad, doubtful = [], []
        for site, values in self.ess.items():
            low, usable = _lowest(values), ESS_USABLE
            text = f"effective sample size is {low:.1f} at '{site}'"
            if not low >= usable:  # also catches nan
                bad.append(f"{text} (usable is above {usable:.0f})")
            elif low < ESS_GOOD:
                doubtful.append(f"{text} (good is above {ESS_GOOD:.0f})")
        for site, values in self.pareto_k.items():
            high = _highest(values)
            text = f"Pareto k is {high:.2f} at '{site}'"
            if high >= K_USABLE:
                bad.append(f"{text} (usable is below {K_USABLE})")
            elif high >= K_GOOD:
                doubtful.append(f"{text} (good is below {K_GOOD})")
        if not self.converged:
            doubtful.append(f"not converged after {self.iterations} iterations")
        doubtful += [
            text for text in dict.fromkeys(self.warnings) if not text.startswith("not converged")
        ]
        if bad or doubtful:
            return f"{'unreliable' if bad else 'check'}: {_few(bad + doubtful)}."
        return "good: nothing in the diagnostics speaks against this result."

    def __str__(self) -> str:
        state = "converged" if self.converged else "not converged"
        lines = [self.verdict, f"{self.iterations} iterations in {self.seconds:.1f} s, {state}"]
        for site in dict.fromkeys((*self.ess, *self.pareto_k)):
            facts = []
            if site in self.ess:
                facts.append(f"effective sample size at least {_lowest(self.ess[site]):.1f}")
            if site in self.pareto_k:
                facts.append(f"Pareto k at most {_highest(self.pareto_k[site]):.2f}")
            lines.append(f"{site}: {', '.join(facts)}")
        lines += [f"warning: {text}" for text in self.warnings]
        lines += [f"{name}: {value}" for name, value in self.notes.items()]
        return "\n".join(lines)


def tail_index(weights: Tensor) -> Tensor:
    """Pareto k of normalised importance weights, bounded by what the largest of them shows.

    Of ``S`` weights with tail index k the largest holds about ``S^(k - 1)`` of the total. Nearly even weights have no
    Pareto tail, and a fit to them says nothing; the bound keeps such a fit from raising an alarm.

    Args:
        weights: ``[*batch, S]``, each row sums to one.

    Returns:
        ``[*batch]``.

    >>> even = torch.full((1000,), 1e-3) + 1e-4 * torch.linspace(-1, 1, 1000)
    >>> bool(tail_index(even / even.sum()) < 0.1)
    True
    """
    size = weights.shape[-1]
    k = pareto_k(weights.clamp(min=torch.finfo(weights.dtype).tiny).log())
    if size < 2:
        return k
    bound = 1.0 + weights.amax(-1).log() / math.log(size)
    return torch.minimum(k, bound.to(k))


def effective_sample_size(weights: Tensor) -> Tensor:
    """Number of equal weights that would be as noisy: ``1 / sum w^2`` ``[*batch]``.

    Args:
        weights: ``[*batch, S]``, summing to one over ``S``.

    >>> effective_sample_size(torch.tensor([0.5, 0.5, 0.0]))
    tensor(2.)
    """
    return 1.0 / (weights**2).sum(-1)


def pareto_k(log_weights: Tensor) -> Tensor:
    """Tail shape of importance weights: below 0.5 is good, over 0.7 the estimate is unreliable.

    Args:
        log_weights: ``[*batch, S]``, unnormalised.

    Returns:
        ``[*batch]``; 0 where all weights are equal, nan where the tail has too few points to fit
        (fewer than about 25 particles, or ties).

    Source: [Vehtari2024] section 3.

    >>> pareto_k(torch.zeros(100))
    tensor(0.)
    """
    return psis(log_weights)[1]


def psis(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Pareto-smoothed importance weights.

    The largest weights are replaced by the quantiles of a generalized Pareto law fitted to them.

    Args:
        log_weights: ``[*batch, S]``, unnormalised.

    Returns:
        Normalised log-weights ``[*batch, S]`` and Pareto k ``[*batch]``, as in `pareto_k`.

    Source: [Vehtari2024] algorithm 1, with the weakly informative prior on k of its appendix.

    >>> log_weights, k = psis(torch.zeros(2, 64))
    >>> log_weights.exp().sum(-1), k
    (tensor([1., 1.]), tensor([0., 0.]))
    """
    batch, size = log_weights.shape[:-1], log_weights.shape[-1]
    rows = log_weights.reshape(-1, size)
    tail = _tail_length(size)
    if tail == 0:
        return torch.zeros_like(log_weights), log_weights.new_zeros(batch)
    per_chunk = max(1, _CHUNK // ((31 + math.isqrt(size)) * (tail + 1)))
    parts = [_smooth(chunk.double(), tail) for chunk in rows.split(per_chunk)]
    smoothed = torch.cat([part[0] for part in parts]) if parts else rows
    k = torch.cat([part[1] for part in parts]) if parts else rows.new_zeros(0)
    return (
        smoothed.reshape(log_weights.shape).to(log_weights.dtype),
        k.reshape(batch).to(log_weights.dtype),
    )


def loo(log_likelihood: Tensor) -> LooResult:
    """Leave-one-out predictive score from posterior draws, without refitting.

    Args:
        log_likelihood: ``[S, n]``, of each observation under each independent posterior draw.

    Source: [Vehtari2017] equations (10) and (22)-(24).

    >>> result = loo(torch.full((100, 4), -1.5, dtype=torch.float64))
    >>> round(result.elpd, 6), round(abs(result.p_loo), 6)
    (-6.0, 0.0)
    """
    log_lik = log_likelihood.double().flatten(1).mT  # [n, S]
    draws, count = log_lik.shape[1], log_lik.shape[0]
    log_weights, k = psis(-log_lik)
    pointwise = (log_weights + log_lik).logsumexp(-1)
    in_sample = log_lik.logsumexp(-1) - math.log(draws)
    return LooResult(
        elpd=pointwise.sum().item(),
        se=math.sqrt(count * pointwise.var(correction=0).item()),
        p_loo=(in_sample - pointwise).sum().item(),
        pointwise=pointwise,
        pareto_k=k,
    )


def r_hat(draws: Tensor) -> Tensor:
    """Split R-hat: how much wider all chains together are than each half chain; 1 is good.

    Args:
        draws: ``[chains, draws, *event]``, at least four draws a chain.

    Returns:
        ``[*event]``.

    Source: [Gelman2013] equations (11.1)-(11.4), each chain cut into two.

    >>> r_hat(torch.tensor([[0.0, 1.0, 0.0, 1.0], [5.0, 6.0, 5.0, 6.0]])) > 2
    tensor(True)
    """
    half = draws.shape[1] // 2
    halves = torch.cat((draws[:, :half], draws[:, draws.shape[1] - half :]))
    within = halves.var(1).mean(0)
    between = halves.mean(1).var(0)
    return (between / within + (half - 1) / half).sqrt()


def _tail_length(size: int) -> int:
    return min(math.ceil(min(size / 5, 3 * math.sqrt(size))), size - 1)


def _smooth(log_weights: Tensor, tail: int) -> tuple[Tensor, Tensor]:
    """`psis` of a chunk of rows ``[rows, S]`` in double precision."""
    shifted = log_weights - log_weights.amax(-1, keepdim=True)
    constant = (shifted == 0).all(-1)
    ordered, order = shifted.sort(-1)
    largest = ordered[:, ordered.shape[1] - tail :]  # ascending
    log_cutoff = ordered[:, -tail - 1, None].clamp(min=math.log(torch.finfo(torch.float64).tiny))
    # Ties with the cutoff are not part of the tail, so that rows may have tails of unequal length.
    inside = largest > log_cutoff
    cutoff = log_cutoff.exp()
    excess = torch.where(inside, largest.exp() - cutoff, 0.0)
    k, scale = _fit_pareto(excess, inside)
    count = inside.sum(-1)
    fits = (count >= _MIN_TAIL) & k.isfinite() & scale.isfinite()
    # Dividing integers would give torch's default dtype.
    rank = inside.cumsum(-1).double()
    quantile = _pareto_quantile(
        (rank - 0.5) / count.clamp(min=1)[:, None], k[:, None], scale[:, None]
    )
    smoothed = torch.where(
        inside & fits[:, None], (quantile + cutoff).log().clamp(max=0.0), largest
    )
    result = shifted.scatter(-1, order[:, order.shape[1] - tail :], smoothed)
    k = torch.where(constant, 0.0, torch.where(fits, k, torch.nan))
    return result.log_softmax(-1), k


def _fit_pareto(excess: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Shape ``k`` and scale ``[rows]`` of a generalized Pareto law.

    Args:
        excess: ``[rows, M]``, ascending, those outside the tail first and equal to zero.
        inside: ``[rows, M]``, which entries count.

    Source: [ZhangStephens2009] section 4: posterior mean of ``b = -k / scale`` on a grid under a
    data-dependent prior; then k is drawn to 0.5 as by ten more points ([Vehtari2024] appendix).
    """
    n = inside.sum(-1, keepdim=True)  # [rows, 1]
    length = excess.shape[-1]
    points = 30 + n.double().sqrt().floor()
    grid = torch.arange(1, 31 + math.isqrt(length), dtype=excess.dtype, device=excess.device)
    quarter = (length - n + (n + 2) // 4 - 1).clamp(0, length - 1)
    b = (1 - (points / (grid - 0.5)).sqrt()) / (3 * excess.gather(-1, quarter)) + 1 / excess[:, -1:]
    profile = torch.log1p(-b[..., None] * excess[:, None, :]).sum(-1) / n  # [rows, grid]
    log_posterior = n * ((-b / profile).log() - profile - 1)
    log_posterior = log_posterior.masked_fill(grid > points, -torch.inf)
    share = log_posterior.softmax(-1)
    mean_b = torch.where(share > 0, share * b, 0.0).sum(-1, keepdim=True)
    k = torch.log1p(-mean_b * excess).sum(-1, keepdim=True) / n
    scale = -k / mean_b
    return ((n * k + 10 * 0.5) / (n + 10)).squeeze(-1), scale.squeeze(-1)


def _pareto_quantile(p: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    flat = k.abs() < 1e-15
    curved = torch.expm1(-k * torch.log1p(-p)) / torch.where(flat, 1.0, k)
    return scale * torch.where(flat, -torch.log1p(-p), curved)


def _lowest(values: Tensor) -> float:
    return float(values.min()) if values.numel() else math.inf


def _highest(values: Tensor) -> float:
    """Largest Pareto k that could be estimated; minus infinity where none could."""
    known = values[~values.isnan()]
    return float(known.max()) if known.numel() else -math.inf


def _few(reasons: list[str], most: int = 3) -> str:
    rest = len(reasons) - most
    return "; ".join(reasons[:most]) + (f"; and {rest} more" if rest > 0 else "")
