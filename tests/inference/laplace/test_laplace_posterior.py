"""What the fitted Gaussian says: against the exact backend, dense algebra, and itself by other routes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ppl import (
    Flat,
    HalfNormal,
    Markov,
    Normal,
    explain,
    given,
    infer,
    latent,
    load,
    model,
    observe,
    param,
    plate,
)
from ppl.errors import ModelError, NumericalError, UnsupportedError
from ppl.inference.laplace import LaplaceApproximation
from ppl.models import classifier, slam

positive = torch.distributions.constraints.positive


@model
def local_level():
    with plate("time", ordered=True):
        level = latent("level", Markov(Normal(0.0, 3.0), lambda before: Normal(before, 0.5)))
        observe("y", Normal(level, 1.0))


@model
def two_groups():
    overall = latent("overall", Normal(0.0, 5.0))
    with plate("group"):
        mean = latent("mean", Normal(overall, 2.0))
        with plate("unit"):
            observe("y", Normal(mean + given("x") * overall, 1.0))


@model
def regression():
    w = latent("w", Normal(given("mean"), 2.0))
    with plate("row"):
        observe("y", Normal((w * given("x")).sum(-1), 0.7))


def cases():
    draw = np.random.default_rng(0).normal
    return {
        "chain": (local_level, {"y": draw(size=30)}),
        "groups": (two_groups, {"y": draw(size=(4, 5)), "x": draw(size=(4, 5))}),
        "regression": (
            regression,
            {"mean": np.zeros(3), "x": draw(size=(20, 3)), "y": draw(size=20)},
        ),
    }


@pytest.mark.parametrize("name", ["chain", "groups", "regression"])
@pytest.mark.parametrize("optimiser", ["lm", "gauss_newton", "dogleg"])
def test_linear_models_equal_the_exact_backend(name, optimiser):
    program, data = cases()[name]
    found = infer(program, data, method="laplace", optimiser=optimiser)
    exact = infer(program, data, method="exact")
    for site in exact.marginals:
        torch.testing.assert_close(found.mean(site), exact.mean(site), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(found.sd(site), exact.sd(site), atol=1e-9, rtol=1e-9)
    assert found.log_evidence.value == pytest.approx(exact.log_evidence.value, abs=1e-9)
    assert found.log_evidence.kind == "exact"
    assert found.diagnostics.iterations == 1


def test_missing_rows_are_marginalised():
    y = np.random.default_rng(1).normal(size=20)
    y[[3, 4, 11]] = np.nan
    found, exact = (infer(local_level, {"y": y}, method=m) for m in ("laplace", "exact"))
    torch.testing.assert_close(found.sd("level"), exact.sd("level"))
    assert found.log_evidence.value == pytest.approx(exact.log_evidence.value, abs=1e-9)


def test_joint_draws_have_the_joint_covariance():
    found = infer(local_level, cases()["chain"][1], method="laplace")
    draws = found.samples(20_000)["level"]
    joint = found.joint("level")
    assert joint.names == ("level", "level") and joint.covariance.shape == (29, 2, 2)
    empirical = torch.cov(draws[:, [4, 3]].T)  # the later one first
    torch.testing.assert_close(empirical, joint.covariance[3], atol=0.02, rtol=0.0)
    torch.testing.assert_close(draws.mean(0), found.mean("level"), atol=0.03, rtol=0.0)
    torch.testing.assert_close(joint.mean[0][5], found.mean("level")[6])


def test_covariances_wait_until_they_are_asked_for():
    found = infer(local_level, cases()["chain"][1], method="laplace")
    assert found.marginals._found == {}
    assert list(found.marginals) == ["level"] and "level" in found.marginals
    found.sd("level")
    assert list(found.marginals._found) == ["level"]


def test_save_and_load(tmp_path):
    found = infer(local_level, cases()["chain"][1], method="laplace")
    found.save(tmp_path / "fit.ppl")
    again = load(tmp_path / "fit.ppl", local_level)
    torch.testing.assert_close(again.sd("level"), found.sd("level"))


# ---- other solvers -------------------------------------------------------------------------------


def ring(n=30, closed=True, seed=0):
    """Poses around a circle, each measured from the one before."""
    rng = np.random.default_rng(seed)
    i, j = np.arange(n - 1 + closed), (np.arange(n - 1 + closed) + 1) % n
    step = np.array([1.0, 0.0, 2 * np.pi / n])
    z = step + rng.normal(size=(len(i), 3)) * [0.05, 0.05, 0.02]
    pose = np.zeros((n, 3))
    for k in range(n - 1):
        c, s = np.cos(pose[k, 2]), np.sin(pose[k, 2])
        pose[k + 1] = pose[k] + [c * z[k, 0] - s * z[k, 1], s * z[k, 0] + c * z[k, 1], z[k, 2]]
    data = {
        "i": i,
        "j": j,
        "z": z,
        "sd": np.tile([0.05, 0.05, 0.02], (len(i), 1)),
        "anchor_precision": 1e4,
    }
    return data, pose


def test_conjugate_gradients_find_the_same_mode():
    data, start = ring()
    program = slam.pose_graph_2d(noise="sd")
    direct = infer(program, data, method="laplace", start={"x": start})
    with pytest.warns(UserWarning, match="estimated from 400 draws"):
        found = infer(program, data, method="laplace", start={"x": start}, solver="cg", draws=400)
    torch.testing.assert_close(found.mean("x"), direct.mean("x"), atol=1e-6, rtol=0.0)
    # The standard error of a variance from 400 draws is at most 7 per cent.
    ratio = (found.sd("x") / direct.sd("x")).square()
    assert (ratio - 1).abs().max() < 0.3
    draws = found.samples(500)["x"]
    assert (draws.std(0) / direct.sd("x") - 1).abs().max() < 0.2
    assert found.joint(
        "residual" if "residual" in found.graph.factors else "edge"
    ).covariance.shape[1:] == (6, 6)


def test_float32():
    data, start = ring()
    program = slam.pose_graph_2d(noise="sd")
    exact = infer(program, data, method="laplace", start={"x": start})
    found = infer(program, data, method="laplace", start={"x": start}, dtype=torch.float32)
    assert found.mean("x").dtype == torch.float32 and found.covariance("x").dtype == torch.float32
    assert found.diagnostics.converged
    torch.testing.assert_close(found.mean("x").double(), exact.mean("x"), atol=1e-3, rtol=0.0)
    torch.testing.assert_close(found.sd("x").double(), exact.sd("x"), rtol=1e-2, atol=1e-5)


# ---- params --------------------------------------------------------------------------------------


@model
def learned_level():
    step = param("step", 1.0, support=positive)
    noise = param("noise", 2.0, support=positive)
    with plate("time", ordered=True):
        level = latent("level", Markov(Normal(0.0, 3.0), lambda before: Normal(before, step)))
        observe("y", Normal(level, noise))


def test_scales_are_those_of_highest_evidence():
    rng = np.random.default_rng(3)
    y = 0.6 * rng.normal(size=200).cumsum() + rng.normal(size=200)
    found = infer(learned_level, {"y": y}, method="laplace")
    assert found.diagnostics.converged

    @model
    def fixed():
        scale, noise = given("step"), given("noise")
        with plate("time", ordered=True):
            law = Markov(Normal(0.0, 3.0), lambda before: Normal(before, scale))
            observe("y", Normal(latent("level", law), noise))

    def evidence(step, noise):
        data = {"y": y, "step": step, "noise": noise}
        return infer(fixed, data, method="laplace").log_evidence.value

    step, noise = (float(found.params[n]) for n in ("step", "noise"))
    best = evidence(step, noise)
    assert found.log_evidence.value == pytest.approx(best, abs=1e-6)
    for other in [
        (step * 1.02, noise),
        (step * 0.98, noise),
        (step, noise * 1.02),
        (step, noise * 0.98),
    ]:
        assert evidence(*other) < best


def test_params_stay_where_learning_is_off():
    found = infer(learned_level, {"y": np.zeros(5)}, method="laplace", learn=False)
    assert float(found.params["step"]) == 1.0


# ---- robust --------------------------------------------------------------------------------------


@model
def location():
    centre = latent("centre", Normal(0.0, 1e3))
    with plate("row"):
        observe("y", Normal(centre, 1.0).robust("huber", 1.5))


def test_huber_location_with_an_outlier_equals_the_m_estimator():
    y = np.r_[np.random.default_rng(5).normal(size=100), 1e3]
    found = infer(location, {"y": y}, method="laplace", tol=1e-9)
    centre = 0.0
    for _ in range(200):
        weight = np.minimum(1, 1.5 / np.maximum(np.abs(y - centre), 1e-12))
        centre = (weight * y).sum() / (weight.sum() + 1e-6)
    assert float(found.mean("centre")) == pytest.approx(centre, abs=1e-8)
    weights = found.diagnostics.notes["robust weights"]["y"]
    assert weights.shape[0] == 101 and float(weights[-1].squeeze()) < 0.002
    shown = str(found.diagnostics)
    assert "robust weights: y: 1 of 101 below 0.1, the least 0.0015 at row 100" in shown
    assert "tensor" not in shown


# ---- refusals ------------------------------------------------------------------------------------


@model
def relative():
    node = plate("node")
    with node:
        x = latent("x", Flat())
    with plate("edge"):
        i, j = given("i", index=node), given("j", index=node)
        observe("z", Normal(x[j] - x[i], 0.1))


@pytest.mark.parametrize("optimiser", ["lm", "gauss_newton", "dogleg"])
def test_undetermined_latents_are_named(optimiser):
    data = {"i": [0, 1], "j": [1, 2], "z": [1.0, 1.0]}
    with pytest.raises(
        NumericalError, match=r"'x' \(node \d\) is not determined.*prior or an anchor"
    ):
        infer(relative, data, method="laplace", optimiser=optimiser)


def test_an_element_that_nothing_touches_is_named_by_its_label():
    data = {"i": ["a", "b"], "j": ["b", "c"], "z": [1.0, 1.0]}
    labels = {"node": ["a", "b", "c", "d"]}
    with pytest.raises(NumericalError, match=r"node d"):
        infer(relative, data, method="laplace", labels=labels)


def test_pose_graph_without_an_anchor():
    data, start = ring()
    program = slam.pose_graph_2d(noise="sd", anchored=False)
    data.pop("anchor_precision")
    with pytest.raises(NumericalError, match=r"'x' \(pose \d+\).* not determined"):
        infer(program, data, method="laplace", start={"x": start})


def test_constrained_latents_are_refused():
    @model
    def scale():
        s = latent("s", HalfNormal(1.0))
        observe("y", Normal(0.0, s))

    with pytest.raises(UnsupportedError, match="'s'"):
        infer(scale, {"y": 1.0}, method="laplace")


def test_gauss_newton_that_diverges_says_so():
    @model
    def steep():
        x = latent("x", Flat())
        observe("y", Normal(x.exp(), 1.0))

    with pytest.raises(NumericalError, match="lm"):
        infer(steep, {"y": 1e6}, method="laplace", optimiser="gauss_newton", start={"x": -3.0})


@pytest.mark.parametrize(
    "options",
    [
        {"optimiser": "newton"},
        {"solver": "qr"},
        {"graduated": 0.5},
        {"damping": -1.0},
        {"draws": 0},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ModelError, match=next(iter(options))):
        LaplaceApproximation(**options)


def test_unsupported_arguments_of_infer_are_refused():
    y = {"y": np.zeros(4)}
    with pytest.raises(UnsupportedError, match="restarts"):
        infer(local_level, y, method="laplace", restarts=2)
    with pytest.raises(UnsupportedError, match="minibatch"):
        infer(local_level, y, method="laplace", minibatch={"time": 2})


def test_a_site_that_couples_too_many_scalars_is_refused_before_the_pairs_are_made():
    data = {"x": np.zeros((3, 40)), "label": [0, 1, 2]}
    with pytest.raises(UnsupportedError, match=r"'label' couples all elements .* method='ssvi'"):
        infer(classifier(hidden=(500,)), data, method="laplace")


def test_explain_says_what_it_would_cost():
    text = str(explain(local_level, {"y": np.zeros(10)}))
    assert "10 unknowns, 20 factors in 3 groups" in text


def test_interrupt_leaves_the_last_state():
    data, start = ring(40)
    count = []

    def stop(progress):
        count.append(progress.metrics["energy"])
        if len(count) == 2:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted"):
        found = infer(
            slam.pose_graph_2d(noise="sd"),
            data,
            method="laplace",
            start={"x": start},
            callbacks=[stop],
        )
    assert not found.diagnostics.converged
    assert found.sd("x").isfinite().all()


def test_the_users_random_state_is_left_alone(rng_untouched):
    found = infer(local_level, cases()["chain"][1], method="laplace", seed=1)
    found.samples(5)
