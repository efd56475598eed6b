"""Messages by Schur complements: a row and the cavities around it as one Gaussian, from which the others are integrated out.

The form that admits cavities which know too little to be inverted. Source: [Bishop2006] section 2.3.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ppl.inference.numerics.gaussian import Gaussian, eliminated, times
from ppl.inference.numerics.linalg import symmetrise


def schur(
    jacobian: Sequence[Tensor], residual: Tensor, cavities: Sequence[Gaussian]
) -> list[Gaussian]:
    """Add the other cavities to a row's own quadratic and integrate the others out; cavities may be improper.

    Computed in float64.
    """
    dtype = residual.dtype
    rows = torch.cat([_side_by_side(j) for j in jacobian], -1).double()
    lam, eta = rows.mT @ rows, -times(rows.mT, residual.double())
    joint = with_cavities(Gaussian(eta, lam), cavities)
    made, start = [], 0
    for j, c in zip(jacobian, cavities, strict=True):
        width, d = j.shape[1], j.shape[-1]
        message = _toward(joint, start, width, d, c)
        own = _own_square(j).double()
        # What is left of a difference of equals says nothing: no message at all, rather than noise.
        real = message.lam.diagonal(dim1=-2, dim2=-1).sum(-1) > 1e-13 * own
        lam = torch.where(real[..., None, None], message.lam, 0.0)
        made.append(
            Gaussian(torch.where(real[..., None], message.eta, 0.0).to(dtype), lam.to(dtype))
        )
        start += width * d
    return made


def with_cavities(row: Gaussian, cavities: Sequence[Gaussian]) -> Gaussian:
    """A row's quadratic ``[F, D]`` times the cavities of all its edges: the belief of the row."""
    eta, lam, start = row.eta.clone(), row.lam.clone(), 0
    for c in cavities:
        for b in range(c.eta.shape[1]):
            at = slice(start, start + c.eta.shape[-1])
            eta[:, at] += c.eta[:, b]
            lam[:, at, at] += c.lam[:, b]
            start = at.stop
    return Gaussian(eta, lam)


def _toward(joint: Gaussian, start: int, width: int, d: int, cavities: Gaussian) -> Gaussian:
    """Messages to the ``width`` edges of a slot whose coordinates begin at ``start``."""
    total = joint.eta.shape[-1]
    device = joint.eta.device
    stay = start + torch.arange(width * d, device=device).reshape(width, d)
    everything = torch.arange(total, device=device).expand(width, total)
    drop = everything[(everything < stay[:, :1]) | (everything > stay[:, -1:])].reshape(width, -1)
    kept = Gaussian(joint.eta[:, stay], _block(joint.lam, stay, stay))
    own = Gaussian(kept.eta - cavities.eta.double(), kept.lam - cavities.lam.double())
    if not drop.shape[1]:
        return own
    dropped = Gaussian(joint.eta[:, drop], _block(joint.lam, drop, drop))
    return _eliminated(own, _block(joint.lam, stay, drop), dropped)


def _block(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return matrix[:, rows.unsqueeze(-1), columns.unsqueeze(-2)]


def _eliminated(kept: Gaussian, cross: Tensor, dropped: Gaussian) -> Gaussian:
    chol, info = torch.linalg.cholesky_ex(dropped.lam)
    sizes = dropped.lam.diagonal(dim1=-2, dim2=-1)
    singular = (info > 0) | (chol.diagonal(dim1=-2, dim2=-1).square() <= 1e-14 * sizes).any(-1)
    if bool(singular.any()):
        # A whisper in directions that nothing informs leaves no trace in the others.
        largest = sizes.amax(-1, keepdim=True)
        whisper = torch.where(largest > 0, 1e-12 * largest, 1.0) * singular.unsqueeze(-1)
        more = torch.diag_embed(whisper.expand_as(sizes))
        dropped = Gaussian(dropped.eta, dropped.lam + more)
    made = eliminated(kept, cross, dropped)
    return Gaussian(made.eta, symmetrise(made.lam))


def _side_by_side(jacobian: Tensor) -> Tensor:
    """``[F, m, B * d]`` from ``[F, B, m, d]``."""
    return jacobian.transpose(1, 2).flatten(2)


def _own_square(jacobian: Tensor) -> Tensor:
    return jacobian.square().sum((-2, -1))


__all__ = ["schur", "with_cavities"]
