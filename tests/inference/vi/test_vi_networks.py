"""Variational inference of networks from end to end: layers, batches, resuming, what is refused, what is reported."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from ppl import (
    DataError,
    ModelError,
    Normal,
    NumericalError,
    Stop,
    UnsupportedError,
    explain,
    given,
    infer,
    model,
    nn,
    observe,
    plate,
)
from ppl.backend import Settings
from ppl.inference import vi
from ppl.inference.networks.records import Problem, horizon
from ppl.models.bnn import classifier, regression
from ppl.streams import Streams
from tests.conjugate import normal_mean

ESTIMATORS = ["local", "flipout", "pathwise", "natural"]


def blobs(n=240, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    centre = 3.0 * torch.randn(classes, 4, generator=g)
    label = torch.randint(classes, (n,), generator=g)
    return {"x": centre[label] + torch.randn(n, 4, generator=g), "label": label}


def images(n=90, size=12, seed=0):
    """Bars along one of two directions."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(2, (n,), generator=g)
    x = 0.3 * torch.randn(n, 1, size, size, generator=g)
    for i, k in enumerate(label.tolist()):
        at = int(torch.randint(size, (), generator=g))
        if k:
            x[i, 0, at] += 2.0
        else:
            x[i, 0, :, at] += 2.0
    return {"x": x, "label": label}


