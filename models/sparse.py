"""Sparse regressions: few of many coefficients matter, and rows are fewer than coefficients.

Constants (the share of coefficients that matter, their scale, the noise) are params that EM learns;
arguments give their start. ``model.sample`` simulates each model; :func:`simulated` gives data to
fit together with the truth, :func:`sensing_matrix` the usual matrices.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

from ppl import (
    Bernoulli,
    Exponential,
    Markov,
    Normal,
    Poisson,
    SpikeSlab,
    dot,
    given,
    latent,
    model,
    observe,
    param,
    plate,
)
from ppl.models.choices import check_choice
from ppl.models.simulation import simulated as simulated
from ppl.models.transforms import dct, image_of_wavelets
from ppl.plates import PlateHandle
from ppl.value import Value

MatrixKind = Literal["independent", "conditioned", "correlated", "offset"]


@model
def sparse_linear(rate: float = 0.1, slab: float = 1.0, noise: float = 0.1) -> None:
    """Linear regression in which most coefficients are zero: compressed sensing.

    x_j is zero with probability 1 - rate, else Normal(0, slab); y ~ Normal(A x, noise).

    Latents: ``x`` ``[coef]``. Data: ``A`` ``[row, coef]``, ``y`` ``[row]``. Params: ``rate``,
    ``slab``, ``noise``, which start at the arguments.

    >>> data, truth = simulated(sparse_linear, {"A": sensing_matrix(50, 100)})
    >>> data["y"].shape, truth["x"].shape
    (torch.Size([50]), torch.Size([100]))
    """
    law = SpikeSlab(_share("rate", rate), slab=Normal(0.0, _scale("slab", slab)))
    row, coef = plate("row"), plate("coef")
    with coef:
        x = latent("x", law)
    _seen_with_noise(x, row, coef, noise)


@model
def nonnegative_sparse(rate: float = 0.1, decay: float = 1.0, noise: float = 0.1) -> None:
    """:func:`sparse_linear` with coefficients that are zero or positive: amounts, intensities.

    x_j is zero with probability 1 - rate, else Exponential(decay); y ~ Normal(A x, noise).

    Latents: ``x`` ``[coef]``. Data: ``A`` ``[row, coef]``, ``y`` ``[row]``. Params: ``rate``,
    ``decay``, ``noise``.

    >>> _, truth = simulated(nonnegative_sparse, {"A": sensing_matrix(50, 100)})
    >>> bool((truth["x"] >= 0).all())
    True
    """
    law = SpikeSlab(_share("rate", rate), slab=Exponential(_scale("decay", decay)))
    row, coef = plate("row"), plate("coef")
    with coef:
        x = latent("x", law)
    _seen_with_noise(x, row, coef, noise)


@model
def group_sparse(rate: float = 0.1, slab: float = 1.0, noise: float = 0.1) -> None:
    """:func:`sparse_linear` in which the coefficients of a group matter together or not at all.

    on_g ~ Bernoulli(rate); x_j ~ Normal(0, slab) where the group of j is on, else zero; y ~
    Normal(A x, noise).

    Latents: ``on`` ``[group]``, ``x`` ``[coef]``. Data: ``A`` ``[row, coef]``, ``y`` ``[row]`` and
    ``group`` ``[coef]``, the group of each coefficient. Params: ``rate``, ``slab``, ``noise``.

    >>> known = {"A": sensing_matrix(30, 60), "group": np.repeat(np.arange(15), 4)}
    >>> _, truth = simulated(group_sparse, known)
    >>> bool(((truth["x"] != 0) == truth["on"].bool()[known["group"]]).all())
    True
    """
    share, spread = _share("rate", rate), _scale("slab", slab)
    row, group = plate("row"), plate("group")
    coef = plate("coef", within=group)
    with group:
        on = latent("on", Bernoulli(share))
    with coef:
        x = latent("x", SpikeSlab(on, slab=Normal(0.0, spread)))
    _seen_with_noise(x, row, coef, noise)


@model
def chain_sparse(
    enter: float = 0.02, stay: float = 0.8, slab: float = 1.0, noise: float = 0.1
) -> None:
    """:func:`sparse_linear` in which coefficients that matter come in runs.

    on_0 ~ Bernoulli(enter); on_j ~ Bernoulli(stay) after one that is on, else Bernoulli(enter); x_j
    ~ Normal(0, slab) where on, else zero; y ~ Normal(A x, noise).

    Latents: ``on`` and ``x`` ``[coef]``. Data: ``A`` ``[row, coef]``, ``y`` ``[row]``. Params:
    ``enter``, ``stay``, ``slab``, ``noise``.

    >>> _, truth = simulated(chain_sparse, {"A": sensing_matrix(100, 200)})
    >>> sorted(truth)
    ['on', 'x']
    """
    begin, keep, spread = _share("enter", enter), _share("stay", stay), _scale("slab", slab)
    row, coef = plate("row"), plate("coef", ordered=True)

    def step(previous: Tensor) -> Bernoulli:
        return Bernoulli(torch.where(previous == 1, keep, begin))

    with coef:
        on = latent("on", Markov(Bernoulli(begin), step))
        x = latent("x", SpikeSlab(on, slab=Normal(0.0, spread)))
    _seen_with_noise(x, row, coef, noise)


@model
def sparse_binary(
    link: Literal["probit", "logit"] = "probit", rate: float = 0.1, slab: float = 1.0
) -> None:
    """Yes or no by a sparse linear score.

    x as in :func:`sparse_linear`; y ~ Bernoulli(p) with p the normal distribution function ("probit")
    or the logistic function ("logit") of A x.

    Latents: ``x`` ``[coef]``. Data: ``A`` ``[row, coef]``, ``y`` ``[row]``, 0 or 1. Params: ``rate``,
    ``slab``.

    >>> data, _ = simulated(sparse_binary(link="logit"), {"A": sensing_matrix(50, 20)})
    >>> sorted(set(data["y"].tolist()))
    [0.0, 1.0]
    """
    check_choice("sparse_binary: link", link, ("probit", "logit"))
    score, row = _sparse_score(rate, _scale("slab", slab))
    with row:
        law = Bernoulli(logits=score) if link == "logit" else Bernoulli(torch.special.ndtr(score))
        observe("y", law)


@model
def one_bit(rate: float = 0.1) -> None:
    """Signs of linear measurements, without noise. Of the coefficients only the direction shows.

    x as in :func:`sparse_linear` with a slab of standard deviation 1, which stands for the scale that
    signs cannot tell; y = 1 where A x > 0, else 0.

    Latents: ``x`` ``[coef]``. Data: ``A`` ``[row, coef]``, ``y`` ``[row]``. Params: ``rate``.

    >>> data, truth = simulated(one_bit, {"A": sensing_matrix(40, 20)})
    >>> bool(((torch.as_tensor(data["A"]) @ truth["x"] > 0) == data["y"].bool()).all())
    True
    """
    score, row = _sparse_score(rate, 1.0)
    with row:
        observe("y", Bernoulli((score > 0).to(score.dtype)))


@model
def sparse_counts(rate: float = 0.1, slab: float = 0.5, level: float = 0.0) -> None:
    """Counts whose log mean is a level plus a sparse linear score.

    x as in :func:`sparse_linear`; level ~ Normal(``level``, 3); y ~ Poisson(exp(level + A x)).

    Latents: ``level`` is a scalar, ``x`` ``[coef]``. Data: ``A`` ``[row, coef]``, ``y`` ``[row]``.
    Params: ``rate``, ``slab``.

    >>> data, _ = simulated(sparse_counts, {"A": sensing_matrix(50, 20)})
    >>> bool((data["y"] >= 0).all())
    True
    """
    base = latent("level", Normal(level, 3.0))
    score, row = _sparse_score(rate, _scale("slab", slab))
    with row:
        observe("y", Poisson(torch.exp(base + score)))


@model
def sparse_spectrum(size: int, rate: float = 0.1, slab: float = 1.0, noise: float = 0.1) -> None:
    """A signal of few frequencies, seen at few of its points; no matrix is formed.

    The signal is the cosine transform of x; y_i ~ Normal(signal at point at_i, noise). A million
    unknowns need no more memory than some vectors of that length.

    Latents: ``x``, an event of ``size`` numbers. Data: ``at`` and ``y``, events of one number a
    sample. Params: ``rate``, ``slab``, ``noise``.

    Args:
        size: number of points of the signal, and of coefficients.
        rate: share of coefficients that are not zero, at the start.
        slab: their standard deviation, at the start.
        noise: at the start.

    >>> at = np.random.default_rng(0).permutation(64)[:32]
    >>> data, _ = simulated(sparse_spectrum(64), {"at": at})
    >>> data["y"].shape
    torch.Size([32])
    """
    law = SpikeSlab(_share("rate", rate), slab=Normal(0.0, _scale("slab", slab)))
    signal = dct(latent("x", law, shape=size))
    observe("y", Normal(signal[given("at")], _scale("noise", noise)))


@model
def sensed_image(side: int, levels: int = 3, noise: float = 0.01) -> None:
    """A square image of few wavelets, from a sample of the cosine transform of its scrambled pixels.

    The image is :func:`~ppl.models.transforms.image_of_wavelets` of x; half of its pixels, those
    where ``sign`` is -1, are turned round, and of the cosine transform of all of them in a row y_i is
    the entry at_i with noise. Each scale of wavelets has its own share and size of non-zeros.

    Latents: ``coarse``, ``[side / 2^levels] * 2``; ``detail1`` (finest), ``detail2``, ..., each ``[3,
    s, s]``: wavelets across, down and along diagonals. Data: ``sign`` ``[side * side]``, ``at`` and
    ``y``, one number a sample. Params: ``rate1``, ``slab1``, ..., ``noise``.

    Args:
        side: a multiple of ``2^levels``.
        levels: scales of wavelets.
        noise: at the start; pixels are of order one.
    """
    small = side >> levels
    parts = [latent("coarse", Normal(0.0, 2.0**levels), shape=(small, small))]
    for k in range(levels, 0, -1):
        spread = _scale(f"slab{k}", 0.05 * 2.0**k)
        law = SpikeSlab(_share(f"rate{k}", 0.2), slab=Normal(0.0, spread))
        parts.append(latent(f"detail{k}", law, shape=(3, side >> k, side >> k)))
    pixels = image_of_wavelets(parts).reshape(side * side)
    observe("y", Normal(dct(pixels * given("sign"))[given("at")], _scale("noise", noise)))


def sensing_matrix(
    rows: int,
    columns: int,
    kind: MatrixKind = "independent",
    *,
    strength: float | None = None,
    seed: int = 0,
) -> np.ndarray:
    """A random matrix ``[rows, columns]`` whose columns have mean squared norm one.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        kind: "independent" Gaussian entries; "conditioned": singular values in a geometric series from
            ``strength`` (100) to 1 between random bases; "correlated": neighbouring columns correlate by
            ``strength`` (0.9); "offset": entries with a mean of ``strength`` (1) standard deviations.
        strength: see ``kind``; "independent" has none.
        seed: of the random numbers.

    Raises:
        ModelError: an unknown kind.

    >>> bool(np.isclose(np.square(sensing_matrix(300, 500, "conditioned")).sum(), 500))
    True
    """
    check_choice("sensing_matrix: kind", kind, get_args(MatrixKind))
    rng = np.random.default_rng(seed)
    entries = rng.standard_normal((rows, columns))
    if kind == "conditioned":
        left, _, right = np.linalg.svd(entries, full_matrices=False)
        entries = (
            left * np.geomspace(100.0 if strength is None else strength, 1.0, len(right)) @ right
        )
    elif kind == "correlated":
        share = 0.9 if strength is None else strength
        fresh = np.sqrt(1 - share**2)
        for j in range(1, columns):
            entries[:, j] = share * entries[:, j - 1] + fresh * entries[:, j]
    elif kind == "offset":
        entries += 1.0 if strength is None else strength
    return entries * np.sqrt(columns / np.square(entries).sum())


def _seen_with_noise(x: Value, row: PlateHandle, coef: PlateHandle, noise: float) -> None:
    scale = _scale("noise", noise)
    with row:
        observe("y", Normal(_score(x, coef), scale))


def _sparse_score(rate: float, slab: Any) -> tuple[Value, PlateHandle]:
    """``A x`` with sparse x, and the plate of its rows."""
    law = SpikeSlab(_share("rate", rate), slab=Normal(0.0, slab))
    row, coef = plate("row"), plate("coef")
    with coef:
        x = latent("x", law)
    with row:
        return _score(x, coef), row


def _score(x: Value, coef: PlateHandle) -> Value:
    with coef:
        matrix = given("A")
    return dot(matrix, x, over=coef)


def _share(name: str, start: float) -> Value:
    return param(name, start, support=constraints.unit_interval)


def _scale(name: str, start: float) -> Value:
    return param(name, start, support=constraints.positive)
