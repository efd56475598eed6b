"""SSVI as a backend: exact answers, the limits in which it is another method, and the invariants of its state."""

from __future__ import annotations

import math

import pytest
import torch

from ppl import Normal, Stop, given, infer, model, nn, observe, plate
from ppl.backend import Settings
from ppl.batches import batches_of
from ppl.continual import with_laws
from ppl.errors import ModelError, NumericalError, UnsupportedError
from ppl.inference.auto import choose
from ppl.inference.networks import fit
from ppl.inference.networks import records as networks
from ppl.inference.ssvi import SSVI, kernel
from ppl.inference.ssvi.beginning import first_sets, noise_shares
from ppl.inference.ssvi.initial import shrinkage
from ppl.inference.ssvi.patterns import KERNELS
from ppl.inference.ssvi.schedule import is_due
from ppl.inference.ssvi.sets import Change
from ppl.inference.ssvi.structured import group_of, members
from ppl.inference.ssvi.update import relaid, update
from ppl.marginals import Gaussian
from ppl.models.bnn import classifier
from ppl.streams import Streams


@model
def linear(inputs=6, noise=0.5, scale=1.0):
    layer = nn.Linear(inputs, 1, name="fc", bias=False, prior=nn.isotropic(scale), plates=())
    with plate("row"):
        observe("y", Normal(layer(given("x"))[0], noise))


def digits(n=120, size=8, dtype=torch.float64):
    """Three kinds of pictures: bars at three heights, with noise."""
    generator = torch.Generator().manual_seed(5)
    label = torch.arange(n) % 3
    x = 0.3 * torch.randn(n, 1, size, size, generator=generator, dtype=dtype)
    for kind in range(3):
        x[label == kind, :, 2 * kind + 1] += 1.0
    return {"x": x, "label": label}


def started(options, net=None, data=None, steps=200, minibatch=40, restarts=1, seed=0):
    data = digits() if data is None else data
    bound = (classifier(hidden=(24, 16), classes=3) if net is None else net).bind(
        data, dtype=data["x"].dtype
    )
    settings = Settings(
        Streams(seed),
        restarts,
        max_iters=steps,
        minibatch={"image": minibatch} if minibatch else None,
    )
    problem = kernel.prepare(bound, options, settings)
    batches = batches_of(bound, settings.minibatch, settings.streams)
    return problem, kernel.init(problem), batches


def walked(problem, state, batches, steps, first=0):
    for t in range(first, first + steps):
        state, info = kernel.step(problem, state, None if batches is None else batches.at(t))
    return state, info


# ---- exact answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["local", "natural", "sampling", "flipout"])
def test_linear_regression_at_density_one_is_exact(estimator):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    x[:, 1] += 0.5 * x[:, 0]
    weight = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)
    y = x @ weight + 0.5 * torch.randn(200, generator=generator, dtype=torch.float64)
    fitted = infer(
        linear,
        {"x": x, "y": y},
        method="ssvi",
        density=1.0,
        estimator=estimator,
        seed=1,
        max_iters=1500,
    )
    precision = x.T @ x / 0.25 + torch.eye(6, dtype=torch.float64)
    sd = precision.diagonal().rsqrt()
    exact = torch.linalg.solve(precision, x.T @ y / 0.25)
    assert float(((fitted.mean("fc.weight")[0] - exact) / sd).abs().max()) < 0.15
    assert float((fitted.sd("fc.weight")[0] / sd - 1).abs().max()) < 0.1


def _orthogonal(d, truth, n=256):
    generator = torch.Generator().manual_seed(7)
    x = torch.linalg.qr(torch.randn(n, d, generator=generator, dtype=torch.float64)).Q * math.sqrt(
        n
    )
    weight = torch.zeros(d, dtype=torch.float64)
    weight[truth] = torch.tensor([1.0, -0.8, 0.6, -0.5, 0.7], dtype=torch.float64)
    y = x @ weight + 0.5 * torch.randn(n, generator=generator, dtype=torch.float64)
    return {"x": x, "y": y}


