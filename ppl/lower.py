"""Lower factors and expressions to plain functions of tensors with named leading axes.

A factor is written for one plate element. Here it is put under plates, particles and restarts: every variable
comes as a tensor whose leading dimensions are the axes that the caller names, followed by its event. Operands are
aligned to *minimal* shapes (size one where an axis is absent) and the recorded torch call acts on them by the rules
of :mod:`ppl.operations`. The result is a list of steps; nothing of the graph is left at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ppl import operations
from ppl.distributions import Normal
from ppl.errors import UnsupportedError
from ppl.graph import Factor, Graph, Law, Node, Ref, refs, substitute

Rules = Literal["all", "vmap"]
_HALF_LOG_2PI = 0.9189385332046727


class Operand(NamedTuple):
    """A compiled expression: where its tensor will stand, its axes, and how many event axes follow them."""

    slot: int
    axes: tuple[str, ...]
    event_ndim: int
    # ordered plate -> elements lost at its start and end, because a neighbour is missing
    edges: tuple[tuple[str, int, int], ...] = ()


class Step(NamedTuple):
    """``slots[out] = run(*slots[inputs])``."""

    run: Callable[..., Any]
    inputs: tuple[int, ...]
    out: int


@dataclass(eq=False)
class Lowered:
    """A plain function from arrays to the tensors of ``outputs``; ``axes`` names their leading dimensions."""

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
        for run, inputs, out in self.steps:
            slots[out] = run(*[slots[i] for i in inputs])
        return [slots[i] for i in self.outputs]

    def given(self, arrays: Mapping[str, Tensor]) -> Lowered:
        """The same function with some inputs fixed; whatever depends on them alone is computed now."""
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


class Compiler:
    """Turns nodes, laws and factors of a graph into steps; :meth:`finish` returns the function.

    Args:
        graph: the traced model.
        axes: leading axes of each variable's array, such as ``("k.level", "county")``.
        order: all axes, in the order that results have them (sample axes, then plates).
        dtype: of the run; constants follow it.
        device: of the run.
        masks: names of observed variables with missing entries; their mask is the input ``name@mask``.
        rules: ``"vmap"`` uses the fallback everywhere (a test compares the two).
    """

    def __init__(
        self,
        graph: Graph,
        axes: Mapping[str, tuple[str, ...]],
        order: Sequence[str],
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        masks: Sequence[str] = (),
        rules: Rules = "all",
    ) -> None:
        self.graph, self.axes, self.rules, self.masks = graph, axes, rules, frozenset(masks)
        self.rank = {axis: i for i, axis in enumerate(order)}
        self.dtype, self.device = dtype, torch.device(device)
        self.inputs: dict[str, int] = {}
        self.steps: list[Step] = []
        self.base: list[Any] = []
        self.memo: dict[Any, Operand] = {}
        self.aligned: dict[Any, int] = {}
        self.along: tuple[str, str] | None = None  # (ordered plate, "next") while a transition is compiled

    # ---- public ---------------------------------------------------------------------------------------------

    def density(self, factor: Factor) -> Operand:
        """Log-density of a factor, event axes summed. Of a chain: that of its first element."""
        if factor.law is None:
            return self._sum_event(self.operand(factor.value))
        if factor.chain is not None:
            value = self._variable(factor.name, "first", factor.chain[0])
        else:
            value = self.operand(factor.value)
        mask = self._mask(factor) if factor.kind == "conditional" else None
        return self._law_density(factor.law, value, mask)

    def transition(self, factor: Factor) -> Operand:
        """Log-density of every later element of a chain given the one before.

        Its particle axis for the previous element is the latent's axis with a prime; its chain plate is one shorter.
        """
        assert factor.chain is not None
        plate, law = factor.chain
        memo, self.memo = self.memo, {}
        self.along = (plate, "next")
        value = self._variable(factor.name, "next", plate)
        out = self._law_density(law, value, self._mask(factor))
        self.along, self.memo = None, memo
        return out

    def arguments(self, law: Law) -> list[Operand]:
        """The parameters of a law."""
        return [self.operand(a) for a in law.arguments]

    def later_arguments(self, law: Law, plate: str) -> list[Operand]:
        """The parameters of a transition law for every element of the ordered plate but the first."""
        memo, self.memo, self.along = self.memo, {}, (plate, "next")
        out = self.arguments(law)
        self.along, self.memo = None, memo
        return out

    def align(self, operand: Operand, axes: tuple[str, ...], event_ndim: int | None = None) -> Operand:
        """The operand with exactly ``axes`` in front (size one where absent) and ``event_ndim`` event axes."""
        event = operand.event_ndim if event_ndim is None else event_ndim
        return Operand(self._align(operand, axes, event), axes, event)

    def total(self, operand: Operand, axis: str) -> Operand:
        """The operand summed over an axis, when it has it."""
        if axis not in operand.axes:
            return operand
        at = operand.axes.index(axis)
        rest = tuple(a for a in operand.axes if a != axis)
        return operand._replace(slot=self._emit(lambda t: t.sum(at), (operand.slot,)), axes=rest)

    def finish(self, outputs: Sequence[Operand]) -> Lowered:
        """The function that computes ``outputs``."""
        return Lowered(
            tuple(o.axes for o in outputs),
            tuple(o.slot for o in outputs),
            dict(self.inputs),
            tuple(self.steps),
            list(self.base),
        )

    # ---- operands -------------------------------------------------------------------------------------------

    def operand(self, item: Any) -> Operand:
        """Compile a reference, or place a constant."""
        if isinstance(item, Ref):
            if item.id not in self.memo:
                self.memo[item.id] = self._node(self.graph.nodes[item.id])
            return self.memo[item.id]
        # Python numbers go to the run's dtype at once: by way of the default dtype they would lose digits.
        tensor = item if isinstance(item, Tensor) else torch.as_tensor(item, dtype=self.dtype)
        tensor = tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)
        return Operand(self._slot(tensor), (), tensor.ndim)

    def _slot(self, value: Any = None) -> int:
        self.base.append(value)
        return len(self.base) - 1

    def _emit(self, run: Callable[..., Any], inputs: Sequence[int]) -> int:
        out = self._slot()
        self.steps.append(Step(run, tuple(inputs), out))
        return out

    def _input(self, name: str) -> int:
        if name not in self.inputs:
            self.inputs[name] = self._slot()
        return self.inputs[name]

    def _node(self, node: Node) -> Operand:
        if node.op == "variable":
            narrowed = self.along is not None and self.along[0] in self.axes[node.name]
            return self._variable(node.name, "next" if narrowed else "", self.along[0] if self.along else "")
        if node.op == "previous":
            assert self.along is not None
            return self._variable(node.name, "previous", self.along[0])
        return getattr(self, f"_{node.op}")(node)

    def _variable(self, name: str, part: str, plate: str) -> Operand:
        axes = self.axes[name]
        event = len(self.graph.variables[name].event_shape)
        slot = self._input(name)
        if not part or plate not in axes:  # an enumerated chain has the same values everywhere
            axes = self._primed(axes) if part == "previous" else axes
            return Operand(*self._sorted(slot, axes, event), event)
        at = axes.index(plate)
        if part == "first":
            slot = self._emit(lambda t: t.select(at, 0), (slot,))
            axes = tuple(a for a in axes if a != plate)
        else:
            start = 1 if part == "next" else 0
            slot = self._emit(lambda t: t.narrow(at, start, t.shape[at] - 1), (slot,))
        if part == "previous":
            axes = self._primed(axes)
        return Operand(*self._sorted(slot, axes, event), event)

    def _primed(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        shared = {*self.graph.plates, "restart", "draw"}
        return tuple(a if a in shared else a + "'" for a in axes)

    def _sorted(self, slot: int, axes: tuple[str, ...], event: int) -> tuple[int, tuple[str, ...]]:
        wanted = tuple(sorted(axes, key=self.rank.__getitem__))
        if wanted == axes:
            return slot, axes
        order = [axes.index(a) for a in wanted] + [len(axes) + i for i in range(event)]
        return self._emit(lambda t: t.permute(order), (slot,)), wanted

    # ---- alignment ------------------------------------------------------------------------------------------

    def _joint_axes(self, operands: Sequence[Operand], plates: Sequence[str] | None = None) -> tuple[str, ...]:
        """Axes of a result: sample axes of all operands, and the finest plates they need."""
        union = {a for o in operands for a in o.axes}
        samples = {a for a in union if a not in self.graph.plates}
        present = union - samples
        finest = set(self.graph.maximal(frozenset(present)))
        for plate in plates or ():  # several ancestors of one plate meet in it, never in their grid
            covered = finest.intersection(self.graph.ancestors(plate))
            if covered and plate not in finest and len(covered) > 1:
                finest = (finest - covered) | {plate}
        return tuple(sorted(samples | finest, key=self.rank.__getitem__))

    def _align(self, operand: Operand, axes: tuple[str, ...], event_ndim: int | None = None) -> int:
        """Slot of the operand with exactly ``axes`` in front (size one where absent) and padded event axes."""
        event = operand.event_ndim if event_ndim is None else event_ndim
        key = (operand.slot, operand.axes, axes, event)
        if key not in self.aligned:
            self.aligned[key] = self._align_new(operand, axes, event)
        return self.aligned[key]

    def _align_new(self, operand: Operand, axes: tuple[str, ...], event: int) -> int:
        slot, have = operand.slot, operand.axes
        for plate in axes:
            lost = [a for a in have if a not in axes and a in self._ancestors(plate)]
            if lost:
                slot, have = self._lift(slot, have, lost, plate)
        stray = [a for a in have if a not in axes]
        assert not stray, f"axes {stray} of {have} do not fit {axes}"
        order = [have.index(a) for a in axes if a in have]
        index = tuple(slice(None) if a in have else None for a in axes) + (None,) * (event - operand.event_ndim)
        if order != sorted(order):
            full = order + [len(have) + i for i in range(operand.event_ndim)]
            slot = self._emit(lambda t: t.permute(full), (slot,))
        first = next((i for i, part in enumerate(index) if part is not None), len(index))
        index = index[first:]  # leading ones come from broadcasting
        return slot if None not in index else self._emit(lambda t: t[index], (slot,))

    def _ancestors(self, axis: str) -> tuple[str, ...]:
        return self.graph.ancestors(axis) if axis in self.graph.plates else ()

    def _lift(self, slot: int, have: tuple[str, ...], lost: list[str], plate: str) -> tuple[int, tuple[str, ...]]:
        """Replace ancestor axes by the axis of ``plate``, through its membership."""
        maps = [self._map(plate, a) for a in lost]
        dims = [have.index(a) for a in lost]
        rest = tuple(a for a in have if a not in lost)
        if len(lost) == 1:
            dim = dims[0]
            slot = self._emit(lambda t, m: t.index_select(dim, m), (slot, *maps))
            return slot, tuple(plate if a == lost[0] else a for a in have)
        others = [i for i in range(len(have)) if i not in dims]

        def pick(t: Tensor, *members: Tensor) -> Tensor:
            tail = range(len(have), t.ndim)
            return t.permute(*dims, *others, *tail)[members]

        return self._emit(pick, (slot, *maps)), (plate, *rest)

    def _map(self, child: str, ancestor: str) -> int:
        slot = self._input(map_name(child, ancestor))
        if self.along is not None and child == self.along[0]:
            return self._emit(lambda m: m[1:], (slot,))
        return slot

    # ---- nodes ----------------------------------------------------------------------------------------------

    def _call(self, node: Node) -> Operand:
        name = node.name.removesuffix("_") if not node.name.startswith("__") else node.name
        operands = [self.operand(Ref(i)) for i in node.operands()]
        edges = _joint_edges(operands)
        if self.rules == "all":
            made = self._by_table(node, name, operands)
            if made is not None:
                return made._replace(edges=edges)
        return self._by_vmap(node, operands)._replace(edges=edges)

    def _by_table(self, node: Node, name: str, operands: list[Operand]) -> Operand | None:
        if name in operations.POINTWISE:
            return self._pointwise(node, operands)
        if name == "getitem":
            return self._getitem(node, operands)
        if name in operations.REDUCTIONS and len(operands) == 1 and isinstance(node.args[0], Ref):
            run = operations.reduction(name, node.func, node.args, node.kwargs, operands[0].event_ndim)  # type: ignore[arg-type]
            return None if run is None else self._apply(run, operands, node)
        if name in ("stack", "cat", "concat", "concatenate"):
            return self._join(node, name)
        if name in ("matmul", "__matmul__", "__rmatmul__", "mv", "mm", "dot", "vdot", "inner", "vecdot"):
            return self._matmul(node, name)
        if name == "linear" and all(isinstance(a, Ref) for a in node.args if a is not None) and not node.kwargs:
            if operands[0].event_ndim == 1 and operands[1].event_ndim == 2:
                return self._apply(operations.linear, operands, node)
        if name == "einsum" and isinstance(node.args[0], str) and "..." not in node.args[0]:
            parts = [self.operand(a) for a in _flat(node.args[1:])]
            return self._apply(partial(torch.einsum, operations.einsum(node.args[0])), parts, node)
        return None

    def _apply(self, run: Callable[..., Tensor], operands: Sequence[Operand], node: Node) -> Operand:
        """A call that keeps leading axes: align each operand, leave its event alone."""
        axes = self._joint_axes(operands, node.plates)
        slots = [self._align(o, axes) for o in operands]
        return Operand(self._emit(run, slots), axes, len(node.event_shape))

    def _pointwise(self, node: Node, operands: list[Operand]) -> Operand:
        # Tensor constants take part in the broadcasting of events; Python numbers pass as they are.
        event = len(node.event_shape)
        axes = self._joint_axes(operands, node.plates)
        slots: list[int] = []

        def place(leaf: Any) -> Any:
            if isinstance(leaf, (Ref, Tensor)):
                slots.append(self._align(self.operand(leaf), axes, event))
                return Ref(len(slots) - 1)
            return self._dtype(leaf)

        template = substitute((node.args, node.kwargs), place)
        return Operand(self._emit(_caller(node.func, *template), slots), axes, event)

    def _dtype(self, leaf: Any) -> Any:
        # x.to(torch.float32), x.float(): floating dtypes are the run's
        return self.dtype if isinstance(leaf, torch.dtype) and leaf.is_floating_point else leaf

    def _getitem(self, node: Node, operands: list[Operand]) -> Operand:
        x, index = node.args
        axes = self._joint_axes(operands, node.plates)
        if isinstance(index, Ref):
            slots = [self._align(operands[0], axes), self._align(self.operand(index), axes)]
            run: Callable[..., Tensor] = partial(operations.index_by_value, n=len(axes))
            slots[0] = self._full_rank(slots[0], operands[0], axes)
            slots[1] = self._full_rank(slots[1], self.operand(index), axes)
            return Operand(self._emit(run, slots), axes, len(node.event_shape))
        index = substitute(index, lambda leaf: leaf.to(self.device) if isinstance(leaf, Tensor) else leaf)
        x_operand = self.operand(x)
        run = operations.index_event(index, len(x_operand.axes))
        return Operand(self._emit(run, (x_operand.slot,)), x_operand.axes, len(node.event_shape))

    def _full_rank(self, slot: int, operand: Operand, axes: tuple[str, ...]) -> int:
        """Leading ones spelled out, for calls that count dimensions from the front."""
        rank = len(axes) + operand.event_ndim
        return self._emit(lambda t: t[(None,) * (rank - t.ndim)] if t.ndim < rank else t, (slot,))

    def _join(self, node: Node, name: str) -> Operand | None:
        parts = [self.operand(a) for a in node.args[0]]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
        rank = parts[0].event_ndim + (name == "stack")
        if any(p.event_ndim != parts[0].event_ndim for p in parts):
            return None
        at = dim - rank if dim >= 0 else dim
        join = torch.stack if name == "stack" else torch.cat
        axes = self._joint_axes(parts, node.plates)
        slots = [self._full_rank(self._align(p, axes), p, axes) for p in parts]
        n = len(axes)

        def run(*tensors: Tensor) -> Tensor:
            lead = torch.broadcast_shapes(*(t.shape[:n] for t in tensors))
            return join([t.expand((*lead, *t.shape[n:])) for t in tensors], dim=at)

        return Operand(self._emit(run, slots), axes, rank)

    def _matmul(self, node: Node, name: str) -> Operand | None:
        a, b = (self.operand(x) for x in node.args[:2])
        if name == "__rmatmul__":
            a, b = b, a
        if not (1 <= a.event_ndim <= 2 and 1 <= b.event_ndim <= 2) or (name == "inner" and max(a[2], b[2]) > 1):
            return None
        return self._apply(operations.matmul(a.event_ndim, b.event_ndim), (a, b), node)

    def _by_vmap(self, node: Node, operands: list[Operand]) -> Operand:
        slots: list[int] = []
        parts: list[Operand] = []

        def place(leaf: Any) -> Any:
            if isinstance(leaf, (Ref, Tensor)):
                parts.append(self.operand(leaf))
                return Ref(len(parts) - 1)
            return self._dtype(leaf)

        template = substitute((node.args, node.kwargs), place)
        axes = self._joint_axes(operands, node.plates)
        lifted = [self._only(p, axes) for p in parts]
        slots = [p.slot for p in lifted]
        run = operations.mapped(_caller(node.func, *template), [[a in p.axes for p in lifted] for a in axes])
        return Operand(self._emit(partial(_explained, run, node), slots), axes, len(node.event_shape))

    def _only(self, operand: Operand, axes: tuple[str, ...]) -> Operand:
        """Lifted and permuted to the order of ``axes``, absent axes left out."""
        have = tuple(
            a for a in axes if a in operand.axes or any(h in self._ancestors(a) and h not in axes for h in operand.axes)
        )
        return operand._replace(slot=self._align(operand, have), axes=have)

    def _item(self, node: Node) -> Operand:
        whole, position = node.args
        source = self.operand(whole)
        return Operand(
            self._emit(lambda parts: parts[position], (source.slot,)), source.axes, len(node.event_shape), source.edges
        )

    def _gather(self, node: Node) -> Operand:
        x, index = (self.operand(a) for a in node.args)
        plate = node.name
        rest = tuple(a for a in x.axes if a != plate)
        at, event = x.axes.index(plate), x.event_ndim
        if not set(rest) & set(index.axes) and not self._related(rest, index.axes):
            n = len(index.axes)

            def select(t: Tensor, i: Tensor) -> Tensor:
                return t.movedim(at, 0)[i.long()]

            slot = self._emit(select, (x.slot, index.slot))
            axes = (*index.axes, *rest)
            assert n == len(index.axes)
            return Operand(*self._sorted(slot, axes, event), event)
        moved = self._emit(lambda t: t.movedim(at, len(rest)), (x.slot,))
        source = Operand(moved, rest, event + 1)
        axes = self._joint_axes((source, index), node.plates)
        slots = [
            self._full_rank(self._align(source, axes), source, axes),
            self._full_rank(self._align(index, axes), index, axes),
        ]
        return Operand(self._emit(partial(operations.index_by_value, n=len(axes)), slots), axes, event)

    def _related(self, left: Sequence[str], right: Sequence[str]) -> bool:
        return any(b in self._ancestors(a) or a in self._ancestors(b) for a in left for b in right)

    def _reduce(self, node: Node) -> Operand:
        x, kind = self.operand(node.args[0]), node.args[1]
        return self._over_plate(x, node, kind)

    def _dot(self, node: Node) -> Operand:
        a, b = (self.operand(x) for x in node.args)
        groups = self._groups(node)
        if not groups and a.event_ndim == b.event_ndim == 0 and node.name in a.axes and node.name in b.axes:
            return self._contracted(a, b, node.name)
        axes = self._joint_axes((a, b), None)
        event = len(node.event_shape)
        slot = self._emit(torch.mul, [self._align(o, axes, event) for o in (a, b)])
        return self._over_plate(Operand(slot, axes, event), node, "sum")

    def _contracted(self, a: Operand, b: Operand, plate: str) -> Operand:
        union = tuple(sorted({*a.axes, *b.axes}, key=self.rank.__getitem__))
        letters = {axis: chr(97 + i) for i, axis in enumerate(union)}
        out = tuple(x for x in union if x != plate)
        spell = ["".join(letters[x] for x in axes) for axes in (a.axes, b.axes, out)]
        equation = f"{spell[0]},{spell[1]}->{spell[2]}"
        return Operand(self._emit(partial(torch.einsum, equation), (a.slot, b.slot)), out, 0)

    def _groups(self, node: Node) -> tuple[str, ...]:
        """Ancestors of the reduced plate that stay as axes of the result."""
        return tuple(p for p in self.graph.plates[node.name].parents if p in node.plates or self._covered(p, node.plates))

    def _covered(self, plate: str, plates: tuple[str, ...]) -> bool:
        return any(plate in self.graph.ancestors(p) for p in plates)

    def _over_plate(self, x: Operand, node: Node, kind: str) -> Operand:
        plate = node.name
        at = x.axes.index(plate)
        groups = self._groups(node)
        rest = tuple(a for a in x.axes if a != plate)
        if not groups:
            run: Callable[..., Tensor] = {
                "sum": lambda t: t.sum(at),
                "mean": lambda t: t.mean(at),
                "logsumexp": lambda t: t.logsumexp(at),
            }[kind]
            return Operand(self._emit(run, (x.slot,)), rest, x.event_ndim)
        if len(groups) > 1:
            raise UnsupportedError(
                f"{kind} over plate '{plate}' ({node.where}) inside two of its parents {groups} is not supported. "
                "Open one of them."
            )
        sizes = self.graph.plates[groups[0]].size
        slot = self._emit(partial(_segment, kind, at, sizes), (x.slot, self._map(plate, groups[0])))
        axes = tuple(groups[0] if a == plate else a for a in x.axes)
        return Operand(*self._sorted(slot, axes, x.event_ndim), x.event_ndim)

    def _pick(self, node: Node) -> Operand:
        x = self.operand(node.args[0])
        at, position = x.axes.index(node.name), node.args[1]
        rest = tuple(a for a in x.axes if a != node.name)
        return Operand(self._emit(lambda t: t.select(at, position), (x.slot,)), rest, x.event_ndim)

    def _shift(self, node: Node) -> Operand:
        x, k = self.operand(node.args[0]), node.args[1]
        at = x.axes.index(node.name)
        slot = self._emit(lambda t: t.roll(-k, at), (x.slot,))
        lost = (node.name, max(-k, 0), max(k, 0))
        return Operand(slot, x.axes, x.event_ndim, _joint_edges([x], [lost]))

    def _collect(self, node: Node) -> Operand:
        """Plate axes move behind all other axes, in front of the event, in the order of the node's name."""
        x, names = self.operand(node.args[0]), node.name.split(",")
        rest = tuple(a for a in x.axes if a not in names)
        tail = range(len(x.axes), len(x.axes) + x.event_ndim)
        order = [x.axes.index(a) for a in (*rest, *names)] + list(tail)
        slot = self._emit(lambda t: t.permute(order), (x.slot,))
        return Operand(slot, rest, x.event_ndim + len(names), x.edges)

    # ---- densities ------------------------------------------------------------------------------------------

    def _law_density(self, law: Law, value: Operand, mask: Operand | None) -> Operand:
        arguments = self.arguments(law)
        family = law.family
        leaves = family.leaves()
        batch = value.event_ndim - family.event_dim
        everything = [value, *arguments] + ([mask] if mask else [])
        axes = self._joint_axes(everything)
        edges = _joint_edges(everything)
        ranks = [batch + leaf.event_dim for leaf in leaves]
        if getattr(family, "needs_vmap", False):
            return self._vmapped_density(law, value, arguments, mask)
        if mask is None and self._is_inner_product(law, value, arguments):
            return self._inner_product(value, arguments, axes)._replace(edges=edges)
        slots = [self._align(value, axes)]
        slots += [self._align(a, axes, max(r, a.event_ndim)) for a, r in zip(arguments, ranks, strict=True)]
        if mask is not None:
            slots.append(self._align(mask, axes))
        run = partial(_evaluate, family, batch, mask is not None)
        return self._masked_edges(Operand(self._emit(run, slots), axes, 0, edges))

    def _is_inner_product(self, law: Law, value: Operand, arguments: list[Operand]) -> bool:
        """A Normal on vectors whose value and parameters have sample axes of their own: a matrix product."""
        if type(law.family) is not Normal or value.event_ndim != 1 or self.rules != "all":
            return False
        others = {a for o in arguments for a in o.axes}
        return bool(set(value.axes) - others) and bool(others - set(value.axes))

    def _inner_product(self, value: Operand, arguments: list[Operand], axes: tuple[str, ...]) -> Operand:

        both = self._joint_axes(arguments)
        slots = [self._align(a, both, 1) for a in arguments]
        shared = tuple(a for a in axes if a in value.axes and a in both)
        rows = tuple(a for a in value.axes if a not in shared)
        columns = tuple(a for a in both if a not in shared)
        v_order = [value.axes.index(a) for a in (*shared, *rows)] + [len(value.axes)]
        p_order = [both.index(a) for a in (*shared, *columns)] + [len(both)]
        made = (*shared, *rows, *columns)
        back = [made.index(a) for a in axes]
        counts = len(shared), len(rows), len(both)
        run = partial(_normal_inner_product, v_order, p_order, back, counts)
        return Operand(self._emit(run, (value.slot, *slots)), axes, 0)

    def _vmapped_density(self, law: Law, value: Operand, arguments: list[Operand], mask: Operand | None) -> Operand:
        operands = [value, *arguments]
        axes = self._joint_axes(operands)
        lifted = [self._only(o, axes) for o in operands]

        def one(x: Tensor, *leaves: Tensor) -> Tensor:
            return law.family.replace(leaves).log_prob(x).sum()

        run = operations.mapped(one, [[a in o.axes for o in lifted] for a in axes])
        out = Operand(self._emit(run, [o.slot for o in lifted]), axes, 0, _joint_edges(operands))
        if mask is not None:
            keep = self._emit(lambda m: m.flatten(len(mask.axes)).all(-1) if m.ndim > len(mask.axes) else m, (mask.slot,))
            slots = [self._align(out, axes), self._align(Operand(keep, mask.axes, 0), axes)]
            out = out._replace(slot=self._emit(lambda lp, m: torch.where(m, lp, 0.0), slots))
        return self._masked_edges(out)

    def _masked_edges(self, out: Operand) -> Operand:
        for plate, start, end in out.edges:
            at = out.axes.index(plate)
            out = out._replace(slot=self._emit(partial(_drop_edges, at - len(out.axes), start, end), (out.slot,)))
        return out._replace(edges=())

    def _mask(self, factor: Factor) -> Operand | None:
        if factor.name not in self.masks:
            return None
        variable = self.graph.variables[factor.name]
        if self.along is not None or factor.chain is not None:
            raise UnsupportedError(
                f"'{factor.name}': missing entries in an observed Markov chain are not supported. Make the chain a latent "
                "and observe it through a law of its own."
            )
        slot = self._input(factor.name + "@mask")
        axes, event = self.axes[factor.name], len(variable.event_shape)
        return Operand(*self._sorted(slot, axes, event), event)

    def _sum_event(self, x: Operand) -> Operand:
        if x.event_ndim == 0:
            return self._masked_edges(x)
        dims = tuple(range(-x.event_ndim, 0))
        return self._masked_edges(x._replace(slot=self._emit(lambda t: t.sum(dims), (x.slot,)), event_ndim=0))


