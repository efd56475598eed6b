"""Compile the nodes of a graph: torch calls by the rules of :mod:`ppl.operations`, and the words of
the language that act along plates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl import operations
from ppl.errors import UnsupportedError
from ppl.graph import Node, Ref, substitute
from ppl.lowered import Operand, joint_edges, map_name
from ppl.shapes import broadcast_shapes

if TYPE_CHECKING:
    from ppl.lower import Compiler

_JOINS = frozenset(("stack", "cat", "concat", "concatenate"))
_MATMULS = frozenset("matmul __matmul__ __rmatmul__ mv mm dot vdot inner vecdot".split())
_TIMES = frozenset("mul multiply __mul__ __rmul__".split())
# Event ranks of both sides -> the product as an einsum.
_PRODUCTS = {(1, 1): "i,i->", (2, 1): "ij,j->i", (1, 2): "i,ij->j", (2, 2): "ij,jk->ik"}


def compile_node(c: Compiler, node: Node) -> Operand:
    """The operand that holds the result of a node."""
    return _given_function(c, node) if node.id in c.replaced else _OPS[node.op](c, node)


def _given_function(c: Compiler, node: Node) -> Operand:
    """A node whose function is an input of the run, called with operands ``[*axes, *event]``."""
    name, ids = c.replaced[node.id]
    operands = [c.operand(Ref(i)) for i in ids]
    axes = c.joint_axes(operands, node.plates)
    slots = [c.spelled_out(o, axes) for o in operands]
    slot = c.emit(lambda run, *tensors: run(*tensors), c.input(name), *slots)
    return Operand(slot, axes, len(node.event_shape), joint_edges(operands))


# ---- torch calls ---------------------------------------------------------------------------------


def _call(c: Compiler, node: Node) -> Operand:
    operands = [c.operand(Ref(i)) for i in node.operands()]
    made = _by_table(c, node, operands) if c.rules == "all" else None
    made = made or _by_vmap(c, node, operands)
    return made._replace(edges=joint_edges(operands))


def _by_table(c: Compiler, node: Node, operands: list[Operand]) -> Operand | None:
    name = node.name
    first = node.args[0] if node.args else None
    if hasattr(node.func, "lower"):  # a function that brings its own rule
        return node.func.lower(c, node, operands)  # type: ignore[union-attr, no-any-return]
    if isinstance(node.func, operations.Batched):
        return _batched(c, node, node.func, operands)
    if name in operations.POINTWISE:
        return _pointwise(c, node, operands)
    if name == "getitem":
        return _getitem(c, node, operands)
    if name in operations.REDUCTIONS and len(operands) == 1 and isinstance(first, Ref):
        assert node.func is not None
        if name == "sum" and (made := _inner(c, node, c.graph.nodes[first.id])) is not None:
            return made
        event = operands[0].event_ndim
        run = operations.reduction(name, node.func, node.args, node.kwargs, event)
        return None if run is None else _apply(c, run, operands, node)
    if name in _JOINS and isinstance(first, (tuple, list)):
        return _join(c, node)
    if name in _MATMULS and len(node.args) == 2:
        return _matmul(c, node)
    if name == "linear" and isinstance(first, Ref) and len(node.args) > 1:
        return _linear(c, node)
    if name == "einsum" and isinstance(first, str) and "..." not in first:
        return _einsum(c, node, [c.operand(a) for a in _flat(node.args[1:])], first)
    return None


def _apply(
    c: Compiler, run: Callable[..., Tensor], operands: Sequence[Operand], node: Node
) -> Operand:
    """A call that keeps leading axes: align each operand, leave its event alone."""
    axes = c.joint_axes(operands, node.plates)
    slot = c.emit(run, *(c.place(o, axes) for o in operands))
    return Operand(slot, axes, len(node.event_shape))


def _pointwise(
    c: Compiler,
    node: Node,
    operands: list[Operand],
    of: Callable[[Any], Operand] | None = None,
) -> Operand:
    # Tensor constants take part in the broadcasting of events; Python numbers pass as they are.
    event = len(node.event_shape)
    axes = c.joint_axes(operands, node.plates if of is None else ())
    slots: list[int] = []

    def place(leaf: Any) -> Any:
        if isinstance(leaf, (Ref, Tensor)):
            slots.append(c.place((of or c.operand)(leaf), axes, event))
            return Ref(len(slots) - 1)
        return _in_dtype(c, leaf)

    template = substitute((node.args, node.kwargs), place)
    return Operand(c.emit(_caller(node.func, *template), *slots), axes, event)


def _batched(c: Compiler, node: Node, func: operations.Batched, operands: list[Operand]) -> Operand:
    """A function that broadcasts leading axes itself, those of an event of several elements too."""
    event = len(node.event_shape)
    own = event - func.output
    axes = c.joint_axes(operands, node.plates)
    slots = [
        c.place(c.operand(a), axes, own + len(shape))
        for a, shape in zip(node.args, func.inputs, strict=True)
    ]
    run: Callable[..., Tensor] = func
    if c.training and func.train is not None:  # statistics over the elements of a batch
        dims = tuple(i - len(axes) - event for i, a in enumerate(axes) if a in node.plates)
        run = partial(func.train, dims)
    return Operand(c.emit(run, *slots), axes, event)


def _getitem(c: Compiler, node: Node, operands: list[Operand]) -> Operand | None:
    x, index = c.operand(node.args[0]), node.args[1]
    if isinstance(index, Ref):
        axes = c.joint_axes(operands, node.plates)
        slots = [c.spelled_out(o, axes) for o in (x, c.operand(index))]
        slot = c.emit(partial(operations.index_by_value, n=len(axes)), *slots)
        return Operand(slot, axes, len(node.event_shape))
    parts = index if isinstance(index, tuple) else (index,)
    if sum(not isinstance(p, (int, slice, type(None), type(...))) for p in parts) > 1:
        return None  # several index arrays: torch may move their axis in front of all others
    index = substitute(index, lambda i: i.to(c.device) if isinstance(i, Tensor) else i)
    slot = c.emit(operations.index_event(index, len(x.axes)), x.slot)
    return Operand(slot, x.axes, len(node.event_shape))


def _join(c: Compiler, node: Node) -> Operand | None:
    parts = [c.operand(a) for a in node.args[0]]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    rank = parts[0].event_ndim + (node.name == "stack")
    if any(p.event_ndim != parts[0].event_ndim for p in parts):
        return None
    at = dim - rank if dim >= 0 else dim
    join = torch.stack if node.name == "stack" else torch.cat
    axes = c.joint_axes(parts, node.plates)
    n = len(axes)

    def run(*tensors: Tensor) -> Tensor:
        lead = broadcast_shapes(*(t.shape[:n] for t in tensors))
        return join([t.expand((*lead, *t.shape[n:])) for t in tensors], dim=at)

    return Operand(c.emit(run, *(c.spelled_out(p, axes) for p in parts)), axes, rank)


def _matmul(c: Compiler, node: Node) -> Operand | None:
    a, b = (c.operand(x) for x in node.args)
    if node.name == "__rmatmul__":
        a, b = b, a
    ranks = a.event_ndim, b.event_ndim
    if ranks not in _PRODUCTS or (node.name in ("inner", "vecdot") and ranks != (1, 1)):
        return None
    return _einsum(c, node, (a, b), _PRODUCTS[ranks])


def _inner(c: Compiler, node: Node, product: Node) -> Operand | None:
    """The sum of a product of two vectors, without the array of all products where either has axes of its own."""
    plain = product.op == "call" and product.name in _TIMES and product.id not in c.replaced
    alone = len(node.args) < 3 and set(node.kwargs) <= {"dim", "axis"}
    if not (plain and alone) or len(product.args) != 2 or product.kwargs:
        return None
    if not all(isinstance(x, Ref) for x in product.args):
        return None
    if any(c.graph.nodes[x.id].event_shape != product.event_shape for x in product.args):
        return None
    a, b = (c.operand(x) for x in product.args)
    if a.event_ndim != 1 or b.event_ndim != 1 or not set(a.axes) - set(b.axes):
        return None
    if not set(b.axes) - set(a.axes):
        return None
    axes = c.joint_axes((a, b), node.plates)
    return Operand(c.emit(operations.inner, *(c.spelled_out(x, axes) for x in (a, b))), axes, 0)


def _linear(c: Compiler, node: Node) -> Operand | None:
    """``torch.nn.functional.linear``; weights may have axes of their own."""
    given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
    x, weight = c.operand(given["input"]), c.operand(given["weight"])
    if x.event_ndim not in (1, 2) or weight.event_ndim != 2:
        return None
    rows = "n" * (x.event_ndim - 1)
    product = _einsum(c, node, (x, weight), f"{rows}i,oi->{rows}o")
    if given.get("bias") is None:
        return product
    bias, event = (
        c.operand(given["bias"]),
        x.event_ndim,
    )  # the bias stands along the last event axis
    axes = c.joint_axes((product, bias), node.plates)
    slot = c.emit(torch.add, c.place(product, axes), c.place(bias, axes, event))
    return Operand(slot, axes, event)


def _einsum(c: Compiler, node: Node, parts: Sequence[Operand], equation: str) -> Operand:
    """A product of events; each axis stands only with the operands that have it."""
    axes = c.joint_axes(parts, node.plates)
    lifted = [c.lifted(p, axes) for p in parts]
    full = operations.einsum(equation, [p.axes for p in lifted], axes)
    slot = c.emit(partial(torch.einsum, full), *(p.slot for p in lifted))
    return Operand(slot, axes, len(node.event_shape))


def _by_vmap(c: Compiler, node: Node, operands: list[Operand]) -> Operand:
    parts: list[Operand] = []

    def place(leaf: Any) -> Any:
        if isinstance(leaf, (Ref, Tensor)):
            parts.append(c.operand(leaf))
            return Ref(len(parts) - 1)
        return _in_dtype(c, leaf)

    template = substitute((node.args, node.kwargs), place)
    axes = c.joint_axes(operands, node.plates)
    lifted = [c.lifted(p, axes) for p in parts]
    has = [[a in p.axes for p in lifted] for a in axes]
    by_value = node.name == "getitem" and isinstance(node.args[1], Ref)
    func = partial(operations.index_by_value, n=0) if by_value else node.func
    run = operations.mapped(_caller(func, *template), has)
    slot = c.emit(partial(_explained, run, node), *(p.slot for p in lifted))
    return Operand(slot, axes, len(node.event_shape))


def _in_dtype(c: Compiler, leaf: Any) -> Any:
    """``x.to(torch.float64)``: floating dtypes are the run's."""
    return c.dtype if isinstance(leaf, torch.dtype) and leaf.is_floating_point else leaf


