"""Predictions of networks: mixtures of laws against counting, portions against one piece, files, statistics of batches."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from ppl import (
    Bernoulli,
    Binomial,
    Categorical,
    Cauchy,
    DataError,
    Normal,
    Poisson,
    UnsupportedError,
    deterministic,
    given,
    infer,
    latent,
    load,
    metrics,
    model,
    nn,
    observe,
    plate,
    portions,
    prediction,
    predictive,
)
from ppl.models.bnn import classifier, regression
from tests.ppl.network_posteriors import network_posterior, normalised


def images(rows=7, classes=3, size=6):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 1, size, size, generator=generator, dtype=torch.float64)
    return {"x": x, "label": torch.arange(rows) % classes}


def small_mlp(**options):
    return network_posterior(classifier(hidden=(8,), classes=3), images(), **options)


def by_hand(posterior, x, n, seed):
    """Probabilities ``[n, rows, classes]`` of an MLP, one draw after the other."""
    draws = posterior.samples(n, seed=seed)
    found = []
    for i in range(n):
        h = (x.flatten(1) @ draws["fc1.weight"][i].T + draws["fc1.bias"][i]).relu()
        found.append((h @ draws["fc2.weight"][i].T + draws["fc2.bias"][i]).softmax(-1))
    return torch.stack(found)


# ---- mixtures of laws --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_probabilities_are_the_mean_of_those_under_each_draw(density):
    posterior = small_mlp(density=density)
    new = images(5)["x"] + 1.0
    each = by_hand(posterior, new, 12, seed=3)
    found = posterior.predict({"x": new}, n=12, seed=3)
    torch.testing.assert_close(found.probs("label"), each.mean(0))
    torch.testing.assert_close(found.entropy("label"), metrics.entropy(each.mean(0)))
    torch.testing.assert_close(found.mutual_information("label"), metrics.mutual_information(each))
    # Counting labels agrees within five standard errors of a share.
    many = posterior.predict({"x": new}, n=4000, seed=4)
    counted = torch.stack([(many.samples()["label"] == k).double().mean(0) for k in range(3)], -1)
    assert (counted - many.probs("label")).abs().max() < 5 * 0.5 / 4000**0.5


def test_moments_of_a_regression_are_those_of_the_mixture_of_gaussians():
    x = torch.linspace(-1, 1, 5, dtype=torch.float64).reshape(-1, 1)
    posterior = network_posterior(regression(hidden=(6,), noise=0.7), {"x": x, "y": x[:, 0]})
    found = posterior.predict(n=9, seed=2)
    draws = posterior.samples(9, seed=2)
    loc = []
    for i in range(9):
        h = (x @ draws["fc1.weight"][i].T + draws["fc1.bias"][i]).relu()
        loc.append((h @ draws["fc2.weight"][i].T + draws["fc2.bias"][i])[:, 0])
    loc = torch.stack(loc)
    torch.testing.assert_close(found.mean("y"), loc.mean(0))
    torch.testing.assert_close(found.sd("y"), (loc.var(0, correction=0) + 0.7**2).sqrt())
    terms = posterior.log_likelihood(n=9, seed=2)["y"]
    direct = np.log(stats.norm(loc, 0.7).pdf(x[:, 0].numpy()).mean(0)).mean()
    assert metrics.log_predictive_density(terms) == pytest.approx(direct)
    low, high = found.interval("y", 0.8)
    assert (low < high).all()


@model
def counts():
    level = latent("level", Normal(0.0, 1.0))
    with plate("row"):
        observe("hits", Binomial(5, logits=level + given("x")))
        observe("yes", Bernoulli(logits=level * given("x")))
        observe("calls", Poisson(level.exp()))
        observe("wild", Cauchy(level, 1.0))
        observe("pair", Normal(level, torch.tensor([1.0, 2.0])))


@pytest.fixture(scope="module")
def counted():
    rows = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    data = {"x": rows, "hits": [1, 2, 3], "yes": [0, 1, 1], "calls": [0, 1, 2], "wild": [0.0, 1, 2]}
    posterior = network_posterior(counts, data | {"pair": torch.zeros(3, 2)}, spread=1.0)
    level = posterior.samples(50, seed=1)["level"].numpy()[:, None]
    return posterior.predict(n=50, seed=1), level, rows.numpy()


def test_tables_of_every_finite_family_are_averaged(counted):
    found, level, x = counted
    binomial = stats.binom(5, 1 / (1 + np.exp(-(level + x))))
    table = np.stack([binomial.pmf(k).mean(0) for k in range(6)], -1)
    torch.testing.assert_close(found.probs("hits"), torch.as_tensor(table))
    torch.testing.assert_close(found.mean("hits"), torch.as_tensor(binomial.mean().mean(0)))
    variance = binomial.var().mean(0) + binomial.mean().var(0)
    torch.testing.assert_close(found.sd("hits"), torch.as_tensor(np.sqrt(variance)))
    p = 1 / (1 + np.exp(-level * x))
    torch.testing.assert_close(found.probs("yes")[:, 1], torch.as_tensor(p.mean(0)))
    h = stats.entropy(np.stack([p, 1 - p]), axis=0).mean(0)
    whole = stats.entropy(np.stack([p.mean(0), 1 - p.mean(0)]), axis=0)
    torch.testing.assert_close(found.mutual_information("yes"), torch.as_tensor(whole - h))


def test_a_law_without_a_table_or_moments_is_answered_from_the_draws(counted):
    found, level, _ = counted
    draws = found.samples()
    torch.testing.assert_close(found.mean("wild"), draws["wild"].mean(0))  # Cauchy has no mean
    torch.testing.assert_close(found.sd("wild"), draws["wild"].std(0, correction=0))
    expected = torch.as_tensor(np.exp(level).mean())
    torch.testing.assert_close(found.mean("calls"), expected.expand(3))
    shares = found.probs("calls")  # infinitely many values: counted
    assert shares.shape[-1] == int(draws["calls"].max()) + 1
    with pytest.raises(DataError, match="mutual_information.*finitely many values"):
        found.mutual_information("calls")
    with pytest.raises(DataError, match="continuous"):
        found.entropy("wild")
    with pytest.raises(DataError, match="nothing was predicted for 'lable'"):
        found.entropy("lable")


def test_a_vector_of_a_plate_has_moments_for_each_entry(counted):
    found, level, _ = counted
    assert found.mean("pair").shape == found.sd("pair").shape == (3, 2)
    expected = np.sqrt(level.var() + np.array([1.0, 4.0]))
    torch.testing.assert_close(found.sd("pair"), torch.as_tensor(expected).expand(3, 2))


def test_tables_are_made_in_slices_of_draws(counted, monkeypatch):
    found, _, x = counted
    posterior_rows = {"x": x, "hits": [1, 2, 3], "yes": [0, 1, 1], "calls": [0, 1, 2]}
    data = posterior_rows | {"wild": [0.0, 1, 2], "pair": torch.zeros(3, 2)}
    posterior = network_posterior(counts, data, spread=1.0)
    monkeypatch.setattr(predictive, "_NUMBERS", 100)  # 5 draws of 18 probabilities
    again = posterior.predict(n=50, seed=1)
    for site in ("hits", "yes"):
        torch.testing.assert_close(again.probs(site), found.probs(site))
        torch.testing.assert_close(again.sd(site), found.sd(site))
        torch.testing.assert_close(again.mutual_information(site), found.mutual_information(site))
    monkeypatch.setattr(predictive, "_WORK", 100)  # too much work: counted from the labels drawn
    rough = posterior.predict(n=50, seed=1)
    torch.testing.assert_close(rough.probs("yes")[:, 1], rough.samples()["yes"].mean(0))


# ---- portions ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_memory(monkeypatch):
    monkeypatch.setattr(portions, "_MANY", 10)
    monkeypatch.setattr(portions, "_NUMBERS", 1500)
    monkeypatch.setattr(portions, "_ROWS", 10)


@model
def reported():
    net = nn.MLP(36, 8, 3)
    with plate("image"):
        logits = deterministic("logits", net(torch.flatten(given("x"))))
        observe("label", Categorical(logits=logits))


def test_portions_cover_all_draws_and_rows(tiny_memory):
    bound = network_posterior(classifier(hidden=(8,), classes=3), images(50)).bound
    assert portions._weights(bound) == 8 * 36 + 8 + 3 * 8 + 3
    cut = portions.portions(bound, 30)
    assert cut.draws == (4,) * 7 + (2,)
    assert cut.plate == "image"
    assert [len(r["image"]) for r in cut.rows] == [10] * 5  # 4 draws of 36 inputs each
    assert torch.equal(torch.cat([r["image"] for r in cut.rows]), torch.arange(50))
    assert portions.portions(bound, 3).draws == (3,)


def test_the_same_portions_give_what_one_piece_gives(tiny_memory, monkeypatch):
    """Cut along the data only: the draws of the weights are the same."""
    posterior = network_posterior(reported, images(50))
    cut = posterior.predict(n=4, seed=1, sites=["label", "logits"])
    terms = posterior.log_likelihood(n=4, seed=1)["label"]
    assert len(portions.portions(posterior.bound, 4).rows) > 3
    assert portions.portions(posterior.bound, 4).draws == (4,)
    monkeypatch.setattr(portions, "_NUMBERS", 2**24)
    whole = posterior.predict(n=4, seed=1, sites=["label", "logits"])
    torch.testing.assert_close(cut.probs("label"), whole.probs("label"))
    torch.testing.assert_close(cut.mutual_information("label"), whole.mutual_information("label"))
    torch.testing.assert_close(cut.samples()["logits"], whole.samples()["logits"])
    torch.testing.assert_close(terms, posterior.log_likelihood(n=4, seed=1)["label"])


def test_portions_of_draws_are_averaged_together(tiny_memory):
    posterior = network_posterior(reported, images(50), spread=1.0)
    found = posterior.predict(n=10, seed=1, sites=["label", "logits", "fc1.bias"])
    assert portions.portions(posterior.bound, 10).draws == (4, 4, 2)
    logits = found.samples()["logits"]
    assert logits.shape == (10, 50, 3)
    assert found.samples()["label"].shape == (10, 50)
    probs = logits.softmax(-1)
    torch.testing.assert_close(found.probs("label"), probs.mean(0))
    torch.testing.assert_close(found.mutual_information("label"), metrics.mutual_information(probs))
    bias = found.samples()["fc1.bias"]
    assert len(bias[:, 0].unique()) == 10, "portions share draws"
    # Labels of two portions of the data come from different random numbers.
    same = network_posterior(reported, {"x": torch.zeros(50, 36), "label": [0] * 50})
    labels = same.predict(n=4, seed=1).samples()["label"]
    rows = len(portions.portions(same.bound, 4).rows[0]["image"])
    assert not torch.equal(labels[:, :rows], labels[:, rows : 2 * rows])


def test_log_likelihood_of_new_rows_is_that_of_each_draw(tiny_memory):
    posterior = network_posterior(reported, images(4))
    new = images(60)
    terms = posterior.log_likelihood(new, n=4, seed=5)["label"]
    probs = by_hand(posterior, new["x"], 4, seed=5)
    hit = probs.take_along_dim(new["label"].expand(4, 60).unsqueeze(-1), -1).squeeze(-1)
    torch.testing.assert_close(terms, hit.log())


def test_weights_of_a_large_network_are_left_out_unless_asked_for(tiny_memory):
    posterior = small_mlp()
    assert posterior.predict().samples()["label"].shape == (30, 7)
    assert list(posterior.predict().samples()) == ["label"]
    assert posterior.log_likelihood()["label"].shape == (30, 7)
    asked = posterior.predict(n=6, sites=["fc1.weight"]).samples()
    assert asked["fc1.weight"].shape == (6, 8, 36)
    assert posterior.samples()["fc1.weight"].shape[0] == 30


def test_importance_weights_of_a_large_network_are_refused(tiny_memory):
    with pytest.raises(UnsupportedError, match="reweight: .* one outweighs all others"):
        small_mlp().reweight(10)


def test_a_small_network_and_any_other_model_keep_a_thousand_draws():
    found = small_mlp().predict()
    assert found.samples()["label"].shape == (1000, 7)
    assert "fc1.weight" in found.samples()
    for n in (0, 2.5):
        with pytest.raises(DataError, match=rf"n={n}: expected a whole number of draws"):
            small_mlp().predict(n=n)


@model
def families():
    user = plate("user")
    with user:
        net = nn.MLP(2, 3, 1)
    with plate("row", within=user):
        observe("y", Normal(net(given("x"))[0], 1.0))


def test_data_that_cannot_be_cut_are_taken_whole(tiny_memory, monkeypatch):
    x = torch.randn(6, 2, dtype=torch.float64)
    data = {"x": x, "y": x[:, 0], "user": ["a", "a", "b", "b", "b", "c"]}
    posterior = network_posterior(families, data)
    assert portions.portions(posterior.bound, 4).rows == (None,)
    found = posterior.predict(n=4, seed=1)
    monkeypatch.setattr(portions, "_MANY", 10**6)
    torch.testing.assert_close(found.mean("y"), posterior.predict(n=4, seed=1).mean("y"))


def test_a_small_network_on_many_data_deals_one_set_of_draws(monkeypatch):
    """What a file or an importance sampler has drawn together is not drawn again for each portion."""
    posterior = network_posterior(reported, images(50), spread=1.0)
    whole = posterior.predict(n=20, seed=1)
    terms = posterior.log_likelihood(n=20, seed=1)["label"]
    monkeypatch.setattr(portions, "_NUMBERS", 3000)
    monkeypatch.setattr(portions, "_ROWS", 10)
    cut = portions.portions(posterior.bound, 20)
    assert cut.draws == (8, 8, 4) and len(cut.rows) == 5
    found = posterior.predict(n=20, seed=1)
    for name in ("fc1.weight", "logits"):
        torch.testing.assert_close(found.samples()[name], whole.samples()[name])
    torch.testing.assert_close(found.probs("label"), whole.probs("label"))
    torch.testing.assert_close(posterior.log_likelihood(n=20, seed=1)["label"], terms)


@pytest.mark.parametrize("many", [10, 10_000], ids=["large", "small"])
def test_memory_does_not_grow_with_draws_and_data(monkeypatch, many):
    """The largest array that any step makes stays within the bound."""
    posterior = network_posterior(classifier(hidden=(40,), classes=3), images(400))
    monkeypatch.setattr(portions, "_MANY", many)
    monkeypatch.setattr(portions, "_NUMBERS", 20_000)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes() // 8)
            return out

    new = torch.randn(3000, 1, 6, 6, dtype=torch.float64)
    with Watch():
        posterior.predict({"x": new}, n=60)
    assert (
        largest <= 3000 * 60
    )  # the labels that come out; a hidden layer of all would be 40 times that


# ---- statistics of batches, files, other backends ----------------------------------------------------------------------


def test_statistics_of_batch_norms_go_where_the_posterior_goes(tmp_path):
    from dataclasses import replace

    x = torch.randn(5, 4, dtype=torch.float64)
    posterior = network_posterior(normalised, {"x": x, "label": [0, 1, 0, 1, 0]})
    kept = {"bn.mean": torch.tensor([1.0, -1.0, 0.5]), "bn.variance": torch.tensor([4.0, 1.0, 0.2])}
    kept = {k: v.double() for k, v in kept.items()}
    posterior.bound = replace(posterior.bound, values={**posterior.bound.values, **kept})
    fitted = posterior.predict(n=5, seed=1).probs("label")
    new = posterior.predict({"x": x}, n=5, seed=1)
    torch.testing.assert_close(new.probs("label"), fitted)
    own = posterior.predict(
        {"x": x, "bn.mean": torch.zeros(3), "bn.variance": torch.ones(3)}, n=5, seed=1
    )
    assert not torch.allclose(own.probs("label"), fitted)
    posterior.save(tmp_path / "net.ppl")
    again = load(tmp_path / "net.ppl", normalised)
    torch.testing.assert_close(again.predict({"x": x}, n=5, seed=1).probs("label"), fitted)
    torch.testing.assert_close(again.to_module()(x), posterior.to_module()(x))


def test_a_fit_predicts_what_it_has_learned():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    label = (x[:, 0] > 0).long()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = infer(
            classifier(hidden=(5,), classes=2), {"x": x, "label": label}, method="vi", seed=0,
            max_iters=400,
        )  # fmt: skip
    far = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    found = posterior.predict({"x": far}, n=200)
    assert found.probs("label").argmax(-1)[:2].tolist() == [1, 0]
    assert found.entropy("label")[2] > found.entropy("label")[:2].max()
    assert (found.mutual_information("label") <= found.entropy("label") + 1e-12).all()
    assert math.isclose(float(found.probs("label").sum()), 3.0, rel_tol=1e-9)


def test_quantiles_of_more_numbers_than_torch_takes(counted, monkeypatch):
    found = counted[0]
    expected = found.quantile("pair", [0.1, 0.5])
    torch.testing.assert_close(
        expected,
        torch.quantile(found.samples()["pair"], torch.tensor([0.1, 0.5]).double(), 0),
    )
    monkeypatch.setattr(prediction, "_CHUNK", 120)  # two columns of 50 draws at a time
    torch.testing.assert_close(found.quantile("pair", [0.1, 0.5]), expected)
    torch.testing.assert_close(found.quantile("pair", 0.5), expected[1])
