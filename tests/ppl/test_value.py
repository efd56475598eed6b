"""Traced values: what torch does to them is recorded; what would leave the trace is refused."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ppl import HalfNormal, ModelError, Normal, deterministic, latent, model, observe, plate
from ppl.graph import Ref
from ppl.value import Value, function_name, is_traced, prototype

ROWS = torch.tensor([[1.0, -0.5], [0.25, 2.0], [0.5, 1.5]], dtype=torch.float64)
IMAGE = torch.linspace(-1.0, 1.0, 16, dtype=torch.float64).reshape(1, 1, 4, 4)
LINEAR = torch.nn.Linear(3, 2).double()

# x: event [3] in a plate; w: event [3, 2] outside; s: a positive number outside.
CASES = [
    ("x+1", lambda x, w, s: x + 1, (3,), True),
    ("1+x", lambda x, w, s: 1 + x, (3,), True),
    ("x-s", lambda x, w, s: x - s, (3,), True),
    ("2.0-x", lambda x, w, s: 2.0 - x, (3,), True),
    ("x*s", lambda x, w, s: x * s, (3,), True),
    ("3*s", lambda x, w, s: 3 * s, (), False),
    ("x/2", lambda x, w, s: x / 2, (3,), True),
    ("1/s", lambda x, w, s: 1 / s, (), False),
    ("x**2", lambda x, w, s: x**2, (3,), True),
    ("2**x", lambda x, w, s: 2**x, (3,), True),
    ("s**x", lambda x, w, s: s**x, (3,), True),
    ("x//2", lambda x, w, s: x // 2, (3,), True),
    ("x%2", lambda x, w, s: x % 2, (3,), True),
    ("-x", lambda x, w, s: -x, (3,), True),
    ("abs", lambda x, w, s: abs(x), (3,), True),
    ("x@w", lambda x, w, s: x @ w, (2,), True),
    ("w.T@x", lambda x, w, s: w.T @ x, (2,), True),
    ("x@tensor", lambda x, w, s: x @ ROWS, (2,), True),
    ("tensor.T@x", lambda x, w, s: ROWS.T @ x, (2,), True),
    ("x@x", lambda x, w, s: x @ x, (), True),
    ("tensor+x", lambda x, w, s: ROWS[:, 0] + x, (3,), True),
    ("x>0", lambda x, w, s: x > 0, (3,), True),
    ("0<=x", lambda x, w, s: 0 <= x, (3,), True),
    ("x==s", lambda x, w, s: x == s, (3,), True),
    ("x!=s", lambda x, w, s: x != s, (3,), True),
    ("~(x>0)", lambda x, w, s: ~(x > 0), (3,), True),
    ("(x>0)&(x<1)", lambda x, w, s: (x > 0) & (x < 1), (3,), True),
    ("x.sum(-1)", lambda x, w, s: x.sum(-1), (), True),
    ("x.sum()", lambda x, w, s: x.sum(), (), True),
    ("w.mean(0)", lambda x, w, s: w.mean(0), (2,), False),
    ("x.amax(keepdim)", lambda x, w, s: x.amax(-1, keepdim=True), (1,), True),
    ("exp", lambda x, w, s: torch.exp(x), (3,), True),
    ("x.exp()", lambda x, w, s: x.exp(), (3,), True),
    ("sigmoid", lambda x, w, s: torch.sigmoid(x), (3,), True),
    ("softplus", lambda x, w, s: F.softplus(x), (3,), True),
    ("softmax", lambda x, w, s: torch.softmax(x, -1), (3,), True),
    ("logsumexp", lambda x, w, s: torch.logsumexp(x, -1), (), True),
    ("linear", lambda x, w, s: F.linear(x, w.T), (2,), True),
    ("linear+bias", lambda x, w, s: F.linear(x, ROWS.T, w[0]), (2,), True),
    ("conv2d", lambda x, w, s: F.conv2d(IMAGE, w.reshape(3, 1, 1, 2))[0], (3, 4, 3), False),
    ("conv2d-plate", lambda x, w, s: F.conv2d(IMAGE, x.reshape(1, 1, 1, 3)), (1, 1, 4, 2), True),
    ("stack", lambda x, w, s: torch.stack([x, x + 1]), (2, 3), True),
    ("stack-mixed", lambda x, w, s: torch.stack([x, w[:, 0], ROWS[:, 1]], -1), (3, 3), True),
    ("cat", lambda x, w, s: torch.cat([x, w[:, 0]]), (6,), True),
    ("where", lambda x, w, s: torch.where(x > 0, x, -x), (3,), True),
    ("where-scalar", lambda x, w, s: torch.where(x > 0, s, 0.0), (3,), True),
    ("einsum", lambda x, w, s: torch.einsum("i,ij->j", x, w), (2,), True),
    ("outer", lambda x, w, s: torch.outer(x, w[:, 1]), (3, 3), True),
    ("clamp", lambda x, w, s: x.clamp(min=0.0), (3,), True),
    ("torch.clamp", lambda x, w, s: torch.clamp(x, -1.0, 1.0), (3,), True),
    ("maximum", lambda x, w, s: torch.maximum(x, s), (3,), True),
    ("w.T", lambda x, w, s: w.T, (2, 3), False),
    ("w.mT", lambda x, w, s: w.mT, (2, 3), False),
    ("reshape", lambda x, w, s: w.reshape(-1), (6,), False),
    ("unsqueeze", lambda x, w, s: x.unsqueeze(0), (1, 3), True),
    ("x[0]", lambda x, w, s: x[0], (), True),
    ("x[-1]", lambda x, w, s: x[-1], (), True),
    ("x[...,1:]", lambda x, w, s: x[..., 1:], (2,), True),
    ("x[:,None]", lambda x, w, s: x[:, None], (3, 1), True),
    ("w[1,0]", lambda x, w, s: w[1, 0], (), False),
    ("x[list]", lambda x, w, s: x[[2, 0]], (2,), True),
    ("tensor[value]", lambda x, w, s: ROWS[(x[0] > 0).long()], (2,), True),
    ("cumsum", lambda x, w, s: x.cumsum(-1), (3,), True),
    ("flip", lambda x, w, s: x.flip(0), (3,), True),
    ("diff", lambda x, w, s: torch.diff(x), (2,), True),
    ("norm", lambda x, w, s: torch.linalg.norm(x), (), True),
    ("module", lambda x, w, s: LINEAR(x), (2,), True),
    ("new_zeros", lambda x, w, s: torch.zeros_like(x) + x, (3,), True),
    ("float()", lambda x, w, s: (x > 0).double().sum(), (), True),
    ("pad", lambda x, w, s: F.pad(x, (1, 1)), (5,), True),
    ("diag", lambda x, w, s: torch.diag_embed(x), (3, 3), True),
    ("lgamma", lambda x, w, s: torch.lgamma(s), (), False),
]  # fmt: skip
IDS = [case[0] for case in CASES]


def traced(function):
    """A model that reports ``function`` of its three latents."""

    @model
    def m():
        w = latent("w", Normal(0.0, 1.0), shape=(3, 2))
        s = latent("s", HalfNormal(1.0))
        with plate("item", 2):
            x = latent("x", Normal(0.0, 1.0), shape=3)
            deterministic("out", function(x, w, s))

    return m


@pytest.mark.parametrize(("name", "function", "event", "in_plate"), CASES, ids=IDS)
def test_a_call_is_recorded_with_the_shape_of_one_element(name, function, event, in_plate):
    graph = traced(function).graph()
    value = graph.factors["out"].value
    assert isinstance(value, Ref)
    node = graph.nodes[value.id]
    assert node.event_shape == event
    assert node.plates == (("item",) if in_plate else ())
    assert node.where.file == __file__


@pytest.mark.parametrize(("name", "function", "event", "in_plate"), CASES, ids=IDS)
def test_a_draw_equals_torch_on_one_element_at_a_time(name, function, event, in_plate):
    with torch.no_grad():
        draws = traced(function).sample(3, seed=1)
        for n in range(3):
            if not in_plate:
                expected = function(draws["x"][n, 0], draws["w"][n], draws["s"][n])
                torch.testing.assert_close(draws["out"][n], expected)
                continue
            for i in range(2):
                expected = function(draws["x"][n, i], draws["w"][n], draws["s"][n])
                torch.testing.assert_close(draws["out"][n, i], expected)


def test_unpacking_gives_the_parts():
    def second(x, w, s):
        a, b, c = x
        return b - a * c

    draws = traced(second).sample(4, seed=0)
    a, b, c = draws["x"].unbind(-1)
    torch.testing.assert_close(draws["out"], b - a * c)


def test_a_call_with_several_results_gives_each():
    def spread(x, w, s):
        low, _ = x.min(-1)
        first, rest = torch.split(x, [1, 2])
        values, order = torch.sort(x)
        return torch.cat([values[:1] - low, first, rest]) + 0 * order.sum()

    out = traced(spread).sample(2, seed=0)["out"]
    assert out.shape == (2, 2, 4)
    assert bool((out[..., 0] == 0).all())


def test_augmented_assignment_rebinds_the_name():
    def grown(x, w, s):
        before = x
        x += 1
        x *= 2
        x -= s
        x /= 4
        return torch.stack([before, x])

    draws = traced(grown).sample(2, seed=0)
    torch.testing.assert_close(draws["out"][:, :, 0], draws["x"])
    expected = ((draws["x"] + 1) * 2 - draws["s"][:, None, None]) / 4
    torch.testing.assert_close(draws["out"][:, :, 1], expected)


def test_a_tensor_that_grows_by_a_value_is_a_value():
    def total(x, w, s):
        sum_ = torch.zeros(3, dtype=torch.float64)
        sum_ = sum_ + x
        sum_ += s
        return sum_

    draws = traced(total).sample(2, seed=0)
    torch.testing.assert_close(draws["out"], draws["x"] + draws["s"][:, None, None])


def test_a_numpy_number_is_a_number():
    draws = traced(lambda x, w, s: np.sqrt(4.0) * x - np.float64(1.0)).sample(2, seed=0)
    torch.testing.assert_close(draws["out"], 2.0 * draws["x"] - 1.0)


def test_a_torch_distribution_of_values_is_a_law():
    @model
    def m():
        v = latent("v", Normal(0.0, 1.0))
        with plate("row", 4):
            observe("y", torch.distributions.Normal(v, 1.0))

    graph = m.graph()
    assert graph.factors["y"].scope == ("y", "v")
    assert graph.variables["y"].event_shape == ()
    assert m.sample(3, seed=0)["y"].shape == (3, 4)


def test_reading_the_shape_records_nothing():
    seen = {}

    @model
    def m():
        x = latent("x", Normal(0.0, 1.0), shape=(3, 2))
        seen.update(shape=tuple(x.shape), ndim=x.ndim, dtype=x.dtype, len=len(x), size=x.size(0))
        seen.update(numel=x.numel(), dim=x.dim(), floating=x.is_floating_point(), device=x.device)
        seen["traced"], seen["plain"] = is_traced(x), type(prototype(x))
        seen["text"] = f"{x}"

    assert len(m.graph().nodes) == 1
    assert seen["shape"] == (3, 2) and seen["ndim"] == 2 and seen["len"] == 3
    assert seen["dtype"] == torch.float64 and seen["traced"] and seen["plain"] is torch.Tensor
    assert seen["text"] == "<value of no plate; one element [3, 2], float64>"


def test_names_of_functions_and_of_properties():
    assert function_name(torch.exp) == "exp"
    assert function_name(torch.Tensor.T.__get__) == "T"


# ---- what leaves the trace ---------------------------------------------------------------------


def assign(x):
    x[0] = 1.0


def delete(x):
    del x[0]


def augmented_item(x):
    x[0] += 1.0


REFUSED = [
    ("if", lambda x: 1.0 if x[0] > 0 else 2.0, "may not branch"),
    ("bool", lambda x: bool(x[0]), "may not branch"),
    ("and", lambda x: x[0] and x[1], "may not branch"),
    ("not", lambda x: not x[0], "may not branch"),
    ("max", lambda x: max(x[0], x[1]), "may not branch"),
    ("chain", lambda x: 0 < x[0] < 1, "may not branch"),
    ("float", lambda x: float(x[0]), "number or a NumPy array"),
    ("int", lambda x: int(x[0]), "number or a NumPy array"),
    ("complex", lambda x: complex(x[0]), "number or a NumPy array"),
    ("item", lambda x: x[0].item(), "number or a NumPy array"),
    ("tolist", lambda x: x.tolist(), "number or a NumPy array"),
    ("numpy", lambda x: x.numpy(), "number or a NumPy array"),
    ("np.asarray", lambda x: np.asarray(x), "number or a NumPy array"),
    ("np.exp", lambda x: np.exp(x), "number or a NumPy array"),
    ("np-left", lambda x: np.ones(3) + x, "number or a NumPy array"),
    ("np-matmul", lambda x: np.ones((2, 3)) @ x, "number or a NumPy array"),
    ("np-right", lambda x: x * np.ones(3), "number or a NumPy array"),
    ("math.exp", lambda x: math.exp(x[0]), "number or a NumPy array"),
    ("range", lambda x: range(x[0].long()), "number or a NumPy array"),
    ("list-index", lambda x: [1, 2, 3][x[0].long()], "number or a NumPy array"),
    ("round", lambda x: [round(float(x[0]))], "number or a NumPy array"),
    ("in", lambda x: 1.0 in x, "number or a NumPy array"),
    ("setitem", assign, "may not assign"),
    ("delitem", delete, "may not assign|support item deletion"),
    ("augmented-item", augmented_item, "may not assign"),
    ("add_", lambda x: x.add_(1), "may not assign"),
    ("mul_", lambda x: x.mul_(2), "may not assign"),
    ("torch.exp_", lambda x: torch.exp_(x), "may not assign"),
    ("relu-inplace", lambda x: F.relu(x, inplace=True), "may not assign|inplace"),
    ("fill", lambda x: torch.nn.init.zeros_(x), "may not assign"),
    ("requires_grad_", lambda x: x.requires_grad_(), "may not assign"),
    ("out", lambda x: torch.exp(x, out=torch.zeros(3)), "out="),
    ("bernoulli", lambda x: torch.bernoulli(x), "draws random numbers"),
    ("normal", lambda x: torch.normal(x, 1.0), "draws random numbers"),
    ("randn_like", lambda x: torch.randn_like(x), "draws random numbers"),
    ("dropout", lambda x: F.dropout(x), "draws random numbers"),
    ("iterate-number", lambda x: list(x[0]), "cannot be iterated over"),
    ("index-number", lambda x: x[0][0], "cannot be indexed"),
    ("shape", lambda x: x + torch.ones(4), "one element"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "use", "text"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_leaves_the_trace_is_an_error_at_the_users_line(name, use, text):
    @model
    def m():
        use(latent("x", Normal(0.5, 0.1), shape=3))

    with pytest.raises(ModelError) as caught:
        m.graph()
    assert re.search(text, str(caught.value)), str(caught.value)
    assert re.match(r"test_value\.py:\d+: ", str(caught.value))
    last = caught.traceback[-1]
    assert str(last.path) == __file__


def test_a_tensor_cannot_take_a_value_in():
    @model
    def m():
        buffer = torch.zeros(3)
        buffer[0] = latent("x", Normal(0.0, 1.0))

    with pytest.raises(ModelError, match="may not assign"):
        m.graph()


def test_a_tensor_cannot_grow_by_a_value_in_place():
    @model
    def m():
        torch.zeros(3).add_(latent("x", Normal(0.0, 1.0)))

    with pytest.raises(ModelError, match="may not assign"):
        m.graph()


def test_a_value_is_of_no_use_after_tracing():
    kept = []

    @model
    def m():
        kept.append(latent("x", Normal(0.0, 1.0)))

    m.graph()
    assert isinstance(kept[0], Value)
    with pytest.raises(ModelError, match="finished tracing"):
        kept[0] + 1


def test_a_value_cannot_travel_to_another_model():
    kept = []

    @model
    def first():
        kept.append(latent("x", Normal(0.0, 1.0)))

    @model
    def second():
        latent("y", Normal(kept[0] + 1, 1.0))

    first.graph()
    with pytest.raises(ModelError, match="another model"):
        second.graph()
