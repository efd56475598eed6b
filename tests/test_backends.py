"""What every backend promises, on the same graphs: pure steps, seeds, dtypes, agreement with an oracle, refusals."""

from __future__ import annotations

import dataclasses
import inspect
import warnings

import pytest
import torch
from torch.utils._pytree import tree_flatten

from ppl import (
    Categorical,
    Flat,
    HalfNormal,
    Markov,
    ModelError,
    Normal,
    UnsupportedError,
    backend,
    dot,
    given,
    infer,
    latent,
    model,
    nn,
    observe,
    plate,
)
from ppl.backend import Settings
from ppl.streams import Streams
from tests.conjugate import coin
from tests.small_programs import autoregression, line

NAMES = ("exact", "qem", "laplace", "gbp", "amp", "vi", "rws", "ssvi")
OPTIONS = {"ssvi": {"density": 1.0}}  # all weights, for the oracles know no sets


@model
def groups():
    spread = latent("spread", HalfNormal(2.0))
    school = plate("school")
    with school:
        level = latent("level", Normal(1.0, spread))
    with plate("pupil", within=school):
        observe("score", Normal(level, 1.0))


@model
def mixture():
    with plate("component", 2) as component:
        centre = given("centre")
    with plate("point"):
        z = latent("z", Categorical(torch.tensor([0.3, 0.7]), over=component))
        observe("x", Normal(centre[z], 1.0))


@model
def hidden_markov():
    with plate("t", ordered=True):
        z = latent(
            "z",
            Markov(
                Categorical(torch.tensor([0.5, 0.5])),
                lambda before: Categorical(torch.tensor([[0.9, 0.1], [0.2, 0.8]])[before]),
            ),
        )
        observe("y", Normal(3.0 * z, 1.0))


@model
def mixing():
    row, coefficient = plate("row"), plate("coefficient")
    with coefficient:
        x = latent("x", Normal(0.0, 1.0))
    with row:
        with coefficient:
            design = given("design")
        observe("y", Normal(dot(design, x, over=coefficient), 0.5))


@model
def layer():
    linear = nn.Linear(3, 1, name="fc")
    with plate("row"):
        observe("y", Normal(linear(given("x"))[0], 0.5))


ROWS = torch.randn(12, 3, generator=torch.Generator().manual_seed(1)).double()
DESIGN = torch.randn(24, 12, generator=torch.Generator().manual_seed(0)).double() / 24**0.5
GRAPHS = {
    "coin": (coin(heads=2.0, tails=2.0), {"heads": [1, 0, 1, 1, 1]}),
    "line": (line, {"x": [-1.0, 0.0, 0.5, 2.0], "y": [0.1, 0.9, 1.6, 3.2]}),
    "groups": (
        groups,
        {"score": [2.0, 1.0, 0.1, 4.0, 3.0, float("nan")], "school": list("aabbbc")},
    ),
    "mixture": (mixture, {"x": [-2.0, 0.5, 3.0], "centre": [-2.0, 2.0]}),
    "series": (autoregression, {"y": [0.3, 0.9, -0.2, 0.4, 1.0]}),
    "hidden markov": (hidden_markov, {"y": [0.2, -0.5, 2.7, 3.5, 3.0, 0.1]}),
    "mixing": (mixing, {"design": DESIGN, "y": DESIGN @ torch.linspace(-2.0, 2.0, 12).double()}),
    "layer": (layer, {"x": ROWS, "y": 0.3 + ROWS @ torch.tensor([0.5, -0.4, 0.0]).double()}),
}


# Which graphs each backend fits, and how far it may be from the oracle: means in posterior standard deviations, then
# logs of standard deviations (None where its variances are known to be approximate), then nats of evidence.
FITS = {
    "exact": dict.fromkeys(GRAPHS, (1e-8, 1e-8, 1e-8)),
    "qem": dict.fromkeys(set(GRAPHS) - {"mixing"}, (0.15, 0.15, 0.02)),
    "laplace": dict.fromkeys(("line", "series", "mixing", "layer"), (1e-6, 1e-6, 1e-6)),
    "gbp": {
        "line": (1e-3, None, None),
        "series": (1e-6, 1e-6, 1e-6),
        "mixing": (1e-2, None, None),
    },
    # One variance for all coefficients: right on average only.
    "amp": {"line": (1e-3, None, None), "mixing": (1e-3, 0.3, None)},
    # Mean field: scales of conditionals, and a bound that lies below the evidence by as much as they leave out.
    "vi": {
        "coin": (0.15, 0.15, 0.02),
        "line": (0.05, 0.15, 0.08),
        "mixture": (1e-8, 1e-8, 1e-8),
        "series": (0.05, None, 0.4),
        "hidden markov": (1e-8, 1e-8, 1e-8),
        "mixing": (0.05, None, 1.0),
        "layer": (0.1, None, 0.5),
    },
    "rws": dict.fromkeys(set(GRAPHS) - {"mixing"}, (0.15, 0.15, 0.02)),
    "ssvi": {"layer": (0.1, None, 0.5)},
}
PAIRS = [(method, graph) for method in NAMES for graph in GRAPHS if graph in FITS[method]]


def fit(name, method, **options):
    program, data = GRAPHS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return infer(
            program, data, method=method, **{"seed": 0, **OPTIONS.get(method, {}), **options}
        )


