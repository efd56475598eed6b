# %% [markdown]
# # A first model: eight schools
#
# Eight schools coached their pupils for a test. Each has its own estimate of what that brought
# (points) and the standard error of the estimate (Rubin 1981). School A stands at 28 points: is
# it that good?

# %%
import os
import warnings

import matplotlib.pyplot as plt
import torch

from ppl import HalfCauchy, Normal, given, infer, latent, model, observe, plate
from ppl.models import datasets

DRAWS = 1000 if os.environ.get("SMOKE_TEST") == "1" else 4000

# %% [markdown]
# ## The model
#
# Two simple answers are wrong: "believe each school" ignores that the errors are large, "all are
# the same" ignores that schools differ. A hierarchical model lets the data choose between them:
# the true effects `theta` scatter around a common mean `mu`, and the size of the scatter, `tau`,
# is unknown, too.
#
# Inside a plate, code is written for **one** school.


# %%
@model
def eight_schools():
    mu = latent("mu", Normal(0.0, 5.0))
    tau = latent("tau", HalfCauchy(5.0))
    with plate("school"):
        theta = latent("theta", Normal(mu, tau))
        observe("y", Normal(theta, given("sigma")))


# %% [markdown]
# ## The data
#
# A mapping of names to arrays. Plates take their sizes from it, and their labels, where there are
# any.

# %%
data = datasets.eight_schools()
for school, y, sigma in zip(data["school"], data["y"], data["sigma"], strict=True):
    print(f"school {school}: {y:3.0f} points, standard error {sigma:.0f}")
print("\n", eight_schools.graph(data))

# %% [markdown]
# ## Before the data: what does the model believe?
#
# Draws from the prior show what the model holds possible. Half of the effects should not be
# miracles.

# %%
prior = eight_schools.sample(2000, data, seed=0)
low, high = torch.quantile(prior["theta"], torch.tensor([0.25, 0.75], dtype=torch.float64))
print(f"before the data, half of all effects lie between {low:.0f} and {high:.0f} points")

# %% [markdown]
# ## The fit
#
# `qem` draws particles for each latent, weighs all their combinations, and moves the proposal to
# the moments that come out. There is nothing to tune; `seed` makes the run repeatable.

# %%
posterior = infer(eight_schools, data, method="qem", seed=0)
print(posterior)

# %% [markdown]
# ## What we learned
#
# Every school is pulled towards the mean, the noisy ones most. School A is probably good, but six
# points are a better guess than 28.

# %%
figure = posterior.plot.forest(["theta", "mu", "tau"])
figure.savefig("eight_schools_forest.png", dpi=110)

draws = posterior.samples(DRAWS, seed=1)
best = (draws["theta"].argmax(1) == 0).double().mean()
print(f"school A: {posterior.mean('theta')[0]:.1f} points; it is the best one with {best:.0%}")

ninth = posterior.predict({"school": ["a ninth school"], "sigma": [15.0]}, seed=2)
low, high = ninth.interval("theta")[:, 0]
print(f"a ninth school would gain between {low:.0f} and {high:.0f} points (90 %)")

# %% [markdown]
# ## What could go wrong: the funnel
#
# Where `tau` is small all `theta` must be close to `mu`; where it is large they may be anywhere.
# This funnel is what makes samplers on the same model crawl or miss the tip. QEM weighs particles
# of `theta` against particles of `(mu, tau)`, so both parts are reached, but the tip is where its
# weights are worst.

# %%
wide, narrow = draws["tau"] > 8, draws["tau"] < 1
spread = draws["theta"] - draws["mu"][:, None]
print(f"sd of theta - mu where tau < 1: {spread[narrow].std():.1f} points")
print(f"sd of theta - mu where tau > 8: {spread[wide].std():.1f} points")

figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
ax.scatter(spread[:, 0], draws["tau"], s=5, alpha=0.4, linewidths=0)
ax.set(yscale="log", xlabel="theta[A] - mu (points)", ylabel="tau (points, log scale)")
ax.set_ylim(0.05, 50)
figure.savefig("eight_schools_funnel.png", dpi=110)

# %% [markdown]
# The result says how far to trust it. *Pareto k* measures how heavy the tail of the weights is:
# below 0.5 all is well, above 0.7 numbers can be off. A fit with far too few particles shows how
# a doubtful result announces itself.

# %%
print("as fitted:  ", posterior.diagnostics.verdict)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it says that the run did not converge: that is the point
    few = infer(eight_schools, data, method="qem", seed=0, particles=5, final_particles=5)
print("5 particles:", few.diagnostics.verdict)

# %% [markdown]
# ## Check
#
# Given `tau` this model is Gaussian, and `tau` is one number to integrate over: `method="exact"`
# does that. It is the oracle that the approximate methods are judged by, where a model is small
# enough.

# %%
exact = infer(eight_schools, data, method="exact")
for name in ("mu", "tau", "theta"):
    off = ((posterior.mean(name) - exact.mean(name)) / exact.sd(name)).abs().max()
    print(f"{name}: {off:.3f} posterior standard deviations from the exact mean")
    assert off < 0.15
assert spread[narrow].std() < spread[wide].std() / 4
