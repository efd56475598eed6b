"""What the pictures show, read back from Matplotlib's artists."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
import torch

from ppl.distributions import Bernoulli, Categorical, Gamma, Normal, Poisson
from ppl.errors import DataError, UnsupportedError
from ppl.marginals import Gaussian, Table
from ppl.model import model
from ppl.plates import plate
from ppl.plots import _bandwidth, _density
from ppl.posterior import Evidence, Posterior
from ppl.sites import latent, observe

matplotlib = pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")


@model
def shop():
    rate = latent("rate", Gamma(2.0, 1.0))
    weight = latent("weight", Normal(0.0, 1.0), shape=50)
    latent("kind", Categorical([0.5, 0.5]))
    with plate("day"):
        observe("visits", Poisson(rate))
        observe("takings", Normal(weight[0], 1.0))
        observe("rain", Bernoulli(0.3))


def draw(n, streams):
    generator = streams.of("x")
    one = torch.ones(n, dtype=torch.float64)
    weight = torch.randn(n, 50, generator=generator, dtype=torch.float64)
    return {"rate": 2.5 * one, "weight": weight, "kind": 0 * one}


def make(size):
    days = torch.arange(size, dtype=torch.float64)
    takings = torch.sin(days)
    takings[1] = torch.nan
    data = {"visits": days % 6, "takings": takings, "rain": days % 3 == 0}
    loc = torch.linspace(-2, 2, 50, dtype=torch.float64)
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    marginals = {
        "rate": Gaussian(torch.tensor(2.5).double(), torch.tensor(0.1).double()),
        "weight": Gaussian(loc, torch.ones_like(loc)),
        "kind": Table(half),
    }
    evidence = Evidence(-50.0, 0.1, "estimate")
    post = Posterior(shop.bind(data), marginals, method="qem", sampler=draw, log_evidence=evidence)
    steps = torch.arange(1.0, 101.0)
    post.trace = {
        "log_evidence": -50.0 - 1000 * torch.exp(-steps / 3),
        "ess": steps.sqrt(),
        "bridge": torch.ones(100),
    }
    return post


@pytest.fixture(autouse=True)
def figures_closed():
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield
    pyplot.close("all")


def test_trace_has_a_panel_for_each_metric_that_moves_with_units():
    top, bottom = make(40).plot.trace().axes
    assert top.get_ylabel() == "log evidence (nats)"
    assert "particles" in bottom.get_ylabel() and bottom.get_xlabel() == "iteration"
    assert top.get_ylim()[0] > -1000  # the climb of the first steps is cut off
    np.testing.assert_allclose(bottom.lines[0].get_ydata(), np.sqrt(np.arange(1, 101)), rtol=1e-6)


def test_trace_without_steps_says_so():
    post = make(40)
    post.trace = {}
    with pytest.raises(DataError, match="nothing that changes"):
        post.plot.trace()


def test_forest_draws_the_quantiles_and_splits_sites_of_another_scale():
    first, second = make(40).plot.forest().axes
    assert [t.get_text() for t in first.get_yticklabels()] == ["rate"]
    ninety, fifty = first.collections[:2]
    (segment,) = ninety.get_segments()
    np.testing.assert_allclose(segment[:, 0], [2.5 - 0.1 * 1.64485, 2.5 + 0.1 * 1.64485], rtol=1e-5)
    (segment,) = fifty.get_segments()
    np.testing.assert_allclose(segment[:, 0], [2.5 - 0.1 * 0.67449, 2.5 + 0.1 * 0.67449], rtol=1e-5)
    assert "50 scalars" in second.get_yticklabels()[0].get_text()


def test_forest_refuses_categories_and_unknown_sites():
    with pytest.raises(DataError, match="category"):
        make(40).plot.forest("kind")
    with pytest.raises(DataError, match="no site"):
        make(40).plot.forest(["rates"])


def test_ppc_shows_bars_for_counts_and_densities_for_numbers():
    post = make(60)
    visits, takings, rain = post.plot.ppc(n=20, seed=0).axes
    assert len(visits.patches) >= 6 and len(rain.patches) == 2
    assert sum(bar.get_height() for bar in rain.patches) == pytest.approx(1.0)
    assert rain.patches[1].get_height() == pytest.approx(1 / 3)
    assert len(takings.lines) == 21


def test_ppc_of_few_entries_shows_each_by_name_without_the_missing():
    axes = make(5).plot.ppc("takings", n=20, seed=0).axes[0]
    names = [t.get_text() for t in axes.get_yticklabels()]
    assert names == ["takings[0]", "takings[2]", "takings[3]", "takings[4]"]


def test_ppc_refuses_what_was_not_observed():
    with pytest.raises(DataError, match="Observed: visits, takings, rain"):
        make(5).plot.ppc("rate")


def test_a_picture_is_written_and_its_figure_closed(tmp_path):
    from matplotlib import pyplot

    file = tmp_path / "forest.png"
    figure = make(40).plot.forest(file=file)
    assert file.stat().st_size > 1000 and figure.axes
    assert not pyplot.get_fignums()


def test_axes_of_the_caller_are_drawn_into():
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2)
    assert make(40).plot.forest(["rate"], ax=axes[0]) is figure
    assert make(40).plot.ppc("rain", ax=axes[1], n=5, seed=0) is figure
    assert axes[0].collections and axes[1].patches
    with pytest.raises(DataError, match="expected 2 axes, one a panel, got 1"):
        make(40).plot.trace(ax=axes[0])


def test_a_density_integrates_to_one_and_is_that_of_scipy():
    from scipy import stats

    values = np.random.default_rng(0).normal(size=300)
    grid = np.linspace(-6, 6, 401)
    width = _bandwidth(values)
    got = _density(values, grid, width)
    expected = stats.gaussian_kde(values, width / values.std(ddof=1))(grid)
    assert np.trapezoid(got, grid) == pytest.approx(1.0, abs=1e-3)
    np.testing.assert_allclose(got, expected, atol=2e-3)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnsupportedError, match=r"factorppl\[plot\]"):
        make(40).plot.forest()
