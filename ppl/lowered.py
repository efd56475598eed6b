"""What lowering makes: steps on plain tensors, and a record of where each result stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

# An ordered plate with the number of its elements at the start and at the end that lack a neighbour.
Edge = tuple[str, int, int]


class Operand(NamedTuple):
    """A compiled expression: where its tensor will stand, its axes, its number of event axes."""

    slot: int
    axes: tuple[str, ...]
    event_ndim: int
    edges: tuple[Edge, ...] = ()


class Step(NamedTuple):
    """``slots[out] = run(*slots[inputs])``."""

    run: Callable[..., Any]
    inputs: tuple[int, ...]
    out: int


@dataclass(eq=False)
class Lowered:
    """A plain function from arrays to the tensors of ``outputs``.

    ``axes`` names the leading dimensions of each output.
    """

    axes: tuple[tuple[str, ...], ...]
    outputs: tuple[int, ...]
    inputs: Mapping[str, int]
    steps: tuple[Step, ...]
    base: list[Any]

    def __call__(self, arrays: Mapping[str, Tensor]) -> list[Tensor]:
        """Evaluate; ``arrays`` maps input names to tensors ``[*axes, *event]``."""
        slots = self.base.copy()
        for name, slot in self.inputs.items():
            slots[slot] = arrays[name]
        for (run, inputs, out), done in zip(self.steps, self._done, strict=True):
            slots[out] = run(*[slots[i] for i in inputs])
            for i in done:  # memory is free for the next step
                slots[i] = None
        return [slots[i] for i in self.outputs]

    @cached_property
    def _done(self) -> list[tuple[int, ...]]:
        """For each step, the slots that nothing reads after it."""
        last = {i: n for n, step in enumerate(self.steps) for i in (*step.inputs, step.out)}
        kept = set(self.outputs)
        done: list[list[int]] = [[] for _ in self.steps]
        for i, n in last.items():
            if i not in kept:
                done[n].append(i)
        return [tuple(slots) for slots in done]

    def given(self, arrays: Mapping[str, Tensor]) -> Lowered:
        """The same function with some inputs fixed; what depends on them alone is computed now."""
        base = self.base.copy()
        known = {i for i, value in enumerate(base) if value is not None}
        for name, slot in self.inputs.items():
            if name in arrays:
                base[slot] = arrays[name]
                known.add(slot)
        left: list[Step] = []
        for step in self.steps:
            if known.issuperset(step.inputs):
                base[step.out] = step.run(*[base[i] for i in step.inputs])
                known.add(step.out)
            else:
                left.append(step)
        open_inputs = {n: s for n, s in self.inputs.items() if n not in arrays}
        return Lowered(self.axes, self.outputs, open_inputs, tuple(left), base)

    def pruned(self) -> Lowered:
        """The same function without steps, inputs and constants that none of its outputs needs."""
        needed, steps = set(self.outputs), []
        for step in reversed(self.steps):
            if step.out in needed:
                needed.update(step.inputs)
                steps.append(step)
        inputs = {name: slot for name, slot in self.inputs.items() if slot in needed}
        base = [value if i in needed else None for i, value in enumerate(self.base)]
        return Lowered(self.axes, self.outputs, inputs, tuple(reversed(steps)), base)


def map_name(child: str, ancestor: str) -> str:
    """Input name of a membership.

    >>> map_name("house", "county")
    'house->county'
    """
    return f"{child}->{ancestor}"


def joint_edges(operands: Sequence[Operand]) -> tuple[Edge, ...]:
    """The elements of ordered plates that any of the operands lacks."""
    lost: dict[str, tuple[int, int]] = {}
    for plate, start, end in [e for o in operands for e in o.edges]:
        before = lost.get(plate, (0, 0))
        lost[plate] = (max(start, before[0]), max(end, before[1]))
    return tuple((p, s, e) for p, (s, e) in lost.items())
