"""Images as grids of unknowns: denoising, Gaussian grids, stereo.

A pixel's neighbour is ``shift(x, column)``; pixels without one drop out of the factor. The same
graph with explicit pairs is :func:`denoise_pairs`, which takes any neighbourhood.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ppl import Flat, Normal, factor, given, latent, model, observe, plate, shift
from ppl.plates import PlateHandle
from ppl.value import Value

Kernel = tuple[str, float] | None  # name and threshold in standard deviations; None: none


@model
def denoise(
    noise: float = 0.05,
    smooth: float = 0.03,
    noise_kernel: Kernel = None,
    smooth_kernel: Kernel = ("huber", 1.0),
    colours: bool = False,
    copies: int = 1,
) -> None:
    """An image from a noisy one: neighbours are alike, but for edges. Units: those of the pixels.

    pixel ~ Normal(x, noise) and, for each pair of neighbours, x_right - x ~ Normal(0, smooth), both
    with a robust kernel or without.

    Latents: ``x`` ``[row, column]`` or ``[row, column, colour]``. Data: ``pixel`` of the same
    shape; NaN where a pixel is missing.

    Args:
        noise: standard deviation of a pixel.
        smooth: standard deviation of the difference of two neighbours.
        noise_kernel: name and threshold, such as ("truncated", 1.0), of the pixels.
        smooth_kernel: of the differences.
        colours: whether the image has a third axis, of colours that are smoothed each by itself.
        copies: how often each pair counts; 2 is close to the doubled pairs of :func:`grid_pairs`.

    >>> denoise.graph({"pixel": [[0.1, 0.2], [0.3, 0.4]]}).latents[0].plates
    ('row', 'column')
    """
    row, column = plate("row", ordered=True), plate("column", ordered=True)
    axes = [row, column, *([plate("colour")] if colours else [])]
    _image(axes, noise, noise_kernel, smooth, smooth_kernel, copies)


@model
def denoise_pairs(
    noise: float = 0.05,
    smooth: float = 0.03,
    noise_kernel: Kernel = None,
    smooth_kernel: Kernel = ("huber", 1.0),
    colours: bool = False,
) -> None:
    """:func:`denoise` with the pairs of neighbours as data, in any number and arrangement.

    Latents: ``x`` ``[spot]`` or ``[spot, colour]``. Data: ``pixel`` of the same shape, ``i`` and
    ``j`` ``[pair]`` as of :func:`grid_pairs`.
    """
    spot, pair = plate("spot"), plate("pair")
    colour = [plate("colour")] if colours else []
    with _all_open(spot, *colour):
        x = latent("x", Flat())
        observe("pixel", _robust(Normal(x, noise), noise_kernel))
    with pair:
        i, j = given("i", index=spot), given("j", index=spot)
        with _all_open(*colour):
            factor("smooth", _robust(Normal(x[j] - x[i], smooth), smooth_kernel), at=0.0)


@model
def gaussian_grid(coupling: float = 1.0, prior: float = 1.0) -> None:
    """An Ising model with Gaussian spins: each is drawn to its own mean and to its neighbours.

    x ~ Normal(mean, 1/sqrt(prior)); x_right - x ~ Normal(right, 1/sqrt(coupling)), x_below - x ~
    Normal(down, 1/sqrt(coupling)). The more coupling beside prior, the slower messages converge and
    the more they overstate what is known.

    Latents: ``x`` ``[row, column]``. Data, all ``[row, column]``: ``mean``, ``right`` and ``down``;
    the last column of ``right`` and the last row of ``down`` are not used.

    Args:
        coupling: precision of the difference of two neighbours.
        prior: precision of each by itself.
    """
    row, column = plate("row", ordered=True), plate("column", ordered=True)
    with row, column:
        x = latent("x", Normal(given("mean"), prior**-0.5))
        for way, along in (("right", column), ("down", row)):
            law = Normal(shift(x, along) - x, coupling**-0.5)
            factor(f"pair_{way}", law, at=given(way))


@model
def stereo(
    smooth: float = 0.3,
    match_kernel: Kernel = ("cauchy", 2.0),
    smooth_kernel: Kernel = ("huber", 1.0),
) -> None:
    """Disparities of two pictures from noisy matches, many of which are wrong. Units: pixels.

    match ~ Normal(disparity, sd), robustly; neighbours differ by Normal(0, smooth), robustly, so
    that objects keep their outlines.

    Latents: ``disparity`` ``[row, column]``. Data: ``match`` and ``sd`` ``[row, column]``, as of
    :func:`block_matches`; NaN where nothing matches.
    """
    row, column = plate("row", ordered=True), plate("column", ordered=True)
    with row, column:
        disparity = latent("disparity", Flat())
        observe("match", _robust(Normal(disparity, given("sd")), match_kernel))
        _smooth(disparity, (row, column), smooth, smooth_kernel)


def grid_pairs(rows: int, columns: int, *, doubled: bool = False) -> dict[str, np.ndarray]:
    """Pairs of neighbours of an image whose pixels are numbered row by row.

    Args:
        rows: of the image.
        columns: of the image.
        doubled: a pair for each pixel inside and each of its four neighbours: pairs of two inner
            pixels stand twice, pairs of two border pixels not at all, as in the public code of
            [Nabarro2024].

    Returns:
        ``i`` and ``j`` ``[pair]``: pairs along rows, then along columns.

    >>> {end: positions.tolist() for end, positions in grid_pairs(2, 2).items()}
    {'i': [0, 2, 0, 1], 'j': [1, 3, 2, 3]}
    """
    spot = np.arange(rows * columns).reshape(rows, columns)
    if doubled:
        inner = spot[1:-1, 1:-1].ravel()
        i = np.concatenate([inner - 1, inner, inner - columns, inner])
        return {"i": i, "j": np.concatenate([inner, inner + 1, inner, inner + columns])}
    ways = ((spot[:, :-1], spot[:, 1:]), (spot[:-1], spot[1:]))
    i, j = (np.concatenate([way[end].ravel() for way in ways]) for end in (0, 1))
    return {"i": i, "j": j}


def peak_signal_to_noise(image: Any, clean: Any) -> float:
    """Peak signal-to-noise ratio in dB of an image clipped to [0, 1].

    >>> round(peak_signal_to_noise(np.full((4, 4), 0.6), np.full((4, 4), 0.5)), 3)
    20.0
    """
    error = np.clip(np.asarray(image), 0, 1) - np.asarray(clean)
    return float(-10 * np.log10(np.mean(np.square(error))))


def stereo_pair(
    rows: int = 48, columns: int = 64, *, noise: float = 0.02, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A left and a right picture of a tilted wall and a box before it, and the disparities.

    A pixel (r, c) of the left picture is seen at (r, c - disparity) in the right one.

    Returns:
        left, right, disparity, each ``[rows, columns]``; pictures in about [0, 1].
    """
    rng = np.random.default_rng(seed)
    tilt = np.linspace(3.0, 5.0, rows)[:, None] + np.zeros((1, columns))
    disparity = tilt.copy()
    box = (slice(rows // 4, 3 * rows // 4), slice(columns // 3, 2 * columns // 3))
    disparity[box] = 9.0
    right = rng.random((rows, columns + 12))
    at = np.arange(columns)[None, :] - disparity + 12
    low = np.floor(at).astype(int)
    row, share = np.arange(rows)[:, None], at - low
    left = (1 - share) * right[row, low] + share * right[row, np.minimum(low + 1, columns + 11)]
    pair = (left, right[:, 12:])
    left, right = (picture + noise * rng.standard_normal(picture.shape) for picture in pair)
    return left, right, disparity


def block_matches(left: Any, right: Any, *, largest: int = 12, radius: int = 2) -> dict[str, Any]:
    """The disparity at which a block around each pixel fits best, as data for :func:`stereo`.

    Args:
        left: picture ``[row, column]``.
        right: the same, from further right.
        largest: disparity that is tried.
        radius: of the block, in pixels.

    Returns:
        ``match`` (pixels, to a fraction by a parabola through the three best costs) and ``sd``.
    """
    left, right = np.asarray(left, dtype=float), np.asarray(right, dtype=float)
    columns = left.shape[1]
    behind = np.pad(right, ((0, 0), (largest, 0)), mode="edge")
    costs = [left - behind[:, largest - d : largest - d + columns] for d in range(largest + 1)]
    volume = np.stack([_box(np.square(cost), radius) for cost in costs])
    best = volume.argmin(0).clip(1, largest - 1)
    before, at, after = (np.take_along_axis(volume, best[None] + k, 0)[0] for k in (-1, 0, 1))
    bend = np.maximum(before - 2 * at + after, 1e-9)
    fraction = np.clip(0.5 * (before - after) / bend, -0.5, 0.5)
    return {"match": best + fraction, "sd": np.full(left.shape, 0.3)}


def _image(
    axes: list[PlateHandle],
    noise: float,
    noise_kernel: Kernel,
    smooth: float,
    smooth_kernel: Kernel,
    copies: int,
) -> None:
    with _all_open(*axes):
        x = latent("x", Flat())
        observe("pixel", _robust(Normal(x, noise), noise_kernel))
        for copy in range(copies):
            _smooth(x, (axes[0], axes[1]), smooth, smooth_kernel, "_again" * copy)


@contextmanager
def _all_open(*plates: PlateHandle) -> Iterator[None]:
    with ExitStack() as stack:
        for each in plates:
            stack.enter_context(each)
        yield


def _smooth(
    x: Value, axes: tuple[PlateHandle, PlateHandle], scale: float, kernel: Kernel, end: str = ""
) -> None:
    for way, along in zip(("down", "right"), axes, strict=True):
        law = _robust(Normal(shift(x, along) - x, scale), kernel)
        factor(f"smooth_{way}{end}", law, at=0.0)


def _robust(law: Normal, kernel: Kernel) -> Any:
    return law if kernel is None else law.robust(*kernel)


def _box(image: np.ndarray, radius: int) -> np.ndarray:
    padded = np.pad(image, radius, mode="edge")
    return sliding_window_view(padded, (2 * radius + 1,) * 2).mean((-1, -2))
