# %% [markdown]
# # Birds that were there and were not seen
#
# A route is walked five times and no warbler is heard. Is there none? Counting such routes as empty
# makes a shy bird look rare. An occupancy model keeps two questions apart: is the bird there, and
# is it noticed when it is? Presence is a discrete latent, one for every visit; `method="qem"` sums
# over its two values exactly and only the continuous latents have particles.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import torch

from ppl import infer
from ppl.models import occupancy

QUICK = os.environ.get("SMOKE_TEST") == "1"
BIRDS, YEARS, VISITS, WALKS = (4, 2, 20, 3) if QUICK else (8, 3, 60, 4)

# %% [markdown]
# ## The model
#
# `ppl.models.occupancy`. For each bird j, year m and visit i
#
#     z_jmi   ~ Bernoulli(logit^-1(bird_year_mean_jm * weather_jmi * beta_j))     is it there?
#     obs_jmir ~ Bernoulli(logit^-1(alpha_j * quality_jmi))    where it is, once for each walk r
#
# and where it is not a walk reports it once in 22 000 times. Birds differ in alpha, beta and in
# their mean, and share what these have in common.

# %%
print(occupancy.__doc__.split("Latents:")[0])

# %% [markdown]
# ## The data
#
# Drawn from the model, so that we know who was there. Weather is given in standard deviations; a
# visit in fair weather and of good quality (1) finds a bird more easily than a poor one (0.3).

# %%
rng = np.random.default_rng(3)
shape = (BIRDS, YEARS, VISITS)
covariates = {"weather": rng.normal(0, 1.5, shape), "quality": rng.choice([0.3, 1.0], shape)}
truth = occupancy.do(
    alpha=np.linspace(-2.5, 1.5, BIRDS),  # the first are shy, the last are loud
    beta=np.linspace(0.6, 1.4, BIRDS),
    bird_mean=np.ones(BIRDS),
)
drawn = truth.sample(1, covariates, sizes={"replicate": WALKS}, seed=1)
there = drawn["z"][0].bool()
data = {**covariates, "obs": drawn["obs"][0]}
seen = data["obs"].bool().any(-1)
print(f"present on {there.float().mean():.0%} of all visits, seen on {seen.float().mean():.0%}")

# %% [markdown]
# ## The fit
#
# One line. `explain` would say that the presences are enumerated: `z` has no particles.

# %%
posterior = infer(occupancy, data, method="qem", seed=0)
print(posterior.summary(["alpha", "beta", "alpha_mean", "beta_mean"]))
print("verdict:", posterior.diagnostics.verdict)

# %% [markdown]
# ## Where nothing was seen
#
# Where a bird was seen it is there. Where it was not, the probability that it is there after all
# depends on how loud the bird is, on the weather, and on how good the visits were. Are these
# probabilities right? Among all silent visits with a probability near 0.4, the bird should be there
# on four in ten.

# %%
presence = posterior.mean("z")
silent = ~seen
edges = torch.linspace(0, 1, 6, dtype=torch.float64)
group = torch.bucketize(presence[silent].contiguous(), edges[1:-1])
said, was, count = (
    torch.zeros(5, dtype=torch.float64).index_add_(0, group, x.double())
    for x in (presence[silent], there[silent], torch.ones_like(presence[silent]))
)
full = count >= 5
said, was, count = (said / count)[full], (was / count)[full], count[full]

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
left.plot([0, 1], [0, 1], color="0.7", lw=1)
error = (said * (1 - said) / count).sqrt()  # of the share, if the probabilities are right
left.errorbar(said, was, 2 * error, fmt="o", capsize=3)
for x, y, n in zip(said, was, count, strict=True):
    left.annotate(
        f"{int(n)} visits", (x, y), xytext=(6, -12), textcoords="offset points", fontsize=8
    )
left.set(
    xlabel="probability of presence, where nothing was seen", ylabel="share where it was there"
)

x = np.arange(BIRDS)
shares = {
    "seen": seen.double().mean((1, 2)),
    "estimated": presence.mean((1, 2)),
    "truly there": there.double().mean((1, 2)),
}
for (name, share), marker, colour in zip(
    shares.items(), ("x", "o", "_"), ("0.5", "tab:blue", "black"), strict=True
):
    right.scatter(x, share, marker=marker, color=colour, label=name, s=60)
right.set(xlabel="bird, from shy to loud", ylabel="share of visits", ylim=(0, 1))
right.legend(frameon=False)
figure.savefig("occupancy.png", dpi=110)

# %% [markdown]
# ## Two kinds of zeros
#
# A visit without a sighting is a zero of one of two kinds: nobody there, or nobody noticed. The same
# question arises for claims, purchases and defects. What the two kinds are worth for one shy and
# one loud bird:

# %%
for j in (0, BIRDS - 1):
    missed = presence[j][silent[j]]
    print(
        f"bird {j}: {len(missed)} silent visits of {seen[j].numel()}; it was missed on about "
        f"{missed.sum():.0f} of them (truly {int(there[j][silent[j]].sum())})"
    )

# %% [markdown]
# ## A new year
#
# Years that the fit has not seen are drawn from what it knows of each bird. A visit in bad weather
# and one in good weather, for the loudest bird:

# %%
weather = np.tile([-2.0, 2.0], (BIRDS, 1, 1))
new = {"weather": weather, "quality": np.ones((BIRDS, 1, 2)), "year": ["next"]}
chance = posterior.predict(new, sizes={"replicate": WALKS}, seed=2).mean("z")
print("presence of the loudest bird in bad and in good weather:", chance[-1, 0].numpy().round(2))

# %% [markdown]
# ## What could go wrong
#
# Presence and detection are told apart by repeated visits alone: with one walk a visit they are not.
# The published data set (`datasets.occupancy()`, the North American Breeding Bird Survey) has
# rows only for birds that were counted, so each visit in it has a detection: presence is certain
# everywhere, and only alpha is learned. Look at your zeros before you model them.
#
# `bird_year_mean` and `beta` appear only as a product, and their priors are symmetric: change the
# signs of both and nothing changes. The posterior has a mirror image, of which a fit finds one
# half (then every beta above has one sign, maybe the wrong one) or, with little data, both
# (then every mean is near 0). Presence and predictions do not care; a report on beta would have to
# fix the sign.

# %%
assert presence[seen].mean() > 0.99
off = {name: (shares[name] - shares["truly there"]).abs().mean() for name in ("seen", "estimated")}
print({name: round(float(value), 3) for name, value in off.items()})
assert off["estimated"] < off["seen"]
assert ((said - was).abs() < 0.05 + 3 * error).all()
