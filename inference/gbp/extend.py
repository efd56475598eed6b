"""Going on with more data: old messages stay, new rows start with none.

Elements and rows are matched by their positions in their plates; new ones stand behind the old ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ppl.errors import DataError
from ppl.inference.gbp.kernel import begin, started
from ppl.inference.gbp.layout import attending
from ppl.inference.gbp.problem import Problem
from ppl.inference.gbp.relinearise import at_means
from ppl.inference.gbp.state import State
from ppl.inference.gbp.structure import positions
from ppl.inference.groups import Group
from ppl.inference.groups.propagation import propagate
from ppl.inference.numerics.gaussian import Gaussian


def extend(
    old_problem: Problem,
    old_state: State,
    new_problem: Problem,
    *,
    lag: Mapping[str, int] | None = None,
) -> State:
    """The state from which a run on old and new data goes on.

    Args:
        old_problem: of the data so far.
        old_state: its messages, about the points that they are kept about.
        new_problem: of the data so far followed by the new rows.
        lag: number of elements of an ordered plate that stay open. Rows that touch only older ones rest: their last
            messages stand for them, as a prior would (fixed-lag smoothing).
    """
    with torch.no_grad():
        charts = at_means(old_problem, old_state.charts, old_state.means)
        state = begin(new_problem, _points(old_problem, charts.points, new_problem))
        messages = dict(state.charts.messages)
        for old in old_problem.edges:
            new = _same(new_problem.edges, old)
            at = places(old.sizes, new.sizes).to(new_problem.groups.like.device)
            messages[new.name] = tuple(
                _placed(m, at, o)
                for m, o in zip(messages[new.name], charts.messages[old.name], strict=True)
            )
        if lag:
            masks = open_rows(new_problem, lag)
            new_problem.kept["open rows"] = attending(new_problem.edges, masks)
        run = state.run._replace(damping=old_state.run.damping, policy=old_state.run.policy)
        return started(new_problem, state.charts._replace(messages=messages), run)


def _points(old: Problem, known: Mapping[str, Tensor], new: Problem) -> dict[str, Tensor]:
    """Old elements where they are; new ones where factors place them from these, else at their start values."""
    groups = new.groups
    points, placed = groups.start(dict(new.options.start or {})), {}
    for name, family in groups.families.items():
        placed[name] = torch.ones(family.count, dtype=torch.bool, device=groups.like.device)
        if name in old.groups.families:
            at = places(old.groups.families[name].sizes, family.sizes).to(groups.like.device)
            points[name] = points[name].index_copy(0, at, known[name])
            if new.moving:
                placed[name] = torch.zeros_like(placed[name]).index_fill(0, at, True)
    return propagate(groups, points, placed)


def places(old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Where the elements of plates of sizes ``old`` stand in grown plates.

    >>> places((2, 2), (3, 4))
    tensor([0, 1, 4, 5])
    """
    if len(old) != len(new) or any(a > b for a, b in zip(old, new, strict=True)):
        raise DataError(
            f"extend: plates of sizes {list(old)} cannot have become {list(new)}: plates only grow. "
            "Fit the new data by itself with prior=posterior."
        )
    grid = torch.arange(int(torch.tensor(list(new), dtype=torch.long).prod())).reshape(list(new))
    return grid[tuple(slice(0, n) for n in old)].reshape(-1)


def open_rows(problem: Problem, lag: Mapping[str, int]) -> dict[str, Tensor]:
    """Masks ``[F]`` of the rows that touch one of the last ``lag[plate]`` elements of a plate."""
    found = {}
    sizes = {
        p: s
        for f in problem.groups.families.values()
        for p, s in zip(f.plates, f.sizes, strict=True)
    }
    unknown = [plate for plate in lag if plate not in sizes]
    if unknown:
        raise DataError(
            f"extend(lag=...): no latent lies in plate '{unknown[0]}'. Plates: {', '.join(sizes)}."
        )
    for group in problem.edges:
        mask = torch.ones(group.rows, dtype=torch.bool, device=group.slots[0].index.device)
        for plate, count in lag.items():
            ends = positions(group, plate)
            if ends is not None:
                mask &= ends[1] >= sizes[plate] - count
        found[group.name] = mask
    return found


def _same(groups: Sequence[Group], old: Group) -> Group:
    for group in groups:
        if group.name == old.name:
            return group
    raise DataError(f"extend: the model with the new data has no factor '{old.name}'.")


def _placed(new: Gaussian, at: Tensor, old: Gaussian) -> Gaussian:
    width = old.eta.shape[1]
    if width == new.eta.shape[1]:
        return Gaussian(new.eta.index_copy(0, at, old.eta), new.lam.index_copy(0, at, old.lam))
    eta, lam = new.eta.clone(), new.lam.clone()  # a reduced plate has grown
    eta[at, :width], lam[at, :width] = old.eta, old.lam
    return Gaussian(eta, lam)


__all__ = ["extend", "open_rows", "places"]