def same(a, b):
    """Equal leaves of two states, NaN included."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(), b.nan_to_num())
    return a == b or (a != a and b != b)


@pytest.mark.parametrize("method", NAMES)
def test_a_backend_is_a_module_with_six_names(method):
    module = backend.load(method)
    for name in ("supports", "prepare", "init", "step", "posterior"):
        assert inspect.isfunction(getattr(module, name)), name
    assert dataclasses.is_dataclass(module.Options) and module.Options.__dataclass_params__.frozen
    module.Options()  # every field has a default


@pytest.mark.parametrize(
    ("method", "idle", "beside"),
    [
        ("gbp", {"active": 0.5}, {"schedule": "residual"}),
        ("gbp", {"rows": {"y": [True]}}, {"schedule": "attention"}),
        ("gbp", {"threshold": 0.5, "relinearise": 1, "cure": False}, {"relinearise": "jit"}),
        ("gbp", {"graduated": 1.0, "graduated_steps": 9}, {"graduated": 4.0}),
        ("laplace", {"damping": 0.1, "optimiser": "dogleg"}, {"optimiser": "lm"}),
        ("laplace", {"draws": 10, "solver": "superlu"}, {"solver": "cg"}),
        ("vi", {"rank": 2}, {"family": "low_rank"}),
        ("ssvi", {"momentum": 0.5}, {"optimiser": "sgd"}),
    ],
)
def test_an_option_that_others_leave_without_a_say_is_refused(method, idle, beside):
    make = backend.load(method).Options
    with pytest.raises(ModelError, match=r"\(.*=...\) is an option of .*Leave it out"):
        make(**idle)
    make(**{**idle, **beside})


@pytest.mark.parametrize(("method", "graph"), PAIRS)
def test_a_step_changes_nothing_that_it_was_given(method, graph):
    module = backend.load(method)
    program, data = GRAPHS[graph]
    problem = module.prepare(
        program.bind(data), module.Options(**OPTIONS.get(method, {})), Settings(Streams(0))
    )
    state = module.init(problem)
    before = [
        leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in tree_flatten(state)[0]
    ]
    bound = {k: v.clone() for k, v in problem.bound.values.items()}
    module.step(problem, state, None)
    for old, new in zip(before, tree_flatten(state)[0], strict=True):
        assert same(old, new)
    assert all(torch.equal(bound[k], v) for k, v in problem.bound.values.items())


@pytest.mark.parametrize(("method", "graph"), PAIRS)
def test_the_same_seed_gives_the_same_answer(method, graph):
    a, b = (fit(graph, method, max_iters=5) for _ in range(2))
    for site in a.marginals:
        assert torch.equal(a.mean(site), b.mean(site))
        assert torch.equal(a.samples(4)[site], b.samples(4)[site])


@pytest.mark.parametrize(("method", "graph"), PAIRS)
def test_float32_gives_the_same_answer_within_tolerance(method, graph):
    a, b = fit(graph, method), fit(graph, method, dtype=torch.float32)
    for site in a.marginals:
        assert b.mean(site).dtype == torch.float32
        apart = (a.mean(site) - b.mean(site)).abs() / a.sd(site).clamp(min=1e-3)
        assert float(apart.max()) < 0.15, (site, apart)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine")
@pytest.mark.parametrize(("method", "graph"), PAIRS)
def test_cuda_gives_the_same_answer_within_tolerance(method, graph):
    a, b = fit(graph, method), fit(graph, method, device="cuda")
    for site in a.marginals:
        assert b.mean(site).is_cuda
        apart = (a.mean(site) - b.mean(site).cpu()).abs() / a.sd(site).clamp(min=1e-3)
        assert float(apart.max()) < 0.15, (site, apart)


@pytest.mark.parametrize(("method", "graph"), [p for p in PAIRS if p[0] != "exact"])
def test_it_agrees_with_the_oracle(method, graph):
    exact, found = fit(graph, "exact"), fit(graph, method)
    means, spreads, nats = FITS[method][graph]
    for site in exact.marginals:
        sd = exact.sd(site).clamp(min=1e-3)
        assert float(((found.mean(site) - exact.mean(site)).abs() / sd).max()) < means, site
        wide = exact.sd(site) > 1e-3
        apart = (found.sd(site) / exact.sd(site)).log().abs()[wide].max()
        assert spreads is None or float(apart) < spreads, site
    apart = abs(found.log_evidence.value - exact.log_evidence.value)
    assert nats is None or apart < 5 * found.log_evidence.se + nats, found.log_evidence


@pytest.mark.parametrize("method", [n for n in NAMES if n != "vi"])  # which fits this one
def test_a_refusal_lists_reasons_with_remedies(method):
    @model
    def crossed():
        scale = [latent(f"scale{i}", HalfNormal(1.0)) for i in range(5)]
        with plate("user", 3) as user:
            taste = latent("taste", Normal(0.0, scale[0] * scale[1]))
        with plate("film", 4) as film:
            quality = latent("quality", Normal(0.0, scale[2] * scale[3]))
        with user, film:
            observe("y", Normal(taste * quality, scale[4]))

    with pytest.raises(UnsupportedError) as caught:
        infer(crossed, {"y": torch.zeros(3, 4)}, method=method)
    text = str(caught.value)
    assert text.startswith(f"{method} cannot fit this model:")
    assert "'taste'" in text or "taste" in text or "scale" in text
    assert any(remedy in text for remedy in ("method=", "another method", "groups", "Put the"))


@pytest.mark.parametrize("method", [n for n in NAMES if n not in ("amp", "ssvi")])
def test_flat_priors_are_welcome_where_the_posterior_is_proper(method):
    @model
    def flat():
        mean = latent("mean", Flat())
        with plate("row"):
            observe("y", Normal(mean, 1.0))

    posterior = infer(flat, {"y": [1.0, 2.0, 4.5]}, method=method, seed=0)
    assert abs(float(posterior.mean("mean")) - 2.5) < 0.03
    assert abs(float(posterior.sd("mean")) - 3**-0.5) < 0.03
