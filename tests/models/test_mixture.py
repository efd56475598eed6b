"""Mixtures and counts with other zeros: log joints by SciPy, posteriors by quadrature, simulated truths."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit, logsumexp

from benchmarks.posteriordb.models import MODELS, data_folder, load
from ppl import (
    Bernoulli,
    Beta,
    Dirichlet,
    HalfNormal,
    Mixture,
    ModelError,
    Normal,
    latent,
    model,
    observe,
    plate,
)
from ppl.models import mixture, ordered_mixture, zero_inflated
from tests.models.joint_density import joint_density
from tests.quiet import quiet_fit

RNG = np.random.default_rng(11)
CENTRES = torch.tensor([-4.0, 0.0, 4.0], dtype=torch.float64)
ROWS = RNG.normal(size=(40, 1))


def points(n: int = 150, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Of three components of weights 0.5, 0.3, 0.2."""
    g = torch.Generator().manual_seed(seed)
    z = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), n, True, generator=g)
    spread = torch.tensor([0.5, 0.7, 0.8], dtype=torch.float64)
    return CENTRES[z] + spread[z] * torch.randn(n, generator=g, dtype=torch.float64), z


def one(program, data=None, **sizes):
    """A simulation of one data set: the bound model and its latents."""
    drawn = program.sample(1, data or {}, sizes=sizes or None, seed=2)
    graph = program.graph(data, sizes=sizes or None)
    seen = {v.name: drawn[v.name][0] for v in graph.role("observed")}
    bound = program.bind({**(data or {}), **seen})
    return bound, {v.name: drawn[v.name][0].double() for v in graph.latents}, seen


# ---- what the models are ----------------------------------------------------------------------------------------


def log_components(point) -> float:
    weight = stats.dirichlet.logpdf(point["weight"].numpy() / point["weight"].sum().item(), [1] * 3)
    return weight + stats.halfnorm.logpdf(point["spread"], scale=2).sum()


@pytest.mark.parametrize("dim", [None, 2])
def test_the_mixture_has_the_documented_density(dim):
    bound, point, seen = one(mixture(3, dim), point=5)
    z = point["z"].long()
    expected = log_components(point) + stats.norm.logpdf(point["centre"], 0, 5).sum()
    expected += point["weight"][z].log().sum().item()
    expected += stats.norm.logpdf(seen["x"], point["centre"][z], point["spread"][z]).sum()
    assert joint_density(bound, point) == pytest.approx(expected)


def test_the_ordered_mixture_has_the_documented_density():
    bound, point, seen = one(ordered_mixture(3), point=5)
    centre = point["first"] + torch.cat([torch.zeros(1), point["gap"].cumsum(0)])
    each = stats.norm.logpdf(seen["x"][:, None], centre, point["spread"])
    expected = log_components(point) + stats.norm.logpdf(point["first"], 0, 5)
    expected += stats.halfnorm.logpdf(point["gap"], scale=5).sum()
    expected += logsumexp(each + point["weight"].log().numpy(), -1).sum()
    assert joint_density(bound, point) == pytest.approx(float(expected))


def log_counts(law, zeros, y, base, effect, absent, size=None):
    """``log p(count)`` of all rows together; parameters broadcast in front of the rows."""
    mean = np.exp(base + ROWS[:, 0] * effect)
    gate = expit(absent)
    known = stats.poisson(mean) if law == "poisson" else stats.nbinom(size, size / (size + mean))
    if zeros == "inflated":
        p = (1 - gate) * known.pmf(y) + gate * (y == 0)
    else:
        p = np.where(y == 0, gate, (1 - gate) * known.pmf(y) / known.sf(0))
    return np.log(p).sum(-1)


@pytest.mark.parametrize("zeros", ["inflated", "hurdle"])
@pytest.mark.parametrize("law", ["poisson", "negative_binomial"])
def test_counts_have_the_documented_density(law, zeros):
    bound, point, seen = one(zero_inflated(law, zeros), {"x": ROWS})
    base, absent, effect = (point[n].numpy() for n in ("base", "absent", "effect"))
    size = point["size"].numpy() if "size" in point else None
    expected = log_counts(law, zeros, seen["count"].numpy(), base, effect[0], absent, size)
    expected += stats.norm.logpdf([base, absent], 0, 2).sum() + stats.norm.logpdf(effect[0])
    if size is not None:
        expected += stats.lognorm.logpdf(size, 1, scale=np.e)
    assert joint_density(bound, point) == pytest.approx(float(expected))


