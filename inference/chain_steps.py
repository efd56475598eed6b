"""The steps of a contraction plan that concern Markov chains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl.inference import chains, scans
from ppl.inference.drawing import Chosen, selected, unravel
from ppl.inference.layout import Chain, Term
from ppl.inference.logspace import log_sum_product
from ppl.inference.steps import Slots, Step

# Entries of a chain's message up to which small matrix products in a tree beat the many steps of a scan.
_TREE_ENTRIES = 64


@dataclass(kw_only=True, eq=False)
class Pad(Step):
    """Give a transition factor an element for the first state, whose previous state is a dummy.

    With ``normalised``, the dummy states get weights that sum to one; otherwise weight one each.
    """

    chain: Chain
    normalised: tuple[str, ...]

    def __post_init__(self) -> None:
        self.joint = self.output.axes
        self.elements = self.work = math.prod(self.layout.shape(self.joint))
        self.weight = -math.log(math.prod(self.layout.shape(self.normalised)))
        self.has_plate = self.chain.plate in self.inputs[0].axes
        self.dim = self.joint.index(self.chain.plate)
        self.length = self.layout.size_of[self.chain.plate]

    def compute(self, *tensors: Tensor) -> Tensor:
        step = tensors[0]
        if not self.has_plate:
            step = step.unsqueeze(self.dim)
            step = step.expand(
                *step.shape[: self.dim], self.length - 1, *step.shape[self.dim + 1 :]
            )
        shape = list(step.shape)
        shape[self.dim] = 1
        return torch.cat([step.new_full(shape, self.weight), step], self.dim)


@dataclass(kw_only=True, eq=False)
class ChainSum(Step):
    """Sum over all paths of one or several coupled chains along one plate.

    The state is the tuple of the chains' particle indices, flattened.
    """

    chains: tuple[Chain, ...]
    tree: bool | None  # None: where it is faster

    def __post_init__(self) -> None:
        self.plate = self.chains[0].plate
        self.states = tuple(c.axis for c in self.chains)
        self.previous = tuple(c.previous for c in self.chains)
        self.firsts = tuple(c.first for c in self.chains)
        self.outer = self.output.axes
        self.size = math.prod(self.layout.shape(self.states))
        self.length = self.layout.size_of[self.plate]
        self.joint = (*self.outer, self.plate, *self.previous, *self.states)
        outer, steps = math.prod(self.layout.shape(self.outer)), max(self.length - 1, 1)
        self.is_tree = outer * self.size <= _TREE_ENTRIES if self.tree is None else self.tree
        self.work = outer * steps * self.size**2
        if self.is_tree:
            self.elements = self.work
            self.work *= self.size
            return
        # A scan holds the matrices as they are, and the messages of all times for the backward pass.
        matrices = {a for t in self.inputs for a in t.axes if self._moves(t) and a in self.outer}
        shared = math.prod(self.layout.shape(matrices))
        self.elements = steps * self.size * max(shared * self.size, outer)

    def _moves(self, term: Term) -> bool:
        axes = set(term.axes)
        return bool(axes & set(self.previous)) and bool(axes & set(self.states))

    def compute(self, *tensors: Tensor) -> Tensor:
        first, units, step, leave = self._parts(tensors)
        if self.is_tree:
            total = chains.tree(first, sum(units[1:], units[0]), chains.with_leave(step, leave))
        else:
            total = scans.scan(first, units, step, leave)
        return total.expand(self.layout.shape(self.outer))

    @property
    def cells(self) -> int:
        plates = self.layout.innermost(self.output.context)
        return math.prod(self.layout.shape(plates)) * self.length * self.size

    def _parts(
        self, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor], Tensor | None, Tensor | None]:
        """First [*outer, S], units [*outer, T, S], step [*outer, T - 1, S, S] or None for T = 1, and factors of the
        state before alone [*outer, T - 1, S], or None.
        """
        first = tensors[0].new_zeros(self.size)
        units: list[Tensor] = []
        step: Tensor | None = None
        leave: Tensor | None = None
        for term, tensor in zip(self.inputs, tensors, strict=True):
            if self._is_leave(term, tensor):
                part = self._flat(term, tensor, self.previous, (self.plate,))
                leave = part if leave is None else leave + part
            elif set(term.axes) & set(self.previous):
                head, tail = self._transition(term, tensor)
                step = tail if step is None else step + tail
                first = first if head is None else first + head
            elif self.plate in term.context:
                units.append(self._flat(term, tensor, self.states, (self.plate,)))
            else:
                first = first + self._flat(term, tensor, self.firsts, ())
        lengths = {u.shape[-2] for u in units}
        if self.length not in lengths:
            units.append(tensors[0].new_zeros((self.length, self.size)))
        if self.length == 1:
            return first, units, None, None
        if step is None:
            step = tensors[0].new_zeros((1, self.size, self.size))
        step = step.expand(*step.shape[:-3], self.length - 1, *step.shape[-2:])
        return first, units, step, leave

    def _is_leave(self, term: Term, tensor: Tensor) -> bool:
        """Whether a factor reads the states before and not the present ones."""
        axes = set(term.axes)
        if not axes & set(self.previous) or axes & set(self.states) or self.plate not in axes:
            return False
        return tensor.shape[term.axes.index(self.plate)] == self.length - 1

    def _transition(self, term: Term, tensor: Tensor) -> tuple[Tensor | None, Tensor]:
        """The transition of t >= 1 and, of a padded factor, what it says of the first state."""
        front = (*self.outer, self.plate)
        onto = (*front, *self.previous, *self.states)
        aligned = self._align(term, tensor, onto)
        if self.plate not in term.axes or tensor.shape[term.axes.index(self.plate)] < self.length:
            return None, self._square(aligned, len(front))
        dim, width = len(self.outer), len(self.states)
        dummy = tuple(range(dim, dim + width))
        head = log_sum_product(aligned.select(dim, 0), aligned.new_zeros(()), dummy)
        sizes = self.layout.shape(self.states)
        head = head.expand(*head.shape[:dim], *sizes).flatten(-width)
        return head, self._square(aligned.narrow(dim, 1, self.length - 1), len(front))

    def _square(self, aligned: Tensor, front: int) -> Tensor:
        sizes = self.layout.shape(self.states)
        full = aligned.expand(*aligned.shape[:front], *sizes, *sizes)
        return full.reshape(*aligned.shape[:front], self.size, self.size)

    def _align(self, term: Term, tensor: Tensor, onto: Sequence[str]) -> Tensor:
        order = sorted(range(len(term.axes)), key=lambda i: onto.index(term.axes[i]))
        shape = [tensor.shape[term.axes.index(a)] if a in term.axes else 1 for a in onto]
        return tensor.permute(order).reshape(shape)

    def _flat(
        self, term: Term, tensor: Tensor, states: tuple[str, ...], plate: tuple[str, ...]
    ) -> Tensor:
        onto = (*self.outer, *plate, *states)
        aligned = self._align(term, tensor, onto)
        front = aligned.shape[: -len(states)]
        return aligned.expand(*front, *self.layout.shape(states)).reshape(*front, self.size)

    def draw(self, slots: Slots, chosen: Chosen, n: int, generator: torch.Generator | None) -> None:
        first, units, step, leave = self._parts([slots[t.slot] for t in self.inputs])
        unary, step = sum(units[1:], units[0]), chains.with_leave(step, leave)
        context, layout, outer = self.output.context, self.layout, self.outer

        def pick(x: Tensor, ends: tuple[str, ...], keep: str, given: Chosen) -> Tensor:
            padded = x.reshape((1,) * (len(outer) + len(ends) - x.ndim) + x.shape)
            return selected(padded, (*outer, *ends), layout, context, (keep,), given)

        def into(t: int, state: Tensor) -> Tensor:
            assert step is not None  # a path of one state never asks
            return pick(step[..., t - 1, :, :], ("@from", "@to"), "@from", {**chosen, "@to": state})

        messages = [pick(m, ("@to",), "@to", chosen) for m in chains.filtered(first, unary, step)]
        plates = layout.shape(layout.innermost(context))
        messages = [m.expand(len(m), *plates, self.size) for m in messages]
        path = chains.draw_backward(messages, into, n, generator)
        place = 1 + layout.innermost(context | {self.plate}).index(self.plate)
        sizes = layout.shape(self.states)
        unravel(path[..., 0], self.firsts, sizes, chosen)
        unravel(path.movedim(-1, place), self.states, sizes, chosen)
        before = torch.cat([torch.zeros_like(path[..., :1]), path[..., :-1]], -1)
        unravel(before.movedim(-1, place), self.previous, sizes, chosen)
