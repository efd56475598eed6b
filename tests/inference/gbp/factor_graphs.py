"""Small factor graphs made by hand, and a runner without the driver."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppl.inference.gbp import GBP, init, step
from ppl.inference.gbp.problem import Problem, make_problem
from ppl.inference.gbp.state import State
from ppl.inference.groups import FactorGroups, Family, Group, Slot


def prior(x: Family, mean: Tensor, precision: Tensor, name: str = "prior") -> Group:
    """Independent Gaussians ``mean [N, d]`` with ``precision [N]`` on every element."""
    root = precision.sqrt()
    root = root if mean.ndim == 1 else root.unsqueeze(-1)
    rows = torch.arange(x.count).unsqueeze(1)
    return Group(
        name,
        (Slot(x.name, rows),),
        (x,),
        lambda v, _: (
            ((v[0][:, 0].reshape(mean.shape) - mean) * root).to(v[0]).reshape(len(mean), -1)
        ),
        site=name,
        plates=x.plates,
        sizes=x.sizes,
        is_affine=True,
        is_fixed=True,
    )


def links(x: Family, edges: Tensor, z: Tensor, info: Tensor, name: str = "link") -> Group:
    """Differences ``x_j - x_i - z`` with information ``[d, d]``, for ``edges [E, 2]``."""
    root = torch.linalg.cholesky(info).mT
    return Group(
        name,
        tuple(Slot(x.name, edges[:, s : s + 1]) for s in range(2)),
        (x, x),
        lambda v, _: ((v[1] - v[0])[:, 0].reshape(z.shape) - z.to(v[0])) @ root.mT.to(v[0]),
        site=name,
        plates=("edge",),
        sizes=(len(edges),),
        is_affine=True,
        is_fixed=True,
    )


def relative(
    mean: Tensor, precision: Tensor, edges: Tensor, z: Tensor, info: Tensor
) -> FactorGroups:
    """Priors on ``mean [N, d]`` and differences along ``edges``."""
    x = Family("x", ("n",), (len(mean),), mean.shape[1:])
    groups = (prior(x, mean, precision), links(x, edges, z, info))
    return FactorGroups({"x": x}, groups, like=torch.zeros((), dtype=mean.dtype))


def run(
    groups: FactorGroups,
    rounds: int = 2000,
    *,
    tol: float = 1e-10,
    ordered: Any = None,
    **options: Any,
) -> tuple[Problem, State]:
    """Rounds until done."""
    problem = make_problem(groups, GBP(**options), tol=tol, ordered=ordered)
    state = init(problem)
    for _ in range(rounds):
        state, info = step(problem, state)
        if info.done:
            break
    return problem, state


def moments(groups: FactorGroups) -> tuple[Tensor, Tensor]:
    """Exact means ``[n]`` and covariance ``[n, n]`` of one linear family ``x``, by autograd and a dense inverse."""
    family = groups.families["x"]
    zero = groups.like.new_zeros(family.count * family.dims)

    def residuals(flat: Tensor) -> Tensor:
        points: Mapping[str, Tensor] = {"x": flat.reshape(family.count, *family.event_shape)}
        return torch.cat([g.outputs(g.gather(points), {}).reshape(-1) for g in groups.groups])

    jacobian = torch.func.jacrev(residuals)(zero)
    covariance = torch.linalg.inv(jacobian.mT @ jacobian)
    return -covariance @ jacobian.mT @ residuals(zero), covariance


def means(groups: FactorGroups, state: State) -> Tensor:
    """Means ``[n]`` of the family ``x``."""
    return groups.retract(state.charts.points, state.means)["x"].reshape(-1)
