"""The structures of the first three acceptance tests: each a program, and its joint density once more in NumPy."""

from __future__ import annotations

import numpy as np

from ppl import Bernoulli, Markov, Normal, latent, model, observe, plate
from tests.inference.qem.acceptance.enumeration import Structure, log_normal, total

Y = np.array([0.7, -0.4, 1.9, 0.2, -1.3, 0.8, 1.1, -0.6])


@model
def chain():
    a = latent("a", Normal(0.5, 1.2))
    b = latent("b", Normal(a, 0.7))
    c = latent("c", Normal(2.0 * b - 1.0, (0.5 * b).exp()))
    observe("y", Normal(c, 0.6))


def log_chain(z, data):
    a, b, c = z["a"], z["b"], z["c"]
    out = log_normal(a, 0.5, 1.2) + log_normal(b, a, 0.7)
    return out + log_normal(c, 2 * b - 1, np.exp(0.5 * b)) + log_normal(data["y"], c, 0.6)


@model
def fork():
    a = latent("a", Normal(0.0, 1.5))
    b = latent("b", Normal(a, 1.0))
    c = latent("c", Normal(-a, (0.3 * a).exp()))
    observe("y", Normal(b, 0.5))
    observe("w", Normal(c, 0.8))


def log_fork(z, data):
    a, b, c = z["a"], z["b"], z["c"]
    out = log_normal(a, 0, 1.5) + log_normal(b, a, 1) + log_normal(c, -a, np.exp(0.3 * a))
    return out + log_normal(data["y"], b, 0.5) + log_normal(data["w"], c, 0.8)


@model
def collider():
    a, b = latent("a", Normal(0.0, 1.0)), latent("b", Normal(1.0, 2.0))
    c = latent("c", Normal(a * b, (0.4 * a).exp()))
    observe("y", Normal(c + b, 0.7))


def log_collider(z, data):
    a, b, c = z["a"], z["b"], z["c"]
    out = log_normal(a, 0, 1) + log_normal(b, 1, 2) + log_normal(c, a * b, np.exp(0.4 * a))
    return out + log_normal(data["y"], c + b, 0.7)


@model
def block_with_parents():
    a, e = latent("a", Normal(0.0, 1.0)), latent("e", Normal(0.0, 0.5))
    b = latent("b", Normal(a, e.exp()))
    c = latent("c", Normal(a - b, 1.3))
    observe("y", Normal(b * c, 0.9))


def log_block_with_parents(z, data):
    a, e, b, c = z["a"], z["e"], z["b"], z["c"]
    out = log_normal(a, 0, 1) + log_normal(e, 0, 0.5) + log_normal(b, a, np.exp(e))
    return out + log_normal(c, a - b, 1.3) + log_normal(data["y"], b * c, 0.9)


@model
def nested_plates():
    mean = latent("mean", Normal(0.0, 1.0))
    with plate("group"):
        level = latent("level", Normal(mean, 0.8))
        with plate("row"):
            x = latent("x", Normal(level + mean, 1.1))
            observe("y", Normal(x, 0.6))


def log_nested_plates(z, data):
    mean, level, x = z["mean"][:, None], z["level"], z["x"]
    out = total(log_normal(mean, 0, 1)) + total(log_normal(level, mean, 0.8))
    out = out + total(log_normal(x, (level + mean)[:, :, None], 1.1))
    return out + total(log_normal(data["y"], x, 0.6))


@model
def sibling_plates():
    mean, spread = latent("mean", Normal(0.0, 1.0)), latent("spread", Normal(0.0, 0.4))
    with plate("left"):
        a = latent("a", Normal(mean, spread.exp()))
        observe("y", Normal(a, 0.6))
    with plate("right"):
        b = latent("b", Normal(mean - 1.0, 0.5))
        observe("w", Normal(b + spread, 0.9))


