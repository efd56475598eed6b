"""Marginals that are zero with certainty at most places: moments, draws, files, text, and what refuses them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ppl import (
    Categorical,
    DataError,
    Normal,
    UnsupportedError,
    given,
    infer,
    latent,
    load,
    model,
    nn,
    observe,
    plate,
)
from ppl import marginals as mg
from ppl.posterior import Independent
from ppl.streams import Streams
from tests.ppl.network_posteriors import network_posterior

SHAPE = (3, 2, 2)
SPARSE = mg.SparseGaussian(
    torch.tensor([1, 5, 11]),
    torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64),
    torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
    SHAPE,
)
LEVELS = torch.tensor([0.1, 0.5, 0.975], dtype=torch.float64)


def dense():
    loc, scale = (torch.zeros(12, dtype=torch.float64) for _ in range(2))
    loc[SPARSE.index], scale[SPARSE.index] = SPARSE.loc, SPARSE.scale
    return mg.Gaussian(loc.reshape(SHAPE), scale.reshape(SHAPE))


@pytest.mark.parametrize("question", ["mean", "sd", "entry_sd"])
def test_moments_are_those_of_gaussians_without_spread_elsewhere(question):
    found = getattr(mg, question)(SPARSE)
    torch.testing.assert_close(found, getattr(mg, question)(dense()))


def test_quantiles_of_what_is_certain_are_zero():
    found = mg.quantile(SPARSE, LEVELS)
    assert found.shape == (3, *SHAPE)
    torch.testing.assert_close(found, mg.quantile(dense(), LEVELS))
    ends = mg.quantile(SPARSE, torch.tensor([0.0, 1.0]))
    assert ends[0, 0, 0].tolist() == [0.0, -torch.inf]


def test_inclusion_is_the_support():
    found = mg.inclusion(SPARSE)
    assert found.shape == SHAPE
    assert found.reshape(-1).nonzero().squeeze(-1).tolist() == SPARSE.index.tolist()
    assert SPARSE.density == 3 / 12


def test_draws_are_zero_at_the_same_places_and_have_the_moments():
    draws = mg.draw(SPARSE, 20000, torch.Generator().manual_seed(0))
    assert draws.shape == (20000, *SHAPE)
    inactive = mg.inclusion(SPARSE) == 0
    assert (draws[:, inactive] == 0).all()
    error = (draws.mean(0) - mg.mean(SPARSE)).abs()
    assert (error <= 4 * mg.sd(SPARSE) / 20000**0.5).all()
    torch.testing.assert_close(draws.std(0), mg.sd(SPARSE), rtol=0.03, atol=0)


@pytest.mark.parametrize("count", [0, 1, 2, 6, 12, 100])
@pytest.mark.parametrize("marginal", [SPARSE, dense()], ids=["sparse", "dense"])
def test_the_first_scalars_are_those_of_the_whole(marginal, count):
    part = mg.first(marginal, count)
    torch.testing.assert_close(mg.mean(part), mg.mean(marginal).reshape(-1)[:count])
    torch.testing.assert_close(mg.sd(part), mg.sd(marginal).reshape(-1)[:count])


@pytest.mark.parametrize(
    "marginal",
    [
        SPARSE,
        dense(),
        mg.Table(torch.tensor([[0.2, 0.8], [1.0, 0.0]], dtype=torch.float64)),
        mg.Weighted(
            torch.tensor([[[1.0, 2], [3, 4]], [[5, 6], [7, 8]]], dtype=torch.float64),
            torch.tensor([[0.25, 1.0], [0.75, 0.0]], dtype=torch.float64),
        ),
        mg.JointGaussian(torch.ones(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)),
    ],
    ids=lambda m: type(m).__name__,
)
def test_an_independent_sampler_draws_each_site_from_its_marginal(marginal):
    draws = Independent({"a": marginal, "b": SPARSE})(4000, Streams(1))
    mean, sd = mg.mean(marginal), mg.sd(marginal)
    assert draws["a"].shape == (4000, *mean.shape)
    assert ((draws["a"].mean(0) - mean).abs() <= 4 * sd / 4000**0.5 + 1e-12).all()
    again = Independent({"b": SPARSE})(4000, Streams(1))
    assert torch.equal(draws["b"], again["b"])  # a site's draws do not depend on the others


def test_points_of_one_element_are_drawn_together():
    points = torch.tensor([[[1.0, 2.0]], [[5.0, 6.0]]])
    draws = mg.draw(mg.Weighted(points, torch.tensor([[0.5], [0.5]])), 50)
    assert (draws[..., 1] - draws[..., 0] == 1).all() and len(draws.unique()) == 4


def test_a_mixture_is_not_drawn_element_by_element():
    mixture = mg.GaussianMixture(torch.zeros(2), torch.ones(2), torch.ones(2) / 2)
    with pytest.raises(ValueError, match="posterior.samples"):
        mg.draw(mixture, 3)


# ---- in a posterior ----------------------------------------------------------------------------------------------------


@model
def digits():
    net = nn.MLP(6, 5, 3)
    with plate("image"):
        observe("label", Categorical(logits=net(given("x"))))


def data(rows=4):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return {"x": x, "label": torch.arange(rows) % 3}


@pytest.fixture(scope="module")
def posterior():
    return network_posterior(digits, data(), 0.3, seed=2)


def test_a_posterior_answers_as_for_any_other_site(posterior):
    m = posterior.marginal("fc1.weight")
    assert posterior.mean("fc1.weight").shape == (5, 6)
    assert torch.equal(posterior.inclusion("fc1.weight"), mg.inclusion(m))
    low, high = posterior.interval("fc1.weight", 0.9)
    assert (low <= high).all()
    assert (low[mg.inclusion(m) == 0] == 0).all()
    with pytest.raises(DataError, match="no point mass"):
        posterior.inclusion("fc1.bias")
    with pytest.raises(DataError, match="continuous"):
        posterior.probs("fc1.weight")


def test_a_file_keeps_the_active_weights_and_no_draws(posterior, tmp_path):
    posterior.save(tmp_path / "net.ppl")
    again = load(tmp_path / "net.ppl", digits)
    for name, m in posterior.marginals.items():
        torch.testing.assert_close(again.marginals[name], m)
    assert again.density == posterior.density
    mine, theirs = (p.samples(20, seed=3) for p in (posterior, again))
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(
        again.predict(n=10, seed=1).probs("label"), posterior.predict(n=10, seed=1).probs("label")
    )


def test_a_file_of_a_large_sparse_net_is_small(tmp_path):
    @model
    def wide():
        net = nn.MLP(200, 400, 3)
        with plate("image"):
            observe("label", Categorical(logits=net(given("x"))))

    fit = network_posterior(wide, {"x": torch.zeros(2, 200), "label": [0, 1]}, 0.02)
    fit.save(tmp_path / "net.ppl")
    # 24 bytes an active weight (index, mean, sd), 16 for each bias.
    active = sum(len(index) for index in fit.support.values())
    assert (tmp_path / "net.ppl").stat().st_size < 24 * active + 16 * 403 + 40_000


def test_continual_learning_and_importance_weights_refuse_it_in_words(posterior):
    with pytest.raises(UnsupportedError, match="zero with certainty, which no Gaussian says"):
        infer(digits, data(), method="vi", prior=posterior, max_iters=1)
    with pytest.raises(UnsupportedError, match="reweight: .*'fc1.weight'.*zero with certainty"):
        posterior.reweight(10)


def test_the_summary_of_a_few_elements_does_not_need_the_array(posterior, monkeypatch):
    @model
    def line():
        weight = latent("weight", Normal(0.0, 1.0), shape=(2000,))
        with plate("row"):
            observe("y", Normal((given("x") * weight).sum(), 1.0))

    fit = network_posterior(line, {"x": torch.ones(2, 2000), "y": [0.0, 1.0]}, 0.5)
    expected = mg.mean(fit.marginal("weight"))[:20].tolist()
    whole = mg.SparseGaussian.spread

    def small(m, values):
        assert m.shape[0] <= 20, "the whole array was made"
        return whole(m, values)

    monkeypatch.setattr(mg.SparseGaussian, "spread", small)
    shown = str(fit).splitlines()
    assert [line.split()[0] for line in shown[1:21]] == [f"weight[{i}]" for i in range(20)]
    assert [float(line.split()[1]) for line in shown[1:21]] == pytest.approx(expected, abs=0.01)


def test_the_print_of_a_network_has_a_line_for_each_array(posterior):
    lines = str(posterior).splitlines()
    assert lines[0].split() == ["weights", "shape", "active", "mean", "|mean|", "median", "sd"]
    m = posterior.marginal("fc1.weight")
    cells = next(line for line in lines if line.startswith("fc1.weight")).split("  ")
    cells = [c.strip() for c in cells if c.strip()]
    size, sd = f"{m.loc.abs().mean():.3g}", f"{m.scale.median():.3g}"
    assert cells == ["fc1.weight", "5 x 6", f"{len(m.index)} of 30", size, sd]
    assert any(line.startswith("fc2.bias") for line in lines)
    assert "... and" not in str(posterior)
    noted = {"nll": "0.5 nats", "kl": "12 nats", "temperature": "1", "data": "N = 4 (image)"}
    posterior.diagnostics = replace(posterior.diagnostics, notes=noted)
    assert "N = 4 (image); NLL 0.5 nats; KL 12 nats; temperature 1" in str(posterior)
