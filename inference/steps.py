"""The steps of a contraction plan: what each computes, and how it draws its indices back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl.inference import chains
from ppl.inference.drawing import Chosen, selected, unravel
from ppl.inference.layout import Chain, Layout, Term
from ppl.inference.logspace import (
    draw_categorical,
    log_matmul,
    log_sum_product,
    matmul_gradients,
    shifted,
    shifted_product,
    summed_products,
    wide,
)

# Entries of a chain's message up to which small matrix products in a tree beat the many steps of a scan.
_TREE_ENTRIES = 64

Slots = list[Any]  # tensors, None where nothing stands yet
Wanted = tuple[bool, ...]  # whether the gradient of each input is asked for
# From the gradient of a step's result, those of its inputs; None for one that is not wanted.
Pull = Callable[[Tensor], Sequence[Tensor | None]]


class IndexCache:
    """A long tensor kept on every device that asked for it."""

    def __init__(self, index: Tensor) -> None:
        self.by_device = {index.device: index}

    def on(self, device: torch.device) -> Tensor:
        if device not in self.by_device:
            self.by_device[device] = next(iter(self.by_device.values())).to(device)
        return self.by_device[device]


@dataclass(kw_only=True, eq=False)
class Step:
    """Reads ``inputs``, writes ``output``; its largest array has the axes ``joint``."""

    layout: Layout
    inputs: tuple[Term, ...]
    output: Term
    joint: tuple[str, ...] = ()
    elements: int = 0  # entries of the largest array it makes
    work: int = 0  # additions and exponentials, about

    def __call__(self, slots: Slots) -> None:
        slots[self.output.slot] = self.compute(*[slots[term.slot] for term in self.inputs])

    def compute(self, *tensors: Tensor) -> Tensor:
        raise NotImplementedError

    def pulled(self, tensors: Sequence[Tensor], wanted: Wanted, overwrite: bool) -> tuple[Tensor, Pull]:
        """The result, and its derivative: by autograd where the step has no rule of its own.

        With ``overwrite`` the memory of the inputs may be used.
        """
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
            out = self.compute(*leaves)
        watched = [t for t in leaves if t.requires_grad]

        def pull(grad: Tensor) -> list[Tensor | None]:
            found = iter(torch.autograd.grad(out, watched, grad, materialize_grads=True))
            return [next(found) if w else None for w in wanted]

        return out.detach(), pull

    @property
    def cells(self) -> int:
        """Probabilities that one draw of the axes summed here needs; 0 if it summed none."""
        return 0

    def draw(self, slots: Slots, chosen: Chosen, n: int, generator: torch.Generator | None) -> None:
        """Add the axes that this step summed to ``chosen``; nothing for a step that summed none."""

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()} -> [{', '.join(self.output.axes)}]"


def _aligned(axes: Sequence[str], sizes: Mapping[str, int], onto: Sequence[str]) -> tuple[int, ...]:
    return tuple(sizes[a] if a in axes else 1 for a in onto)


def inverse(order: Sequence[int]) -> list[int]:
    """The permutation that undoes another."""
    return sorted(range(len(order)), key=order.__getitem__)


@dataclass(kw_only=True, eq=False)
class Combine(Step):
    """Add factors and sum ``summed`` out by log-sum-exp, through the joint array."""

    summed: tuple[str, ...]

    def __post_init__(self) -> None:
        self.joint = self.layout.canonical(a for t in self.inputs for a in t.axes)
        self.elements = self.work = math.prod(self.layout.shape(self.joint))
        self.shapes = [_aligned(t.axes, self.layout.size_of, self.joint) for t in self.inputs]
        self.dims = tuple(self.joint.index(a) for a in self.summed)
        sizes = [math.prod(shape) for shape in self.shapes]
        self.largest = sizes.index(max(sizes))
        self.plain = [self.layout.shape(t.axes) for t in self.inputs]
        self.is_plain = [a == b for a, b in zip(self.shapes, self.plain, strict=True)]
        full = self.layout.shape(self.joint)
        self.dims_of = [
            tuple(d for d, (a, b) in enumerate(zip(shape, full, strict=True)) if a == 1 < b)
            for shape in self.shapes
        ]
        self.kept = tuple(1 if d in self.dims else n for d, n in enumerate(full))

    def compute(self, *tensors: Tensor) -> Tensor:
        return log_sum_product(*self._pair(tensors), self.dims)

    def pulled(self, tensors: Sequence[Tensor], wanted: Wanted, overwrite: bool) -> tuple[Tensor, Pull]:
        x, y = self._pair(tensors)
        if self.dims:
            exponentials, total, out = shifted(x, y, self.dims, overwrite)
            out = out.squeeze(self.dims)
        else:
            exponentials, total, out = None, None, x + y

        def pull(grad: Tensor) -> list[Tensor | None]:
            grad = grad.reshape(self.kept)
            # The largest term of a sum is one, unless all are zero.
            scaled = grad if total is None else grad / total.clamp(min=1.0)
            dims = [d for d, w in zip(self.dims_of, wanted, strict=True) if w]
            found = iter(summed_products(exponentials, scaled, dims))
            return [
                next(found).reshape(shape) if w else None
                for w, shape in zip(wanted, self.plain, strict=True)
            ]

        return out, pull

    def _pair(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        parts = [
            t if same else t.reshape(shape)
            for t, shape, same in zip(tensors, self.shapes, self.is_plain, strict=True)
        ]
        first = parts.pop(self.largest)
        if not parts:
            return first, first.new_zeros(())
        rest = parts[0]
        for part in parts[1:]:
            rest = rest + part
        return first, rest

    @property
    def cells(self) -> int:
        plates = self.layout.innermost(self.output.context)
        return math.prod(self.layout.shape((*plates, *self.summed))) if self.summed else 0

    def draw(self, slots: Slots, chosen: Chosen, n: int, generator: torch.Generator | None) -> None:
        context, layout = self.output.context, self.layout
        parts = [
            selected(slots[t.slot], t.axes, layout, context, self.summed, chosen)
            for t in self.inputs
        ]
        logits = sum(parts[1:], parts[0])
        plates = layout.shape(layout.innermost(context))
        states = layout.shape(self.summed)
        flat = logits.expand(len(logits), *plates, *states).flatten(1 + len(plates))
        unravel(draw_categorical(flat, n, generator), self.summed, states, chosen)

    def __str__(self) -> str:
        what = f"sum {', '.join(self.summed)}" if self.summed else "add"
        return f"{what} -> [{', '.join(self.output.axes)}]"


@dataclass(kw_only=True, eq=False)
class Product(Combine):
    """The same for two factors as a batched matrix product, which never holds the joint array."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes, (a, b) = self.layout.size_of, self.inputs
        both = [x for x in a.axes if x in b.axes and x not in self.summed]
        left = [x for x in a.axes if x not in b.axes]
        right = [x for x in b.axes if x not in a.axes]
        self.order_a = [a.axes.index(x) for x in (*both, *left, *self.summed)]
        self.order_b = [b.axes.index(x) for x in (*both, *self.summed, *right)]
        count = [math.prod(sizes[x] for x in part) for part in (both, left, self.summed, right)]
        self.shape_a, self.shape_b = count[:3], [count[0], count[2], count[3]]
        made = [*both, *left, *right]
        self.shape_out = [sizes[x] for x in made]
        self.order_out = [made.index(x) for x in self.output.axes]
        self.elements = count[0] * max(
            count[1] * count[2], count[2] * count[3], count[1] * count[3]
        )

    def compute(self, *tensors: Tensor) -> Tensor:
        return self._unfolded(log_matmul(*self._matrices(tensors)))

    def pulled(self, tensors: Sequence[Tensor], wanted: Wanted, overwrite: bool) -> tuple[Tensor, Pull]:
        made = shifted_product(*self._matrices(tensors))

        def pull(grad: Tensor) -> list[Tensor | None]:
            folded = grad.permute(inverse(self.order_out)).reshape(made.log.shape)
            found = matmul_gradients(made, folded, wanted)
            return [
                g if g is None else self._input(g, t, order)
                for g, t, order in zip(found, self.inputs, (self.order_a, self.order_b), strict=True)
            ]

        return self._unfolded(made.log), pull

    def _matrices(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        a = tensors[0].permute(self.order_a).reshape(self.shape_a)
        return a, tensors[1].permute(self.order_b).reshape(self.shape_b)

    def _unfolded(self, made: Tensor) -> Tensor:
        return made.reshape(self.shape_out).permute(self.order_out)

    def _input(self, made: Tensor, term: Term, order: list[int]) -> Tensor:
        shape = self.layout.shape(term.axes)
        return made.reshape([shape[i] for i in order]).permute(inverse(order))

    def __str__(self) -> str:
        return super().__str__() + " (matrix product)"


@dataclass(kw_only=True, eq=False)
class Lift(Step):
    """Repeat a factor over the elements of ``plate`` through their membership in ``ancestors``."""

    plate: str
    ancestors: tuple[str, ...]

    def __post_init__(self) -> None:
        axes = self.inputs[0].axes
        rest = [a for a in axes if a not in self.ancestors]
        self.order = [axes.index(a) for a in (*self.ancestors, *rest)]
        self.rest_axes = rest
        self.order_out = [(self.plate, *rest).index(a) for a in self.output.axes]
        self.index = IndexCache(self.layout.joint_member(self.plate, self.ancestors))
        self.joint = self.output.axes
        self.elements = self.work = math.prod(self.layout.shape(self.joint))

    def compute(self, *tensors: Tensor) -> Tensor:
        moved = tensors[0].permute(self.order).flatten(0, len(self.ancestors) - 1)
        return moved.index_select(0, self.index.on(moved.device)).permute(self.order_out)


@dataclass(kw_only=True, eq=False)
class Weigh(Step):
    """Multiply a log-factor by the number of elements of ``plate`` in each ancestor."""

    plate: str
    ancestors: tuple[str, ...]

    def __post_init__(self) -> None:
        self.joint = self.output.axes
        self.elements = self.work = math.prod(self.layout.shape(self.joint))
        cells = math.prod(self.layout.shape(self.ancestors))
        member = self.layout.joint_member(self.plate, self.ancestors)
        count = torch.bincount(member, minlength=cells).reshape(self.layout.shape(self.ancestors))
        order = [self.ancestors.index(a) for a in self.joint if a in self.ancestors]
        self.count = IndexCache(
            count.permute(order).reshape(_aligned(self.ancestors, self.layout.size_of, self.joint))
        )
        self.is_full = bool((count > 0).all())
        self.shape = _aligned(self.inputs[0].axes, self.layout.size_of, self.joint)

    def compute(self, *tensors: Tensor) -> Tensor:
        x, count = tensors[0].reshape(self.shape), self.count.on(tensors[0].device)
        if self.is_full:
            return x * count
        return (
            torch.where(count > 0, x, 0.0) * count
        )  # no element: 0, even where the factor is -inf


@dataclass(kw_only=True, eq=False)
class Reduce(Step):
    """Multiply a factor over the elements of ``plate`` (add logs), within each target."""

    plate: str
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        axes = self.inputs[0].axes
        self.joint = axes
        self.elements = math.prod(self.layout.shape(self.output.axes))
        self.work = math.prod(self.layout.shape(axes))
        self.dim = axes.index(self.plate)
        rest = [a for a in axes if a != self.plate]
        self.groups = math.prod(self.layout.shape(self.targets))
        self.index = IndexCache(self.layout.joint_member(self.plate, self.targets))
        made = (*self.targets, *rest)
        self.shape_out = [self.layout.size_of[a] for a in made]
        self.order_out = [made.index(a) for a in self.output.axes]

    def compute(self, *tensors: Tensor) -> Tensor:
        x = tensors[0]
        if not self.targets:
            return x.sum(self.dim, dtype=torch.float64).to(x.dtype)
        logs = wide(x.movedim(self.dim, 0)).reshape(
            x.shape[self.dim], -1
        )  # two dimensions: three times as fast
        zeros = logs.new_zeros((self.groups, logs.shape[1]))
        total = zeros.index_add(0, self.index.on(x.device), logs)
        return total.to(x.dtype).reshape(self.shape_out).permute(self.order_out)

    def pulled(self, tensors: Sequence[Tensor], wanted: Wanted, overwrite: bool) -> tuple[Tensor, Pull]:
        shape = tensors[0].shape

        def pull(grad: Tensor) -> list[Tensor | None]:
            if not self.targets:
                return [grad.unsqueeze(self.dim).expand(shape)]
            rows = grad.permute(inverse(self.order_out)).reshape(self.groups, -1)
            picked = rows.index_select(0, self.index.on(grad.device))
            rest = [n for d, n in enumerate(shape) if d != self.dim]
            return [picked.reshape(shape[self.dim], *rest).movedim(0, self.dim)]

        return self.compute(*tensors), pull

    def __str__(self) -> str:
        within = f" within {', '.join(self.targets)}" if self.targets else ""
        return f"multiply over {self.plate}{within} -> [{', '.join(self.output.axes)}]"


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
            total = chains.scan(first, units, step, leave)
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
