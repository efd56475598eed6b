"""Growth scores: dense gradients in blocks, running best, noise over batches, evidence of new weights, and groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from ppl.errors import NumericalError
from ppl.inference.ssvi import growth
from ppl.inference.ssvi.growth import Seen, magnitudes, t_like
from ppl.inference.ssvi.patterns import Form
from ppl.inference.ssvi.scores import evidence
from ppl.inference.ssvi.structured import (
    Groups,
    group_of,
    group_scores,
    groups_of,
    members,
    top_groups,
)

_FORMS = [
    Form("linear", (7, 5)),
    Form("conv1d", (4, 3, 3), lambda x, w: functional.conv1d(x, w, None, 2, 1)),
    Form("conv2d", (4, 3, 3, 3), lambda x, w: functional.conv2d(x, w, None, 1, 1)),
]
_INPUTS = {"linear": (5,), "conv1d": (3, 8), "conv2d": (3, 6, 6)}


def _seen(form, batch=6):
    x = torch.randn(batch, *_INPUTS[form.kind]).double()
    weight = torch.zeros(form.shape).double().requires_grad_()
    y = form.run(x, weight)
    g = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * g).sum(), weight)
    return Seen(form, x, g), gradient.reshape(-1)


@pytest.mark.parametrize("form", _FORMS, ids=lambda f: f.kind)
def test_the_dense_gradient_is_that_of_autograd(form):
    seen, expected = _seen(form)
    found = growth.dense_gradient([seen], slice(0, form.rows)).reshape(-1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("form", _FORMS, ids=lambda f: f.kind)
@pytest.mark.parametrize("size", [1, 20, 10**6])
def test_the_running_best_is_the_best_whatever_the_blocks(form, size):
    seen, gradient = _seen(form)
    keep = torch.randperm(form.size)[: form.size // 3].sort().values
    found = growth.top(form, [[seen]], keep, 8, size=size)
    masked = gradient.abs().index_fill(0, keep, -1.0)
    assert found.indices.tolist() == masked.topk(8).indices.tolist()


def test_kept_members_do_not_come_out_even_if_all_else_is_zero():
    form = _FORMS[0]
    seen = Seen(form, torch.zeros(2, 5), torch.zeros(2, 7))
    keep = torch.arange(30)
    assert sorted(growth.top(form, [[seen]], keep, 9).indices.tolist()) == [30, 31, 32, 33, 34]


def test_gradients_are_averaged_over_batches():
    form = _FORMS[0]
    (a, first), (b, second) = _seen(form), _seen(form)
    mean = (first + second) / 2
    found = growth.top(form, [[a], [b]], torch.tensor([], dtype=torch.long), 5)
    assert found.indices.tolist() == mean.abs().topk(5).indices.tolist()


def test_gradients_of_all_uses_of_an_array_add_up():
    (a, first), (b, second) = _seen(_FORMS[0]), _seen(_FORMS[0], batch=3)
    found = growth.dense_gradient([a, b], slice(0, 7)).reshape(-1)
    torch.testing.assert_close(found, first + second)


def test_the_t_like_score_prefers_what_repeats():
    form = Form("linear", (1, 2))
    x = torch.eye(2).double()
    # weight 0 has the larger mean gradient but changes sign, weight 1 is small and steady
    batches = [
        Seen(form, x, torch.tensor([[3.0 * s + 1.0], [0.5]]).double()) for s in (1, -1, 1, -1)
    ]
    batches = [[s._replace(g=s.g + 1e-3 * i)] for i, s in enumerate(batches)]
    nothing = torch.tensor([], dtype=torch.long)
    assert growth.top(form, batches, nothing, 1, magnitudes).indices.tolist() == [0]
    assert growth.top(form, batches, nothing, 1, t_like).indices.tolist() == [1]


def test_the_gain_of_a_new_weight_is_the_evidence_it_has_at_its_optimum():
    n, h, s, g = 40, 0.8, 1.5, torch.tensor([0.3, -0.05]).double()
    sd2 = 1 / (n * h + s**-2)
    log_prior = torch.distributions.Normal(0.0, s).log_prob(torch.zeros(2).double())
    expected = evidence(-n * g * sd2, torch.full_like(g, math.sqrt(sd2)), log_prior)
    found = growth.gains(n, h, s**-2)(g, torch.zeros_like(g))
    torch.testing.assert_close(found, expected)


def test_a_gradient_that_is_not_finite_is_refused():
    seen = Seen(_FORMS[0], torch.ones(1, 5), torch.full((1, 7), math.inf))
    with pytest.raises(NumericalError, match="not finite"):
        growth.top(_FORMS[0], [[seen]], torch.tensor([0]), 2)


@pytest.mark.parametrize("form", _FORMS, ids=lambda f: f.kind)
@pytest.mark.parametrize("sets", ["neuron", "output", "channel", "kernel", "block"])
def test_groups_share_out_all_weights(sets, form):
    groups = groups_of(sets, form, (3, 2))
    if groups is None:
        assert form.kind == "linear" and sets in ("channel", "kernel")
        return
    every = torch.arange(form.size)
    owner = group_of(groups, every)
    assert owner.unique().tolist() == list(range(groups.number))
    for group in range(groups.number):
        assert torch.equal(members(groups, torch.tensor([group])), every[owner == group])


def test_scores_of_groups():
    groups = Groups(Form("linear", (2, 3)), (2, 1))
    index, scores = torch.tensor([0, 2, 3, 5]), torch.tensor([3.0, 1.0, 4.0, 0.0])
    active, root = group_scores(groups, index, scores, is_sum=False)
    assert active.tolist() == [0, 2] and root.tolist() == [5.0, 1.0]
    assert group_scores(groups, index, scores, is_sum=True)[1].tolist() == [7.0, 1.0]


def test_groups_grow_by_the_norm_of_their_gradient():
    form = _FORMS[2]
    groups = groups_of("neuron", form)
    seen, gradient = _seen(form)
    norms = gradient.reshape(form.shape).square().sum((0, 2, 3)).sqrt()
    norms[1] = -1.0
    found = top_groups(groups, [[seen]], torch.tensor([1]), 2)
    assert found.indices.tolist() == norms.topk(2).indices.tolist()
    torch.testing.assert_close(found.score.square().sqrt(), found.score)
