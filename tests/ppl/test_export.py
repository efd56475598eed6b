"""The ArviZ object: groups, dimensions, coordinates, and that ArviZ itself can use it."""

from __future__ import annotations

import math
import sys
import types
import warnings

import numpy as np
import pytest
import torch

from ppl.diagnostics import Diagnostics
from ppl.distributions import HalfNormal, Normal
from ppl.errors import UnsupportedError
from ppl.export import datasets, to_arviz, to_frame
from ppl.marginals import Gaussian
from ppl.model import model
from ppl.plates import plate
from ppl.posterior import Evidence, Posterior
from ppl.sites import given, latent, observe, param

xarray = pytest.importorskip("xarray", reason="the extra 'arviz' is not installed")


@pytest.fixture(scope="module")
def az():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("arviz", reason="the extra 'arviz' is not installed")


@model
def schools():
    school = plate("school")
    tau = latent("tau", HalfNormal(5.0))
    shift = param("shift", 1.0)
    with school:
        theta = latent("theta", Normal(shift, tau), shape=2)
    with plate("pupil"):
        place = given("school", index=school)
        observe("score", Normal(theta[place][0], 1.0))
        observe("other", Normal(0.0, 1.0))


def draw(n, streams):
    theta = torch.randn(n, 2, 2, generator=streams.of("x"), dtype=torch.float64)
    return {"tau": theta[:, 0, 0].exp(), "theta": theta}


@pytest.fixture
def posterior():
    nan = math.nan
    data = {
        "school": ["B", "A", "B", "A"],
        "score": [1.0, 2.0, 0.5, 0.0],
        "other": [0.1, nan, 0.3, nan],
    }
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    return Posterior(
        schools.bind(data),
        {
            "tau": Gaussian(torch.tensor(1.0), torch.tensor(0.1)),
            "theta": Gaussian(zeros, zeros + 1),
        },
        method="qem",
        sampler=draw,
        params={"shift": torch.tensor(0.5, dtype=torch.float64)},
        log_evidence=Evidence(-31.8, 0.03, "estimate"),
        diagnostics=Diagnostics({}, {}, True, 12, 0.5),
    )


def test_draws_have_chain_and_draw_plates_are_dims_and_labels_coords(posterior):
    group = datasets(posterior, 30)["posterior"]
    assert group["theta"].dims == ("chain", "draw", "school", "theta_dim_0")
    assert group["theta"].shape == (1, 30, 2, 2)
    assert group["school"].values.tolist() == ["A", "B"]
    expected = posterior.samples(30)
    for name in ("tau", "theta", "shift"):
        np.testing.assert_array_equal(group[name].values[0], expected[name].numpy())


def test_data_groups_keep_missing_entries_and_rename_a_site_that_is_a_plate(posterior):
    groups = datasets(posterior, 5)
    np.testing.assert_array_equal(groups["observed_data"]["other"], [0.1, math.nan, 0.3, math.nan])
    membership = groups["constant_data"]["school_index"]
    assert membership.dims == ("pupil",) and membership.values.tolist() == [1, 0, 1, 0]


def test_log_likelihood_is_that_of_the_same_draws_at_present_entries(posterior):
    groups = datasets(posterior, 30)
    group, theta = groups["log_likelihood"], groups["posterior"]["theta"].values[0]
    score = np.array([1.0, 2.0, 0.5, 0.0])
    at = theta[:, [1, 0, 1, 0], 0]
    expected = -0.5 * (score - at) ** 2 - 0.5 * math.log(2 * math.pi)
    np.testing.assert_allclose(group["score"].values[0], expected)
    assert group["other"].dims == ("chain", "draw", "other_entry")
    assert group["other_entry"].values.tolist() == ["other[0]", "other[2]"]


def test_evidence_and_verdict_are_attributes(posterior):
    stats = datasets(posterior, 5)["sample_stats"]
    assert stats.attrs["log_evidence"] == -31.8 and stats.attrs["log_evidence_kind"] == "estimate"
    assert stats.attrs["method"] == "qem" and stats.attrs["verdict"].startswith("good")
    assert stats["weight"].shape == (1, 5)


def test_arviz_summarises_and_scores_it(az, posterior):
    exported = posterior.to_arviz(n=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one chain has no R-hat, and ArviZ says so
        table = az.summary(exported, var_names=["theta"])
        score = az.loo(exported, var_name="score")
    assert table.index[0] == "theta[A, 0]"
    got = float(score.elpd_loo if hasattr(score, "elpd_loo") else score.elpd)
    from ppl.diagnostics import loo

    assert got == pytest.approx(loo(posterior.log_likelihood(n=200)["score"]).elpd, abs=1e-6)


@pytest.mark.parametrize("version", ["0.23.4", "1.3.0"])
def test_each_line_of_arviz_gets_its_own_container(monkeypatch, posterior, version):
    fake = types.SimpleNamespace(__version__=version, InferenceData=lambda **groups: groups)
    monkeypatch.setitem(sys.modules, "arviz", fake)
    exported = to_arviz(posterior, 5)
    if version.startswith("0"):
        assert set(exported) == {
            "posterior",
            "sample_stats",
            "log_likelihood",
            "observed_data",
            "constant_data",
        }
    else:
        assert isinstance(exported, xarray.DataTree)
        assert exported["posterior"]["theta"].dims[:2] == ("chain", "draw")


def test_without_arviz_the_error_names_the_extra(monkeypatch, posterior):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(UnsupportedError, match=r"factorppl\[arviz\]"):
        to_arviz(posterior, 5)


def test_to_frame_is_the_summary_and_names_the_extra_without_pandas(monkeypatch, posterior):
    pytest.importorskip("pandas")
    assert to_frame(posterior).loc["shift", "mean"] == 0.5
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UnsupportedError, match="arviz.*tutorials"):
        to_frame(posterior)
