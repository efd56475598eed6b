# %% [markdown]
# # A picture from few measurements: compressed sensing
#
# A camera with a single pixel: light falls through a random mask of open and closed spots, and one number
# comes out. A picture of 64 x 64 pixels has 4096 unknowns. How many masks does it take?
#
# Fewer than 4096, because pictures are not arbitrary: in a basis of wavelets most of their coefficients are
# nearly zero. Which ones, nobody knows beforehand.

# %%
import os
import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_sample_image
from torch.distributions import constraints

from ppl import (
    Laplace,
    Normal,
    SpikeSlab,
    dot,
    given,
    infer,
    latent,
    model,
    observe,
    param,
    plate,
    state_evolution,
)
from ppl.models import sensed_image
from ppl.models.grids import peak_signal_to_noise
from ppl.models.transforms import dct, image_of_wavelets, wavelets_of_image

QUICK = os.environ.get("SMOKE_TEST") == "1"
SIDE, LEVELS = (32, 2) if QUICK else (64, 3)
ROWS = 300 if QUICK else 1000
warnings.filterwarnings("ignore", "amp: not converged")  # the last digits do not show in a picture

# %% [markdown]
# ## The data
#
# A photograph in grey, from 0 to 1. A picture of 8 x 8 coarse spots is measured directly; the masks are for
# the rest. Each is a row of +1 and -1 (open minus closed). The wavelets are orthonormal, so a mask sees a
# coefficient through the mask's own wavelet coefficient: that is the matrix `A`.

# %%
photo = load_sample_image("china.jpg").mean(2) / 255
step = 128 // SIDE
clean = photo[90:218, 290:418].reshape(SIDE, step, SIDE, step).mean((1, 3))
coarse, *details = wavelets_of_image(torch.as_tensor(clean), LEVELS)
truth = torch.cat([d.flatten() for d in details])


def exposures(rows, seed=0):
    """Matrix of random masks in terms of the wavelets, and what the camera reads."""
    rng = np.random.default_rng(seed)
    masks = torch.as_tensor(rng.choice([-1.0, 1.0], (rows, SIDE, SIDE))) / SIDE
    matrix = torch.cat([d.flatten(1) for d in wavelets_of_image(masks, LEVELS)[1:]], 1)
    return {"A": matrix, "y": matrix @ truth + 0.002 * torch.as_tensor(rng.standard_normal(rows))}


def split(coefficients):
    """A vector of coefficients as the details of each scale."""
    pieces = coefficients.split([d.numel() for d in details])
    return [p.reshape(d.shape) for p, d in zip(pieces, details, strict=True)]


def picture(coefficients):
    """The image of some coefficients."""
    return image_of_wavelets([coarse, *split(coefficients)]).numpy()


data = exposures(ROWS)
print(f"{SIDE} x {SIDE} pixels, {len(truth)} unknown coefficients, {ROWS} measurements")

# %% [markdown]
# ## The model
#
# A coefficient is zero or it is not: `SpikeSlab`. What is not zero may be large: `Laplace`. How many are not,
# how large they are and how noisy the camera is are constants (`param`) that are learned on the way.
# `dot(A, x, over=coef)` is one row of the matrix times all coefficients.


# %%
@model
def camera():
    rate = param("rate", 0.1, support=constraints.unit_interval)
    size = param("size", 0.3, support=constraints.positive)
    noise = param("noise", 0.05, support=constraints.positive)
    row, coef = plate("row"), plate("coef")
    with coef:
        x = latent("x", SpikeSlab(rate, slab=Laplace(0.0, size)))
    with row:
        with coef:
            matrix = given("A")
        observe("y", Normal(dot(matrix, x, over=coef), noise))


# %% [markdown]
# ## The fit
#
# Approximate message passing (`amp`) needs two products with the matrix a sweep. It looks at the spectrum of
# the matrix to pick a variant, and says which and why.


# %%
def develop(exposed):
    """Fit, to the precision that a picture needs."""
    fit = infer(camera, exposed, method="amp", start="data", seed=0, tol=1e-4, max_iters=300)
    return fit, peak_signal_to_noise(picture(fit.mean("x")), clean)


fit, quality = develop(data)
blurred = picture(torch.zeros_like(truth))
print(fit.variant)
print({name: round(float(value), 3) for name, value in fit.params.items()})
print(f"coarse: {peak_signal_to_noise(blurred, clean):.1f} dB, {ROWS} masks: {quality:.1f} dB")

# %% [markdown]
# Every coefficient comes with the probability that it is not zero. Wavelets of three directions stand around
# the coarse picture, finer scales further out: what matters are edges.


# %%
def mosaic(parts):
    """Coefficients of all scales beside each other."""
    image = parts[0]
    for across, down, both in parts[1:]:
        image = torch.cat([torch.cat([image, across], 1), torch.cat([down, both], 1)], 0)
    return image


