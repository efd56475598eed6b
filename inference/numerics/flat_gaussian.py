"""Gaussian families whose coordinates lie in one flat vector: draws, densities and moments of each piece.

A piece is one Gaussian for every element of its plates: of all latents together, or of a block. Its parameters are
``loc``, ``raw`` (the log of scales) and ``extra``: nothing, the strict lower triangle of a Cholesky factor, or the
directions of a low-rank part. Draws are ``v [R, G, *plates, K, D]`` for R restarts, G draws and K particles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Piece:
    """One Gaussian for every element of the plates."""

    name: str
    plates: tuple[int, ...]  # sizes
    dims: int  # D
    family: Literal["mean_field", "low_rank", "full_rank"]
    rank: int
    offset: int  # of its first coordinate

    @property
    def extra_dims(self) -> int:
        """Numbers beyond location and scale that one coordinate has."""
        return {"mean_field": 0, "low_rank": self.rank, "full_rank": self.dims}[self.family]

    @property
    def cells(self) -> int:
        """Numbers in ``loc``."""
        return math.prod(self.plates) * self.dims

    @property
    def size(self) -> int:
        """Numbers in all parameters."""
        return self.cells * (2 + self.extra_dims)

    @property
    def locations(self) -> slice:
        """Where ``loc`` lies in the flat vector."""
        return slice(self.offset, self.offset + self.cells)

    @property
    def raws(self) -> slice:
        """Where ``raw`` lies in the flat vector."""
        return slice(self.offset + self.cells, self.offset + 2 * self.cells)


class Views(NamedTuple):
    """Parameters of a piece, cut out of the flat vector ``[R, P]``."""

    loc: Tensor  # [R, *plates, D]
    raw: Tensor  # [R, *plates, D], log scales
    extra: Tensor | None  # [R, *plates, D, D or rank]


class Noise(NamedTuple):
    """Standard Normal numbers of one step."""

    eps: Tensor  # [R, G, *plates, K, D]
    low: Tensor | None  # [R, G, *plates, K, rank]


def views(piece: Piece, theta: Tensor) -> Views:
    """Cut a piece's parameters out of ``theta [R, P]``."""
    lead = theta.shape[:-1]
    shape = (*lead, *piece.plates, piece.dims)
    loc, raw = (theta[..., part].reshape(shape) for part in (piece.locations, piece.raws))
    if not piece.extra_dims:
        return Views(loc, raw, None)
    rest = theta[..., piece.offset + 2 * piece.cells : piece.offset + piece.size]
    return Views(loc, raw, rest.reshape(*shape, piece.extra_dims))