def _item(c: Compiler, node: Node) -> Operand:
    source, position = c.operand(node.args[0]), node.args[1]
    slot = c.emit(lambda parts: parts[position], source.slot)
    return Operand(slot, source.axes, len(node.event_shape), source.edges)


# ---- along plates --------------------------------------------------------------------------------


def _gather(c: Compiler, node: Node) -> Operand:
    x, index = c.whole(node.args[0], node.name), c.operand(node.args[1])
    edges = joint_edges([x, index])
    _refuse_edges(node, x)
    at, event = x.axes.index(node.name), index.event_ndim + x.event_ndim
    rest = tuple(a for a in x.axes if a != node.name)
    if not set(rest) & set(index.axes) and not c.related(rest, index.axes):
        slot = c.emit(partial(_select, at, len(rest), index.event_ndim), x.slot, index.slot)
        return c.ordered(Operand(slot, (*index.axes, *rest), event, edges))
    moved = c.emit(lambda t: t.movedim(at, len(rest)), x.slot)
    source = Operand(moved, rest, x.event_ndim + 1)
    axes = c.joint_axes((source, index), node.plates)
    slots = [c.spelled_out(o, axes) for o in (source, index)]
    slot = c.emit(partial(operations.index_by_value, n=len(axes)), *slots)
    return Operand(slot, axes, event, edges)


