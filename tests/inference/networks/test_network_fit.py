"""One step and many: the objective, its scale, closed-form answers, restarts, resuming, and what stops a run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ppl import (
    HalfNormal,
    LogNormal,
    ModelError,
    Normal,
    NumericalError,
    given,
    latent,
    model,
    nn,
    observe,
    param,
    plate,
)
from ppl.backend import Settings
from ppl.batches import batches_of
from ppl.inference.networks import checks, fit, noise, slopes
from ppl.inference.networks.records import Rule, rate, sds, slices
from ppl.inference.networks.results import judge
from ppl.inference.numerics.ivon import curvature_step, total_curvature_step
from ppl.models.bnn import classifier
from ppl.streams import Streams


@model
def line(noise=0.5, prior=None, bias=True):
    prior = Normal(0.0, 1.0) if prior is None else prior
    layer = nn.Linear(3, 1, name="fc", prior=prior, bias=bias)
    with plate("row"):
        observe("y", Normal(layer(given("x"))[0], noise))


def rows(n=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=g, dtype=torch.float64)
    x = x @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 1.0]]).double()
    y = x @ torch.tensor([1.0, -2.0, 0.5]).double() + 0.7
    return {"x": x, "y": y + 0.5 * torch.randn(n, generator=g, dtype=torch.float64)}


def test_an_augmented_covariate_must_be_read():
    @model
    def unread():
        layer = nn.Linear(2, 1, name="fc")
        with plate("row"):
            given("z")
            observe("y", Normal(layer(given("x"))[0], 1.0))

    data = {"x": torch.zeros(3, 2), "z": torch.zeros(3), "y": torch.zeros(3)}
    run(unread, data, 1, augment={"x": lambda x, generator: x})
    for name in ("z", "y"):
        with pytest.raises(ModelError, match="reads no such covariate. Covariates: x"):
            run(unread, data, 1, augment={name: lambda x, generator: x})


def run(program, data, steps, wish="local", batch=None, restarts=1, seed=0, sizes=None, **rule):
    settings = Settings(Streams(seed), restarts, minibatch=batch)
    bound = program.bind(data, sizes=sizes)
    problem = fit.prepare(bound, settings, Rule(horizon=steps, **rule), wish)
    batches = batches_of(bound, batch, settings.streams)
    state = fit.init(problem)
    for i in range(steps):
        state, _ = fit.step_all(problem, state, None if batches is None else batches.at(i))
    return problem, state


@pytest.mark.parametrize("natural", [False, True], ids=["local", "natural"])
def test_linear_regression_reaches_the_exact_mean_field_answer(natural):
    data = rows()
    wish, learning_rate = ("draw", 0.1) if natural else ("local", 0.05)
    options = {"natural": natural, "learning_rate": learning_rate}
    problem, state = run(line, data, 2000, wish, **options)
    x = torch.cat([data["x"], torch.ones(60, 1).double()], 1)
    precision = torch.eye(4).double() + x.T @ x / 0.25
    mean = torch.linalg.solve(precision, x.T @ data["y"] / 0.25)
    sd = precision.diagonal().rsqrt()
    found = state.runs[0]
    assert ((found.mean - mean) / sd).abs().max() < (0.15 if natural else 0.05)
    assert (sds(problem, found) / sd).log().abs().max() < 0.04


def test_the_natural_step_has_the_known_fixed_point():
    """On ``h (theta - c)^2 / 2`` for each example: theta = h c / (h + delta), sd^2 = 1 / (N (h + delta))."""
    layer = {"prior": Normal(0.0, 0.3), "bias": False}

    @model
    def point():
        weight = nn.Linear(1, 1, name="fc", **layer)
        with plate("row"):
            observe("y", Normal(weight(given("x"))[0], 0.5))

    n, h, c = 10, 4.0, 2.0
    data = {"x": torch.ones(n, 1).double(), "y": torch.full((n,), c).double()}
    problem, state = run(point, data, 3000, "draw", natural=True, learning_rate=0.1, draws=4)
    delta = 1 / (n * 0.3**2)
    theta, sd = h * c / (h + delta), (n * (h + delta)) ** -0.5
    assert abs(float(state.runs[0].mean[0]) - theta) < 0.1 * sd
    assert abs(math.log(float(sds(problem, state.runs[0])[0]) / sd)) < 0.03


def test_the_curvature_in_few_passes_is_that_of_the_source():
    c, e = torch.rand(100).double() + 0.5, 0.05 * torch.randn(100).double()
    for decay in (0.3, torch.rand(100).double()):
        sd = (50.0 * c).rsqrt()
        source = curvature_step(c - decay, e / sd, 0.2, decay) + decay
        assert torch.allclose(total_curvature_step(c, e.clone(), sd, 0.2, decay, 50.0), source)
    large = total_curvature_step(c, 1e3 + e, (50.0 * c).rsqrt(), 0.2, 0.3, 50.0)
    assert torch.allclose(large, 2.5 * c)


@pytest.mark.parametrize("size", [1, 7, 20, 60])
def test_the_objective_does_not_depend_on_the_size_of_the_batch(size):
    data = rows()
    settings = Settings(Streams(1), minibatch={"row": size})
    bound = line.bind(data)
    problem = fit.prepare(bound, settings, Rule(), "local")
    assert problem.examples == 60
    (state,) = fit.init(problem).runs
    batches = batches_of(bound, settings.minibatch, settings.streams)
    parts = [batches.part(i) for i in range(batches.parts)]
    found = [fit.evaluate(problem, state, b, at="mean").log_likelihood for b in parts]
    whole = fit.evaluate(problem, state, None, at="mean").log_likelihood
    law = torch.distributions.Normal(data["x"] @ state.mean[:3] + state.mean[3], 0.5)
    assert torch.allclose(whole, law.log_prob(data["y"]).sum())
    assert torch.allclose(torch.stack(found).mean(), whole)


@pytest.mark.parametrize("wish", ["local", "flipout", "draw"])
def test_slopes_are_those_of_the_bound(wish):
    """One step of plain gradient descent moves along the derivative of the loss with the same noise."""
    data = rows(8)
    rule = {"optimiser": "sgd", "momentum": 0.0, "learning_rate": 1.0, "scale_rate": 1.0}
    problem, state = run(line, data, 0, wish, **rule, schedule="constant")
    (old,) = state.runs
    new, info = fit.step(problem, old, None)
    mean, raw = old.mean.clone().requires_grad_(), old.raw.clone().requires_grad_()
    fit_sd = torch.nn.functional.softplus(raw)
    generator = noise.generator_of(problem, old)
    x, y = data["x"], data["y"]
    if wish == "local":
        m, v = x @ mean[:3] + mean[3], x.square() @ fit_sd[:3].square() + fit_sd[3].square()
        eps = torch.randn(8, 1, generator=generator, dtype=torch.float64)[:, 0]
        out = m + v.sqrt() * eps
    else:
        eps = noise.standard_noise(problem, old, generator, 4)
        if wish == "draw":
            theta = mean + fit_sd * eps
            out = x @ theta[:3] + theta[3]
        else:
            from ppl.inference.networks.estimators import draw_signs

            signs = draw_signs((8,), 1, 3, x, generator)
            drift = fit_sd * eps
            spread = (signs.into * x) @ drift[:3] + drift[3]
            out = x @ mean[:3] + mean[3] + signs.out[:, 0] * spread
    nll = -torch.distributions.Normal(out, 0.5).log_prob(y).mean()
    q = torch.distributions.Normal(mean, fit_sd)
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum()
    assert abs(info.metrics["nll"] - float(nll.detach())) < 1e-10
    assert abs(info.metrics["kl"] - float(kl.detach())) < 1e-9
    slopes = torch.autograd.grad(nll + kl / 8, [mean, raw])
    assert torch.allclose(old.mean - new.mean, slopes[0])
    assert torch.allclose(old.raw - new.raw, slopes[1])


def test_draws_are_averaged():
    data, n = rows(8), 400
    rule = {"optimiser": "sgd", "momentum": 0.0, "learning_rate": 1.0, "scale_rate": 1.0}
    problem, state = run(line, data, 0, "draw", **rule, draws=n, schedule="constant")
    moved, _ = fit.step(problem, state.runs[0], None)
    local, start = run(line, data, 0, "local", **rule, draws=n, schedule="constant")
    assert torch.equal(start.runs[0].mean, state.runs[0].mean)
    other, _ = fit.step(local, start.runs[0], None)
    change = (moved.mean - state.runs[0].mean, other.mean - state.runs[0].mean)
    assert torch.allclose(*change, rtol=0.05, atol=0.1)


def test_a_step_changes_nothing_that_it_was_given():
    for rule in ({}, {"optimiser": "sgd"}, {"natural": True, "learning_rate": 0.1}):
        wish = "draw" if rule.get("natural") else "local"
        problem, state = run(line, rows(), 3, wish, **rule)
        before = [t.clone() for t in (state.runs[0].mean, state.runs[0].raw, *state.runs[0].memory)]
        one = fit.step_all(problem, state, None)[0].runs[0]
        two = fit.step_all(problem, state, None)[0].runs[0]
        after = (state.runs[0].mean, state.runs[0].raw, *state.runs[0].memory)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert torch.equal(one.mean, two.mean) and torch.equal(one.raw, two.raw)
        assert not torch.equal(one.mean, state.runs[0].mean)


def test_states_that_are_held_keep_their_values_while_memory_is_used_again():
    problem, state = run(line, rows(), 1)
    held, copies, views = [state.runs[0]], [], []
    for _ in range(6):
        new, _ = fit.step(problem, held[-1], None)
        held.append(new)
    copies = [(s.mean.clone(), s.raw.clone(), [m.clone() for m in s.memory]) for s in held]
    last, views = held[-1], [s.mean[1:3] for s in held[:2]]
    seen = [v.clone() for v in views]
    kept = held[::3]
    del held[:]
    places = set()
    for _ in range(12):
        last, _ = fit.step(problem, last, None)
        places.add(last.mean.data_ptr())
    assert len(places) < 6  # memory came back
    assert all(torch.equal(a, b) for a, b in zip(views, seen, strict=True))
    for s, (mean, raw, memory) in zip(kept, copies[::3], strict=True):
        assert torch.equal(s.mean, mean) and torch.equal(s.raw, raw)
        assert all(torch.equal(a, b) for a, b in zip(s.memory, memory, strict=True))


def test_tempering_and_warmup_weigh_the_divergence():
    rule = {"natural": True, "learning_rate": 0.1}
    problem, cold = run(line, rows(), 1500, "draw", tempering=0.01, **rule)
    x = torch.cat([rows()["x"], torch.ones(60, 1).double()], 1)
    sd = (x.square().sum(0) / 0.25 / 0.01 + 1.0).rsqrt()
    assert torch.allclose(sds(problem, cold.runs[0]), sd, rtol=0.05)
    rule = Rule(warmup=4, tempering=0.5)
    from ppl.inference.networks.records import temperature

    assert [temperature(rule, t) for t in range(5)] == [0.125, 0.25, 0.375, 0.5, 0.5]


def test_the_rate_falls_along_a_cosine_and_a_little_is_left():
    rule = Rule(horizon=100)
    assert rate(rule, 0) == 1.0 and abs(rate(rule, 50) - 0.5) < 1e-12
    assert rate(rule, 100) == rate(rule, 1000) == 0.01
    assert rate(Rule(schedule="constant"), 70) == 1.0


def test_a_prior_with_a_scale_for_every_weight_starts_at_random_means():
    scales = torch.linspace(0.5, 2.0, 6, dtype=torch.float64).reshape(2, 3)

    @model
    def own(varies=False):
        weight = latent("w", Normal(scales if varies else 0.0, scales))
        with plate("row"):
            observe("y", Normal((given("x") @ weight.T).sum(), 0.5))

    problem = run(own, rows(), 0)[0]
    assert problem.starts[0].spread.tolist() == pytest.approx((2 / 3) ** 0.5)
    # A law whose locations differ is where it starts, as one that was carried over.
    problem = run(own(varies=True), rows(), 0)[0]
    assert torch.equal(problem.starts[0].loc, scales) and float(problem.starts[0].spread) == 0.0


def test_noise_and_a_scale_with_a_law_are_learned():
    @model
    def regression():
        scale = latent("scale", HalfNormal(2.0))
        layer = nn.Linear(3, 1, name="fc", prior=nn.isotropic(scale), bias=False)
        spread = param("noise", 2.0, support=torch.distributions.constraints.positive)
        with plate("row"):
            observe("y", Normal(layer(given("x"))[0] + 0.7, spread))

    data = rows(400)
    problem, state = run(regression, data, 2500, batch={"row": 100})
    found = state.runs[0]
    where = dict(zip([a.name for a in problem.arrays], slices(problem, found), strict=True))
    assert problem.estimators[[a.name for a in problem.arrays].index("scale")] == "draw"
    assert abs(float(found.mean[-1].exp()) - 0.5) < 0.05
    assert 0.5 < float(found.mean[where["scale"]].exp()) < 3.0
    assert (found.mean[where["fc.weight"]] - torch.tensor([1.0, -2.0, 0.5])).abs().max() < 0.1


def test_point_weights_follow_weight_decay_and_adam():
    @model
    def points():
        layer = nn.Linear(3, 1, name="fc", prior=Normal(0.0, 1.0), bias=nn.point())
        with plate("row"):
            observe("y", Normal(layer(given("x"))[0], 0.5))

    _, free = run(points, rows(), 1500)
    assert abs(float(free.runs[0].mean[-1]) - 0.7) < 0.2
    _, pulled = run(points, rows(), 1500, weight_decay=4.0)  # as much as the data weigh: 1 / 0.25
    assert abs(float(pulled.runs[0].mean[-1] / free.runs[0].mean[-1]) - 0.5) < 0.1


def test_restarts_differ_and_the_best_is_kept():
    from ppl.inference.networks.results import collect

    data = {"x": torch.randn(40, 4).double(), "label": torch.randint(3, (40,))}
    problem, state = run(classifier(hidden=(6,), classes=3), data, 60, restarts=3)
    losses = [s.loss + s.kl / 40 for s in state.runs]
    assert len(set(losses)) == 3
    best = state.runs[losses.index(min(losses))]
    posterior = collect(problem, state)
    assert torch.equal(posterior.mean("fc1.weight").reshape(-1), best.mean[:24])
    assert "the lowest is kept" in str(posterior.diagnostics.notes["restarts"])


def test_the_table_of_noise_is_exact_within_a_step_and_continues(monkeypatch):
    monkeypatch.setattr(noise, "_FEW", 3)
    data = rows()
    rule = {"natural": True, "learning_rate": 0.1}
    problem, state = run(line, data, 70, "draw", **rule)
    a, _ = fit.step_all(problem, state, None)
    problem.table.clear()  # as in a run that is continued from a file
    b, _ = fit.step_all(problem, state, None)
    assert torch.equal(a.runs[0].mean, b.runs[0].mean)
    # 4000 steps read 62 tables of 8 numbers: as good as 500 independent ones.
    draws = torch.stack(
        [
            noise.standard_noise(problem, s, noise.generator_of(problem, s), 4)
            for s in (state.runs[0]._replace(step=i) for i in range(4000))
        ]
    )
    assert draws.mean(0).abs().max() < 4 * 500**-0.5
    assert torch.allclose(draws.var(0), torch.ones(4).double(), atol=4 * (2 / 500) ** 0.5)
    corners = torch.corrcoef(draws.T) - torch.eye(4).double()
    assert corners.abs().max() < 4 * 500**-0.5


def test_a_batch_that_is_no_number_names_the_layer_and_keeps_the_state():
    factor = [1.0]
    augment = {"x": lambda x, generator: x * factor[0]}
    problem, state = run(classifier(hidden=(6,), classes=3), _digits(), 3, augment=augment)
    factor[0] = math.nan
    with pytest.raises(NumericalError, match="what layer 'fc1' gets is not finite"):
        fit.step_all(problem, state, None)
    assert bool(state.runs[0].mean.isfinite().all())
    factor[0] = 1.0
    fit.step_all(problem, state, None)


def test_weights_that_overflow_name_the_layer():
    problem, state = run(classifier(hidden=(6,), classes=3), _digits(), 0)
    (first,) = state.runs
    where = slices(problem, first)[[a.name for a in problem.arrays].index("fc2.weight")]
    first.mean[where] = 1e308
    with pytest.raises(NumericalError, match="layer 'fc2'"):
        fit.step(problem, first, None)


def test_the_noise_of_a_step_is_found_again(monkeypatch):
    seen, of_step = [], []
    problem, runs = run(line, rows(), 1, draws=2)
    real = checks.callables

    def recorded(*arguments):
        seen.append(arguments[3].get_state())
        return real(*arguments)

    def stepped(*arguments):
        of_step.append(arguments[3].get_state())
        return real(*arguments)

    monkeypatch.setattr(slopes, "callables", stepped)
    monkeypatch.setattr(checks, "callables", recorded)
    fit.step(problem, runs.runs[0])
    with pytest.raises(NumericalError, match="all outputs of layers are finite"):
        checks.check_loss(problem, runs.runs[0], None, math.nan)
    assert len(seen) == 2
    assert all(torch.equal(a, b) for a, b in zip(seen, of_step, strict=True))


def test_a_rate_that_is_too_large_is_refused_in_words():
    with pytest.raises(NumericalError, match="the loss|gradient"):
        run(line, rows(), 300, optimiser="sgd", learning_rate=10.0)


def test_the_judge_estimates_the_bound():
    data = rows()
    problem, state = run(line, data, 1000)
    found = judge(problem, state.runs[0])
    first = state.runs[0]
    law = torch.distributions.Normal(data["x"] @ first.mean[:3] + first.mean[3], 0.5)
    spread = data["x"].square() @ sds(problem, first)[:3].square() + sds(problem, first)[3] ** 2
    expected = law.log_prob(data["y"]).sum() - 0.5 * spread.sum() / 0.25
    assert abs(found.log_likelihood - float(expected)) < 4 * max(found.se, 0.1)
    q = torch.distributions.Normal(first.mean, sds(problem, first))
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum()
    assert abs(found.kl - float(kl)) < 1e-9
    assert abs(found.mean_log_likelihood - float(law.log_prob(data["y"]).sum())) < 1e-9


def test_the_divergence_from_a_law_that_reads_a_latent_is_its_mean_over_draws():
    @model
    def scaled():
        s = latent("s", LogNormal(0.0, 1.0))
        layer = nn.Linear(3, 1, name="fc", bias=False, prior=Normal(0.0, s))
        with plate("row"):
            observe("y", Normal(layer(given("x"))[0], 0.5))

    problem, runs = run(scaled, rows(), 1, initial_sd=0.5)
    (state,) = runs.runs
    found = [judge(replace(problem, settings=Settings(Streams(i))), state).kl for i in range(30)]
    sd = sds(problem, state)
    s, w = (slices(problem, state)[i] for i in _places(problem, "s", "fc.weight"))
    normal = torch.distributions.Normal
    own = torch.distributions.kl_divergence(normal(state.mean[s], sd[s]), normal(0.0, 1.0)).sum()
    # E exp(-2 log s) of a Gaussian log s.
    inverse = torch.exp(-2 * state.mean[s] + 2 * sd[s].square())
    squares = (state.mean[w].square() + sd[w].square()).sum()
    expected = own + 3 * state.mean[s] - sd[w].log().sum() + 0.5 * (squares * inverse - 3)
    error = torch.tensor(found).std() / 30**0.5
    assert abs(sum(found) / 30 - float(expected)) < 4 * float(error)
    assert float(0.5 * squares * (inverse - torch.exp(-2 * state.mean[s]))) > 8 * float(error)


def _places(problem, *names):
    known = [a.name for a in problem.arrays]
    return [known.index(n) for n in names]


def _digits():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    return {"x": x, "label": (x[:, 0] > 0).long() + (x[:, 1] > 1).long()}
