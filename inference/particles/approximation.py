"""The state that methods on particles share: a proposal for every sampled block, and learned params."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.distributions import biject_to

from ppl.graph import Variable
from ppl.inference.particles.proposals import Joint, Proposal


class Learned(NamedTuple):
    """A param on its unconstrained scale, with the moments of Adam."""

    free: Tensor
    first: Tensor
    second: Tensor


class Approximation(NamedTuple):
    """The approximate posterior: a proposal for every sampled block, and the params."""

    proposals: dict[str, Proposal]  # particle axis -> proposal
    params: dict[str, Learned]


def ordinary(q: Approximation) -> Approximation:
    """The same with tensors that autograd takes, in the place of those made in torch's inference mode."""
    proposals = {}
    for axis, p in q.proposals.items():
        known = p.joint is None or not p.joint.mean.is_inference()
        joint = p.joint if known or p.joint is None else Joint(*(t.clone() for t in p.joint))
        proposals[axis] = p._replace(joint=joint)
    return q._replace(proposals=proposals)


def param_value(v: Variable, free: Tensor) -> Tensor:
    """A param on its own scale."""
    return biject_to(v.support)(free)