def _select(at: int, rest: int, index_event: int, x: Tensor, index: Tensor) -> Tensor:
    picked = x.movedim(at, 0)[index.long()]  # [*index axes, *index event, *rest, *x event]
    lead = index.ndim - index_event
    source = range(lead + index_event, lead + index_event + rest)
    return picked.movedim(tuple(source), tuple(range(lead, lead + rest)))


def _reduce(c: Compiler, node: Node) -> Operand:
    return _over_plate(c, c.whole(node.args[0], node.name), node, node.args[1])


def _dot(c: Compiler, node: Node) -> Operand:
    a, b = (c.whole(x, node.name) for x in node.args)
    edges = joint_edges([a, b])
    if not edges and not _groups(c, node) and a.event_ndim == b.event_ndim == 0:
        axes = c.joint_axes((a, b), node.plates)
        out = tuple(x for x in axes if x != node.name)
        lifted = [c.lifted(o, axes) for o in (a, b)]
        equation = operations.einsum(",->", [o.axes for o in lifted], out)
        slot = c.emit(partial(torch.einsum, equation), *(o.slot for o in lifted))
        return Operand(slot, out, 0)
    axes, event = c.joint_axes((a, b), node.plates), len(node.event_shape)
    slot = c.emit(torch.mul, *(c.place(o, axes, event) for o in (a, b)))
    return _over_plate(c, Operand(slot, axes, event, edges), node, "sum")


