# %% [markdown]
# # Time series: levels, gaps, regimes, panels
#
# From 1871 to 1970 the flow of the Nile at Aswan was measured every year. How much water came in
# the years that we shall leave out, how much will come in the next ten, and did something change
# around 1898, when work on the first dam began? (Durbin and Koopman 2012, chapter 2.)

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import torch

from ppl import (
    Bernoulli,
    HalfNormal,
    Markov,
    Normal,
    given,
    infer,
    latent,
    model,
    observe,
    plate,
)

QUICK = os.environ.get("SMOKE_TEST") == "1"
OPTIONS = {"method": "qem", "seed": 0} | ({"particles": 20, "final_particles": 40} if QUICK else {})

FLOW = np.fromstring(  # 10^8 cubic metres a year
    """1120 1160 963 1210 1160 1160 813 1230 1370 1140 995 935 1110 994 1020 960 1180 799 958 1140
    1100 1210 1150 1250 1260 1220 1030 1100 774 840 874 694 940 833 701 916 692 1020 1050 969
    831 726 456 824 702 1120 1100 832 764 821 768 845 864 862 698 845 744 796 1040 759
    781 865 845 944 984 897 822 1010 771 676 649 846 812 742 801 1040 860 874 848 890
    744 749 838 1050 918 986 797 923 975 815 1020 906 901 1170 912 746 919 718 714 740""",
    sep=" ",
)
YEARS = list(range(1871, 1971))

# %% [markdown]
# ## A level that wanders
#
# `plate("year", ordered=True)` is a plate whose neighbours matter, and `Markov(init, step)` the law
# of a chain along it: the law of its first element, and that of each other one given the one
# before. Everything else is as in any model.


# %%
@model
def local_level(known=False):
    wander = given("wander") if known else latent("wander", HalfNormal(100.0))
    noise = given("noise") if known else latent("noise", HalfNormal(300.0))
    with plate("year", ordered=True):
        level = latent("level", Markov(Normal(1000.0, 300.0), lambda last: Normal(last, wander)))
        observe("flow", Normal(level, noise))


# %% [markdown]
# Forty years are taken out, as if nobody had measured: NaN is a missing entry, and the chain runs
# through it. `labels` names the elements of the plate.

# %%
gap = np.zeros(100, dtype=bool)
gap[20:40] = gap[60:80] = True
seen = np.where(gap, np.nan, FLOW)
short = slice(0, 50) if QUICK else slice(None)
data, years = {"flow": seen[short]}, YEARS[short]
posterior = infer(local_level, data, labels={"year": years}, **OPTIONS)
print(posterior.summary(["wander", "noise"]))
print(posterior.diagnostics.verdict)

# %% [markdown]
# ## The future
#
# `forecast` goes on from the last state of each joint draw: its paths are paths, so that the
# uncertainty of a sum or a maximum over the ten years can be read off them.

# %%
future = posterior.forecast(year=10, n=4000)
dry = (future.draws["flow"] < 700).any(1).double().mean()
print(f"a year under 700 in the next ten: {dry:.0%}")

figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
ax.scatter(years, FLOW[short], s=12, color=np.where(gap[short], "0.8", "0.4"))
low, high = posterior.interval("level", 0.9)
ax.fill_between(years, low, high, color="tab:blue", alpha=0.25, linewidth=0)
ax.plot(years, posterior.mean("level"), color="tab:blue", label="level, 90 %")
ahead = np.array(future.labels["year"])
for name, shade in (("flow", 0.12), ("level", 0.25)):
    ax.fill_between(ahead, *future.interval(name, 0.9), color="tab:red", alpha=shade, linewidth=0)
ax.plot(ahead, future.mean("level"), color="tab:red", label="forecast: level and flow, 90 %")
ax.set(ylabel="flow of the Nile, 10^8 m^3 a year; grey: left out")
ax.legend(frameon=False)
figure.savefig("nile.png", dpi=110)

# %% [markdown]
# ## Is that right?
#
# With the two standard deviations known the model is linear and Gaussian, and `method="exact"`
# computes what a Kalman smoother does. The particles have to agree with it.

