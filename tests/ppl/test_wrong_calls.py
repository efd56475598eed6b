"""Calls that cannot be meant are refused in words, at the call."""

from __future__ import annotations

import math

import pytest
import torch

from ppl import (
    DataError,
    HalfNormal,
    ModelError,
    Normal,
    UnsupportedError,
    infer,
    latent,
    model,
    observe,
    plate,
)
from tests.conjugate import normal_mean

ROWS = torch.tensor([0.3, -1.0, 0.2, 1.4], dtype=torch.float64)


@model
def nested():
    mean, spread = latent("mean", Normal(0.0, 1.0)), latent("spread", HalfNormal(1.0))
    with plate("group"):
        effect = latent("effect", Normal(mean, spread), shape=4)
        with plate("row"):
            observe("y", Normal(effect.sum(-1), 1.0))


@pytest.mark.parametrize("method", ["qem", "laplace", "exact", "vi"])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_observation_is_told_by_site_count_and_label(method, value):
    y = ROWS.clone()
    y[2:] = value
    text = (
        r"'y' \(observed\): 2 entries are infinite, the first at row 'c'.*NaN, which sums them out"
    )
    with pytest.raises(DataError, match=text):
        infer(normal_mean, {"y": y}, method=method, labels={"row": list("abcd")})


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("max_iters", 0, "max_iters: expected a whole number of at least 1, got 0"),
        ("max_iters", True, "max_iters: expected a whole number of at least 1, got True"),
        ("seed", "a", "seed: expected a whole number or None, got 'a'"),
        ("seed", 1.5, "seed: expected a whole number or None, got 1.5"),
        ("restarts", True, "restarts: expected a whole number of at least 1, got True"),
        ("tol", "a", "tol: expected a number that is not negative, got 'a'"),
        ("memory", 1.5, "memory: expected bytes or text such as '4GiB', got 1.5"),
        ("bridge", "no", r"QEM\(bridge=...\): expected True or False, got 'no'"),
        ("variance_correction", 3, r"QEM\(variance_correction=...\): expected True or False"),
        ("distribute", 3, r"QEM\(distribute=...\): expected the name of a plate, got 3"),
        ("step", True, r"QEM\(step=...\): expected 'schedule', a number"),
        ("step", lambda t: 2.0, r"the function gave 2.0 at 0"),
        (
            "joint_up_to",
            -1,
            r"QEM\(joint_up_to=...\): expected a whole number that is not negative",
        ),
        ("enumerate_up_to", 2.5, r"QEM\(enumerate_up_to=...\): expected a whole number"),
        ("tails", "x", r"QEM\(tails=...\): expected a positive number or inf, got 'x'"),
        ("groups", 3, r"QEM\(groups=...\): expected 'auto', 'correlation' or groups"),
        ("groups", ["mean"], r"QEM\(groups=...\): expected 'auto', 'correlation' or groups"),
        ("q", "mean", r"QEM\(q=...\): expected a mapping from latents to proposals"),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused(option, value, text):
    with pytest.raises(ModelError, match=text):
        infer(
            normal_mean, {"y": ROWS}, method="qem", **{"seed": 0, "progress": False, option: value}
        )


def test_too_little_memory_is_told_by_factor_axes_bytes_and_remedy():
    y = torch.randn((50, 20), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(UnsupportedError) as caught:
        infer(nested, {"y": y}, method="qem", seed=0, particles=100, memory="100KiB")
    text = str(caught.value)
    assert "the factor of 'effect' over [group, k:mean+spread, k:effect, event of 4]" in text
    assert "2000000 entries, 15.3 MiB" in text and "The budget is 0.0977 MiB" in text
    assert "particles=..." in text and "minibatch=..." in text and "memory=..." in text
