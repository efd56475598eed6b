"""Compare the moments of a posterior with those of a reference."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppl import Posterior


class Moments(NamedTuple):
    """Mean and standard deviation of one number."""

    mean: float
    sd: float


class Score(NamedTuple):
    """Errors over all parameters of a model.

    ``err`` is the difference of means in reference standard deviations, ``lsr`` the log of the
    ratio of standard deviations (negative: too narrow).
    """

    parameters: int
    max_err: float
    mean_err: float
    max_lsr: float
    mean_lsr: float  # mean of the absolute values
    worst_mean: str
    worst_sd: str


def load_reference(folder: Path) -> dict[str, Moments]:
    """Reference moments by scalar name (``beta[1]``, from one); exact ones where there are any."""
    content = json.loads((folder / "reference.json").read_text())
    entries = {**content["params"], **content.get("exact", {})}
    return {
        name: Moments(float(entries[name]["mean"]), float(entries[name]["sd"]))
        for name in content["params"]
    }


def load_arrays(path: Path, only: Sequence[str] = ()) -> dict[str, Moments]:
    """Moments of an archive with ``site__mean`` and ``site__sd``, by scalar name; of some sites, or of all."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return named(arrays, only)


def named(arrays: Mapping[str, np.ndarray], only: Sequence[str] = ()) -> dict[str, Moments]:
    """The same from arrays.

    >>> named({"mu__mean": np.zeros(1), "mu__sd": np.ones(1)})
    {'mu[1]': Moments(mean=0.0, sd=1.0)}
    """
    sites = [name.removesuffix("__mean") for name in arrays if name.endswith("__mean")]
    found: dict[str, Moments] = {}
    for site in sites:
        if not only or site in only:
            pair = (torch.as_tensor(arrays[f"{site}__{part}"]) for part in ("mean", "sd"))
            found |= _scalars(site, *pair)
    return found


def scalar_names(site: str, shape: tuple[int, ...]) -> Iterator[str]:
    """Names of the scalars of a site, in the order of its flattened array.

    >>> list(scalar_names("mu", ())), list(scalar_names("beta", (2,)))
    (['mu'], ['beta[1]', 'beta[2]'])
    """
    for index in np.ndindex(*shape):
        yield f"{site}[{','.join(str(i + 1) for i in index)}]" if index else site


def posterior_moments(posterior: Posterior, names: Mapping[str, Moments]) -> dict[str, Moments]:
    """Moments of every site that a reference name speaks of; ``abs_x`` is the magnitude of ``x``."""
    found: dict[str, Moments] = {}
    known = {v.name for v in posterior.bound.graph.latents}
    for site in dict.fromkeys(name.partition("[")[0] for name in names):
        if site.startswith("abs_") and site not in known:
            mean, sd = _of_magnitude(posterior, site.removeprefix("abs_"))
        else:
            mean, sd = posterior.mean(site), posterior.sd(site)
        found |= _scalars(site, mean, sd)
    return found


def score(found: Mapping[str, Moments], reference: Mapping[str, Moments]) -> Score:
    """Errors of ``found`` against ``reference``; a parameter that does not vary is left out.

    >>> ours = {"a": Moments(0.1, 1.0), "b": Moments(2.0, 4.0)}
    >>> result = score(ours, {"a": Moments(0.0, 1.0), "b": Moments(2.0, 2.0)})
    >>> result.max_err, round(result.max_lsr, 3), result.worst_sd
    (0.1, 0.693, 'b')
    """
    names = [name for name, moments in reference.items() if moments.sd > 0]
    missing = [name for name in names if name not in found]
    if missing:
        raise KeyError(f"no moments for {missing[:5]}")
    ours = np.array([found[name] for name in names])
    theirs = np.array([reference[name] for name in names])
    err = np.abs(ours[:, 0] - theirs[:, 0]) / theirs[:, 1]
    lsr = np.abs(np.log(np.maximum(ours[:, 1], 1e-300) / theirs[:, 1]))
    return Score(
        len(names),
        float(err.max()),
        float(err.mean()),
        float(lsr.max()),
        float(lsr.mean()),
        names[int(err.argmax())],
        names[int(lsr.argmax())],
    )


def smallest(values: Mapping[str, Tensor]) -> float:
    """Smallest entry over all sites; NaN when there is none."""
    return min((float(torch.as_tensor(v).min()) for v in values.values()), default=float("nan"))


def largest(values: Mapping[str, Tensor]) -> float:
    """Largest entry over all sites; NaN when there is none."""
    return max((float(torch.as_tensor(v).max()) for v in values.values()), default=float("nan"))


def cell(values: Sequence[Any]) -> str:
    """Of a table: the median over seeds and their range, or the worst verdict.

    >>> cell([0.1, 0.3, 0.2]), cell(["good: fine.", "check: look."])
    ('0.2 (0.1 to 0.3)', 'check')
    """
    if isinstance(values[0], str):
        worst = max(
            values, key=lambda v: ("good", "check", "unreliable").index(v.partition(":")[0])
        )
        return worst.partition(":")[0]
    centre, low, high = median(values), min(values), max(values)
    return number(centre) if low == high else f"{number(centre)} ({number(low)} to {number(high)})"


def number(value: float) -> str:
    """Three digits, and no decimals where they say nothing."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.3g}"


_LEVELS = 4000


def _of_magnitude(posterior: Posterior, site: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of |x|, by the quantiles of x: of any kind of marginal."""
    levels = (torch.arange(_LEVELS, dtype=torch.float64) + 0.5) / _LEVELS
    values = posterior.quantile(site, levels).abs()
    return values.mean(0), values.std(0, correction=0)


def _scalars(site: str, mean: Tensor, sd: Tensor) -> dict[str, Moments]:
    pairs = zip(mean.reshape(-1).tolist(), sd.expand_as(mean).reshape(-1).tolist(), strict=True)
    return {
        n: Moments(*p) for n, p in zip(scalar_names(site, tuple(mean.shape)), pairs, strict=True)
    }
