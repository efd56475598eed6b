"""Rows as linear functions near the charts of their variables, and what happens to them when charts move.

Every variable has one point, the origin of its chart: messages, beliefs and rows are written in tangent coordinates about
it, so that their digits go to what is unknown and angles never wrap. When a point moves by ``delta`` all of these are
re-expressed; on a manifold with the derivative of the change of charts. Source: [Ortiz2021], [Sola2018].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ppl.distributions.robust import robust_weight
from ppl.inference.gbp.layout import Part
from ppl.inference.groups import Family, Group, LogDensity, Quadratic, Robust
from ppl.inference.groups.forward import jvp
from ppl.inference.groups.linearise import outputs_and_jacobian
from ppl.inference.groups.losses import Matching
from ppl.inference.groups.motions import inverse_right_jacobian
from ppl.inference.numerics.gaussian import Gaussian, times
from ppl.manifolds import SE2, SE3, SO2, SO3

Params = Mapping[str, Tensor]


class Model(NamedTuple):
    """Outputs of a group's rows, linear in tangent vectors: ``outputs + sum of jacobian @ delta``."""

    jacobian: tuple[Tensor, ...]  # [F, B, m, d] a slot
    outputs: Tensor  # [F, m] at the charts


class Rows(NamedTuple):
    """Rows as squares ``|J delta + r|^2 / 2``; ``weight`` is of scalar robust rows, whose ``J`` and ``r`` lack it."""

    jacobian: tuple[Tensor, ...]  # [F, B, m, d] a slot
    residual: Tensor  # [F, m] at the charts
    weight: Tensor | None = None  # [F]


class Made(NamedTuple):
    """A fresh model, and the number of its rows that were not finite and are left out."""

    model: Model
    dropped: int


def linear_model(group: Group, points: Mapping[str, Tensor], params: Params) -> Made:
    """Linearise a group at the charts; absent rows and rows that are not finite say nothing."""
    with torch.no_grad():
        outputs, jacobian = outputs_and_jacobian(group, group.gather(points), params)
    keep = torch.ones_like(outputs, dtype=torch.bool)
    if group.keep is not None:
        keep = (group.keep if group.keep.ndim == 2 else group.keep.unsqueeze(-1)) != 0
        keep = keep.expand_as(outputs)
    finite = outputs.isfinite().logical_or(~keep).all(-1)
    finite &= jacobian.isfinite().logical_or(~keep.unsqueeze(-1)).flatten(1).all(1)
    keep = keep & finite.unsqueeze(-1)
    if not bool(keep.all()):
        outputs = torch.where(keep, outputs, 0.0)
        jacobian = torch.where(keep.unsqueeze(-1), jacobian, 0.0)
    return Made(Model(_by_slot(group, jacobian), outputs), int((~finite).sum()))


def _by_slot(group: Group, jacobian: Tensor) -> tuple[Tensor, ...]:
    widths = [s.width * f.dims for s, f in zip(group.slots, group.families, strict=True)]
    parts = jacobian.split(widths, -1)
    return tuple(
        p.reshape(*p.shape[:2], s.width, f.dims).transpose(1, 2).contiguous()
        for p, s, f in zip(parts, group.slots, group.families, strict=True)
    )


def predicted(model: Model, delta: Sequence[Tensor]) -> Tensor:
    """Outputs ``[F, m]`` at tangent vectors ``[F, B, d]`` a slot."""
    outputs = model.outputs
    for j, x in zip(model.jacobian, delta, strict=True):
        step = times(j, x) if x.shape[-1] > 1 else j[..., 0] * x
        outputs = outputs + (step[:, 0] if step.shape[1] == 1 else step.sum(1))
    return outputs


class View(NamedTuple):
    """How losses are looked at in a round."""

    params: Params
    matching: Matching = "gradient"
    kernel_scale: float = 1.0  # multiplies robust thresholds


def weighed(part: Part, model: Model, means: Mapping[str, Tensor], view: View) -> Rows:
    """The rows of a group as squares, with the weights or curvatures of its loss at the means.

    Source: [Ortiz2021] for robust factors; the weight is taken at the means in every round, also where the model is linear.
    """
    group = part.group
    if isinstance(group.loss, Quadratic):
        return Rows(model.jacobian, model.outputs)
    if isinstance(group.loss, Robust) and model.outputs.shape[1] == 1:
        return Rows(model.jacobian, model.outputs, _scalar_weights(part, model, means, view))
    delta = group.gather(means)
    terms = group.loss.terms(predicted(model, delta), *view)
    if isinstance(group.loss, LogDensity):
        jacobian = tuple(_rooted(j, terms.root) for j in model.jacobian)
        back = predicted(Model(jacobian, torch.zeros_like(terms.residual)), delta)
        return Rows(jacobian, terms.residual - back)
    assert terms.root is not None
    jacobian = tuple(_rooted(j, terms.root) for j in model.jacobian)
    return Rows(jacobian, terms.root * model.outputs)