def _groups(c: Compiler, node: Node) -> tuple[str, ...]:
    """Ancestors of the reduced plate that stay as axes of the result."""
    above = c.graph.ancestors(node.name)
    return tuple(p for p in above if p in node.plates)


def _over_plate(c: Compiler, x: Operand, node: Node, kind: str) -> Operand:
    plate, groups = node.name, _groups(c, node)
    at, rest = x.axes.index(plate), tuple(a for a in x.axes if a != plate)
    keep = {p: (start, end) for p, start, end in x.edges}.get(plate, (0, 0))
    edges = tuple(e for e in x.edges if e[0] != plate)
    slot = c.emit(partial(_narrowed, at, keep), x.slot) if any(keep) else x.slot
    if not groups:
        run = partial(_REDUCTIONS[kind], dim=at)
        return Operand(c.emit(run, slot), rest, x.event_ndim, edges)
    if len(groups) > 1 or c.related(rest, groups):
        raise UnsupportedError(
            f"{kind} over plate '{plate}' ({node.where}) inside {' and '.join(groups)} is not "
            "supported for a value that varies over another plate of theirs. Open one plate, and "
            "reduce one after the other."
        )
    members = c.input(map_name(plate, groups[0]))
    members = c.emit(partial(_narrowed, 0, keep), members) if any(keep) else members
    size = c.graph.plates[groups[0]].size
    assert size is not None
    slot = c.emit(partial(_segment, kind, at, size), slot, members)
    axes = tuple(groups[0] if a == plate else a for a in x.axes)
    made = c.ordered(Operand(slot, axes, x.event_ndim, edges))
    return _cut(c, made) if c.along == groups[0] else made


def _cut(c: Compiler, x: Operand) -> Operand:
    """Without the first element of the plate that a transition runs along."""
    assert c.along is not None
    at = x.axes.index(c.along)
    return x._replace(slot=c.emit(lambda t: t.narrow(at, 1, t.shape[at] - 1), x.slot))


def _pick(c: Compiler, node: Node) -> Operand:
    return _element(c, node, node.args[0])


def _element(c: Compiler, pick: Node, item: Any) -> Operand:
    """One element along the plate of a pick.

    Of a pointwise call it is the call of one element of each argument, so that combinations of particles are made for that
    element alone.
    """
    plate, position = pick.name, pick.args[1]
    node = c.graph.nodes[item.id] if isinstance(item, Ref) else None
    if node is not None and _is_elementwise(c, node, plate):

        def of(leaf: Any) -> Operand:
            varies = isinstance(leaf, Ref) and plate in c.graph.nodes[leaf.id].plates
            return _element(c, pick, leaf) if varies else c.operand(leaf)

        operands = [of(Ref(i)) for i in node.operands()]
        return _pointwise(c, node, operands, of)._replace(edges=joint_edges(operands))
    x = c.whole(item, plate)
    _refuse_edges(pick, x)
    at = x.axes.index(plate)
    rest = tuple(a for a in x.axes if a != plate)
    return Operand(c.emit(lambda t: t.select(at, position), x.slot), rest, x.event_ndim, x.edges)


def _is_elementwise(c: Compiler, node: Node, plate: str) -> bool:
    """Whether a node is a pointwise call of values that vary over the plate itself, or over none of those it lies within."""
    known = node.op == "call" and node.name in operations.POINTWISE and c.rules == "all"
    if not known or node.name == "dropout" or node.id in c.replaced or hasattr(node.func, "lower"):
        return False
    inputs = [c.graph.nodes[i] for i in node.operands()]
    related = {*c.ancestors(plate), plate}
    return all(plate in n.plates or not related & set(n.plates) for n in inputs)