@pytest.mark.parametrize("estimator", ["local", "natural"])
@pytest.mark.parametrize("seed", range(3))
def test_the_true_set_is_found_from_any_start(seed, estimator):
    truth = [3, 8, 17, 20, 29]
    fitted = infer(
        linear(inputs=32), _orthogonal(32, truth), method="ssvi", density=5 / 32, estimator=estimator,
        removal="evidence", seed=seed, max_iters=600, every=15, prior_inputs="all",
    )  # fmt: skip
    assert fitted.marginal("fc.weight").index.tolist() == truth


@pytest.mark.parametrize("seed", range(3))
def test_the_evidence_finds_how_many_weights_there_are(seed):
    truth = [3, 8, 17, 20, 29]
    fitted = infer(
        linear(inputs=32), _orthogonal(32, truth), method="ssvi", density="auto", seed=seed,
        max_iters=800, every=20, prior_inputs="all",
    )  # fmt: skip
    assert fitted.marginal("fc.weight").index.tolist() == truth


# ---- limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["local", "natural"])
def test_density_one_is_mean_field_vi(estimator):
    data, net = digits(), classifier(hidden=(12,), classes=3)
    settings = {"seed": 3, "minibatch": {"image": 30}, "max_iters": 60, "learning_rate": 0.1}
    if estimator == "local":
        settings["scale_rate"] = 0.1
    sparse = infer(net, data, method="ssvi", density=1.0, estimator=estimator, **settings)
    settings.pop("scale_rate", None)
    dense = infer(net, data, method="vi", estimator=estimator, **settings)
    for name in ("fc1.weight", "fc2.weight", "fc2.bias"):
        assert torch.equal(sparse.mean(name), dense.mean(name))
        assert torch.equal(sparse.sd(name), dense.sd(name))


def test_rate_zero_is_a_static_set():
    problem, state, batches = started(SSVI(density=0.2, rate=0.0), steps=80)
    static, first, _ = started(SSVI(density=0.2, rate=0.5, until=0.0), steps=80)
    after, _ = walked(problem, state, batches, 80)
    other, _ = walked(static, first, batches, 80)
    for a, b, c in zip(
        after.inner.runs[0].indices,
        state.inner.runs[0].indices,
        other.inner.runs[0].indices,
        strict=True,
    ):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert torch.equal(after.inner.runs[0].mean, other.inner.runs[0].mean)


