"""Near the mode one factorisation serves several steps, and slow convergence is cured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from ppl import Normal, given, infer, latent, model, observe, plate
from ppl.backend import Settings
from ppl.inference.groups.equations import Equations
from ppl.inference.laplace import LaplaceApproximation, init, prepare, step
from ppl.streams import Streams


@model
def bend():
    """Residuals that stay large and curve strongly: full Gauss-Newton steps overshoot."""
    w = latent("w", Normal(0.0, 5.0))
    with plate("row"):
        observe("y", Normal((w * given("t")).exp(), 1.0))


@model
def robust_mean():
    m = latent("m", Normal(0.0, 100.0))
    with plate("row"):
        observe("y", Normal(m, 1.0).robust("huber", 0.1))


def run(program, data, **options):
    """All states of a run."""
    problem = prepare(program.bind(data), LaplaceApproximation(**options), Settings(Streams(0)))
    states, done = [init(problem)], False
    while not done and len(states) < 200:
        state, info = step(problem, states[-1], None)
        states.append(state)
        done = info.done
    assert done
    return problem, states


def curved():
    t = torch.linspace(0.5, 2.0, 8, dtype=torch.float64)
    return {"t": t, "y": torch.tensor([-6.0, 5.0] * 4, dtype=torch.float64)}


def many(seed=0):
    rng = np.random.default_rng(seed)
    return {"y": np.concatenate([rng.normal(0.0, 1.0, 40), rng.normal(9.0, 1.0, 15)])}


def test_large_residuals_end_at_the_optimum_of_scipy():
    data = curved()
    t, y = data["t"].numpy(), data["y"].numpy()
    energy = lambda w: 0.5 * ((y - np.exp(w * t)) ** 2).sum() + 0.5 * (w / 5.0) ** 2  # noqa: E731
    found = infer(bend, data, method="laplace")
    best = minimize(lambda x: float(energy(x[0])), [0.0], method="Nelder-Mead", tol=1e-12)
    assert float(found.mean("w")) == pytest.approx(float(best.x[0]), abs=1e-5)
    assert found.diagnostics.converged


def test_robust_steps_keep_their_factorisation(monkeypatch):
    made = []
    factorise = Equations.factorise
    monkeypatch.setattr(
        Equations, "factorise", lambda self, *a, **k: made.append(1) or factorise(self, *a, **k)
    )
    _, held = run(robust_mean, many())
    factorisations = len(made)
    _, full = run(robust_mean, many(), optimiser="gauss_newton")
    assert factorisations < len(made) - factorisations
    assert len(held) < len(full)  # reweighting alone converges linearly
    torch.testing.assert_close(held[-1].points["m"], full[-1].points["m"], atol=1e-6, rtol=0.0)


def test_slopes_are_zero_where_a_run_ends():
    for program, data in ((bend, curved()), (robust_mean, many())):
        _, states = run(program, data)
        assert float(states[-1].gradient.abs().max()) < 1e-5


def test_weights_by_height_are_never_held():
    _, states = run(robust_mean, many(), matching="energy")
    assert all(not s.held.numel() for s in states)


def test_a_run_can_be_taken_up_from_the_tensors_of_its_state(tmp_path):
    file = tmp_path / "run.pt"
    first = infer(robust_mean, many(), method="laplace", checkpoint=file)
    again = infer(robust_mean, many(), method="laplace", checkpoint=file)
    torch.testing.assert_close(again.mean("m"), first.mean("m"), atol=1e-6, rtol=0.0)
