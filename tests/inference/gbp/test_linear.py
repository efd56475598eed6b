"""Linear graphs: exact on trees whatever the schedule, exact means on loops, divergence said and cured."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ppl import infer, latent, model, observe, plate, shift
from ppl.distributions import Flat, Markov, MultivariateNormal, Normal
from ppl.errors import NumericalError
from ppl.inference.groups import FactorGroups, Family, Group, Slot
from tests.data_files import data_file
from tests.inference.gbp import factor_graphs as fg
from tests.smoothers import kalman_smoother

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def oracle(name: str) -> dict[str, np.ndarray]:
    with np.load(data_file("gbp/linear_oracles.npz")) as file:
        return {k[len(name) + 1 :]: file[k] for k in file.files if k.startswith(name + "_")}


def tree_of(data: dict[str, np.ndarray]) -> FactorGroups:
    mean = torch.from_numpy(data["mu0"])
    if "parent" in data:
        ends = np.stack([data["parent"], np.arange(1, len(mean))], 1)
    else:
        ends = np.stack([np.arange(len(mean) - 1), np.arange(1, len(mean))], 1)
    parts = [torch.from_numpy(data[k]) for k in ("prior_prec", "Z", "info")]
    return fg.relative(mean, parts[0], torch.from_numpy(ends), parts[1], parts[2])


def grid_of(coupling: str, dtype=torch.float64) -> tuple[FactorGroups, dict[str, np.ndarray]]:
    data = oracle(f"grid16_s{coupling}")
    edges = torch.from_numpy(oracle("grid16")["edges"])
    mean, z = (torch.from_numpy(data[k]).to(dtype) for k in ("mu0", "Z"))
    info = torch.tensor([[float(coupling)]], dtype=dtype)
    return fg.relative(mean, torch.ones(256, dtype=dtype), edges, z, info), data


# ---- trees -----------------------------------------------------------------------------------------------------

DIAMETER = {"chain1": 59, "chain3": 59, "tree": 17}


@pytest.mark.parametrize("name", DIAMETER)
@pytest.mark.parametrize("schedule", ["tree", "flood", "sweep"])
def test_trees_are_exact(name, schedule):
    """Trees: chain1, chain3, tree; means and covariances 1e-10 after `diameter` rounds, two sweeps."""
    data = oracle(name)
    _, state = fg.run(tree_of(data), schedule=schedule, ordered=["n"])
    belief = state.beliefs["x"]
    covariance = torch.linalg.inv(belief.lam)
    torch.testing.assert_close(state.means["x"], torch.from_numpy(data["mean"]), **TIGHT)
    torch.testing.assert_close(covariance, torch.from_numpy(data["cov"]), **TIGHT)
    most = {"tree": 1, "flood": DIAMETER[name] + 2, "sweep": 2 if "chain" in name else 60}[schedule]
    assert state.round <= most and state.run.converged


@model
def level():
    with plate("t", ordered=True):
        state = latent(
            "state",
            Markov(
                MultivariateNormal(torch.zeros(2), torch.eye(2)),
                lambda s: MultivariateNormal(
                    torch.stack([s[0] + s[1], 0.875 * s[1]]), 0.125 * torch.eye(2)
                ),
            ),
        )
        observe("y", Normal(state[0], 0.5))


@pytest.mark.parametrize("schedule", ["auto", "sweep"])
def test_chains_are_the_kalman_smoother(schedule):
    """Trees: Kalman smoother equality on a 2-state local-level model."""
    y = torch.randn(40, dtype=torch.float64).cumsum(0)
    posterior = infer(level, {"y": y}, method="gbp", schedule=schedule)
    move, read = np.array([[1.0, 1.0], [0.0, 0.875]]), np.array([[1.0, 0.0]])
    exact = kalman_smoother(
        y, np.zeros(2), np.eye(2), move, 0.125 * np.eye(2), read, 0.25 * np.eye(1)
    )
    torch.testing.assert_close(posterior.mean("state"), torch.as_tensor(exact.mean), **TIGHT)
    torch.testing.assert_close(posterior.covariance("state"), torch.as_tensor(exact.cov), **TIGHT)
    assert posterior.diagnostics.iterations <= 2
    assert posterior.log_evidence.kind == "exact"


def test_evidence_of_a_tree_is_exact():
    """Trees: evidence (8) equals direct log-density 1e-9."""
    y = torch.randn(12, dtype=torch.float64)
    got = infer(level, {"y": y}, method="gbp").log_evidence.value
    want = infer(level, {"y": y}, method="exact").log_evidence.value
    assert got == pytest.approx(want, abs=1e-9)


@model
def star():
    centre = latent("centre", Normal(1.0, 3.0))
    with plate("n"):
        leaf = latent("leaf", Normal(centre, 1.0))
        observe("y", Normal(leaf, 2.0))


def test_star_of_a_thousand_factors():
    """Trees: Forney-style star, one variable and 1000 factors."""
    y = torch.randn(1000, dtype=torch.float64) + 2
    posterior = infer(star, {"y": y}, method="gbp")
    precision = 1 / 9 + 1000 / 5
    assert float(posterior.sd("centre")) == pytest.approx(precision**-0.5, rel=1e-12)
    assert float(posterior.mean("centre")) == pytest.approx(
        (1 / 9 + float(y.sum()) / 5) / precision, rel=1e-12
    )


# ---- loops -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coupling", "rounds"),
    [("0.1", 8), ("1", 31), ("10", 194), pytest.param("100", 1888, marks=pytest.mark.slow)],
)
def test_grids_have_exact_means_and_known_variances(coupling, rounds):
    """Loopy linear: grid16 means 1e-6 within 2x the rounds of 8.5; variances = _bpvar and <= _var."""
    groups, data = grid_of(coupling)
    _, state = fg.run(groups, 2 * rounds, tol=1e-12)
    torch.testing.assert_close(
        state.means["x"][:, 0], torch.from_numpy(data["mean"]), rtol=0, atol=1e-6
    )
    variance = state.sds["x"][:, 0].square()
    torch.testing.assert_close(variance, torch.from_numpy(data["bpvar"]), rtol=0, atol=1e-6)
    assert bool((variance <= torch.from_numpy(data["var"]) + 1e-12).all())


SCHEDULES = {
    "flood": {},
    "sweep": {"schedule": "sweep", "ordered": ["n"]},
    "sites": {"schedule": "sweep"},
    "layers": {"schedule": "layers"},
    "tree": {"schedule": "tree"},
    "random 10 %": {"schedule": "random", "active": 0.1},
    "residual 20 %": {"schedule": "residual", "active": 0.2},
    "damped 0.5": {"damping": 0.5},
    "dropout 0.5": {"dropout": 0.5},
    "schur": {"form": "schur"},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_has_the_same_fixed_point(name):
    """Loopy linear: flood, sweep, random, residual, damped, dropout: same fixed point 1e-8."""
    n = 5
    groups = small_grid(n)
    mean, _ = fg.moments(groups)
    _, state = fg.run(groups, **SCHEDULES[name])
    torch.testing.assert_close(state.means["x"][:, 0], mean, rtol=0, atol=1e-8)
    assert state.run.converged


def small_grid(n: int) -> FactorGroups:
    at = torch.arange(n * n).reshape(n, n)
    pairs = [(at[:, :-1], at[:, 1:]), (at[:-1], at[1:])]
    edges = torch.cat([torch.stack([a.reshape(-1), b.reshape(-1)], 1) for a, b in pairs])
    draws = torch.Generator().manual_seed(3)
    mean = torch.randn(n * n, 1, generator=draws, dtype=torch.float64)
    z = torch.randn(len(edges), 1, generator=draws, dtype=torch.float64)
    ones = torch.ones(n * n, dtype=torch.float64)
    return fg.relative(mean, ones, edges, z, torch.ones(1, 1, dtype=torch.float64))


def canonical(matrix: torch.Tensor, right: torch.Tensor) -> FactorGroups:
    """``exp(-x' A x / 2 + b' x)`` with pairwise rows ``sqrt|a| (x_i ± x_j)`` and what is left on the diagonal."""
    n = len(matrix)
    i, j = torch.triu_indices(n, n, 1).unbind(0)
    i, j = (k[matrix[torch.triu_indices(n, n, 1).unbind(0)] != 0] for k in (i, j))
    a = matrix[i, j]
    left = matrix.diagonal() - torch.zeros(n, dtype=a.dtype).index_add(0, i, a.abs()).index_add(
        0, j, a.abs()
    )
    x = Family("x", ("n",), (n,))
    slots = (Slot("x", i[:, None]), Slot("x", j[:, None]))
    pair = Group(
        "pair",
        slots,
        (x, x),
        lambda v, _: a.abs().sqrt()[:, None] * (v[0] + a.sign()[:, None] * v[1]),
        is_affine=True,
        is_fixed=True,
    )
    root = left.clamp(min=1e-300).sqrt()
    assert bool((left > 0).all())
    own = Group(
        "own",
        (Slot("x", torch.arange(n)[:, None]),),
        (x,),
        lambda v, _: root[:, None] * v[0] - (right / root)[:, None],
        is_affine=True,
        is_fixed=True,
    )
    return FactorGroups({"x": x}, (own, pair), like=torch.zeros((), dtype=torch.float64))


def frustrated_rows() -> tuple[FactorGroups, torch.Tensor]:
    """Three scalars that share 25 rows of mixed signs.

    The frustrated four-cycle with a chord is no sum of squares with pairwise rows; this graph is, and its assembled
    precision is as far from walk-summable (spectral radius of |R| above one).
    """
    t = torch.linspace(0, 2, 25, dtype=torch.float64)
    design = torch.stack([torch.ones_like(t), t, t**2], 1)
    y = torch.sin(3 * t)
    x = Family("x", ("n",), (3,))
    everything = torch.arange(3).expand(25, 3)
    row = Group(
        "row",
        (Slot("x", everything),),
        (x,),
        lambda v, _: ((v[0] * design).sum(1, keepdim=True) - y[:, None]) / 0.1,
        is_affine=True,
        is_fixed=True,
        plates=("row",),
        sizes=(25,),
    )
    own = fg.prior(x, torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    made = FactorGroups({"x": x}, (own, row), like=torch.zeros((), dtype=torch.float64))
    return made, fg.moments(made)[0]


def test_random_walk_summable_graphs_always_converge():
    """Loopy linear: random sparse positive definite with rho(|R|) < 1 always converges."""
    for seed in range(12):
        draws = torch.Generator().manual_seed(seed)
        n = 12
        raw = torch.randn(n, n, generator=draws, dtype=torch.float64)
        raw = raw * (torch.rand(n, n, generator=draws) < 0.3)
        r = torch.triu(raw, 1)
        r = r + r.mT
        size = float(r.abs().sum(1).max())
        matrix = torch.eye(n, dtype=torch.float64) - 0.95 * r / max(size, 1e-9)
        right = torch.randn(n, generator=draws, dtype=torch.float64)
        _, state = fg.run(canonical(matrix, right))
        assert state.run.converged
        got = fg.means(canonical(matrix, right), state)
        torch.testing.assert_close(got, torch.linalg.solve(matrix, right), rtol=0, atol=1e-8)


# ---- grouping --------------------------------------------------------------------------------------------------


def test_groups_and_the_order_of_rows_do_not_matter():
    """Grouping: one group, several groups, permuted rows: identical results (1e-12)."""
    mean = torch.randn(6, 2, dtype=torch.float64)
    edges = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 0], [1, 4]])
    z, info = torch.randn(7, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64) * 3
    ones = torch.ones(6, dtype=torch.float64)
    one = fg.relative(mean, ones, edges, z, info)
    x = one.families["x"]
    order = torch.tensor([3, 1, 6, 0, 5, 2, 4])
    turned = fg.relative(mean, ones, edges[order], z[order], info)
    first, second = (
        fg.links(x, edges[s], z[s], info, f"link{k}")
        for k, s in enumerate((slice(0, 3), slice(3, 7)))
    )
    several = FactorGroups({"x": x}, (one.groups[0], first, second), like=one.like)
    states = [fg.run(g, tol=1e-12)[1] for g in (one, turned, several)]
    for other in states[1:]:
        torch.testing.assert_close(other.means["x"], states[0].means["x"], rtol=0, atol=1e-12)
        torch.testing.assert_close(other.sds["x"], states[0].sds["x"], rtol=0, atol=1e-12)


@model
def broadcast():
    level = latent("level", Normal(0.0, 2.0))
    with plate("n"):
        x = latent("x", Normal(level, 1.0))
        observe("y", Normal(x, 0.5))


@model
def indexed():
    from ppl import given

    root = plate("root", 1)
    with root:
        level = latent("level", Normal(0.0, 2.0))
    with plate("n"):
        x = latent("x", Normal(level[given("i", index=root)], 1.0))
        observe("y", Normal(x, 0.5))


def test_broadcast_and_explicit_indices_agree():
    """Grouping: a plate written as broadcast or as explicit indices."""
    y = torch.randn(7, dtype=torch.float64)
    one = infer(broadcast, {"y": y}, method="gbp")
    two = infer(indexed, {"y": y, "i": torch.zeros(7, dtype=torch.long)}, method="gbp")
    torch.testing.assert_close(one.mean("x"), two.mean("x"), rtol=0, atol=1e-12)
    torch.testing.assert_close(one.sd("level"), two.sd("level")[0], rtol=0, atol=1e-12)


def test_coupled_scalars_as_one_vector_have_exact_variances():
    """Grouping: two coupled scalars as one vector variable: variance becomes exact."""

    @model
    def scalars():
        from ppl import given

        a, b = latent("a", Normal(0.0, 1.0)), latent("b", Normal(0.0, 1.0))
        with plate("n"):
            observe("y", Normal(a + b * given("t"), 0.3))

    @model
    def vector():
        from ppl import given

        w = latent("w", MultivariateNormal(torch.zeros(2), torch.eye(2)))
        with plate("n"):
            observe("y", Normal(w[0] + w[1] * given("t"), 0.3))

    data = {
        "t": torch.linspace(1, 2, 9, dtype=torch.float64),
        "y": torch.randn(9, dtype=torch.float64),
    }
    with pytest.warns(UserWarning, match="0.26 of the exact ones"):
        loopy = infer(scalars, data, method="gbp", variance="check", tol=1e-10, max_iters=5000)
    joint, exact = infer(vector, data, method="gbp"), infer(vector, data, method="exact")
    torch.testing.assert_close(joint.sd("w"), exact.sd("w"), **TIGHT)
    torch.testing.assert_close(
        torch.stack([loopy.mean("a"), loopy.mean("b")]), exact.mean("w"), rtol=0, atol=1e-7
    )
    assert float(loopy.sd("a")) < 0.9 * float(exact.sd("w")[0])
    assert "not exact" in str(loopy.diagnostics.notes["variances"])


# ---- robustness of the engine ----------------------------------------------------------------------------------


def test_a_graph_without_absolute_information_names_the_variable():
    """Robustness: singular start (no prior, one relative factor) names the variable."""

    @model
    def floating():
        with plate("t", ordered=True):
            x = latent("x", Flat())
            observe("z", Normal(shift(x, "t", 1) - x, 1.0))

    with pytest.raises(NumericalError, match="'x' have no absolute information.* t 0"):
        infer(floating, {"z": torch.randn(4, dtype=torch.float64)}, method="gbp")


def test_a_group_of_no_rows_says_nothing():
    """Robustness: a group of zero rows."""
    groups = small_grid(3)
    x = groups.families["x"]
    none = torch.zeros(0, 2, dtype=torch.long)
    empty = fg.links(x, none, torch.zeros(0, 1).double(), torch.ones(1, 1).double(), "none")
    more = FactorGroups({"x": x}, (*groups.groups, empty), like=groups.like)
    one, two = (fg.run(g)[1] for g in (groups, more))
    torch.testing.assert_close(one.means["x"], two.means["x"], rtol=0, atol=0)


def test_same_seed_same_answer():
    """Robustness: same seed, same answer."""
    options = {"schedule": "random", "dropout": 0.3, "rounds": 20}
    one, two = (fg.run(small_grid(4), **options)[1] for _ in range(2))
    assert bool((one.means["x"] == two.means["x"]).all())


def test_float32_agrees_with_float64():
    """Robustness: float32 vs float64 means on grid16_s10 within 1e-4."""
    states = [
        fg.run(grid_of("10", dtype)[0], tol=1e-6)[1] for dtype in (torch.float32, torch.float64)
    ]
    assert all(s.run.converged for s in states)
    torch.testing.assert_close(
        states[0].means["x"].double(), states[1].means["x"], rtol=0, atol=1e-4
    )


def test_a_step_writes_nothing_the_caller_holds():
    from torch.utils._pytree import tree_leaves, tree_map

    for options in ({}, {"schedule": "tree"}, {"schedule": "layers"}, {"dropout": 0.5}):
        problem, state = fg.run(small_grid(3), rounds=2, **options)
        from ppl.inference.gbp import step

        kept = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state)
        step(problem, state)
        pairs = zip(tree_leaves(kept), tree_leaves(state), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


def test_attention_updates_only_the_rows_asked_for():
    groups = small_grid(3)
    mask = torch.zeros(groups.groups[1].rows, dtype=torch.bool)
    mask[2] = True
    _, state = fg.run(groups, 3, schedule="attention", rows={"link": mask})
    sent = state.charts.messages["link"][0].lam.flatten() != 0
    assert sent.tolist() == mask.tolist()


def test_frustrated_cycle_is_reported_and_cured():
    """Loopy linear: frustrated 4-cycle: non-convergence said; the proximal prior converges (1e-8)."""
    groups, want = frustrated_rows()
    _, plain = fg.run(groups, 400, cure=False)
    assert not plain.run.converged and plain.run.failed
    for options in ({"damping": 0.3, "proximal": 0.1, "cure": False}, {}):
        _, cured = fg.run(groups, 4000, **options)
        assert cured.run.converged
        torch.testing.assert_close(fg.means(groups, cured), want, rtol=0, atol=1e-8)
    assert math.isfinite(cured.run.energy)
