"""Active sets: index lists, what an update makes of them, and what the values that stand at them become.

A set is a list of indices into a flattened array of weights, ``[k]`` long, ascending. An update removes its ``count`` members of
lowest score and adds as many others of highest growth; members that were removed and added again keep their values.

Source: [Li2024] algorithm 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ppl.errors import NumericalError


class Change(NamedTuple):
    """A new set, and where its members stood in the old one."""

    indices: Tensor  # [k], long, ascending
    source: Tensor  # [k], positions in the old list, -1 for new members

    @property
    def is_new(self) -> Tensor:
        """Which members were not there before, ``[k]``."""
        return self.source < 0

    @property
    def new(self) -> int:
        """How many of them."""
        return int(self.is_new.sum())


def random_set(size: int, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """``count`` of ``size`` coordinates, drawn uniformly without replacement, ascending.

    >>> random_set(5, 5, torch.Generator(), torch.device("cpu"))
    tensor([0, 1, 2, 3, 4])
    """
    if count >= size:
        return torch.arange(size, device=device)
    return torch.randperm(size, generator=generator, device=device)[:count].sort().values


def cover_rows(index: Tensor, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """The set with at least one member in every row, of the same size where that is possible.

    An empty row takes a random column; in exchange the fullest rows give up members.

    Args:
        index: ``[k]``, of an array of ``rows`` times ``columns``.
        rows: number of output units.
        columns: inputs of each.
        generator: of the columns.

    >>> cover_rows(torch.tensor([0, 1, 2]), 2, 3, torch.Generator()).numel()
    3
    """
    row = index // columns
    counts = torch.bincount(row, minlength=rows)
    empty = (counts == 0).nonzero().squeeze(-1)
    if not len(empty):
        return index
    column = torch.randint(columns, (len(empty),), generator=generator, device=index.device)
    # Members are dropped by their place in their row, the last of the fullest rows first; no first member goes.
    place = torch.arange(len(index), device=index.device) - (counts.cumsum(0) - counts)[row]
    spare = min(len(empty), int((place > 0).sum()))
    drop = place.topk(spare).indices
    keep = torch.ones_like(index, dtype=torch.bool)
    keep[drop] = False
    return torch.cat([index[keep], empty * columns + column]).sort().values


def kept(scores: Tensor, count: int, protected: Tensor | None = None) -> Tensor:
    """Which members stay when the ``count`` lowest scores go ``[k]``.

    Args:
        scores: ``[k]``.
        count: how many go; fewer where protected members leave too few.
        protected: ``[k]``, members that may not go.

    Raises:
        NumericalError: a score is NaN.

    >>> kept(torch.tensor([0.3, 0.1, 0.2]), 1)
    tensor([ True, False,  True])
    """
    if bool(scores.isnan().any()):
        raise NumericalError("a removal score is NaN. Lower the learning rate.")
    mask = torch.ones_like(scores, dtype=torch.bool)
    if protected is not None:
        count = min(count, int((~protected).sum()))
        # Infinity, not a large number: a protected member can never be among the lowest.
        scores = scores.masked_fill(protected, float("inf"))
    if count:
        mask[scores.topk(count, largest=False).indices] = False
    return mask


def best_of_rows(scores: Tensor, row: Tensor, rows: int) -> Tensor:
    """Whether a member has the highest score of its row ``[k]``; one member of every row that has any.

    >>> best_of_rows(torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0, 0, 1]), 2)
    tensor([False,  True,  True])
    """
    order = scores.argsort(stable=True)
    last = torch.full((rows,), -1, dtype=torch.long, device=row.device)
    position = torch.arange(len(order), device=row.device)
    last = last.scatter_reduce(0, row[order], position, "amax")
    mask = torch.zeros_like(row, dtype=torch.bool)
    mask[order[last[last >= 0]]] = True
    return mask


def joined(index: Tensor, keep: Tensor, grown: Tensor) -> Change:
    """The kept members together with the grown ones.

    Args:
        index: the old set, ``[k]``.
        keep: which of it stay, ``[k]``.
        grown: indices outside the kept ones, ``[K]``, in any order; may contain members that were removed.

    >>> joined(torch.tensor([1, 4, 6]), torch.tensor([True, False, True]), torch.tensor([0]))
    Change(indices=tensor([0, 1, 6]), source=tensor([-1,  0,  2]))
    """
    new = torch.cat([index[keep], grown]).sort().values
    at = torch.searchsorted(index, new).clamp(max=max(len(index) - 1, 0))
    found = index[at] == new if len(index) else torch.zeros_like(new, dtype=torch.bool)
    return Change(new, torch.where(found, at, -1))


def carried(values: Tensor, change: Change, fresh: Tensor | float = 0.0) -> Tensor:
    """Values ``[k]`` of the old set as values of the new one; ``fresh`` at new members.

    >>> carried(torch.tensor([5.0, 6.0]), Change(torch.tensor([0, 3]), torch.tensor([1, -1])))
    tensor([6., 0.])
    """
    if not len(values):
        return values.new_zeros(len(change.indices)) + fresh
    moved = values[change.source.clamp(min=0)]
    return torch.where(change.is_new, torch.as_tensor(fresh, dtype=values.dtype), moved)
