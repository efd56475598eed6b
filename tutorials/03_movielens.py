# %% [markdown]
# # Ratings: what a person likes, from five films
#
# Three hundred people said of five films each whether they liked them. What will each say of the
# next five? And what of someone who comes in, and has rated two films, or none?

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import torch

from ppl import DataError, infer
from ppl.models import datasets, movielens
from ppl.models.simulation import genre_flags

QUICK = os.environ.get("SMOKE_TEST") == "1"

# %% [markdown]
# ## The model
#
# `ppl.models.movielens`. A film is a row of genre flags x, a person a vector of tastes z, one for
# each genre, and the person likes the film with probability logit^-1(z . x). Tastes are Normal
# around what people have in common, mu_z, with a spread exp(psi_z) for each genre: some genres
# divide people, others do not.
#
# ## The data
#
# Simulated in the shape of MovieLens, with 18 genres; where the file of the published experiment is
# on this machine it is used (`datasets.movielens` says where to get it), elsewhere the model draws
# its own. (Published curves are of another file, in which every rating is "not liked":
# `datasets.movielens(simulated=False)`. Nothing can be learned from it.)


# %%
def drawn(users=300, films=10, features=18):
    """Ratings drawn from the model; half of each person's films are kept to predict."""
    x = genre_flags(users, films, features, seed=1)
    obs = movielens(features=features).sample(1, {"x": x}, seed=8)["obs"][0].numpy()
    half = films // 2
    return tuple(
        {"x": x[:, part], "obs": obs[:, part]} for part in np.split(np.arange(films), [half])
    )


try:
    train, test = datasets.movielens()
except DataError as error:
    print(error)
    train, test = drawn()
if QUICK:
    train, test = drawn(users=60, features=6)
users, films, features = train["x"].shape
program = movielens(features=features)
print(f"{users} people, {films} films each, {features} genres; {train['obs'].mean():.0%} liked")

# %% [markdown]
# ## The fit
#
# There are more tastes than ratings: 18 for each person, who rated five films. What they have
# in common is learned from all of them. The fit sums over all combinations of the particles of mu_z,
# psi_z and each person's z.

# %%
posterior = infer(program, train, method="qem", seed=0)
print(f"log evidence {posterior.log_evidence}")
print("verdict:", posterior.diagnostics.verdict)
common, spread = posterior.mean("mu_z"), posterior.mean("psi_z").exp()

# %% [markdown]
# ## Which genres are liked, and by whom
#
# The upper panel shows mu_z and, as bars, how much people differ; the lower one the tastes of some
# people. A person's taste for a genre that none of the five films had is that of everybody.

# %%
figure, (upper, lower) = plt.subplots(
    2, 1, figsize=(8, 6), height_ratios=[2, 3], sharex=True, layout="constrained"
)
genre = np.arange(features)
upper.axhline(0, color="0.8", lw=1)
upper.bar(
    genre, 2 * spread, 0.6, bottom=common - spread, color="tab:blue", alpha=0.2, label="people"
)
upper.errorbar(genre, common, 2 * posterior.sd("mu_z"), fmt="o", ms=4, label="in common, ± 2 sd")
upper.set_ylabel("taste (logits)")
upper.legend(frameon=False, ncols=2, fontsize=8)
some = np.argsort(-train["obs"].sum(1), kind="stable")[:: max(1, users // 20)]
tastes = posterior.mean("z")[some]
limit = float(tastes.abs().max())
image = lower.imshow(tastes, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
lower.set(xlabel="genre", ylabel="people, from many likes to few", yticks=[], xticks=genre)
figure.colorbar(image, ax=lower, label="taste (logits)")
figure.savefig("movielens_tastes.png", dpi=110)

# %% [markdown]
# ## The next five films
#
# `log_likelihood` scores held-out ratings under joint posterior draws; the mean over draws, of each
# rating, is the probability that the model gave to what happened. To compare: a coin, and the
# share of likes of all people.


# %%
def score(chance):
    """Mean log-probability of a held-out rating."""
    liked = torch.as_tensor(test["obs"]).bool()
    return float(torch.where(liked, chance, 1 - chance).log().mean())


held_out = posterior.log_likelihood(test, n=1000, seed=1)["obs"]
own = float(held_out.logsumexp(0).sub(np.log(len(held_out))).mean())
share = torch.full(test["obs"].shape, float(train["obs"].mean()), dtype=torch.float64)
scores = {"a coin": float(np.log(0.5)), "share of likes": score(share)}

# %% [markdown]
# ## Someone new
#
# A person without a rating has tastes drawn from what people have in common: label the people of new
# data, and those whom the fit does not know are new. Predicted so, as if we knew nothing of
# anybody, the same films tell what the five ratings of each person are worth.

# %%
strangers = {"x": test["x"], "user": [f"stranger {i}" for i in range(users)]}
expected = posterior.predict(strangers, n=1000, seed=2).mean("obs")
scores |= {"as a stranger": score(expected), "with the own five ratings": own}
for name, value in scores.items():
    print(f"{name:28s}{value:.3f} nats a rating")

# %% [markdown]
# Newcomers who rate films one by one: fit nothing anew, but take what is known of mu_z and psi_z as
# it is and learn each newcomer's z. `do` puts in the values, and the fit takes a moment. Ours
# are drawn from what the fit says people are like, so that we know what they will say.

# %%
rng, newcomers = np.random.default_rng(4), 40
tastes = common.numpy() + spread.numpy() * rng.standard_normal((newcomers, features))
fixed = program.do(mu_z=common, psi_z=posterior.mean("psi_z"))
shown = genre_flags(newcomers, 40, features, seed=5)
likes = rng.random((newcomers, 40)) < 1 / (1 + np.exp(-np.einsum("uk,ufk->uf", tastes, shown)))
new_films = genre_flags(newcomers, 100, features, seed=6)
truth = np.einsum("uk,ufk->uf", tastes, new_films) > 0
counts, hits = [0, 2, 5, 10, 20, 40], []
for n in counts:
    guess = np.broadcast_to(common, tastes.shape)
    if n:
        rated = {"x": shown[:, :n], "obs": likes[:, :n].astype(float)}
        guess = infer(fixed, rated, method="qem", joint_up_to=features, seed=0).mean("z").numpy()
    hits.append(float(((np.einsum("uk,ufk->uf", guess, new_films) > 0) == truth).mean()))

figure, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
ax.plot(counts, hits, "o-", label="own tastes, as far as known")
ax.axhline(hits[0], color="0.6", lw=1, ls="--", label="what people have in common")
ax.set(xlabel="films rated", ylabel="share right of 100 other films")
ax.legend(frameon=False, loc="upper left")
figure.savefig("movielens_newcomer.png", dpi=110)
print("right after", dict(zip(counts, (round(h, 2) for h in hits), strict=True)), "films")

# %% [markdown]
# ## What could go wrong
#
# Tastes for rare genres are nearly prior: rank people by a genre only where the data speak (compare
# `posterior.sd("z")` with the spread). People do not choose films at random, and what they did
# not watch is not missing at random; the model does not know that. For very many people
# see `minibatch=`.

# %%
assert scores["with the own five ratings"] > max(scores["a coin"], scores["as a stranger"])
assert hits[-1] > hits[0]
assert posterior.sd("mu_z").mean() < 0.8  # the prior's is 1: what people have in common was learned
