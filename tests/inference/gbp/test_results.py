"""What a user gets and is told: options, variances, joints, draws, evidence, more data."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import constraints

from ppl import explain, given, infer, latent, model, observe, param, plate, shift
from ppl.distributions import Markov, Normal
from ppl.errors import DataError, ModelError, UnsupportedError
from ppl.inference.gbp import GBP


@model
def walk():
    with plate("t", ordered=True):
        x = latent("x", Markov(Normal(0.0, 1.0), lambda previous: Normal(previous, 0.3)))
        observe("y", Normal(x, 0.5))


@model
def sheet():
    with plate("i", ordered=True), plate("j", ordered=True):
        x = latent("x", Normal(0.0, 1.0))
        observe("y", Normal(x, 0.5))
        observe("right", Normal(shift(x, "j", 1) - x, 0.5))
        observe("down", Normal(shift(x, "i", 1) - x, 0.5))


def sheet_data(n: int = 5) -> dict[str, torch.Tensor]:
    zero = torch.zeros(n, n, dtype=torch.float64)
    return {"y": torch.randn(n, n, dtype=torch.float64), "right": zero, "down": zero}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"schedule": "folld"}, "schedule.*Did you mean 'flood'"),
        ({"damping": 1.0}, "damping"),
        ({"dropout": -0.1}, "dropout"),
        ({"active": 0.0}, "active"),
        ({"relinearise": 0}, "relinearise"),
        ({"schedule": "attention"}, "rows"),
        ({"variance": "yes"}, "variance"),
        ({"graduated": 0.5}, "graduated"),
        ({"graduated_steps": 0}, "graduated_steps"),
    ],
)
def test_options_are_checked(options, text):
    with pytest.raises(ModelError, match=text):
        GBP(**options)


@pytest.mark.parametrize("option", [{"minibatch": {"t": 2}}, {"restarts": 2}])
def test_options_of_infer_that_it_cannot_do_are_refused(option):
    with pytest.raises(UnsupportedError, match="gbp does not support"):
        infer(walk, {"y": torch.zeros(4)}, method="gbp", **option)


def test_explain_says_what_it_would_do():
    rows = {r.method: r.note for r in explain(walk, {"y": torch.zeros(9)}).rows}
    assert "a tree" in rows["gbp"] and "schedule tree" in rows["gbp"]
    loopy = {r.method: r.note for r in explain(sheet, sheet_data()).rows}["gbp"]
    assert "loopy" in loopy and "schedule flood" in loopy and "bytes an edge" in loopy


def test_loopy_variances_are_measured_against_exact_ones():
    """variance="gbp" | "check" | "exact"; loopy ones are never presented as exact."""
    data = sheet_data()
    want = infer(sheet, data, method="exact")
    found = {
        v: infer(sheet, data, method="gbp", variance=v, tol=1e-9) for v in ("gbp", "check", "exact")
    }
    for posterior in found.values():
        torch.testing.assert_close(posterior.mean("x"), want.mean("x"), rtol=0, atol=1e-8)
    torch.testing.assert_close(found["exact"].sd("x"), want.sd("x"), rtol=1e-8, atol=1e-8)
    assert bool((found["check"].sd("x") < want.sd("x")).all())
    notes = {v: str(p.diagnostics.notes["variances"]) for v, p in found.items()}
    assert "too small" in notes["gbp"]
    ratio = (found["check"].sd("x") / want.sd("x")).square()
    assert f"min {float(ratio.min()):.3g}" in notes["check"] and "not exact" in notes["check"]


def test_bethe_evidence_is_near_the_exact_one_on_loops():
    data = sheet_data()
    got = infer(sheet, data, method="gbp", tol=1e-9).log_evidence
    want = infer(sheet, data, method="exact").log_evidence.value
    assert got.kind == "Bethe"
    assert got.value == pytest.approx(want, abs=1.0)


@pytest.mark.parametrize("variance", ["gbp", "exact"])
def test_joints_of_a_chain_are_exact(variance):
    y = torch.randn(6, dtype=torch.float64)
    posterior = infer(walk, {"y": y}, method="gbp", variance=variance)
    other = infer(walk, {"y": y}, method="laplace")
    got, want = posterior.joint("x"), other.joint("x")
    assert got.names == want.names == ("x", "x")
    torch.testing.assert_close(got.covariance, want.covariance, rtol=1e-9, atol=1e-9)
    for a, b in zip(got.mean, want.mean, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_draws_have_the_joint_covariance():
    y = torch.randn(6, dtype=torch.float64)
    posterior = infer(walk, {"y": y}, method="gbp")
    draws = posterior.samples(20000, seed=1)["x"]
    joint = posterior.joint("x").covariance
    sample = torch.cov(draws[:, :2].T)
    # Five standard errors of a covariance of 20 000 draws.
    torch.testing.assert_close(
        sample, joint[0].flip(0, 1), rtol=0, atol=5 * float(joint[0].max()) / 100
    )


def test_a_graph_that_does_not_fit_warns_of_independent_draws(monkeypatch):
    from ppl.inference.gbp import results

    monkeypatch.setattr(results, "_FEASIBLE", (0, 0))
    posterior = infer(walk, {"y": torch.randn(4)}, method="gbp")
    with pytest.warns(UserWarning, match="independent"):
        assert posterior.samples(3)["x"].shape == (3, 4)


# ---- more data -------------------------------------------------------------------------------------------------


def test_extending_a_chain_is_the_smoother_of_all_data():
    y = torch.randn(30, dtype=torch.float64).cumsum(0)
    posterior = infer(walk, {"y": y[:20]}, method="gbp")
    for at in range(20, 30, 5):
        posterior = posterior.extend({"y": y[at : at + 5]})
    whole = infer(walk, {"y": y}, method="gbp")
    torch.testing.assert_close(posterior.mean("x"), whole.mean("x"), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(posterior.sd("x"), whole.sd("x"), rtol=1e-9, atol=1e-9)


def test_fixed_lag_is_the_filter_inside_the_lag():
    """Old rows rest: what they say of the open ones is that of all data so far, as in a Kalman filter."""
    y = torch.randn(24, dtype=torch.float64).cumsum(0)
    posterior = infer(walk, {"y": y[:20]}, method="gbp")
    for at in range(20, 24):
        posterior = posterior.extend({"y": y[at : at + 1]}, lag={"t": 3})
    whole = infer(walk, {"y": y}, method="gbp")
    torch.testing.assert_close(posterior.mean("x")[-2:], whole.mean("x")[-2:], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(posterior.mean("x")[15], whole.mean("x")[15], rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", ["auto", "flood", "sweep", "layers"])
@pytest.mark.parametrize("lag", [2, 4, 12])
def test_several_elements_at_once_are_smoothed_inside_the_lag(lag, schedule):
    y = torch.randn(12, dtype=torch.float64).cumsum(0)
    options = {"method": "gbp", "schedule": schedule, "tol": 1e-11}
    posterior = infer(walk, {"y": y[:8]}, **options).extend({"y": y[8:]}, lag={"t": lag})
    whole = infer(walk, {"y": y}, **options)
    assert posterior.diagnostics.converged
    torch.testing.assert_close(posterior.mean("x")[8:], whole.mean("x")[8:], rtol=0, atol=1e-9)
    torch.testing.assert_close(posterior.sd("x")[8:], whole.sd("x")[8:], rtol=0, atol=1e-9)


def test_extending_after_a_start_of_ones_own():
    y = torch.randn(12, dtype=torch.float64).cumsum(0)
    posterior = infer(walk, {"y": y[:8]}, method="gbp", start={"x": y[:8]})
    posterior = posterior.extend({"y": y[8:]})
    want = infer(walk, {"y": y}, method="exact")
    torch.testing.assert_close(posterior.mean("x"), want.mean("x"), rtol=0, atol=1e-9)


@model
def turning():
    with plate("t", ordered=True):
        x = latent("x", Markov(Normal(0.0, 1.0), lambda last: Normal(last + 0.3 * last.sin(), 0.1)))
        observe("y", Normal(x, 0.5))


def test_new_elements_of_a_curved_chain_are_placed_by_their_factors():
    y = 1 + 0.2 * torch.randn(12, dtype=torch.float64)
    options = {"method": "gbp", "tol": 1e-9}
    posterior = infer(turning, {"y": y[:8]}, start={"x": y[:8]}, **options).extend({"y": y[8:]})
    want = infer(turning, {"y": y}, method="laplace", tol=1e-10)
    torch.testing.assert_close(posterior.mean("x"), want.mean("x"), rtol=0, atol=1e-6)
    torch.testing.assert_close(posterior.sd("x"), want.sd("x"), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("lag", "text"),
    [
        ({"time": 2}, "no latent lies in plate 'time'"),
        ({"t": 0}, "at least 1 element of 't', got 0"),
        ({"t": -1}, "at least 1 element of 't', got -1"),
    ],
)
def test_a_lag_that_makes_no_sense_is_refused(lag, text):
    posterior = infer(walk, {"y": torch.randn(5)}, method="gbp")
    with pytest.raises(DataError, match=text):
        posterior.extend({"y": torch.randn(1)}, lag=lag)


def test_a_posterior_as_prior_filters_a_vector_exactly():

    @model
    def line():
        from ppl.distributions import MultivariateNormal

        w = latent("w", MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double()))
        with plate("n"):
            observe("y", Normal(w[0] + w[1] * given("t"), 0.3))

    t, y = torch.randn(2, 40, dtype=torch.float64)
    first = infer(line, {"t": t[:20], "y": y[:20]}, method="gbp")
    second = infer(line, {"t": t[20:], "y": y[20:]}, method="gbp", prior=first)
    whole = infer(line, {"t": t, "y": y}, method="gbp")
    torch.testing.assert_close(second.mean("w"), whole.mean("w"), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(second.covariance("w"), whole.covariance("w"), rtol=1e-8, atol=1e-8)


def test_a_checkpoint_is_continued(tmp_path):
    data, file = sheet_data(), tmp_path / "run.pt"
    with pytest.warns(UserWarning, match="not converged"):
        infer(sheet, data, method="gbp", max_iters=4, checkpoint=file)
    again = infer(sheet, data, method="gbp", checkpoint=file)
    whole = infer(sheet, data, method="gbp")
    assert again.diagnostics.iterations == whole.diagnostics.iterations
    torch.testing.assert_close(again.mean("x"), whole.mean("x"), rtol=1e-12, atol=1e-12)


@model
def noisy_walk():
    move, noise = (param(n, 1.0, support=constraints.positive) for n in ("move", "noise"))
    with plate("t", ordered=True):
        x = latent("x", Markov(Normal(0.0, 1.0), lambda previous: Normal(previous, move)))
        observe("y", Normal(x, noise))


def test_learning_goes_on_from_the_params_so_far():
    draws = torch.randn(2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = 0.5 * draws[0].cumsum(0) + 0.3 * draws[1]
    posterior = infer(noisy_walk, {"y": y[:38]}, method="gbp")
    more = posterior.extend({"y": y[38:]}, max_iters=1)  # one round, and one step of the params
    for name, value in posterior.params.items():
        assert abs(float(value) - 1) > 0.3  # where they started
        assert float(more.params[name]) == pytest.approx(float(value), abs=0.1)


def test_params_are_learned_to_the_maximum_of_the_evidence():
    y = 0.5 * torch.randn(80, dtype=torch.float64).cumsum(0)
    y = y + 0.3 * torch.randn(80, dtype=torch.float64)
    posterior = infer(noisy_walk, {"y": y}, method="gbp", tol=1e-6, max_iters=4000)
    best = posterior.log_evidence.value
    assert posterior.diagnostics.converged
    for name in ("move", "noise"):
        for factor in (0.97, 1.03):
            params = {n: v * (factor if n == name else 1.0) for n, v in posterior.params.items()}

            @model
            def fixed(params=params):
                with plate("t", ordered=True):
                    walk = Markov(
                        Normal(0.0, 1.0), lambda previous: Normal(previous, params["move"])
                    )
                    x = latent("x", walk)
                    observe("y", Normal(x, params["noise"]))

            assert infer(fixed, {"y": y}, method="exact").log_evidence.value < best
