"""The loop around every backend: seeds, stopping, restarts, interruption, checkpoints, learned constants."""

from __future__ import annotations

import warnings

import pytest
import torch

from ppl import (
    QEM,
    DataError,
    HalfNormal,
    ModelError,
    Normal,
    Stop,
    UnsupportedError,
    explain,
    given,
    infer,
    latent,
    model,
    observe,
    param,
    plate,
)


@model
def groups():
    mean, spread = latent("mean", Normal(0.0, 5.0)), latent("spread", HalfNormal(2.0))
    with plate("group"):
        level = latent("level", Normal(mean, spread))
        observe("y", Normal(level, given("noise")))


DATA = {"y": [1.0, 3.0, -0.5, 2.0, 4.0], "noise": [1.0, 0.5, 1.0, 0.7, 1.2]}


def fit(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return infer(*args, **{"method": "qem", **options})


def test_the_same_seed_gives_the_same_numbers():
    first, again, other = (fit(groups, DATA, seed=s, max_iters=30) for s in (1, 1, 2))
    assert torch.equal(first.mean("level"), again.mean("level"))
    assert torch.equal(first.samples(5)["mean"], again.samples(5)["mean"])
    assert not torch.equal(first.mean("level"), other.mean("level"))


def test_another_seed_gives_the_same_answer_within_monte_carlo_error():
    a, b = (fit(groups, DATA, seed=s) for s in (1, 2))
    for name in ("mean", "spread", "level"):
        apart = (a.mean(name) - b.mean(name)).abs() / a.sd(name)
        error = (1 / a.diagnostics.ess[name] + 1 / b.diagnostics.ess[name]).sqrt()
        assert (apart < 5 * error + 0.01).all(), (name, apart, error)


def test_float32_gives_the_same_answer():
    a, b = fit(groups, DATA, seed=1), fit(groups, DATA, seed=1, dtype=torch.float32)
    assert b.mean("level").dtype == torch.float32
    # Both have about 2000 effective particles of the spread, on which every level depends: 0.03 sd of noise each.
    assert ((a.mean("level") - b.mean("level")).abs() / a.sd("level")).max() < 0.15
    assert (a.sd("level") / b.sd("level")).log().abs().max() < 0.15


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine")
def test_cuda_gives_the_same_answer():
    a, b = fit(groups, DATA, seed=1), fit(groups, DATA, seed=1, device="cuda")
    assert b.mean("level").is_cuda
    assert ((a.mean("level") - b.mean("level").cpu()).abs() / a.sd("level")).max() < 0.1


def test_the_users_generator_is_left_alone(rng_untouched):
    fit(groups, DATA, seed=0, max_iters=5).samples(3)


def test_without_a_seed_the_global_generator_governs():
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        results.append(fit(groups, DATA, max_iters=5).mean("mean"))
    assert torch.equal(*results)


def test_it_stops_by_itself_and_says_so():
    posterior = fit(groups, DATA, seed=0)
    assert posterior.diagnostics.converged
    assert 40 <= posterior.diagnostics.iterations < 500
    assert len(posterior.trace["log_evidence"]) == posterior.diagnostics.iterations


def test_not_converging_is_a_warning_and_a_field():
    with pytest.warns(
        UserWarning, match=r"not converged after 5 iterations; continue with posterior.resume"
    ):
        posterior = infer(groups, DATA, method="qem", seed=0, max_iters=5)
    assert not posterior.diagnostics.converged


def test_resume_goes_on():
    posterior = fit(groups, DATA, seed=0, max_iters=5, tol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        longer = posterior.resume(7)
    assert longer.diagnostics.iterations == 12
    assert len(longer.trace["ess"]) == 12


def test_an_interrupted_run_returns_its_state():
    def interrupt(progress):
        if progress.iteration == 9:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted after 9 iterations"):
        posterior = infer(groups, DATA, method="qem", seed=0, callbacks=[interrupt])
    assert posterior.diagnostics.iterations == 9
    assert posterior.mean("level").shape == (5,)


def test_a_callback_sees_the_metrics_and_can_stop():
    seen = []

    def callback(progress):
        seen.append(progress.metrics["ess"])
        return Stop if progress.iteration == 4 else None

    posterior = fit(groups, DATA, seed=0, callbacks=[callback])
    assert len(seen) == posterior.diagnostics.iterations == 4


def test_a_checkpoint_is_continued(tmp_path):
    file = tmp_path / "run.ppl"
    straight = fit(groups, DATA, seed=3, max_iters=20, tol=0)

    def crash(progress):
        if progress.iteration == 8:
            raise RuntimeError("the power went off")

    with pytest.raises(RuntimeError, match="power"):
        infer(
            groups,
            DATA,
            method="qem",
            seed=3,
            max_iters=20,
            tol=0,
            checkpoint=file,
            callbacks=[crash],
        )
    resumed = fit(groups, DATA, seed=3, max_iters=20, tol=0, checkpoint=file)
    assert resumed.diagnostics.iterations == 20
    assert torch.equal(straight.trace["ess"], resumed.trace["ess"])
    assert torch.allclose(straight.mean("level"), resumed.mean("level"), rtol=1e-12)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    @model
    def other():
        latent("x", Normal(0.0, 1.0))

    file = tmp_path / "run.ppl"
    fit(groups, DATA, seed=3, max_iters=3, checkpoint=file)
    with pytest.raises(DataError, match="another model or method"):
        infer(other, method="qem", checkpoint=file)


def test_restarts_are_a_batch_axis_and_the_best_is_kept():
    posterior = fit(groups, DATA, seed=0, restarts=3)
    assert "of 3 restarts" in posterior.diagnostics.notes["restarts"]
    single = fit(groups, DATA, seed=0)
    assert ((posterior.mean("level") - single.mean("level")).abs() / single.sd("level")).max() < 0.1


def test_options_record_and_keywords_are_the_same():
    a = fit(groups, DATA, seed=0, particles=7, max_iters=5)
    b = fit(groups, DATA, seed=0, method=QEM(particles=7), max_iters=5)
    assert torch.equal(a.trace["ess"], b.trace["ess"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"particles": 0}, "at least 1"),
        ({"step": 2.0}, r"\(0, 1\]"),
        ({"step": "slow"}, "'schedule'"),
        ({"start": "posterior"}, "one of prior, standard, laplace, gbp"),
        ({"restarts": 0}, "at least 1"),
        ({"memory": "4 elephants"}, "'4GiB'"),
        ({"method": QEM(), "particles": 3}, "Put them inside"),
        ({"method": 7}, "expected a name"),
        ({"q": {"levl": "Gamma"}}, "Did you mean 'level'"),
        ({"q": {"level": "Gama"}}, "Did you mean 'Gamma'"),
        ({"groups": [("mean", "level")]}, "Group latents of one plate"),
        ({"particles": {"levle": 3}}, "not a latent"),
    ],
)
def test_bad_options_are_refused_in_words(options, message):
    with pytest.raises(ModelError, match=message):
        infer(groups, DATA, **{"method": "qem", **options})


