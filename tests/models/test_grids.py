"""Grids: energies by hand, the stored Huber optimum, pairs as shifts, stereo matches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ppl import infer
from ppl.models import datasets, denoise, denoise_pairs, gaussian_grid, stereo
from ppl.models.grids import block_matches, grid_pairs, peak_signal_to_noise, stereo_pair
from tests.models.joint_density import joint_density

IMAGE = np.random.default_rng(0).random((5, 7))
GUESS = np.random.default_rng(1).random((5, 7))


def huber(r: np.ndarray, k: float) -> np.ndarray:
    return np.where(np.abs(r) <= k, r**2 / 2, k * np.abs(r) - k**2 / 2)


def energy(program, data, x) -> float:
    """Energy up to the constant: differences from the flat image are free of it."""
    bound = program.bind(data)
    return joint_density(bound, {"x": np.zeros_like(x)}) - joint_density(bound, {"x": x})


def test_the_energy_is_the_formula():
    expected = [
        huber((IMAGE - x) / 0.1, 2.0).sum()
        + sum(huber(np.diff(x, axis=axis) / 0.2, 1.5).sum() for axis in (0, 1))
        for x in (GUESS, np.zeros_like(GUESS))
    ]
    program = denoise(
        noise=0.1, smooth=0.2, noise_kernel=("huber", 2.0), smooth_kernel=("huber", 1.5)
    )
    assert energy(program, {"pixel": IMAGE}, GUESS) == pytest.approx(expected[0] - expected[1])


def test_pairs_are_shifts():
    flat = {"pixel": IMAGE.ravel(), **grid_pairs(5, 7)}
    by_shift = energy(denoise, {"pixel": IMAGE}, GUESS)
    assert energy(denoise_pairs, flat, GUESS.ravel()) == pytest.approx(by_shift, rel=1e-12)


def test_copies_count_each_pair_again():
    once, twice = (energy(denoise(copies=n), {"pixel": IMAGE}, GUESS) for n in (1, 2))
    data_only = energy(denoise(copies=0), {"pixel": IMAGE}, GUESS)
    assert twice - data_only == pytest.approx(2 * (once - data_only))


def test_colours_are_smoothed_one_by_one():
    image, guess = np.stack([IMAGE, IMAGE[::-1]], 2), np.stack([GUESS, GUESS[::-1]], 2)
    both = energy(denoise(colours=True), {"pixel": image}, guess)
    assert both == pytest.approx(2 * energy(denoise, {"pixel": IMAGE}, GUESS))
    flat = {"pixel": image.reshape(-1, 2), **grid_pairs(5, 7)}
    by_pairs = energy(denoise_pairs(colours=True), flat, guess.reshape(-1, 2))
    assert by_pairs == pytest.approx(both, rel=1e-12)


def test_doubled_pairs_are_those_of_the_public_code():
    pairs = grid_pairs(4, 5, doubled=True)
    spots, counts = np.unique(np.stack([pairs["i"], pairs["j"]], 1), axis=0, return_counts=True)
    row, column = spots // 5, spots % 5
    inner = (row > 0) & (row < 3) & (column > 0) & (column < 4)
    assert np.array_equal(counts, inner.sum(1))
    assert (np.abs(np.diff(row, axis=1)) + np.abs(np.diff(column, axis=1)) == 1).all()
    assert len(pairs["i"]) == 4 * 2 * 3


def test_the_stored_huber_optimum_is_a_stationary_point():
    path = datasets.find("gbp/image64_oracle.npz")
    if path is None:
        pytest.skip("the data file 'gbp/image64_oracle.npz' is not on this machine")
    with np.load(path) as stored:
        kernels = {"noise_kernel": ("huber", 1.0), "smooth_kernel": ("huber", 1.0)}
        bound = denoise(noise=0.05, smooth=0.03, **kernels).bind({"pixel": stored["noisy"]})
        best = stored["huber_map"]
        edges = grid_pairs(64, 64)
        pairs = {tuple(p) for p in np.stack([edges["i"], edges["j"]], 1).tolist()}
        assert pairs == {tuple(p) for p in stored["edges"].tolist()}
    rng = np.random.default_rng(0)
    at_best = joint_density(bound, {"x": best})
    for size in (1e-3, 1e-5):  # to first order nothing changes, to second it gets worse
        there = joint_density(bound, {"x": best + size * rng.standard_normal(best.shape)})
        assert 0 < at_best - there < 1e7 * size**2


def test_a_gaussian_grid_has_the_precision_of_its_pairs():
    rng = np.random.default_rng(2)
    mean, right, down = rng.standard_normal((3, 3, 4))
    bound = gaussian_grid(coupling=4.0, prior=0.5).bind(
        {"mean": mean, "right": right, "down": down}
    )
    x = rng.standard_normal((3, 4))
    square = 0.5 * (x - mean) ** 2
    across, below = np.diff(x, axis=1) - right[:, :-1], np.diff(x, axis=0) - down[:-1]
    expected = square.sum() + 4 * (across**2).sum() + 4 * (below**2).sum()
    constant = 0.5 * (12 * np.log(0.5) + 17 * np.log(4.0)) - 0.5 * 29 * np.log(2 * np.pi)
    assert joint_density(bound, {"x": x}) == pytest.approx(constant - expected / 2)


def test_spins_are_drawn_from_their_own_law():
    zeros = dict.fromkeys(("mean", "right", "down"), np.zeros((8, 8)))
    drawn = gaussian_grid(prior=4.0).sample(200, zeros, seed=0)["x"]
    assert drawn.shape == (200, 8, 8) and float(drawn.std()) == pytest.approx(0.5, rel=0.05)


def test_missing_pixels_say_nothing():
    holes = IMAGE.copy()
    holes[1:3, 2] = np.nan
    bound = denoise.bind({"pixel": holes})
    far = GUESS.copy()
    assert np.isfinite(joint_density(bound, {"x": far}))
    assert bound.report[0].startswith("2 of 35 entries of 'pixel' are missing")


def test_blocks_match_where_there_is_one_surface():
    left, right, disparity = stereo_pair(seed=0)
    data = block_matches(left, right)
    error = np.abs(data["match"] - disparity)
    assert np.median(error) < 0.3 and (error > 1).mean() < 0.4
    bound = stereo.bind(data)
    at_truth = joint_density(bound, {"disparity": disparity})
    assert at_truth > joint_density(bound, {"disparity": np.full_like(disparity, 5.0)})
    again = stereo_pair(seed=0)
    assert all(np.array_equal(a, b) for a, b in zip((left, right, disparity), again, strict=True))


@pytest.mark.parametrize("method", ["laplace", "gbp"])
def test_smoothing_brings_stereo_and_pictures_nearer_to_the_truth(method):
    left, right, disparity = stereo_pair(24, 40, seed=1)
    matches = block_matches(left, right)
    found = infer(stereo, matches, method=method, start={"disparity": matches["match"]}, tol=1e-2)
    off = [
        np.abs(np.asarray(d) - disparity).mean()
        for d in (matches["match"], found.mean("disparity"))
    ]
    assert off[1] < 0.95 * off[0]
    clean = np.add.outer(np.linspace(0, 1, 20) > 0.5, np.linspace(0, 0.5, 24)) / 1.5
    noisy = clean + 0.05 * np.random.default_rng(0).standard_normal(clean.shape)
    smooth = infer(denoise, {"pixel": noisy}, method=method, start={"x": noisy}, tol=1e-2)
    gained = peak_signal_to_noise(smooth.mean("x").numpy(), clean) - peak_signal_to_noise(
        noisy, clean
    )
    assert gained > 2


def test_the_noise_of_the_bear_is_the_stored_one():
    if datasets.find("gbp/bear_video.npz") is None:
        pytest.skip("the data file 'gbp/bear_video.npz' is not on this machine")
    clean, noisy = datasets.bear()
    assert clean.shape == noisy.shape == (258, 454, 3)
    assert 0 <= clean.min() and clean.max() <= 1
    assert peak_signal_to_noise(noisy, clean) == pytest.approx(18.70, abs=0.005)
    assert (clean != noisy).any(2).mean() == pytest.approx(0.1, abs=0.003)


def test_models_take_tensors_too():
    bound = denoise.bind(
        {"pixel": torch.as_tensor(IMAGE, dtype=torch.float32)}, dtype=torch.float32
    )
    assert bound.values["pixel"].dtype == torch.float32
