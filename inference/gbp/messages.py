"""Messages from the rows of a group to the variables they touch, in three algebraically equal forms.

A row says ``|J x + r|^2 / 2`` about the variables of its edges. Every function takes one tensor a slot, with axes
``[F, B]`` for ``F`` rows of ``B`` edges each, and returns messages in the same layout. Source: [Ortiz2021];
the innovation form is the measurement update of a Kalman filter, [Bishop2006] section 13.3. With cavities of mean
``u_j`` and covariance ``V_j`` and ``W = 1``, and for scalars with ``s_j = J_j^2 V_j``, ``t_j = J_j u_j``:

    S_i = 1 + sum_{j != i} J_j V_j J_j'      lam_i = J_i' S_i^-1 J_i      eta_i = -J_i' S_i^-1 (r + sum_{j != i} J_j u_j)   (4)
    lam_i = J_i^2 / (1 + sum s_j)            eta_i = -J_i (r + sum t_j) / (1 + sum s_j)                                     (5)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ppl.inference.gbp.schur import schur
from ppl.inference.numerics.gaussian import Gaussian, inverse, times

Form = Literal["auto", "innovation", "schur"]
_FEW = 256  # rows up to which calls take longer than numbers


class Sent(NamedTuple):
    """Messages of some rows."""

    messages: list[Gaussian]  # a slot each: eta [F, B, d], lam [F, B, d, d]
    improper: int  # rows with a cavity that no inverse exists of


def factor_messages(
    jacobian: Sequence[Tensor],
    residual: Tensor,
    cavities: Sequence[Gaussian],
    form: Form = "auto",
) -> Sent:
    """Messages of every row to every variable that it touches.

    Args:
        jacobian: ``[F, B, m, d]`` a slot.
        residual: ``[F, m]`` where all variables are zero.
        cavities: beliefs without the message of this row, eta ``[F, B, d]``, lam ``[F, B, d, d]``.
        form: ``"innovation"`` where cavities are proper and ``"schur"`` elsewhere by default.
    """
    if form == "schur":
        return Sent(schur(jacobian, residual, cavities), 0)
    if residual.shape[-1] == 1 and all(j.shape[-1] == 1 for j in jacobian):
        return _scalar_messages(jacobian, residual, cavities)
    if 1 < len(cavities) and len(residual) <= _FEW and len({c.eta.shape for c in cavities}) == 1:
        return _as_one_slot(jacobian, residual, cavities, form)
    inverses = [inverse(c.lam) for c in cavities]
    made, good = innovation(jacobian, residual, cavities, [i.matrix for i in inverses])
    proper = torch.stack([i.proper.all(-1) for i in inverses]).all(0) & good
    if bool(proper.all()) or form == "innovation":
        return Sent(made, 0)
    rows = (~proper).nonzero().squeeze(-1)
    part = [Gaussian(c.eta[rows], c.lam[rows]) for c in cavities]
    exact = schur([j[rows] for j in jacobian], residual[rows], part)
    for whole, few in zip(made, exact, strict=True):
        whole.eta[rows], whole.lam[rows] = few.eta, few.lam
    return Sent(made, len(rows))


def _as_one_slot(
    jacobian: Sequence[Tensor], residual: Tensor, cavities: Sequence[Gaussian], form: Form
) -> Sent:
    """Equal slots as one of more edges: for a few rows the number of calls is what takes the time."""
    width = jacobian[0].shape[1]
    whole = Gaussian(
        torch.cat([c.eta for c in cavities], 1), torch.cat([c.lam for c in cavities], 1)
    )
    sent = factor_messages([torch.cat(list(jacobian), 1)], residual, [whole], form)
    etas, lams = sent.messages[0].eta.split(width, 1), sent.messages[0].lam.split(width, 1)
    return Sent([Gaussian(e, p) for e, p in zip(etas, lams, strict=True)], sent.improper)


def _scalar_messages(
    jacobian: Sequence[Tensor], residual: Tensor, cavities: Sequence[Gaussian]
) -> Sent:
    safe = [informed(c.eta[..., 0], c.lam[..., 0, 0]) for c in cavities]
    etas, lams, empty = zip(*safe, strict=True)
    slopes = [j[..., 0, 0] for j in jacobian]
    made = scalar_innovation(slopes, residual[:, 0], etas, lams)
    made = silenced(made, slopes) if any(empty) else made
    return Sent([Gaussian(e[..., None], p[..., None, None]) for e, p in made], 0)


# ---- innovation form, (4) -----------------------------------------------------------------------------


def innovation(
    jacobian: Sequence[Tensor],
    residual: Tensor,
    cavities: Sequence[Gaussian],
    covariances: Sequence[Tensor],
) -> tuple[list[Gaussian], Tensor]:
    """Equation (4): read a row as a measurement of one variable, with the noise that the others' cavities add.

    Never indefinite, and no matrix larger than ``m`` or ``d`` appears. ``covariances [F, B, d, d]`` are the inverses of
    the cavities' precisions.
    """
    spread, shift = [], []
    for j, c, v in zip(jacobian, cavities, covariances, strict=True):
        jv = j @ v
        spread.append(jv @ j.mT)
        shift.append(times(jv, c.eta))
    unit = torch.eye(residual.shape[-1], dtype=residual.dtype, device=residual.device)
    others = leave_one_out(spread), leave_one_out(shift)
    made = [
        _measured(j, unit + s, -residual.unsqueeze(1) - y)
        for j, s, y in zip(jacobian, *others, strict=True)
    ]
    return [message for message, _ in made], torch.stack([g.all(-1) for _, g in made]).all(0)


def _measured(jacobian: Tensor, noise: Tensor, value: Tensor) -> tuple[Gaussian, Tensor]:
    """``J' S^-1 J`` and ``J' S^-1 v`` of ``J [F, B, m, d]``, ``S [F, B, m, m]``, ``v [F, B, m]``."""
    if noise.shape[-1] == 1:
        gain = jacobian / noise
        message = Gaussian((gain * value.unsqueeze(-1))[..., 0, :], jacobian.mT @ gain)
        return message, noise[..., 0, 0] > 0
    chol, info = torch.linalg.cholesky_ex(noise)
    right = torch.cat([jacobian, value.unsqueeze(-1)], -1)
    half = torch.linalg.solve_triangular(chol, right, upper=False)
    gain = half[..., :-1].mT
    return Gaussian(times(gain, half[..., -1]), gain @ gain.mT), info == 0


def scalar_innovation(
    slopes: Sequence[Tensor],
    residual: Tensor,
    etas: Sequence[Tensor],
    lams: Sequence[Tensor],
    weight: Tensor | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Equation (5): scalar residuals of scalar variables, O(edges) in all.

    Args:
        slopes: ``[F, B]`` a slot.
        residual: ``[F]`` where all variables are zero.
        etas: of the cavities, ``[F, B]`` a slot.
        lams: of the cavities, positive; see :func:`floored`.
        weight: ``[F]`` of the rows (robust), one by default.

    Returns:
        ``(eta, lam)`` ``[F, B]`` a slot.
    """
    ratios = [u / p for u, p in zip(slopes, lams, strict=True)]
    if (
        len(slopes) == 2 and slopes[0].shape[1] == slopes[1].shape[1] == 1
    ):  # no sums to leave out of
        spread = [slopes[1] * ratios[1], slopes[0] * ratios[0]]
        shift = [ratios[1] * etas[1], ratios[0] * etas[0]]
    else:
        spread = leave_one_out([u * g for u, g in zip(slopes, ratios, strict=True)])
        shift = leave_one_out([g * e for g, e in zip(ratios, etas, strict=True)])
    made = []
    for u, s, t in zip(slopes, spread, shift, strict=True):
        gain = _gain(u, s, weight)
        made.append((-gain * (residual.unsqueeze(1) + t), gain * u))
    return made


