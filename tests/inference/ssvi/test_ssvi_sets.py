"""Set updates: invariants of the algorithm, values that move with their weights, budgets that are shared or found."""

from __future__ import annotations

import pytest
import torch

from ppl.errors import NumericalError
from ppl.inference.ssvi import moves, sets, structured
from ppl.inference.ssvi.growth import Seen, dense_gradient, gains, magnitudes, t_like
from ppl.inference.ssvi.moves import Moving
from ppl.inference.ssvi.patterns import Form


def _moving(form, index, scores=None, growth=magnitudes, batch=6):
    x, g = torch.randn(batch, form.columns).double(), torch.randn(batch, form.rows).double()
    scores = torch.rand(len(index)).double() if scores is None else scores
    return Moving(form, None, index, scores, [[Seen(form, x, g)]], growth)


def _check(form, old, change, count):
    assert len(change.indices) == count
    assert bool((change.indices.diff() > 0).all())
    assert int(change.indices.min()) >= 0 and int(change.indices.max()) < form.size
    stays = ~change.is_new
    assert torch.equal(old[change.source[stays]], change.indices[stays])
    assert not bool(torch.isin(change.indices[change.is_new], old).any())


def test_invariants_hold_under_a_thousand_random_updates():
    generator = torch.Generator().manual_seed(3)
    for trial in range(1000):
        rows, columns = (int(n) for n in torch.randint(1, 8, (2,), generator=generator))
        form = Form("linear", (rows, columns))
        k = (1, form.size)[trial % 2] if trial % 5 == 0 else 1 + trial % form.size
        share = (0.0, 0.3, 0.9, 1.0)[trial % 4]
        index = sets.random_set(form.size, k, generator, torch.device("cpu"))
        layer = _moving(form, index)
        (change,) = moves.within_layers([layer], share)
        _check(form, index, change, k)
        values = torch.randn(k)
        carried = sets.carried(values, change, 7.0)
        table = dict(zip(index.tolist(), values.tolist(), strict=True))
        expected = [table.get(i, 7.0) for i in change.indices.tolist()]
        assert carried.tolist() == expected
        if share == 0.0 or k == form.size:
            assert change.new == 0


def test_the_lowest_scores_go_and_the_largest_gradients_come():
    form = Form("linear", (3, 4))
    index = torch.tensor([0, 5, 7, 10])
    layer = _moving(form, index, torch.tensor([4.0, 1.0, 2.0, 3.0]).double())
    (change,) = moves.within_layers([layer], 0.5)
    gradient = dense_gradient(layer.seen[0], slice(0, 3)).abs().reshape(-1)
    gradient[[0, 10]] = -1.0  # those that stay
    expected = sorted([0, 10, *gradient.topk(2).indices.tolist()])
    assert change.indices.tolist() == expected


def test_members_that_are_removed_and_grow_back_keep_their_values():
    form = Form("linear", (2, 2))
    x, g = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[5.0, 0.1]]).double()
    index = torch.tensor([0, 3])
    layer = Moving(
        form, None, index, torch.tensor([0.0, 1.0]).double(), [[Seen(form, x, g)]], magnitudes
    )
    (change,) = moves.within_layers([layer], 0.5)
    assert change.indices.tolist() == [0, 3] and change.new == 0
    assert sets.carried(torch.tensor([8.0, 9.0]), change).tolist() == [8.0, 9.0]


def test_a_score_that_is_nan_is_refused():
    with pytest.raises(NumericalError, match="removal score is NaN"):
        sets.kept(torch.tensor([1.0, float("nan")]), 1)


