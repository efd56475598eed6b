"""A few elements of a plate a step: the same posterior of the blocks outside the plate, and what is refused."""

import gc
import math
import weakref

import pytest
import torch

from ppl import (
    Bernoulli,
    DataError,
    HalfNormal,
    ModelError,
    Normal,
    UnsupportedError,
    given,
    infer,
    latent,
    mean,
    model,
    observe,
    param,
    plate,
)
from ppl.backend import Settings
from ppl.batches import batches_of
from ppl.inference import qem
from ppl.inference.qem import minibatch
from ppl.streams import Streams

DATA = {
    "y": 3.0
    + 2.0 * torch.randn(60, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
}


@model
def groups():
    level = latent("level", Normal(0.0, 10.0))
    spread = latent("spread", HalfNormal(3.0))
    with plate("group"):
        effect = latent("effect", Normal(level, spread))
        observe("y", Normal(effect, 1.0))


@model
def answers():
    ability = latent("ability", Normal(0.0, 1.5))
    spread = latent("spread", HalfNormal(1.0))
    person = plate("person")
    with person:
        own = latent("own", Normal(ability, spread))
    with plate("answer", within=person):
        observe("right", Bernoulli(logits=own - given("difficulty")))


def run(program, data, size, steps, seed=0, **options):
    """The state after some steps, without the last weighting."""
    bound = program.bind(data, dtype=torch.float64)
    settings = Settings(Streams(seed), minibatch=size)
    problem = qem.prepare(bound, qem.QEM(**options), settings)
    batches, state = batches_of(bound, size, settings.streams), qem.init(problem)
    for t in range(steps):
        state, _ = qem.step(problem, state, batches.at(t) if batches else None)
    return problem, state


def averaged(program, data, size, steps, **options):
    """Means and sds of the proposal outside the plate, averaged over the last half of the steps."""
    bound = program.bind(data, dtype=torch.float64)
    settings = Settings(Streams(0), minibatch=size)
    problem = qem.prepare(bound, qem.QEM(**options), settings)
    batches, state, seen = batches_of(bound, size, settings.streams), qem.init(problem), []
    for t in range(steps):
        state, _ = qem.step(problem, state, batches.at(t) if batches else None)
        if t >= steps // 2:
            joint = next(iter(state.q.proposals.values())).joint
            seen.append(torch.stack([joint.mean, joint.sd]))
    return torch.stack(seen).mean(0)


def oracle(y):
    """Posterior of ``level`` and ``log spread`` with the effects integrated out, on a grid."""
    level = torch.linspace(0, 6, 241, dtype=torch.float64).reshape(-1, 1, 1)
    log_spread = torch.linspace(-1, 2.2, 241, dtype=torch.float64).reshape(1, -1, 1)
    variance = (2 * log_spread).exp() + 1
    log_p = (-0.5 * (y - level).square() / variance - 0.5 * variance.log()).sum(-1)
    log_p = log_p - 0.5 * (level / 10).square()[..., 0]
    log_p = log_p + (log_spread - 0.5 * (log_spread.exp() / 3).square())[..., 0]
    p = (log_p - log_p.logsumexp((0, 1))).exp()
    grid = torch.stack([x.expand(241, 241, 1)[..., 0] for x in (level, log_spread)])
    centre = (p * grid).sum((1, 2))
    return centre, (p * (grid - centre.reshape(2, 1, 1)).square()).sum((1, 2)).sqrt()


def test_sites_stand_in_for_the_other_elements():
    centre, sd = oracle(DATA["y"])
    found = averaged(groups, DATA, {"group": 15}, 120, particles=40)
    assert ((found[0] - centre).abs() / sd).max() < 0.1
    assert (found[1] / sd).log().abs().max() < 0.12


def test_a_nested_plate_goes_with_its_elements():
    g = torch.Generator().manual_seed(3)
    person = torch.arange(40).repeat_interleave(6)
    ability = 0.5 + torch.randn(40, generator=g, dtype=torch.float64)
    difficulty = torch.randn(240, generator=g, dtype=torch.float64)
    right = torch.bernoulli(torch.sigmoid(ability[person] - difficulty), generator=g)
    data = {"person": person, "difficulty": difficulty, "right": right}
    whole = averaged(answers, data, None, 120, particles=40)
    parts = averaged(answers, data, {"person": 14}, 160, particles=40)
    assert ((parts[0] - whole[0]).abs() / whole[1]).max() < 0.15
    assert (parts[1] / whole[1]).log().abs().max() < 0.15


def test_a_plate_of_data_alone_is_not_summed_beforehand():
    @model
    def line():
        slope = latent("slope", Normal(0.0, 10.0))
        with plate("row"):
            observe("y", Normal(slope * given("x"), 1.0))

    g = torch.Generator().manual_seed(4)
    x = torch.randn(60, generator=g, dtype=torch.float64)
    y = 2 * x + torch.randn(60, generator=g, dtype=torch.float64)
    precision = x.square().sum() + 0.01
    found = averaged(line, {"x": x, "y": y}, {"row": 20}, 80, particles=30)
    assert abs(found[0, 0] - (x * y).sum() / precision) * precision.sqrt() < 0.1
    assert abs((found[1, 0] * precision.sqrt()).log()) < 0.1


def test_parts_of_the_data_are_let_go_with_the_run():
    problem, state = run(groups, {"y": torch.zeros(12)}, {"group": 4}, 4, particles=5)
    part = weakref.ref(minibatch._PARTS[problem][0][0])
    assert len(minibatch._PARTS[problem]) == 3 and part() is not None
    del problem, state
    gc.collect()
    assert part() is None


def test_one_batch_of_all_elements_is_the_plain_step():
    _, plain = run(groups, DATA, None, 5, particles=10)
    _, batch = run(groups, DATA, {"group": 60}, 5, particles=10)
    for axis, proposal in plain.q.proposals.items():
        assert torch.equal(proposal.joint.mean, batch.q.proposals[axis].joint.mean)


def test_only_the_moments_of_the_batch_advance():
    problem, state = run(groups, DATA, {"group": 15}, 1, particles=10)
    start = qem.init(problem).q.proposals["k:effect"].joint.mean
    moved = (state.q.proposals["k:effect"].joint.mean != start)[:, 0]
    batch = batches_of(problem.bound, {"group": 15}, problem.settings.streams).at(0)
    assert torch.equal(moved.nonzero().squeeze(-1), batch.rows["group"])
    assert state.visits.sum() == 1


@model
def rows():
    middle, between = latent("middle", Normal(0.0, 2.0)), latent("between", HalfNormal(1.0))
    noise = latent("noise", HalfNormal(1.0))
    group = plate("group")
    with group:
        level = latent("level", Normal(middle, between))
    with plate("row", within=group):
        observe("y", Normal(level, noise))


def test_tempered_steps_leave_the_sites_alone():
    """A site fitted where the weights are still tempered ran away, to means in the thousands."""
    g = torch.Generator().manual_seed(1)
    group = torch.arange(100).repeat_interleave(5)
    level = 1.0 + 0.7 * torch.randn(100, generator=g, dtype=torch.float64)
    y = level[group] + 0.5 * torch.randn(500, generator=g, dtype=torch.float64)
    data = {"group": group, "y": y}
    _, whole = run(rows, data, None, 120)
    want = next(iter(whole.q.proposals.values())).joint
    for seed in range(3):
        _, state = run(rows, data, {"group": 20}, 200, seed)
        found = next(iter(state.q.proposals.values())).joint
        assert state.bridge == 1.0
        assert ((found.mean - want.mean).abs() / want.sd).max() < 0.6


@pytest.mark.filterwarnings("ignore:qem")
def test_the_last_weighting_is_of_all_elements():
    posterior = infer(
        groups,
        DATA,
        method="qem",
        seed=0,
        minibatch={"group": 20},
        particles=30,
        final_particles=100,
        replicates=4,
        max_iters=60,
        tol=0.5,
    )
    centre, sd = oracle(DATA["y"])
    assert abs(float(posterior.mean("level")) - centre[0]) < 0.25 * sd[0]
    assert posterior.mean("effect").shape == (60,)
    assert math.isfinite(posterior.log_evidence.value)


def test_parts_are_visited_once_an_epoch_and_cover_the_plate():
    batches = batches_of(groups.bind(DATA), {"group": 7}, Streams(0))
    for epoch in range(2):
        seen = [batches.at(epoch * batches.parts + i) for i in range(batches.parts)]
        rows = torch.cat([b.rows["group"] for b in seen])
        assert torch.equal(rows.sort().values, torch.arange(60))
        assert all(len(b.rows["group"]) <= 7 and b.scale == batches.parts for b in seen)


@model
def walk():
    with plate("time", ordered=True):
        x = latent("x", Normal(0.0, 1.0))
        observe("y", Normal(x, 1.0))


@model
def across():
    with plate("group"):
        effect = latent("effect", Normal(0.0, 1.0))
        observe("y", Normal(effect - mean(effect, over="group"), 1.0))


@model
def learned():
    level = param("level", 0.0)
    with plate("group"):
        observe("y", Normal(latent("effect", Normal(level, 1.0)), 1.0))


@pytest.mark.parametrize(
    ("program", "size", "error", "text"),
    [
        (groups, {"grup": 5}, DataError, "Did you mean 'group'"),
        (groups, {"group": 61}, DataError, "has 60 elements only"),
        (groups, {"group": 0}, ModelError, "at least 1"),
        (groups, {"group": 5, "other": 5}, ModelError, "one plate"),
        (walk, {"time": 5}, UnsupportedError, "ordered"),
        (across, {"group": 5}, UnsupportedError, "runs over plate 'group'"),
        (learned, {"group": 5}, UnsupportedError, "params level"),
    ],
)
def test_what_cannot_be_divided_is_refused_in_words(program, size, error, text):
    with pytest.raises(error, match=text):
        infer(program, DATA, method="qem", minibatch=size)


def test_the_inner_plate_of_a_nest_is_refused():
    data = {
        "person": torch.tensor([0, 0, 1]),
        "difficulty": torch.zeros(3),
        "right": torch.tensor([0, 1, 1]),
    }
    with pytest.raises(UnsupportedError, match="Divide the outer one: 'person'"):
        infer(answers, data, method="qem", minibatch={"answer": 2})


def test_outer_families_are_refused():
    with pytest.raises(UnsupportedError, match="need a Gaussian proposal"):
        infer(groups, DATA, method="qem", minibatch={"group": 5}, q={"spread": "Gamma"})