@pytest.mark.parametrize("estimator", ["local", "natural", "flipout"])
def test_sparse_rows_and_masks_are_the_same_run(estimator):
    data = digits(dtype=torch.float32)
    losses = []
    for kind in ("csr", "dense"):
        options = SSVI(density=0.15, kernel=kind, estimator=estimator, every=20)
        problem, state, batches = started(options, data=data, steps=150)
        assert {KERNELS[k] for k in state.kernels} == {kind}
        _, info = walked(problem, state, batches, 100)
        losses.append(info.metrics["nll"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_sets_settle_only_after_the_warmup():
    problem, state, batches = started(SSVI(density=0.2, rate=0.001, every=5, warmup=30), steps=80)
    state, _ = walked(problem, state, batches, 30)
    assert state.still == (0,)  # nothing was new five times in a row
    state, _ = walked(problem, state, batches, 11, first=30)
    assert state.still == (3,)


def test_snr_of_the_absolute_value_is_the_same_run():
    ends = []
    for removal in ("snr", "snr_abs"):
        problem, state, batches = started(SSVI(density=0.2, removal=removal), steps=60)
        ends.append(walked(problem, state, batches, 60)[0].inner.runs[0].mean)
    assert torch.equal(*ends)


# ---- invariants --------------------------------------------------------------------------------------------------


def _check_state(problem, state, budgets):
    counts = networks.sizes(problem.inner, state)
    for layer, budget in zip(problem.layers, budgets, strict=True):
        indices = state.indices[layer.at]
        assert len(indices) == budget == counts[layer.at]
        assert bool((indices.diff() > 0).all()) and int(indices.max()) < layer.form.size
    assert state.raw.numel() == sum(counts)
    assert bool((networks.sds(problem.inner, state) > 0).all())


@pytest.mark.parametrize("optimiser", ["adam", "sgd", "natural"])
def test_the_algorithm_keeps_its_invariants(optimiser):
    kind = {"estimator": "natural"} if optimiser == "natural" else {"optimiser": optimiser}
    problem, state, batches = started(SSVI(density=0.2, every=5, **kind), steps=80)
    budgets, moved = [y.budget for y in problem.layers], 0
    for t in range(80):
        before = state.inner.runs[0]
        state, info = kernel.step(problem, state, batches.at(t))
        after = state.inner.runs[0]
        _check_state(problem, after, budgets)
        assert after.step == before.step + 1
        if is_due(problem.plan, t) and state.still[0] < 3:
            moved += info.metrics["new"] > 0
            _check_update(problem, before, after)
    assert moved > 3


def _check_update(problem, before, after):
    """New weights start from nothing; the others, and all that is no weight, keep values and memory."""
    for at, (old, new) in enumerate(
        zip(
            networks.slices(problem.inner, before),
            networks.slices(problem.inner, after),
            strict=True,
        )
    ):
        if not problem.inner.is_sparse[at]:
            assert torch.equal(before.mean[old], after.mean[new])
            continue
        stays = torch.isin(after.indices[at], before.indices[at])
        stayed = torch.isin(before.indices[at], after.indices[at])
        for flat_old, flat_new in [
            (before.mean, after.mean), (before.raw, after.raw), *zip(before.memory, after.memory, strict=True)
        ]:  # fmt: skip
            if len(flat_old) < len(before.raw):
                continue  # of params alone
            assert torch.equal(flat_new[new][stays], flat_old[old][stayed])
            if flat_old is not before.raw:
                assert not bool(flat_new[new][~stays].any())
        if bool((~stays).any()):
            fresh = after.raw[new][~stays]
            assert bool((fresh == before.raw[old].median()).all())


@pytest.mark.parametrize(
    ("fresh", "expected"),
    [("tiny", 1e-6), ("initial", None), ("mean", None), ("median", None)],
)
@pytest.mark.parametrize("estimator", ["local", "natural"])
def test_scales_of_new_weights(fresh, expected, estimator):
    options = SSVI(density=0.2, fresh=fresh, estimator=estimator)
    problem, state, batches = started(options)
    state, _ = walked(problem, state, batches, 12)
    before = state.inner.runs[0]
    after = update(problem, before, batches.at(12)).state
    at = problem.layers[0].at
    is_new = ~torch.isin(after.indices[at], before.indices[at])
    sd = networks.sds(problem.inner, after)[networks.slices(problem.inner, after)[at]][is_new]
    old = networks.sds(problem.inner, before)[networks.slices(problem.inner, before)[at]]
    if fresh == "tiny":
        assert sd.tolist() == pytest.approx([expected] * len(sd), rel=1e-4)
    elif fresh == "initial":
        assert float(sd[0]) == pytest.approx(float(problem.inner.starts[at].sd), rel=1e-6)
    else:
        assert float(old.min()) < float(sd[0]) < float(old.max())
    assert len(sd) > 0


def test_a_shared_budget_moves_between_layers():
    problem, state, batches = started(SSVI(density=0.15, budgets="global", every=5), steps=120)
    first = networks.sizes(problem.inner, state.inner.runs[0])
    total = sum(len(i) for i in state.inner.runs[0].indices)
    state, _ = walked(problem, state, batches, 60)
    last = networks.sizes(problem.inner, state.inner.runs[0])
    assert sum(len(i) for i in state.inner.runs[0].indices) == total and first != last
    for layer in problem.layers:
        rows = state.inner.runs[0].indices[layer.at] // layer.form.columns
        assert len(rows.unique()) == layer.form.rows


@pytest.mark.parametrize("addition", ["gradient", "t_like", "evidence"])
@pytest.mark.parametrize("at", ["draw", "mean"])
def test_every_addition_rule_moves_the_set(addition, at):
    options = SSVI(density=0.1, addition=addition, at=at, batches=2, every=5)
    problem, state, batches = started(options, steps=60)
    after, _ = walked(problem, state, batches, 30)
    moved = [
        not torch.equal(after.inner.runs[0].indices[y.at], state.inner.runs[0].indices[y.at])
        for y in problem.layers
    ]
    assert any(moved)


@pytest.mark.parametrize("sets", ["neuron", "output", "channel", "kernel", "block"])
@pytest.mark.parametrize("net", ["mlp", "lenet"])
def test_groups_move_as_a_whole(sets, net):
    hidden = {"hidden": (24, 16)} if net == "mlp" else {}
    data = digits(48, 12)
    options = SSVI(
        density=0.4,
        rate=1.0,
        budgets="uniform",
        sets=sets,
        **({"block": (4, 4)} if sets == "block" else {}),
        every=4,
        removal="evidence",
        rejoin="value",
    )
    problem, state, batches = started(
        options, classifier(net=net, classes=3, **hidden), data, steps=24, minibatch=16
    )
    first = [i.clone() for i in state.inner.runs[0].indices]
    state, _ = walked(problem, state, batches, 20)
    moved = 0
    for layer in problem.layers:
        indices = state.inner.runs[0].indices[layer.at]
        if layer.groups is None:
            continue
        assert torch.equal(members(layer.groups, group_of(layer.groups, indices).unique()), indices)
        moved += not torch.equal(indices, first[layer.at])
    assert moved or sets in ("channel", "kernel")  # a linear layer has neither; LeNet few channels


def test_sets_of_outputs_leave_the_last_layer_whole():
    problem, state, _ = started(SSVI(density=0.3, sets="output"), classifier(hidden=(24, 16)))
    last = problem.inner.network.weights[-1]
    assert last not in [layer.at for layer in problem.layers] and problem.layers
    assert len(state.inner.runs[0].indices[last]) == 0  # dense


def test_noise_is_small_at_the_start_whatever_the_first_scale():
    problem, state, _ = started(SSVI(density=0.3, initial_sd=3.0))
    shares = noise_shares(problem, state.inner.runs[0])
    assert all(float(s) < 0.051 for s in shares)


def test_first_means_and_the_prior_count_the_inputs_that_are_there():
    problem, state, _ = started(SSVI(density=0.1, budgets="uniform", output=1.0))
    layer = problem.layers[0]
    where = networks.slices(problem.inner, state.inner.runs[0])[layer.at]
    inputs = layer.budget / layer.form.rows
    assert float(state.inner.runs[0].mean[where].std()) == pytest.approx(
        (2 / inputs) ** 0.5, rel=0.2
    )
    assert float(problem.inner.priors[layer.at].normal(None)[1]) == pytest.approx(inputs**-0.5)
    own, *_ = started(SSVI(density=0.1, prior_inputs="all"))
    assert float(own.inner.priors[layer.at].normal(None)[1]) == pytest.approx(64**-0.5)
    fixed, *_ = started(
        SSVI(density=0.1), classifier(classes=3, hidden=(8,), prior=nn.isotropic(0.3))
    )
    assert float(fixed.inner.priors[0].normal(None)[1]) == pytest.approx(0.3)


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_a_spread_of_first_means_holds_for_dense_layers_too(density):
    problem, state, _ = started(SSVI(density=density, dense=("fc2",), initial_mean=0.01))
    run = state.inner.runs[0]
    wheres = networks.slices(problem.inner, run)
    for at in problem.inner.network.weights:
        assert float(run.mean[wheres[at]].std()) == pytest.approx(0.01, rel=0.35)


def test_the_report_is_that_of_the_restart_that_is_kept():
    problem, state, _ = started(SSVI(density="auto"), restarts=2)
    few, many = state.inner.runs
    # The second has the higher loss, and with its divergence the lower objective.
    changes = {y.at: Change(many.indices[y.at][:5], torch.arange(5)) for y in problem.layers}
    many = relaid(problem, many, changes)
    runs = (few._replace(loss=1.0, kl=1e4), many._replace(loss=1.1, kl=1.0))
    fitted = kernel.posterior(problem, state._replace(inner=networks.Runs(runs)))
    kept = sum(len(fitted.support[problem.inner.arrays[y.at].name]) for y in problem.layers)
    assert kept == 5 * len(problem.layers)
    assert fitted.diagnostics.notes["active"].startswith(f"{kept} of ")


def test_scales_stay_positive_where_outputs_are_the_same_for_all_data():
    assert float(shrinkage(torch.tensor(1.0))) > 0
    data = digits()
    state = started(SSVI(density=0.2), data={**data, "x": torch.ones_like(data["x"])})[1]
    assert bool(state.inner.runs[0].raw.isfinite().all())


# ---- memory, checkpoints, errors ---------------------------------------------------------------------------------


def _bytes(state):
    run = state.inner.runs[0]
    return sum(t.numel() * t.itemsize for t in (run.mean, run.raw, *run.memory, *run.indices))


def test_memory_of_the_state_is_in_proportion_to_the_density():
    data, net = digits(12, dtype=torch.float32), classifier(hidden=(512, 512), classes=3)

    def bytes_of(density):
        options = SSVI(density=density, budgets="uniform", output=1.0)
        return _bytes(started(options, net, data, minibatch=None)[1])

    biases, weights = 24 * (512 + 512 + 3), 512 * (64 + 512 + 3)
    # six numbers of four bytes a weight, and an index of eight where the set is a list
    assert bytes_of(1.0) == 24 * weights + biases
    for density in (0.2, 0.05, 0.01):
        assert bytes_of(density) == pytest.approx(32 * density * weights + biases, abs=100)


@pytest.mark.parametrize("options", [{}, {"budgets": "global"}, {"estimator": "natural"}], ids=str)
def test_a_run_is_resumed_bit_for_bit(options, tmp_path):
    data, net = digits(), classifier(hidden=(24,), classes=3)
    settings = {
        "method": "ssvi", "density": 0.2, "every": 7, "seed": 4, "minibatch": {"image": 32},
        "max_iters": 50, **options,
    }  # fmt: skip
    whole = infer(net, data, **settings)
    file = tmp_path / "run.checkpoint"

    def stop(progress):
        return Stop() if progress.iteration == 23 else None

    infer(net, data, checkpoint=file, callbacks=[stop], **settings)
    resumed = infer(net, data, checkpoint=file, **settings)
    for name in ("fc1.weight", "fc2.weight"):
        assert torch.equal(whole.mean(name), resumed.mean(name))
        assert torch.equal(whole.sd(name), resumed.sd(name))
    assert torch.equal(whole.marginal("fc1.weight").index, resumed.marginal("fc1.weight").index)


def test_a_state_brings_its_kernels_along():
    options = SSVI(density=0.2, every=5)
    problem, state, batches = started(options)
    other = state._replace(kernels=(1, 1, 1))
    kernel.step(problem, other, batches.at(0))
    assert set(problem.running.of_node.values()) == {"csr"}
    kernel.step(problem, state._replace(kernels=(0, 0, 0)), batches.at(0))
    assert set(problem.running.of_node.values()) == {"dense"}


def test_a_gradient_that_is_not_finite_names_the_layer():
    problem, state, batches = started(SSVI(density=0.2))
    run = state.inner.runs[0]
    bad = run._replace(mean=run.mean.index_fill(0, torch.tensor([0]), math.inf))
    with pytest.raises(NumericalError, match="layer 'fc"):
        update(problem, bad, batches.at(0))
    with pytest.raises(NumericalError, match=r"fc1\.weight"):
        kernel.step(problem, state._replace(inner=networks.Runs((bad,))), batches.at(0))


def test_a_run_that_fails_names_step_and_layer():
    data, net = digits(), classifier(hidden=(24,), classes=3)
    with pytest.raises(NumericalError, match="ssvi, step .*fc"):
        infer(net, data, method="ssvi", optimiser="sgd", learning_rate=1e12, seed=0, max_iters=60)


def test_every_restart_begins_once(monkeypatch):
    begun, first = [], fit.first
    monkeypatch.setattr(fit, "first", lambda *a: begun.append(a[1]) or first(*a))
    started(SSVI(density=0.2), restarts=3)
    assert begun == [0, 1, 2]


@pytest.mark.parametrize("options", [{}, {"sets": "output"}, {"initial_mean": 0.01}], ids=str)
def test_a_law_that_was_carried_over_is_its_own_start(options):
    net = classifier(hidden=(24, 16), classes=3)
    bound = net.bind(digits(), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    laws = {
        v.name: Gaussian(
            torch.randn(bound.shape(v), generator=generator, dtype=torch.float64),
            0.1 + torch.rand(bound.shape(v), generator=generator, dtype=torch.float64),
        )
        for v in bound.graph.latents
        if v.name.endswith("weight")
    }
    settings = Settings(Streams(0), max_iters=100)
    options = SSVI(density=0.25, **options)
    problem = kernel.prepare(with_laws(bound, laws, bound.labels), options, settings)
    (state,) = (fit.first(problem.inner, 0, first_sets(problem, 0)),)
    for layer in problem.layers:
        law, index = laws[problem.inner.arrays[layer.at].name], state.indices[layer.at]
        where = networks.slices(problem.inner, state)[layer.at]
        assert torch.equal(state.mean[where], law.loc.reshape(-1)[index])
        sd = networks.sds(problem.inner, state)[where]
        torch.testing.assert_close(sd, law.scale.reshape(-1)[index])
        if layer.groups is None:
            sure = (law.loc / law.scale).abs().reshape(-1)
            others = torch.ones_like(sure, dtype=torch.bool).index_fill(0, index, False)
            assert float(sure[index].min()) >= float(sure[others].max())


def test_restarts_have_sets_of_their_own():
    problem, state, batches = started(SSVI(density=0.2, every=5), restarts=2)
    state, _ = walked(problem, state, batches, 20)
    a, b = (run.indices[problem.layers[0].at] for run in state.inner.runs)
    assert len(a) == len(b) and not torch.equal(a, b)
    fitted = kernel.posterior(problem, state)
    assert "restarts" in fitted.diagnostics.notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1.2}, "density"),
        ({"removal": "snrr"}, "snr"),
        ({"sets": "neuron", "budgets": "global"}, "budget in every layer"),
        ({"density": "auto", "batches": 1}, "not known from one batch"),
        ({"dense": ("fc9",)}, "no layer 'fc9'"),
        ({"rate": -1.0}, "rate"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": 0.5}, r"SSVI\(momentum=...\) is an option of optimiser='sgd'"),
        ({"output": 2.0}, "is an option of budgets='uniform'"),
        ({"block": (4, 4)}, "is an option of sets='block'"),
        ({"prior_inclusion": 0.1}, "is an option of density='auto'"),
        ({"sets": "neuron", "kernel": "csr"}, "sets that are no whole units"),
        ({"augment": {"picture": torch.flip}}, "no such covariate"),
        ({"estimator": "natural", "optimiser": "sgd"}, "Leave optimiser out"),
        ({"estimator": "natural", "scale_rate": 0.1}, "Leave scale_rate out"),
        ({"density": "auto", "removal": "magnitude"}, "Leave removal out"),
        ({"density": "auto", "addition": "t_like"}, "Leave addition out"),
    ],
)
def test_options_are_refused_in_words(options, message):
    with pytest.raises(ModelError, match=message):
        started(SSVI(**options))