def test_a_shared_budget_keeps_its_total_and_every_output_unit():
    generator = torch.Generator().manual_seed(1)
    forms = [Form("linear", (6, 9)), Form("linear", (4, 6))]
    cpu = torch.device("cpu")
    index = [
        sets.cover_rows(sets.random_set(f.size, f.size // 3, generator, cpu), *f.shape, generator)
        for f in forms
    ]
    total = sum(len(i) for i in index)
    sizes = set()
    for step in range(60):
        layers = [
            _moving(f, i, torch.rand(len(i)).double() * (1 + s * (step % 3)))
            for s, (f, i) in enumerate(zip(forms, index, strict=True))
        ]
        changes = moves.across_layers(layers, 0.4)
        for f, i, c in zip(forms, index, changes, strict=True):
            _check(f, i, c, len(c.indices))
            assert len((c.indices // f.columns).unique()) == f.rows
        index = [c.indices for c in changes]
        assert sum(len(i) for i in index) == total
        sizes.add(len(index[0]))
    assert len(sizes) > 1  # the budget does move between layers


def test_gradients_are_compared_between_layers_by_size_and_standard_errors_as_they_are():
    generator = torch.Generator().manual_seed(2)
    form, index = Form("linear", (4, 50)), torch.arange(0, 200, 10)

    def layer(scale, signal, score):
        batches = []
        for _ in range(8):
            x = torch.randn(20, 50, generator=generator, dtype=torch.float64)
            g = torch.randn(20, 4, generator=generator, dtype=torch.float64)
            batches.append([Seen(form, x, scale * (g + signal * x.mean(1, keepdim=True)))])
        return Moving(form, None, index, torch.arange(20.0).double(), batches, score)

    # The first layer has signals, the second gradients a thousand times smaller, all noise.
    told, noise = moves.across_layers([layer(1.0, 9.0, t_like), layer(1e-3, 0.0, t_like)], 0.5)
    assert told.new > 2 * noise.new
    # Without signals, sizes are compared in units of each layer.
    a, b = moves.across_layers([layer(1.0, 0.0, magnitudes), layer(1e-3, 0.0, magnitudes)], 0.5)
    assert min(a.new, b.new) > 3


def test_groups_grow_by_the_sum_of_their_gains_whatever_removes_them():
    form = Form("linear", (2, 4))
    groups = structured.groups_of("neuron", form)
    seen = Seen(form, torch.tensor([[1.0, 0.0, 0.0, 3.0]]), torch.tensor([[0.1, 0.1]]))
    index = structured.members(groups, torch.tensor([0, 1]))
    layer = Moving(
        form, groups, index, torch.tensor([2.0, 1.0] * 2), [[seen]], gains(100, 1.0, 1.0)
    )
    for is_sum in (False, True):
        (change,) = moves.within_layers([layer], 0.5, is_sum)
        # Inputs 1 and 2 promise a loss of evidence, whose square is large.
        assert structured.group_of(groups, change.indices).unique().tolist() == [0, 3]


def test_cover_rows_gives_every_unit_an_input_at_the_same_size():
    generator = torch.Generator().manual_seed(0)
    for trial in range(50):
        index = sets.random_set(80, 12 + trial % 20, generator, torch.device("cpu"))
        covered = sets.cover_rows(index, 10, 8, generator)
        assert len(covered) == len(index) and len(covered.unique()) == len(covered)
        assert len((covered // 8).unique()) == 10


def test_the_evidence_decides_how_many_members_there_are():
    form = Form("linear", (1, 5))
    x, g = torch.eye(5).double(), torch.tensor([[0.1], [0.9], [0.0], [0.8], [0.0]]).double()
    scores = torch.tensor([-1.0, 3.0]).double()
    layer = Moving(
        form, None, torch.tensor([0, 2]), scores, [[Seen(form, x, g)]], lambda m, e: m.abs() - 0.5
    )
    assert moves.by_evidence([layer], room=5)[0].indices.tolist() == [1, 2, 3]
    assert moves.by_evidence([layer], room=1)[0].indices.tolist() == [1, 2]
    assert moves.by_evidence([layer], room=0)[0].indices.tolist() == [2]
    # the only weight of an output unit stays even so
    costly = layer._replace(scores=layer.scores - 9)
    assert moves.by_evidence([costly], room=0)[0].indices.tolist() == [2]
