"""The steps of a contraction plan: what each computes, and how it draws its indices back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ppl.inference.drawing import Chosen, selected, unravel
from ppl.inference.layout import Layout, Term
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
            with torch.inference_mode(False):  # it is kept for other calls
                self.by_device[device] = next(iter(self.by_device.values())).to(device)
        return self.by_device[device]


def slopes(out: Tensor, inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients of ``(out * grad).sum()``: given ``grad`` apart, torch would import a computer algebra system first."""
    with torch.enable_grad():
        total = (out * grad).sum()
    return torch.autograd.grad(total, inputs, materialize_grads=True)


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

    def pulled(
        self, tensors: Sequence[Tensor], wanted: Wanted, overwrite: bool
    ) -> tuple[Tensor, Pull]:
        """The result, and its derivative: by autograd where the step has no rule of its own.

        With ``overwrite`` the memory of the inputs may be used.
        """
        apart = torch.is_inference_mode_enabled()  # whose tensors autograd does not take
        with torch.inference_mode(False), torch.enable_grad():
            parts = [t.clone() if apart else t.detach() for t in tensors]
            leaves = [t.requires_grad_(w) for t, w in zip(parts, wanted, strict=True)]
            out = self.compute(*leaves)
        watched = [t for t in leaves if t.requires_grad]

        def pull(grad: Tensor) -> list[Tensor | None]:
            with torch.inference_mode(False):
                grad = grad.clone() if apart else grad
                found = iter(slopes(out, watched, grad))
            return [next(found) if w else None for w in wanted]

        return out.detach(), pull

    @property
    def has_rule(self) -> bool:
        """Whether its derivative takes no autograd."""
        return type(self).pulled is not Step.pulled

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


def _broadcast(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(max(sizes) for sizes in zip(*shapes, strict=True))


def _spread_dims(shape: Sequence[int], onto: Sequence[int]) -> tuple[int, ...]:
    """Where an array is repeated to get the shape ``onto``."""
    return tuple(d for d, (a, b) in enumerate(zip(shape, onto, strict=True)) if a == 1 < b)


def _merges(shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Which two arrays to add next, the smallest sum first, until two are left; the second of each goes."""
    left, made = list(shapes), []
    while len(left) > 2:
        pairs = list(combinations(range(len(left)), 2))
        i, j = min(pairs, key=lambda p: math.prod(_broadcast([left[p[0]], left[p[1]]])))
        left[i] = _broadcast([left[i], left.pop(j)])
        made.append((i, j))
    return made


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
        self.plain = [self.layout.shape(t.axes) for t in self.inputs]
        self.is_plain = [a == b for a, b in zip(self.shapes, self.plain, strict=True)]
        full = self.layout.shape(self.joint)
        self.kept = tuple(1 if d in self.dims else n for d, n in enumerate(full))
        # What does not vary along the summed axes is added to the sum.
        varies = [not self.dims or any(s[d] > 1 for d in self.dims) for s in self.shapes]
        self.inside = [i for i, v in enumerate(varies) if v] or list(range(len(self.inputs)))
        self.outside = [i for i in range(len(self.inputs)) if i not in self.inside]
        within = _broadcast([self.shapes[i] for i in self.inside])
        self.dims_of = [
            _spread_dims(s, within if i in self.inside else self.kept)
            for i, s in enumerate(self.shapes)
        ]
        self.dims_inside = _spread_dims(within, full)
        self.merges = _merges([self.shapes[i] for i in self.inside])

    def compute(self, *tensors: Tensor) -> Tensor:
        x, y, rest = self._parts(tensors)
        if not self.dims:
            return x if y is None else x + y
        return self._with(rest, log_sum_product(x, y, self.dims, keepdim=True))

    def pulled(
        self, tensors: Sequence[Tensor], wanted: Wanted, overwrite: bool
    ) -> tuple[Tensor, Pull]:
        x, y, rest = self._parts(tensors)
        if self.dims:
            exponentials, total, out = shifted(x, y, self.dims, overwrite)
            out = self._with(rest, out)
        else:
            exponentials, total, out = None, None, x if y is None else x + y

        def pull(grad: Tensor) -> list[Tensor | None]:
            grad = grad.reshape(self.kept)
            found: dict[int, Tensor] = {}
            inside = [i for i in self.inside if wanted[i]]
            if inside:
                scaled = grad.sum(self.dims_inside, keepdim=True) if self.dims_inside else grad
                # The largest term of a sum is one, unless all are zero.
                scaled = scaled if total is None else scaled / total.clamp(min=1.0)
                made = summed_products(exponentials, scaled, [self.dims_of[i] for i in inside])
                found |= dict(zip(inside, made, strict=True))
            for i in self.outside:
                dims = self.dims_of[i]
                found[i] = grad.sum(dims, keepdim=True) if dims else grad
            return [
                found[i].reshape(shape) if w else None
                for i, (w, shape) in enumerate(zip(wanted, self.plain, strict=True))
            ]

        return out, pull

    def _parts(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Two arrays that add up to the summand, the larger one first, or one, and what is added to the sum."""
        parts = [
            t if same else t.reshape(shape)
            for t, shape, same in zip(tensors, self.shapes, self.is_plain, strict=True)
        ]
        rest = [parts[i] for i in self.outside]
        parts = [parts[i] for i in self.inside]
        for i, j in self.merges:
            second = parts.pop(j)
            parts[i] = parts[i] + second
        if len(parts) == 1:
            return parts[0], None, rest
        first, second = parts
        return (first, second, rest) if first.numel() >= second.numel() else (second, first, rest)

    def _with(self, rest: Sequence[Tensor], out: Tensor) -> Tensor:
        for part in rest:
            out = out + part
        return out.squeeze(self.dims)

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

    def pulled(
        self, tensors: Sequence[Tensor], wanted: Wanted, overwrite: bool
    ) -> tuple[Tensor, Pull]:
        made = shifted_product(*self._matrices(tensors))

        def pull(grad: Tensor) -> list[Tensor | None]:
            folded = grad.permute(inverse(self.order_out)).reshape(made.log.shape)
            found = matmul_gradients(made, folded, wanted)
            return [
                g if g is None else self._input(g, t, order)
                for g, t, order in zip(
                    found, self.inputs, (self.order_a, self.order_b), strict=True
                )
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

    def pulled(
        self, tensors: Sequence[Tensor], wanted: Wanted, overwrite: bool
    ) -> tuple[Tensor, Pull]:
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