def map_name(child: str, ancestor: str) -> str:
    """Input name of a membership.

    >>> map_name("house", "county")
    'house->county'
    """
    return f"{child}->{ancestor}"


def variables_of(graph: Graph, factor: Factor) -> frozenset[str]:
    """Every variable that the density of a factor reads, covariates included."""
    found: set[str] = set()
    laws = [factor.law, factor.chain[1] if factor.chain else None]
    queue = list(refs((factor.value, *(law.arguments for law in laws if law))))
    seen: set[int] = set()
    while queue:
        node = graph.nodes[queue.pop()]
        if node.id in seen:
            continue
        seen.add(node.id)
        if node.op in ("variable", "previous"):
            found.add(node.name)
        queue.extend(node.operands())
    return frozenset(found)


def _evaluate(family: Any, batch: int, masked: bool, value: Tensor, *rest: Tensor) -> Tensor:
    leaves, mask = (rest[:-1], rest[-1]) if masked else (rest, None)
    density = family.replace(leaves).log_prob(value)
    if mask is not None:
        if family.event_dim:  # a joint event counts only when all of it is there
            mask = mask.flatten(mask.ndim - family.event_dim).all(-1)
        density = torch.where(mask, density, 0.0)
    return density.sum(tuple(range(-batch, 0))) if batch else density