def test_what_this_version_cannot_do_is_refused():
    with pytest.raises(UnsupportedError, match="minibatch="):
        infer(groups, DATA, method="exact", minibatch={"group": 2})


def test_a_method_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(UnsupportedError, match=r"there is no method 'svi'\. Did you mean .*ssvi"):
        infer(groups, DATA, method="svi")


def test_a_learned_constant_reaches_the_maximum_of_the_evidence():
    @model
    def empirical_bayes():
        spread = param("spread", 0.5, support=torch.distributions.constraints.positive)
        with plate("group"):
            level = latent("level", Normal(0.0, spread))
            observe("y", Normal(level, 1.0))

    y = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    posterior = fit(empirical_bayes, {"y": y}, seed=0, max_iters=300)
    best = (y.square().mean() - 1).sqrt()  # of N(y; 0, spread^2 + 1)
    assert abs(float(posterior.mean("spread")) / float(best) - 1) < 0.05


def test_progress_is_one_line_and_silent_when_not_asked_for(capsys):
    fit(groups, DATA, seed=0, max_iters=5)
    assert capsys.readouterr().err == ""
    fit(groups, DATA, seed=0, max_iters=5, progress=True)
    shown = capsys.readouterr().err
    assert "qem 1/5" in shown and "ess" in shown


def test_explain_says_why_a_method_cannot_run():
    @model
    def crossed():
        with plate("user", 3) as user:
            taste = latent("taste", Normal(0.0, 1.0))
        with plate("film", 4) as film:
            quality = latent("quality", Normal(0.0, 1.0))
        with user, film:
            observe("y", Normal(taste + quality, 1.0))

    table = str(explain(crossed, {"y": torch.zeros(3, 4)}))
    assert "taste" in table and "quality" in table
    assert "largest array" in str(explain(groups, DATA))