# %%
sds = {"wander": posterior.mean("wander"), "noise": posterior.mean("noise")}
kalman = infer(local_level(known=True), {**data, **sds}, method="exact")
particles = infer(local_level(known=True), {**data, **sds}, **OPTIONS)
apart = (particles.mean("level") - kalman.mean("level")).abs() / kalman.sd("level")
narrow = (particles.sd("level") / kalman.sd("level")).log().abs()
print(f"means within {apart.max():.3f} sd, sds within {narrow.max():.1%}")
print(f"log evidence {particles.log_evidence}, exact {kalman.log_evidence}")
next_years = [p.forecast(year=5, n=4000, seed=1) for p in (kalman, particles)]

# %% [markdown]
# ## Two regimes
#
# Perhaps the level did not wander, but fell once. A discrete chain is declared in the same way.
# Its states are summed exactly, by the forward-backward recursions, for every particle of the
# continuous latents beside it.


# %%
@model
def regimes():
    before, fall = latent("before", Normal(1000.0, 300.0)), latent("fall", HalfNormal(300.0))
    noise = latent("noise", HalfNormal(300.0))
    with plate("year", ordered=True):
        step = lambda last: Bernoulli(0.01 + 0.98 * last)  # noqa: E731  # it seldom changes
        low = latent("low", Markov(Bernoulli(0.01), step))
        observe("flow", Normal(before - fall * low, noise))


switched = infer(regimes, {"flow": FLOW[short]}, **OPTIONS)
print(switched.summary(["before", "fall", "noise"]))
chance = switched.mean("low")
paths = switched.samples(2000)["low"]
year_of = np.array(YEARS)[paths.long().argmax(1).numpy()]
print(f"the fall came in {np.quantile(year_of, 0.05):.0f} to {np.quantile(year_of, 0.95):.0f}")

# %% [markdown]
# The year is read off joint draws of whole paths. The chance of each year by itself does not say
# how often the regime changed.

# %%
figure, ax = plt.subplots(figsize=(8, 2.5), layout="constrained")
ax.bar(years, chance, width=1.0, color="tab:blue")
ax.set(ylabel="chance of low flow", ylim=(0, 1))
figure.savefig("nile_regimes.png", dpi=110)

# %% [markdown]
# ## A panel
#
# Many short series say together what none says alone. A chain inside a plate is one chain for each
# element; the plates nest as they are written. The series need not have the same length: what is
# missing at an end is NaN. A covariate of the future comes in as data.


# %%
@model
def sales():
    effect, wander = latent("effect", Normal(0.0, 1.0)), latent("wander", HalfNormal(0.5))
    with plate("shop"):
        first = latent("first", Normal(3.0, 1.0))
        with plate("week", ordered=True):
            level = latent("level", Markov(Normal(first, 0.01), lambda last: Normal(last, wander)))
            observe("sold", Normal(level + effect * given("offer"), 0.3))


shops, weeks = (6, 12) if QUICK else (8, 20)
offer = np.random.default_rng(0).binomial(1, 0.2, (shops, weeks)).astype(float)
truth = sales.do(effect=0.8, wander=0.15)
drawn = truth.sample(1, {"offer": offer}, seed=1)
sold = drawn["sold"][0].numpy().copy()
sold[0, weeks // 2 :] = np.nan  # closed halfway
panel = infer(sales, {"offer": offer, "sold": sold}, **OPTIONS)
print(panel.summary(["effect", "wander"]))

plan = np.zeros((shops, 4))
plan[:, 1] = 1.0  # an offer in the second week from now
coming = panel.forecast({"offer": plan}, week=4, n=2000)
rise = coming.draws["sold"][..., 1] - coming.draws["sold"][..., 0]
print(f"the offer brings {rise.mean():.2f} ± {rise.mean(1).std():.2f} a shop")

# %% [markdown]
# ## What could go wrong
#
# A chain's order is one: a step sees one state before it. Longer memory is a larger state, a vector
# such as (level, slope), whose parts `step` moves along. A chain runs along one ordered
# plate; a plate of groups that lies within another one (`within=`) has no neighbours, and is
# refused in words. And a level is no cause: before you believe a forecast, take the last years out
# and forecast those.

# %%
assert apart.max() < 0.1 and narrow.max() < 0.08
assert abs(particles.log_evidence.value - kalman.log_evidence.value) < 0.3
mean, other = (p.mean("flow") for p in next_years)
assert ((mean - other).abs() < 0.1 * next_years[0].sd("flow")).all()
assert 1895 <= np.median(year_of) <= 1901
assert abs(panel.mean("effect") - 0.8) < 4 * panel.sd("effect")
assert float(torch.as_tensor(posterior.sd("level")[30])) > float(posterior.sd("level")[10])
