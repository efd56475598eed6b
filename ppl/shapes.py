"""Shapes of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """What shapes broadcast to; the first call of torch's own function imports a computer algebra system, for a second.

    Raises:
        RuntimeError: they do not broadcast.

    >>> broadcast_shapes((3, 1), (2,), ())
    torch.Size([3, 2])
    """
    rank = max(map(len, shapes), default=0)
    padded = [(1,) * (rank - len(s)) + tuple(s) for s in shapes]
    sizes = []
    for each in zip(*padded, strict=True):
        long = {n for n in each if n != 1}
        if len(long) > 1:
            raise RuntimeError(
                f"shapes {', '.join(str(tuple(s)) for s in shapes)} do not broadcast."
            )
        sizes.append(long.pop() if long else 1)
    return torch.Size(sizes)
