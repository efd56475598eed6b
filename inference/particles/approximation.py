"""The state that methods on particles share: a proposal for every sampled block, and learned params."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.distributions import biject_to

from ppl.graph import Variable
from ppl.inference.particles.proposals import Proposal


class Learned(NamedTuple):
    """A param on its unconstrained scale, with the moments of Adam."""

    free: Tensor
    first: Tensor
    second: Tensor


class Approximation(NamedTuple):
    """The approximate posterior: a proposal for every sampled block, and the params."""

    proposals: dict[str, Proposal]  # particle axis -> proposal
    params: dict[str, Learned]


def param_value(v: Variable, free: Tensor) -> Tensor:
    """A param on its own scale."""
    return biject_to(v.support)(free)
