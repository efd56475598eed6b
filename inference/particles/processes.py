"""A plate split over processes: every process holds its own elements, all hold the blocks outside the plate.

What the elements of a process say of the rest is a small tensor over the particles outside the plate. The sum of these
tensors over all processes is the one thing that is sent in a weighting; everything after it is computed identically
everywhere. Random numbers belong to fixed parts of the plate, whichever process holds them, so the number of processes
changes nothing but the order of that sum.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ppl.batches import check_divisible, rows_within
from ppl.binding import Bound
from ppl.errors import DataError, UnsupportedError
from ppl.streams import Streams

_PARTS = 16  # of the plate, at least, however many processes there are


class Share(NamedTuple):
    """The elements of one process."""

    plate: str
    start: int  # first element
    ends: tuple[int, ...]  # boundaries of the parts, counted from ``start``
    first: int  # number of the first part
    reduce: Callable[[list[Tensor]], list[Tensor]]

    def rows(self, bound: Bound) -> dict[str, Tensor]:
        """Elements of the plate, and of those within it, that this process holds."""
        return rows_within(bound, self.plate, torch.arange(self.start, self.start + self.ends[-1]))


def join(device: torch.device) -> None:
    """Make sure that there is a process group, from torchrun's environment if need be.

    Raises:
        UnsupportedError: neither is there.
    """
    if not dist.is_available():
        raise UnsupportedError("distribute: this build of torch has no torch.distributed.")
    if dist.is_initialized():
        return
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise UnsupportedError(
            "distribute: there is one process only. Start the program with torchrun --nproc-per-node 2 program.py, or call "
            "torch.distributed.init_process_group first; or leave distribute= out."
        )
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def share_of(bound: Bound, plate: str, parts: int) -> Share:
    """The elements of this process: a run of whole parts of the plate.

    Raises:
        DataError: there is no such plate, or it has fewer elements than there are processes.
        UnsupportedError: the plate cannot be divided.
    """
    check_divisible(bound, plate, "distribute")
    size, rank, ranks = bound.size(plate), dist.get_rank(), dist.get_world_size()
    count = min(max(parts, _PARTS, ranks), size)
    if count < ranks:
        raise DataError(
            f"distribute='{plate}': {ranks} processes, but plate '{plate}' has {size} elements. Start fewer processes."
        )
    ends = [i * size // count for i in range(count + 1)]
    first, last = rank * count // ranks, (rank + 1) * count // ranks
    inside = tuple(e - ends[first] for e in ends[first : last + 1])
    return Share(plate, ends[first], inside, first, add_up)


def add_up(tensors: list[Tensor]) -> list[Tensor]:
    """The sum of each tensor over all processes, by one all-reduce of all of them."""
    flat = torch.cat([t.reshape(-1).double() for t in tensors])
    dist.all_reduce(flat)
    pieces = flat.split([t.numel() for t in tensors])
    return [p.reshape(t.shape).to(t.dtype) for p, t in zip(pieces, tensors, strict=True)]


def same_streams(streams: Streams) -> Streams:
    """Streams from the seed of the first process."""
    seed = torch.tensor([streams.seed], dtype=torch.long, device=streams.device)
    dist.broadcast(seed, 0)
    return Streams(int(seed), streams.device)


def gathered(tensor: Tensor, dim: int) -> Tensor:
    """The tensors of all processes joined along ``dim``, on every process."""
    sizes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, tensor.shape[dim])
    most = max(sizes)
    padded = tensor.movedim(dim, 0).contiguous()
    if len(padded) < most:  # all_gather wants equal shapes
        padded = torch.cat([padded, padded.new_zeros((most - len(padded), *padded.shape[1:]))])
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded)
    return torch.cat([f[:n] for f, n in zip(found, sizes, strict=True)]).movedim(0, dim)
