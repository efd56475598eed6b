"""Start values of a family: one number, one for each entry of an event, one for each element of a plate."""

from __future__ import annotations

import pytest
import torch

from ppl import Gamma, ModelError, Normal, latent, model, observe, plate
from ppl.backend import Settings
from ppl.inference.qem import QEM, init, prepare, step
from ppl.streams import Streams
from tests.small_programs import rates


@model
def vectors():
    with plate("user"):
        z = latent("z", Normal(0.0, 1.0), shape=(3,))
        observe("y", Normal(z.sum(), 1.0))


def started(program, data, q, restarts=1):
    problem = prepare(program.bind(data), QEM(q=q), Settings(Streams(0), restarts=restarts))
    state = init(problem)
    step(problem, state)
    return state.q.proposals


@pytest.mark.parametrize("restarts", [1, 2])
def test_every_element_of_a_plate_may_start_elsewhere(restarts):
    shape, rate = torch.tensor([2.0, 6.0, 3.0]), torch.tensor([2.0, 3.0, 1.5])
    data = {"pace": [1.0, 2.0, 3.0], "count": [1, 2, 3]}
    mean = started(rates, data, {"rate": Gamma(shape, rate)}, restarts)["k:rate"].families["rate"][
        1
    ]
    assert torch.allclose(mean, (shape / rate).to(mean.dtype).expand_as(mean))
    with pytest.raises(ModelError, match=r"broadcasts to \[3\] \(plates, then event\), got \[2\]"):
        started(rates, data, {"rate": Gamma(torch.ones(2), 1.0)})


def test_a_vector_starts_from_one_law_for_all_its_entries():
    data = {"y": [0.3, 0.5, 0.1, 0.7]}
    loc, variance = started(vectors, data, {"z": Normal(0.5, 2.0)})["k:z"].families["z"]
    assert loc.shape == variance.shape == (4, 3)
    assert bool((loc == 0.5).all()) and bool((variance == 4.0).all())
