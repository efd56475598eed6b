"""Compare the moments of a posterior with those of a reference."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

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


def scalar_names(site: str, shape: tuple[int, ...]) -> Iterator[str]:
    """Names of the scalars of a site, in the order of its flattened array.

    >>> list(scalar_names("mu", ())), list(scalar_names("beta", (2,)))
    (['mu'], ['beta[1]', 'beta[2]'])
    """
    for index in np.ndindex(*shape):
        yield f"{site}[{','.join(str(i + 1) for i in index)}]" if index else site


def posterior_moments(posterior: Posterior, names: Mapping[str, Moments]) -> dict[str, Moments]:
    """Moments of every site that a reference name speaks of."""
    found: dict[str, Moments] = {}
    for site in dict.fromkeys(name.partition("[")[0] for name in names):
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


def _scalars(site: str, mean: Tensor, sd: Tensor) -> dict[str, Moments]:
    pairs = zip(mean.reshape(-1).tolist(), sd.expand_as(mean).reshape(-1).tolist(), strict=True)
    return {
        n: Moments(*p) for n, p in zip(scalar_names(site, tuple(mean.shape)), pairs, strict=True)
    }