def test_unknown_laws_are_refused():
    with pytest.raises(ModelError, match=r"law.*poisson, negative_binomial.*'poison'"):
        zero_inflated("poison").graph({"x": ROWS})


# ---- posteriors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", ["inflated", "hurdle"])
def test_counts_agree_with_quadrature(zeros):
    mean = np.exp(0.8 + 0.5 * ROWS[:, 0])
    y = np.random.default_rng(3).poisson(mean) * (np.random.default_rng(4).random(40) > 0.4)
    grid = np.meshgrid(
        np.linspace(-0.8, 2.2, 61), np.linspace(-1.0, 2.0, 61), np.linspace(-3.0, 2.0, 61),
        indexing="ij",
    )  # fmt: skip
    base, effect, absent = (g.reshape(-1) for g in grid)
    log = log_counts("poisson", zeros, y, base[:, None], effect[:, None], absent[:, None])
    log += stats.norm.logpdf(base, 0, 2) + stats.norm.logpdf(absent, 0, 2)
    log += stats.norm.logpdf(effect)
    weight = np.exp(log - logsumexp(log))
    posterior = quiet_fit(zero_inflated("poisson", zeros), {"x": ROWS, "count": y})
    step = np.log(3 / 60) * 2 + np.log(5 / 60)
    assert posterior.log_evidence.value == pytest.approx(logsumexp(log) + step, abs=0.03)
    for name, values in (("base", base), ("effect", effect), ("absent", absent)):
        centre = weight @ values
        sd = np.sqrt(weight @ (values - centre) ** 2)
        assert abs(float(posterior.mean(name).squeeze()) - centre) < 0.05 * sd
        assert abs(np.log(float(posterior.sd(name).squeeze()) / sd)) < 0.05


def test_negative_binomial_counts_cover_the_truth():
    program = zero_inflated("negative_binomial")
    x = np.random.default_rng(5).normal(size=(400, 1))
    mean, g = np.exp(1.5 + 0.6 * x[:, 0]), np.random.default_rng(6)
    y = g.poisson(g.gamma(2.0, mean / 2.0)) * (g.random(400) > 0.3)
    posterior = quiet_fit(program, {"x": x, "count": y})
    truth = {"base": 1.5, "effect": 0.6, "absent": np.log(0.3 / 0.7), "size": 2.0}
    for name, value in truth.items():
        apart = (posterior.mean(name).squeeze() - value) / posterior.sd(name).squeeze()
        assert abs(float(apart)) < 3.5, name


@pytest.mark.parametrize("seed, restarts", [(0, 1), (1, 1), (2, 4)])
def test_simulated_components_are_found(seed, restarts):
    x, z = points()
    found = quiet_fit(mixture(), {"x": x}, seed=seed, restarts=restarts).relabelled(by="centre")
    shares = torch.bincount(z, minlength=3).double() / len(z)
    for name, truth in (("centre", CENTRES), ("weight", shares)):
        assert ((found.mean(name) - truth).abs() < 4 * found.sd(name)).all()
    assert float((found.probs("z").argmax(-1) == z).double().mean()) > 0.98


def test_components_in_two_dimensions_are_found():
    x, z = points(90, seed=3)
    data = torch.stack([x, torch.where(z == 1, 4.0, 0.0) + points(90, seed=4)[0] / 4], -1)
    found = quiet_fit(mixture(k=3, dim=2), {"x": data}).relabelled()
    own = torch.stack([data[z == c].mean(0) for c in range(3)])
    apart = torch.cdist(found.mean("centre"), own)
    assert apart.amin(0).max() < 0.3
    assert apart.argmin(0).unique().numel() == 3


@model
def summed():
    """The mixture with the component of each point summed out by its law."""
    weight = latent("weight", Dirichlet(torch.ones(3)))
    centre = latent("centre", Normal(0.0, 5.0), shape=3)
    spread = latent("spread", HalfNormal(2.0), shape=3)
    with plate("point"):
        observe("x", Mixture(weight, Normal(centre, spread)))


