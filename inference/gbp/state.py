"""What a run of Gaussian belief propagation carries from round to round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ppl.inference.gbp.candidates import Tally
from ppl.inference.gbp.relinearise import Charts
from ppl.inference.numerics.gaussian import Gaussian


class Run(NamedTuple):
    """How the run goes: numbers that steer it and numbers to report."""

    damping: float
    proximal: float
    policy: int | str  # of relinearisation
    history: Tensor  # [WINDOW]: latest changes of the means in standard deviations, the newest last; infinite before
    stage: int = 0  # cures tried
    since: int = 0  # rounds since the last cure
    rate: float = float("nan")  # observed contraction a round
    rising: int = 0  # rounds in a row with a rate above one
    swings: int = 0  # rounds in a row in which the means went back
    energy: float = float("inf")  # at the means, when last computed
    energy_age: int = 0  # rounds since the lowest energy
    settled: bool = False  # the linear problem has converged; rows may still have to move
    converged: bool = False
    failed: str = ""  # why the run was given up
    ranks: tuple[int, int] = (
        -1,
        0,
    )  # known directions of beliefs that are improper; rounds without a new one
    moved: int = 0  # rows linearised in the last round
    moved_in_all: int = 0
    dropped: int = 0  # affine rows that are not finite and count as absent
    tally: Tally = Tally()


class Best(NamedTuple):
    """The state of lowest energy so far."""

    energy: float
    charts: Charts
    beliefs: Mapping[str, Gaussian]
    means: Mapping[str, Tensor]


class State(NamedTuple):
    """Messages, and what they were computed from."""

    charts: Charts
    prior: Mapping[str, Gaussian]  # the variables' own terms: unary rows, and the proximal ones
    beliefs: Mapping[str, Gaussian]  # prior plus messages; kept to save a sum
    means: Mapping[str, Tensor]  # [N, d] about the charts
    sds: Mapping[str, Tensor]  # [N, d] of the beliefs; infinite where improper
    params: Mapping[str, Tensor]
    round: int
    run: Run
    best: Best
    step: Mapping[
        str, Tensor
    ]  # [N, d] last change of the means in standard deviations, while it is watched


WINDOW = 64  # rounds that the run remembers

__all__ = ["Best", "Run", "State", "WINDOW"]