def quiet(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return infer(*args, method="vi", seed=0, **kwargs)


def accuracy(posterior, data):
    found = posterior.predict({"x": data["x"]}, n=30).probs("label")
    return float((found.argmax(-1) == data["label"]).double().mean())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_classifier_learns_from_batches(estimator):
    data, new = blobs(), blobs(seed=0)
    net = classifier(hidden=(16,), classes=3)
    options = {"minibatch": {"image": 40}, "max_iters": 400, "dtype": torch.float32}
    posterior = infer(net, data, method="vi", seed=0, estimator=estimator, **options)
    assert posterior.diagnostics.converged and posterior.diagnostics.warnings == ()
    assert posterior.mean("fc1.weight").dtype == torch.float32
    assert accuracy(posterior, new) > 0.95
    assert posterior.log_evidence.kind == "bound"
    assert len(posterior.trace["nll"]) == 400
    assert float(posterior.trace["nll"][-50:].mean()) < 0.3


def test_auto_is_local_for_networks_and_draws_elsewhere():
    net = classifier(hidden=(4,), classes=3)
    problem = vi.prepare(net.bind(blobs()), vi.VI(), Settings(Streams(0)))
    assert isinstance(problem, Problem) and set(problem.estimators) == {"local"}
    general = vi.prepare(normal_mean.bind({"y": [1.0, 2.0]}), vi.VI(), Settings(Streams(0)))
    assert not isinstance(general, Problem) and vi.VI().draw_count == 8
    one = quiet(normal_mean, {"y": [1.0, 2.0]}, max_iters=30)
    two = quiet(normal_mean, {"y": [1.0, 2.0]}, max_iters=30, estimator="pathwise")
    assert torch.equal(one.mean("mean"), two.mean("mean"))


def test_both_codes_find_one_posterior():
    """The general code and that for networks maximise the same bound."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 2, generator=g, dtype=torch.float64)
    data = {"x": x, "y": x @ torch.tensor([1.0, -1.0]).double()}

    @model
    def line():
        layer = nn.Linear(2, 1, name="fc", prior=Normal(0.0, 1.0))
        with plate("row"):
            observe("y", Normal(layer(given("x"))[0], 0.7))

    general = infer(line, data, method="vi", seed=0, estimator="total", tol=0.05)
    network = infer(line, data, method="vi", seed=0, max_iters=2000)
    for name in ("fc.weight", "fc.bias"):
        sd = general.sd(name)
        assert ((network.mean(name) - general.mean(name)) / sd).abs().max() < 0.2
        assert (network.sd(name) / sd).log().abs().max() < 0.1
    gap = network.log_evidence.value - general.log_evidence.value
    assert abs(gap) < 4 * (network.log_evidence.se + general.log_evidence.se) + 0.1


@pytest.mark.parametrize("estimator", ["local", "flipout", "natural"])
def test_convolutions_learn(estimator):
    data = images()
    net = classifier(net="lenet", classes=2)
    options = {"minibatch": {"image": 30}, "max_iters": 250, "tempering": 0.1}
    posterior = quiet(net, data, estimator=estimator, dtype=torch.float32, **options)
    assert accuracy(posterior, data) > 0.9
    assert "not a posterior" in posterior.diagnostics.warnings[0]


@model
def small_resnet(width=4, classes=2):
    with plate("image"):
        net = nn.ResNet18(classes, channels=1, width=width, plates=())
        from ppl import Categorical

        observe("label", Categorical(logits=net(given("x"))))


def test_a_residual_network_with_batch_norms_trains_and_its_statistics_are_estimated_anew():
    data = images(64, 8)
    options = {"minibatch": {"image": 32}, "max_iters": 60, "tempering": 0.01}
    posterior = quiet(small_resnet, data, dtype=torch.float32, learning_rate=0.1, **options)
    values = posterior.bound.values
    assert "statistics were estimated anew" in str(posterior.diagnostics.notes["batch norms"])
    assert not torch.allclose(values["bn1.mean"], torch.zeros(4))
    assert bool((values["layer4.1.bn2.variance"] > 0).all())
    assert posterior.trace["nll"][-10:].mean() < 0.6 * posterior.trace["nll"][:3].mean()
    assert accuracy(posterior, data) > 0.8  # new data are bound anew, and keep the statistics
    weights = [n for n, v in posterior.marginals.items() if n.endswith("conv1.weight")]
    assert len(weights) == 9


@model
def normed():
    layer, norm = nn.Linear(2, 2, name="fc", bias=False), nn.BatchNorm(2, name="bn")
    with plate("row"):
        observe("y", Normal(norm(layer(given("x"))).sum(), 1.0))


def test_statistics_are_those_of_the_inputs_of_the_norm():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 2, generator=g, dtype=torch.float64) * torch.tensor([1.0, 3.0]) + 2.0
    posterior = quiet(normed, {"x": x, "y": torch.zeros(400)}, max_iters=30)
    draws = posterior.samples(2000)["fc.weight"]
    out = torch.einsum("ri,soi->sro", x, draws)
    error = out.mean(1).std(0) / 32**0.5
    values = posterior.bound.values
    assert ((values["bn.mean"] - out.mean((0, 1))).abs() < 5 * error).all()
    expected = out.var(1, correction=0)
    error = expected.std(0) / 32**0.5
    assert ((values["bn.variance"] - expected.mean(0)).abs() < 5 * error).all()


def test_lifted_modules_and_families_are_fitted_by_weight_draws():
    module = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    @model
    def lifted():
        net = nn.lift("net", module)
        with plate("row"):
            observe("y", Normal(net(given("x"))[0], 0.3))

    g = torch.Generator().manual_seed(0)
    x = torch.randn(120, 2, generator=g, dtype=torch.float64)
    data = {"x": x, "y": x[:, 0] - 0.5 * x[:, 1]}
    posterior = quiet(lifted, data, minibatch={"row": 40}, max_iters=500)
    fit = posterior.predict({"x": x}, n=60).mean("y")
    assert float((fit - data["y"]).square().mean()) < 0.15 * float(data["y"].var())
    assert "lifted" in str(posterior.diagnostics.notes["layers"])

    @model
    def family():
        with plate("user") as user:
            layer = nn.Linear(2, 1, name="fc", prior=Normal(0.0, 1.0))
        with plate("row", within=user):
            observe("y", Normal(layer(given("x"))[0], 0.3))

    user = torch.arange(120) % 2
    y = torch.where(user == 0, x[:, 0], -2.0 * x[:, 1])
    posterior = quiet(family, {"x": x, "y": y, "user": user}, max_iters=800)
    expected = torch.tensor([[[1.0, 0.0]], [[0.0, -2.0]]]).double()
    assert torch.allclose(posterior.mean("fc.weight"), expected, atol=0.15)
    with pytest.raises(UnsupportedError, match="taken in batches"):
        quiet(family, {"x": x, "y": y, "user": user}, minibatch={"user": 1}, estimator="local")


def test_laplace_spike_and_mixture_priors_and_a_learned_noise():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(150, 3, generator=g, dtype=torch.float64)
    data = {"x": x, "y": x[:, 0] + 0.2 * torch.randn(150, generator=g, dtype=torch.float64)}
    for prior in (nn.laplace, nn.spike_slab(0.3), nn.scale_mixture(narrow=0.2)):
        options = {"minibatch": {"row": 50}, "max_iters": 600}
        posterior = quiet(regression(hidden=(8,), prior=prior), data, **options)
        assert 0.15 < float(posterior.mean("noise")) < 0.5
        assert math.isfinite(posterior.log_evidence.value)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    data, net = blobs(), classifier(hidden=(8,), classes=3)
    for estimator in ("local", "natural"):
        options = {"minibatch": {"image": 50}, "max_iters": 40, "estimator": estimator}
        whole = quiet(net, data, **options)
        file = tmp_path / estimator

        def halfway(progress):
            return Stop if progress.iteration == 17 else None

        stopped = quiet(net, data, callbacks=[halfway], checkpoint=file, **options)
        assert stopped.diagnostics.iterations == 17
        resumed = quiet(net, data, checkpoint=file, **options)
        again = stopped.resume(23)
        for name in ("fc1.weight", "fc2.bias"):
            assert torch.equal(resumed.mean(name), whole.mean(name))
            assert torch.equal(again.mean(name), whole.mean(name))
            assert torch.equal(resumed.sd(name), whole.sd(name))
        assert torch.equal(resumed.trace["nll"], whole.trace["nll"])


def test_no_number_in_a_batch_stops_the_run_and_the_file_holds_the_last_good_state(tmp_path):
    data, net, file = blobs(), classifier(hidden=(8,), classes=3), tmp_path / "run"
    seen = []

    def broken(x, generator):
        seen.append(len(x))
        return x * math.nan if len(seen) in (6, 7) else x  # the check looks again

    options = {"minibatch": {"image": 60}, "max_iters": 12, "checkpoint": file}
    with pytest.raises(NumericalError, match="vi, step 6: the loss is nan.*layer 'fc1'"):
        quiet(net, data, augment={"x": broken}, **options)
    assert torch.load(file, weights_only=True)["iteration"] == 5
    posterior = quiet(net, data, **options)
    assert posterior.diagnostics.iterations == 12
    assert bool(posterior.mean("fc1.weight").isfinite().all())


def test_a_loss_that_runs_away_names_step_and_weights():
    data = {"x": torch.randn(50, 3), "y": torch.randn(50)}
    with pytest.raises(NumericalError, match=r"vi, step \d+: .*(fc1|fc2|runs away)"):
        quiet(regression(hidden=(8,)), data, optimiser="sgd", learning_rate=30.0, max_iters=200)


def test_augmented_batches_come_with_a_generator_of_the_run():
    data, net = blobs(), classifier(hidden=(4,), classes=3)

    def jitter(x, generator):
        return x + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype)

    options = {"minibatch": {"image": 60}, "max_iters": 20}
    one, two = (quiet(net, data, augment={"x": jitter}, **options) for _ in range(2))
    plain = quiet(net, data, **options)
    assert torch.equal(one.mean("fc1.weight"), two.mean("fc1.weight"))
    assert not torch.equal(one.mean("fc1.weight"), plain.mean("fc1.weight"))
    with pytest.raises(ModelError, match="no such covariate"):
        quiet(net, data, augment={"z": jitter}, **options)
    with pytest.raises(ModelError, match="no such covariate. Covariates: x"):
        quiet(net, data, augment={"label": jitter}, **options)


def test_restarts_are_reported():
    posterior = quiet(classifier(hidden=(4,), classes=3), blobs(), restarts=2, max_iters=30)
    assert "the lowest is kept" in str(posterior.diagnostics.notes["restarts"])


def test_a_run_lasts_for_epochs():
    bound = classifier(hidden=(4,), classes=3).bind(blobs())
    assert horizon(bound, Settings(Streams(0))) == 2000
    assert horizon(bound, Settings(Streams(0), max_iters=7)) == 7
    assert horizon(bound, Settings(Streams(0), minibatch={"image": 1})) == 20 * 240


def test_explain_has_a_line_for_every_layer():
    text = str(explain(classifier(net="lenet", classes=2), images(8)))
    line = next(x for x in text.splitlines() if x.split()[:1] == ["conv2"])
    # 16 maps of 1 x 1 from kernels of 6 x 5 x 5, two products of a forward and two backward passes each
    assert line.split()[1:3] == ["2416", "2416"] and "local reparameterisation" in line
    assert "N = 8" in text


def test_a_posterior_that_is_still_the_prior_is_named():
    data = {"x": torch.zeros(40, 4), "label": torch.arange(40) % 2}
    posterior = quiet(classifier(hidden=(64,), classes=2), data, max_iters=1500)
    assert any("still the prior" in w for w in posterior.diagnostics.warnings)


def test_what_does_not_go_together_is_refused_in_words():
    net, data = classifier(hidden=(4,), classes=3), blobs()

    with pytest.raises(UnsupportedError, match="no layer of the model"):
        quiet(normal_mean, {"y": [1.0]}, estimator="local")
    with pytest.raises(ModelError, match="option for networks"):
        quiet(normal_mean, {"y": [1.0]}, weight_decay=0.1)
    with pytest.raises(UnsupportedError, match="several particles"):
        quiet(net, data, estimator="flipout", particles=3)
    with pytest.raises(ModelError, match="start="):
        quiet(net, data, start="standard")
    with pytest.raises(ModelError, match="momentum"):
        quiet(net, data, momentum=1.5)
    with pytest.raises(ModelError, match="final_draws.*as its size"):
        quiet(net, data, final_draws=10)
    with pytest.raises(UnsupportedError, match="batch norm are estimated"):
        quiet(small_resnet, images(8, 8), family="low_rank")
    with pytest.raises(DataError):
        quiet(net, {**data, "x": data["x"] * math.nan})


def test_a_posterior_is_the_prior_of_the_next_fit():
    data, net = blobs(), classifier(hidden=(6,), classes=3)
    first = quiet(net, data, max_iters=300)
    more = quiet(net, blobs(30), prior=first, max_iters=100)
    assert math.isfinite(more.log_evidence.value)
    moved = (more.mean("fc1.weight") - first.mean("fc1.weight")) / first.sd("fc1.weight")
    assert float(moved.square().mean().sqrt()) < 1.0


def test_the_table_of_noise_counts_as_memory():
    """70400 weights of eight bytes: 2 x 6 vectors of a state, and a table of two where weights are drawn."""
    data = {"x": torch.zeros(8, 640), "label": torch.zeros(8)}
    data["x"] = data["x"].double()
    vector = 8 * (640 * 110 + 110 + 110 * 2 + 2)
    limit = 12 * vector + 200_000  # with what layers put out
    options = {"method": "vi", "memory": limit, "max_iters": 1, "seed": 0, "progress": False}
    net = classifier(hidden=(110,), classes=2)
    with pytest.raises(UnsupportedError, match="for weights"):
        infer(net, data, estimator="pathwise", **options)
    infer(net, data, estimator="local", **options)


def test_statistics_that_the_data_hold_are_used_as_they_are():
    data = {"x": torch.randn(20, 2), "y": torch.zeros(20)}
    known = {"bn.mean": [0.5, 1.0], "bn.variance": [4.0, 9.0]}
    posterior = quiet(normed, {**data, **known}, max_iters=30)
    assert posterior.bound.values["bn.mean"].tolist() == [0.5, 1.0]
    assert "batch norms" not in posterior.diagnostics.notes


def test_a_budget_of_memory_that_a_step_would_exceed_is_refused_before_it():
    data = {"x": torch.zeros(4000, 20), "label": torch.zeros(4000)}
    with pytest.raises(UnsupportedError, match=r"'fc1' .* of it; memory= allows 1 MiB.*minibatch="):
        infer(classifier(hidden=(64,)), data, method="vi", memory="1 MiB")
    small = {"minibatch": {"image": 50}, "max_iters": 2, "progress": False}
    infer(classifier(hidden=(64,)), data, method="vi", memory="1 MiB", seed=0, **small)
