"""Laws of categories that are intervals of a noisy predictor: probit, sign, ordinal and quantised outcomes.

``P(y <= k | z) = Phi((c_k - z) / s)`` for every category ``k`` but the last says that ``z + Normal(0, s)`` lies between
the cut points ``c_{k-1}`` and ``c_k``. Whether a law of categories is of this form, and where its cut points are, is
read off its probabilities alone, so that any spelling will do: where a cumulative probability is a half there is a
cut point, and its score ``ndtri(P)`` must be a straight line of slope ``-1 / s`` around it.

Source: [McCullagh1980], the proportional form with a probit link.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Cumulative scores ``[P, R, B | 1, m | 1, K - 1]`` at predictors ``[P, R | 1, B | 1, m | 1]``.
Scores = Callable[[Tensor], Tensor]

_TINY = 1e-300
_REACH, _HALVINGS = 50.0, 60  # of the search for cut points, in asinh of the predictor
_ROUNDS = 40  # of the search for the noise
_NOISELESS = 1e-9  # noise below which a cut is a step, relative to one plus the cut point
_TESTED = (-2.5, -1.0, 0.5, 2.0)  # noise standard deviations from a cut point


@dataclass(frozen=True, eq=False)
class Cuts:
    """Cut points and noise of a law of categories, all ``[K - 1, R | 1, B | 1, m | 1]``."""

    places: Tensor
    scale: Tensor  # 0: there is no noise
    sign: float  # -1: later categories stand for smaller predictors

    @property
    def is_noiseless(self) -> bool:
        """Whether categories follow from the predictor."""
        return not bool(torch.count_nonzero(self.scale))

    def edges(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the interval of ``z`` for categories ``y [1, B, m]``."""
        infinite = torch.full_like(self.places[:1], self.sign * torch.inf)
        padded = torch.cat([-infinite, self.places, infinite]).movedim(0, -1)
        padded = padded.expand(-1, *y.shape[1:], -1)
        at = y.long().unsqueeze(-1).expand(len(padded), *y.shape[1:], 1)
        ends = padded.gather(-1, at).squeeze(-1), padded.gather(-1, at + 1).squeeze(-1)
        return ends if self.sign > 0 else (ends[1], ends[0])


def scores(leaves: Mapping[str, Tensor]) -> Tensor:
    """Normal scores ``[..., K - 1]`` of the cumulative probabilities of a Categorical law.

    >>> half = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    >>> scores({"probs": half}).round(decimals=4)
    tensor([0.0000, 0.6745], dtype=torch.float64)
    """
    p = leaves["probs"] if "probs" in leaves else leaves["logits"].softmax(-1)
    below, above = p.cumsum(-1)[..., :-1], p.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    low, high = (torch.special.ndtri(x.clamp(_TINY, 0.5)) for x in (below, above))
    return torch.where(below <= above, low, -high)


def found_cuts(at: Scores, like: Tensor, shape: tuple[int, ...]) -> Cuts | None:
    """Cut points of a law, None if its categories are no intervals.

    Args:
        at: the scores.
        like: for dtype and device.
        shape: ``[K - 1, 1, B | 1, m | 1]``, of the cut points.
    """
    ends = at(like.new_tensor([-10.0, 10.0]).reshape(2, 1, 1, 1))
    fall = ends[0] - ends[1]
    sign = 1.0 if bool((fall >= 0).all()) else -1.0
    if not bool((sign * fall > 0).any() & (sign * fall >= 0).all()):
        return None

    def own(z: Tensor) -> Tensor:
        """The score of each cut at its own predictor ``[K - 1, R, B, m]``, falling in ``z``."""
        return sign * _own(at, z)

    zero = like.new_zeros(shape)
    guess = _tested(own, *_line(at, sign, zero, zero + 1.0), sign)
    return _searched(own, zero, sign) if guess is None else guess


def _searched(own: Scores, zero: Tensor, sign: float) -> Cuts | None:
    """Cut points anywhere, by bisection, then the noise around them."""
    low, high = zero - _REACH, zero + _REACH
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        below = own(middle.sinh()) > 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    places = (0.5 * (low + high)).sinh()
    scale = torch.full_like(places, 1e6)
    for _ in range(_ROUNDS):
        scale = scale / own(places + scale).abs().clamp(1e-3, 37.0)
    return _tested(own, places, scale, sign)


def moved_cuts(at: Scores, before: Cuts) -> Cuts:
    """The cut points for other params, by way of scores near the cut points before; differentiable.

    Scores are straight lines, so two points of each give place and slope; a first round comes near.
    """
    with torch.no_grad():
        places, scale = _line(at, before.sign, before.places, before.scale)
    return Cuts(*_line(at, before.sign, places, scale), before.sign)


def _line(at: Scores, sign: float, places: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    before, after = sign * _own(at, places - scale), sign * _own(at, places + scale)
    new = 2.0 * scale / (before - after)
    return places + 0.5 * new * (before + after), new


def _own(at: Scores, z: Tensor) -> Tensor:
    return at(z).diagonal(dim1=0, dim2=-1).movedim(-1, 0)


def _tested(own: Scores, places: Tensor, scale: Tensor, sign: float) -> Cuts | None:
    """The cuts if the law has this form: no noise, or one noise for all cuts and straight scores."""
    steps = scale < _NOISELESS * (1.0 + places.abs())
    if bool(steps.all()):
        return Cuts(torch.where(places.abs() < _NOISELESS, 0.0, places), 0.0 * scale, sign)
    tolerance = 10 * torch.finfo(places.dtype).eps ** 0.5
    straight = [(own(places + t * scale) + t).abs() <= tolerance for t in _TESTED]
    same = (scale / scale[:1]).log().abs() <= tolerance
    if bool(steps.any()) or not bool(torch.stack([same, *straight]).all()):
        return None
    return Cuts(torch.where(places.abs() < _NOISELESS * scale, 0.0, places), scale, sign)