def _normal_inner_product(
    v_order: list[int],
    p_order: list[int],
    back: list[int],
    counts: tuple[int, int, int],
    value: Tensor,
    loc: Tensor,
    scale: Tensor,
) -> Tensor:
    """Sum over the event of log N(z; m, s) as ``[z, z^2] @ [m / s^2, -1 / (2 s^2)] + constant``.

    Centred at the mean location, so that the squares stay small where precision matters.
    """
    shared, _, n_params = counts
    precision = scale.pow(-2)
    pad = n_params + 1
    loc, precision = loc[(None,) * (pad - loc.ndim)], precision[(None,) * (pad - precision.ndim)]
    centre = loc.reshape(-1, loc.shape[-1]).mean(0)
    z, m = value - centre, loc - centre
    linear = m * precision
    constant = (0.5 * precision.log() - _HALF_LOG_2PI - 0.5 * m * linear).sum(-1, keepdim=True)
    lead = torch.broadcast_shapes(linear.shape[:-1], precision.shape[:-1])
    natural = torch.cat([t.expand(*lead, -1) for t in (linear, -0.5 * precision, constant)], -1).permute(p_order)
    statistics = torch.cat([z, z.square(), torch.ones_like(z[..., :1])], -1).permute(v_order)
    lead = torch.broadcast_shapes(statistics.shape[:shared], natural.shape[:shared])
    row_shape, column_shape = statistics.shape[shared:-1], natural.shape[shared:-1]
    left = statistics.expand(*lead, *row_shape, -1).reshape(*lead, -1, statistics.shape[-1])
    right = natural.expand(*lead, *column_shape, -1).reshape(*lead, -1, natural.shape[-1])
    return (left @ right.mT).reshape(*lead, *row_shape, *column_shape).permute(back)