probability = fit.inclusion("x")
panels = {
    "true": clean,
    "coarse only": blurred,
    f"{ROWS} masks": picture(fit.mean("x")),
    "probability of not zero": mosaic([torch.ones_like(coarse), *split(probability)]),
}
figure, axes = plt.subplots(1, 4, figsize=(14, 3.8), layout="constrained")
for ax, (name, pixels) in zip(axes, panels.items(), strict=True):
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    ax.set(title=name, xticks=[], yticks=[])
figure.savefig("compressed_sensing.png", dpi=110)

# %% [markdown]
# ## Would 20 % more masks help?
#
# For large random matrices the error of message passing can be computed from the laws alone, without data:
# *state evolution*. With the learned constants it predicts what this run has achieved, and what other numbers
# of masks would give. Then we take them, and look.

# %%
found = {name: float(value) for name, value in fit.params.items()}


def forecast(rows):
    """Mean squared error of a coefficient that state evolution predicts; a mask has norm one."""
    sizes = {"row": rows, "coef": len(truth)}
    return state_evolution(camera, sizes, params=found, row_norm=1.0).mse


def achieved(fit):
    """Mean squared error of a coefficient."""
    return float((fit.mean("x") - truth).square().mean())


more = round(1.2 * ROWS)
fits = {rows: develop(exposures(rows))[0] for rows in (ROWS // 2, more, 3 * ROWS // 2)}
fits[ROWS] = fit
print(f"{ROWS} masks: predicted {fit.predicted_mse:.2e}, achieved {achieved(fit):.2e}")
print(f"{more} masks: predicted {forecast(more):.2e}, achieved {achieved(fits[more]):.2e}")

# %%
numbers = np.linspace(0.3 * ROWS, 1.7 * ROWS, 6 if QUICK else 20).round().astype(int)
curve = [10 * np.log10(forecast(int(rows))) for rows in numbers]
figure, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
ax.plot(numbers, curve, label="predicted from the first fit")
for rows, one in fits.items():
    ax.plot(
        rows,
        10 * np.log10(achieved(one)),
        "o",
        color="C1",
        label="achieved" if rows == ROWS else None,
    )
ax.axhline(float(10 * truth.square().mean().log10()), color="0.6", ls=":", label="no masks at all")
ax.set(xlabel="masks", ylabel="mean squared error, dB")
ax.legend()
figure.savefig("compressed_sensing_forecast.png", dpi=110)

# %% [markdown]
# ## What could go wrong
#
# With half of the masks the coefficients cannot be told apart: most of the detail stays unknown, and no amount of
# computing changes that. The fit says so itself, in its own estimate of its error. Trust a prediction as far as
# you trust the laws: wavelets of a photograph gather along edges and are not independent, which is why prediction
# and achievement are a decibel or so apart.

# %%
for rows, one in sorted(fits.items()):
    print(
        f"{rows} masks: the fit expects an error of {one.estimated_mse['x']:.1e}, it is {achieved(one):.1e}"
    )

# %% [markdown]
# ## Without a matrix
#
# For 256 x 256 pixels the matrix would have a billion entries. It need not exist: a model may contain any
# linear torch expression, and its transpose is derived. In `sensed_image` the pixels' signs are scrambled and
# a part of the cosine transform of all pixels is seen. Each scale of wavelets has constants of its own.

# %%
side = 32 if QUICK else 256
large = photo[60 : 60 + side, 240 : 240 + side]
rng = np.random.default_rng(0)
sign = rng.choice([-1.0, 1.0], side * side)
seen = np.sort(rng.permutation(side * side)[: 3 * side * side // 10])
y = dct(torch.as_tensor(large.ravel() * sign))[torch.as_tensor(seen)].numpy()
y += 0.01 * rng.standard_normal(len(y))

levels = 2 if QUICK else 5
program = sensed_image(side, levels=levels)
without_matrix = infer(
    program, {"sign": sign, "at": seen, "y": y}, method="amp", seed=0, tol=1e-4, max_iters=100
)
names = ["coarse", *(f"detail{k}" for k in range(levels, 0, -1))]
restored = image_of_wavelets([without_matrix.mean(name) for name in names]).numpy()
print(
    f"{side} x {side} pixels, {len(y)} measurements: {peak_signal_to_noise(restored, large):.1f} dB"
)

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 4.7), layout="constrained")
for ax, pixels, name in zip(
    axes, (large, restored), ("true", "from 30 % of the numbers"), strict=True
):
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    ax.set(title=name, xticks=[], yticks=[])
figure.savefig("compressed_sensing_large.png", dpi=110)

# %% [markdown]
# ## Check

# %%
assert quality > peak_signal_to_noise(blurred, clean) + (1 if QUICK else 4)
assert achieved(fits[more]) < achieved(fit) and forecast(more) < forecast(ROWS)
assert abs(10 * np.log10(fit.predicted_mse / achieved(fit))) < 3
large_coefficients = truth.abs() > 0.5
assert probability[large_coefficients].mean() > 2 * probability.mean()
assert peak_signal_to_noise(restored, large) > (15 if QUICK else 23)
