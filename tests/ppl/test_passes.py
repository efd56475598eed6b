"""What passes tell of expressions: degree in the latents, accesses, Gaussian conditionals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import ppl
from ppl import (
    Categorical,
    Markov,
    MultivariateNormal,
    Normal,
    StudentT,
    deterministic,
    dot,
    factor,
    given,
    latent,
    logsumexp,
    mean,
    model,
    observe,
    param,
    pick,
    plate,
    shift,
)
from ppl.graph import Graph, Ref
from ppl.lower import Compiler
from ppl.passes import Degree, degree, gaussian_given, implied_gathers, upstream

C, A, B, N = Degree.CONSTANT, Degree.AFFINE, Degree.BILINEAR, Degree.NONLINEAR
EYE = 2.0 * torch.eye(3, dtype=torch.float64)

# Expressions of two scalars x, y, a vector v, a covariate c and a param p; their degree in {x, y, v}.
TABLE: dict[str, tuple[Degree, Callable]] = {
    "covariate": (C, lambda x, y, v, c, p: c * p),
    "function of a covariate": (C, lambda x, y, v, c, p: torch.exp(c) / (1.0 + p)),
    "itself": (A, lambda x, y, v, c, p: x + 0.0),
    "sum": (A, lambda x, y, v, c, p: 1.0 - x + 2.0 * y),
    "reversed difference": (A, lambda x, y, v, c, p: torch.rsub(x, 2.0)),
    "scaled by a covariate": (A, lambda x, y, v, c, p: c * x + p),
    "divided by a covariate": (A, lambda x, y, v, c, p: x / (1.0 + c * c)),
    "square of a covariate": (A, lambda x, y, v, c, p: c**2 * x),
    "negative": (A, lambda x, y, v, c, p: -x),
    "matrix": (A, lambda x, y, v, c, p: EYE @ v),
    "vector sum": (A, lambda x, y, v, c, p: (v + x).sum(-1)),
    "mean": (A, lambda x, y, v, c, p: v.mean()),
    "item": (A, lambda x, y, v, c, p: v[0] + v[..., 1:].sum()),
    "stack": (A, lambda x, y, v, c, p: torch.stack([x, y, c])),
    "cat": (A, lambda x, y, v, c, p: torch.cat([v, v + 1.0])),
    "linear": (A, lambda x, y, v, c, p: functional.linear(v, EYE)),
    "linear with bias": (A, lambda x, y, v, c, p: functional.linear(v, EYE, v)),
    "einsum": (A, lambda x, y, v, c, p: torch.einsum("ij,j->i", EYE, v)),
    "product": (B, lambda x, y, v, c, p: x * y),
    "product and sum": (B, lambda x, y, v, c, p: x * y + y - c),
    "scaled product": (B, lambda x, y, v, c, p: 3.0 * (x * v)),
    "linear in both": (B, lambda x, y, v, c, p: functional.linear(v, x * EYE)),
    "square": (N, lambda x, y, v, c, p: x * x),
    "product with a sum of itself": (N, lambda x, y, v, c, p: x * (x + y)),
    "three": (N, lambda x, y, v, c, p: x * y * (v + 1.0)),
    "sum of products that share": (N, lambda x, y, v, c, p: (x * y) * x),
    "exponential": (N, lambda x, y, v, c, p: torch.exp(x)),
    "power": (N, lambda x, y, v, c, p: x**2),
    "quotient": (N, lambda x, y, v, c, p: c / x),
    "left quotient": (N, lambda x, y, v, c, p: 1.0 / x),
    "ratio": (N, lambda x, y, v, c, p: x / y),
    "inner": (N, lambda x, y, v, c, p: v @ v),
    "where": (N, lambda x, y, v, c, p: torch.where(c > 0, x, y * y)),
    "condition": (N, lambda x, y, v, c, p: torch.where(x > 0, x, 0.0)),
    "softmax": (N, lambda x, y, v, c, p: v.softmax(-1)),
    "sort": (N, lambda x, y, v, c, p: torch.sort(v)[0]),
    "largest": (N, lambda x, y, v, c, p: v.amax(-1)),
    "alternating": (A, lambda x, y, v, c, p: torch.add(x, y, alpha=3)),
    "whole number": (N, lambda x, y, v, c, p: v.long().double()),
}


def _traced(expression: Callable) -> Graph:
    def one() -> None:
        x, y = latent("x", Normal(0.0, 1.0)), latent("y", Normal(0.0, 1.0))
        v, p = latent("v", Normal(0.0, 1.0), shape=3), param("p", 0.7)
        deterministic("out", expression(x, y, v, given("c"), p))

    return model(one).graph({"c": 0.4})


def _sampled_degree(graph: Graph) -> Degree:
    """Degree from second differences of the lowered expression along random lines."""
    names = {"x": (), "y": (), "v": (3,), "c": (), "p": ()}
    compiler = Compiler(graph, {n: () for n in names}, ())
    lowered = compiler.finish([compiler.operand(graph.factors["out"].value)])
    base = {n: torch.rand(s, dtype=torch.float64) + 0.2 for n, s in names.items()}
    base["c"], base["p"] = (
        torch.tensor(0.4, dtype=torch.float64),
        torch.tensor(0.7, dtype=torch.float64),
    )

    def bends(moving: tuple[str, ...], order: int) -> bool:
        step = {n: torch.rand(names[n], dtype=torch.float64) for n in moving}
        points = [
            {**base, **{n: base[n] + t * d for n, d in step.items()}} for t in range(order + 1)
        ]
        values = torch.stack([lowered({k: q[k] for k in lowered.inputs})[0] for q in points])
        return bool((values.diff(n=order, dim=0).abs() > 1e-9).any())

    everything = ("x", "y", "v")
    if not bends(everything, 1):
        return C
    if not bends(everything, 2):
        return A
    return B if not any(bends((n,), 2) for n in everything) and not bends(everything, 3) else N


@pytest.mark.parametrize("name", TABLE)
def test_degree(name: str) -> None:
    expected, expression = TABLE[name]
    graph = _traced(expression)
    found = degree(graph, graph.factors["out"].value, frozenset("xyv"))
    assert found == expected
    assert found >= _sampled_degree(graph), "claims less than the expression does"


def test_degree_counts_only_the_latents_asked_for() -> None:
    graph = _traced(lambda x, y, v, c, p: x * torch.exp(y))
    value = graph.factors["out"].value
    assert degree(graph, value, frozenset("x")) == A
    assert degree(graph, value, frozenset("y")) == N
    assert degree(graph, value, frozenset("xy")) == N
    assert degree(graph, value, frozenset("v")) == C
    assert degree(graph, 3.0, frozenset("x")) == C


def _plated() -> Graph:
    def program() -> None:
        level = latent("level", Normal(0.0, 1.0))
        a = plate("a", 3)
        b = plate("b", 4, within=a)
        time = plate("time", 5, ordered=True)
        with a:
            x = latent("x", Normal(level, 1.0))
            w = latent("w", Normal(0.0, 1.0))
        with b:
            latent("z", Normal(x, 1.0))
            i = given("i", index=a)
            deterministic("looked up", x[i] + 1.0)
            factor("of another", Normal(x[i], 1.0), at=0.0)
        with plate("row", 2):
            chosen = latent("chosen", Categorical(logits=torch.zeros(3), over=a))
            deterministic("by a latent", x[chosen])
        with time:
            s = latent("s", Markov(Normal(level, 1.0), lambda before: Normal(before + level, 1.0)))
            deterministic("ahead", shift(s, time) - s)
            factor("smooth", Normal(s, 1.0), at=shift(s, time))
        deterministic("sum", ppl.sum(x, over=a))
        deterministic("mean", mean(x, over=a) + level)
        deterministic("logsumexp", logsumexp(x, over=a))
        deterministic("dot", dot(x, w, over=a))
        deterministic("dot with itself", dot(x, x, over=a))
        deterministic("pick", pick(x, a=1))
        factor("total", Normal(ppl.sum(x, over=a), 1.0), at=level)

    data = {"a": [0, 1, 2, 0], "i": [0, 1, 1, 2]}
    return model(program).graph(data)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sum", A), ("mean", A), ("logsumexp", N), ("dot", B), ("dot with itself", N), ("pick", A), ("looked up", A),
        ("by a latent", N), ("ahead", A),
    ],
)  # fmt: skip
def test_degree_along_plates(name: str, expected: Degree) -> None:
    graph = _plated()
    names = frozenset(v.name for v in graph.latents)
    assert degree(graph, graph.factors[name].value, names) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x", {"x": {"same"}, "level": {"broadcast"}}),
        ("z", {"z": {"same"}, "x": {"gather"}}),
        ("of another", {"x": {"gather"}, "i": {"same"}}),
        ("s", {"s": {"same", "lag"}, "level": {"broadcast"}}),
        ("smooth", {"s": {"same", "lag"}}),
        ("total", {"x": {"all"}, "level": {"same"}}),
        ("pick", {"x": {"gather"}}),
    ],
)
def test_accesses(name: str, expected: dict[str, set[str]]) -> None:
    graph = _plated()
    assert {v: set(graph.access(name, v)) for v in expected} == expected
    assert graph.access(name, "w") == frozenset()


def test_implied_gathers_name_what_is_looked_up() -> None:
    found = implied_gathers(_plated())
    assert found["z"] == ("x",) and "x" in found["of another"]
    assert "total" not in found and "s" not in found


def test_upstream_reaches_through_shared_expressions() -> None:
    graph = _plated()
    value = graph.factors["by a latent"].value
    assert isinstance(value, Ref)
    assert upstream(graph, value.id) == {"x", "chosen"}


LAWS: dict[str, tuple[bool, Callable[[Tensor, Tensor, Tensor], object]]] = {
    "affine": (True, lambda x, y, v: Normal(2.0 * x + y, 0.5)),
    "vector": (True, lambda x, y, v: Normal(v + x, 0.5)),
    "multivariate": (True, lambda x, y, v: MultivariateNormal(EYE @ v, covariance_matrix=EYE)),
    "bilinear": (False, lambda x, y, v: Normal(x * y, 0.5)),
    "curved": (False, lambda x, y, v: Normal(torch.exp(x), 0.5)),
    "spread": (False, lambda x, y, v: Normal(x, torch.exp(y))),
    "multivariate spread": (
        False,
        lambda x, y, v: MultivariateNormal(v, covariance_matrix=EYE * torch.exp(x)),
    ),
    "heavy tails": (False, lambda x, y, v: StudentT(3.0, x, 1.0)),
    "robust": (False, lambda x, y, v: Normal(x, 1.0).robust("huber", 1.3)),
    "masked": (False, lambda x, y, v: Normal(x, 1.0).masked(torch.tensor(True))),
}


@pytest.mark.parametrize("name", LAWS)
def test_gaussian_given(name: str) -> None:
    expected, law = LAWS[name]

    def program() -> None:
        x, y = latent("x", Normal(0.0, 1.0)), latent("y", Normal(0.0, 1.0))
        v = latent("v", Normal(0.0, 1.0), shape=3)
        observe("out", law(x, y, v))

    graph = model(program).graph()
    made = graph.factors["out"].law
    assert made is not None
    assert gaussian_given(graph, made, frozenset("xyv")) is expected
    if name in ("spread", "bilinear"):  # with y known, it is
        assert gaussian_given(graph, made, frozenset("xv"))
