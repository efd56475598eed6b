"""A posterior of Gaussian vectors and poses: covariances, joints, tables, pictures and files."""

from __future__ import annotations

import pytest
import torch

from ppl import marginals as mg
from ppl.distributions import Bernoulli, ConcentratedNormal, Flat, Normal
from ppl.driver import infer
from ppl.errors import DataError, UnsupportedError
from ppl.manifolds import MANIFOLDS, SE3
from ppl.model import model
from ppl.plates import plate
from ppl.posterior import Joint, Posterior
from ppl.save import load
from ppl.sites import deterministic, given, latent, observe


@model
def poses(manifold=SE3):
    pose, edge = plate("pose"), plate("edge")
    latent("bias", Normal(0.0, 1.0), shape=2)
    with pose:
        x = latent("x", Flat(manifold))
        deterministic("back", manifold.inverse(x))
        latent("seen", Bernoulli(0.5))
    with edge:
        i, j = given("i", index=pose), given("j", index=pose)
        observe("z", ConcentratedNormal(manifold, manifold.between(x[i], x[j]), 0.1))


def built(manifold):
    edges = {
        "i": ["a", "b"],
        "j": ["b", "c"],
        "z": manifold.identity().expand(2, *manifold.event_shape),
    }
    bound = poses(manifold=manifold).bind(edges)
    d = manifold.dims
    loc = manifold.exp(0.3 * torch.randn(3, d, dtype=torch.float64))
    x = mg.JointGaussian(
        loc, 0.01 * torch.eye(d, dtype=torch.float64).expand(3, d, d), manifold.name
    )
    covariance = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    bias = mg.JointGaussian(torch.zeros(2, dtype=torch.float64), covariance)
    seen = mg.Table(torch.full((3, 2), 0.5, dtype=torch.float64))

    def sampler(n, streams):
        return {
            "bias": mg.draw(bias, n, streams.of("bias")),
            "x": mg.draw(x, n, streams.of("x")),
            "seen": torch.zeros(n, 3, dtype=torch.float64),
        }

    def joints(site):
        pair = loc[:2], loc[1:]
        return Joint(
            ("x", "x"), pair, torch.eye(2 * d, dtype=torch.float64).expand(2, 2 * d, 2 * d)
        )

    posterior = Posterior(
        bound, {"bias": bias, "x": x, "seen": seen}, method="made", sampler=sampler, joints=joints
    )
    posterior.model = poses(manifold=manifold)
    return posterior


@pytest.mark.parametrize("manifold", list(MANIFOLDS.values()))
def test_everything_a_posterior_does_works_on_a_group(manifold, tmp_path):
    posterior = built(manifold)
    d, event = manifold.dims, manifold.event_shape
    assert posterior.mean("x").shape == (3, *event)
    assert posterior.sd("x").shape == (3, d)
    assert posterior.covariance("x").shape == (3, d, d)
    assert posterior.interval("x").shape == (2, 3, *event)
    assert posterior.samples(4)["back"].shape == (4, 3, *event)
    text = str(posterior)
    assert ("x[a, 0]" if event else "x[a]") in text
    frame = posterior.to_frame()
    assert frame.loc["x[b, 0]" if event else "x[b]", "sd"] > 0
    assert posterior.predict(n=5).mean("z").shape == (2, *event)
    file = tmp_path / "poses.pt"
    posterior.save(file)
    again = load(file, poses(manifold=manifold))
    assert again.marginals["x"].manifold == manifold.name
    torch.testing.assert_close(again.covariance("x"), posterior.covariance("x"))
    torch.testing.assert_close(again.quantile("x", 0.1), posterior.quantile("x", 0.1))


def test_it_is_drawn_and_handed_to_arviz():
    posterior = built(SE3)
    pytest.importorskip("arviz")
    exported = posterior.to_arviz(n=10)
    assert exported["posterior"]["x"].shape == (1, 10, 3, 7)
    pytest.importorskip("matplotlib").use("Agg")
    posterior.plot.forest(["x", "bias"])


def test_covariances_and_joints_are_asked_for_by_name():
    posterior = built(SE3)
    assert posterior.covariance("bias").tolist() == [[2.0, 1.0], [1.0, 3.0]]
    joint = posterior.joint("z")
    assert joint.names == ("x", "x") and joint.covariance.shape == (2, 12, 12)
    with pytest.raises(DataError, match="no factor has that name"):
        posterior.joint("zz")
    with pytest.raises(DataError, match="is discrete. Use probs"):
        posterior.covariance("seen")
    posterior.marginals["x"] = mg.Gaussian(posterior.mean("x"), torch.ones(3, 7))
    with pytest.raises(DataError, match="keeps no tangent coordinates"):
        posterior.covariance("x")


def test_a_backend_without_joints_says_so():
    @model
    def line():
        weights = latent("weights", Normal(0.0, 1.0), shape=2)
        with plate("row"):
            observe("y", Normal(weights @ given("x"), 0.5))

    x = torch.randn(6, 2, dtype=torch.float64)
    posterior = infer(line, {"x": x, "y": x.sum(-1)}, method="exact")
    precision = torch.eye(2, dtype=torch.float64) + x.T @ x / 0.25
    torch.testing.assert_close(posterior.covariance("weights"), torch.linalg.inv(precision))
    with pytest.raises(UnsupportedError, match="exact keeps no joint Gaussians"):
        posterior.joint("y")


def test_vectors_in_plates_have_a_covariance_an_element():
    @model
    def lines():
        group = plate("group")
        with group:
            weights = latent("weights", Normal(0.0, 1.0), shape=2)
        with plate("row", within=group):
            observe("y", Normal(weights @ given("x"), 0.5))

    x, group = torch.randn(8, 2, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1, 0, 2, 2])
    posterior = infer(lines, {"x": x, "y": x.sum(-1), "group": group}, method="exact")
    for g in range(3):
        rows = x[group == g]
        precision = torch.eye(2, dtype=torch.float64) + rows.T @ rows / 0.25
        torch.testing.assert_close(posterior.covariance("weights")[g], torch.linalg.inv(precision))
