"""How much memory an E-step takes, and the largest array in it, told before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from ppl.binding import Bound
from ppl.errors import UnsupportedError
from ppl.inference.contract import Plan
from ppl.inference.particles import nested
from ppl.inference.particles.blocks import Block

_MOST = 4 * 2**30
# Arrays as large as the largest that live at once: the factor, its shifted exponential, and their gradients.
_COPIES = 4
# Of the particles: noise, unconstrained values, values, and what their log-density makes on the way.
_DRAWS = 5


@cache
def keep_freed_memory() -> None:
    """Let the allocator keep what an iteration frees for the next one, up to 62 MiB.

    The system clears the pages of new memory, which takes longer than the arithmetic on a few particles. glibc gives back
    less after it has freed a large piece once, at most 32 MiB; elsewhere this does nothing. The piece is never written to.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


class Largest(NamedTuple):
    """The largest array of an E-step."""

    name: str
    axes: tuple[str, ...]
    entries: int
    bytes: int

    def __str__(self) -> str:
        return (
            f"{self.name} over [{', '.join(self.axes)}]: {self.entries} entries, "
            f"{self.bytes / 2**20:.3g} MiB"
        )


class _Factor(Protocol):
    """One log-factor of the contraction."""

    @property
    def name(self) -> str: ...
    @property
    def axes(self) -> tuple[str, ...]: ...
    @property
    def inside(self) -> tuple[str, ...]: ...


def default_memory(device: torch.device | str = "cpu") -> int:
    """The budget in bytes when none is given: 4 GiB, or half of what the machine has free if that is less."""
    if torch.device(device).type == "cuda":
        return min(_MOST, torch.cuda.mem_get_info(device)[0] // 2)
    return min(_MOST, _available() // 2)


def _available() -> int:
    """Free memory of the machine in bytes, within the limits of a container; a lot where no file tells."""
    found = [_MOST * 2]
    info = Path("/proc/meminfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        found.append(int(lines.get("MemAvailable", "0 kB").split()[0]) * 1024 or found[0])
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and limit.read_text().strip().isdigit():
        found.append(max(int(limit.read_text()) - int(used.read_text()), 2**28))
    return min(found)


def factor_arrays(
    bound: Bound, blocks: Sequence[Block], factors: Sequence[_Factor], sizes: Mapping[str, int]
) -> list[Largest]:
    """The largest array that the evaluation of each factor makes, events included."""
    graph, home = bound.graph, {b.axis for b in blocks}
    size_of = {**sizes, **{p: bound.size(p) for p in graph.plates}}
    item = torch.empty((), dtype=bound.dtype).element_size()
    found = []
    for f in factors:
        axes = f.inside if len(f.inside) > len(f.axes) else f.axes
        entries = math.prod(size_of.get(a.rstrip("'"), 1) for a in axes)
        name = "the proposal of " + f.name[2:] if f.name in home else f"the factor of '{f.name}'"
        if f.name not in home and not f.inside:
            event = max((_event(bound, v) for v in graph.factors[f.name].scope), default=1)
            if event > 1:
                entries, axes = entries * event, (*axes, f"event of {event}")
        found.append(Largest(name, axes, entries, entries * item))
    return found


def _event(bound: Bound, name: str) -> int:
    return math.prod(bound.graph.variables[name].event_shape)


def point_bytes(bound: Bound, blocks: Sequence[Block], sizes: Mapping[str, int]) -> int:
    """Bytes of one set of particles of all blocks."""
    total = 0
    for block in blocks:
        if not block.enumerated:
            numbers = sum(math.prod((*m.sizes, *m.variable.event_shape)) for m in block.members)
            own = nested.count(blocks, block, sizes)
            total += math.prod(bound.size(p) for p in block.plates) * own * numbers
    return total * torch.empty((), dtype=bound.dtype).element_size()


def plan_within(
    make: Callable[[int | None], Plan],
    arrays: Sequence[Largest],
    points: int,
    memory: int,
) -> Plan:
    """A plan whose E-step takes no more than ``memory`` bytes, all arrays that live at once counted.

    Args:
        make: a plan for a budget of its largest array alone.
        arrays: of the factors, whole.
        points: bytes of the particles, whole.
        memory: budget in bytes.

    Raises:
        UnsupportedError: no split of one plate fits, with the largest array by name and the remedy.
    """
    plan = make(None)
    axes, entries, size = plan.largest
    most = max([*arrays, Largest("a sum of factors", axes, entries, size)], key=lambda x: x.bytes)
    total = _COPIES * size + max((a.bytes for a in arrays), default=0) + _DRAWS * points
    if total <= memory:
        return plan
    try:
        return make(int(memory * size / total))
    except UnsupportedError:
        raise UnsupportedError(
            f"the largest array is {most}; with all others that live at the same time a step takes about "
            f"{total / 2**20:.3g} MiB. The budget is {memory / 2**20:.3g} MiB, and no split of one plate fits it. Use fewer "
            "particles (particles=...), let latents share one particle index (groups=...), take a part of a plate at a "
            "time (minibatch=...), or allow more memory (memory=...)."
        ) from None