def noise(
    piece: Piece, lead: tuple[int, int], k: int, like: Tensor, generator: torch.Generator
) -> Noise:
    """Fresh noise; an even number of draws comes in pairs of opposite sign.

    Args:
        piece: whose noise it is.
        lead: restarts R and draws G.
        k: particles.
        like: for dtype and device.
        generator: of random numbers.
    """
    restarts, draws = lead
    is_paired = draws % 2 == 0
    shape = (restarts, draws // 2 if is_paired else draws, *piece.plates, k)

    def fresh(size: int) -> Tensor:
        half = torch.randn(
            (*shape, size), generator=generator, dtype=like.dtype, device=like.device
        )
        return torch.cat([half, -half], 1) if is_paired else half

    return Noise(fresh(piece.dims), fresh(piece.rank) if piece.family == "low_rank" else None)


def sample(piece: Piece, at: Views, n: Noise) -> Tensor:
    """Draws ``v [R, G, *plates, K, D]``, differentiable in the parameters.

    >>> piece = Piece("x", (), 2, "mean_field", 0, 0)
    >>> at = views(piece, torch.tensor([[1.0, 2.0, 0.0, 0.0]]))
    >>> sample(piece, at, Noise(torch.ones(1, 1, 1, 2), None)).flatten()
    tensor([2., 3.])
    """
    loc = _spread(at.loc)
    if piece.family == "full_rank":
        return loc + n.eps @ _factor(at).unsqueeze(1).mT
    out = loc + n.eps * _spread(at.raw).exp()
    if piece.family == "low_rank":
        assert n.low is not None and at.extra is not None
        out = out + n.low @ at.extra.unsqueeze(1).mT
    return out


def log_density(piece: Piece, at: Views, v: Tensor) -> Tensor:
    """Log-density ``[R, G, *plates, K]`` of draws."""
    apart = v - _spread(at.loc)
    log_det = at.raw.sum(-1)
    if piece.family == "full_rank":
        factor = _factor(at).unsqueeze(1)
        z = torch.linalg.solve_triangular(factor, apart.mT, upper=False).mT
        squares = z.square().sum(-1)
    else:
        z = apart * _spread(-at.raw).exp()
        squares = z.square().sum(-1)
    if piece.family == "low_rank":
        assert at.extra is not None
        reduced, extra = _capacitance(at)
        part = torch.linalg.solve_triangular(
            reduced.unsqueeze(1), (z @ extra.unsqueeze(1)).mT, upper=False
        )
        squares = squares - part.square().sum(-2)
        log_det = log_det + reduced.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = piece.dims * _HALF_LOG_2PI
    return -0.5 * squares - (log_det.unsqueeze(1).unsqueeze(-1) + constant)


def sds(piece: Piece, at: Views) -> Tensor:
    """Marginal standard deviations ``[R, *plates, D]``."""
    if piece.family == "full_rank":
        return _factor(at).square().sum(-1).sqrt()
    variance = (2 * at.raw).exp()
    if piece.family == "low_rank":
        assert at.extra is not None
        variance = variance + at.extra.square().sum(-1)
    return variance.sqrt()


def roots(piece: Piece, at: Views) -> Tensor:
    """``B [R, *plates, D, m]`` with covariance ``B B'``, plus the squared scales where the family is low rank."""
    if piece.family == "full_rank":
        return _factor(at)
    if at.extra is not None:
        return at.extra
    return torch.diag_embed(at.raw.exp())


def first(piece: Piece, restarts: int, sd: float, like: Tensor, g: torch.Generator) -> Tensor:
    """Flat parameters ``[R, size]`` of a Gaussian at zero with scales ``sd``."""
    lead = (restarts,)
    loc = torch.zeros((*lead, piece.cells), dtype=like.dtype, device=like.device)
    raw = torch.full_like(loc, math.log(sd))
    size = (*lead, piece.cells * piece.extra_dims)
    extra = torch.zeros(size, dtype=like.dtype, device=like.device)
    if piece.family == "low_rank":
        # At zero the gradient by the directions vanishes: they need a push.
        extra = 0.1 * sd * torch.randn(size, generator=g, dtype=like.dtype, device=like.device)
    return torch.cat([loc, raw, extra], -1)


def _spread(parameter: Tensor) -> Tensor:
    """``[R, *plates, D]`` with axes for draws and particles."""
    return parameter.unsqueeze(1).unsqueeze(-2)


def _factor(at: Views) -> Tensor:
    """Cholesky factor ``[R, *plates, D, D]``."""
    assert at.extra is not None
    return at.extra.tril(-1) + torch.diag_embed(at.raw.exp())


def _capacitance(at: Views) -> tuple[Tensor, Tensor]:
    """Cholesky factor ``[R, *plates, r, r]`` of ``I + W' W``, and the directions W in units of the scales."""
    assert at.extra is not None
    scaled = at.extra * (-at.raw).exp().unsqueeze(-1)
    eye = torch.eye(scaled.shape[-1], dtype=scaled.dtype, device=scaled.device)
    return torch.linalg.cholesky(eye + scaled.mT @ scaled), scaled


def unit(piece: Piece, theta: Tensor) -> Tensor:
    """The change in each parameter ``[R, size]`` that counts as one: an sd, or one in logs of scales."""
    sd = sds(piece, views(piece, theta)).flatten(1)
    extra = sd.repeat_interleave(piece.extra_dims, -1) if piece.extra_dims else sd[..., :0]
    return torch.cat([sd, torch.ones_like(sd), extra], -1)
