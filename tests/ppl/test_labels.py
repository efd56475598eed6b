"""Label switching: what the diagnostics say, and draws whose components are numbered alike."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ppl import (
    Bernoulli,
    Categorical,
    DataError,
    HalfNormal,
    Normal,
    infer,
    latent,
    load,
    model,
    observe,
    plate,
    sum,  # noqa: A004 - the word of the language
)
from ppl.labels import matched, ordered
from ppl.models import mixture, ordered_mixture
from ppl.symmetry import Exchange

THREE = Exchange("component", 3, {"centre": (0,), "spread": (0,)}, ("z",))
CENTRES = torch.tensor([-4.0, 0.0, 4.0], dtype=torch.float64)
SPREADS = torch.tensor([0.5, 0.7, 0.8], dtype=torch.float64)


def points(n: int = 150, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Well separated points, and the component of each."""
    g = torch.Generator().manual_seed(seed)
    z = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), n, True, generator=g)
    noise = torch.randn(n, generator=g, dtype=torch.float64)
    return CENTRES[z] + SPREADS[z] * noise, z


def shuffled(n: int = 300) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Draws of three components, each draw numbered at random; and the numbers that were drawn."""
    g = torch.Generator().manual_seed(1)
    order = torch.rand(n, 3, generator=g).argsort(-1)
    noise = torch.randn(n, 3, generator=g, dtype=torch.float64)
    centre = torch.tensor([0.0, 0.2, 5.0]) + 0.05 * noise
    spread = torch.tensor([1.0, 9.0, 1.0]) + 0.3 * noise.flip(0)
    z = torch.randint(3, (n, 7), generator=g)
    draws = {"centre": centre, "spread": spread, "z": z.double()}
    return THREE.renumbered(draws, order), order


def test_draws_are_matched_whatever_their_numbers_were():
    draws, order = shuffled()
    found = THREE.renumbered(draws, matched(THREE, draws))
    first = found["centre"][0]
    assert (found["centre"] - first).abs().max() < 1.0
    assert found["spread"].std(0).max() < 0.5
    assert len(order.unique(dim=0)) == 6


def test_labels_follow_their_components():
    draws, _ = shuffled()
    found = THREE.renumbered(draws, matched(THREE, draws))
    before = draws["centre"].gather(1, draws["z"].long())
    assert torch.equal(found["centre"].gather(1, found["z"].long()), before)


def test_numbers_can_follow_one_site():
    draws, _ = shuffled()
    found = THREE.renumbered(draws, ordered(THREE, draws, "spread"))
    assert bool((found["spread"].diff(dim=-1) >= 0).all())
    with pytest.raises(DataError, match=r"by='centr'.*Did you mean 'centre'"):
        ordered(THREE, draws, "centr")


def test_the_numbering_is_the_best_of_all():
    g = torch.Generator().manual_seed(2)
    centre = torch.randn(40, 3, generator=g, dtype=torch.float64)
    one = Exchange("component", 3, {"centre": (0,)}, ())
    here = one.renumbered({"centre": centre}, matched(one, {"centre": centre}))["centre"]
    middle, sd = here.mean(0), here.std(0, correction=0)
    cost = torch.stack(
        [
            (((here[:, list(p)] - middle) / sd).square() / 2).sum(-1)
            for p in itertools.permutations(range(3))
        ]
    )
    assert bool((cost[0] <= cost.amin(0) + 1e-9).all())


@pytest.fixture(scope="module")
def fitted():
    x, z = points()
    return infer(mixture(), {"x": x}, method="qem", seed=1, restarts=4, progress=False), z


def test_a_mixture_says_that_its_labels_are_arbitrary(fitted):
    posterior, _ = fitted
    (text,) = posterior.diagnostics.warnings
    assert text.startswith("labels of the elements of plate 'component' are arbitrary")
    assert "3! = 6 equal copies" in text and "log 3! = 1.79 higher" in text
    assert "posterior.relabelled('component')" in text
    assert posterior.diagnostics.verdict.startswith("check")
    assert "labels of the elements" in str(posterior)
    note = posterior.diagnostics.notes["labels of component"]
    assert note.startswith("1 of 6 numberings in 200 draws")
    assert "among the 4 restarts" in note


def test_restarts_agree_after_matching(fitted):
    posterior, _ = fitted
    means = posterior.restart_means["centre"]
    assert means.shape == (4, 3)
    assert (means.sort(-1).values - CENTRES).abs().max() < 0.5
    note = posterior.diagnostics.notes["labels of component"]
    apart = float(note.split("agree to ")[1].split()[0])
    assert apart < 0.5


def test_relabelled_components_stand_in_order(fitted):
    posterior, z = fitted
    found = posterior.relabelled(by="centre")
    assert torch.allclose(found.mean("centre"), CENTRES, atol=0.4)
    assert torch.equal(found.mean("centre").argsort(), torch.arange(3))
    assert torch.allclose(found.sd("centre").sum(), posterior.sd("centre").sum(), rtol=0.15)
    assert float((found.probs("z").argmax(-1) == z).double().mean()) > 0.98
    assert not found.diagnostics.warnings
    assert "labels" not in found.diagnostics.verdict
    draws = found.samples(100)
    assert bool((draws["centre"].diff(dim=-1) > 0).all())


def test_relabelled_posteriors_can_be_saved(fitted, tmp_path):
    found = fitted[0].relabelled("component")
    found.save(tmp_path / "mixture.pt")
    assert torch.allclose(
        load(tmp_path / "mixture.pt", mixture()).mean("centre"), found.mean("centre")
    )


def test_two_fits_agree_once_they_are_numbered_alike(fitted):
    x, _ = points()
    other = infer(mixture(), {"x": x}, method="qem", seed=5, progress=False)
    means = [p.relabelled(by="centre").mean("weight") for p in (fitted[0], other)]
    assert torch.allclose(*means, atol=0.01)


def test_an_ordered_mixture_raises_no_alarm():
    posterior = infer(ordered_mixture(), {"x": points()[0]}, method="qem", seed=0, progress=False)
    assert not [w for w in posterior.diagnostics.warnings if "labels" in w]
    assert not [k for k in posterior.diagnostics.notes if k.startswith("labels")]
    # The third centre has few points: its posterior sd is about 0.4.
    assert torch.allclose(posterior.mean("centre"), CENTRES, atol=0.6)
    with pytest.raises(DataError, match="no components of this model are exchangeable"):
        posterior.relabelled()


@model
def coins():
    """Two kinds of coins, one fixed law for both: the draws visit both numberings."""
    kind = plate("kind", 2)
    with kind:
        level = latent("level", Normal(0.0, 1.0))
    with plate("toss"):
        z = latent("z", Categorical([0.5, 0.5], over=kind))
        observe("heads", Bernoulli(logits=level[z]))


def test_draws_that_visit_several_numberings_are_told():
    posterior = infer(coins, {"heads": [0, 1, 1]}, method="qem", seed=0, progress=False)
    (text,) = posterior.diagnostics.warnings
    assert "2! = 2 equal copies, and the draws visit 2 of them" in text
    assert "evidence" not in text
    low, high = posterior.relabelled(by="level").mean("level").tolist()
    one, two = posterior.mean("level").tolist()
    assert abs(one - two) < 0.1 < high - low
    assert low + high == pytest.approx(one + two, abs=0.1)


def test_a_symmetric_sum_with_one_mode_raises_no_alarm():
    @model
    def total():
        item = plate("item", 3)
        with item:
            size = latent("size", HalfNormal(1.0))
        observe("x", Normal(sum(size, over=item), 1.0))

    posterior = infer(total, {"x": 2.0}, method="qem", seed=0, progress=False)
    assert not posterior.diagnostics.warnings
    assert math.isclose(*posterior.mean("size")[:2].tolist(), abs_tol=0.05)


def test_an_unknown_name_is_refused(fitted):
    with pytest.raises(DataError, match=r"relabelled\('componen'\).*Did you mean 'component'"):
        fitted[0].relabelled("componen")
