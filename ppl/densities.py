"""Log-densities of laws under leading axes: broadcast, as a matrix product, or by ``vmap``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppl import operations
from ppl.distributions import Distribution, MultivariateNormal, Normal
from ppl.errors import UnsupportedError
from ppl.graph import Law
from ppl.lowered import Operand, joint_edges

if TYPE_CHECKING:
    from ppl.lower import Compiler

_LARGE = 1 << 20  # entries above which memory is used again
_HALF_LOG_2PI = 0.9189385332046727


def law_density(
    c: Compiler, law: Law, value: Operand, mask: Operand | None, plates: Sequence[str] = ()
) -> Operand:
    """Log-density of ``value`` with its event summed.

    Args:
        c: the compiler to emit steps to.
        law: its parameters are compiled here.
        value: the whole event of one draw.
        mask: where entries are present; of the shape of ``value``.
        plates: of the factor.
    """
    arguments = c.arguments(law)
    everything = [value, *arguments, *([mask] if mask else [])]
    axes, edges = c.joint_axes(everything, plates), joint_edges(everything)
    if is_foreign(law.family):
        slot = _by_vmap(c, law, everything, axes, masked=mask is not None)
    elif mask is None and _is_inner_product(c, law, value, arguments):
        slot = _inner_product(c, value, arguments, axes)
    elif mask is None and _is_plain_normal(law, value, arguments):
        slot = _plain_normal(c, value, arguments, axes)
    else:
        slot = _broadcast(c, law, everything, axes, masked=mask is not None)
    return without_edges(c, Operand(slot, axes, 0, edges))


def is_foreign(family: Distribution) -> bool:
    """Whether a law, or one inside it, is right only for parameters of one element's shape."""
    if family.needs_vmap:
        return True
    inside = [part for v in vars(family).values() for part in (v if isinstance(v, tuple) else (v,))]
    return any(isinstance(part, Distribution) and is_foreign(part) for part in inside)


def without_edges(c: Compiler, out: Operand) -> Operand:
    """Zero where a neighbour is missing: those elements drop out of the factor."""
    for plate, start, end in out.edges:
        within = [a for a in out.axes if a == plate or plate in c.ancestors(a)]
        if len(within) != 1:
            raise UnsupportedError(
                f"a value shifted along plate '{plate}' is used where it is not clear which "
                f"elements lack a neighbour. Use it with '{plate}' open."
            )
        at = out.axes.index(within[0]) - len(out.axes)
        inputs = [out.slot]
        if within[0] != plate:
            inputs.append(c.membership(within[0], plate))
        run = partial(_drop_edges, at, start, end, c.graph.plates[plate].size)
        out = out._replace(slot=c.emit(run, *inputs))
    return out._replace(edges=())


def _broadcast(
    c: Compiler, law: Law, everything: Sequence[Operand], axes: tuple[str, ...], masked: bool
) -> int:
    family, value = law.family, everything[0]
    batch = value.event_ndim - family.event_dim
    ranks = [batch + leaf.event_dim for leaf in family.leaves()]
    slots = [c.place(value, axes)]
    for argument, rank in zip(everything[1 : 1 + len(ranks)], ranks, strict=True):
        slots.append(c.place(argument, axes, max(rank, argument.event_ndim)))
    if masked:
        slots.append(c.place(everything[-1], axes))
    return c.emit(partial(_evaluate, family, batch, masked), *slots)


def _by_vmap(
    c: Compiler, law: Law, everything: Sequence[Operand], axes: tuple[str, ...], masked: bool
) -> int:
    operands = [c.lifted(o, axes) for o in everything]
    batch = everything[0].event_ndim - law.family.event_dim
    run = operations.mapped(
        partial(_evaluate, law.family, batch, masked),
        [[a in o.axes for o in operands] for a in axes],
    )
    return c.emit(run, *(o.slot for o in operands))


def _evaluate(
    family: Distribution, batch: int, masked: bool, value: Tensor, *rest: Tensor
) -> Tensor:
    leaves, mask = (rest[:-1], rest[-1]) if masked else (rest, None)
    law = family.replace(leaves)
    density = law.log_prob(value) if mask is None else masked_log_prob(law, value, mask)
    return density.sum(tuple(range(-batch, 0))) if batch else density