def test_a_score_of_noise_needs_noise():
    with pytest.raises(ModelError, match="no noise to compare"):
        started(SSVI(addition="t_like", at="mean"), minibatch=None)
    started(SSVI(addition="t_like", at="mean"))


def test_what_has_no_layers_is_refused():
    @model
    def plain():
        with plate("row"):
            observe("y", Normal(given("x"), 1.0))

    with pytest.raises(UnsupportedError, match="no layer"):
        infer(plain, {"x": [1.0], "y": [2.0]}, method="ssvi")


def test_layers_can_be_kept_dense():
    problem, state, _ = started(SSVI(density=0.1, dense=("fc1",)))
    assert [y.name for y in problem.layers] == ["fc2", "fc3"]
    assert len(state.inner.runs[0].indices[problem.inner.network.weights[0]]) == 0


@pytest.mark.filterwarnings("ignore:ssvi")
def test_the_settings_of_the_paper_run():
    data = digits(48, 12)
    net = classifier(net="lenet", classes=3, prior=nn.isotropic(0.005), bias=nn.point())
    fitted = infer(
        net,
        data,
        method=SSVI.paper(density=0.3, every=5),
        seed=0,
        minibatch={"image": 16},
        max_iters=24,
    )
    assert fitted.diagnostics.notes["temperature"] == "0.01"
    assert any("not a posterior" in w for w in fitted.diagnostics.warnings)


