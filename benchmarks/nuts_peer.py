"""NumPyro's variational inference on one model of ``nuts_reference.py``: the peer of its table.

    $PPL_PEERS benchmarks/nuts_peer.py CASE.npz MODEL PEER SEED MOMENTS.npz

CASE has the arrays of the data. A peer is a guide and a form of the model: "mean-field" (AutoNormal) and "full rank"
(AutoMultivariateNormal) of the model as it is written, group effects centred, and "mean-field, standardised", where
group effects, and the steps of the chain of covid, are Normal(0, 1) and scaled afterwards. Double precision as
for the references, NumPyro's start and one draw of the ELBO a step.

Adam takes windows of 1000 steps, compiled as one loop, at steps of 0.03, 0.01, 0.003 and 0.001. The step falls, and in the
end the ELBO counts as converged, when its mean over a window is no more than two standard errors above that of the window
before. Seconds are those from arrays to that end, on one thread, with the start and the compilation, which are given
apart; imports, and the draws by which moments are found, are not in them.

Prints a JSON line; MOMENTS gets mean and standard deviation of every latent after every window, ``[window, ...]``, from 2000
draws, and from 20 000 after the last. Runs in an environment that has numpyro (README.md here) and nothing of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ["NPROC"] = "1"  # threads of XLA

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.nn import log_sigmoid, logsumexp
from numpyro import deterministic, factor, handlers, sample
from numpyro.distributions import (
    Bernoulli,
    ImproperUniform,
    NegativeBinomialLogits,
    Normal,
    constraints,
)
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from numpyro.optim import Adam

STEP_SIZES = (0.03, 0.01, 0.003, 0.001)
WINDOW = 1000
MOST_WINDOWS = 100
GUIDES = {
    "mean-field": (AutoNormal, True),
    "mean-field, standardised": (AutoNormal, False),
    "full rank": (AutoMultivariateNormal, True),
}


def standard(name, *shape):
    """Independent Normal(0, 1)."""
    return sample(name, Normal(0.0, 1.0).expand(shape))


def effect(name, mean, scale, shape, centred):
    """A group effect, sampled as it is or in standardised form."""
    if centred:
        return sample(name, Normal(mean, scale).expand(shape))
    return deterministic(name, mean + scale * standard(f"{name}_standard", *shape))


def radon(data, centred):
    mean, scale = standard("global_mean"), jnp.exp(standard("global_log_sigma"))
    state = effect("State_mean", mean, scale, (4,), centred)
    noise = jnp.exp(standard("State_log_sigma", 4))
    uranium, basement = standard("Beta_u", 4), standard("Beta_basement", 4)
    centre = state[:, None] + data["basement"] * basement[:, None]
    centre += data["log_uranium"] * uranium[:, None]
    sample("obs", Normal(centre, noise[:, None]), obs=data["obs"])


def chimpanzees(data, centred):
    of_block, of_actor = jnp.exp(standard("sigma_block")), jnp.exp(standard("sigma_actor"))
    both, prosocial, alpha = (sample(n, Normal(0.0, 10.0)) for n in ("beta_PC", "beta_P", "alpha"))
    actor = effect("alpha_actor", 0.0, of_actor, (7,), centred)
    block = effect("alpha_block", 0.0, of_block, (7, 6), centred)
    treatment = (prosocial + both * data["condition"]) * data["prosoc_left"]
    logits = alpha + actor[:, None, None] + block[..., None] + treatment
    sample("obs", Bernoulli(logits=logits), obs=data["obs"])


def bus_breakdown(data, centred):
    psi, phi = standard("psi", 8), standard("phi", 59)
    scale, mean = jnp.exp(standard("sigma_beta")), standard("mu_beta")
    beta = effect("beta", mean, scale, (2,), centred)
    of_year = jnp.exp(standard("sigma_alpha", 2))
    alpha = effect("alpha", beta[:, None], of_year[:, None], (2, 3), centred)
    logits = alpha[..., None] + data["company"] @ phi + data["run_type"] @ psi
    sample("obs", Bernoulli(logits=logits), obs=data["obs"])


def movielens(data, centred):
    users, features = data["x"].shape[0], data["x"].shape[2]
    mean, scale = standard("mu_z", features), jnp.exp(standard("psi_z", features))
    taste = effect("z", mean, scale, (users, features), centred)
    logits = jnp.einsum("uk,ufk->uf", taste, data["x"])
    sample("obs", Bernoulli(logits=logits), obs=data["obs"])


def occupancy(data, centred):
    """Presence, 0 or 1, is summed out."""

    def of_birds(name):
        mean, scale = standard(f"{name}_mean"), jnp.exp(standard(f"{name}_log_var"))
        return effect(name, mean, scale, (12,), centred)

    bird, alpha, beta = (of_birds(n) for n in ("bird_mean", "alpha", "beta"))
    year = effect("bird_year_mean", bird[:, None], 1.0, (12, 6), centred)
    deterministic("abs_beta", jnp.abs(beta))
    there = year[..., None] * data["weather"] * beta[:, None, None]
    hits, visits = data["obs"].sum(-1), data["obs"].shape[-1]

    def seen(logits):
        return hits * log_sigmoid(logits) + (visits - hits) * log_sigmoid(-logits)

    present = log_sigmoid(there) + seen(alpha[:, None, None] * data["quality"])
    absent = log_sigmoid(-there) + seen(-10.0)
    factor("obs", logsumexp(jnp.stack([present, absent]), 0).sum())


def covid(data, centred):
    regions, times, kinds = data["npis"].shape
    by_npi, masks = standard("CM_alpha", kinds), sample("Wearing_alpha", Normal(0.0, 0.4))
    mobility, rate = (
        sample("Mobility_alpha", Normal(1.704, 0.44)),
        sample("RegionR", Normal(1.07, 0.6)),
    )
    size = sample("InitialSize_log_mean", Normal(np.log(1000), 0.5))
    noisy = sample("log_infected_noise_mean", Normal(np.log(0.01), 0.25))
    start = effect("InitialSize_log", size, 0.5, (regions,), centred)
    noise = jnp.exp(effect("log_infected_noise", noisy, 0.25, (regions,), centred))[:, None]
    psi = standard("psi", regions)[:, None]
    growth = rate + data["npis"] @ by_npi + masks * data["wearing"] + mobility * data["mobility"]
    if centred:  # the law of a whole path is the product of the laws of its steps
        path = sample("log_infected", ImproperUniform(constraints.real, (regions,), (times,)))
        before = jnp.concatenate([start[:, None], path[:, :-1]], 1)
        factor("steps", Normal(before + growth, noise).log_prob(path).sum())
    else:
        steps = growth + noise * standard("steps_standard", regions, times)
        path = deterministic("log_infected", start[:, None] + steps.cumsum(1))
    sample("obs", NegativeBinomialLogits(jnp.exp(psi), path - psi), obs=data["obs"])


MODELS = {
    "radon": radon,
    "chimpanzees": chimpanzees,
    "bus_breakdown": bus_breakdown,
    "movielens_simulated": movielens,
    "movielens": movielens,
    "occupancy": occupancy,
    "covid_weekly": covid,
}


def fit(svi, seed):
    """Windows until convergence: parameters and clocks after each, and a record of the run."""
    wall, cpu = time.perf_counter(), time.process_time()
    state = svi.init(jax.random.PRNGKey(seed))

    def window(state, step_size):
        svi.optim = Adam(lambda _: step_size)
        return jax.lax.scan(lambda s, _: svi.stable_update(s), state, length=WINDOW)

    compiled = jax.jit(window).lower(state, STEP_SIZES[0]).compile()
    ready = time.perf_counter() - wall, time.process_time() - cpu
    found, levels, stage = [], [], 0
    while stage < len(STEP_SIZES) and len(found) < MOST_WINDOWS:
        state, losses = compiled(state, STEP_SIZES[stage])
        losses = np.asarray(losses)
        levels.append((losses.mean(), losses.var() / WINDOW))
        clocks = time.perf_counter() - wall, time.process_time() - cpu
        found.append((svi.get_params(state), *clocks, -levels[-1][0]))
        if len(levels) > 1 and not has_risen(*levels[-2:]):
            stage, levels = stage + 1, []
    record = {
        "compile_s": ready[0],
        "compile_cpu_s": ready[1],
        "seconds": found[-1][1],
        "cpu_s": found[-1][2],
        "steps": WINDOW * len(found),
        "converged": stage == len(STEP_SIZES),
        "elbo": found[-1][3],
    }
    return found, record


def has_risen(before, after):
    """Whether the mean loss of a window is below that of the one before by more than its noise, or is NaN."""
    return not after[0] >= before[0] - 2 * (before[1] + after[1]) ** 0.5


def moments_of(model, guide, data):
    """A function of parameters and a number of draws: mean and standard deviation of all latents."""

    def one(params, key):
        drawn = guide.sample_posterior(key, params)
        with handlers.seed(rng_seed=0), handlers.substitute(data=drawn), handlers.trace() as trace:
            model()
        named = {n: s for n, s in trace.items() if s["type"] in ("sample", "deterministic")}
        return {n: s["value"] for n, s in named.items() if not s.get("is_observed")}

    @jax.jit
    def sums(params, keys, centre):
        drawn = jax.vmap(lambda key: one(params, key))(keys)
        return {
            n: ((x - centre[n]).sum(0), ((x - centre[n]) ** 2).sum(0)) for n, x in drawn.items()
        }

    def moments(params, draws, part=500):
        centre = one(params, jax.random.PRNGKey(1))
        total = None
        for keys in jax.random.split(jax.random.PRNGKey(2), draws).reshape(-1, part, 2):
            new = sums(params, keys, centre)
            total = new if total is None else jax.tree.map(jnp.add, total, new)
        found = {}
        for name, (first, second) in total.items():
            found[f"{name}__mean"] = centre[name] + first / draws
            found[f"{name}__sd"] = jnp.sqrt(second / draws - (first / draws) ** 2)
        return {n: np.asarray(x) for n, x in found.items()}

    return moments


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", type=Path)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("peer", choices=GUIDES)
    parser.add_argument("seed", type=int)
    parser.add_argument("moments", type=Path)
    options = parser.parse_args()
    numpyro.enable_x64()
    with np.load(options.case) as archive:
        data = {name: jnp.asarray(archive[name], dtype=float) for name in archive.files}
    make, centred = GUIDES[options.peer]

    def model():
        MODELS[options.model](data, centred)

    guide = make(model)
    found, record = fit(SVI(model, guide, Adam(STEP_SIZES[0]), Trace_ELBO()), options.seed)
    moments = moments_of(model, guide, data)
    looks = [moments(params, 2000) for params, *_ in found[:-1]] + [moments(found[-1][0], 20_000)]
    np.savez(options.moments, **{n: np.stack([x[n] for x in looks]) for n in looks[0]})
    versions = {"numpyro": numpyro.__version__, "jax": jax.__version__, "dtype": "float64"}
    clocks = {"clocks": [list(clocks) for _, *clocks in found]}
    print(json.dumps({**record, **clocks, **versions}))


if __name__ == "__main__":
    main()