def masked_log_prob(law: Distribution, value: Tensor, mask: Tensor) -> Tensor:
    """Log-density of the entries that are there; the others are integrated out.

    Args:
        law: with tensors as parameters.
        value: ``[*batch, *event]``; any legal number where an entry is missing.
        mask: True where an entry is there; broadcasts with ``value``.
    """
    if law.event_dim == 0:
        return torch.where(mask, law.log_prob(value), 0.0)
    present = mask.flatten(mask.ndim - law.event_dim)
    if isinstance(law, MultivariateNormal) and bool((present.any(-1) & ~present.all(-1)).any()):
        return marginal_log_prob(law, value, mask)
    return torch.where(present.all(-1), law.log_prob(value), 0.0)


def marginal_log_prob(law: MultivariateNormal, value: Tensor, mask: Tensor) -> Tensor:
    """Log-density of the sub-vector where ``mask [*batch, d]`` is True.

    The rows and columns of missing entries are replaced by those of the identity, and their
    residuals by zero: they add nothing to the determinant or to the square.

    >>> law = MultivariateNormal(torch.zeros(2), covariance_matrix=4.0 * torch.eye(2))
    >>> one = marginal_log_prob(law, torch.zeros(2), torch.tensor([True, False]))
    >>> torch.allclose(one, Normal(0.0, 2.0).log_prob(torch.zeros(())).float())
    True
    """
    both = mask.unsqueeze(-1) & mask.unsqueeze(-2)
    covariance = law.covariance
    eye = torch.eye(value.shape[-1], dtype=covariance.dtype, device=covariance.device)
    residual = torch.where(mask, value - law.tensors()["loc"], 0.0)
    chol = torch.linalg.cholesky(torch.where(both, covariance, eye))
    white = torch.linalg.solve_triangular(chol, residual.unsqueeze(-1), upper=False).squeeze(-1)
    log_det = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    present = mask.sum(
        -1, dtype=covariance.dtype
    )  # a whole number times a float is single precision
    return -0.5 * white.square().sum(-1) - log_det - _HALF_LOG_2PI * present


def _is_plain_normal(law: Law, value: Operand, arguments: Sequence[Operand]) -> bool:
    """The most frequent law by itself: a third of the calls, which is the time that a small factor takes."""
    fits = all(a.event_ndim <= value.event_ndim for a in arguments)
    return type(law.family) is Normal and fits and value.event_ndim <= 1


def _plain_normal(
    c: Compiler, value: Operand, arguments: Sequence[Operand], axes: tuple[str, ...]
) -> int:
    """In few calls, which are what a small factor costs: those that read constants alone are made once."""
    dims = tuple(range(-value.event_ndim, 0))
    slots = [c.place(o, axes, value.event_ndim) for o in (value, *arguments)]
    if all(_is_number(c, o, n) for o, n in zip(arguments, (0.0, 1.0), strict=True)):
        return c.emit(partial(_standard_normal, dims), slots[0])
    shift = c.emit(partial(_log_scale, c.dtype), slots[2])
    return c.emit(partial(_normal, dims), *slots, shift)


def _is_number(c: Compiler, operand: Operand, number: float) -> bool:
    """Whether an operand is this constant."""
    constant = c.base[operand.slot]
    return isinstance(constant, Tensor) and not constant.ndim and float(constant) == number


def _standard_normal(dims: tuple[int, ...], value: Tensor) -> Tensor:
    square, count = value.square(), math.prod(value.shape[d] for d in dims)
    square = square.sum(dims) if dims else square
    return torch.rsub(square, -count * _HALF_LOG_2PI, alpha=0.5)


def _log_scale(dtype: torch.dtype, scale: Tensor) -> Tensor:
    if not scale.is_floating_point():  # whole numbers: their logarithm would be in single precision
        scale = scale.to(dtype)
    return scale.log() + _HALF_LOG_2PI


