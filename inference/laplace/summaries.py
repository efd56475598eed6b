"""The Gaussian that elements leave on others when they are integrated out (a Schur complement), as a group of one row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl.inference.groups.coordinates import Coordinates
from ppl.inference.groups.equations import Equations
from ppl.inference.groups.linearise import linearise
from ppl.inference.groups.records import Family, Group, Slot
from ppl.inference.laplace.problem import Problem
from ppl.inference.laplace.systems import undetermined

SUMMARY = "(summary of what is closed)"


@dataclass(frozen=True, eq=False)
class Summary:
    """A Gaussian on some elements: ``|root (x - origin) - shift|^2 / 2``, with ``x - origin`` in the tangent space.

    ``root [D, D]``; elements of one slot after the other.

    >>> known = Summary((Family("x"),), (torch.ones(1),), 2 * torch.eye(1), torch.zeros(1))
    >>> known([torch.tensor([[1.5]])], {})
    tensor([[1.]])
    """

    families: tuple[Family, ...]
    origins: tuple[Tensor, ...]  # [B, *event]
    root: Tensor
    shift: Tensor

    def __call__(self, values: Any, params: Any) -> Tensor:
        moves = [
            f.local(o, v).reshape(len(v), -1)
            for f, o, v in zip(self.families, self.origins, values, strict=True)
        ]
        return torch.cat(moves, -1) @ self.root.T - self.shift


def summed_up(
    problem: Problem,
    groups: list[Group],
    points: dict[str, Tensor],
    params: Mapping[str, Tensor],
    closing: Mapping[str, Tensor],
) -> list[Group]:
    """The Gaussian that rows leave on the open elements when the closing ones are integrated out."""
    touched = [masked(g, touches(g, closing)) for g in groups]
    equations = Equations(replace(problem.groups, groups=tuple(touched)))
    at = equations.at
    rows = [
        linearise(g, g.gather(points), params, matching=problem.options.matching) for g in touched
    ]
    scalars, gone = _involved(equations, touched, closing)
    lam = equations.matrix(equations.curvature(rows)).tocsr()
    place = equations.ordering.positions[scalars]
    dense = torch.from_numpy(lam[place][:, place].toarray())
    eta = -equations.gradient(rows).to("cpu", torch.float64)[torch.from_numpy(scalars)]
    inside = torch.from_numpy(gone)
    energy = sum(float(r.energy.sum(dtype=torch.float64)) for r in rows)
    try:
        root = torch.linalg.cholesky(dense[inside][:, inside])
    except torch.linalg.LinAlgError:
        raise undetermined(problem, scalars[gone]) from None
    half = torch.linalg.solve_triangular(root, dense[inside][:, ~inside], upper=False)
    known = torch.linalg.solve_triangular(root, eta[inside].unsqueeze(-1), upper=False).squeeze(-1)
    # Integrated out: what is left of the energy at the origin, and half a log determinant.
    constant = 0.5 * float(known @ known) - energy - float(root.diagonal().log().sum())
    constant += 0.5 * int(inside.sum()) * math.log(2 * math.pi)
    constant += sum(float(g.log_norm(params).sum()) for g in touched if g.name == SUMMARY)
    rest = dense[~inside][:, ~inside] - half.T @ half
    shift = eta[~inside] - half.T @ known
    return _summary(problem, at, points, scalars[~gone], rest, shift, constant)


def _involved(
    equations: Equations, touched: list[Group], closing: Mapping[str, Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """Scalars of all elements that rows touch, in order, and which of them close."""
    families = equations.groups.families
    seen = {n: torch.zeros(f.count, dtype=torch.bool) for n, f in families.items()}
    for group in touched:
        rows = torch.nonzero(touches(group, closing)).flatten()
        for slot in group.slots:
            seen[slot.family][slot.index.to("cpu")[rows].reshape(-1)] = True
    wide = {n: x.repeat_interleave(families[n].dims) for n, x in seen.items()}
    shut = {n: x.repeat_interleave(families[n].dims) for n, x in closing.items()}
    flat = torch.cat([wide[n] for n in families]).numpy()
    scalars = np.flatnonzero(flat)
    return scalars, torch.cat([shut[n] for n in families]).numpy()[scalars]


def _summary(
    problem: Problem,
    at: Coordinates,
    points: dict[str, Tensor],
    scalars: np.ndarray,
    lam: Tensor,
    eta: Tensor,
    constant: float,
) -> list[Group]:
    """A group of one row for the Gaussian ``(eta, lam)`` around the points of some scalars."""
    if not len(scalars):
        return [_constant(problem, constant)] if problem.groups.families else []
    like = problem.groups.like
    # A root by eigenvectors: the Gaussian may be improper, where nothing is known of a direction.
    values, vectors = torch.linalg.eigh(lam)
    top = values.clamp(min=1e-14 * float(values[-1]) + 1e-300).sqrt()
    root, shift = top.unsqueeze(-1) * vectors.T, (vectors.T @ eta) / top
    slots, families, origins = [], [], []
    for name, family in at.families.items():
        begin = at.offsets[name]
        own = scalars[(scalars >= begin) & (scalars < begin + family.count * family.dims)]
        if len(own):
            index = torch.from_numpy((own[:: family.dims] - begin) // family.dims).to(like.device)
            slots.append(Slot(name, index.unsqueeze(0)))
            families.append(family)
            origins.append(points[name][index])
    law = Summary(tuple(families), tuple(origins), root.to(like), shift.to(like))
    # |root d - shift|^2 / 2 has the constant |shift|^2 / 2 that the energy at the origin does not have.
    total = like.new_tensor([constant + 0.5 * float(shift @ shift)])
    return [_one_row(tuple(slots), tuple(families), law, total)]


def _one_row(slots: Any, families: Any, law: Any, constant: Tensor) -> Group:
    affine = all(f.manifold is None for f in families)
    return Group(
        SUMMARY,
        slots,
        families,
        law,
        site=SUMMARY,
        is_affine=affine,
        is_fixed=affine,
        norm=partial(same, constant),
    )


def _constant(problem: Problem, constant: float) -> Group:
    """Nothing is left open: only the evidence of what was closed stays."""
    name, family = next(iter(problem.groups.families.items()))
    like = problem.groups.like
    slot = Slot(name, torch.zeros(1, 1, dtype=torch.long, device=like.device))
    width = family.dims
    law = Summary(
        (family,), (family.neutral(like).unsqueeze(0),), like.new_zeros(1, width), like.new_zeros(1)
    )
    return _one_row((slot,), (family,), law, like.new_tensor([constant]))


def touches(group: Group, elements: Mapping[str, Tensor]) -> Tensor:
    """Rows that touch one of the elements ``[F]``; an earlier summary always goes into the next one."""
    if group.name == SUMMARY:
        return torch.ones(1, dtype=torch.bool)
    hit = torch.zeros(group.rows, dtype=torch.bool)
    for slot in group.slots:
        hit |= elements[slot.family][slot.index.to("cpu")].any(-1)
    return hit


def masked(group: Group, rows: Tensor) -> Group:
    here = group.slots[0].index.device
    kept = rows.to(here, torch.float64 if group.keep is None else group.keep.dtype)
    if group.keep is not None:
        kept = group.keep * kept.reshape(-1, *(1,) * (group.keep.ndim - 1))
    return replace(group, keep=kept)


def same(value: Tensor, params: Any) -> Tensor:
    """A constant that reads no params."""
    return value


__all__ = ["SUMMARY", "Summary", "masked", "same", "summed_up", "touches"]
