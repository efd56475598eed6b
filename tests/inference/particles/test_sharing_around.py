"""Outer latents that meet once inner plates are summed out share a particle index."""

from __future__ import annotations

import pytest

from ppl import Markov, Normal, latent, model, observe, plate
from ppl import models as shipped
from ppl.backend import Settings
from ppl.inference.particles.blocks import make_blocks
from ppl.inference.particles.options import ParticleOptions
from ppl.inference.particles.problem import prepare_particles
from ppl.streams import Streams


@model
def two_arms(joined: bool):
    """Two globals in no common factor; below them a plate that both reach, or a plate for each."""
    a, b = latent("a", Normal(0.0, 1.0)), latent("b", Normal(0.0, 1.0))
    with plate("left"):
        x = latent("x", Normal(a, 1.0))
        y = latent("y", Normal(b, 1.0)) if joined else 0.0
        observe("seen", Normal(x + y, 1.0))
    if not joined:
        with plate("right"):
            observe("also", Normal(latent("z", Normal(b, 1.0)), 1.0))


def groups_of(program, data=None, **options):
    return {b.names for b in make_blocks(program.graph(data), ParticleOptions(**options))}


def test_globals_meet_where_a_plate_below_both_is_summed_out():
    assert groups_of(two_arms(True), {"seen": [1.0]}) == {("a", "b"), ("x", "y")}
    apart = groups_of(two_arms(False), {"seen": [1.0], "also": [1.0]})
    assert apart == {("a",), ("b",), ("x",), ("z",)}


def test_no_larger_than_the_limit():
    assert ("a",) in groups_of(two_arms(True), {"seen": [1.0]}, joint_up_to=0)


@pytest.mark.parametrize("chained", [True, False])
def test_through_several_levels(chained):
    @model
    def nested():
        a, b = latent("a", Normal(0.0, 1.0)), latent("b", Normal(0.0, 1.0))
        with plate("outer"):
            u, v = latent("u", Normal(a, 1.0)), latent("v", Normal(0.0, 1.0))
            with plate("inner", ordered=chained):
                law = Markov(Normal(v, 1.0), lambda last: Normal(last, b.exp()))
                x = latent("x", law if chained else Normal(v, b.exp()))
                observe("y", Normal(x + u, 1.0))

    assert groups_of(nested, {"y": [[1.0, 2.0]]}) == {("a", "b"), ("u", "v"), ("x",)}


def test_the_blocks_of_covid_are_those_of_the_paper_and_fit():
    sizes = {"region": 92, "time": 16}
    blocks = make_blocks(shipped.covid.graph(sizes=sizes), ParticleOptions())
    assert [len(b.names) for b in blocks] == [6, 3, 1]
    data = {n: [[1.0] * 16] * 92 for n in ("obs", "wearing", "mobility")}
    bound = shipped.covid.bind({**data, "npis": [[[0.0] * 9] * 16] * 92})
    counts = prepare_particles(bound, ParticleOptions(), Settings(Streams(0)), 1).weighting.sizes
    root, region, chain = counts.values()
    assert 92 * 16 * root * region * chain <= 20_000_000 and root >= 40