def test_labelled_and_summed_mixtures_are_one_model():
    x, _ = points()
    fits = [quiet_fit(program, {"x": x}) for program in (mixture(), summed)]
    evidence = [p.log_evidence.value for p in fits]
    assert evidence[0] == pytest.approx(evidence[1], abs=0.1)
    labelled, total = (p.relabelled(by="centre") for p in fits)
    for name in ("centre", "spread", "weight"):
        assert torch.allclose(labelled.mean(name), total.mean(name), atol=0.03)
        assert torch.allclose(labelled.sd(name), total.sd(name), rtol=0.15)


def test_sampled_components_agree_with_enumerated_ones():
    x = points(6, seed=1)[0]
    data = {"x": torch.cat([x, torch.tensor([1.9, -2.1], dtype=torch.float64)])}
    exact = quiet_fit(ordered_labels, data)
    sampled = quiet_fit(ordered_labels, data, enumerate_up_to=1, particles=60, max_iters=40)
    assert abs(exact.log_evidence.value - sampled.log_evidence.value) < 0.15
    assert torch.allclose(exact.probs("z"), sampled.probs("z"), atol=0.06)
    for name in ("low", "high", "share"):
        assert abs(float(exact.mean(name) - sampled.mean(name)) / exact.sd(name)) < 0.15


@model
def ordered_labels():
    """Two components of known spread, told apart by their priors."""
    low, high = latent("low", Normal(-3.0, 1.0)), latent("high", Normal(3.0, 1.0))
    share = latent("share", Beta(2.0, 2.0))
    centre = torch.stack([low, high])
    with plate("point"):
        z = latent("z", Bernoulli(share))
        observe("x", Normal(centre[z], 1.0))


def test_the_mixture_of_posteriordb_agrees_with_its_reference():
    folder, name = data_folder(), "low_dim_gauss_mix-low_dim_gauss_mix"
    if folder is None:
        pytest.skip("no folder posteriordb with references in $PPL_DATA or ../shared/data")
    posterior = quiet_fit(MODELS[name].model, load(folder, name))
    assert not posterior.diagnostics.warnings
    reference = json.loads((folder / name / "reference.json").read_text())["params"]
    for site in ("mu", "sigma", "theta"):
        for i, (mean, sd) in enumerate(
            zip(posterior.mean(site).reshape(-1), posterior.sd(site).reshape(-1), strict=True)
        ):
            known = reference[site if site == "theta" else f"{site}[{i + 1}]"]
            assert abs(float(mean) - known["mean"]) < 0.1 * known["sd"]
            assert abs(np.log(float(sd) / known["sd"])) < 0.1


# ---- presence behind detections ---------------------------------------------------------------------------------


@model
def presence():
    """Sites that are visited several times; a species that is there may stay unseen."""
    there, seen = latent("there", Beta(1.0, 1.0)), latent("seen", Beta(2.0, 2.0))
    with plate("site"):
        present = latent("present", Bernoulli(there))
        with plate("visit"):
            observe("detected", Bernoulli(present * seen))


def test_presence_at_sites_without_detections_is_that_of_enumeration():
    y = np.zeros((12, 4))
    y[:4, 0], y[2:6, 2] = 1.0, 1.0
    posterior = quiet_fit(presence, {"detected": y})
    axis = (np.arange(300) + 0.5) / 300
    there, seen = (g.reshape(-1) for g in np.meshgrid(axis, axis, indexing="ij"))
    hits = y.sum(-1)[:, None]
    absent = (1 - there) * (hits == 0)
    present = there * seen**hits * (1 - seen) ** (4 - hits)
    log = np.log(absent + present).sum(0) + stats.beta.logpdf(seen, 2, 2)
    weight = np.exp(log - logsumexp(log))
    assert posterior.log_evidence.value == pytest.approx(logsumexp(log) - 2 * np.log(300), abs=0.02)
    expected = (present / (absent + present)) @ weight
    np.testing.assert_allclose(posterior.probs("present")[:, 1], expected, atol=0.01)
    assert posterior.probs("present")[:6, 1] == pytest.approx(1.0)
    assert 0.02 < expected[-1] < 0.5
