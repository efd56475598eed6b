"""Unknowns without a prior start where factors place them."""

from __future__ import annotations

import pytest
import torch

from ppl import SE2, ConcentratedNormal, Flat, Normal, factor, given, infer, latent, model, plate
from ppl.inference.groups import build, propagation
from ppl.plates import pick


@model
def relative():
    pose, edge = plate("pose"), plate("edge")
    with pose:
        x = latent("x", Flat(SE2))
    with edge:
        seen = SE2.between(x[given("i", index=pose)], x[given("j", index=pose)])
        factor("edge", ConcentratedNormal(SE2, given("measured"), 0.1), at=seen)
    factor("anchor", ConcentratedNormal(SE2, given("home"), 0.01), at=pick(x, pose=0))


def ring(n=12, seed=0):
    """Poses on a circle, each seen from the one before, and two chords; without noise."""
    g = torch.Generator().manual_seed(seed)
    angle = torch.arange(n).double() * 2 * torch.pi / n
    truth = torch.stack([5 * angle.cos(), 5 * angle.sin(), angle + torch.pi / 2], -1)
    truth = SE2.project(truth + 0.1 * torch.randn(truth.shape, generator=g).double())
    i = torch.tensor([*range(n - 1), 0, 3])
    j = torch.tensor([*range(1, n), n // 2, n - 1])
    data = {"i": i, "j": j, "measured": SE2.between(truth[i], truth[j]), "home": truth[0]}
    return truth, data


def test_noise_free_poses_are_placed_where_they_are():
    truth, data = ring()
    groups = build(relative.bind(data, sizes={"pose": len(truth)}))
    found = groups.start()["x"]
    assert SE2.local(truth, found).abs().max() < 1e-6


def test_few_rows_of_a_large_group_place_the_same(monkeypatch):
    truth, data = ring()
    groups = build(relative.bind(data, sizes={"pose": len(truth)}))
    placed = {"x": torch.arange(len(truth)) != 5}
    start = {"x": truth.index_fill(0, torch.tensor([5]), 0.0)}
    monkeypatch.setattr(propagation, "_MANY", 0)  # a group of one row is made
    found = propagation.propagate(groups, start, placed)["x"]
    assert SE2.local(truth, found).abs().max() < 1e-6


def test_a_long_chain_that_turns_many_times_is_followed_to_its_end():
    n = 3000
    i = torch.arange(n - 1)
    step = torch.tensor([1.0, 0.1, 0.3], dtype=torch.float64).expand(n - 1, 3)
    data = {"i": i, "j": i + 1, "measured": step, "home": torch.zeros(3)}
    groups = build(relative.bind(data, sizes={"pose": n}))
    assert float(groups.energy(groups.start())) < 1e-12


def test_an_element_that_its_row_does_not_determine_stays_and_another_row_places_it():
    @model
    def half():
        pose, edge = plate("pose"), plate("edge")
        with pose:
            x = latent("x", Flat(2))
        with edge:
            off = x[given("j", index=pose)] - x[given("i", index=pose)]
            factor("edge", Normal(off * given("seen"), 1.0), at=given("z"))
        factor("anchor", Normal(pick(x, pose=0), 1.0), at=torch.tensor([1.0, 2.0]))

    # The first edge to element 1 says nothing of its second coordinate; element 3 hangs on nothing else.
    data = {
        "i": [0, 0, 1, 2],
        "j": [1, 1, 2, 3],
        "seen": [[1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [0.0, 1.0]],
        "z": [[1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [0.0, 1.0]],
    }
    groups = build(half.bind(data, sizes={"pose": 4}))
    points = {"x": torch.zeros(4, 2).double()}
    placed = {"x": torch.zeros(4, dtype=torch.bool)}
    found = propagation.propagate(groups, points, placed)["x"]
    assert torch.allclose(found[:3], torch.tensor([[1.0, 2], [2, 3], [3, 4]]).double(), atol=1e-6)
    assert bool(found[3].isfinite().all())


def test_a_graph_in_two_parts_without_an_anchor_has_one_origin_each():
    truth, data = ring()
    keep = torch.tensor([e for e in range(10) if e != 4])
    data = {k: v[keep] if k != "home" else v for k, v in data.items()}
    groups = build(relative.bind(data, sizes={"pose": len(truth)}))
    found = groups.start()["x"]
    assert SE2.local(truth[:5], found[:5]).abs().max() < 1e-6
    assert torch.equal(found[5], torch.zeros(3).double())  # the second part starts at the identity
    assert SE2.local(SE2.between(truth[5], truth[9]), found[9]).abs().max() < 1e-6


@pytest.mark.parametrize("method", ["laplace", "gbp"])
def test_nobody_has_to_say_where_a_pose_graph_starts(method):
    truth, data = ring(40)
    found = infer(relative, data, sizes={"pose": 40}, method=method, seed=0)
    assert SE2.local(truth, found.mean("x")).abs().max() < 1e-4


def test_what_has_a_proper_prior_starts_at_its_mean():
    @model
    def placed():
        x = latent("x", Normal(3.0, 1.0))
        factor("seen", Normal(x.exp(), 1.0), at=2.0)

    groups = build(placed.bind({}))
    assert float(groups.start()["x"]) == 3.0
