"""Acceptance test 7: parts and whole agree in value and gradient; the order of plates and factors does not matter."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ppl import Normal, latent, model, observe, plate
from ppl.backend import Settings
from ppl.inference.contract import Chain, Layout, LogFactor, PlateSpec, make_plan
from ppl.inference.particles.conditional import update_all
from ppl.inference.particles.estep import draw_all, draw_in_parts, evaluated, weigh
from ppl.inference.particles.proposals import Particles
from ppl.inference.particles.shards import PartDraws
from ppl.inference.qem import QEM, init, prepare, step
from ppl.streams import Streams
from tests.inference.qem.acceptance.structures import STRUCTURES, grid
from tests.inference.qem.acceptance.weighing import PLAIN

TIGHT = {"rtol": 1e-10, "atol": 1e-11}
# Larger plates than those that can be enumerated, so that a plan can process one of them in parts.
LONG = {
    "nested plates": {"y": grid(11, 4)},
    "sibling plates": {"y": grid(9), "w": grid(17)},
    "latent after a plate": {"y": grid(9), "w": grid(17), "v": 0.4},
    "series in a plate": {"y": grid(9, 3)},
    "discrete latents": {"y": grid(19)},
}


def problem_of(name, memory):
    structure, data = STRUCTURES[name], LONG[name]
    options = QEM(**PLAIN, particles=6, groups=structure.groups)
    return prepare(structure.program.bind(data), options, Settings(Streams(5), memory=memory))


def in_parts(name):
    """The same under a budget that makes the plan split a plate: the largest of a falling sequence."""
    memory = 1 << 20
    while (problem := problem_of(name, memory)).weighting.plan.split is None:
        memory = int(0.9 * memory)
    return problem


def value_and_gradient(problem):
    """Log evidence, its slope by every particle and proposal density, and all weights."""
    q = init(problem).q
    drawn = draw_all(problem.weighting, q, problem.settings.streams)
    live = {
        a: p._replace(
            values={n: v.clone().requires_grad_() for n, v in p.values.items()},
            log_q=p.log_q.clone().requires_grad_(),
        )
        for a, p in drawn.items()
    }
    here = evaluated(problem, problem.weighting, live, q)
    log_z = problem.weighting.plan.log_evidence(here.factors())
    leaves = {f"{a} {n}": v for a, p in live.items() for n, v in p.values.items()}
    leaves |= {f"{a} log q": p.log_q for a, p in live.items()}
    slopes = torch.autograd.grad(log_z, list(leaves.values()))
    still = evaluated(problem, problem.weighting, drawn, q)
    return log_z.detach(), dict(zip(leaves, slopes, strict=True)), weigh(still)


@pytest.mark.parametrize("name", LONG)
def test_07_parts_agree_with_the_whole_in_value_gradient_and_weights(name):
    whole, parts = problem_of(name, None), in_parts(name)
    assert whole.weighting.plan.split is None and len(parts.weighting.plan.parts) > 1
    (z, slopes, weights), (z2, slopes2, weights2) = map(value_and_gradient, (whole, parts))
    torch.testing.assert_close(z2, z, **TIGHT)
    torch.testing.assert_close(weights2.log_z, z, **TIGHT)
    for key in slopes:
        assert slopes[key].abs().max() > 0
        torch.testing.assert_close(
            slopes2[key], slopes[key], msg=lambda m, k=key: f"{k}: {m}", **TIGHT
        )
    for axis in weights.marginals:
        torch.testing.assert_close(weights2.marginals[axis], weights.marginals[axis], **TIGHT)


@pytest.mark.parametrize("name", LONG)
def test_07_an_iteration_in_parts_is_that_of_the_whole_at_the_same_particles(name):
    """Particles are drawn part by part; put together they give the same evidence and the same new proposals."""
    whole, parts, again = problem_of(name, None), in_parts(name), in_parts(name)
    state = init(parts)
    after, info = step(parts, state)
    drawn = put_together(
        again.weighting, draw_in_parts(again.weighting, state.q, again.settings.streams)
    )
    here = evaluated(whole, whole.weighting, drawn, state.q)
    weights, share = weigh(here), whole.options.step_at(0)
    wanted = update_all(
        whole.weighting, state.q.proposals, drawn, here.arrays, weights, share, False
    )
    assert info.metrics["log_evidence"] == pytest.approx(float(weights.log_z), rel=1e-10)
    for axis, proposal in wanted.items():
        for a, b in zip(after.q.proposals[axis].joint, proposal.joint, strict=True):
            torch.testing.assert_close(a, b, **TIGHT)


def put_together(weighting, draws):
    """Particles of all parts in the places of their elements."""
    if not isinstance(draws, PartDraws):
        return draws
    parts, plate = [draws.of_part(rows) for rows in draws.parts], draws.plate
    made = {}
    for block in weighting.blocks:
        if block.enumerated:
            continue
        if plate not in block.plates:
            made[block.axis] = draws[block.axis]
            continue
        at, own = block.plates.index(plate), [p[block.axis] for p in parts]
        made[block.axis] = Particles(
            {n: torch.cat([p.values[n] for p in own], at) for n in block.names},
            torch.cat([p.log_q for p in own], at),
            torch.cat([p.free for p in own], at),
        )
    return made


# ---- order --------------------------------------------------------------------------------------


def written(order):
    """The same model with its sites in another order, and the grid of plates opened the other way."""

    @model
    def forwards():
        mean, spread = latent("mean", Normal(0.0, 1.0)), latent("spread", Normal(0.0, 0.3))
        with plate("group"):
            level = latent("level", Normal(mean, spread.exp()))
            with plate("row"):
                x = latent("x", Normal(level, 1.1))
                observe("y", Normal(x, 0.6))
        with plate("other"):
            b = latent("b", Normal(mean, 0.5))
            observe("w", Normal(b + spread, 0.9))

    @model
    def backwards():
        spread, mean = latent("spread", Normal(0.0, 0.3)), latent("mean", Normal(0.0, 1.0))
        row, group, other = plate("row"), plate("group"), plate("other")
        with other:
            b = latent("b", Normal(mean, 0.5))
            observe("w", Normal(b + spread, 0.9))
        with group:
            level = latent("level", Normal(mean, spread.exp()))
        with row, group:
            x = latent("x", Normal(level, 1.1))
            observe("y", Normal(x, 0.6))

    return forwards if order == "forwards" else backwards


def test_07_the_order_of_sites_and_plates_does_not_matter():
    y, w = grid(3, 4), grid(5)
    problems = {}
    for order, data in (("forwards", {"y": y, "w": w}), ("backwards", {"y": y.T, "w": w})):
        options = QEM(**PLAIN, particles={"x": 3, "level": 4, "b": 2, "mean": 5, "spread": 6},
                      groups=[(n,) for n in ("mean", "spread", "level", "x", "b")])  # fmt: skip
        problems[order] = prepare(written(order).bind(data), options, Settings(Streams(1)))
    plates = {o: {b.axis: b.plates for b in p.blocks} for o, p in problems.items()}
    assert plates["forwards"]["k:x"] == plates["backwards"]["k:x"][::-1]
    one, two = problems.values()
    q = init(one).q
    drawn = draw_all(one.weighting, q, one.settings.streams)
    turned = drawn["k:x"]
    swapped = turned._replace(
        values={"x": turned.values["x"].transpose(0, 1)}, log_q=turned.log_q.transpose(0, 1)
    )
    first = weigh(evaluated(one, one.weighting, drawn, q))
    second = weigh(evaluated(two, two.weighting, {**drawn, "k:x": swapped}, init(two).q))
    torch.testing.assert_close(second.log_z, first.log_z, **TIGHT)
    for axis, weights in first.marginals.items():
        other = second.marginals[axis]
        other = other.transpose(0, 1) if axis == "k:x" else other
        torch.testing.assert_close(other, weights, **TIGHT)


SCOPES = [("a",), ("a", "b"), ("p", "a", "c"), ("p", "c", "b"), ("p", "r", "c", "d"), ("p", "r", "d"),
          ("s", "b", "e"), ("t", "p", "c", "x", "x'"), ("p", "c", "x"), ("t", "p", "x"), ("s",)]  # fmt: skip
PLATES_OF = [
    (),
    (),
    ("p",),
    ("p",),
    ("p", "r"),
    ("p", "r"),
    ("s",),
    ("t", "p"),
    ("p",),
    ("t", "p"),
    ("s",),
]


def layout_in(order) -> Layout:
    sizes = {"p": 3, "r": 2, "s": 4, "t": 5}
    particles = {"a": 2, "b": 3, "c": 2, "d": 4, "e": 2, "x": 3}
    owners = {"a": (), "b": (), "c": ("p",), "d": ("p", "r"), "e": ("s",), "x": ("p", "t")}
    shuffled = order.permutation(list(particles))
    return Layout(
        plates={p: PlateSpec(p, sizes[p]) for p in order.permutation(list(sizes))},
        sizes={k: particles[k] for k in shuffled},
        owners={k: owners[k] for k in order.permutation(list(particles))},
        chains=(Chain("t", "x", "x'"),),
    )


def test_07_every_order_of_factors_axes_and_plates_gives_one_value():
    generator = torch.Generator().manual_seed(0)
    lengths = {
        "p": 3,
        "r": 2,
        "s": 4,
        "t": 5,
        "a": 2,
        "b": 3,
        "c": 2,
        "d": 4,
        "e": 2,
        "x": 3,
        "x'": 3,
    }
    logs = [
        torch.randn([lengths[a] - (a == "t" and "x'" in s) for a in s],
                    generator=generator, dtype=torch.float64)
        for s in SCOPES
    ]  # fmt: skip
    values, order = [], np.random.default_rng(0)
    for _ in range(20):
        layout, where = layout_in(order), order.permutation(len(SCOPES))
        turns = [tuple(order.permutation(len(SCOPES[i]))) for i in where]
        scopes = [tuple(SCOPES[i][d] for d in turn) for i, turn in zip(where, turns, strict=True)]
        plan = make_plan(scopes, layout, plates_of=[PLATES_OF[i] for i in where])
        factors = [
            LogFactor(scope, logs[i].permute(turn))
            for scope, i, turn in zip(scopes, where, turns, strict=True)
        ]
        values.append(float(plan.log_evidence(factors)))
    assert max(abs(a - b) for a, b in itertools.pairwise(values)) < 1e-10
