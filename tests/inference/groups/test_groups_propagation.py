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


def test_few_rows_of_a_large_group_give_the_same_start(monkeypatch):
    truth, data = ring()
    groups = build(relative.bind(data, sizes={"pose": len(truth)}))
    whole = groups.start()["x"]
    monkeypatch.setattr(propagation, "_MANY", 0)
    assert torch.allclose(groups.start()["x"], whole, atol=1e-10)


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
