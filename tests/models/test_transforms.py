"""Cosines and wavelets: SciPy as oracle, orthonormality, leading axes, use inside a model."""

from __future__ import annotations

import pytest
import scipy.fft
import torch

from ppl import Normal, latent, model, observe
from ppl.models.transforms import dct, image_of_wavelets, inverse_dct, wavelets_of_image


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 33])
def test_cosines_are_those_of_scipy(size):
    x = noise(3, size)
    expected = scipy.fft.dct(x.numpy(), norm="ortho")
    assert dct(x).numpy() == pytest.approx(expected, abs=1e-12)
    assert inverse_dct(x).numpy() == pytest.approx(
        scipy.fft.idct(x.numpy(), norm="ortho"), abs=1e-12
    )
    assert torch.allclose(inverse_dct(dct(x)), x)


def test_single_precision_stays():
    assert dct(noise(8).float()).dtype == torch.float32


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_wavelets_are_orthonormal(levels):
    images = noise(4, 16, 24)
    parts = wavelets_of_image(images, levels)
    assert [tuple(p.shape[1:]) for p in parts] == [
        (16 >> levels, 24 >> levels),
        *((3, 16 >> k, 24 >> k) for k in range(levels, 0, -1)),
    ]
    flat = torch.cat([p.flatten(1) for p in parts], 1)
    assert torch.allclose(flat @ flat.T, images.flatten(1) @ images.flatten(1).T)
    assert torch.allclose(image_of_wavelets(parts), images)


def test_wavelets_do_not_see_slopes():
    ramp = torch.arange(32, dtype=torch.float64) + torch.zeros(32, 1, dtype=torch.float64)
    fine = wavelets_of_image(ramp, 1)[1]
    assert fine[:, :, :-1].abs().max() < 1e-10  # but for the edge, which is joined to the other


def test_transforms_stand_inside_a_model():
    @model
    def seen():
        x = latent("x", Normal(0.0, 1.0), shape=16)
        observe("y", Normal(dct(x)[torch.arange(0, 16, 3)], 1e-9))

    drawn = seen.sample(5, seed=0)
    assert torch.allclose(drawn["y"], dct(drawn["x"])[:, ::3], atol=1e-6)
