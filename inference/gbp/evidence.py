"""Beliefs of factors, and the Bethe approximation of the log evidence that they add up to.

Source: the Bethe approximation, [Wainwright2008] section 4.2, with every belief written as the product of a cavity and a message:
logs of integrals of all variables' and factors' beliefs, less those of the edges. Exact on trees of linear factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ppl.inference.gbp.cavities import cavity
from ppl.inference.gbp.models import Rows, plain
from ppl.inference.gbp.problem import Problem
from ppl.inference.gbp.schur import with_cavities
from ppl.inference.gbp.wiring import Wire
from ppl.inference.groups import Group
from ppl.inference.numerics.gaussian import Gaussian, log_integral, times

_MOST = (
    100_000_000  # numbers in the factor beliefs of one group, beyond which no evidence is computed
)


def factor_beliefs(
    problem: Problem,
    rows: Rows,
    wires: Sequence[Wire],
    messages: Sequence[Gaussian],
    beliefs: Mapping[str, Gaussian],
) -> Gaussian:
    """Each row times the cavities of its edges: eta ``[F, D]``, lam ``[F, D, D]``."""
    rows = plain(rows)
    jacobian = torch.cat([j.transpose(1, 2).flatten(2) for j in rows.jacobian], -1)
    own = Gaussian(-times(jacobian.mT, rows.residual), jacobian.mT @ jacobian)
    cavities = []
    for wire, sent in zip(wires, messages, strict=True):
        belief = beliefs[wire.family]
        here = Gaussian(wire.gather(belief.eta), wire.gather(belief.lam))
        cavities.append(cavity(here, sent, problem.floor)[0])
    return with_cavities(own, cavities)


def log_evidence(
    problem: Problem,
    rows: Mapping[str, Rows],
    messages: Mapping[str, Sequence[Gaussian]],
    beliefs: Mapping[str, Gaussian],
    at_charts: Tensor,
) -> float | None:
    """Bethe log evidence, the charts standing at the means; None where it is too large or not defined.

    Args:
        problem: its wires.
        rows: linearised at the charts.
        messages: by group and slot.
        beliefs: by family.
        at_charts: log-density of all factors at the charts, a scalar.
    """
    if any(g.rows * g.dims**2 > _MOST for g in problem.edges):
        return None
    try:
        single = {n: log_integral(b) for n, b in beliefs.items()}
        total = at_charts + sum(s.sum() for s in single.values())
        for part in problem.wholes:
            name = part.group.name
            sent = [Gaussian(m.eta[part.rows], m.lam[part.rows]) for m in messages[name]]
            taken = plain(rows[name])
            here = Rows(tuple(j[part.rows] for j in taken.jacobian), taken.residual[part.rows])
            joint = factor_beliefs(problem, here, part.wires, sent, beliefs)
            edges = sum(w.gather(single[w.family]).sum() for w in part.wires)
            total = total + log_integral(joint).sum() - edges
    except torch.linalg.LinAlgError:
        return None
    value = float(total)
    return value if math.isfinite(value) else None


def joint_covariance(
    problem: Problem,
    group: Group,
    rows: Rows,
    messages: Sequence[Gaussian] | None,
    beliefs: Mapping[str, Gaussian],
) -> Tensor:
    """Covariance ``[F, D, D]`` of what each row touches, by its own belief."""
    if messages is None:  # a unary row: the belief of its variable
        family = group.families[0].name
        lam = beliefs[family].lam[group.slots[0].index[:, 0]]
        return torch.cholesky_inverse(torch.linalg.cholesky(lam))
    part = next(p for p in problem.wholes if p.group is group)
    sent = [Gaussian(m.eta[part.rows], m.lam[part.rows]) for m in messages]
    rows = plain(rows)
    here = Rows(tuple(j[part.rows] for j in rows.jacobian), rows.residual[part.rows])
    joint = factor_beliefs(problem, here, part.wires, sent, beliefs)
    found = torch.cholesky_inverse(torch.linalg.cholesky(joint.lam))
    full = found.new_full((group.rows, *found.shape[1:]), math.nan)  # absent rows have no joint
    full[part.rows] = found
    return full


__all__ = ["factor_beliefs", "joint_covariance", "log_evidence"]
