# %% [markdown]
# # Cleaning a picture: grids and robust losses
#
# A picture has lost some of its pixels to noise, and the rest is grainy. Neighbouring pixels of the
# true picture are mostly alike. How much of it can be brought back from that alone?

# %%
import os
import warnings

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_image

from ppl import Flat, Normal, factor, infer, latent, model, observe, plate, shift
from ppl.models.grids import peak_signal_to_noise

QUICK = os.environ.get("SMOKE_TEST") == "1"
SIDE = 48 if QUICK else 144
ROUNDS = 60 if QUICK else 150

# %% [markdown]
# ## The data
#
# A crop of a photograph in grey, with values from 0 to 1. Every pixel gets some grain; one in ten
# is replaced by any value at all.

# %%
photo = load_sample_image("china.jpg").mean(2) / 255
clean = photo[130 : 130 + SIDE, 220 : 220 + SIDE]
rng = np.random.default_rng(0)
broken = rng.random(clean.shape) < 0.1
noisy = np.where(broken, rng.random(clean.shape), clean + 0.04 * rng.standard_normal(clean.shape))
print(f"{SIDE} x {SIDE} pixels; the noisy picture has {peak_signal_to_noise(noisy, clean):.1f} dB")

# %% [markdown]
# ## The model
#
# One unknown a pixel. Each is seen with noise, and differs little from its neighbours to the right
# and below: `shift(x, column)` is the pixel one column on; where there is none, the factor drops
# out. The code is that of one pixel.
#
# What "little" means makes all the difference. A Normal says: a difference of ten standard
# deviations costs a hundred times as much as one of one. A *robust* loss grows more slowly: large
# differences are rare, but they happen, at the edges of things and at broken pixels.


# %%
@model
def picture(noise_kernel=None, smooth_kernel=None):
    row, column = plate("row", ordered=True), plate("column", ordered=True)

    def law(loc, scale, kernel):
        return Normal(loc, scale).robust(*kernel) if kernel else Normal(loc, scale)

    with row, column:
        x = latent("x", Flat())
        observe("pixel", law(x, 0.04, noise_kernel))
        factor("right", law(shift(x, column) - x, 0.06, smooth_kernel), at=0.0)
        factor("below", law(shift(x, row) - x, 0.06, smooth_kernel), at=0.0)


# %% [markdown]
# ## The fit
#
# Messages between neighbours: `gbp` updates all of them at once, round by round. A grid of
# $n$ pixels needs memory for $4 n$ messages and never forms a system of equations.

# %%
programs = {
    "quadratic": picture,
    "robust edges": picture(smooth_kernel=("huber", 1.0)),
    "robust edges and pixels": picture(noise_kernel=("cauchy", 4.0), smooth_kernel=("huber", 1.0)),
}


def fit(program, pixels, **options):
    """Means and standard deviations of the pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a few hundred rounds are enough for the eye
        return infer(program, {"pixel": pixels}, method="gbp", max_iters=ROUNDS, **options)


fits = {name: fit(program, noisy, variance="gbp") for name, program in programs.items()}
decibels = {
    name: peak_signal_to_noise(found.mean("x").numpy(), clean) for name, found in fits.items()
}
for name, value in decibels.items():
    print(f"{name}: {value:.1f} dB")

# %%
pictures = {"true": clean, "noisy": noisy} | {n: f.mean("x").numpy() for n, f in fits.items()}
figure, axes = plt.subplots(1, len(pictures), figsize=(15, 3.4), layout="constrained")
for ax, (name, pixels) in zip(axes, pictures.items(), strict=True):
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    ax.set(title=name, xticks=[], yticks=[])
figure.savefig("denoising.png", dpi=110)

# %% [markdown]
# A quadratic loss has to choose between grain and blur, and smears each broken pixel over its
# neighbours. A robust loss for the differences keeps edges, but takes a broken pixel for an object
# of its own size. With a robust loss for the pixels, too, the neighbours outvote it.
#
# ## Holes
#
# A pixel that is missing (NaN) has no factor of its own: its neighbours say what it may be, and the
# standard deviation says how sure they are. It grows towards the middle of a hole.

# %%
holes = clean + 0.04 * rng.standard_normal(clean.shape)
hole = (slice(SIDE // 3, SIDE // 3 + SIDE // 6), slice(SIDE // 3, SIDE // 3 + SIDE // 4))
holes[hole] = np.nan
scratch = np.abs(np.add.outer(np.arange(SIDE), -np.arange(SIDE)) + SIDE // 4) < 2
holes[scratch] = np.nan
filled = infer(picture, {"pixel": holes}, method="laplace")
sd = filled.sd("x").numpy()
print(
    f"sd of a pixel that was seen {np.median(sd):.3f}, in the middle of the hole {sd[hole].max():.3f}"
)

figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
for ax, pixels, title in zip(
    axes, (holes, filled.mean("x"), sd), ("holes", "filled", "sd"), strict=True
):
    shown = ax.imshow(pixels, cmap="gray" if title != "sd" else "viridis")
    ax.set(title=title, xticks=[], yticks=[])
figure.colorbar(shown, ax=axes[2], shrink=0.8)
figure.savefig("denoising_holes.png", dpi=110)

# %% [markdown]
# ## What could go wrong: variances
#
# The holes were filled by `laplace`, which solves one sparse system. Change one word and messages
# do it: the means agree, but a grid is full of loops, and around a loop evidence comes back to where
# it started and is counted again. `variance="check"` measures it on a sample of pixels.

# %%
loopy = fit(picture, holes, variance="check")
print(loopy.diagnostics.verdict)
ratio = loopy.sd("x").numpy() / sd
seen, unseen = np.median(ratio[~np.isnan(holes)]), np.median(ratio[hole])
print(f"standard deviations by messages, of the exact ones: {seen:.3f} where a pixel was seen,")
print(f"{unseen:.3f} in the hole, where all that is known came round by the neighbours")
gap = np.abs(loopy.mean("x").numpy() - filled.mean("x").numpy()) / sd
print(f"means: at most {gap.max():.2f} standard deviations apart")

# %% [markdown]
# ## Check

# %%
assert decibels["robust edges and pixels"] > decibels["quadratic"] + 0.5
assert decibels["robust edges and pixels"] > peak_signal_to_noise(noisy, clean) + 2
assert unseen < seen < 1 and gap.max() < 1
assert sd[hole].max() > 1.5 * np.median(sd)