def _scalar_weights(part: Part, model: Model, means: Mapping[str, Tensor], view: View) -> Tensor:
    """Robust weights ``[F]`` of scalar rows, a chunk at a time."""
    loss = part.group.loss
    assert isinstance(loss, Robust)
    if not isinstance(part.rows, slice):
        terms = loss.terms(predicted(model, part.group.gather(means)), *view)
        assert terms.weight is not None
        return terms.weight.reshape(-1)
    k = loss.k(view.params) if callable(loss.k) else loss.k
    k = view.kernel_scale * torch.as_tensor(k).to(model.outputs)
    k = k if k.ndim == 0 else k.reshape(-1)[part.rows]
    weight = torch.ones_like(model.outputs[:, 0])
    jacobian, outputs = [j[part.rows] for j in model.jacobian], model.outputs[part.rows]
    for a in range(0, part.count, part.chunk):
        b = min(a + part.chunk, part.count)
        delta = [w.gather(means[w.family], a, b) for w in part.wires]
        here = predicted(Model(tuple(j[a:b] for j in jacobian), outputs[a:b]), delta)[:, 0]
        own = k if k.ndim == 0 else k[a:b]
        start = part.rows.start
        weight[start + a : start + b] = robust_weight(
            loss.kernel, here.square(), own, view.matching
        )
    return weight


def _rooted(jacobian: Tensor, root: Tensor | None) -> Tensor:
    """``root @ jacobian`` for ``[F, B, m, d]`` and the three layouts of a root."""
    if root is None:
        return jacobian
    if root.ndim == 2:
        return root[:, None, :, None] * jacobian
    count, width, _, d = jacobian.shape
    blocks = jacobian.reshape(count, width, *root.shape[1:3], d)
    return (root.unsqueeze(1) @ blocks).reshape(jacobian.shape)


def plain(rows: Rows) -> Rows:
    """The same rows with their weight inside ``J`` and ``r``."""
    if rows.weight is None:
        return rows
    root = rows.weight.sqrt().unsqueeze(-1)
    jacobian = tuple(_rooted(j, root) for j in rows.jacobian)
    return Rows(jacobian, root * rows.residual)


def own(rows: Rows, slot: int, at: slice | Tensor) -> Gaussian:
    """Information of some rows about one slot alone: eta ``[F, B, d]``, lam ``[F, B, d, d]``."""
    j, r = rows.jacobian[slot][at], rows.residual[at]
    if rows.weight is not None:
        gain = rows.weight[at, None, None] * j[:, :, 0]
        return Gaussian(-gain * r.unsqueeze(1), gain.unsqueeze(-1) * j)
    if j.shape[-2:] == (1, 1):
        return Gaussian(-j[..., 0] * r.unsqueeze(1), j * j)
    return Gaussian(-times(j.mT, r.unsqueeze(1)), j.mT @ j)


# ---- moving charts ---------------------------------------------------------------------------------------------


def change_of_chart(family: Family, origin: Tensor, points: Tensor) -> Tensor | None:
    """Derivative ``[N, d, d]`` of old coordinates by new ones at the new origin; None where it is the identity."""
    if family.manifold is None:
        return None
    if family.manifold in (
        SO2,
        SE2,
        SO3,
        SE3,
    ):  # log(exp(m) exp(delta)) with m the way between the origins
        return inverse_right_jacobian(family.manifold, family.local(origin, points))

    def old(delta: Tensor) -> Tensor:
        return family.local(origin, family.retract(points, delta))

    zero = torch.zeros(len(points), family.dims, dtype=points.dtype, device=points.device)
    units = torch.eye(family.dims, dtype=points.dtype, device=points.device)
    columns = [jvp(old, (zero,), (u.expand_as(zero).contiguous(),))[1] for u in units]
    return torch.stack(columns, -1)


def carried(message: Gaussian, delta: Tensor, turn: Tensor | None) -> Gaussian:
    """A density in coordinates about the point that ``delta [F, B, d]`` leads to."""
    moved = message.moved(delta)
    if turn is None:
        return moved
    return Gaussian(times(turn.mT, moved.eta), turn.mT @ moved.lam @ turn)


def carried_model(model: Model, delta: Sequence[Tensor], turns: Sequence[Tensor | None]) -> Model:
    """A model about the points that ``delta [F, B, d]`` leads to."""
    jacobian = tuple(j if t is None else j @ t for j, t in zip(model.jacobian, turns, strict=True))
    return Model(jacobian, predicted(model, delta))


__all__ = [
    "Made",
    "Model",
    "Rows",
    "View",
    "carried",
    "carried_model",
    "change_of_chart",
    "linear_model",
    "own",
    "plain",
    "predicted",
    "weighed",
]
