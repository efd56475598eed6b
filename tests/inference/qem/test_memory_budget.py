"""Plates processed in parts: the same weights as at once, particles drawn part by part, memory within the budget."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ppl
from ppl import (
    Gamma,
    Normal,
    Poisson,
    UnsupportedError,
    explain,
    given,
    infer,
    latent,
    model,
    observe,
    plate,
)
from ppl.backend import Settings
from ppl.inference.particles.estep import draw_in_parts, evaluated, weigh
from ppl.inference.particles.memory import default_memory
from ppl.inference.particles.problem import prepare_particles
from ppl.inference.particles.proposals import Particles
from ppl.inference.particles.shards import PartDraws
from ppl.inference.particles.start import first_approximation
from ppl.inference.particles.weighting import make_weighting
from ppl.inference.qem import QEM
from ppl.models.ratings import movielens
from ppl.streams import Streams


@model
def counts():
    level = latent("level", Normal(0.0, 1.0))
    spread = latent("spread", Gamma(2.0, 2.0))
    school = plate("school")
    lesson = plate("lesson", within=school)
    pupil = plate("pupil", within=lesson)
    with school:
        effect = latent("effect", Normal(level, spread))
    with lesson:
        rate = latent("rate", Gamma(2.0, 2.0 / torch.exp(effect)))
    with pupil:
        observe("y", Poisson(rate * given("hours")))


def ragged(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    school = torch.randint(0, 7, (23,), generator=g)
    school[:7] = torch.arange(7)
    group = torch.randint(0, 23, (90,), generator=g)
    group[:23] = torch.arange(23)
    return {
        "school": school,
        "lesson": group,
        "hours": 1 + torch.rand(90, generator=g),
        "y": torch.poisson(torch.full((90,), 2.0), generator=g),
    }


def problem_of(program, data, memory: int | None = None, **options):
    bound = program.bind(data, dtype=torch.float64)
    settings = Settings(Streams(1), memory=memory)
    return prepare_particles(bound, QEM(**options), settings, 1)


def whole(draws: PartDraws, blocks) -> dict[str, Particles]:
    """The particles of all parts in the places of the whole."""
    found = dict(draws)
    for block in draws.inner:
        parts = [(rows, draws.of_part(rows)[block.axis]) for rows in draws.parts]
        places = torch.cat([rows[block.plates[-1]] for rows, _ in parts]).argsort()
        joined = [
            torch.cat([get(p) for _, p in parts])[places]
            for get in (lambda p: p.log_q, lambda p: p.free)
        ]
        values = {n: torch.cat([p.values[n] for _, p in parts])[places] for n in block.names}
        found[block.axis] = Particles(values, *joined)
    return found


def test_weights_of_ragged_plates_in_parts_are_those_of_the_whole():
    at_once = problem_of(counts, ragged(), particles=5, joint_up_to=1)
    in_parts = make_weighting(at_once.bound, at_once.blocks, at_once.weighting.sizes, 0, 18_000)
    assert in_parts.plan.split == "school" and len(in_parts.plan.parts) >= 2
    q = first_approximation(at_once)
    draws = draw_in_parts(in_parts, q, Streams(3))
    assert isinstance(draws, PartDraws)
    a = weigh(evaluated(at_once, in_parts, draws, q), 0.7)
    particles = whole(draws, at_once.blocks)
    b = weigh(evaluated(at_once, at_once.weighting, particles, q), 0.7)
    torch.testing.assert_close(a.log_z, b.log_z, rtol=1e-12, atol=1e-12)
    assert set(a.marginals) == set(b.marginals)
    for axis, weights in b.marginals.items():
        torch.testing.assert_close(a.marginals[axis], weights, rtol=1e-10, atol=1e-12)


def ratings(users: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = (torch.rand((users, 5, 18), generator=g) < 0.2).float()
    return {"x": x, "obs": (torch.rand((users, 5), generator=g) < 0.5).float()}


@pytest.mark.filterwarnings("ignore:qem")
def test_a_large_plate_keeps_moments_and_draws_again():
    fit = dict(method="qem", seed=0, particles=6, max_iters=6, tol=0, final_particles=6)
    data = ratings(150)
    small = infer(movielens, data, memory="700KiB", replicates=4, **fit)
    marginal = small.marginals["z"]
    assert type(marginal).__name__ == "Gaussian" and marginal.loc.shape == (150, 18)
    assert small.quantile("z", [0.1, 0.9]).shape == (2, 150, 18)
    assert small.diagnostics.ess["z"].shape == (150,)
    draws = small.samples(20)
    assert draws["z"].shape == (20, 150, 18) and draws["mu_z"].shape == (20, 18)
    apart = (draws["z"].mean(0) - small.mean("z")).abs() / small.sd("z").clamp(min=0.05)
    assert apart.mean() < 0.5
    with pytest.raises(UnsupportedError, match="Draw at most"):
        small.samples(10_000)


@pytest.mark.filterwarnings("ignore:qem")
def test_latents_that_are_no_real_numbers_keep_a_few_points():
    posterior = infer(
        counts, ragged(), method="qem", seed=0, particles=8, joint_up_to=1, max_iters=5, tol=0,
        final_particles=8, replicates=3, memory="60KiB",
    )  # fmt: skip
    rate = posterior.marginals["rate"]
    assert type(rate).__name__ == "Weighted" and rate.points.shape == (24, 23)
    torch.testing.assert_close(rate.weights.sum(0), torch.ones(23, dtype=rate.weights.dtype))
    assert bool((rate.points > 0).all())


def test_explain_names_the_largest_array():
    text = str(explain(movielens, ratings(50)))
    assert "largest array: the factor of 'z' over [user, k:mu_z+psi_z, k:z" in text
    assert "MiB" in text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"memory": "1KiB"}, "no split of one plate fits"),
        ({"memory": "1MiB", "particles": 400}, "Use fewer particles"),
        (
            {"memory": "2MiB", "particles": 5, "final_particles": 1000},
            "the last weighting, with final_particles=1000",
        ),
    ],
)
def test_more_than_the_budget_is_refused_before_anything_runs(options, text):
    with pytest.raises(UnsupportedError, match=text):
        infer(movielens, ratings(20), method="qem", groups=(), **options)


def test_the_event_of_a_data_factor_counts():
    @model
    def wide():
        weight = latent("weight", Normal(0.0, 1.0), shape=500)
        with plate("row"):
            observe("y", Normal((weight * given("x")).sum(-1), 1.0))

    data = {"x": torch.randn(200, 500), "y": torch.zeros(200)}
    assert "event of 500" in str(explain(wide, data)) or "'weight'" in str(explain(wide, data))


def test_the_default_budget_respects_what_is_free():
    assert 2**20 < default_memory() <= 4 * 2**30


PROGRAM = """
import resource, sys, warnings
import torch
from ppl import infer
from ppl.models.ratings import movielens
warnings.simplefilter("ignore")

def run(users, memory):
    g = torch.Generator().manual_seed(0)
    x = (torch.rand((users, 5, 18), generator=g) < 0.2).float()
    data = {"x": x, "obs": (torch.rand((users, 5), generator=g) < 0.5).float()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    infer(movielens, data, method="qem", seed=0, dtype=torch.float32, particles=10, max_iters=2,
          memory=memory, replicates=1, progress=False)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

run(50, "64MiB")
print(run(8000, sys.argv[1]))
"""


@pytest.mark.slow
def test_peak_memory_obeys_the_budget(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    root = str(Path(ppl.__file__).absolute().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    out = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), "48MiB"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    # Beside the budget: the data, bound and given (6 MiB), and the state, old and new (3 MiB), with weights.
    assert float(out.stdout) < 48 + 25