def test_explain_tells_what_a_layer_keeps_and_costs():
    bound = classifier(hidden=(24,), classes=3).bind(digits())
    note = kernel.describe(bound, SSVI(density=0.2), Settings(Streams(0)))
    for part in ("20", "move every", "N = 120", "local reparam", "MAC/step", "kernels: fc1"):
        assert part in note
    assert "stays as it is" in kernel.describe(bound, SSVI(rate=0.0), Settings(Streams(0)))
    assert "as many as the evidence" in kernel.describe(bound, SSVI("auto"), Settings(Streams(0)))


def test_the_result_tells_what_the_sets_did():
    fitted = infer(
        classifier(hidden=(24,), classes=3), digits(), method="ssvi", density=0.2, seed=0,
        minibatch={"image": 40}, max_iters=300,
    )  # fmt: skip
    notes = fitted.diagnostics.notes
    assert "active" in notes and "kernels" in notes and "nll" in notes and "kl" in notes
    assert fitted.density == pytest.approx(0.2, abs=0.01)
    assert float(fitted.trace["density"][-1]) == pytest.approx(0.2, abs=0.01)


def test_auto_takes_it_for_large_networks():
    data = digits(12, 12)
    large, small = classifier(hidden=(80,), classes=3), classifier(hidden=(8,), classes=3)
    bound = large.bind(data)
    assert choose(bound)[0] == "ssvi" and "weights" in choose(bound)[1]
    assert choose(small.bind(data))[0] != "ssvi"


def test_updates_see_the_data_as_steps_do():
    calls = []

    def flip(x, generator):
        calls.append(len(x))
        return x.flip(-1)

    problem, state, batches = started(SSVI(density=0.2, augment={"x": flip}))
    update(problem, state.inner.runs[0], batches.at(0))
    assert calls == [40]


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({}, 0.05),
        ({"learning_rate": 0.01}, 0.01),
        ({"estimator": "natural", "learning_rate": 0.2}, 0.05),
    ],
)
def test_the_rate_of_params_is_that_of_means_where_units_are_the_same(options, rate):
    problem, _, _ = started(SSVI(density=0.3, **options))
    assert problem.inner.rule.point_rate == rate