def log_sibling_plates(z, data):
    mean, spread = z["mean"][:, None], z["spread"][:, None]
    out = total(log_normal(mean, 0, 1)) + total(log_normal(spread, 0, 0.4))
    out = out + total(log_normal(z["a"], mean, np.exp(spread)))
    out = out + total(log_normal(data["y"], z["a"], 0.6))
    out = out + total(log_normal(z["b"], mean - 1, 0.5))
    return out + total(log_normal(data["w"], z["b"] + spread, 0.9))


@model
def latent_after_a_plate():
    mean = latent("mean", Normal(0.0, 1.0))
    with plate("left"):
        a = latent("a", Normal(mean, 1.0))
        observe("y", Normal(a, 0.6))
    later = latent("later", Normal(mean, 2.0))
    with plate("right"):
        b = latent("b", Normal(later, 0.5))
        observe("w", Normal(b, 0.9))
    observe("v", Normal(later, 1.0))


def log_latent_after_a_plate(z, data):
    mean, later = z["mean"][:, None], z["later"][:, None]
    out = total(log_normal(mean, 0, 1)) + total(log_normal(later, mean, 2))
    out = out + total(log_normal(z["a"], mean, 1)) + total(log_normal(data["y"], z["a"], 0.6))
    out = out + total(log_normal(z["b"], later, 0.5)) + total(log_normal(data["w"], z["b"], 0.9))
    return out + log_normal(data["v"], z["later"], 1)


@model
def plate_without_latents():
    mean, spread = latent("mean", Normal(0.0, 1.0)), latent("spread", Normal(0.0, 0.4))
    with plate("row"):
        observe("y", Normal(mean, spread.exp()))


def log_plate_without_latents(z, data):
    mean, spread = z["mean"][:, None], z["spread"][:, None]
    out = total(log_normal(mean, 0, 1)) + total(log_normal(spread, 0, 0.4))
    return out + total(log_normal(data["y"], mean, np.exp(spread)))


@model
def latents_without_children():
    mean = latent("mean", Normal(0.0, 1.0))
    latent("alone", Normal(3.0, 2.0))
    latent("leaf", Normal(mean, 0.5))
    with plate("row"):
        latent("inner", Normal(mean, 1.5))
        observe("y", Normal(mean, 0.7))


def log_latents_without_children(z, data):
    mean = z["mean"][:, None]
    out = total(log_normal(mean, 0, 1)) + log_normal(z["alone"], 3, 2)
    out = out + log_normal(z["leaf"], z["mean"], 0.5) + total(log_normal(z["inner"], mean, 1.5))
    return out + total(log_normal(data["y"], mean, 0.7))


@model
def series():
    """A first state that is a latent of its own, and a noise that every step uses."""
    first, noise = latent("first", Normal(0.3, 1.0)), latent("noise", Normal(-0.5, 0.5))
    with plate("time", ordered=True):
        step = lambda before: Normal(0.8 * before, noise.exp())  # noqa: E731
        x = latent("x", Markov(Normal(0.8 * first, noise.exp()), step))
        observe("y", Normal(x, 0.5))


def log_series(z, data):
    first, noise, x = z["first"], z["noise"], z["x"]
    out = log_normal(first, 0.3, 1) + log_normal(noise, -0.5, 0.5)
    before = np.concatenate([first[:, None], x[:, :-1]], 1)
    out = out + total(log_normal(x, 0.8 * before, np.exp(noise)[:, None]))
    return out + total(log_normal(data["y"], x, 0.5))


@model
def series_in_a_plate():
    """One series a region; its first state and noise share an index, as in the covid model."""
    drift = latent("drift", Normal(0.0, 1.0))
    with plate("region"):
        first, noise = latent("first", Normal(drift, 1.0)), latent("noise", Normal(0.0, 0.5))
        with plate("time", ordered=True):
            step = lambda before: Normal(before + drift, noise.exp())  # noqa: E731
            x = latent("x", Markov(Normal(first + drift, noise.exp()), step))
            observe("y", Normal(x, 0.5))


def log_series_in_a_plate(z, data):
    drift, first, noise, x = z["drift"], z["first"], z["noise"], z["x"]
    out = log_normal(drift, 0, 1) + total(log_normal(first, drift[:, None], 1))
    out = out + total(log_normal(noise, 0, 0.5))
    before = np.concatenate([first[:, :, None], x[:, :, :-1]], 2)
    out = out + total(log_normal(x, before + drift[:, None, None], np.exp(noise)[:, :, None]))
    return out + total(log_normal(data["y"], x, 0.5))


