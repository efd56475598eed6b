"""Marginals in pieces against scipy's distributions."""

import numpy as np
import pytest
import scipy.stats as st
import torch

from ppl import marginals as mg
from ppl.pieces import Pieces

LEVELS = torch.tensor([0.001, 0.05, 0.3, 0.5, 0.8, 0.999], dtype=torch.float64)


def one(*values):
    return torch.tensor(values, dtype=torch.float64)


def pieces(loc, scale, low=None, high=None, weights=None, share=None):
    fields = {"low": low, "high": high, "weights": weights}
    wide = {k: one(*v).unsqueeze(-1) for k, v in fields.items() if v is not None}
    share = None if share is None else one(share)
    return Pieces(
        one(0.0), one(1.0), one(*loc).unsqueeze(-1), one(*scale).unsqueeze(-1), share, **wide
    )


@pytest.mark.parametrize(
    ("loc", "low", "high"),
    [
        (0.3, 0.0, np.inf),
        (-8.0, 0.0, np.inf),
        (2.0, -1.0, 0.5),
        (0.3, -1.0, 1.0),
        (-30.0, 0.0, 9.0),
    ],
)
def test_a_cut_gaussian_has_the_quantiles_of_scipy(loc, low, high):
    law = st.truncnorm((low - loc) / 0.7, (high - loc) / 0.7, loc, 0.7)
    found = mg.quantile(pieces([loc], [0.7], [low], [high]), LEVELS)[:, 0]
    expected = torch.as_tensor(law.ppf(LEVELS))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_a_gaussian_without_edges_is_closed_and_reaches_infinity():
    found = mg.quantile(pieces([1.0], [2.0]), one(0.0, 0.3, 1.0))[:, 0]
    torch.testing.assert_close(found, torch.as_tensor(st.norm(1, 2).ppf([0, 0.3, 1])))


def test_a_spike_takes_its_share_of_the_levels():
    share = 0.4
    found = mg.quantile(pieces([1.0], [2.0], share=share), LEVELS)[:, 0]
    slab = st.norm(1, 2)
    left = share * slab.cdf(0)
    expected = [
        slab.ppf(q / share) if q < left else slab.ppf((q - 0.6) / share) if q > left + 0.6 else 0.0
        for q in LEVELS.tolist()
    ]
    torch.testing.assert_close(found, one(*expected))
    assert (found == 0).sum() == 2


def test_elements_without_a_slab_are_zero():
    found = mg.quantile(pieces([1.0], [2.0], share=0.0), LEVELS)
    assert not torch.count_nonzero(found)


def test_several_pieces_and_even_stretches():
    two = pieces([0.0, 5.0], [1.0, 0.5], weights=[0.7, 0.3])
    found = mg.quantile(two, LEVELS)[:, 0]
    reached = 0.7 * st.norm.cdf(found) + 0.3 * st.norm(5, 0.5).cdf(found)
    torch.testing.assert_close(torch.as_tensor(reached), LEVELS, atol=1e-12, rtol=0)
    even = pieces([0.5, 2.0], [np.inf, np.inf], [0.0, 1.0], [1.0, 3.0], [0.5, 0.5])
    found = mg.quantile(even, one(0.0, 0.25, 0.5, 0.75, 1.0))[:, 0]
    torch.testing.assert_close(found, one(0.0, 0.5, 1.0, 2.0, 3.0))


def test_moments_are_those_that_were_kept():
    m = pieces([1.0], [2.0], share=0.4)._replace(centre=one(0.25), spread=one(0.5))
    assert mg.mean(m).tolist() == [0.25]
    assert mg.sd(m).tolist() == mg.entry_sd(m).tolist() == [0.5]
    assert mg.covariance(m, 0).tolist() == [[[0.25]]]
    assert mg.inclusion(m).tolist() == [0.4]
    assert mg.inclusion(mg.Gaussian(one(0.0), one(1.0))) is None
    with pytest.raises(ValueError, match="continuous"):
        mg.probs(m)
