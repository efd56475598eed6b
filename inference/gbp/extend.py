"""Going on with more data: old messages stay, new rows start with none.

Elements and rows are matched by their positions in their plates; new ones stand behind the old ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ppl.errors import DataError
from ppl.inference.gbp.kernel import begin, started
from ppl.inference.gbp.layout import opened
from ppl.inference.gbp.problem import Problem
from ppl.inference.gbp.relinearise import at_means
from ppl.inference.gbp.state import State
from ppl.inference.gbp.structure import positions
from ppl.inference.groups import Group
from ppl.inference.groups.growth import grown_points, lagging, newcomers, places
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
        lag: number of elements of an ordered plate that stay open. Old rows that touch only older ones rest: their last
            messages stand for them, as a prior would (fixed-lag smoothing). New rows are always open.
    """
    with torch.no_grad():
        charts = at_means(old_problem, old_state.charts, old_state.means)
        params = old_state.params
        points = grown_points(old_problem.groups, charts.points, new_problem.groups, params)
        state = begin(new_problem, points, params)
        messages = dict(state.charts.messages)
        for old in old_problem.edges:
            new = _same(new_problem.edges, old)
            at = places(old.sizes, new.sizes).to(new_problem.groups.like.device)
            messages[new.name] = tuple(
                _placed(m, at, o)
                for m, o in zip(messages[new.name], charts.messages[old.name], strict=True)
            )
        if lag:
            masks = open_rows(old_problem, new_problem, lag)
            new_problem.kept["open rows"] = opened(new_problem.blocks, masks)
        run = state.run._replace(damping=old_state.run.damping, policy=old_state.run.policy)
        return started(new_problem, state.charts._replace(messages=messages), run, params)


def open_rows(old: Problem, new: Problem, lag: Mapping[str, int]) -> dict[str, Tensor]:
    """Masks ``[F]`` of the rows that are new or touch one of the last ``lag[plate]`` elements of a plate."""
    first = lagging(new.groups.families, lag)
    before = {g.name: g for g in old.edges}
    found = {}
    for group in new.edges:
        mask = torch.ones(group.rows, dtype=torch.bool, device=group.slots[0].index.device)
        for plate, position in first.items():
            ends = positions(group, plate)
            if ends is not None:
                mask &= ends[1] >= position
        if group.name in before:
            mask |= newcomers(before[group.name].sizes, group.sizes).to(mask.device)
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


__all__ = ["extend", "open_rows"]
