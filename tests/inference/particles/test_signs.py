"""What qem chooses where a model does not know signs, and that it chooses nothing elsewhere."""

from __future__ import annotations

import pytest
import torch

from ppl import Bernoulli, Normal, explain, given, infer, latent, model, observe, plate
from ppl.backend import Settings
from ppl.inference.particles import Mirrored, Prior, signs
from ppl.inference.qem import QEM, init, posterior, prepare, step
from ppl.models import mixture, occupancy
from ppl.streams import Streams

SIGNED = {"bird_mean_mean", "beta_mean", "bird_mean", "beta", "bird_year_mean"}


@pytest.fixture(scope="module")
def survey():
    generator = torch.Generator().manual_seed(0)
    weather = 40 * torch.rand(3, 2, 4, generator=generator, dtype=torch.float64)
    visits = {"weather": weather, "quality": torch.ones(3, 2, 4)}
    seen = (torch.rand(3, 2, 4, 3, generator=generator) < 0.8).double()
    return {**visits, "obs": seen}


def chosen(program, data, **options):
    return signs.with_signs(program.bind(data), QEM(**options), Settings(Streams(0)))


def test_units_follow_what_they_have_in_common(survey):
    found = chosen(occupancy, survey)
    forms = {str(key): form for key, form in found.q.items()}
    assert forms["('bird_mean', 'beta')"] == Prior()
    assert forms["bird_year_mean"] == Prior(index="nested")
    (mirrored,) = (f for f in found.q.values() if isinstance(f, Mirrored))
    assert set(mirrored.flips) == {"bird_mean_mean", "beta_mean"}


def test_nothing_is_chosen_where_something_is_asked(survey):
    for options in ({"q": {}}, {"particles": 10}, {"bridge": False}, {"groups": [["alpha"]]}):
        asked = QEM(**options)
        assert signs.with_signs(occupancy.bind(survey), asked, Settings(Streams(0))) is asked
    asked, batches = QEM(), Settings(Streams(0), minibatch={"bird": 2})
    assert signs.with_signs(occupancy.bind(survey), asked, batches) is asked


@model
def known(direction=1.0):
    """The same as a survey of one year whose direction is known."""
    middle = latent("middle", Normal(direction, 1.0))
    with plate("bird"):
        effect = latent("effect", Normal(middle, 1.0))
        with plate("visit"):
            z = latent("z", Bernoulli(logits=effect * given("x")))
            observe("y", Normal(z, 0.5))


def test_nothing_is_chosen_for_other_models():
    data = {"x": [[1.0, 2.0]], "y": [[0.1, 0.9]]}
    assert chosen(known, data).q is None
    assert chosen(mixture, {"x": [0.0, 1.0, 5.0]}).q is None


def test_a_posterior_has_both_signs(survey):
    """Each of what the birds have in common half the time, and those of products that the data tell."""
    found = infer(occupancy, survey, method="qem", seed=0)
    assert set(found.diagnostics.notes["signs not known"]) == SIGNED
    draws = found.samples(4000, seed=0)
    share = (draws["beta_mean"] > 0).double().mean()
    assert float(share) == pytest.approx(0.5, abs=0.15)
    agree = (draws["beta"].unsqueeze(-1) * draws["bird_year_mean"] > 0).double().mean()
    assert float(agree) > 0.95
    assert "k:bird_mean+beta+alpha" in found.diagnostics.notes["particles"]


def test_explain_says_so(survey):
    assert "signs of" in str(explain(occupancy, survey))


def test_restarts_seeds_precision_and_resumption(survey):
    def run(dtype, restarts, stop=4):
        bound = occupancy.bind(survey, dtype=dtype)
        problem = prepare(bound, QEM(), Settings(Streams(2), restarts=restarts))
        state = init(problem)
        for _ in range(stop):
            state, _ = step(problem, state)
        return problem, state

    problem, state = run(torch.float32, 3)
    assert posterior(problem, state).mean("alpha").dtype == torch.float32
    (_, one), (_, two) = run(torch.float64, 1), run(torch.float64, 1)
    for a, b in zip(one.q.proposals.values(), two.q.proposals.values(), strict=True):
        assert a.joint is None or torch.equal(a.joint.mean, b.joint.mean)


@pytest.mark.filterwarnings("ignore:qem. not converged")
def test_a_run_is_taken_up_again(survey, tmp_path):
    path = tmp_path / "run.pt"
    few = {"method": "qem", "seed": 0, "max_iters": 4}
    whole = infer(occupancy, survey, **few)
    infer(occupancy, survey, **{**few, "max_iters": 2}, checkpoint=path)
    resumed = infer(occupancy, survey, **few, checkpoint=path)
    assert torch.equal(whole.mean("alpha"), resumed.mean("alpha"))
