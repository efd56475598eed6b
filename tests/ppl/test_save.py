"""Save and load: the same posterior afterwards, from plain tensors, and errors in words."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch

from ppl.diagnostics import Diagnostics
from ppl.distributions import Bernoulli, HalfNormal, Normal
from ppl.errors import DataError, UnsupportedError
from ppl.marginals import Gaussian, Table, Weighted
from ppl.model import model
from ppl.plates import plate
from ppl.posterior import Evidence, Posterior
from ppl.save import load, save
from ppl.sites import deterministic, given, latent, observe, param


@model
def radon(floors: bool = True):
    county = plate("county")
    house = plate("house", within=county)
    base = latent("base", Normal(0.0, 3.0))
    spread = latent("spread", HalfNormal(1.0))
    shift = param("shift", 0.0)
    with county:
        level = latent("level", Normal(base, spread))
        latent("rural", Bernoulli(0.5))
        deterministic("double", 2 * level + shift)
    with house:
        effect = given("floor") if floors else 0.0
        observe("log_radon", Normal(level + effect, 1.0))


@model
def other():
    mu = latent("mu", Normal(0.0, 1.0))
    with plate("house"):
        observe("log_radon", Normal(mu, given("floor")))


def draw(n, streams):
    level = torch.randn(n, 2, generator=streams.of("x"), dtype=torch.float64)
    return {
        "base": level[:, 0],
        "spread": level[:, 1].exp(),
        "level": level,
        "rural": level.gt(0).double(),
    }


def data():
    return {
        "county": ["Cass", "Aitkin", "Cass", "Cass"],
        "log_radon": [1.0, math.nan, 0.5, 2.0],
        "floor": [0.0, 1.0, 1.0, 0.0],
    }


def fitted(source=None, **binding):
    points = torch.randn(20, 2, dtype=torch.float64)
    marginals = {
        "base": Gaussian(torch.tensor(1.0).double(), torch.tensor(0.1).double()),
        "spread": Gaussian(torch.tensor(1.0).double(), torch.tensor(0.2).double()),
        "level": Weighted(points, torch.full((20, 2), 0.05, dtype=torch.float64)),
        "rural": Table(torch.tensor([[0.5, 0.5], [0.1, 0.9]], dtype=torch.float64)),
    }
    post = Posterior(
        radon.bind(data() if source is None else source, **binding),
        marginals,
        method="qem",
        sampler=draw,
        log_evidence=Evidence(-31.8, math.nan, "estimate"),
        diagnostics=Diagnostics(
            {"level": torch.tensor([20.0, 10.0])},
            {"level": torch.tensor([0.1, math.nan])},
            False,
            42,
            0.7,
            ("not converged",),
            {"particles": {"level": 20}, 3: np.float64(2.0)},
        ),
        params={"shift": torch.tensor(0.25, dtype=torch.float64)},
        seed=7,
    )
    post.model, post.why = radon, "chosen by auto"
    post.trace = {"log_evidence": torch.tensor([-40.0, -31.8], dtype=torch.float64)}
    return post


@pytest.fixture
def saved(tmp_path):
    post, file = fitted(), tmp_path / "radon.ppl"
    post.save(file)
    return post, load(file, radon), file


def test_everything_but_the_draws_comes_back_unchanged(saved):
    before, after, _ = saved
    shown = ["base", "level", "rural", "shift"]
    assert str(after.summary(shown)) == str(before.summary(shown))
    torch.testing.assert_close(after.marginals["level"], before.marginals["level"], rtol=0, atol=0)
    for name in ("method", "why", "seed"):
        assert getattr(after, name) == getattr(before, name)
    for name in ("params", "trace"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name), rtol=0, atol=0)
    assert after.log_evidence[0] == -31.8 and math.isnan(after.log_evidence.se)
    assert after.diagnostics.warnings == ("not converged",) and after.diagnostics.iterations == 42
    assert after.diagnostics.notes == {"particles": {"level": 20}, "3": 2.0}
    assert after.bound.labels == before.bound.labels and after.bound.report == before.bound.report
    assert torch.equal(after.bound.masks["log_radon"], before.bound.masks["log_radon"])
    assert torch.equal(after.bound.maps["house", "county"], before.bound.maps["house", "county"])
    assert str(after).split("\n")[-5:] == str(before).split("\n")[-5:]


def test_draws_are_dealt_from_the_pool_jointly(saved):
    _, after, file = saved
    pool = torch.load(file, weights_only=True)["pool"]
    drawn = after.samples(2000)
    assert set(pool) == {"base", "spread", "level", "rural"} and len(pool["level"]) == 2000
    torch.testing.assert_close(drawn["level"].sort(0).values, pool["level"].sort(0).values)
    torch.testing.assert_close(drawn["base"], drawn["level"][:, 0])  # rows stay together
    torch.testing.assert_close(drawn["double"], 2 * drawn["level"] + 0.25)
    assert torch.equal(after.samples(50)["base"], after.samples(50)["base"])
    assert not torch.equal(after.samples(50, seed=1)["base"], after.samples(50, seed=2)["base"])
    assert len(after.samples(4500)["base"]) == 4500


def test_predictions_and_scores_work_without_the_data(saved):
    before, after, _ = saved
    assert after.predict(n=30).draws["log_radon"].shape == (30, 4)
    new = after.predict({"county": ["Aitkin", "New"], "floor": [0.0, 0.0]}, n=30)
    assert new.draws["log_radon"].shape == (30, 2)
    assert after.log_likelihood(n=30)["log_radon"].shape == (30, 4)
    assert math.isfinite(after.loo(n=200).elpd)
    with pytest.raises(UnsupportedError, match="loaded from a file"):
        after.resume()


def test_arviz_takes_a_loaded_posterior(saved):
    pytest.importorskip("xarray")
    from ppl.export import datasets

    assert datasets(saved[1], 10)["posterior"]["level"].dims == ("chain", "draw", "county")


def test_a_posterior_is_saved_twice_and_the_copy_again(saved, tmp_path):
    _, after, file = saved
    after.save(file)
    assert str(load(file, radon).summary(["level"])) == str(after.summary(["level"]))
    assert [f.name for f in tmp_path.iterdir()] == ["radon.ppl"]


def test_data_frames_with_columns_that_nobody_reads(tmp_path):
    pandas = pytest.importorskip("pandas")
    houses = pandas.DataFrame({**data(), "unused": ["x"] * 4})
    houses["county"] = pandas.Categorical(houses["county"], categories=["Cass", "Aitkin"])
    post = fitted(houses)
    save(post, tmp_path / "a.ppl")
    after = load(tmp_path / "a.ppl", radon)
    assert list(after.bound.labels["county"]) == ["Cass", "Aitkin"]
    assert b"unused" not in (tmp_path / "a.ppl").read_bytes()
    assert torch.equal(after.bound.values["floor"], post.bound.values["floor"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_of_the_run_is_kept(tmp_path, dtype):
    post = fitted(dtype=dtype)
    post.save(tmp_path / "a.ppl")
    assert load(tmp_path / "a.ppl", radon).bound.values["floor"].dtype == dtype


def test_a_view_does_not_drag_its_storage_into_the_file(tmp_path):
    wide = torch.zeros(4, 100_000, dtype=torch.float64)
    post = fitted({**data(), "floor": wide[:, 0]})
    post.save(tmp_path / "a.ppl")
    assert (tmp_path / "a.ppl").stat().st_size < 300_000


# ---- errors -----------------------------------------------------------------------------------


def test_another_models_file_is_refused_by_name_and_fingerprint(saved):
    _, _, file = saved
    for wrong in (other, radon(floors=False)):
        with pytest.raises(
            DataError, match="posterior of model 'radon' .fingerprint.*model that was fitted"
        ):
            load(file, wrong)


def test_missing_foreign_and_damaged_files_are_named(saved, tmp_path):
    _, _, file = saved
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "none.ppl", radon)
    bad = tmp_path / "bad.ppl"
    torch.save({"weights": torch.zeros(2)}, bad)
    with pytest.raises(DataError, match="something else than a posterior"):
        load(bad, radon)
    for content in (b"", b"not a posterior", file.read_bytes()[:3000]):
        bad.write_bytes(content)
        with pytest.raises(DataError, match="damaged, or not a posterior"):
            load(bad, radon)


def test_a_file_without_one_of_its_parts_is_damaged(saved, tmp_path):
    content = torch.load(saved[2], weights_only=True)
    del content["params"]
    torch.save(content, tmp_path / "a.ppl")
    with pytest.raises(DataError, match="damaged: KeyError"):
        load(tmp_path / "a.ppl", radon)


def test_a_newer_format_asks_for_an_update(saved, tmp_path):
    content = torch.load(saved[2], weights_only=True)
    torch.save({**content, "version": 99}, tmp_path / "a.ppl")
    with pytest.raises(DataError, match="format version 99"):
        load(tmp_path / "a.ppl", radon)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    for write in (torch.save, lambda x, f: f.write_bytes(pickle.dumps(x))):
        write({"format": Evil()}, tmp_path / "evil.ppl")
        with pytest.raises(DataError, match="not a posterior"):
            load(tmp_path / "evil.ppl", radon)
