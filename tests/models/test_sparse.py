"""Sparse regressions: draws, densities by hand, matrices, and fits that find the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from ppl import ModelError, infer
from ppl.models import (
    chain_sparse,
    group_sparse,
    local_level,
    nonnegative_sparse,
    one_bit,
    pose_graph_2d,
    sensed_image,
    sparse_binary,
    sparse_counts,
    sparse_linear,
    sparse_spectrum,
)
from ppl.models.sparse import sensing_matrix, simulated
from ppl.models.transforms import dct, image_of_wavelets
from tests.models.joint_density import joint_density

MATRIX = {"A": sensing_matrix(60, 100)}
GROUPED = {**MATRIX, "group": np.repeat(np.arange(25), 4)}
TALL = {"A": sensing_matrix(600, 200)}
SAMPLE = {"at": np.random.default_rng(0).permutation(128)[:64]}
IMAGE = {"at": np.arange(0, 256, 2), "sign": np.random.default_rng(0).choice([-1.0, 1.0], 256)}

# model, covariates, latents
CASES = [
    pytest.param(sparse_linear, MATRIX, {"x"}, id="linear"),
    pytest.param(nonnegative_sparse, MATRIX, {"x"}, id="nonnegative"),
    pytest.param(group_sparse, GROUPED, {"on", "x"}, id="group"),
    pytest.param(chain_sparse, MATRIX, {"on", "x"}, id="chain"),
    pytest.param(sparse_binary(link="probit"), MATRIX, {"x"}, id="probit"),
    pytest.param(sparse_binary(link="logit"), MATRIX, {"x"}, id="logit"),
    pytest.param(one_bit, MATRIX, {"x"}, id="one-bit"),
    pytest.param(sparse_counts, MATRIX, {"level", "x"}, id="counts"),
    pytest.param(sparse_spectrum(128), SAMPLE, {"x"}, id="spectrum"),
    pytest.param(sensed_image(16, levels=1), IMAGE, {"coarse", "detail1"}, id="image"),
]


@pytest.mark.parametrize("program, known, latents", CASES)
def test_a_model_is_drawn_and_fits_its_own_draws(program, known, latents):
    data, truth = simulated(program, known, seed=2)
    assert set(truth) == latents
    again, _ = simulated(program, known, seed=2)
    assert torch.equal(torch.as_tensor(data["y"]), torch.as_tensor(again["y"]))
    assert math.isfinite(joint_density(program.bind(data), truth))


@pytest.mark.parametrize("program, known, latents", CASES)
@pytest.mark.filterwarnings("ignore:amp")  # a few sweeps on little data
def test_message_passing_takes_every_model(program, known, latents):
    data, _ = simulated(program, known, seed=2)
    fitted = infer(program, data, method="amp", seed=0, max_iters=5)
    assert all(bool(fitted.mean(name).isfinite().all()) for name in latents)


def test_the_density_of_the_linear_model_is_the_formula():
    program = sparse_linear(rate=0.2, slab=2.0, noise=0.3)
    data, truth = simulated(program, MATRIX, seed=1)
    x, y = truth["x"].numpy(), data["y"].numpy()
    prior = np.where(x == 0, np.log(0.8), np.log(0.2) + stats.norm.logpdf(x, 0, 2)).sum()
    expected = prior + stats.norm.logpdf(y, MATRIX["A"] @ x, 0.3).sum()
    assert joint_density(program.bind(data), truth) == pytest.approx(expected, rel=1e-12)


def test_a_chain_comes_in_runs():
    program = chain_sparse(enter=0.05, stay=0.9)
    _, truth = simulated(program, {"A": np.zeros((1, 20_000))}, seed=0)
    on = truth["on"].numpy()
    after = on[1:][on[:-1] == 1].mean()
    assert after == pytest.approx(0.9, abs=0.02) and (truth["x"].numpy() != 0).mean() == on.mean()
    assert on.mean() == pytest.approx(0.05 / 0.15, abs=0.03)  # of the stationary chain


def test_an_image_is_seen_through_its_wavelets():
    program = sensed_image(16, levels=1, noise=1e-9)
    data, truth = simulated(program, IMAGE, seed=0)
    image = image_of_wavelets([truth["coarse"], truth["detail1"]])
    seen = dct(image.flatten() * torch.as_tensor(IMAGE["sign"]))[torch.as_tensor(IMAGE["at"])]
    assert torch.allclose(data["y"], seen, atol=1e-6)


# model to draw from, model to fit, covariates, largest error in dB (of the direction where no scale shows)
FITS = [
    pytest.param(
        sparse_linear(noise=0.01), sparse_linear, {"A": sensing_matrix(200, 400)}, -28, id="linear"
    ),
    pytest.param(
        nonnegative_sparse(noise=0.01),
        nonnegative_sparse,
        {"A": sensing_matrix(200, 400)},
        -30,
        id="nonnegative",
    ),
    pytest.param(
        group_sparse(rate=0.2, noise=0.01),
        group_sparse(rate=0.3),
        {"A": sensing_matrix(120, 400), "group": np.repeat(np.arange(40), 10)},
        -25,
        id="group",
    ),
    pytest.param(sparse_binary(slab=7.0), sparse_binary, TALL, -6, id="probit"),
    pytest.param(sparse_counts(slab=5.0), sparse_counts, TALL, -8, id="counts"),
    pytest.param(
        sparse_spectrum(512, noise=0.01),
        sparse_spectrum(512),
        {"at": np.random.default_rng(0).permutation(512)[:256]},
        -28,
        id="spectrum",
    ),
]


@pytest.mark.parametrize("source, program, known, worst", FITS)
@pytest.mark.filterwarnings("ignore:amp")
def test_fits_find_the_truth(source, program, known, worst):
    data, truth = simulated(source, known, seed=1)
    found, x = infer(program, data, method="amp", seed=0, max_iters=150).mean("x"), truth["x"]
    assert 10 * math.log10((found - x).square().sum() / x.square().sum()) < worst


@pytest.mark.filterwarnings("ignore:amp")  # without the groups it cannot settle
def test_groups_help_where_there_are_too_few_rows():
    groups = {"A": sensing_matrix(100, 400), "group": np.repeat(range(40), 10)}
    data, truth = simulated(group_sparse(rate=0.15, noise=0.01), groups, seed=3)
    fits = {
        program: infer(program, given, method="amp", seed=0, max_iters=150).mean("x")
        for program, given in (
            (group_sparse, data),
            (sparse_linear, {name: data[name] for name in ("A", "y")}),
        )
    }
    known, unknown = (float((x - truth["x"]).square().sum()) for x in fits.values())
    assert known < 0.01 * float(truth["x"].square().sum()) and known < 0.1 * unknown


@pytest.mark.parametrize("kind", ["independent", "conditioned", "correlated", "offset"])
def test_columns_have_mean_square_norm_one(kind):
    matrix = sensing_matrix(30, 50, kind, seed=3)
    assert np.square(matrix).sum() == pytest.approx(50)
    assert np.array_equal(matrix, sensing_matrix(30, 50, kind, seed=3))


def test_matrices_are_of_their_kind():
    values = np.linalg.svd(sensing_matrix(30, 50, "conditioned", strength=7), compute_uv=False)
    assert values[0] / values[-1] == pytest.approx(7)
    columns = sensing_matrix(5000, 3, "correlated", strength=0.8).T
    assert np.corrcoef(columns)[0, 1] == pytest.approx(0.8, abs=0.02)
    offset = sensing_matrix(300, 300, "offset", strength=2)
    assert offset.mean() / offset.std() == pytest.approx(2, abs=0.05)


def test_words_that_no_model_knows_are_refused():
    with pytest.raises(ModelError, match="link: expected one of probit, logit, got 'logistic'"):
        simulated(sparse_binary(link="logistic"), TALL)
    with pytest.raises(ModelError, match="kind: .* Did you mean 'correlated'"):
        sensing_matrix(3, 4, "corelated")
    with pytest.raises(ModelError, match="scales: expected one of given, learned, latent"):
        local_level(scales="learn").graph({})
    with pytest.raises(ModelError, match="noise: expected one of info, sd"):
        pose_graph_2d(noise="scale").graph({})
