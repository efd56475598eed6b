"""Memory of states that nobody holds any more, for the states to come.

A step makes a state of a state and changes nothing that it was given. Fresh memory for that is slow: the system hands it
out page by page, and takes as long for it as for the arithmetic. So what a step has made is remembered here, and used
again once no other tensor, view or array shares it. Where that cannot be told, memory is always fresh.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

_MOST = 32  # tensors that are remembered
_count = getattr(torch._C, "_storage_Use_Count", None)


class Spare:
    """Tensors to write to.

    >>> spare = Spare()
    >>> one = spare.like(torch.zeros(2))
    >>> view, place = one[:1], one.data_ptr()
    >>> del one
    >>> spare.like(torch.zeros(2)).data_ptr() == place  # the view still needs it
    False
    >>> del view
    >>> spare.like(torch.zeros(2)).data_ptr() == place
    True
    """

    def __init__(self) -> None:
        self._made: list[Tensor] = []

    def like(self, tensor: Tensor) -> Tensor:
        """A tensor of this shape, dtype and device; what it holds is undefined."""
        if _count is None or not hasattr(sys, "getrefcount"):
            return torch.empty_like(tensor)
        (alone,) = _holders([torch.empty(1)])
        for at, holders in enumerate(_holders(self._made)):
            if holders == alone and _is_alike(self._made[at], tensor):
                return self._made[at]
        made = torch.empty_like(tensor)
        self._made = [*self._made[1 - _MOST :], made]
        return made

    def clear(self) -> None:
        """Forget all."""
        self._made = []


def _holders(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """For each, the references to it, and to its storage by it, its views and arrays; equal where a list alone holds it."""
    assert _count is not None
    return [(sys.getrefcount(t), _count(t.untyped_storage()._cdata)) for t in tensors]


def _is_alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


__all__ = ["Spare"]
