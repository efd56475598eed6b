"""Damping of messages, and cavities that rounding cannot make negative."""

from __future__ import annotations

import torch
from torch import Tensor

from ppl.inference.numerics.gaussian import Gaussian, inverse, times


def damped(new: Gaussian, old: Gaussian, share: float | Tensor) -> Gaussian:
    """Keep ``share`` of the old message, a number or ``[F]``."""
    if isinstance(share, Tensor):
        wide = share.reshape(-1, *(1,) * (new.eta.ndim - 1))
        return Gaussian(
            torch.lerp(new.eta, old.eta, wide), torch.lerp(new.lam, old.lam, wide.unsqueeze(-1))
        )
    if share == 0.0:
        return new
    return Gaussian(torch.lerp(new.eta, old.eta, share), torch.lerp(new.lam, old.lam, share))


def cavity(belief: Gaussian, message: Gaussian, floor: float) -> tuple[Gaussian, int]:
    """Belief without one message, its precision kept above ``floor`` times the belief's.

    Where the floor acts the mean stays that of the belief. Returns the cavity and the number of floored edges.
    In exact arithmetic no cavity is negative; what the floor meets is rounding.
    """
    eta, lam = belief.eta - message.eta, belief.lam - message.lam
    own, whole = (x.diagonal(dim1=-2, dim2=-1) for x in (lam, belief.lam))
    low = (own < floor * whole) & (own != 0)  # nothing known is no rounding
    if not bool(low.any()):
        return Gaussian(eta, lam), 0
    edges = low.any(-1)
    raised = torch.where(low.unsqueeze(-1) | low.unsqueeze(-2), 0.0, lam)
    raised = raised + torch.diag_embed(torch.where(low, floor * whole, 0.0))
    informed = inverse(belief.lam)
    mean = torch.where(informed.proper[..., None], times(informed.matrix, belief.eta), 0.0)
    kept = torch.where(edges[..., None], times(raised, mean), eta)
    return Gaussian(kept, raised), int(edges.sum())


__all__ = ["cavity", "damped"]
