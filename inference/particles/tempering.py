"""Exponents of the weights: how far a weighting may go from the proposals to the posterior with the particles that it has.

Outside all plates and within them the exponents may differ. Tempering within plates makes their message to the other blocks that
of mean-field inference, which is too narrow; so plates are tempered for their own sake only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ppl.inference.particles import nested, picked
from ppl.inference.particles.blocks import Block
from ppl.inference.particles.estep import Evaluated, Weights, weigh
from ppl.inference.particles.forms import Mirrored, Prior
from ppl.inference.particles.shards import inner_blocks
from ppl.inference.particles.weighting import Weighting

_NONE = 1e-12  # exponent at which weights count as equal


class Exponents(NamedTuple):
    """Of the weights, and of those within plates."""

    outside: float = 1.0
    within: float = 1.0


def may_differ(weighting: Weighting) -> bool:
    """Whether weights within plates may have an exponent of their own."""
    along = any(b.chain and b.plates == (b.chain,) and not b.enumerated for b in weighting.blocks)
    return weighting.plan.split is None and weighting.share is None and not along


def largest_exponents(
    here: Evaluated, first: Exponents, enough: float, apart: bool
) -> tuple[Exponents, Weights]:
    """The largest exponents that leave an effective share ``enough`` of every block's particles, and the weights there.

    Args:
        here: particles and log-densities.
        first: where the search begins; it goes down by halves, near the end by their roots.
        enough: least effective share, see :func:`effective_shares`.
        apart: whether the exponent within plates may be larger than the one outside.
    """
    above = picked.parent(here.weighting) if apart and first.within == 1.0 else None
    if above is not None:
        found = _by_powers(here, above, first.outside, enough)
        if found is not None:
            return found
    outside, within = first
    waits = any(isinstance(b.form, Mirrored) for b in here.weighting.blocks)
    while True:
        # Of tempered units that have no sign yet those say most whose products are near zero.
        outside = min(outside, within**2) if waits else outside
        within = within if apart else outside
        weights = weigh(here, outside, inner=within, enumerated=False)
        shares = effective_shares(here.weighting, weights)
        if min(shares) >= enough or outside < _NONE:
            return Exponents(outside, within), weights
        if apart and shares[1] < enough:
            within = _lower(within, shares[1], enough)
            outside = min(outside, within)
        else:
            outside = _lower(outside, min(shares), enough)


def _by_powers(
    here: Evaluated, above: Block, first: float, enough: float
) -> tuple[Exponents, Weights] | None:
    """The same where one block's weights decide: those at another exponent are powers of them. None if others are too few."""
    base = weigh(here, first, inner=1.0, enumerated=False)
    outside = first
    while True:
        marginals = picked.powered(here.weighting, above, base.marginals, outside / first)
        weights = Weights(base.log_z, marginals, base.joint)
        shares = effective_shares(here.weighting, weights)
        if shares[1] < enough or not math.isfinite(float(base.log_z.sum())):
            return None
        if shares[0] >= enough or outside < _NONE:
            return Exponents(outside, 1.0), weights
        outside = _lower(outside, shares[0], enough)


def _lower(exponent: float, share: float, enough: float) -> float:
    """A power of the root of 2 below an exponent that leaves too small an effective share; by a root where it is near."""
    roots = round(2 * math.log2(exponent)) - (2 if share < enough / 2 else 1)
    return 2.0 ** (roots / 2)  # half of them exact, so that doubling leads to 1


def _learns_nothing(block: Block) -> bool:
    """Whether a block's proposal is its law, so that no moments are spoilt by few effective particles."""
    return isinstance(block.form, Prior) and not block.gaussian


def effective_share(weighting: Weighting, weights: Weights) -> float:
    """The lesser of :func:`effective_shares`."""
    return min(effective_shares(weighting, weights))


def effective_shares(weighting: Weighting, weights: Weights) -> tuple[float, float]:
    """Effective share of the particles outside and within plates: median over a block's elements, least over the blocks.

    Of a plate spread over processes only the blocks outside it count: they are the same everywhere.
    """
    least = {False: 1.0, True: 1.0}
    own = inner_blocks(weighting) if weighting.share else ()
    for block in weighting.blocks:
        if block.enumerated or block in own or _learns_nothing(block):
            continue
        w = weights.marginals[block.axis]
        if block.is_nested:
            each = nested.share(w, weighting.sizes[block.axis])
            share = float(each.median()) if bool(w.isfinite().all()) else 0.0
        else:
            share = (weights.effective(block.axis) - 1) / max(w.shape[-1] - 1, 1)
            share = 0.0 if math.isnan(share) else share
        least[bool(block.plates)] = min(least[bool(block.plates)], share)
    return least[False], least[True]