@model
def switched():
    """Discrete latents, whose values are summed in the place of particles."""
    share = latent("share", Normal(0.0, 1.0))
    with plate("row"):
        on = latent("on", Bernoulli(logits=share))
        x = latent("x", Normal(2.0 * on, 1.0))
        observe("y", Normal(x, 0.5))


def log_switched(z, data):
    share, on, x = z["share"][:, None], z["on"], z["x"]
    out = total(log_normal(share, 0, 1)) + total(on * share - np.logaddexp(0, share))
    return out + total(log_normal(x, 2 * on, 1)) + total(log_normal(data["y"], x, 0.5))


def grid(*shape: int) -> np.ndarray:
    """Some data of this shape."""
    return np.resize(Y, shape)


STRUCTURES = {
    "chain": Structure(
        chain, {"y": 0.7}, (("a",), ("b",), ("c",)), {"a": (), "b": (), "c": ()}, log_chain
    ),
    "fork": Structure(
        fork, {"y": 0.7, "w": -0.4}, (("a",), ("b",), ("c",)), {n: () for n in "abc"}, log_fork
    ),
    "collider": Structure(
        collider, {"y": 1.9}, (("a",), ("b",), ("c",)), {n: () for n in "abc"}, log_collider
    ),
    "block with parents": Structure(
        block_with_parents,
        {"y": 0.7},
        (("a",), ("e",), ("b", "c")),
        {n: () for n in "aebc"},
        log_block_with_parents,
    ),
    "nested plates": Structure(
        nested_plates,
        {"y": grid(2, 2)},
        (("mean",), ("level",), ("x",)),
        {"mean": (), "level": (2,), "x": (2, 2)},
        log_nested_plates,
    ),
    "sibling plates": Structure(
        sibling_plates,
        {"y": grid(2), "w": grid(3)},
        (("mean", "spread"), ("a",), ("b",)),
        {"mean": (), "spread": (), "a": (2,), "b": (3,)},
        log_sibling_plates,
    ),
    "latent after a plate": Structure(
        latent_after_a_plate,
        {"y": grid(2), "w": grid(2), "v": 0.4},
        (("mean",), ("a",), ("later",), ("b",)),
        {"mean": (), "a": (2,), "later": (), "b": (2,)},
        log_latent_after_a_plate,
    ),
    "plate without latents": Structure(
        plate_without_latents,
        {"y": grid(4)},
        (("mean",), ("spread",)),
        {"mean": (), "spread": ()},
        log_plate_without_latents,
    ),
    "latents without children": Structure(
        latents_without_children,
        {"y": grid(2)},
        (("mean",), ("alone",), ("leaf",), ("inner",)),
        {"mean": (), "alone": (), "leaf": (), "inner": (2,)},
        log_latents_without_children,
    ),
    "series, init alone": Structure(
        series,
        {"y": grid(4)},
        (("first",), ("noise",)),
        {"first": (), "noise": (), "x": (4,)},
        log_series,
    ),
    "series, init in a shared block": Structure(
        series,
        {"y": grid(4)},
        (("first", "noise"),),
        {"first": (), "noise": (), "x": (4,)},
        log_series,
    ),
    "series, T = 1": Structure(
        series,
        {"y": grid(1)},
        (("first", "noise"),),
        {"first": (), "noise": (), "x": (1,)},
        log_series,
    ),
    "series in a plate": Structure(
        series_in_a_plate,
        {"y": grid(2, 3)},
        (("drift",), ("first", "noise")),
        {"drift": (), "first": (2,), "noise": (2,), "x": (2, 3)},
        log_series_in_a_plate,
    ),
    "discrete latents": Structure(
        switched,
        {"y": grid(2)},
        (("share",), ("x",)),
        {"share": (), "on": (2,), "x": (2,)},
        log_switched,
        ("on",),
    ),
}
