# %% [markdown]
# # Radon: houses in counties
#
# Radon is a gas that comes out of the ground and causes lung cancer. How much of it is there in
# the houses of a county, when in some counties two houses were measured and in others a hundred?
# And in a county where nobody measured? (Gelman and Hill 2006, chapter 12.)

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from ppl import DataError, HalfNormal, Normal, given, infer, latent, model, observe, plate
from ppl.models import datasets

QUICK = os.environ.get("SMOKE_TEST") == "1"

# %% [markdown]
# ## The model
#
# Every house belongs to a county: `plate("house", within=county)`. In the house plate, `level` is
# the level of the house's own county; no index appears anywhere, and the groups may be of any
# size. The soil's uranium is known for each county and explains part of the level.


# %%
@model
def radon(uranium=True):
    county = plate("county")
    house = plate("house", within=county)

    base, effect = latent("base", Normal(0.0, 3.0)), latent("effect", Normal(0.0, 1.0))
    spread, noise = latent("spread", HalfNormal(1.0)), latent("noise", HalfNormal(1.0))
    slope = latent("slope", Normal(0.0, 1.0)) if uranium else 0.0
    with county:
        centre = base + slope * given("uranium") if uranium else base
        level = latent("level", Normal(centre, spread))
    with house:
        observe("log_radon", Normal(level + effect * given("floor"), noise))


# %% [markdown]
# ## The data
#
# A table with one row a house: the log of the radon (pCi/L), whether it was measured on the first
# floor (1) or in the basement (0), the county, and its uranium (log ppm). Where the survey of
# Minnesota is on this machine it is used (`datasets.radon_minnesota` says where to get it);
# elsewhere the model itself draws houses for us.


# %%
def simulated(counties=40):
    """Houses drawn from the model, 1 to 30 a county."""
    rng = np.random.default_rng(0)
    sizes = np.round(np.exp(rng.uniform(0, np.log(30), counties))).astype(int)
    names = np.repeat([f"county {i:02d}" for i in range(counties)], sizes)
    soil = np.repeat(rng.normal(0, 0.4, counties), sizes)
    table = {"county": names, "floor": rng.binomial(1, 0.2, sizes.sum()), "uranium": soil}
    truth = radon.do(base=1.4, slope=0.75, effect=-0.65, spread=0.15, noise=0.75)
    drawn = truth.sample(1, table, seed=1)["log_radon"][0].numpy()
    return pd.DataFrame({**table, "log_radon": drawn})


try:
    houses = pd.DataFrame(datasets.radon_minnesota())
except DataError as error:
    print(error)
    houses = simulated()
if QUICK:
    houses = houses[houses["county"].isin(sorted(set(houses["county"]))[:12])]

sizes = houses.groupby("county").size()
print(f"{len(houses)} houses in {len(sizes)} counties, {sizes.min()} to {sizes.max()} in each")

# %%
posterior = infer(radon, houses, method="qem", seed=0)
print(posterior)

# %% [markdown]
# The verdict says whether the weights can be trusted. Where it does not say "good", there is a
# cheap second opinion: weigh fresh particles, with the fit itself as the proposal. Compare the
# numbers; where they stay, the worry was about nothing.

# %%
again = posterior.reweight(100, seed=1)
print(again.summary(["base", "effect", "spread", "noise", "slope"]))
print(again.diagnostics.verdict)

# %% [markdown]
# ## Shrinkage
#
# A county's own average is an honest estimate, but from two houses it says little. The model
# pulls it towards what the county's soil suggests: far where there are few houses, hardly at all
# where there are many. Nobody told it how far.

# %%
base, slope, effect = (posterior.mean(name).item() for name in ("base", "slope", "effect"))
in_basement = houses.assign(own=houses["log_radon"] - effect * houses["floor"])
table = in_basement.groupby("county").agg(own=("own", "mean"), soil=("uranium", "first"))
table["houses"] = sizes
table["level"] = pd.Series(posterior.mean("level"), index=posterior.bound.labels["county"])
table["soil_says"] = base + slope * table["soil"]

figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
x = table["houses"] * np.exp(np.random.default_rng(1).uniform(-0.12, 0.12, len(table)))
ax.vlines(x, table["own"], table["level"], color="0.8", linewidth=1, zorder=0)
ax.scatter(x, table["own"], s=14, color="0.6", label="average of the county's houses")
ax.scatter(x, table["level"], s=14, color="tab:blue", label="level, by the model")
ax.set(xscale="log", xlabel="houses in the county (jittered)", ylabel="log radon in a basement")
ax.set_xticks([1, 3, 10, 30, 100], [1, 3, 10, 30, 100])
ax.legend(frameon=False)
figure.savefig("radon_shrinkage.png", dpi=110)

# %% [markdown]
# ## A county that was measured, and one that was not
#
# `predict` takes a table like that of the fit, without the radon. It knows counties by their
# names; one that it has not seen gets a level of its own, drawn from what the counties have in
# common.

# %%
known = sizes.idxmax()
soil = table.loc[known, "soil"]
new_houses = pd.DataFrame({"county": [known, "elsewhere"], "floor": 0, "uranium": soil})
prediction = posterior.predict(new_houses, seed=1)
levels = prediction.bound.labels["county"]
sd = dict(zip(levels, prediction.sd("level").tolist(), strict=True))
low, high = prediction.interval("log_radon").exp()
for county, a, b in zip(new_houses["county"], low, high, strict=True):
    print(f"{county}: level known to ±{sd[county]:.2f}; 90 % of houses {a:.1f} to {b:.1f} pCi/L")

# %% [markdown]
# ## Does the uranium help?
#
# Leave-one-out (`loo`) estimates how well each house is predicted from all others, without
# refitting. The difference of two models is judged house by house, by its own standard error.

# %%
plain = infer(radon(uranium=False), houses, method="qem", seed=0)
scores = [p.loo(n=1000, seed=2) for p in (posterior, plain)]
gain = scores[0].pointwise - scores[1].pointwise
for name, fitted, score in zip(("with", "without"), (posterior, plain), scores, strict=True):
    print(f"{name} uranium: spread of the counties {fitted.mean('spread'):.2f}, {score}")
print(f"gain {gain.sum():.1f} ± {len(gain) ** 0.5 * gain.std():.1f} nats")

# %% [markdown]
# ## What could go wrong
#
# Scores of houses in the same county are not independent, and every house left out leaves its
# neighbours in: `loo` says nothing of counties without data. To judge those, fit without some
# counties and pass their houses to `posterior.log_likelihood`. A house with Pareto k over 0.7 is
# one without which the posterior would look different; `loo().pareto_k` names it.

# %%
few = table["houses"] <= table["houses"].median()
moved, room = (table["own"] - table["level"]).abs(), (table["own"] - table["soil_says"]).abs()
assert moved[few].sum() / room[few].sum() > moved[~few].sum() / room[~few].sum()
assert sd["elsewhere"] > sd[known]
assert plain.mean("spread") > posterior.mean("spread")
assert abs(posterior.mean("effect") + 0.65) < 0.3
