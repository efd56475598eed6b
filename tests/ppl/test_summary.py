"""The summary table against moments in closed form, and the text that `print(posterior)` shows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

from ppl.diagnostics import Diagnostics
from ppl.distributions import Bernoulli, Categorical, HalfNormal, Normal
from ppl.errors import DataError
from ppl.marginals import Gaussian, Table, Weighted
from ppl.model import model
from ppl.plates import plate
from ppl.posterior import Evidence, Posterior
from ppl.sites import deterministic, given, latent, observe, param
from ppl.summary import Row, Summary, headline, summarise

DATA = {"y": [28.0, 8.0, -3.0], "sigma": [15.0, 10.0, 16.0], "school": ["A", "B", "C"]}


@model
def schools():
    mu = latent("mu", Normal(0.0, 5.0))
    tau = latent("tau", HalfNormal(5.0))
    shift = param("shift", 1.0)
    with plate("school"):
        theta = latent("theta", Normal(mu + shift, tau), shape=2)
        deterministic("double", theta * 2)
        observe("y", Normal(theta[0], given("sigma")))


def draw(n, streams):
    def normal(*shape):
        return torch.randn(n, *shape, generator=streams.of("x"), dtype=torch.float64)

    return {"mu": normal(), "tau": normal().exp(), "theta": normal(3, 2)}


@pytest.fixture
def posterior():
    weights = torch.full((4,), 0.25, dtype=torch.float64)
    loc = torch.arange(6.0, dtype=torch.float64).reshape(3, 2)
    marginals = {
        "theta": Gaussian(loc, torch.full_like(loc, 0.5)),
        "mu": Weighted(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64), weights),
        "tau": Gaussian(torch.tensor(2000.0), torch.tensor(300.0)),
    }
    return Posterior(
        schools.bind(DATA),
        marginals,
        method="qem",
        sampler=draw,
        params={"shift": torch.tensor(1.25)},
        log_evidence=Evidence(-31.82, 0.03, "estimate"),
        diagnostics=Diagnostics(
            {"mu": torch.tensor(700.0), "theta": torch.tensor([900.0, 611.0, 800.0])},
            {"mu": torch.tensor(0.21), "theta": torch.tensor([0.1, math.nan, 0.0])},
            True,
            142,
            0.9,
            ("the weights are tempered", "the weights are tempered"),
        ),
    )


def test_rows_are_named_by_labels_then_event_and_ordered_as_the_program(posterior):
    names = [r.name for r in posterior.summary().rows]
    assert names[:5] == ["mu", "tau", "shift", "theta[A, 0]", "theta[A, 1]"]
    assert names[9] == "double[A, 0]"
    assert len(posterior.summary()) == 15


def test_labels_that_are_positions_print_as_positions():
    data = {k: DATA[k] for k in ("y", "sigma")}
    loc = torch.zeros(3, 2, dtype=torch.float64)
    post = Posterior(
        schools.bind(data), {"theta": Gaussian(loc, loc + 1)}, method="t", sampler=draw
    )
    assert [r.name for r in summarise(post, "theta").rows][:3] == [
        "theta[0, 0]",
        "theta[0, 1]",
        "theta[1, 0]",
    ]


def test_numbers_are_those_of_the_marginals(posterior):
    row = {r.name: r for r in posterior.summary().rows}["theta[B, 1]"]
    law = stats.norm(3.0, 0.5)
    assert row.mean == 3.0 and row.sd == 0.5
    for level, got in ((0.05, row.q05), (0.5, row.q50), (0.95, row.q95)):
        assert got == pytest.approx(law.ppf(level))
    assert row.ess == 611.0 and math.isnan(row.pareto_k)


def test_a_param_has_no_spread(posterior):
    (row,) = posterior.summary(["shift"]).rows
    assert (row.mean, row.sd, row.q05, row.q95) == (1.25, 0.0, 1.25, 1.25)


def test_an_unknown_site_is_refused_with_the_nearest(posterior):
    with pytest.raises(DataError, match="Did you mean 'theta'"):
        posterior.summary(["thetas"])


def test_the_table_is_aligned(posterior):
    lines = str(posterior.summary(["mu", "tau", "theta"])).split("\n")
    assert lines[0].split() == ["mean", "sd", "q05", "q50", "q95", "ess", "pareto_k"]
    points = {line.index(".") for line in lines[1:] if line.startswith(("mu", "theta"))}
    assert len(points) == 1
    assert "2000" in lines[2] and "2000." not in lines[2]  # two digits of a deviation of 300


def test_columns_that_nobody_has_are_left_out():
    row = Row("a", "a", 1.0, 0.5, 0.0, 1.0, 2.0, math.nan, math.nan)
    assert str(Summary((row,))).split("\n")[0].split() == ["mean", "sd", "q05", "q50", "q95"]
    assert str(Summary(())) == "no sites"


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e12, -3.0, math.inf])
def test_any_number_can_be_printed(value):
    row = Row("a", "a", value, 0.0, value, value, value, 2.5, 0.9)
    assert "nan" not in str(Summary((row,)))


def test_to_frame_holds_the_rows(posterior):
    frame = posterior.to_frame()
    assert frame.loc["theta[A, 1]", "mean"] == 1.0
    assert list(frame.columns) == ["site", "mean", "sd", "q05", "q50", "q95", "ess", "pareto_k"]


# ---- discrete sites ---------------------------------------------------------------------------


@model
def mixture():
    cluster = plate("cluster", 3)
    with plate("item"):
        latent("kind", Categorical([0.2, 0.3, 0.5], over=cluster))
        latent("on", Bernoulli(0.5))
        observe("y", Normal(0.0, 1.0))


@pytest.fixture
def discrete():
    kind = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    on = torch.tensor([[0.75, 0.25], [0.0, 1.0]], dtype=torch.float64)
    bound = mixture.bind({"y": [0.0, 1.0]}, labels={"cluster": ["low", "mid", "high"]})
    return Posterior(bound, {"kind": Table(kind), "on": Table(on)}, method="exact", sampler=draw)


def test_categories_show_their_probabilities_by_label_and_no_mean(discrete):
    first, second = discrete.summary(["kind"]).rows
    assert first.values == "low: 0.90, mid: 0.10"
    assert second.values == "high: 0.50, mid: 0.30, low: 0.20"
    assert math.isnan(first.mean) and math.isnan(first.q50)
    assert "nan" not in str(discrete.summary())


def test_numbers_of_a_finite_site_keep_their_mean(discrete):
    first, second = discrete.summary(["on"]).rows
    assert first.mean == 0.25 and first.values == "0: 0.75, 1: 0.25"
    assert second.q05 == 1.0 and second.values == "1: 1.00"


# ---- what print shows -------------------------------------------------------------------------


def test_headline_has_the_lines_that_every_user_needs(posterior):
    lines = headline(posterior).split("\n")
    assert "qem on 4 sites (9 numbers), 142 iterations, converged, 0.9 s on cpu float64" in lines
    quality = (
        "log evidence -31.82 ± 0.03 (estimate); Pareto k 0.21 (good); smallest ESS 611 (theta)"
    )
    assert quality in lines
    assert "verdict: check: the weights are tempered." in lines
    assert lines.count("warning: the weights are tempered") == 1
    assert str(posterior) == headline(posterior)


def test_headline_shows_the_data_report_once(posterior):
    posterior.bound = replace(posterior.bound, report=("2 entries are missing",) * 2)
    assert headline(posterior).count("data: 2 entries are missing") == 1


def test_headline_of_a_bare_posterior_is_short(discrete):
    text = headline(discrete)
    assert "exact on 2 sites (4 numbers), 0.0 s on cpu float64" in text
    assert "evidence" not in text and "ESS" not in text


def test_a_bad_result_says_where(posterior):
    posterior.diagnostics = replace(
        posterior.diagnostics, pareto_k={"theta": torch.tensor([0.1, 0.8, 0.2])}, converged=False
    )
    text = headline(posterior)
    assert "Pareto k 0.80 (too high, theta)" in text
    assert "verdict: unreliable" in text and "not converged, 0.9 s" in text


def test_headline_shows_twenty_rows_and_every_small_site():
    @model
    def wide():
        with plate("item"):
            big = latent("big", Normal(0.0, 1.0))
            observe("y", Normal(big, 1.0))
        latent("last", Normal(0.0, 1.0))

    zeros = torch.zeros(50, dtype=torch.float64)
    marginals = {"big": Gaussian(zeros, zeros + 1), "last": Gaussian(zeros[0], zeros[0] + 1)}
    post = Posterior(wide.bind({"y": zeros}), marginals, method="t", sampler=draw)
    lines = headline(post).split("\n")
    assert lines[20].startswith("last ")
    assert lines[21] == "... and 31 more: posterior.summary()"
