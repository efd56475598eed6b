"""The log joint of every posteriordb model against a formula of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from benchmarks.posteriordb.models import MODELS, data_folder, load
from ppl.binding import Bound
from ppl.graph import Variable
from ppl.lower import Compiler, map_name
from tests.benchmarks.posteriordb_formulas import FORMULAS, concentrations

FOLDER = data_folder()

pytestmark = pytest.mark.skipif(
    FOLDER is None,
    reason="the references of posteriordb are neither in $PPL_DATA nor in ../shared/data",
)


def log_joint(bound: Bound, points: list[dict[str, np.ndarray]]) -> np.ndarray:
    """Sum of all log-densities of the graph, once for every value of all latents."""
    graph = bound.graph
    axes = {
        v.name: v.plates if v.name in bound.values else ("draw", *v.plates)
        for v in graph.variables.values()
    }
    compiler = Compiler(graph, axes, ("draw", *graph.plates))
    outputs = [compiler.density(f) for f in graph.densities]
    outputs += [compiler.transition(f) for f in graph.densities if f.chain]
    arrays = dict(bound.values) | {map_name(*key): m for key, m in bound.maps.items()}
    arrays |= {name: torch.as_tensor(np.stack([p[name] for p in points])) for name in points[0]}
    lowered = compiler.finish(outputs)
    parts = lowered({k: arrays[k] for k in lowered.inputs})
    return sum(part.reshape(len(points), -1).sum(1) for part in parts).numpy()


def draw(
    bound: Bound, reference: Mapping[str, Any], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """A point within the spread of the reference, or of order one for latents that it lacks."""
    return {v.name: _draw(v, bound.shape(v), reference, rng) for v in bound.graph.latents}


def _draw(
    v: Variable, shape: tuple[int, ...], reference: Mapping[str, Any], rng: np.random.Generator
) -> np.ndarray:
    if v.is_discrete:
        return rng.integers(0, v.cardinality, shape).astype(float)
    if str(v.support) == "Simplex()":
        return rng.dirichlet(np.ones(shape[-1]))
    names = [
        v.name + ("[" + ",".join(str(i + 1) for i in at) + "]" if at else "")
        for at in np.ndindex(*shape)
    ]
    known = [reference["params"].get(name) for name in names]
    mean, sd = (
        np.array([k[part] if k else rest for k in known])
        for part, rest in (("mean", 0.5), ("sd", 0.3))
    )
    noise = rng.standard_normal(len(names))
    is_real = str(v.support) in ("Real()", "IndependentConstraint(Real(), 1)")
    value = (
        mean + sd * noise if is_real else mean * np.exp(np.clip(0.5 * sd / mean, 0, 0.3) * noise)
    )
    return value.reshape(shape)


def raw_data(name: str) -> dict[str, np.ndarray]:
    assert FOLDER is not None
    return {
        k: np.asarray(v, float)
        for k, v in json.loads((FOLDER / name / "data.json").read_text()).items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_log_joint_agrees_with_its_formula(name: str):
    assert FOLDER is not None
    rng = np.random.default_rng(0)
    bound = MODELS[name].model.bind(load(FOLDER, name))
    reference = json.loads((FOLDER / name / "reference.json").read_text())
    points = [draw(bound, reference, rng) for _ in range(5)]
    ours = log_joint(bound, points)
    theirs = np.array([FORMULAS[name](raw_data(name), p) for p in points])
    assert np.ptp(theirs) > 1e-3, "the points do not tell densities apart"
    np.testing.assert_allclose(ours - ours[0], theirs - theirs[0], rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_every_reference_parameter_is_a_site(name: str):
    assert FOLDER is not None
    bound = MODELS[name].model.bind(load(FOLDER, name))
    reference = json.loads((FOLDER / name / "reference.json").read_text())
    sites = {v.name for v in bound.graph.latents} | set(bound.graph.deterministics)
    assert {p.partition("[")[0] for p in reference["params"]} <= sites


def test_fixed_steps_solve_the_differential_equation():
    name = "one_comp_mm_elim_abs-one_comp_mm_elim_abs"
    d = raw_data(name)
    assert FOLDER is not None
    means = json.loads((FOLDER / name / "reference.json").read_text())["params"]
    p = {k: means[k]["mean"] for k in ("k_a", "K_m", "V_m")}

    def slope(t: float, c: np.ndarray) -> np.ndarray:
        absorbed = d["D"] * p["k_a"] / d["V"] * np.exp(-p["k_a"] * t)
        return absorbed - p["V_m"] / d["V"] * c / (p["K_m"] + c)

    exact = solve_ivp(slope, (0, d["times"][-1]), [0.0], t_eval=d["times"], rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(concentrations(d, p, 4), exact.y[0], rtol=1e-5)