def _segment(kind: str, at: int, size: int, x: Tensor, members: Tensor) -> Tensor:
    shape = list(x.shape)
    shape[at] = size
    if kind == "logsumexp":
        index = members.reshape([-1 if i == at else 1 for i in range(x.ndim)]).expand_as(x)
        top = torch.full(shape, -torch.inf, dtype=x.dtype, device=x.device).scatter_reduce(at, index, x, "amax")
        safe = torch.where(top.isfinite(), top, 0.0)
        total = torch.zeros(shape, dtype=x.dtype, device=x.device)
        return total.index_add(at, members, (x - safe.index_select(at, members)).exp()).log() + safe
    total = torch.zeros(shape, dtype=x.dtype, device=x.device).index_add(at, members, x)
    if kind == "mean":
        count = torch.bincount(members, minlength=size).clamp(min=1).to(x.dtype)
        total = total / count.reshape([-1 if i == at else 1 for i in range(x.ndim)])
    return total


def _drop_edges(at: int, start: int, end: int, density: Tensor) -> Tensor:
    size = density.shape[at]
    place = torch.arange(size, device=density.device)
    keep = (place >= start) & (place < size - end)
    return torch.where(keep.reshape(-1, *(1,) * (-at - 1)), density, 0.0)


def _joint_edges(
    operands: Sequence[Operand], more: Sequence[tuple[str, int, int]] = ()
) -> tuple[tuple[str, int, int], ...]:
    lost: dict[str, tuple[int, int]] = {}
    for plate, start, end in [e for o in operands for e in o.edges] + list(more):
        before = lost.get(plate, (0, 0))
        lost[plate] = (max(start, before[0]), max(end, before[1]))
    return tuple((p, s, e) for p, (s, e) in lost.items())


def _flat(args: Sequence[Any]) -> list[Any]:
    return list(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list)) else list(args)


def _caller(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """A function of the operands alone; constants are closed over."""
    if not kwargs and all(isinstance(a, Ref) for a in args):
        if [a.id for a in args] == list(range(len(args))):
            return func
    if not kwargs and len(args) == 2 and isinstance(args[0], Ref) and not isinstance(args[1], (Ref, tuple, list)):
        constant = args[1]
        return lambda x: func(x, constant)

    def call(*tensors: Any) -> Any:
        def fill(leaf: Any) -> Any:
            return tensors[leaf.id] if isinstance(leaf, Ref) else leaf

        return func(*substitute(args, fill), **substitute(kwargs, fill))

    return call


def _explained(run: Callable[..., Any], node: Node, *tensors: Tensor) -> Any:
    try:
        return run(*tensors)
    except RuntimeError as error:
        raise UnsupportedError(
            f"torch.{node.name} ({node.where}) cannot be evaluated for many elements at once: {error}. "
            "Write it with other torch functions, or compute it outside the model and pass it as data."
        ) from None
