"""A planned contraction: steps that turn input factors into output factors, and draw back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ppl.errors import DataError
from ppl.inference.chain_steps import ChainSum
from ppl.inference.drawing import Chosen
from ppl.inference.layout import Layout, LogFactor, Term
from ppl.inference.steps import Pull, Reduce, Slots, Step, Wanted, Weigh, inverse

_DRAW_ELEMENTS = 1 << 24  # probabilities held at a time while drawing


class Program:
    """Steps that reduce input factors to output factors; every slot holds one tensor."""

    def __init__(
        self,
        layout: Layout,
        scopes: Sequence[tuple[str, ...]],
        inputs: list[Term],
        steps: list[Step],
        outputs: list[Term],
    ) -> None:
        self.layout, self.scopes, self.steps, self.outputs = layout, scopes, steps, outputs
        self._known: dict[tuple[int, ...], list[Wanted]] = {}
        self.extra = max((s.output.slot + 1 for s in steps), default=len(inputs)) - len(inputs)
        self.loads = [_load(layout, s, t) for s, t in zip(scopes, inputs, strict=True)]
        self.flops = sum(step.work for step in steps)
        sizes = [
            (math.prod(shape), scope) for scope, (shape, _) in zip(scopes, self.loads, strict=True)
        ]
        sizes += [(step.elements, step.joint) for step in steps]
        self.elements, self.axes = max(sizes, key=lambda pair: pair[0], default=(1, ()))

    def load(self, factor: LogFactor, i: int) -> Tensor:
        """The tensor of input ``i`` with its axes in canonical order.

        Raises:
            DataError: its axes or shape are not those of the plan.
        """
        shape, order = self.loads[i]
        axes, log = factor
        if log.shape != shape or axes != self.scopes[i]:
            raise DataError(
                f"log-factor {i}: expected axes {self.scopes[i]} of shape {list(shape)}, got axes "
                f"{tuple(axes)} of shape {list(log.shape)}. Pass factors in the order of the "
                "plan's scopes."
            )
        return log if order is None else log.permute(order)

    def unload(self, tensor: Tensor, i: int) -> Tensor:
        """A tensor like that of input ``i`` with its axes as in the scope: the inverse of :meth:`load`."""
        order = self.loads[i][1]
        return tensor if order is None else tensor.permute(inverse(order))

    def run(self, tensors: Sequence[Tensor], power: float = 1.0) -> Slots:
        """All slots after all steps; ``power`` as for :meth:`gradients`."""
        slots: Slots = [*tensors, *[None] * self.extra]
        for step in self.steps:
            step(slots)
            if power != 1.0 and _leaves_plates(step):
                slots[step.output.slot] = power * slots[step.output.slot]
        return slots

    def results(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The output factors; intermediate arrays are let go as soon as autograd lets them."""
        slots: Slots = [*tensors, *[None] * self.extra]
        for step in self.steps:
            step(slots)
            for term in step.inputs:
                slots[term.slot] = None
        return [slots[term.slot] for term in self.outputs]

    def gradients(
        self,
        tensors: Sequence[Tensor],
        watched: tuple[int, ...],
        overwrite: bool = False,
        power: float = 1.0,
    ) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], list[Tensor]]]:
        """The output factors, and what turns their gradients into those of the inputs ``watched``.

        ``power`` is an exponent of what plates say of the axes outside all plates.
        """
        slots: Slots = [*tensors, *[None] * self.extra]
        pulls: list[tuple[Step, Pull]] = []
        for step, wanted in zip(self.steps, self._wanted(watched), strict=True):
            if any(wanted):
                read = [slots[t.slot] for t in step.inputs]
                slots[step.output.slot], pull = step.pulled(read, wanted, overwrite)
                pulls.append((step, pull))
            else:
                step(slots)
            if power != 1.0 and _leaves_plates(step):
                slots[step.output.slot] = power * slots[step.output.slot]
            for term in step.inputs:
                slots[term.slot] = None
        shapes = {i: tensors[i].shape for i in watched}
        return [slots[t.slot] for t in self.outputs], partial(self._backward, pulls, shapes, power)

    def _backward(
        self,
        pulls: list[tuple[Step, Pull]],
        shapes: Mapping[int, torch.Size],
        power: float,
        grads: Sequence[Tensor],
    ) -> list[Tensor]:
        """Gradients of the inputs of these ``shapes``, zero for those that nothing reads; empties ``pulls``."""
        at = {t.slot: g for t, g in zip(self.outputs, grads, strict=True)}
        while pulls:
            step, pull = pulls.pop()
            if step.output.slot in at:
                grad = at.pop(step.output.slot)
                found = pull(power * grad if power != 1.0 and _leaves_plates(step) else grad)
                at |= {t.slot: g for t, g in zip(step.inputs, found, strict=True) if g is not None}
        return [at[i] if i in at else grads[0].new_zeros(s) for i, s in shapes.items()]

    def _wanted(self, watched: tuple[int, ...]) -> list[Wanted]:
        """Which inputs of each step depend on those ``watched``."""
        if watched not in self._known:
            found, made = set(watched), []
            for step in self.steps:
                made.append(tuple(t.slot in found for t in step.inputs))
                if any(made[-1]):
                    found.add(step.output.slot)
            self._known[watched] = made
        return self._known[watched]

    def draw(self, slots: Slots, chosen: Chosen, n: int, generator: torch.Generator | None) -> None:
        """Draw the axes that the steps summed, last step first, given those ``chosen``."""
        for step in reversed([s for s in self.steps if s.cells]):
            parts = torch.arange(n).split(max(1, _DRAW_ELEMENTS // step.cells))
            drawn = []
            for part in parts:
                given = {axis: index[part[0] : part[-1] + 1] for axis, index in chosen.items()}
                step.draw(slots, given, len(part), generator)
                drawn.append(given)
            chosen |= {a: torch.cat([d[a] for d in drawn]) for a in drawn[0] if a not in chosen}


def _leaves_plates(step: Step) -> bool:
    """Whether a step multiplies over the last plate around a factor, or sums all paths along it."""
    if isinstance(step, ChainSum):
        return not step.output.context
    return isinstance(step, (Reduce, Weigh)) and not set(step.output.context) - {step.plate}


def _load(
    layout: Layout, scope: tuple[str, ...], term: Term
) -> tuple[torch.Size, list[int] | None]:
    """Expected shape of an input and its permutation to canonical order, None for none."""
    shorter = {c.plate for c in layout.chains if c.previous in scope}
    sizes = {a: layout.size_of[a] - (a in shorter) for a in scope}
    renamed = {c.axis: c.first for c in layout.chains if c.first in term.axes}
    order = [[renamed.get(a, a) for a in scope].index(a) for a in term.axes]
    return torch.Size(sizes[a] for a in scope), None if order == sorted(order) else order
