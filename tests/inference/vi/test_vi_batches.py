"""Mini-batches: unbiased gradients, rows that stay when they are not drawn, and the same answer as without."""

from __future__ import annotations

import pytest
import torch

from ppl import (
    VI,
    Bernoulli,
    Categorical,
    Normal,
    UnsupportedError,
    infer,
    latent,
    model,
    observe,
    plate,
)
from ppl.backend import Settings
from ppl.batches import batches_of
from ppl.inference.vi import kernel
from ppl.inference.vi.batches import step_on_batch
from ppl.inference.vi.estimators import ESTIMATORS
from ppl.streams import Streams
from tests.small_programs import line


@model
def schools():
    centre = latent("centre", Normal(0.0, 2.0))
    school = plate("school")
    with school:
        effect = latent("effect", Normal(centre, 1.0))
        passed = latent("passed", Bernoulli(0.4))
    with plate("pupil", within=school):
        observe("y", Normal(effect + passed, 0.5))


@model
def groups():
    centre = latent("centre", Normal(0.0, 2.0))
    school = plate("school")
    with school:
        effect = latent("effect", Normal(centre, 1.0))
    with plate("pupil", within=school):
        observe("y", Normal(effect, 0.5))


@model
def shared():
    z = latent("z", Categorical(torch.tensor([0.5, 0.5])))
    with plate("row"):
        observe("y", Normal(3.0 * z, 1.0))


SCHOOL = torch.arange(40) // 4
SCORES = {"y": torch.randn(40, generator=torch.Generator().manual_seed(0)), "school": SCHOOL}


def made(minibatch, **options):
    bound = schools.bind(SCORES)
    settings = Settings(Streams(0), max_iters=100, minibatch=minibatch)
    options = {"optimiser": "sgd", "learning_rate": 1.0, "settle": False, **options}
    problem = kernel.prepare(bound, VI(**options), settings)
    return problem, kernel.init(problem), batches_of(bound, minibatch, settings.streams)


@pytest.mark.parametrize("estimator", ["pathwise", "total"])
def test_steps_of_all_parts_add_up_to_the_step_on_everything(estimator):
    """The mean over parts of the scaled gradients is the gradient; latents of an element move with its part only."""
    step = ESTIMATORS[estimator]
    problem, state, _ = made(None, draws=400, estimator=estimator)
    whole = torch.stack(
        [step(problem, state, 1.0)[0].theta - state.ascent.theta for _ in range(40)]
    )
    problem, state, batches = made({"school": 3}, draws=400, estimator=estimator)
    found = []
    for _ in range(40):
        moves = []
        for i in range(batches.parts):
            moved, _ = step_on_batch(problem, state, 1.0, batches.part(i), step)
            moves.append(moved.theta - state.ascent.theta)
        found.append(torch.stack(moves).mean(0))
    part = torch.stack(found)
    # Coordinates: one group [centre, effect] without batches; [centre], then [effect] with them.
    order = [0, *range(2, 12), 1, *range(12, 22)]
    whole, part = whole[:, 0], part[:, 0][:, order]
    error = ((whole.var(0) + part.var(0)) / 40).sqrt()
    assert float(((whole.mean(0) - part.mean(0)) / error).abs().max()) < 4.5


def test_elements_outside_the_batch_keep_their_parameters():
    problem, state, batches = made({"school": 3})
    batch = batches.part(0)
    moved, _ = step_on_batch(problem, state, 1.0, batch, ESTIMATORS["pathwise"])
    changed = (moved.theta != state.ascent.theta)[0]
    wanted = torch.zeros(22, dtype=torch.bool)
    wanted[:2] = True
    wanted[2 + batch.rows["school"]] = True
    wanted[12 + batch.rows["school"]] = True
    assert torch.equal(changed, wanted)
    assert torch.equal(moved.counts > 0, wanted)


@pytest.mark.parametrize("options", [{"family": "full_rank"}, {"estimator": "natural"}])
def test_batches_lead_to_the_same_posterior(options):
    x = torch.linspace(0.5, 2.0, 60, dtype=torch.float64)
    data = {"x": x, "y": 1.0 + 2.0 * x + 0.5 * torch.randn(60, dtype=torch.float64)}
    whole = infer(line, data, method="vi", seed=0, tol=0.03, **options)
    part = infer(line, data, method="vi", seed=0, minibatch={"row": 20}, **options)
    for site in ("base", "slope"):
        assert abs(float(part.mean(site) - whole.mean(site))) < 0.4 * float(whole.sd(site))
        assert abs(float((part.sd(site) / whole.sd(site)).log())) < 0.3


@pytest.mark.filterwarnings("ignore:vi. not converged")
@pytest.mark.parametrize(("program", "estimator"), [(schools, "pathwise"), (groups, "natural")])
def test_latents_of_the_plate_are_learned_batch_by_batch(program, estimator):
    options = {"method": "vi", "seed": 0, "estimator": estimator, "max_iters": 700}
    whole = infer(program, SCORES, **options)
    part = infer(program, SCORES, minibatch={"school": 5}, **options)
    apart = (part.mean("effect") - whole.mean("effect")) / whole.sd("effect")
    assert float(apart.abs().max()) < 0.3
    assert float((part.sd("effect") / whole.sd("effect")).log().abs().max()) < 0.25
    assert all(v.shape[0] == 3 for v in part.samples(3).values())
    assert abs(part.log_evidence.value - whole.log_evidence.value) < 0.5


def test_what_does_not_part_is_refused():
    with pytest.raises(UnsupportedError, match="bounds of several particles"):
        infer(
            line,
            {"x": [1.0, 2.0], "y": [1.0, 2.0]},
            method="vi",
            particles=3,
            minibatch={"row": 1},
        )
    with pytest.raises(UnsupportedError, match="discrete latent 'z' is shared"):
        infer(shared, {"y": [1.0, 2.0]}, method="vi", minibatch={"row": 1})