def _normal(
    dims: tuple[int, ...], value: Tensor, loc: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    residual = (value - loc) / scale
    if dims and shift.ndim == 0:  # one scale for the whole event
        square = residual.square().sum(dims)
        return torch.add(-residual.shape[dims[0]] * shift, square, alpha=-0.5)
    density = torch.addcmul(-shift, residual, residual, value=-0.5)
    return density.sum(dims) if dims else density


# ---- Normal vectors as a matrix product ----------------------------------------------------------


def _is_inner_product(c: Compiler, law: Law, value: Operand, arguments: Sequence[Operand]) -> bool:
    """A Normal on vectors whose value and parameters have axes of their own."""
    if type(law.family) is not Normal or value.event_ndim != 1 or c.rules != "all":
        return False
    others = {a for o in arguments for a in o.axes}
    if not set(value.axes) - others or not others - set(value.axes):
        return False
    return not c.related(value.axes, tuple(others)) and not c.related(tuple(others), tuple(others))


def _inner_product(
    c: Compiler, value: Operand, arguments: Sequence[Operand], axes: tuple[str, ...]
) -> int:
    both = c.joint_axes(arguments)
    slots = [c.place(a, both, 1) for a in arguments]
    shared = tuple(a for a in axes if a in value.axes and a in both)
    rows = tuple(a for a in value.axes if a not in shared)
    columns = tuple(a for a in both if a not in shared)
    v_order = [value.axes.index(a) for a in (*shared, *rows)] + [len(value.axes)]
    p_order = [both.index(a) for a in (*shared, *columns)] + [len(both)]
    made = (*shared, *rows, *columns)
    back = [made.index(a) for a in axes]
    counts = len(shared), len(both)
    return c.emit(
        partial(_normal_inner_product, Room(), v_order, p_order, back, counts), value.slot, *slots
    )


class Room:
    """Memory of a large result, used again once nothing else refers to it.

    The system clears the pages of new memory, which for the largest array of an iteration takes longer than the
    arithmetic on it. Where torch does not tell how often a storage is referred to, every result has memory of its own.
    """

    def __init__(self) -> None:
        self._flat: Tensor | None = None

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """``left @ right``, in the old memory where it is free and of the right size."""
        shape = (*left.shape[:-1], right.shape[-1])
        if math.prod(shape) < _LARGE or left.requires_grad or right.requires_grad:
            return left @ right
        if self._flat is None or not self._fits(shape, left):
            self._flat = torch.empty(math.prod(shape), dtype=left.dtype, device=left.device)
        return torch.matmul(left, right, out=self._flat.view(shape))

    def _fits(self, shape: tuple[int, ...], like: Tensor) -> bool:
        flat, count = self._flat, getattr(torch._C, "_storage_Use_Count", None)
        if flat is None or count is None:
            return False
        kind = like.dtype, like.device, torch.is_inference_mode_enabled()
        same = flat.numel() == math.prod(shape)
        same = same and (flat.dtype, flat.device, flat.is_inference()) == kind
        return same and bool(
            count(flat.untyped_storage()._cdata) <= 2
        )  # this tensor and the storage just asked for


def _normal_inner_product(
    room: Room,
    v_order: list[int],
    p_order: list[int],
    back: list[int],
    counts: tuple[int, int],
    value: Tensor,
    loc: Tensor,
    scale: Tensor,
) -> Tensor:
    """Sum over the event of log N(z; m, s) as ``[z, z^2] @ [m / s^2, -1 / (2 s^2)] + constant``.

    Centred at the mean location, so that the squares stay small where precision matters.
    """
    shared, n_params = counts
    precision = scale.pow(-2)
    pad = n_params + 1
    loc = loc[(None,) * (pad - loc.ndim)]
    precision = precision[(None,) * (pad - precision.ndim)]
    width = value.shape[-1]
    centre = loc.expand((*loc.shape[:-1], width)).reshape(-1, width).mean(0)
    z, m = value - centre, loc - centre
    linear = m * precision
    constant = (0.5 * precision.log() - _HALF_LOG_2PI - 0.5 * m * linear).sum(-1, keepdim=True)
    shape = (*map(max, linear.shape[:-1], precision.shape[:-1]), width)  # equal, or one of them 1
    parts = (linear.expand(shape), (-0.5 * precision).expand(shape), constant)
    natural = torch.cat(parts, -1).permute(p_order)
    statistics = torch.cat([z, z.square(), torch.ones_like(z[..., :1])], -1).permute(v_order)
    lead = tuple(map(max, statistics.shape[:shared], natural.shape[:shared]))
    rows, columns = statistics.shape[shared:-1], natural.shape[shared:-1]
    left = statistics.expand((*lead, *statistics.shape[shared:]))
    right = natural.expand((*lead, *natural.shape[shared:]))
    product = room.product(
        left.reshape((*lead, -1, left.shape[-1])), right.reshape((*lead, -1, right.shape[-1])).mT
    )
    return product.reshape((*lead, *rows, *columns)).permute(back)


def _drop_edges(
    at: int, start: int, end: int, size: int | None, density: Tensor, place: Tensor | None = None
) -> Tensor:
    """Zero at the first ``start`` and last ``end`` places; ``place`` is that of each element."""
    if place is None:
        size = density.shape[at]  # one less in a transition
        place = torch.arange(size, device=density.device)
    assert size is not None
    keep = (place >= start) & (place < size - end)
    return torch.where(keep.reshape(-1, *(1,) * (-at - 1)), density, 0.0)