def informed(eta: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Scalar cavities that equation (5) can divide by, and whether there were any that know nothing.

    Those get a precision so small that it silences their row; :func:`silenced` then removes the whisper that is left.
    """
    limits = torch.finfo(lam.dtype)
    empty = lam <= limits.tiny
    if not bool(empty.any()):
        return eta, lam, False
    return torch.where(empty, 0.0, eta), torch.where(empty, limits.eps**3, lam), True


def silenced(
    made: list[tuple[Tensor, Tensor]], slopes: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Messages below 1e-13 of what a row says by itself are none: ``(0, 0)``."""
    kept = []
    for (eta, lam), u in zip(made, slopes, strict=True):
        real = lam > 1e-13 * u * u
        kept.append((torch.where(real, eta, 0.0), torch.where(real, lam, 0.0)))
    return kept


def _gain(slope: Tensor, spread: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return slope / (1 + spread)
    k = weight.unsqueeze(1)
    return k * slope / (1 + k * spread)


def leave_one_out(parts: Sequence[Tensor]) -> list[Tensor]:
    """For every edge the sum over the other edges of its row; ``[F, B, ...]`` a slot.

    Sums before and after, never total minus own: with one vague edge among sharp ones that keeps all digits.

    >>> leave_one_out([torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0]])])
    [tensor([[6., 5.]]), tensor([[3.]])]
    """
    totals = [p.sum(1, keepdim=True) if p.shape[1] > 1 else p for p in parts]
    others: list[Tensor | None] = [None] * len(parts)
    for order in (range(len(parts)), range(len(parts) - 1, -1, -1)):
        passed: Tensor | None = None
        for s in order:
            others[s] = _plus(others[s], passed)
            passed = _plus(passed, totals[s])
    within = [_others_within(p) if p.shape[1] > 1 else None for p in parts]
    zero = torch.zeros((), dtype=parts[0].dtype, device=parts[0].device)
    sums = [_plus(o, w) for o, w in zip(others, within, strict=True)]
    return [
        zero.expand_as(p) if s is None else s.expand_as(p) for p, s in zip(parts, sums, strict=True)
    ]


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _others_within(part: Tensor) -> Tensor:
    nothing = torch.zeros_like(part[:, :1])
    before = torch.cat([nothing, part[:, :-1]], 1).cumsum(1)
    after = torch.cat([nothing, part[:, 1:].flip(1)], 1).cumsum(1).flip(1)
    return before + after


__all__ = [
    "Form",
    "Sent",
    "factor_messages",
    "informed",
    "innovation",
    "leave_one_out",
    "scalar_innovation",
    "silenced",
]