def _shift(c: Compiler, node: Node) -> Operand:
    plate, k = node.name, node.args[1]
    x = c.whole(node.args[0], plate)
    at = x.axes.index(plate)
    before = {p: (s, e) for p, s, e in x.edges}.get(plate, (0, 0))
    start, end = max(before[0] - k, 0), max(before[1] + k, 0)
    slot = c.emit(lambda t: t.roll(-k, at), x.slot)
    others = tuple(e for e in x.edges if e[0] != plate)
    out = Operand(slot, x.axes, x.event_ndim)
    if c.along == plate:
        out, start = _cut(c, out), max(start - 1, 0)
    lost = ((plate, start, end),) if start or end else ()
    return out._replace(edges=(*others, *lost))


def _collect(c: Compiler, node: Node) -> Operand:
    """Plate axes move behind all others, in front of the event, in the order of the node's name."""
    x, plates = c.operand(node.args[0]), node.name.split(",")
    rest = tuple(a for a in x.axes if a not in plates)
    order = [x.axes.index(a) for a in (*rest, *plates)]
    order += [len(x.axes) + i for i in range(x.event_ndim)]
    slot = c.emit(lambda t: t.permute(order), x.slot)
    return Operand(slot, rest, len(plates) + x.event_ndim, x.edges)


def _refuse_edges(node: Node, x: Operand) -> None:
    if any(plate == node.name for plate, _, _ in x.edges):
        raise UnsupportedError(
            f"{node.where}: an element of a value shifted along plate '{node.name}' is looked up, "
            "and elements at the edge have none. Look up first, or shift the index."
        )


_OPS: Mapping[str, Callable[[Compiler, Node], Operand]] = {
    "call": _call,
    "item": _item,
    "gather": _gather,
    "reduce": _reduce,
    "dot": _dot,
    "pick": _pick,
    "shift": _shift,
    "collect": _collect,
}
_REDUCTIONS: Mapping[str, Callable[..., Tensor]] = {
    "sum": torch.sum,
    "mean": torch.mean,
    "logsumexp": torch.logsumexp,
}


# ---- plain functions -----------------------------------------------------------------------------


def _narrowed(at: int, keep: tuple[int, int], x: Tensor) -> Tensor:
    return x.narrow(at, keep[0], x.shape[at] - keep[0] - keep[1])


def _segment(kind: str, at: int, size: int, x: Tensor, members: Tensor) -> Tensor:
    shape = list(x.shape)
    shape[at] = size
    if kind == "logsumexp":
        index = members.reshape([-1 if i == at else 1 for i in range(x.ndim)]).expand_as(x)
        top = torch.full(shape, -torch.inf, dtype=x.dtype, device=x.device)
        top = top.scatter_reduce(at, index, x, "amax")
        safe = torch.where(top.isfinite(), top, 0.0)
        total = torch.zeros(shape, dtype=x.dtype, device=x.device)
        shifted = (x - safe.index_select(at, members)).exp()
        return total.index_add(at, members, shifted).log() + safe
    total = torch.zeros(shape, dtype=x.dtype, device=x.device).index_add(at, members, x)
    if kind == "mean":
        count = torch.bincount(members, minlength=size).clamp(min=1).to(x.dtype)
        total = total / count.reshape([-1 if i == at else 1 for i in range(x.ndim)])
    return total


def _flat(args: Sequence[Any]) -> list[Any]:
    return list(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list)) else list(args)


def _caller(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """A function of the operands alone; constants are closed over."""
    if not kwargs and all(isinstance(a, Ref) for a in args):
        if [a.id for a in args] == list(range(len(args))):
            return func
    plain = len(args) == 2 and not isinstance(args[1], (Ref, tuple, list, slice, Mapping))
    if not kwargs and plain and isinstance(args[0], Ref):
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
            f"torch.{node.name} ({node.where}) cannot be evaluated for many elements at once: "
            f"{error}. Write it with other torch functions, or compute it outside the model and "
            "pass it as data."
        ) from None


__all__ = ["compile_node"]
